"""What README.md and docs/results.md say is what runs: snippets, printed lines, figures; and who imports whom."""
import ast
import contextlib
import itertools
import re
import shlex
import sys

import pytest
import quantize_catdog

from helpers import README, ROOT, Place, blocks, python

RESULTS = (ROOT / "docs" / "results.md").read_text()
MEASURED = re.compile(r"-?\d[\d,]*(?:\.\d+)?(?:e-?\d+)?")       # a figure

@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder as README's reader has it, after its first command."""
    place = Place(tmp_path_factory.mktemp("reader"), 100)
    (place.folder / "tools").mkdir()
    for file in (ROOT / "tools").glob("*.py"):
        (place.folder / "tools" / file.name).write_bytes(file.read_bytes())
    place.printed = place.report()[1]
    return place

def run(place, *command):
    status, out, err = python(*command, cwd=place.folder)
    assert status == 0, err
    return out

def assert_same_but_for_digits(found, expected, share):
    """The same words, and figures as near as a share of them."""
    assert MEASURED.sub("#", found) == MEASURED.sub("#", expected)
    for a, b in zip(MEASURED.findall(found), MEASURED.findall(expected)):
        a, b = float(a.replace(",", "")), float(b.replace(",", ""))
        assert a == pytest.approx(b, rel=share, abs=1e-4), (found, expected)

def test_summary_is_what_the_run_prints(place):
    """Figures but for the times, which are this machine's, and a line on other programs that it may run."""
    def timeless(line):
        return re.sub(r"[\d.]+ (?=[\d,]+$)|[\d.]+(?= times)", "# ", " ".join(line.split()))

    shown = next(block for block in blocks(README) if "\nSummary" in block).splitlines()
    printed = [line for line in place.printed.splitlines() if not line.startswith("The times varied")]
    start = next(i for i, line in enumerate(printed) if line.split() == shown[0].split())
    assert len(shown) >= 7
    for a, b in zip(printed[start:], shown):
        assert_same_but_for_digits(timeless(a), timeless(b), 0.02)

def test_run_fits_a_terminal_of_80_columns(place):
    """All but the network as torch prints it."""
    long = [line for line in place.printed.splitlines() if len(line) > 80]
    assert all(re.match(r"  \(bn\d\): ", line) for line in long), long
    assert all(len(line) <= 80 for block in blocks(README) for line in block.splitlines())

def test_table_of_runs_is_what_the_tool_prints(place):
    """Figures but for the times."""
    block = next(block for block in blocks(README, "sh") if "python quantize_catdog.py" in block)
    for words in commands(block):
        place.report(*words, "OUTPUT_DIR=bench")
    printed = run(place, block.split("python ")[-1].strip(), "OUTPUT_DIR=bench")
    shown = next(block for block in blocks(README) if block.startswith("The last runs"))
    for a, b in zip(printed.splitlines(), shown.splitlines(), strict=True):
        a, b = [re.sub(r"[\d.]+ (?=[\d,]+$)", "# ", " ".join(line.split())) for line in (a, b)]
        assert_same_but_for_digits(a, b, 0.02)

def test_value_followed_is_what_explain_prints(place):
    shown = next(block for block in blocks(README) if block.startswith("One value followed"))
    printed = run(place, "tools/explain.py")
    assert_same_but_for_digits(printed[printed.index("One value followed"):][:len(shown)], shown, 0.05)
    assert (place.folder / "results" / "report.png").exists()

def test_snippets_run(place):
    snippet, = blocks(README, "python")
    (place.folder / "README.md").write_text(README)
    lines = run(place, "-c", snippet).splitlines()
    probabilities = ast.literal_eval(lines[0].removeprefix("cat "))
    assert sum(probabilities) == pytest.approx(1) and probabilities[0] > 0.5
    assert lines[1].startswith("./README.md cannot be decoded: ") and float(lines[-1]) == pytest.approx(95)

def commands(text):
    """[words] of each run of the script in a shell's block, with variables as it sets them, without the folders, which
    are the reader's own."""
    variables = dict(re.findall(r'(?m)^(\w+)="(.*?)"', text))
    lines = re.findall(r"(?m)^.*?python quantize_catdog\.py(.*)", text.replace("\\\n", ""))
    split = [shlex.split(re.sub(r"\$(\w+)", lambda found: variables[found[1]], line), comments=True) for line in lines]
    folders = ("DATA_DIR=", "CALIBRATION_SPLIT=", "EVALUATION_SPLIT=")
    return [[word for word in words if not word.startswith(folders)] for words in split]

def test_recipes_of_the_results_are_those_of_the_commands_above_them():
    block = next(block for block in blocks(RESULTS, "sh") if block.count("python quantize_catdog.py") > 15)
    table = RESULTS.split(block)[1].split("\n\n|")[1].split("\n\n")[0]
    names = [row.split("|")[1].strip() for row in table.splitlines()[2:]]
    assert names == [f"`{' '.join(words)}`" if words else "the default" for words in commands(block)]

@pytest.mark.parametrize("text", [*blocks(README), *blocks(README, "sh"), *blocks(RESULTS, "sh"),
                                  quantize_catdog.__doc__], ids=lambda text: text.split("\n")[0][:30])
def test_commands_set_what_they_say(monkeypatch, text):
    for words in commands(text):
        with monkeypatch.context() as patch:
            for name in quantize_catdog.LEGAL:
                patch.setattr(quantize_catdog, name, getattr(quantize_catdog, name))
            expected = quantize_catdog.read_constants()
            for word in words:
                name, _, value = word.partition("=")
                with contextlib.suppress(ValueError, SyntaxError):      # a word without quotes
                    value = ast.literal_eval(value)
                expected |= {name: value} if "=" in word else quantize_catdog.PRESETS[word]
            quantize_catdog.set_constants(words, "")
            assert quantize_catdog.read_constants() == expected, words

def test_figures_of_the_readme_are_in_the_results():
    """The rows of README's tables of results, each as it stands there, cells in order, and a sentence."""
    recipes = {row[0]: row for row in rows_of(RESULTS, "## What each constant does")}
    rows = rows_of(README, "## Results")
    assert len(rows) == 6 and all(row == recipes[row[0]] for row in rows)
    named = {"this script": "this script INT8", "OpenVINO, NNCF": "OpenVINO, NNCF INT8, performance (default)",
             "ONNX Runtime": "ONNX Runtime INT8, default", "this script's FP32": "this script FP32"}
    engines = {row[0]: [cell.split("(")[0].strip() for cell in row]
               for row in rows_of(RESULTS, "## Against other engines")}
    rows = rows_of(README, "| INT8 on two cores |")
    assert [row[0] for row in rows] == list(named)
    for name, *cells in rows:
        measured = engines[named[name]]
        assert cells == [measured[1], measured[3], measured[5], measured[9].strip("-")], name
    script_seconds, notebook_seconds = re.search(
        r"takes the\s+whole\s+script ([\d.]+) s,\s+and\s+the\s+notebook's\s+code\s+([\d.]+) s", README).groups()
    section = RESULTS[RESULTS.index("--pictures PHOTOS"):]
    assert re.search(rf"(?m)^script +{script_seconds} s,", section)
    assert re.search(rf"(?m)^notebook +{notebook_seconds} s,", section)

def rows_of(text, heading):
    """The rows of the first table at or below a heading, each a list of its cells."""
    lines = itertools.dropwhile(lambda line: not line.startswith("|"), text[text.index(heading):].splitlines())
    table = itertools.takewhile(lambda line: line.startswith("|"), lines)
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table][2:]

def test_effects_that_the_readme_tells_are_measured():
    """Each figure of "what you see, what to change" stands in the table that its row names in results.md."""
    rows = rows_of(README, "| what you see |")
    assert 8 <= len(rows) <= 10
    sections = dict(section.split("\n", 1) for section in RESULTS.split("\n## ")[1:])
    for _, _, measured in rows:
        name, figures = re.search(r"\((\[.*?\]|[A-Z][\w ]+)\)$", measured), MEASURED.findall(measured)
        assert name and name[1] in sections, measured
        for figure in re.findall(r"(?<![\w.])\d[\d,]*\.?\d*(?= (?:dB|%|bytes|times))", measured):
            assert re.search(rf"(?<![\d.,]){re.escape(figure)}(?![\d]|\.\d)", sections[name[1]]), (figure, name[1])
        assert figures

def test_map_of_the_script_is_right():
    lines = (ROOT / "quantize_catdog.py").read_text().splitlines()
    starts = [i for i, line in enumerate(lines, 1) if line.startswith("# ## ")]
    expected = [f"{lines[start - 1][5:]} {start - 1}-{end - 2}"
                for start, end in zip(starts, [*starts[1:], len(lines) + 2])]
    told = re.search(r"The lines of `quantize_catdog\.py`: (.*?)\.\n", README, re.DOTALL)[1]
    assert " ".join(told.split()).split(", ") == expected

def imported(path):
    """Top-level names of the modules that a file imports, anywhere in it."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module.split(".")[0])
    return names

def test_script_imports_its_four_packages_alone():
    assert imported(ROOT / "quantize_catdog.py") - sys.stdlib_module_names == {"torch", "numpy", "PIL", "torchnet"}

@pytest.mark.parametrize("path", [*(ROOT / "tools").glob("*.py"), *(ROOT / "training").glob("*.py")],
                         ids=lambda path: path.name)
def test_tools_reach_into_the_script_by_its_names(path):
    """By the module, and by names that it has and that are not private."""
    tree = ast.parse(path.read_text())
    used = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)
            and isinstance(node.value, ast.Name) and node.value.id == "script"}
    assert used or path.name == "draw_cat_dog.py" or "quantize_catdog" not in imported(path)
    assert [name for name in used if name.startswith("_") or not hasattr(quantize_catdog, name)] == []
    assert not any(isinstance(node, ast.ImportFrom) and node.module == "quantize_catdog" for node in ast.walk(tree))

@pytest.mark.parametrize("name", ["README.md", "docs/results.md", "training/README.md"])
def test_files_that_the_docs_name_are_there(name):
    text = (ROOT / name).read_text()
    for path in re.findall(r"`((?:tools|training|tests|docs|cat_dog)/[\w./]*)`|\]\((docs/[\w.]+)\)", text):
        assert (ROOT / (path[0] or path[1])).exists(), path
