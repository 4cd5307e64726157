"""Post-training INT8 quantization of a cat/dog CNN, from a picture's bytes to its INT8 logits.

    pip install -r requirements.txt && python quantize_catdog.py

A network trained in FP32 becomes one of 8-bit integers, without training it again: run it once on
calibration pictures and note the largest value at 7 places of the network, turn these ranges into
scales, round weights and biases to integers, then run on integers alone:

    stage       what it does                                          what leaves it
    pictures    decode and resize                                     uint8   (N, 3, 224, 224)
    calibrate   FP32 network, an observer at each place               range   one float a channel
    fold        batch norm into the convolution before it             FP32    weights, biases
    equalize    weak channels times a factor, undone a layer later    FP32    weights, biases
    quantize    scale = largest integer / range                       int8    weights, int32 biases
    refine      rounding and biases, by the outputs they lead to      int8    weights, int32 biases
    INT8 pass   uint8 x int8 -> int32 sums -> uint8, layer by layer   FP32    logits (N, 2)
    analysis    where the error is born, what the ranges rest on      tables, results/report.png
    report      what changed, and by how much                         results/report.json, INT8_checkpoint.pth.tar

Below come the constants, pictures, arithmetic, FP32 network, INT8 network, what brings it closer to
FP32, checkpoints, passes, analysis and report; the run at the end calls them in the order of the
table. Its last lines are:

    loaded back, the INT8 checkpoint changes a logit by 0
    Summary
    seconds: list, load 0.03, calibration pass 0.29, quantization 0.29, comparing, timing 0.23, INT8 pass  ...
    FP32 Top1: 95.000 % (95 of 100), 95 % interval 88.8 to 97.8 %, 1.38 ms a picture, 2,069,096 bytes of p ...
    INT8 Top1: 95.000 % (95 of 100), 95 % interval 88.8 to 97.8 %, 0.47 ms a picture, 521,116 bytes of par ...
    agreement 100.00 %, logit SQNR 38.8 dB, INT8 2.9 times as fast; 0 of 100 pictures changed their class; ...
    FP32: 50 cats, 3 of them called dogs; 50 dogs, 2 called cats
    INT8: 50 cats, 3 of them called dogs; 50 dogs, 2 called cats
    INT8 corrects 0 and spoils 0 of FP32's answers: no more than chance (exact McNemar test, p = 1); the t ...
    wrote results/report.json, report.png and INT8_checkpoint.pth.tar

It is the port of a notebook: the weights keep its names, and so do the functions that it has. The
file opens as a notebook too (VS Code, Jupytext).
"""

# %%
import ctypes
import io
import json
import math
import os
import re
import signal
import sys
import time
import warnings
import zipfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
import torchnet.meter as tnt
from PIL import Image, ImageOps

# %% [markdown]
# ## Constants
# Edit one and run again. Relative paths start at this file's folder.

# %%
# what is run, on what
DATA_DIR = "cat_dog"                     # folder that holds the splits
CALIBRATION_SPLIT = "val"                # folder in it whose pictures set the ranges; no labels are used for that
EVALUATION_SPLIT = "val"                 # folder in it whose pictures are counted in the accuracies
CHECKPOINT = "BEST_checkpoint.pth.tar"   # FP32 weights, {"model": state_dict}; or an INT8 checkpoint, run alone
OUTPUT_DIR = "results"                   # report.json, report.png and INT8_checkpoint.pth.tar are written here
IMAGE_SIZE = (224, 224)                  # width, height; 212 to 227 each: FC1 takes maps of 11 x 11 after pooling
BATCH_SIZE = 5                           # pictures per step, 1 to 4096: speed and memory; it changes no answer
NUM_WORKERS = os.cpu_count() or 1        # threads that decode pictures, 1 to 256; one a core is right
SWEEP_BITS = False                       # run the INT8 pass with BIT 8 down to 2 as well, and compare
# the recipe; the notebook's is PER_CHANNEL False, UNSIGNED_RELU False, BIAS_BIT 16, QUANTIZE_LOGITS True, HEADROOM 1
# and EQUALIZE, GPTQ, BIAS_CORRECTION False
BIT = 8                                  # width of the integers for weights and activations, 2 to 8
PER_CHANNEL = True                       # weight scale: one per output channel, or one per layer (False)
UNSIGNED_RELU = True                     # integers of pixels and ReLU outputs: 0..255, or 0..127 (False)
BIAS_BIT = 32                            # width of the integers for biases, 2 to 32
QUANTIZE_LOGITS = False                  # round the logits to BIT bits too, or scale FC2's sums to FP32 (False)
HEADROOM = 2                             # ranges before FC1 and FC2 are widened by this factor, 1 to 16
EQUALIZE = True                          # rescale channels so that weak ones use more of the integers too
GPTQ = True                              # round convolutions' weights so that errors cancel, or to nearest (False)
BIAS_CORRECTION = True                   # move biases by the mean error that is left on calibration pictures
INT8_ENGINE = "auto"                     # "onednn" kernels, "reference" arithmetic; "auto": onednn where they agree

ROOT = Path(globals().get("__file__", "notebook")).resolve().parent    # in a notebook: the working folder
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
KEEP_BYTES = 2**28      # decoded pictures kept from the first pass for the next; beyond it they are decoded again
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF")  # for one of the others Pillow runs a program
Image.MAX_IMAGE_PIXELS = 2**25      # Pillow refuses pictures of more than twice as many, before they fill the memory

torch.backends.cudnn.allow_tf32 = False             # FP32 means FP32, on a GPU too
if sys.platform == "linux" and hasattr(ctypes.CDLL(None), "mallopt"):
    # glibc returns every big buffer to the system and faults its pages in again at the next layer; keeping
    # them (M_MMAP_MAX = -4, M_TRIM_THRESHOLD = -1) halves the time of both passes
    ctypes.CDLL(None).mallopt(-4, 0)
    ctypes.CDLL(None).mallopt(-1, 2**31 - 1)
warnings.filterwarnings("ignore", module="PIL")     # a broken picture is reported once, below, in our words


class InputError(SystemExit):
    """Bad input: the program ends with this one line on stderr and exit status 1."""


def feature_map(side):
    """Side of the maps that reach FC1 when a picture's side is given: convolution, then pooling, four times."""
    for kernel in (5, 5, 3, 3):
        side = (side - kernel + 1) // 2
    return side


RECIPE = ["BIT", "PER_CHANNEL", "UNSIGNED_RELU", "BIAS_BIT", "QUANTIZE_LOGITS", "HEADROOM", "EQUALIZE", "GPTQ",
          "BIAS_CORRECTION"]


def current_recipe():
    """{constant: value} of those that decide the integers."""
    return {name: globals()[name] for name in RECIPE}


def legal_values():
    """{constant: (test, what to set it to)}."""
    def whole(low, high):
        return lambda value: type(value) is int and low <= value <= high, f"a whole number from {low} to {high}"

    text = lambda value: isinstance(value, str) and value.strip("\0") == value != "", "the name of a file or folder"
    switch = lambda value: isinstance(value, bool), "True or False"
    size = (lambda value: isinstance(value, tuple) and [type(side) for side in value] == [int, int]
            and all(feature_map(side) == 11 for side in value)), "(width, height), each from 212 to 227"
    factor = lambda value: type(value) in (int, float) and 1 <= value <= 16, "a number from 1 to 16"
    engine = lambda value: value in ("auto", "onednn", "reference"), '"auto", "onednn" or "reference"'
    return {"DATA_DIR": text, "CALIBRATION_SPLIT": text, "EVALUATION_SPLIT": text, "CHECKPOINT": text,
            "OUTPUT_DIR": text, "IMAGE_SIZE": size, "BATCH_SIZE": whole(1, 4096), "NUM_WORKERS": whole(1, 256),
            "SWEEP_BITS": switch, "BIT": whole(2, 8), "PER_CHANNEL": switch, "UNSIGNED_RELU": switch,
            "BIAS_BIT": whole(2, 32), "QUANTIZE_LOGITS": switch, "HEADROOM": factor, "EQUALIZE": switch, "GPTQ": switch,
            "BIAS_CORRECTION": switch, "INT8_ENGINE": engine}


def check_constants():
    """Print and return the constants; raise InputError at a value that this file cannot run with."""
    legal = legal_values()
    for name, (is_legal, what) in legal.items():
        if not is_legal(globals()[name]):
            raise InputError(f"{name} = {globals()[name]!r} in quantize_catdog.py: set it to {what}")
        print(f"{name} = {globals()[name]!r}")
    return {name: globals()[name] for name in legal}


# %% [markdown]
# ## Pictures
# A file becomes uint8 pixels and a label: 0 for cat, 1 for dog. What cannot be used is left out and named.

# %%
CLASSES = ("cat", "dog")


def label_of(name):
    """Label from the words of a path: 0 for cat or cats, 1 for dog or dogs; None when it says neither or both."""
    words = {word.removesuffix("s") for word in re.findall(r"[^\W\d_]+", str(name).casefold())}
    return {(True, False): 0, (False, True): 1}.get(("cat" in words, "dog" in words))


def decode(path):
    """Picture file -> uint8 (height, width, 3) of IMAGE_SIZE. Raises what Pillow raises on a broken file.

    Resized with Pillow's default filter (bicubic), as in the notebook. Turned as its EXIF data says; the
    first frame of an animation; transparent parts on white; 16-bit grey divided by 257 = 65535 / 255.
    """
    with Image.open(path, formats=FORMATS) as image:
        ImageOps.exif_transpose(image, in_place=True)
        if image.mode.startswith("I"):
            image = Image.fromarray((np.asarray(image) / 257).clip(0, 255).round().astype(np.uint8))
        if "A" in image.getbands() or "transparency" in image.info:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        if image.mode != "RGB":
            image = image.convert("RGB")
        return np.array(image.resize(IMAGE_SIZE))


def decode_or_reason(path):
    """What `decode` gives, or a text that says why the file cannot be decoded."""
    if os.path.exists(path) and not os.path.isfile(path):
        return "is no file"         # a pipe, say, at which `open` would wait for ever
    try:
        return decode(path)
    except Exception as error:      # decoders raise nearly every type on broken bytes, none of which is our bug
        return f"cannot be decoded: {type(error).__name__}: {' '.join(str(error).split())}"


class Batch(NamedTuple):
    pixels: torch.Tensor    # uint8 (n, 3, height, width), channels-last in memory
    labels: torch.Tensor    # int64 (n,)
    files: list             # n file names


class CatDogDataset:
    """The pictures below one folder, in one fixed order, and those left out with the reason.

    Ordered by the numbers in the path, then by path: cat.0, dog.0, cat.1, ... so that any first few hold both.
    Raises InputError when the folder is missing or holds no picture that can be used.
    """

    def __init__(self, folder):
        self.folder, self.skipped, self.kept, self.done = Path(folder), {}, [], 0   # done: files that `kept` covers
        if not self.folder.is_dir() or not os.access(self.folder, os.R_OK):
            raise InputError(f"no folder {self.folder}: put pictures named cat.0.jpg, dog.0.jpg, ... there, "
                             "or set DATA_DIR and the splits")
        self.files, self.labels = [], []
        in_order = lambda name: ([int(number) for number in re.findall("[0-9]+", name)], name)
        for name in sorted(self.names(), key=in_order):
            label = label_of(name)
            if label is None:
                self.skipped[name] = "the path says neither cat nor dog, or both"
            else:
                self.files.append(name)
                self.labels.append(label)
        self.require(len(self.files))

    def names(self):
        """Yield the paths of all files below the folder, relative to it; links are followed, no folder twice."""
        def cannot_list(error):
            self.skipped[os.path.relpath(error.filename, self.folder)] = f"cannot be listed: {error.strerror}"

        seen = set()
        for place, folders, files in os.walk(self.folder, onerror=cannot_list, followlinks=True):
            if os.path.realpath(place) in seen:
                folders.clear()
                continue
            seen.add(os.path.realpath(place))
            yield from (os.path.relpath(os.path.join(place, file), self.folder) for file in files)

    def require(self, usable):
        if not usable:
            reasons = "".join(f", e.g. {name}: {reason}" for name, reason in list(self.skipped.items())[:1])
            raise InputError(f"no usable picture in {self.folder}{reasons}: put pictures named cat.0.jpg, "
                             "dog.0.jpg, ... there")

    def __len__(self):
        return len(self.files)

    def left_out(self):
        """{folder/path: reason} so far."""
        return {f"{self.folder.name}/{name}": reason for name, reason in self.skipped.items()}

    def decoded(self, first):
        """Yield what `decode_or_reason` gives for each file from the first on.

        All cores decode a few batches, then all cores run the network on them. Both at once would leave neither idle
        either, and take longer: they would fight for the cores.
        """
        pool, count = ThreadPoolExecutor(NUM_WORKERS), max(BATCH_SIZE, 32 * NUM_WORKERS)
        try:
            for start in range(first, len(self), count):    # Pillow lets go of the interpreter while it decodes
                yield from list(pool.map(decode_or_reason, map(self.folder.joinpath, self.files[start:start + count])))
        finally:
            pool.shutdown(cancel_futures=True)

    def batches(self):
        """Yield a Batch at a time; decoded once, as far as KEEP_BYTES reach, however often this is called.

        A batch whose pictures are all broken is not yielded. Raises InputError when no picture can be used.
        """
        yield from self.kept
        usable = sum(len(batch.files) for batch in self.kept)
        room, keeping, good = KEEP_BYTES - sum(batch.pixels.nbytes for batch in self.kept), True, []
        for index, pixels in enumerate(self.decoded(self.done), self.done):
            if isinstance(pixels, str):
                self.skipped[self.files[index]] = pixels
            else:
                good.append((index, pixels))
            if good and (len(good) == BATCH_SIZE or index == len(self) - 1):
                indices, good = [index for index, _ in good], [pixels for _, pixels in good]
                batch = Batch(torch.from_numpy(np.stack(good)).permute(0, 3, 1, 2),
                              torch.tensor([self.labels[i] for i in indices]), [self.files[i] for i in indices])
                good, usable, room = [], usable + len(indices), room - batch.pixels.nbytes
                if keeping := keeping and (room >= 0 or not self.kept):
                    self.kept.append(batch)
                    self.done = index + 1
                yield batch
        self.require(usable)


# %% [markdown]
# ## Arithmetic
# A real number x is kept as an integer q with x = q / scale; torch's own quantizers call 1 / scale the scale.
# Everything here is symmetric: the integer 0 means 0.0, and there is no zero point.

# %%
SMALLEST = 1e-12    # a range below it counts as this: a dead layer divides by no zero


class IntRange(NamedTuple):
    low: int
    high: int
    dtype: torch.dtype


def int_range(bit, unsigned=False):
    """Integers of 8 bits: -127..127 in int8, or 0..255 in uint8 for what is never negative; fewer bits alike."""
    if unsigned:
        return IntRange(0, 2**bit - 1, torch.uint8)
    largest = 2**(bit - 1) - 1
    return IntRange(-largest, largest, torch.int8)


def scale_of(largest_integer, range_data):
    """Scale that maps range_data, the largest magnitude seen, to the largest integer. FP32, of range_data's shape."""
    return largest_integer / range_data.clamp(min=SMALLEST)


def spread(values, dims):
    """(out,) or (1,) -> the same with `dims` more axes of length 1: one value per output channel."""
    return values.reshape(-1, *[1] * dims)


def round_and_clip(x, scale, to):
    """clip(round(x * scale), low, high): FP32 -> whole numbers in FP32. to: an IntRange."""
    return (x * scale).round_().clip_(to.low, to.high)


def quantize(x, scale, to):
    """q = clip(round(x * scale), low, high): FP32 -> the integer type of `to`, an IntRange."""
    return round_and_clip(x, scale, to).to(to.dtype)


def requantize(sums, bias, multiplier, to):
    """int32 sums at scale_in * scale_w -> integers at scale_out: q = clip(round(sums * M + bias * M), low, high).

    The sums are real * scale_in * scale_w; times M = scale_out / (scale_in * scale_w) they are real * scale_out.
    A low of 0 is the ReLU. Product and sum are rounded to FP32 separately: this is what INT8 kernels do.
    """
    return (sums * multiplier).add_(bias * multiplier).round_().clip_(to.low, to.high).to(to.dtype)


def fusion_conv_bn(conv, bn):
    """Weight and bias of the one convolution that does what convolution and batch norm do.

    bn(y) = (y - mean) * g + beta with g = gamma / sqrt(var + eps), hence W' = W * g, b' = b * g + (beta - mean * g)
    (Jacob et al. 2018, arXiv:1712.05877, section 3.2).
    """
    bn_gamma = bn.weight / torch.pow(bn.running_var + bn.eps, 0.5)
    bn_beta = bn.bias - bn.running_mean * bn_gamma
    return conv.weight * bn_gamma.reshape(-1, 1, 1, 1), conv.bias * bn_gamma + bn_beta


def weight_quant(w, b, in_scale, recipe):
    """FP32 weight (out, ...) and bias (out,) -> int8 weight, int32 bias, and the weight's scale, (out,) or (1,).

    Products of inputs and weights carry the scale in_scale * w_scale; so must the bias that is added to them.
    """
    to = int_range(recipe["BIT"])
    rows = (w if recipe["PER_CHANNEL"] else w[None]).flatten(1)                 # one row a scale
    w_scale = scale_of(to.high, rows.abs().amax(1))
    if recipe["BIAS_BIT"] == 32:
        # next to weights of nearly 0 a bias would leave int32: then the bias sets the scale, at half of int32,
        # which leaves the other half to the products
        b_rows = b.reshape(len(rows), -1)
        w_scale = torch.minimum(w_scale, scale_of(2**30, b_rows.abs().amax(1) * in_scale))
    wq = quantize(w, spread(w_scale, w.dim() - 1), to)
    b_largest = 2**(recipe["BIAS_BIT"] - 1) - 1
    bq = torch.round(b * (w_scale * in_scale)).double().clip(-b_largest, b_largest)     # FP32 cannot hold b_largest
    return wq, bq.to(torch.int32), w_scale


# %% [markdown]
# ## The FP32 network and its observers
# Four times convolution, batch norm, ReLU, pooling; then two fully connected layers. An observer sits at each
# *place*: the input, each ReLU's output, each fully connected layer's output. It remembers the largest magnitude
# that it has seen in each channel of a map, or in all values of a fully connected layer, as `range_<place>`, and the
# one of each picture as `maxima[place]`. The largest of all is the range that `cl_scale` turns into the place's scale.

# %%
class Layer(NamedTuple):
    name: str           # of the convolution or fully connected layer
    bn: str | None      # batch norm, ReLU and pooling behind it
    relu: str | None
    pool: str | None
    source: str         # place that it reads from
    place: str          # place that it writes to, before pooling


LAYERS = [
    Layer("cnn1", "bn1", "relu1", "maxpool1", "input", "cv1"),
    Layer("cnn2", "bn2", "relu2", "maxpool2", "cv1", "cv2"),
    Layer("cnn3", "bn3", "relu3", "maxpool3", "cv2", "cv3"),
    Layer("cnn4", "bn4", "relu4", "maxpool4", "cv3", "cv4"),
    Layer("fc1", None, None, None, "cv4", "fc1"),       # no ReLU: the notebook's forward has none here
    Layer("fc2", None, None, None, "fc1", "fc2"),
]
PLACES = ["input"] + [layer.place for layer in LAYERS]
BEFORE_FC = [layer.source for layer in LAYERS if not layer.bn]


def place_integers(recipe):
    """{place: IntRange}. Pixels and ReLU outputs are never negative, so the sign's bit can be theirs too."""
    return {place: int_range(recipe["BIT"], recipe["UNSIGNED_RELU"] and place not in ("fc1", "fc2"))
            for place in PLACES}


class MaxPool2d(nn.MaxPool2d):
    """2 x 2 maximum (n, c, h, w), of floats and of integers; a last odd row or column is dropped.

    torch's own also finds out where each maximum was, which takes three times as long, and refuses uint8.
    """

    def forward(self, x):
        height, width = x.shape[2] // 2 * 2, x.shape[3] // 2 * 2
        x = torch.maximum(x[:, :, 0:height:2], x[:, :, 1:height:2])
        return torch.maximum(x[:, :, :, 0:width:2], x[:, :, :, 1:width:2])


class CNN_Model(nn.Module):
    """The notebook's network in FP32: uint8 or float pixels 0..255 (N, 3, 224, 224) -> logits (N, 2), cat and dog."""

    def __init__(self):
        super().__init__()
        self.cnn1 = nn.Conv2d(in_channels=3, out_channels=16, kernel_size=5, stride=1, padding=0)
        self.bn1 = nn.BatchNorm2d(16)
        self.relu1 = nn.ReLU(inplace=True)
        self.maxpool1 = MaxPool2d(kernel_size=2)
        self.cnn2 = nn.Conv2d(in_channels=16, out_channels=32, kernel_size=5, stride=1, padding=0)
        self.bn2 = nn.BatchNorm2d(32)
        self.relu2 = nn.ReLU(inplace=True)
        self.maxpool2 = MaxPool2d(kernel_size=2)
        self.cnn3 = nn.Conv2d(in_channels=32, out_channels=16, kernel_size=3, stride=1, padding=0)
        self.bn3 = nn.BatchNorm2d(16)
        self.relu3 = nn.ReLU(inplace=True)
        self.maxpool3 = MaxPool2d(kernel_size=2)
        self.cnn4 = nn.Conv2d(in_channels=16, out_channels=8, kernel_size=3, stride=1, padding=0)
        self.bn4 = nn.BatchNorm2d(8)
        self.relu4 = nn.ReLU(inplace=True)
        self.maxpool4 = MaxPool2d(kernel_size=2)
        self.fc1 = nn.Linear(8 * 11 * 11, 512)
        self.fc2 = nn.Linear(512, 2)
        self.observing, self.seen, self.maxima = False, 0, {}           # see `observe`
        channels = {"input": 3} | {layer.place: getattr(self, layer.name).out_channels if layer.bn else 1
                                   for layer in LAYERS}
        for place in PLACES:
            self.register_buffer(f"range_{place}", torch.zeros(channels[place]))    # largest |value| seen

    def linear(self, layer, x):
        """One layer up to where its ReLU would come: convolution and batch norm, or fully connected.

        A picture's values are the same, to the last bit, whichever pictures are beside it. Kernels for one picture, and
        products of matrices, may sum in another order: so one becomes two, and each has its own product.
        """
        part = getattr(self, layer.name)
        if layer.bn:
            return getattr(self, layer.bn)(part(x) if len(x) > 1 else part(torch.cat([x, x]))[:1])
        return torch.bmm(x.flatten(1)[:, None], part.weight.t().expand(len(x), -1, -1))[:, 0] + part.bias   # (N, 512)

    def activations(self, x):
        """Yield (place, FP32 values) from the input to the logits."""
        x = x.float()                                           # (N, 3, 224, 224)
        yield "input", x
        for layer in LAYERS:
            x = self.linear(layer, x)                           # cnn1: (N, 16, 220, 220)
            if layer.relu:
                x = getattr(self, layer.relu)(x)
            yield layer.place, x
            if layer.pool:
                x = getattr(self, layer.pool)(x)                # cnn1: (N, 16, 110, 110)

    def observe(self, count):
        """Let the observers forget what they saw, and watch the forward passes of `count` pictures to come.

        The space for it is taken at once: small pieces, one a batch, would come to lie between the big buffers, so
        that these grow without end.
        """
        self.observing, self.seen = True, 0
        for place in PLACES:
            range_data = getattr(self, f"range_{place}").zero_()
            self.maxima[place] = range_data.new_zeros(count, len(range_data))           # of each picture

    def forward(self, x):
        """The last of `activations`, with each ReLU after the pooling: same maximum, a quarter of the work."""
        x = x.float()
        if self.observing:
            self.update_range("input", x)
        for layer in LAYERS:
            x = self.linear(layer, x)
            if self.observing:
                self.update_range(layer.place, x)
            if layer.pool:
                x = getattr(self, layer.relu)(getattr(self, layer.pool)(x))
        self.seen += len(x)
        return x

    def update_range(self, place, data):
        """The observer: range = max(range, largest magnitude). data: (N, C, height, width), each channel by itself,
        or (N, values), all as one channel.

        Maps need no |data|: they are pixels, or a ReLU is to come that leaves what is positive. Ranges start at 0.
        """
        if data.dim() == 4:     # rows first, channels last as in memory: any other way takes 50 times as long
            largest = data.permute(0, 2, 3, 1).amax(1).amax(1).clamp(min=0)
        else:
            largest = data.abs().amax(1, keepdim=True)
        self.maxima[place][self.seen:self.seen + len(largest)] = largest                # (N, C)
        range_data = getattr(self, f"range_{place}")
        range_data.copy_(torch.maximum(range_data, largest.amax(0)))

    def fused(self):
        """A copy whose convolutions have taken in their batch norms; same logits up to rounding."""
        model = CNN_Model().to(self.fc1.weight.device)
        model.load_state_dict(self.state_dict())
        for layer in LAYERS:
            if layer.bn:
                conv = getattr(model, layer.name)
                conv.weight.data, conv.bias.data = fusion_conv_bn(conv, getattr(model, layer.bn))
                setattr(model, layer.bn, nn.Identity())
        return model.eval().to(memory_format=torch.channels_last)

    @torch.no_grad()
    def cl_scale(self, recipe=None):
        """Compute the scales from the ranges, quantize the weights, and return the INT8_Model.

        recipe: the constants', unless another is given. This model keeps its FP32 weights. Raises ValueError unless
        it comes from `fused`.
        """
        if isinstance(self.bn1, nn.BatchNorm2d):
            raise ValueError("fold the batch norms first: model.fused().cl_scale()")
        model, state = INT8_Model(recipe or current_recipe()), {}
        for place, to in model.integers.items():
            range_data = getattr(self, f"range_{place}").amax()
            headroom = model.recipe["HEADROOM"] if place in BEFORE_FC else 1
            state[f"scale_{place}"] = scale_of(to.high, range_data * headroom)
        for layer in LAYERS:
            part = getattr(self, layer.name)
            tensors = weight_quant(part.weight, part.bias, state[f"scale_{layer.source}"], model.recipe)
            state |= {f"{layer.name}.{key}": tensor for key, tensor in zip(("weight", "bias", "w_scale"), tensors)}
        model.load_state_dict(state)
        return model.to(self.fc1.weight.device)


# %% [markdown]
# ## The INT8 network
# The same layers on integers. A layer multiplies and adds integers only; between two layers the sums are brought
# to the next place's scale by one multiplication per output channel.

# %%
def pack(weight, multiplier, bias):
    """int8 weight, FP32 multiplier and bias*M, each (out,) -> what torch's INT8 kernels take, for `kernel`."""
    if weight.dim() == 4:
        packed = torch.ops.onednn.qconv_prepack(weight, multiplier, 1.0, 0, [1, 1], [0, 0], [1, 1], 1)
    else:
        packed = torch.ops.onednn.qlinear_prepack(weight, None)
    return packed, multiplier, torch.zeros_like(multiplier, dtype=torch.int32), bias


def kernel(x, packed, dtype, relu):
    """One layer in one kernel: int32 sums * M + bias, ReLU, rounded and saturated to `dtype`.

    Input and output scale are given as 1 and the weight's as M, so that the kernel's own rescaling is that of
    `requantize`, bit for bit.
    """
    weight, multiplier, zero, bias = packed
    if x.dim() == 4:                                        # convolutions take uint8 alone; nothing here is negative
        return torch.ops.onednn.qconv2d_pointwise(
            x.view(torch.uint8), 1.0, 0, weight, multiplier, zero, bias, [1, 1], [0, 0], [1, 1], 1, 1.0, 0, dtype,
            "relu" if relu else "none", [], "")
    return torch.ops.onednn.qlinear_pointwise(
        x, 1.0, 0, weight, multiplier, zero, bias, 1.0, 0, dtype, "relu" if relu else "none", [], "")


def kernels_saturate():
    """Whether this CPU adds pairs of products in 16 bits, as x86 without VNNI does: 2 * 255 * 127 overflows them."""
    pixels, one, none = torch.full((1, 16, 9, 9), 255, dtype=torch.uint8), torch.ones(16), torch.zeros(16)
    pixels = pixels.contiguous(memory_format=torch.channels_last)
    weight = torch.full((16, 16, 3, 3), 127, dtype=torch.int8)
    sums = kernel(pixels, pack(weight, one, none), torch.float32, relu=False)
    sums_fc = kernel(pixels.flatten(1)[:, :144], pack(weight.flatten(1), one, none), torch.float32, relu=False)
    return bool((sums != 144 * 255 * 127).any() or (sums_fc != 144 * 255 * 127).any())


class INT8_Model(nn.Module):
    """The quantized network: uint8 pixels (N, 3, 224, 224) -> FP32 logits (N, 2).

    recipe: the constants named in RECIPE that it is made with. Buffers: scale_<place> (FP32, one value);
    <layer>.weight (int8), <layer>.bias (int32), <layer>.w_scale (FP32, one value or one per output channel); all
    blank until `CNN_Model.cl_scale` or a checkpoint fills them in. Two executors give the same integers:
    `reference`, the definition, and `onednn`, after `use_kernels`.
    """

    def __init__(self, recipe):
        super().__init__()
        self.recipe, self.integers = recipe, place_integers(recipe)
        self.engine, self.packed, self.maxpool = "reference", {}, MaxPool2d(kernel_size=2)
        for place in PLACES:
            self.register_buffer(f"scale_{place}", torch.tensor(1.0))
        fp32 = CNN_Model()
        for layer in LAYERS:
            weight, part = getattr(fp32, layer.name).weight, nn.Module()
            part.register_buffer("weight", torch.zeros(weight.shape, dtype=torch.int8))
            part.register_buffer("bias", torch.zeros(len(weight), dtype=torch.int32))
            part.register_buffer("w_scale", torch.ones(len(weight) if recipe["PER_CHANNEL"] else 1))
            self.add_module(layer.name, part)

    @staticmethod
    def load(path):
        """The INT8_Model of an INT8 checkpoint, ready to `predict`. Raises InputError as `load_checkpoint` does."""
        model = load_checkpoint(path)[1]
        if not isinstance(model, INT8_Model):
            raise InputError(f"checkpoint {path} holds FP32 weights: give the INT8_checkpoint.pth.tar of a run")
        noise = torch.arange(2 * 3 * 224 * 224).mul(2654435761).bitwise_right_shift(16).to(torch.uint8)
        choose_engine(model, noise.reshape(2, 3, 224, 224).to(DEVICE))
        return model

    @torch.inference_mode()
    def predict(self, picture):
        """A picture's file -> ("cat" or "dog", [cat's logit, dog's logit]).

        Raises InputError, which ends a program that does not catch it, when the file cannot be decoded.
        """
        pixels = decode_or_reason(picture)
        if isinstance(pixels, str):
            raise InputError(f"{picture} {pixels}")
        logits = self(torch.from_numpy(pixels).permute(2, 0, 1)[None].to(DEVICE))[0].cpu()
        return CLASSES[logits.argmax()], logits.tolist()

    def is_fp32(self, place):
        """Whether values at this place stay FP32: the logits, unless they are quantized too."""
        return place == "fc2" and not self.recipe["QUANTIZE_LOGITS"]

    def largest_sum(self, layer):
        """Bound on the |sum| of products in a layer: every input at its largest, every sign at its worst. (out,)"""
        weight = getattr(self, layer.name).weight.long()
        return weight.abs().flatten(1).sum(1) * self.integers[layer.source].high

    def largest_accumulator(self, layer):
        """The same with the bias included. (out,)"""
        return self.largest_sum(layer) + getattr(self, layer.name).bias.long().abs()

    def accumulator_bits(self, layer):
        """Bits of the largest possible |accumulator|; int32 has 31."""
        return int(self.largest_accumulator(layer).max()).bit_length()

    def sum_scale(self, layer):
        """scale_in * scale_w, (out,) or (1,): the scale of a layer's sums of products, and of its bias."""
        return getattr(self, f"scale_{layer.source}") * getattr(self, layer.name).w_scale

    def multiplier(self, layer):
        """M = scale_out / (scale_in * scale_w), (out,). scale_out is 1 where the logits stay FP32."""
        scale_out = 1 if self.is_fp32(layer.place) else getattr(self, f"scale_{layer.place}")
        return (scale_out / self.sum_scale(layer)).expand(getattr(self, layer.name).bias.shape).contiguous()

    def sums(self, layer, x):
        """Integer inputs -> sums of products. The one place where floats hold integers.

        Exact: FP32 holds every integer up to 2^24, FP64 up to 2^53. A GPU may compute a convolution by way of a
        transform that rounds (Winograd, FFT); there FP64 and a last rounding give the integer.
        """
        weight = getattr(self, layer.name).weight
        exact = x.device.type == "cpu" and self.largest_sum(layer).max() < 2**24
        dtype = torch.float32 if exact else torch.float64
        sums = (F.conv2d if weight.dim() == 4 else F.linear)(x.to(dtype), weight.to(dtype))
        return sums if exact else sums.round().float()

    def rescale(self, layer, sums):
        """Sums of products -> integers of the layer's place, before pooling, or FP32 logits."""
        bias, multiplier = (spread(x, sums.dim() - 2) for x in (getattr(self, layer.name).bias, self.multiplier(layer)))
        if self.is_fp32(layer.place):
            return sums * multiplier + bias * multiplier                    # FP32 (N, 2)
        to = self.integers[layer.place]
        return requantize(sums, bias, multiplier, to._replace(low=0) if layer.relu else to)

    def reference(self, layer, x):
        """Integers of one place -> integers of the next before pooling, or logits, in the arithmetic's definition."""
        return self.rescale(layer, self.sums(layer, x))                     # cnn1: (N, 16, 220, 220)

    def onednn(self, layer, x):
        """The same in one INT8 kernel. Its output saturates at 8 bits; narrower integers are clipped after it."""
        if layer.name == "fc2":         # two columns: setting up the kernel would take longer than these int32 sums
            return self.rescale(layer, torch._int_mm(x, self.fc2.weight.t()))
        to = self.integers[layer.place]
        if layer.relu:
            x = kernel(x, self.packed[layer.name], torch.uint8, relu=True)
            return x if to.high == 255 else x.clip_(max=to.high).view(to.dtype)
        return kernel(x, self.packed[layer.name], torch.int8, relu=False).clip_(to.low, to.high)

    def use_kernels(self):
        """Switch to `onednn`. Raises RuntimeError or AttributeError where torch has no such kernels."""
        for layer in LAYERS[:-1]:
            part, multiplier = getattr(self, layer.name), self.multiplier(layer)
            self.packed[layer.name] = pack(part.weight, multiplier, part.bias * multiplier)
        self.engine = "onednn"

    def activations(self, x):
        """Yield (place, values): uint8 or int8 tensors, and last the FP32 logits or their int8 integers."""
        if not (x.dtype == torch.uint8 and self.integers["input"].high == 255 and self.scale_input == 1):
            x = quantize(x, self.scale_input, self.integers["input"])
        yield "input", x                                        # uint8 (N, 3, 224, 224)
        execute = self.onednn if self.engine == "onednn" else self.reference
        for layer in LAYERS:
            x = execute(layer, x if layer.pool else x.flatten(1))
            yield layer.place, x                                # uint8; cnn1: (N, 16, 220, 220); fc1: int8 (N, 512)
            if layer.pool:
                x = self.maxpool(x.view(torch.uint8))           # cnn1: (N, 16, 110, 110); none of it is negative

    def forward(self, x):
        for _, x in self.activations(x):
            pass
        return x if self.is_fp32("fc2") else x / self.scale_fc2


# %% [markdown]
# ## Closer to FP32
# Rounding each weight to its nearest integer is not the best that integers can do. Besides HEADROOM, which `cl_scale`
# applies since other pictures exceed the largest value of those that calibrate, three methods find better weights,
# biases and scales for the same INT8 arithmetic. None needs a label.

# %%
@torch.no_grad()
def equalize(model):
    """Rescale channels of a folded model in place, weak ones up; its logits stay. Returns {place: factors (C,)}.

    All channels of a place share one scale, set by the strongest, so weak ones use few of the integers. ReLU and
    pooling let a positive factor s through: times s in the layer that writes a channel, divided by s in the one
    that reads it. s = sqrt(largest range / the channel's range) goes half of the way, which leaves weak channels
    room for values that calibration did not see (Nagel et al. 2019, arXiv:1906.04721, section 4.1).
    """
    found = {}
    for layer, reader in zip(LAYERS, LAYERS[1:]):
        if layer.relu:
            part, weight = getattr(model, layer.name), getattr(model, reader.name).weight
            ranges = getattr(model, f"range_{layer.place}")
            largest = ranges.amax().clamp(min=SMALLEST)
            factors = (largest / torch.maximum(ranges, largest / 16)).sqrt()    # at most 4: a silent one may wake
            part.weight *= factors.reshape(-1, 1, 1, 1)
            part.bias *= factors
            ranges *= factors
            per_channel = weight.reshape(len(weight), len(factors), -1)     # fc1 reads 11 x 11 values of a channel
            weight.copy_((per_channel / factors.reshape(-1, 1)).reshape(weight.shape))
            found[layer.place] = factors
    return found


def gptq(weight, w_scale, moments, to):
    """Round FP32 weights (out, K) one input after the other, the error of each made up for by those still to come.

    moments (K, K): how inputs go together, X X' over the patches X (K, positions) of calibration pictures. Two
    pixels that are nearly always alike can share an error: one weight rounded up, the next down. w_scale: (out,).
    Returns integers (out, K) of the type `to` (Frantar et al. 2022, arXiv:2210.17323, algorithm 1).

    Row k of `upper` holds how much of weight k's error each later one takes over, once those before k are fixed:
    eliminating inputs one by one is what a Cholesky factorization of the inverse does.
    """
    # a little of every input's own, else dead inputs, and those always alike, leave nothing to invert
    damping = 0.01 * moments.diagonal().mean() + SMALLEST
    inverse = torch.linalg.inv(moments + damping * torch.eye(len(moments), device=moments.device))
    upper = torch.linalg.cholesky(inverse, upper=True)
    weight = weight.t().clone(memory_format=torch.contiguous_format)            # (K, out)
    rounded = torch.zeros_like(weight, dtype=to.dtype)
    for k in range(len(weight)):
        rounded[k] = quantize(weight[k], w_scale, to)
        error = (weight[k] - rounded[k] / w_scale) / upper[k, k]
        weight[k:].addr_(upper[k, k:], error, alpha=-1)
    return rounded.t()


@torch.no_grad()
def refine(int8_model, model, pixels):
    """Layer by layer, round the weights by `gptq` and correct the bias, on what calibration pictures make of them.

    model: the folded FP32 network that int8_model was made from; pixels: uint8 (n, 3, 224, 224). A layer's bias moves
    by the mean difference between its FP32 and its INT8 output, where the INT8 layers before it give its input (Nagel
    et al. 2019, section 4.2). Returns {layer: largest move of a bias, in the layer's FP32 units}.
    """
    def mean(x):                                                                # over positions: (n, out)
        return x.flatten(2).mean(2) if x.dim() == 4 else x

    recipe = int8_model.recipe
    if not (recipe["GPTQ"] or recipe["BIAS_CORRECTION"]):
        return {}
    moved, xs = {}, [chunk.float() for chunk in pixels.split(5)]                # FP32 inputs of a layer
    qs = [next(int8_model.activations(chunk))[1] for chunk in pixels.split(5)]  # INT8 inputs
    for layer in LAYERS:
        part, part8 = getattr(model, layer.name), getattr(int8_model, layer.name)
        w_scale = part8.w_scale.expand(part8.bias.shape)
        if recipe["GPTQ"] and layer.bn:     # fully connected: one position a picture, too few for so many inputs
            patches = (F.unfold(q.float(), part.kernel_size, stride=6) for q in qs)     # (5, K, positions)
            moments = sum(torch.einsum("nkp,njp->kj", chunk, chunk) for chunk in patches).double()
            part8.weight.copy_(gptq(part.weight.flatten(1).double(), w_scale.double(), moments,
                                    int_range(recipe["BIT"])).reshape(part8.weight.shape))
        relu = getattr(model, layer.relu) if layer.relu else nn.Identity()
        bias = spread(part8.bias.float(), part.weight.dim() - 2)
        unit = int8_model.sum_scale(layer).expand(w_scale.shape)                # integers per unit of a sum
        sums, gaps = [], []
        for i, q in enumerate(qs):
            x = relu(model.linear(layer, xs[i]))                                # cnn1: FP32 (5, 16, 220, 220)
            sums.append(int8_model.sums(layer, q if layer.pool else q.flatten(1)))
            gaps.append(mean(x) - mean(relu(sums[i] + bias)) / unit)
            xs[i] = int8_model.maxpool(x) if layer.pool else x
        if recipe["BIAS_CORRECTION"]:
            limit = 2**(recipe["BIAS_BIT"] - 1) - 1
            gap = torch.cat(gaps).mean(0).nan_to_num(0, 0, 0)                   # 0: a mean overflowed
            part8.bias.copy_((part8.bias + torch.round(gap * unit).double()).clip(-limit, limit))
            moved[layer.name] = gap.abs().max().item()
        qs = [int8_model.rescale(layer, sums.pop(0)) for _ in gaps]             # freed one by one
        qs = [int8_model.maxpool(q) for q in qs] if layer.pool else qs
    return moved


# %% [markdown]
# ## Checkpoints
# Nothing that a checkpoint brings is executed: torch's safe loader builds tensors and plain values, and, for the
# notebook's own format, objects of the classes listed here, from which only tensors are read.

# %%
LARGEST_CHECKPOINT = 2**28      # bytes, packed or not: a hundred times what this network needs
ALLOWED_CLASSES = [CNN_Model, (CNN_Model, "__main__.CNN_Model"), MaxPool2d, (MaxPool2d, "__main__.MaxPool2d"),
                   nn.Conv2d, nn.BatchNorm2d, nn.ReLU, nn.MaxPool2d, nn.Linear, nn.Softmax]


def tensors_of(module):
    """{name: tensor} of a loaded module, read from its attributes without calling any of its methods."""
    tensors = {}
    for kind in ("_parameters", "_buffers"):
        tensors.update({k: v for k, v in vars(module).get(kind, {}).items() if isinstance(v, torch.Tensor)})
    for name, part in vars(module).get("_modules", {}).items():
        tensors.update({f"{name}.{key}": tensor for key, tensor in tensors_of(part).items()})
    return tensors


def weights_of(model):
    """{name: tensor} of an FP32 model's weights, biases and batch-norm statistics, without ranges."""
    return {name: value for name, value in model.state_dict().items()
            if value.is_floating_point() and not name.startswith("range_")}


def intact(path):
    """A checkpoint's archive, written anew from what its checksums vouch for, as a file. Raises ValueError or what
    zipfile raises where they do not.

    torch.load ignores the checksums of its format, zip: a flipped bit would be a wrong weight.
    """
    if path.stat().st_size > LARGEST_CHECKPOINT:
        raise ValueError("too large")
    fresh = io.BytesIO()
    with zipfile.ZipFile(path) as archive, zipfile.ZipFile(fresh, "w") as copy:
        names = archive.namelist()
        if len(set(names)) < len(names) or sum(part.file_size for part in archive.infolist()) > LARGEST_CHECKPOINT:
            raise ValueError("two parts of one name, or too large")
        for name in names:
            copy.writestr(name, archive.read(name))
    fresh.seek(0)
    return fresh


def load_checkpoint(path):
    """Return (the names that a checkpoint holds, its model on DEVICE).

    {"model": state_dict or CNN_Model} gives a CNN_Model, {"model": tensors, "recipe": {constant: value}}, as
    `save_checkpoint` writes it, an INT8_Model. Raises InputError when the file is missing, damaged or unsafe, or when
    a tensor is missing, of another shape or type, or not finite.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"no checkpoint {path}: put the file there or set CHECKPOINT")
    try:
        content = intact(path)
        with torch.serialization.safe_globals(ALLOWED_CLASSES), warnings.catch_warnings(action="ignore"):
            saved = torch.load(content, map_location="cpu", weights_only=True)
        recipe, saved = saved.get("recipe"), saved["model"]
        recipe = None if recipe is None else {name: recipe[name] for name in RECIPE}
        saved = tensors_of(saved) if isinstance(saved, CNN_Model) else dict(saved)
    except Exception as error:      # damaged bytes raise nearly every type inside torch's loader
        unsafe = re.search(r"(?:GLOBAL|global:?|class|function) ([\w.]+\.\w+)", str(error))
        reason = (f"holds {unsafe[1]}, which this network does not need; it was not loaded" if unsafe else
                  f"is damaged, or no checkpoint of torch 1.6 or newer ({type(error).__name__})")
        raise InputError(f"checkpoint {path} {reason}: give a file with {{'model': state_dict}}") from None
    legal = legal_values()
    for name, value in (recipe or {}).items():
        is_legal, what = legal[name]
        if not is_legal(value):
            raise InputError(f"checkpoint {path}: its recipe has no legal {name}, which is {what}; quantize again")
    model = CNN_Model() if recipe is None else INT8_Model(recipe)
    needed = weights_of(model) if recipe is None else model.state_dict()
    for name, value in needed.items():
        problem = problem_of(name, saved.get(name), value, recipe)
        if problem:
            raise InputError(f"checkpoint {path}: {name} {problem}; give a checkpoint of this network")
    model.load_state_dict({name: saved[name] for name in needed}, strict=False)
    for layer in LAYERS if recipe else []:
        if not (model.largest_accumulator(layer) * model.multiplier(layer)).isfinite().all():
            raise InputError(f"checkpoint {path}: scales around {layer.name} overflow FP32; quantize again")
    return list(saved), model.to(DEVICE).eval().to(memory_format=torch.channels_last)


def problem_of(name, found, needed, recipe):
    """What is wrong with a checkpoint's tensor, in words; None when it can stand for `needed`."""
    if not isinstance(found, torch.Tensor):
        return "is missing"
    if found.layout != torch.strided or found.is_meta or found.is_quantized:
        return f"is no dense tensor ({found.dtype})"
    if found.dtype != needed.dtype and not (found.is_floating_point() and needed.is_floating_point()):
        return f"is {found.dtype}, not {needed.dtype}"
    if found.shape != needed.shape:
        return f"has shape {tuple(found.shape)}, not {tuple(needed.shape)}"
    if not found.float().isfinite().all():
        return "has a NaN or an infinity in it, as FP32"
    if name.endswith("running_var") and (found < 0).any():
        return "has a negative variance in it"
    if "scale" in name and not (found.float() > 0).all():
        return "has a scale in it that is not positive"
    if not found.is_floating_point():
        limit = 2**(recipe["BIT" if name.endswith("weight") else "BIAS_BIT"] - 1) - 1
        if (found.long().abs() > limit).any():
            return f"has an integer in it beyond {limit}"
    return None


def save_checkpoint(model, path):
    """Write an INT8_Model: its recipe, and tensors. Raises InputError when the file cannot be written."""
    tensors = {name: tensor.cpu().contiguous() for name, tensor in model.state_dict().items()}
    file = io.BytesIO()
    torch.save({"recipe": model.recipe, "model": tensors}, file)
    write_whole(path, file.getvalue())


def write_whole(path, content):
    """Write bytes to a file, whole or not at all. Raises InputError when it cannot be written."""
    path = Path(path)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(content)
        os.replace(temporary, path)
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror}; set OUTPUT_DIR") from None
    finally:
        temporary.unlink(missing_ok=True)


# %% [markdown]
# ## The passes
# Calibration and evaluation are the same walk over the pictures; during calibration the observers are on.

# %%
class Outcome(NamedTuple):
    files: list             # n file names
    labels: torch.Tensor    # int64 (n,)
    logits: torch.Tensor    # FP32 (n, 2)

    @property
    def classes(self):
        """0 or 1; where the logits are equal, 0, cat."""
        return self.logits.argmax(1)

    @property
    def top1(self):
        """Percent of the pictures whose class is their label."""
        return 100 * (self.classes == self.labels).double().mean().item()


@torch.inference_mode()
def evaluate(name, model, pictures):
    """Run a model over the pictures, print how far it is and its Top-1 so far, and return the Outcome.

    A terminal shows one line that changes, anything else a line every ten seconds, and both the last.
    """
    meter, terminal = tnt.ClassErrorMeter(topk=[1], accuracy=True), sys.stdout.isatty()
    files, labels, logits = [], torch.zeros(len(pictures), dtype=torch.int64), torch.zeros(len(pictures), 2)
    start, shown = time.perf_counter(), 0
    for batch in pictures.batches():
        rows = slice(len(files), len(files) + len(batch.files))
        labels[rows], logits[rows] = batch.labels, model(batch.pixels.to(DEVICE)).cpu()
        meter.add(logits[rows], batch.labels)
        files.extend(batch.files)
        seconds = time.perf_counter() - start
        line = (f"{name} Top1: {meter.value()[0]:.3f}, {len(files)} of {len(pictures)} pictures, "
                f"{len(files) / seconds:.0f} a second")
        if seconds - shown >= (0.1 if terminal else 10):
            left = f"{line}, {(len(pictures) - len(files)) * seconds / len(files):.0f} seconds left"
            print(f"\r{left}\033[K" if terminal else left, end="" if terminal else "\n", flush=True)
            shown = seconds
    print(f"\r{line}\033[K" if terminal else line)
    return Outcome(files, labels[:len(files)], logits[:len(files)])


def in_common(outcome, other):
    """Both Outcomes, cut down to the pictures that both have: files may come and go while the run looks at them.

    Raises InputError when there is none.
    """
    names = set(outcome.files) & set(other.files)
    if not names:
        raise InputError("every picture came or went while the run looked at them: run it again")
    return [Outcome([name for name in each.files if name in names], each.labels[keep], each.logits[keep])
            for each in (outcome, other) for keep in [torch.tensor([name in names for name in each.files])]]


@torch.inference_mode()
def time_networks(networks, pixels):
    """{name: median ms a picture} of {name: network}, in turns on one batch of `pixels`, which is in memory already.

    At least two pictures: the FP32 network makes two of one, see `linear`.
    """
    batch, ms = torch.cat([pixels, pixels])[:max(BATCH_SIZE, 2)], {name: [] for name in networks}
    for _ in range(15):
        for name, network in networks.items():
            start = time.perf_counter()
            network(batch).cpu()                                # .cpu() waits for a GPU
            ms[name].append(1e3 * (time.perf_counter() - start) / len(batch))
    return {name: float(np.median(times)) for name, times in ms.items()}


def calibrate(model, pictures):
    """The FP32 pass that sets the ranges. Raises InputError where weights are so large that FP32 overflows.

    It runs with the batch norms already folded, which takes a sixth less time; the run proves below that folding
    changes nothing but the last digits.
    """
    fused = model.fused()
    fused.observe(len(pictures))
    outcome = evaluate("FP32", fused, pictures)
    for place in PLACES:
        range_data = getattr(fused, f"range_{place}")
        if not (range_data * HEADROOM).isfinite().all():
            raise InputError(f"values at {place} overflow FP32: give a checkpoint with smaller weights")
        getattr(model, f"range_{place}").copy_(range_data)
        model.maxima[place] = fused.maxima[place][:fused.seen]
    return outcome


def sample(pictures, count=20):
    """Pixels of the first pictures, at most `count`, on DEVICE, to prove a transformation on."""
    pixels, count_so_far = [], 0
    for batch in pictures.batches():
        pixels.append(batch.pixels)
        count_so_far += len(batch.files)
        if count_so_far >= count:
            break
    return torch.cat(pixels)[:count].to(DEVICE)


@torch.inference_mode()
def largest_change(model, other, pixels):
    """Largest |difference| between two models' logits."""
    return (model(pixels) - other(pixels)).abs().max().item()


@torch.inference_mode()
def choose_engine(int8_model, pixels):
    """Set int8_model to the executor that INT8_ENGINE asks for, after comparing both, every value at every place.

    Returns {"compared": values, "different": values, "why": a sentence}. Raises InputError where "onednn" is
    forced and cannot run.
    """
    int8_model.engine = "reference"
    exact = {"compared": 0, "different": 0, "why": "forced by INT8_ENGINE"}
    if INT8_ENGINE == "reference":
        return exact
    expected = list(int8_model.activations(pixels))
    try:
        int8_model.use_kernels()
        for (_, x), (_, y) in zip(expected, int8_model.activations(pixels)):
            exact["compared"] += x.numel()
            exact["different"] += int((x != y).sum())
        exact["why"] = ("this CPU's kernels add pairs of products in 16 bits" if kernels_saturate() else
                        "this CPU's kernels give other integers" if exact["different"] else None)
    except (RuntimeError, AttributeError) as error:             # another device, or a torch without them
        exact["why"] = f"no INT8 kernels here ({' '.join(str(error).split())[:80]})"
        if INT8_ENGINE == "onednn":
            raise InputError(f'INT8_ENGINE = "onednn": {exact["why"]}; set it to "auto"') from None
    if exact["why"] and INT8_ENGINE == "auto":
        int8_model.engine = "reference"
    exact["why"] = exact["why"] or "its kernels agree with the reference"
    return exact


# %% [markdown]
# ## What quantization did
# Where is the error born? Where do the ranges come from? How many calibration pictures are enough? What would fewer
# bits do? Is the difference between the answers more than chance? Nothing here changes a network.

# %%
BINS = 1024         # of a histogram, from 0 to the range


def flat(x):
    """All values in one row; maps in the order in which they lie in memory, so that nothing is copied."""
    return (x.permute(0, 2, 3, 1) if x.dim() == 4 else x).reshape(-1)


def histogram(x, largest):
    """Counts (4 * BINS,) of FP32 values from -2 to 2 times `largest`; the outer bins count what is beyond, too."""
    bins = (x * (BINS / max(largest, SMALLEST)) + 2 * BINS).clamp_(0, 4 * BINS - 1).short()
    return torch.bincount(flat(bins), minlength=4 * BINS)


def energy(x):
    """Sum of squares, in FP32, good for four digits or 0.001 dB; in FP64 where it overflows."""
    norm = torch.linalg.vector_norm(x).item()
    return (norm if norm < math.inf else torch.linalg.vector_norm(x.double()).item())**2


def decibels(signal, noise):
    """Ratio of two energies in dB; None when there is no noise."""
    return 10 * math.log10(max(signal / noise, 1e-300)) if noise else None


def sqnr_db(signal, changed):
    """Signal-to-quantization-noise ratio in dB; None when there is no noise."""
    return decibels(energy(signal.double()), energy(signal.double() - changed.double()))


def agreement(logits, other):
    """Share of the pictures that both give the same class."""
    return (logits.argmax(1) == other.argmax(1)).double().mean().item()


def round_trip(int8_model, place, x):
    """FP32 values to the integers of a place and back; logits that stay FP32 stay what they are."""
    if int8_model.is_fp32(place):
        return x
    scale = getattr(int8_model, f"scale_{place}")
    return round_and_clip(x, scale, int8_model.integers[place]).div_(scale)


def rounding_errors(model, int8_model, layer):
    """What quantization adds to a layer's FP32 weight and bias, in their shapes.

    The biases are those of before the bias correction, which makes up for what is inherited.
    """
    part, part8 = getattr(model, layer.name), getattr(int8_model, layer.name)
    bias = weight_quant(part.weight, part.bias, getattr(int8_model, f"scale_{layer.source}"), int8_model.recipe)[1]
    return (part8.weight / spread(part8.w_scale, part.weight.dim() - 1) - part.weight,
            bias / int8_model.sum_scale(layer) - part.bias)


def quantized_alone(model, int8_model, layer, x, weight, bias):
    """{part: a layer's output on its FP32 input x when that part is quantized}; "fp32": none, "born": all of them.

    weight, bias: the layer's `rounding_errors`.
    """
    by_weights = F.conv2d(x, weight) if layer.bn else F.linear(x.flatten(1), weight)
    by_biases = spread(bias, weight.dim() - 2)
    sums, activate = model.linear(layer, x), F.relu_ if layer.relu else lambda x: x
    both = activate((sums + by_weights).add_(by_biases))
    found = {"weights": activate(by_weights.add_(sums)), "biases": activate(sums + by_biases), "fp32": activate(sums)}
    return found | {"rounding": round_trip(int8_model, layer.place, found["fp32"]),
                    "born": round_trip(int8_model, layer.place, both)}


@torch.inference_mode()
def error_ledger(model, int8_model, pixels):
    """Where the error is born. model: the folded network that int8_model was made from; pixels: uint8 (n, 3, 224, 224).

    Runs side by side: the FP32 network, the INT8 network, and for each layer one that quantizes this layer alone.
    Returns a dict a layer, and {place: histogram of its FP32 values}. "sqnr_db" is in dB, None for no error:
    at the layer's output the INT8 network's error ("int8"), what of it comes with the layer's input ("inherited": FP32
    layer, INT8 input), the error of quantizing this layer alone ("born") and its parts ("weights", "biases" and
    "rounding" of the output); and the error of quantizing this layer alone at the logits ("logits").
    """
    names = {"input": "input"} | {layer.place: layer.name for layer in LAYERS}      # {place: its row}
    rows = {name: Counter() for name in names.values()}         # {row: {kind of error: its energy; count: so many}}
    histograms, codes = Counter(), Counter()                    # {place: counts}, {place: counts of its integers}
    errors = {layer.name: rounding_errors(model, int8_model, layer) for layer in LAYERS}
    for chunk in pixels.split(5):
        x, others = chunk.float(), {}       # what the next layer reads: of the FP32 network, {of another: values}
        for (place, q), layer in zip(int8_model.activations(chunk), [None, *LAYERS]):
            row, to, scale = rows[names[place]], int8_model.integers[place], getattr(int8_model, f"scale_{place}")
            if layer:
                others = {name: model.linear(layer, values) for name, values in others.items()}
                others = {name: F.relu_(values) if layer.relu else values for name, values in others.items()}
                found = quantized_alone(model, int8_model, layer, x, *errors[layer.name])
                found["inherited"] = others["int8"]
                x = found.pop("fp32")
            else:
                found = dict.fromkeys(("rounding", "born"), round_trip(int8_model, place, x))
            found["int8"] = q if int8_model.is_fp32(place) else q / scale
            row.update({kind: energy(values - x) for kind, values in found.items()}, signal=energy(x))
            histograms[place] += histogram(x, ((to.high + 0.5) / scale).item())
            if not int8_model.is_fp32(place):
                row.update(values=x.numel(), clipped=int(torch.count_nonzero(x.abs() > (to.high + 0.5) / scale)))
                codes[place] += torch.bincount(flat(q).int() - to.low, minlength=to.high - to.low + 1)
            others |= {"int8": found["int8"], names[place]: found["born"]}
            if layer and layer.pool:
                x, others = int8_model.maxpool(x), {name: int8_model.maxpool(values) for name, values in others.items()}
        for name, row in rows.items():
            row["logits"] += energy(others[name] - x)

    ledger = []
    for place, name in names.items():
        row, clipped, used, available = rows[name], None, None, None        # None where the logits stay FP32
        if place in codes:
            clipped, used, available = row["clipped"] / row["values"], int((codes[place] > 0).sum()), len(codes[place])
        sqnr = {kind: decibels(row["signal"], row[kind])
                for kind in ("int8", "inherited", "born", "weights", "biases", "rounding")}
        sqnr["logits"] = decibels(rows["fc2"]["signal"], row["logits"])
        ledger.append({"name": name, "sqnr_db": sqnr, "clipped": clipped, "codes_used": used, "codes": available,
                       "hurts_most": False})
    guilty = [row for row in ledger if row["sqnr_db"]["logits"] is not None]
    if guilty:
        min(guilty, key=lambda row: row["sqnr_db"]["logits"])["hurts_most"] = True
    return ledger, {place: counts.cpu() for place, counts in histograms.items()}


@torch.inference_mode()
def range_sources(model, files, pixels):
    """Where a range comes from: a dict a place with the range, the picture that set it and its number, and the 99.9th
    percentile of the magnitudes on `pixels`, to a thousandth of the range. files: names of the calibration pictures.
    """
    folded, histograms, rows = model.fused(), Counter(), []
    largest = {place: model.maxima[place].amax(1).cpu().numpy() for place in PLACES}        # (pictures,)
    for chunk in pixels.split(5):
        for place, x in folded.activations(chunk):
            histograms[place] += histogram(x.abs(), largest[place].max().item())
    for place, values in largest.items():
        share = histograms[place].cumsum(0) / histograms[place].sum()
        bins = (share < 0.999).sum().item() + 1 - 2 * BINS                                  # upper edge of the bin
        index = int(values.argmax())                                                        # the first, if several
        rows.append({"place": place, "range": values[index].item(), "file": files[index], "number": index + 1,
                     "percentile999": values[index].item() * min(bins / BINS, 1)})
    return rows


def quantized(model, count, pixels, engine, **changes):
    """The INT8_Model that the run below makes in steps, calibrated on the first `count` pictures that `model` observed.

    pixels: the first calibration pictures; changes: constants of the recipe that are to be others.
    """
    folded, recipe = model.fused(), current_recipe() | changes
    for place in PLACES:
        getattr(folded, f"range_{place}").copy_(model.maxima[place][:count].amax(0))
    if recipe["EQUALIZE"]:
        equalize(folded)
    int8_model = folded.cl_scale(recipe)
    refine(int8_model, folded, pixels[:count])
    if engine == "onednn":
        int8_model.use_kernels()
    return int8_model


@torch.inference_mode()
def calibration_curve(model, int8_model, calibration_pixels, pixels, fp32_logits):
    """How many pictures are enough: a dict for the first 1, 2, 5, 10, 20, 50, ... calibration pictures and for all.

    Each holds the place's ranges as shares of the last, and how an INT8 network calibrated on so many answers `pixels`:
    "agreement" with FP32 and "sqnr_db" of the logits, "as_last" whether every class is the one of the last.
    """
    total = len(model.maxima["input"])
    counts = [k * 10**exponent for exponent in range(len(str(total))) for k in (1, 2, 5) if k * 10**exponent < total]
    rows = []
    for count in counts + [total]:
        other = int8_model if count == total else quantized(model, count, calibration_pixels, int8_model.engine)
        logits = torch.cat([other(chunk).cpu() for chunk in pixels.split(5)])
        ranges = {place: (maxima[:count].max() / maxima.max()).item() if maxima.max() else 1.0
                  for place, maxima in model.maxima.items()}
        rows.append({"pictures": count, "ranges": ranges, "sqnr_db": sqnr_db(fp32_logits, logits),
                     "agreement": agreement(fp32_logits, logits), "classes": logits.argmax(1)})
    last = rows[-1]["classes"]
    return [row | {"as_last": torch.equal(row.pop("classes"), last)} for row in rows]


def sweep_bits(model, calibration_pixels, evaluation, fp32, engine):
    """The same network, pictures and recipe with BIT 8 down to 2: a dict each, with the seconds that it took."""
    rows = []
    for bit in range(8, 1, -1):
        start = time.perf_counter()
        int8_model = quantized(model, len(model.maxima["input"]), calibration_pixels, engine, BIT=bit)
        expected, found = in_common(fp32, evaluate(f"{bit} bits", int8_model, evaluation))
        rows.append({"bit": bit, "top1": found.top1, "sqnr_db": sqnr_db(expected.logits, found.logits),
                     "agreement": agreement(expected.logits, found.logits),
                     "size_bytes": size_of(int8_model), "seconds": time.perf_counter() - start})
    return rows


def wilson(correct, n, z=1.959964):
    """95 % Wilson score interval of a share, in percent (Wilson 1927)."""
    share = correct / n
    middle = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return max(0, 100 * (middle - half)), min(100, 100 * (middle + half))


def mcnemar(gained, lost):
    """Exact two-sided p-value: how likely a fair coin splits as unevenly the pictures that only one network has right
    (McNemar 1947)."""
    pictures = gained + lost
    tail = sum(math.comb(pictures, k) for k in range(min(gained, lost) + 1))
    return min(1.0, 2 * tail / 2**pictures)


def compare_answers(fp32, int8):
    """Two Outcomes of the same pictures: what changed its class, whether that is more than chance, and how often each
    label got each answer."""
    changed = (fp32.classes != int8.classes).nonzero().flatten().tolist()
    flips = [{"file": fp32.files[i], "label": CLASSES[fp32.labels[i]],
              "better": bool(int8.classes[i] == int8.labels[i]),
              "fp32_logits": fp32.logits[i].tolist(), "int8_logits": int8.logits[i].tolist(),
              "fp32_margin": (fp32.logits[i].max() - fp32.logits[i].min()).item()} for i in changed]
    gained = sum(flip["better"] for flip in flips)
    lost = len(flips) - gained              # two classes: a change is from wrong to right, or from right to wrong
    confusion = {name: torch.bincount(2 * outcome.labels + outcome.classes, minlength=4).reshape(2, 2).tolist()
                 for name, outcome in (("fp32", fp32), ("int8", int8))}
    return {"agreement": 1 - len(flips) / len(fp32.files), "logit_sqnr_db": sqnr_db(fp32.logits, int8.logits),
            "flips": flips, "mcnemar": {"gained": gained, "lost": lost, "p": mcnemar(gained, lost)},
            "confusion": confusion}


# %% [markdown]
# ## Report

# %%
def layer_rows(int8_model):
    """One dict a layer: what quantization made of it."""
    rows = []
    for layer in LAYERS:
        part, to = getattr(int8_model, layer.name), int8_model.integers[layer.place]
        scale_out = getattr(int8_model, f"scale_{layer.place}").item()
        rows.append({
            "name": layer.name, "shape": list(part.weight.shape), "range": to.high / scale_out,
            "scale_in": getattr(int8_model, f"scale_{layer.source}").item(),
            "scale_out": None if int8_model.is_fp32(layer.place) else scale_out,
            "weight_scale": part.w_scale.tolist(),
            "accumulator_bits": int8_model.accumulator_bits(layer)})
    return rows


def print_layers(rows):
    print("layer  weight shape      range kept   scale in     scale out    weight scale             accumulator bits")
    for row in rows:
        low, high = min(row["weight_scale"]), max(row["weight_scale"])
        shape = " x ".join(map(str, row["shape"]))
        out = "FP32" if row["scale_out"] is None else f"{row['scale_out']:.6g}"
        weights = f"{low:.6g}" + (f" .. {high:.6g}" if high > low else "")
        print(f"{row['name']:<6} {shape:<17} {row['range']:<12.6g} {row['scale_in']:<12.6g} {out:<12} {weights:<24} "
              f"{row['accumulator_bits']}")


def size_of(model):
    """Bytes of a model's parameters: FP32, or weights of BIT bits, biases of BIAS_BIT and FP32 scales."""
    if isinstance(model, CNN_Model):
        return 4 * sum(value.numel() for value in weights_of(model).values())
    bits = {torch.int8: model.recipe["BIT"], torch.int32: model.recipe["BIAS_BIT"], torch.float32: 32}
    return sum(math.ceil(value.numel() * bits[value.dtype] / 8) for value in model.state_dict().values())


def build_report(constants, calibrated, skipped, fp32, int8, model, int8_model, exact, ms):
    """Everything the passes found out, as plain values for JSON; fp32 and what needs it None when only INT8 was run.

    Raises InputError where a picture that did not calibrate makes FP32 overflow.
    """
    for outcome in (fp32, int8):
        if outcome and not outcome.logits.isfinite().all():
            raise InputError("logits overflow FP32: give a checkpoint with smaller weights")

    def accuracy(name, outcome):
        correct = int((outcome.classes == outcome.labels).sum())
        return {"top1": outcome.top1, "correct": correct, "interval95": wilson(correct, len(outcome.files)),
                "ms_per_image": ms[name]}

    report = {
        "constants": constants, "recipe": int8_model.recipe, "torch": torch.__version__, "device": str(DEVICE),
        "images": {"evaluated": len(int8.files), "calibrated": calibrated},
        "skipped": [{"file": file, "reason": reason} for file, reason in skipped.items()],
        "fp32": None, "int8": {"engine": int8_model.engine, **accuracy("int8", int8)}, "speedup": None, "exact": exact,
        "agreement": None, "flips": [], "logit_sqnr_db": None, "mcnemar": None, "confusion": None,
        "layers": layer_rows(int8_model), "size_bytes": {"fp32": None, "int8": size_of(int8_model)}}
    if fp32 is None:
        return report
    report["size_bytes"]["fp32"] = size_of(model)
    return report | compare_answers(fp32, int8) | {
        "fp32": accuracy("fp32", fp32), "speedup": ms["fp32"] / ms["int8"]}


LISTED = 20         # pictures of a kind that the terminal lists; report.json has all


def db(value, unit=""):
    return "exact" if value is None else f"{value:.1f}{unit}"


def shown(name, width=1000):
    """A file's name without what would move a terminal's cursor, cut at the front where it is too long."""
    name = "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in name)
    return name if len(name) <= width else f"...{name[3 - width:]}"


def print_ledger(ledger, pictures):
    print(f"\nWhere is the error born? SQNR in dB on {pictures} pictures, the lower the worse; born: this layer "
          "quantized, all else FP32\nlayer   INT8 network  inherited     born: weights   biases  output's rounding   "
          "born, at the logits  clipped   codes used")
    for row in ledger:
        figures = {kind: db(value) for kind, value in row["sqnr_db"].items()}
        clipped = "stay FP32" if row["codes"] is None else f"{100 * row['clipped']:.3g} %"
        used = "" if row["codes"] is None else f"{row['codes_used']} of {row['codes']}"
        print("{:<7} {int8:>12}  {inherited:>9}  {born:>7}: {weights:>7}  {biases:>7}  {rounding:>17}   {logits:>19}  "
              "{:<9} {}".format(row["name"], clipped, used, **figures) + "  <- hurts most" * row["hurts_most"])


def print_ranges(sources, pictures, curve, compared):
    print(f"\nWhere do the ranges come from? 99.9 %: no more than that, of the values of {pictures} pictures\n"
          "place      range     99.9 %  range / that  set by picture")
    for row in sources:
        times = row["range"] / max(row["percentile999"], SMALLEST)
        print(f"{row['place']:<6} {row['range']:>9.5g}  {row['percentile999']:>9.4g}  {times:>12.1f}  "
              f"{row['number']:>6} {shown(row['file'])}")
    print("\nHow many calibration pictures are enough? Ranges in % of the last; INT8 against FP32 "
          f"on {compared}\npictures {' '.join(f'{place:>6}' for place in PLACES)}   same class  logit SQNR")
    for row in curve:
        ranges = " ".join(f"{100 * row['ranges'][place]:>6.1f}" for place in PLACES)
        print(f"{row['pictures']:>8} {ranges}   {100 * row['agreement']:>8.2f} % {db(row['sqnr_db'], ' dB'):>11}")
    last = curve[-1]["pictures"]
    settled = max((i + 1 for i, row in enumerate(curve) if not row["as_last"]), default=0)      # the row from which
    classes = (f"between {curve[-2]['pictures']} and {last} a class still changed" if 0 < settled == len(curve) - 1 else
               f"from {curve[settled]['pictures']} on no class changes")
    print(f"after picture {max(row['number'] for row in sources)} of {last} no range grows; {classes}")


def print_sweep(sweep):
    print("\nHow many bits?\nBIT    Top-1    same class  logit SQNR  bytes      seconds")
    for row in sweep:
        print(f"{row['bit']:<5} {row['top1']:>6.2f} %    {100 * row['agreement']:>6.2f} %  "
              f"{db(row['sqnr_db'], ' dB'):>10}  {row['size_bytes']:<9,}  {row['seconds']:.2f}")


def print_summary(report):
    n = report["images"]["evaluated"]
    print("\nSummary\nseconds: " + ", ".join(f"{stage} {taken:.2f}" for stage, taken in report["seconds"].items()))
    for name in ("fp32", "int8") if report["fp32"] else ("int8",):
        row = report[name]
        print(f"{name.upper()} Top1: {row['top1']:.3f} % ({row['correct']} of {n}), 95 % interval "
              f"{row['interval95'][0]:.1f} to {row['interval95'][1]:.1f} %, {row['ms_per_image']:.2f} ms a picture, "
              f"{report['size_bytes'][name]:,} bytes of parameters, packed")
    left_out = f"{len(report['skipped'])} files left out"
    if report["fp32"]:
        print(f"agreement {100 * report['agreement']:.2f} %, logit SQNR {db(report['logit_sqnr_db'], ' dB')}, INT8 "
              f"{report['speedup']:.1f} times as fast; {len(report['flips'])} of {n} pictures changed their class; "
              + left_out)
        for name in ("fp32", "int8"):
            (cats, cats_as_dogs), (dogs_as_cats, dogs) = report["confusion"][name]
            print(f"{name.upper()}: {cats + cats_as_dogs} cats, {cats_as_dogs} of them called dogs; "
                  f"{dogs + dogs_as_cats} dogs, {dogs_as_cats} called cats")
        print(verdict(report))
    else:
        print(left_out)
    for flip in report["flips"][:LISTED]:
        logits = [f"cat {cat:.3f} dog {dog:.3f}" for cat, dog in (flip["fp32_logits"], flip["int8_logits"])]
        print(f"  {shown(flip['file'])} ({flip['label']}): FP32 {logits[0]}, margin {flip['fp32_margin']:.3f} -> "
              f"INT8 {logits[1]}, for the {'better' if flip['better'] else 'worse'}")
    for row in report["skipped"][:LISTED]:
        print(f"  left out {shown(row['file'])}: {row['reason']}")
    hidden = max(0, len(report["flips"]) - LISTED) + max(0, len(report["skipped"]) - LISTED)
    if hidden:
        print(f"  ... and {hidden} more in report.json")


def verdict(report):
    """In words: is the difference between the two accuracies more than chance?"""
    test, (fp32, int8) = report["mcnemar"], (report[name]["interval95"] for name in ("fp32", "int8"))
    overlap = "overlap" if fp32[0] <= int8[1] and int8[0] <= fp32[1] else "do not overlap"
    return (f"INT8 corrects {test['gained']} and spoils {test['lost']} of FP32's answers: "
            f"{'no ' if test['p'] >= 0.05 else ''}more than chance (exact McNemar test, p = {test['p']:.2g}); the two "
            f"95 % intervals, which do not know that the pictures are the same, {overlap}")


BLUE, SKY, ORANGE, RED, GREEN, PINK, GRAY = "#0072B2 #56B4E9 #E69F00 #D55E00 #009E73 #CC79A7 #555555".split()
SHOWN = 8           # pictures in report.png


def draw_report(report, histograms, fp32, int8, folder):
    """The bytes of report.png. histograms: as error_ledger returns them; fp32, int8: Outcomes on the folder's pictures.

    The colours are those of Okabe and Ito, which the colour-blind can tell apart.
    """
    from matplotlib.figure import Figure        # here and not above: it takes a third of a second that only a run needs

    def axes_of(where, title, **settings):
        axes = figure.add_subplot(where)
        axes.set_title(title, loc="left", fontsize=13, fontweight="bold")
        axes.set(**settings)
        axes.spines[["top", "right"]].set_visible(False)
        return axes

    def draw_activations(grid):
        for i, (place, row) in enumerate(zip(PLACES, report["ledger"])):
            counts = histograms[place].reshape(128, -1).sum(1).double()     # bars 64 to 95: from 0 to the range
            share, edges = (counts / counts.sum()).numpy(), np.arange(129) / 32 - 2
            lowest = -1.4 if place in ("fc1", "fc2") else 0
            axes = axes_of(grid[i], place, yscale="log", xlim=(lowest, 1.4), ylim=(1e-8, 30))
            axes.stairs(share, edges, fill=True, color=SKY if row["clipped"] is None else RED)
            axes.stairs(share[32:96], edges[32:97], fill=True, color=SKY)
            for edge in (lowest < 0) * [-1] + [1]:
                axes.axvline(edge, color=RED, linestyle="--", ymax=0.85)
            clipped = "stays FP32" if row["clipped"] is None else f"{100 * row['clipped']:.3g} % clipped"
            axes.text(0.5, 0.98, clipped, transform=axes.transAxes, ha="center", va="top", fontsize=11, color=GRAY)
            axes.set_yticks([1e-8, 1e-6, 1e-4, 1e-2, 1], [] if i else None)
            axes.set_xlabel("value / largest kept" if i == 0 else "")

    def draw_ranges(where):
        axes, curve = axes_of(where, "Ranges, by calibration pictures", xscale="log", xlabel="pictures",
                              ylabel="% of the last range", ylim=(0, 108)), report["calibration_curve"]
        pictures = [row["pictures"] for row in curve]
        for place, color, marker in zip(PLACES, (GRAY, BLUE, SKY, GREEN, ORANGE, RED, PINK), "xosD^vP"):
            axes.plot(pictures, [100 * row["ranges"][place] for row in curve], color=color, marker=marker, label=place)
        axes.plot(pictures, [100 * row["agreement"] for row in curve], "k:", linewidth=2.5, label="same class")
        ticks = [count for count in pictures if len(pictures) < 9 or str(count)[0] == "1"]
        ticks = [count for count in ticks if 1.9 * count < pictures[-1]] + pictures[-1:]
        axes.set_xticks(ticks, ticks)
        axes.minorticks_off()
        axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), fontsize=10, frameon=False)

    def draw_ledger(where):
        axes = axes_of(where, "Where the error is born, in % of the signal")
        kinds = [("inherited", SKY, "inherited from the input"), ("born", BLUE, "born in the layer"),
                 ("logits", ORANGE, "what that does to the logits")]
        percent = lambda row, kind: 0 if row["sqnr_db"][kind] is None else 100 * 10**(-row["sqnr_db"][kind] / 20)
        for i, (kind, color, label) in enumerate(kinds):
            axes.bar(np.arange(len(PLACES)) + 0.27 * (i - 1), [percent(row, kind) for row in report["ledger"]], 0.25,
                     color=color, label=label)
        top = max(percent(row, kind) for row in report["ledger"] for kind, _, _ in kinds) or 1
        axes.set_ylim(0, 1.95 * top)
        for i, row in enumerate(report["ledger"]):
            if row["hurts_most"]:
                axes.annotate("hurts most", (i + 0.27, percent(row, "logits")), (i + 0.27, 1.15 * top), ha="center",
                              fontsize=11, color=RED, fontweight="bold", arrowprops={"arrowstyle": "->", "color": RED})
        axes.set_xticks(range(len(PLACES)), [row["name"] for row in report["ledger"]])
        axes.legend(loc="upper left", fontsize=10, frameon=False)

    def draw_bits(grid):
        bits = [row["bit"] for row in report["sweep_bits"]]
        axes = axes_of(grid[0], "Accuracy and size, by bits", ylabel="Top-1, %", ylim=(0, 108), xlim=(8.6, 1.4))
        axes.axhline(fp32.top1, color=GRAY, linestyle="--", label="FP32")
        axes.plot(bits, [row["top1"] for row in report["sweep_bits"]], color=BLUE, marker="o", label="quantized")
        axes.legend(loc="lower left", fontsize=10, frameon=False)
        axes.set_xticks(bits, [])
        axes = axes_of(grid[1], "", xlabel="bits", ylabel="KB", xlim=(8.6, 1.4))
        bars = axes.bar(bits, [row["size_bytes"] / 1000 for row in report["sweep_bits"]], 0.6, color=ORANGE)
        axes.bar_label(bars, fmt="%.0f", fontsize=10)
        axes.set_ylim(0, 1.3 * axes.get_ylim()[1])
        axes.set_xticks(bits)

    def draw_pictures(grid):
        margins = (fp32.logits[:, 0] - fp32.logits[:, 1]).abs().numpy()
        changed = (fp32.classes != int8.classes).numpy()
        order = np.lexsort((np.where(changed, -margins, margins), ~changed))        # changed first, the surest first
        for cell, i in zip(grid, order[:SHOWN]):
            axes, pixels = figure.add_subplot(cell), decode_or_reason(folder / fp32.files[i])
            axes.imshow(np.full((1, 1, 3), 200, np.uint8) if isinstance(pixels, str) else pixels)
            axes.set_axis_off()
            answers = [f"{CLASSES[classes]} by {(logits.max() - logits.min()).item():.3f}" for classes, logits in
                       ((fp32.classes[i], fp32.logits[i]), (int8.classes[i], int8.logits[i]))]
            name = fp32.files[i].encode("ascii", "backslashreplace").decode()      # the font knows few other letters
            text = f"{shown(name, 15)} ({CLASSES[fp32.labels[i]]})\nFP32 {answers[0]}\nINT8 {answers[1]}"
            axes.text(0.5, -0.04, text, fontsize=11, va="top", ha="center", transform=axes.transAxes, parse_math=False,
                      color=RED if changed[i] else "black")

    figure, n = Figure(figsize=(16, 9), dpi=120), report["images"]["evaluated"]
    heading = dict(x=0.05, fontsize=13, fontweight="bold")
    smaller = report["size_bytes"]["fp32"] / report["size_bytes"]["int8"]
    figure.text(0.05, 0.96, f"INT8 answers {n - len(report['flips']):,} of {n:,} pictures as FP32; "
                f"Top-1 {fp32.top1:.2f} -> {int8.top1:.2f} %; logit SQNR {db(report['logit_sqnr_db'], ' dB')}; "
                f"{report['speedup']:.1f} x as fast, {smaller:.1f} x as small", fontsize=15)
    figure.text(y=0.915, s="Activations: share of the FP32 values; beyond the dashed range they are clipped (HEADROOM "
                "widens cv4's and fc1's)", **heading)
    rows = figure.add_gridspec(3, 1, left=0.05, right=0.985, top=0.875, bottom=0.08, hspace=0.5,
                               height_ratios=[1, 1.3, 0.8])
    draw_activations(rows[0].subgridspec(1, len(PLACES), wspace=0.1))
    middle = rows[1].subgridspec(1, 3 if "sweep_bits" in report else 2, wspace=0.5)
    draw_ranges(middle[0])
    draw_ledger(middle[1])
    if "sweep_bits" in report:
        draw_bits(middle[2].subgridspec(2, 1, height_ratios=[2, 1], hspace=0.12))
    figure.text(y=0.26, s="Pictures that changed, in red, then those with the smallest FP32 margin" if report["flips"]
                else "No picture changed; those with the smallest FP32 margin", **heading)
    draw_pictures(rows[2].subgridspec(1, SHOWN, wspace=0.1))
    file = io.BytesIO()
    with warnings.catch_warnings(action="ignore"):
        figure.savefig(file, format="png")
    return file.getvalue()


def print_pictures(pictures):
    print(f"{pictures.folder}: {len(pictures)} pictures, {pictures.labels.count(0)} cat and "
          f"{pictures.labels.count(1)} dog")


def make_writable(folder):
    """Make the folder; raise InputError now, not after the run, when 8 MB, more than a run writes, find no room."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f"probe.{os.getpid()}.tmp"
        try:
            probe.write_bytes(bytes(2**23))
        finally:
            probe.unlink(missing_ok=True)
    except OSError as error:
        raise InputError(f"cannot write in {folder}: {error.strerror}; set OUTPUT_DIR") from None


def stop(*_):
    """What Ctrl-C does."""
    raise SystemExit("stopped by Ctrl-C; files of earlier runs are as they were")


class Stopwatch(dict):
    """{stage: seconds}. `lap` ends a stage, which began where the one before it ended."""

    def __init__(self):
        self.began = time.perf_counter()

    def lap(self, stage):
        self.began, began = time.perf_counter(), self.began
        self[stage] = self.began - began


# %% [markdown]
# ## The run

# %%
if __name__ == "__main__":
    # %% constants, device, version
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")       # a file's name may hold what a terminal cannot show
    signal.signal(signal.SIGINT, stop)
    watch = Stopwatch()
    constants = check_constants()
    make_writable(ROOT / OUTPUT_DIR)
    print(f"device {DEVICE}, torch {torch.__version__}")

    # %% pictures and labels
    calibration = evaluation = CatDogDataset(ROOT / DATA_DIR / EVALUATION_SPLIT)
    print_pictures(evaluation)

    # %% checkpoint and model; an INT8 checkpoint has the steps between here and the INT8 pass behind it
    names, model = load_checkpoint(ROOT / CHECKPOINT)
    print(f"pretrained_dict:\n dict_keys({names})")
    quantizing, fp32, calibrated = isinstance(model, CNN_Model), None, None      # the two: Outcomes
    print(model if quantizing else f"INT8 checkpoint, made with {model.recipe}, whatever the constants say")
    watch.lap("list, load")

    # %% FP32 calibration: the observers see every picture
    if quantizing:
        if CALIBRATION_SPLIT != EVALUATION_SPLIT:
            calibration = CatDogDataset(ROOT / DATA_DIR / CALIBRATION_SPLIT)
            print_pictures(calibration)
        print(f"calibrating on {calibration.folder}")
        fp32 = calibrated = calibrate(model, calibration)
        watch.lap("calibration pass")
        for place in PLACES:
            print(f"range_{place:<6} {getattr(model, f'range_{place}').max().item():.6g}")
        if calibration is not evaluation:
            print(f"evaluating on {evaluation.folder}")
            fp32 = evaluate("FP32", model.fused(), evaluation)
            watch.lap("FP32 pass")

    # %% conv + batch-norm folding, and equalization: proven to keep the logits
    pixels = sample(evaluation)
    if quantizing:
        folded = model.fused()
        change = largest_change(model, folded, pixels)
        print(f"folding changed a logit by at most {change:.3g}, on {len(pixels)} pictures")
        if EQUALIZE:
            factors = [f"{place} {found.min():.2f} to {found.max():.2f}" for place, found in equalize(folded).items()]
            change = largest_change(model, folded, pixels)
            print(f"equalizing, channels times {', '.join(factors)}, changed a logit by at most {change:.3g}")

    # %% scales, integer weights and biases
    if quantizing:
        calibration_pixels = sample(calibration)
        int8_model = folded.cl_scale()
        moved = refine(int8_model, folded, calibration_pixels)
        if BIAS_CORRECTION:
            print("bias correction moved a bias by at most "
                  + ", ".join(f"{value:.3g} in {layer}" for layer, value in moved.items()))
        watch.lap("quantization")
    else:
        int8_model = model
    print_layers(layer_rows(int8_model))

    # %% the two executors, compared
    exact = choose_engine(int8_model, pixels)
    print(f"INT8 engine {int8_model.engine}: {exact['why']}; {exact['compared']:,} values of {len(pixels)} pictures "
          f"compared, {exact['different']:,} differ")
    ms = time_networks({"fp32": folded, "int8": int8_model} if quantizing else {"int8": int8_model}, pixels)
    watch.lap("comparing, timing")

    # %% INT8 inference
    int8 = evaluate("INT8", int8_model, evaluation)
    watch.lap("INT8 pass")

    # %% what the passes found
    if quantizing and fp32.files != int8.files:
        fp32, int8 = in_common(fp32, int8)
    report = build_report(constants, len(calibrated.files) if quantizing else None,
                          calibration.left_out() | evaluation.left_out(), fp32, int8, model, int8_model, exact, ms)

    # %% what quantization did: the errors, the ranges, the bits
    if quantizing:
        report["ledger"], histograms = error_ledger(folded, int8_model, pixels)
        print_ledger(report["ledger"], len(pixels))
        report["ranges"] = range_sources(model, calibrated.files, calibration_pixels)
        compared = sample(evaluation, 100)
        report["calibration_curve"] = calibration_curve(model, int8_model, calibration_pixels, compared,
                                                        fp32.logits[:len(compared)])
        print_ranges(report["ranges"], len(calibration_pixels), report["calibration_curve"], len(compared))
        watch.lap("ledger, ranges")
        if SWEEP_BITS:
            report["sweep_bits"] = sweep_bits(model, calibration_pixels, evaluation, fp32, int8_model.engine)
            print_sweep(report["sweep_bits"])
            watch.lap("bits")
        picture = draw_report(report, histograms, fp32, int8, evaluation.folder)
        watch.lap("drawing")

    # %% what is kept: the INT8 network, the report and its picture
    folder, report["seconds"] = ROOT / OUTPUT_DIR, watch
    text = json.dumps(report, indent=1, allow_nan=False) + "\n"
    signal.signal(signal.SIGINT, signal.SIG_IGN)                # the three belong together
    write_whole(folder / "report.json", text.encode())
    if quantizing:
        write_whole(folder / "report.png", picture)
        save_checkpoint(int8_model, folder / "INT8_checkpoint.pth.tar")
        kept = INT8_Model.load(folder / "INT8_checkpoint.pth.tar")
        print(f"\nloaded back, the INT8 checkpoint changes a logit by {largest_change(int8_model, kept, pixels):g}")
    else:
        (folder / "report.png").unlink(missing_ok=True)         # of another run
    signal.signal(signal.SIGINT, signal.default_int_handler)
    print_summary(report)
    print(f"wrote {folder}/report.json" + (", report.png and INT8_checkpoint.pth.tar" if quantizing else ""))
