"""The bench around the pipeline: constants and their legal values, the command line."""
import math
import re

import pytest
import quantize_catdog as script
import torch

from helpers import (
    DEVICE,
    METHODS,
    SCRIPT,
    Place,
    as_constants,
    figures_of,
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
    ("CHECKPOINT", 3), ("CHECKPOINT", " "), ("IMAGE_SIZE", (211, 224)),
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
    name = word.partition("=")[0]
    refuses(rf"{name} = .*: {illegal(name)}", given, word)

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
        assert f"\npreset {name}: {changes}\n" in out
    assert max(len(line) for line in out.splitlines() if not line.startswith("preset ")) <= 100

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

# lines of the summary

def test_a_line_says_that_the_counted_pictures_calibrated(usual, capsys):
    """By their content, whatever their folder is called."""
    line = "\nCalibration and evaluation use the same pictures: "
    for inputs, said in ((usual[1]["inputs"], False), (dict.fromkeys(usual[1]["inputs"], 7), True)):
        script.print_summary(usual[1] | {"inputs": inputs})
        assert (line in capsys.readouterr().out) == said
