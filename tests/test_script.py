"""The script as its user meets it: a copy with edited constants is run, on good input and on bad."""
import json
import math
import os
import platform
import re
import shutil
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import oracle
import quantize_catdog

ROOT = Path(__file__).resolve().parent.parent
PICTURES = ROOT / "cat_dog" / "val"


class Place:
    """A folder with a copy of the script, a few pictures and the checkpoint."""

    def __init__(self, folder, pictures=6):
        self.folder, self.val, self.checkpoint = folder, folder / "cat_dog" / "val", folder / "BEST_checkpoint.pth.tar"
        self.val.mkdir(parents=True)
        for i in range(pictures // 2):
            for kind in ("cat", "dog"):
                shutil.copy(PICTURES / f"{kind}.{i}.jpg", self.val)
        shutil.copy(ROOT / "BEST_checkpoint.pth.tar", self.checkpoint)
        shutil.copy(ROOT / "quantize_catdog.py", folder)

    def edit(self, **constants):
        """Edit constants as a user would, and return the copy's path."""
        script = self.folder / "quantize_catdog.py"
        text = (ROOT / "quantize_catdog.py").read_text()
        for name, value in constants.items():
            text, count = re.subn(rf"(?m)^{name} = .*$", lambda _: f"{name} = {value!r}", text)
            assert count == 1, f"{name} is not one assignment on one line"
        script.write_text(text)
        return script

    def run(self, environment=None, **constants):
        """Run the copy with these constants, and return (exit status, stdout, stderr)."""
        script = self.edit(**constants)
        # from another folder: relative paths must be taken from the script's
        done = subprocess.run([sys.executable, script], cwd="/", capture_output=True, text=True, timeout=300,
                              env={**os.environ, **(environment or {})})
        return done.returncode, done.stdout, done.stderr

    def report(self, **constants):
        status, out, err = self.run(**constants)
        assert (status, err) == (0, ""), err
        return json.loads((self.folder / "results" / "report.json").read_text()), out

    def refuse(self, *words, **constants):
        """The run must end with one line that holds the words, status 1, and no report."""
        status, _, err = self.run(**constants)
        assert status == 1
        assert len(err.strip().splitlines()) == 1 and "Traceback" not in err, err
        for word in words:
            assert word in err
        results = self.folder / "results"
        assert not results.is_dir() or not list(results.iterdir())


@pytest.fixture
def place(tmp_path):
    return Place(tmp_path)


@pytest.fixture(scope="module")
def state():
    return torch.load(ROOT / "BEST_checkpoint.pth.tar", weights_only=True)["model"]


def test_run_end_to_end(place, state):
    """Figures in report.json and on the terminal against the oracle's."""
    report, out = place.report(BATCH_SIZE=4)
    weights = {name: value.numpy() for name, value in state.items()}
    names = [f"{kind}.{i}.jpg" for i in range(3) for kind in ("cat", "dog")]
    pixels = np.stack([np.asarray(Image.open(place.val / name).resize((224, 224))) for name in names]).transpose(0, 3, 1, 2)
    fp32 = oracle.forward(weights, pixels)["fc2"]
    labels = np.array([0, 1] * 3)
    correct = int((fp32.argmax(1) == labels).sum())
    assert report["fp32"]["correct"] == correct and report["fp32"]["top1"] == pytest.approx(100 * correct / 6)
    lines = re.findall(r"(?m)^(FP32|INT8) Top1: ([\d.]+), 6 of 6 pictures, \d+ a second$", out)
    assert [name for name, _ in lines] == ["FP32", "INT8"]
    assert float(lines[0][1]) == pytest.approx(100 * correct / 6, abs=1e-3)
    assert float(lines[1][1]) == pytest.approx(report["int8"]["top1"], abs=1e-3)    # INT8 counted alone
    assert report["images"] == {"evaluated": 6, "calibrated": 6} and report["skipped"] == []
    assert report["constants"]["BATCH_SIZE"] == 4 and report["torch"] == torch.__version__
    assert [row["name"] for row in report["layers"]] == ["cnn1", "cnn2", "cnn3", "cnn4", "fc1", "fc2"]
    assert report["layers"][-1]["range"] == pytest.approx(np.abs(fp32).max(), rel=1e-4)
    count = sum(value.size for name, value in weights.items() if not name.endswith("num_batches_tracked"))
    assert report["size_bytes"]["fp32"] == 4 * count
    assert 0.24 < report["size_bytes"]["int8"] / report["size_bytes"]["fp32"] < 0.26
    assert report["logit_sqnr_db"] > 15
    assert report["speedup"] == pytest.approx(report["fp32"]["ms_per_image"] / report["int8"]["ms_per_image"])


def test_wilson_interval():
    """Against values worked out by hand from the formula in Wilson (1927)."""
    assert quantize_catdog.wilson(97, 100) == pytest.approx((91.548, 98.974), abs=2e-3)
    assert quantize_catdog.wilson(0, 10) == pytest.approx((0, 27.753), abs=2e-3)
    assert quantize_catdog.wilson(10, 10) == pytest.approx((72.247, 100), abs=2e-3)


def test_flips_agreement_and_sqnr():
    """A planted flip: the second of four pictures."""
    files, labels = ["cat.0.jpg", "dog.0.jpg", "cat.1.jpg", "dog.1.jpg"], torch.tensor([0, 1, 0, 1])
    fp32 = torch.tensor([[2.0, 0.0], [0.0, 1.0], [3.0, 1.0], [1.0, 2.0]])
    int8 = fp32 + torch.tensor([[0.0, 0.0], [2.0, 0.0], [0.0, 0.0], [0.0, 0.0]])
    model = quantize_catdog.CNN_Model()
    report = quantize_catdog.build_report({}, 4, {}, quantize_catdog.Outcome(files, labels, fp32),
                                          quantize_catdog.Outcome(files, labels, int8), model, model.fused().cl_scale(), {},
                                          {"fp32": 2.0, "int8": 0.5})
    assert report["flips"] == [{"file": "dog.0.jpg", "label": "dog", "better": False, "fp32_margin": 1.0,
                                "fp32_logits": [0.0, 1.0], "int8_logits": [2.0, 1.0]}]
    assert report["agreement"] == 0.75 and report["speedup"] == 4 and report["int8"]["correct"] == 3
    assert report["logit_sqnr_db"] == pytest.approx(10 * math.log10((4 + 1 + 9 + 1 + 1 + 4) / 4))


# values of a picture at all places: pixels, four convolutions' outputs, fc1, fc2
VALUES = 3 * 224**2 + 16 * 220**2 + 32 * 106**2 + 16 * 51**2 + 8 * 23**2 + 512 + 2


@pytest.mark.skipif(not torch.cpu._is_vnni_supported(), reason="the INT8 kernels need a CPU with VNNI")
def test_kernels_are_proven_and_taken(place):
    report, out = place.report()
    assert report["int8"]["engine"] == "onednn"
    assert report["exact"]["compared"] == 6 * VALUES and report["exact"]["different"] == 0
    assert f"INT8 engine onednn: its kernels agree with the reference; {6 * VALUES:,} values of 6 pictures" in out


def test_reference_can_be_forced(place):
    report, _ = place.report(INT8_ENGINE="reference")
    assert report["int8"]["engine"] == "reference" and report["exact"]["compared"] == 0


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="x86 alone has CPUs that saturate")
@pytest.mark.parametrize("isa", ["AVX2", "AVX512_CORE"])
def test_kernels_that_saturate_are_noticed(place, isa):
    """The answers are those of any other machine, by way of the reference."""
    usual, _ = place.report(INT8_ENGINE="reference")
    report, out = place.report(environment={"ONEDNN_MAX_CPU_ISA": isa})
    assert report["int8"]["engine"] == "reference" and "16 bits" in report["exact"]["why"] in out
    assert report["int8"]["correct"] == usual["int8"]["correct"]
    forced, _ = place.report(environment={"ONEDNN_MAX_CPU_ISA": isa}, INT8_ENGINE="onednn")
    assert forced["int8"]["engine"] == "onednn" and forced["exact"]["different"] > 0


def quantized(state):
    model = quantize_catdog.CNN_Model().eval()
    model.load_state_dict(state, strict=False)
    model.observe(1)
    pixels = torch.from_numpy(np.stack([quantize_catdog.decode(PICTURES / "cat.0.jpg")])).permute(0, 3, 1, 2)
    with torch.no_grad():
        model(pixels)
    return model.fused().cl_scale(), pixels


@pytest.mark.skipif(not torch.cpu._is_vnni_supported(), reason="the INT8 kernels need a CPU with VNNI")
def test_a_single_different_value_is_noticed(monkeypatch, state):
    int8, pixels = quantized(state)
    kernel = quantize_catdog.kernel

    def off_by_one(x, packed, dtype, relu):
        out = kernel(x, packed, dtype, relu)
        if out.shape[1:] == (8, 23, 23):                    # cnn4
            out[0, 0, 0, 0] += 1
        return out
    assert quantize_catdog.choose_engine(int8, pixels)["different"] == 0 and int8.engine == "onednn"
    monkeypatch.setattr(quantize_catdog, "kernel", off_by_one)
    for _ in range(2):                                      # a cell that is run again proves as much as before
        assert quantize_catdog.choose_engine(int8, pixels)["different"] >= 1 and int8.engine == "reference"


def test_missing_kernels(monkeypatch, state):
    int8, pixels = quantized(state)

    def missing(*_):
        raise AttributeError("'_OpNamespace' 'onednn' object has no attribute 'qconv_prepack'")
    monkeypatch.setattr(quantize_catdog, "pack", missing)
    exact = quantize_catdog.choose_engine(int8, pixels)
    assert int8.engine == "reference" and "no INT8 kernels" in exact["why"] and exact["compared"] == 0
    monkeypatch.setattr(quantize_catdog, "INT8_ENGINE", "onednn")
    with pytest.raises(SystemExit, match='INT8_ENGINE = "onednn".*set it to "auto"'):
        quantize_catdog.choose_engine(int8, pixels)


def test_notebook_recipe_runs_from_edited_constants(place):
    report, _ = place.report(PER_CHANNEL=False, UNSIGNED_RELU=False, BIAS_BIT=16, QUANTIZE_LOGITS=True, HEADROOM=1,
                             EQUALIZE=False, GPTQ=False, BIAS_CORRECTION=False)
    rows = report["layers"]
    assert rows[0]["scale_in"] == pytest.approx(127 / 255)
    assert all(len(row["weight_scale"]) == 1 for row in rows)
    assert all(row["scale_out"] == pytest.approx(127 / row["range"]) for row in rows)


def test_calibration_and_evaluation_on_different_splits(place):
    """Ranges come from the calibration pictures alone, accuracies from the evaluation pictures alone."""
    other = place.folder / "cat_dog" / "other"
    other.mkdir()
    for i in (3, 4):
        shutil.copy(PICTURES / f"dog.{i}.jpg", other)
    both, out = place.report(EVALUATION_SPLIT="other")
    assert both["images"] == {"evaluated": 2, "calibrated": 6}
    same, _ = place.report()
    assert [row["range"] for row in both["layers"]] == [row["range"] for row in same["layers"]]
    assert re.findall(r"(?m)^FP32 Top1: .*, (\d) of \1 pictures", out) == ["6", "2"]       # calibrated, evaluated


def test_pictures_are_decoded_once(tmp_path, monkeypatch):
    """And memory stays bounded: what does not fit KEEP_BYTES is decoded again, to the same batches."""
    monkeypatch.setattr(quantize_catdog, "BATCH_SIZE", 60)
    decoded = []
    decode = quantize_catdog.decode
    monkeypatch.setattr(quantize_catdog, "decode", lambda path: decoded.append(path.name) or decode(path))
    pictures = quantize_catdog.CatDogDataset(Place(tmp_path, 80).val)
    first, second = list(pictures.batches()), list(pictures.batches())
    assert len(decoded) == 80 and [len(batch.files) for batch in first] == [60, 20]
    monkeypatch.setattr(quantize_catdog, "BATCH_SIZE", 7)     # edited between two passes: the pictures stay the same
    assert sum([batch.files for batch in pictures.batches()], []) == sum([batch.files for batch in first], [])
    monkeypatch.setattr(quantize_catdog, "BATCH_SIZE", 60)
    pictures = quantize_catdog.CatDogDataset(tmp_path / "cat_dog" / "val")
    monkeypatch.setattr(quantize_catdog, "KEEP_BYTES", 70 * 224 * 224 * 3)
    third, fourth = list(pictures.batches()), list(pictures.batches())
    assert len(decoded) == 80 + 80 + 20 and len(pictures.kept) == 1
    for batches in (second, third, fourth):
        assert [batch.files for batch in batches] == [batch.files for batch in first]
        assert all(torch.equal(a.pixels, b.pixels) for a, b in zip(batches, first))


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
])
def test_odd_pictures_are_decoded_as_a_viewer_shows_them(tmp_path, kind, make, expected):
    make(tmp_path / kind)
    pixels = quantize_catdog.decode(tmp_path / kind)
    assert pixels.shape == (224, 224, 3) and pixels.dtype == np.uint8
    assert np.abs(pixels.astype(int) - expected).max() <= (4 if kind.endswith("jpg") else 0)


def test_picture_is_turned_as_its_exif_says(tmp_path):
    image = Image.new("RGB", (8, 6), "black")
    image.paste("white", (0, 0, 4, 6))                      # white on the left
    exif = Image.Exif()
    exif[0x0112] = 6                                        # to be turned a quarter clockwise: left becomes top
    image.save(tmp_path / "cat.png", exif=exif)
    pixels = quantize_catdog.decode(tmp_path / "cat.png")
    assert pixels[:60].min() > 200 and pixels[-60:].max() < 50


def png_header_that_promises(width, height):
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)) + chunk(
        b"IDAT", b"") + chunk(b"IEND", b"")


def test_unusable_files_are_left_out_and_named(place):
    good, _ = place.report()
    jpeg = (PICTURES / "cat.9.jpg").read_bytes()
    (place.val / "cat.9.jpg").write_bytes(jpeg[:len(jpeg) // 2])
    (place.val / "dog.9.jpg").write_text("no picture")
    (place.val / "cat.10.jpg").write_bytes(b"")
    (place.val / "dog.10.png").write_bytes(png_header_that_promises(60000, 60000))
    (place.val / "bird.1.jpg").write_bytes(jpeg)
    (place.val / "cat-dog.jpg").write_bytes(jpeg)
    os.mkfifo(place.val / "cat.pipe.jpg")                   # to open it would wait for ever
    (place.val / "dog.link.jpg").symlink_to("nowhere")
    report, out = place.report(BATCH_SIZE=1)                # a batch may lose all its pictures
    reasons = {row["file"]: row["reason"] for row in report["skipped"]}
    assert set(reasons) == {f"val/{name}" for name in (
        "cat.9.jpg", "dog.9.jpg", "cat.10.jpg", "dog.10.png", "bird.1.jpg", "cat-dog.jpg", "cat.pipe.jpg", "dog.link.jpg")}
    assert "truncated" in reasons["val/cat.9.jpg"] and "neither" in reasons["val/bird.1.jpg"]
    assert "8 files left out" in out and all(name in out for name in reasons)
    assert report["images"]["evaluated"] == 6 and report["fp32"]["correct"] == good["fp32"]["correct"]
    for row, expected in zip(report["layers"], good["layers"]):
        assert row["range"] == pytest.approx(expected["range"], rel=1e-5)


def test_no_usable_picture(place):
    shutil.rmtree(place.val)
    place.refuse("no folder", "cat_dog/val")
    place.val.mkdir()
    place.refuse("no usable picture", "cat_dog/val")
    (place.val / "cat.0.jpg").write_text("no picture")
    place.refuse("no usable picture", "cat_dog/val", "cat.0.jpg")


@pytest.mark.parametrize("name, value", [
    ("BIT", 1), ("BIT", 9), ("BIT", 8.0), ("BIT", True), ("BIAS_BIT", 33), ("BIAS_BIT", 1), ("BATCH_SIZE", 0),
    ("NUM_WORKERS", 0), ("SWEEP_BITS", 1), ("PER_CHANNEL", 1), ("UNSIGNED_RELU", "no"), ("QUANTIZE_LOGITS", None), ("INT8_ENGINE", "fast"), ("DATA_DIR", ""),
    ("CHECKPOINT", 3), ("IMAGE_SIZE", (211, 224)), ("IMAGE_SIZE", (224, 228)), ("IMAGE_SIZE", 224),
    ("IMAGE_SIZE", (224.0, 224))])
def test_illegal_constants(monkeypatch, name, value):
    monkeypatch.setattr(quantize_catdog, name, value)
    with pytest.raises(SystemExit, match=rf"^{name} = .*quantize_catdog.py.*set it to"):
        quantize_catdog.check_constants()


def test_illegal_constant_ends_the_run(place):
    place.refuse("BIT = 9", "2 to 8", BIT=9)


def test_largest_picture_size_runs(place):
    report, _ = place.report(IMAGE_SIZE=(227, 212))
    assert report["constants"]["IMAGE_SIZE"] == [227, 212] and report["images"]["evaluated"] == 6


def test_output_folder_that_cannot_be_written(place):
    (place.folder / "file").write_text("")
    place.refuse("OUTPUT_DIR", "file", OUTPUT_DIR="file/results")


def test_refused_write_leaves_nothing_behind(place):
    (place.folder / "results" / "report.json").mkdir(parents=True)
    status, _, err = place.run()
    assert status == 1 and "cannot write" in err and len(err.splitlines()) == 1
    assert {file.name for file in (place.folder / "results").iterdir()} == {"report.json"}


def test_name_that_a_terminal_cannot_show(place):
    shutil.copy(PICTURES / "cat.0.jpg", place.val / "cat.\u732b.jpg")
    (place.val / "dog.\u732b.jpg").write_text("no picture")
    report, out = place.report(environment={"PYTHONIOENCODING": "ascii"})
    assert report["images"]["evaluated"] == 7 and report["skipped"][0]["file"] == "val/dog.\u732b.jpg"
    assert r"dog.\u732b.jpg" in out


def test_pictures_that_come_and_go_during_the_run(tmp_path, monkeypatch, state):
    """Where they are decoded twice, FP32 and INT8 answers are compared on the pictures that both have seen."""
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
    for kept, whole in zip(quantize_catdog.in_common(first, second), (first, second)):
        assert kept.files == names[:2] + names[4:] and kept.labels.tolist() == [0, 1, 0, 1]
        assert torch.equal(kept.logits, whole.logits[[whole.files.index(name) for name in kept.files]])
    assert set(pictures.left_out()) == {"val/cat.1.jpg", "val/dog.1.jpg"}
    with pytest.raises(SystemExit, match="came or went"):
        quantize_catdog.in_common(first._replace(files=["a"] * 5), second)


def test_earlier_report_survives_a_refused_run(place):
    place.report()
    before = (place.folder / "results" / "report.json").read_bytes()
    place.checkpoint.unlink()
    status, _, _ = place.run()
    assert status == 1 and (place.folder / "results" / "report.json").read_bytes() == before
    assert {file.name for file in (place.folder / "results").iterdir()} == {"report.json", "INT8_checkpoint.pth.tar",
                                                                            "report.png"}


# the checkpoint: in this process, since each case needs only the loader

def refused(path, *words):
    with pytest.raises(quantize_catdog.InputError) as error:
        quantize_catdog.load_checkpoint(path)
    message = str(error.value)
    assert isinstance(error.value, SystemExit) and "\n" not in message      # one line, and exit status 1
    for word in (*words, str(path)):
        assert word in message


def test_missing_checkpoint_ends_the_run(place):
    place.checkpoint.unlink()
    place.refuse("no checkpoint", "BEST_checkpoint.pth.tar", "CHECKPOINT")


@pytest.mark.parametrize("keep", [0, 1, 1000, 0.5, 0.999])
def test_truncated_checkpoint(tmp_path, keep):
    data = (ROOT / "BEST_checkpoint.pth.tar").read_bytes()
    path = tmp_path / "c.pth.tar"
    path.write_bytes(data[:keep if isinstance(keep, int) else int(len(data) * keep)])
    refused(path, "damaged")


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


def test_weights_that_overflow(tmp_path, state):
    model = quantize_catdog.CNN_Model().eval()
    model.load_state_dict({**state, "cnn1.weight": torch.full((16, 3, 5, 5), 1e38)}, strict=False)
    with pytest.raises(SystemExit, match="values at cv1 overflow FP32"):
        quantize_catdog.calibrate(model, quantize_catdog.CatDogDataset(Place(tmp_path).val))


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
    model = quantize_catdog.CNN_Model().eval()
    model.load_state_dict(state, strict=False)
    quantize_catdog.calibrate(model, pictures)
    factor = 2.5e38 / model.range_fc1.max()
    changed = {name: state[name] * factor for name in ("fc1.weight", "fc1.bias")}
    model.load_state_dict({**state, **changed, "fc2.weight": torch.zeros(2, 512)}, strict=False)
    with pytest.raises(SystemExit, match="values at fc1 overflow FP32"):
        quantize_catdog.calibrate(model, pictures)


def test_calibrating_again_forgets_the_pictures_before(tmp_path, state):
    bright, dark = Place(tmp_path / "a"), Place(tmp_path / "b")
    for file in dark.val.iterdir():
        Image.new("RGB", (224, 224), (9, 9, 9)).save(file)
    model = quantize_catdog.CNN_Model().eval()
    model.load_state_dict(state, strict=False)
    for place, largest in [(bright, 255), (dark, 9)]:
        quantize_catdog.calibrate(model, quantize_catdog.CatDogDataset(place.val))
        assert model.range_input.max() == largest


def test_sample_is_of_good_pictures_at_any_batch_size(tmp_path, monkeypatch):
    place = Place(tmp_path, 20)
    for name in ("cat.0.jpg", "dog.3.jpg"):
        (place.val / name).write_bytes(b"broken")
    found = []
    for size in (1, 4, 7, 50):
        monkeypatch.setattr(quantize_catdog, "BATCH_SIZE", size)
        found.append(quantize_catdog.sample(quantize_catdog.CatDogDataset(place.val), 10))
    assert all(len(pixels) == 10 and torch.equal(pixels, found[0]) for pixels in found)


@pytest.mark.parametrize("saved", [[1, 2], {"weights": {}}, {"model": None}, {"model": 3}, "text"])
def test_file_without_a_model(tmp_path, saved):
    torch.save(saved, tmp_path / "c.pth.tar")
    refused(tmp_path / "c.pth.tar", "model")


def notebook_model(state):
    """The notebook's pickled module, whose class lives in __main__, with modules and attributes of its own."""
    class CNN_Model(torch.nn.Module):
        pass
    CNN_Model.__module__, CNN_Model.__qualname__ = "__main__", "CNN_Model"
    sys.modules["__main__"].CNN_Model = CNN_Model
    model = CNN_Model()
    source = quantize_catdog.CNN_Model()
    source.load_state_dict(state, strict=False)
    for name, part in source.named_children():
        model.add_module(name, torch.nn.MaxPool2d(2) if name.startswith("maxpool") else part)
    model.relu5, model.output = torch.nn.ReLU(), torch.nn.Softmax(dim=1)
    model.range_cv1, model.Quantization, model.bit = torch.tensor(1.0), False, 8
    return model


@pytest.fixture
def main_class():
    yield
    vars(sys.modules["__main__"]).pop("CNN_Model", None)


def test_notebooks_pickled_module_loads(tmp_path, state, main_class):
    torch.save({"model": notebook_model(state)}, tmp_path / "c.pth.tar")
    del sys.modules["__main__"].CNN_Model
    _, model = quantize_catdog.load_checkpoint(tmp_path / "c.pth.tar")
    loaded = model.state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in state.items() if value.is_floating_point())


def test_pickled_module_with_a_foreign_class_is_refused(tmp_path, state, main_class):
    model = notebook_model(state)
    model.extra = torch.nn.Dropout()
    torch.save({"model": model}, tmp_path / "c.pth.tar")
    refused(tmp_path / "c.pth.tar", "torch.nn.modules.dropout.Dropout")


class Hostile:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("where", ["model", "beside"])
def test_hostile_pickle_is_refused_without_running_it(tmp_path, state, where, zipped):
    hostile = Hostile(tmp_path / "executed")
    saved = {"model": hostile} if where == "model" else {"model": state, "note": hostile}
    torch.save(saved, tmp_path / "c.pth.tar", _use_new_zipfile_serialization=zipped)
    refused(tmp_path / "c.pth.tar", "mkdir" if zipped else "damaged")
    assert not (tmp_path / "executed").exists()
    with pytest.raises(FileExistsError):                    # the pickle does what the test thinks it does
        (tmp_path / "executed").mkdir()
        torch.load(tmp_path / "c.pth.tar", weights_only=False)


# the INT8 checkpoint

KEYS = [f"scale_{place}" for place in oracle.PLACES] + [
    f"{layer}.{key}" for layer, *_ in oracle.LAYERS for key in ("weight", "bias", "w_scale")]


def test_int8_checkpoint_holds_what_was_run(place):
    report, out = place.report()
    path = place.folder / "results" / "INT8_checkpoint.pth.tar"
    saved = torch.load(path, weights_only=True)         # tensors and plain values only, or this raises
    assert set(saved) == {"model", "recipe"} and list(saved["model"]) == KEYS
    assert json.loads(json.dumps(saved["recipe"])) == report["recipe"]
    assert report["recipe"] == {name: report["constants"][name] for name in quantize_catdog.RECIPE}
    dtypes = {"weight": torch.int8, "bias": torch.int32}
    assert all(value.dtype == dtypes.get(name.split(".")[-1], torch.float32) for name, value in saved["model"].items())
    assert 0.25 <= path.stat().st_size / place.checkpoint.stat().st_size < 0.26
    assert "loaded back, the INT8 checkpoint changes a logit by 0\n" in out
    rows = {row["name"]: row for row in report["layers"]}
    assert rows["cnn3"]["scale_in"] == saved["model"]["scale_cv2"].item()
    assert rows["cnn3"]["weight_scale"] == saved["model"]["cnn3.w_scale"].tolist()

    # alone: no calibration pictures, other constants, the same answers
    shutil.copy(path, place.folder / "kept.pth.tar")
    assert (place.folder / "results" / "report.png").exists()
    alone, out = place.report(CHECKPOINT="kept.pth.tar", CALIBRATION_SPLIT="nowhere", BIT=4, PER_CHANNEL=False)
    assert not (place.folder / "results" / "report.png").exists()              # it would be another run's
    assert "FP32 Top1" not in out and alone["fp32"] is alone["agreement"] is alone["speedup"] is None
    assert alone["images"] == {"evaluated": 6, "calibrated": None} and alone["recipe"] == report["recipe"]
    assert alone["layers"] == report["layers"] and alone["size_bytes"]["int8"] == report["size_bytes"]["int8"]
    assert alone["int8"]["correct"] == report["int8"]["correct"]
    assert alone["int8"]["engine"] == report["int8"]["engine"] and alone["exact"] == report["exact"]


RECIPES = {"default": {}, "notebook's": dict(PER_CHANNEL=False, UNSIGNED_RELU=False, BIAS_BIT=16, QUANTIZE_LOGITS=True),
           "5 bits": dict(BIT=5, BIAS_BIT=20)}


@pytest.fixture(scope="module", params=RECIPES)
def kept(request, tmp_path_factory, state):
    """(INT8_Model, pixels, its checkpoint), for several recipes; `expected`: logits while the recipe was in the constants."""
    path = tmp_path_factory.mktemp("kept") / "INT8_checkpoint.pth.tar"
    with pytest.MonkeyPatch.context() as patch:
        for name, value in RECIPES[request.param].items():
            patch.setattr(quantize_catdog, name, value)
        int8, pixels = quantized(state)
        with torch.no_grad():
            int8.expected = int8(pixels)
    quantize_catdog.save_checkpoint(int8, path)
    return int8, pixels, path


def test_int8_checkpoint_loads_to_the_same_logits(kept, capfd):
    """Whatever the constants say when it is loaded."""
    int8, pixels, path = kept
    loaded = quantize_catdog.INT8_Model.load(path)
    expected, found = int8.state_dict(), loaded.state_dict()
    assert list(found) == KEYS
    for name, value in expected.items():
        assert found[name].dtype == value.dtype and torch.equal(found[name], value)
    with torch.no_grad():
        assert torch.equal(loaded(pixels), int8.expected) and torch.equal(int8(pixels), int8.expected)
    assert [file.name for file in path.parent.iterdir()] == [path.name] and capfd.readouterr().out == ""


def test_three_lines_classify_a_picture(kept):
    int8, pixels, path = kept
    done = subprocess.run([sys.executable, "-c", f"""from quantize_catdog import INT8_Model
model = INT8_Model.load({str(path)!r})
print(model.predict({str(PICTURES / "cat.0.jpg")!r}))"""], cwd=ROOT, capture_output=True, text=True, check=True)
    with torch.no_grad():
        logits = int8(pixels)[0]
    assert done.stdout == f"{(('cat', 'dog')[logits.argmax()], logits.tolist())}\n"


def test_predicting_a_broken_picture(kept, tmp_path):
    (tmp_path / "cat.jpg").write_bytes(b"no picture")
    for name in ("cat.jpg", "none.jpg"):
        with pytest.raises(SystemExit, match=rf"{name} cannot be decoded"):
            quantize_catdog.INT8_Model.load(kept[2]).predict(tmp_path / name)


def change_scale(name, value):
    return lambda saved: saved["model"][name].fill_(value)


@pytest.mark.parametrize("change, words", [
    (lambda saved: saved["model"].pop("cnn2.bias"), ["cnn2.bias", "missing"]),
    (lambda saved: saved["model"].pop("scale_fc2"), ["scale_fc2", "missing"]),
    (lambda saved: saved["model"].update({"cnn1.weight": torch.zeros(16, 3, 5, 5)}), ["cnn1.weight", "float32", "int8"]),
    (lambda saved: saved["model"].update({"cnn1.bias": torch.zeros(16, dtype=torch.int64)}), ["cnn1.bias", "int64", "int32"]),
    (lambda saved: saved["model"].update({"fc2.weight": torch.zeros(2, 5, dtype=torch.int8)}), ["fc2.weight", "(2, 512)"]),
    (lambda saved: saved["model"].update({"cnn1.w_scale": torch.ones(3)}), ["cnn1.w_scale", "(3,)"]),
    (lambda saved: saved["model"]["cnn1.weight"].fill_(-128), ["cnn1.weight", "beyond"]),
    (change_scale("scale_cv1", 0), ["scale_cv1", "not positive"]),
    (change_scale("fc1.w_scale", -1), ["fc1.w_scale", "not positive"]),
    (change_scale("scale_input", math.nan), ["scale_input", "NaN"]),
    (change_scale("scale_fc1", 1e-45), ["overflow", "fc2"]),
    (change_scale("scale_fc1", 1e-38), ["overflow", "fc2"]),
    (change_scale("cnn2.w_scale", 1e-38), ["overflow", "cnn2"]),
    (lambda saved: saved["recipe"].pop("BIT"), ["damaged"]),
    (lambda saved: saved["recipe"].update(BIT=9), ["recipe", "BIT", "2 to 8"]),
    (lambda saved: saved["recipe"].update(PER_CHANNEL="yes"), ["recipe", "PER_CHANNEL", "True or False"]),
    (lambda saved: saved.update(recipe=[8]), ["damaged"]),
    (lambda saved: saved.pop("model"), ["damaged"]),
])
def test_wrong_int8_checkpoint(kept, tmp_path, change, words):
    saved = torch.load(kept[2], weights_only=True)
    change(saved)
    torch.save(saved, tmp_path / "c.pth.tar")
    refused(tmp_path / "c.pth.tar", *words)


@pytest.mark.parametrize("constant, width, name", [("BIT", 5, "cnn3.weight"), ("BIAS_BIT", 20, "fc1.bias")])
def test_int8_checkpoint_with_integers_wider_than_its_recipe(tmp_path, monkeypatch, state, constant, width, name):
    monkeypatch.setattr(quantize_catdog, constant, width)
    int8, _ = quantized(state)
    int8.state_dict()[name].view(-1)[-1] = 2**(width - 1)
    quantize_catdog.save_checkpoint(int8, tmp_path / "c.pth.tar")
    refused(tmp_path / "c.pth.tar", name, f"beyond {2**(width - 1) - 1}")


@pytest.mark.parametrize("keep", [0, 100, 0.5, 0.99])
def test_truncated_int8_checkpoint(kept, tmp_path, keep):
    data = kept[2].read_bytes()
    (tmp_path / "c.pth.tar").write_bytes(data[:keep if isinstance(keep, int) else int(len(data) * keep)])
    refused(tmp_path / "c.pth.tar", "damaged")


def test_fp32_checkpoint_is_no_int8_model():
    with pytest.raises(quantize_catdog.InputError, match="holds FP32 weights.*INT8_checkpoint.pth.tar"):
        quantize_catdog.INT8_Model.load(ROOT / "BEST_checkpoint.pth.tar")


def test_hostile_int8_checkpoint_is_refused_without_running_it(kept, tmp_path):
    saved = torch.load(kept[2], weights_only=True)
    saved["recipe"]["BIT"] = Hostile(tmp_path / "executed")
    torch.save(saved, tmp_path / "c.pth.tar")
    refused(tmp_path / "c.pth.tar", "mkdir")
    assert not (tmp_path / "executed").exists()


# closer to FP32

def test_the_methods_pay(tmp_path):
    """On the trained network and pictures that did not calibrate: without any, with the strongest, with all."""
    place = Place(tmp_path, 40)
    other = place.folder / "cat_dog" / "other"
    other.mkdir()
    for file in PICTURES.iterdir():
        if int(file.name.split(".")[1]) >= 20:
            shutil.copy(file, other)
    off = dict(HEADROOM=1, EQUALIZE=False, GPTQ=False, BIAS_CORRECTION=False)
    sqnr = {}
    for name in ("none", "HEADROOM", "all"):
        constants = {} if name == "all" else {key: value for key, value in off.items() if key != name}
        report, out = place.report(EVALUATION_SPLIT="other", **constants)
        sqnr[name] = report["logit_sqnr_db"]
        assert ("equalizing, channels" in out) == ("bias correction moved" in out) == (name == "all")
    assert sqnr["none"] + 0.5 < sqnr["HEADROOM"] and sqnr["none"] + 3 < sqnr["all"]


# accuracy

def test_accuracy_on_the_drawings(tmp_path):
    place = Place(tmp_path, 100)
    report, _ = place.report()
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
    report, _ = place.report(DATA_DIR=".", CALIBRATION_SPLIT="train100", EVALUATION_SPLIT=str(photos / "val"), BATCH_SIZE=20)
    assert report["fp32"]["top1"] >= 89
    assert abs(report["fp32"]["top1"] - report["int8"]["top1"]) <= 0.3 + 1e-9
    assert report["agreement"] >= 0.99 and report["logit_sqnr_db"] >= 30
