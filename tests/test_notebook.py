"""The script executed as the notebook it is: by Jupytext's cells, in one kernel, edited and run again."""
import json

import jupytext
import nbclient
import pytest
import torch
from nbclient.exceptions import CellExecutionError

from helpers import ROOT, Place


class Notebook:
    """A kernel, and the script's cells. `run` executes the cells from one on, as a user would."""

    def __init__(self, place):
        self.book = jupytext.read(place.folder / "quantize_catdog.py")
        self.book.cells.append(jupytext.reads("# %%\n# %run tools/explain.py", "py:percent").cells[0])
        self.client = nbclient.NotebookClient(self.book, timeout=300, kernel_name="python3",
                                              resources={"metadata": {"path": str(place.folder)}})
        self.constants = next(i for i, cell in enumerate(self.book.cells) if cell.source.startswith("# what is run"))

    def edit(self, line, other):
        cell = self.book.cells[self.constants]
        assert cell.source.count(line) == 1
        cell.source = cell.source.replace(line, other)

    def run(self, first, last=-1):
        for i, cell in enumerate(self.book.cells[first:last], first):
            if cell.cell_type == "code":
                cell.outputs = []
                self.client.execute_cell(cell, i)

    def printed(self, word):
        """What the cells below that hold the word have printed."""
        cells = [cell for cell in self.book.cells if cell.cell_type == "code" and word in cell.source]
        return "".join(output.get("text", "") for cell in cells for output in cell.outputs)


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
    for key in ("agreement", "logit_sqnr_db", "flips", "engine", "recipe"):
        assert report[key] == expected[key]
    assert list(tensors) == list(expected_tensors)
    assert all(torch.equal(tensor, expected_tensors[name]) for name, tensor in tensors.items())


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    return Place(tmp_path_factory.mktemp("notebook")), Place(tmp_path_factory.mktemp("plain"))


def test_as_a_notebook(places):
    place, plain = places
    (place.folder / "tools").symlink_to(ROOT / "tools")
    notebook = Notebook(place)
    with notebook.client.setup_kernel():
        notebook.run(0)
        assert_same_run(place, plain)
        assert "26,616,840" not in notebook.printed("choose_engine(int8_model, pixels)")        # of 6 pictures here
        assert "INT8 Top1: " in notebook.printed("int8 = evaluate(")

        # a constant edited, its cell and those below run again: nothing is left over from the run before
        notebook.edit("EQUALIZE = True ", "EQUALIZE = False")
        notebook.run(notebook.constants)
        assert_same_run(place, plain, EQUALIZE=False)
        table = notebook.printed("print_runs(add_run(")        # both runs, and the constant that differs
        assert "EQUALIZE" in table and " True" in table and "False" in table and ">2" in table
        before = results(place)[0]

        # bad input: one readable line, and the cells below do not run
        notebook.edit('CHECKPOINT = "BEST_checkpoint.pth.tar"', 'CHECKPOINT = "nowhere.pth.tar"')
        with pytest.raises(CellExecutionError):
            notebook.run(notebook.constants)
        failed = [cell for cell in notebook.book.cells if cell.cell_type == "code"
                  and any(output.output_type == "error" for output in cell.outputs)]
        assert len(failed) == 1 and "load_checkpoint(resolve_path(CHECKPOINT))" in failed[0].source
        error = next(output for output in failed[0].outputs if output.output_type == "error")
        assert (error.ename, len(error.traceback)) == ("InputError", 1)
        assert "\n" not in error.traceback[0] and "no checkpoint" in error.traceback[0]
        assert "nowhere.pth.tar" in error.traceback[0] and "set CHECKPOINT" in error.traceback[0]
        assert results(place)[0] == before


def test_markdown_cells_head_each_step():
    """Each step of the run is a cell of its own at column 0, with a sentence before it."""
    text = (ROOT / "quantize_catdog.py").read_text()
    assert "\n    # %%" not in text
    cells = jupytext.reads(text, "py:percent").cells
    steps = [i for i, cell in enumerate(cells) if cell.source.startswith('if __name__ == "__main__":')]
    assert len(steps) >= 8
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
    assert sum(output.output_type == "display_data" for output in outputs) == 2     # answers, and the report
    assert path.stat().st_size < 1e6
