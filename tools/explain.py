"""Why answers changed: tables in the terminal, explain.json and report.png.

    python tools/explain.py [--bits] [preset] [NAME=value ...]

Quantizes the network as quantize_catdog.py does, and shows

- where the error arises: the error of each layer when it alone is quantized;
- where the ranges come from: the picture that set each;
- how many calibration pictures are enough: the first 1, 2, 5, 10, ... of them;
- how a value is quantized: one output of the first layer, and one logit;
- with --bits: how many bits are enough, from 8 down to 2, for all weights and
  all activations, and for the weights of each layer alone: some 90 networks;
- which answers changed.

results/explain.json has the figures of the tables, results/report.png draws
them; no other file is written. In a notebook, `%run tools/explain.py` uses the
constants of the notebook's cells and shows the picture below its own cell.
"""
import sys

if __name__ == "__main__":
    for module in ("quantize_catdog", "draw_report", "hints", "sweep_bits"):
        sys.modules.pop(module, None)       # a notebook's kernel may hold an older one

import copy
import json
import textwrap
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch.func import functional_call

sys.path[:0] = [str(folder) for folder in Path(__file__).resolve().parents[:2]]
from draw_report import SHOWN, draw_report, small_jpeg
from hints import hints
from sweep_bits import (
    SWEPT,
    Sweep,
    decimal,
    figures,
    logits_of,
    print_grid,
    print_layer_bits,
    read_by,
    real,
    with_unit,
)

import quantize_catdog as script

BINS = 1024             # of a histogram, from 0 to the range
COMPARED = 100          # evaluation pictures, at most, whose answers the curve compares


# Values and their energies

def flat(x):
    """All values in one row, in the order in which they lie in memory, so that none is copied."""
    return (x.permute(0, 2, 3, 1) if x.dim() == 4 else x).reshape(-1)


def histogram(x, largest):
    """Counts (4 * BINS,) of values from -2 to 2 times `largest`; the outer bins count all beyond.

    x: FP32, any shape; largest: a float. The counts are on the CPU.
    """
    width = max(largest, script.SMALLEST) / BINS
    bins = (x / width + 2 * BINS).clamp_(0, 4 * BINS - 1).short()
    return torch.bincount(flat(bins), minlength=4 * BINS).cpu()


def energy(x):
    """Sum of squares in FP64: FP32 would square 1e-25 to 0, and 1e25 to infinity."""
    return x.double().square().sum().item()


def round_trip(int8_model, activation, x):
    """FP32 values, quantized to an activation's integers and back."""
    if int8_model.is_fp32(activation):
        return x
    scale = int8_model.scale(activation)
    return script.quantize(x, scale, int8_model.integers[activation]) / scale


# Calibration, picture by picture

def calibrate_by_picture(folded, pictures):
    """Like the script's `calibrate`, and remember what each picture adds to the ranges.

    Returns the Predictions and {activation: largest magnitude in each channel of each picture,
    FP32 (n, C)}.
    """
    maxima, seen = {}, Counter()

    def observe(name, values):
        found = script.largest_magnitudes(values)
        rows = maxima.setdefault(name, torch.zeros(len(pictures), found.shape[1]))
        rows[seen[name]:seen[name] + len(found)] = found
        seen[name] += len(found)
        folded.update_range(name, found)
        return values

    folded.reset_ranges()
    fp32 = script.evaluate("FP32", folded, pictures, observe)
    return fp32, {name: rows[:len(fp32.files)] for name, rows in maxima.items()}


# Where the error arises

ERRORS = ("int8", "inherited", "added", "weights", "biases", "rounding")


def layer_output(model, layer, x, **changed):
    """The output of a layer of an FP32 network, with another `weight` or `bias` if given."""
    y = functional_call(model.get_submodule(layer.name), changed, x)
    return F.relu_(y) if layer.is_conv else y


def logits_from(model, activation, values):
    """An FP32 network's logits (n, classes) when an activation has these values."""
    for layer in script.LAYERS[script.ACTIVATIONS.index(activation):]:
        values = layer_output(model, layer, read_by(layer, {layer.input: values}))
    return values


def uncorrected_bias(fp32_model, int8_model, layer):
    """A layer's int32 bias before bias correction, which makes up for what is inherited."""
    fp32_layer, in_scale = fp32_model.get_submodule(layer.name), int8_model.scale(layer.input)
    bit = script.layer_bit(int8_model.recipe, layer)
    return script.weight_quant(fp32_layer.weight, fp32_layer.bias, in_scale, bit,
                               int8_model.recipe)[1]


def outputs_with_errors(fp32_model, int8_model, layer, values, int8_values):
    """{one of ERRORS: the output of a layer that has this error and no other}.

    values: {activation: FP32 values} of the FP32 network; int8_values: the FP32 values that the
    INT8 network's integers stand for. `error_ledger` explains the errors.
    """
    int8_layer, output = int8_model.get_submodule(layer.name), layer.output
    weight = int8_layer.weight / script.broadcast(int8_layer.w_scale, int8_layer.weight.dim() - 1)
    bias = uncorrected_bias(fp32_model, int8_model, layer) / int8_layer.sum_scale
    x, int8_x = read_by(layer, values), read_by(layer, int8_values)
    both = layer_output(fp32_model, layer, x, weight=weight, bias=bias)
    return {"int8": int8_values[output],
            "inherited": layer_output(fp32_model, layer, int8_x),
            "added": round_trip(int8_model, output, both),
            "weights": layer_output(fp32_model, layer, x, weight=weight),
            "biases": layer_output(fp32_model, layer, x, bias=bias),
            "rounding": round_trip(int8_model, output, values[output])}


@torch.inference_mode()
def error_ledger(fp32_model, int8_model, pixels):
    """Where the error arises: a list with a dict for the input and for each layer.

    fp32_model: the folded network that int8_model was quantized from; pixels: uint8 (n, 3, h, w).
    Each dict has an SQNR in dB, None for no error, of these errors. In the layer's output:

        int8        the whole error of the INT8 network
        inherited   from the layer's input: the FP32 layer reads the INT8 network's values
        added       by quantizing this layer alone, with FP32 inputs; and of it by
        weights, biases, rounding (of the output)

    and, at the logits, "logits": by quantizing this layer alone. Biases are those before bias
    correction. The second result is {activation: histogram of its FP32 values}, to twice the
    largest value that is not clipped.
    """
    energies, levels, histograms = defaultdict(float), defaultdict(int), defaultdict(int)
    names = dict(zip(script.ACTIVATIONS, [None, *script.LAYERS]))
    for chunk in pixels.split(script.CHUNK):
        values = script.activations_of(fp32_model, chunk)
        integers = script.activations_of(int8_model, chunk)
        int8_values = {name: real(int8_model, name, q) for name, q in integers.items()}
        for name, layer in names.items():
            if layer:
                found = outputs_with_errors(fp32_model, int8_model, layer, values, int8_values)
            else:
                found = dict.fromkeys(("int8", "added", "rounding"), int8_values[name])
            for error, changed in found.items():
                energies[name, error] += energy(changed - values[name])
            energies[name, "signal"] += energy(values[name])
            logits = logits_from(fp32_model, name, found["added"])
            energies[name, "logits"] += energy(logits - values[script.LOGITS])
            to, scale = int8_model.integers[name], int8_model.scale(name)
            histograms[name] += histogram(values[name], ((to.high + 0.5) / scale).item())
            if not int8_model.is_fp32(name):
                used = flat(integers[name]).int() - to.low
                levels[name] += torch.bincount(used, minlength=to.high - to.low + 1)

    ledger = []
    for name, layer in names.items():
        signal = energies[name, "signal"]
        sqnr = {error: script.decibels(signal, energies[name, error]) for error in ERRORS}
        signal = energies[script.LOGITS, "signal"]
        sqnr["logits"] = script.decibels(signal, energies[name, "logits"])
        row = {"name": layer.name if layer else "input", "sqnr_db": sqnr,
               "clipped": None, "levels_used": None, "levels": None, "hurts_most": False}
        if name in levels:
            counts = histograms[name]
            total, within = counts.sum().item(), counts[BINS:3 * BINS].sum().item()
            row |= {"clipped": (total - within) / total, "levels": len(levels[name]),
                    "levels_used": int((levels[name] > 0).sum())}
        ledger.append(row)
    wrong = [row for row in ledger if row["sqnr_db"]["logits"] is not None]
    if wrong:
        min(wrong, key=lambda row: row["sqnr_db"]["logits"])["hurts_most"] = True
    return ledger, dict(histograms)


# Where the ranges come from, and how many pictures are enough

@torch.inference_mode()
def range_sources(folded, files, maxima, pixels):
    """Where a range comes from: a dict per activation, with the range and the picture that set it.

    files, maxima: the calibration pictures and what `calibrate_by_picture` found in them; pixels:
    the first of them, uint8 (n, 3, h, w). "percentile999" is that of the magnitudes on `pixels`,
    to a thousandth of the range. No picture sets the input's range: "file" and "number" are None.
    """
    ranges = {name: folded.ranges[name].max().item() for name in maxima}
    histograms, rows = defaultdict(int), []
    for chunk in pixels.split(script.CHUNK):
        for name, x in script.activations_of(folded, chunk).items():
            histograms[name] += histogram(x.abs(), ranges[name])
    for name, found in maxima.items():
        shares = histograms[name].cumsum(0) / histograms[name].sum()
        upper_edge = (shares < 0.999).sum().item() + 1 - 2 * BINS       # in bins
        row = {"activation": name, "range": ranges[name], "file": None, "number": None,
               "percentile999": ranges[name] * min(upper_edge / BINS, 1)}
        if name != "input":
            index = int(found.amax(1).argmax())         # the first one where several are equal
            row |= {"file": files[index], "number": index + 1}
        rows.append(row)
    return rows


def equalized(folded, recipe):
    """The FP32 network that is quantized, and {activation: factors (C,) on its channels}.

    The factors are 1 where cross-layer equalization changes nothing.
    """
    factors = {name: torch.ones_like(folded.ranges[name]) for name in script.ACTIVATIONS}
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

    Each has the activations' "ranges" as shares of the last, and how the INT8 network that so many
    pictures calibrate answers `pixels`: the `figures` against fp32_logits, and "as_last", whether
    each class is that of the last network. calibration_pixels: the first ones, uint8 (n, 3, h, w);
    int8_model: the network that all of them calibrated.
    """
    total, rows, classes = len(maxima["input"]), [], []
    for count in first_counts(total):
        part, other = copy.copy(folded), int8_model
        if count < total:
            part.reset_ranges()
            for name, found in maxima.items():
                part.update_range(name, found[:count].to(script.device()))
            other = script.quantize_network(part, calibration_pixels[:count], int8_model.recipe)[1]
        logits = logits_of(other, pixels)
        classes.append(logits.argmax(1))
        whole = {name: folded.ranges[name].max().item() for name in script.ACTIVATIONS}
        ranges = {name: part.ranges[name].max().item() / largest if largest else 1.0
                  for name, largest in whole.items()}
        rows.append({"pictures": count, "ranges": ranges, **figures(fp32_logits, logits)})
    return [row | {"as_last": torch.equal(found, classes[-1])}
            for row, found in zip(rows, classes)]


# One value followed

@torch.inference_mode()
def spot_to_follow(folded, int8_model, pixels):
    """(channel, row, column) of an output of cnn1 for the first picture that is worth following.

    Of the largest value in each 2 x 2 window, the first one that meets most wishes.
    """
    values, integers = [script.activations_of(model, pixels[:1])["cv1"][0]
                        for model in (folded, int8_model)]
    largest, where = by_windows(integers.short()).topk(2)                   # (C, h, w, 2)
    largest, second, where = largest[..., 0], largest[..., 1], where[..., :1]
    expected = by_windows(values).gather(3, where)[..., 0]
    factor = script.broadcast(equalized(folded, int8_model.recipe)[1]["cv1"], 2)
    error = (largest - expected * factor * int8_model.scale("cv1")).abs()   # in integers
    wishes = [factor > 1.1,                         # the channel is rescaled
              (largest >= 5) & (largest <= 20),     # so small that the error shows
              largest - second >= 2,                # no tie in the pooling
              (error > 0.25) & (error < 0.5),       # neither lucky nor beyond rounding
              (largest > 0) & (largest < int8_model.integers["cv1"].high)]  # not clipped
    score = sum(2**i * wish.int() for i, wish in enumerate(wishes))         # the last counts most
    channel, row, column = [int(i) for i in np.unravel_index(int(score.argmax()), score.shape)]
    down, right = divmod(int(where[channel, row, column]), 2)
    return channel, 2 * row + down, 2 * column + right


def by_windows(maps):
    """(C, height, width) -> (C, height // 2, width // 2, 4), the four values that pooling reads."""
    return maps.unfold(1, 2, 2).unfold(2, 2, 2).flatten(3)


@torch.inference_mode()
def follow(folded, int8_model, pixels, layer, spot):
    """One output of a layer for the first picture, in FP32 and in integers: a dict of its figures.

    spot: (channel, row, column), or (channel,) of a fully connected layer. FP32 is the folded
    network. Cross-layer equalization multiplies the channel by "factor", which is divided out of
    "value"; and the first input by "input_factor", by which the first weight is divided.
    """
    values, integers = [script.activations_of(model, pixels[:1]) for model in (folded, int8_model)]
    x, q, pooled = read_by(layer, values)[0], read_by(layer, integers)[0], None
    fp32_layer, channel = folded.get_submodule(layer.name), spot[0]
    if layer.is_conv:
        row, column, size = spot[1], spot[2], fp32_layer.kernel_size[0]
        x, q = [maps[:, row:row + size, column:column + size] for maps in (x, q)]
        pooled = by_windows(integers[layer.output][0])[channel, row // 2, column // 2].tolist()
    weight = fp32_layer.weight[channel]
    fp32 = {"inputs": x.flatten().tolist(), "weights": weight.flatten().tolist(),
            "sum": (x.double() * weight.double()).sum().item(),
            "bias": fp32_layer.bias[channel].item(), "value": values[layer.output][0][spot].item()}

    fp32_model, factors = equalized(folded, int8_model.recipe)
    int8_layer, factor = int8_model.get_submodule(layer.name), factors[layer.output][channel].item()
    int8_weight = int8_layer.weight[channel]
    total = (q.long() * int8_weight.long()).sum()
    result = integers[layer.output][0][spot]
    multiplier, offset = int8_layer.multiplier[channel], int8_layer.offset[channel]
    to, scale_out = int8_model.integers[layer.output], None
    if not int8_model.is_fp32(layer.output):
        scale_out = int8_model.scale(layer.output).item()
    int8 = {"inputs": q.flatten().tolist(), "weights": int8_weight.flatten().tolist(),
            "sum": total.item(), "bias": int8_layer.bias[channel].item(),
            "uncorrected_bias": uncorrected_bias(fp32_model, int8_model, layer)[channel].item(),
            "scale_in": int8_model.scale(layer.input).item(),
            "scale_weight": int8_layer.w_scale.expand(len(int8_layer.bias))[channel].item(),
            "scale_out": scale_out, "multiplier": multiplier.item(),
            "unrounded": (total.float() * multiplier + offset).item(),
            "limits": [to.low, to.high], "result": result.item()}
    value = real(int8_model, layer.output, result).item() / factor
    return {"layer": layer.name, "spot": list(spot), "fp32": fp32, "int8": int8, "factor": factor,
            "input_factor": factors[layer.input][0].item(), "value": value,
            "error": value - fp32["value"], "pooled": pooled,
            "step": None if scale_out is None else 1 / scale_out / factor}


# The tables, in lines of at most 80 characters

def print_ledger(ledger, pictures):
    """The table of `error_ledger`."""
    print(f"\nWhere does the error arise? SQNR in dB on {pictures} pictures: lower is worse.\n"
          "A layer inherits an error with its input and adds its own: by rounding weights,\n"
          'biases and outputs. "At logits" is what its own error alone does to the logits.')
    headings = ("INT8 network", "inherited", "added", "by weights", "by biases", "by rounding")
    script.print_table([{
        "layer": row["name"],
        **{heading: decimal(row["sqnr_db"][error]) for heading, error in zip(headings, ERRORS)},
        "at logits": decimal(row["sqnr_db"]["logits"]) + ("*" if row["hurts_most"] else " "),
        "% clipped": "none" if row["clipped"] is None else f"{100 * row['clipped']:.2g}",
        "integer levels": "FP32" if row["levels"] is None else
                          f"{row['levels_used']}/{row['levels']}"} for row in ledger])
    for row in ledger:
        if row["hurts_most"]:
            print(f"* Quantizing {row['name']} alone changes the logits most.")


def print_ranges(sources, pictures):
    """The table of `range_sources`."""
    print("\nWhere do the ranges come from? Each is the largest magnitude in all pictures,\n"
          f"and the file named has it. 99.9 % of the values in the first {pictures} are within\n"
          '"99.9%"; the ratio is that of the two.')
    script.print_table([{
        "activation": row["activation"],
        "range": row["range"],
        "99.9%": f"{row['percentile999']:.4g}",
        "ratio": f"{row['range'] / max(row['percentile999'], script.SMALLEST):.1f}",
        "picture": row["number"] or "-",
        "file": script.shorten(row["file"], 30) if row["file"] else "pixels reach 255"}
        for row in sources])


def print_curve(curve, sources, compared):
    """The table of `calibration_curve`."""
    print("\nHow many calibration pictures are enough? Ranges in % of the last ones; same\n"
          f"class in % and logit SQNR in dB of INT8 against FP32, on {compared} pictures")
    script.print_table([{
        "pictures": row["pictures"],
        **{name: f"{100 * row['ranges'][name]:.1f}" for name in script.ACTIVATIONS},
        "same class": f"{100 * row['agreement']:.2f}",
        "logit SQNR": decimal(row["sqnr_db"])} for row in curve])
    last = curve[-1]["pictures"]
    settled = max((i + 1 for i, row in enumerate(curve) if not row["as_last"]), default=0)
    classes = f"from {curve[settled]['pictures']} on no class changes"
    if 0 < settled == len(curve) - 1:
        classes = f"between {curve[-2]['pictures']} and {last} a class still changes"
    grown = max(row["number"] or 0 for row in sources)
    print(textwrap.fill(f"After picture {grown} of {last} no range grows; {classes}.", 80))
    shown = [round(row["sqnr_db"], 1) for row in curve if row["sqnr_db"] is not None]
    if shown != sorted(shown):
        print("More pictures can give fewer dB: a wider range has coarser steps.")


def products(inputs, weights):
    """The first two of many products, and the last, as text."""
    first, second, *_, last = [f"{x:.5g} x {w:.5g}" for x, w in zip(inputs, weights)]
    return f"{first} + {second}", f"+ ... + {last}"


def print_line(head, text):
    print(textwrap.fill(f"  {head:<9}{text}", 80, subsequent_indent=" " * 11,
                        break_on_hyphens=False))


def print_followed(row):
    """The figures of `follow`, so that a pocket calculator can check each line.

    Of the products, explain.json has all.
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
    print(f"\nOne value followed: {row['layer']}'s {spot}, counted from 0")
    print(f"  picture  {script.shorten(row['file'], 69)}")
    begin, end = products(fp32["inputs"], fp32["weights"])
    print_line("FP32", begin)
    print_line("", f"{end} = {fp32['sum']:.6g}, {len(fp32['inputs'])} products")
    print_line("", f"plus bias {fp32['bias']:.6g}{', then ReLU' * bool(row['pooled'])}: "
                   f"{fp32['value']:.6g}")
    if times:
        print_line("scaled", "cross-layer equalization multiplies the channel by "
                             f"{row['factor']:.6g}")
    if undone:
        print_line("scaled", "cross-layer equalization multiplies the first input by "
                             f"{row['input_factor']:.6g} and divides its weight by it")
    print_line("weight", f"{fp32['weights'][0]:.5g}{times}{undone} x scale {scale:.6g} = "
                         f"{weight:.5g}, quantized to {int8['weights'][0]}{choice}")
    print_line("bias", f"{fp32['bias']:.6g}{times} x {scale:.6g} x {scale_in:.6g} = "
                       f"{bias * scale_in:.6g}, quantized to {int8['uncorrected_bias']}")
    if int8["bias"] != int8["uncorrected_bias"]:
        print_line("", f"moved to {int8['bias']} by bias correction")
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
        print_line("pooling", f"{max(row['pooled'])}, the largest of "
                              f"{', '.join(map(str, row['pooled']))}")


# The run

def notebook_shell():
    """IPython's shell where this runs in one, as in a notebook; else None."""
    return sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None


def pictures_to_show(fp32, int8):
    """What `draw_report` takes of two Predictions: those whose class changed, then others.

    Of the former the surest come first, of the latter those nearest to a change. Cats and dogs
    take turns, so that some of each are shown.
    """
    highest, second = fp32.logits.topk(2).values.unbind(1)
    margins, same = (highest - second).tolist(), (fp32.classes == int8.classes).tolist()
    labels, ranks, turns = fp32.labels.tolist(), Counter(), {}
    for i in sorted(range(len(labels)), key=lambda i: margins[i] if same[i] else -margins[i]):
        turns[i] = same[i], ranks[same[i], labels[i]], labels[i]
        ranks[same[i], labels[i]] += 1
    shown = []
    for i in sorted(turns, key=turns.get)[:SHOWN]:
        pixels = fp32.pictures.decode_file(fp32.files[i])
        if pixels is None:                  # the file has gone meanwhile
            pixels = np.full((1, 1, 3), 200, np.uint8)
        shown.append({"file": fp32.files[i], "label": labels[i], "pixels": pixels,
                      "fp32": fp32.logits[i].tolist(), "int8": int8.logits[i].tolist()})
    return shown


def main():
    words, shell = sys.argv[1:], notebook_shell()
    if shell:       # the constants of the notebook's cells, edited or not
        cells = shell.user_ns
        vars(script).update({name: cells[name] for name in script.LEGAL if name in cells})
    script.set_constants([word for word in words if word != "--bits"], __doc__)
    script.prepare_process()
    constants, recipe = script.read_constants(), script.read_constants(script.LEGAL_RECIPE)
    print("\n".join(f"{name} = {value!r}" for name, value in constants.items()))
    output = script.resolve_path(script.OUTPUT_DIR)
    evaluation = calibration = script.CatDogDataset(
        script.resolve_path(script.DATA_DIR, script.EVALUATION_SPLIT))
    if script.CALIBRATION_SPLIT != script.EVALUATION_SPLIT:
        calibration = script.CatDogDataset(
            script.resolve_path(script.DATA_DIR, script.CALIBRATION_SPLIT))
    checkpoint = script.resolve_path(script.CHECKPOINT)
    folded = script.load_checkpoint(checkpoint).fused()
    print(f"calibrating on {calibration}\nevaluating on  {evaluation}")

    fp32, maxima = calibrate_by_picture(folded, calibration)
    calibrated = fp32.files
    if evaluation is not calibration:
        fp32 = script.evaluate("FP32", folded, evaluation)
    pixels, calibration_pixels = [pictures.first_pixels(script.SAMPLE)
                                  for pictures in (evaluation, calibration)]
    fp32_model, int8_model = script.quantize_network(folded, calibration_pixels, recipe)
    engines = script.choose_engines(int8_model, pixels)
    int8 = script.evaluate(script.name_of(recipe), int8_model, evaluation)
    report = {"constants": constants, "recipe": recipe, "torch": torch.__version__,
              "images": {"evaluated": len(int8.files), "calibrated": len(calibrated)},
              "engines": engines, **script.compare(fp32, int8)}
    report["file_bytes"] = {"fp32": checkpoint.stat().st_size,
                            "int8": len(script.int8_checkpoint(int8_model))}
    print(f"same class {100 * report['agreement']:.2f} %, logit SQNR "
          f"{with_unit(report['logit_sqnr_db'])}; "
          f"pictures that changed their class: {len(report['flips'])}")
    report["hints"] = hints(report, folded, int8_model)
    for hint in report["hints"]:
        print(textwrap.fill(f"Hint: {hint}", 80))

    report["ledger"], histograms = error_ledger(fp32_model, int8_model, pixels)
    print_ledger(report["ledger"], len(pixels))
    report["ranges"] = range_sources(folded, calibrated, maxima, calibration_pixels)
    print_ranges(report["ranges"], len(calibration_pixels))
    compared = evaluation.first_pixels(COMPARED)
    report["calibration_curve"] = calibration_curve(
        folded, int8_model, maxima, calibration_pixels, compared, fp32.logits[:len(compared)])
    print_curve(report["calibration_curve"], report["ranges"], len(compared))

    spots = {script.LAYERS[0]: spot_to_follow(folded, int8_model, pixels),
             script.LAYERS[-1]: (int(int8.classes[0]),)}
    report["followed"] = [{"file": fp32.files[0]} | follow(folded, int8_model, pixels, *spot)
                          for spot in spots.items()]
    for row in report["followed"]:
        print_followed(row)

    if "--bits" in words:
        print()
        sweep = Sweep(folded, calibration_pixels, recipe, evaluation.first_pixels(SWEPT), fp32)
        report["bits"], report["layer_bits"] = sweep.grid(), sweep.layer_bits()
        print_grid(report["bits"], len(sweep.pixels))
        print_layer_bits(report["layer_bits"], script.WEIGHT_BIT, len(sweep.pixels))

    picture = draw_report(report, histograms, pictures_to_show(fp32, int8))
    report_json = (json.dumps(report, indent=1, allow_nan=False) + "\n").encode()
    script.write_files(output, {"report.png": picture, "explain.json": report_json})
    print(f"\nwrote {script.display_path(output)}/report.png and explain.json")
    if shell:
        from IPython.display import Image as Shown
        from IPython.display import display
        display(Shown(small_jpeg(picture)))


if __name__ == "__main__":
    sys.excepthook = script.end_in_one_line
    main()
