"""The table of runs: the line that a run of the script adds to runs.jsonl, and what tools/runs.py makes of them."""
import contextlib
import csv
import io
import json
import multiprocessing
import random
import shutil
import sys
import textwrap
import time
import zlib
from types import SimpleNamespace

import pytest
import quantize_catdog as script
import torch

from helpers import MUTATIONS, PICTURES, ROOT, SCRIPT, Printed, batches, mutated, one_line, run_here

sys.path.insert(0, str(ROOT / "tools"))
import runs  # noqa: E402

LEGAL = script.LEGAL
CRCS = ["evaluation_crc", "calibration_crc", "checkpoint_crc"]
FIGURES = ["fp32_top1", "sqnr_db", "same_class", "top1", "p", "fp32_ms", "ms", "bytes"]
ALWAYS = ["run", "SQNR dB", "same class", "Top-1 %", "p", "ms", "bytes"]

def shown(place, *words):
    """(exit status, stdout, stderr) of tools/runs.py in this place, run in this process."""
    (place.folder / "tools").mkdir(exist_ok=True)
    tool = shutil.copy(ROOT / "tools" / "runs.py", place.folder / "tools")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "path", sys.path[:])
        patch.delitem(sys.modules, "quantize_catdog")       # it imports the place's copy
        return run_here(tool, *words)

def rows_of(path):
    """The rows as a spreadsheet or pandas reads them: by the names in the first line."""
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))

def as_text(row):
    return {name: str(value) for name, value in row.items()}

def crc_of(folder, names):
    """What identifies pictures: labels and bytes in order, not names."""
    crc = 0
    for name in names:
        crc = zlib.crc32((folder / name).read_bytes(), crc + ("dog" in name))
    return crc

def printed(rows):
    """What is printed of these, without the two lines of the heading."""
    out = io.TextIOWrapper(Printed(), "utf-8", write_through=True)
    with contextlib.redirect_stdout(out):
        runs.print_runs(rows)
    return "".join(out.buffer.getvalue().decode().splitlines(keepends=True)[2:])

def columns_of(rows):
    """{heading: cells} of the printed table, which is at most 80 columns wide."""
    assert max(map(len, printed(rows).splitlines())) <= 80
    found = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(script, "print_table", found.extend)
        printed(rows)
    assert all(list(row) == list(found[0]) for row in found)
    return {heading: [row[heading].strip() for row in found] for heading in found[0]}

@pytest.fixture
def report(usual):
    """A report with other figures, to plant runs like it."""
    planted = json.loads(json.dumps(usual[1])) | {"logit_sqnr_db": 30.0, "agreement": 0.99}
    planted["mcnemar"]["p"] = 0.25
    planted["int8"] |= {"top1": 93.5, "ms_per_image": 0.456, "file_bytes": 424650}
    return planted

@pytest.fixture
def row(report):
    return runs.run_row(report)

# a run's line, and its row

def test_a_run_adds_its_report(usual):
    place, report, out = usual
    assert (place.results / "runs.jsonl").read_text() == json.dumps(report) + "\n"
    written = time.mktime(time.strptime(report["when"], "%Y-%m-%d %H:%M:%S"))
    assert abs(written - (place.results / "runs.jsonl").stat().st_mtime) < 60
    assert out.endswith("report.json\npython tools/runs.py OUTPUT_DIR=results compares all runs written there\n")

def test_a_run_is_a_row(rerun, usual):
    """runs.csv holds its figures as the report has them; the table is printed, and the runs stay as they are."""
    before, report = rerun.files(), usual[1]
    status, out, err = shown(rerun)
    assert (status, err) == (0, "") and rerun.files() == before | {"runs.csv": rerun.files()["runs.csv"]}
    row, = rows_of(rerun.results / "runs.csv")
    assert list(row) == ["when", *CRCS, *FIGURES, *LEGAL] and row["when"] == report["when"]
    names = [f"{kind}.{i}.jpg" for i in range(3) for kind in ("cat", "dog")]
    crcs = [crc_of(rerun.val, names), crc_of(rerun.train, names), zlib.crc32(rerun.checkpoint.read_bytes())]
    assert [int(row[name]) for name in CRCS] == crcs == [report["inputs"][name] for name in CRCS]
    int8, fp32 = report["int8"], report["fp32"]
    assert [float(row[name]) for name in FIGURES] == [
        fp32["top1"], report["logit_sqnr_db"], 100 * report["agreement"], int8["top1"], report["mcnemar"]["p"],
        fp32["ms_per_image"], int8["ms_per_image"], int8["file_bytes"]]
    constants = {name: getattr(script, name) for name in LEGAL} | {"BATCH_SIZE": 4}
    assert [row[name] for name in LEGAL] == [str(report["constants"][name]) for name in LEGAL] == [
        str(list(value) if type(value) is tuple else value) for value in constants.values()]
    assert out == f"""\
The last runs on these evaluation pictures and weights, FP32 Top-1 {fp32['top1']:.3f} %
(> last run, * best SQNR, same class in %; runs.csv has all runs and constants)
{printed([runs.run_row(report)])}"""

def test_a_name_with_a_line_break_stays_in_its_row(report, tmp_path):
    row = runs.run_row(report | {"constants": report["constants"] | {"DATA_DIR": 'a,\n"b"\x1b[2J\r\udcff'}})
    (tmp_path / "runs.csv").write_bytes(runs.csv_bytes([row, row]))
    assert rows_of(tmp_path / "runs.csv") == [as_text(row)] * 2
    assert all(cell.isprintable() for cell in as_text(row).values()) and row["DATA_DIR"] == r'a,\n"b"\x1b[2J\r\udcff'

# which columns and runs the table has

def test_columns_are_of_constants_that_differ(row):
    assert columns_of([row]) == {"run": [">1"], "SQNR dB": ["30.0*"], "same class": ["99.0"], "Top-1 %": ["93.5"],
                                 "p": ["0.25"], "ms": ["0.46"], "bytes": ["424,650"]}
    assert list(columns_of([row, dict(row)])) == ALWAYS
    others = [row | {"LAYER_BITS": "{'fc1': 4}", "sqnr_db": 24.26, "bytes": 1234567},
              row | {"GPTQ": "False", "sqnr_db": 31.07}, row | {"WEIGHT_BIT": "4", "sqnr_db": -1.5, "p": 1e-17}]
    found = columns_of([row, *others])
    assert list(found) == ["run", "WEIGHT_BIT", "LAYER_BITS", "GPTQ", *ALWAYS[1:]]
    assert found["run"] == ["1", "2", "3", ">4"] and found["SQNR dB"] == ["30.0", "24.3", "31.1*", "-1.5"]
    assert found["WEIGHT_BIT"] == ["8", "8", "8", "4"] and found["LAYER_BITS"] == ["{}", "{'fc1': 4}", "{}", "{}"]
    assert found["GPTQ"] == ["True", "True", "False", "True"]
    assert found["p"] == ["0.25", "0.25", "0.25", "1e-17"] and found["bytes"][1] == "1,234,567"

def test_an_exact_network_has_the_best_sqnr(report, row):
    found = columns_of([row, runs.run_row(report | {"logit_sqnr_db": None}), dict(row)])
    assert found["SQNR dB"] == ["30.0", "inf*", "30.0"] and found["run"] == ["1", "2", ">3"] and len(found) == 7

def test_figures_in_the_table_are_the_summarys(report):
    """Rounded once: 39.7466 dB is 39.7, though 39.75 would be 39.8."""
    report |= {"logit_sqnr_db": 39.7466, "agreement": 0.98749}
    report["int8"] |= {"top1": 93.7496, "ms_per_image": 0.44466}
    found = columns_of([runs.run_row(report)])
    assert [found[name] for name in ALWAYS[1:4]] == [["39.7*"], ["98.7"], ["93.7"]] and found["ms"] == ["0.44"]

def test_calibration_pictures_have_a_column_where_no_name_tells_them(row):
    other = {"calibration_crc": 7}
    assert list(columns_of([row, row | other])) == ["run", "calibration_crc", *ALWAYS[1:]]
    for name in ("DATA_DIR", "CALIBRATION_SPLIT"):
        assert list(columns_of([row, row | other | {name: "others"}])) == ["run", name, *ALWAYS[1:]]

@pytest.mark.parametrize("name", ["evaluation_crc", "checkpoint_crc"])
def test_runs_on_other_pictures_or_weights_are_not_in_the_table(row, name):
    rows = [row, row | {name: 7, "sqnr_db": 50.0, "WEIGHT_BIT": "4"}, row | {"GPTQ": "False"}]
    found = columns_of(rows)
    assert found["run"] == ["1", ">3"] and found["SQNR dB"] == ["30.0*", "30.0*"]       # as in runs.csv
    assert found["GPTQ"] == ["True", "False"] and "WEIGHT_BIT" not in found

def test_table_of_many_and_wide_runs(row):
    """The last twelve; long names are cut at the front; figures may be absurd."""
    rows = [row | {name: f"{'long' * 20} {name} {i}" for name in LEGAL} for i in range(20)]
    rows[0]["sqnr_db"] = 99.0
    found = columns_of(rows)
    assert set(found) == {*ALWAYS, *LEGAL} and found["run"] == [*map(str, range(9, 20)), ">20"]
    for name in LEGAL:
        assert found[name] == ["..." + f"{'long' * 20} {name} {i}"[-21:] for i in range(8, 20)]
    assert found["SQNR dB"] == ["30.0*"] * 12
    for name, cell in (("bytes", 1e300), ("sqnr_db", 1e90)):
        assert printed([row | {name: cell}, row]).count("424,650") == (1 if name == "bytes" else 2)

def test_runs_of_other_versions_do_not_break_it(report, row, tmp_path):
    """One has a constant that is gone, one lacks GPTQ: its cells are empty, and runs.csv has the columns of all."""
    old = row | {"SMOOTHING": "True", "BIT": "7"}
    older = {name: value for name, value in row.items() if name != "GPTQ"}
    found = columns_of([old, older, row])
    assert list(found) == ["run", "BIT", "GPTQ", *ALWAYS[1:]]
    assert found["BIT"] == ["7", "8", "8"] and found["GPTQ"] == ["True", "", "True"]
    assert columns_of([row, old, older])["GPTQ"] == ["True", "True", ""]
    (tmp_path / "runs.csv").write_bytes(runs.csv_bytes([older, old, row]))
    empty = dict.fromkeys(["GPTQ", "SMOOTHING"], "")
    assert rows_of(tmp_path / "runs.csv") == [empty | as_text(each) for each in (older, old, row)]

# what tells pictures

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
    """A second run adds a second line; the first stays as it is, and both are in the table. A third one, on a
    checkpoint of other content and on other pictures under the same names, is not compared with them."""
    before = (rerun.results / "runs.jsonl").read_bytes()
    for split in (rerun.train, rerun.val):
        split.rename(split.with_name(f"my {split.name}"))
    words = ["CALIBRATION_SPLIT=my train", "EVALUATION_SPLIT=my val", "GPTQ=False", "BATCH_SIZE=4"]
    rerun.report(*words)
    assert (rerun.results / "runs.jsonl").read_bytes().startswith(before)
    rows = runs.read_runs(rerun.results / "runs.jsonl")
    found = columns_of(rows)
    assert list(found) == ["run", "CALIBRATION_SPLIT", "EVALUATION_SPLIT", "GPTQ", *ALWAYS[1:]]
    assert found["run"] == ["1", ">2"] and found["EVALUATION_SPLIT"] == ["val", "my val"]
    better = max(row["sqnr_db"] for row in rows)
    assert [cell[-1] == "*" for cell in found["SQNR dB"]] == [row["sqnr_db"] == better for row in rows]
    assert shown(rerun)[1].endswith(f" constants)\n{printed(rows)}")
    assert rows_of(rerun.results / "runs.csv") == [as_text(row) for row in rows]
    torch.save({"model": {**state, "fc2.bias": -state["fc2.bias"]}}, rerun.checkpoint)
    shutil.copy(PICTURES / "cat.7.jpg", rerun.val.with_name("my val") / "cat.1.jpg")
    rerun.report(*words)
    rows = runs.read_runs(rerun.results / "runs.jsonl")
    assert [rows[1][name] == rows[2][name] for name in CRCS] == [False, True, False]
    assert columns_of(rows)["run"] == [">3"]

# lines that are damaged, and runs at the same time

def add_run(folder, report, dumps=json.dumps):
    """The script's own lines that add a run to the table."""
    cell = SCRIPT.read_text().split("    write_files(output, ")[1].split("\n# %%")[0]
    exec(textwrap.dedent(cell.partition("\n")[2]), vars(script) | {
        "output": folder, "report": report, "json": SimpleNamespace(dumps=dumps)})

@pytest.fixture
def table(tmp_path, report):
    """Three runs, told apart by their ms. The second has a name with commas, quotes and letters of any kind in it."""
    for i, name in enumerate(["val", 'a, "b" 猫 c', "val"], 1):
        report["int8"]["ms_per_image"] = i
        add_run(tmp_path, report | {"constants": report["constants"] | {"EVALUATION_SPLIT": name}})
    return tmp_path / "runs.jsonl"

def read(path, capsys):
    """(rows, what is printed) of reading a table."""
    capsys.readouterr()
    return runs.read_runs(path), capsys.readouterr().out

@pytest.mark.parametrize("old, new", [
    (None, b""), (None, b"?"), (None, b"{}"), (None, b"[1]"), (None, b"null"), (None, b"1e999"), (None, b'"text"'),
    (None, b"[" * 200_000), (None, b"\0\xff\xfe"), (b"{", b""), (b"}", b""), (b'"when": ', b'"then": '),
    (b'"logit_sqnr_db": 30.0', b'"logit_sqnr_db": "30.0"'), (b'"agreement": 0.99', b'"agreement": []'),
    (b'"p": 0.25', b'"p": null'), (b'"ms_per_image": 2', b'"ms_per_image": {}'), (b'"top1": 93.5', b'"top1": "much"'),
    (b'"file_bytes": 424650', b'"file_bytes": "424650"'), (b'"file_bytes": 424650', b'"file_bytes": 1\xff'),
    (b'"p": 0.25', b'"p": ' + b"9" * 400), (b'"p": 0.25', b'"p": ' + b"9" * 5000), (b'"fp32": {', b'"fp32": 1, "_": {'),
    (b'"fp32": {"top1": ', b'"fp32": {"top1": "much", "_": '), (b'"inputs": {', b'"inputs": [], "_": {'),
    (b'"inputs": {', b'"inputs": {}, "_": {'), (b'"calibration_crc": ', b'"calibration_crc": [], "_": '),
    (b'"constants": {', b'"constants": [], "_": {'), (b'"constants": {', b'"_": {')], ids=range(28))
@pytest.mark.parametrize("at", [1, 2], ids=["middle", "last"])
def test_a_broken_line_is_left_out_and_said(table, capsys, at, old, new):
    """It stays in the file."""
    lines = table.read_bytes().splitlines(keepends=True)
    lines.insert(2, lines.pop(1)) if at == 2 else None
    broken = new if old is None else lines[at].rstrip().replace(old, new, 1)
    assert broken != lines[at].rstrip()
    lines[at] = broken + b"\n"
    table.write_bytes(b"".join(lines))
    rows, out = read(table, capsys)
    assert [each["ms"] for each in rows] == [1, 3] and columns_of(rows)["run"] == ["1", ">2"]
    assert out == (f"{table}: 1 lines cannot be read and are left out\n" if broken else "")
    assert table.read_bytes() == b"".join(lines)

@pytest.mark.parametrize("change, ms", [
    (lambda content: content[:-1], [1, 2]), (lambda content: content[:-30], [1, 2]),
    (lambda content: content.replace(b"\n", b"\r\n"), [1, 2, 3, 4]), (lambda content: content + b"\n", [1, 2, 3, 4])],
    ids=range(4))
def test_lines_that_end_otherwise(table, report, capsys, change, ms):
    """As an editor or a full disk leaves them: what is joined to the next run cannot be read, and it is said."""
    content = change(table.read_bytes())
    table.write_bytes(content)
    report["int8"]["ms_per_image"] = 4
    add_run(table.parent, report)
    rows, out = read(table, capsys)
    assert [each["ms"] for each in rows] == ms and table.read_bytes().startswith(content)
    assert out == (f"{table}: 1 lines cannot be read and are left out\n" if len(ms) == 2 else "")

def add_runs(folder, reports, together):
    """In a process of its own, which has little to do but to write."""
    lines = [json.dumps(report) for report in reports]
    together.wait()
    for line in lines:
        add_run(folder, line, dumps=str)

@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.parametrize("others", [1, 0])
def test_runs_at_the_same_time_lose_no_line(tmp_path, report, capsys, others):
    """Eighty, from four processes, of many changed pictures each. The table is there already, or theirs are the first.
    """
    fork = multiprocessing.get_context("fork")
    reports = [report | {"int8": report["int8"] | {"ms_per_image": i}, "flips": ["a changed picture"] * 20_000}
               for i in range(80 + others)]
    for other in reports[80:]:
        add_run(tmp_path, other)
    together = fork.Barrier(4)
    processes = [fork.Process(target=add_runs, args=(tmp_path, reports[i:80:4], together)) for i in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0] * 4
    found, out = read(tmp_path / "runs.jsonl", capsys)
    assert sorted(found, key=lambda each: each["ms"]) == [runs.run_row(each) for each in reports] and out == ""

def test_mutated_tables(table, capsys):
    """What is printed is printable, runs.csv holds what was read, and an accident in one place leaves other runs."""
    content, original = table.read_bytes(), runs.read_runs(table)
    rng, survived = random.Random(20), 0
    for i, kind in enumerate([*range(MUTATIONS)] * 10):
        damaged = mutated(content, rng, kind)
        table.write_bytes(damaged)
        try:
            rows, out = read(table, capsys)
        except script.InputError as error:
            assert kind in (0, 1, 7) and str(error) == f"{table} holds no run: run quantize_catdog.py first"
            continue
        table.with_name("runs.csv").write_bytes(runs.csv_bytes(rows))
        empty = dict.fromkeys((column for row in rows for column in row), "")
        assert rows_of(table.with_name("runs.csv")) == [empty | as_text(row) for row in rows]
        found = printed(rows).splitlines()
        assert all(line.isprintable() for line in [*out.splitlines(), *found]) and max(map(len, found)) <= 80, i
        survived += sum(row in original for row in rows)
        assert kind in (0, 1, 7) or any(row in original for row in rows), i
    assert 80 < survived < 240

# one line where it cannot go on

def test_a_table_that_cannot_be_written_ends_the_run_in_one_line(place):
    """The report and the network are there then."""
    (place.results / "runs.jsonl").mkdir(parents=True)
    status, out, err = run_here(place.edit())
    one_line(status, err, "results/runs.jsonl", "directory")
    assert "\nwrote results/INT8_checkpoint.pth.tar and report.json" in out
    assert set(place.files()) == {"report.json", "INT8_checkpoint.pth.tar", "runs.jsonl"}

@pytest.mark.parametrize("name, content, words", [
    ("runs.csv", None, ["cannot write in", "results", "runs.csv", "OUTPUT_DIR"]),
    ("runs.jsonl", None, ["results/runs.jsonl", "directory"]),
    ("runs.jsonl", "?\n" * 2, ["results/runs.jsonl", "holds no run", "quantize_catdog.py"]),
    ("runs.jsonl", "", ["results/runs.jsonl", "holds no run", "quantize_catdog.py"])], ids=range(4))
def test_the_tool_ends_in_one_line(rerun, name, content, words):
    """And leaves what is there."""
    path = rerun.results / name
    path.unlink(missing_ok=True)
    path.mkdir() if content is None else path.write_text(content)
    before = rerun.files()
    status, out, err = shown(rerun)
    one_line(status, err, *words)
    assert rerun.files() == before and "The last runs" not in out

def test_words_of_the_tool(rerun):
    """OUTPUT_DIR is the one of the constants, or the word. Other words are refused, and --help is the script's."""
    path = rerun.results.rename(rerun.folder / "elsewhere")
    status, _, err = shown(rerun)
    one_line(status, err, "results holds no runs.jsonl", "quantize_catdog.py")
    assert not rerun.results.exists()
    status, out, err = shown(rerun, "OUTPUT_DIR=elsewhere")
    assert (status, err) == (0, "") and "\n >1" in out and len(rows_of(path / "runs.csv")) == 1
    status, _, err = shown(rerun, "OUTPT_DIR=elsewhere")
    one_line(status, err, "OUTPT_DIR", "did you mean OUTPUT_DIR?")
    status, out, err = shown(rerun, "--help")
    assert (status, err) == (0, "") and out.startswith(f"{runs.__doc__}\nThe constants:\n") and "OUTPUT_DIR = " in out
