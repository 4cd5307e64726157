"""The edits that readers make in a copy of the script, each run end to end with random weights."""
import json
import re
import runpy
import shutil
from types import SimpleNamespace

import pytest
import torch

from helpers import ROOT, SCRIPT, run_here

FIFTH_BLOCK = [
    ("        self.fc1 = Linear(8 * 11 * 11, 512)\n", """\
        self.cnn5 = nn.Conv2d(in_channels=8, out_channels=12, kernel_size=3, stride=1, padding=0)
        self.bn5 = nn.BatchNorm2d(12)
        self.relu5 = nn.ReLU(inplace=True)
        self.maxpool5 = MaxPool2d(kernel_size=2)
        self.fc1 = Linear(12 * 4 * 4, 512)
"""),
    ('        x = observe("fc1", self.fc1(x.flatten(1)))', """\
        x = self.maxpool5(observe("cv5", self.relu5(self.bn5(self.cnn5(x)))))   # (N, 12, 4, 4)
        x = observe("fc1", self.fc1(x.flatten(1)))"""),
    ('        x = observe("fc1", run["fc1"](x.flatten(1)))', """\
        x = self.maxpool(observe("cv5", run["cnn5"](x)))                    # (N, 12, 4, 4)
        x = observe("fc1", run["fc1"](x.flatten(1)))"""),
    ('    Layer("fc1", None, "fc1"),', '    Layer("cnn5", "bn5", "cv5"),\n    Layer("fc1", None, "fc1"),'),
]
FEWER_CHANNELS = [
    ("(in_channels=16, out_channels=32, ", "(in_channels=16, out_channels=24, "),
    ("        self.bn2 = nn.BatchNorm2d(32)", "        self.bn2 = nn.BatchNorm2d(24)"),
    ("(in_channels=32, ", "(in_channels=24, "),
]
THIRD_CLASS = [('CLASSES = ("cat", "dog")', 'CLASSES = ("cat", "dog", "bird")')]
NEW_OPTION = [
    ("HEADROOM = 2 ", "ROUND_DOWN = False                      # round weights down, not to nearest\nHEADROOM = 2 "),
    ('    "HEADROOM": (', '    "ROUND_DOWN": BOOL,\n    "HEADROOM": ('),
    ("    wq = quantize(w, broadcast(w_scale, w.dim() - 1), integers)\n", """\
    step = broadcast(w_scale, w.dim() - 1)
    wq = quantize((w * step).floor() / step if recipe["ROUND_DOWN"] else w, step, integers)
"""),
]

class Copy:
    """A folder with an edited copy of the script, a checkpoint of random weights, and a few pictures."""

    def __init__(self, folder, edits, kinds=("cat", "dog")):
        text = SCRIPT.read_text()
        for old, new in edits:
            assert text.count(old) == 1, f"{old!r} stands {text.count(old)} times in the script"
            text = text.replace(old, new)
        self.folder = folder
        (folder / SCRIPT.name).write_text(text)
        for split in ("train", "val"):
            (folder / "cat_dog" / split).mkdir(parents=True)
            for i in range(4):
                for kind in kinds:
                    drawing = f"cat.{i + 4}.jpg" if kind == "bird" else f"{kind}.{i}.jpg"
                    shutil.copy(ROOT / "cat_dog" / split / drawing, folder / "cat_dog" / split / f"{kind}.{i}.jpg")

    def module(self):
        """The copy as it is imported."""
        return SimpleNamespace(**runpy.run_path(self.folder / SCRIPT.name, run_name="edited"))

    def train(self):
        """Make a checkpoint of random weights, with batch-norm statistics: activations have ordinary sizes."""
        torch.manual_seed(0)
        model = self.module().CNN_Model().train()
        with torch.no_grad():
            for _ in range(3):
                model(torch.randint(0, 256, (8, 3, 224, 224), dtype=torch.uint8))
        torch.save({"model": model.state_dict()}, self.folder / "BEST_checkpoint.pth.tar")

    def run(self, *words):
        """(report, stdout) of a run with random weights, which must succeed."""
        self.train()
        status, out, err = run_here(self.folder / SCRIPT.name, *words)
        assert (status, err) == (0, ""), err
        return json.loads((self.folder / "results" / "report.json").read_text()), out

def close_to_fp32(report):
    """The INT8 network computes what the FP32 network does: another one would have 0 dB."""
    assert report["logit_sqnr_db"] > 25
    assert [row["different"] for row in report["engines"]] == [0] * len(report["layers"]["layer"])

def test_a_fifth_block_is_four_edits(tmp_path):
    report, _ = Copy(tmp_path, FIFTH_BLOCK).run()
    close_to_fp32(report)
    layers = report["layers"]
    assert layers["layer"] == ["cnn1", "cnn2", "cnn3", "cnn4", "cnn5", "fc1", "fc2"]
    assert layers["weight shape"][4:6] == ["12x8x3x3", "512x192"]
    assert layers["scale in"][1:] == layers["scale out"][:-1]
    # 4 pictures of two classes: every output that a kernel and the reference computed is counted
    sides = [(16, 220), (32, 106), (16, 51), (8, 23), (12, 9)]
    sizes = [channels * side**2 for channels, side in sides] + [512, 2]
    assert [row["compared"] for row in report["engines"]] == [8 * size for size in sizes]

@pytest.mark.parametrize("forgotten", range(4), ids=["init", "FP32 forward", "INT8 forward", "LAYERS"])
def test_a_forgotten_edit_is_an_error(tmp_path, forgotten):
    """It must not be another network without a word."""
    copy = Copy(tmp_path, FIFTH_BLOCK[:forgotten] + FIFTH_BLOCK[forgotten + 1:])
    try:
        copy.train()
    except (RuntimeError, AttributeError):
        return
    status, _, err = run_here(tmp_path / SCRIPT.name)
    assert status == 1 and re.search("(?m)^(RuntimeError|AttributeError|KeyError|calibrate first)", err), err
    assert not (tmp_path / "results").exists()

def test_another_channel_count_is_init_alone(tmp_path):
    report, _ = Copy(tmp_path, FEWER_CHANNELS).run()
    close_to_fp32(report)
    assert report["layers"]["weight shape"][1:3] == ["24x16x5x5", "16x24x3x3"]

def test_a_third_class_is_its_name_and_a_checkpoint(tmp_path):
    copy = Copy(tmp_path, THIRD_CLASS, ("cat", "dog", "bird"))
    report, out = copy.run()
    close_to_fp32(report)
    assert "12 pictures, 4 cat, 4 dog, 4 bird" in out
    for network in (report["fp32"], report["int8"]):
        assert [sum(row) for row in network["confusion"]] == [4, 4, 4]
        assert network["correct"] == sum(network["confusion"][i][i] for i in range(3))
    assert report["layers"]["weight shape"][-1] == "3x512"
    model = copy.module().INT8_Model.load(tmp_path / "results" / "INT8_checkpoint.pth.tar")
    name, logits = model.predict(tmp_path / "cat_dog" / "val" / "bird.0.jpg")
    assert len(logits) == 3 and name == ("cat", "dog", "bird")[logits.index(max(logits))]

def test_a_new_option_is_its_constant_its_row_and_its_use(tmp_path):
    copy = Copy(tmp_path, NEW_OPTION)
    plain, _ = copy.run("plain")
    floor, out = copy.run("plain", "ROUND_DOWN=True")
    assert (plain["recipe"]["ROUND_DOWN"], floor["recipe"]["ROUND_DOWN"]) == (False, True)
    assert floor["logit_sqnr_db"] < plain["logit_sqnr_db"] - 6       # twice the error on average, and all to one side
    table = out.split("The last runs")[1]
    assert "ROUND_" in table and "True" in table.splitlines()[-1]    # it has a column
    (tmp_path / SCRIPT.name).write_text((tmp_path / SCRIPT.name).read_text().replace('    "ROUND_DOWN": BOOL,\n', ""))
    status, _, err = run_here(tmp_path / SCRIPT.name)
    assert status == 1 and err.startswith("ROUND_DOWN: ") and "LEGAL" in err
