"""The edits that readers make in a copy of the script, each run end to end with random weights."""
import json
import re
import runpy
import shutil
from types import SimpleNamespace

import pytest
import torch

from helpers import KERNELS, ROOT, SCRIPT, python, run_here

FIFTH_BLOCK = [
    ("        self.fc1 = Linear(8 * 11 * 11, 512)\n", """\
        self.cnn5 = nn.Conv2d(8, 12, kernel_size=3)
        self.bn5 = nn.BatchNorm2d(12)
        self.fc1 = Linear(12 * 4 * 4, 512)
"""),
    ('self.bn4(self.cnn4(x)))))    # (N, 8, 11, 11)\n', """\
self.bn4(self.cnn4(x)))))    # (N, 8, 11, 11)
        x = maxpool(observe("cv5", F.relu_(self.bn5(self.cnn5(x)))))    # (N, 12, 4, 4)
"""),
    ('self.cnn4(x)))       # (N, 8, 11, 11)\n', """\
self.cnn4(x)))       # (N, 8, 11, 11)
        x = maxpool(observe("cv5", self.cnn5(x)))       # (N, 12, 4, 4)
"""),
    ('    Layer("fc1", None, "fc1"),', '    Layer("cnn5", "bn5", "cv5"),\n    Layer("fc1", None, "fc1"),'),
]
FEWER_CHANNELS = [
    ("nn.Conv2d(16, 32, ", "nn.Conv2d(16, 24, "),
    ("        self.bn2 = nn.BatchNorm2d(32)", "        self.bn2 = nn.BatchNorm2d(24)"),
    ("nn.Conv2d(32, ", "nn.Conv2d(24, "),
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
    assert len(report["engines"]) == len(report["layers"])
    for row in report["engines"]:       # where a CPU's kernels overflow, the reference is used
        assert not row["different"] or (row["engine"] == "reference" and not KERNELS)

def column(report, heading):
    """A heading's values, layer by layer."""
    return [row[heading] for row in report["layers"]]

def test_a_fifth_block_is_four_edits(tmp_path):
    report, _ = Copy(tmp_path, FIFTH_BLOCK).run()
    close_to_fp32(report)
    assert column(report, "layer") == ["cnn1", "cnn2", "cnn3", "cnn4", "cnn5", "fc1", "fc2"]
    assert column(report, "weight shape")[4:6] == ["12x8x3x3", "512x192"]
    assert column(report, "scale in")[1:] == column(report, "scale out")[:-1]
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
    assert column(report, "weight shape")[1:3] == ["24x16x5x5", "16x24x3x3"]

def test_a_third_class_is_its_name_and_a_checkpoint(tmp_path):
    copy = Copy(tmp_path, THIRD_CLASS, ("cat", "dog", "bird"))
    report, out = copy.run()
    close_to_fp32(report)
    assert "12 pictures, 4 cat, 4 dog, 4 bird" in out
    for network in (report["fp32"], report["int8"]):
        assert [sum(row) for row in network["confusion"]] == [4, 4, 4]
        assert network["correct"] == sum(network["confusion"][i][i] for i in range(3))
    assert column(report, "weight shape")[-1] == "3x512"
    model = copy.module().load_int8_checkpoint(tmp_path / "results" / "INT8_checkpoint.pth.tar")
    name, logits = model.predict(tmp_path / "cat_dog" / "val" / "bird.0.jpg")
    assert len(logits) == 3 and name == ("cat", "dog", "bird")[logits.index(max(logits))]

def test_a_new_option_is_its_constant_its_row_and_its_use(tmp_path):
    copy = Copy(tmp_path, NEW_OPTION)
    plain, _ = copy.run("plain")
    floor, _ = copy.run("plain", "ROUND_DOWN=True")
    assert (plain["recipe"]["ROUND_DOWN"], floor["recipe"]["ROUND_DOWN"]) == (False, True)
    assert floor["logit_sqnr_db"] < plain["logit_sqnr_db"] - 6       # twice the error on average, and all to one side
    (tmp_path / "tools").mkdir()
    shutil.copy(ROOT / "tools" / "runs.py", tmp_path / "tools")
    status, table, err = python(tmp_path / "tools" / "runs.py")
    assert (status, err) == (0, ""), err
    heading, *rows = [line.split() for line in table.splitlines()[2:]]
    assert heading[0] == "ROUND_" and [row[:2] for row in rows] == [["run", "DOWN"], ["1", "False"], [">2", "True"]]
    (tmp_path / SCRIPT.name).write_text((tmp_path / SCRIPT.name).read_text().replace('    "ROUND_DOWN": BOOL,\n', ""))
    status, _, err = run_here(tmp_path / SCRIPT.name)
    assert status == 1 and err.startswith("ROUND_DOWN: ") and "LEGAL" in err
