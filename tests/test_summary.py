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


@pytest.mark.parametrize("gained, lost, p", [(0, 0, 1), (0, 1, 1), (5, 5, 1), (1, 9, 0.021484375), (9, 1, 0.021484375),
                                             (0, 10, 0.001953125), (3, 8, 0.2265625)])
def test_mcnemar(gained, lost, p):
    """Tails of the binomial distribution, by hand: (1, 9) is 2 * (1 + 10) / 1024."""
    assert script.mcnemar(gained, lost) == p


def test_a_tie_is_a_cat(capsys):
    """In each figure: Top-1, pictures right, and what they were called."""
    pictures = Pictures(torch.zeros(4, 3, 2, 2), [0, 0, 0, 1])
    outcome = script.evaluate("INT8", lambda pixels, at: torch.ones(len(pixels), 2), pictures)
    assert outcome.top1 == 75 and "INT8 Top1: 75.000, 4 of 4" in capsys.readouterr().out
    found = script.accuracy_of(outcome)
    assert found["correct"] == 3 and found["confusion"] == [[3, 0], [1, 0]]


def test_mcnemar_of_very_many():
    assert 0 < script.mcnemar(3000, 3300) < 0.001 < 0.1 < script.mcnemar(3000, 3050) < 1


def test_planted_flips():
    """Of five pictures the second turns right and the fourth wrong."""
    files, labels = [f"cat and co {i}.jpg" for i in range(5)], torch.tensor([0, 0, 1, 1, 1])
    fp32 = torch.tensor([[2.0, 0], [0.0, 0.5], [0, 1], [0.25, 1], [3, 1]])
    int8 = torch.tensor([[2.0, 0], [0.6, 0.5], [0, 1], [1.25, 1], [3, 2]])
    found = script.compare(script.Predictions(files, labels, fp32, 60.0), script.Predictions(files, labels, int8, 60.0))
    assert [(flip["file"], flip["label"], flip["better"], flip["fp32_margin"]) for flip in found["flips"]] == [
        ("cat and co 1.jpg", "cat", True, 0.5), ("cat and co 3.jpg", "dog", False, 0.75)]
    assert found["flips"][1]["fp32_logits"] == [0.25, 1] and found["flips"][1]["int8_logits"] == [1.25, 1]
    assert found["agreement"] == 0.6 and found["mcnemar"] == {"corrected": 1, "broken": 1, "p": 1}
    assert found["flips"][0]["fp32_logits"] == [0.0, 0.5] and set(found["flips"][0]) == {
        "file", "label", "better", "fp32_margin", "fp32_logits", "int8_logits"}
    assert found["fp32"]["confusion"] == [[1, 1], [1, 2]] and found["int8"]["confusion"] == [[2, 0], [2, 1]]
    assert [found[name]["correct"] for name in ("fp32", "int8")] == [3, 3]
    assert found["logit_sqnr_db"] == pytest.approx(10 * math.log10(16.3125 / 2.36))


@pytest.mark.parametrize("value", [float("inf"), -float("inf"), float("nan")])
@pytest.mark.parametrize("wrong", [0, 1])
def test_logits_that_are_no_numbers_are_not_compared(value, wrong):
    """Of either network."""
    outcomes = [script.Predictions(["cat.jpg"], torch.tensor([0]), torch.tensor([[1.0, 0.0]]), 100.0) for _ in range(2)]
    outcomes[wrong].logits[0, 1] = value
    with pytest.raises(script.InputError, match="logits overflow FP32"):
        script.compare(*outcomes)


@pytest.mark.parametrize("gained, lost, chance", [(0, 5, "can be chance (McNemar's p = 0.062)"),
                                                  (4, 12, "can be chance (McNemar's p = 0.077)"),
                                                  (3, 11, "can be chance (McNemar's p = 0.057)"),
                                                  (4, 13, "more than chance (McNemar's p = 0.049)"),
                                                  (0, 6, "more than chance (McNemar's p = 0.031)"),
                                                  (0, 40, "more than chance (McNemar's p = 1.8e-12)")])
def test_verdict(crowded, capsys, gained, lost, chance):
    test = {"corrected": gained, "broken": lost, "p": script.mcnemar(gained, lost)}
    script.print_summary(crowded[0] | {"mcnemar": test})
    assert f"INT8 corrects {gained} and spoils {lost} FP32 answers: {chance}\n" in capsys.readouterr().out


def test_intervals_in_the_summary(crowded, capsys):
    rows = {name: crowded[0][name] | {"interval95": script.wilson(correct, 100)}
            for name, correct in (("fp32", 90), ("int8", 50))}
    script.print_summary(crowded[0] | rows)
    lines = capsys.readouterr().out.splitlines()
    for name, row in rows.items():
        low, high = row["interval95"]
        assert any(line.startswith(name.upper()) and f"{low:.1f} to {high:.1f} %" in line for line in lines)


def test_names_that_would_move_the_cursor():
    assert script.shorten("cats/\x1b[31mred\n.jpg", 99) == r"cats/\x1b[31mred\n.jpg"
    assert script.shorten("\u732b.jpg", 99) == "\u732b.jpg"
    assert script.shorten("a" * 20 + "cat.jpg", 15) == "...aaaaacat.jpg" and len(script.shorten("b" * 15, 15)) == 15


def test_lists_are_cut_in_the_terminal_and_whole_in_the_report(crowded):
    report, out = crowded
    assert len(report["skipped"]) == 30 and out.count("/val/bird.") == 20
    assert f"{len(report['flips'])} pictures changed their class, 30 files were left out\n" in out
    assert "(at most 20 of a kind are shown here; all are in report.json)\n" in out
