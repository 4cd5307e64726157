"""The script executed as the notebook it is: by Jupytext's cells, in one kernel, edited and run again."""
import json
import re
import shutil

import jupytext
import nbclient
import pytest
import torch
from nbclient.exceptions import CellExecutionError

from helpers import KERNELS, ROOT, Place, python


class Notebook:
    """A kernel, and the script's cells. `run` executes the cells from one on, as a user would, but for the last one:
    it runs tools/explain.py, which takes longer than all others."""

    def __init__(self, place):
        self.book = jupytext.read(place.folder / "quantize_catdog.py")
        assert self.book.cells[-1].source == "%run tools/explain.py"
        self.client = nbclient.NotebookClient(self.book, timeout=300, kernel_name="python3",
                                              resources={"metadata": {"path": str(place.folder)}})
        self.constants = self.cell('DATA_DIR = "cat_dog"')

    def cell(self, word):
        """The number of the one code cell that holds the word."""
        found, = [i for i, cell in enumerate(self.book.cells) if cell.cell_type == "code" and word in cell.source]
        return found

    def edit(self, line, other):
        cell = self.book.cells[self.constants]
        assert cell.source.count(line) == 1
        cell.source = cell.source.replace(line, other)
        self.client.execute_cell(cell, self.constants)

    def run(self, first, last=-1):
        for i, cell in enumerate(self.book.cells[first:last], first):
            if cell.cell_type == "code":
                cell.outputs = []
                self.client.execute_cell(cell, i)

    def fails(self, first, last=-1):
        """(name, lines) of the error at which a run of these cells ends."""
        for cell in self.book.cells:
            cell.outputs = []
        with pytest.raises(CellExecutionError):
            self.run(first, last)
        failed, = [cell for cell in self.book.cells if any(output.output_type == "error" for output in cell.outputs)]
        error = next(output for output in failed.outputs if output.output_type == "error")
        return error.ename, error.traceback

    def printed(self, word):
        """What the cell that holds the word has printed."""
        return "".join(output.get("text", "") for output in self.book.cells[self.cell(word)].outputs)

def results(place):
    folder = place.folder / "results"
    tensors = torch.load(folder / "INT8_checkpoint.pth.tar", weights_only=True)["model"]
    return json.loads((folder / "report.json").read_text()), tensors

def assert_same_run(place, plain, **constants):
    """The notebook's results against those of the file run as a program, with the same constants."""
    (report, tensors), (expected, _) = results(place), plain.report(**constants)
    _, expected_tensors = results(plain)
    for key in ("fp32", "int8"):
        assert report[key]["top1"] == expected[key]["top1"]
    for key in ("agreement", "logit_sqnr_db", "flips", "recipe"):
        assert report[key] == expected[key]
    assert list(tensors) == list(expected_tensors)
    assert all(torch.equal(tensor, expected_tensors[name]) for name, tensor in tensors.items())

@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """Two folders: one for a notebook, one for the file as a program. Each has calibration pictures of two kinds."""
    made = Place(tmp_path_factory.mktemp("notebook")), Place(tmp_path_factory.mktemp("plain"))
    shutil.copytree(ROOT / "tools", made[0].folder / "tools")       # a link would run the project's own script
    for place in made:
        shutil.copytree(place.val, place.val.with_name("other"))
    return made

@pytest.fixture(scope="module")
def notebook(places):
    """One that has been run from its first cell to its last."""
    notebook = Notebook(places[0])
    with notebook.client.setup_kernel():
        notebook.run(0, None)
        yield notebook

# the first cell of the run, and those of its steps
FIRST, FOLD, QUANTIZE = "set_constants(sys.argv", "folded = model.fused()", "int8_model = quantize_network("
EVALUATE, SAVE = "int8 = evaluate(", "write_files(output, "
VALUES = 16 * 220**2 + 32 * 106**2 + 16 * 51**2 + 8 * 23**2 + 512 + 2      # outputs of all layers for a picture

def test_as_a_notebook(places, notebook):
    place, plain = places
    assert_same_run(place, plain)
    rows = re.findall(r"(?m)^ *(?:cnn|fc)\d +([\d,]+) +([\d,]+) +(\w+)", notebook.printed("= choose_engines("))
    assert sum(int(compared.replace(",", "")) for compared, _, _ in rows) == 6 * VALUES
    assert all(different == "0" or (engine == "reference" and not KERNELS) for _, different, engine in rows)
    assert "INT8 Top1: " in notebook.printed(EVALUATE)
    assert (place.results / "report.png").exists() and "report.png" in notebook.printed("%run tools/explain.py")

    # a constant edited, its cell and those below run again: nothing is left over from the run before
    notebook.edit("EQUALIZE = True ", "EQUALIZE = False")
    notebook.run(notebook.constants)
    assert_same_run(place, plain, EQUALIZE=False)
    status, table, err = python(place.folder / "tools" / "runs.py")     # both runs, and the constant that differs
    assert (status, err) == (0, "") and "saving changed a logit by at most 0," in notebook.printed(SAVE)
    heading, *rows = [line.split() for line in table.splitlines()[2:]]
    assert "EQUALIZE" in rows[0] and [row[:2] for row in rows[1:]] == [["1", "True"], [">2", "False"]]
    before = results(place)[0]

    # bad input: one readable line, and the cells below do not run
    notebook.edit('CHECKPOINT = "BEST_checkpoint.pth.tar"', 'CHECKPOINT = "nowhere.pth.tar"')
    name, lines = notebook.fails(notebook.constants)
    assert (name, len(lines)) == ("InputError", 1) and "\n" not in lines[0]
    assert "nowhere.pth.tar cannot be read" in lines[0] and "CHECKPOINT" in lines[0]
    assert results(place)[0] == before

    notebook.edit('CHECKPOINT = "nowhere.pth.tar"', 'CHECKPOINT = "BEST_checkpoint.pth.tar"')
    notebook.edit("EQUALIZE = False", "EQUALIZE = True ")
    notebook.run(notebook.constants)        # the next test starts where this one did

def test_empty_folder_is_named_by_the_working_folder(tmp_path):
    shutil.copy(ROOT / "quantize_catdog.py", tmp_path)
    place = Place(tmp_path / "elsewhere")
    place.folder = tmp_path
    notebook = Notebook(place)
    with notebook.client.setup_kernel():
        name, lines = notebook.fails(0)
    assert (name, len(lines)) == ("InputError", 1)
    assert f"no usable picture in {tmp_path}/cat_dog/val" in lines[0]
    assert not (tmp_path / "results").exists()

def test_fold_again_without_calibration_is_an_error(places, notebook):
    before = results(places[0])[0]
    notebook.run(notebook.cell(FOLD), notebook.cell(FOLD) + 1)
    name, lines = notebook.fails(notebook.cell(QUANTIZE))
    assert name == "InputError" and "calibrate first" in lines[0]
    assert results(places[0])[0] == before
    notebook.run(notebook.constants)

@pytest.mark.parametrize("line, other", [("BIT = 8 ", "BIT = 4 "),
                                         ("IMAGE_SIZE = (224, 224)", "IMAGE_SIZE = (220, 220)")])
def test_network_of_other_constants_is_not_evaluated(places, notebook, line, other):
    """The first cell of the run, then Evaluate to the end: the INT8 network is that of the old constants."""
    before = results(places[0])[0]
    notebook.edit(f"\n{line}", f"\n{other}")
    notebook.run(notebook.constants, notebook.cell(FIRST) + 1)
    assert notebook.fails(notebook.cell(EVALUATE))[0] == "NameError"
    assert results(places[0])[0] == before
    notebook.edit(f"\n{other}", f"\n{line}")
    notebook.run(notebook.constants, notebook.cell(EVALUATE))

def test_recipe_is_read_where_the_network_is_quantized(places, notebook):
    notebook.edit("WEIGHT_BIT = 8 ", "WEIGHT_BIT = 5 ")
    notebook.run(notebook.cell(EVALUATE))           # the network is still the one of 8 bits: so says the report
    report, tensors = results(places[0])
    assert report["recipe"]["WEIGHT_BIT"] == report["constants"]["WEIGHT_BIT"] == 8
    assert tensors["fc1.weight"].abs().max() > 100
    notebook.run(notebook.cell(QUANTIZE))
    assert_same_run(*places, WEIGHT_BIT=5)
    report, tensors = results(places[0])
    assert report["constants"]["WEIGHT_BIT"] == 5 and tensors["fc1.weight"].abs().max() == 15
    notebook.edit("WEIGHT_BIT = 5 ", "WEIGHT_BIT = 8 ")
    notebook.run(notebook.constants)

def test_other_calibration_pictures_must_calibrate(places, notebook):
    before = results(places[0])[0]
    notebook.edit('CALIBRATION_SPLIT = "train"', 'CALIBRATION_SPLIT = "other"')
    notebook.run(notebook.cell(FIRST), notebook.cell(FOLD) + 1)
    assert notebook.fails(notebook.cell(QUANTIZE))[0] == "NameError"
    assert results(places[0])[0] == before
    notebook.run(notebook.constants)
    assert_same_run(*places, CALIBRATION_SPLIT="other")

def test_markdown_cells_head_each_step():
    """Each step of the run is a cell of its own at column 0, with a sentence before it."""
    text = (ROOT / "quantize_catdog.py").read_text()
    assert "\n    # %%" not in text
    cells = jupytext.reads(text, "py:percent").cells
    steps = [i for i, cell in enumerate(cells) if 'if __name__ == "__main__":\n' in cell.source]
    assert [re.match("##+ (.*)", cells[i - 1].source)[1] for i in steps] == [
        "The run", "Load and fold", "Calibrate", "Quantize", "Verify", "Evaluate and compare", "Save"]
    for i in steps:
        assert cells[i - 1].cell_type == "markdown" and len(cells[i - 1].source.split()) > 8
        compile(cells[i].source, "cell", "exec")

def test_executed_notebook_is_the_script():
    """The one that is there to be read has the script's cells, each run without an error, and is small."""
    path = ROOT / "docs" / "quantize_catdog.ipynb"
    book, script = jupytext.read(path), jupytext.read(ROOT / "quantize_catdog.py")
    assert [(cell.cell_type, cell.source) for cell in book.cells] == [
        (cell.cell_type, cell.source) for cell in script.cells]
    outputs = [output for cell in book.cells if cell.cell_type == "code" for output in cell.outputs]
    assert not any(output.output_type == "error" for output in outputs)
    assert sum(output.output_type == "display_data" for output in outputs) == 1     # the report
    assert path.stat().st_size < 1e6
