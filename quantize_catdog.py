"""Post-training INT8 quantization of a cat/dog CNN, from a picture's bytes to its INT8 logits.

    pip install -r requirements.txt && python quantize_catdog.py

A network trained in FP32 becomes one of 8-bit integers without being trained again: run it on
pictures and note the largest magnitude at 7 places of the network, turn these ranges into scales,
round weights and biases to integers, then multiply and add integers.

    step        what it does                                          what leaves it
    pictures    decode and resize                                     uint8  (N, 3, 224, 224)
    load        read the checkpoint, executing nothing of it          FP32   weights, batch norms
    fold        each batch norm into the convolution before it        FP32   weights, biases
    calibrate   run in FP32, with an observer at each place           FP32   logits (N, 2), ranges
    quantize    scale = largest integer / range; then round, so       int8   weights
                that the outputs stay close to FP32                   int32  biases
    prove       this CPU's INT8 kernels against their definition      the kernels, or the reference
    evaluate    uint8 x int8 -> int32 sums -> uint8, layer by layer   FP32   logits (N, 2)
    compare     what changed, and is it more than chance?             a summary
    keep        the INT8 network, and the report                      results/

The run at the end has these steps; what they call is defined above it. Constants are edited in the
file, or for one run on the command line: a preset's name, then NAME=value (--help lists them):

    python quantize_catdog.py plain GPTQ=True

The file is the port of a notebook, whose names it keeps, and is one itself: Jupytext reads a cell
after each `# %%`. tools/explain.py shows why answers changed.
"""
import os
import sys


def printable(text):
    """A text, such as a file's name, without what would move a terminal's cursor."""
    return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in text)


class InputError(Exception):
    """Bad input, in one line that says what, where, and what to do. All that reads may raise it."""

    def __str__(self):
        return printable(super().__str__())

    def _render_traceback_(self):       # what Jupyter shows under the cell
        return [f"InputError: {self}"]


def end_in_one_line(kind, error, trace):
    """sys.excepthook of the run: one line for bad input and for Ctrl-C, none for `| head`."""
    if issubclass(kind, InputError):
        print(error, file=sys.stderr)
    elif issubclass(kind, KeyboardInterrupt):
        print("stopped by Ctrl-C", file=sys.stderr)
    elif issubclass(kind, BrokenPipeError):     # nobody reads on: the rest goes nowhere
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    else:
        sys.__excepthook__(kind, error, trace)


if __name__ == "__main__":
    sys.excepthook = end_in_one_line            # before the imports below, which take a second

import ast
import builtins
import copy
import csv
import ctypes
import difflib
import io
import itertools
import json
import math
import re
import textwrap
import time
import warnings
import zipfile
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
import torchnet.meter as tnt
from PIL import Image, ImageDraw, ImageFont, ImageOps

# %% [markdown]
# ## Constants
# Edit one and run again: the file, or this cell and all below. On the command line NAME=value sets
# one for a single run. Relative paths start at this file's folder, `~` is the home folder.

# %%
# what is run, on what
DATA_DIR = "cat_dog"                    # folder that holds the splits
CALIBRATION_SPLIT = "train"             # folder in it whose pictures set the ranges
EVALUATION_SPLIT = "val"                # folder in it whose pictures are counted in the accuracies
CHECKPOINT = "BEST_checkpoint.pth.tar"  # FP32 weights: {"model": state_dict}
OUTPUT_DIR = "results"                  # the INT8 network, report.json and runs.csv go here
BATCH_SIZE = 5                          # pictures per batch; affects only speed and memory
NUM_WORKERS = min(os.cpu_count() or 1, 16)      # threads that decode pictures
INT8_ENGINE = "auto"                    # kernels, exact arithmetic, or kernels where they are exact
# the recipe: what decides the integers
IMAGE_SIZE = (224, 224)                 # width and height; FC1 needs 11 x 11 maps
BIT = 8                                 # bits of an activation
WEIGHT_BIT = 8                          # bits of a weight
LAYER_BITS = {}                         # bits of single layers' weights, where not WEIGHT_BIT
PER_CHANNEL = True                      # weight scale: one per output channel, or one per layer
UNSIGNED_RELU = True                    # pixels and ReLU outputs use 0..255, or only 0..127
BIAS_BIT = 32                           # bits of a bias
QUANTIZE_LOGITS = False                 # round the logits to BIT bits too, or leave them FP32
HEADROOM = 2                            # multiplies the ranges of what FC1 and FC2 read
EQUALIZE = True                         # rescale channels so that weak ones use more integers too
GPTQ = True                             # round weights so that errors cancel, or each to nearest
BIAS_CORRECTION = True                  # shift biases by the mean error in calibration

# %% [markdown]
# The legal values of each, to which the file, the command line and checkpoints are held. A preset
# is a recipe by its differences from the one above.

# %%
PRESETS = {"plain": {"HEADROOM": 1, "EQUALIZE": False, "GPTQ": False, "BIAS_CORRECTION": False}}
PRESETS["notebook"] = PRESETS["plain"] | {
    "PER_CHANNEL": False, "UNSIGNED_RELU": False, "BIAS_BIT": 16, "QUANTIZE_LOGITS": True}


class Legal(NamedTuple):
    """The legal values of a constant: in words, and as a function of a value."""
    words: str
    allows: Callable


def whole_number(low, high):
    return Legal(f"a whole number from {low} to {high}",
                 lambda value: type(value) is int and low <= value <= high)


def is_image_size(value):
    return (isinstance(value, tuple) and [type(side) for side in value] == [int, int]
            and all(212 <= side <= 227 for side in value))


def is_layer_bits(value):
    return isinstance(value, dict) and all(
        name in [layer.name for layer in LAYERS] and whole_number(2, 8).allows(bit)
        for name, bit in value.items())


TRUE_FALSE = Legal("True or False", lambda value: isinstance(value, bool))
PATH = Legal("the name of a file or folder",
             lambda value: isinstance(value, str) and value.strip() != "" and "\0" not in value)
RECIPE = {
    "IMAGE_SIZE": Legal("(width, height), each a whole number from 212 to 227", is_image_size),
    "BIT": whole_number(2, 8), "WEIGHT_BIT": whole_number(2, 8),
    "LAYER_BITS": Legal('bits from 2 to 8 by name of layer, such as {"fc1": 4}', is_layer_bits),
    "PER_CHANNEL": TRUE_FALSE, "UNSIGNED_RELU": TRUE_FALSE, "BIAS_BIT": whole_number(2, 32),
    "QUANTIZE_LOGITS": TRUE_FALSE,
    "HEADROOM": Legal("a number from 1 to 16",
                      lambda value: type(value) in (int, float) and 1 <= value <= 16),
    "EQUALIZE": TRUE_FALSE, "GPTQ": TRUE_FALSE, "BIAS_CORRECTION": TRUE_FALSE}
LEGAL = {
    "DATA_DIR": PATH, "CALIBRATION_SPLIT": PATH, "EVALUATION_SPLIT": PATH, "CHECKPOINT": PATH,
    "OUTPUT_DIR": PATH, "BATCH_SIZE": whole_number(1, 4096), "NUM_WORKERS": whole_number(1, 256),
    "INT8_ENGINE": Legal('"auto", "onednn" or "reference"',
                         lambda value: value in ("auto", "onednn", "reference"))} | RECIPE

ROOT = Path(globals().get("__file__", "notebook")).resolve().parent     # a notebook: where it runs
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def described_constants():
    """{constant: its comment} of the block at the top of this file; {} in a notebook."""
    if "__file__" not in globals():
        return {}
    block = Path(__file__).read_text("utf-8").split("# what is run, on what")[1].split("# %%")[0]
    return dict(re.findall(r"(?m)^([A-Z]\w*) *=.*?(?:  # (.*))?$", block))


def no_such(name, known):
    """InputError for a name that is not among the known ones; it names the nearest of them."""
    wanted = name.strip("-").replace("-", "_").upper()
    near = difflib.get_close_matches(wanted, [each.upper() for each in known], 1)
    found = [each for each in known if each.upper() in near]
    hint = f"did you mean {found[0]}?" if found else "--help lists them all"
    return InputError(f"{name}: no constant of this name, {hint}")


def print_help(doc):
    """Print a docstring, the constants with their comments and values, and the presets."""
    print(doc)
    comments = described_constants()
    for name, legal in LEGAL.items():
        print(f"{name} = {globals().get(name)!r}")
        print(textwrap.fill(f"{comments.get(name, '')}; {legal.words}", 80, initial_indent="    ",
                            subsequent_indent="    "))
    for name, changes in PRESETS.items():
        words = " ".join(f"{constant}={value!r}" for constant, value in changes.items())
        print(textwrap.fill(f"preset {name}: {words}", 80, subsequent_indent="    "))


def set_constants(words, doc):
    """Set constants by the words of a command line: presets, then NAME=value as Python literals.

    --help prints `doc`, all constants and the presets, and ends the program.
    """
    if {"--help", "-h"} & set(words):
        print_help(doc)
        sys.exit()
    assigned = False
    for word in words:
        name, equals, text = word.partition("=")
        if word in PRESETS and not assigned:
            globals().update(PRESETS[word])
        elif word in PRESETS:
            raise InputError(f"{word}: a preset comes before the constants that change it")
        elif name in LEGAL and equals:
            try:
                globals()[name] = ast.literal_eval(text)
            except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
                globals()[name] = text              # a word without quotes, such as a folder's name
            assigned = True
        elif name in LEGAL:
            raise InputError(f"{name}: give it a value, {name}={globals().get(name)!r} for example")
        else:
            raise no_such(name, [*PRESETS, *LEGAL])


def command_line():
    """The words after this file's name; none in a notebook: its kernel has other arguments."""
    is_program = "__file__" in globals() and Path(sys.argv[0]).resolve() == Path(__file__).resolve()
    return sys.argv[1:] if is_program else []


def check_constants():
    """Print and return {constant: value}; raise InputError where this file cannot run with one."""
    for name in described_constants():
        if name not in LEGAL:
            raise no_such(name, LEGAL)
    for name, legal in LEGAL.items():
        if name not in globals():
            raise InputError(f"{name} is missing: set it to {legal.words}")
        if not legal.allows(globals()[name]):
            raise InputError(f"{name} = {globals()[name]!r}: set it to {legal.words}")
    constants = {name: copy.copy(globals()[name]) for name in LEGAL}
    for name, value in constants.items():
        print(f"{name} = {value!r}")
    return constants


def current_recipe():
    """{constant: value} of those that decide the integers."""
    return {name: copy.copy(globals()[name]) for name in RECIPE}


def layer_bit(recipe, layer):
    """Bits of a Layer's weights."""
    return recipe["LAYER_BITS"].get(layer.name, recipe["WEIGHT_BIT"])


def weight_widths(recipe):
    """The different bits of all layers' weights, in order."""
    return sorted({layer_bit(recipe, layer) for layer in LAYERS})


def located(*names):
    """The path that constants name: below ROOT unless one is absolute; ~ is the home folder."""
    return ROOT.joinpath(*[os.path.expanduser(name) for name in names])


def short(path):
    """A path as it is printed: relative to ROOT where it lies below it."""
    path = Path(path)
    return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else str(path)


def prepare_process():
    """Change the process of a run; one that only imports this file stays as it is."""
    if hasattr(sys.stdout, "reconfigure"):      # a file's name may hold what a terminal cannot show
        sys.stdout.reconfigure(errors="backslashreplace", line_buffering=True)
    torch.backends.cudnn.allow_tf32 = False             # FP32 means FP32, on a GPU too
    warnings.filterwarnings("ignore", module="PIL")     # a broken picture is reported once, by us
    Image.MAX_IMAGE_PIXELS = 2**25      # Pillow refuses pictures of more than twice as many
    if sys.platform == "linux" and hasattr(ctypes.CDLL(None), "mallopt"):
        # glibc returns every big buffer to the system and faults its pages in again at the next
        # layer; keeping them (M_MMAP_MAX, M_TRIM_THRESHOLD) halves the time of both passes
        ctypes.CDLL(None).mallopt(-4, 0)
        ctypes.CDLL(None).mallopt(-1, 2**31 - 1)


# %% [markdown]
# ## Pictures
# A file becomes uint8 pixels and a label: 0 for cat, 1 for dog. What cannot be used is left out,
# and named with the reason.

# %%
CLASSES = ("cat", "dog")
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF")  # EPS would start a program
KEEP_BYTES = 2**28          # decoded pictures kept for the next pass; the others are decoded again
DECODED_AHEAD = 32          # pictures a thread decodes before the network gets them


def label_of(path):
    """0 where the words of a path say cat or cats, 1 for dog or dogs, None for neither or both."""
    words = re.findall(r"[^\W\d_]+", str(path).casefold())
    said = {word.removesuffix("s") for word in words} & set(CLASSES)
    return CLASSES.index(said.pop()) if len(said) == 1 else None


def decode(picture, size):
    """A file, Pillow picture or array -> uint8 (height, width, 3) of size (width, height).

    Resized with Pillow's default filter (bicubic), as in the notebook. Turned as its EXIF data
    says; the first frame of an animation; transparent parts on white.
    """
    if isinstance(picture, (str, Path)) and os.path.exists(picture) and not os.path.isfile(picture):
        raise InputError("is no file")      # a pipe, say, at which `open` would wait for ever
    if isinstance(picture, np.ndarray):
        if picture.dtype != np.uint8 or picture.shape[2:] != (3,) or picture.size == 0:
            raise InputError("is not uint8 (height, width, 3)")
        picture = Image.fromarray(picture)
    try:
        in_memory = isinstance(picture, Image.Image)
        image = picture.copy() if in_memory else Image.open(picture, formats=FORMATS)
        with image:
            image.load()
            ImageOps.exif_transpose(image, in_place=True)
            if not image.mode.startswith("I"):          # I: grey of 16 bits
                image = image.convert("RGBA" if image.has_transparency_data else "RGB")
    except Exception as error:      # decoders raise nearly every type on broken bytes
        reason = " ".join(str(error).split())
        raise InputError(f"cannot be decoded: {type(error).__name__}: {reason}") from None
    if image.mode.startswith("I"):
        grey = (np.asarray(image) / 257).clip(0, 255).round().astype(np.uint8)  # 65535 / 255
        image = Image.fromarray(grey).convert("RGB")
    if image.mode == "RGBA":
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image).convert("RGB")
    return np.array(image.resize(size))


def to_tensor(pictures):
    """n times uint8 (height, width, 3) -> uint8 (n, 3, height, width), channels last in memory."""
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2)


class CatDogDataset:
    """The pictures below a folder in one fixed order: `files`, `labels`, and `skipped` {path: why}.

    Ordered by the numbers in the path, then by path: cat.0, dog.0, cat.1, ... so that any first few
    hold both. size: (width, height) of its pixels, IMAGE_SIZE unless another is given.
    """

    def __init__(self, folder, size=None):
        self.folder, self.size = Path(folder), size or IMAGE_SIZE
        self.files, self.labels, self.skipped = [], [], {}
        if not os.path.isdir(self.folder) or not os.access(self.folder, os.R_OK):
            raise InputError(f"no folder {short(self.folder)}: put pictures named cat.0.jpg, "
                             "dog.0.jpg, ... there, or set DATA_DIR and the splits")
        for file in sorted(self.names(), key=self.numbers_first):
            label = label_of(file)
            if label is None:
                reason = "the path says neither cat nor dog, or both"
                self.skipped[short(self.folder / file)] = reason
            else:
                self.files.append(file)
                self.labels.append(label)
        self.kept = []          # what `decoded` yields for the first files

    def names(self):
        """Yield the files below the folder, relative to it; links are followed, no folder twice."""
        def cannot_list(error):
            self.skipped[short(error.filename)] = f"cannot be listed: {error.strerror}"

        seen = set()
        for place, folders, files in os.walk(self.folder, onerror=cannot_list, followlinks=True):
            if os.path.realpath(place) in seen:
                folders.clear()
                continue
            seen.add(os.path.realpath(place))
            for file in files:
                yield os.path.relpath(os.path.join(place, file), self.folder)

    @staticmethod
    def numbers_first(file):
        return [int(number) for number in re.findall("[0-9]+", file)], file

    def __len__(self):
        return len(self.files)

    def __str__(self):
        cats = self.labels.count(0)
        return f"{short(self.folder)}: {len(self)} pictures, {cats} cat and {len(self) - cats} dog"

    def decoded(self):
        """Yield for each file its pixels, uint8 (height, width, 3), or None where it has none.

        Decoded once, as far as KEEP_BYTES reach, however often this is called. All cores decode
        some pictures, then all run the network on them: both at once would only fight for cores.
        """
        yield from self.kept
        most = KEEP_BYTES // (3 * self.size[0] * self.size[1])
        step = max(BATCH_SIZE, DECODED_AHEAD * NUM_WORKERS)
        with ThreadPoolExecutor(NUM_WORKERS) as pool:   # Pillow lets other threads run meanwhile
            for start in range(len(self.kept), len(self), step):
                found = list(pool.map(self.pixels_of, self.files[start:start + step]))
                if start == len(self.kept):     # not beyond KEEP_BYTES, nor after another walk
                    self.kept += found[:max(0, most - start)]
                yield from found

    def pixels_of(self, file):
        """A file's pixels; None where it has none, with the reason in `skipped`."""
        try:
            return decode(self.folder / file, self.size)
        except InputError as error:
            self.skipped[short(self.folder / file)] = str(error)
            return None

    def batches(self):
        """Yield (pixels uint8 (n, 3, height, width), labels int64 (n,), n files) of usable ones."""
        rows = zip(self.decoded(), self.labels, self.files)
        usable = (row for row in rows if row[0] is not None)
        batch = list(itertools.islice(usable, BATCH_SIZE))
        if not batch:
            reasons = [f", e.g. {file}: {reason}" for file, reason in sorted(self.skipped.items())]
            raise InputError(f"no usable picture in {short(self.folder)}{''.join(reasons[:1])}: "
                             "put pictures named cat.0.jpg, dog.0.jpg, ... there")
        while batch:
            pictures, labels, files = zip(*batch)
            yield to_tensor(pictures), torch.tensor(labels), list(files)
            batch = list(itertools.islice(usable, BATCH_SIZE))

    def first(self, count):
        """uint8 (n, 3, height, width) of the first usable pictures, at most `count`, on DEVICE."""
        full = math.ceil(count / BATCH_SIZE)         # all batches but the last are
        batches = itertools.islice(self.batches(), full)
        return torch.cat([pixels for pixels, _, _ in batches])[:count].to(DEVICE)

    def checksum(self):
        """CRC-32 of the labels and the bytes of the usable files, whatever these are called."""
        crc = 0
        for file, label in zip(self.files, self.labels):
            path = self.folder / file
            if short(path) not in self.skipped:
                try:
                    crc = zlib.crc32(path.read_bytes(), zlib.crc32(bytes([label]), crc))
                except OSError:
                    raise InputError("pictures came or went while the run looked at them: run it "
                                     "again") from None
        return crc


# %% [markdown]
# ## Arithmetic
# A real number x is kept as an integer q with x = q / scale. (torch's own quantizers call 1 / scale
# the scale.) All here is symmetric: the integer 0 stands for 0.0, and there is no zero point.

# %%
SMALLEST = 1e-12    # a range below it counts as this, so that no dead layer divides by zero


class IntRange(NamedTuple):
    low: int
    high: int
    dtype: torch.dtype


def int_range(bit, unsigned=False):
    """Of 8 bits: -127..127 in int8, or 0..255 in uint8 for what is never negative."""
    if unsigned:
        return IntRange(0, 2**bit - 1, torch.uint8)
    largest = 2**(bit - 1) - 1
    return IntRange(-largest, largest, torch.int8)


def scale_of(largest_integer, range_data):
    """The scale that maps range_data, the largest magnitude seen, to the largest integer. FP32."""
    return largest_integer / range_data.clamp(min=SMALLEST)


def spread(values, dims):
    """(out,) or (1,) -> with `dims` more axes of length 1: one value per output channel."""
    return values.reshape(-1, *[1] * dims)


def quantize(x, scale, to):
    """q = clip(round(x * scale), low, high): FP32 -> the integer type of `to`, an IntRange."""
    return (x * scale).round_().clip_(to.low, to.high).to(to.dtype)


def requantize(sums, multiplier, offset, to):
    """Sums of products -> integers at the next place's scale: q = clip(round(sums * M + offset)).

    The sums are real numbers times scale_in * scale_w. Times M = scale_out / (scale_in * scale_w)
    they are real numbers times scale_out; offset = bias * M. A `to.low` of 0 is the ReLU. Product
    and sum are rounded to FP32 separately: this is what INT8 kernels do.
    """
    return (sums * multiplier).add_(offset).round_().clip_(to.low, to.high).to(to.dtype)


def fusion_conv_bn(conv, bn):
    """Weight and bias of the one convolution that does what convolution and batch norm do.

    bn(y) = (y - mean) * g + beta with g = gamma / sqrt(var + eps), hence W' = W * g and
    b' = b * g + (beta - mean * g) (Jacob et al. 2018, arXiv:1712.05877, section 3.2).
    """
    bn_gamma = bn.weight / torch.pow(bn.running_var + bn.eps, 0.5)
    bn_beta = bn.bias - bn.running_mean * bn_gamma
    return conv.weight * spread(bn_gamma, 3), conv.bias * bn_gamma + bn_beta


def weight_quant(w, b, in_scale, bit, recipe):
    """FP32 weight (out, ...), bias (out,) -> int8 weight, int32 bias, weight scale (out,) or (1,).

    bit: the weight's. The bias is added to products of inputs and weights: its scale is theirs,
    in_scale * w_scale.
    """
    to = int_range(bit)
    groups = w.flatten(1) if recipe["PER_CHANNEL"] else w.reshape(1, -1)        # one row a scale
    w_scale = scale_of(to.high, groups.abs().amax(1))
    if recipe["BIAS_BIT"] == 32:
        # weights of nearly 0 get so large a scale that the bias beside them would not fit int32:
        # then the bias sets the scale, and takes half of int32; the products have the other half.
        # Fewer BIAS_BITs are clipped, as in the notebook
        b_groups = b.reshape(len(groups), -1)
        w_scale = torch.minimum(w_scale, scale_of(2**30, b_groups.abs().amax(1) * in_scale))
    wq = quantize(w, spread(w_scale, w.dim() - 1), to)
    bq = clip_bias(torch.round(b * (w_scale * in_scale)).double(), recipe)
    return wq, bq, w_scale


def clip_bias(bias, recipe):
    """Whole numbers in FP64, since FP32 cannot hold the limits -> int32 of BIAS_BIT bits."""
    largest = 2**(recipe["BIAS_BIT"] - 1) - 1
    return bias.clip(-largest, largest).to(torch.int32)


# %% [markdown]
# ## The FP32 network and its observers
# Four times convolution, batch norm, ReLU, pooling; then two fully connected layers. An observer
# looks at each *place*: the input, each ReLU's output, each fully connected layer's output. It
# keeps the largest magnitude that it has seen in each channel, as `range_<place>`. The largest of a
# place's channels is the range that becomes the place's scale.

# %%
class Layer(NamedTuple):
    name: str           # of the convolution or fully connected layer
    bn: str | None      # batch norm behind a convolution; ReLU and pooling follow
    source: str         # place that it reads from, after pooling
    place: str          # place that it writes to, before pooling

    @property
    def is_conv(self):
        return self.bn is not None


LAYERS = [
    Layer("cnn1", "bn1", "input", "cv1"),
    Layer("cnn2", "bn2", "cv1", "cv2"),
    Layer("cnn3", "bn3", "cv2", "cv3"),
    Layer("cnn4", "bn4", "cv3", "cv4"),
    Layer("fc1", None, "cv4", "fc1"),       # no ReLU: the notebook's forward has none here
    Layer("fc2", None, "fc1", "fc2"),
]
PLACES = ["input", "cv1", "cv2", "cv3", "cv4", "fc1", "fc2"]
BEFORE_FC = ["cv4", "fc1"]      # what fully connected layers read: there clipping hurts most


class Conv2d(nn.Conv2d):
    """torch's, but a picture's values are the same to the last bit whatever is beside it.

    For one picture torch may take a kernel that sums in another order. So it is run as two: its
    upper and its lower half, with the rows that both need.
    """

    def forward(self, x):
        if len(x) > 1:
            return super().forward(x)
        rows = x.shape[2] - self.kernel_size[0] + 1         # of the output
        upper = (rows + 1) // 2
        needed = upper + self.kernel_size[0] - 1
        y = super().forward(torch.cat([x[:, :, :needed], x[:, :, -needed:]]))
        return torch.cat([y[:1], y[1:, :, 2 * upper - rows:]], 2)   # odd: the middle row is in both


class Linear(nn.Linear):
    """torch's, with a product for each picture by itself, for the same reason."""

    def forward(self, x):
        weight = self.weight.t().expand(len(x), -1, -1)
        return torch.bmm(x[:, None], weight)[:, 0] + self.bias


class MaxPool2d(nn.MaxPool2d):
    """2 x 2 maximum; a last odd row or column is dropped. torch's refuses uint8, and is slower."""

    def forward(self, x):
        height, width = x.shape[2] // 2 * 2, x.shape[3] // 2 * 2
        x = torch.maximum(x[:, :, 0:height:2], x[:, :, 1:height:2])
        return torch.maximum(x[:, :, :, 0:width:2], x[:, :, :, 1:width:2])


def largest_magnitudes(data):
    """(N, C, height, width) or (N, C) -> the largest |value| in each picture's channels, (N, C)."""
    if data.dim() == 2:
        return data.abs()
    rows = data.permute(0, 2, 3, 1)     # channels last as in memory; |data| would copy it
    return torch.maximum(rows.amax(1), -rows.amin(1)).amax(1)


def unwatched(place, values):
    """The `at` of a forward that nobody looks at."""
    return values


def values_at(model, pixels):
    """{place: values} of one forward pass through an FP32 or an INT8 network."""
    values = {}
    model(pixels, values.setdefault)        # keeps what is at a place, and returns it
    return values


class CNN_Model(nn.Module):
    """The notebook's network in FP32: pixels 0..255 (N, 3, 224, 224) -> logits (N, 2), cat, dog."""

    def __init__(self):
        super().__init__()
        self.cnn1 = Conv2d(in_channels=3, out_channels=16, kernel_size=5, stride=1, padding=0)
        self.bn1 = nn.BatchNorm2d(16)
        self.relu1 = nn.ReLU(inplace=True)
        self.maxpool1 = MaxPool2d(kernel_size=2)
        self.cnn2 = Conv2d(in_channels=16, out_channels=32, kernel_size=5, stride=1, padding=0)
        self.bn2 = nn.BatchNorm2d(32)
        self.relu2 = nn.ReLU(inplace=True)
        self.maxpool2 = MaxPool2d(kernel_size=2)
        self.cnn3 = Conv2d(in_channels=32, out_channels=16, kernel_size=3, stride=1, padding=0)
        self.bn3 = nn.BatchNorm2d(16)
        self.relu3 = nn.ReLU(inplace=True)
        self.maxpool3 = MaxPool2d(kernel_size=2)
        self.cnn4 = Conv2d(in_channels=16, out_channels=8, kernel_size=3, stride=1, padding=0)
        self.bn4 = nn.BatchNorm2d(8)
        self.relu4 = nn.ReLU(inplace=True)
        self.maxpool4 = MaxPool2d(kernel_size=2)
        self.fc1 = Linear(8 * 11 * 11, 512)
        self.fc2 = Linear(512, 2)
        for place, channels in zip(PLACES, (3, 16, 32, 16, 8, 512, 2)):
            self.register_buffer(f"range_{place}", torch.empty(channels))
        self.reset_ranges()

    def forward(self, x, at=unwatched):
        """at(place, values) sees the values of each place, and returns what goes on from there."""
        x = at("input", x.float())                                          # (N, 3, 224, 224)
        x = self.maxpool1(at("cv1", self.relu1(self.bn1(self.cnn1(x)))))    # (N, 16, 110, 110)
        x = self.maxpool2(at("cv2", self.relu2(self.bn2(self.cnn2(x)))))    # (N, 32, 53, 53)
        x = self.maxpool3(at("cv3", self.relu3(self.bn3(self.cnn3(x)))))    # (N, 16, 25, 25)
        x = self.maxpool4(at("cv4", self.relu4(self.bn4(self.cnn4(x)))))    # (N, 8, 11, 11)
        x = at("fc1", self.fc1(x.flatten(1)))                               # (N, 512), no ReLU
        return at("fc2", self.fc2(x))                                       # (N, 2)

    def part(self, layer):
        """The convolution or fully connected layer that a Layer names."""
        return self.get_submodule(layer.name)

    def range_at(self, place):
        """Largest magnitude seen in each channel of a place, (C,)."""
        return self.get_buffer(f"range_{place}")

    def reset_ranges(self):
        """Forget what the observers saw. Pixels reach 255, whatever those that calibrate reach."""
        for place in PLACES:
            self.range_at(place).fill_(255 if place == "input" else 0)

    def update_range(self, place, data):
        """The observer, as `at`: range = max(range, |data|). data: (N, C, h, w) or (N, C)."""
        range_data = self.range_at(place)
        torch.maximum(range_data, largest_magnitudes(data).amax(0), out=range_data)
        return data

    @torch.no_grad()
    def fused(self):
        """A copy whose convolutions have taken in their batch norms; same logits up to rounding."""
        model = copy.deepcopy(self)
        for layer in LAYERS:
            if layer.is_conv:
                conv = model.part(layer)
                weight, bias = fusion_conv_bn(conv, model.get_submodule(layer.bn))
                conv.weight.copy_(weight)
                conv.bias.copy_(bias)
                setattr(model, layer.bn, nn.Identity())
        return model.eval().to(memory_format=torch.channels_last)

    @torch.no_grad()
    def cl_scale(self, recipe):
        """Calculate the scales from the ranges, quantize the weights, return the INT8_Model that
        the next section defines.

        This model, which must come from `fused`, stays as it is. Raises InputError where a range
        overflows FP32.
        """
        if isinstance(self.bn1, nn.BatchNorm2d):
            raise ValueError("fold the batch norms first: model.fused().cl_scale(recipe)")
        int8_model = INT8_Model(recipe).to(self.fc1.weight.device)
        for place, integers in int8_model.integers.items():
            range_data = self.range_at(place).amax()
            if place in BEFORE_FC:
                range_data = range_data * recipe["HEADROOM"]
            if not range_data.isfinite():
                raise InputError(f"values at {place} overflow FP32: give a checkpoint with smaller "
                                 "weights")
            int8_model.scale_at(place).copy_(scale_of(integers.high, range_data))
        for layer in LAYERS:
            part, part8 = self.part(layer), int8_model.part(layer)
            in_scale = int8_model.scale_at(layer.source)
            bit = layer_bit(recipe, layer)
            wq, bq, w_scale = weight_quant(part.weight, part.bias, in_scale, bit, recipe)
            part8.weight.copy_(wq)
            part8.bias.copy_(bq)
            part8.w_scale.copy_(w_scale)
        return int8_model


# %% [markdown]
# ## The INT8 network
# The same layers on integers. A layer multiplies and adds integers only; between two layers the
# sums are brought to the next place's scale, by one FP32 multiplication and addition per output
# channel. A layer can be run in two ways that give the same integers: by the definition, or by this
# CPU's INT8 kernels.

# %%
def place_integers(recipe):
    """{place: IntRange}. Pixels and ReLU outputs are never negative: the sign's bit is free."""
    signed = int_range(recipe["BIT"])
    positive = int_range(recipe["BIT"], recipe["UNSIGNED_RELU"])._replace(low=0)
    return {place: signed if place in ("fc1", "fc2") else positive for place in PLACES}


class INT8_Model(nn.Module):
    """The quantized network: uint8 pixels (N, 3, height, width) -> FP32 logits (N, 2).

    recipe: what `current_recipe` returns. Buffers: scale_<place> (FP32, one value); <layer>.weight
    (int8), <layer>.bias (int32), <layer>.w_scale (FP32, one value or one per output channel); blank
    until `CNN_Model.cl_scale` or a checkpoint fills them in. engine: "reference" or "onednn".
    """

    @torch.inference_mode(False)    # inference tensors lack the _version that `layers` looks at
    def __init__(self, recipe):
        super().__init__()
        self.recipe, self.integers, self.engine = recipe, place_integers(recipe), "reference"
        self.maxpool = MaxPool2d(kernel_size=2)
        for place in PLACES:
            self.register_buffer(f"scale_{place}", torch.tensor(1.0))
        fp32 = CNN_Model()
        for layer in LAYERS:
            shape, part = fp32.part(layer).weight.shape, nn.Module()
            part.register_buffer("weight", torch.zeros(shape, dtype=torch.int8))
            part.register_buffer("bias", torch.zeros(shape[0], dtype=torch.int32))
            part.register_buffer("w_scale", torch.ones(shape[0] if recipe["PER_CHANNEL"] else 1))
            self.add_module(layer.name, part)
        self.prepared, self.made_from, self.tensors = {}, None, []      # see `layers`

    def forward(self, x, at=unwatched):
        """The FP32 network's forward on integers of the types that `place_integers` says."""
        run = self.layers()
        x = at("input", self.quantize_pixels(x))                    # (N, 3, 224, 224)
        x = self.maxpool(at("cv1", run["cnn1"](x)))                 # (N, 16, 110, 110)
        x = self.maxpool(at("cv2", run["cnn2"](x)))                 # (N, 32, 53, 53)
        x = self.maxpool(at("cv3", run["cnn3"](x)))                 # (N, 16, 25, 25)
        x = self.maxpool(at("cv4", run["cnn4"](x)))                 # (N, 8, 11, 11)
        x = at("fc1", run["fc1"](x.flatten(1)))                     # (N, 512)
        x = at("fc2", run["fc2"](x))                                # (N, 2), FP32 or integers
        return x if self.is_fp32("fc2") else x / self.scale_fc2

    def quantize_pixels(self, x):
        """Pixels -> the integers of the input; at scale 1 they are these integers already."""
        to = self.integers["input"]
        if x.dtype == to.dtype and to.high == 255 and self.scale_input == 1:
            return x
        return quantize(x, self.scale_input, to)

    def layers(self):
        """{layer: what runs it}; made anew whenever a tensor, or the engine, has changed."""
        tensors = list(self.buffers())
        made_from = [self.engine, *[(id(x), x._version) for x in tensors]]
        if made_from != self.made_from:
            # fc2 has two columns: to set up a kernel for them takes longer than their definition
            kernels = LAYERS[:-1] if self.engine == "onednn" else []
            self.prepared = {}
            for layer in LAYERS:
                kind = KernelLayer if layer in kernels else ReferenceLayer
                self.prepared[layer.name] = kind(self, layer)
            self.made_from, self.tensors = made_from, tensors   # held: no new one takes an old id
        return self.prepared

    def __getstate__(self):         # what is prepared cannot be copied
        return {**vars(self), "prepared": {}, "made_from": None, "tensors": []}

    def part(self, layer):
        """The module that holds a Layer's weight, bias and w_scale."""
        return self.get_submodule(layer.name)

    def scale_at(self, place):
        """The scale of a place's integers, FP32, one value."""
        return self.get_buffer(f"scale_{place}")

    def is_fp32(self, place):
        """Whether values at this place stay FP32: the logits, unless they are quantized too."""
        return place == "fc2" and not self.recipe["QUANTIZE_LOGITS"]

    def sum_scale(self, layer):
        """scale_in * scale_w, (out,) or (1,): the scale of a layer's sums and of its bias."""
        return self.scale_at(layer.source) * self.part(layer).w_scale

    def multiplier(self, layer):
        """M = scale_out / (scale_in * scale_w), (out,). scale_out is 1 where logits stay FP32."""
        scale_out = 1 if self.is_fp32(layer.place) else self.scale_at(layer.place)
        multiplier = scale_out / self.sum_scale(layer)
        return multiplier.expand(self.part(layer).bias.shape).contiguous()

    def largest_sum(self, layer):
        """Bound on |sum + bias|, (out,): each input at its largest, each sign at its worst."""
        weight, bias = self.part(layer).weight.long(), self.part(layer).bias.long()
        return weight.abs().flatten(1).sum(1) * self.integers[layer.source].high + bias.abs()

    @staticmethod
    def load(path):
        """The INT8_Model of a run's INT8 checkpoint, ready to `predict`."""
        int8_model = load_int8_checkpoint(path)
        width, height = int8_model.recipe["IMAGE_SIZE"]
        noise = np.random.default_rng(0).integers(0, 256, (2, 3, height, width), np.uint8)
        choose_engine(int8_model, torch.from_numpy(noise).to(DEVICE))
        return int8_model

    @torch.inference_mode()
    def predict(self, picture):
        """A picture -> ("cat" or "dog", [cat's logit, dog's logit]); a list of them -> a list.

        picture: a file's path, a Pillow picture, or a uint8 array (height, width, 3).
        """
        pixels = []
        for each in picture if isinstance(picture, list) else [picture]:
            try:
                pixels.append(decode(each, self.recipe["IMAGE_SIZE"]))
            except InputError as error:
                name = each if isinstance(each, (str, Path)) else f"picture {len(pixels)}"
                raise InputError(f"{name} {error}") from None
        logits = self(to_tensor(pixels).to(DEVICE)).cpu() if pixels else []
        answers = [(CLASSES[row.argmax()], row.tolist()) for row in logits]
        return answers if isinstance(picture, list) else answers[0]


class ReferenceLayer:
    """One layer by the definition: float arithmetic on integers, exact, on any device.

    Here floats hold integers: FP32 holds every integer up to 2^24, FP64 up to 2^53. A GPU may
    compute a convolution by way of a transform that rounds (Winograd, FFT); there FP64 and a last
    rounding give the integer.
    """

    def __init__(self, model, layer):
        part, multiplier = model.part(layer), model.multiplier(layer)
        largest = model.largest_sum(layer).max()
        self.in_fp32 = part.weight.device.type == "cpu" and largest < 2**24
        self.weight = part.weight.to(torch.float32 if self.in_fp32 else torch.float64)
        self.multiplier = spread(multiplier, part.weight.dim() - 2)
        self.offset = spread(part.bias * multiplier, part.weight.dim() - 2)
        self.to = None if model.is_fp32(layer.place) else model.integers[layer.place]

    def sums(self, x):
        """Integers (N, C, height, width) or (N, C) -> their sums of products in FP32."""
        operation = F.conv2d if self.weight.dim() == 4 else F.linear
        sums = operation(x.to(self.weight.dtype), self.weight)
        return sums if self.in_fp32 else sums.round().float()

    def rescale(self, sums):
        """Sums -> integers of the layer's place, or FP32 logits."""
        if self.to is None:
            return sums * self.multiplier + self.offset
        return requantize(sums, self.multiplier, self.offset, self.to)

    def __call__(self, x):
        return self.rescale(self.sums(x))


def pack(weight, multiplier):
    """int8 weight (out, ...) and FP32 multiplier (out,) -> the form that torch's kernels take."""
    if weight.dim() == 4:
        return torch.ops.onednn.qconv_prepack(weight, multiplier, 1.0, 0, [1, 1], [0, 0], [1, 1], 1)
    return torch.ops.onednn.qlinear_prepack(weight, None)


def kernel(x, packed, multiplier, zero, offset, dtype, relu):
    """One layer in one kernel: int32 sums * M + offset, ReLU, rounded and saturated to `dtype`.

    Input and output scale are given as 1, zero points as 0 and the weight's scale as M, so that the
    kernel's own rescaling is that of `requantize`, bit for bit. zero: int32 zeros (out,).
    """
    if x.dim() == 4:
        return torch.ops.onednn.qconv2d_pointwise.default(
            x, 1.0, 0, packed, multiplier, zero, offset, [1, 1], [0, 0], [1, 1], 1, 1.0, 0, dtype,
            relu, [], "")
    return torch.ops.onednn.qlinear_pointwise.default(
        x, 1.0, 0, packed, multiplier, zero, offset, 1.0, 0, dtype, relu, [], "")


class KernelLayer:
    """One layer in one INT8 kernel of torch's. It saturates at 8 bits; fewer are clipped here."""

    def __init__(self, model, layer):
        part, self.multiplier = model.part(layer), model.multiplier(layer)
        self.packed = pack(part.weight, self.multiplier)
        self.zero = torch.zeros_like(part.bias)
        self.offset = part.bias * self.multiplier
        self.to = model.integers[layer.place]
        self.relu = "relu" if layer.is_conv else "none"
        self.dtype = torch.uint8 if layer.is_conv else torch.int8

    def __call__(self, x):
        if self.relu == "relu":     # convolutions take uint8 alone; no int8 here is negative
            x = x.view(torch.uint8)
        x = kernel(x, self.packed, self.multiplier, self.zero, self.offset, self.dtype, self.relu)
        if self.to.high == 255:             # the kernel's own limit
            return x
        return x.clip_(self.to.low, self.to.high).view(self.to.dtype)       # its int8 reaches -128


# %% [markdown]
# ## Closer to FP32
# Rounding each weight to its nearest integer is not the best that integers can do. Besides
# HEADROOM, which `cl_scale` applies because other pictures exceed the largest value of those that
# calibrate, three methods find better weights, biases and scales for the same INT8 arithmetic.
# None needs a label.

# %%
LARGEST_FACTOR = 4      # cap of `equalize`: a channel that was silent in calibration may wake
DAMPING = 0.01          # of `gptq`, the share of the mean diagonal that Frantar et al. take
GPTQ_STRIDE = 6         # every sixth row and column of a map is enough: neighbours are much alike
SAMPLE = 20             # calibration pictures that `refine` sees, evaluation pictures of the proofs
CHUNK = 5               # of them at a time, so that their FP32 maps stay in the cache


@torch.no_grad()
def equalize(folded):
    """A copy of a folded network with weak channels scaled up, and {place: factors (C,)}.

    Its logits are the same. All channels of a place share one scale, set by the strongest, so weak
    ones use few of the integers. ReLU and pooling let a positive factor s through: times s in the
    layer that writes a channel, divided by s in the one that reads it. s = sqrt(largest range / the
    channel's range) goes half of the way, which leaves weak channels room for values that
    calibration did not see (Nagel et al. 2019, arXiv:1906.04721, section 4.1).
    """
    model, found = copy.deepcopy(folded), {}
    for layer, reader in zip(LAYERS, LAYERS[1:]):
        writer, read_weight = model.part(layer), model.part(reader).weight
        ranges = model.range_at(layer.place)
        largest = ranges.amax().clamp(min=SMALLEST)
        weakest = largest / LARGEST_FACTOR**2       # a range below it counts as this
        factors = (largest / torch.maximum(ranges, weakest)).sqrt()
        writer.weight *= spread(factors, writer.weight.dim() - 1)
        writer.bias *= factors
        ranges *= factors
        by_channel = read_weight.unflatten(1, (len(factors), -1))       # of fc1: 11 x 11 a channel
        by_channel.div_(spread(factors, by_channel.dim() - 2))          # a view of read_weight
        found[layer.place] = factors
    return model, found


def gptq(weight, w_scale, moments, to):
    """Round FP32 weights (out, K) input by input, each error made up for by the inputs to come.

    moments (K, K): how inputs go together, X X' over the patches X (K, positions) of calibration
    pictures, the paper's H but for a factor. Two pixels that are nearly always alike can share an
    error: one weight rounded up, the next down. w_scale: (out,). Returns integers (out, K) of the
    type `to` (Frantar et al. 2022, arXiv:2210.17323, algorithm 1).
    """
    # inputs that are always 0, or always alike, would make the matrix singular
    damping = DAMPING * moments.diagonal().mean() + SMALLEST
    inverse = torch.linalg.inv(moments + damping * torch.eye(len(moments), device=moments.device))
    # row k holds how much of weight k's error each later one takes over, once those before k are
    # fixed: eliminating inputs one by one is what a Cholesky factorization of the inverse does
    upper = torch.linalg.cholesky(inverse, upper=True)
    weight = weight.t().clone(memory_format=torch.contiguous_format)            # (K, out)
    rounded = torch.zeros_like(weight, dtype=to.dtype)
    for k in range(len(weight)):
        rounded[k] = quantize(weight[k], w_scale, to)
        error = (weight[k] - rounded[k] / w_scale) / upper[k, k]
        weight[k:].addr_(upper[k, k:], error, alpha=-1)
    return rounded.t()


def refined_weight(conv, w_scale, inputs, to):
    """A convolution's weight rounded by `gptq` on its integer inputs, chunks of (n, C, h, w)."""
    moments = 0
    for x in inputs:
        patches = F.unfold(x.float(), conv.kernel_size, stride=GPTQ_STRIDE)     # (n, K, positions)
        moments = moments + torch.einsum("nkp,njp->kj", patches, patches)
    weight, w_scale = conv.weight.flatten(1), w_scale.expand(len(conv.weight))
    rounded = gptq(weight.double(), w_scale.double(), moments.double(), to)
    return rounded.reshape(conv.weight.shape)


def mean_error(expected, sums, bias, sum_scale):
    """FP32 minus INT8 output of a layer, mean over pictures and positions, in FP32 units, (out,).

    expected, sums: chunks (n, out, ...) of FP32 outputs, and of INT8 sums before bias and ReLU;
    sum_scale: (out,).
    """
    errors = []
    for y, total in zip(expected, sums):
        found = total + spread(bias.float(), total.dim() - 2)
        if total.dim() == 4:        # a convolution's
            y, found = y.flatten(2).mean(2), F.relu_(found).flatten(2).mean(2)
        errors.append(y - found / sum_scale)
    return torch.cat(errors).mean(0)


def refine_layer(int8_model, fp32_model, layer, inputs, expected):
    """`refine` for one layer; returns what the next layer reads, chunks of integers.

    inputs: chunks of the integers that the layer reads; expected: chunks of its FP32 outputs.
    """
    recipe, part, part8 = int8_model.recipe, fp32_model.part(layer), int8_model.part(layer)
    if recipe["GPTQ"] and layer.is_conv:    # FC: one position a picture, too few for its inputs
        to = int_range(layer_bit(recipe, layer))
        part8.weight.copy_(refined_weight(part, part8.w_scale, inputs, to))
    rounded = ReferenceLayer(int8_model, layer)
    sums = [rounded.sums(x) for x in inputs]
    if recipe["BIAS_CORRECTION"]:
        sum_scale = int8_model.sum_scale(layer).expand(len(part8.bias))
        error = mean_error(expected, sums, part8.bias, sum_scale)
        error = error.nan_to_num(0, 0, 0)           # 0 where a mean overflowed
        moves = torch.round(error * sum_scale)
        part8.bias.copy_(clip_bias(part8.bias + moves.double(), recipe))
    refined = ReferenceLayer(int8_model, layer)
    outputs = [refined.rescale(x) for x in sums]
    if layer.is_conv:
        outputs = [int8_model.maxpool(x) for x in outputs]
    if layer.place == "cv4":
        outputs = [x.flatten(1) for x in outputs]
    return outputs


@torch.no_grad()
def refine(int8_model, fp32_model, pixels):
    """Layer by layer, in place, round weights by GPTQ and correct biases on calibration pictures.

    fp32_model: the folded network that int8_model was made from; pixels: uint8 (n, 3, h, w). A
    layer's input is what the INT8 layers before it, refined already, make of the pictures. Its bias
    moves by the mean error of its output (Nagel et al. 2019, section 4.2).
    """
    chunks = pixels.split(CHUNK)
    fp32_values = [values_at(fp32_model, chunk) for chunk in chunks]
    inputs = [int8_model.quantize_pixels(chunk) for chunk in chunks]
    for layer in LAYERS:
        expected = [values[layer.place] for values in fp32_values]
        inputs = refine_layer(int8_model, fp32_model, layer, inputs, expected)


# %% [markdown]
# ## Checkpoints
# Nothing that a checkpoint brings is executed: torch's safe loader builds tensors and plain values,
# and, for the notebook's own format, objects of the classes listed here, from which only tensors
# are read.

# %%
LARGEST_CHECKPOINT = 2**28      # bytes, packed or not: a hundred times what this network needs
ALLOWED_CLASSES = [CNN_Model, Conv2d, Linear, MaxPool2d, nn.Conv2d, nn.BatchNorm2d, nn.ReLU,
                   nn.MaxPool2d, nn.Linear, nn.Softmax]
# as they are called in a file that the notebook, the main program there, saved
ALLOWED_CLASSES += [(kind, f"__main__.{kind.__name__}") for kind in ALLOWED_CLASSES[:4]]


def rezipped(content, compression):
    """A zip archive, which a checkpoint is, written anew as a file in memory.

    zipfile holds what it reads against the checksums. torch.load would take a flipped bit for a
    weight.
    """
    fresh = io.BytesIO()
    with zipfile.ZipFile(content) as old, zipfile.ZipFile(fresh, "w", compression) as new:
        names = old.namelist()
        if len(set(names)) < len(names):
            raise ValueError("two parts of one name")
        if sum(part.file_size for part in old.infolist()) > LARGEST_CHECKPOINT:
            raise ValueError("too large when unpacked")
        for name in names:
            new.writestr(zipfile.ZipInfo(name), old.read(name), compression)    # without the time
    fresh.seek(0)
    return fresh


def tensors_of(module):
    """{name: tensor} of a loaded module, from its attributes, without calling its methods."""
    parts = vars(module)
    tensors = {**parts.get("_parameters", {}), **parts.get("_buffers", {})}
    for name, part in parts.get("_modules", {}).items():
        tensors.update({f"{name}.{key}": tensor for key, tensor in tensors_of(part).items()})
    return tensors


def read_checkpoint(path):
    """({name: tensor}, the recipe or None) of a checkpoint."""
    if not os.path.isfile(path):
        raise InputError(f"no checkpoint {path}: put the file there or set CHECKPOINT")
    try:
        if os.path.getsize(path) > LARGEST_CHECKPOINT:
            raise ValueError("too large")
        content = rezipped(path, zipfile.ZIP_STORED)
        quietly = warnings.catch_warnings(action="ignore")
        with quietly, torch.serialization.safe_globals(ALLOWED_CLASSES):
            saved = torch.load(content, map_location="cpu", weights_only=True)
        model = saved["model"]
        tensors = tensors_of(model) if isinstance(model, CNN_Model) else dict(model)
        return tensors, saved.get("recipe")
    except Exception as error:      # damaged bytes raise nearly every type inside torch's loader
        reason = f"is damaged, or no checkpoint of torch 1.6 or newer ({type(error).__name__})"
        unsafe = re.search(r"(?:GLOBAL|global:?|class|function) ([\w.]+\.\w+)", str(error))
        if unsafe:
            reason = f"holds {unsafe[1]}, which this network does not need; it was not loaded"
        advice = "give a file with {'model': state_dict}"
        raise InputError(f"checkpoint {path} {reason}: {advice}") from None


def problem_of(name, found, needed):
    """What is wrong with a checkpoint's tensor, in words; None when it can stand for `needed`."""
    if not isinstance(found, torch.Tensor):
        return "is missing"
    if found.layout != torch.strided or found.is_meta or found.is_quantized:
        return f"is no dense tensor ({found.dtype})"
    both_real = found.is_floating_point() and needed.is_floating_point()
    if found.dtype != needed.dtype and not both_real:
        return f"is {found.dtype}, not {needed.dtype}"
    if found.shape != needed.shape:
        return f"has shape {tuple(found.shape)}, not {tuple(needed.shape)}"
    if not found.float().isfinite().all():
        return "has a NaN or an infinity in it, as FP32"
    if name.endswith("running_var") and (found < 0).any():
        return "has a negative variance in it"
    if "scale" in name and not (found.float() > 0).all():
        return "has a scale in it that is not positive"
    return None


def fill(model, tensors, path):
    """Load what a model needs of a checkpoint's tensors, and return it on DEVICE, ready to run."""
    needed = {name: value for name, value in model.state_dict().items()
              if not name.startswith("range_") and not name.endswith("num_batches_tracked")}
    for name, value in needed.items():
        problem = problem_of(name, tensors.get(name), value)
        if problem:
            raise InputError(f"checkpoint {path}: {name} {problem}; give one of this network")
    model.load_state_dict({name: tensors[name] for name in needed}, strict=False)
    return model.to(DEVICE).eval().to(memory_format=torch.channels_last)


def load_checkpoint(path):
    """The CNN_Model of {"model": state_dict or CNN_Model}."""
    tensors, recipe = read_checkpoint(path)
    if recipe is not None:
        raise InputError(f"checkpoint {path} is the INT8 network of a run: set CHECKPOINT to FP32 "
                         "weights, or use INT8_Model.load in Python")
    return fill(CNN_Model(), tensors, path)


def int8_checkpoint(int8_model):
    """The bytes of an INT8 checkpoint: {"recipe": ..., "model": tensors}, compressed."""
    tensors = {name: tensor.cpu().contiguous() for name, tensor in int8_model.state_dict().items()}
    file = io.BytesIO()
    torch.save({"recipe": int8_model.recipe, "model": tensors}, file)
    return rezipped(file, zipfile.ZIP_DEFLATED).getvalue()


@torch.inference_mode(False)        # as `INT8_Model` needs it
def load_int8_checkpoint(path):
    """The INT8_Model of a run's INT8 checkpoint, engine not chosen yet."""
    tensors, recipe = read_checkpoint(path)
    if not isinstance(recipe, dict):
        raise InputError(f"checkpoint {path} holds FP32 weights, or no recipe: give the "
                         "INT8_checkpoint.pth.tar of a run")
    # constants that earlier recipes did not have yet
    recipe = {"WEIGHT_BIT": recipe.get("BIT"), "IMAGE_SIZE": (224, 224), "LAYER_BITS": {}} | recipe
    for name, legal in RECIPE.items():
        if name not in recipe or not legal.allows(recipe[name]):
            raise InputError(f"checkpoint {path}: {name} in its recipe is not {legal.words}")
    recipe = {name: recipe[name] for name in RECIPE}
    int8_model = fill(INT8_Model(recipe), tensors, path)
    for layer in LAYERS:
        for kind, bit in (("weight", layer_bit(recipe, layer)), ("bias", recipe["BIAS_BIT"])):
            limit = 2**(bit - 1) - 1
            if (int8_model.part(layer).get_buffer(kind).long().abs() > limit).any():
                raise InputError(f"checkpoint {path}: {layer.name}.{kind} has an integer in it "
                                 f"beyond {limit}; quantize again")
        if not (int8_model.largest_sum(layer) * int8_model.multiplier(layer)).isfinite().all():
            raise InputError(f"checkpoint {path}: scales around {layer.name} overflow FP32; "
                             "quantize again")
    return int8_model


def write_files(folder, contents):
    """Write {name: bytes}, each file whole or not at all.

    The last is absent meanwhile, so that no report stands beside the network of another run.
    """
    temporary = {folder / name: folder / f"{name}.{os.getpid()}.tmp" for name in contents}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for content, path in zip(contents.values(), temporary.values()):
            path.write_bytes(content)
        list(temporary)[-1].unlink(missing_ok=True)
        for final, path in temporary.items():
            os.replace(path, final)
    except OSError as error:
        raise InputError(f"cannot write in {folder}: {error}; set OUTPUT_DIR") from None
    finally:
        for path in temporary.values():
            if os.path.exists(path):
                path.unlink()


def make_writable(folder):
    """Make the folder, and try now, not after the run, whether it can be written to."""
    probe = f"{os.getpid()}.probe"
    write_files(folder, {probe: bytes(2**23)})          # more than a run writes
    (folder / probe).unlink()


# %% [markdown]
# ## The passes
# Calibration and evaluation are the same walk over the pictures; in calibration the observers look
# at the places.

# %%
TIMED_ROUNDS = 15       # of which the median counts


class Outcome(NamedTuple):
    files: list             # n file names
    labels: torch.Tensor    # int64 (n,)
    logits: torch.Tensor    # FP32 (n, 2)
    top1: float             # percent of the pictures whose class is their label

    @property
    def classes(self):
        """0 or 1, (n,); where the logits are equal, 0, cat."""
        return self.logits.argmax(1)


@torch.inference_mode()
def evaluate(name, model, pictures, at=unwatched):
    """Run a model over the pictures and return the Outcome. at: see `CNN_Model.forward`."""
    meter = tnt.ClassErrorMeter(topk=[1], accuracy=True)
    files, labels, logits = [], [], []
    start = reported = time.perf_counter()
    for pixels, batch_labels, batch_files in pictures.batches():
        answers = model(pixels.to(DEVICE), at).cpu()
        meter.add(answers, batch_labels)
        files += batch_files
        labels += batch_labels.tolist()         # small tensors kept would lie between big buffers
        logits += answers.tolist()
        now = time.perf_counter()
        if now - reported >= 10:
            left = (now - start) / len(files) * (len(pictures) - len(files))
            print(f"{name} Top1: {meter.value()[0]:.3f}, {len(files)} of {len(pictures)} pictures, "
                  f"{left:.0f} seconds left")
            reported = now
    outcome = Outcome(files, torch.tensor(labels), torch.tensor(logits), float(meter.value()[0]))
    print(f"{name} Top1: {outcome.top1:.3f}, {len(files)} of {len(pictures)} pictures of "
          f"{short(pictures.folder)}")
    return outcome


def calibrate(folded, pictures):
    """The FP32 pass that sets the ranges of a folded network. Returns the Outcome."""
    folded.reset_ranges()
    return evaluate("FP32", folded, pictures, folded.update_range)


def quantize_network(folded, pixels, recipe):
    """A folded, calibrated network -> (the FP32 network that is quantized, its INT8_Model).

    The first is `folded`, or with EQUALIZE an equalized copy. pixels: of calibration, (n, 3, h, w).
    """
    fp32_model = equalize(folded)[0] if recipe["EQUALIZE"] else folded
    int8_model = fp32_model.cl_scale(recipe)
    if recipe["GPTQ"] or recipe["BIAS_CORRECTION"]:
        refine(int8_model, fp32_model, pixels)
    return fp32_model, int8_model


@torch.inference_mode()
def largest_change(model, other, pixels):
    """Largest |difference| between two models' logits."""
    return (model(pixels) - other(pixels)).abs().max().item()


def kernels_saturate(recipe):
    """Whether this CPU's INT8 kernels are wrong where a recipe's inputs and weights are largest.

    x86 without VNNI adds pairs of products in 16 bits, which 2 * 255 * 127 overflows.
    """
    inputs, weights = place_integers(recipe)["cv4"], int_range(max(weight_widths(recipe)))
    x = torch.full((1, 16, 9, 9), inputs.high, dtype=torch.uint8, device=DEVICE)
    row = x.flatten(1)[:, :144].to(inputs.dtype)        # what FC1 reads
    weight = torch.full((16, 16, 3, 3), weights.high, dtype=torch.int8, device=DEVICE)
    one, zero = torch.ones(16, device=DEVICE), torch.zeros(16, dtype=torch.int32, device=DEVICE)
    for q, w in ((x, weight), (row, weight.flatten(1))):
        sums = kernel(q, pack(w, one), one, zero, zero.float(), torch.float32, "none")
        if (sums != 16 * 3 * 3 * inputs.high * weights.high).any():
            return True
    return False


@torch.inference_mode()
def choose_engine(int8_model, pixels):
    """Set int8_model to the engine that INT8_ENGINE asks for, after comparing every value of both.

    If it asks for the reference, nothing is compared. Returns {"compared": values, "different":
    values, "why": in words}.
    """
    int8_model.engine = "reference"
    if INT8_ENGINE == "reference":
        return {"compared": 0, "different": 0, "why": "forced by INT8_ENGINE"}
    try:
        saturate = kernels_saturate(int8_model.recipe)
    except (AttributeError, RuntimeError) as error:
        if INT8_ENGINE == "onednn":
            reason = " ".join(str(error).split())
            raise InputError(f'INT8_ENGINE = "onednn": no INT8 kernels here ({reason}); set it to '
                             '"auto"') from None
        return {"compared": 0, "different": 0, "why": "no INT8 kernels here"}
    expected = values_at(int8_model, pixels)
    int8_model.engine = "onednn"
    found = values_at(int8_model, pixels)
    compared = sum(values.numel() for values in expected.values())
    different = sum(int((found[place] != values).sum()) for place, values in expected.items())
    why = "its kernels agree with the reference"
    if saturate:
        why = "kernels overflow 16 bits here, not with WEIGHT_BIT = 7"
    elif different:
        why = "this CPU's kernels give other integers"
    if INT8_ENGINE == "auto" and (saturate or different):
        int8_model.engine = "reference"
    return {"compared": compared, "different": different, "why": why}


@torch.inference_mode()
def time_networks(networks, pixels):
    """{name: median ms a picture} of {name: network}, in turns on one batch of pixels."""
    ms = {name: [] for name in networks}
    for _ in range(TIMED_ROUNDS):
        for name, network in networks.items():
            start = time.perf_counter()
            network(pixels).cpu()           # .cpu() waits for a GPU
            ms[name].append(1e3 * (time.perf_counter() - start) / len(pixels))
    return {name: float(np.median(times)) for name, times in ms.items()}


# %% [markdown]
# ## Comparison
# Which answers changed, by how much, and is it more than chance? And what of it is shown.

# %%
LISTED = 20         # pictures of a kind that the terminal lists; report.json has all
LOW_SQNR = 20       # dB: an error of a tenth of the logits, below which answers change
OUTLIER = 100       # times the median: a channel so strong leaves the others a few integers each
DRAWN = 6           # pictures that a notebook shows with their answers


def decibels(signal, noise):
    """Ratio of two energies in dB; None when there is no noise."""
    return 10 * math.log10(max(signal / noise, 1e-300)) if noise else None


def sqnr_db(signal, changed):
    """Signal-to-quantization-noise ratio in dB; None when there is no noise."""
    signal, changed = signal.double(), changed.double()
    return decibels(signal.square().sum().item(), (signal - changed).square().sum().item())


def wilson(correct, n, z=1.959964):
    """95 % Wilson score interval of a share, in percent (Wilson 1927)."""
    share = correct / n
    middle = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return max(0, 100 * (middle - half)), min(100, 100 * (middle + half))


def mcnemar(gained, lost):
    """Exact two-sided p-value: how likely a fair coin splits the pictures that only one network has
    right at least as unevenly (McNemar 1947)."""
    pictures = gained + lost
    tail = sum(math.comb(pictures, k) for k in range(min(gained, lost) + 1))
    return min(1.0, 2 * tail / 2**pictures)


def accuracy_of(outcome):
    """Top-1 in percent, the pictures it counts, its interval, and what each label was called."""
    correct = int((outcome.classes == outcome.labels).sum())
    answers = torch.bincount(2 * outcome.labels + outcome.classes, minlength=4)
    return {"top1": outcome.top1, "correct": correct, "confusion": answers.reshape(2, 2).tolist(),
            "interval95": wilson(correct, len(outcome.files))}


def compare(fp32, int8):
    """What changed between two Outcomes: a dict of plain values, each figure of the summary."""
    if fp32.files != int8.files:
        raise InputError("pictures came or went while the run looked at them: run it again")
    if not (fp32.logits.isfinite().all() and int8.logits.isfinite().all()):
        raise InputError("logits overflow FP32: give a checkpoint with smaller weights")
    flips = []
    for i in (fp32.classes != int8.classes).nonzero().flatten().tolist():
        cat, dog = fp32.logits[i].tolist()
        flips.append({"file": fp32.files[i], "label": CLASSES[fp32.labels[i]],
                      "better": bool(int8.classes[i] == int8.labels[i]),
                      "fp32_logits": [cat, dog], "int8_logits": int8.logits[i].tolist(),
                      "fp32_margin": abs(cat - dog)})
    gained = sum(flip["better"] for flip in flips)
    lost = len(flips) - gained      # of two classes: a change is from wrong to right, or back
    return {"fp32": accuracy_of(fp32), "int8": accuracy_of(int8),
            "agreement": 1 - len(flips) / len(fp32.files),
            "logit_sqnr_db": sqnr_db(fp32.logits, int8.logits), "flips": flips,
            "mcnemar": {"gained": gained, "lost": lost, "p": mcnemar(gained, lost)}}


def name_of(recipe):
    """INT8, or where integers have fewer bits W4-8A8: 4 to 8 for weights, 8 for activations."""
    widths = weight_widths(recipe)
    if widths == [8] and recipe["BIT"] == 8:
        return "INT8"
    narrowest_and_widest = sorted({widths[0], widths[-1]})
    return f"W{'-'.join(map(str, narrowest_and_widest))}A{recipe['BIT']}"


def db(value):
    return "exact" if value is None else f"{value:.1f} dB"


def shown(name, width):
    """A file's name as it is printed, cut at the front where it is too long."""
    name = printable(name)
    return name if len(name) <= width else f"...{name[3 - width:]}"


def layer_rows(int8_model):
    """One dict a layer: what quantization made of it."""
    rows = []
    for layer in LAYERS:
        part, scale_out = int8_model.part(layer), int8_model.scale_at(layer.place).item()
        largest = int(int8_model.largest_sum(layer).max())
        rows.append({
            "name": layer.name, "shape": list(part.weight.shape),
            "range": int8_model.integers[layer.place].high / scale_out,
            "scale_in": int8_model.scale_at(layer.source).item(),
            "scale_out": None if int8_model.is_fp32(layer.place) else scale_out,
            "weight_scale": part.w_scale.tolist(),
            "accumulator_bits": largest.bit_length()})      # int32 has 31 and a sign
    return rows


def print_layers(rows):
    """The table of `layer_rows`."""
    print("layer  weight shape  covers    scale in  scale out  weight scale        max sum")
    for row in rows:
        low, high = min(row["weight_scale"]), max(row["weight_scale"])
        shape = "x".join(map(str, row["shape"]))
        scale_out = "FP32" if row["scale_out"] is None else f"{row['scale_out']:.5g}"
        scales = f"{low:.6g} .. {high:.6g}" if high > low else f"{low:.6g}"
        print(f"{row['name']:<5}  {shape:<12}  {row['range']:<8.5g}  {row['scale_in']:<8.5g}  "
              f"{scale_out:<9}  {scales:<18}  {row['accumulator_bits']:>3} bits")


def print_summary(report):
    """The figures of a report, in lines of at most 80 characters."""
    pictures, name = report["images"]["evaluated"], name_of(report["recipe"])
    networks = (("FP32", report["fp32"]), (name, report["int8"]))
    print("\nSummary      Top1              right   95 % interval  ms a picture    file bytes")
    for label, row in networks:
        low, high = row["interval95"]
        right, interval = f"{row['correct']:,} of {pictures:,}", f"{low:.1f} to {high:.1f} %"
        print(f"{label:<7}{row['top1']:>8.3f} %{right:>19}{interval:>16}"
              f"{row['ms_per_image']:>14.2f}{row['file_bytes']:>14,}")
    print(f"same class {100 * report['agreement']:.2f} %, logit SQNR "
          f"{db(report['logit_sqnr_db'])}, {name} {report['speedup']:.1f} times as fast")
    if weight_widths(report["recipe"])[0] < 8:
        print("Weights of fewer bits make a smaller file; if 8 have kernels, nothing faster.")
    for label, row in networks:
        (cats, cats_as_dogs), (dogs_as_cats, dogs) = row["confusion"]
        print(f"{label}: {cats + cats_as_dogs} cats, {cats_as_dogs} of them called dogs; "
              f"{dogs + dogs_as_cats} dogs, {dogs_as_cats} called cats")
    test = report["mcnemar"]
    verdict = "can be chance" if test["p"] >= 0.05 else "more than chance"
    print(f"{name} corrects {test['gained']} and spoils {test['lost']} FP32 answers: {verdict} "
          f"(McNemar's p = {test['p']:.2g})")
    if report["inputs"]["evaluation_crc"] == report["inputs"]["calibration_crc"]:
        print("Calibrated on the pictures that are counted: this flatters the ranges and hides\n"
              "what HEADROOM does.")
    print(f"{len(report['flips'])} pictures changed their class, {len(report['skipped'])} files "
          "were left out")
    for flip in report["flips"][:LISTED]:
        effect = "better" if flip["better"] else "worse"
        (cat, dog), (cat8, dog8) = flip["fp32_logits"], flip["int8_logits"]
        print(f"  {shown(flip['file'], 54)} ({flip['label']}), for the {effect}\n"
              f"    FP32 cat {cat:.3f} dog {dog:.3f}, margin {flip['fp32_margin']:.3f}; "
              f"{name} cat {cat8:.3f} dog {dog8:.3f}")
    for row in report["skipped"][:LISTED]:
        reason = printable(row["reason"])
        if len(reason) > 76:
            reason = f"{reason[:73]}..."
        print(f"  {shown(row['file'], 78)}\n    {reason}")
    if max(len(report["flips"]), len(report["skipped"])) > LISTED:
        print(f"  (at most {LISTED} of a kind are shown here; all are in report.json)")


def hints(report, folded, int8_model):
    """What to look at next, in at most three lines; none where nothing stands out."""
    found, recipe, fp32 = [], int8_model.recipe, report["fp32"]
    chance, (low, high) = 100 / len(CLASSES), fp32["interval95"]
    if high < chance:
        found.append(f"FP32 Top-1 of {fp32['top1']:.1f} % is worse than guessing: do the labels in "
                     "the files' names belong to other classes than the weights were trained on?")
    elif low < chance and report["images"]["evaluated"] >= SAMPLE:
        found.append(f"FP32 Top-1 of {fp32['top1']:.1f} % is near guessing: were the weights "
                     "trained on pixels from 0 to 255, and on these labels?")
    limit = 2**(recipe["BIAS_BIT"] - 1) - 1
    clipped = {layer.name: int((int8_model.part(layer).bias.long().abs() == limit).sum())
               for layer in LAYERS}
    if any(clipped.values()):
        where = ", ".join(f"{count} in {name}" for name, count in clipped.items() if count)
        found.append(f"BIAS_BIT = {recipe['BIAS_BIT']} clips {sum(clipped.values())} biases "
                     f"({where}): more bits avoid it.")
    sqnr = report["logit_sqnr_db"]
    if sqnr is not None and sqnr < LOW_SQNR:
        place, times = max(((place, outlier(folded.range_at(place))) for place in PLACES[1:-1]),
                           key=lambda pair: pair[1])
        strongest = (f" {place}'s strongest channel is {times:,.0f} times its median one, and all "
                     "share one scale." if times >= OUTLIER else "")
        found.append(f"Logit SQNR is below {LOW_SQNR} dB: python tools/explain.py shows where the "
                     f"error is born.{strongest}")
    silent = {place: int((folded.range_at(place) == 0).sum()) for place in PLACES}
    if any(silent.values()):
        where = ", ".join(f"{count} of {len(folded.range_at(place))} in {place}"
                          for place, count in silent.items() if count)
        found.append(f"Channels that were never active in calibration: {where}.")
    pictures = report["images"]["calibrated"]
    if pictures < SAMPLE:
        found.append(f"Only {pictures} calibration pictures: other pictures may exceed their "
                     f"ranges. {SAMPLE} or more are better.")
    return found[:3]


def outlier(ranges):
    """How many times the median of the active channels the strongest one reaches."""
    active = ranges[ranges > 0]
    return (active.max() / active.median()).item() if len(active) else 0


def draw_answers(pictures, fp32, int8, name):
    """A Pillow picture of the first pictures, those that changed before, with both answers."""
    order = sorted(range(len(fp32.files)), key=lambda i: bool(fp32.classes[i] == int8.classes[i]))
    order, side = order[:DRAWN], 160
    sheet = Image.new("RGB", (side * len(order), side + 56), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(13)
    for column, i in enumerate(order):
        path = pictures.folder / fp32.files[i]
        sheet.paste(Image.fromarray(decode(path, (side - 8, side - 8))), (side * column + 4, 4))
        lines = [path.name] + [f"{label}: {CLASSES[answer.classes[i]]} "
                               f"{answer.logits[i].max():.3f}"
                               for label, answer in (("FP32", fp32), (name, int8))]
        draw.text((side * column + 6, side), "\n".join(lines), "black", font)
    return sheet


# %% [markdown]
# ## The table of runs
# Every run adds a row to `runs.csv`, which a spreadsheet or pandas opens. What is printed of it
# compares the runs on the same pictures and weights.

# %%
RUNS_LISTED = 12    # of the last runs


def run_row(report):
    """{column: text} of a run: when, on what, its figures, its constants."""
    sqnr = report["logit_sqnr_db"]
    row = {"when": time.strftime("%Y-%m-%d %H:%M:%S"), **report["inputs"],
           "fp32_top1": f"{report['fp32']['top1']:.3f}", "top1": f"{report['int8']['top1']:.4f}",
           "same_class": f"{100 * report['agreement']:.4f}",
           "sqnr_db": "inf" if sqnr is None else f"{sqnr:.4f}",
           "p": f"{report['mcnemar']['p']:.4g}", "fp32_ms": f"{report['fp32']['ms_per_image']:.5f}",
           "ms": f"{report['int8']['ms_per_image']:.5f}", "bytes": report["int8"]["file_bytes"]}
    return {name: printable(str(value)) for name, value in (row | report["constants"]).items()}


def csv_line(cells):
    line = io.StringIO()
    csv.writer(line, lineterminator="\n").writerow(cells)
    return line.getvalue()


def add_run(path, row):
    """Append a row to the table of runs, and return its readable rows, the new one last.

    One write appends it, so that of two runs at once neither loses its row. A table that has other
    columns is renamed and stays. Raises InputError where the file cannot be written.
    """
    try:
        lines = path.read_bytes().decode("utf-8", "replace").split("\n") if path.exists() else [""]
        if lines != [""] and lines[0].rstrip("\r") + "\n" != csv_line(row):
            numbered = (path.with_stem(f"runs-{i}") for i in itertools.count(1))
            aside = next(other for other in numbered if not other.exists())
            path.rename(aside)
            print(f"{short(path)} has other columns than this version's: kept as {aside.name}")
            lines = [""]
        if lines == [""]:       # two runs at once make one file: only one of the links succeeds
            fresh = path.with_name(f"{path.name}.{os.getpid()}.tmp")
            fresh.write_bytes(csv_line(row).encode())
            if path.exists() and path.stat().st_size == 0:
                path.unlink()
            try:
                os.link(fresh, path)
            except FileExistsError:
                pass
            finally:
                fresh.unlink()
        begin = "\n" if lines[-1] else ""
        with open(path, "ab") as file:
            file.write((begin + csv_line(row.values())).encode())
    except OSError as error:
        raise InputError(f"cannot write {short(path)}: {error}; set OUTPUT_DIR") from None
    rows = [parsed_run(line, list(row)) for line in lines[1:] if line.strip()]
    unreadable = rows.count(None)
    if unreadable:
        print(f"{short(path)}: {unreadable} rows cannot be read and are left out")
    return [each for each in rows if each] + [row]


def parsed_run(line, columns):
    """{column: text} of a line of the table of runs, or None where it cannot be read."""
    try:
        row = dict(zip(columns, next(csv.reader([line])), strict=True))
        for name in ("sqnr_db", "same_class", "top1", "p", "ms", "bytes"):
            float(row[name])
        return row
    except (ValueError, csv.Error, StopIteration):
        return None


def print_runs(rows):
    """Print the last runs that share pictures and weights with the last row.

    Constants have a column where they differ. > marks the last run, * the best SQNR.
    """
    same = [row for row in rows if all(row[name] == rows[-1][name] for name in
                                       ("evaluation_crc", "checkpoint_crc"))][-RUNS_LISTED:]
    columns = {"run": [f"{'>' if row is rows[-1] else ''}{i}" for i, row in enumerate(same, 1)]}
    for name in [name for name in [*LEGAL, "calibration_crc"] if name in rows[-1]]:
        cells = [row[name] for row in same]
        explained = name == "calibration_crc" and {"DATA_DIR", "CALIBRATION_SPLIT"} & set(columns)
        if len(set(cells)) > 1 and not explained:
            columns[name] = [shown(cell, 24) for cell in cells]
    sqnr = [float(row["sqnr_db"]) for row in same]
    columns["SQNR dB"] = [f"{value:.1f}{'*' if value == max(sqnr) else ' '}" for value in sqnr]
    for heading, name, style in (
            ("same class", "same_class", ".1f"), ("Top-1 %", "top1", ".1f"), ("p", "p", ".2g"),
            ("ms", "ms", ".2f"), ("bytes", "bytes", ",.0f")):
        columns[heading] = [format(float(row[name]), style) for row in same]
    print(f"\nThe last runs on these pictures and weights, FP32 Top-1 {rows[-1]['fp32_top1']} %\n"
          "(> this run, * best SQNR, same class in %; runs.csv has all runs and constants)")
    print_columns(columns)


def print_columns(columns, width=80):
    """Print {heading: cells}, each heading a word a line, in blocks that are at most so wide."""
    texts = []
    for heading, cells in columns.items():
        words = heading.replace("_", "_ ").split()
        texts.append([word.rjust(max(map(len, [*words, *cells]))) for word in words + cells])
    height = max(len(text) for text in texts)
    texts = [[" " * len(text[0])] * (height - len(text)) + text for text in texts]
    first, *others = texts
    while others:
        block = [first, others.pop(0)]
        left = width - len(first[0]) - 1 - len(block[1][0])
        while others and left > len(others[0][0]):
            block.append(others.pop(0))
            left -= 1 + len(block[-1][0])
        print("\n".join(" ".join(cells) for cells in zip(*block)))


# %% [markdown]
# ## The run
# Each step is a cell. First the constants and the pictures: a file whose name tells no label is
# left out and listed at the end.

# %%
if __name__ == "__main__":
    set_constants(command_line(), __doc__)
    prepare_process()
    constants = check_constants()
    recipe = current_recipe()
    output = located(OUTPUT_DIR)
    make_writable(output)
    print(f"device {DEVICE}, torch {torch.__version__}")
    evaluation = calibration = CatDogDataset(located(DATA_DIR, EVALUATION_SPLIT))
    if CALIBRATION_SPLIT != EVALUATION_SPLIT:
        calibration = CatDogDataset(located(DATA_DIR, CALIBRATION_SPLIT))
    print(f"calibrating on {calibration}\nevaluating on  {evaluation}")

# %% [markdown]
# ### Load
# The trained network. Four times `cnn`, `bn`, `relu`, `maxpool`; no ReLU between `fc1` and `fc2`.

# %%
if __name__ == "__main__":
    model = load_checkpoint(located(CHECKPOINT))
    fp32_file = located(CHECKPOINT).read_bytes()
    print(model)

# %% [markdown]
# ### Fold
# A batch norm multiplies and adds, as the convolution before it does: one convolution can do both.
# The logits must stay the same but for FP32's last digits.

# %%
if __name__ == "__main__":
    pixels = evaluation.first(SAMPLE)
    folded = model.fused()
    change = largest_change(model, folded, pixels)
    print(f"folding changed a logit by at most {change:.3g}, on {len(pixels)} pictures")

# %% [markdown]
# ### Calibrate
# The observers see every calibration picture. Each range printed is the largest of a place's
# channels; one far above the others' would make coarse steps of its place.

# %%
if __name__ == "__main__":
    fp32 = calibrated = calibrate(folded, calibration)
    for place in PLACES:
        print(f"range_{place:<6} {folded.range_at(place).max().item():.6g}")
    if evaluation is not calibration:
        fp32 = evaluate("FP32", folded, evaluation)

# %% [markdown]
# ### Quantize
# Ranges become scales, weights and biases integers. In the table each layer has the magnitude that
# its output's integers cover, HEADROOM and EQUALIZE included, its scales, and the bits that its
# largest possible sum takes of the 31 that int32 has.

# %%
if __name__ == "__main__":
    fp32_model, int8_model = quantize_network(folded, calibration.first(SAMPLE), recipe)
    if recipe["EQUALIZE"]:
        change = largest_change(folded, fp32_model, pixels)
        print(f"equalizing changed a logit by at most {change:.3g}")
    layers = layer_rows(int8_model)
    print_layers(layers)

# %% [markdown]
# ### Prove
# The kernels are taken if every value that they give at every place, on these pictures, is the
# definition's, unless INT8_ENGINE says otherwise. Then both networks are timed, in turns.

# %%
if __name__ == "__main__":
    exact = choose_engine(int8_model, pixels)
    print(f"{name_of(recipe)} engine {int8_model.engine}: {exact['why']}")
    print(f"{exact['compared']:,} values of {len(pixels)} pictures compared, "
          f"{exact['different']:,} differ")
    ms = time_networks({"fp32": folded, "int8": int8_model}, pixels[:BATCH_SIZE])

# %% [markdown]
# ### Evaluate
# The same pictures on integers, counted alone: the notebook's meter still held FP32's answers.

# %%
if __name__ == "__main__":
    int8 = evaluate(name_of(recipe), int8_model, evaluation)

# %% [markdown]
# ### Compare
# What counts is how many answers changed, and how close to a tie those were.

# %%
if __name__ == "__main__":
    checkpoint = int8_checkpoint(int8_model)
    left_out = sorted((calibration.skipped | evaluation.skipped).items())
    report = {
        "constants": constants, "recipe": recipe, "torch": torch.__version__, "device": str(DEVICE),
        "inputs": {"evaluation_crc": evaluation.checksum(),
                   "calibration_crc": calibration.checksum(),
                   "checkpoint_crc": zlib.crc32(fp32_file)},
        "images": {"evaluated": len(int8.files), "calibrated": len(calibrated.files)},
        "skipped": [{"file": file, "reason": reason} for file, reason in left_out],
        "engine": int8_model.engine, "exact": exact, "layers": layers,
        "speedup": ms["fp32"] / ms["int8"], **compare(fp32, int8)}
    report["fp32"] |= {"ms_per_image": ms["fp32"], "file_bytes": len(fp32_file)}
    report["int8"] |= {"ms_per_image": ms["int8"], "file_bytes": len(checkpoint)}
    print_summary(report)
    for hint in hints(report, folded, int8_model):
        print(textwrap.fill(f"Hint: {hint}", 80))
    if hasattr(builtins, "display"):            # in a notebook
        display(draw_answers(evaluation, fp32, int8, name_of(recipe)))      # noqa: F821

# %% [markdown]
# ### Keep
# The INT8 network, loaded back to the same logits, all figures, and a row in the table of runs.

# %%
if __name__ == "__main__":
    report_json = (json.dumps(report, indent=1) + "\n").encode()
    write_files(output, {"INT8_checkpoint.pth.tar": checkpoint, "report.json": report_json})
    kept = INT8_Model.load(output / "INT8_checkpoint.pth.tar")
    change = largest_change(int8_model, kept, pixels)
    print(f"loaded back, the {name_of(recipe)} checkpoint changes a logit by {change:g}")
    print(f"wrote {short(output)}/INT8_checkpoint.pth.tar and report.json")
    print_runs(add_run(output / "runs.csv", run_row(report)))

# %% [markdown]
# ### Explain
# Why answers changed, in tables and a picture. A notebook runs the tool; a program leaves it out.

# %%
# %run tools/explain.py
