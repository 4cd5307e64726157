"""The tables of `tools/explain.py --bits`: INT8 networks with other bits than the recipe's.

One table for the bits of all weights and all activations, one for the bits of single layers'
weights, and the smallest file that is nearly as good as that of 8 bits everywhere.
"""
import json
import math
import textwrap
import time

import torch

import quantize_catdog as script

WIDTHS = range(8, 1, -1)    # bits that are tried
SWEPT = 1000                # evaluation pictures, at most, that each network answers
SPARED = 1                  # dB that the smallest file may lose against 8 bits everywhere
COMBINED = 10               # networks, at most, in which several layers have fewer bits


# Values of a network

def real(int8_model, activation, integers):
    """FP32 values that an activation's integers stand for; logits that stay FP32 are returned."""
    fp32 = int8_model.is_fp32(activation)
    return integers if fp32 else integers / int8_model.scale(activation)


def read_by(layer, values):
    """What a layer reads of {activation: values}: the first layer the input, as it is."""
    x, index = values[layer.input], script.LAYERS.index(layer)
    return script.next_input(script.LAYERS[index - 1], x) if index else x


@torch.inference_mode()
def logits_of(int8_model, pixels):
    """FP32 logits (n, classes), on the CPU, of uint8 pixels (n, 3, height, width)."""
    return torch.cat([int8_model(chunk).cpu() for chunk in pixels.split(script.SAMPLE)])


def figures(fp32_logits, logits):
    """The share of answers that equal FP32's, and the SQNR in dB of the logits, (n, classes)."""
    same = (logits.argmax(1) == fp32_logits.argmax(1)).double().mean().item()
    return {"agreement": same, "sqnr_db": script.sqnr_db(fp32_logits, logits)}


def sqnr_of(row):
    """The dB of such figures, infinitely many where there is no error."""
    return math.inf if row["sqnr_db"] is None else row["sqnr_db"]


# The networks

def first_layer_of(layer_bits):
    """The number of the first layer that {layer: bits} names."""
    return [layer.name in layer_bits for layer in script.LAYERS].index(True)


class Sweep:
    """INT8 networks that have other bits and are otherwise alike, measured on the same pictures.

    Whatever the bits, the equalized FP32 network and its activations on calibration_pixels are the
    same: they are computed once. Weights have 8 bits unless a change says otherwise.
    folded: calibrated; fp32: Predictions, whose first pictures are pixels, uint8 (n, 3, h, w).
    """

    def __init__(self, folded, calibration_pixels, recipe, pixels, fp32):
        self.recipe = recipe | {"WEIGHT_BIT": 8, "LAYER_BITS": {}}
        self.fp32_model = script.equalize(folded)[0] if recipe["EQUALIZE"] else folded
        self.chunks = calibration_pixels.split(script.CHUNK)
        with torch.inference_mode():
            self.values = [script.activations_of(self.fp32_model, chunk) for chunk in self.chunks]
        self.pixels = pixels
        self.logits, self.labels = fp32.logits[:len(pixels)], fp32.labels[:len(pixels)]
        self.networks = len(WIDTHS)**2 + 1 + len(script.LAYERS) * (len(WIDTHS) - 1) + COMBINED
        self.done, self.start = 0, time.perf_counter()
        self.reported = self.start

    def progress(self, networks):
        """Count so many networks as done; a line every ten seconds says how long the rest takes."""
        self.done, now = self.done + networks, time.perf_counter()
        if self.done and now - self.reported >= 10:
            left = (now - self.start) / self.done * (self.networks - self.done)
            print(f"bits: {self.done:.0f} of {self.networks} networks, {left:.0f} seconds left")
            self.reported = now

    @torch.no_grad()
    def quantized(self, changes, base=None):
        """(INT8_Model with these changes to the recipe, each layer's calibration inputs).

        base: such a pair without changes. Layers before the first one in LAYER_BITS are copied
        from it.
        """
        int8_model = self.fp32_model.cl_scale(self.recipe | changes)
        inputs, first = [[int8_model.quantize_pixels(chunk) for chunk in self.chunks]], 0
        if base:
            first = first_layer_of(changes["LAYER_BITS"])
            inputs = base[1][:first + 1]
        for layer in script.LAYERS[:first]:
            copied = base[0].get_submodule(layer.name).state_dict()
            int8_model.get_submodule(layer.name).load_state_dict(copied)
        for layer in script.LAYERS[first:]:
            expected = [values[layer.output] for values in self.values]
            inputs.append(script.refine_layer(int8_model, self.fp32_model, layer, inputs[-1],
                                              expected))
        script.choose_engines(int8_model)
        self.progress(0.5)
        return int8_model, inputs

    def measured(self, int8_model, logits=None):
        """The `figures` and the Top-1 in % of a network; logits: its logits if they are known."""
        if logits is None:
            logits = logits_of(int8_model, self.pixels)
        right = (logits.argmax(1) == self.labels).double().mean().item()
        self.progress(0.5)
        return figures(self.logits, logits) | {"top1": 100 * right}

    def grid(self):
        """A dict per WEIGHT_BIT: the bytes of its file, and a cell of figures per BIT."""
        rows = []
        for weight_bit in WIDTHS:
            row = {"WEIGHT_BIT": weight_bit, "file_bytes": None, "cells": []}
            for bit in WIDTHS:
                int8_model, _ = self.quantized({"WEIGHT_BIT": weight_bit, "BIT": bit})
                row["cells"].append({"BIT": bit, **self.measured(int8_model)})
                row["file_bytes"] = row["file_bytes"] or len(script.int8_checkpoint(int8_model))
            rows.append(row)
        return rows

    @torch.inference_mode()
    def logits_beyond(self, base, networks):
        """{key: FP32 logits (n, classes)} of {key: INT8_Model with fewer bits in one layer}.

        Before this layer all compute what base, an INT8_Model, does: that is computed once.
        """
        logits = {key: [] for key in networks}
        for chunk in self.pixels.split(script.CHUNK):
            values = script.activations_of(base, chunk)
            for key, model in networks.items():
                x = values
                for layer in script.LAYERS[first_layer_of(model.recipe["LAYER_BITS"]):]:
                    x = {layer.output: model.get_submodule(layer.name)(read_by(layer, x))}
                logits[key].append(real(model, script.LOGITS, x[script.LOGITS]).cpu())
            self.progress(0)
        return {key: torch.cat(found) for key, found in logits.items()}

    def layer_bits(self):
        """What each layer's weights can spare, a dict.

        "layers": a dict per layer, with a cell of figures per number of bits that it alone has,
        all others having 8; "combined": figures of networks in which several layers have fewer
        bits; "smallest": of all these the one with the smallest file that loses at most
        "spared_db" against 8 bits everywhere.
        """
        def measure(int8_model, logits=None):
            bits, size = int8_model.recipe["LAYER_BITS"], len(script.int8_checkpoint(int8_model))
            rows[tuple(bits.items())] = {"LAYER_BITS": bits, "file_bytes": size,
                                         **self.measured(int8_model, logits)}

        def is_good(row):
            return sqnr_of(row) >= sqnr_of(rows[()]) - SPARED

        rows, base, names = {}, self.quantized({}), [layer.name for layer in script.LAYERS]
        measure(base[0])
        networks = {(name, bit): self.quantized({"LAYER_BITS": {name: bit}}, base)[0]
                    for name in names for bit in WIDTHS[1:]}
        for single, logits in self.logits_beyond(base[0], networks).items():
            measure(networks[single], logits)
        alone = {name: {bit: rows[((name, bit),) * (bit < 8)] for bit in WIDTHS} for name in names}
        size = {(name, bit): alone[name][bit]["file_bytes"] for name in names for bit in WIDTHS}

        # Greedy: the layer whose next bit saves most bytes is tried first. If the whole network
        # still is good, the layer gives up that bit; else no fewer bits of this layer are tried
        widths, left = dict.fromkeys(names, 8), {name: list(WIDTHS[1:]) for name in names}
        most = len(rows) + COMBINED
        while any(left.values()) and len(rows) < most:
            saved = {name: size[name, widths[name]] - size[name, following[0]]
                     for name, following in left.items() if following}
            name = max(saved, key=saved.get)
            trial = widths | {name: left[name].pop(0)}
            bits = {each: bit for each, bit in trial.items() if bit < 8}
            if tuple(bits.items()) not in rows:
                measure(self.quantized({"LAYER_BITS": bits}, base)[0])
            if is_good(rows[tuple(bits.items())]):
                widths = trial
            else:
                left[name] = []
        layers = [{"name": name, "cells": [{"bit": bit, **row} for bit, row in cells.items()]}
                  for name, cells in alone.items()]
        return {"layers": layers, "combined": [row for bits, row in rows.items() if len(bits) > 1],
                "smallest": min(filter(is_good, rows.values()), key=lambda row: row["file_bytes"]),
                "spared_db": SPARED}


# The tables, in lines of at most 80 characters

def decimal(value):
    """An SQNR in dB with one decimal, or "exact" where there is no error."""
    return "exact" if value is None else f"{round(value, 1) + 0:.1f}"      # + 0: no -0.0


def with_unit(value):
    """The same for a sentence, with the unit."""
    return decimal(value) if value is None else f"{decimal(value)} dB"


def print_cells(head, cells, last=""):
    """Two lines of a table: the share of equal answers in %, and below it the dB."""
    print(f"{head:<7}" + "".join(f"{100 * cell['agreement']:>8.2f}" for cell in cells) + last)
    print(" " * 7 + "".join(f"{decimal(cell['sqnr_db']):>8}" for cell in cells))


def print_grid(grid, pictures):
    """The table of `Sweep.grid`."""
    print("\nHow many bits are enough? W8: weights of 8 bits, A8: activations of 8 bits. Same\n"
          f"class in % and, below it, logit SQNR in dB, on {pictures} pictures\n       "
          + "".join(f"A{cell['BIT']}".rjust(8) for cell in grid[0]["cells"]) + "      file bytes")
    for row in grid:
        print_cells(f"W{row['WEIGHT_BIT']}", row["cells"], f"{row['file_bytes']:>16,}")


def print_layer_bits(found, weight_bit, pictures):
    """The table of `Sweep.layer_bits`, and the setting to paste where WEIGHT_BIT is weight_bit."""
    print("\nWhat can each layer spare? Its weights have so many bits, all others 8. Same\n"
          f"class in %, logit SQNR in dB and file bytes, on {pictures} pictures\nlayer  "
          + "".join(f"{cell['bit']:>8}" for cell in found["layers"][0]["cells"]))
    for row in found["layers"]:
        print_cells(row["name"], row["cells"])
        print(" " * 7 + "".join(f"{cell['file_bytes']:>8,}" for cell in row["cells"]))
    smallest, base = found["smallest"], found["layers"][0]["cells"][0]
    print(textwrap.fill(
        f"Of these networks, and of {len(found['combined'])} in which several layers have fewer "
        f"bits, this one has the smallest file that loses at most {found['spared_db']} dB against "
        f"8 bits everywhere: {smallest['file_bytes']:,} instead of {base['file_bytes']:,} bytes, "
        f"at {with_unit(smallest['sqnr_db'])} instead of {with_unit(base['sqnr_db'])}.", 80))
    if weight_bit != 8:
        print("WEIGHT_BIT = 8")
    print(f"LAYER_BITS = {json.dumps(smallest['LAYER_BITS'])}")
