"""The script as its user meets it: a copy with edited constants is run, on good input and on bad."""
import contextlib
import copy
import io
import json
import math
import os
import platform
import re
import shutil
import struct
import subprocess
import sys
import time
import zipfile
import zlib
from pathlib import Path

import numpy as np
import PIL
import pytest
import quantize_catdog as script
import torch
from PIL import Image

import oracle
from helpers import (
    DEVICE,
    KERNELS,
    PICTURES,
    PIXELS,
    ROOT,
    SIZE,
    Pictures,
    Place,
    batches,
    default,
    loaded,
    one_line,
    png_header_that_promises,
    python,
    quantized,
    refused,
    run_here,
    to_tensor,
    with_kernel,
)

LAYERS = [row[0] for row in oracle.LAYERS]
VALUES = [16 * 220**2, 32 * 106**2, 16 * 51**2, 8 * 23**2, 512, 2]         # outputs of each layer for a picture
VNNI = pytest.mark.skipif(not KERNELS, reason="the INT8 kernels need a CPU with VNNI")

# one run, of few bits so that answers change, on disjoint splits of different size

def checksum(pixels):
    return zlib.crc32(pixels.contiguous().cpu().numpy().tobytes())

@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """(place, report, stdout, passes): [(class of the network, checksum of its pixels)] of the run's passes."""
    place, passes = Place(tmp_path_factory.mktemp("whole"), 40, calibration=26), []

    def note(module, inputs):
        if type(module).__name__ in ("CNN_Model", "INT8_Model"):
            passes.append((type(module).__name__, checksum(inputs[0])))
    hook = torch.nn.modules.module.register_module_forward_pre_hook(note)
    try:
        report, out = place.report("BIT=4", "WEIGHT_BIT=3")
    finally:
        hook.remove()
    return place, report, out, passes

def test_which_network_sees_which_pictures(whole):
    """One split calibrates and refines; the other one is counted, and its first pictures are for checks and times."""
    names = {}
    for split in (whole[0].train, whole[0].val):
        pixels = script.CatDogDataset(split).first_pixels(40)
        names |= {checksum(pixels[start:start + 5]): f"{split.name} {start}" for start in range(0, len(pixels), 5)}
        names[checksum(pixels[:20])] = f"{split.name} first 20"
    train, val = [[f"{split} {start}" for start in range(0, count, 5)] for split, count in (("train", 26), ("val", 40))]
    sample, fp32, int8 = ["val first 20"], "CNN_Model", "INT8_Model"
    timed = (len(whole[3]) - 32) // 2
    assert timed >= 10 and [(network, names.get(crc, "noise")) for network, crc in whole[3]] == [
        *[(fp32, name) for name in sample * 2 + train + val + train[:4] + sample * 2],      # refining, equalization
        *[(fp32, "val 0"), (int8, "val 0")] * timed, *[(int8, name) for name in val + sample * 2]]  # saved, loaded

def test_file_and_report_are_those_of_direct_calls(whole):
    """The INT8 network to the last byte, the report to the last figure, but for times."""
    place, report, _, _ = whole
    calibration, evaluation = script.CatDogDataset(place.train), script.CatDogDataset(place.val)
    recipe = script.read_constants(script.LEGAL_RECIPE) | {"BIT": 4, "WEIGHT_BIT": 3}
    folded = script.load_checkpoint(place.checkpoint).fused()
    calibrated = script.calibrate(folded, calibration)
    assert len(calibrated.files) == 26
    fp32 = script.evaluate("FP32", folded, evaluation)
    fp32_model, int8_model = script.quantize_network(folded, calibration.first_pixels(20), recipe)

    def change(model, other):
        with torch.inference_mode():
            return (model(evaluation.first_pixels(20)) - other(evaluation.first_pixels(20))).abs().max().item()
    int8_bytes = script.int8_checkpoint(int8_model)
    assert (place.results / "INT8_checkpoint.pth.tar").read_bytes() == int8_bytes
    found = script.compare(fp32, script.evaluate("INT8", int8_model, evaluation))
    ms = [report[name]["ms_per_image"] for name in ("fp32", "int8")]
    sizes = [place.checkpoint.stat().st_size, len(int8_bytes)]
    for name, time_, size in zip(("fp32", "int8"), ms, sizes):
        found[name] |= {"ms_per_image": time_, "file_bytes": size}
    lines = (place.results / "runs.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [report]
    expected = {
        **found, "constants": script.read_constants() | recipe, "recipe": recipe, "skipped": [],
        "torch": torch.__version__, "device": str(DEVICE), "engines": report["engines"],
        "numpy": np.__version__, "pillow": PIL.__version__, "batch_timed": script.BATCH_SIZE,
        "ranges": {name: folded.ranges[name].max().item() for name in script.ACTIVATIONS},
        "calibration_top1": calibrated.top1, "logit_changes": {
            "folding": change(script.load_checkpoint(place.checkpoint), folded),
            "equalization": change(folded, fp32_model), "saving": 0},
        "inputs": {"evaluation_crc": evaluation.checksum(), "calibration_crc": calibration.checksum(),
                   "checkpoint_crc": zlib.crc32(place.checkpoint.read_bytes())},
        "images": {"evaluated": 40, "calibrated": 26}, "layers": script.layer_table(int8_model),
        "speedup": ms[0] / ms[1], "busy": report["busy"], "when": report["when"]}
    assert report == json.loads(json.dumps(expected)) and min(ms) > 0
    assert abs(time.mktime(time.strptime(report["when"], "%Y-%m-%d %H:%M:%S")) - time.time()) < 3600

def test_run_is_the_oracles(whole, state):
    """Scales and weights follow from the FP32 weights; answers and their comparison from the integers in the file."""
    place, report, out, _ = whole
    recipe, weights = default(4, 3), {name: value.numpy() for name, value in state.items()}
    names = [f"{kind}.{i}.jpg" for i in range(20) for kind in ("cat", "dog")]
    evaluated, calibrating = [np.stack([np.asarray(Image.open(split / name).resize(SIZE)) for name in files]).transpose(
        0, 3, 1, 2) for split, files in ((place.val, names), (place.train, names[:26]))]
    saved = torch.load(place.results / "INT8_checkpoint.pth.tar", weights_only=True)["model"]
    saved = {name: value.numpy() for name, value in saved.items()}
    scales = {name: saved[f"scale_{name}"] for name in oracle.ACTIVATIONS}
    integers = {name: [saved[f"{name}.{key}"] for key in ("weight", "bias", "w_scale")] for name in LAYERS}

    calibrated = oracle.forward(weights, calibrating)
    ranges = oracle.ranges(calibrated)
    factors = {output: oracle.equalizing_factors(ranges[output]) for _, _, _, output in oracle.LAYERS[:-1]}
    expected = oracle.scales(recipe, {name: (ranges[name] * factors.get(name, 1)).max() for name in ranges})
    np.testing.assert_allclose([*scales.values()], [expected[name] for name in scales], rtol=1e-4)
    for name, bn, source, output in oracle.LAYERS:
        w, b = oracle.folded(weights, name, bn)
        written = factors.get(output, np.ones(len(w)))
        read = np.repeat(factors.get(source, np.ones(w.shape[1])), w.shape[1] // len(factors.get(source, w[0])))
        w = w * written.reshape(-1, *[1] * (w.ndim - 1)) / read.reshape(-1, *[1] * (w.ndim - 2))
        w8, _, w_scale = oracle.mended_weights(w, b * written, scales[source], recipe, name)
        np.testing.assert_allclose(integers[name][2], w_scale, rtol=1e-4)
        difference = np.abs(integers[name][0] - w8)
        assert (difference.max() <= 1 and difference.mean() < 1e-3) if not bn else difference.mean() < 0.5  # GPTQ's

    rows = []
    for name, _, source, output in oracle.LAYERS:
        weight, _, w_scale = integers[name]
        rows.append({"layer": name, "weight shape": "x".join(map(str, weight.shape)),
                     "output range": oracle.limits(recipe, output)[1] / scales[output], "scale in": scales[source],
                     "scale out": "FP32" if output == "fc2" else scales[output],
                     "smallest weight scale": w_scale.min(), "largest weight scale": w_scale.max(),
                     "bits of sum": int(oracle.largest_totals(recipe, name, integers).max()).bit_length()})
    assert report["layers"] == [{
        heading: cell if isinstance(cell, (str, int)) else pytest.approx(float(cell), rel=1e-6)
        for heading, cell in row.items()} for row in rows]

    labels = np.array([0, 1] * 20)
    logits = [oracle.forward(weights, evaluated)["fc2"], oracle.int8_pass(recipe, evaluated, scales, integers)[2]]
    classes = [each.argmax(1) for each in logits]
    for kind, answers in zip(("fp32", "int8"), classes):
        assert report[kind]["correct"] == (answers == labels).sum()
        assert report[kind]["top1"] == pytest.approx(100 * (answers == labels).mean())
        assert report[kind]["confusion"] == [[((labels == label) & (answers == answer)).sum() for answer in (0, 1)]
                                             for label in (0, 1)]
    flips = (classes[0] != classes[1]).nonzero()[0]
    corrected, broken = [int((each[flips] == labels[flips]).sum()) for each in reversed(classes)]
    assert corrected + broken == len(flips) and broken > corrected > 0
    assert [(flip["file"], flip["label"], flip["effect"]) for flip in report["flips"]] == [
        (names[i], names[i][:3], "corrected" if classes[1][i] == labels[i] else "broken") for i in flips]
    for i, flip in zip(flips, report["flips"]):
        np.testing.assert_allclose(flip["fp32_logits"], logits[0][i], atol=1e-4)
        np.testing.assert_allclose(flip["int8_logits"], logits[1][i], rtol=1e-6)
        assert flip["fp32_margin"] == pytest.approx(abs(logits[0][i][0] - logits[0][i][1]), abs=2e-4)
    assert report["agreement"] == pytest.approx(1 - len(flips) / 40)
    assert (report["mcnemar"]["corrected"], report["mcnemar"]["broken"]) == (corrected, broken)
    noise = ((logits[0] - logits[1])**2).sum()
    assert report["logit_sqnr_db"] == pytest.approx(10 * math.log10((logits[0]**2).sum() / noise), rel=1e-4)

    top1 = [(calibrated["fc2"].argmax(1) == labels[:26]).mean(), *[(each == labels).mean() for each in classes]]
    lines = re.findall(r"(?m)^(.*) Top1: ([\d.]+), (\d+) of \3 pictures of (.*)$", out)
    assert [(name, count, split) for name, _, count, split in lines] == [
        ("FP32", "26", "cat_dog/train"), ("FP32", "40", "cat_dog/val"), ("W3A4", "40", "cat_dog/val")]
    np.testing.assert_allclose([float(line[1]) for line in lines], 100 * np.array(top1), atol=1e-3)
    printed = re.findall(r"(?m)^range_(\w+) +([\d.]+)$", out)
    np.testing.assert_allclose([float(value) for _, value in printed], [ranges[name].max() for name, _ in printed],
                               rtol=1e-4)
    assert [name for name, _ in printed] == oracle.ACTIVATIONS

def test_terminal(usual):
    place, report, out = usual
    assert ("\ncalibrating on cat_dog/train: 6 pictures, 3 cat, 3 dog\n"
            "evaluating on  cat_dog/val: 6 pictures, 3 cat, 3 dog\n") in out
    assert out.endswith("\nsaving changed a logit by at most 0, on 6 pictures\n"
                        "wrote results/INT8_checkpoint.pth.tar and report.json\n"
                        "python tools/runs.py OUTPUT_DIR=results compares all runs written there\n")
    assert str(place.folder) not in out
    assert report["constants"]["BATCH_SIZE"] == 4 and report["logit_sqnr_db"] > 15
    sizes = [path.stat().st_size for path in (place.checkpoint, place.results / "INT8_checkpoint.pth.tar")]
    assert re.findall(r"(?m)^ *(FP32|INT8) .* ([\d,]+)$", out) == [
        ("FP32", f"{sizes[0]:,}"), ("INT8", f"{sizes[1]:,}")]
    assert 0.19 < sizes[1] / sizes[0] < 0.22
    if KERNELS:
        assert [row["engine"] for row in report["engines"]][:4] == ["kernel"] * 4
        for name, compared in zip(LAYERS[:4], VALUES):
            line = rf"\n *{name} +{6 * compared:,} +0 +kernel +exact, and faster here than the reference\n"
            assert re.search(line, out)
        assert [row["layer"] for row in report["engines"]] == LAYERS
        assert [(row["compared"], row["different"]) for row in report["engines"]] == [(6 * n, 0) for n in VALUES]

def test_wilson_interval():
    """Against values worked out by hand from the formula in Wilson (1927)."""
    assert script.wilson(97, 100) == pytest.approx((91.548, 98.974), abs=2e-3)
    assert script.wilson(0, 10) == pytest.approx((0, 27.753), abs=2e-3)
    assert script.wilson(10, 10) == pytest.approx((72.247, 100), abs=2e-3)
    for n in range(1, 500):
        assert script.wilson(0, n)[0] >= 0 and script.wilson(n, n)[1] <= 100

def test_networks_are_timed_in_turns(monkeypatch):
    """Two networks that take 8 and 2 seconds, but for a first time that takes longer."""
    now, calls = [0.0], []

    def network(name, seconds):
        def run(pixels):
            now[0] += seconds + 1000 * (name not in calls)
            calls.append(name)
            return pixels
        return run
    monkeypatch.setattr(script.time, "perf_counter", lambda: now[0])
    networks = {"fp32": network("fp32", 8), "int8": network("int8", 2)}
    assert script.time_in_turns(networks, torch.zeros(4, 3, 2, 2), 3) == {"fp32": [1008, 8, 8], "int8": [1002, 2, 2]}
    assert calls == ["fp32", "int8"] * 3

@pytest.mark.parametrize("slowest, busy", [(0.0079, False), (0.0081, True)])        # twice 0.004
def test_the_fastest_round_counts_and_rounds_that_differ_mean_a_busy_machine(place, slowest, busy):
    """Five pictures a batch; more than a factor of two between the rounds of a network is told in the summary."""
    report, out = place.report(inserted=("Verify", f"""
def time_in_turns(functions, x, rounds):
    times = {{"fp32": [0.005, 0.004, {slowest}], "int8": [0.001] * 3, "kernel": [1], "reference": [2]}}
    return {{name: times[name] for name in functions}}"""))
    assert [report[name]["ms_per_image"] for name in ("fp32", "int8")] == pytest.approx([0.8, 0.2])
    assert report["speedup"] == pytest.approx(4) and report["busy"] == busy
    assert ("\nThe times varied by more than a factor of 2: " in out) == busy
    assert {row["engine"] for row in report["engines"]} <= {"kernel"} or not KERNELS

# the INT8 engine

@pytest.mark.parametrize("largest", [2**24 - 1, 2**24])
def test_sums_that_fp32_cannot_hold_are_computed_in_fp64(largest):
    """FP32 holds every integer up to 2^24."""
    unsigned = script.int_range(8, unsigned=True)
    layer = script.INT8Layer((1, 500), 1, unsigned, None)
    layer.weight.fill_(127)
    layer.bias.fill_(500 * 127 * 255 - largest)
    assert layer.largest_sum().tolist() == [largest] and layer.prepare(1, 1).fp32_is_exact == (largest < 2**24)
    rng = np.random.default_rng(3)
    layer = script.INT8Layer((16, 40, 5, 5), 16, unsigned, None)
    layer.weight.copy_(torch.from_numpy(rng.integers(100, 128, (16, 40, 5, 5)).astype(np.int8)))
    x = torch.from_numpy(rng.integers(200, 256, (2, 40, 20, 20)).astype(np.uint8))
    exact = oracle.linear(x.numpy().astype(np.float64), layer.weight.numpy().astype(np.float64))
    found = layer.prepare(1, 1).sums(x)
    assert exact.min() > 2**24 and torch.equal(found, torch.from_numpy(exact.astype(np.float32)))

def engine_checks(paths):
    """For each INT8 checkpoint and each INT8_ENGINE, and with kernels alone ("kernel"), what `choose_engines` says, and
    the values' checksum."""
    pixels, rows = script.CatDogDataset(PICTURES).first_pixels(2), []
    for path in paths:
        row = {}
        for engine in ("reference", "kernel", "auto"):
            script.INT8_ENGINE = engine.replace("kernel", "auto")
            model = script.load_int8_checkpoint(path)
            checks = script.choose_engines(model, pixels)
            if engine == "kernel":
                model.prepare(LAYERS)
            crc = 0
            for values in script.activations_of(model, pixels).values():
                crc = zlib.crc32(values.contiguous().numpy().tobytes(), crc)
            row[engine] = {"checks": {check["layer"]: check for check in checks}, "crc": crc}
        rows.append(row)
    return rows

WIDTHS = [{"WEIGHT_BIT": 8}, {"WEIGHT_BIT": 7}, {"WEIGHT_BIT": 7, "LAYER_BITS": {"cnn2": 8}}]

@pytest.fixture(scope="module")
def widths(tmp_path_factory, state):
    """For each of WIDTHS (INT8 checkpoint, checksum of the values that the reference makes here)."""
    found = []
    for recipe in WIDTHS:
        path = tmp_path_factory.mktemp("widths") / "c.pth.tar"
        path.write_bytes(script.int8_checkpoint(quantized(state, **recipe)[0]))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(script, "INT8_ENGINE", "auto")
            found.append((path, engine_checks([path])[0]["reference"]["crc"]))
    assert len({crc for _, crc in found}) == 3
    return found

def has(flag):
    return Path("/proc/cpuinfo").exists() and flag in Path("/proc/cpuinfo").read_text().split()

@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="x86 alone has CPUs that saturate")
@pytest.mark.parametrize("isa, saturates", [
    ("AVX2", True), ("AVX512_CORE", True),
    pytest.param("AVX2_VNNI", False, marks=pytest.mark.skipif(not has("avx_vnni"), reason="no AVX2_VNNI here"))])
def test_engine_on_other_processors(widths, isa, saturates):
    """The same integers on each. Where kernels saturate, layers of 8-bit weights take the reference, and no others."""
    paths = [str(path) for path, _ in widths]
    driver = f"import json, test_script\nprint(json.dumps(test_script.engine_checks({paths})))"
    status, out, err = python("-c", driver, environment={"ONEDNN_MAX_CPU_ISA": isa})
    assert status == 0, err
    for recipe, (_, crc), row in zip(WIDTHS, widths, json.loads(out), strict=True):
        wide = [name for name in LAYERS if recipe.get("LAYER_BITS", {}).get(name, recipe["WEIGHT_BIT"]) == 8]
        auto = row["auto"]["checks"]
        assert row["reference"]["crc"] == row["auto"]["crc"] == crc
        assert (row["kernel"]["crc"] != crc) == bool(saturates and wide)
        for name, compared in zip(LAYERS, VALUES):
            assert auto[name]["compared"] == 2 * compared
            wrong = "VNNI" in auto[name]["why"] and "WEIGHT_BIT = 7" in auto[name]["why"]
            # few weights of fc2 and of cnn1 may have no pair that overflows
            assert wrong == (saturates and name in wide) or name in ("cnn1", "fc2") and not wrong
            assert auto[name]["engine"] == ("reference" if wrong else auto[name]["engine"])
            assert wrong or auto[name]["different"] == 0
            assert wrong or name not in ("cnn1", "cnn2") or auto[name]["engine"] == "kernel"

def kernel_changed(monkeypatch, change):
    """Let `change(layer, y)` change what the kernels answer."""
    run_kernel = script.INT8Layer.run_kernel

    def changed(layer, x):
        y = run_kernel(layer, x)
        change(layer, y)
        return y
    monkeypatch.setattr(script.INT8Layer, "run_kernel", changed)

@VNNI
def test_a_single_different_value_is_noticed(monkeypatch, state):
    """Its layer alone takes the reference. Also where no engine was chosen: the first pass checks it on noise."""
    int8, pixels = quantized(state)
    assert [row["different"] for row in script.choose_engines(int8, pixels)] == [0] * 6
    assert with_kernel(int8)[:4] == LAYERS[:4]

    def off_by_one(layer, y):
        if y.shape[1:] == (8, 23, 23):                      # cnn4
            y[0, 0, 0, 0] += 1
    kernel_changed(monkeypatch, off_by_one)
    for _ in range(2):                                      # a cell that is run again checks as much as before
        rows = script.choose_engines(int8, pixels)
        assert [row["different"] for row in rows] == [0, 0, 0, 1, 0, 0] and with_kernel(int8)[:3] == LAYERS[:3]
        assert rows[3]["engine"] == "reference" and "other integers" in rows[3]["why"]
        assert "cnn4" not in with_kernel(int8)
    unused = copy.deepcopy(int8)
    with torch.no_grad():
        assert torch.equal(unused(pixels), int8(pixels)) and "cnn4" not in with_kernel(unused)

def test_each_layer_is_compared_on_what_it_reads(monkeypatch, state):
    int8, pixels = quantized(state)
    seen = {}

    def note(model, layer, x, expected):
        seen[layer.output] = x, expected
        return False, "", None
    monkeypatch.setattr(script, "judge_kernel", note)
    script.choose_engines(int8, pixels)
    assert with_kernel(int8) == []
    values = script.activations_of(int8, pixels)
    assert torch.equal(seen["cv1"][0], values["input"]) and torch.equal(seen["fc2"][0], values["fc1"])
    for name, (_, expected) in seen.items():
        assert torch.equal(expected, values[name]), name

@VNNI
@pytest.mark.parametrize("name", ["cnn1", "cnn4", "fc1"])
def test_kernels_that_overflow_are_not_taken_though_the_pictures_agree(monkeypatch, state, name):
    """In one output channel of one layer, where all inputs are at their largest."""
    int8, pixels = quantized(state)
    width = len(int8.get_submodule(name).bias)

    def overflows(layer, y):
        if layer.outputs is None and y.shape[1] == width:
            y[:, -1] -= 1
    kernel_changed(monkeypatch, overflows)
    check = script.choose_engines(int8, pixels)[LAYERS.index(name)]
    assert check["different"] == 0 < check["compared"] and "WEIGHT_BIT = 7" in check["why"]
    assert name not in with_kernel(int8) and "cnn2" in with_kernel(int8)

@pytest.mark.parametrize("error", [AttributeError, RuntimeError, NotImplementedError])
def test_missing_kernels(monkeypatch, state, error):
    int8, pixels = quantized(state)

    def missing(*_):
        raise error("'_OpNamespace' 'onednn' object has no attribute 'qconv_prepack'")
    monkeypatch.setattr(script.INT8Layer, "pack_kernel", missing)
    for row in script.choose_engines(int8, pixels):
        assert row["engine"] == "reference" and "no kernel" in row["why"] and row["compared"] == 0
    assert with_kernel(int8) == []
    monkeypatch.setattr(script, "INT8_ENGINE", "reference")
    expected = {"engine": "reference", "compared": 0, "different": 0, "why": 'INT8_ENGINE = "reference"'}
    assert script.choose_engines(int8, pixels) == [{"layer": name} | expected for name in LAYERS]
    assert with_kernel(int8) == []

@pytest.mark.parametrize("where, error", [
    ("pack_kernel", NameError), ("run_kernel", TypeError), ("sums", NameError), ("rescale", AttributeError)])
def test_mistakes_of_our_own_are_no_missing_kernels(monkeypatch, state, where, error):
    """Guarded is only against what torch raises where it has none; the reference is not guarded."""
    int8, pixels = quantized(state)

    def mistaken(*_):
        raise error("a mistake of our own")
    monkeypatch.setattr(script.INT8Layer, where, mistaken)
    with pytest.raises(error, match="of our own"), torch.no_grad():
        int8(pixels)

@pytest.mark.parametrize("changes, name, layers, size", [
    (dict(WEIGHT_BIT=4), "W4A8", dict.fromkeys(LAYERS, 7), 0.75),
    (dict(LAYER_BITS={"fc1": 4}), "W4-8A8", dict.fromkeys(LAYERS, 127) | {"fc1": 7}, 0.6)], ids=str)
def test_fewer_bits_of_weights(place, usual, changes, name, layers, size):
    """They are named throughout, and make the file smaller; nothing is faster."""
    report, out = place.report(BATCH_SIZE=4, **changes)
    assert not re.search("INT8(?!_ENGINE|_checkpoint)", out)        # in the names of a constant and of the file alone
    for line in (rf"{name} Top1: [\d.]+, 6 of 6 pictures of cat_dog/val", rf" *{name} +[\d.]+ %.*",
                 rf"same class .* {name} [\d.]+ times as fast"):
        assert re.search(rf"(?m)^{line}$", out), line
    tensors = torch.load(place.results / "INT8_checkpoint.pth.tar", weights_only=True)["model"]
    assert {layer: int(tensors[f"{layer}.weight"].abs().max()) for layer in LAYERS} == layers
    assert report["int8"]["file_bytes"] < size * usual[1]["int8"]["file_bytes"]
    assert [row["compared"] for row in report["engines"]] == [row["compared"] for row in usual[1]["engines"]]
    if KERNELS or "WEIGHT_BIT" in changes:
        assert [row["different"] for row in report["engines"]] == [0] * 6

@pytest.mark.parametrize("weight_bit, bit, layer_bits, name", [
    (8, 8, {}, "INT8"), (4, 8, {}, "W4A8"), (8, 4, {}, "W8A4"), (2, 2, {}, "W2A2"), (8, 8, {"fc1": 4}, "W4-8A8"),
    (4, 8, {"fc1": 8}, "W4-8A8"), (4, 8, {"fc1": 4}, "W4A8"), (8, 8, {"fc1": 8}, "INT8"), (8, 7, {"cnn1": 8}, "W8A7"),
    (5, 8, {"cnn1": 8, "fc1": 2, "fc2": 4}, "W2-8A8"), (8, 8, dict.fromkeys(LAYERS, 4), "W4A8"),
    (4, 8, dict.fromkeys(LAYERS, 8), "INT8")], ids=str)
def test_name_of_a_recipe(weight_bit, bit, layer_bits, name):
    assert script.name_of({"WEIGHT_BIT": weight_bit, "BIT": bit, "LAYER_BITS": layer_bits}) == name

def test_one_split_for_both(place, usual):
    """It is passed through once in FP32, and the ranges are its own."""
    report, out = place.report(CALIBRATION_SPLIT="val")
    assert report["inputs"]["calibration_crc"] == report["inputs"]["evaluation_crc"]
    assert [report["fp32"][key] for key in ("correct", "confusion")] == [
        usual[1]["fp32"][key] for key in ("correct", "confusion")]
    assert all(row["output range"] != other["output range"] for row, other in zip(report["layers"], usual[1]["layers"]))
    assert len(re.findall(r"(?m)^FP32 Top1: ", out)) == 1

# pictures

@pytest.fixture
def decoded(monkeypatch):
    """The names of the files that are decoded from now on."""
    names, decode = [], script.decode

    def count(path, size):
        names.append(path.name)
        return decode(path, size)
    monkeypatch.setattr(script, "decode", count)
    return names

def all_of(pictures, size=5):
    """(pixels, labels) of a pass."""
    pixels, labels = zip(*batches(pictures, size))
    return torch.cat(pixels), torch.cat(labels).tolist()

def test_pictures_are_decoded_once(tmp_path, monkeypatch, decoded):
    """In passes of any batch size and looked at alone. What does not fit KEEP_BYTES is decoded again, to the same."""
    folder = Place(tmp_path, 80).val
    pictures = script.CatDogDataset(folder)
    pixels, labels = all_of(pictures, 60)
    assert sorted(decoded) == sorted(pictures.files) and len(decoded) == 80 and labels == [0, 1] * 40
    with Image.open(folder / "dog.3.jpg") as image:
        assert np.array_equal(pixels[7].permute(1, 2, 0), np.asarray(image.resize(SIZE)))
    assert torch.equal(pictures.first_pixels(20).cpu(), pixels[:20]) and torch.equal(pictures[7][0], pixels[7])
    assert torch.equal(all_of(pictures, 7)[0], pixels) and len(decoded) == 80
    monkeypatch.setattr(script, "KEEP_BYTES", 70 * 224 * 224 * 3)
    pictures = script.CatDogDataset(folder)
    for count in (80, 10, 10):
        decoded.clear()
        assert torch.equal(all_of(pictures)[0], pixels) and (len(decoded), len(pictures.kept)) == (count, 70)

def test_first_pixels_are_of_good_pictures_and_no_more_are_decoded_than_needed(tmp_path, decoded):
    place = Place(tmp_path, 20)
    expected = script.CatDogDataset(place.val).first_pixels(7)
    assert len(expected) == 7 == len(decoded)
    for i in range(8):
        (place.val / f"cat.0.{i}.jpg").write_bytes(b"broken")
    assert torch.equal(script.CatDogDataset(place.val).first_pixels(7), expected) and len(decoded) <= 7 + 3 * 7
    assert len(script.CatDogDataset(place.val).first_pixels(50)) == 20

def test_pixels_are_those_of_the_file_whatever_its_index(place, decoded):
    """A dataset that loses files after a pass, or is put into another order, as programs do for a subset."""
    pictures = script.CatDogDataset(place.val)
    pixels = dict(zip(pictures.files, all_of(pictures)[0]))
    for file in ("cat.0.jpg", "dog.1.jpg"):
        del pictures.labels[pictures.files.index(file)]
        pictures.files.remove(file)
    pictures.files.reverse()
    pictures.labels.reverse()
    found, labels = all_of(pictures)
    assert torch.equal(found, torch.stack([pixels[file] for file in pictures.files])) and len(decoded) == 6
    assert labels == [int("dog" in file) for file in pictures.files] and len(pictures) == 4

# a program of one's own; prints for each way of loading the sizes of the batches and (label, checksum) of each picture
LOADING = """
import itertools, json, sys, zlib
import torch
from torch.utils.data import DataLoader
from quantize_catdog import CatDogDataset

if __name__ == "__main__":
    pictures, found = CatDogDataset(sys.argv[1]), []
    for workers, shuffle, collate in itertools.product((0, 2), (False, True), (None, pictures.collate_fn)):
        torch.manual_seed(0)
        sizes, items = [], []
        for pixels, labels in DataLoader(pictures, batch_size=8, shuffle=shuffle, num_workers=workers,
                                         collate_fn=collate):
            assert pixels.dtype == torch.uint8 and labels.dtype == torch.int64
            sizes.append(list(pixels.shape))
            items += [(label, zlib.crc32(each.contiguous().numpy().tobytes()))
                      for each, label in zip(pixels, labels.tolist())]
        found.append((sizes, items))
    print(json.dumps(found))
"""

def test_data_loader_of_torch(tmp_path):
    """In this process and with workers, in order and shuffled, with torch's collation and ours. What cannot be decoded
    is left out of its batch."""
    place = Place(tmp_path, 20)
    for name in ("cat.2.jpg", "dog.9.jpg"):
        (place.val / name).write_bytes(b"broken")
    status, out, err = python("-c", LOADING, place.val)
    assert (status, err) == (0, "")
    files = [f"{kind}.{i}.jpg" for i in range(10) for kind in ("cat", "dog")]
    expected = [[int("dog" in file), checksum(to_tensor([script.decode(place.val / file, SIZE)]))]
                for file in files if file not in ("cat.2.jpg", "dog.9.jpg")]
    found = json.loads(out)
    for i, (sizes, items) in enumerate(found):
        assert sum(size[0] for size in sizes) == 18 and all(size[1:] == [3, 224, 224] for size in sizes)
        if i // 2 % 2:
            assert sorted(items) == sorted(expected) and items != expected and len(sizes) == 3
        else:
            assert items == expected and [size[0] for size in sizes] == [7, 8, 3]
    assert len(found) == 8 and found[2] == found[3] == found[6] == found[7]

def test_items_of_a_dataset(place):
    (place.val / "dog.1.jpg").write_bytes(b"broken")
    pictures = script.CatDogDataset(place.val)
    assert len(pictures) == 6
    pixels, label = pictures[1]
    assert torch.equal(pixels, to_tensor([script.decode(place.val / "dog.0.jpg", SIZE)])[0]) and label == 1
    with pytest.raises(script.InputError, match="^dog.1.jpg cannot be decoded: "):
        pictures[3]
    assert [len(items) for items in (pictures.__getitems__([0, 3, 2]), pictures.__getitems__([3]))] == [2, 0]
    pixels, labels = pictures.collate_fn([])
    assert pixels.shape == (0, 3, 224, 224) and labels.shape == (0,) and labels.dtype == torch.int64
    assert pictures.usable() == [(file, int("dog" in file)) for file in pictures.files if file != "dog.1.jpg"]

@pytest.mark.parametrize("name, label", [
    ("cat.0.jpg", 0), ("dog.12.jpg", 1), ("Cat_7.PNG", 0), ("my dogs 3.jpg", 1), ("DOG.jpeg", 1),
    ("bird.1.jpg", None), ("cat_and_dog.jpg", None), ("catalog.jpg", None), ("hotdog.jpg", None), ("1.jpg", None),
    ("Cat/0.jpg", 0), ("DOGS/part 2/0.jpg", 1), ("Cat/dog.1.jpg", 1),
    ("cats and dogs/dog/1.jpg", 1), ("dogs-vs-cats/train/cat.7.jpg", 0), ("dogs-vs-cats/train/7.jpg", None),
    ("caté.jpg", None), ("cats/猫.jpg", 0),
    ("catss.jpg", None), ("5dog7.jpg", 1)])
def test_label_from_name(name, label):
    """The part of the path nearest to the file decides. Where none does, it is said whether that is neither or both."""
    if label is None:
        both = "and" in name or "vs" in name
        words = " says cat and dog$" if both else "^its path says neither cat nor dog$"
        with pytest.raises(script.InputError, match=words):
            script.label_of(name)
    else:
        assert script.label_of(name) == label

def grey(value, size=(8, 6)):
    return Image.new("L", size, value)

def wide(value):
    return Image.fromarray(np.full((6, 8), value, np.uint16))

def bmp_with_alpha(bgra):
    """A BMP file of 8 x 6 pixels of one colour, with masks for four channels."""
    masks = struct.pack("<LLLL", 0xff0000, 0xff00, 0xff, 0xff000000)
    info = struct.pack("<LllHHLLllLL", 108, 8, 6, 1, 32, 3, 192, 2835, 2835, 0, 0) + masks + b"BGRs" + bytes(48)
    return b"BM" + struct.pack("<LHHL", 122 + 192, 0, 0, 122) + info + bytes(bgra) * 48

@pytest.mark.parametrize("kind, make, expected", [
    ("L.png", lambda path: grey(77).save(path), (77, 77, 77)),
    ("P.png", lambda path: Image.new("RGB", (8, 6), (200, 30, 90)).quantize(4).save(path), (200, 30, 90)),
    ("RGBA.png", lambda path: Image.new("RGBA", (8, 6), (255, 0, 0, 0)).save(path), (255, 255, 255)),
    ("RGBA-half.png", lambda path: Image.new("RGBA", (8, 6), (255, 0, 0, 128)).save(path), (255, 127, 127)),
    ("LA.png", lambda path: Image.new("LA", (8, 6), (10, 255)).save(path), (10, 10, 10)),
    ("P-transparent.png", lambda path: Image.new("P", (8, 6), 0).save(path, transparency=0), (255, 255, 255)),
    ("CMYK.jpg", lambda path: Image.new("CMYK", (8, 6), (0, 255, 255, 0)).save(path), (255, 0, 0)),
    ("16.png", lambda path: wide(100 * 257).save(path), (100, 100, 100)),
    ("16.tif", lambda path: wide(200 * 257).save(path), (200, 200, 200)),
    ("1.png", lambda path: Image.new("1", (8, 6), 1).save(path), (255, 255, 255)),
    ("animated.gif", lambda path: grey(50).save(path, save_all=True, append_images=[grey(200)]), (50, 50, 50)),
    ("animated.webp", lambda path: grey(50).convert("RGB").save(path, save_all=True, lossless=True, append_images=[
        grey(200).convert("RGB")]), (50, 50, 50)),
    ("LA-clear.png", lambda path: Image.new("LA", (8, 6), (10, 0)).save(path), (255, 255, 255)),
    ("RGB-clear.png", lambda path: Image.new("RGB", (8, 6), (1, 2, 3)).save(path, transparency=(1, 2, 3)), (255,) * 3),
    ("16-between.png", lambda path: wide(999).save(path), (4, 4, 4)),
    ("16.pgm", lambda path: path.write_bytes(b"P5 8 6 65535 " + bytes([100]) * 96), (100, 100, 100)),
    ("alpha-0.bmp", lambda path: path.write_bytes(bmp_with_alpha((9, 99, 199, 0))), (199, 99, 9)),
    ("alpha.bmp", lambda path: path.write_bytes(bmp_with_alpha((9, 99, 199, 255))), (199, 99, 9)),
])
def test_odd_pictures_are_decoded_as_a_viewer_shows_them(tmp_path, kind, make, expected):
    """Given as a path, and given as the picture that Pillow opens, which stays as it is."""
    make(tmp_path / kind)
    pixels = script.decode(tmp_path / kind, SIZE)
    assert pixels.shape == (224, 224, 3) and pixels.dtype == np.uint8
    assert np.abs(pixels.astype(int) - expected).max() <= (4 if kind.endswith("jpg") else 0)
    with Image.open(tmp_path / kind) as image:
        before = image.mode, image.size, image.tobytes()
        assert np.array_equal(script.decode(image, SIZE), pixels)
        assert (image.mode, image.size, image.tobytes()) == before

@pytest.mark.parametrize("mode, value", [("F", 0.5), ("I", 70000), ("I", -5000)])
def test_pixels_of_no_known_white_are_refused(tmp_path, mode, value):
    """They would be all white or all black. Given as an array they are refused as well."""
    Image.new(mode, (8, 6), value).save(tmp_path / "cat.tif")
    with pytest.raises(script.InputError, match="^has 32-bit pixels"):
        script.decode(tmp_path / "cat.tif", SIZE)
    with Image.open(tmp_path / "cat.tif") as image, pytest.raises(script.InputError, match="^has 32-bit pixels"):
        script.decode(np.asarray(image), SIZE)

def test_unusable_files_are_left_out_and_named(place, usual):
    jpeg = (PICTURES / "cat.9.jpg").read_bytes()
    postscript = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n"     # would start Ghostscript
    bad = {"cat.9.jpg": (jpeg[:len(jpeg) // 2], "truncated"), "dog.9.jpg": (b"no picture", "identify"),
           "cat.10.jpg": (b"", "identify"), "cat.11.jpg": (postscript, "identify"), "bird.1.jpg": (jpeg, "neither"),
           "cat-dog.jpg": (jpeg, "says cat and dog"), "dog.10.png": (png_header_that_promises(60000, 60000), "Bomb"),
           "dog.11.png": (png_header_that_promises(9000, 9000), "81,000,000 pixels: from 1 to 67,108,864 are possible")}
    for name, (content, _) in bad.items():
        (place.val / name).write_bytes(content)
    os.mkfifo(place.val / "cat.pipe.jpg")                   # to open it would wait for ever
    for i, target in enumerate(("nowhere", "dog.link1.jpg", "x" * 300)):        # the second is a link to itself
        (place.val / f"dog.link{i}.jpg").symlink_to(target)
    # those decoded together may all be broken
    report, out = place.report(BATCH_SIZE=4, DECODED_TOGETHER=1)
    reasons = {row["file"]: row["reason"] for row in report["skipped"]}
    expected = {name: words for name, (_, words) in bad.items()} | dict.fromkeys(
        ("cat.pipe.jpg", "dog.link0.jpg", "dog.link1.jpg", "dog.link2.jpg"), "is not a file")
    assert set(reasons) == {f"cat_dog/val/{name}" for name in expected} and "files left out: 12;" in out
    assert all(words in reasons[f"cat_dog/val/{name}"] for name, words in expected.items())
    assert all(script.shorten(name, 78) in out for name in reasons)
    good = usual[1]
    assert report["images"]["evaluated"] == 6 and report["fp32"]["correct"] == good["fp32"]["correct"]
    assert report["layers"] == good["layers"]
    shutil.rmtree(place.train)
    place.val.rename(place.train)                           # the same among the pictures that calibrate
    shutil.copytree(usual[0].train, place.val)
    report, out = place.report(BATCH_SIZE=4, DECODED_TOGETHER=1)
    assert {row["file"].replace("train", "val"): row["reason"].replace("cat_dog/train", "cat_dog/val")
            for row in report["skipped"]} == reasons
    assert report["images"] == {"evaluated": 6, "calibrated": 6} and "files left out: 12;" in out

def test_two_folders_of_one_name_have_their_own_left_out_files(place):
    for kind, split, words in (("a", place.train, "no picture"), ("b", place.val, "no picture either")):
        shutil.copytree(split, place.folder / kind / "val")
        (place.folder / kind / "val" / "cat.9.jpg").write_text(words)
    report, out = place.report(DATA_DIR=".", CALIBRATION_SPLIT="a/val", EVALUATION_SPLIT="b/val")
    expected = ["a/val/cat.9.jpg", "b/val/cat.9.jpg"]
    assert [row["file"] for row in report["skipped"]] == expected and "files left out: 2;" in out
    assert all(f"{place.folder}/{file}" in row["reason"] for file, row in zip(expected, report["skipped"]))

@pytest.mark.parametrize("split", ["train", "val"])
def test_no_usable_picture(place, split):
    """One line, whatever a file is called."""
    folder, words = getattr(place, split), ("no usable picture", f"cat_dog/{split}", "set DATA_DIR")
    shutil.rmtree(folder)
    place.refuse(*words, "No such file")
    folder.mkdir()
    place.refuse(*words)
    for name in ("cat\n\x1b[2J0.jpg", "cat.0.jpg"):
        (folder / name).write_text("no picture")
        place.refuse(*words, "cat")
        (folder / name).unlink()

# constants

def test_home_folder(place, monkeypatch, usual, tmp_path_factory):
    home = tmp_path_factory.mktemp("home")
    place.val.parent.rename(home / "pictures")
    place.checkpoint.rename(home / "c.pth.tar")
    monkeypatch.setenv("HOME", str(home))
    status, out, err = run_here(place.edit(BATCH_SIZE=4, DATA_DIR="~/pictures", CHECKPOINT="~/c.pth.tar",
                                           OUTPUT_DIR="~/out"))
    assert (status, err) == (0, "")
    report = json.loads((home / "out" / "report.json").read_text())
    assert report["layers"] == usual[1]["layers"] and report["constants"]["DATA_DIR"] == "~/pictures"
    assert not (place.folder / "~").exists()
    assert f"evaluating on  {home}/pictures/val: " in out and f"\nwrote {home}/out/INT8_checkpoint.pth.tar" in out
    assert script.resolve_path("a", "~/b") == home / "b"
    assert script.resolve_path("a", "b~") == ROOT / "a" / "b~"

def test_largest_picture_size_runs_and_is_saved(place):
    """In the INT8 checkpoint too: `predict` brings each picture to this size."""
    report, _ = place.report(IMAGE_SIZE=(227, 212))
    assert report["constants"]["IMAGE_SIZE"] == [227, 212] and report["images"]["evaluated"] == 6
    model = script.load_int8_checkpoint(place.results / "INT8_checkpoint.pth.tar")
    assert model.recipe["IMAGE_SIZE"] == (227, 212)
    with Image.open(PICTURES / "cat.0.jpg") as image, torch.no_grad():
        expected = model(to_tensor([np.asarray(image.resize((227, 212)))]))[0].tolist()
    assert model.predict(PICTURES / "cat.0.jpg")[1] == expected
    # a folder of pictures too, whatever the constant is here
    answers = script.evaluate("", model, script.CatDogDataset(place.val, model.recipe["IMAGE_SIZE"]))
    assert answers.logits[answers.files.index("cat.0.jpg")].tolist() == expected

# results

RESULTS = {"report.json", "INT8_checkpoint.pth.tar", "runs.jsonl"}

@contextlib.contextmanager
def nobody():
    """Root may look into every folder; for a while the tests that root runs are somebody else's."""
    if os.geteuid() == 0:
        os.seteuid(65534)
        try:
            yield
        finally:
            os.seteuid(0)
    else:
        yield

@pytest.mark.parametrize("use, words", [
    (script.CatDogDataset, "DATA_DIR"), (script.load_checkpoint, "CHECKPOINT"),
    (script.load_int8_checkpoint, "checkpoint"), (lambda path: script.write_files(path, {"c": b"c"}), "OUTPUT_DIR")])
@pytest.mark.parametrize("path", ["closed/a/b", "file/a", "x" * 300, f"{'x' * 300}/a"], ids=lambda path: path[:8])
def test_paths_that_cannot_be_looked_at(tmp_path, use, words, path):
    """In a folder of somebody else's, below a file, of a name that is too long."""
    (tmp_path / "file").write_text("")
    (tmp_path / "closed").mkdir(mode=0)
    with nobody() if path.startswith("closed") else contextlib.nullcontext(), pytest.raises(script.InputError) as error:
        use(tmp_path / path)
    message = str(error.value)
    assert words in message and str(tmp_path / path) in message and message.isprintable()

def test_output_folder(place):
    """One that cannot be written, one where a folder has the report's name, one below a folder yet to be made. Files
    of others stay, whatever they are called."""
    (place.folder / "file").write_text("")
    place.refuse("cannot write", "OUTPUT_DIR", "file", OUTPUT_DIR="file/results")
    (place.results / "report.json").mkdir(parents=True)
    place.refuse("cannot write", "OUTPUT_DIR", "report.json")
    place.results = place.folder / "a" / "b"
    place.report(OUTPUT_DIR="a/b")
    assert set(place.files()) == RESULTS
    others = {name: name.encode() for name in ("probe", "tmp", "report.png", "report.json.tmp")}
    for name, content in others.items():
        (place.results / name).write_bytes(content)
    first = (place.results / "runs.jsonl").read_bytes()
    report, _ = place.report(OUTPUT_DIR="a/b")
    found = place.files()
    assert found["runs.jsonl"] == first + json.dumps(report).encode() + b"\n"
    assert {name: found.get(name) for name in others} == others and set(found) == set(others) | RESULTS

def test_name_that_a_terminal_cannot_show(place):
    shutil.copy(PICTURES / "cat.0.jpg", place.val / "cat.\u732b.jpg")
    (place.val / "dog.\u732b.jpg").write_text("no picture")
    status, out, err = place.run(environment={"PYTHONIOENCODING": "ascii"})
    assert (status, err) == (0, "")
    report = place.last_report()
    assert report["images"]["evaluated"] == 7 and report["skipped"][0]["file"] == "cat_dog/val/dog.\u732b.jpg"
    assert r"dog.\u732b.jpg" in out

# what ends a run late, or early, leaves the results of the run before

def test_answers_of_other_pictures_are_not_compared(place, monkeypatch):
    """One goes between two passes, or the answers are of another dataset of the same files."""
    monkeypatch.setattr(script, "KEEP_BYTES", 0)
    monkeypatch.setattr(script, "BATCH_SIZE", 3)            # no picture is alone in its batch
    pictures, model = script.CatDogDataset(place.val), script.CNN_Model().eval()
    first, other = [script.evaluate("", model, each) for each in (pictures, script.CatDogDataset(place.val))]
    (place.val / "cat.1.jpg").unlink()
    second = script.evaluate("", model, pictures)
    assert first.files == pictures.files and second.files == [file for file in pictures.files if file != "cat.1.jpg"]
    assert first.labels.tolist() == [0, 1, 0, 1, 0, 1] and second.labels.tolist() == [0, 1, 1, 0, 1]
    assert torch.equal(first.logits[[0, 1, 3, 4, 5]], second.logits) and list(pictures.skipped) == ["cat.1.jpg"]
    shutil.copy(PICTURES / "cat.1.jpg", place.val)          # what was left out once is left out until the end
    assert torch.equal(script.evaluate("", model, pictures).logits, second.logits)
    assert script.compare(first, first)["agreement"] == script.compare(second, second)["agreement"] == 1
    for answers in (second, other):
        with pytest.raises(script.InputError, match="different pictures"):
            script.compare(first, answers)

@pytest.mark.parametrize("keep_bytes, step, words", [
    (0, "Quantize", "different pictures"), (2**28, "Evaluate and compare", "cat.1.jpg")])
def test_picture_that_goes_during_the_run_ends_it(rerun, keep_bytes, step, words):
    """Between the passes, where its pixels are not kept in memory; or before its bytes are summed up."""
    rerun.refuse(words, KEEP_BYTES=keep_bytes, inserted=(step, f"os.remove({str(rerun.val / 'cat.1.jpg')!r})"))

def beyond_fp32(state):
    """FP32 weights whose logits are numbers, but fc1's integers at their largest would lead to logits that are none:
    one channel of fc1 has a large bias, and fc2 weights all alike."""
    changed = {**state, "fc1.weight": torch.zeros(512, 968), "fc1.bias": torch.zeros(512)}
    changed["fc1.bias"][0] = 2e37
    return {**changed, "fc2.weight": torch.ones(2, 512), "fc2.bias": torch.zeros(2)}

def test_earlier_results_survive(rerun, state):
    """A run whose file holds another network than it evaluated; one on an INT8 checkpoint; one on weights whose INT8
    network could not be loaded; one without a checkpoint."""
    other = """
broken = torch.load(io.BytesIO(int8_bytes), weights_only=True)
broken["model"]["cnn4.bias"][0] += 9
file = io.BytesIO()
torch.save(broken, file)
int8_bytes = file.getvalue()
"""
    rerun.refuse("saving changed a logit", inserted=("Save", other))
    rerun.refuse("results/INT8_checkpoint.pth.tar", "INT8 network", "set CHECKPOINT to FP32 weights",
                 "load_int8_checkpoint", CHECKPOINT="results/INT8_checkpoint.pth.tar")
    torch.save({"model": beyond_fp32(state)}, rerun.checkpoint)
    overflow = rerun.refuse("fc1")
    rerun.checkpoint.unlink()
    rerun.refuse("BEST_checkpoint.pth.tar cannot be read: No such file", "CHECKPOINT")
    assert set(rerun.files()) == RESULTS and "BytesIO" not in overflow
    assert overflow.count("checkpoint") == 1

@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(28, "No space"), OSError(30, "Read-only")], ids=str)
@pytest.mark.parametrize("stage", [1, 2, 3, 4])
def test_write_that_stops(tmp_path, monkeypatch, stage, error):
    """Files that lie together are of one run, or there is no report. Nothing half-written is left."""
    for name in ("c", "report.json"):
        (tmp_path / name).write_bytes(b"before")
    calls = []

    def stopping(function, half_done):
        def call(*arguments):
            calls.append(arguments)
            if half_done or len(calls) != stage:
                function(*arguments)
            if len(calls) == stage:
                raise error
        return call
    monkeypatch.setattr(type(tmp_path), "write_bytes", stopping(type(tmp_path).write_bytes, True))
    monkeypatch.setattr(os, "replace", stopping(os.replace, False))
    with pytest.raises((KeyboardInterrupt, script.InputError)) as stopped:
        script.write_files(tmp_path, {"c": b"after", "report.json": b"after"})
    if isinstance(error, OSError):
        assert re.match(f"cannot write in {tmp_path}.*{error.strerror}.*OUTPUT_DIR", str(stopped.value))
    found = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    both, network, new = {"c": b"before", "report.json": b"before"}, {"c": b"before"}, {"c": b"after"}
    assert found == [both, both, network, new][stage - 1]

# the checkpoint: in this process, since each case needs only the loader

@pytest.mark.parametrize("change, words", [
    (lambda s: s.pop("cnn2.weight"), ["cnn2.weight", "missing"]),
    (lambda s: s.pop("bn4.running_var"), ["bn4.running_var", "missing"]),
    (lambda s: s.update({"fc1.weight": torch.zeros(512, 100)}), ["fc1.weight", "(512, 100)", "(512, 968)"]),
    (lambda s: s.update({"fc2.bias": torch.tensor([0.0, math.nan])}), ["fc2.bias", "not finite"]),
    (lambda s: s.update({"cnn1.bias": torch.full((16,), math.inf)}), ["cnn1.bias", "not finite"]),
    (lambda s: s.update({"cnn1.bias": torch.zeros(16, dtype=torch.int64)}), ["cnn1.bias", "int64"]),
    (lambda s: s.update({"cnn1.bias": 3}), ["cnn1.bias", "missing"]),
    (lambda s: s.update({"cnn1.bias": torch.full((16,), 1e300, dtype=torch.float64)}), ["cnn1.bias", "not finite"]),
    (lambda s: s.update({"cnn1.bias": torch.empty(16, device="meta")}), ["cnn1.bias"]),
    (lambda s: s.update({"cnn1.bias": torch.zeros(16).to_sparse()}), ["cnn1.bias", "missing"]),
    (lambda s: s.update({"cnn1.bias": torch.full((16,), math.nan).to(torch.float8_e4m3fn)}), ["cnn1.bias", "finite"]),
])
def test_wrong_weights(tmp_path, state, change, words):
    changed = dict(state)
    change(changed)
    torch.save({"model": changed}, tmp_path / "c.pth.tar")
    refused(tmp_path / "c.pth.tar", *words)

def test_values_that_overflow_end_the_run(place, state):
    """In the calibration pictures; in others, where the calibration picture is black; in the folded weights."""
    torch.save({"model": {**state, "cnn1.weight": torch.full((16, 3, 5, 5), 1e38)}}, place.checkpoint)
    place.refuse("give a checkpoint with")
    black = place.folder / "cat_dog" / "black"
    black.mkdir()
    Image.new("RGB", (224, 224)).save(black / "cat.0.jpg")
    torch.save({"model": {**state, "fc2.weight": state["fc2.weight"] * 1.2e38}}, place.checkpoint)
    place.refuse("give a checkpoint with", CALIBRATION_SPLIT="black")
    torch.save({"model": {**state, "bn1.running_var": torch.full((16,), -1.0)}}, place.checkpoint)
    place.refuse("folding changed a logit by nan", "give a checkpoint with other weights")

def test_calibrating_again_forgets_the_pictures_before(state):
    folded, alone = loaded(state).fused(), loaded(state).fused()
    bright, dark = Pictures(PIXELS), Pictures(PIXELS // 9)
    for model, pictures, same in ((alone, dark, True), (folded, bright, False), (folded, dark, True)):
        script.calibrate(model, pictures)
        assert {torch.equal(model.ranges[name], alone.ranges[name]) for name in script.ACTIVATIONS[1:]} == {same}

@pytest.mark.parametrize("load", [script.load_checkpoint, script.load_int8_checkpoint])
@pytest.mark.parametrize("saved", [[1, 2], {"weights": {}}, {"model": None}, {"model": 3}, "text"])
def test_file_without_a_model(tmp_path, saved, load):
    """Nor are FP32 weights an INT8 network."""
    torch.save(saved, tmp_path / "c.pth.tar")
    refused(tmp_path / "c.pth.tar", "it holds " if load is script.load_checkpoint else "not an INT8 network", load=load)
    refused(ROOT / "BEST_checkpoint.pth.tar", "not an INT8 network", "INT8_checkpoint.pth.tar",
            load=script.load_int8_checkpoint)

# the INT8 checkpoint

KEYS = [f"scale_{name}" for name in oracle.ACTIVATIONS] + [
    f"{layer}.{key}" for layer in LAYERS for key in ("weight", "bias", "w_scale")]

def test_int8_checkpoint_alone_gives_the_same_answers(rerun, usual):
    """A few lines of Python do it: no FP32 weights, no calibration, whatever the constants say."""
    report, path = usual[1], rerun.results / "INT8_checkpoint.pth.tar"
    rerun.edit(BIT=4, WEIGHT_BIT=4, PER_CHANNEL=False, CALIBRATION_SPLIT="nowhere", CHECKPOINT="nowhere")
    done = subprocess.run([sys.executable, "-c", """
from quantize_catdog import CatDogDataset, evaluate, load_int8_checkpoint
model = load_int8_checkpoint("results/INT8_checkpoint.pth.tar")
evaluate("INT8", model, CatDogDataset("cat_dog/val"))
print(model.predict("cat_dog/val/cat.0.jpg"))"""], cwd=rerun.folder, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    model = script.load_int8_checkpoint(path)
    with Image.open(PICTURES / "cat.0.jpg") as image, torch.no_grad():
        logits = model(to_tensor([np.asarray(image.resize(SIZE))]))[0]
    assert done.stdout == (f"INT8 Top1: {report['int8']['top1']:.3f}, 6 of 6 pictures of cat_dog/val\n"
                           f"{(('cat', 'dog')[logits.argmax()], logits.tolist())}\n")
    answers = script.evaluate("INT8", model, script.CatDogDataset(rerun.val))
    assert script.accuracy_of(answers)["confusion"] == report["int8"]["confusion"]
    assert json.loads(json.dumps(model.recipe)) == report["recipe"] and ("cnn2" in with_kernel(model)) == KERNELS
    assert script.layer_table(model) == report["layers"] and not model.training

RECIPES = {"default": {}, "notebook's": dict(PER_CHANNEL=False, UNSIGNED_RELU=False, BIAS_BIT=16, QUANTIZE_LOGITS=True),
           "5 bits": dict(BIT=5, WEIGHT_BIT=5, BIAS_BIT=20), "W4-8A8": dict(LAYER_BITS={"cnn2": 5, "fc1": 4}),
           "wide": dict(IMAGE_SIZE=(227, 212))}

@pytest.fixture(scope="module", params=RECIPES)
def saved(request, tmp_path_factory, state):
    """(INT8_Model, pixels, its checkpoint), for several recipes; `expected`: logits before it was saved."""
    path = tmp_path_factory.mktemp("saved") / "INT8_checkpoint.pth.tar"
    int8, pixels = quantized(state, **RECIPES[request.param])
    with torch.no_grad():
        int8.expected = int8(pixels)
    path.write_bytes(script.int8_checkpoint(int8))
    return int8, pixels, path

def test_int8_checkpoint_loads_to_the_same_logits(saved, capfd, monkeypatch):
    """And, saved again at another time, to the same bytes. Whatever the constants say when it is loaded."""
    int8, pixels, path = saved
    for name, value in dict(BIT=3, WEIGHT_BIT=2, LAYER_BITS={"cnn1": 2}, IMAGE_SIZE=(220, 220), PER_CHANNEL=False,
                            BIAS_BIT=9).items():
        monkeypatch.setattr(script, name, value)
    found = script.load_int8_checkpoint(path)
    content = torch.load(path, weights_only=True)           # tensors and plain values, or this raises
    assert set(content) == {"model", "recipe"} and list(content["model"]) == KEYS and content["recipe"] == int8.recipe
    assert list(found.state_dict()) == KEYS and found.recipe == int8.recipe and not found.training
    for name, value in int8.state_dict().items():
        assert found.state_dict()[name].dtype == value.dtype and torch.equal(found.state_dict()[name], value)
    with torch.no_grad():
        assert torch.equal(found(pixels), int8.expected) and torch.equal(int8(pixels), int8.expected)
    answer = found.predict(PICTURES / "cat.0.jpg")
    assert answer == (("cat", "dog")[int8.expected[0].argmax()], int8.expected[0].tolist())
    later = time.time() + 1e6
    monkeypatch.setattr(time, "time", lambda: later)        # zipfile asks it for the date
    for model in (int8, found, script.load_int8_checkpoint(io.BytesIO(script.int8_checkpoint(found)))):
        assert script.int8_checkpoint(model) == path.read_bytes()
    with zipfile.ZipFile(path) as parts:
        assert {part.date_time for part in parts.infolist()} == {(1980, 1, 1, 0, 0, 0)}
    assert [file.name for file in path.parent.iterdir()] == [path.name] and capfd.readouterr().out == ""

def change_tensor(name, value):
    return lambda saved: saved["model"].update({name: value})

def change_scale(name, value):
    return lambda saved: saved["model"][name].fill_(value)

def change_recipe(**changes):
    return lambda saved: saved["recipe"].update(changes)

@pytest.mark.parametrize("change, words", [
    (lambda saved: saved["model"].pop("cnn2.bias"), ["cnn2.bias", "missing"]),
    (lambda saved: saved["model"].pop("scale_fc2"), ["scale_fc2", "missing"]),
    (change_tensor("cnn1.weight", torch.zeros(16, 3, 5, 5)), ["cnn1.weight", "float32", "int8"]),
    (change_tensor("cnn1.bias", torch.zeros(16, dtype=torch.int64)), ["cnn1.bias", "int64", "int32"]),
    (change_tensor("fc2.weight", torch.zeros(2, 5, dtype=torch.int8)), ["fc2.weight", "(2, 512)"]),
    (change_tensor("cnn1.w_scale", torch.ones(3)), ["cnn1.w_scale", "(3,)"]),
    (lambda saved: saved["model"]["cnn1.weight"].fill_(-128), ["cnn1 ", "not as its recipe says"]),
    (change_scale("scale_cv1", 0), ["cnn1 ", "not as its recipe says"]),
    (change_scale("fc1.w_scale", -1), ["fc1 ", "not as its recipe says"]),
    (change_scale("scale_input", math.nan), ["scale_input", "not finite"]),
    (change_scale("scale_fc1", 1e-45), ["fc1 ", "not as its recipe says"]),
    (change_scale("scale_fc1", 1e-38), ["fc", "not as its recipe says"]),
    (change_scale("cnn2.w_scale", 1e-38), ["cnn2 ", "not as its recipe says"]),
    (lambda saved: saved["recipe"].pop("BIT"), ["BIT is missing", "2 to 8"]),
    (lambda saved: saved["recipe"].pop("PER_CHANNEL"), ["PER_CHANNEL is missing", "True or False"]),
    (change_recipe(BITS=8), ["BITS", "did you mean BIT?"]),
    (change_recipe(BIT=9), ["BIT = 9", "2 to 8"]),
    (change_recipe(WEIGHT_BIT=9), ["WEIGHT_BIT = 9", "2 to 8"]),
    *[(change_recipe(LAYER_BITS=bits), ["LAYER_BITS", "2 to 8"])
      for bits in ({"fc1": 9}, {"fc3": 4}, {"fc1": True}, {"fc1": torch.tensor(4)}, [4], None)],
    *[(change_recipe(IMAGE_SIZE=size), ["IMAGE_SIZE", "212 to 227"]) for size in ((9000, 224), (224,), "224")],
    (change_recipe(PER_CHANNEL="yes"), ["PER_CHANNEL", "True or False"]),
    (change_recipe(HEADROOM=math.inf), ["HEADROOM", "1 to 16"]),
    (lambda saved: saved.update(recipe=[8]), ["not an INT8 network", "INT8_checkpoint.pth.tar of a run"]),
    (lambda saved: saved.pop("recipe"), ["not an INT8 network", "INT8_checkpoint.pth.tar of a run"]),
    (lambda saved: saved.pop("model"), ["not an INT8 network", "INT8_checkpoint.pth.tar of a run"]),
])
def test_wrong_int8_checkpoint(saved, tmp_path, change, words):
    content = torch.load(saved[2], weights_only=True)
    change(content)
    torch.save(content, tmp_path / "c.pth.tar")
    refused(tmp_path / "c.pth.tar", *words, load=script.load_int8_checkpoint)

@pytest.mark.parametrize("recipe, width, name", [
    (dict(WEIGHT_BIT=5), 5, "cnn3.weight"), (dict(BIAS_BIT=20), 20, "fc1.bias"),
    (dict(LAYER_BITS={"fc1": 4}), 4, "fc1.weight"), (dict(WEIGHT_BIT=3, LAYER_BITS={"fc1": 4}), 3, "cnn4.weight")],
    ids=str)
def test_int8_checkpoint_with_integers_wider_than_its_recipe(tmp_path, state, recipe, width, name):
    """The largest that fits is taken, the next is not."""
    int8, path = quantized(state, **recipe)[0], tmp_path / "c.pth.tar"
    for integer in (2**(width - 1) - 1, 2**(width - 1)):
        int8.state_dict()[name].view(-1)[-1] = integer
        path.write_bytes(script.int8_checkpoint(int8))
        if integer < 2**(width - 1):
            assert script.load_int8_checkpoint(path).state_dict()[name].flatten()[-1] == integer
    refused(path, f"{name.split('.')[0]} is not as its recipe says", load=script.load_int8_checkpoint)

# as a module

@pytest.fixture(scope="module")
def model(usual):
    return script.load_int8_checkpoint(usual[0].results / "INT8_checkpoint.pth.tar")

def test_predict_takes_what_holds_a_picture(model):
    """A path, a file object, its bytes, a Pillow picture, an array. It is one pass of one picture, and none changes."""
    files = [PICTURES / name for name in ("cat.0.jpg", "dog.0.jpg", "cat.1.jpg", "dog.1.jpg")]
    images = [Image.open(file) for file in files]
    arrays = [np.asarray(image) for image in images]
    with torch.no_grad():
        logits = [model(to_tensor([np.asarray(image.resize(SIZE))]))[0] for image in images]
    expected = [(("cat", "dog")[row.argmax()], row.tolist()) for row in logits]
    assert len({name for name, _ in expected}) == 2 and len({tuple(row) for _, row in expected}) == 4
    for file, image, array, answer in zip(files, images, arrays, expected):
        for picture in (file, str(file), image, array, array[::-1][::-1], file.read_bytes(), open(file, "rb")):
            assert model.predict(picture) == answer
    grey = arrays[0][..., 0]
    clear = np.dstack([arrays[0], np.full_like(grey, 255)])
    assert model.predict(clear) == expected[0] and model.predict(grey) == model.predict(np.dstack([grey] * 3))
    assert [np.array_equal(np.asarray(image), array) for image, array in zip(images, arrays)] == [True] * 4

@pytest.mark.parametrize("picture", [
    *[np.zeros(shape, np.uint8) for shape in ((9, 9, 1), (3, 9, 9), (1, 9, 9, 3), ())],
    *[np.zeros((9, 9, 3), dtype) for dtype in (np.float32, np.float64, np.int8, np.uint16, bool)],
    None, 3, b"no picture", [PICTURES / "cat.0.jpg"]],
    ids=lambda picture: f"{picture.dtype}{picture.shape}" if isinstance(picture, np.ndarray) else str(picture)[:12])
def test_predict_refuses_what_is_no_picture(model, picture):
    """Nor does it take several."""
    with pytest.raises(script.InputError, match="^the picture cannot be decoded: ") as error:
        model.predict(picture)
    assert "\n" not in str(error.value)

@pytest.mark.parametrize("name, words", [
    ("broken.jpg", "cannot be decoded"), ("half.jpg", "truncated"), ("folder.jpg", "IsADirectoryError"),
    ("none.jpg", "FileNotFoundError")])
def test_predict_names_a_broken_file(model, tmp_path, name, words):
    """Nothing but InputError comes, so that a loop over files can live on."""
    (tmp_path / "broken.jpg").write_bytes(b"no picture")
    (tmp_path / "half.jpg").write_bytes((PICTURES / "cat.0.jpg").read_bytes()[:2000])
    (tmp_path / "folder.jpg").mkdir()
    for picture in (tmp_path / name, str(tmp_path / name)):
        with pytest.raises(script.InputError, match=f"^{tmp_path / name} .*{words}") as error:
            model.predict(picture)
        assert "\n" not in str(error.value)

IMPORTING = """
import os, random, signal, sys, threading, warnings
import numpy, torch, torchnet.meter
from PIL import Image, PngImagePlugin

os.chdir("/")
sys.excepthook = lambda *error: None
signal.signal(signal.SIGUSR1, lambda *_: None)
PngImagePlugin.MAX_TEXT_CHUNK = 12345


def process():
    return {
        "warnings": repr(warnings.filters), "pixels": Image.MAX_IMAGE_PIXELS, "text": PngImagePlugin.MAX_TEXT_CHUNK,
        "allow_tf32": torch.backends.cudnn.allow_tf32, "matmul": torch.backends.cuda.matmul.allow_tf32,
        "stdout": [sys.stdout.errors, sys.stdout.line_buffering], "path": list(sys.path),
        "excepthook": sys.excepthook, "hooks": [sys.displayhook, sys.unraisablehook],
        "signals": [signal.getsignal(number) for number in signal.valid_signals()], "folder": os.getcwd(),
        "environment": dict(os.environ), "threads": [threading.active_count(), torch.get_num_threads()],
        "torch": [torch.get_default_dtype(), torch.is_grad_enabled(), torch.serialization.get_safe_globals()],
        "random": [random.getstate(), repr(numpy.random.get_state()), torch.get_rng_state().tolist()]}


before = process()
import quantize_catdog
imported = process()
assert imported == before, {name for name in before if imported[name] != before[name]}
quantize_catdog.prepare_process()
print(*sorted(name for name, value in process().items() if value != before[name]))
"""

def test_importing_changes_nothing_in_the_process():
    """Nor does it print. What the run changes is in one function."""
    assert python("-c", IMPORTING) == (0, "allow_tf32 stdout text warnings\n", "")

@pytest.mark.parametrize("name, given, expected", [
    ("__main__", {}, ["10000", "64m"]), ("__main__", {"OMP_WAIT_POLICY": "active"}, [None, "64m"]),
    ("__main__", {"GOMP_SPINCOUNT": "7", "PILLOW_BLOCK_SIZE": "1m"}, ["7", "1m"]), ("quantize_catdog", {}, [None] * 2)])
def test_what_libraries_read_is_set_before_their_import_for_the_program_alone(name, given, expected):
    """And only where the user has set nothing."""
    head = (ROOT / "quantize_catdog.py").read_text().split("import numpy as np")[0]
    code = head + """
print([os.environ.get(name) for name in ("GOMP_SPINCOUNT", "PILLOW_BLOCK_SIZE")], "torch" in sys.modules)"""
    names = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY", "PILLOW_BLOCK_SIZE")
    environment = {key: value for key, value in os.environ.items() if key not in names} | given
    done = subprocess.run([sys.executable, "-c", f"exec({code!r}, {{'__name__': {name!r}}})"], capture_output=True,
                          text=True, env=environment, check=True)
    assert done.stdout == f"{expected} False\n"

def test_one_line_for_what_a_user_can_mend(place):
    """A mistake of the script's own shows its traceback."""
    status, _, err = run_here(place.edit(("Quantize", "raise OSError(28, 'No space left', 'x')")))
    one_line(status, err, "No space left", "'x'")
    status, _, err = run_here(place.edit(("Load and fold", "load_chekpoint(CHECKPOINT)")))
    assert status == 1 and "Traceback" in err and "NameError" in err and "load_chekpoint" in err

# closer to FP32

def test_the_methods_pay(tmp_path, state):
    """On the trained network and pictures that did not calibrate: without any, with the strongest, with all."""
    for file in PICTURES.iterdir():
        folder = tmp_path / ("calibration" if int(file.name.split(".")[1]) < 20 else "evaluation")
        folder.mkdir(exist_ok=True)
        shutil.copy(file, folder)
    calibration, evaluation = [script.CatDogDataset(tmp_path / name) for name in ("calibration", "evaluation")]
    folded = loaded(state).fused()
    script.calibrate(folded, calibration)
    fp32, pixels = script.evaluate("FP32", folded, evaluation), calibration.first_pixels(script.SAMPLE)
    off = dict(HEADROOM=1, EQUALIZE=False, GPTQ=False, BIAS_CORRECTION=False)
    sqnr = {}
    for name in ("none", "HEADROOM", "all"):
        constants = {} if name == "all" else {key: value for key, value in off.items() if key != name}
        recipe = script.read_constants(script.LEGAL_RECIPE) | constants
        fp32_model, int8 = script.quantize_network(folded, pixels, recipe)
        sqnr[name] = script.compare(fp32, script.evaluate("INT8", int8, evaluation))["logit_sqnr_db"]
        assert (fp32_model is not folded) == (name == "all")                        # equalized
    assert sqnr["none"] + 0.5 < sqnr["HEADROOM"] and sqnr["none"] + 3 < sqnr["all"]

@pytest.mark.skipif("CATDOG_PHOTOS" not in os.environ, reason="CATDOG_PHOTOS names no folder with train/ and val/")
def test_accuracy_on_photographs(tmp_path):
    """Calibrated on the first 100 training photographs, counted on others that nothing was chosen by."""
    photos = Path(os.environ["CATDOG_PHOTOS"]).resolve()
    place = Place(tmp_path)
    (place.folder / "train100").mkdir()
    for name in sorted(os.listdir(photos / "train"), key=lambda name: int(name.split(".")[1]))[:100]:
        shutil.copy(photos / "train" / name, place.folder / "train100")
    report, _ = place.report(DATA_DIR=".", CALIBRATION_SPLIT="train100", EVALUATION_SPLIT=str(photos / "val"),
                             BATCH_SIZE=20)
    assert report["fp32"]["top1"] >= 89
    assert abs(report["fp32"]["top1"] - report["int8"]["top1"]) <= 0.3 + 1e-9
    assert report["agreement"] >= 0.99 and report["logit_sqnr_db"] >= 30
