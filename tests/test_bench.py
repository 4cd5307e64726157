"""The bench around the pipeline: constants and their legal values, the command line, the table of runs."""
import contextlib
import csv
import io
import json
import math
import multiprocessing
import random
import re
import shutil
import time
import zlib

import numpy as np
import pytest
import quantize_catdog as script
import torch

from helpers import (
    DEVICE,
    METHODS,
    MUTATIONS,
    PICTURES,
    SCRIPT,
    Place,
    Printed,
    as_constants,
    batches,
    figures_of,
    mutated,
    notebook,
    one_line,
    run_here,
)

LEGAL, InputError = script.LEGAL, script.InputError
PLAIN = dict(HEADROOM=1, EQUALIZE=False, GPTQ=False, BIAS_CORRECTION=False)
NOTEBOOK = PLAIN | dict(PER_CHANNEL=False, UNSIGNED_RELU=False, BIAS_BIT=16, QUANTIZE_LOGITS=True)

def refuses(match, function, *arguments):
    """It raises one line that matches, from its beginning."""
    with pytest.raises(InputError) as error:
        function(*arguments)
    assert re.match(match, str(error.value)) and "\n" not in str(error.value), str(error.value)

def illegal(name):
    """The end of the line that refuses a constant's value."""
    return rf"set it to {re.escape(LEGAL[name][0])}$"

# constants and their legal values

def test_each_constant_is_one_assignment_with_a_comment(usual):
    """And one row of legal values, in the same order. A run prints them all."""
    rows = re.findall(r"(?m)^(\w+) = \S.*?  +# (\S.*)$", script.constants_block())
    assert [name for name, _ in rows] == re.findall(r"(?m)^(\w+)", script.constants_block()) == list(LEGAL)
    recipe = list(script.LEGAL_RECIPE)
    assert recipe == list(LEGAL)[list(LEGAL).index("IMAGE_SIZE"):] == list(script.read_constants(recipe))
    values = {name: getattr(script, name) for name in LEGAL} | {"BATCH_SIZE": 4}
    assert usual[2].splitlines()[:len(values) + 1] == [
        *[f"{name} = {value!r}" for name, value in values.items()],
        f"device {DEVICE}, torch {torch.__version__}"]

@pytest.mark.parametrize("line, hint", [
    ("SMOOTHING = None", "LEGAL"), ("SMOOTHING = {} # why", "LEGAL"), ("GTPQ = False", "GPTQ?"),
    ("EQUALISE = False     # none", "EQUALIZE?"), ("WEIGHT_BITS=4", "WEIGHT_BIT?"),
    ("BIAS_CORECTION = True", "BIAS_CORRECTION?")])
def test_a_constant_without_legal_values_is_named(monkeypatch, tmp_path, line, hint):
    """A new one would be without effect on the command line, a misspelt one everywhere."""
    text = SCRIPT.read_text()
    assert text.count("\nBIT = 8 ") == 1
    (tmp_path / SCRIPT.name).write_text(text.replace("\nBIT = 8 ", f"\n{line}\nBIT = 8 "))
    monkeypatch.setattr(script, "__file__", str(tmp_path / SCRIPT.name))
    name = re.match(r"\w+", line)[0]
    refuses(rf"{name}: .* {re.escape(hint)}", script.read_constants)

@pytest.mark.parametrize("name, value", [
    ("BIT", 1), ("BIT", 9), ("BIT", 8.0), ("BIT", True), ("WEIGHT_BIT", 1), ("WEIGHT_BIT", 9), ("WEIGHT_BIT", "8"),
    ("BIAS_BIT", 33), ("BIAS_BIT", 1), ("BATCH_SIZE", 0), ("BATCH_SIZE", 4097), ("NUM_WORKERS", 0),
    ("NUM_WORKERS", 257), ("PER_CHANNEL", 1), ("UNSIGNED_RELU", "no"), ("QUANTIZE_LOGITS", None), ("HEADROOM", 0.5),
    ("HEADROOM", 16.5), ("HEADROOM", math.nan), ("HEADROOM", True), ("INT8_ENGINE", "fast"), ("DATA_DIR", ""),
    ("OUTPUT_DIR", "a\0b"), ("CHECKPOINT", 3), ("CHECKPOINT", " "), ("IMAGE_SIZE", (211, 224)),
    ("IMAGE_SIZE", (224, 228)), ("IMAGE_SIZE", 224), ("IMAGE_SIZE", (224.0, 224)), ("IMAGE_SIZE", (224,)),
    ("IMAGE_SIZE", [224, 224]), ("LAYER_BITS", 4), ("LAYER_BITS", None), ("LAYER_BITS", {"fc3": 4}),
    ("LAYER_BITS", {"bn1": 4}), ("LAYER_BITS", {"fc1": 9}), ("LAYER_BITS", {"fc1": 1}), ("LAYER_BITS", {"fc1": True}),
    ("LAYER_BITS", {"cnn1": 4, "fc1": "4"}), ("LAYER_BITS", {4: 4}), ("LAYER_BITS", [("fc1", 4)]), ("GPTQ", None)])
def test_illegal_constants(monkeypatch, name, value):
    """In the file, and in a recipe that a program of one's own makes."""
    monkeypatch.setattr(script, name, value)
    refuses(rf"{name} = .*: {illegal(name)}", script.read_constants)
    if name in script.LEGAL_RECIPE:
        for make in (script.INT8_Model, script.CNN_Model().fused().cl_scale):
            refuses(rf"{name} = .*: {illegal(name)}", make, as_constants(notebook()) | {name: value})

@pytest.mark.parametrize("name, values", {
    "BIT": [2, 8], "WEIGHT_BIT": [2, 8], "BIAS_BIT": [2, 32], "BATCH_SIZE": [1, 4096], "NUM_WORKERS": [1, 256],
    "HEADROOM": [1, 1.5, 16], "INT8_ENGINE": ["auto", "reference"], "IMAGE_SIZE": [(212, 227)],
    "LAYER_BITS": [{}, {"fc1": 2}, dict.fromkeys(["cnn1", "cnn2", "cnn3", "cnn4", "fc1", "fc2"], 8)]}.items())
def test_legal_constants(monkeypatch, name, values):
    for value in values:
        monkeypatch.setattr(script, name, value)
        assert script.read_constants()[name] == value

@pytest.mark.parametrize("name", LEGAL)
def test_missing_constants(monkeypatch, name):
    recipe = as_constants(notebook())
    monkeypatch.delattr(script, name)
    refuses(rf"{name} is missing: {illegal(name)}", script.read_constants)
    if name in recipe:
        refuses(rf"{name} is missing: {illegal(name)}", script.INT8_Model,
                {key: value for key, value in recipe.items() if key != name})
    refuses("GTPQ: no constant of this name, did you mean GPTQ", script.INT8_Model, recipe | {"GTPQ": True})

def test_presets():
    """Their values are legal, and the notebook's recipe is the oracle's."""
    assert {"plain": PLAIN, "notebook": NOTEBOOK} == script.PRESETS
    for changes in script.PRESETS.values():
        assert all(script.LEGAL_RECIPE[name][1](value) for name, value in changes.items())
    recipe = script.read_constants(script.LEGAL_RECIPE)
    assert recipe | script.PRESETS["notebook"] == as_constants(notebook())
    assert recipe | script.PRESETS["plain"] == recipe | dict.fromkeys(METHODS, False) | {"HEADROOM": 1}

# the command line

@pytest.fixture
def given(monkeypatch):
    """Sets constants by words, until the test ends, and returns those that are others than before."""
    for name in LEGAL:
        monkeypatch.setattr(script, name, getattr(script, name))

    def give(*words):
        before = {name: getattr(script, name) for name in LEGAL}
        script.set_constants(list(words), "no docstring")
        return {name: getattr(script, name) for name in LEGAL if getattr(script, name) != before[name]}
    return give

@pytest.mark.parametrize("words, changes", [
    ([], {}), (["plain"], PLAIN), (["notebook"], NOTEBOOK), (["plain", "notebook"], NOTEBOOK),
    (["notebook", "plain"], NOTEBOOK), (["plain", "GPTQ=True", "BIT=5"],
     {name: value for name, value in PLAIN.items() if name != "GPTQ"} | dict(BIT=5)),
    (["DATA_DIR=photos", "CHECKPOINT='c d.tar'", 'OUTPUT_DIR="out"', "EVALUATION_SPLIT=~/a b=c"],
     dict(DATA_DIR="photos", CHECKPOINT="c d.tar", OUTPUT_DIR="out", EVALUATION_SPLIT="~/a b=c")),
    (["HEADROOM=1.5", "IMAGE_SIZE=(227, 212)", 'LAYER_BITS={"fc1": 4, "cnn1": 6}', "INT8_ENGINE=reference"],
     dict(HEADROOM=1.5, IMAGE_SIZE=(227, 212), LAYER_BITS={"fc1": 4, "cnn1": 6}, INT8_ENGINE="reference")),
    (["GPTQ=True", "plain", "BIT=5"],
     {name: value for name, value in PLAIN.items() if name != "GPTQ"} | dict(BIT=5)),
    (["BIT=3", "BIT=4"], dict(BIT=4)), (["OUTPUT_DIR=/a/1/b"], dict(OUTPUT_DIR="/a/1/b"))], ids=str)
def test_words_set_constants(given, words, changes):
    """Presets first, in whatever order they are given, then NAME=value; a word without quotes is a string."""
    assert given(*words) == changes

@pytest.mark.parametrize("words, line", [
    (["GTPQ=False"], r"GTPQ: .* GPTQ\?$"), (["plain", "gptq=False"], r"gptq: .* GPTQ\?$"),
    (["--weight-bit=4"], r".* WEIGHT_BIT\?$"), (["LAYERBITS={}"], r".* LAYER_BITS\?$"),
    (["notebok"], r"notebok: .* notebook\?$"), (["PLAIN=True"], r".* plain\?$"), (["equalize"], r".* EQUALIZE\?$"),
    (["xyz=3"], "xyz: .*--help"), (["=3"], ".*--help"), ([""], ".*--help"),
    (["a\nb\x1b[2J"], ".*--help")], ids=str)
def test_words_that_are_refused(given, words, line):
    refuses(line, given, *words)

@pytest.mark.parametrize("word", [
    "WEIGHT_BIT=9", "WEIGHT_BIT=", "GPTQ", "GPTQ=yes", "GPTQ=1", "BATCH_SIZE=many", "IMAGE_SIZE=224", "HEADROOM=nan",
    "INT8_ENGINE=fast", "DATA_DIR=", "NUM_WORKERS=os.cpu_count()", 'LAYER_BITS={"fc3": 4}', "LAYER_BITS={fc1: 4}",
    "LAYER_BITS={[1]: 4}", f"BIT={'-' * 5000}8", f"BIT={'(' * 500}8{')' * 500}"], ids=lambda word: word[:20])
def test_illegal_values_on_the_command_line(given, word):
    """Are refused as those in the file are, whether Python can read them or not."""
    def run():
        given(word)
        script.read_constants()
    name = word.partition("=")[0]
    refuses(rf"{name} = .*: {illegal(name)}", run)

def test_a_refused_word_and_a_misspelt_constant_end_the_run(place):
    place.refuse("GTPQ", "did you mean GPTQ?", arguments=["GTPQ=False"])
    place.refuse("WEIGHT_BIT = 9", "2 to 8", arguments=["WEIGHT_BIT=9"])
    path = place.edit()
    path.write_text(path.read_text().replace("\nGPTQ = True ", "\nGTPQ = False\nGPTQ = True "))
    status, _, err = run_here(path)
    one_line(status, err, "GTPQ", "did you mean GPTQ?")
    assert place.files() == {}

@pytest.mark.parametrize("words", [["--help"], ["-h"], ["plain", "--help", "no=1"]], ids=str)
def test_help(place, words):
    """The docstring, every constant with its value, comment and legal values, and the presets. Nothing is run."""
    status, out, err = run_here(place.edit(WEIGHT_BIT=5), *words)
    assert (status, err) == (0, "") and place.files() == {} and out.startswith(f"{script.__doc__}\n")
    assert script.constants_block().replace("\nWEIGHT_BIT = 8 ", "\nWEIGHT_BIT = 5 ") in out
    flat = " ".join(out.split())
    for name, (legal, _) in LEGAL.items():
        assert f" {name} {legal} " in flat
    for name, changes in script.PRESETS.items():
        assert f"preset {name}: " + " ".join(f"{key}={value!r}" for key, value in changes.items()) in flat
    assert max(map(len, out.splitlines())) <= 100

def test_the_command_line_gives_what_the_edited_file_gives(place, tmp_path_factory):
    """The same report but for times, and the same checkpoint to the last byte."""
    constants = dict(GPTQ=True, WEIGHT_BIT=5, LAYER_BITS={"fc1": 4, "cnn2": 7}, IMAGE_SIZE=(220, 227), BATCH_SIZE=4)
    words = [f"{name}={value}" for name, value in constants.items()]
    edited = Place(tmp_path_factory.mktemp("edited"))
    reports = [place.report("plain", *words)[0], edited.report(**PLAIN | constants)[0]]
    assert reports[0]["constants"] == reports[1]["constants"] and reports[0]["recipe"]["LAYER_BITS"]["fc1"] == 4
    assert figures_of(reports[0]) == figures_of(reports[1])
    files = [folder.files()["INT8_checkpoint.pth.tar"] for folder in (place, edited)]
    assert files[0] == files[1]
    rows = [rows_of(folder.results / "runs.csv")[0] for folder in (place, edited)]
    assert all(rows[0][name] == rows[1][name] for name in LEGAL)

# the table of runs

FIGURES = ["when", "evaluation_crc", "calibration_crc", "checkpoint_crc", "fp32_top1", "top1", "same_class", "sqnr_db",
           "p", "fp32_ms", "ms", "bytes"]

def rows_of(path):
    """The rows as a spreadsheet or pandas reads them: by the names in the first line."""
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))

def crc_of(folder, names):
    """What identifies pictures: labels and bytes in order, not names."""
    crc = 0
    for name in names:
        crc = zlib.crc32((folder / name).read_bytes(), zlib.crc32(bytes(["dog" in name]), crc))
    return crc

def test_a_run_adds_a_row(usual):
    place, report, out = usual
    row, = rows_of(place.results / "runs.csv")
    assert list(row) == [*FIGURES, *LEGAL]
    names = [f"{kind}.{i}.jpg" for i in range(3) for kind in ("cat", "dog")]
    crcs = [crc_of(place.val, names), crc_of(place.train, names), zlib.crc32(place.checkpoint.read_bytes())]
    assert [int(row[name]) for name in FIGURES[1:4]] == crcs == list(report["inputs"].values())
    int8, fp32 = report["int8"], report["fp32"]
    expected = [fp32["top1"], int8["top1"], 100 * report["agreement"], report["logit_sqnr_db"], report["mcnemar"]["p"],
                fp32["ms_per_image"], int8["ms_per_image"], int8["file_bytes"]]
    np.testing.assert_allclose([float(row[name]) for name in FIGURES[4:]], expected, rtol=0.01, atol=0.006)
    constants = {name: getattr(script, name) for name in LEGAL} | {"BATCH_SIZE": 4}
    assert [row[name] for name in LEGAL] == [str(value) for value in constants.values()]
    written = time.mktime(time.strptime(row["when"], "%Y-%m-%d %H:%M:%S"))
    assert abs(written - (place.results / "runs.csv").stat().st_mtime) < 60
    assert out.endswith(f"""
The last runs on these evaluation pictures and weights, FP32 Top-1 {row['fp32_top1']} %
(> this run, * best SQNR, same class in %; runs.csv has all runs and constants)
{printed([row])}""")

def printed(rows, function=script.print_runs, heading=3):
    """What a function prints of these, without the lines of its heading."""
    out = io.TextIOWrapper(Printed(), "utf-8", write_through=True)
    with contextlib.redirect_stdout(out):
        function(rows)
    return "".join(out.buffer.getvalue().decode().splitlines(keepends=True)[heading:])

def columns_of(rows):
    """{heading: cells} of the printed table, which is at most 80 columns wide."""
    assert max(map(len, printed(rows).splitlines())) <= 80
    found = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(script, "print_columns", found.update)
        printed(rows)
    return {heading: [cell.strip() for cell in cells] for heading, cells in found.items()}

@pytest.fixture
def row(usual):
    """The row of a run, to plant others like it."""
    return script.run_row(usual[1]) | {"sqnr_db": "30.00", "same_class": "99.000", "top1": "93.500", "p": "0.25",
                                       "ms": "0.456", "bytes": "424650"}

ALWAYS = ["run", "SQNR dB", "same class", "Top-1 %", "p", "ms", "bytes"]

def test_columns_are_of_constants_that_differ(row):
    assert columns_of([row]) == {"run": [">1"], "SQNR dB": ["30.0*"], "same class": ["99.0"], "Top-1 %": ["93.5"],
                                 "p": ["0.25"], "ms": ["0.46"], "bytes": ["424,650"]}
    assert list(columns_of([row, dict(row)])) == ALWAYS
    others = [row | {"LAYER_BITS": "{'fc1': 4}", "sqnr_db": "24.26", "bytes": "1234567"},
              row | {"GPTQ": "False", "sqnr_db": "31.07"}, row | {"WEIGHT_BIT": "4", "sqnr_db": "-1.50", "p": "1e-17"}]
    found = columns_of([row, *others])
    assert list(found) == ["run", "WEIGHT_BIT", "LAYER_BITS", "GPTQ", *ALWAYS[1:]]
    assert found["run"] == ["1", "2", "3", ">4"] and found["SQNR dB"] == ["30.0", "24.3", "31.1*", "-1.5"]
    assert found["WEIGHT_BIT"] == ["8", "8", "8", "4"] and found["LAYER_BITS"] == ["{}", "{'fc1': 4}", "{}", "{}"]
    assert found["GPTQ"] == ["True", "True", "False", "True"]
    assert found["p"] == ["0.25", "0.25", "0.25", "1e-17"] and found["bytes"][1] == "1,234,567"
    exact = columns_of([row, row | {"sqnr_db": "inf"}, dict(row)])
    assert exact["SQNR dB"] == ["30.0", "inf*", "30.0"] and exact["run"] == ["1", "2", ">3"] and len(exact) == 7

def test_figures_in_the_table_are_the_summarys(usual):
    """Rounded once: 39.7466 dB is 39.7, though 39.75 would be 39.8."""
    report = json.loads(json.dumps(usual[1])) | {"logit_sqnr_db": 39.7466, "agreement": 0.98749}
    report["int8"] |= {"top1": 93.7496, "ms_per_image": 0.44466}
    found = columns_of([script.run_row(report)])
    assert [found[name] for name in ALWAYS[1:4]] == [["39.7*"], ["98.7"], ["93.7"]] and found["ms"] == ["0.44"]

def test_a_name_with_a_line_break_stays_in_its_row(usual, tmp_path):
    row = script.run_row(usual[1] | {"constants": usual[1]["constants"] | {"DATA_DIR": 'a,\n"b"\x1b[2J\r'}})
    for count in (1, 2):
        rows = script.add_run(tmp_path / "runs.csv", row)
        assert rows == rows_of(tmp_path / "runs.csv") == [row] * count
    assert all(cell.isprintable() for cell in row.values()) and row["DATA_DIR"] == r'a,\n"b"\x1b[2J\r'

def test_calibration_pictures_have_a_column_where_no_name_tells_them(row):
    other = {"calibration_crc": "7"}
    assert list(columns_of([row, row | other])) == ["run", "calibration_crc", *ALWAYS[1:]]
    for name in ("DATA_DIR", "CALIBRATION_SPLIT"):
        assert list(columns_of([row, row | other | {name: "others"}])) == ["run", name, *ALWAYS[1:]]

@pytest.mark.parametrize("name", ["evaluation_crc", "checkpoint_crc"])
def test_runs_on_other_pictures_or_weights_are_not_in_the_table(row, name):
    rows = [row, row | {name: "7", "sqnr_db": "50.00", "WEIGHT_BIT": "4"}, row | {"GPTQ": "False"}]
    found = columns_of(rows)
    assert found["run"] == ["1", ">3"] and found["SQNR dB"] == ["30.0*", "30.0*"]       # as in the file
    assert found["GPTQ"] == ["True", "False"] and "WEIGHT_BIT" not in found

def test_table_of_many_and_wide_runs(row):
    """The last twelve; long names are cut at the front; figures may be absurd."""
    rows = [row | {name: f"{'long' * 20} {name} {i}" for name in LEGAL} for i in range(20)]
    rows[0]["sqnr_db"] = "99.00"
    found = columns_of(rows)
    assert set(found) == {*ALWAYS, *LEGAL} and found["run"] == [*map(str, range(9, 20)), ">20"]
    for name in LEGAL:
        assert found[name] == ["..." + f"{'long' * 20} {name} {i}"[-21:] for i in range(8, 20)]
    assert found["SQNR dB"] == ["30.0*"] * 12
    for name, cell in (("bytes", "1e300"), ("sqnr_db", "9" * 90)):
        assert printed([row | {name: cell}, row]).count("424,650") == (1 if name == "bytes" else 2)

COLUMNS = {"run": ["1", ">2"], "LAYER_BITS": ["{}", "{'fc1': 4}"], "SQNR dB": ["30.0 ", "31.5*"],
           "Top-1 %": [100, 9.5]}
WIDE = ["        LAYER_  SQNR Top-1", "run       BITS    dB     %", "  1         {} 30.0    100",
        " >2 {'fc1': 4} 31.5*   9.5"]

@pytest.mark.parametrize("width, edges", [(80, [3, 26]), (26, [3, 26]), (25, [3, 20, 26]), (20, [3, 20, 26]),
                                          (19, [3, 14, 26]), (15, [3, 14, 26]), (14, [3, 14, 20, 26])])
def test_columns_are_printed_in_blocks_that_fit(width, edges):
    """Each begins with the first column."""
    found = printed(COLUMNS, lambda columns: script.print_columns(columns, width), heading=0)
    blocks = [line[:3] + line[a:b] for a, b in zip(edges, edges[1:]) for line in WIDE]
    assert found.splitlines() == blocks

def test_pictures_are_told_by_their_content(tmp_path):
    """Folder and names do not count; bytes and labels do, and unusable files do not."""
    def checksum(name):
        pictures = script.CatDogDataset(tmp_path / name)
        list(batches(pictures))
        return pictures.checksum()

    def copied(name):
        return shutil.copytree(tmp_path / "val", tmp_path / name)
    (tmp_path / "val").mkdir()
    for file in ("cat.0.jpg", "dog.0.jpg", "cat.1.jpg"):
        shutil.copy(PICTURES / file, tmp_path / "val")
    expected = crc_of(tmp_path / "val", ["cat.0.jpg", "dog.0.jpg", "cat.1.jpg"])
    assert checksum("val") == checksum(copied("renamed").name) == expected
    (copied("named otherwise") / "cat.0.jpg").rename(tmp_path / "named otherwise" / "a cat 0.jpeg")
    (tmp_path / "named otherwise" / "dog.5.jpg").write_text("no picture")
    (tmp_path / "named otherwise" / "bird.jpg").write_text("no label")
    assert checksum("named otherwise") == expected
    changed, content = copied("changed") / "cat.1.jpg", bytearray((tmp_path / "val" / "cat.1.jpg").read_bytes())
    content[15] ^= 1                            # of its header's dots per inch: the same size, still a picture
    changed.write_bytes(content)
    shutil.copy(PICTURES / "cat.2.jpg", copied("other") / "cat.1.jpg")
    (copied("label") / "cat.1.jpg").rename(tmp_path / "label" / "dog.1.jpg")
    (copied("fewer") / "cat.1.jpg").unlink()
    assert len({expected, *map(checksum, ("changed", "other", "label", "fewer"))}) == 5

def test_the_same_pictures_in_another_folder_are_the_same(rerun, state):
    """A second run adds a second row; the first stays as it is, and both are in the table. A third one, on a checkpoint
    of other content and on other pictures under the same names, is not compared with them."""
    before = (rerun.results / "runs.csv").read_bytes()
    for split in (rerun.train, rerun.val):
        split.rename(split.with_name(f"my {split.name}"))
    words = ["CALIBRATION_SPLIT=my train", "EVALUATION_SPLIT=my val", "GPTQ=False", "BATCH_SIZE=4"]
    _, out = rerun.report(*words)
    assert (rerun.results / "runs.csv").read_bytes().startswith(before)
    rows = rows_of(rerun.results / "runs.csv")
    found = columns_of(rows)
    assert list(found) == ["run", "CALIBRATION_SPLIT", "EVALUATION_SPLIT", "GPTQ", *ALWAYS[1:]]
    assert found["run"] == ["1", ">2"] and found["EVALUATION_SPLIT"] == ["val", "my val"]
    better = max(float(row["sqnr_db"]) for row in rows)
    assert [cell[-1] == "*" for cell in found["SQNR dB"]] == [float(row["sqnr_db"]) == better for row in rows]
    assert out.endswith(f"\n{printed(rows)}")
    torch.save({"model": {**state, "fc2.bias": -state["fc2.bias"]}}, rerun.checkpoint)
    shutil.copy(PICTURES / "cat.7.jpg", rerun.val.with_name("my val") / "cat.1.jpg")
    rerun.report(*words)
    rows = rows_of(rerun.results / "runs.csv")
    assert [rows[1][name] == rows[2][name] for name in FIGURES[1:4]] == [False, True, False]
    assert columns_of(rows)["run"] == [">3"]

def add(path, row, capsys):
    """(rows, what is printed) of adding a row."""
    capsys.readouterr()
    return script.add_run(path, row), capsys.readouterr().out

@pytest.fixture
def table(tmp_path, row, capsys):
    """A table of three runs, of which the second has a name with commas, quotes and letters of any kind in it."""
    path = tmp_path / "runs.csv"
    for i, name in enumerate(["val", 'a, "b" 猫 c', "val"], 1):
        rows, out = add(path, row | {"EVALUATION_SPLIT": name, "ms": f"{i}"}, capsys)
        assert len(rows) == i and out == ""
    assert rows_of(path) == rows and len(path.read_bytes().splitlines()) == 4
    return path

@pytest.mark.parametrize("broken", [
    lambda line: b"", lambda line: b"?", lambda line: line[:len(line) // 2], lambda line: line + b",1",
    lambda line: line.replace(b"30.00", b"much"), lambda line: line.replace(b"424650", b""),
    lambda line: b"\0\xff\xfe" + line[:-40], lambda line: b'"' + line, lambda line: b"a" * 200_000,
    lambda line: line.replace(b"99.000", b"\xff")], ids=range(10))
def test_a_broken_row_is_left_out_and_said(table, row, capsys, broken):
    """It stays in the file."""
    lines = table.read_bytes().splitlines(keepends=True)
    lines[2] = broken(lines[2].rstrip()) + b"\n"
    table.write_bytes(b"".join(lines))
    rows, out = add(table, row | {"ms": "4"}, capsys)
    assert [each["ms"] for each in rows] == ["1", "3", "4"]
    assert out == ("" if lines[2] == b"\n" else f"{table}: 1 rows cannot be read and are left out\n")
    assert table.read_bytes().startswith(b"".join(lines)) and columns_of(rows)["run"] == ["1", "2", ">3"]

@pytest.mark.parametrize("change, read", [
    (lambda content: content[:-1], "123"), (lambda content: content[:-30], "12"),
    (lambda content: content[:-100], "12"), (lambda content: content.replace(b"\n", b"\r\n"), "123")], ids=range(4))
def test_lines_that_end_otherwise(table, row, capsys, change, read):
    """As an editor, a full disk, a stopped run or a spreadsheet leaves them: the next row is not lost."""
    content, new = change(table.read_bytes()), row | {"ms": "4"}
    table.write_bytes(content)
    rows, out = add(table, new, capsys)
    assert rows[-1] == rows_of(table)[-1] == new and table.read_bytes().startswith(content)
    assert [each["ms"] for each in rows] == [*read, "4"] and ("1 rows cannot be read" in out) == (read == "12")

def aside(path):
    """What tables of other columns were renamed to."""
    return [file for file in path.parent.iterdir() if re.fullmatch(r"runs-\d{8}-\d{6}-\d+\.csv", file.name)]

@pytest.mark.parametrize("content", [b"a,b\n1,2\n", b"\0\xff", b"\n", b"when\n"])
def test_a_table_of_other_columns_is_renamed(tmp_path, row, capsys, content):
    """It stays as it is, byte by byte, and the new one has the new columns."""
    path = tmp_path / "runs.csv"
    path.write_bytes(content)
    rows, out = add(path, row, capsys)
    renamed, = aside(path)
    assert out == f"{path} has other columns than this run; kept: {renamed.name}\n"
    assert renamed.read_bytes() == content and rows == [row] == rows_of(path)

def add_slowly(path, rows, together):
    """In a process of its own: what lies between reading the table and writing to it takes its time."""
    csv_line = script.csv_line

    def slowly(cells):
        time.sleep(0.02)
        return csv_line(cells)
    script.csv_line = slowly
    together.wait()
    for row in rows:
        script.add_run(path, row)

@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.parametrize("others", [1, 0])
def test_runs_at_the_same_time_lose_no_row(tmp_path, row, capsys, others):
    """Twenty, from four processes; the table is there already, or theirs are the first. Then a second line of names may
    lie among the rows, which is passed over."""
    path, fork = tmp_path / "runs.csv", multiprocessing.get_context("fork")
    rows, together = [row | {"ms": str(i)} for i in range(20 + others)], fork.Barrier(4)
    for other in rows[20:]:
        script.add_run(path, other)
    processes = [fork.Process(target=add_slowly, args=(path, rows[i:20:4], together)) for i in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0] * 4
    found, out = add(path, row | {"ms": "99"}, capsys)
    assert sorted(found, key=lambda each: int(each["ms"])) == [*rows, row | {"ms": "99"}] and out == ""
    assert (path.read_text().count("when,") == 1 or not others) and aside(path) == []

def test_mutated_tables(table, row, capsys, tmp_path):
    """Nothing but rows comes out, the table stays or is renamed byte by byte, and what is printed is printable."""
    content, rng, kept = table.read_bytes(), random.Random(20), 0
    for i, kind in enumerate([*range(MUTATIONS)] * 10):
        path, damaged = tmp_path / str(i) / "runs.csv", mutated(content, rng, kind)
        path.parent.mkdir()
        path.write_bytes(damaged)
        rows, out = add(path, row, capsys)
        assert rows[-1] == row and all(list(each) == list(row) for each in rows)
        stays = path.read_bytes().startswith(damaged)
        assert stays or aside(path)[0].read_bytes() == damaged
        assert path.read_bytes().endswith(b"\n" + script.csv_line(row.values()).encode())
        found = printed(rows).splitlines()
        assert all(line.isprintable() for line in [*out.splitlines(), *found]) and max(map(len, found)) <= 80, i
        kept += stays
    assert 20 < kept < 80

def test_a_table_that_cannot_be_written_ends_the_run_in_one_line(place):
    """The report and the network are there then."""
    (place.results / "runs.csv").mkdir(parents=True)
    status, out, err = run_here(place.edit())
    one_line(status, err, "results/runs.csv", "directory")
    assert "\nwrote results/INT8_checkpoint.pth.tar and report.json\n" in out and "The last runs" not in out
    assert set(place.files()) == {"report.json", "INT8_checkpoint.pth.tar", "runs.csv"}

# lines of the summary

def test_a_line_says_that_the_counted_pictures_calibrated(usual, capsys):
    """By their content, whatever their folder is called."""
    line = "\nCalibration and evaluation use the same pictures: "
    for inputs, said in ((usual[1]["inputs"], False), (dict.fromkeys(usual[1]["inputs"], 7), True)):
        script.print_summary(usual[1] | {"inputs": inputs})
        assert (line in capsys.readouterr().out) == said
