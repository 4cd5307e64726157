# %% [markdown]
"""
# Post-training INT8 quantization of a cat/dog CNN

    pip install -r requirements.txt && python quantize_catdog.py        # Python 3.11 or later

This script converts a trained FP32 network to 8-bit integers without training it again. It runs the
network on some pictures and records the *range* of each layer's output, its largest magnitude. From
the ranges it calculates scales, rounds weights and biases to integers, and computes on integers.

    step        what it does                                          output
    pictures    list them; each is decoded when it is first needed    uint8  (N, 3, 224, 224)
    load        read the checkpoint without executing anything in it  FP32   weights, batch norms
    fold        each batch norm into the convolution before it        FP32   weights, biases
    calibrate   run in FP32, observe the range of each activation     FP32   logits (N, 2), ranges
    quantize    scale = largest integer / range; round so that the    int8   weights
                outputs stay close to FP32                            int32  biases
    verify      check this CPU's INT8 kernels against exact results   which layers use them
    evaluate    layer by layer: integer products, int32 sums, rescale FP32   logits (N, 2)
    compare     which answers changed, and could it be chance?        a summary
    save        the INT8 network and the report                       results/

The run at the end of the file has these steps in this order. After the constants, four sections
explain quantization itself, from "Arithmetic" to "Closer to FP32"; the rest is what a run needs
around them. Edit a constant in the file, or set it for one run on the command line, by a preset or
NAME=value; --help lists them. tools/runs.py then compares the runs, and tools/explain.py shows why
answers changed.

    python quantize_catdog.py plain GPTQ=True

The script is also a notebook: Jupytext turns what follows each `# %%` into a cell. It keeps the
names of the PyTorch notebook that it was ported from, "the notebook" below.
"""

# %%
import ast
import copy
import difflib
import io
import json
import math
import os
import re
import sys
import tempfile
import threading
import time
import warnings
import zipfile
import zlib
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from typing import NamedTuple

if __name__ == "__main__":      # libraries read these when they are imported
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "10000")    # idle threads soon sleep
    os.environ.setdefault("PILLOW_BLOCK_SIZE", "64m")       # large blocks go back to the system

import numpy as np
import PIL
import torch
import torch.nn as nn
import torch.nn.functional as F
import torchnet.meter as tnt
from PIL import ExifTags, Image, PngImagePlugin
from torch.utils.data import DataLoader, Dataset

# %% [markdown]
# ## Constants
# Edit one and run again: the whole file, or in a notebook this cell and those below it. Relative
# paths start at this file's folder, and `~` is the home folder.

# %%
# what to run, and on what
DATA_DIR = "cat_dog"                    # folder that holds the splits
CALIBRATION_SPLIT = "train"             # folder in it whose pictures set the ranges
EVALUATION_SPLIT = "val"                # folder in it whose pictures measure the accuracy
CHECKPOINT = "BEST_checkpoint.pth.tar"  # FP32 weights: {"model": state_dict}
OUTPUT_DIR = "results"                  # folder for the INT8 network and the reports
BATCH_SIZE = 5                          # affects speed, memory and, on some CPUs, last digits
NUM_WORKERS = min(os.cpu_count() or 1, 16)      # threads that decode pictures
DEVICE = "auto"                         # "cpu", "cuda", or "auto": a GPU if there is one
INT8_ENGINE = "auto"                    # "reference": exact sums; "auto": kernels if as exact
# the recipe, which decides the integers; in "A, or B" below, True is A and False is B
IMAGE_SIZE = (224, 224)                 # width and height; fc1 fits 212 to 227
BIT = 8                                 # bits of an activation
WEIGHT_BIT = 8                          # bits of a weight; fewer: a smaller file, less exact
LAYER_BITS = {}                         # weight bits of single layers, such as {"fc1": 4}
PER_CHANNEL = True                      # one weight scale per output channel, or one per layer
UNSIGNED_RELU = True                    # pixels and ReLU outputs use 0..255, or only 0..127
BIAS_BIT = 32                           # bits of a bias
QUANTIZE_LOGITS = False                 # round the logits to BIT bits too, or leave them FP32
HEADROOM = 2                            # factor on the ranges of the inputs of fc1 and fc2
EQUALIZE = True                         # scale weak channels up, so that they use more integers
GPTQ = True                             # round weights of convolutions so that errors cancel
BIAS_CORRECTION = True                  # shift biases by the mean error in calibration

# %% [markdown]
# A preset is a set of changes to this recipe: `plain` leaves out the four methods of "Closer to
# FP32", `notebook` computes as the notebook does. LEGAL says which values are legal, wherever they
# come from: this file, the command line or a checkpoint.

# %%
PRESETS = {"plain": {"HEADROOM": 1, "EQUALIZE": False, "GPTQ": False, "BIAS_CORRECTION": False}}
PRESETS["notebook"] = PRESETS["plain"] | {
    "PER_CHANNEL": False, "UNSIGNED_RELU": False, "BIAS_BIT": 16, "QUANTIZE_LOGITS": True}

# each of these is, or returns, a rule: (the legal values in words, a test of a value)
def whole(low, high):
    return (f"a whole number from {low} to {high}",
            lambda value: type(value) is int and low <= value <= high)

def one_of(*choices):       # compared by repr: 1 == True, but 1 is not legal
    return " or ".join(map(repr, choices)), lambda value: repr(value) in map(repr, choices)

def is_image_size(value):
    return type(value) is tuple and len(value) == 2 and all(map(whole(212, 227)[1], value))

def is_layer_bits(value):       # LAYERS is defined below
    names, is_bits = [layer.name for layer in LAYERS], whole(2, 8)[1]
    return type(value) is dict and all(
        name in names and is_bits(bit) for name, bit in value.items())

BOOL = one_of(True, False)
STRING = "a string", lambda value: type(value) is str and value.strip() != ""
LEGAL_RECIPE = {
    "IMAGE_SIZE": ("(width, height), each a whole number from 212 to 227", is_image_size),
    "BIT": whole(2, 8), "WEIGHT_BIT": whole(2, 8),
    "LAYER_BITS": ('bits from 2 to 8 of layers, such as {"fc1": 4}', is_layer_bits),
    "PER_CHANNEL": BOOL, "UNSIGNED_RELU": BOOL, "BIAS_BIT": whole(2, 32), "QUANTIZE_LOGITS": BOOL,
    "HEADROOM": ("a number from 1 to 16",
                 lambda value: type(value) in (int, float) and 1 <= value <= 16),
    "EQUALIZE": BOOL, "GPTQ": BOOL, "BIAS_CORRECTION": BOOL}
LEGAL = {
    "DATA_DIR": STRING, "CALIBRATION_SPLIT": STRING, "EVALUATION_SPLIT": STRING,
    "CHECKPOINT": STRING, "OUTPUT_DIR": STRING, "BATCH_SIZE": whole(1, 4096),
    "NUM_WORKERS": whole(1, 256), "DEVICE": one_of("auto", "cpu", "cuda"),
    "INT8_ENGINE": one_of("auto", "reference")} | LEGAL_RECIPE

def printable(text):
    """A text, such as a file's name, with its unprintable characters escaped."""
    return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in text)

class InputError(Exception):
    """Bad input: one line that says what is wrong, where, and what to do. It ends a run."""

    def __str__(self):
        return printable(" ".join(super().__str__().split()))

    def _render_traceback_(self):       # what Jupyter shows beneath the cell
        return [f"InputError: {self}"]

def check_legal(constants, names):
    """Raise InputError unless {constant: value} has exactly these names, with legal values."""
    for name in constants | dict.fromkeys(names):
        if name not in names:
            known = {each.upper(): each for each in [*names, *PRESETS]}
            near = difflib.get_close_matches(str(name).upper(), known, 1)
            hint = f"did you mean {known[near[0]]}?" if near else "--help and LEGAL list them"
            raise InputError(f"{name}: no constant of this name, {hint}")
        words, is_legal = LEGAL[name]
        if name not in constants:
            raise InputError(f"{name} is missing: set it to {words}")
        if not is_legal(constants[name]):
            raise InputError(f"{name} = {constants[name]!r}: set it to {words}")

# %% [markdown]
# ## Arithmetic
# A real number x is stored as the integer q for which q / scale is nearest to x. (torch's own
# quantizers call 1 / scale the scale.) The scale maps the *range*, the largest magnitude seen, to
# the largest integer. The integer 0 always stands for 0.0; other schemes may use another one, the
# *zero point*.

# %%
SMALLEST = 1e-12    # smaller ranges count as this: the scale of an all-zero layer stays finite

class IntRange(NamedTuple):
    low: int
    high: int
    dtype: torch.dtype

def int_range(bit, unsigned=False):
    """With 8 bits: -127..127 (symmetric: no -128), or 0..255 for what is never negative."""
    if unsigned:
        return IntRange(0, 2**bit - 1, torch.uint8)
    largest = 2**(bit - 1) - 1
    return IntRange(-largest, largest, torch.int8)

def scale_of(largest_integer, range_data):
    """The FP32 scale that maps range_data, the largest magnitude seen, to the largest integer."""
    return largest_integer / range_data.clamp(min=SMALLEST)

def broadcast(values, dims):
    """(out,) -> (out, 1, ...), with `dims` axes of length 1 for those after the channels' axis."""
    return values.reshape(-1, *[1] * dims)

def quantize(x, scale, integers):
    """q = clip(round(x * scale), low, high), in the type of `integers`, an IntRange.

    >>> quantize(torch.tensor([0.1, -0.5, 2.0]), 127, int_range(8))
    tensor([ 13, -64, 127], dtype=torch.int8)
    """
    q = (x * scale).round_().clip_(integers.low, integers.high)
    return q.to(integers.dtype)

def requantize(sums, multiplier, offset, integers):
    """Sums of products -> integers at the output's scale: q = clip(round(sums * M + offset)).

    A sum is the real result times in_scale * w_scale. The multiplier M = out_scale / (in_scale *
    w_scale) makes it the real result times out_scale; offset = the int32 bias * M. With
    `integers.low` = 0 the clipping is the ReLU. sums * M and the total are each rounded to FP32.

    >>> requantize(torch.tensor([1000.0, -500.0]), 0.01, 1.0, int_range(8, unsigned=True))
    tensor([11,  0], dtype=torch.uint8)
    """
    q = (sums * multiplier).add_(offset).round_().clip_(integers.low, integers.high)
    return q.to(integers.dtype)

def fusion_conv_bn(conv, bn):
    """Weight and bias of the one convolution that equals a convolution and its batch norm.

    bn(y) = (y - mean) * g + beta with g = gamma / sqrt(var + eps), hence W' = W * g and
    b' = b * g + (beta - mean * g) (Jacob et al. 2018, arXiv:1712.05877, section 3.2).

    >>> conv, bn = nn.Conv2d(1, 1, 1), nn.BatchNorm2d(1, eps=0)
    >>> for tensor, value in [(conv.weight, 2), (conv.bias, 1), (bn.running_mean, 1),
    ...                       (bn.running_var, 4), (bn.weight, 3), (bn.bias, 5)]:
    ...     _ = tensor.detach().fill_(value)
    >>> [tensor.item() for tensor in fusion_conv_bn(conv, bn)]          # g = 3 / sqrt(4)
    [3.0, 5.0]
    """
    g = bn.weight / torch.sqrt(bn.running_var + bn.eps)
    return conv.weight * broadcast(g, 3), conv.bias * g + (bn.bias - bn.running_mean * g)

def clip_bias(bias, recipe):
    """Whole FP64 numbers -> int32, clipped to BIAS_BIT bits. (FP32 cannot hold 2^31 - 1.)"""
    largest = 2**(recipe["BIAS_BIT"] - 1) - 1
    return bias.clip(-largest, largest).to(torch.int32)

def weight_quant(w, b, in_scale, bit, recipe):
    """FP32 weight (out, ...), bias (out,) -> int8 weight, int32 bias, weight scale (out,) or (1,).

    bit: bits of the weight. A bias is added to sums of inputs times weights, so it has their
    scale, in_scale * w_scale.

    >>> w, b = torch.tensor([[0.5, -1.0]]), torch.tensor([0.1])
    >>> weight_quant(w, b, 2, 8, {"PER_CHANNEL": True, "BIAS_BIT": 32})     # b * 2 * 127 = 25.4
    (tensor([[  64, -127]], dtype=torch.int8), tensor([25], dtype=torch.int32), tensor([127.]))
    """
    integers = int_range(bit)
    rows = w.flatten(1) if recipe["PER_CHANNEL"] else w.reshape(1, -1)      # one row per scale
    w_scale = scale_of(integers.high, rows.abs().amax(1))
    # Tiny weights get a huge scale, at which the bias may be too large for its bits. With 32 bits
    # the scale is limited so that |bias| <= 2^30, and the rest of int32 is left for the products;
    # with fewer the bias is clipped, as in the notebook
    if recipe["BIAS_BIT"] == 32:
        largest_bias = b.reshape(len(rows), -1).abs().amax(1)
        w_scale = torch.minimum(w_scale, scale_of(2**30, largest_bias * in_scale))
    wq = quantize(w, broadcast(w_scale, w.dim() - 1), integers)
    bq = clip_bias(torch.round(b * (w_scale * in_scale)).double(), recipe)
    return wq, bq, w_scale

def layer_bit(recipe, layer):
    """Bits of a Layer's weights."""
    return recipe["LAYER_BITS"].get(layer.name, recipe["WEIGHT_BIT"])

# %% [markdown]
# ## The FP32 network and its observer
# Four blocks of convolution, batch norm, ReLU and pooling, then two fully connected layers. The
# *activations* are the tensors that are quantized: the input, each ReLU's output and each fully
# connected layer's output (the last one, the logits, only with QUANTIZE_LOGITS). An observer
# remembers the largest magnitude in each channel of an activation; the largest of these is its
# range, from which its scale is calculated. Names are the notebook's: `cnn1` is a convolution,
# `cv1` the output of its ReLU, and `fc1` both a layer and its output.

# %%
CLASSES = ("cat", "dog")        # logit i is that of class i, and so is label i

class Layer(NamedTuple):
    name: str           # of the convolution or fully connected layer
    bn: str | None      # batch norm after a convolution; None: a fully connected layer
    output: str         # the activation that it computes, before pooling

    @property
    def input(self):
        """The activation that it reads, after pooling: the output of the layer before it."""
        return ACTIVATIONS[LAYERS.index(self)]

    @property
    def is_conv(self):
        return self.bn is not None

LAYERS = [
    Layer("cnn1", "bn1", "cv1"),
    Layer("cnn2", "bn2", "cv2"),
    Layer("cnn3", "bn3", "cv3"),
    Layer("cnn4", "bn4", "cv4"),
    Layer("fc1", None, "fc1"),      # no ReLU: the notebook's forward has none here
    Layer("fc2", None, "fc2"),
]
ACTIVATIONS = ["input", *[layer.output for layer in LAYERS]]    # layer i reads activation i
LOGITS = ACTIVATIONS[-1]
FC_INPUTS = [layer.input for layer in LAYERS if not layer.is_conv]

class Linear(nn.Linear):
    """Like torch's, but with one matrix product per picture.

    torch's adds in an order that depends on the number of pictures, which changes the last digits.
    """

    def forward(self, x):
        weight = self.weight.t().expand(len(x), -1, -1)
        return torch.bmm(x[:, None], weight)[:, 0] + self.bias

def maxpool(x):
    """2 x 2 maximum; an odd last row or column is dropped. (torch's is slower.)"""
    height, width = x.shape[2] // 2 * 2, x.shape[3] // 2 * 2
    x = torch.maximum(x[:, :, 0:height:2], x[:, :, 1:height:2])
    return torch.maximum(x[:, :, :, 0:width:2], x[:, :, :, 1:width:2])

# %% [markdown]
# `forward` passes every activation through `observe(name, data)`, which returns it: `no_observer`
# in evaluation, `update_range` in calibration.

# %%
def no_observer(name, data):
    return data

def largest_magnitudes(data):
    """(N, C, height, width) or (N, C) -> the largest |value| in each picture's channels, (N, C)."""
    if data.dim() == 2:
        return data.abs()
    # abs() would copy the data. Reducing one axis after the other is fast: channels are last in
    # memory (see `fused`), and little is left for the second reduction
    nhwc = data.permute(0, 2, 3, 1)
    return torch.maximum(nhwc.amax(1), -nhwc.amin(1)).amax(1)

class CNN_Model(nn.Module):
    """The notebook's network in FP32: pixels 0..255 (N, 3, 224, 224) -> logits (N, 2), cat, dog.

    ranges: {activation: largest magnitude of each channel, (C,)}, filled by `update_range`.
    """

    def __init__(self):
        super().__init__()
        self.cnn1 = nn.Conv2d(3, 16, kernel_size=5)
        self.bn1 = nn.BatchNorm2d(16)
        self.cnn2 = nn.Conv2d(16, 32, kernel_size=5)
        self.bn2 = nn.BatchNorm2d(32)
        self.cnn3 = nn.Conv2d(32, 16, kernel_size=3)
        self.bn3 = nn.BatchNorm2d(16)
        self.cnn4 = nn.Conv2d(16, 8, kernel_size=3)
        self.bn4 = nn.BatchNorm2d(8)
        self.fc1 = Linear(8 * 11 * 11, 512)
        self.fc2 = Linear(512, len(CLASSES))
        self.float()        # whatever torch's default dtype is
        self.ranges = {}

    @torch.autocast("cpu", enabled=False)  # never in 16 bits
    def forward(self, x, observe=no_observer):
        x = observe("input", x.float())                                 # (N, 3, 224, 224)
        x = maxpool(observe("cv1", F.relu_(self.bn1(self.cnn1(x)))))    # (N, 16, 110, 110)
        x = maxpool(observe("cv2", F.relu_(self.bn2(self.cnn2(x)))))    # (N, 32, 53, 53)
        x = maxpool(observe("cv3", F.relu_(self.bn3(self.cnn3(x)))))    # (N, 16, 25, 25)
        x = maxpool(observe("cv4", F.relu_(self.bn4(self.cnn4(x)))))    # (N, 8, 11, 11)
        x = observe("fc1", self.fc1(x.flatten(1)))                      # (N, 512), no ReLU
        return observe("fc2", self.fc2(x))                              # (N, 2)

    def reset_ranges(self):
        """Forget what was observed. The input's range is 255, however dark the pictures are."""
        self.ranges = {"input": torch.tensor([255.0], device=self.fc1.bias.device)}

    def update_range(self, name, data):
        """The observer: range = max(range, |data|)."""
        largest = largest_magnitudes(data).amax(0)
        self.ranges[name] = torch.maximum(self.ranges.get(name, largest), largest)
        return data

    @torch.no_grad()
    def fused(self):
        """A copy with its batch norms folded into the convolutions; same logits up to rounding."""
        model = copy.deepcopy(self)
        for layer in LAYERS:
            if layer.is_conv:
                conv = model.get_submodule(layer.name)
                weight, bias = fusion_conv_bn(conv, model.get_submodule(layer.bn))
                conv.weight.copy_(weight)
                conv.bias.copy_(bias)
                setattr(model, layer.bn, nn.Identity())
        return model.eval().to(memory_format=torch.channels_last)

    @torch.no_grad()
    def cl_scale(self, recipe):
        """Calculate the scales from the ranges, quantize the weights, return the INT8_Model.

        Raises InputError for an illegal recipe, and where a range overflows FP32.
        """
        if isinstance(self.bn1, nn.BatchNorm2d):
            raise InputError("fold the batch norms first: model.fused()")
        int8_model = INT8_Model(recipe).to(self.fc1.weight.device)
        for name, integers in int8_model.integers.items():
            range_data = self.ranges[name].amax()
            if name in FC_INPUTS:       # clipping costs most there (measured)
                range_data = range_data * recipe["HEADROOM"]
            if not range_data.isfinite():
                raise InputError(f"activation {name} overflows FP32: give a checkpoint with "
                                 "smaller weights")
            int8_model.scale(name).copy_(scale_of(integers.high, range_data))
        for layer in LAYERS:
            fp32_layer = self.get_submodule(layer.name)
            int8_layer = int8_model.get_submodule(layer.name)
            wq, bq, w_scale = weight_quant(
                fp32_layer.weight, fp32_layer.bias, int8_model.scale(layer.input),
                layer_bit(recipe, layer), recipe)
            int8_layer.weight.copy_(wq)
            int8_layer.bias.copy_(bq)
            int8_layer.w_scale.copy_(w_scale)
        return int8_model

def activations_of(model, pixels):
    """{activation: its values} of one forward pass through an FP32 or an INT8 network."""
    activations = {}
    def remember(name, data):
        activations[name] = data
        return data

    model(pixels, remember)
    return activations

# %% [markdown]
# ## The INT8 network
# The same layers on integers. A layer multiplies and adds integers; then one FP32 multiplication
# and addition, with factors per output channel, brings each sum to the scale of the next
# activation. There are two engines: the *reference*, exact sums that are written out here, and the
# *kernels*, torch's own INT8 functions, which are fast and normally give the same integers.

# %%
class INT8Layer(nn.Module):
    """One layer on integers: clip(round(sums * M + offset)); FP32 logits: sums * M + offset.

    Buffers: weight, int8 (out, ...); bias, int32 (out,); w_scale, FP32 (out,) or (1,). inputs,
    outputs: IntRange, or None for FP32 outputs. Call `prepare` before use, and again after a buffer
    has changed.

    The reference computes with floats that hold integers: FP32 holds every integer up to 2^24,
    FP64 up to 2^53. A GPU may compute a convolution by a transform that rounds (Winograd, FFT), so
    there the sums are computed in FP64 and rounded to integers.
    """

    def __init__(self, shape, scales, inputs, outputs):
        super().__init__()
        self.is_conv, self.inputs, self.outputs = len(shape) == 4, inputs, outputs
        self.register_buffer("weight", torch.zeros(shape, dtype=torch.int8))
        self.register_buffer("bias", torch.zeros(shape[0], dtype=torch.int32))
        self.register_buffer("w_scale", torch.ones(scales, dtype=torch.float32))

    def prepare(self, in_scale, out_scale, use_kernel=False):
        """Calculate what `forward` needs. out_scale is 1 where the outputs stay FP32."""
        self.sum_scale = (in_scale * self.w_scale).expand(len(self.bias))
        self.multiplier = (out_scale / self.sum_scale).contiguous()     # M
        self.offset = self.bias * self.multiplier
        is_cpu = self.bias.device.type == "cpu"
        self.fp32_is_exact = is_cpu and self.largest_sum().max().item() < 2**24
        self.float_weight = self.weight.to(torch.float32 if self.fp32_is_exact else torch.float64)
        self.kernel = self.pack_kernel() if use_kernel else None
        return self

    def largest_sum(self):
        """Bound on |sum + bias|, (out,): each input at its largest, each sign at its worst."""
        products = self.weight.long().abs().flatten(1).sum(1) * self.inputs.high
        return products + self.bias.long().abs()

    def forward(self, x):
        """x: integers (N, C, h, w) or (N, C)."""
        return self.reference(x) if self.kernel is None else self.run_kernel(x)

    def reference(self, x):
        return self.rescale(self.sums(x))

    @torch.autocast("cpu", enabled=False)
    def sums(self, x):
        """The exact sums of products, returned in FP32."""
        operation = F.conv2d if self.is_conv else F.linear
        sums = operation(x.to(self.float_weight.dtype), self.float_weight)
        return sums if self.fp32_is_exact else sums.round().float()

    def rescale(self, sums):
        """The reference's outputs, computed from these sums."""
        multiplier = broadcast(self.multiplier, sums.dim() - 2)
        offset = broadcast(self.offset, sums.dim() - 2)
        if self.outputs is None:
            return sums * multiplier + offset
        return requantize(sums, multiplier, offset, self.outputs)

    def pack_kernel(self):
        """(torch's kernel for this layer, its arguments after x).

        It is given M as the scale of the weights, the offset as its bias, 1 as the scales of input
        and output, and 0 as each zero point. Its own rescaling is then that of `requantize`.
        """
        scale, zero_point, zero_points = 1.0, 0, torch.zeros_like(self.bias)
        if self.is_conv:
            operation, dtype = torch.ops.onednn.qconv2d_pointwise.default, torch.uint8
            geometry = [1, 1], [0, 0], [1, 1], 1        # stride, padding, dilation, groups
            packed = torch.ops.onednn.qconv_prepack(
                self.weight, self.multiplier, scale, zero_point, *geometry)
        else:
            operation, dtype = torch.ops.onednn.qlinear_pointwise.default, torch.int8
            geometry, packed = (), torch.ops.onednn.qlinear_prepack(self.weight, None)
        dtype = torch.float32 if self.outputs is None else dtype
        relu = "relu" if self.outputs is not None and self.outputs.low == 0 else "none"
        relu_scalars, relu_algorithm = [], ""   # unused by ReLU
        inputs, weights = (scale, zero_point), (packed, self.multiplier, zero_points, self.offset)
        outputs = scale, zero_point, dtype, relu, relu_scalars, relu_algorithm
        return operation, (*inputs, *weights, *geometry, *outputs)

    def run_kernel(self, x):
        """The kernel's outputs. Raises RuntimeError where torch has none for this input."""
        operation, arguments = self.kernel
        # a convolution's kernel takes uint8; int8 inputs are never negative there: the same bytes
        y = operation(x.view(torch.uint8) if self.is_conv else x, *arguments)
        # the kernel clips at 0..255 or -128..127; narrower ranges, such as -127..127, follow here
        if self.outputs is None or self.outputs.high == 255:
            return y
        return y.clip_(self.outputs.low, self.outputs.high).view(self.outputs.dtype)

    def __getstate__(self):
        """Copies and pickles have no kernel: they may be used on another CPU."""
        return {**super().__getstate__(), "kernel": None}

# %% [markdown]
# The network is six of these layers, with a scale for each activation.

# %%
CHOOSING = threading.Lock()     # one thread at a time chooses engines

class INT8_Model(nn.Module):
    """The quantized network: uint8 pixels (N, 3, height, width) -> FP32 logits (N, 2).

    recipe: {constant: value} for each name in LEGAL_RECIPE. Buffers: scale_<activation> (FP32, one
    value) and those of the layers; `CNN_Model.cl_scale` or a checkpoint fills them in. After
    changing one, call `prepare` or `choose_engines`. Raises InputError for an illegal recipe.
    """

    def __init__(self, recipe):
        super().__init__()
        check_legal(recipe, LEGAL_RECIPE)
        self.recipe, self.is_prepared = copy.deepcopy(recipe), False
        # {activation: IntRange}; pixels and ReLU outputs have 0..255, or 0..127 in int8
        signed = int_range(recipe["BIT"])
        positive = int_range(recipe["BIT"], recipe["UNSIGNED_RELU"])._replace(low=0)
        self.integers = {"input": positive} | {
            layer.output: positive if layer.is_conv else signed for layer in LAYERS}
        for name in ACTIVATIONS:
            self.register_buffer(f"scale_{name}", torch.tensor(1, dtype=torch.float32))
        fp32_model = CNN_Model()                # for its shapes
        for layer in LAYERS:
            shape = fp32_model.get_submodule(layer.name).weight.shape
            scales = shape[0] if recipe["PER_CHANNEL"] else 1
            outputs = None if self.is_fp32(layer.output) else self.integers[layer.output]
            self.add_module(layer.name,
                            INT8Layer(shape, scales, self.integers[layer.input], outputs))

    def prepare(self, kernels=()):
        """Prepare all layers: those named use their kernels, the others the reference."""
        for layer in LAYERS:
            self.prepare_layer(layer, layer.name in kernels)
        self.is_prepared = True
        return self

    def prepare_layer(self, layer, use_kernel=False):
        """Prepare the INT8Layer of a Layer, and return it."""
        out_scale = 1 if self.is_fp32(layer.output) else self.scale(layer.output)
        module = self.get_submodule(layer.name)
        return module.prepare(self.scale(layer.input), out_scale, use_kernel)

    def __getstate__(self):
        """Copies and pickles choose their engines anew."""
        return {**super().__getstate__(), "is_prepared": False}

    def forward(self, x, observe=no_observer):
        """`CNN_Model.forward` on integers. Chooses the engines first if nothing is prepared."""
        x = observe("input", self.quantize_pixels(x))   # (N, 3, 224, 224)
        with CHOOSING:
            if not self.is_prepared:
                choose_engines(self)
        x = maxpool(observe("cv1", self.cnn1(x)))       # (N, 16, 110, 110), ReLU by clipping at 0
        x = maxpool(observe("cv2", self.cnn2(x)))       # (N, 32, 53, 53)
        x = maxpool(observe("cv3", self.cnn3(x)))       # (N, 16, 25, 25)
        x = maxpool(observe("cv4", self.cnn4(x)))       # (N, 8, 11, 11)
        x = observe("fc1", self.fc1(x.flatten(1)))      # (N, 512)
        x = observe("fc2", self.fc2(x))                 # (N, 2)
        return x if self.is_fp32(LOGITS) else x / self.scale(LOGITS)

    def quantize_pixels(self, x):
        """Pixels -> the integers of the input; at scale 1 the pixels are these integers."""
        width, height = self.recipe["IMAGE_SIZE"]
        if x.dtype != torch.uint8 or x.shape[1:] != (3, height, width):
            raise InputError(f"pixels are {x.dtype} {tuple(x.shape)}: give uint8 from 0 to 255 of "
                             f"shape (n, 3, {height}, {width})")
        integers = self.integers["input"]
        if integers.high == 255 and self.scale_input.item() == 1:
            return x
        return quantize(x, self.scale_input, integers)

    def scale(self, name):
        """The scale of an activation's integers, FP32, one value."""
        return self.get_buffer(f"scale_{name}")

    def is_fp32(self, name):
        """Whether an activation stays FP32: the logits, unless they are quantized too."""
        return name == LOGITS and not self.recipe["QUANTIZE_LOGITS"]

    @torch.inference_mode()
    def predict(self, picture):
        """A picture, as `decode` takes it -> ("cat" or "dog", [cat's logit, dog's logit]).

        Raises InputError, with the picture's name, where it cannot be decoded.
        """
        try:
            pixels = torch.from_numpy(decode(picture, self.recipe["IMAGE_SIZE"]))
        except InputError as error:
            name = picture if isinstance(picture, (str, Path)) else "the picture"
            raise InputError(f"{name} {error}") from None
        logits = self(pixels.permute(2, 0, 1)[None].to(self.scale_input.device))[0]
        return CLASSES[logits.argmax()], logits.tolist()

def next_input(layer, outputs):
    """What the next layer reads of a layer's outputs, as in `forward`: pooled, and flat for fc1."""
    if layer.is_conv:
        outputs = maxpool(outputs)
    return outputs.flatten(1) if layer.output == FC_INPUTS[0] else outputs

# %% [markdown]
# Which engine runs which layer, and a table that describes the quantized layers.

# %%
@torch.inference_mode()
def time_in_turns(functions, x, rounds):
    """{name: seconds of each round} of {name: function}, called alternately on x."""
    seconds = {name: [] for name in functions}
    for _ in range(rounds):
        for name, function in functions.items():
            start = time.perf_counter()
            function(x).cpu()           # .cpu() waits for a GPU
            seconds[name].append(time.perf_counter() - start)
    return seconds

def kernel_overflows(int8_layer):
    """Whether this CPU's INT8 kernel overflows with a layer's weights.

    Without VNNI instructions, x86 adds two products in 16 bits, which 2 * 255 * 127 overflows. The
    worst case is all inputs at their largest (products of opposite sign cannot overflow): there the
    kernel's sums, with M = 1 and no bias, are compared with the exact ones.
    """
    shape, inputs = int8_layer.weight.shape, int8_layer.inputs
    unscaled = INT8Layer(shape, 1, inputs, outputs=None).to(int8_layer.weight.device)
    unscaled.weight.copy_(int8_layer.weight)
    unscaled.prepare(in_scale=1, out_scale=1, use_kernel=True)
    size = (shape[1], 9, 9) if unscaled.is_conv else shape[1:]  # from 5 x 5 on, any will do
    x = torch.full((1, *size), inputs.high, dtype=inputs.dtype, device=unscaled.weight.device)
    return bool((unscaled.reference(x) != unscaled.run_kernel(x)).any())

def judge_kernel(int8_model, layer, x, expected):
    """(whether a layer should use its kernel, why, how many outputs differ or None).

    x: the integers that the layer reads; expected: the reference's outputs.
    """
    if INT8_ENGINE == "reference":
        return False, 'INT8_ENGINE = "reference"', None
    try:
        int8_layer = int8_model.prepare_layer(layer, use_kernel=True)
        different = int((int8_layer.run_kernel(x) != expected).sum())
        overflows = kernel_overflows(int8_layer)
    except (AttributeError, RuntimeError):
        return False, "torch has no kernel for it here", None
    if overflows:
        why = "the kernel can overflow on this CPU (no VNNI); WEIGHT_BIT = 7 avoids it"
        return False, why, different
    if different:
        return False, "the kernel gives other integers here", different
    seconds = time_in_turns({"kernel": int8_layer.run_kernel, "reference": int8_layer.reference},
                            x[:BATCH_SIZE], rounds=5)
    if min(seconds["kernel"]) > min(seconds["reference"]):
        return False, "exact, and faster here than the kernel", 0
    return True, "exact, and faster here than the reference", 0

@torch.inference_mode()
def choose_engines(int8_model, pixels=None):
    """Prepare a model with an engine for each layer; return a row per layer that says why.

    pixels: uint8 (n, 3, h, w) on which the engines are compared, by default noise.
    """
    if pixels is None:
        width, height = int8_model.recipe["IMAGE_SIZE"]
        noise = np.random.default_rng(0).integers(0, 256, (2, 3, height, width), np.uint8)
        pixels = torch.from_numpy(noise).to(int8_model.scale_input.device)
    x, rows = int8_model.quantize_pixels(pixels), []
    for layer in LAYERS:
        expected = int8_model.prepare_layer(layer).reference(x)
        use_kernel, why, different = judge_kernel(int8_model, layer, x, expected)
        compared = 0 if different is None else expected.numel()
        rows.append({"layer": layer.name, "compared": compared, "different": different or 0,
                     "engine": "kernel" if use_kernel else "reference", "why": why})
        x = next_input(layer, expected)
    int8_model.prepare([row["layer"] for row in rows if row["engine"] == "kernel"])
    return rows

def layer_table(int8_model):
    """A row per quantized layer, {heading: value}."""
    rows = []
    for layer in LAYERS:
        int8_layer, out_scale = int8_model.get_submodule(layer.name), int8_model.scale(layer.output)
        rows.append({
            "layer": layer.name,
            "weight shape": "x".join(map(str, int8_layer.weight.shape)),
            "output range": int8_model.integers[layer.output].high / out_scale.item(),
            "scale in": int8_model.scale(layer.input).item(),
            "scale out": "FP32" if int8_model.is_fp32(layer.output) else out_scale.item(),
            "smallest weight scale": int8_layer.w_scale.min().item(),
            "largest weight scale": int8_layer.w_scale.max().item(),
            "bits of sum": int(int8_layer.largest_sum().max()).bit_length()})
    return rows

# %% [markdown]
# ## Closer to FP32
# Rounding each weight to the nearest integer is not the best use of integers. Four methods come
# closer with the same INT8 arithmetic, and none needs a label. Headroom, in `cl_scale`, leaves room
# for pictures that exceed the ranges seen in calibration; the others are below.

# %%
LARGEST_FACTOR = 4      # of equalization: a channel silent in calibration may not stay silent
DAMPING = 0.01          # GPTQ's, as a share of the Hessian's mean diagonal, as in the paper
GPTQ_STRIDE = 6         # GPTQ needs only every sixth row and column: neighbouring patches are alike
SAMPLE = 20             # pictures for GPTQ and bias correction, and for the checks of the run
CHUNK = 5               # of these per forward pass: few enough for activations to stay in the cache

@torch.no_grad()
def equalize(folded):
    """A copy of a folded network with weak channels scaled up, and {activation: factors (C,)}.

    All channels of an activation share one scale, set by the strongest, so weak ones use few of the
    integers. ReLU and pooling commute with a positive factor s: multiply by s in the layer that
    writes the channel and divide by s in the layer that reads it, and the logits stay the same.
    s = sqrt(largest range / the channel's range) goes half-way on a log scale, which leaves weak
    channels room for values that calibration did not see. A variant of Nagel et al. 2019,
    arXiv:1906.04721, section 4.1, who equalize the ranges of weights.
    """
    model, found = copy.deepcopy(folded), {}
    for writer, reader in zip(LAYERS, LAYERS[1:]):
        written = model.get_submodule(writer.name)
        read_weight = model.get_submodule(reader.name).weight
        ranges = model.ranges[writer.output]
        largest = ranges.amax().clamp(min=SMALLEST)
        weakest = largest / LARGEST_FACTOR**2       # smaller ranges count as this
        factors = (largest / torch.maximum(ranges, weakest)).sqrt()
        written.weight *= broadcast(factors, written.weight.dim() - 1)
        written.bias *= factors
        model.ranges[writer.output] = ranges * factors
        # (out, in, ...) -> (out, channels, values per channel, ...): fc1 reads 11 x 11 per channel
        by_channel = read_weight.unflatten(1, (len(factors), -1))
        by_channel.div_(broadcast(factors, by_channel.dim() - 2))           # a view of read_weight
        found[writer.output] = factors
    return model, found

def gptq(weight, w_scale, hessian, integers):
    """Round FP64 weights (out, K), one input after the other; later ones make up for each error.

    An output is the sum of K products of a weight and an input. Two inputs that are nearly always
    alike can share an error: one weight is rounded up, the other down. hessian (K, K) says how
    alike they are: entry i, j is the sum of x_i x_j over patches of calibration pictures (half the
    second derivative of the squared output error). w_scale: (out,). Returns integers (out, K) of
    the IntRange `integers` (Frantar et al. 2022, arXiv:2210.17323, algorithm 1).
    """
    # inputs that are always 0, or always alike, would make the Hessian singular
    damping = DAMPING * hessian.diagonal().mean() + SMALLEST
    inverse = torch.linalg.inv(hessian + damping * torch.eye(len(hessian)).to(hessian))
    # Let G be the inverse of the Hessian of the weights k, k + 1, ... alone. Once weight k is
    # rounded, the best change of these weights is -error * G[0] / G[0, 0]. Row k of the Cholesky
    # factor below is G[0] up to a factor that cancels (step 3 of the paper)
    upper = torch.linalg.cholesky(inverse, upper=True)
    weight = weight.t().clone(memory_format=torch.contiguous_format)        # (K, out)
    rounded = torch.zeros_like(weight, dtype=integers.dtype)
    for k in range(len(weight)):
        rounded[k] = quantize(weight[k], w_scale, integers)
        error = weight[k] - rounded[k] / w_scale
        weight[k:] -= torch.outer(upper[k, k:], error / upper[k, k])
    return rounded.t()

@torch.autocast("cpu", enabled=False)
def gptq_conv(conv, w_scale, inputs, integers):
    """A convolution's weight rounded by `gptq`. inputs: integers it reads, chunks (n, C, h, w)."""
    hessian = 0
    for x in inputs:
        patches = F.unfold(x.float(), conv.kernel_size, stride=GPTQ_STRIDE)     # (n, K, positions)
        hessian = hessian + torch.einsum("nkp,njp->kj", patches, patches)
    weight, w_scale = conv.weight.flatten(1), w_scale.expand(len(conv.weight))
    rounded = gptq(weight.double(), w_scale.double(), hessian.double(), integers)
    return rounded.reshape(conv.weight.shape)

def mean_error(expected, sums, bias, sum_scale):
    """FP32 minus INT8 output of a layer, mean over pictures and positions, in real units, (out,).

    expected, sums: chunks (n, out, ...) of FP32 outputs, and of INT8 sums before bias and ReLU;
    sum_scale: (out,).
    """
    errors = []
    for fp32, int8 in zip(expected, sums):
        int8 = int8 + broadcast(bias.float(), int8.dim() - 2)
        if int8.dim() == 4:         # a convolution
            fp32, int8 = fp32.flatten(2).mean(2), F.relu_(int8).flatten(2).mean(2)
        errors.append(fp32 - int8 / sum_scale)
    return torch.cat(errors).mean(0)

def refine_layer(int8_model, fp32_model, layer, inputs, expected):
    """Refine one layer as the recipe says. Returns what the next layer reads, in chunks.

    inputs: chunks of the integers that the layer reads; expected: chunks of its FP32 outputs.
    """
    recipe, int8_layer = int8_model.recipe, int8_model.get_submodule(layer.name)
    if recipe["GPTQ"] and layer.is_conv:    # SAMPLE pictures tell too little of fc1's 968 inputs
        integers = int_range(layer_bit(recipe, layer))
        conv = fp32_model.get_submodule(layer.name)
        int8_layer.weight.copy_(gptq_conv(conv, int8_layer.w_scale, inputs, integers))
    int8_model.prepare_layer(layer)             # with the rounded weight
    sums = [int8_layer.sums(x) for x in inputs]
    if recipe["BIAS_CORRECTION"]:
        error = mean_error(expected, sums, int8_layer.bias, int8_layer.sum_scale)
        error = error.nan_to_num(nan=0, posinf=0, neginf=0)     # a mean may overflow
        change = torch.round(error * int8_layer.sum_scale)
        int8_layer.bias.copy_(clip_bias(int8_layer.bias + change.double(), recipe))
        int8_model.prepare_layer(layer)         # with the corrected bias
    return [next_input(layer, int8_layer.rescale(x)) for x in sums]

@torch.no_grad()
def refine(int8_model, fp32_model, pixels):
    """Refine int8_model, layer by layer: round weights by GPTQ, correct biases, as the recipe says.

    fp32_model: the folded network that int8_model was quantized from; pixels: calibration
    pictures, uint8 (n, 3, h, w). Each layer reads the output of the already refined INT8 layers
    before it. Its bias is moved by the mean error of its output (Nagel et al. 2019, section 4.2).
    """
    chunks = pixels.split(CHUNK)
    fp32 = [activations_of(fp32_model, chunk) for chunk in chunks]
    inputs = [int8_model.quantize_pixels(chunk) for chunk in chunks]
    for layer in LAYERS:
        expected = [activations[layer.output] for activations in fp32]
        inputs = refine_layer(int8_model, fp32_model, layer, inputs, expected)

def quantize_network(folded, pixels, recipe):
    """A folded, calibrated network -> (the FP32 network that is quantized, its INT8_Model).

    The first is `folded`, or an equalized copy. pixels: calibration pictures, uint8 (n, 3, h, w).
    Raises InputError as `cl_scale` does.
    """
    if set(folded.ranges) != set(ACTIVATIONS):
        raise InputError("calibrate first: calibrate(folded, pictures) observes the ranges")
    check_legal(recipe, LEGAL_RECIPE)
    fp32_model = equalize(folded)[0] if recipe["EQUALIZE"] else folded
    int8_model = fp32_model.cl_scale(recipe)
    if recipe["GPTQ"] or recipe["BIAS_CORRECTION"]:
        refine(int8_model, fp32_model, pixels)
    return fp32_model, int8_model

# %% [markdown]
# ## Pictures
# A file is decoded to uint8 pixels, and its path tells the label: 0 for cat, 1 for dog. Files that
# cannot be used are left out and listed with the reason.

# %%
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF")  # not EPS: it runs programs
MOST_PIXELS = 2**26     # larger pictures are refused
LARGE_PIXELS = 2**24    # larger pictures are decoded one at a time, to save memory
LARGE_LOCK = threading.Lock()
TURN = Image.Transpose
# what makes a picture upright, by the orientation in its EXIF data
UPRIGHT = {2: TURN.FLIP_LEFT_RIGHT, 3: TURN.ROTATE_180, 4: TURN.FLIP_TOP_BOTTOM,
           5: TURN.TRANSPOSE, 6: TURN.ROTATE_270, 7: TURN.TRANSVERSE, 8: TURN.ROTATE_90}
KEEP_BYTES = 2**28      # decoded pictures kept for the next pass; the others are decoded again

def label_of(path):
    """Index in CLASSES of the class in a file's name, or else in that of its nearest folder."""
    for part in reversed(Path(path).parts):
        words = re.findall(r"[^\W\d_]+", part.casefold())
        named = [name for name in CLASSES if {name, f"{name}s"} & set(words)]
        if len(named) > 1:
            raise InputError(f"{part} says {' and '.join(named)}")
        if named:
            return CLASSES.index(named[0])
    raise InputError(f"its path says neither {' nor '.join(CLASSES)}")

def to_rgb(image):
    """A loaded Pillow picture of any mode as RGB, as a viewer shows it, upright, on white."""
    if image.format == "BMP" and image.mode == "RGBA" and not image.getchannel("A").getbbox():
        image = image.convert("RGB")            # alpha is 0 everywhere: an unused byte
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation)
    except Exception:       # EXIF data may hold anything; the pixels are fine
        orientation = None
    if orientation in UPRIGHT:
        image = image.transpose(UPRIGHT[orientation])
    if image.mode.startswith("I"):              # 16-bit grey (see decode): 65535 / 255 = 257
        grey = (np.asarray(image) / 257).clip(0, 255).round()
        image = Image.fromarray(grey.astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")

def decode(picture, size):
    """A picture -> uint8 (height, width, 3), RGB, of size (width, height).

    picture: a path, a file object or the bytes of a file in one of FORMATS; a Pillow picture; or an
    array, uint8 (h, w), (h, w, 3) or (h, w, 4). Resized with Pillow's default filter (bicubic), as
    in the notebook. Raises InputError, whose text follows the picture's name.
    """
    try:
        if isinstance(picture, np.ndarray):
            picture = Image.fromarray(picture)
        elif not isinstance(picture, Image.Image):
            file = io.BytesIO(picture) if isinstance(picture, bytes) else picture
            picture = Image.open(file, formats=FORMATS)
        count = picture.width * picture.height
        if not 0 < count <= MOST_PIXELS:
            raise InputError(f"has {count:,} pixels: from 1 to {MOST_PIXELS:,} are possible")
        # modes F and I have 32 bits, but a PPM uses 16 of them
        if picture.mode == "F" or (picture.mode == "I" and picture.format != "PPM"):
            raise InputError("has 32-bit pixels, and nothing says which value is white")
        with LARGE_LOCK if count > LARGE_PIXELS else nullcontext():
            picture.load()
            return np.array(to_rgb(picture).resize(size))
    except InputError:
        raise
    except Exception as error:      # decoders raise nearly every type on broken bytes
        raise InputError(f"cannot be decoded: {type(error).__name__}: {error}") from None

# %% [markdown]
# This class makes a folder of pictures a torch Dataset.

# %%
class CatDogDataset(Dataset):
    """The pictures below a folder: item i is (pixels uint8 (3, height, width), label).

    Ordered by the numbers in the path: cat.0, dog.0, cat.1, ..., so that the first few hold both
    classes. What cannot be decoded is left out of its batch; `skipped` says why. size: (width,
    height), IMAGE_SIZE unless given. Raises InputError where no picture is usable.
    """

    def __init__(self, folder, size=None):
        self.folder, self.size = Path(folder), size or IMAGE_SIZE
        self.files, self.labels = [], []
        self.skipped, self.kept = {}, {}        # {file: reason}, {file: pixels}
        def cannot_list(error):
            self.skipped[error.filename] = f"cannot be listed: {error.strerror}"

        found = []
        for parent, folders, names in os.walk(self.folder, onerror=cannot_list):
            folders[:] = [name for name in folders if name[0] not in ".@"]  # hidden, a NAS's
            found += [os.path.relpath(os.path.join(parent, name), self.folder) for name in names]
        found.sort(key=lambda file: ([int(number) for number in re.findall("[0-9]+", file)], file))
        for file in found:
            try:
                if not os.path.isfile(self.folder / file):  # reading a pipe would wait for ever
                    raise InputError("is not a file")
                self.labels.append(label_of(file))
                self.files.append(file)
            except InputError as error:
                self.skipped[file] = str(error)
        self.usable()   # raises InputError if no picture is usable

    def usable(self):
        """[(file, label)] of those not skipped so far; raises InputError where there is none."""
        usable = [pair for pair in zip(self.files, self.labels) if pair[0] not in self.skipped]
        if not usable:
            reasons = [f", e.g. {file}: {reason}" for file, reason in self.skipped.items()]
            raise InputError(f"no usable picture in {self.folder}{''.join(reasons[:1])}: put "
                             "cat.0.jpg, dog.0.jpg, ... there, or set DATA_DIR and the splits")
        return usable

    def __str__(self):
        counts = [f"{self.labels.count(i)} {name}" for i, name in enumerate(CLASSES)]
        return f"{display_path(self.folder)}: {len(self)} pictures, {', '.join(counts)}"

    def __len__(self):
        return len(self.files)

    def __getitem__(self, index):
        if items := self.__getitems__([index]):
            return items[0]
        raise InputError(f"{self.files[index]} {self.skipped[self.files[index]]}")

    def __getitems__(self, indices):
        """The items of a batch, for DataLoader: decoded in threads, without undecodable ones."""
        with ThreadPoolExecutor(NUM_WORKERS) as pool:       # Pillow releases the GIL
            decoded = pool.map(self.decode_file, [self.files[i] for i in indices])
            return [(torch.from_numpy(pixels).permute(2, 0, 1), self.labels[i])
                    for i, pixels in zip(indices, decoded) if pixels is not None]

    def decode_file(self, file):
        """A file's pixels, uint8 (height, width, 3); None where decoding fails, now or before."""
        if file in self.kept or file in self.skipped:
            return self.kept.get(file)          # None for a skipped file
        try:
            pixels = decode(self.folder / file, self.size)
        except InputError as error:
            self.skipped[file] = str(error)
            return None
        if len(self.kept) < KEEP_BYTES // pixels.nbytes:
            self.kept[file] = pixels
        return pixels

    def collate_fn(self, items):
        """Items -> pixels uint8 (n, 3, height, width), labels int64 (n,); n may be 0."""
        width, height = self.size
        # channels last in memory: the layout in which the networks are fastest
        pixels = torch.empty(len(items), height, width, 3, dtype=torch.uint8).permute(0, 3, 1, 2)
        for row, (picture, _) in zip(pixels, items):
            row.copy_(picture)
        return pixels, torch.tensor([label for _, label in items]).long()

    def first_pixels(self, count):
        """uint8 (n, 3, height, width) of the first usable pictures, at most `count`."""
        items = []
        for start in range(0, len(self), count):
            items += self.__getitems__(range(start, min(start + count, len(self))))
            if len(items) >= count:
                break
        self.usable()   # raises InputError if no picture is usable
        return self.collate_fn(items[:count])[0].to(device())

    def checksum(self):
        """CRC-32 of the labels and the bytes of the usable files, in order; not of their names."""
        crc = 0
        for file, label in self.usable():
            crc = zlib.crc32((self.folder / file).read_bytes(), crc + label)
        return crc

# %% [markdown]
# ## Checkpoints
# Nothing in a checkpoint is executed: torch's safe loader builds tensors and plain values, and
# refuses all else.

# %%
LARGEST_CHECKPOINT = 2**28      # bytes when unpacked: a hundred times what this network needs

def read_checkpoint(file):
    """(what a checkpoint holds, its name in errors). file: a path or a file object."""
    name = "checkpoint in memory" if isinstance(file, io.BytesIO) else f"checkpoint {file}"
    try:
        with zipfile.ZipFile(file) as archive:
            if sum(part.file_size for part in archive.infolist()) > LARGEST_CHECKPOINT:
                raise ValueError("too large when unpacked")
            if damaged := archive.testzip():            # checks CRCs, as torch.load does not
                raise ValueError(f"{damaged} is damaged")
        if hasattr(file, "seek"):
            file.seek(0)
        with warnings.catch_warnings(action="ignore"):
            return torch.load(file, map_location="cpu", weights_only=True), name
    except OSError as error:
        raise InputError(f"{name} cannot be read: {error.strerror}; set CHECKPOINT") from None
    except zipfile.BadZipFile:
        raise InputError(f"{name} is damaged, or was saved by torch before 1.6: save it "
                         "anew") from None
    except Exception as error:      # damaged bytes raise nearly every type
        # torch's message names what it refused, such as "Unsupported global: GLOBAL os.system"
        unsafe = re.search(r"(?:GLOBAL|global:?|class|function) ([\w.]+\.\w+)", str(error))
        said = f"{type(error).__name__}: {error}".split(". ")[0][:100]
        reason = f"it holds {unsafe[1]}" if unsafe else said
        raise InputError(f"{name} cannot be loaded safely ({reason}): save weights alone, or use "
                         "tools/convert_checkpoint.py, which reads more kinds") from None

def fill(model, values, name):
    """Load the tensors that a model needs; return the model on `device()`, ready; or InputError."""
    needed = {key: tensor for key, tensor in model.state_dict().items()
              if not key.endswith("num_batches_tracked")}
    for key, tensor in needed.items():
        found = values.get(key)
        if not (isinstance(found, torch.Tensor) and found.is_cpu and found.layout == torch.strided):
            held = ", ".join(map(str, values))[:60] or "no weights"
            raise InputError(f"{name}: {key} is missing, it holds {held}: "
                             "tools/convert_checkpoint.py reads more kinds")
        both_float = found.is_floating_point() and tensor.is_floating_point()
        if found.shape != tensor.shape or not (found.dtype == tensor.dtype or both_float):
            raise InputError(f"{name}: {key} is {found.dtype} {tuple(found.shape)}, not "
                             f"{tensor.dtype} {tuple(tensor.shape)}")
        if not found.float().isfinite().all():
            raise InputError(f"{name}: {key} is not finite in FP32")
    model.load_state_dict({key: values[key] for key in needed}, strict=False)
    return model.to(device()).eval().to(memory_format=torch.channels_last)

def load_checkpoint(file):
    """The CNN_Model of FP32 weights: a state_dict, alone or as {"model": state_dict}."""
    saved, name = read_checkpoint(file)
    held = saved if isinstance(saved, dict) else {}
    if "recipe" in held:
        raise InputError(f"{name} is the INT8 network of a run: set CHECKPOINT to FP32 weights, or "
                         "use load_int8_checkpoint in Python")
    values = held.get("model", held)
    return fill(CNN_Model(), values if isinstance(values, dict) else {}, name)

def int8_checkpoint(int8_model):
    """The bytes of an INT8 checkpoint: {"recipe": ..., "model": tensors}, compressed."""
    tensors = {name: tensor.cpu().contiguous() for name, tensor in int8_model.state_dict().items()}
    saved, compressed = io.BytesIO(), io.BytesIO()
    torch.save({"recipe": int8_model.recipe, "model": tensors}, saved)
    # copied without times, so that equal networks have equal bytes
    with zipfile.ZipFile(saved) as archive, zipfile.ZipFile(compressed, "w") as copied:
        for part in archive.namelist():
            copied.writestr(zipfile.ZipInfo(part), archive.read(part), zipfile.ZIP_DEFLATED)
    return compressed.getvalue()

def load_int8_checkpoint(file):
    """The INT8_Model that a run saved. file: a path or a file object. Raises InputError where its
    integers or scales are not those of its recipe."""
    saved, name = read_checkpoint(file)
    held = saved if isinstance(saved, dict) else {}
    recipe, values = held.get("recipe"), held.get("model")
    if not (isinstance(recipe, dict) and isinstance(values, dict)):
        raise InputError(f"{name} is not an INT8 network: give INT8_checkpoint.pth.tar of a run")
    try:
        int8_model = INT8_Model(recipe)
    except InputError as error:
        raise InputError(f"{name}: {error}") from None
    fill(int8_model, values, name)
    for layer in LAYERS:
        int8_layer, bit = int8_model.prepare_layer(layer), layer_bit(recipe, layer)
        in_range = (int8_layer.weight.long().abs() < 2**(bit - 1)).all()
        in_range &= (int8_layer.bias.long().abs() < 2**(recipe["BIAS_BIT"] - 1)).all()
        outputs = int8_layer.largest_sum() * int8_layer.multiplier
        if not (in_range and outputs.isfinite().all() and (int8_layer.multiplier > 0).all()):
            raise InputError(f"{name}: {layer.name} is not as its recipe says: quantize again")
    return int8_model

def write_files(folder, contents):
    """Write {name: bytes}, in this order, each file whole or not at all; or InputError."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as temporary:
            for name, content in contents.items():
                Path(temporary, name).write_bytes(content)
            for name in list(contents)[1:]:     # no old report may stand beside a new network
                (folder / name).unlink(missing_ok=True)
            for name in contents:
                os.replace(Path(temporary, name), folder / name)
    except OSError as error:
        raise InputError(f"cannot write in {folder}: {error}; set OUTPUT_DIR") from None

# %% [markdown]
# ## The passes
# Calibration and evaluation are the same pass over the pictures; calibration observes the ranges.

# %%
DECODED_TOGETHER = 64   # pictures decoded before the network runs; doing both at once is slower
TIMED_ROUNDS = 15       # the fastest counts, since other programs only slow a round down
ROUNDING = 1e-3         # largest change allowed to FP32's rounding, as a share of the largest logit

class Predictions(NamedTuple):
    """What a network answered for n pictures of a dataset."""
    pictures: CatDogDataset
    files: list             # n names
    labels: torch.Tensor    # int64 (n,)
    logits: torch.Tensor    # FP32 (n, classes)
    top1: float             # percent of the pictures whose class is their label

    @property
    def classes(self):
        """Index of the largest logit, int64 (n,); the first where two are equal."""
        return self.logits.argmax(1)

@torch.inference_mode()
def evaluate(name, model, pictures, observe=no_observer):
    """Run a model over a CatDogDataset and return its Predictions."""
    meter = tnt.ClassErrorMeter(topk=[1], accuracy=True)
    labels, logits, run_on = [], [], device()
    start = reported = time.perf_counter()
    decoded_together = BATCH_SIZE * math.ceil(DECODED_TOGETHER / BATCH_SIZE)
    loader = DataLoader(pictures, decoded_together, collate_fn=pictures.collate_fn)
    for decoded, their_labels in loader:
        if not len(decoded):        # none of these could be decoded
            continue
        for batch, batch_labels in zip(decoded.split(BATCH_SIZE), their_labels.split(BATCH_SIZE)):
            answers = model(batch.to(run_on), observe).cpu()
            meter.add(answers, batch_labels)
            logits += answers.tolist()      # tensors kept here would fragment the memory
        labels += their_labels.tolist()
        now = time.perf_counter()
        if now - reported >= 10:
            left = (now - start) / len(labels) * (len(pictures) - len(labels))
            print(f"{name}: {len(labels)} of {len(pictures)} pictures, {left:.0f} seconds left")
            reported = now
    files, top1 = [file for file, _ in pictures.usable()], float(meter.value()[0])
    print(f"{name} Top1: {top1:.3f}, {len(files)} of {len(pictures)} pictures of "
          f"{display_path(pictures.folder)}")
    logits = torch.tensor(logits, dtype=torch.float32)
    return Predictions(pictures, files, torch.tensor(labels), logits, top1)

def calibrate(folded, pictures):
    """The FP32 pass that observes the ranges of a folded network. Returns its Predictions."""
    folded.reset_ranges()
    return evaluate("FP32", folded, pictures, folded.update_range)

@torch.inference_mode()
def check_unchanged(step, model, other, pixels, tolerance):
    """Print and return the largest difference of two models' logits. Raises InputError if it is
    more than `tolerance`, a share of the largest logit."""
    expected = model(pixels)
    change, largest = (expected - other(pixels)).abs().max().item(), expected.abs().max().item()
    print(f"{step} changed a logit by at most {change:.3g}, on {len(pixels)} pictures")
    if not change <= tolerance * largest:       # NaN, too
        raise InputError(f"{step} changed a logit by {change:.3g}, where the largest is "
                         f"{largest:.3g}: give a checkpoint with other weights")
    return change

# %% [markdown]
# ## Comparison
# Which answers changed, by how much, and could it be chance?

# %%
LISTED = 20         # flips, and files left out, that the terminal lists
LOW_SQNR = 20       # dB of signal-to-quantization-noise ratio; below it answers change

def decibels(signal, noise):
    """Ratio of two energies in dB; None when there is no noise."""
    return 10 * math.log10(max(signal / noise, 1e-300)) if noise else None      # signal may be 0

def sqnr_db(signal, changed):
    """Signal-to-quantization-noise ratio in dB; None when there is no noise."""
    signal, changed = signal.double(), changed.double()
    return decibels(signal.square().sum().item(), (signal - changed).square().sum().item())

def wilson(correct, n):
    """95 % Wilson score interval of a share, in percent (Wilson 1927)."""
    share, z = correct / n, 1.959964        # z: 97.5 % quantile of the normal distribution
    middle = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return max(0, 100 * (middle - half)), min(100, 100 * (middle + half))

def mcnemar(corrected, broken):
    """Exact two-sided p-value of McNemar's test (1947): of the pictures that exactly one network
    gets right, the probability that a fair coin would divide them at least this unevenly."""
    either = corrected + broken
    tail = sum(math.comb(either, k) for k in range(min(corrected, broken) + 1))
    return min(1.0, 2 * tail / 2**either)

def accuracy_of(predictions):
    """Top-1 in percent, its interval, and confusion[label][answer], a count of pictures."""
    labels, classes, k = predictions.labels, predictions.classes, len(CLASSES)
    correct = int((classes == labels).sum())
    confusion = torch.bincount(k * labels + classes, minlength=k * k).reshape(k, k)
    return {"top1": predictions.top1, "correct": correct, "confusion": confusion.tolist(),
            "interval95": wilson(correct, len(labels))}

def compare(fp32, int8):
    """What changed between two Predictions on the same pictures: a dict of plain values."""
    if fp32.pictures is not int8.pictures or fp32.files != int8.files:
        raise InputError("FP32 and INT8 saw different pictures: run again from the constants on")
    if not (fp32.logits.isfinite().all() and int8.logits.isfinite().all()):
        raise InputError("logits overflow FP32: give a checkpoint with smaller weights")
    was_right, is_right = fp32.classes == fp32.labels, int8.classes == int8.labels
    corrected, broken = int((is_right & ~was_right).sum()), int((was_right & ~is_right).sum())
    flips = []
    for i in (fp32.classes != int8.classes).nonzero().flatten().tolist():
        effect = "corrected" if is_right[i] else "broken" if was_right[i] else "still wrong"
        highest, second = fp32.logits[i].topk(2).values.tolist()
        flips.append({"file": fp32.files[i], "label": CLASSES[fp32.labels[i]], "effect": effect,
                      "fp32_logits": fp32.logits[i].tolist(), "fp32_margin": highest - second,
                      "int8_logits": int8.logits[i].tolist()})
    return {"fp32": accuracy_of(fp32), "int8": accuracy_of(int8),
            "agreement": 1 - len(flips) / len(fp32.files),
            "logit_sqnr_db": sqnr_db(fp32.logits, int8.logits), "flips": flips,
            "mcnemar": {"corrected": corrected, "broken": broken, "p": mcnemar(corrected, broken)}}

def name_of(recipe):
    """INT8, or with fewer bits a name such as W4-8A8: 4 to 8 for weights, 8 for activations."""
    widths = sorted({layer_bit(recipe, layer) for layer in LAYERS})
    if widths == [8] and recipe["BIT"] == 8:
        return "INT8"
    weights = f"{widths[0]}-{widths[-1]}" if len(widths) > 1 else widths[0]
    return f"W{weights}A{recipe['BIT']}"

def shorten(name, width):
    """A file's name as it is printed, cut at the front where it is too long."""
    name = printable(name)
    return name if len(name) <= width else f"...{name[3 - width:]}"

def print_table(rows, width=80):
    """Print rows, {heading: value} each; a heading takes one line per word (split after _ too).

    Columns beyond `width` go into another block, which repeats the first column.
    """
    headings = {heading: heading.replace("_", "_ ").split() for heading in rows[0]}
    height = max(map(len, headings.values()))
    columns = []
    for heading, words in headings.items():
        values = [row[heading] for row in rows]
        cells = [format(value, {float: ".5g", int: ","}.get(type(value), "")) for value in values]
        texts = [""] * (height - len(words)) + words + cells
        columns.append([text.rjust(max(map(len, texts))) for text in texts])
    first, *others = columns
    while others:
        block = [first, others.pop(0)]
        while others and sum(len(text[0]) + 1 for text in [*block, others[0]]) <= width + 1:
            block.append(others.pop(0))
        print("\n".join(" ".join(cells) for cells in zip(*block)))

def print_summary(report):
    """The figures of a report, in lines of at most 80 characters."""
    name, sqnr, test = name_of(report["recipe"]), report["logit_sqnr_db"], report["mcnemar"]
    rows = []
    for network, row in (("FP32", report["fp32"]), (name, report["int8"])):
        right = {f"{label} right": f"{row['confusion'][i][i]:,} of {sum(row['confusion'][i]):,}"
                 for i, label in enumerate(CLASSES)}
        rows.append({"Summary": network, "Top-1": f"{row['top1']:.3f} %",
                     "95 % interval": "{:.1f} to {:.1f} %".format(*row["interval95"]), **right,
                     "ms per picture": f"{row['ms_per_image']:.2f}",
                     "file bytes": row["file_bytes"]})
    print()
    print_table(rows)
    sqnr_text = "infinite" if sqnr is None else f"{sqnr:.1f} dB"
    print(f"same class {100 * report['agreement']:.2f} %, logit SQNR {sqnr_text}, "
          f"{name} {report['speedup']:.1f} times as fast")
    if report["busy"]:
        print("The times varied by more than a factor of 2: other programs may be running.")
    if sqnr is not None and sqnr < LOW_SQNR:
        print("The SQNR is low: python tools/explain.py shows where the error arises.")
    if test["corrected"] or test["broken"]:
        verdict = "which could be chance" if test["p"] >= 0.05 else "which is more than chance"
        print(f"{name} corrects {test['corrected']} and breaks {test['broken']} of FP32's "
              f"answers,\n{verdict} (McNemar's p = {test['p']:.2g})")
    if report["inputs"]["evaluation_crc"] == report["inputs"]["calibration_crc"]:
        print("Calibration and evaluation use the same pictures: the ranges look better than they\n"
              "are, and HEADROOM seems useless.")
    print(f"pictures that changed their class: {len(report['flips'])}; files left out: "
          f"{len(report['skipped'])}; see report.json")
    for flip in report["flips"][:LISTED]:
        print(f"  {shorten(flip['file'], 34)} ({flip['label']}), {flip['effect']}, "
              f"FP32's margin {flip['fp32_margin']:.3f}")
    for row in report["skipped"][:LISTED]:
        print(f"  {shorten(row['file'], 78)}\n    {printable(row['reason'])[:76]}")

# %% [markdown]
# ## Command line
# How a run reads its constants, their paths and the device, and what it sets in its process.

# %%
def constants_block():
    """The constants as they stand in this file, with their comments; "" in a notebook."""
    if "__file__" not in globals():
        return ""
    return Path(__file__).read_text("utf-8").split("# what to run, and on what")[1].split("# %%")[0]

def read_constants(names=tuple(LEGAL)):
    """{constant: value} as they are now; InputError for an illegal value or a misspelt name."""
    constants = {name: copy.copy(globals()[name]) for name in names if name in globals()}
    # a misspelt constant in the file is an error: it would have no effect
    written = re.findall(r"(?m)^([A-Z]\w*) *=", constants_block())
    check_legal(constants | dict.fromkeys(name for name in written if name not in LEGAL), names)
    return constants

def set_constants(words, doc):
    """Set constants from the words of a command line: presets, applied first, and NAME=value.

    A value is a Python literal, or else a string. --help prints `doc`, the docstring of the
    program, and the constants, and exits. Raises InputError for any other word.
    """
    if {"--help", "-h"} & set(words):
        print(f"{doc}\nThe constants:\n{constants_block()}\nTheir legal values:\n")
        print("\n".join(f"{name:<18} {legal}" for name, (legal, _) in LEGAL.items()))
        print("\n".join(f"preset {name}: {changes}" for name, changes in PRESETS.items()))
        sys.exit()
    given = {}
    for word in sorted(words, key=lambda word: word not in PRESETS):    # presets first
        name, _, text = word.partition("=")
        try:
            value = ast.literal_eval(text)
        except Exception:       # many types, for what is no literal
            value = text        # a word without quotes, such as a folder's name
        if isinstance(globals().get(name), str) and not isinstance(value, str):
            value = text        # a folder may be called 2024
        given |= PRESETS.get(word) or {name: value}
    check_legal(read_constants() | given, LEGAL)
    globals().update(given)

ROOT = Path(__file__).resolve().parent if "__file__" in globals() else Path.cwd()    # notebook: cwd

def resolve_path(*names):
    """ROOT joined with these names; an absolute one replaces ROOT, and ~ is the home folder."""
    return ROOT.joinpath(*[os.path.expanduser(name) for name in names])

def display_path(path):
    """A path as it is printed: relative to ROOT if it is inside ROOT."""
    return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else str(path)

def device():
    """The torch.device that DEVICE names."""
    has_gpu = torch.cuda.is_available()
    if DEVICE == "cuda" and not has_gpu:
        raise InputError('DEVICE = "cuda": torch finds no GPU here; set it to "auto"')
    return torch.device("cuda" if has_gpu and DEVICE != "cpu" else "cpu")

def prepare_process():
    """Settings of this process that a run needs. Importing the file changes none of them."""
    if hasattr(sys.stdout, "reconfigure"):      # a file's name may hold what a terminal cannot show
        sys.stdout.reconfigure(errors="backslashreplace", line_buffering=True)
    torch.backends.cudnn.allow_tf32 = False             # FP32 means FP32, on a GPU too
    warnings.filterwarnings("ignore", module="PIL")     # broken pictures are listed in `skipped`
    PngImagePlugin.MAX_TEXT_CHUNK = 2**26       # bytes; at 1 MB Pillow refuses good pictures

# %% [markdown]
# ## The run
# Each step is a cell, guarded so that importing the file runs nothing. The first reads the
# constants and lists the pictures.

# %%
def end_in_one_line(kind, error, trace):
    """sys.excepthook of a run: one line for bad input, OSError, Ctrl-C; none after `| head`."""
    if issubclass(kind, BrokenPipeError):       # head has what it wants: drop the rest
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    elif issubclass(kind, KeyboardInterrupt):
        print("stopped by Ctrl-C", file=sys.stderr)
    elif issubclass(kind, (InputError, OSError)):
        print(error, file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, trace)

if __name__ == "__main__":
    sys.excepthook = end_in_one_line
    if "__file__" in globals():         # a notebook's kernel has other arguments
        set_constants(sys.argv[1:], __doc__)
    prepare_process()
    constants = read_constants()
    print("\n".join(f"{name} = {value!r}" for name, value in constants.items()))
    print(f"device {device()}, torch {torch.__version__}")
    evaluation = calibration = CatDogDataset(resolve_path(DATA_DIR, EVALUATION_SPLIT))
    if CALIBRATION_SPLIT != EVALUATION_SPLIT:
        calibration = CatDogDataset(resolve_path(DATA_DIR, CALIBRATION_SPLIT))
    print(f"calibrating on {calibration}\nevaluating on  {evaluation}")
    # in a notebook, delete results of earlier constants, so that a cell that is run too early fails
    for made_below in ("model", "folded", "calibrated", "int8_model", "int8"):
        globals().pop(made_below, None)

# %% [markdown]
# ### Load and fold
# A batch norm multiplies and adds, as the convolution before it does: one convolution can do both.
# The logits stay the same except for FP32's rounding.

# %%
if __name__ == "__main__":
    checkpoint = resolve_path(constants["CHECKPOINT"])
    model, fp32_bytes = load_checkpoint(checkpoint), checkpoint.read_bytes()
    print(model)
    pixels = evaluation.first_pixels(SAMPLE)
    folded = model.fused()
    changes = {"folding": check_unchanged("folding", model, folded, pixels, ROUNDING)}

# %% [markdown]
# ### Calibrate
# The observers see every calibration picture. Each range printed is that of the activation's
# strongest channel; if that is far above the others, they get few integers.

# %%
if __name__ == "__main__":
    calibrated = calibrate(folded, calibration)
    ranges = {name: folded.ranges[name].max().item() for name in ACTIVATIONS}
    print("\n".join(f"range_{name:<6} {largest:.6g}" for name, largest in ranges.items()))
    fp32 = calibrated if evaluation is calibration else evaluate("FP32", folded, evaluation)

# %% [markdown]
# ### Quantize
# Scales are calculated from the ranges, and weights and biases are rounded to integers. The table
# shows for each layer the largest output that its scale covers (headroom and equalization
# included), its scales, and how many of the 31 bits of an int32 its largest possible sum takes.

# %%
if __name__ == "__main__":
    recipe = read_constants(LEGAL_RECIPE)   # in a notebook they may have changed
    constants |= recipe
    sample = calibrated.pictures.first_pixels(SAMPLE)
    fp32_model, int8_model = quantize_network(folded, sample, recipe)
    changes["equalization"] = None if fp32_model is folded else check_unchanged(
        "equalization", folded, fp32_model, pixels, ROUNDING)
    layers = layer_table(int8_model)
    print_table(layers)

# %% [markdown]
# ### Verify
# A layer uses its INT8 kernel if that cannot overflow, gives the reference's integers on 20
# pictures and is faster: the table says how many outputs were compared, and how many differ. Then
# both networks are timed, alternately.

# %%
if __name__ == "__main__":
    constants |= read_constants(["INT8_ENGINE"])
    engines = choose_engines(int8_model, pixels)
    print_table(engines)
    batch = pixels[:BATCH_SIZE]
    seconds = time_in_turns({"fp32": folded, "int8": int8_model}, batch, TIMED_ROUNDS)
    ms = {name: 1000 * min(times) / len(batch) for name, times in seconds.items()}
    busy = any(max(times) > 2 * min(times) for times in seconds.values())

# %% [markdown]
# ### Evaluate and compare
# The same pictures, now on integers. What matters is how many answers changed, and how close to a
# tie those were.

# %%
if __name__ == "__main__":
    int8 = evaluate(name_of(recipe), int8_model, evaluation)
    int8_bytes = int8_checkpoint(int8_model)
    skipped = {display_path(pictures.folder / file): reason
               for pictures in (calibration, evaluation)
               for file, reason in pictures.skipped.items()}
    report = {
        "when": time.strftime("%Y-%m-%d %H:%M:%S"), "constants": constants, "recipe": recipe,
        "torch": torch.__version__, "numpy": np.__version__, "pillow": PIL.__version__,
        "device": str(device()), "ranges": ranges, "calibration_top1": calibrated.top1,
        "inputs": {"evaluation_crc": evaluation.checksum(),
                   "calibration_crc": calibration.checksum(),
                   "checkpoint_crc": zlib.crc32(fp32_bytes)},
        "images": {"evaluated": len(int8.files), "calibrated": len(calibrated.files)},
        "skipped": [{"file": file, "reason": reason} for file, reason in sorted(skipped.items())],
        "engines": engines, "layers": layers, "logit_changes": changes,
        "batch_timed": len(batch), "busy": busy,
        "speedup": ms["fp32"] / ms["int8"], **compare(fp32, int8)}
    report["fp32"] |= {"ms_per_image": ms["fp32"], "file_bytes": len(fp32_bytes)}
    report["int8"] |= {"ms_per_image": ms["int8"], "file_bytes": len(int8_bytes)}
    print_summary(report)

# %% [markdown]
# ### Save
# Check that the loaded file gives the same logits. Then write the INT8 network and all figures.

# %%
if __name__ == "__main__":
    loaded = load_int8_checkpoint(io.BytesIO(int8_bytes))
    report["logit_changes"]["saving"] = check_unchanged("saving", int8_model, loaded, pixels, 0)
    report_json = (json.dumps(report, indent=1) + "\n").encode()
    output = resolve_path(OUTPUT_DIR)
    write_files(output, {"INT8_checkpoint.pth.tar": int8_bytes, "report.json": report_json})
    print(f"wrote {display_path(output)}/INT8_checkpoint.pth.tar and report.json")
    with open(output / "runs.jsonl", "ab", buffering=0) as runs:
        runs.write((json.dumps(report) + "\n").encode())    # one write: runs cannot mix
    print(f"python tools/runs.py OUTPUT_DIR={OUTPUT_DIR} compares all runs written there")

# %% [markdown]
# ### Explain
# Why answers changed, in tables and a picture. (In the script the line below is a comment.)

# %%
# %run tools/explain.py
