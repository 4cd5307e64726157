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
import subprocess
import sys
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import quantize_catdog
import torch
from PIL import Image

import oracle
from helpers import (
    KERNELS,
    ONE_THREAD,
    PICTURES,
    ROOT,
    SIZE,
    Place,
    hostile,
    loaded,
    one_line,
    png_header_that_promises,
    quantized,
    refused,
    run_here,
)

LAYERS = [row[0] for row in oracle.LAYERS]
VNNI = pytest.mark.skipif(not KERNELS, reason="the INT8 kernels need a CPU with VNNI")


def test_run_end_to_end(usual, state):
    """Figures in report.json and on the terminal against the oracle's."""
    place, report, out = usual
    weights = {name: value.numpy() for name, value in state.items()}
    names = [f"{kind}.{i}.jpg" for i in range(3) for kind in ("cat", "dog")]
    pixels = [np.stack([np.asarray(Image.open(split / name).resize(SIZE)) for name in names])
              for split in (place.val, place.train)]
    fp32, calibrated = [oracle.forward(weights, each.transpose(0, 3, 1, 2))["fc2"] for each in pixels]
    assert not np.allclose(np.abs(fp32).max(), np.abs(calibrated).max(), rtol=1e-2)
    labels = np.array([0, 1] * 3)
    correct = int((fp32.argmax(1) == labels).sum())
    confusion = [[int(((labels == label) & (fp32.argmax(1) == answer)).sum()) for answer in (0, 1)] for label in (0, 1)]
    assert report["fp32"]["correct"] == correct and report["fp32"]["top1"] == pytest.approx(100 * correct / 6)
    assert report["fp32"]["confusion"] == confusion
    lines = re.findall(r"(?m)^(FP32|INT8) Top1: ([\d.]+), 6 of 6 pictures of (.*)$", out)
    assert [(name, split) for name, _, split in lines] == [
        ("FP32", "cat_dog/train"), ("FP32", "cat_dog/val"), ("INT8", "cat_dog/val")]
    right = 100 * np.array([(calibrated.argmax(1) == labels).mean(), correct / 6, report["int8"]["correct"] / 6])
    np.testing.assert_allclose([float(top1) for _, top1, _ in lines], right, atol=1e-3)     # each counted alone
    assert ("\ncalibrating on cat_dog/train: 6 pictures, 3 cat and 3 dog\n"
            "evaluating on  cat_dog/val: 6 pictures, 3 cat and 3 dog\n") in out
    assert "\nwrote results/INT8_checkpoint.pth.tar and report.json\n" in out and str(place.folder) not in out
    assert report["images"] == {"evaluated": 6, "calibrated": 6} and report["skipped"] == []
    assert report["constants"]["BATCH_SIZE"] == 4 and report["torch"] == torch.__version__
    assert [row["name"] for row in report["layers"]] == LAYERS
    assert report["layers"][-1]["range"] == pytest.approx(np.abs(calibrated).max(), rel=1e-4)
    assert report["logit_sqnr_db"] > 15
    assert report["speedup"] == pytest.approx(report["fp32"]["ms_per_image"] / report["int8"]["ms_per_image"])


def test_size_is_the_files(usual):
    """What the report and the summary call the size is what the file has."""
    place, report, out = usual
    sizes = [place.checkpoint.stat().st_size, (place.results / "INT8_checkpoint.pth.tar").stat().st_size]
    assert [report["fp32"]["file_bytes"], report["int8"]["file_bytes"]] == sizes
    rows = re.findall(r"(?m)^(FP32|INT8) .* ([\d,]+)$", out)
    assert rows == [("FP32", f"{sizes[0]:,}"), ("INT8", f"{sizes[1]:,}")]
    assert 0.19 < sizes[1] / sizes[0] < 0.22


def test_wilson_interval():
    """Against values worked out by hand from the formula in Wilson (1927)."""
    assert quantize_catdog.wilson(97, 100) == pytest.approx((91.548, 98.974), abs=2e-3)
    assert quantize_catdog.wilson(0, 10) == pytest.approx((0, 27.753), abs=2e-3)
    assert quantize_catdog.wilson(10, 10) == pytest.approx((72.247, 100), abs=2e-3)
    for n in range(1, 500):
        assert quantize_catdog.wilson(0, n)[0] >= 0 and quantize_catdog.wilson(n, n)[1] <= 100


def test_time_is_the_median_of_turns(monkeypatch):
    """Two networks that take 8 and 2 seconds for 4 pictures, but for a first time that takes longer."""
    now, calls = [0.0], []

    def network(name, seconds):
        def run(pixels):
            now[0] += seconds + 1000 * (name not in calls)
            calls.append(name)
            return pixels
        return run
    monkeypatch.setattr(quantize_catdog.time, "perf_counter", lambda: now[0])
    networks = {"fp32": network("fp32", 8), "int8": network("int8", 2)}
    assert quantize_catdog.time_networks(networks, torch.zeros(4, 3, 2, 2)) == {"fp32": 2000.0, "int8": 500.0}
    assert calls == ["fp32", "int8"] * (len(calls) // 2) and len(calls) >= 10


# the INT8 engine

# values of a picture at all places: pixels, four convolutions' outputs, fc1, fc2
VALUES = 3 * 224**2 + 16 * 220**2 + 32 * 106**2 + 16 * 51**2 + 8 * 23**2 + 512 + 2


@VNNI
def test_kernels_are_proven_and_taken(usual):
    _, report, out = usual
    assert report["engine"] == "onednn"
    assert report["kernel_check"]["compared"] == 6 * VALUES and report["kernel_check"]["different"] == 0
    assert ("INT8 engine onednn: its kernels agree with the reference\n"
            f"{6 * VALUES:,} values of 6 pictures compared, 0 differ\n") in out


def test_reference_can_be_forced(place):
    report, out = place.report(INT8_ENGINE="reference")
    assert report["engine"] == "reference" and report["kernel_check"]["compared"] == 0
    assert "INT8 engine reference: forced by INT8_ENGINE\n" in out


def proofs(paths):
    """For each INT8 checkpoint and each INT8_ENGINE what `choose_engine` says, the engine, and the values' checksum."""
    pixels, rows = quantize_catdog.CatDogDataset(PICTURES).first_pixels(4), []
    for path in paths:
        row = {}
        for engine in ("reference", "onednn", "auto"):
            quantize_catdog.INT8_ENGINE = engine
            model = quantize_catdog.load_int8_checkpoint(path)
            proof = quantize_catdog.choose_engine(model, pixels)
            crc = 0
            for values in quantize_catdog.activations_of(model, pixels).values():
                crc = zlib.crc32(values.contiguous().numpy().tobytes(), crc)
            row[engine] = {**proof, "engine": model.engine, "crc": crc}
        rows.append(row)
    return rows


WIDTHS = [{"WEIGHT_BIT": 8}, {"WEIGHT_BIT": 7}, {"WEIGHT_BIT": 7, "LAYER_BITS": {"cnn2": 8}}]


@pytest.fixture(scope="module")
def widths(tmp_path_factory, state):
    """For each of WIDTHS (INT8 checkpoint, checksum of the values that the reference makes here)."""
    found = []
    for recipe in WIDTHS:
        path = tmp_path_factory.mktemp("widths") / "c.pth.tar"
        path.write_bytes(quantize_catdog.int8_checkpoint(quantized(state, **recipe)[0]))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(quantize_catdog, "INT8_ENGINE", "auto")
            found.append((path, proofs([path])[0]["reference"]["crc"]))
    assert len({crc for _, crc in found}) == 3
    return found


def has(flag):
    return Path("/proc/cpuinfo").exists() and flag in Path("/proc/cpuinfo").read_text().split()


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="x86 alone has CPUs that saturate")
@pytest.mark.parametrize("isa, saturates", [
    ("AVX2", True), ("AVX512_CORE", True),
    pytest.param("AVX2_VNNI", False, marks=pytest.mark.skipif(not has("avx_vnni"), reason="no AVX2_VNNI here"))])
def test_engine_on_other_processors(widths, isa, saturates):
    """The same integers on each. Where kernels saturate, 8-bit weights take the reference, be they in one layer alone;
    7-bit ones never need it."""
    paths = [str(path) for path, _ in widths]
    driver = f"import json, test_script\nprint(json.dumps(test_script.proofs({paths})))"
    done = subprocess.run([sys.executable, "-c", driver], capture_output=True, text=True, check=True,
                          env=os.environ | ONE_THREAD | {"ONEDNN_MAX_CPU_ISA": isa,
                                                         "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"})
    for recipe, (_, crc), row in zip(WIDTHS, widths, json.loads(done.stdout)):
        wrong = saturates and 8 in (recipe["WEIGHT_BIT"], recipe.get("LAYER_BITS", {}).get("cnn2"))
        auto, forced = row["auto"], row["onednn"]
        assert auto["engine"] == ("reference" if wrong else "onednn") and forced["engine"] == "onednn"
        assert row["reference"]["crc"] == auto["crc"] == crc
        assert (forced["crc"] != crc) == wrong
        assert auto["compared"] == 4 * VALUES and (auto["different"] > 0) == (forced["different"] > 0) == wrong
        assert ("16 bits" in auto["why"] and "WEIGHT_BIT = 7" in auto["why"]) == wrong


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="x86 alone has CPUs that saturate")
def test_run_on_a_processor_that_saturates(place, usual):
    """The answers are those of any other machine, by way of the reference, and the run says what would be faster."""
    status, out, err = place.run(environment={**ONE_THREAD, "ONEDNN_MAX_CPU_ISA": "AVX2"})
    report = place.last_report()
    assert (status, err, report["engine"]) == (0, "", "reference")
    assert re.search(r"(?m)^INT8 engine reference: .*16 bits.*WEIGHT_BIT = 7", out)
    assert report["int8"]["correct"] == usual[1]["int8"]["correct"]


@VNNI
def test_a_single_different_value_is_noticed(monkeypatch, state):
    int8, pixels = quantized(state)
    kernel = quantize_catdog.kernel

    def off_by_one(*arguments):
        out = kernel(*arguments)
        if out.shape[1:] == (8, 23, 23):                    # cnn4
            out[0, 0, 0, 0] += 1
        return out
    assert quantize_catdog.choose_engine(int8, pixels)["different"] == 0 and int8.engine == "onednn"
    monkeypatch.setattr(quantize_catdog, "kernel", off_by_one)
    for _ in range(2):                                      # a cell that is run again proves as much as before
        assert quantize_catdog.choose_engine(int8, pixels)["different"] >= 1 and int8.engine == "reference"


@VNNI
@pytest.mark.parametrize("dim", [4, 2], ids=["convolution", "fully connected"])
def test_kernels_of_one_kind_that_overflow_are_noticed(monkeypatch, dim):
    """In one output channel of the probe."""
    kernel, recipe = quantize_catdog.kernel, quantize_catdog.current_recipe()

    def overflows(x, *arguments):
        out = kernel(x, *arguments)
        if x.dim() == dim:
            out[:, -1] -= 1
        return out
    assert not quantize_catdog.kernels_overflow(recipe)
    monkeypatch.setattr(quantize_catdog, "kernel", overflows)
    assert quantize_catdog.kernels_overflow(recipe)


@VNNI
def test_kernels_that_overflow_are_not_taken_though_these_pictures_agree(monkeypatch, state):
    int8, pixels = quantized(state)
    monkeypatch.setattr(quantize_catdog, "kernels_overflow", lambda recipe: True)
    exact = quantize_catdog.choose_engine(int8, pixels)
    assert exact["different"] == 0 < exact["compared"] and "WEIGHT_BIT = 7" in exact["why"]
    assert int8.engine == "reference"


@pytest.mark.parametrize("error", [AttributeError, RuntimeError, NotImplementedError])
def test_missing_kernels(monkeypatch, state, error):
    int8, pixels = quantized(state)

    def missing(*_):
        raise error("'_OpNamespace' 'onednn' object has no attribute 'qconv_prepack'")
    monkeypatch.setattr(quantize_catdog, "pack", missing)
    exact = quantize_catdog.choose_engine(int8, pixels)
    assert int8.engine == "reference" and "no INT8 kernels" in exact["why"] and exact["compared"] == 0
    monkeypatch.setattr(quantize_catdog, "INT8_ENGINE", "onednn")
    with pytest.raises(quantize_catdog.InputError, match='INT8_ENGINE = "onednn".*set it to "auto"'):
        quantize_catdog.choose_engine(int8, pixels)


@VNNI
@pytest.mark.parametrize("where, error", [
    ("kernels_overflow", NameError), ("kernels_overflow", TypeError), ("pack", NameError), ("kernel", TypeError),
    ("KernelLayer", AttributeError), ("KernelLayer", RuntimeError), ("ReferenceLayer", NotImplementedError),
    ("ReferenceLayer", AttributeError)])
def test_mistakes_of_our_own_are_no_missing_kernels(monkeypatch, state, where, error):
    """Only what probes the kernels is guarded, and only against what torch raises where it has none."""
    int8, pixels = quantized(state)

    def mistaken(*_):
        raise error("a mistake of our own")
    monkeypatch.setattr(quantize_catdog, where, mistaken)
    with pytest.raises(error, match="of our own"):
        quantize_catdog.choose_engine(int8, pixels)


def test_fewer_bits_have_their_own_name(place, usual):
    """Throughout: INT8 is only in the names of a constant and of the file. The file is smaller, nothing is faster."""
    report, out = place.report(WEIGHT_BIT=4)
    assert not re.search("INT8(?!_ENGINE|_checkpoint)", out)
    for line in (r"W4A8 Top1: [\d.]+, 6 of 6 pictures of cat_dog/val", r"W4A8 +[\d.]+ %.* 6 .*",
                 r"same class .* W4A8 [\d.]+ times as fast", r"W4A8: 3 cats.*", r"W4A8 corrects.*",
                 r"Weights of fewer bits .*smaller file.* nothing faster\."):
        assert re.search(rf"(?m)^{line}$", out), line
    assert "WEIGHT_BIT = 4\n" in out and "fewer bits" not in usual[2]
    assert "fewer bits" not in Place(place.folder / "W8A4").report(BIT=4)[1]        # whose weights have 8
    size = (place.results / "INT8_checkpoint.pth.tar").stat().st_size
    assert report["int8"]["file_bytes"] == size < 0.75 * usual[1]["int8"]["file_bytes"]


@pytest.mark.parametrize("weight_bit, bit, layer_bits, name", [
    (8, 8, {}, "INT8"), (4, 8, {}, "W4A8"), (8, 4, {}, "W8A4"), (2, 2, {}, "W2A2"), (8, 8, {"fc1": 4}, "W4-8A8"),
    (4, 8, {"fc1": 8}, "W4-8A8"), (4, 8, {"fc1": 4}, "W4A8"), (8, 8, {"fc1": 8}, "INT8"), (8, 7, {"cnn1": 8}, "W8A7"),
    (5, 8, {"cnn1": 8, "fc1": 2, "fc2": 4}, "W2-8A8"), (8, 8, dict.fromkeys(LAYERS, 4), "W4A8"),
    (4, 8, dict.fromkeys(LAYERS, 8), "INT8")], ids=str)
def test_name_of_a_recipe(weight_bit, bit, layer_bits, name):
    recipe = {"WEIGHT_BIT": weight_bit, "BIT": bit, "LAYER_BITS": layer_bits}
    assert quantize_catdog.name_of(recipe) == name


def test_fewer_bits_of_one_layer(place, usual):
    """They are in the file alone: what is printed of a run says how wide its narrowest and widest weights are."""
    report, out = place.report(LAYER_BITS={"fc1": 4}, BATCH_SIZE=4)
    assert re.search(r"(?m)^W4-8A8 Top1: [\d.]+, 6 of 6 pictures of cat_dog/val$", out)
    assert "\nWeights of fewer bits make a smaller file" in out
    tensors = torch.load(place.results / "INT8_checkpoint.pth.tar", weights_only=True)["model"]
    largest = {layer: int(tensors[f"{layer}.weight"].abs().max()) for layer in LAYERS}
    assert largest == dict.fromkeys(LAYERS, 127) | {"fc1": 7}
    assert report["recipe"]["LAYER_BITS"] == {"fc1": 4}
    assert report["int8"]["file_bytes"] < 0.6 * usual[1]["int8"]["file_bytes"]
    assert report["engine"] == usual[1]["engine"] and report["kernel_check"] == usual[1]["kernel_check"]


def ranges_of(report):
    return [row["range"] for row in report["layers"]]


def test_ranges_and_refining_are_of_the_calibration_pictures_alone(place, usual):
    """And accuracies of the evaluation pictures alone."""
    for file in place.val.iterdir():
        file.unlink()
    for i in (3, 4):
        shutil.copy(PICTURES / f"dog.{i}.jpg", place.val)
    other, out = place.report(BATCH_SIZE=4)
    assert other["images"] == {"evaluated": 2, "calibrated": 6}
    assert other["layers"] == usual[1]["layers"]
    found, expected = [torch.load(folder.results / "INT8_checkpoint.pth.tar", weights_only=True)["model"]
                       for folder in (place, usual[0])]
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    assert re.findall(r"(?m)^FP32 Top1: .*, (\d) of \1 pictures of (.*)$", out) == [
        ("6", "cat_dog/train"), ("2", "cat_dog/val")]
    assert re.search(r"(?m)^folding changed a logit by .*, on 2 pictures$", out) and " values of 2 pictures" in out


def test_one_split_for_both(place, usual):
    """It is walked through once in FP32, and the ranges are its own."""
    report, out = place.report(CALIBRATION_SPLIT="val")
    assert report["inputs"]["calibration_crc"] == report["inputs"]["evaluation_crc"]
    assert [report["fp32"][key] for key in ("correct", "confusion")] == [
        usual[1]["fp32"][key] for key in ("correct", "confusion")]
    assert ranges_of(report) != ranges_of(usual[1])
    assert len(re.findall(r"(?m)^FP32 Top1: ", out)) == 1
    assert "Calibrated on the pictures that are counted" in out and "Calibrated on the" not in usual[2]


# pictures

def counted(monkeypatch):
    """The names of the files that are decoded from now on."""
    names, decode = [], quantize_catdog.decode

    def count(path, size):
        names.append(path.name)
        return decode(path, size)
    monkeypatch.setattr(quantize_catdog, "decode", count)
    return names


def test_pictures_are_decoded_once(tmp_path, monkeypatch):
    """And memory stays bounded: what does not fit KEEP_BYTES is decoded again, to the same batches."""
    monkeypatch.setattr(quantize_catdog, "BATCH_SIZE", 60)
    decoded = counted(monkeypatch)
    pictures = quantize_catdog.CatDogDataset(Place(tmp_path, 80).val)
    first, second = list(pictures.batches()), list(pictures.batches())
    names = sum([files for _, _, files in first], [])
    assert len(decoded) == 80 and [len(files) for _, _, files in first] == [60, 20]
    monkeypatch.setattr(quantize_catdog, "BATCH_SIZE", 7)     # edited between two passes: the pictures stay the same
    assert sum([files for _, _, files in pictures.batches()], []) == names
    monkeypatch.setattr(quantize_catdog, "BATCH_SIZE", 60)
    monkeypatch.setattr(quantize_catdog, "KEEP_BYTES", 70 * 224 * 224 * 3)
    pictures = quantize_catdog.CatDogDataset(tmp_path / "cat_dog" / "val")
    third, fourth = list(pictures.batches()), list(pictures.batches())
    assert len(decoded) == 80 + 80 + 10 and len(pictures.kept) == 70
    for batches in (second, third, fourth):
        assert [files for _, _, files in batches] == [files for _, _, files in first]
        for (pixels, labels, _), (expected, expected_labels, _) in zip(batches, first):
            assert torch.equal(pixels, expected) and torch.equal(labels, expected_labels)


def test_pictures_that_were_looked_at_alone_are_decoded_once_too(monkeypatch):
    """As the run does: the first 20 for the proofs, then all of them in each pass."""
    decoded = counted(monkeypatch)
    pictures = quantize_catdog.CatDogDataset(PICTURES)
    pixels = pictures.first_pixels(20)
    assert torch.equal(torch.cat([batch for batch, _, _ in pictures.batches()])[:20], pixels)
    assert sorted(decoded) == sorted(pictures.files)


def test_walks_that_overlap_keep_each_picture_once(tmp_path, monkeypatch):
    """A walk that another one overtakes decodes again, and keeps nothing twice."""
    for name, value in dict(NUM_WORKERS=1, DECODED_AHEAD=1, BATCH_SIZE=2).items():
        monkeypatch.setattr(quantize_catdog, name, value)
    pictures = quantize_catdog.CatDogDataset(Place(tmp_path).val)
    slow = pictures.batches()
    walks = [[next(slow)], list(pictures.batches())]
    walks[0] += slow
    walks.append(list(pictures.batches()))
    expected = torch.cat([pixels for pixels, _, _ in walks[0]])
    for walk in walks:
        assert sum([files for _, _, files in walk], []) == pictures.files
        assert torch.equal(torch.cat([pixels for pixels, _, _ in walk]), expected)
    assert len(pictures.kept) == len(pictures) == 6


def test_a_few_pictures_are_not_all(monkeypatch):
    """`first` decodes whole batches, and no more of them than it needs."""
    for name, value in dict(NUM_WORKERS=1, DECODED_AHEAD=1, BATCH_SIZE=5).items():
        monkeypatch.setattr(quantize_catdog, name, value)
    decoded = counted(monkeypatch)
    assert len(quantize_catdog.CatDogDataset(PICTURES).first_pixels(7)) == 7 and len(decoded) == 10


@pytest.mark.parametrize("name, label", [
    ("cat.0.jpg", 0), ("dog.12.jpg", 1), ("Cat_7.PNG", 0), ("my dogs 3.jpg", 1), ("DOG.jpeg", 1),
    ("bird.1.jpg", None), ("cat_and_dog.jpg", None), ("catalog.jpg", None), ("hotdog.jpg", None), ("1.jpg", None),
    ("Cat/0.jpg", 0), ("DOGS/part 2/0.jpg", 1), ("Cat/dog.1.jpg", None), ("caté.jpg", None), ("cats/猫.jpg", 0),
    ("catss.jpg", None), ("5dog7.jpg", 1)])
def test_label_from_name(name, label):
    assert quantize_catdog.label_of(name) == label


def grey(value, size=(8, 6)):
    return Image.new("L", size, value)


@pytest.mark.parametrize("kind, make, expected", [
    ("L.png", lambda path: grey(77).save(path), (77, 77, 77)),
    ("P.png", lambda path: Image.new("RGB", (8, 6), (200, 30, 90)).quantize(4).save(path), (200, 30, 90)),
    ("RGBA.png", lambda path: Image.new("RGBA", (8, 6), (255, 0, 0, 0)).save(path), (255, 255, 255)),
    ("RGBA-half.png", lambda path: Image.new("RGBA", (8, 6), (255, 0, 0, 128)).save(path), (255, 127, 127)),
    ("LA.png", lambda path: Image.new("LA", (8, 6), (10, 255)).save(path), (10, 10, 10)),
    ("P-transparent.png", lambda path: Image.new("P", (8, 6), 0).save(path, transparency=0), (255, 255, 255)),
    ("CMYK.jpg", lambda path: Image.new("CMYK", (8, 6), (0, 255, 255, 0)).save(path), (255, 0, 0)),
    ("16.png", lambda path: Image.fromarray(np.full((6, 8), 100 * 257, np.uint16)).save(path), (100, 100, 100)),
    ("16.tif", lambda path: Image.fromarray(np.full((6, 8), 200 * 257, np.uint16)).save(path), (200, 200, 200)),
    ("1.png", lambda path: Image.new("1", (8, 6), 1).save(path), (255, 255, 255)),
    ("animated.gif", lambda path: grey(50).save(path, save_all=True, append_images=[grey(200)]), (50, 50, 50)),
    ("animated.webp", lambda path: grey(50).convert("RGB").save(path, save_all=True, lossless=True, append_images=[
        grey(200).convert("RGB")]), (50, 50, 50)),
    ("LA-clear.png", lambda path: Image.new("LA", (8, 6), (10, 0)).save(path), (255, 255, 255)),
    ("RGB-clear.png", lambda path: Image.new("RGB", (8, 6), (1, 2, 3)).save(path, transparency=(1, 2, 3)), (255,) * 3),
    ("16-between.png", lambda path: Image.fromarray(np.full((6, 8), 999, np.uint16)).save(path), (4, 4, 4)),
    ("32.tif", lambda path: Image.new("I", (8, 6), 70000).save(path), (255, 255, 255)),
    ("32-below.tif", lambda path: Image.new("I", (8, 6), -5000).save(path), (0, 0, 0)),
])
def test_odd_pictures_are_decoded_as_a_viewer_shows_them(tmp_path, kind, make, expected):
    """Given as a path, and given as the picture that Pillow opens, which stays as it is."""
    make(tmp_path / kind)
    pixels = quantize_catdog.decode(tmp_path / kind, SIZE)
    assert pixels.shape == (224, 224, 3) and pixels.dtype == np.uint8
    assert np.abs(pixels.astype(int) - expected).max() <= (4 if kind.endswith("jpg") else 0)
    with Image.open(tmp_path / kind) as image:
        before = image.mode, image.size, image.tobytes()
        assert np.array_equal(quantize_catdog.decode(image, SIZE), pixels)
        assert (image.mode, image.size, image.tobytes()) == before


def test_picture_is_turned_as_its_exif_says(tmp_path):
    image = Image.new("RGB", (8, 6), "black")
    image.paste("white", (0, 0, 4, 6))                      # white on the left
    exif = Image.Exif()
    exif[0x0112] = 6                                        # to be turned a quarter clockwise: left becomes top
    image.save(tmp_path / "cat.png", exif=exif)
    pixels = quantize_catdog.decode(tmp_path / "cat.png", SIZE)
    assert pixels[:60].min() > 200 and pixels[-60:].max() < 50
    with Image.open(tmp_path / "cat.png") as image:
        before = np.asarray(image)
        assert np.array_equal(quantize_catdog.decode(image, SIZE), pixels)
        assert np.array_equal(np.asarray(image), before)    # the caller's picture is not turned


def test_picture_size_is_width_and_height():
    pixels = quantize_catdog.decode(PICTURES / "cat.0.jpg", (227, 212))
    with Image.open(PICTURES / "cat.0.jpg") as image:
        assert pixels.shape == (212, 227, 3) and np.array_equal(pixels, np.asarray(image.resize((227, 212))))


def test_mistakes_of_our_own_are_no_broken_pictures(monkeypatch):
    """A name that does not exist, a size that is none: each comes out, and no file is left out because of it."""
    pictures = quantize_catdog.CatDogDataset(PICTURES)
    with monkeypatch.context() as patch, pytest.raises(TypeError):
        patch.setattr(pictures, "size", None)
        list(pictures.batches())
    with monkeypatch.context() as patch, pytest.raises(NameError):
        patch.delattr(quantize_catdog, "np")
        list(pictures.batches())
    with monkeypatch.context() as patch, pytest.raises(NameError):
        patch.delattr(quantize_catdog, "decode")
        list(pictures.batches())
    assert pictures.skipped == {}


def test_unusable_files_are_left_out_and_named(place, usual):
    jpeg = (PICTURES / "cat.9.jpg").read_bytes()
    (place.val / "cat.9.jpg").write_bytes(jpeg[:len(jpeg) // 2])
    (place.val / "dog.9.jpg").write_text("no picture")
    (place.val / "cat.10.jpg").write_bytes(b"")
    (place.val / "dog.10.png").write_bytes(png_header_that_promises(60000, 60000))
    (place.val / "bird.1.jpg").write_bytes(jpeg)
    (place.val / "cat-dog.jpg").write_bytes(jpeg)
    os.mkfifo(place.val / "cat.pipe.jpg")                   # to open it would wait for ever
    (place.val / "dog.link.jpg").symlink_to("nowhere")
    (place.val / "dog.name.jpg").symlink_to("x" * 300)      # no file has so long a name
    status, out, err = place.run(BATCH_SIZE=1)              # a batch may lose all its pictures
    assert (status, err) == (0, ""), err
    report = place.last_report()
    reasons = {row["file"]: row["reason"] for row in report["skipped"]}
    assert set(reasons) == {f"cat_dog/val/{name}" for name in (
        "cat.9.jpg", "dog.9.jpg", "cat.10.jpg", "dog.10.png", "bird.1.jpg", "cat-dog.jpg", "cat.pipe.jpg",
        "dog.link.jpg", "dog.name.jpg")}
    assert "truncated" in reasons["cat_dog/val/cat.9.jpg"] and "neither" in reasons["cat_dog/val/bird.1.jpg"]
    assert "9 files were left out" in out
    assert all(quantize_catdog.shown(name, 78) in out for name in reasons)
    good = usual[1]
    assert report["images"]["evaluated"] == 6 and report["fp32"]["correct"] == good["fp32"]["correct"]
    assert ranges_of(report) == ranges_of(good)
    shutil.rmtree(place.train)
    place.val.rename(place.train)                           # the same among the pictures that calibrate
    shutil.copytree(usual[0].train, place.val)
    report, out = place.report()
    assert {row["file"].replace("train", "val"): row["reason"].replace("cat_dog/train", "cat_dog/val")
            for row in report["skipped"]} == reasons
    assert report["images"] == {"evaluated": 6, "calibrated": 6} and "9 files were left out" in out


def test_pictures_of_too_many_pixels_are_left_out(place):
    """Of more than 2 * 2^25, whatever Pillow's own limit is."""
    (place.val / "dog.10.png").write_bytes(png_header_that_promises(9000, 9000))
    report, _ = place.report()
    assert [row["file"] for row in report["skipped"]] == ["cat_dog/val/dog.10.png"]
    assert "DecompressionBombError" in report["skipped"][0]["reason"]


def test_two_folders_of_one_name_keep_their_left_out_files_apart(place):
    for kind, split, words in (("a", place.train, "no picture"), ("b", place.val, "no picture either")):
        shutil.copytree(split, place.folder / kind / "val")
        (place.folder / kind / "val" / "cat.9.jpg").write_text(words)
    report, out = place.report(DATA_DIR=".", CALIBRATION_SPLIT="a/val", EVALUATION_SPLIT="b/val")
    expected = ["a/val/cat.9.jpg", "b/val/cat.9.jpg"]
    assert [row["file"] for row in report["skipped"]] == expected and "2 files were left out" in out
    assert all(f"{place.folder}/{file}" in row["reason"] for file, row in zip(expected, report["skipped"]))


def test_no_usable_picture(place):
    for split in (place.train, place.val):
        aside, name = place.folder / split.name, f"cat_dog/{split.name}"
        split.rename(aside)
        place.refuse("no folder", name)
        split.mkdir()
        place.refuse("no usable picture", name)
        (split / "cat.0.jpg").write_text("no picture")
        place.refuse("no usable picture", name, "cat.0.jpg")
        shutil.rmtree(split)
        aside.rename(split)


def test_a_line_stays_one_line_whatever_a_file_is_called(place):
    shutil.rmtree(place.val)
    place.val.mkdir()
    (place.val / "cat\n\x1b[2J0.jpg").write_text("no picture")
    place.refuse("no usable picture", "cat_dog/val")


# constants

def test_home_folder(place, monkeypatch, usual, tmp_path_factory):
    home = tmp_path_factory.mktemp("home")
    place.val.parent.rename(home / "pictures")
    place.checkpoint.rename(home / "c.pth.tar")
    monkeypatch.setenv("HOME", str(home))
    status, out, err = run_here(place.edit(DATA_DIR="~/pictures", CHECKPOINT="~/c.pth.tar", OUTPUT_DIR="~/out"))
    assert (status, err) == (0, "")
    report = json.loads((home / "out" / "report.json").read_text())
    assert report["layers"] == usual[1]["layers"] and report["constants"]["DATA_DIR"] == "~/pictures"
    assert not (place.folder / "~").exists()
    assert f"evaluating on  {home}/pictures/val: " in out and f"\nwrote {home}/out/INT8_checkpoint.pth.tar" in out
    assert quantize_catdog.resolve_path("a", "~/b") == home / "b"
    assert quantize_catdog.resolve_path("a", "b~") == ROOT / "a" / "b~"


def test_largest_picture_size_runs_and_is_kept(place):
    """In the INT8 checkpoint too: `predict` brings each picture to this size."""
    report, _ = place.report(IMAGE_SIZE=(227, 212))
    assert report["constants"]["IMAGE_SIZE"] == [227, 212] and report["images"]["evaluated"] == 6
    model = quantize_catdog.INT8_Model.load(place.results / "INT8_checkpoint.pth.tar")
    assert model.recipe["IMAGE_SIZE"] == (227, 212)
    with Image.open(PICTURES / "cat.0.jpg") as image:
        large, small = [np.asarray(image.resize(size)) for size in ((227, 212), (224, 224))]
    with torch.no_grad():
        expected, other = [model(quantize_catdog.to_tensor([pixels]))[0].tolist() for pixels in (large, small)]
    assert model.predict(PICTURES / "cat.0.jpg")[1] == expected != other
    # a folder of pictures too, whatever the constant is here
    outcome = quantize_catdog.evaluate("", model, quantize_catdog.CatDogDataset(place.val, model.recipe["IMAGE_SIZE"]))
    assert outcome.logits[outcome.files.index("cat.0.jpg")].tolist() == expected


# results

RESULTS = {"report.json", "INT8_checkpoint.pth.tar", "runs.csv"}


def test_output_folder_that_cannot_be_written(place):
    (place.folder / "file").write_text("")
    place.refuse("OUTPUT_DIR", "file", OUTPUT_DIR="file/results")


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
    (quantize_catdog.CatDogDataset, "DATA_DIR"), (quantize_catdog.load_checkpoint, "CHECKPOINT"),
    (quantize_catdog.INT8_Model.load, "checkpoint"), (quantize_catdog.make_writable, "OUTPUT_DIR")])
@pytest.mark.parametrize("path", ["closed/a/b", "file/a", "x" * 300, f"{'x' * 300}/a"], ids=lambda path: path[:8])
def test_paths_that_cannot_be_looked_at(tmp_path, use, words, path):
    """In a folder of somebody else's, below a file, of a name that is too long."""
    (tmp_path / "file").write_text("")
    (tmp_path / "closed").mkdir(mode=0)
    error = None
    with nobody() if path.startswith("closed") else contextlib.nullcontext():
        try:
            use(tmp_path / path)
        except quantize_catdog.InputError as found:
            error = str(found)
    assert error and words in error and str(tmp_path / path) in error and error.isprintable()


def test_refused_write_leaves_nothing_behind(place):
    (place.results / "report.json").mkdir(parents=True)
    status, _, err = run_here(place.edit())
    one_line(status, err, "cannot write", "report.json")
    assert set(place.files()) == {"report.json"}


def test_files_of_others_stay(place):
    """Whatever they are called: results/ may be a folder that holds more."""
    place.results.mkdir()
    others = {name: name.encode() for name in ("probe", "tmp", "report.png", "report.json.tmp")}
    for name, content in others.items():
        (place.results / name).write_bytes(content)
    place.report()
    found = place.files()
    assert {name: found.get(name) for name in others} == others
    assert set(found) == set(others) | RESULTS


def test_output_folder_in_folders_that_are_not_there_yet(tmp_path):
    quantize_catdog.make_writable(tmp_path / "a" / "b")
    quantize_catdog.write_files(tmp_path / "a" / "b", {"c": b"c"})
    assert [file.name for file in (tmp_path / "a" / "b").iterdir()] == ["c"]


def test_name_that_a_terminal_cannot_show(place):
    shutil.copy(PICTURES / "cat.0.jpg", place.val / "cat.\u732b.jpg")
    (place.val / "dog.\u732b.jpg").write_text("no picture")
    status, out, err = place.run(environment={**ONE_THREAD, "PYTHONIOENCODING": "ascii"})
    assert (status, err) == (0, "")
    report = place.last_report()
    assert report["images"]["evaluated"] == 7 and report["skipped"][0]["file"] == "cat_dog/val/dog.\u732b.jpg"
    assert r"dog.\u732b.jpg" in out


NAMES = ["x" * 300, "cat.0.jpg", "猫" * 200, "a\nb\r\x1b[2J" * 30, "\u202e" * 99, "\udcff" * 99, "cat\u0301" * 99,
         " " * 500, "/".join(["folder"] * 60)]


def test_summary_is_at_most_80_characters_wide(usual, capsys):
    """With names of any length and kind, in lines that hold nothing but what can be printed."""
    flips = [{"file": name, "label": "dog", "better": better, "fp32_margin": 12.345, "fp32_logits": [-12.345, 11.222],
              "int8_logits": [11.222, -12.345]} for name in NAMES for better in (True, False)]
    skipped = [{"file": f"/home/{name}", "reason": f"cannot be decoded: {name}"} for name in NAMES * 3]
    recipe = usual[1]["recipe"] | {"WEIGHT_BIT": 7}
    quantize_catdog.print_summary(usual[1] | {"flips": flips, "skipped": skipped, "recipe": recipe,
                                              "images": {"evaluated": 123_456, "calibrated": 123_456}})
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if len(line) > 80] == []
    assert all(line.isprintable() for line in lines)
    assert sum(" (dog), for the " in line for line in lines) == len(flips)
    assert sum("margin 12.345" in line for line in lines) == len(flips)
    assert len(lines) == 1 + 3 + 1 + 1 + 2 + 1 + 2 * len(flips) + 1 + 2 * quantize_catdog.LISTED + 1
    assert "18 pictures changed their class, 27 files were left out" in lines
    assert sum("..." in line for line in lines) >= 2 * 7 + quantize_catdog.LISTED


def test_pictures_that_come_and_go_during_the_run(tmp_path, monkeypatch):
    """Where they are decoded twice, FP32 and INT8 answers would be of other pictures: the run ends with one line."""
    monkeypatch.setattr(quantize_catdog, "KEEP_BYTES", 0)
    monkeypatch.setattr(quantize_catdog, "BATCH_SIZE", 1)
    place = Place(tmp_path)
    moved = (place.val / "dog.1.jpg").rename(tmp_path / "dog.1.jpg")
    pictures = quantize_catdog.CatDogDataset(place.val)
    pictures.files.insert(3, "dog.1.jpg")                   # listed, but gone before it is read
    pictures.labels.insert(3, 1)
    model = quantize_catdog.CNN_Model().eval()
    first = quantize_catdog.evaluate("FP32", model, pictures)
    (place.val / "cat.1.jpg").unlink()
    moved.rename(place.val / "dog.1.jpg")
    second = quantize_catdog.evaluate("FP32", model, pictures)
    names = ["cat.0.jpg", "dog.0.jpg", "cat.1.jpg", "dog.1.jpg", "cat.2.jpg", "dog.2.jpg"]
    assert first.files == names[:3] + names[4:] and second.files == names[:2] + names[3:]
    assert first.labels.tolist() == [0, 1, 0, 0, 1] and second.labels.tolist() == [0, 1, 1, 0, 1]
    assert set(pictures.skipped) == {f"{place.val}/cat.1.jpg", f"{place.val}/dog.1.jpg"}
    for fp32, int8 in ((first, second), (first, first._replace(files=["a"] * 5))):
        with pytest.raises(quantize_catdog.InputError, match="^pictures came or went.*run it again$"):
            quantize_catdog.compare(fp32, int8)
    assert quantize_catdog.compare(first, first)["agreement"] == 1


@pytest.mark.parametrize("keep_bytes, step", [(0, "# ### Quantize\n"), (2**28, "# ### Compare\n")])
def test_picture_that_goes_during_the_run_ends_it(rerun, keep_bytes, step):
    """Between the passes, where it is not kept in memory; or before its bytes are summed up."""
    script, before = rerun.edit(KEEP_BYTES=keep_bytes), rerun.files()
    before_step, mark, step = script.read_text().partition(step)
    script.write_text(f"{before_step}\nos.remove({str(rerun.val / 'cat.1.jpg')!r})\n{mark}{step}")
    status, _, err = run_here(script)
    one_line(status, err, "pictures came or went")
    assert rerun.files() == before


def test_earlier_results_survive_a_refused_run(rerun):
    before = rerun.files()
    rerun.checkpoint.unlink()
    status, _, err = run_here(rerun.edit())
    one_line(status, err, "no checkpoint")
    assert rerun.files() == before and set(before) == RESULTS


@pytest.mark.parametrize("stopped_at", [0, 1, 2])
def test_report_is_absent_while_the_checkpoint_changes(tmp_path, monkeypatch, stopped_at):
    """Files that lie together are of one run, or there is no report. Nothing half-written is left."""
    replace, calls = os.replace, []
    for name in ("c", "report.json"):
        (tmp_path / name).write_bytes(b"before")

    def stop(source, target):
        calls.append(target)
        assert not (tmp_path / "report.json").exists()
        if len(calls) == stopped_at:
            raise KeyboardInterrupt
        replace(source, target)
    monkeypatch.setattr(os, "replace", stop)

    def stop_writing(path, _):
        path.touch()
        raise KeyboardInterrupt
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        if stopped_at == 0:
            patch.setattr(type(tmp_path), "write_bytes", stop_writing)
        quantize_catdog.write_files(tmp_path, {"c": b"after", "report.json": b"after"})
    found = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    assert found == [{"c": b"before", "report.json": b"before"}, {"c": b"before"}, {"c": b"after"}][stopped_at]


# the checkpoint: in this process, since each case needs only the loader

def test_missing_checkpoint_ends_the_run(place):
    place.checkpoint.unlink()
    place.refuse("no checkpoint", "BEST_checkpoint.pth.tar", "CHECKPOINT")


@pytest.mark.parametrize("change, words", [
    (lambda s: s.pop("cnn2.weight"), ["cnn2.weight", "missing"]),
    (lambda s: s.pop("bn4.running_var"), ["bn4.running_var", "missing"]),
    (lambda s: s.update({"fc1.weight": torch.zeros(512, 100)}), ["fc1.weight", "(512, 100)", "(512, 968)"]),
    (lambda s: s.update({"fc2.bias": torch.tensor([0.0, math.nan])}), ["fc2.bias", "NaN"]),
    (lambda s: s.update({"cnn1.bias": torch.full((16,), math.inf)}), ["cnn1.bias", "infinity"]),
    (lambda s: s.update({"bn1.running_var": torch.full((16,), -1.0)}), ["bn1.running_var", "negative"]),
    (lambda s: s.update({"cnn1.bias": torch.zeros(16, dtype=torch.int64)}), ["cnn1.bias", "int64"]),
    (lambda s: s.update({"cnn1.bias": 3}), ["cnn1.bias", "missing"]),
    (lambda s: s.update({"cnn1.bias": torch.full((16,), 1e300, dtype=torch.float64)}), ["cnn1.bias", "infinity"]),
    (lambda s: s.update({"cnn1.bias": torch.empty(16, device="meta")}), ["cnn1.bias", "dense"]),
    (lambda s: s.update({"cnn1.bias": torch.zeros(16).to_sparse()}), ["cnn1.bias", "dense"]),
    (lambda s: s.update({"cnn1.bias": torch.full((16,), math.nan).to(torch.float8_e4m3fn)}), ["cnn1.bias", "NaN"]),
])
def test_wrong_weights(tmp_path, state, change, words):
    changed = dict(state)
    change(changed)
    torch.save({"model": changed}, tmp_path / "c.pth.tar")
    refused(tmp_path / "c.pth.tar", *words)


def test_weights_alone_are_enough(tmp_path, state):
    """Torch before 0.4.1 counted no batches, and no ranges are needed: they are set anew."""
    weights = {name: value for name, value in state.items() if not name.endswith("num_batches_tracked")
               and not name.startswith("range_")}
    assert len(weights) == 28
    torch.save({"model": weights}, tmp_path / "c.pth.tar")
    found = quantize_catdog.load_checkpoint(tmp_path / "c.pth.tar").state_dict()
    assert all(torch.equal(found[name], value) for name, value in weights.items())


def test_weights_that_overflow(place, state):
    torch.save({"model": {**state, "cnn1.weight": torch.full((16, 3, 5, 5), 1e38)}}, place.checkpoint)
    place.refuse("values at cv1 overflow FP32")


def test_evaluated_picture_that_overflows(place, state):
    """The calibration pictures are black; what the others lead to is no number. Nothing is written."""
    black = place.folder / "cat_dog" / "black"
    black.mkdir()
    Image.new("RGB", (224, 224)).save(black / "cat.0.jpg")
    torch.save({"model": {**state, "fc2.weight": state["fc2.weight"] * 1.2e38}}, place.checkpoint)
    place.refuse("logits overflow FP32", CALIBRATION_SPLIT="black")


def test_headroom_that_overflows(tmp_path, state):
    """FC1's largest value is a number of FP32, twice that is not."""
    pictures = quantize_catdog.CatDogDataset(Place(tmp_path).val)
    folded = loaded(state).fused()
    quantize_catdog.calibrate(folded, pictures)
    factor = 2.5e38 / folded.range_fc1.max()
    changed = {name: state[name] * factor for name in ("fc1.weight", "fc1.bias")}
    folded = loaded({**state, **changed, "fc2.weight": torch.zeros(2, 512)}).fused()
    quantize_catdog.calibrate(folded, pictures)
    recipe = quantize_catdog.current_recipe()
    assert folded.range_fc1.max().isfinite() and folded.cl_scale(recipe | {"HEADROOM": 1})
    with pytest.raises(quantize_catdog.InputError, match="values at fc1 overflow FP32"):
        folded.cl_scale(recipe)


def test_calibrating_again_forgets_the_pictures_before(tmp_path, state):
    bright, dark = Place(tmp_path / "a"), Place(tmp_path / "b")
    for file in dark.val.iterdir():
        Image.new("RGB", (224, 224), (9, 9, 9)).save(file)
    folded, alone = loaded(state).fused(), loaded(state).fused()
    quantize_catdog.calibrate(alone, quantize_catdog.CatDogDataset(dark.val))
    for place in (bright, dark):
        quantize_catdog.calibrate(folded, quantize_catdog.CatDogDataset(place.val))
        same = [torch.equal(folded.ranges[name], alone.ranges[name]) for name in quantize_catdog.ACTIVATIONS[1:]]
        assert set(same) == {place is dark}


def test_sample_is_of_good_pictures_at_any_batch_size(tmp_path, monkeypatch):
    place = Place(tmp_path, 20)
    for name in ("cat.0.jpg", "dog.3.jpg"):
        (place.val / name).write_bytes(b"broken")
    found = []
    for size in (1, 4, 7, 50):
        monkeypatch.setattr(quantize_catdog, "BATCH_SIZE", size)
        found.append(quantize_catdog.CatDogDataset(place.val).first_pixels(10))
    assert all(len(pixels) == 10 and torch.equal(pixels, found[0]) for pixels in found)


@pytest.mark.parametrize("load", [quantize_catdog.load_checkpoint, quantize_catdog.INT8_Model.load])
@pytest.mark.parametrize("saved", [[1, 2], {"weights": {}}, {"model": None}, {"model": 3}, "text"])
def test_file_without_a_model(tmp_path, saved, load):
    torch.save(saved, tmp_path / "c.pth.tar")
    refused(tmp_path / "c.pth.tar", "model", load=load)


def notebook_model(state):
    """The notebook's pickled module, whose class lives in __main__, with modules and attributes of its own."""
    class CNN_Model(torch.nn.Module):
        pass
    CNN_Model.__module__, CNN_Model.__qualname__ = "__main__", "CNN_Model"
    sys.modules["__main__"].CNN_Model = CNN_Model
    model = CNN_Model()
    for name, part in loaded(state).named_children():
        kind = type(part).__mro__[1] if type(part).__module__ == "quantize_catdog" else type(part)      # torch's own
        model.add_module(name, torch.nn.MaxPool2d(2) if name.startswith("maxpool") else as_kind(part, kind))
    model.relu5, model.output = torch.nn.ReLU(), torch.nn.Softmax(dim=1)
    model.range_cv1, model.Quantization, model.bit = torch.tensor(1.0), False, 8
    return model


def as_kind(part, kind):
    """The same layer as an object of another class."""
    other = kind.__new__(kind)
    other.__dict__.update(part.__dict__)
    return other


@pytest.fixture
def main_class():
    yield
    vars(sys.modules["__main__"]).pop("CNN_Model", None)


def test_notebooks_pickled_module_loads(tmp_path, state, main_class):
    torch.save({"model": notebook_model(state)}, tmp_path / "c.pth.tar")
    del sys.modules["__main__"].CNN_Model
    found = quantize_catdog.load_checkpoint(tmp_path / "c.pth.tar").state_dict()
    assert all(torch.equal(found[name], value) for name, value in state.items() if value.is_floating_point())


def test_pickled_module_of_the_script_loads(tmp_path, state):
    """Its own classes, pickled under the name that they have where it is imported."""
    torch.save({"model": loaded(state)}, tmp_path / "c.pth.tar")
    found = quantize_catdog.load_checkpoint(tmp_path / "c.pth.tar").state_dict()
    assert all(torch.equal(found[name], value) for name, value in state.items() if value.is_floating_point())


def test_pickled_module_with_a_foreign_class_is_refused(tmp_path, state, main_class):
    model = notebook_model(state)
    model.extra = torch.nn.Dropout()
    torch.save({"model": model}, tmp_path / "c.pth.tar")
    refused(tmp_path / "c.pth.tar", "torch.nn.modules.dropout.Dropout")


@pytest.mark.parametrize("load", [quantize_catdog.load_checkpoint, quantize_catdog.INT8_Model.load])
@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("where", ["model", "note", "recipe"])
def test_hostile_pickle_is_refused_without_running_it(tmp_path, state, where, zipped, load):
    saved = {"model": state, where: hostile(tmp_path / "executed")}
    torch.save(saved, tmp_path / "c.pth.tar", _use_new_zipfile_serialization=zipped)
    refused(tmp_path / "c.pth.tar", "mkdir" if zipped else "damaged", load=load)
    assert not (tmp_path / "executed").exists()
    with pytest.raises(FileExistsError):                    # the pickle does what the test thinks it does
        (tmp_path / "executed").mkdir()
        torch.load(tmp_path / "c.pth.tar", weights_only=False)


# the INT8 checkpoint

KEYS = [f"scale_{place}" for place in oracle.ACTIVATIONS] + [
    f"{layer}.{key}" for layer in LAYERS for key in ("weight", "bias", "w_scale")]


def test_int8_checkpoint_holds_what_was_run(usual):
    place, report, out = usual
    path = place.results / "INT8_checkpoint.pth.tar"
    saved = torch.load(path, weights_only=True)         # tensors and plain values only, or this raises
    assert set(saved) == {"model", "recipe"} and list(saved["model"]) == KEYS
    assert json.loads(json.dumps(saved["recipe"])) == report["recipe"]
    assert report["recipe"] == {name: report["constants"][name] for name in quantize_catdog.RECIPE}
    dtypes = {"weight": torch.int8, "bias": torch.int32}
    assert all(value.dtype == dtypes.get(name.split(".")[-1], torch.float32) for name, value in saved["model"].items())
    assert "loaded back, the INT8 checkpoint changes a logit by 0\n" in out
    rows = {row["name"]: row for row in report["layers"]}
    assert rows["cnn3"]["scale_in"] == saved["model"]["scale_cv2"].item()
    assert rows["cnn3"]["weight_scale"] == saved["model"]["cnn3.w_scale"].tolist()
    assert set(place.files()) == RESULTS
    again = quantize_catdog.int8_checkpoint(quantize_catdog.load_int8_checkpoint(path))
    assert again == path.read_bytes()                   # nor is there a time in it


def test_no_time_is_in_the_int8_checkpoint(state):
    file = io.BytesIO(quantize_catdog.int8_checkpoint(quantized(state)[0]))
    with zipfile.ZipFile(file) as parts:
        assert {part.date_time for part in parts.infolist()} == {(1980, 1, 1, 0, 0, 0)}


def test_int8_checkpoint_alone_gives_the_same_answers(rerun, usual):
    """Three lines of Python do it: no FP32 weights, no calibration, whatever the constants say."""
    report, path = usual[1], rerun.results / "INT8_checkpoint.pth.tar"
    rerun.edit(BIT=4, WEIGHT_BIT=4, PER_CHANNEL=False, CALIBRATION_SPLIT="nowhere", CHECKPOINT="nowhere")
    done = subprocess.run([sys.executable, "-c", """from quantize_catdog import CatDogDataset, INT8_Model, evaluate
model = INT8_Model.load("results/INT8_checkpoint.pth.tar")
evaluate("INT8", model, CatDogDataset("cat_dog/val"))"""], cwd=rerun.folder, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"INT8 Top1: {report['int8']['top1']:.3f}, 6 of 6 pictures of cat_dog/val\n"
    model = quantize_catdog.INT8_Model.load(path)
    outcome = quantize_catdog.evaluate("INT8", model, quantize_catdog.CatDogDataset(rerun.val))
    assert quantize_catdog.accuracy_of(outcome)["confusion"] == report["int8"]["confusion"]
    assert json.loads(json.dumps(model.recipe)) == report["recipe"] and model.engine == report["engine"]
    assert quantize_catdog.layer_table(model) == report["layers"]


def test_int8_checkpoint_is_refused_as_fp32_weights(rerun):
    before = rerun.files()
    status, _, err = run_here(rerun.edit(CHECKPOINT="results/INT8_checkpoint.pth.tar"))
    one_line(status, err, "results/INT8_checkpoint.pth.tar", "INT8 network", "set CHECKPOINT to FP32 weights",
             "INT8_Model.load")
    assert rerun.files() == before


RECIPES = {"default": {}, "notebook's": dict(PER_CHANNEL=False, UNSIGNED_RELU=False, BIAS_BIT=16, QUANTIZE_LOGITS=True),
           "5 bits": dict(BIT=5, WEIGHT_BIT=5, BIAS_BIT=20), "W4-8A8": dict(LAYER_BITS={"cnn2": 5, "fc1": 4}),
           "wide": dict(IMAGE_SIZE=(227, 212))}


@pytest.fixture(scope="module", params=RECIPES)
def kept(request, tmp_path_factory, state):
    """(INT8_Model, pixels, its checkpoint), for several recipes; `expected`: logits before it was saved."""
    path = tmp_path_factory.mktemp("kept") / "INT8_checkpoint.pth.tar"
    int8, pixels = quantized(state, **RECIPES[request.param])
    with torch.no_grad():
        int8.expected = int8(pixels)
    path.write_bytes(quantize_catdog.int8_checkpoint(int8))
    return int8, pixels, path


def test_int8_checkpoint_loads_to_the_same_logits(kept, capfd, monkeypatch):
    """Whatever the constants say when it is loaded."""
    int8, pixels, path = kept
    for name, value in dict(BIT=3, WEIGHT_BIT=2, LAYER_BITS={"cnn1": 2}, IMAGE_SIZE=(220, 220), PER_CHANNEL=False,
                            BIAS_BIT=9).items():
        monkeypatch.setattr(quantize_catdog, name, value)
    found = quantize_catdog.INT8_Model.load(path)
    assert list(found.state_dict()) == KEYS and found.recipe == int8.recipe
    for name, value in int8.state_dict().items():
        assert found.state_dict()[name].dtype == value.dtype and torch.equal(found.state_dict()[name], value)
    with torch.no_grad():
        assert torch.equal(found(pixels), int8.expected) and torch.equal(int8(pixels), int8.expected)
    answer = found.predict(PICTURES / "cat.0.jpg")
    assert answer == (("cat", "dog")[int8.expected[0].argmax()], int8.expected[0].tolist())
    assert [file.name for file in path.parent.iterdir()] == [path.name] and capfd.readouterr().out == ""


@pytest.mark.parametrize("bits", [8, 5])
def test_checkpoint_of_an_earlier_version(tmp_path, state, monkeypatch, bits):
    """Its recipe lacks what came later: it is for 224 x 224 pixels, and BIT is the width of all. The answers stay."""
    int8, pixels = quantized(state, BIT=bits, WEIGHT_BIT=bits)
    missing = dict(IMAGE_SIZE=(227, 212), WEIGHT_BIT=2, LAYER_BITS={"fc1": 3})
    recipe = {name: value for name, value in int8.recipe.items() if name not in missing}
    path = tmp_path / "c.pth.tar"
    torch.save({"recipe": recipe, "model": int8.state_dict()}, path)
    for name, value in missing.items():
        monkeypatch.setattr(quantize_catdog, name, value)
    old = quantize_catdog.INT8_Model.load(path)
    assert old.recipe == int8.recipe
    assert [old.recipe[name] for name in missing] == [(224, 224), bits, {}]
    with torch.no_grad():
        assert old.predict(PICTURES / "cat.0.jpg")[1] == int8(pixels)[0].tolist()


def change_tensor(name, value):
    return lambda saved: saved["model"].update({name: value})


def change_scale(name, value):
    return lambda saved: saved["model"][name].fill_(value)


@pytest.mark.parametrize("change, words", [
    (lambda saved: saved["model"].pop("cnn2.bias"), ["cnn2.bias", "missing"]),
    (lambda saved: saved["model"].pop("scale_fc2"), ["scale_fc2", "missing"]),
    (change_tensor("cnn1.weight", torch.zeros(16, 3, 5, 5)), ["cnn1.weight", "float32", "int8"]),
    (change_tensor("cnn1.bias", torch.zeros(16, dtype=torch.int64)), ["cnn1.bias", "int64", "int32"]),
    (change_tensor("fc2.weight", torch.zeros(2, 5, dtype=torch.int8)), ["fc2.weight", "(2, 512)"]),
    (change_tensor("cnn1.w_scale", torch.ones(3)), ["cnn1.w_scale", "(3,)"]),
    (lambda saved: saved["model"]["cnn1.weight"].fill_(-128), ["cnn1.weight", "beyond"]),
    (change_scale("scale_cv1", 0), ["scale_cv1", "not positive"]),
    (change_scale("fc1.w_scale", -1), ["fc1.w_scale", "not positive"]),
    (change_scale("scale_input", math.nan), ["scale_input", "NaN"]),
    (change_scale("scale_fc1", 1e-45), ["overflow", "fc2"]),
    (change_scale("scale_fc1", 1e-38), ["overflow", "fc2"]),
    (change_scale("cnn2.w_scale", 1e-38), ["overflow", "cnn2"]),
    (lambda saved: saved["recipe"].pop("BIT"), ["recipe", "BIT in its recipe is not ", "2 to 8"]),
    (lambda saved: saved["recipe"].pop("PER_CHANNEL"), ["recipe", "PER_CHANNEL in its recipe is not "]),
    (lambda saved: saved["recipe"].update(BIT=9), ["recipe", "BIT", "2 to 8"]),
    (lambda saved: saved["recipe"].update(WEIGHT_BIT=9), ["recipe", "WEIGHT_BIT", "2 to 8"]),
    *[(lambda saved, bits=bits: saved["recipe"].update(LAYER_BITS=bits), ["recipe", "LAYER_BITS", "2 to 8"])
      for bits in ({"fc1": 9}, {"fc3": 4}, {"fc1": True}, {"fc1": torch.tensor(4)}, [4], None)],
    (lambda saved: saved["recipe"].update(IMAGE_SIZE=(9000, 224)), ["recipe", "IMAGE_SIZE", "212 to 227"]),
    (lambda saved: saved["recipe"].update(IMAGE_SIZE=(224,)), ["recipe", "IMAGE_SIZE", "212 to 227"]),
    (lambda saved: saved["recipe"].update(IMAGE_SIZE="224"), ["recipe", "IMAGE_SIZE", "212 to 227"]),
    (lambda saved: saved["recipe"].update(PER_CHANNEL="yes"), ["recipe", "PER_CHANNEL", "True or False"]),
    (lambda saved: saved["recipe"].update(HEADROOM=math.inf), ["recipe", "HEADROOM", "1 to 16"]),
    (lambda saved: saved.update(recipe=[8]), ["no recipe", "INT8_checkpoint.pth.tar of a run"]),
    (lambda saved: saved.pop("recipe"), ["no recipe", "INT8_checkpoint.pth.tar of a run"]),
    (lambda saved: saved.pop("model"), ["damaged"]),
])
def test_wrong_int8_checkpoint(kept, tmp_path, change, words):
    saved = torch.load(kept[2], weights_only=True)
    change(saved)
    torch.save(saved, tmp_path / "c.pth.tar")
    refused(tmp_path / "c.pth.tar", *words, load=quantize_catdog.INT8_Model.load)


@pytest.mark.parametrize("recipe, width, name", [
    (dict(WEIGHT_BIT=5), 5, "cnn3.weight"), (dict(BIAS_BIT=20), 20, "fc1.bias"),
    (dict(LAYER_BITS={"fc1": 4}), 4, "fc1.weight"), (dict(WEIGHT_BIT=3, LAYER_BITS={"fc1": 4}), 3, "cnn4.weight")],
    ids=str)
def test_int8_checkpoint_with_integers_wider_than_its_recipe(tmp_path, state, recipe, width, name):
    """The largest that fits is taken, the next is not."""
    int8, path = quantized(state, **recipe)[0], tmp_path / "c.pth.tar"
    for integer in (2**(width - 1) - 1, 2**(width - 1)):
        int8.state_dict()[name].view(-1)[-1] = integer
        path.write_bytes(quantize_catdog.int8_checkpoint(int8))
        if integer < 2**(width - 1):
            assert quantize_catdog.load_int8_checkpoint(path).state_dict()[name].flatten()[-1] == integer
    refused(path, name, f"beyond {2**(width - 1) - 1}", load=quantize_catdog.INT8_Model.load)


def test_fp32_checkpoint_is_no_int8_model():
    refused(ROOT / "BEST_checkpoint.pth.tar", "holds FP32 weights", "INT8_checkpoint.pth.tar",
            load=quantize_catdog.INT8_Model.load)


# as a module

@pytest.fixture(scope="module")
def model(usual):
    return quantize_catdog.INT8_Model.load(usual[0].results / "INT8_checkpoint.pth.tar")


def test_three_lines_classify_a_picture(usual, model):
    done = subprocess.run([sys.executable, "-c", f"""from quantize_catdog import INT8_Model
model = INT8_Model.load({str(usual[0].results / "INT8_checkpoint.pth.tar")!r})
print(model.predict({str(PICTURES / "cat.0.jpg")!r}))"""], cwd=ROOT, capture_output=True, text=True, check=True)
    with Image.open(PICTURES / "cat.0.jpg") as image, torch.no_grad():
        logits = model(quantize_catdog.to_tensor([np.asarray(image.resize((224, 224)))]))[0]
    assert done.stdout == f"{(('cat', 'dog')[logits.argmax()], logits.tolist())}\n"


def test_predict_takes_what_holds_a_picture(model):
    """A path, a Pillow picture, an array; or a list of them all, in one pass that answers the same."""
    files = [PICTURES / name for name in ("cat.0.jpg", "dog.0.jpg", "cat.1.jpg", "dog.1.jpg")]
    images = [Image.open(file) for file in files]
    arrays = [np.asarray(image) for image in images]
    with torch.no_grad():
        pixels = [np.asarray(image.resize((224, 224))) for image in images]
        logits = [model(quantize_catdog.to_tensor([each]))[0] for each in pixels]
    expected = [(("cat", "dog")[row.argmax()], row.tolist()) for row in logits]
    assert len({name for name, _ in expected}) == 2 and len({tuple(row) for _, row in expected}) == 4
    passes = []
    handle = model.register_forward_pre_hook(lambda _, inputs: passes.append(len(inputs[0])))
    try:
        for file, image, array, answer in zip(files, images, arrays, expected):
            for picture in (file, str(file), image, array, array[::-1][::-1]):
                assert model.predict(picture) == answer
        assert passes == [1] * 20
        mixed = [files[0], arrays[1], images[2], str(files[3]), images[0]]
        assert model.predict(mixed) == expected + expected[:1]
        assert passes == [1] * 20 + [5]
        assert model.predict(files[:1]) == expected[:1]     # a list of one is a list
        assert model.predict([]) == [] and len(passes) == 22
    finally:
        handle.remove()
    assert [np.array_equal(np.asarray(image), array) for image, array in zip(images, arrays)] == [True] * 4


@pytest.mark.parametrize("picture", [
    *[np.zeros(shape, np.uint8) for shape in ((9, 9), (9, 9, 4), (9, 9, 1), (3, 9, 9), (1, 9, 9, 3), (3,), (),
                                              (0, 9, 3), (9, 0, 3))],
    *[np.zeros((9, 9, 3), dtype) for dtype in (np.float64, np.int8, bool)], None, 3, ("cat.0.jpg",)],
    ids=lambda picture: f"{picture.dtype}{picture.shape}" if isinstance(picture, np.ndarray) else str(picture))
def test_predict_refuses_what_is_no_picture(model, picture):
    with pytest.raises(quantize_catdog.InputError, match="^picture 0 ") as error:
        model.predict(picture)
    assert "\n" not in str(error.value)
    with pytest.raises(quantize_catdog.InputError, match="^picture 1 "):
        model.predict([PICTURES / "cat.0.jpg", picture])


def test_loop_over_pictures_lives_on_at_broken_ones(model, tmp_path):
    """`except Exception` is what programs write; nothing but InputError comes."""
    (tmp_path / "broken.jpg").write_bytes(b"no picture")
    (tmp_path / "half.jpg").write_bytes((PICTURES / "cat.0.jpg").read_bytes()[:2000])
    (tmp_path / "folder.jpg").mkdir()
    os.mkfifo(tmp_path / "pipe.jpg")
    bad = {"broken.jpg": "cannot be decoded", "half.jpg": "truncated", "folder.jpg": "is no file",
           "pipe.jpg": "is no file", "none.jpg": "cannot be decoded: FileNotFoundError"}
    answers, errors = [], []
    for file in [PICTURES / "cat.0.jpg", *[tmp_path / name for name in bad], PICTURES / "dog.0.jpg"]:
        try:
            answers.append(model.predict(file))
        except Exception as error:
            errors.append(error)
    assert answers == model.predict([PICTURES / "cat.0.jpg", PICTURES / "dog.0.jpg"])
    for error, (name, words) in zip(errors, bad.items(), strict=True):
        assert isinstance(error, quantize_catdog.InputError) and str(error).startswith(f"{tmp_path / name} ")
        assert words in str(error) and "\n" not in str(error)
    with pytest.raises(quantize_catdog.InputError, match="half.jpg cannot be decoded"):
        model.predict([PICTURES / "cat.0.jpg", str(tmp_path / "half.jpg")])


def test_copy_of_a_model_is_another(model):
    """It answers the same, and its weights are its own, also in what is prepared from them."""
    picture = PICTURES / "cat.0.jpg"
    answer, other = model.predict(picture), copy.deepcopy(model)
    assert other.engine == model.engine and other.predict(picture) == answer
    other.cnn1.weight.zero_()
    assert other.predict(picture) != answer == model.predict(picture)


def test_model_that_was_loaded_in_inference_mode(usual, model):
    """As programs do that only answer."""
    with torch.inference_mode():
        other = quantize_catdog.INT8_Model.load(usual[0].results / "INT8_checkpoint.pth.tar")
        assert other.predict(PICTURES / "cat.0.jpg") == model.predict(PICTURES / "cat.0.jpg")
    assert other.predict(PICTURES / "dog.0.jpg") == model.predict(PICTURES / "dog.0.jpg")


IMPORTING = """
import ctypes, os, random, signal, sys, threading, warnings
import numpy, torch, torchnet.meter
from PIL import Image

os.chdir("/")
sys.excepthook = lambda *error: None
signal.signal(signal.SIGUSR1, lambda *_: None)
Image.MAX_IMAGE_PIXELS = 12345
asked, load = [], ctypes.CDLL


def library(*names, **options):
    asked.append(names)
    return load(*names, **options)


ctypes.CDLL = library       # the way to glibc's allocator


def process():
    return {
        "warnings": repr(warnings.filters), "pixels": Image.MAX_IMAGE_PIXELS, "libraries": list(asked),
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
    done = subprocess.run([sys.executable, "-c", IMPORTING], capture_output=True, text=True,
                          env={**os.environ, "PYTHONPATH": str(ROOT)})
    changed = ["allow_tf32", *["libraries"] * (sys.platform == "linux"), "pixels", "stdout", "warnings"]
    assert (done.returncode, done.stdout, done.stderr) == (0, " ".join(changed) + "\n", "")


# closer to FP32

def test_the_methods_pay(tmp_path, state):
    """On the trained network and pictures that did not calibrate: without any, with the strongest, with all."""
    for file in PICTURES.iterdir():
        folder = tmp_path / ("calibration" if int(file.name.split(".")[1]) < 20 else "evaluation")
        folder.mkdir(exist_ok=True)
        shutil.copy(file, folder)
    calibration, evaluation = [quantize_catdog.CatDogDataset(tmp_path / name) for name in ("calibration", "evaluation")]
    folded = loaded(state).fused()
    quantize_catdog.calibrate(folded, calibration)
    fp32 = quantize_catdog.evaluate("FP32", folded, evaluation)
    off = dict(HEADROOM=1, EQUALIZE=False, GPTQ=False, BIAS_CORRECTION=False)
    sqnr = {}
    for name in ("none", "HEADROOM", "all"):
        constants = {} if name == "all" else {key: value for key, value in off.items() if key != name}
        recipe = quantize_catdog.current_recipe() | constants
        fp32_model, int8 = quantize_catdog.quantize_network(folded, calibration.first_pixels(quantize_catdog.SAMPLE), recipe)
        sqnr[name] = quantize_catdog.compare(fp32, quantize_catdog.evaluate("INT8", int8, evaluation))["logit_sqnr_db"]
        nearest = fp32_model.cl_scale(recipe)
        assert (fp32_model is not folded) == (name == "all")                        # equalized
        for key in ("cnn1.weight", "fc2.bias"):                                     # by GPTQ, by bias correction
            assert torch.equal(int8.state_dict()[key], nearest.state_dict()[key]) == (name != "all")
    assert sqnr["none"] + 0.5 < sqnr["HEADROOM"] and sqnr["none"] + 3 < sqnr["all"]


# accuracy

def test_accuracy_on_the_drawings(tmp_path):
    """The run as it is shipped, no constant edited."""
    place = Place(tmp_path, 100)
    report, out = place.report()
    assert report["images"]["evaluated"] == 100
    assert 95 <= report["fp32"]["top1"] <= 99.9


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
