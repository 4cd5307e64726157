"""tools/explain.py against direct computation: ledger, ranges, curve, values followed, bits, picture; and its manners.

Pictures that calibrate and pictures that are looked at are never the same.
"""
import functools
import io
import json
import math
import re
import signal
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import quantize_catdog as script
import torch
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
from matplotlib.text import Text
from PIL import Image

import oracle
from helpers import (
    ACTIVATIONS,
    DEVICE,
    KERNELS,
    MANY,
    METHODS,
    ROOT,
    STATE,
    Pictures,
    Place,
    as_constants,
    default,
    integers_of,
    notebook,
    observed,
    one_line,
    python,
    random_pixels,
    run_here,
    scales_of,
    started,
    stopped,
    with_kernel,
)

sys.path.insert(0, str(ROOT / "tools"))
import draw_report  # noqa: E402
import explain  # noqa: E402
import hints  # noqa: E402
import sweep_bits  # noqa: E402

MODULES = {"quantize_catdog": script, "draw_report": draw_report, "hints": hints, "sweep_bits": sweep_bits}
LAYERS = [row[0] for row in oracle.LAYERS]
FEW, OTHERS = MANY[:3], random_pixels(7, seed=9)        # 7: not a whole number of chunks

def calibrated(pictures, state=STATE):
    """(folded network, Predictions, maxima) of explain's own calibration."""
    folded = observed(state, OTHERS[:1])        # whose ranges it must forget
    return folded, *explain.calibrate_by_picture(folded, pictures)

def db(signal, noise):
    noise = np.square(noise, dtype=np.float64).sum()
    return 10 * math.log10(np.square(signal, dtype=np.float64).sum() / noise) if noise else None

def assert_db(found, expected, what):
    assert (found is None) == (expected is None), (what, found, expected)
    assert expected is None or found == pytest.approx(expected, abs=0.02), what

@functools.cache
def fp32_values(kind):
    return oracle.forward(STATE, {"few": FEW, "others": OTHERS}[kind].numpy())

# where the error arises

@pytest.fixture(scope="module")
def quantized():
    """Folded network in which half the range of cv2 and of fc1 is clipped; its INT8 network; other pictures."""
    folded = observed(STATE, FEW)
    folded.ranges |= {"cv2": folded.ranges["cv2"] / 2, "fc1": folded.ranges["fc1"] / 4}     # fc1 has HEADROOM
    int8 = folded.cl_scale(as_constants(default()))
    return SimpleNamespace(model=folded, int8=int8, pixels=OTHERS.to(DEVICE))

def on_grid(x, scale, name):
    low, high = oracle.limits(default(), name)
    return x if name == "fc2" else np.clip(np.rint(x * scale), low, high) / scale

def layer_output(x, weight, bias, bn):
    y = oracle.linear(x, weight)
    y = y + oracle.per_channel(bias, y)
    return np.maximum(y, 0) if bn else y

def test_ledger_against_direct_computation(quantized):
    ledger, histograms = explain.error_ledger(quantized.model, quantized.int8, quantized.pixels)
    rows = {row["name"]: row for row in ledger}
    assert [row["name"] for row in ledger] == ["input", *LAYERS]
    pixels = quantized.pixels.cpu().numpy().astype(np.float64)
    scales, integers = scales_of(quantized.int8), integers_of(quantized.int8)
    modules = {name: quantized.model.get_submodule(name) for name in LAYERS}
    fp32 = {name: [getattr(module, key).detach().cpu().numpy().astype(np.float64) for key in ("weight", "bias")]
            for name, module in modules.items()}
    real = {name: (w / w_scale.reshape(-1, *[1] * (w.ndim - 1)), b / (w_scale * scales[source]).astype(np.float64))
            for (name, _, source, _), (w, b, w_scale) in zip(oracle.LAYERS, integers.values())}
    int8, _, int8_logits = oracle.int8_pass(default(), quantized.pixels.cpu().numpy(), scales, integers)

    def logits(x, start):
        """Of the FP32 network, from the inputs of the layer of this number."""
        for name, bn, _, _ in oracle.LAYERS[start:]:
            x = layer_output(x, *fp32[name], bn)
            x = oracle.pool(x) if bn else x
        return x

    x, exact_logits = pixels, logits(pixels, 0)
    for i, (name, bn, source, output) in enumerate(oracle.LAYERS):
        (w, b), (w8, b8), row, scale = fp32[name], real[name], rows[name], scales[output]
        y, x8 = layer_output(x, w, b, bn), int8[source] / scales[source]
        added = on_grid(layer_output(x, w8, b8, bn), scale, output)
        outputs = {"int8": int8_logits if output == "fc2" else int8[output] / scale,
                   "inherited": layer_output(oracle.pool(x8) if source.startswith("cv") else x8, w, b, bn),
                   "added": added, "weights": layer_output(x, w8, b, bn), "biases": layer_output(x, w, b8, bn),
                   "rounding": on_grid(y, scale, output)}
        for error, changed in outputs.items():
            found, expected = row["sqnr_db"][error], db(y, changed - y)
            if (name, error) == ("cnn1", "inherited"):
                assert found is None
            elif error != "biases" or found < 100:          # beyond it FP32 has no digits left
                assert_db(found, expected, (name, error))
        changed = logits(oracle.pool(added) if bn else added, i + 1)
        assert_db(row["sqnr_db"]["logits"], db(exact_logits, changed - exact_logits), name)
        if output != "fc2":
            high, counts = oracle.limits(default(), output)[1], histograms[output]
            clipped = (np.abs(y) * scale > high + 0.5).mean()
            assert row["clipped"] == pytest.approx(clipped, rel=1e-3, abs=1.1 / y.size)
            assert (clipped > 1e-4) == (name in ("cnn2", "fc1"))            # planted
            assert row["levels_used"] == len(np.unique(int8[output]))
            assert row["levels"] == (255 if output == "fc1" else 256)
            assert counts.sum() == y.size
            assert counts[3 * explain.BINS:].sum() == pytest.approx((y * scale > high + 0.5).sum(),
                                                                    abs=1 + 2e-4 * y.size)
        x = oracle.pool(y) if bn else y
    assert rows["fc2"]["clipped"] is rows["fc2"]["levels"] is rows["fc2"]["sqnr_db"]["rounding"] is None
    assert set(rows["input"]["sqnr_db"].values()) == {None}                  # pixels are exact
    assert [row["name"] for row in ledger if row["hurts_most"]] == [
        min(rows, key=lambda name: rows[name]["sqnr_db"]["logits"] or math.inf)]

def test_input_has_an_error_where_pixels_have_fewer_bits(quantized):
    int8 = quantized.model.cl_scale(as_constants(default(4)))
    ledger, _ = explain.error_ledger(quantized.model, int8, quantized.pixels)
    pixels = quantized.pixels.cpu().numpy().astype(np.float64)
    expected = db(pixels, np.rint(pixels / 17) * 17 - pixels)
    for error in ("int8", "added", "rounding"):
        assert_db(ledger[0]["sqnr_db"][error], expected, error)
    assert ledger[0]["sqnr_db"]["logits"] is not None and ledger[0]["levels"] == 16

def test_bias_correction_is_no_error_of_the_layer():
    """It makes up for what is inherited, and would be called the layer's own error otherwise."""
    folded, ledgers = observed(STATE, FEW), []
    for methods in ([], ["BIAS_CORRECTION"]):
        _, int8 = script.quantize_network(folded, FEW.to(DEVICE), as_constants(default(3), *methods))
        ledgers.append(explain.error_ledger(folded, int8, OTHERS[:5].to(DEVICE))[0])
    for plain, corrected in zip(*ledgers):
        for error in ("added", "weights", "biases", "rounding", "logits"):
            assert plain["sqnr_db"][error] == corrected["sqnr_db"][error]
    assert ledgers[0][-1]["sqnr_db"]["int8"] != ledgers[1][-1]["sqnr_db"]["int8"]

@pytest.mark.parametrize("value", [1e-44, 1e-25, 1e-3, 3.0, 1e25])
def test_decibels_of_tiny_and_of_huge_values(value):
    """FP32 would square the first two to 0, which is called exact, and the last to infinity."""
    values = torch.full((4, 3), value, dtype=torch.float32)
    before, noise = values.clone(), explain.energy(values)
    assert noise == pytest.approx(12 * np.float64(np.float32(value))**2, rel=1e-12)
    assert explain.energy(values.double()) == noise and torch.equal(values, before)
    assert script.decibels(100 * noise, noise) == pytest.approx(20) and script.decibels(noise, 0) is None
    assert script.decibels(0, noise) < -300

def test_histogram_against_numpy():
    values = np.random.default_rng(0).normal(0, 1, (3, 4, 5, 6)).astype(np.float32)
    bins = np.floor(values.ravel() * (explain.BINS / 0.7)) + 2 * explain.BINS
    expected = np.bincount(np.clip(bins, 0, 4 * explain.BINS - 1).astype(int), minlength=4 * explain.BINS)
    assert expected[0] > 1 < expected[-1]                       # values beyond twice the largest
    assert np.abs(explain.histogram(torch.from_numpy(values), 0.7).numpy() - expected).sum() <= 4   # some at an edge

# ranges

class Broken(Pictures):
    """The second and the fifth picture cannot be decoded."""

    def __getitems__(self, indices):
        self.skipped |= {self.files[i]: "broken" for i in indices if i in (1, 4)}
        return [(self.pixels[i], self.labels[i]) for i in indices if i not in (1, 4)]

def test_calibrating_by_picture_is_calibrating():
    """The script's ranges to the last bit, and each picture's part in them; pixels reach 255 whatever was seen."""
    dim = MANY[:8] // 2
    usable = dim[[0, 2, 3, 5, 6, 7]]
    folded, fp32, maxima = calibrated(Broken(dim))
    expected = observed(STATE, usable)
    assert list(maxima) == ACTIVATIONS and fp32.files == [f"cat.{i}.jpg" for i in (0, 2, 3, 5, 6, 7)]
    for name, values in oracle.forward(STATE, usable.numpy()).items():
        largest = np.abs(values).max((2, 3)) if values.ndim == 4 else np.abs(values)
        np.testing.assert_allclose(maxima[name], largest, rtol=1e-4, atol=1e-4 * largest.max())
        assert torch.equal(folded.ranges[name], expected.ranges[name])
        assert torch.equal(folded.ranges[name].cpu(), maxima[name].amax(0)) == (name != "input")
    assert folded.ranges["input"].tolist() == [255] * 3 and maxima["input"].max() < 128

def test_ranges_name_the_picture_that_set_them():
    """The last two hold the maximum everywhere, the second the outlier: one bright pixel on black."""
    dark = torch.zeros(5, 3, 224, 224, dtype=torch.uint8)
    dark[1, :, 100, 100] = 250
    dark[2] += 3
    dark[3:] = 251 - OTHERS[0] % 3
    folded, fp32, maxima = calibrated(Pictures(dark))
    sources = explain.range_sources(folded, fp32.files, maxima, dark[:3].to(DEVICE))
    rows = {row["activation"]: row for row in sources}
    assert list(rows) == ACTIVATIONS
    for name, values in oracle.forward(STATE, dark.numpy()).items():
        largest = np.abs(values).reshape(5, -1).max(1)
        expected = np.quantile(np.abs(values[:3]), 0.999, method="inverted_cdf")
        assert rows[name]["percentile999"] == pytest.approx(expected, abs=rows[name]["range"] / 1000)
        if name != "input":
            setter = largest[:4].argmax()           # of two that are equal the first
            assert (rows[name]["number"], rows[name]["file"]) == (setter + 1, f"cat.{setter}.jpg")
            assert rows[name]["range"] == pytest.approx(largest.max(), rel=1e-4)
    assert rows["input"]["range"] == 255 and rows["input"]["number"] is rows["input"]["file"] is None
    assert rows["input"]["percentile999"] == pytest.approx(3, abs=0.3)

# how many pictures

def test_curve_is_what_calibrating_on_so_many_gives():
    order = torch.cat([MANY[:11] // 4, MANY[11:]])              # the last picture holds the maximum
    recipe, pixels = as_constants(default(4), *METHODS), OTHERS.to(DEVICE)
    cat, dog = fp32_values("others")["fc2"].T
    balanced = STATE | {"fc2.bias": STATE["fc2.bias"] - np.float32([np.median(cat - dog), 0])}      # near a tie
    folded, _, maxima = calibrated(Pictures(order), balanced)
    _, whole = script.quantize_network(folded, order.to(DEVICE), recipe)
    with torch.no_grad():
        fp32, int8 = folded(pixels).cpu(), whole(pixels).cpu()
    curve = explain.calibration_curve(folded, whole, maxima, order.to(DEVICE), pixels, fp32)
    assert [row["pictures"] for row in curve] == [1, 2, 5, 10, 12]
    assert {row["as_last"] for row in curve} == {True, False}
    for row in curve:
        part = observed(balanced, order[:row["pictures"]])
        _, expected = script.quantize_network(part, order[:row["pictures"]].to(DEVICE), recipe)
        with torch.no_grad():
            logits = expected(pixels).cpu()
        assert row["sqnr_db"] == pytest.approx(script.sqnr_db(fp32, logits), abs=1e-6)
        assert row["agreement"] == (logits.argmax(1) == fp32.argmax(1)).double().mean()
        assert row["as_last"] == torch.equal(logits.argmax(1), int8.argmax(1))
        assert row["ranges"]["input"] == 1
        for name in ACTIVATIONS[1:]:
            share = (part.ranges[name].max() / folded.ranges[name].max()).item()
            assert row["ranges"][name] == pytest.approx(share, rel=1e-6)
            assert name == "fc2" or (share < 0.9) == (row["pictures"] < 12)

def test_counts_of_the_curve():
    expected = {1: [1], 2: [1, 2], 7: [1, 2, 5, 7], 10: [1, 2, 5, 10], 101: [1, 2, 5, 10, 20, 50, 100, 101]}
    assert {total: explain.first_counts(total) for total in expected} == expected

@pytest.mark.parametrize("as_last, sqnr, settled, fewer", [
    ([False, False, True, True], [None, None, 50, None], "from 5 on no class changes", False),
    ([False, True, False, True], [30, 40.54, 40.53, 41], "between 5 and 7 a class still changes", False),
    ([True] * 4, [30, 40.54, 38.8, 38.76], "from 1 on no class changes", True)])
def test_curve_says_from_which_picture_on_nothing_changes(capsys, as_last, sqnr, settled, fewer):
    """fewer: dB after more pictures, as far as the table shows it."""
    rows = [{"pictures": n, "ranges": dict.fromkeys(ACTIVATIONS, 1), "agreement": 1, "sqnr_db": found, "as_last": same}
            for n, found, same in zip((1, 2, 5, 7), sqnr, as_last)]
    explain.print_curve(rows, [{"number": n} for n in (None, 3, 6, 2)], 9)
    out = capsys.readouterr().out
    assert f"After picture 6 of 7 no range grows; {settled}.\n" in out
    assert ("More pictures can give fewer dB" in out) == fewer

# one value followed

FOLLOWED = {"default": (default(), METHODS), "plain": (default(), ()), "pixels of 4 bits": (default(4, 8), METHODS),
            "weights of 3 bits": (default(8, 3), METHODS), "notebook": (notebook(), ())}

@pytest.fixture(scope="module", params=FOLLOWED)
def followed(request):
    """One output of cnn1 and one logit of the first picture: the figures, and what they are made of."""
    (recipe, methods), fp32 = FOLLOWED[request.param], fp32_values("others")
    folded, pixels = observed(STATE, FEW), OTHERS.to(DEVICE)
    _, int8 = script.quantize_network(folded, FEW.to(DEVICE), as_constants(recipe, *methods))
    spots = {script.LAYERS[0]: explain.spot_to_follow(folded, int8, pixels), script.LAYERS[5]: (1,)}
    rows = {layer: explain.follow(folded, int8, pixels, layer, spot) for layer, spot in spots.items()}
    scales, integers = scales_of(int8), integers_of(int8)
    activations, totals, logits = oracle.int8_pass(recipe, OTHERS[:1].numpy(), scales, integers)
    activations["fc2"] = np.rint(logits * scales["fc2"]) if recipe.quantize_logits else logits
    return SimpleNamespace(recipe=recipe, equalized="EQUALIZE" in methods, rows=rows, scales=scales, integers=integers,
                           fp32={name: x[:1] for name, x in fp32.items()}, int8=activations, totals=totals)

def patch_of(layer, spot, values):
    """What an output is computed from, of one picture's {activation: values}."""
    x = values[layer.input][0]
    return x[:, spot[1]:spot[1] + 5, spot[2]:spot[2] + 5] if layer.is_conv else x

def test_value_followed_is_what_numpy_gives(followed):
    ranges = oracle.ranges(fp32_values("few"))
    for layer, row in followed.rows.items():
        spot, fp32, int8 = tuple(row["spot"]), row["fp32"], row["int8"]
        channel, (w, b) = spot[0], oracle.folded(STATE, layer.name, layer.bn)
        x, y = patch_of(layer, spot, followed.fp32), followed.fp32[layer.output][0][spot]
        np.testing.assert_allclose(fp32["inputs"], x.ravel(), rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(fp32["weights"], w[channel].ravel(), rtol=1e-5)
        assert fp32["sum"] == pytest.approx((x * w[channel].reshape(x.shape)).sum(), rel=1e-4, abs=1e-5)
        assert fp32["bias"] == pytest.approx(b[channel], rel=1e-5)
        assert fp32["value"] == pytest.approx(y, rel=1e-4, abs=1e-5)

        wq, bq, w_scale = followed.integers[layer.name]
        w_scale, scale_in = float(np.broadcast_to(w_scale, len(bq))[channel]), float(followed.scales[layer.input])
        total, result = [values[layer.output][0][spot] for values in (followed.totals, followed.int8)]
        assert int8["inputs"] == patch_of(layer, spot, followed.int8).ravel().tolist()
        assert int8["weights"] == wq[channel].ravel().tolist()
        assert (int8["bias"], int8["sum"]) == (bq[channel], total - bq[channel])
        factor = input_factor = 1
        if followed.equalized and layer.name != "fc2":
            factor = oracle.equalizing_factors(ranges[layer.output])[channel]
        if followed.equalized and layer.name != "cnn1":
            input_factor = oracle.equalizing_factors(ranges[layer.input])[0]
        assert (row["factor"], row["input_factor"]) == pytest.approx((factor, input_factor), rel=1e-4)
        is_fp32 = layer.name == "fc2" and not followed.recipe.quantize_logits
        scale_out = 1 if is_fp32 else float(followed.scales[layer.output])
        assert (int8["scale_in"], int8["scale_weight"]) == (scale_in, w_scale)
        assert int8["scale_out"] == (None if is_fp32 else scale_out)
        plain_bias, largest = b[channel] * factor * scale_in * w_scale, 2**(followed.recipe.bias_bit - 1) - 1
        assert int8["uncorrected_bias"] == pytest.approx(np.clip(plain_bias, -largest, largest), rel=1e-5, abs=0.51)
        assert int8["multiplier"] == pytest.approx(scale_out / scale_in / w_scale, rel=1e-6)
        assert int8["unrounded"] == pytest.approx(total * scale_out / scale_in / w_scale, rel=1e-4, abs=1e-4)
        assert int8["result"] == pytest.approx(result, rel=1e-6)
        low, high = oracle.limits(followed.recipe, layer.output)
        assert int8["limits"] == [0 if layer.is_conv else low, high]
        assert row["value"] == pytest.approx(result / scale_out / factor, rel=1e-5)
        assert row["error"] == pytest.approx(row["value"] - y, abs=2e-5)
        assert row["step"] == (None if is_fp32 else pytest.approx(1 / scale_out / factor, rel=1e-5))
        assert (row["pooled"] is None) == (layer.name == "fc2")
        if layer.is_conv:       # a spot worth following: not clipped, pooled, and wrong by a rounding that is seen
            top, left = spot[1] // 2 * 2, spot[2] // 2 * 2
            pooled = followed.int8[layer.output][0, channel, top:top + 2, left:left + 2]
            assert row["pooled"] == pooled.ravel().tolist() and 0 < result < high and result == pooled.max()
            if followed.recipe.bit == 8:
                assert 5 <= result <= 20 and sorted(row["pooled"])[-2] <= result - 2
                assert row["step"] / 4 < abs(row["error"]) < row["step"] / 2
                assert (row["factor"] > 1.1) == followed.equalized

def printed_lines(row, capsys):
    """[(head, text)] of `print_followed`, with what was wrapped in one line again; none is too long."""
    explain.print_followed(row)
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= 80
    lines = re.sub(r"\n {11}(?!plus|moved)", " ", out).splitlines()[2:]
    return [(line[2:11].strip(), line[11:]) for line in lines]

def calculated(text, **letters):
    """What a pocket calculator makes of a line's left side, and the figure right of it."""
    left, right = text.rsplit(" = ", 1)
    return eval(left.replace(" x ", " * "), {}, letters), float(re.match(r"-?[\d.]+(e[+-]?\d+)?", right)[0])

def test_each_line_of_a_value_followed_can_be_checked_with_a_calculator(followed, capsys):
    """From the figures that are printed, to the digits that are printed."""
    for layer, row in followed.rows.items():
        fp32, int8 = row["fp32"], row["int8"]
        printed = printed_lines({"file": "cat.3.jpg", **row}, capsys)
        lines, texts = dict(reversed(printed)), [text for _, text in printed]
        assert printed[0] == ("picture", "cat.3.jpg")
        for side, text in ((fp32, lines["FP32"]), (int8, lines["int32"])):     # the first two products, and the last
            figures = [float(x) for x in re.findall(r"(?<![\w.])-?\d[\d.]*(?:e-\d+)?", text)][:7]
            expected = [side[key][i] for i in (0, 1, -1) for key in ("inputs", "weights")]
            assert figures == pytest.approx([*expected, side["sum"]], rel=5e-5), text
        assert f"plus bias {fp32['bias']:.6g}{', then ReLU' * layer.is_conv}: {fp32['value']:.6g}" in texts
        assert float(f"{fp32['sum']:.6g}") + float(f"{fp32['bias']:.6g}") == pytest.approx(fp32["value"], abs=2e-5)
        factors = [f"{factor:.6g}" for factor in (row["factor"], row["input_factor"]) if factor != 1]
        scaled = " ".join(text for head, text in printed if head == "scaled")
        assert bool(factors) == followed.equalized and re.findall(r" by (\d[\d.]+)", scaled) == factors

        lines["weight"], lines["M"] = lines["weight"].replace("scale ", ""), lines["M"].split(" = ", 1)[1]
        found, multiplier = calculated(lines["M"])
        assert found == pytest.approx(multiplier, rel=2e-5) == int8["multiplier"]
        shown = {"M": multiplier}
        for head in lines.keys() & {"weight", "bias", "INT8", "logit", "back", "error"}:
            found, shown[head] = calculated(lines[head], M=multiplier)
            assert found == pytest.approx(shown[head], rel=1e-3 if head == "error" else 1e-4, abs=1e-6), lines[head]
        assert f"quantized to {int8['weights'][0]}" in lines["weight"]
        assert ("by GPTQ" in lines["weight"]) == (abs(shown["weight"] - int8["weights"][0]) > 0.5)
        assert lines["bias"].endswith(f"quantized to {int8['uncorrected_bias']}")
        corrected = f"moved to {int8['bias']} by bias correction"
        assert (corrected in texts) == (int8["bias"] != int8["uncorrected_bias"])
        assert shown["INT8" if row["step"] else "logit"] == pytest.approx(int8["unrounded"], rel=2e-5)
        assert shown["error"] == pytest.approx(row["error"], rel=1e-3)
        if row["step"]:
            low, high = int8["limits"]
            assert lines["INT8"].endswith(f"; rounded, within {low} to {high}: {int8['result']}")
            assert min(max(round(shown["INT8"]), low), high) == int8["result"]
            assert shown["back"] == pytest.approx(row["value"], rel=2e-5)
            assert lines["error"].endswith(f"; a step is {row['step']:.4g}")
        if layer.is_conv:
            assert lines["pooling"] == f"{int8['result']}, the largest of {', '.join(map(str, row['pooled']))}"

# how many bits

@pytest.fixture(scope="module")
def folded():
    return observed(STATE, FEW)

LABELLED = Pictures(OTHERS, [0, 1, 1, 0, 1, 0, 1])

def sweep_of(folded, **changes):
    """A Sweep; the bits in its recipe must not matter."""
    recipe = as_constants(default(), *METHODS) | {"WEIGHT_BIT": 4, "LAYER_BITS": {"fc2": 2, "cnn1": 7}} | changes
    fp32 = script.evaluate("FP32", folded, LABELLED)
    return sweep_bits.Sweep(folded, FEW.to(DEVICE), recipe, OTHERS.to(DEVICE), fp32)

def assert_direct(row, folded, fp32_logits, **changes):
    """Hold figures to those of the network that the script makes with these changes, and evaluates."""
    int8 = script.quantize_network(folded, FEW.to(DEVICE), as_constants(default(), *METHODS) | changes)[1]
    predictions = script.evaluate("INT8", int8, LABELLED)
    assert row["agreement"] == (predictions.classes == fp32_logits.argmax(1)).double().mean(), changes
    assert row["sqnr_db"] == pytest.approx(script.sqnr_db(fp32_logits, predictions.logits), rel=1e-12), changes
    assert row["top1"] == pytest.approx(predictions.top1), changes
    assert "file_bytes" not in row or row["file_bytes"] == len(script.int8_checkpoint(int8)), changes

@pytest.mark.parametrize("widths, changes", [
    ((8, 4), {}), ((8, 5, 3), {"BIT": 5, "QUANTIZE_LOGITS": True, "EQUALIZE": False, "GPTQ": False}),
    ((8, 3), {"GPTQ": False, "BIAS_CORRECTION": False, "PER_CHANNEL": False})])
def test_each_network_is_what_the_script_makes(folded, monkeypatch, widths, changes):
    """Those of the grid, and all that were measured with LAYER_BITS, also those in which several layers have fewer."""
    monkeypatch.setattr(sweep_bits, "WIDTHS", widths)
    monkeypatch.setattr(sweep_bits, "COMBINED", 3)
    monkeypatch.setattr(sweep_bits, "SPARED", 40)
    before = {name: value.clone() for name, value in folded.state_dict().items()}
    sweep = sweep_of(folded, **changes)
    grid, found = sweep.grid() if changes == {} else [], sweep.layer_bits()
    assert [row["WEIGHT_BIT"] for row in grid] == [*widths][:len(grid)] and bool(grid) == (changes == {})
    for row in grid:
        assert [cell["BIT"] for cell in row["cells"]] == [*widths]
        row["cells"][0]["file_bytes"] = row["file_bytes"]           # of the first cell's network
        for cell in row["cells"]:
            assert_direct(cell, folded, sweep.logits, WEIGHT_BIT=row["WEIGHT_BIT"], BIT=cell["BIT"])
    assert [row["name"] for row in found["layers"]] == LAYERS
    for row in found["layers"]:
        assert [(cell["bit"], cell["LAYER_BITS"]) for cell in row["cells"]] == [
            (8, {}), *[(bit, {row["name"]: bit}) for bit in widths[1:]]]
    for row in measured_in(found):
        assert_direct(row, folded, sweep.logits, **changes, LAYER_BITS=row["LAYER_BITS"])
    assert found["combined"] and all(len(row["LAYER_BITS"]) > 1 for row in found["combined"])
    assert all(torch.equal(value, before[name]) for name, value in folded.state_dict().items())

def measured_in(found):
    return [cell for row in found["layers"] for cell in row["cells"]] + found["combined"]

class Planted(sweep_bits.Sweep):
    """Networks that are no more than their recipe; each bit less costs a layer dB, and saves bytes of its file."""

    cost = {"cnn1": 0.3, "cnn2": 0.6, "cnn3": 0.05, "cnn4": 2, "fc1": 0.1, "fc2": 0.012}
    saves = {"cnn1": 10, "cnn2": 300, "cnn3": 200, "cnn4": 100, "fc1": 1000, "fc2": 50}

    def __init__(self):
        self.pixels, self.tried = None, []

    def quantized(self, changes, base=None):
        self.tried.append(changes.get("LAYER_BITS", {}))
        return SimpleNamespace(recipe={"LAYER_BITS": self.tried[-1]}), None

    def logits_beyond(self, base, networks):
        return dict.fromkeys(networks, 0)

    def measured(self, int8_model, logits=None):
        lost = sum(self.cost[name] * (8 - bit) for name, bit in int8_model.recipe["LAYER_BITS"].items())
        return {"agreement": 1, "top1": 100, "sqnr_db": 40 - lost if lost or self.cost["cnn1"] else None}

    def file(self, int8_model):
        layer_bits = int8_model.recipe["LAYER_BITS"]
        return bytes(20_000 - sum(self.saves[name] * (8 - bit) for name, bit in layer_bits.items()))

@pytest.fixture
def planted(monkeypatch):
    sweep = Planted()
    monkeypatch.setattr(script, "int8_checkpoint", sweep.file)
    return sweep

@pytest.mark.parametrize("cost, smallest", [
    ({}, {"cnn3": 2, "fc1": 2, "fc2": 6}),                              # then COMBINED networks have been tried
    ({"cnn3": 0.121}, {"cnn3": 5, "fc1": 2, "fc2": 5}),                 # a layer that stops leaves room to others
    ({"fc1": 0.41}, {"cnn3": 5, "fc1": 6, "fc2": 6}),
    (dict.fromkeys(LAYERS, 1.5), {}),
    (dict.fromkeys(LAYERS, 0) | {"cnn2": 1e-9}, {"cnn3": 2, "cnn4": 5, "fc1": 2})])         # exact, but for cnn2
def test_smallest_good_file_is_searched_from_the_largest_saving_on(planted, cost, smallest):
    """What is named has been measured, loses at most 1 dB, and of what was measured nothing smaller does."""
    planted.cost = Planted.cost | cost
    found = planted.layer_bits()
    named, measured = found["smallest"], measured_in(found)
    least = None if measured[0]["sqnr_db"] is None else 39
    good = [row for row in measured if (row["sqnr_db"] is None if least is None else row["sqnr_db"] >= least)]
    assert named["LAYER_BITS"] == smallest in [row["LAYER_BITS"] for row in good]
    assert named["file_bytes"] == min(row["file_bytes"] for row in good)
    assert len(found["combined"]) <= sweep_bits.COMBINED and found["spared_db"] == sweep_bits.SPARED == 1
    keys = [tuple(bits.items()) for bits in planted.tried]
    assert len(keys) == len(set(keys)) == 1 + 36 + len(found["combined"])           # none is made twice

def test_setting_can_be_pasted(capsys, planted):
    found = planted.layer_bits()
    for weight_bit, setting in ((4, "WEIGHT_BIT = 8\n"), (8, "")):
        sweep_bits.print_layer_bits(found, weight_bit, 12)
        out = capsys.readouterr().out
        assert out.endswith(f'.\n{setting}LAYER_BITS = {{"cnn3": 2, "fc1": 2, "fc2": 6}}\n')
    lines, words = out.splitlines(), " ".join(out.split())
    assert "12,700 instead of 20,000 bytes, at 39.1 dB instead of 40.0 dB." in words
    cells = [f"{40 - 0.1 * i:.1f}" for i in range(7)] + [f"{20_000 - 1000 * i:,}" for i in range(7)]
    assert f" fc1 {'100.00 ' * 7}{' '.join(cells)} " in words
    assert max(map(len, [*lines, f"LAYER_BITS = {json.dumps(dict.fromkeys(LAYERS, 7))}"])) <= 80        # the longest

def test_each_network_is_run_by_an_engine_that_is_right_for_it(folded, monkeypatch):
    """Kernels that overflow with weights of 8 bits, as on a CPU without VNNI, run the others."""
    monkeypatch.setattr(script, "kernel_overflows", lambda layer: bool(layer.weight.abs().max() > 63))
    sweep = sweep_of(folded)
    kernels = [with_kernel(sweep.quantized(changes)[0]) for changes in ({}, {"WEIGHT_BIT": 7}, {"BIT": 3})]
    assert kernels[0] == kernels[2] == [] and ("cnn2" in kernels[1] or not KERNELS)

def test_time_left_is_shown_every_ten_seconds(folded, monkeypatch, capsys):
    """By a clock on which a network takes five seconds."""
    monkeypatch.setattr(sweep_bits, "WIDTHS", (8, 5, 3))
    now = [100.0]
    monkeypatch.setattr(sweep_bits.time, "perf_counter", lambda: now[0])
    sweep = sweep_of(folded)
    capsys.readouterr()
    for now[0] in range(105, 261, 5):
        sweep.progress(1)
    assert capsys.readouterr().out.splitlines() == [
        f"bits: {done} of 32 networks, {5 * (32 - done)} seconds left" for done in range(2, 33, 2)]

# the run

def start(folder):
    """The tool in a folder with the script, as in the project; it tries two widths instead of seven."""
    (folder / "tools").mkdir(exist_ok=True)
    for name in ("explain", "draw_report", "hints", "sweep_bits"):
        text = (ROOT / "tools" / f"{name}.py").read_text()
        text, count = re.subn(r"(?m)^WIDTHS = range\(8, 1, -1\)", "WIDTHS = 8, 5", text)
        assert count == (name == "sweep_bits")
        (folder / "tools" / f"{name}.py").write_text(text)
    return folder / "tools" / "explain.py"

def explained(place, *words, **constants):
    """(exit status, stdout, stderr) of explain.py, run in this process."""
    place.edit(**constants)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "path", sys.path[:])
        for name, module in MODULES.items():
            patch.setitem(sys.modules, name, module)        # the copies go again
        return run_here(start(place.folder), *words)

@pytest.fixture(scope="module")
def swept(tmp_path_factory):
    """(place, report.json, explain.json, stdout) of the script and then explain.py --bits, on six pictures a split."""
    place = Place(tmp_path_factory.mktemp("swept"))
    report, _ = place.report()
    before = place.files()
    status, out, err = explained(place, "--bits")
    assert (status, err) == (0, ""), err
    assert {name: content for name, content in place.files().items() if name in before} == before
    assert set(place.files()) - set(before) == {"explain.json", "report.png"}
    return place, report, json.loads(place.files()["explain.json"]), out

def test_it_explains_the_network_of_the_run(swept):
    """Whose ranges and refinement come from other pictures than those that it answers."""
    place, report, found, _ = swept
    assert not {file.read_bytes() for file in place.train.iterdir()} & {
        file.read_bytes() for file in place.val.iterdir()}
    for key in ("constants", "recipe", "agreement", "flips", "logit_sqnr_db", "mcnemar", "images", "torch"):
        assert found[key] == report[key], key
    for name in ("fp32", "int8"):
        assert all(report[name][key] == value for key, value in found[name].items())
        assert found["file_bytes"][name] == report[name]["file_bytes"]
    for row, source in zip(report["layers"], found["ranges"][1:], strict=True):
        headroom = {"cv4": 2, "fc1": 2}.get(source["activation"], 1)
        assert row["output range"] == pytest.approx(headroom * source["range"], rel=1e-6)

def test_every_figure_is_that_of_direct_calls_on_disjoint_splits(swept):
    """What calibrates comes from one split, what is looked at from the other."""
    place, _, found, _ = swept
    train, val = script.CatDogDataset(place.train), script.CatDogDataset(place.val)
    seen, pixels = train.first_pixels(20), val.first_pixels(20)
    folded, recipe = script.load_checkpoint(place.checkpoint).fused(), script.read_constants(script.LEGAL_RECIPE)
    calibration, maxima = explain.calibrate_by_picture(folded, train)
    fp32, (fp32_model, int8) = script.evaluate("FP32", folded, val), script.quantize_network(folded, seen, recipe)
    spots = [explain.spot_to_follow(folded, int8, pixels), (int(script.evaluate("INT8", int8, val).classes[0]),)]
    sweep = sweep_bits.Sweep(folded, seen, recipe, pixels, fp32)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sweep_bits, "WIDTHS", (8, 5))
        expected = {
            "ledger": explain.error_ledger(fp32_model, int8, pixels)[0],
            "ranges": explain.range_sources(folded, calibration.files, maxima, seen),
            "calibration_curve": explain.calibration_curve(folded, int8, maxima, seen, pixels, fp32.logits),
            "followed": [{"file": val.files[0]} | explain.follow(folded, int8, pixels, script.LAYERS[i], spot)
                         for i, spot in zip((0, -1), spots)],
            "bits": sweep.grid(), "layer_bits": sweep.layer_bits()}
    assert {key: found[key] for key in expected} == json.loads(json.dumps(expected))
    assert {row["file"] for row in found["ranges"][1:]} <= {file.name for file in place.train.iterdir()}

def test_run_says_it_in_the_terminal_too(swept):
    place, report, found, out = swept
    assert all(len(line) <= 80 for line in out.splitlines() if str(place.folder) not in line)
    rows = [f"same class {100 * report['agreement']:.2f} %, logit SQNR {report['logit_sqnr_db']:.1f} dB; "
            f"pictures that changed their class: {len(report['flips'])}"]
    for row in found["ledger"]:
        sqnr = [sweep_bits.decimal(row["sqnr_db"][error]) for error in (*explain.ERRORS, "logits")]
        levels = f"{row['levels_used']}/{row['levels']}"
        clipped = "none FP32" if row["levels"] is None else f"{100 * row['clipped']:.2g} {levels}"
        rows.append(f"{row['name']} {' '.join(sqnr)}{'*' * row['hurts_most']} {clipped}")
        rows += [f"* Quantizing {row['name']} alone changes the logits most."] * row["hurts_most"]
    for row in found["ranges"]:
        file = f"{row['number']} {row['file']}" if row["number"] else "- pixels reach 255"
        rows.append(f"{row['activation']} {row['range']:.5g} {row['percentile999']:.4g} "
                    f"{row['range'] / row['percentile999']:.1f} {file}")
    for row in found["calibration_curve"]:
        ranges = " ".join(f"{100 * row['ranges'][name]:.1f}" for name in ACTIVATIONS)
        rows.append(f"{row['pictures']} {ranges} {100 * row['agreement']:.2f} {row['sqnr_db']:.1f}")
    for row in found["bits"]:
        cells = [f"{100 * cell['agreement']:.2f}" for cell in row["cells"]] + [f"{row['file_bytes']:,}"]
        rows.append(" ".join([f"W{row['WEIGHT_BIT']}", *cells, *[f"{cell['sqnr_db']:.1f}" for cell in row["cells"]]]))
    rows.append(f"LAYER_BITS = {json.dumps(found['layer_bits']['smallest']['LAYER_BITS'])}")
    rows.append("wrote results/report.png and explain.json")
    printed = f" {' '.join(out.split())} "
    assert [row for row in rows if f" {row} " not in printed] == []

@pytest.fixture
def place(tmp_path):
    """A place with two pictures a split."""
    return Place(tmp_path, 2)

def test_hints_of_runs(swept, place):
    """Of what calibration saw, and of biases that 9 bits clip."""
    def of(out):
        return " ".join(re.split(r"changed their class: \d+\n", out)[1].partition("Where does")[0].split())

    def where(masks):
        return ", ".join(f"{int(mask.sum())} of {len(mask)} in {name}" for name, mask in masks.items() if mask.any())
    folded = script.load_checkpoint(place.checkpoint).fused()
    script.calibrate(folded, script.CatDogDataset(place.train))
    silent = where({name: folded.ranges[name] == 0 for name in ACTIVATIONS})
    assert silent and of(swept[3]).startswith(
        f"Hint: Channels never active in calibration (often harmless): {silent}. Hint: Only 6 calibration pictures: ")
    status, out, err = explained(place, "plain", "BIAS_BIT=9")
    assert (status, err) == (0, "")
    recipe = script.read_constants(script.LEGAL_RECIPE) | script.PRESETS["plain"] | {"BIAS_BIT": 9}
    int8 = script.quantize_network(folded, None, recipe)[1]
    clipped = where({layer: int8.get_submodule(layer).bias.abs() == 255 for layer in LAYERS})
    assert clipped and f"Hint: BIAS_BIT = 9 clips biases ({clipped}): " in of(out)

def test_other_recipes_same_split_and_odd_names(place):
    """Every branch of the tables: logits in integers, no equalization, one split for both, long names."""
    for file in list(place.val.iterdir()):
        file.rename(file.with_stem(f"{file.stem}.{'y' * 90}"))
    status, out, err = explained(place, QUANTIZE_LOGITS=True, EQUALIZE=False, GPTQ=False, WEIGHT_BIT=4,
                                 PER_CHANNEL=False, CALIBRATION_SPLIT="val", IMAGE_SIZE=(213, 227))
    assert (status, err) == (0, ""), err
    assert [line for line in out.splitlines() if len(line) > 80] == []
    found = json.loads((place.results / "explain.json").read_text())
    assert found["ledger"][-1]["levels"] == 255 and "stay FP32" not in out and "W4A8 Top1" in out
    assert found["ranges"][1]["file"].endswith("yyy.jpg") and "...yyy" in out
    assert "How many bits" not in out and "bits" not in found              # without --bits there is no grid

def test_constants_on_the_command_line(place):
    """A preset, then what changes it, wherever --bits stands. The splits differ in names and numbers of pictures."""
    (place.train / "dog.0.jpg").unlink()
    (place.val / "cat.0.jpg").rename(place.val / "cat.0.val.jpg")
    status, out, err = explained(place, "notebook", "--bits", "WEIGHT_BIT=7", "LAYER_BITS={'fc1': 4}")
    assert (status, err) == (0, ""), err
    found = json.loads((place.results / "explain.json").read_text())
    assert found["recipe"] == script.read_constants(script.LEGAL_RECIPE) | script.PRESETS["notebook"] | {
        "WEIGHT_BIT": 7, "LAYER_BITS": {"fc1": 4}, "IMAGE_SIZE": [224, 224]}
    assert "WEIGHT_BIT = 7\n" in out and "bits" in found
    assert found["images"] == {"evaluated": 2, "calibrated": 1} and len(found["calibration_curve"]) == 1
    assert [row["file"] for row in found["followed"]] == ["cat.0.val.jpg"] * 2
    assert re.search(r"\nWEIGHT_BIT = 8\nLAYER_BITS = \{.*\}\n\nwrote results", out)

def test_help_fits_a_terminal(place):
    status, out, err = explained(place, "--bits", "--help")
    assert (status, err) == (0, "") and place.files() == {}
    assert out.startswith(explain.__doc__) and "\nWEIGHT_BIT = 8  " in out
    assert f"\npreset notebook: {script.PRESETS['notebook']}\n" in out
    assert max(map(len, explain.__doc__.splitlines())) <= 80

def test_bad_input_ends_it_with_one_line_and_leaves_what_was_there(place, monkeypatch):
    place.results.mkdir()
    for name in ("report.json", "explain.json", "report.png", "INT8_checkpoint.pth.tar"):
        (place.results / name).write_text(name)
    before, write = place.files(), explain.Path.write_bytes

    def full(path, content):
        if path.name.startswith("explain.json"):
            raise OSError(28, "No space left on device")
        return write(path, content)

    monkeypatch.setattr(explain.Path, "write_bytes", full)
    for words, arguments, constants in (
            (["BIT = 9", "2 to 8"], [], {"BIT": 9}),
            (["--bit: no constant of this name, did you mean BIT?"], ["--bit"], {}),
            (["nowhere.pth.tar cannot be read", "CHECKPOINT"], [], {"CHECKPOINT": "nowhere.pth.tar"}),
            (["cannot write", "set OUTPUT_DIR"], [], {"OUTPUT_DIR": "BEST_checkpoint.pth.tar"}),
            (["cannot write", "No space left on device", "OUTPUT_DIR"], [], {})):
        status, _, err = explained(place, *arguments, **constants)
        one_line(status, err, *words)
        assert place.files() == before

def test_ctrl_c_in_the_run(place):
    process = started(start(place.folder))
    for line in process.stdout:
        if line.startswith("Where do the ranges"):
            process.send_signal(signal.SIGINT)
            break
    stopped(process, place, {})

# in a notebook

NOTEBOOK = """
import base64, io, pathlib, sys
from IPython.core.interactiveshell import InteractiveShell
from IPython.utils.capture import capture_output
from PIL import Image

folder = pathlib.Path(sys.argv[1])
file, picture = folder / "quantize_catdog.py", folder / "results" / "report.png"
shell = InteractiveShell.instance()
shell.run_cell("from quantize_catdog import *")
shell.run_cell("CNN_Model = quantize_network = 'of the notebook'; EQUALIZE, WEIGHT_BIT, BIAS_BIT = False, 5, 30")
before = dict(shell.user_ns)
for edit in ("", "del HEADROOM"):
    shell.run_cell(edit)
    if edit:
        file.write_text(file.read_text().replace("HEADROOM = 2 ", "HEADROOM = 99 "))
    with capture_output() as caught:
        shell.run_line_magic("run", f"{folder / 'tools' / 'explain.py'} BIAS_BIT=29 GPTQ=False")
    print(caught.stdout + caught.stderr)
    for output in caught.outputs:
        jpeg = base64.b64decode(output.data["image/jpeg"])
        print("shown", 100_000 < len(jpeg) <= 300_000, Image.open(io.BytesIO(jpeg)).size == Image.open(picture).size)
    import quantize_catdog as module
    print("overwritten", [name for name, value in before.items() if hasattr(module, name) and name[0] != "_"
           and name not in edit and shell.user_ns[name] is not value])
"""

def test_under_a_notebooks_cell(place):
    """A small picture is shown, the notebook's constants count, then the words; its names stay what they were."""
    start(place.folder)
    status, out, err = python("-c", NOTEBOOK, place.folder, cwd=place.folder,
                              environment={"IPYTHONDIR": str(place.folder / "ipython")})
    assert status == 0 and "Traceback" not in out, out + err
    first, edited, rest = out.split("overwritten []\n")
    assert first.endswith("\nshown True True\n") and "shown" not in edited and rest == ""
    assert "EQUALIZE = False\n" in first and "WEIGHT_BIT = 5\n" in first and "BIAS_BIT = 29\n" in first
    assert "W5A8 Top1: " in first and "report.png and explain.json\n" in first
    found = json.loads((place.results / "explain.json").read_text())["constants"]
    assert (found["WEIGHT_BIT"], found["EQUALIZE"], found["GPTQ"], found["BIAS_BIT"]) == (5, False, False, 29)
    assert "InputError: HEADROOM = 99: set it to" in edited         # what no cell defines is the file's, as it is now

# report.png

def predictions(pictures, labels, logits):
    top1 = 100 * (logits.argmax(1) == labels).double().mean().item()
    return script.Predictions(pictures, pictures.files, labels, logits, top1)

def drawn(report, fp32, int8, monkeypatch, histograms=None):
    """(Figure, its picture, {text written: its box in pixels}) of draw_report."""
    figures, texts, save, draw = [], [], Figure.savefig, Text.draw
    monkeypatch.setattr(Figure, "savefig", lambda self, *args, **how: (figures.append(self), save(self, *args, **how)))
    monkeypatch.setattr(Text, "draw", lambda self, renderer: (texts.append(self), draw(self, renderer)))
    histograms = histograms or {name: torch.ones(4 * explain.BINS, dtype=torch.int64) for name in ACTIVATIONS}
    pictures = explain.pictures_to_show(fp32, int8)
    picture = Image.open(io.BytesIO(draw_report.draw_report(report, histograms, pictures)))
    monkeypatch.undo()
    texts = [(text.get_text(), text.get_window_extent()) for text in texts if text.get_text().strip()]
    return figures[0], picture, texts

def axes_titled(figure, words):
    return next(axes for axes in figure.axes if words in axes.get_title(loc="left"))

FULL_GRID = [{"WEIGHT_BIT": w, "file_bytes": 1000 * w, "cells": [
    {"BIT": a, "agreement": 0.99856, "sqnr_db": None if a == w == 8 else 2.5 * a + 3 * w - 21.35, "top1": 95.0}
    for a in range(8, 1, -1)]} for w in range(8, 1, -1)]
ALL_LAYERS = {"spared_db": 1, "layers": [{"name": name, "cells": [
    {"bit": bit, "sqnr_db": 5 * bit - i * (8 - bit)} for bit in range(8, 1, -1)]} for i, name in enumerate(LAYERS)]}

@pytest.mark.parametrize("sweep, flips, guilty", [(True, 0, 0), (True, 0, 1), (True, 3, 4), (True, 40, 6),
                                                  (False, 0, 4), (False, 3, 4), (False, 40, 4)])
def test_no_text_in_the_picture_overlaps(swept, sweep, flips, guilty, monkeypatch):
    report = swept[2] | {"bits": [row | {"file_bytes": 10_424_286} for row in FULL_GRID], "layer_bits": ALL_LAYERS}
    if not sweep:
        del report["bits"], report["layer_bits"]
    labels = torch.arange(60) % 2
    fp32 = torch.stack([1.0 - labels, labels.float()], 1) * torch.linspace(0.01, 12345, 60)[:, None]
    int8 = fp32.clone()
    int8[:flips] = int8[:flips].flip(1)
    pictures = Pictures(random_pixels(60), labels.tolist())
    pictures.files = [f"a dog $x_{{ 名前 {i}" * (i % 3 + 1) for i in range(60)]
    fp32, int8 = [predictions(pictures, labels, logits) for logits in (fp32, int8)]
    report["images"] = {"evaluated": 1234567, "calibrated": 6}
    report["flips"] = [None] * flips
    report["ledger"] = [row | {"hurts_most": i == guilty} for i, row in enumerate(report["ledger"])]
    report["calibration_curve"] = [report["calibration_curve"][0] | {"pictures": count} for count in (
        [1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000, 18000] if sweep else [1, 2, 5, 6])]
    _, picture, texts = drawn(report, fp32, int8, monkeypatch)
    height = 1512 if sweep else 1080
    assert picture.size == (1920, height)
    assert {"hurts most", "cv1", "same class"} <= {text for text, _ in texts} and len(texts) > 60
    for text, box in texts:
        assert box.x0 >= 0 and box.y0 >= 0 and box.x1 <= 1920 and box.y1 <= height, text
    for i, (text, box) in enumerate(texts):
        for other, its in texts[i + 1:]:
            width, height = min(box.x1, its.x1) - max(box.x0, its.x0), min(box.y1, its.y1) - max(box.y0, its.y0)
            assert width <= 1 or height <= 1, (text, other)

@pytest.mark.parametrize("flipped, shown", [
    ([], [0, 10, 1, 11, 2, 12, 3, 4]), ([5, 9, 11], [9, 11, 5, 0, 10, 1, 12, 2]),
    ([*range(10)], [9, 8, 7, 6, 5, 4, 3, 2])])
def test_picture_shows_cats_and_dogs_and_first_what_changed(swept, tmp_path, monkeypatch, flipped, shown):
    """Changed pictures first, the surest first; then those nearest to a change. Cats and dogs take turns."""
    labels = torch.tensor([0] * 10 + [1] * 3)
    for i, label in enumerate(labels):
        Image.new("RGB", (4, 4), (10 * i,) * 3).save(tmp_path / f"{script.CLASSES[label]}.{i}.png")
    margins = torch.tensor([*range(1, 11), 20, 30, 40]) * (1 - 2 * labels)
    logits, changed = [torch.stack([margins, torch.zeros(13)], 1) for _ in range(2)]
    changed[flipped] *= -1
    pictures = script.CatDogDataset(tmp_path, (4, 4))
    fp32, int8 = [predictions(pictures, labels, each) for each in (logits, changed)]
    figure = drawn(swept[2] | script.compare(fp32, int8), fp32, int8, monkeypatch)[0]
    axes = [axes for axes in figure.axes if axes.texts and "\nFP32 " in axes.texts[0].get_text()]
    captions = [each.texts[0].get_text() for each in axes]
    assert captions == ["{0}.{1}.png ({0})\nFP32 {0} by {2}.000\nINT8 {3} by {2}.000".format(
        script.CLASSES[labels[i]], i, abs(margins[i]), script.CLASSES[int8.classes[i]]) for i in shown]
    assert [each.images[0].get_array()[0, 0, 0] for each in axes] == [10 * i for i in shown]
    assert [each.texts[0].get_color() == draw_report.RED for each in axes] == [i in flipped for i in shown]

@pytest.mark.parametrize("exact", [False, True])
def test_histograms_curves_and_cells_have_the_measured_figures(swept, monkeypatch, exact):
    """From 8 bits on the left to 2, and a line where 1 dB is lost; a network without an error lies at the top."""
    layers, counts = json.loads(json.dumps(ALL_LAYERS)), torch.zeros(4 * explain.BINS, dtype=torch.int64)
    counts[2 * explain.BINS:3 * explain.BINS], counts[3 * explain.BINS + 40] = 1, 7     # 40 bins beyond the range
    for row in layers["layers"]:
        row["cells"][0]["sqnr_db"] = None if exact else 40
    fp32 = predictions(LABELLED, torch.zeros(7, dtype=torch.int64), torch.rand(7, 2))
    figure, _, texts = drawn(swept[2] | {"bits": FULL_GRID, "layer_bits": layers}, fp32, fp32, monkeypatch,
                             dict.fromkeys(ACTIVATIONS, counts))
    axes = axes_titled(figure, "cv1")
    within, clipped = [next(patch for patch in axes.patches if patch.get_facecolor() == to_rgba(color))
                       for color in (draw_report.SKY, draw_report.RED)]
    values, edges, _ = clipped.get_data()
    assert values[(edges[:-1] >= 1)].tolist() == pytest.approx([0, 7 / 1031] + [0] * 30)
    assert within.get_data()[1][-1] == 1 and within.zorder >= clipped.zorder
    assert [line.get_xdata()[0] for line in axes.lines] == [1]

    axes = axes_titled(figure, "one layer has fewer bits")
    lines, top = {line.get_label(): line for line in axes.lines}, 60 if exact else 40
    assert list(lines) == [*LAYERS, "1 dB lost"] and axes.xaxis_inverted()
    for row in layers["layers"]:
        assert lines[row["name"]].get_xdata().tolist() == [8, 7, 6, 5, 4, 3, 2]
        assert lines[row["name"]].get_ydata().tolist() == [top] + [cell["sqnr_db"] for cell in row["cells"][1:]]
    assert set(lines["1 dB lost"].get_ydata()) == {top - 1}

    axes = axes_titled(figure, "by bits")
    heat = axes.images[0].get_array()
    for labels in (axes.get_xticklabels(), axes.get_yticklabels()):
        assert [label.get_text() for label in labels] == list("8765432")
    cells = {tuple(map(round, text.get_position())): text.get_text() for text in axes.texts if "\n" in text.get_text()}
    assert len(cells) == 49
    for (column, row), text in cells.items():
        sqnr = FULL_GRID[row]["cells"][column]["sqnr_db"]
        assert text == f"99.86\n{'exact' if sqnr is None else f'{sqnr:.1f}'}"
        assert heat[row, column] == (40 if sqnr is None else sqnr)
    assert {f"{row['file_bytes']:,}" for row in FULL_GRID} <= {text for text, _ in texts}

def test_picture_for_a_notebook_is_small_even_of_noise():
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (1512, 1920, 3), np.uint8)).save(file, "PNG")
    jpeg = explain.small_jpeg(file.getvalue())
    assert len(jpeg) <= 300_000 and Image.open(io.BytesIO(jpeg)).size == (1920, 1512)
