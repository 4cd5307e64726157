"""Why quantization changed what it changed: tables, results/explain.json and results/report.png.

    python tools/explain.py [--bits]

Makes the network that quantize_catdog.py makes with its constants, and looks at it:

    where is the error born?          each layer quantized alone, all others in FP32
    where do the ranges come from?    which picture set each, and what most values stay below
    how many pictures are enough?     the network calibrated on the first 1, 2, 5, 10, ... of them
    how does a value become integer?  one output of the first layer and one logit, figure by figure
    how many bits are enough?         with --bits: WEIGHT_BIT and BIT from 8 down to 2, 49 networks
    which pictures changed?           report.png shows them, and draws the tables

It changes no network, and no file but these two. In a notebook, `%run tools/explain.py` takes the
constants of the notebook's cells and shows report.png under its own.
"""
import sys


def end_import_in_one_line(kind, error, trace):
    """sys.excepthook while the imports run, before the script's own can take over."""
    if issubclass(kind, KeyboardInterrupt):
        print("stopped by Ctrl-C", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, trace)


if __name__ == "__main__":
    sys.excepthook = end_import_in_one_line
    sys.modules.pop("quantize_catdog", None)    # a notebook's kernel may hold it as it was before

import argparse
import contextlib
import copy
import io
import itertools
import json
import math
import textwrap
import warnings
from collections import Counter
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch.func import functional_call

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import quantize_catdog as script

BINS = 1024         # of a histogram, from 0 to the range
COMPARED = 100      # evaluation pictures, at most, whose answers the curve compares
WIDTHS = range(8, 1, -1)    # bits of the grid, for weights and for activations


# Values and their energies

def flat(x):
    """All values in one row; maps in the order in which they lie in memory: nothing is copied."""
    return (x.permute(0, 2, 3, 1) if x.dim() == 4 else x).reshape(-1)


def histogram(x, largest):
    """Counts (4 * BINS,) of values from -2 to 2 times `largest`; the outer bins count all beyond.

    x: FP32, any shape; largest: a float. The counts come back on the CPU.
    """
    width = max(largest, script.SMALLEST) / BINS
    bins = (x / width + 2 * BINS).clamp_(0, 4 * BINS - 1).short()
    return torch.bincount(flat(bins), minlength=4 * BINS).cpu()


def energy(x):
    """Sum of squares, in FP32, good for four digits or 0.001 dB; in FP64 where it overflows."""
    norm = torch.linalg.vector_norm(x).item()
    return (norm if norm < math.inf else torch.linalg.vector_norm(x.double()).item())**2


def real(int8_model, place, integers):
    """The numbers that a place's integers stand for; logits that stay FP32 are these already."""
    return integers if int8_model.is_fp32(place) else integers / int8_model.scale_at(place)


def round_trip(int8_model, place, x):
    """FP32 values to a place's integers and back."""
    if int8_model.is_fp32(place):
        return x
    scale = int8_model.scale_at(place)
    return script.quantize(x, scale, int8_model.integers[place]) / scale


def read_by(layer, values):
    """What a layer reads of {place: values}: pooled behind a convolution, flat before FC1."""
    x = values[layer.source]
    if layer.source.startswith("cv"):
        x = script.MaxPool2d(2)(x)
    return x if layer.is_conv else x.flatten(1)


# Calibration, picture by picture

def calibrate_by_picture(folded, pictures):
    """As the script's `calibrate`, and remember each picture's part in the ranges.

    Returns the Outcome and {place: largest magnitude in each picture's channels, FP32 (n, C)}.
    """
    maxima = {place: torch.zeros(len(pictures), len(folded.range_at(place)))
              for place in script.PLACES}
    seen = Counter()

    def observe(place, values):
        rows = slice(seen[place], seen[place] + len(values))
        maxima[place][rows] = script.largest_magnitudes(values)
        seen[place] += len(values)
        return values

    outcome = script.evaluate("FP32", folded, pictures, observe)
    maxima = {place: found[:len(outcome.files)] for place, found in maxima.items()}
    set_ranges(folded, maxima)
    return outcome, maxima


@torch.no_grad()
def set_ranges(folded, maxima):
    """Give a folded network the ranges that pictures with these maxima set."""
    for place, found in maxima.items():
        folded.range_at(place).copy_(found.amax(0))


# Where the error is born

def layer_output(model, layer, x, **changed):
    """What a layer of an FP32 network makes of x, with another `weight` or `bias` if given."""
    y = functional_call(model.part(layer), changed, x)
    return F.relu_(y) if layer.is_conv else y


def logits_from(model, place, values):
    """An FP32 network's logits when these values are at a place."""
    for layer in script.LAYERS[script.PLACES.index(place):]:
        values = layer_output(model, layer, read_by(layer, {layer.source: values}))
    return values


def uncorrected_bias(fp32_model, int8_model, layer):
    """A layer's int32 bias before the bias correction, which makes up for what is inherited."""
    part, in_scale = fp32_model.part(layer), int8_model.scale_at(layer.source)
    return script.weight_quant(part.weight, part.bias, in_scale, int8_model.recipe)[1]


def quantized_alone(fp32_model, int8_model, layer, values, int8_values):
    """{kind of error: values at a layer's place that have this error and no other}.

    values, int8_values: {place: values} of the FP32 network, and what the INT8 network's integers
    stand for. The kinds are those of `error_ledger`, which are seen at the layer's own place.
    """
    part, part8, place = fp32_model.part(layer), int8_model.part(layer), layer.place
    weight8 = part8.weight / script.spread(part8.w_scale, part.weight.dim() - 1)
    bias8 = uncorrected_bias(fp32_model, int8_model, layer) / int8_model.sum_scale(layer)
    x, x8 = read_by(layer, values), read_by(layer, int8_values)
    both = layer_output(fp32_model, layer, x, weight=weight8, bias=bias8)
    return {"int8": int8_values[place],
            "inherited": layer_output(fp32_model, layer, x8),
            "weights": layer_output(fp32_model, layer, x, weight=weight8),
            "biases": layer_output(fp32_model, layer, x, bias=bias8),
            "rounding": round_trip(int8_model, place, values[place]),
            "born": round_trip(int8_model, place, both)}


@torch.inference_mode()
def error_ledger(fp32_model, int8_model, pixels):
    """Where the error is born: a list with a dict for the input and each layer.

    fp32_model: the folded network that int8_model was made from; pixels: uint8 (n, 3, h, w). Each
    dict has an SQNR in dB, None for no error, of these errors. At the layer's place:

        int8        of the INT8 network
        inherited   of it, what comes with the layer's input: the FP32 layer on the INT8 input
        born        of quantizing this layer alone, on the FP32 input; and of its parts:
        weights, biases, rounding (of the output)

    and, at the logits, "logits": of quantizing this layer alone. Biases are those of before their
    correction. The second result: {place: histogram of its FP32 values}, to twice what is kept.
    """
    energies, codes, histograms = Counter(), Counter(), Counter()
    for chunk in pixels.split(script.CHUNK):
        values, integers = script.values_at(fp32_model, chunk), script.values_at(int8_model, chunk)
        int8_values = {place: real(int8_model, place, q) for place, q in integers.items()}
        for place, layer in zip(script.PLACES, [None, *script.LAYERS]):
            x = values[place]
            if layer:
                found = quantized_alone(fp32_model, int8_model, layer, values, int8_values)
            else:
                found = dict.fromkeys(("int8", "rounding", "born"), int8_values[place])
            for kind, changed in found.items():
                energies[place, kind] += energy(changed - x)
            energies[place, "signal"] += energy(x)
            logits = logits_from(fp32_model, place, found["born"])
            energies[place, "logits"] += energy(logits - values["fc2"])
            to = int8_model.integers[place]
            histograms[place] += histogram(x, ((to.high + 0.5) / int8_model.scale_at(place)).item())
            if not int8_model.is_fp32(place):
                used = flat(integers[place]).int() - to.low
                codes[place] += torch.bincount(used, minlength=to.high - to.low + 1)

    ledger = []
    for place, layer in zip(script.PLACES, [None, *script.LAYERS]):
        sqnr = {kind: script.decibels(energies[place, "signal"], energies[place, kind])
                for kind in ("int8", "inherited", "born", "weights", "biases", "rounding")}
        sqnr["logits"] = script.decibels(energies["fc2", "signal"], energies[place, "logits"])
        row = {"name": layer.name if layer else "input", "sqnr_db": sqnr,
               "clipped": None, "codes_used": None, "codes": None, "hurts_most": False}
        if place in codes:
            total, kept = histograms[place].sum(), histograms[place][BINS:3 * BINS].sum()
            row["clipped"] = (total - kept).item() / total.item()
            row["codes_used"], row["codes"] = int((codes[place] > 0).sum()), len(codes[place])
        ledger.append(row)
    worst = worst_by("logits", ledger)
    if worst:
        worst["hurts_most"] = True
    return ledger, dict(histograms)


def worst_by(kind, ledger):
    """The row with the fewest dB of a kind; None where none has an error of this kind."""
    rows = [row for row in ledger if row["sqnr_db"][kind] is not None]
    return min(rows, key=lambda row: row["sqnr_db"][kind]) if rows else None


# Where the ranges come from, and how many pictures are enough

@torch.inference_mode()
def range_sources(folded, files, maxima, pixels):
    """Where a range comes from: a dict a place, with the range and the picture that set it.

    files, maxima: the calibration pictures and what `calibrate_by_picture` found in them; pixels:
    the first of them. "percentile999" of the magnitudes on `pixels`, to a thousandth of the range.
    """
    largest = {place: found.amax(1) for place, found in maxima.items()}         # (n,)
    histograms, rows = Counter(), []
    for chunk in pixels.split(script.CHUNK):
        for place, x in script.values_at(folded, chunk).items():
            histograms[place] += histogram(x.abs(), largest[place].max().item())
    for place, found in largest.items():
        shares = histograms[place].cumsum(0) / histograms[place].sum()
        upper_edge = (shares < 0.999).sum().item() + 1 - 2 * BINS          # in bins
        index = int(found.argmax())                             # the first where several are
        setter = {"range": found[index].item(), "file": files[index], "number": index + 1}
        percentile = setter["range"] * min(upper_edge / BINS, 1)
        rows.append({"place": place, **setter, "percentile999": percentile})
    return rows


def equalized(folded, recipe):
    """The FP32 network that is quantized, and {place: what multiplies each channel, (C,)}: 1 but
    where EQUALIZE has rescaled it."""
    factors = {place: torch.ones_like(folded.range_at(place)) for place in script.PLACES}
    if not recipe["EQUALIZE"]:
        return folded, factors
    fp32_model, found = script.equalize(folded)
    return fp32_model, factors | found


def first_counts(total):
    """1, 2, 5, 10, 20, 50, ... and the total itself."""
    counts = [k * 10**exponent for exponent in range(len(str(total))) for k in (1, 2, 5)]
    return [count for count in counts if count < total] + [total]


def calibration_curve(folded, int8_model, maxima, calibration_pixels, pixels, fp32_logits):
    """How many pictures are enough: a dict for the first 1, 2, 5, 10, ... of them, and for all.

    Each has the places' "ranges" as shares of the last, and how the INT8 network that so many
    pictures calibrate answers `pixels`: its logits' "sqnr_db" against fp32_logits, "agreement" with
    their classes, "as_last": whether each class is the one of the last. "coarser": {place: channels
    whose steps are coarser than in the row before}. calibration_pixels: the first ones; int8_model:
    the network that all of them calibrated.
    """
    total, rows, classes, steps = len(maxima["input"]), [], [], []
    for count in first_counts(total):
        part, other = copy.deepcopy(folded), int8_model
        if count < total:
            set_ranges(part, {place: found[:count] for place, found in maxima.items()})
            seen = calibration_pixels[:count]
            other = script.quantize_network(part, seen, int8_model.recipe)[1]
            other.engine = int8_model.engine        # proven with the same widths
        logits = logits_of(other, pixels)
        classes.append(logits.argmax(1))
        same = (classes[-1] == fp32_logits.argmax(1)).double().mean().item()
        factors = equalized(part, other.recipe)[1]
        steps.append({place: 1 / (other.scale_at(place) * factors[place])
                      for place in script.PLACES if not other.is_fp32(place)})
        before = steps[-2] if len(steps) > 1 else steps[-1]
        coarser = {place: int((step > before[place]).sum()) for place, step in steps[-1].items()}
        ranges = {place: (found[:count].max() / found.max()).item() if found.max() else 1.0
                  for place, found in maxima.items()}
        rows.append({"pictures": count, "ranges": ranges, "agreement": same, "coarser": coarser,
                     "sqnr_db": script.sqnr_db(fp32_logits, logits)})
    return [row | {"as_last": torch.equal(found, classes[-1])}
            for row, found in zip(rows, classes)]


@torch.inference_mode()
def logits_of(model, pixels):
    """FP32 logits (n, 2), on the CPU."""
    return torch.cat([model(chunk).cpu() for chunk in pixels.split(script.CHUNK)])


# One value followed

@torch.inference_mode()
def spot_to_follow(folded, int8_model, pixels):
    """(channel, row, column) of an output of cnn1 in the first picture that is worth following.

    Of the largest of each 2 x 2, which the pooling keeps, the first that meets most wishes.
    """
    values, integers = [script.values_at(model, pixels[:1])["cv1"][0]
                        for model in (folded, int8_model)]
    kept, where = by_windows(integers.short()).topk(2)                      # (C, h, w, 2)
    kept, second, where = kept[..., 0], kept[..., 1], where[..., :1]
    expected = by_windows(values).gather(3, where)[..., 0]
    factor = script.spread(equalized(folded, int8_model.recipe)[1]["cv1"], 2)
    error = (kept - expected * factor * int8_model.scale_at("cv1")).abs()   # in steps
    wishes = [factor > 1.1,                         # EQUALIZE has rescaled the channel
              (kept >= 5) & (kept <= 20),           # so small that the error shows
              kept - second >= 2,                   # no tie in the pooling
              (error > 0.25) & (error < 0.5),       # not by luck, and not beyond rounding
              (kept > 0) & (kept < int8_model.integers["cv1"].high)]        # not clipped
    score = sum(2**i * wish.int() for i, wish in enumerate(wishes))         # the last counts most
    channel, row, column = [int(i) for i in np.unravel_index(int(score.argmax()), score.shape)]
    down, right = divmod(int(where[channel, row, column]), 2)
    return channel, 2 * row + down, 2 * column + right


def by_windows(maps):
    """(C, height, width) -> (C, height // 2, width // 2, 4), the four values that pooling sees."""
    return maps.unfold(1, 2, 2).unfold(2, 2, 2).flatten(3)


@torch.inference_mode()
def follow(folded, int8_model, pixels, layer, spot):
    """One output of a layer in the first picture, in FP32 and in integers: a dict of its figures.

    spot: (channel, row, column), or (channel,) where a layer is fully connected. The FP32 network
    is the folded one; what EQUALIZE did to the channel, its "factor", is undone on the way back.
    What it did to the channel that the first product reads, the "input_factor", its weight undoes.
    """
    values, integers = [script.values_at(model, pixels[:1]) for model in (folded, int8_model)]
    part, part8, channel = folded.part(layer), int8_model.part(layer), spot[0]
    x, q, pooled = read_by(layer, values)[0], read_by(layer, integers)[0], None
    if layer.is_conv:
        row, column, size = spot[1], spot[2], part.kernel_size[0]
        x, q = [maps[:, row:row + size, column:column + size] for maps in (x, q)]
        pooled = by_windows(integers[layer.place][0])[channel, row // 2, column // 2].tolist()
    weight, weight8 = part.weight[channel], part8.weight[channel]
    fp32 = {"inputs": x.flatten().tolist(), "weights": weight.flatten().tolist(),
            "sum": (x.double() * weight.double()).sum().item(),
            "bias": part.bias[channel].item(), "value": values[layer.place][0][spot].item()}

    fp32_model, factors = equalized(folded, int8_model.recipe)
    total, bias = (q.long() * weight8.long()).sum(), part8.bias[channel]
    multiplier, factor = int8_model.multiplier(layer)[channel], factors[layer.place][channel].item()
    result, rounded = integers[layer.place][0][spot], not int8_model.is_fp32(layer.place)
    to = int8_model.integers[layer.place]
    scale_out = int8_model.scale_at(layer.place).item() if rounded else None
    int8 = {"inputs": q.flatten().tolist(), "weights": weight8.flatten().tolist(),
            "sum": total.item(), "bias": bias.item(),
            "uncorrected_bias": uncorrected_bias(fp32_model, int8_model, layer)[channel].item(),
            "scale_in": int8_model.scale_at(layer.source).item(),
            "scale_weight": part8.w_scale.expand(len(part8.bias))[channel].item(),
            "scale_out": scale_out, "multiplier": multiplier.item(),
            "unrounded": (total.float() * multiplier + bias * multiplier).item(),
            "limits": [0 if layer.is_conv else to.low, to.high], "result": result.item()}
    value = real(int8_model, layer.place, result).item() / factor
    return {"layer": layer.name, "spot": list(spot), "fp32": fp32, "int8": int8, "factor": factor,
            "input_factor": factors[layer.source][0].item(), "value": value,
            "error": value - fp32["value"],
            "step": 1 / scale_out / factor if rounded else None, "pooled": pooled}


# How many bits

def bits_row(folded, calibration_pixels, evaluation, fp32, weight_bit):
    """A row of the grid: a dict with a cell for each BIT, and the bytes of the file of the first.

    fp32: the Outcome on `evaluation`, whose pictures each cell's network answers, all of them.
    """
    row = {"WEIGHT_BIT": weight_bit, "file_bytes": None, "cells": []}
    for bit in WIDTHS:
        recipe = script.current_recipe() | {"WEIGHT_BIT": weight_bit, "BIT": bit}
        _, int8_model = script.quantize_network(folded, calibration_pixels, recipe)
        script.choose_engine(int8_model, calibration_pixels[:script.CHUNK])
        with contextlib.redirect_stdout(io.StringIO()):         # the table says what this would
            int8 = script.evaluate(script.name_of(recipe), int8_model, evaluation)
        found = script.compare(fp32, int8)
        row["cells"].append({"BIT": bit, "agreement": found["agreement"],
                             "sqnr_db": found["logit_sqnr_db"], "top1": int8.top1})
        row["file_bytes"] = row["file_bytes"] or len(script.int8_checkpoint(int8_model))
    return row


# The tables, in lines of at most 80 characters

def print_wrapped(text, indent=0):
    print(textwrap.fill(text, 80, subsequent_indent=" " * indent, break_on_hyphens=False))


def decimal(value):
    return "exact" if value is None else f"{round(value, 1) + 0:.1f}"      # + 0: no -0.0


def fewer_db(row, other):
    """By how many dB the other row is lower, as the tables round them; 0 where it is not."""
    if row["sqnr_db"] is None or other["sqnr_db"] is None:
        return 0
    return max(0, round(row["sqnr_db"], 1) - round(other["sqnr_db"], 1))


def print_ledger(ledger, pictures):
    """The table of `error_ledger`, and why what puzzles in it is so."""
    print(f"\nWhere is the error born? SQNR in dB on {pictures} pictures, the lower the worse\n"
          "         INT8           born in this layer, all else FP32  at the\n"
          "layer network inherited   all weights biases rounding  logits  clipped   codes")
    for row in ledger:
        sqnr = {kind: decimal(value) for kind, value in row["sqnr_db"].items()}
        clipped = "  none: stay FP32"
        if row["codes"] is not None:
            clipped = f"{100 * row['clipped']:>6.2g} % {row['codes_used']:>4}/{row['codes']}"
        print("{:<6}{int8:>7}{inherited:>10}{born:>6}{weights:>8}{biases:>7}{rounding:>9}"
              "{logits:>8}".format(row["name"], **sqnr)
              + ("*" if row["hurts_most"] else " ") + clipped)
    guilty, largest = worst_by("logits", ledger), worst_by("born", ledger)
    if guilty:
        print(f"* hurts most: quantizing {guilty['name']} alone changes the logits most.")
    if guilty and guilty is not largest:
        print_wrapped(f"{largest['name']}'s own error is larger, but what counts is how much of it "
                      "reaches the logits: on the way, in sums over many values, errors of either "
                      "sign cancel.")


def print_ranges(sources, pictures):
    """The table of `range_sources`."""
    print("\nWhere do the ranges come from?\n"
          f"99.9 %: what so many of the values of {pictures} pictures do not exceed\n"
          "place      range     99.9 %  range / that  set by picture")
    for row in sources:
        times = row["range"] / max(row["percentile999"], script.SMALLEST)
        print(f"{row['place']:<6} {row['range']:>9.5g}  {row['percentile999']:>9.4g}  "
              f"{times:>12.1f}  {row['number']:>6} {script.shown(row['file'], 27)}")


def print_curve(curve, sources, compared):
    """The table of `calibration_curve`, and why what puzzles in it is so."""
    print("\nHow many calibration pictures are enough? Ranges in % of the last ones;\n"
          f"same class and logit SQNR of INT8 against FP32, on {compared} pictures\n"
          f"pictures {' '.join(f'{place:>5}' for place in script.PLACES)}  same class  logit SQNR")
    for row in curve:
        ranges = " ".join(f"{100 * row['ranges'][place]:>5.1f}" for place in script.PLACES)
        print(f"{row['pictures']:>8} {ranges}  {100 * row['agreement']:>8.2f} %  "
              f"{script.db(row['sqnr_db']):>10}")
    last = curve[-1]["pictures"]
    settled = max((i + 1 for i, row in enumerate(curve) if not row["as_last"]), default=0)
    classes = f"from {curve[settled]['pictures']} on no class changes"
    if 0 < settled == len(curve) - 1:
        classes = f"between {curve[-2]['pictures']} and {last} a class still changed"
    grown = max(row["number"] for row in sources)
    print(f"after picture {grown} of {last} no range grows; {classes}")
    print_fewer_db(curve)


def print_fewer_db(curve):
    """Why more pictures gave fewer dB, where they did: of the row that lost most."""
    lost, before, row = max(((fewer_db(*pair), *pair) for pair in itertools.pairwise(curve)),
                            key=lambda found: found[0], default=(0, None, None))
    if not lost:
        return
    why = ("not only their ranges differ, but also what GPTQ and bias correction, which look at "
           f"{script.SAMPLE} at most, have seen.")
    if before["pictures"] >= script.SAMPLE:
        coarser = ", ".join(f"{place} {n}" for place, n in row["coarser"].items() if n)
        why = ("a range can only grow, and a wider one, of a place or with EQUALIZE of a channel, "
               f"has coarser steps. Channels with coarser steps: {coarser}.")
    print_wrapped(f"{row['pictures']} pictures give fewer dB than {before['pictures']}: {why}")


def products(inputs, weights):
    """The first two of many products, and the last, as text."""
    first, second, *_, last = [f"{x:.5g} x {w:.5g}" for x, w in zip(inputs, weights)]
    return f"{first} + {second}", f"+ ... + {last}"


def print_line(head, text):
    print_wrapped(f"  {head:<9}{text}", indent=11)


def print_followed(row):
    """The figures of `follow`, such that a pocket calculator can check each line.

    Of the products explain.json has all.
    """
    fp32, int8 = row["fp32"], row["int8"]
    spot = ", ".join(f"{name} {i}" for name, i in zip(("channel", "row", "column"), row["spot"]))
    scale_in, scale = int8["scale_in"], int8["scale_weight"]
    times, back, undone = "", "", ""
    if row["factor"] != 1:
        times, back = f" x {row['factor']:.6g}", f" / {row['factor']:.6g}"
    if row["input_factor"] != 1:
        undone = f" / {row['input_factor']:.6g}"
    weight = fp32["weights"][0] * row["factor"] / row["input_factor"] * scale
    bias = fp32["bias"] * row["factor"] * scale
    choice = "" if round(weight) == int8["weights"][0] else " by GPTQ"
    print(f"\nOne value followed: {row['layer']}'s {spot} (from 0)")
    print(f"  picture  {script.shown(row['file'], 69)}")
    begin, end = products(fp32["inputs"], fp32["weights"])
    print_line("FP32", begin)
    print_line("", f"{end} = {fp32['sum']:.6g}, {len(fp32['inputs'])} products")
    print_line("", f"bias {fp32['bias']:.6g}; {'ReLU' if row['pooled'] else 'logit'}: "
                   f"{fp32['value']:.6g}")
    if times:
        print_line("EQUALIZE", f"multiplies the channel by {row['factor']:.6g}")
    if undone:
        print_line("EQUALIZE", f"multiplies the first input by {row['input_factor']:.6g}, so "
                               "divides its weight")
    print_line("weights", f"{fp32['weights'][0]:.5g}{times}{undone} x scale {scale:.6g} = "
                          f"{weight:.5g} became {int8['weights'][0]}{choice}, and so on")
    print_line("bias", f"{fp32['bias']:.6g}{times} x {scale:.6g} x {scale_in:.6g} = "
                       f"{bias * scale_in:.6g} became {int8['uncorrected_bias']}")
    if int8["bias"] != int8["uncorrected_bias"]:
        print_line("", f"bias correction made it {int8['bias']}")
    print_line("int32", " ".join(products(int8["inputs"], int8["weights"])) + f" = {int8['sum']}")
    print_line("M", f"scale out / (in x weights) = {int8['scale_out'] or 1:.6g} / ({scale_in:.6g} "
                    f"x {scale:.6g}) = {int8['multiplier']:.6g}")
    scaled = f"{int8['sum']} x M + {int8['bias']} x M = {int8['unrounded']:.6g}"
    if row["step"]:
        low, high = int8["limits"]
        print_line("INT8", f"{scaled}; rounded, within {low} to {high}: {int8['result']}")
        print_line("back", f"{int8['result']} / {int8['scale_out']:.6g}{back} = {row['value']:.6g}")
    else:
        print_line("logit", f"{scaled}: logits stay FP32")
    print_line("error", f"{row['value']:.6g} - {fp32['value']:.6g} = {row['error']:.4g}"
                        + (f"; a step is {row['step']:.4g}" if row["step"] else ""))
    if row["pooled"]:
        print_line("pooling", f"keeps {max(row['pooled'])}, the largest of "
                              f"{', '.join(map(str, row['pooled']))}")


def print_bits_head(pictures):
    print(f"\nHow many bits? On {pictures} pictures; W8: weights of 8 bits, A8: activations of 8\n"
          "Same class in % and, below it, logit SQNR in dB\n       "
          + "".join(f"{f'A{bit}':>8}" for bit in WIDTHS) + "   bytes of file")


def print_bits_row(row):
    same = "".join(f"{100 * cell['agreement']:>8.2f}" for cell in row["cells"])
    sqnr = "".join(f"{decimal(cell['sqnr_db']):>8}" for cell in row["cells"])
    print(f"W{row['WEIGHT_BIT']:<6}{same}{row['file_bytes']:>16,}\n       {sqnr}")


def print_more_bits(bits, recipe):
    """Why more bits gave fewer dB, where they did. Without GPTQ they hardly do."""
    cells = {(row["WEIGHT_BIT"], cell["BIT"]): cell for row in bits for cell in row["cells"]}
    pairs = [(less, (w, a)) for w, a in cells for less in ((w - 1, a), (w, a - 1)) if less in cells]
    lost, less, more = max(((fewer_db(cells[less], cells[more]), less, more)
                            for less, more in pairs), default=(0, None, None))
    if lost and recipe["GPTQ"]:
        fewer, higher = [f"W{w}A{a} {cells[w, a]['sqnr_db']:.1f}" for w, a in (more, less)]
        print_wrapped(f"More bits give fewer dB: {fewer}, {higher}. For each cell GPTQ rounds the "
                      "weights anew, by what the activations are like then, and it is chance which "
                      "rounding comes out better.")


# The picture. The colours are those of Okabe and Ito, which the colour-blind can tell apart.

BLUE, SKY, ORANGE, RED = "#0072B2", "#56B4E9", "#E69F00", "#D55E00"
GREEN, PINK, GRAY = "#009E73", "#CC79A7", "#555555"
BARS = 128          # of a drawn histogram, from -2 to 2 times the largest value kept
SHOWN = 8           # pictures in report.png


def axes_of(figure, where, title, **settings):
    axes = figure.add_subplot(where)
    axes.set_title(title, loc="left", fontsize=13, fontweight="bold")
    axes.set(**settings)
    axes.spines[["top", "right"]].set_visible(False)
    return axes


def draw_activations(figure, grid, ledger, histograms):
    for i, (place, row) in enumerate(zip(script.PLACES, ledger)):
        counts = histograms[place].reshape(BARS, -1).sum(1).double()
        shares, edges = (counts / counts.sum()).numpy(), np.linspace(-2, 2, BARS + 1)
        within = slice(BARS // 4, 3 * BARS // 4)                # of the largest value kept
        lowest = -1.4 if place.startswith("fc") else 0
        axes = axes_of(figure, grid[i], place, yscale="log", xlim=(lowest, 1.4), ylim=(1e-8, 30))
        axes.stairs(shares, edges, fill=True, color=SKY if row["clipped"] is None else RED)
        axes.stairs(shares[within], edges[BARS // 4:3 * BARS // 4 + 1], fill=True, color=SKY)
        for edge in [-1, 1] if lowest < 0 else [1]:
            axes.axvline(edge, color=RED, linestyle="--", ymax=0.85)
        clipped = "stays FP32"
        if row["clipped"] is not None:
            clipped = f"{100 * row['clipped']:.3g} % clipped"
        axes.text(0.5, 0.98, clipped, transform=axes.transAxes, ha="center", va="top", fontsize=11,
                  color=GRAY)
        axes.set_yticks([1e-8, 1e-6, 1e-4, 1e-2, 1], [] if i else None)
        axes.set_xlabel("value / largest kept" if i == 0 else "")


def draw_curve(figure, where, curve):
    axes = axes_of(figure, where, "Ranges, by calibration pictures", xscale="log",
                   xlabel="pictures", ylabel="% of the last range", ylim=(0, 108))
    pictures = [row["pictures"] for row in curve]
    colors = GRAY, BLUE, SKY, GREEN, ORANGE, RED, PINK
    for place, color, marker in zip(script.PLACES, colors, "xosD^vP"):
        ranges = [100 * row["ranges"][place] for row in curve]
        axes.plot(pictures, ranges, color=color, marker=marker, label=place)
    same = [100 * row["agreement"] for row in curve]
    axes.plot(pictures, same, "k:", linewidth=2.5, label="same class")
    ticks = [count for count in pictures if len(pictures) < 9 or str(count)[0] == "1"]
    ticks = [count for count in ticks if 1.9 * count < pictures[-1]] + pictures[-1:]
    axes.set_xticks(ticks, ticks)
    axes.minorticks_off()
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), fontsize=10, frameon=False)


def percent_of_signal(row, kind):
    sqnr = row["sqnr_db"][kind]
    return 0 if sqnr is None else 100 * 10**(-sqnr / 20)


def draw_ledger(figure, where, ledger):
    axes = axes_of(figure, where, "Where the error is born, in % of the signal")
    kinds = [("inherited", SKY, "inherited from the input"), ("born", BLUE, "born in the layer"),
             ("logits", ORANGE, "what that does to the logits")]
    for i, (kind, color, label) in enumerate(kinds):
        heights = [percent_of_signal(row, kind) for row in ledger]
        axes.bar(np.arange(len(ledger)) + 0.27 * (i - 1), heights, 0.25, color=color, label=label)
    top = max(percent_of_signal(row, kind) for row in ledger for kind, _, _ in kinds) or 1
    axes.set_ylim(0, 1.95 * top)                # the legend lies above the bars
    for i, row in enumerate(ledger):
        if row["hurts_most"]:
            axes.annotate("hurts most", (i + 0.27, percent_of_signal(row, "logits")),
                          (i + 0.27, 1.15 * top), ha="center", fontsize=11, color=RED,
                          fontweight="bold", arrowprops={"arrowstyle": "->", "color": RED})
    axes.set_xticks(range(len(ledger)), [row["name"] for row in ledger])
    axes.legend(loc="upper left", fontsize=10, frameon=False)


def draw_bits(figure, where, bits):
    axes = axes_of(figure, where, "Same class, %, and logit SQNR, dB, by bits",
                   xlabel="bits of activations", ylabel="bits of weights")
    sqnr = [[cell["sqnr_db"] for cell in row["cells"]] for row in bits]
    heat = [[40 if value is None else value for value in row] for row in sqnr]
    axes.imshow(heat, cmap="cividis", vmin=0, vmax=40, aspect="auto")
    for i, row in enumerate(bits):
        for j, cell in enumerate(row["cells"]):
            same, color = 100 * cell["agreement"], "black" if heat[i][j] > 20 else "white"
            axes.text(j, i, f"{same:.4g}\n{decimal(cell['sqnr_db'])}", ha="center", va="center",
                      fontsize=8.5, linespacing=1, color=color)
        axes.text(len(row["cells"]) - 0.4, i, f"{row['file_bytes']:,}", va="center", fontsize=10)
    axes.text(len(bits[0]["cells"]) - 0.4, len(bits) - 0.35, "bytes of file", va="top", fontsize=10)
    axes.set_xticks(range(len(bits[0]["cells"])), [cell["BIT"] for cell in bits[0]["cells"]])
    axes.set_yticks(range(len(bits)), [row["WEIGHT_BIT"] for row in bits])


def draw_pictures(figure, grid, fp32, int8, folder, name):
    """Those whose class changed first, the surest of them before; then those nearest to it."""
    margins = (fp32.logits[:, 0] - fp32.logits[:, 1]).abs().numpy()
    changed = (fp32.classes != int8.classes).numpy()
    order = np.lexsort((np.where(changed, -margins, margins), ~changed))
    for cell, i in zip(grid, order[:SHOWN]):
        axes = figure.add_subplot(cell)
        try:
            axes.imshow(script.decode(folder / fp32.files[i], script.IMAGE_SIZE))
        except script.InputError:           # it went away meanwhile
            axes.imshow(np.full((1, 1, 3), 200, np.uint8))
        axes.set_axis_off()
        (fp32_cat, fp32_dog), (cat, dog) = fp32.logits[i].tolist(), int8.logits[i].tolist()
        file = fp32.files[i].encode("ascii", "backslashreplace").decode()   # as the font has it
        text = (f"{script.shown(file, 15)} ({script.CLASSES[fp32.labels[i]]})\n"
                f"FP32 {script.CLASSES[fp32.classes[i]]} by {abs(fp32_cat - fp32_dog):.3f}\n"
                f"{name} {script.CLASSES[int8.classes[i]]} by {abs(cat - dog):.3f}")
        axes.text(0.5, -0.04, text, fontsize=11, va="top", ha="center", parse_math=False,
                  transform=axes.transAxes, color=RED if changed[i] else "black")


def draw_report(report, histograms, fp32, int8, folder):
    """The bytes of report.png: what the tables say, and pictures of `folder`.

    histograms: as `error_ledger` returns them; fp32, int8: Outcomes on the folder's pictures.
    """
    figure, n = Figure(figsize=(16, 9), dpi=120), report["images"]["evaluated"]
    name, flips = script.name_of(report["recipe"]), len(report["flips"])
    fp32_bytes, int8_bytes = report["file_bytes"]["fp32"], report["file_bytes"]["int8"]
    heading = {"x": 0.05, "fontsize": 13, "fontweight": "bold"}
    figure.text(0.05, 0.96, f"{name} answers {n - flips:,} of {n:,} pictures as FP32; Top-1 "
                f"{fp32.top1:.2f} -> {int8.top1:.2f} %; logit SQNR "
                f"{script.db(report['logit_sqnr_db'])}; "
                f"file {fp32_bytes / int8_bytes:.1f} x as small", fontsize=15)
    figure.text(y=0.915, s="Activations: share of the FP32 values; beyond the dashed range they "
                "are clipped (HEADROOM widens cv4's and fc1's)", **heading)
    rows = figure.add_gridspec(3, 1, left=0.05, right=0.985, top=0.875, bottom=0.08, hspace=0.5,
                               height_ratios=[1, 1.3, 0.8])
    draw_activations(figure, rows[0].subgridspec(1, len(script.PLACES), wspace=0.1),
                     report["ledger"], histograms)
    if "bits" in report:
        middle = rows[1].subgridspec(1, 3, wspace=0.42, width_ratios=[0.85, 1, 1.2])
        draw_bits(figure, middle[2].subgridspec(1, 2, width_ratios=[5, 1])[0], report["bits"])
    else:
        middle = rows[1].subgridspec(1, 2, wspace=0.5)
    draw_curve(figure, middle[0], report["calibration_curve"])
    draw_ledger(figure, middle[1], report["ledger"])
    figure.text(y=0.26, s="Pictures that changed, in red, then those with the smallest FP32 margin"
                if flips else "No picture changed; those with the smallest FP32 margin", **heading)
    draw_pictures(figure, rows[2].subgridspec(1, SHOWN, wspace=0.1), fp32, int8, folder, name)
    file = io.BytesIO()
    with warnings.catch_warnings(action="ignore"):          # letters that the font has not
        figure.savefig(file, format="png")
    return file.getvalue()


# The run

def notebook_shell():
    """IPython's shell where this runs in one, as in a notebook; else None."""
    return sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None


def take_constants(names):
    """Give the script those constants that a notebook's cells define: edited or not."""
    for name in script.DEFAULTS | script.DEFAULT_RECIPE:
        if name in names:
            setattr(script, name, names[name])


def open_pictures():
    """The calibration and the evaluation pictures: one CatDogDataset where they are the same."""
    evaluation = script.CatDogDataset(script.located(script.DATA_DIR, script.EVALUATION_SPLIT))
    if script.CALIBRATION_SPLIT == script.EVALUATION_SPLIT:
        return evaluation, evaluation
    folder = script.located(script.DATA_DIR, script.CALIBRATION_SPLIT)
    return script.CatDogDataset(folder), evaluation


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--bits", action="store_true",
                        help="also make networks of 2 to 8 bits, for weights and activations apart")
    with_bits, shell = parser.parse_args().bits, notebook_shell()
    if shell:
        take_constants(shell.user_ns)

    script.prepare_process()
    constants, recipe = script.check_constants(), script.current_recipe()
    output = script.located(script.OUTPUT_DIR)
    script.make_writable(output)
    calibration, evaluation = open_pictures()
    checkpoint = script.located(script.CHECKPOINT)
    folded = script.load_checkpoint(checkpoint).fused()
    print(f"calibrating on {calibration}\nevaluating on  {evaluation}")

    fp32, maxima = calibrate_by_picture(folded, calibration)
    calibrated = fp32.files
    if evaluation is not calibration:
        fp32 = script.evaluate("FP32", folded, evaluation)
    pixels, calibration_pixels = evaluation.first(script.SAMPLE), calibration.first(script.SAMPLE)
    fp32_model, int8_model = script.quantize_network(folded, calibration_pixels, recipe)
    script.choose_engine(int8_model, pixels[:script.CHUNK])
    name = script.name_of(recipe)
    int8 = script.evaluate(name, int8_model, evaluation)
    report = {"constants": constants, "recipe": recipe, "torch": torch.__version__,
              "images": {"evaluated": len(int8.files), "calibrated": len(calibrated)},
              "engine": int8_model.engine, **script.compare(fp32, int8)}
    report["file_bytes"] = {"fp32": checkpoint.stat().st_size,
                            "int8": len(script.int8_checkpoint(int8_model))}
    print(f"same class {100 * report['agreement']:.2f} %, logit SQNR "
          f"{script.db(report['logit_sqnr_db'])}, {len(report['flips'])} pictures changed class")

    report["ledger"], histograms = error_ledger(fp32_model, int8_model, pixels)
    print_ledger(report["ledger"], len(pixels))
    report["ranges"] = range_sources(folded, calibrated, maxima, calibration_pixels)
    print_ranges(report["ranges"], len(calibration_pixels))
    compared = evaluation.first(COMPARED)
    report["calibration_curve"] = calibration_curve(
        folded, int8_model, maxima, calibration_pixels, compared, fp32.logits[:len(compared)])
    print_curve(report["calibration_curve"], report["ranges"], len(compared))

    spots = [(script.LAYERS[0], spot_to_follow(folded, int8_model, pixels)),
             (script.LAYERS[-1], (int(int8.classes[0]),))]
    report["followed"] = []
    for layer, spot in spots:
        row = {"file": fp32.files[0]} | follow(folded, int8_model, pixels, layer, spot)
        print_followed(row)
        report["followed"].append(row)

    if with_bits:
        print_bits_head(len(fp32.files))
        report["bits"] = []
        for weight_bit in WIDTHS:
            row = bits_row(folded, calibration_pixels, evaluation, fp32, weight_bit)
            print_bits_row(row)
            report["bits"].append(row)
        print_more_bits(report["bits"], recipe)

    picture = draw_report(report, histograms, fp32, int8, evaluation.folder)
    report_json = (json.dumps(report, indent=1, allow_nan=False) + "\n").encode()
    script.write_files(output, {"report.png": picture, "explain.json": report_json})
    print(f"\nwrote {output}/report.png and explain.json")
    if shell:
        from IPython.display import Image, display
        display(Image(picture))


if __name__ == "__main__":
    sys.excepthook = script.end_in_one_line
    main()
