"""tools/explain.py against direct computation: ledger, ranges, curve, values followed, bits, picture; its manners."""
import functools
import io
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import quantize_catdog as script
import torch
from PIL import Image

import oracle
from test_arithmetic import (
    DEVICE,
    KERNELS,
    MANY,
    PIXELS,
    PLACES,
    STATE,
    as_constants,
    default,
    integers_of,
    notebook,
    observed,
    one_thread,  # noqa: F401, a fixture
    scales_of,
)
from test_robustness import INTERRUPTED
from test_script import ROOT, Place, one_line, run_here

sys.path.insert(0, str(ROOT / "tools"))
import explain  # noqa: E402

LAYERS = [row[0] for row in oracle.LAYERS]
METHODS = "EQUALIZE", "GPTQ", "BIAS_CORRECTION"
FEW = MANY[:3]


class Pictures:
    """Pixels in batches of two, as a CatDogDataset gives them; every picture is a cat."""

    def __init__(self, pixels):
        self.pixels, self.files = pixels, [f"cat.{i}.jpg" for i in range(len(pixels))]

    def __len__(self):
        return len(self.pixels)

    def batches(self):
        for start in range(0, len(self), 2):
            pixels = self.pixels[start:start + 2]
            yield pixels, torch.zeros(len(pixels), dtype=torch.int64), self.files[start:start + 2]


def calibrated(pixels, state=STATE):
    """(folded network, Outcome, maxima) of explain's own calibration."""
    folded = observed(state, pixels[:1])        # whose ranges it must forget
    return folded, *explain.calibrate_by_picture(folded, Pictures(pixels))


def db(signal, noise):
    noise = np.square(noise, dtype=np.float64).sum()
    return 10 * math.log10(np.square(signal, dtype=np.float64).sum() / noise) if noise else None


def assert_db(found, expected, what):
    assert (found is None) == (expected is None), (what, found, expected)
    assert expected is None or found == pytest.approx(expected, abs=0.02), what


# where the error is born

@pytest.fixture(scope="module")
def quantized():
    """Folded network whose cv2 has half of its range, so that values are clipped; its INT8 network; pictures."""
    folded = observed(STATE, MANY)
    folded.range_cv2.mul_(0.5)
    int8 = folded.cl_scale(as_constants(default()))
    return SimpleNamespace(model=folded, int8=int8, pixels=MANY[:7].to(DEVICE))     # 7: not a whole number of chunks


def on_grid(x, scale, place):
    low, high = oracle.limits(default(), place)
    return x if place == "fc2" else np.clip(np.rint(x * scale), low, high) / scale


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
    fp32 = {layer.name: [getattr(quantized.model.part(layer), key).detach().cpu().numpy().astype(np.float64)
                         for key in ("weight", "bias")] for layer in script.LAYERS}
    real = {name: (w / w_scale.reshape(-1, *[1] * (w.ndim - 1)), b / (w_scale * scales[source]).astype(np.float64))
            for (name, _, source, _), (w, b, w_scale) in zip(oracle.LAYERS, integers.values())}
    int8 = oracle.int8_pass(default(), quantized.pixels.cpu().numpy(), scales, integers)

    def logits(x, start):
        """Of the FP32 network, from what is read by the layer of this number."""
        for name, bn, _, _ in oracle.LAYERS[start:]:
            x = layer_output(x, *fp32[name], bn)
            x = oracle.pool(x) if bn else x
        return x

    x, exact_logits = pixels, logits(pixels, 0)
    for i, (name, bn, source, place) in enumerate(oracle.LAYERS):
        (w, b), (w8, b8), sqnr = fp32[name], real[name], rows[name]["sqnr_db"]
        y, x8 = layer_output(x, w, b, bn), int8[0][source] / scales[source]
        last = int8[2] if place == "fc2" else int8[0][place] / scales[place]
        inherited = layer_output(oracle.pool(x8) if source.startswith("cv") else x8, w, b, bn)
        assert_db(sqnr["int8"], db(y, last - y), f"{name} int8")
        assert_db(sqnr["inherited"], db(y, inherited - y) if name != "cnn1" else None, f"{name} inherited")
        born = on_grid(layer_output(x, w8, b8, bn), scales[place], place)
        assert_db(sqnr["born"], db(y, born - y), f"{name} born")
        assert_db(sqnr["weights"], db(y, layer_output(x, w8, b, bn) - y), f"{name} weights")
        if sqnr["biases"] < 100:        # beyond it FP32 has no digits left
            assert_db(sqnr["biases"], db(y, layer_output(x, w, b8, bn) - y), f"{name} biases")
        assert_db(sqnr["rounding"], db(y, on_grid(y, scales[place], place) - y), f"{name} rounding")
        changed = logits(oracle.pool(born) if bn else born, i + 1)
        assert_db(sqnr["logits"], db(exact_logits, changed - exact_logits), f"{name} logits")
        if place != "fc2":
            high = oracle.limits(default(), place)[1]
            clipped = (np.abs(y) * scales[place] > high + 0.5).mean()
            assert rows[name]["clipped"] == pytest.approx(clipped, rel=1e-3, abs=1.1 / y.size)
            assert (clipped > 1e-4) == (name == "cnn2")                     # planted
            assert rows[name]["codes_used"] == len(np.unique(int8[0][place]))
            assert rows[name]["codes"] == (255 if place == "fc1" else 256)
            counts = histograms[place]
            assert counts.sum() == y.size
            assert counts[3 * explain.BINS:].sum() == pytest.approx((y * scales[place] > high + 0.5).sum(),
                                                                    abs=1 + 2e-4 * y.size)
        x = oracle.pool(y) if bn else y
    assert rows["fc2"]["clipped"] is rows["fc2"]["codes"] is rows["fc2"]["sqnr_db"]["rounding"] is None
    assert set(rows["input"]["sqnr_db"].values()) == {None}                  # pixels are exact
    assert [row["name"] for row in ledger if row["hurts_most"]] == [
        min(rows, key=lambda name: rows[name]["sqnr_db"]["logits"] or math.inf)]


@pytest.mark.parametrize("layer", script.LAYERS, ids=LAYERS)
def test_the_layer_with_the_planted_error_is_marked(quantized, layer):
    """A layer whose weights have lost seven of their bits."""
    int8 = quantized.model.cl_scale(as_constants(default()))
    weight = int8.part(layer).weight
    weight.copy_((weight / 64).round() * 64)
    ledger, _ = explain.error_ledger(quantized.model, int8, quantized.pixels[:2])
    assert [row["name"] for row in ledger if row["hurts_most"]] == [layer.name]


def test_input_has_an_error_where_pixels_have_fewer_bits(quantized):
    int8 = quantized.model.cl_scale(as_constants(default(4)))
    ledger, _ = explain.error_ledger(quantized.model, int8, quantized.pixels)
    pixels = quantized.pixels.cpu().numpy().astype(np.float64)
    expected = db(pixels, np.rint(pixels / 17) * 17 - pixels)
    for kind in ("int8", "born", "rounding"):
        assert_db(ledger[0]["sqnr_db"][kind], expected, kind)
    assert ledger[0]["sqnr_db"]["logits"] is not None and ledger[0]["codes"] == 16


def test_bias_correction_is_no_error_of_the_layer():
    """It makes up for what is inherited, and would be called the layer's own error otherwise."""
    folded, ledgers = observed(STATE, MANY), []
    for methods in ([], ["BIAS_CORRECTION"]):
        _, int8 = script.quantize_network(folded, MANY.to(DEVICE), as_constants(default(3), *methods))
        ledgers.append(explain.error_ledger(folded, int8, MANY[:5].to(DEVICE))[0])
    for plain, corrected in zip(*ledgers):
        for kind in ("born", "weights", "biases", "rounding", "logits"):
            assert plain["sqnr_db"][kind] == corrected["sqnr_db"][kind]
    assert ledgers[0][-1]["sqnr_db"]["int8"] != ledgers[1][-1]["sqnr_db"]["int8"]


def test_decibels_where_there_is_nothing_or_too_much():
    zeros, huge = torch.zeros(4, 3), torch.full((4, 3), 1e25)
    assert script.sqnr_db(huge, huge) is None and script.sqnr_db(zeros, zeros) is None          # no noise: exact
    assert script.sqnr_db(zeros, huge) < -300
    assert script.sqnr_db(huge, 0.9 * huge) == pytest.approx(20, abs=1e-3)
    assert explain.energy(huge) == pytest.approx(12e50, rel=1e-6)                               # beyond FP32
    assert script.decibels(1e3, 1) == pytest.approx(30) and script.decibels(1, 0) is None
    assert script.decibels(0, 1) < -300
    assert [explain.decimal(value) for value in (None, -0.04, -0.06, 12.345)] == ["exact", "0.0", "-0.1", "12.3"]


@pytest.mark.skipif(not KERNELS, reason="needs the INT8 kernels")
def test_ledger_is_the_same_whatever_the_engine(quantized):
    reference, _ = explain.error_ledger(quantized.model, quantized.int8, quantized.pixels)
    kernels = quantized.model.cl_scale(as_constants(default()))
    script.choose_engine(kernels, quantized.pixels)
    assert kernels.engine == "onednn"
    assert explain.error_ledger(quantized.model, kernels, quantized.pixels)[0] == reference


def test_ledger_changes_no_network(quantized):
    before = [{name: value.clone() for name, value in model.state_dict().items()}
              for model in (quantized.model, quantized.int8)]
    explain.error_ledger(quantized.model, quantized.int8, quantized.pixels[:2])
    for model, state in zip((quantized.model, quantized.int8), before):
        assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_histogram_against_numpy():
    values = np.random.default_rng(0).normal(0, 1, (3, 4, 5, 6)).astype(np.float32)
    counts = explain.histogram(torch.from_numpy(values), 1.7)
    bins = np.floor(values.ravel() * (explain.BINS / 1.7)) + 2 * explain.BINS
    bins = np.clip(bins, 0, 4 * explain.BINS - 1).astype(int)
    expected = np.bincount(bins, minlength=4 * explain.BINS)
    assert np.abs(counts.numpy() - expected).sum() <= 4         # a value at an edge
    assert explain.histogram(torch.tensor([[-9.0, 9.0, 0.0]]), 1.0)[[0, -1, 2 * explain.BINS]].tolist() == [1, 1, 1]


def ledger_rows(born, logits):
    """Rows that differ in these two alone."""
    return [{"name": name, "sqnr_db": dict.fromkeys(("int8", "inherited", "weights", "biases", "rounding"), 1.0)
             | {"born": own, "logits": arrived}, "clipped": 1.23e-5, "codes_used": 200, "codes": 256,
             "hurts_most": arrived is not None and arrived == min(x for x in logits if x is not None)}
            for name, own, arrived in zip(LAYERS, born, logits)]


@pytest.mark.parametrize("born, logits, guilty, larger", [
    ([30.0, 20.0, 40.0], [50.0, 45.0, 60.0], "cnn2", None),         # the largest error hurts most: nothing puzzles
    ([30.0, 20.0, 40.0], [40.0, 45.0, 60.0], "cnn1", "cnn2"),
    ([None, 20.0, 40.0], [None, 45.0, 44.0], "cnn3", "cnn2"),
    ([None, None, None], [None, None, None], None, None)])
def test_ledger_says_why_the_largest_error_need_not_hurt_most(capsys, born, logits, guilty, larger):
    explain.print_ledger(ledger_rows(born, logits), 20)
    lines = capsys.readouterr().out.splitlines()
    assert [line[:4] for line in lines[4:7] if "*" in line] == [guilty] * (guilty is not None)
    assert [line for line in lines if line.startswith("* hurts most")] == [
        f"* hurts most: quantizing {guilty} alone changes the logits most."] * (guilty is not None)
    assert [line[:4] for line in lines if "own error is larger" in line] == [larger] * (larger is not None)


# ranges

def test_calibrating_by_picture_is_calibrating():
    """The script's ranges to the last bit, and each picture's part in them."""
    folded, outcome, maxima = calibrated(FEW)
    expected = observed(STATE, FEW)
    for place, values in oracle.forward(STATE, FEW.numpy()).items():
        largest = np.abs(values).max((2, 3)) if values.ndim == 4 else np.abs(values)
        np.testing.assert_allclose(maxima[place], largest, rtol=1e-4, atol=1e-4 * largest.max())
        assert torch.equal(folded.range_at(place), expected.range_at(place))
        assert torch.equal(folded.range_at(place).cpu(), maxima[place].amax(0))
    assert outcome.files == [f"cat.{i}.jpg" for i in range(3)]


def test_pictures_that_cannot_be_decoded_leave_no_row():
    pictures = Pictures(MANY[:3])
    pictures.__class__ = type("Shrinking", (Pictures,), {"__len__": lambda self: 5})    # two of five are broken
    _, maxima = explain.calibrate_by_picture(observed(STATE, PIXELS), pictures)
    assert {len(found) for found in maxima.values()} == {3}


def test_ranges_name_the_picture_that_set_them():
    """The last picture holds the maximum everywhere, the second the outlier: one bright pixel on black."""
    dark = torch.zeros(4, 3, 224, 224, dtype=torch.uint8)
    dark[1, :, 100, 100] = 250
    dark[2] += 3
    dark[3] = 251 - PIXELS[0] % 3
    folded, outcome, maxima = calibrated(dark)
    rows = {row["place"]: row for row in explain.range_sources(folded, outcome.files, maxima, dark[:3].to(DEVICE))}
    assert list(rows) == PLACES
    for place, values in oracle.forward(STATE, dark.numpy()).items():
        largest = np.abs(values).reshape(4, -1).max(1)
        assert (rows[place]["number"], rows[place]["file"]) == (largest.argmax() + 1, f"cat.{largest.argmax()}.jpg")
        assert rows[place]["range"] == pytest.approx(largest.max(), rel=1e-4)
        expected = np.quantile(np.abs(values[:3]), 0.999, method="inverted_cdf")
        assert rows[place]["percentile999"] == pytest.approx(expected, abs=largest.max() / 1000)
    assert rows["input"]["number"] == 4 and rows["input"]["range"] == 251
    assert rows["input"]["percentile999"] == pytest.approx(3, abs=0.3)


def test_range_set_twice_is_named_after_the_first():
    folded, outcome, maxima = calibrated(torch.cat([PIXELS[:1] // 2, PIXELS, PIXELS]))
    rows = explain.range_sources(folded, outcome.files, maxima, PIXELS.to(DEVICE))
    assert {row["number"] for row in rows} <= {2, 3} and rows[0]["range"] == PIXELS.max()


# how many pictures

def test_curve_is_what_calibrating_on_so_many_gives():
    order = torch.cat([MANY[:11] // 4, MANY[11:]])              # the last picture holds the maximum
    recipe, pixels = as_constants(default(), *METHODS), MANY[6:].to(DEVICE)
    folded, _, maxima = calibrated(order)
    _, whole = script.quantize_network(folded, order.to(DEVICE), recipe)
    with torch.no_grad():
        fp32, int8 = folded(pixels).cpu(), whole(pixels).cpu()
    curve = explain.calibration_curve(folded, whole, maxima, order.to(DEVICE), pixels, fp32)
    assert [row["pictures"] for row in curve] == [1, 2, 5, 10, 12]
    steps = []
    for row in curve:
        part = observed(STATE, order[:row["pictures"]])
        equalized, expected = script.quantize_network(part, order[:row["pictures"]].to(DEVICE), recipe)
        with torch.no_grad():
            logits = expected(pixels).cpu()
        assert row["sqnr_db"] == pytest.approx(script.sqnr_db(fp32, logits), abs=1e-6)
        assert row["agreement"] == (logits.argmax(1) == fp32.argmax(1)).double().mean()
        assert row["as_last"] == torch.equal(logits.argmax(1), int8.argmax(1))
        for place in PLACES:
            share = (part.range_at(place).max() / folded.range_at(place).max()).item()
            assert row["ranges"][place] == pytest.approx(share, rel=1e-6) and (share < 0.9) == (row["pictures"] < 12)
        # a step in the folded network's own units: what EQUALIZE does to a channel is what it does to its range
        factors = {place: np.ones(len(part.range_at(place))) for place in PLACES}
        factors |= {place: oracle.equalizing_factors(part.range_at(place).cpu().numpy()) for place in PLACES[1:6]}
        steps.append({place: 1 / (expected.scale_at(place).item() * factors[place]) for place in PLACES[:-1]})
    for row, before, now in zip(curve[1:], steps, steps[1:]):
        coarser = {place: int((now[place] > before[place] * (1 + 1e-5)).sum()) for place in now}
        assert row["coarser"] == coarser
    assert set(curve[0]["coarser"].values()) == {0} and curve[-1]["coarser"]["fc1"] == 512
    assert 0 < curve[-1]["coarser"]["cv1"]


def test_rows_whose_classes_are_not_the_last_ones(monkeypatch):
    """Of two pictures, by planted logits."""
    cat_dog, cat_cat = torch.tensor([[1.0, 0], [0, 1]]), torch.tensor([[1.0, 0], [2, 1]])
    planted = iter([cat_cat, cat_dog, cat_cat, 2 * cat_dog])
    monkeypatch.setattr(explain, "logits_of", lambda model, pixels: next(planted))
    folded, _, maxima = calibrated(MANY[:6])
    _, int8 = script.quantize_network(folded, PIXELS.to(DEVICE), as_constants(default()))
    curve = explain.calibration_curve(folded, int8, maxima, MANY[:6].to(DEVICE), PIXELS.to(DEVICE), cat_dog)
    assert [(row["pictures"], row["as_last"], row["agreement"]) for row in curve] == [
        (1, False, 0.5), (2, True, 1), (5, False, 0.5), (6, True, 1)]


def test_curve_leaves_the_network_as_it_was():
    folded, _, maxima = calibrated(PIXELS)
    before = {name: value.clone() for name, value in folded.state_dict().items()}
    _, int8 = script.quantize_network(folded, PIXELS.to(DEVICE), as_constants(default()))
    explain.calibration_curve(folded, int8, maxima, PIXELS.to(DEVICE), PIXELS.to(DEVICE), torch.zeros(2, 2))
    assert all(torch.equal(value, before[name]) for name, value in folded.state_dict().items())


@pytest.mark.parametrize("total, counts", [(1, [1]), (2, [1, 2]), (7, [1, 2, 5, 7]), (10, [1, 2, 5, 10]),
                                           (100, [1, 2, 5, 10, 20, 50, 100]), (101, [1, 2, 5, 10, 20, 50, 100, 101])])
def test_counts_of_the_curve(total, counts):
    assert explain.first_counts(total) == counts


def curve_rows(pictures, sqnr, as_last=None, coarser=None):
    return [{"pictures": n, "ranges": dict.fromkeys(PLACES, 1), "agreement": 1, "sqnr_db": found, "as_last": same,
             "coarser": coarser or {"cv1": 0}}
            for n, found, same in zip(pictures, sqnr, as_last or [True] * len(pictures))]


def sources(*numbers):
    return [{"place": "input", "range": 4.0, "file": f"cat.{n}.jpg", "number": n, "percentile999": 2.0}
            for n in numbers]


@pytest.mark.parametrize("as_last, words", [
    ([False, False, True, True], "from 5 on no class changes"),
    ([False, True, False, True], "between 5 and 7 a class still changed"),
    ([True, True, True, True], "from 1 on no class changes")])
def test_from_which_picture_on_nothing_changes(capsys, as_last, words):
    explain.print_ranges(sources(3, 6, 2), 3)
    explain.print_curve(curve_rows((1, 2, 5, 7), [30] * 4, as_last), sources(3, 6, 2), 9)
    out = capsys.readouterr().out
    assert f"after picture 6 of 7 no range grows; {words}\n" in out
    assert "input          4          2           2.0       6 cat.6.jpg\n" in out
    assert "the values of 3 pictures do" in out and "INT8 against FP32, on 9 pictures\n" in out


WIDER = "a range can only grow, and a wider one, of a place or with EQUALIZE of a channel, has coarser steps. "
OTHERS = "not only their ranges differ, but also what GPTQ and bias correction, which look at 20 at most, have seen. "


@pytest.mark.parametrize("sqnr, words", [
    ([30, 31, 32, 33], None),                                   # more and more dB
    ([30, 40.54, 40.53, 41], None),                             # the same dB, as far as the table goes
    ([None, None, 50, None], None),
    ([30, 40.54, 38.8, 38.76], "100 pictures give fewer dB than 50: " + WIDER),
    ([30, 29, 27, 26], "100 pictures give fewer dB than 50: " + WIDER),         # the row that lost most
    ([30, 20, 19, 22], "50 pictures give fewer dB than 10: " + OTHERS)])
def test_curve_says_why_more_pictures_give_fewer_db(capsys, sqnr, words):
    curve = curve_rows((10, 50, 100, 200), sqnr, coarser=dict(zip(PLACES, (3, 16, 0, 16, 8, 512, 2))))
    explain.print_curve(curve, sources(1), 9)
    lines = capsys.readouterr().out.splitlines()
    out = "".join(f"{line} " for line in lines)
    assert ("fewer dB" in out) == (words is not None) and (words or "") in out
    channels = "Channels with coarser steps: input 3, cv1 16, cv3 16, cv4 8, fc1 512, fc2 2. "
    assert (channels in out) == (WIDER in (words or ""))
    assert all(len(line) <= 80 for line in lines)


# one value followed

FOLLOWED = {"default": (default(), METHODS), "plain": (default(), ()), "pixels of 4 bits": (default(4, 8), METHODS),
            "weights of 3 bits": (default(8, 3), METHODS), "notebook": (notebook(), ())}


@functools.cache
def fp32_of_few():
    return oracle.forward(STATE, FEW.numpy())


@pytest.fixture(scope="module", params=FOLLOWED)
def followed(request):
    """One output of cnn1 and one logit of the first of two pictures: the figures, and what they are made of."""
    recipe, methods = FOLLOWED[request.param]
    folded, pixels = observed(STATE, FEW), FEW[1:].to(DEVICE)
    _, int8 = script.quantize_network(folded, FEW.to(DEVICE), as_constants(recipe, *methods))
    spots = {script.LAYERS[0]: explain.spot_to_follow(folded, int8, pixels), script.LAYERS[5]: (1,)}
    rows = {layer: explain.follow(folded, int8, pixels, layer, spot) for layer, spot in spots.items()}
    scales, integers = scales_of(int8), integers_of(int8)
    places, totals, logits = oracle.int8_pass(recipe, FEW[1:2].numpy(), scales, integers)
    places["fc2"] = np.rint(logits * scales["fc2"]) if recipe.quantize_logits else logits
    fp32 = fp32_of_few()
    return SimpleNamespace(recipe=recipe, equalized="EQUALIZE" in methods, rows=rows, ranges=oracle.ranges(fp32),
                           fp32={place: values[1:2] for place, values in fp32.items()},
                           scales=scales, integers=integers, places=places, totals=totals)


def patch_of(layer, spot, values):
    """What an output is computed from, of one picture's {place: values}."""
    x = values[layer.source][0]
    return x[:, spot[1]:spot[1] + 5, spot[2]:spot[2] + 5] if layer.is_conv else x


def test_value_followed_is_what_numpy_gives(followed):
    for layer, row in followed.rows.items():
        spot, fp32, int8 = tuple(row["spot"]), row["fp32"], row["int8"]
        channel, (w, b) = spot[0], oracle.folded(STATE, layer.name, layer.bn)
        x = patch_of(layer, spot, followed.fp32)
        np.testing.assert_allclose(fp32["inputs"], x.ravel(), rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(fp32["weights"], w[channel].ravel(), rtol=1e-5)
        assert fp32["sum"] == pytest.approx((x * w[channel].reshape(x.shape)).sum(), rel=1e-4, abs=1e-5)
        assert fp32["bias"] == pytest.approx(b[channel], rel=1e-5)
        assert fp32["value"] == pytest.approx(followed.fp32[layer.place][0][spot], rel=1e-4, abs=1e-5)

        wq, bq, w_scale = followed.integers[layer.name]
        w_scale = float(np.broadcast_to(w_scale, len(bq))[channel])
        q, total = patch_of(layer, spot, followed.places), followed.totals[layer.place][0][spot]
        assert int8["inputs"] == q.ravel().tolist() and int8["weights"] == wq[channel].ravel().tolist()
        assert int8["bias"] == bq[channel] and int8["sum"] == total - bq[channel]
        factor = input_factor = 1
        if followed.equalized and layer.name != "fc2":
            factor = oracle.equalizing_factors(followed.ranges[layer.place])[channel]
        if followed.equalized and layer.name != "cnn1":
            input_factor = oracle.equalizing_factors(followed.ranges[layer.source])[0]
        assert row["factor"] == pytest.approx(factor, rel=1e-4)
        assert row["input_factor"] == pytest.approx(input_factor, rel=1e-4)
        is_fp32 = layer.name == "fc2" and not followed.recipe.quantize_logits
        scale_in = float(followed.scales[layer.source])
        scale_out, result = 1 if is_fp32 else float(followed.scales[layer.place]), followed.places[layer.place][0][spot]
        assert (int8["scale_in"], int8["scale_weight"]) == (scale_in, w_scale)
        assert int8["scale_out"] == (None if is_fp32 else scale_out)
        plain_bias = b[channel] * factor * scale_in * w_scale
        largest = 2**(followed.recipe.bias_bit - 1) - 1
        assert int8["uncorrected_bias"] == pytest.approx(np.clip(plain_bias, -largest, largest), rel=1e-5, abs=0.51)
        assert int8["multiplier"] == pytest.approx(scale_out / scale_in / w_scale, rel=1e-6)
        assert int8["unrounded"] == pytest.approx(total * scale_out / scale_in / w_scale, rel=1e-4, abs=1e-4)
        assert int8["result"] == pytest.approx(result, rel=1e-6)
        low, high = oracle.limits(followed.recipe, layer.place)
        assert int8["limits"] == [0 if layer.is_conv else low, high]
        assert row["value"] == pytest.approx(result / scale_out / factor, rel=1e-5)
        assert row["error"] == pytest.approx(row["value"] - followed.fp32[layer.place][0][spot], abs=2e-5)
        assert row["step"] == (None if is_fp32 else pytest.approx(1 / scale_out / factor, rel=1e-5))
        if layer.is_conv:
            top, left = spot[1] // 2 * 2, spot[2] // 2 * 2
            pooled = followed.places[layer.place][0, channel, top:top + 2, left:left + 2]
            assert row["pooled"] == pooled.ravel().tolist()
        else:
            assert row["pooled"] is None


def test_value_followed_shows_something(followed):
    """Not zero, not clipped, kept by the pooling, and wrong by a rounding that is seen."""
    row = followed.rows[script.LAYERS[0]]
    result, (low, high) = row["int8"]["result"], row["int8"]["limits"]
    assert low < result < high and result == max(row["pooled"])
    if followed.recipe.bit == 8:
        assert 5 <= result <= 20 and sorted(row["pooled"])[-2] <= result - 2
        assert row["step"] / 4 < abs(row["error"]) < row["step"] / 2
        assert (row["factor"] > 1.1) == followed.equalized


def calculated(text, **letters):
    """What a pocket calculator makes of a line's left side, and the figure right of it."""
    left, right = text.rsplit(" = ", 1)
    return eval(left.replace(" x ", " * "), {}, letters), float(re.match(r"-?[\d.]+(e[+-]?\d+)?", right)[0])


def test_each_line_of_a_value_followed_can_be_checked_with_a_calculator(followed, capsys):
    """From the figures that are printed, to the digits that are printed."""
    def near(found, expected):
        return found == pytest.approx(expected, rel=2e-5, abs=1e-9)

    for layer, row in followed.rows.items():
        explain.print_followed({"file": "cat.3.jpg", **row})
        out = capsys.readouterr().out
        fp32, int8, spot = row["fp32"], row["int8"], ", ".join(
            f"{name} {i}" for name, i in zip(("channel", "row", "column"), row["spot"]))
        assert max(map(len, out.splitlines())) <= 80
        out = re.sub(r"\n {11}(?!bias )", " ", out).splitlines()                   # what was wrapped
        assert out[1:3] == [f"One value followed: {layer.name}'s {spot} (from 0)", "  picture  cat.3.jpg"]
        terms = {"FP32": fp32, "int32": int8}
        for label, side in terms.items():
            line = next(line for line in out if line.startswith(f"  {label:<9}"))[11:]
            shown = [float(x) for x in re.findall(r"(?<![\w.])-?\d[\d.]*(?:e-\d+)?", line)][:6]
            expected = [side[kind][i] for i in (0, 1, -1) for kind in ("inputs", "weights")]
            assert shown == pytest.approx(expected, rel=5e-5), line
        lines = {line[2:11].strip(): line[11:] for line in out[5:]}
        assert out[3].endswith(f" = {fp32['sum']:.6g}, {len(fp32['inputs'])} products")
        assert out[4] == (f"           bias {fp32['bias']:.6g}; "
                          f"{'ReLU' if layer.is_conv else 'logit'}: {fp32['value']:.6g}")
        assert float(f"{fp32['sum']:.6g}") + float(f"{fp32['bias']:.6g}") == pytest.approx(fp32["value"], abs=2e-5)

        rescaled = f"  EQUALIZE multiplies the channel by {row['factor']:.6g}"
        assert (rescaled in out) == (row["factor"] != 1)
        undone = f"  EQUALIZE multiplies the first input by {row['input_factor']:.6g}, so divides its weight"
        assert (undone in out) == (row["input_factor"] != 1)
        found, shown = calculated(lines["weights"].replace("scale ", ""))
        assert found == pytest.approx(shown, rel=1e-4)
        assert f"became {int8['weights'][0]}" in lines["weights"]
        assert ("by GPTQ" in lines["weights"]) == (abs(shown - int8["weights"][0]) > 0.5)
        found, shown = calculated(lines["bias"])
        assert near(found, shown) and lines["bias"].endswith(f"became {int8['uncorrected_bias']}")
        corrected = f"           bias correction made it {int8['bias']}"
        assert (corrected in out) == (int8["bias"] != int8["uncorrected_bias"])
        assert lines["int32"].endswith(f" = {int8['sum']}")
        found, shown = calculated(lines["M"].removeprefix("scale out / (in x weights) = "))
        assert near(found, shown) and near(shown, int8["multiplier"])
        last = lines["INT8"] if row["step"] else lines["logit"]
        found, scaled = calculated(last, M=shown)
        assert found == pytest.approx(scaled, rel=1e-4, abs=1e-3) and near(scaled, int8["unrounded"])
        if row["step"]:
            low, high = int8["limits"]
            assert last.endswith(f"; rounded, within {low} to {high}: {int8['result']}")
            assert min(max(round(scaled), low), high) == int8["result"]
            found, shown = calculated(lines["back"])
            assert near(found, shown) and near(shown, row["value"])
            assert lines["error"].endswith(f"; a step is {row['step']:.4g}")
        else:
            assert last.endswith(": logits stay FP32")
        found, shown = calculated(lines["error"])
        assert found == pytest.approx(shown, rel=1e-3) and shown == pytest.approx(row["error"], rel=1e-3)
        if layer.is_conv:
            assert lines["pooling"] == f"keeps {int8['result']}, the largest of {', '.join(map(str, row['pooled']))}"


def test_values_followed_fit_in_80_characters_whatever_they_are(followed, capsys):
    """Figures of other networks may have signs, exponents and more digits."""
    tiny, many = -1.234567e-5, -12_345_678
    for row in followed.rows.values():
        fp32 = {"inputs": [tiny] * 512, "weights": [tiny] * 512, "sum": tiny, "bias": tiny, "value": tiny}
        int8 = {"inputs": [-127] * 512, "weights": [-127] * 512, "sum": many, "bias": many,
                "uncorrected_bias": many - 1, "scale_in": 0.4980392, "scale_weight": -10.2e6, "scale_out": 1.234567e-5,
                "multiplier": tiny, "unrounded": tiny, "limits": [-127, 127], "result": -127}
        spot = [111, 222, 222][:len(row["spot"])]
        explain.print_followed({"file": "cat" * 50, "layer": row["layer"], "spot": spot, "fp32": fp32, "int8": int8,
                                "factor": 3.516421, "input_factor": 2.516421, "value": tiny, "error": tiny,
                                "step": -tiny, "pooled": row["pooled"] and [255] * 4})
        lines = capsys.readouterr().out.splitlines()
        assert [line for line in lines if len(line) > 80] == [] and max(map(len, lines)) > 75
        out = re.sub(r"\n {11}", " ", "\n".join(lines))
        assert " became -127 by GPTQ, " in out                      # 443 is nearer to the product


# how many bits

def grid(*rows):
    """Cells of W8 and below, A8 and below, with these dB."""
    return [{"WEIGHT_BIT": 8 - i, "file_bytes": 424_286, "cells": [
        {"BIT": 8 - j, "agreement": 0.9985, "sqnr_db": sqnr, "top1": 95.0} for j, sqnr in enumerate(row)]}
        for i, row in enumerate(rows)]


@pytest.mark.parametrize("rows, words", [
    ([[30.0, 20.0], [25.0, 10.0]], None),
    ([[30.0, 30.04], [30.0, 10.0]], None),                                  # the same dB, as far as the table goes
    ([[30.0, 31.0], [29.0, 33.5]], "More bits give fewer dB: W7A8 29.0, W7A7 33.5. "),
    ([[30.0, 20.0], [25.0, 24.0]], "More bits give fewer dB: W8A7 20.0, W7A7 24.0. "),
    ([[None, 20.0], [25.0, None]], None)])
def test_grid_says_why_more_bits_give_fewer_db(capsys, rows, words):
    explain.print_more_bits(grid(*rows), {"GPTQ": True})
    assert re.findall(r"More bits give fewer dB: \w+ [\d.]+, \w+ [\d.]+\. ", capsys.readouterr().out) == [
        words] * (words is not None)
    explain.print_more_bits(grid(*rows), {"GPTQ": False})                   # which is what it says is the reason
    assert capsys.readouterr().out == ""


# the run

def start(folder):
    """The tool in a folder with the script, as in the project; its grid has four cells instead of 49."""
    text = (ROOT / "tools" / "explain.py").read_text()
    text, count = re.subn(r"(?m)^WIDTHS = .*$", "WIDTHS = 8, 3", text)
    assert count == 1
    (folder / "tools").mkdir(exist_ok=True)
    (folder / "tools" / "explain.py").write_text(text)
    return folder / "tools" / "explain.py"


def explained(place, *arguments, **constants):
    """(exit status, stdout, stderr) of explain.py, run in this process."""
    place.edit(**constants)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["explain.py", *arguments])
        patch.setattr(sys, "path", sys.path[:])
        patch.setitem(sys.modules, "quantize_catdog", script)       # the copy goes again
        return run_here(start(place.folder))


@pytest.fixture(scope="module")
def swept(tmp_path_factory):
    """(place, report.json, explain.json, stdout) of the script and then explain.py --bits, on six pictures."""
    place = Place(tmp_path_factory.mktemp("swept"))
    report, _ = place.report()
    before = place.files()
    status, out, err = explained(place, "--bits")
    assert (status, err) == (0, ""), err
    assert {name: content for name, content in place.files().items() if name in before} == before
    assert set(place.files()) - set(before) == {"explain.json", "report.png"}
    return place, report, json.loads(place.files()["explain.json"]), out


def test_it_explains_the_network_of_the_run(swept):
    _, report, found, out = swept
    for key in ("constants", "recipe", "agreement", "flips", "logit_sqnr_db", "mcnemar", "images", "engine", "torch"):
        assert found[key] == report[key], key
    for name in ("fp32", "int8"):
        assert all(report[name][key] == value for key, value in found[name].items())
        assert found["file_bytes"][name] == report[name]["file_bytes"]
    for row, place in zip(found["ranges"], PLACES):
        kept = {"cv4": 2, "fc1": 2}.get(place, 1) * row["range"]
        expected = 255 if place == "input" else next(layer["range"] for layer in report["layers"]
                                                     if dict(zip(LAYERS, PLACES[1:]))[layer["name"]] == place)
        assert kept == pytest.approx(expected, rel=1e-6)
    assert f"same class {100 * report['agreement']:.2f} %, " in out


def test_run_says_it_in_the_terminal_too(swept):
    place, _, found, out = swept
    assert all(len(line) <= 80 for line in out.splitlines() if str(place.folder) not in line)
    guilty = next(row for row in found["ledger"] if row["hurts_most"])
    marked = line_with(out, "* ")
    assert marked.startswith(guilty["name"]) and f"{guilty['sqnr_db']['logits']:.1f}*" in marked
    assert f"* hurts most: quantizing {guilty['name']} alone changes the logits most.\n" in out
    for row in found["ledger"]:
        figures = line_with(out, f"{row['name']:<6}  ").split()[1:8]
        for figure, kind in zip(figures, ("int8", "inherited", "born", "weights", "biases", "rounding", "logits")):
            value = row["sqnr_db"][kind]
            assert figure.rstrip("*") == ("exact" if value is None else f"{value:.1f}"), kind
    for row in found["ranges"]:
        assert line_with(out, f"{row['place']:<6} {row['range']:>9.5g}").endswith(f"{row['number']:>6} {row['file']}")
    assert found["calibration_curve"][-1]["pictures"] == 6 and found["calibration_curve"][-1]["as_last"] is True
    for row in found["calibration_curve"]:
        line = line_with(out, f"{row['pictures']:>8} {100 * row['ranges']['input']:>5.1f} ")
        assert line.endswith(f"{100 * row['agreement']:>8.2f} %  {script.db(row['sqnr_db']):>10}")
    assert [row["layer"] for row in found["followed"]] == ["cnn1", "fc2"]
    for row in found["followed"]:
        assert f"followed: {row['layer']}'s channel {row['spot'][0]}" in out
    assert out.count("\n  picture  cat.0.jpg\n") == 2
    assert out.splitlines()[-1] == f"wrote {place.results}/report.png and explain.json"


def line_with(out, text):
    return next(line for line in out.splitlines() if text in line)


@pytest.mark.parametrize("weight_bit, bit", [(8, 8), (3, 8), (8, 3), (3, 3)])
def test_a_cell_of_the_grid_is_what_editing_the_bits_gives(swept, tmp_path, weight_bit, bit):
    _, edited, found, out = swept
    if (weight_bit, bit) != (8, 8):
        edited, _ = Place(tmp_path).report(WEIGHT_BIT=weight_bit, BIT=bit)
    assert [row["WEIGHT_BIT"] for row in found["bits"]] == [8, 3]
    row = next(row for row in found["bits"] if row["WEIGHT_BIT"] == weight_bit)
    assert [cell["BIT"] for cell in row["cells"]] == [8, 3]
    cell = next(cell for cell in row["cells"] if cell["BIT"] == bit)
    assert cell["top1"] == edited["int8"]["top1"] and cell["agreement"] == edited["agreement"]
    assert cell["sqnr_db"] == pytest.approx(edited["logit_sqnr_db"], abs=1e-6)
    if bit == 8:
        assert row["file_bytes"] == edited["int8"]["file_bytes"]
        assert line_with(out, f"W{weight_bit}    ").split() == [
            f"W{weight_bit}", *[f"{100 * each['agreement']:.2f}" for each in row["cells"]], f"{row['file_bytes']:,}"]
    assert f"{cell['sqnr_db']:.1f}" in out[out.index("How many bits?"):].split()


@pytest.fixture
def place(tmp_path):
    """A place with two pictures."""
    return Place(tmp_path, 2)


def test_picture_that_goes_during_the_sweep_ends_it(place, monkeypatch):
    monkeypatch.setattr(script, "KEEP_BYTES", 0)
    monkeypatch.setattr(script, "BATCH_SIZE", 1)
    monkeypatch.setattr(explain, "WIDTHS", (8,))
    pictures = script.CatDogDataset(place.val)
    folded = script.load_checkpoint(place.checkpoint).fused()
    fp32, _ = explain.calibrate_by_picture(folded, pictures)
    pixels = pictures.first(1)
    (place.val / "dog.0.jpg").unlink()
    with pytest.raises(script.InputError, match="came or went"):
        explain.bits_row(folded, pixels, pictures, fp32, 8)


def test_other_recipes_other_splits_and_odd_names(place):
    """Every branch of the tables: logits in integers, no equalizing, other calibration pictures, long names."""
    other = place.folder / "cat_dog" / "calibrate"
    shutil.copytree(place.val, other)
    (other / "cat.0.jpg").rename(other / f"cat.0.{'x' * 90}.jpg")
    (place.val / "cat.0.jpg").rename(place.val / f"cat.0.{'y' * 90}.jpg")
    status, out, err = explained(place, QUANTIZE_LOGITS=True, EQUALIZE=False, GPTQ=False, WEIGHT_BIT=4,
                                 PER_CHANNEL=False, CALIBRATION_SPLIT="calibrate", IMAGE_SIZE=(213, 227))
    assert (status, err) == (0, ""), err
    assert [line for line in out.splitlines() if len(line) > 80 and str(place.folder) not in line] == []
    found = json.loads((place.results / "explain.json").read_text())
    assert found["ledger"][-1]["codes"] == 255 and "stay FP32" not in out and "W4A8 Top1" in out
    assert found["ranges"][0]["number"] in (1, 2)
    assert found["ranges"][0]["file"] in [file.name for file in other.iterdir()]
    assert found["followed"][0]["file"].endswith("yyy.jpg")
    assert "How many bits?" not in out and "bits" not in found              # without --bits there is no grid


def refuse(place, *words, **constants):
    status, out, err = explained(place, **constants)
    one_line(status, err, *words)
    return out


def test_bad_input_ends_it_with_one_line_and_leaves_what_was_there(place, tmp_path):
    place.results.mkdir()
    for name in ("report.json", "explain.json", "report.png", "INT8_checkpoint.pth.tar"):
        (place.results / name).write_text(name)
    before = place.files()
    refuse(place, "BIT = 9", "2 to 8", BIT=9)
    refuse(place, "no checkpoint", "set CHECKPOINT", CHECKPOINT="nowhere.pth.tar")
    refuse(place, "no folder", "DATA_DIR", DATA_DIR="nowhere")
    assert "Top1" not in refuse(place, "cannot write", "set OUTPUT_DIR", OUTPUT_DIR="BEST_checkpoint.pth.tar")
    assert place.files() == before


def test_refused_write_leaves_nothing_of_its_own(place, monkeypatch):
    """The disk is full when the picture is written."""
    write = explain.Path.write_bytes

    def full(path, content):
        if path.name.startswith("explain.json"):
            raise OSError(28, "No space left on device")
        return write(path, content)

    monkeypatch.setattr(explain.Path, "write_bytes", full)
    refuse(place, "cannot write", "No space left on device", "OUTPUT_DIR")
    assert place.files() == {}


def started(place, **environment):
    """The process of explain.py as a user starts it."""
    place.edit()
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    return subprocess.Popen([sys.executable, start(place.folder)], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                            text=True, env=environment)


def stopped(process, place):
    """It ends as one that Ctrl-C ends, with one line, and writes nothing."""
    _, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (-signal.SIGINT, "stopped by Ctrl-C\n")
    assert place.files() == {}


@pytest.mark.parametrize("imports", [1, 300])
def test_ctrl_c_during_the_imports(place, imports):
    (place.folder / "sitecustomize.py").write_text(INTERRUPTED)
    stopped(started(place, PYTHONPATH=str(place.folder), IMPORTS=str(imports)), place)


def test_ctrl_c_in_the_run(place):
    process = started(place)
    for line in process.stdout:
        if line.startswith("Where do the ranges"):
            process.send_signal(signal.SIGINT)
            break
    stopped(process, place)


def test_closed_pipe(place):
    """`python tools/explain.py | head -1`."""
    process = started(place)
    process.stdout.readline()
    process.stdout.close()
    with process.stderr:
        assert process.stderr.read() == "" and process.wait(timeout=60) == 1
    assert place.files() == {}


# in a notebook

NOTEBOOK = """
import base64, pathlib, sys
from IPython.core.interactiveshell import InteractiveShell
from IPython.utils.capture import capture_output

folder = pathlib.Path(sys.argv[1])
file, picture = folder / "quantize_catdog.py", folder / "results" / "report.png"
shell = InteractiveShell.instance()
shell.run_cell("from quantize_catdog import *")
shell.run_cell("CNN_Model = current_recipe = 'of the notebook'; EQUALIZE, WEIGHT_BIT = False, 5")
before = dict(shell.user_ns)
for edit in ("", "WEIGHT_BIT = 'wide'", "WEIGHT_BIT = 5; del HEADROOM"):
    shell.run_cell(edit)
    if "del" in edit:
        file.write_text(file.read_text().replace("HEADROOM = 2 ", "HEADROOM = 99 "))
    with capture_output() as caught:
        shell.run_line_magic("run", str(folder / "tools" / "explain.py"))
    shown = [base64.b64decode(output.data["image/png"]) for output in caught.outputs if "image/png" in output.data]
    print(caught.stdout + caught.stderr)
    print("shown", len(shown), shown == [picture.read_bytes()])
    import quantize_catdog as module
    print("overwritten", [name for name, value in before.items() if hasattr(module, name) and name[0] != "_"
           and name not in edit and shell.user_ns[name] is not value])
"""


def test_under_a_notebooks_cell(place):
    """The picture is shown, the notebook's constants count, and its names stay what they were."""
    place.edit()
    start(place.folder)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "IPYTHONDIR": str(place.folder / "ipython")}
    done = subprocess.run([sys.executable, "-c", NOTEBOOK, place.folder], capture_output=True, text=True,
                          cwd=place.folder, env=environment)
    assert done.returncode == 0 and "Traceback" not in done.stdout, done.stdout + done.stderr
    first, wide, edited, rest = done.stdout.split("overwritten []\n")
    assert first.endswith("\nshown 1 True\n") and wide.endswith("\nshown 0 False\n") and rest == ""
    assert "EQUALIZE = False    # default: True\n" in first and "WEIGHT_BIT = 5    # default: 8\n" in first
    assert "W5A8 Top1: " in first and "report.png and explain.json\n" in first
    assert json.loads((place.results / "explain.json").read_text())["constants"]["WEIGHT_BIT"] == 5
    assert "\nInputError: WEIGHT_BIT = 'wide' in quantize_catdog.py" in wide
    # what no cell defines is the file's, as it is now
    assert "\nInputError: HEADROOM = 99 in quantize_catdog.py" in edited


def test_names_of_its_own_are_none_of_the_scripts():
    """%run puts them beside those of the notebook."""
    both = [name for name in vars(explain).keys() & vars(script).keys() if not name.startswith("__")]
    assert all(vars(explain)[name] is vars(script)[name] for name in both), both


# report.png

def outcome(labels, logits):
    files = [f"cat and co {i}.jpg" for i in range(len(labels))]
    return script.Outcome(files, labels, logits, 100 * (logits.argmax(1) == labels).double().mean().item())


def drawn(report, fp32, int8, folder, monkeypatch, histograms=None):
    """(Figure, its picture, {text written: its box in pixels}) of draw_report."""
    from matplotlib.figure import Figure
    from matplotlib.text import Text
    figures, texts, save, draw = [], [], Figure.savefig, Text.draw
    monkeypatch.setattr(Figure, "savefig", lambda self, *args, **how: (figures.append(self), save(self, *args, **how)))
    monkeypatch.setattr(Text, "draw", lambda self, renderer: (texts.append(self), draw(self, renderer)))
    histograms = histograms or {place: torch.ones(4 * explain.BINS, dtype=torch.long) for place in PLACES}
    picture = Image.open(io.BytesIO(explain.draw_report(report, histograms, fp32, int8, folder)))
    monkeypatch.undo()
    texts = [(text.get_text(), text.get_window_extent()) for text in texts if text.get_text().strip()]
    return figures[0], picture, texts


FULL_GRID = [{"WEIGHT_BIT": w, "file_bytes": 10_424_286, "cells": [
    {"BIT": a, "agreement": 0.99856, "sqnr_db": None if a == w == 8 else 2.5 * a + 3 * w - 21.35, "top1": 95.0}
    for a in range(8, 1, -1)]} for w in range(8, 1, -1)]


@pytest.mark.parametrize("sweep, flips, guilty", [(True, 0, guilty) for guilty in range(7)] + [
    (True, 3, 4), (True, 40, 4), (False, 0, 4), (False, 3, 4), (False, 40, 4)])
def test_no_text_in_the_picture_overlaps(swept, sweep, flips, guilty, monkeypatch):
    place, _, report, _ = swept
    report = report | {"bits": FULL_GRID} if sweep else {key: value for key, value in report.items() if key != "bits"}
    n = 60
    labels = torch.arange(n) % 2
    fp32 = torch.stack([1.0 - labels, labels.float()], 1) * torch.linspace(0.01, 12345, n)[:, None]
    int8 = fp32.clone()
    int8[:flips] = int8[:flips].flip(1)
    fp32, int8 = outcome(labels, fp32), outcome(labels, int8)
    fp32 = fp32._replace(files=[f"a dog $x_{{ 名前 {i}" * (i % 3 + 1) for i in range(n)])
    report["images"] = {"evaluated": 1234567, "calibrated": 6}
    report["flips"] = [None] * flips
    report["ledger"] = [row | {"hurts_most": i == guilty} for i, row in enumerate(report["ledger"])]
    report["calibration_curve"] = [report["calibration_curve"][0] | {"pictures": count} for count in (
        [1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000, 18000] if sweep else [1, 2, 5, 6])]
    _, picture, texts = drawn(report, fp32, int8, place.val, monkeypatch)
    assert picture.size == (1920, 1080)
    assert {"hurts most", "cv1", "same class"} <= {text for text, _ in texts} and len(texts) > 60
    for text, box in texts:
        assert box.x0 >= 0 and box.y0 >= 0 and box.x1 <= 1920 and box.y1 <= 1080, text
    for i, (text, box) in enumerate(texts):
        for other, its in texts[i + 1:]:
            width, height = min(box.x1, its.x1) - max(box.x0, its.x0), min(box.y1, its.y1) - max(box.y0, its.y0)
            assert width <= 1 or height <= 1, (text, other)


def test_picture_shows_what_changed(swept, monkeypatch):
    """Changed pictures first, the surest first; then those nearest to a change."""
    place, _, report, _ = swept
    margins = torch.tensor([5.0, 0.1, 3, 2, 0.2, 9])
    fp32 = outcome(torch.zeros(6, dtype=torch.long), torch.stack([margins, torch.zeros(6)], 1))
    int8 = fp32._replace(logits=torch.stack([margins * torch.tensor([1, 1, -1, -1, 1, 1]), torch.zeros(6)], 1))
    report = report | script.compare(fp32, int8)
    texts = [text for text, _ in drawn(report, fp32, int8, place.val, monkeypatch)[2]]
    captions = [text for text in texts if "\nFP32 " in text]
    assert [caption.split(" (")[0][-5] for caption in captions] == list("231405")
    assert "FP32 cat by 3.000\nINT8 dog by 3.000" in captions[0]
    assert any("in red" in text for text in texts) and any("4 of 6 pictures" in text for text in texts)


def test_clipped_part_is_drawn_beyond_the_range(swept, monkeypatch):
    from matplotlib.colors import to_rgb
    place, _, report, _ = swept
    counts = torch.zeros(4 * explain.BINS, dtype=torch.long)
    counts[2 * explain.BINS:3 * explain.BINS], counts[3 * explain.BINS + 40] = 1, 7     # 40 bins beyond the range
    labels = torch.zeros(3, dtype=torch.long)
    fp32 = outcome(labels, torch.rand(3, 2))
    figure = drawn(report, fp32, fp32, place.val, monkeypatch, dict.fromkeys(PLACES, counts))[0]
    axes = next(axes for axes in figure.axes if axes.get_title(loc="left") == "cv1")
    kept = [patch for patch in axes.patches if patch.get_facecolor()[:3] == to_rgb(explain.SKY)]
    clipped = [patch for patch in axes.patches if patch.get_facecolor()[:3] == to_rgb(explain.RED)]
    values, edges, _ = clipped[0].get_data()
    assert values[(edges[:-1] >= 1)].tolist() == pytest.approx([0, 7 / 1031] + [0] * 30)
    assert kept[0].get_data()[1][-1] == 1 and kept[0].zorder >= clipped[0].zorder
    assert [line.get_xdata()[0] for line in axes.lines] == [1]


def test_heat_map_has_the_grids_figures_in_its_cells(swept, monkeypatch):
    place, _, report, _ = swept
    fp32 = outcome(torch.zeros(3, dtype=torch.long), torch.rand(3, 2))
    rows = [dict(row, file_bytes=1000 * row["WEIGHT_BIT"]) for row in FULL_GRID]
    figure, _, texts = drawn(report | {"bits": rows}, fp32, fp32, place.val, monkeypatch)
    axes = next(axes for axes in figure.axes if "by bits" in axes.get_title(loc="left"))
    heat = axes.images[0].get_array()
    for labels in (axes.get_xticklabels(), axes.get_yticklabels()):
        assert [label.get_text() for label in labels] == list("8765432")
    cells = {tuple(map(round, text.get_position())): text.get_text() for text in axes.texts if "\n" in text.get_text()}
    assert len(cells) == 49
    for (column, row), text in cells.items():
        cell = FULL_GRID[row]["cells"][column]
        sqnr = cell["sqnr_db"]
        assert text == f"99.86\n{'exact' if sqnr is None else f'{sqnr:.1f}'}"
        assert heat[row, column] == (40 if sqnr is None else sqnr)
    for row in rows:
        assert f"{row['file_bytes']:,}" in [text for text, _ in texts]
