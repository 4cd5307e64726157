"""What the summary says of two networks' answers: what changed, whether it is more than chance, names of any kind."""
import math

import pytest
import quantize_catdog as script
import torch

from helpers import Pictures, Place


@pytest.fixture(scope="module")
def crowded(tmp_path_factory):
    """(report, stdout) of a run on six pictures and 30 files that are none."""
    place = Place(tmp_path_factory.mktemp("crowded"))
    for i in range(30):
        (place.val / f"bird.{i}.jpg").write_bytes(b"")
    return place.report()

def predictions(pictures, logits):
    """The Predictions of a network that answers with these logits."""
    return script.evaluate("INT8", lambda pixels, observe: logits, pictures)

@pytest.mark.parametrize("corrected, broken, p", [
    (0, 0, 1), (0, 1, 1), (5, 5, 1), (1, 9, 0.021484375), (9, 1, 0.021484375), (0, 10, 0.001953125),
    (3, 8, 0.2265625)])
def test_mcnemar(corrected, broken, p):
    """Tails of the binomial distribution, by hand: (1, 9) is 2 * (1 + 10) / 1024."""
    assert script.mcnemar(corrected, broken) == p

def test_mcnemar_of_very_many():
    """2^1550 is beyond a float."""
    assert 0 < script.mcnemar(700, 850) < 0.001 < 0.1 < script.mcnemar(700, 730) < 1

def test_a_tie_is_a_cat(capsys):
    """In each figure: Top-1, pictures right, and what they were called."""
    found = predictions(Pictures(torch.zeros(4, 3, 2, 2), [0, 0, 0, 1]), torch.ones(4, 2))
    assert found.top1 == 75 and found.classes.tolist() == [0] * 4
    assert "INT8 Top1: 75.000, 4 of 4" in capsys.readouterr().out
    accuracy = script.accuracy_of(found)
    assert accuracy["correct"] == 3 and accuracy["confusion"] == [[3, 0], [1, 0]]

def test_planted_flips():
    """Of five pictures the second and the third turn right and the fourth wrong."""
    pictures = Pictures(torch.zeros(5, 3, 2, 2), [0, 0, 1, 1, 1])
    fp32, int8 = [predictions(pictures, torch.tensor(logits)) for logits in (
        [[2.0, 0], [0, 0.5], [1, 0], [0.25, 1], [3, 1]], [[2.0, 0], [0.75, 0.5], [0, 1], [1.25, 1], [3, 2]])]
    found = script.compare(fp32, int8)
    assert found["flips"] == [dict(zip(
        ["file", "label", "effect", "fp32_margin", "fp32_logits", "int8_logits"], values)) for values in (
            ["cat.1.jpg", "cat", "corrected", 0.5, [0, 0.5], [0.75, 0.5]],
            ["cat.2.jpg", "dog", "corrected", 1, [1, 0], [0, 1]],
            ["cat.3.jpg", "dog", "broken", 0.75, [0.25, 1], [1.25, 1]])]
    assert found["agreement"] == pytest.approx(0.4) and found["mcnemar"] == {"corrected": 2, "broken": 1, "p": 1}
    assert found["fp32"]["confusion"] == [[1, 1], [2, 1]] and found["int8"]["confusion"] == [[2, 0], [2, 1]]
    assert [found[name]["correct"] for name in ("fp32", "int8")] == [2, 3]
    assert found["logit_sqnr_db"] == pytest.approx(10 * math.log10(16.3125 / (0.5625 + 2 + 1 + 1)))

def test_three_classes(monkeypatch):
    """An answer may change from one wrong class to another one; the confusion has as many rows as there are classes."""
    monkeypatch.setattr(script, "CLASSES", ("cat", "dog", "bird"))
    pictures = Pictures(torch.zeros(3, 3, 2, 2), [0, 1, 2])
    fp32, int8 = [predictions(pictures, torch.eye(3)[classes]) for classes in ([1, 1, 2], [2, 1, 2])]
    found = script.compare(fp32, int8)
    assert [(flip["effect"], flip["label"]) for flip in found["flips"]] == [("still wrong", "cat")]
    assert found["mcnemar"] == {"corrected": 0, "broken": 0, "p": 1}
    assert found["int8"]["confusion"] == [[0, 0, 1], [0, 1, 0], [0, 0, 1]]

@pytest.mark.parametrize("value", [float("inf"), -float("inf"), float("nan")])
@pytest.mark.parametrize("wrong", [0, 1])
def test_logits_that_are_no_numbers_are_not_compared(value, wrong):
    """Of either network."""
    pictures = Pictures(torch.zeros(1, 3, 2, 2))
    answers = [predictions(pictures, torch.tensor([[1.0, value if i == wrong else 0.0]])) for i in range(2)]
    with pytest.raises(script.InputError, match="logits overflow FP32"):
        script.compare(*answers)

@pytest.mark.parametrize("corrected, broken, chance", [
    (0, 5, "could be chance (McNemar's p = 0.062)"), (4, 12, "could be chance (McNemar's p = 0.077)"),
    (3, 11, "could be chance (McNemar's p = 0.057)"), (4, 13, "is more than chance (McNemar's p = 0.049)"),
    (0, 6, "is more than chance (McNemar's p = 0.031)"), (0, 40, "is more than chance (McNemar's p = 1.8e-12)"),
    (0, 0, None)])
def test_verdict(crowded, capsys, corrected, broken, chance):
    """None where no answer turned right or wrong."""
    test = {"corrected": corrected, "broken": broken, "p": script.mcnemar(corrected, broken)}
    script.print_summary(crowded[0] | {"mcnemar": test})
    out = " ".join(capsys.readouterr().out.split())
    verdict = f"INT8 corrects {corrected} and breaks {broken} of FP32's answers, which {chance}"
    assert verdict in out if chance else "McNemar" not in out

def test_figures_in_the_summary(crowded, capsys):
    """Each in its network's row: Top-1, its interval, right pictures of each class, time, size."""
    rows = {name: crowded[0][name] | dict(
        interval95=script.wilson(correct, 100), top1=correct + 0.1234, confusion=[[correct, 1], [2000, correct + 3]],
        ms_per_image=correct / 7, file_bytes=12345 * correct) for name, correct in (("fp32", 90), ("int8", 50))}
    script.print_summary(crowded[0] | rows | {"speedup": 1.84, "agreement": 0.98749, "logit_sqnr_db": 39.7466})
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    for line in ("FP32 90.123 % 82.6 to 94.5 % 90 of 91 93 of 2,093 12.86 1,111,050",
                 "INT8 50.123 % 40.4 to 59.6 % 50 of 51 53 of 2,053 7.14 617,250",
                 "same class 98.75 %, logit SQNR 39.7 dB, INT8 1.8 times as fast"):
        assert line.split() in lines

TABLE = [{"run": "1", "LAYER_BITS": "{}", "SQNR dB": "30.0 ", "Top-1 %": 1000},
         {"run": ">2", "LAYER_BITS": "{'fc1': 4}", "SQNR dB": "31.5*", "Top-1 %": 9.51239}]
WIDE = ["        LAYER_  SQNR  Top-1", "run       BITS    dB      %", "  1         {} 30.0   1,000",
        " >2 {'fc1': 4} 31.5* 9.5124"]

@pytest.mark.parametrize("width, edges", [(80, [3, 27]), (27, [3, 27]), (26, [3, 20, 27]), (20, [3, 20, 27]),
                                          (19, [3, 14, 27]), (16, [3, 14, 27]), (15, [3, 14, 20, 27])])
def test_a_table_is_printed_in_blocks_that_fit(capsys, width, edges):
    """Each begins with the first column."""
    script.print_table(TABLE, width)
    blocks = [line[:3] + line[a:b] for a, b in zip(edges, edges[1:]) for line in WIDE]
    assert capsys.readouterr().out.splitlines() == blocks

NAMES = ["x" * 300, "cat.0.jpg", "猫" * 200, "a\nb\r\x1b[2J" * 30, "\u202e" * 99, "\udcff" * 99, "cat\u0301" * 99,
         " " * 500, "/".join(["folder"] * 60)]

def test_summary_is_at_most_80_characters_wide(crowded, capsys):
    """With names of any length and kind, in lines that hold nothing but what can be printed. Lists are cut."""
    flips = [{"file": name, "label": "dog", "effect": effect, "fp32_margin": 12.345, "fp32_logits": [-12.345, 11.222],
              "int8_logits": [11.222, -12.345]} for name in NAMES for effect in ("corrected", "broken", "still wrong")]
    skipped = [{"file": f"/home/{name}", "reason": f"cannot be decoded: {name}"} for name in NAMES * 3]
    script.print_summary(crowded[0] | {
        "flips": flips, "skipped": skipped, "recipe": crowded[0]["recipe"] | {"WEIGHT_BIT": 7},
        "mcnemar": {"corrected": 12, "broken": 345, "p": 1.2e-34}})
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if len(line) > 80] == [] and all(line.isprintable() for line in lines)
    effects = [sum(line.endswith(f" (dog), {effect}, FP32's margin 12.345") for line in lines)
               for effect in ("corrected", "broken", "still wrong")]
    assert effects == [7, 7, 6] and script.LISTED == 20
    assert "pictures that changed their class: 27; files left out: 27; see report.json" in lines
    assert sum("..." in line for line in lines) >= 2 * 20 / 9 * 7       # of flips and of files left out

def test_names_that_would_move_the_cursor():
    assert script.shorten("cats/\x1b[31mred\n.jpg", 99) == r"cats/\x1b[31mred\n.jpg"
    assert script.shorten("\u732b.jpg", 99) == "\u732b.jpg"
    assert script.shorten("a" * 20 + "cat.jpg", 15) == "...aaaaacat.jpg" and len(script.shorten("b" * 15, 15)) == 15

def test_lists_are_cut_in_the_terminal_and_whole_in_the_report(crowded):
    report, out = crowded
    assert len(report["skipped"]) == 30 and out.count("/val/bird.") == 20
    assert f"\npictures that changed their class: {len(report['flips'])}; files left out: 30; see report.json\n" in out
