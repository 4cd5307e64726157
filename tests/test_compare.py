"""The tools that compare the script with other engines, and with the notebook that it ports."""
import json
import os
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import quantize_catdog as script
import torch

from helpers import ROOT, as_constants
from helpers import notebook as notebook_recipe

sys.path.insert(0, str(ROOT / "tools"))
import compare_engines  # noqa: E402
import compare_notebook  # noqa: E402

# A notebook with two classes: its network is one matrix, on the mean of each colour, and takes 20 ms.
CELLS = ["""\
import time
import torch

COLOURS = 3""", """\
class CNN_Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.fc2 = torch.nn.Linear(COLOURS, 2, bias=False)
        self.largest = torch.tensor(0.0)

        # an empty line above, and one of blanks below
        self.Quantization = False
\x20\x20\x20\x20
    def forward(self, x):
        time.sleep(0.02)
        out = self.fc2(x.mean((2, 3)))
        if self.Quantization:
            return torch.round(out * self.scale_fc2)
        self.largest = torch.maximum(self.largest, out.abs().max())
        return out

    def cl_scale(self):
        self.scale_fc2 = 10 / self.largest""", """\
best_model = torch.load("BEST_checkpoint.pth.tar")["model"]
model = CNN_Model()
model.load_state_dict(best_model.state_dict())
model.eval()"""]
# its first line could be code
OUTPUT = "3\nof 3 are there\n\nFP32 Top1: 0.000, 0/3\n\nFP32 Top1: 20.000, 1/3\n\nCNN_Model(\n  (fc2): Linear()\n"
PROSE = "## The next step\n\nHere comes what it does, in words.\n<br />\n"

@pytest.fixture
def notebook(tmp_path):
    """The notebook as Markdown: prompts before the code, no mark between the code and what follows it."""
    parts = "".join(f"{PROSE}\nIn [{i}]:\n{cell}\n\n{OUTPUT}\n" for i, cell in enumerate(CELLS, 7))
    (tmp_path / "notebook.md").write_text(f"# A title\n\n{parts}", encoding="utf-8")
    return tmp_path / "notebook.md"

@pytest.fixture
def ported_notebook():
    """The notebook that the script ports; it is no part of the project."""
    file = Path(os.environ.get("CATDOG_NOTEBOOK", ROOT.parent / "shared" / "notebook.md"))
    if not file.is_file():
        pytest.skip(f"no {file}: CATDOG_NOTEBOOK says where the notebook is")
    return file

@pytest.fixture
def project(tmp_path, monkeypatch):
    """A project whose checkpoint is the small notebook's."""
    folder = tmp_path / "project"
    folder.mkdir()
    weight = torch.tensor([[0.5, -0.25, 0.125], [-0.5, 0.125, 0.25]])
    torch.save({"model": {"fc2.weight": weight}}, folder / "BEST_checkpoint.pth.tar")
    for tool in (compare_engines, compare_notebook):
        monkeypatch.setattr(tool, "ROOT", folder)
    return folder

def code(*cells):
    return "\n\n".join(cells)

def test_code_is_cut_out_of_each_kind_of_file(notebook, tmp_path):
    cells = [{"cell_type": "markdown", "source": [PROSE]},
             *({"cell_type": "code", "source": cell.splitlines(keepends=True), "outputs": [OUTPUT]} for cell in CELLS)]
    (tmp_path / "n.ipynb").write_text(json.dumps({"cells": cells}), encoding="utf-8")
    blocks = "".join(f"{PROSE}\n{fence}\n{cell}\n{fence[:3]}\n\n```text\n{OUTPUT}```\n"
                     for fence, cell in zip(["```python", "~~~", "``` py"], CELLS, strict=True))
    (tmp_path / "fenced.md").write_text(blocks, encoding="utf-8")
    assert compare_notebook.code_of(tmp_path / "n.ipynb") == code(*CELLS)
    assert re.sub("\n\n+", "\n\n", compare_notebook.code_of(tmp_path / "fenced.md")).strip() == code(*CELLS)
    # the prose's heading, a comment, may stay
    cut = compare_notebook.code_of(notebook).replace("## The next step\n", "")
    assert re.sub("\n\n+", "\n\n", cut).strip() == code(*CELLS)

def test_what_the_code_is_taken_for():
    changed = compare_notebook.with_state_dict(code(*CELLS))
    assert changed == code(*CELLS).replace("best_model.state_dict()", "best_model")
    assert compare_notebook.network_of(changed) == code(*CELLS[:2])
    assert compare_notebook.imports_of(changed) == "import time\nimport torch"

@pytest.mark.parametrize("name, text, line", [
    ("n.ipynb", "{", "is no Jupyter notebook"), ("n.ipynb", '{"a": 1}', "is no Jupyter notebook"),
    ("n.ipynb", '{"cells": []}', "holds no code"), ("n.md", "only words\n", "holds no code"),
    ("n.md", "```\n%pip install x\n```\n", "not plain Python"), ("n.md", "In [1]:\nx = 1\n", "state_dict() 0 times"),
    ("n.md", "```python\nbest_model.state_dict(), best_model.state_dict()\n```\n", "state_dict() 2 times")])
def test_file_without_the_notebooks_code(tmp_path, monkeypatch, name, text, line):
    (tmp_path / name).write_text(text, encoding="utf-8")
    monkeypatch.setattr(sys, "argv", ["compare_notebook.py", "--notebook", str(tmp_path / name)])
    with pytest.raises(SystemExit) as ended:
        compare_notebook.main()
    assert str(ended.value).startswith(f"{tmp_path / name} ") and line in str(ended.value)

def test_network_of_other_code():
    with pytest.raises(ValueError, match="no class CNN_Model"):
        compare_notebook.network_of(CELLS[0])

# A script of known times: 0.1 s of imports, a run of 0.5 s more; decoding 0.1 s, FP32 pass 0.2 s, INT8 pass 0.15 s
SCRIPT = """\
import json
import time
from pathlib import Path
time.sleep(0.1)
DEVICE, BATCH_SIZE = "cpu", 1

def prepare_process():
    global prepared
    prepared = True

class Network:
    def __init__(self, seconds):
        self.seconds = seconds
    def __call__(self, pixels):
        time.sleep(self.seconds)
        return pixels
    def fused(self):
        return self

def load_checkpoint(path):
    assert path.is_file()
    return Network(0.1)

def load_int8_checkpoint(path):
    assert path.is_file() and prepared
    return Network(0.45)

def choose_engines(int8_model, pixels):
    int8_model.seconds = 0.075

class CatDogDataset:
    def __init__(self, folder):
        self.files = sorted(path.name for path in folder.iterdir())
        assert self.files == ["cat.0.jpg", "dog.0.jpg"]
    def __len__(self):
        return 2
    def first_pixels(self, count):
        import torch
        time.sleep(0.05 * count)
        return torch.zeros(count)

if __name__ == "__main__":
    time.sleep(0.5)
    Path("results").mkdir(exist_ok=True)
    Path("results/INT8_checkpoint.pth.tar").touch()
    report = {"images": {"evaluated": 2}, "fp32": {"top1": 95}, "int8": {"top1": 94}}
    Path("results/report.json").write_text(json.dumps(report))
    with open("LOG", "a") as log:
        log.write("script\\n")
"""
TIMED_NOTEBOOK = """
In [1]:
import time

best_model = {}
weights = best_model.state_dict()

In [2]:
for i in range(3):
    time.sleep(0.1)
    print(f"FP32 Top1: {20 * i:.3f}, {i}/3")
print("INT8 Top1: 99.000, 0/3")

with open("LOG", "a") as log:
    log.write("notebook\\n")
"""

def run_tool(monkeypatch, capsys, *arguments):
    """What compare_notebook.py prints, and {row: median seconds}."""
    monkeypatch.setattr(sys, "argv", ["compare_notebook.py", *map(str, arguments)])
    compare_notebook.main()
    out = capsys.readouterr().out
    return out, {name: float(value) for name, value in re.findall(r"^(\w.*?) +([\d.]+) s, from", out, re.MULTILINE)}

def test_times_are_those_of_a_script_with_known_ones(project, tmp_path, monkeypatch, capsys):
    log = tmp_path / "log"
    before = SCRIPT.replace("0.5", "0.25").replace('"script', '"before').replace("95", "93")
    for file, program in [(project / "quantize_catdog.py", SCRIPT), (tmp_path / "before.py", before),
                          (tmp_path / "notebook.md", TIMED_NOTEBOOK)]:
        file.write_text(program.replace("LOG", str(log)))
    (tmp_path / "pictures").mkdir()
    for name in ("cat.0.jpg", "dog.0.jpg"):
        (tmp_path / "pictures" / name).touch()
    out, seconds = run_tool(monkeypatch, capsys, "--pictures", tmp_path / "pictures", "--rounds", 2,
                            "--notebook", tmp_path / "notebook.md", "--before", tmp_path / "before.py")

    assert log.read_text().split() == 2 * ["script", "before", "notebook"]      # in turns
    known = {"script": 0.6, "before": 0.35, "script, imports": 0.1, "notebook": 0.3, "notebook, imports": 0,
             "decoding": 0.1, "FP32 pass": 0.2, "INT8 pass": 0.15}
    assert list(seconds) == ["script", "before", "script, imports", "notebook", "notebook, imports", "decoding",
                             "FP32 pass", "INT8 pass"]
    for name, value in known.items():
        assert value - 0.006 < seconds[name] < value + 1, name      # printed to 0.01 s
    ratios = {name: float(value) for name, value in re.findall(r"^(\w+ / \w+) +([\d.]+)", out, re.MULTILINE)}
    floor = sum(seconds[name] for name in ("script, imports", "decoding", "FP32 pass", "INT8 pass"))
    assert ratios == pytest.approx({"notebook / script": seconds["notebook"] / seconds["script"],
                                    "script / before": seconds["script"] / seconds["before"],
                                    "script / floor": seconds["script"] / floor}, abs=0.05)   # of rounded seconds
    assert "script            FP32 Top1 95.000, INT8 Top1 94.000" in out
    assert "before            FP32 Top1 93.000, INT8 Top1 94.000" in out
    assert "notebook          FP32 Top1 40.000\n" in out            # the last of those that it counts up to

def test_program_that_fails_is_named(project, tmp_path, monkeypatch):
    (project / "quantize_catdog.py").write_text("raise ValueError('no such thing')")
    monkeypatch.setattr(sys, "argv", ["compare_notebook.py", "--pictures", str(tmp_path)])
    with pytest.raises(SystemExit, match="script: .* ended with 1: ValueError: no such thing"):
        compare_notebook.main()

def pictures_of(folder):
    """Seven pictures in a folder, one of them a dog called cat, so that not all answers are right."""
    folder.mkdir()
    for name in ("cat.0", "dog.0", "cat.1", "dog.1", "cat.2", "dog.2"):
        shutil.copy(ROOT / "cat_dog" / "val" / f"{name}.jpg", folder)
    shutil.copy(ROOT / "cat_dog" / "val" / "dog.3.jpg", folder / "cat.3.jpg")
    return folder

def fp32_top1(folder):
    model = script.load_checkpoint(ROOT / "BEST_checkpoint.pth.tar").fused()
    return f"{script.evaluate('FP32', model, script.CatDogDataset(folder)).top1:.3f}"

def test_script_is_measured_without_a_notebook(tmp_path, monkeypatch, capsys):
    folder = pictures_of(tmp_path / "pictures")
    out, seconds = run_tool(monkeypatch, capsys, "--pictures", folder, "--rounds", 1)
    assert out.startswith(f"python tools/compare_notebook.py --pictures {folder} --rounds 1\n7 pictures, ")
    assert "no --notebook FILE, so the notebook's rows are left out\n" in out
    assert list(seconds) == ["script", "script, imports", "decoding", "FP32 pass", "INT8 pass"]
    assert seconds["script"] > seconds["script, imports"] > seconds["decoding"] > 0
    assert f"script            FP32 Top1 {fp32_top1(folder)}, INT8 Top1 " in out

def test_ported_notebook_runs_on_our_checkpoint(ported_notebook, tmp_path):
    program = compare_notebook.with_state_dict(compare_notebook.code_of(ported_notebook))
    folder = tmp_path / "notebook"
    pictures = pictures_of(tmp_path / "pictures")
    compare_notebook.furnish(folder, pictures, "notebook.py", program)
    _, printed = compare_notebook.run_python(["notebook.py"], folder)
    assert re.findall(r"FP32 Top1: ([\d.]+)", printed)[-1] == fp32_top1(pictures)

def test_notebooks_engines_answer_and_time_themselves_in_their_process(project, notebook, tmp_path):
    pixels = torch.randint(0, 256, (10, 3, 4, 4), dtype=torch.uint8)
    fp32, int8 = compare_engines.notebook_engines(notebook, pixels[:6], tmp_path)
    assert not compare_engines.NOTEBOOK_ENGINES and "notebook_network" not in sys.modules

    weight = np.array([[0.5, -0.25, 0.125], [-0.5, 0.125, 0.25]])
    expected = pixels.numpy().mean((2, 3)) @ weight.T
    scale = 10 / np.abs(expected[:6]).max()
    np.testing.assert_allclose(fp32.logits(pixels, 4), expected, rtol=1e-5, atol=1e-4)
    np.testing.assert_allclose(int8.logits(pixels, 4), np.round(expected * scale) / scale, rtol=1e-5, atol=1e-4)
    assert fp32.size == int8.size == (project / "BEST_checkpoint.pth.tar").stat().st_size

    times = compare_engines.measure([fp32, int8], pixels, [1, 5], rounds=3)
    for engine in (fp32, int8):             # each takes 20 ms per batch
        assert 20 < np.median(times[engine.name, 1]) < 100 and 4 < np.median(times[engine.name, 5]) < 20
    fp32.process.shutdown()

def test_notebooks_engines_are_the_scripts_own_with_its_recipe(ported_notebook, tmp_path):
    """Two programs, one arithmetic: the notebook's class, and the script with the notebook's recipe."""
    pictures = script.CatDogDataset(pictures_of(tmp_path / "pictures"))
    pixels = pictures.first_pixels(7)
    fp32, int8 = compare_engines.notebook_engines(ported_notebook, pixels, tmp_path)
    model = script.load_checkpoint(ROOT / "BEST_checkpoint.pth.tar")
    folded = model.fused()
    script.calibrate(folded, pictures)
    own = folded.cl_scale(as_constants(notebook_recipe()))
    with torch.no_grad():
        assert torch.allclose(fp32.logits(pixels, 5), model(pixels), atol=1e-5)
        # its integers are the script's up to ties, so its logits differ by at most one of their integer levels
        assert (int8.logits(pixels, 5) - own(pixels)).abs().max() < 1.5 / own.scale_fc2
    fp32.process.shutdown()

def test_pictures_and_labels_of_a_folder(tmp_path):
    pixels, labels = compare_engines.pixels_and_labels(pictures_of(tmp_path / "pictures"))
    assert pixels.shape == (7, 3, 224, 224) and labels.tolist() == [0, 1, 0, 1, 0, 1, 0]
    for i, name in enumerate(("cat.0", "dog.0", "cat.1")):
        expected = script.decode(ROOT / "cat_dog" / "val" / f"{name}.jpg", (224, 224))
        np.testing.assert_array_equal(pixels[i].permute(1, 2, 0), expected)
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "cat.0.jpg").write_bytes(b"no picture")
    with pytest.raises(script.InputError, match="no usable picture"):
        compare_engines.pixels_and_labels(tmp_path / "broken")

def test_table_of_engines(capsys):
    """Two pictures, one of them of another class: an SQNR and an agreement that are known."""
    fp32 = torch.tensor([[3.0, 0.0], [0.0, 4.0]])
    logits = torch.tensor([[3.0, 0.0], [0.5, 0.0]])
    engines = [compare_engines.Engine(name, None, None, size) for name, size in
               [("this script FP32", 2000), ("other", 1_234_567), ("this script INT8", 1000)]]
    quality = {"this script FP32": fp32, "other": logits, "this script INT8": fp32}
    times = {(engine.name, 5): [ms, 9.0, ms / 2] for engine, ms in zip(engines, [2.0, 3.0, 1.0])}
    compare_engines.print_table(engines, quality, times, torch.tensor([0, 1]), [5])
    lines = capsys.readouterr().out.splitlines()
    assert lines[2] == "| other | 3.00 (1.50-9.00) | 3.00 | 50.0 % | 50.0 % | 1.9 dB | 1,235 |"     # 25 / 16.25
    assert lines[4].startswith("| this script INT8 | 1.00 (0.50-9.00) | 1.00 | 100.0 % | 100.0 % | - |")

def test_multiply_adds():
    expected = 16 * 75 * 220**2 + 32 * 400 * 106**2 + 16 * 288 * 51**2 + 8 * 144 * 23**2 + 968 * 512 + 512 * 2
    assert compare_engines.multiply_adds(script.CNN_Model().eval()) == expected

def test_engines_take_turns():
    """Each round runs every engine at every batch size, on batches of that size alone."""
    seen = []

    def engine(name):
        return compare_engines.Engine(
            name, lambda x: x * 2, lambda batch: lambda x: seen.append((name, batch, len(x))), 0)
    times = compare_engines.measure([engine("a"), engine("b")], torch.ones(10, 1), [1, 4], rounds=3)
    keys = {(name, batch): 3 for name in "ab" for batch in (1, 4)}
    assert {key: len(values) for key, values in times.items()} == keys
    assert all(batch == size for _, batch, size in seen)
    assert seen.count(("a", 1, 1)) == 3 * (3 + 10) and seen.count(("b", 4, 4)) == 3 * (3 + 2)
