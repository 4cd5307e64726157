"""Why quantization changed what it changed: tables, explain.json, report.png.

    python tools/explain.py [--bits] [preset] [NAME=value ...]

Makes the network that quantize_catdog.py makes of the same constants, and shows

- where the error is born: each layer quantized alone, all others in FP32;
- where the ranges come from: the picture that set each;
- how many pictures are enough: calibrated on the first 1, 2, 5, 10, ...;
- how a value becomes an integer: an output of the first layer, and a logit;
- with --bits: how many bits are enough, from 8 down to 2 for weights and for
  activations, and what each layer alone can spare: some 90 networks;
- which pictures changed.

results/explain.json has the tables' figures, results/report.png draws them; no
other file is written. In a notebook, `%run tools/explain.py` takes the
constants of the notebook's cells and shows the picture under its own.
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
    for module in ("quantize_catdog", "draw_report", "sweep_bits"):     # a kernel may hold old ones
        sys.modules.pop(module, None)

import copy
import json
import textwrap
from collections import Counter
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch.func import functional_call

sys.path[:0] = [str(folder) for folder in Path(__file__).resolve().parents[:2]]
from draw_report import SHOWN, draw_report, small_jpeg
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
)

import quantize_catdog as script

BINS = 1024             # of a histogram, from 0 to the range
COMPARED = 100          # evaluation pictures, at most, whose answers the curve compares


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
    """Sum of squares, a float. In FP64: FP32 would square 1e-25 to 0, and 1e25 to infinity."""
    return x.to(torch.float64, copy=True).square_().sum().item()


def round_trip(int8_model, activation, x):
    """FP32 values to an activation's integers and back."""
    if int8_model.is_fp32(activation):
        return x
    scale = int8_model.scale(activation)
    return script.quantize(x, scale, int8_model.integers[activation]) / scale


# Calibration, picture by picture

def calibrate_by_picture(folded, pictures):
    """As the script's `calibrate`, and remember each picture's part in the ranges.

    Returns the Predictions and {activation: largest magnitude in each picture's channels, FP32 (n, C)}.
    """
    maxima = {activation: torch.zeros(len(pictures), len(folded.ranges[activation]))
              for activation in script.ACTIVATIONS}
    seen = Counter()

    def observe(activation, values):
        rows = slice(seen[activation], seen[activation] + len(values))
        maxima[activation][rows] = script.largest_magnitudes(values)
        seen[activation] += len(values)
        return values

    outcome = script.evaluate("FP32", folded, pictures, observe)
    maxima = {activation: found[:len(outcome.files)] for activation, found in maxima.items()}
    set_ranges(folded, maxima)
    return outcome, maxima


@torch.no_grad()
def set_ranges(folded, maxima):
    """Give a folded network the ranges that pictures with these maxima set; the input's is 255."""
    folded.reset_ranges()
    for activation, found in maxima.items():
        folded.update_range(activation, found.to(script.DEVICE))


# Where the error is born

def layer_output(model, layer, x, **changed):
    """What a layer of an FP32 network makes of x, with another `weight` or `bias` if given."""
    y = functional_call(model.get_submodule(layer.name), changed, x)
    return F.relu_(y) if layer.is_conv else y


def logits_from(model, activation, values):
    """An FP32 network's logits (n, 2) when an activation has these values."""
    for layer in script.LAYERS[script.ACTIVATIONS.index(activation):]:
        values = layer_output(model, layer, read_by(layer, {layer.input: values}))
    return values


def uncorrected_bias(fp32_model, int8_model, layer):
    """A layer's int32 bias before the bias correction, which makes up for what is inherited."""
    part, in_scale = fp32_model.get_submodule(layer.name), int8_model.scale(layer.input)
    bit = script.layer_bit(int8_model.recipe, layer)
    return script.weight_quant(part.weight, part.bias, in_scale, bit, int8_model.recipe)[1]


def quantized_alone(fp32_model, int8_model, layer, values, int8_values):
    """{kind of error: what a layer puts out with this error and no other}.

    values, int8_values: {activation: FP32 values} of the FP32 network, and what the INT8 network's
    integers stand for. The kinds are those of `error_ledger`.
    """
    part, part8, activation = fp32_model.get_submodule(layer.name), int8_model.get_submodule(layer.name), layer.output
    weight8 = part8.weight / script.broadcast(part8.w_scale, part.weight.dim() - 1)
    bias8 = uncorrected_bias(fp32_model, int8_model, layer) / int8_model.sum_scale(layer)
    x, x8 = read_by(layer, values), read_by(layer, int8_values)
    both = layer_output(fp32_model, layer, x, weight=weight8, bias=bias8)
    return {"int8": int8_values[activation],
            "inherited": layer_output(fp32_model, layer, x8),
            "weights": layer_output(fp32_model, layer, x, weight=weight8),
            "biases": layer_output(fp32_model, layer, x, bias=bias8),
            "rounding": round_trip(int8_model, activation, values[activation]),
            "born": round_trip(int8_model, activation, both)}


@torch.inference_mode()
def error_ledger(fp32_model, int8_model, pixels):
    """Where the error is born: a list with a dict for the input and each layer.

    fp32_model: the folded network that int8_model was made from; pixels: uint8 (n, 3, h, w). Each
    dict has an SQNR in dB, None for no error, of these errors. In what the layer puts out:

        int8        of the INT8 network
        inherited   of it, what comes with the layer's input: the FP32 layer on the INT8 input
        born        of quantizing this layer alone, on the FP32 input; and of its parts:
        weights, biases, rounding (of the output)

    and, at the logits, "logits": of quantizing this layer alone. Biases are those of before their
    correction. The second result: {activation: histogram of its FP32 values}, to twice what is
    kept.
    """
    energies, levels, histograms = Counter(), Counter(), Counter()
    for chunk in pixels.split(script.CHUNK):
        values, integers = script.activations_of(fp32_model, chunk), script.activations_of(int8_model, chunk)
        int8_values = {name: real(int8_model, name, q) for name, q in integers.items()}
        for activation, layer in zip(script.ACTIVATIONS, [None, *script.LAYERS]):
            x = values[activation]
            if layer:
                found = quantized_alone(fp32_model, int8_model, layer, values, int8_values)
            else:
                found = dict.fromkeys(("int8", "rounding", "born"), int8_values[activation])
            for kind, changed in found.items():
                energies[activation, kind] += energy(changed - x)
            energies[activation, "signal"] += energy(x)
            logits = logits_from(fp32_model, activation, found["born"])
            energies[activation, "logits"] += energy(logits - values["fc2"])
            to, scale = int8_model.integers[activation], int8_model.scale(activation)
            histograms[activation] += histogram(x, ((to.high + 0.5) / scale).item())
            if not int8_model.is_fp32(activation):
                used = flat(integers[activation]).int() - to.low
                levels[activation] += torch.bincount(used, minlength=to.high - to.low + 1)

    ledger = []
    for activation, layer in zip(script.ACTIVATIONS, [None, *script.LAYERS]):
        sqnr = {kind: script.decibels(energies[activation, "signal"], energies[activation, kind])
                for kind in ("int8", "inherited", "born", "weights", "biases", "rounding")}
        sqnr["logits"] = script.decibels(energies["fc2", "signal"], energies[activation, "logits"])
        row = {"name": layer.name if layer else "input", "sqnr_db": sqnr,
               "clipped": None, "levels_used": None, "levels": None, "hurts_most": False}
        if activation in levels:
            counts, used = histograms[activation], levels[activation]
            total, kept = counts.sum(), counts[BINS:3 * BINS].sum()
            row["clipped"] = (total - kept).item() / total.item()
            row["levels_used"], row["levels"] = int((used > 0).sum()), len(used)
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
    the first of them, uint8 (n, 3, h, w). "percentile999" of the magnitudes on `pixels`, to a
    thousandth of the range. No picture sets the input's range: "file" and "number" are None.
    """
    ranges = {activation: folded.ranges[activation].max().item() for activation in maxima}
    histograms, rows = Counter(), []
    for chunk in pixels.split(script.CHUNK):
        for activation, x in script.activations_of(folded, chunk).items():
            histograms[activation] += histogram(x.abs(), ranges[activation])
    for activation, found in maxima.items():
        shares = histograms[activation].cumsum(0) / histograms[activation].sum()
        upper_edge = (shares < 0.999).sum().item() + 1 - 2 * BINS       # in bins
        row = {"activation": activation, "range": ranges[activation], "file": None, "number": None,
               "percentile999": ranges[activation] * min(upper_edge / BINS, 1)}
        if activation != "input":
            index = int(found.amax(1).argmax())                 # the first where several are
            row |= {"file": files[index], "number": index + 1}
        rows.append(row)
    return rows


def equalized(folded, recipe):
    """The FP32 network that is quantized, and {activation: what multiplies each channel, (C,)}.

    The factors are 1 where EQUALIZE has not rescaled.
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
    each class is the one of the last. calibration_pixels: the first ones, uint8 (n, 3, h, w);
    int8_model: the network that all of them calibrated.
    """
    total, rows, classes = len(maxima["input"]), [], []
    for count in first_counts(total):
        part, other = copy.deepcopy(folded), int8_model
        if count < total:
            set_ranges(part, {name: found[:count] for name, found in maxima.items()})
            seen = calibration_pixels[:count]
            other = script.quantize_network(part, seen, int8_model.recipe)[1]
            other.engine = int8_model.engine        # verified with the same widths
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
    """(channel, row, column) of an output of cnn1 in the first picture that is worth following.

    Of the largest of each 2 x 2, which the pooling keeps, the first that meets most wishes.
    """
    values, integers = [script.activations_of(model, pixels[:1])["cv1"][0]
                        for model in (folded, int8_model)]
    kept, where = by_windows(integers.short()).topk(2)                      # (C, h, w, 2)
    kept, second, where = kept[..., 0], kept[..., 1], where[..., :1]
    expected = by_windows(values).gather(3, where)[..., 0]
    factor = script.broadcast(equalized(folded, int8_model.recipe)[1]["cv1"], 2)
    error = (kept - expected * factor * int8_model.scale("cv1")).abs()   # in steps
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
    values, integers = [script.activations_of(model, pixels[:1]) for model in (folded, int8_model)]
    part, part8, channel = folded.get_submodule(layer.name), int8_model.get_submodule(layer.name), spot[0]
    x, q, pooled = read_by(layer, values)[0], read_by(layer, integers)[0], None
    if layer.is_conv:
        row, column, size = spot[1], spot[2], part.kernel_size[0]
        x, q = [maps[:, row:row + size, column:column + size] for maps in (x, q)]
        pooled = by_windows(integers[layer.output][0])[channel, row // 2, column // 2].tolist()
    weight, weight8 = part.weight[channel], part8.weight[channel]
    fp32 = {"inputs": x.flatten().tolist(), "weights": weight.flatten().tolist(),
            "sum": (x.double() * weight.double()).sum().item(),
            "bias": part.bias[channel].item(), "value": values[layer.output][0][spot].item()}

    fp32_model, factors = equalized(folded, int8_model.recipe)
    total, bias = (q.long() * weight8.long()).sum(), part8.bias[channel]
    multiplier, factor = int8_model.multiplier(layer)[channel], factors[layer.output][channel].item()
    result, rounded = integers[layer.output][0][spot], not int8_model.is_fp32(layer.output)
    to = int8_model.integers[layer.output]
    scale_out = int8_model.scale(layer.output).item() if rounded else None
    int8 = {"inputs": q.flatten().tolist(), "weights": weight8.flatten().tolist(),
            "sum": total.item(), "bias": bias.item(),
            "uncorrected_bias": uncorrected_bias(fp32_model, int8_model, layer)[channel].item(),
            "scale_in": int8_model.scale(layer.input).item(),
            "scale_weight": part8.w_scale.expand(len(part8.bias))[channel].item(),
            "scale_out": scale_out, "multiplier": multiplier.item(),
            "unrounded": (total.float() * multiplier + bias * multiplier).item(),
            "limits": [0 if layer.is_conv else to.low, to.high], "result": result.item()}
    value = real(int8_model, layer.output, result).item() / factor
    return {"layer": layer.name, "spot": list(spot), "fp32": fp32, "int8": int8, "factor": factor,
            "input_factor": factors[layer.input][0].item(), "value": value,
            "error": value - fp32["value"],
            "step": 1 / scale_out / factor if rounded else None, "pooled": pooled}


# The tables, in lines of at most 80 characters

def print_wrapped(text, indent=0):
    print(textwrap.fill(text, 80, subsequent_indent=" " * indent, break_on_hyphens=False))


def print_ledger(ledger, pictures):
    """The table of `error_ledger`."""
    print(f"\nWhere is the error born? SQNR in dB on {pictures} pictures, the lower the worse\n"
          "         INT8           born in this layer, all else FP32  at the\n"
          "layer network inherited   all weights biases rounding  logits  clipped  levels")
    guilty = ""
    for row in ledger:
        sqnr = {kind: decimal(value) for kind, value in row["sqnr_db"].items()}
        clipped = "  none: stay FP32"
        if row["levels"] is not None:
            clipped = f"{100 * row['clipped']:>6.2g} % {row['levels_used']:>4}/{row['levels']}"
        print("{:<6}{int8:>7}{inherited:>10}{born:>6}{weights:>8}{biases:>7}{rounding:>9}"
              "{logits:>8}".format(row["name"], **sqnr)
              + ("*" if row["hurts_most"] else " ") + clipped)
        if row["hurts_most"]:
            guilty = f"* hurts most: quantizing {row['name']} alone changes the logits most"
    if guilty:
        print(f"{guilty}.")
    print("levels: how many of the integer levels occur, of those that there are")


def print_ranges(sources, pictures):
    """The table of `range_sources`."""
    print("\nWhere do the ranges come from?\n"
          f"99.9 %: what so many of the values of {pictures} pictures do not exceed\n"
          "activation     range     99.9 %  range / that  set by picture")
    for row in sources:
        times = row["range"] / max(row["percentile999"], script.SMALLEST)
        setter = "  none: pixels reach 255"
        if row["number"]:
            setter = f"{row['number']:>6} {script.shorten(row['file'], 23)}"
        print(f"{row['activation']:<10} {row['range']:>9.5g}  {row['percentile999']:>9.4g}  "
              f"{times:>12.1f}  {setter}")


def print_curve(curve, sources, compared):
    """The table of `calibration_curve`."""
    print("\nHow many calibration pictures are enough? Ranges in % of the last ones;\n"
          f"same class and logit SQNR of INT8 against FP32, on {compared} pictures\n"
          f"pictures {' '.join(f'{name:>5}' for name in script.ACTIVATIONS)}  same class  logit SQNR")
    for row in curve:
        ranges = " ".join(f"{100 * row['ranges'][name]:>5.1f}" for name in script.ACTIVATIONS)
        print(f"{row['pictures']:>8} {ranges}  {100 * row['agreement']:>8.2f} %  "
              f"{script.db(row['sqnr_db']):>10}")
    last = curve[-1]["pictures"]
    settled = max((i + 1 for i, row in enumerate(curve) if not row["as_last"]), default=0)
    classes = f"from {curve[settled]['pictures']} on no class changes"
    if 0 < settled == len(curve) - 1:
        classes = f"between {curve[-2]['pictures']} and {last} a class still changed"
    grown = max(row["number"] or 0 for row in sources)
    print(f"after picture {grown} of {last} no range grows; {classes}")
    shown = [round(row["sqnr_db"], 1) for row in curve if row["sqnr_db"] is not None]
    if shown != sorted(shown):
        print("More pictures can give fewer dB: a wider range has coarser steps.")


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
    print(f"  picture  {script.shorten(row['file'], 69)}")
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


# The run

def notebook_shell():
    """IPython's shell where this runs in one, as in a notebook; else None."""
    return sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None


def pictures_to_show(fp32, int8, folder):
    """Those whose class changed first, the surest of them before; then those nearest to a change.

    fp32, int8: Outcomes on the pictures of `folder`. Returns what `draw_report` takes.
    """
    margins = (fp32.logits[:, 0] - fp32.logits[:, 1]).abs().numpy()
    changed = (fp32.classes != int8.classes).numpy()
    order, shown = np.lexsort((np.where(changed, -margins, margins), ~changed)), []
    for i in order[:SHOWN].tolist():
        try:
            pixels = script.decode(folder / fp32.files[i], script.IMAGE_SIZE)
        except script.InputError:           # it went away meanwhile
            pixels = np.full((1, 1, 3), 200, np.uint8)
        shown.append({"file": fp32.files[i], "label": int(fp32.labels[i]), "pixels": pixels,
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
    output = script.resolve_path(script.OUTPUT_DIR)
    script.make_writable(output)
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
    pixels, calibration_pixels = evaluation.first_pixels(script.SAMPLE), calibration.first_pixels(script.SAMPLE)
    fp32_model, int8_model = script.quantize_network(folded, calibration_pixels, recipe)
    script.choose_engine(int8_model, pixels[:script.CHUNK])
    name = script.name_of(recipe)
    int8 = script.evaluate(name, int8_model, evaluation)
    report = {"constants": constants, "recipe": recipe, "torch": torch.__version__,
              "images": {"evaluated": len(int8.files), "calibrated": len(calibrated)},
              "engine": int8_model.engine, **script.compare(fp32, int8)}
    sizes = checkpoint.stat().st_size, len(script.int8_checkpoint(int8_model))
    report["file_bytes"] = dict(zip(("fp32", "int8"), sizes))
    print(f"same class {100 * report['agreement']:.2f} %, logit SQNR "
          f"{script.db(report['logit_sqnr_db'])}, {len(report['flips'])} pictures changed class")

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

    shown = pictures_to_show(fp32, int8, evaluation.folder)
    picture = draw_report(report, histograms, shown)
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
