"""What the run says about quantization, against direct computation: ledger, ranges, curve, flips, bits, picture."""
import io
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import oracle
import quantize_catdog as script
from test_arithmetic import MANY, PIXELS, STATE, integers_of, network, scales_of
from test_script import Place, state     # noqa: F401, a fixture

LAYERS = [row[0] for row in oracle.LAYERS]


def calibrated(pixels, weights=STATE):
    """A CNN_Model calibrated on pixels, a picture at a time."""
    batches = [script.Batch(picture[None], torch.tensor([0]), [f"cat.{i}.jpg"]) for i, picture in enumerate(pixels)]

    class Pictures:
        def __len__(self):
            return len(batches)

        def batches(self):
            return batches

    model = network(weights)
    return model, script.calibrate(model, Pictures())


def db(signal, noise):
    noise = np.square(noise, dtype=np.float64).sum()
    return 10 * math.log10(np.square(signal, dtype=np.float64).sum() / noise) if noise else None


def assert_db(found, expected, what):
    assert (found is None) == (expected is None), (what, found, expected)
    assert expected is None or found == pytest.approx(expected, abs=0.02), what


@pytest.fixture(scope="module")
def quantized():
    """Folded network whose cv2 has half of its range, so that values are clipped; its INT8 network; pictures."""
    model, _ = calibrated(MANY)
    folded = model.fused()
    folded.range_cv2.mul_(0.5)
    return SimpleNamespace(model=folded, int8=folded.cl_scale(), pixels=MANY[:7])      # 7: not a whole number of chunks


def on_grid(x, scale, place):
    low, high = oracle.limits(oracle.Recipe(8, True, True, 32, False, 2), place)
    return x if place == "fc2" else np.clip(np.rint(x * scale), low, high) / scale


def layer_output(x, weight, bias, bn):
    y = oracle.linear(x, weight)
    y = y + oracle.per_channel(bias, y)
    return np.maximum(y, 0) if bn else y


def test_ledger_against_direct_computation(quantized):
    ledger, histograms = script.error_ledger(quantized.model, quantized.int8, quantized.pixels)
    rows = {row["name"]: row for row in ledger}
    assert [row["name"] for row in ledger] == ["input", *LAYERS]
    pixels = quantized.pixels.numpy().astype(np.float64)
    scales, integers = scales_of(quantized.int8), integers_of(quantized.int8)
    fp32 = {name: [getattr(getattr(quantized.model, name), key).detach().numpy().astype(np.float64)
                   for key in ("weight", "bias")] for name in LAYERS}
    real = {name: (w / w_scale.reshape(-1, *[1] * (w.ndim - 1)), b / (w_scale * scales[source]).astype(np.float64))
            for (name, _, source, _), (w, b, w_scale) in zip(oracle.LAYERS, integers.values())}
    int8 = oracle.int8_pass(oracle.Recipe(8, True, True, 32, False, 2), quantized.pixels.numpy(), scales, integers)

    def logits(changed=None):
        """Of the network that quantizes one layer alone."""
        x = pixels
        for name, bn, _, place in oracle.LAYERS:
            x = layer_output(x, *(real if name == changed else fp32)[name], bn)
            x = on_grid(x, scales[place], place) if name == changed else x
            x = oracle.pool(x) if bn else x
        return x

    x, exact_logits = pixels, logits()
    for name, bn, source, place in oracle.LAYERS:
        (w, b), (w8, b8), sqnr = fp32[name], real[name], rows[name]["sqnr_db"]
        y, x8 = layer_output(x, w, b, bn), int8[0][source] / scales[source]
        last = int8[2] if place == "fc2" else int8[0][place] / scales[place]
        inherited = layer_output(oracle.pool(x8) if source.startswith("cv") else x8, w, b, bn)
        assert_db(sqnr["int8"], db(y, last - y), f"{name} int8")
        assert_db(sqnr["inherited"], db(y, inherited - y) if name != "cnn1" else None, f"{name} inherited")
        assert_db(sqnr["born"], db(y, on_grid(layer_output(x, w8, b8, bn), scales[place], place) - y), f"{name} born")
        assert_db(sqnr["weights"], db(y, layer_output(x, w8, b, bn) - y), f"{name} weights")
        if sqnr["biases"] < 100:        # beyond it FP32 has no digits left
            assert_db(sqnr["biases"], db(y, layer_output(x, w, b8, bn) - y), f"{name} biases")
        assert_db(sqnr["rounding"], db(y, on_grid(y, scales[place], place) - y), f"{name} rounding")
        assert_db(sqnr["logits"], db(exact_logits, logits(name) - exact_logits), f"{name} logits")
        if place != "fc2":
            high = oracle.limits(oracle.Recipe(8, True, True, 32, False, 2), place)[1]
            clipped = (np.abs(y) * scales[place] > high + 0.5).mean()
            assert rows[name]["clipped"] == pytest.approx(clipped, rel=1e-3, abs=1.1 / y.size)
            assert (clipped > 1e-4) == (name == "cnn2")                     # planted
            assert rows[name]["codes_used"] == len(np.unique(int8[0][place]))
            assert rows[name]["codes"] == (255 if place == "fc1" else 256)
            counts = histograms[place]
            assert counts.sum() == y.size
            assert counts[3 * script.BINS:].sum() == pytest.approx((y * scales[place] > high + 0.5).sum(), abs=1 + 2e-4 * y.size)
        x = oracle.pool(y) if bn else y
    assert rows["fc2"]["clipped"] is rows["fc2"]["codes"] is rows["fc2"]["sqnr_db"]["rounding"] is None
    assert set(rows["input"]["sqnr_db"].values()) == {None}                  # pixels are exact
    assert [row["name"] for row in ledger if row["hurts_most"]] == [
        min(rows, key=lambda name: rows[name]["sqnr_db"]["logits"] or math.inf)]


@pytest.mark.parametrize("name", LAYERS)
def test_the_layer_with_the_planted_error_is_marked(quantized, name):
    """A layer whose weights have lost seven of their bits."""
    int8 = quantized.model.cl_scale()
    weight = getattr(int8, name).weight
    weight.copy_((weight / 64).round() * 64)
    ledger, _ = script.error_ledger(quantized.model, int8, quantized.pixels[:2])
    assert [row["name"] for row in ledger if row["hurts_most"]] == [name]


def test_input_has_an_error_where_pixels_have_fewer_bits(quantized, monkeypatch):
    monkeypatch.setattr(script, "BIT", 4)
    ledger, _ = script.error_ledger(quantized.model, quantized.model.cl_scale(), quantized.pixels)
    pixels = quantized.pixels.numpy().astype(np.float64)
    expected = db(pixels, np.rint(pixels / 17) * 17 - pixels)
    for kind in ("int8", "born", "rounding"):
        assert_db(ledger[0]["sqnr_db"][kind], expected, kind)
    assert ledger[0]["sqnr_db"]["logits"] is not None and ledger[0]["codes"] == 16


def test_bias_correction_is_no_error_of_the_layer(monkeypatch):
    """It makes up for what is inherited, and would be called the layer's own error otherwise."""
    model, _ = calibrated(MANY)
    ledgers = []
    for correct in (False, True):
        int8 = script.quantized(model, 12, MANY, "reference", BIT=3, GPTQ=False, EQUALIZE=False, BIAS_CORRECTION=correct)
        ledgers.append(script.error_ledger(model.fused(), int8, MANY[:5])[0])
    for plain, corrected in zip(*ledgers):
        for kind in ("born", "weights", "biases", "rounding", "logits"):
            assert plain["sqnr_db"][kind] == corrected["sqnr_db"][kind]
    assert ledgers[0][-1]["sqnr_db"]["int8"] != ledgers[1][-1]["sqnr_db"]["int8"]


def test_decibels_where_there_is_nothing_or_too_much():
    zeros, huge = torch.zeros(4, 3), torch.full((4, 3), 1e25)
    assert script.sqnr_db(huge, huge) is None and script.sqnr_db(zeros, zeros) is None          # no noise: exact
    assert script.sqnr_db(zeros, huge) < -300
    assert script.sqnr_db(huge, 0.9 * huge) == pytest.approx(20, abs=1e-3)
    assert script.energy(huge) == pytest.approx(12e50, rel=1e-6)                                # beyond FP32


def test_ledger_is_the_same_whatever_the_executor(quantized):
    reference, _ = script.error_ledger(quantized.model, quantized.int8, quantized.pixels)
    kernels = quantized.model.cl_scale()
    script.choose_engine(kernels, quantized.pixels)
    assert script.error_ledger(quantized.model, kernels, quantized.pixels)[0] == reference


def test_histogram_against_numpy():
    values = np.random.default_rng(0).normal(0, 1, (3, 4, 5, 6)).astype(np.float32)
    counts = script.histogram(torch.from_numpy(values), 1.7)
    bins = np.clip(np.floor(values.ravel() * (script.BINS / 1.7)) + 2 * script.BINS, 0, 4 * script.BINS - 1).astype(int)
    expected = np.bincount(bins, minlength=4 * script.BINS)
    assert np.abs(counts.numpy() - expected).sum() <= 4         # a value at an edge
    assert script.histogram(torch.tensor([[-9.0, 9.0, 0.0]]), 1.0)[[0, -1, 2 * script.BINS]].tolist() == [1, 1, 1]


# ranges

def test_ranges_name_the_picture_that_set_them():
    """The last picture holds the maximum everywhere, the second the outlier: one bright pixel on black."""
    dark = torch.zeros(4, 3, 224, 224, dtype=torch.uint8)
    dark[1, :, 100, 100] = 250
    dark[2] += 3
    dark[3] = 251 - PIXELS[0] % 3
    model, outcome = calibrated(dark)
    rows = {row["place"]: row for row in script.range_sources(model, outcome.files, dark[:3])}
    places = oracle.forward(STATE, dark.numpy())
    for place, values in places.items():
        largest = np.abs(values).reshape(4, -1).max(1)
        assert (rows[place]["number"], rows[place]["file"]) == (largest.argmax() + 1, f"cat.{largest.argmax()}.jpg")
        assert rows[place]["range"] == pytest.approx(largest.max(), rel=1e-4)
        expected = np.quantile(np.abs(values[:3]), 0.999, method="inverted_cdf")
        assert rows[place]["percentile999"] == pytest.approx(expected, abs=largest.max() / 1000)
    assert rows["input"]["number"] == 4 and rows["input"]["range"] == 251
    assert rows["input"]["percentile999"] == pytest.approx(3, abs=0.3)


def test_range_set_twice_is_named_after_the_first():
    model, outcome = calibrated(torch.cat([PIXELS[:1] // 2, PIXELS, PIXELS]))
    rows = script.range_sources(model, outcome.files, PIXELS)
    assert {row["number"] for row in rows} <= {2, 3} and rows[0]["range"] == PIXELS.max()


def test_observers_remember_each_picture():
    model, _ = calibrated(MANY)
    for place, values in oracle.forward(STATE, MANY.numpy()).items():
        expected = np.abs(values).max((2, 3)) if values.ndim == 4 else np.abs(values).max(1, keepdims=True)
        np.testing.assert_allclose(model.maxima[place], expected, rtol=1e-4, atol=1e-4 * expected.max())
        assert torch.equal(getattr(model, f"range_{place}"), model.maxima[place].amax(0))


def test_curve_is_what_calibrating_on_so_many_gives():
    order = torch.cat([MANY[:11] // 4, MANY[11:]])              # the last picture holds the maximum
    model, _ = calibrated(order)
    whole = script.quantized(model, 12, order, "reference")
    with torch.no_grad():
        fp32, int8 = model(MANY), whole(MANY)
    curve = script.calibration_curve(model, whole, order, MANY, fp32)
    assert [row["pictures"] for row in curve] == [1, 2, 5, 10, 12]
    for row in curve:
        part, _ = calibrated(order[:row["pictures"]])
        folded = part.fused()
        script.equalize(folded)
        expected = folded.cl_scale()
        script.refine(expected, folded, order[:row["pictures"]])
        with torch.no_grad():
            logits = expected(MANY)
        assert row["sqnr_db"] == pytest.approx(script.sqnr_db(fp32, logits), abs=1e-6)
        assert row["agreement"] == (logits.argmax(1) == fp32.argmax(1)).double().mean()
        assert row["as_last"] == torch.equal(logits.argmax(1), int8.argmax(1))
        for place in oracle.PLACES:
            share = (getattr(part, f"range_{place}").max() / getattr(model, f"range_{place}").max()).item()
            assert row["ranges"][place] == pytest.approx(share, rel=1e-6) and (share < 0.9) == (row["pictures"] < 12)


@pytest.mark.parametrize("as_last, words", [
    ([False, False, True, True], "from 5 on no class changes"),
    ([False, True, False, True], "between 5 and 7 a class still changed"),
    ([True, True, True, True], "from 1 on no class changes")])
def test_from_which_picture_on_nothing_changes(capsys, as_last, words):
    curve = [{"pictures": n, "ranges": dict.fromkeys(oracle.PLACES, 1), "agreement": 1, "sqnr_db": 30, "as_last": same}
             for n, same in zip((1, 2, 5, 7), as_last)]
    sources = [{"place": "input", "range": 4.0, "file": f"cat.{n}.jpg", "number": n, "percentile999": 2.0} for n in (3, 6, 2)]
    script.print_ranges(sources, 3, curve, 9)
    out = capsys.readouterr().out
    assert f"after picture 6 of 7 no range grows; {words}\n" in out and "input          4          2           2.0       6 cat.6.jpg\n" in out
    assert "the values of 3 pictures" in out and "INT8 against FP32 on 9\n" in out


# flips

@pytest.mark.parametrize("gained, lost, p", [(0, 0, 1), (0, 1, 1), (5, 5, 1), (1, 9, 0.021484375), (9, 1, 0.021484375),
                                             (0, 10, 0.001953125), (3, 8, 0.2265625)])
def test_mcnemar(gained, lost, p):
    """Tails of the binomial distribution, by hand: (1, 9) is 2 * (1 + 10) / 1024."""
    assert script.mcnemar(gained, lost) == p


def test_mcnemar_of_very_many():
    assert 0 < script.mcnemar(3000, 3300) < 0.001 < 0.1 < script.mcnemar(3000, 3050) < 1


def outcome(labels, logits):
    return script.Outcome([f"cat and co {i}.jpg" for i in range(len(labels))], labels, logits)


def test_planted_flips():
    """Of five pictures the second turns right and the fourth wrong."""
    labels = torch.tensor([0, 0, 1, 1, 1])
    fp32 = torch.tensor([[2.0, 0], [0.0, 0.5], [0, 1], [0.25, 1], [3, 1]])
    int8 = torch.tensor([[2.0, 0], [0.6, 0.5], [0, 1], [1.25, 1], [3, 2]])
    found = script.compare_answers(outcome(labels, fp32), outcome(labels, int8))
    assert [(flip["file"], flip["label"], flip["better"], flip["fp32_margin"]) for flip in found["flips"]] == [
        ("cat and co 1.jpg", "cat", True, 0.5), ("cat and co 3.jpg", "dog", False, 0.75)]
    assert found["flips"][1]["fp32_logits"] == [0.25, 1] and found["flips"][1]["int8_logits"] == [1.25, 1]
    assert found["agreement"] == 0.6 and found["mcnemar"] == {"gained": 1, "lost": 1, "p": 1}
    assert found["confusion"] == {"fp32": [[1, 1], [1, 2]], "int8": [[2, 0], [2, 1]]}


@pytest.mark.parametrize("lost, chance, overlap", [
    (5, "no more than chance (exact McNemar test, p = 0.062)", "overlap"),
    (6, "more than chance (exact McNemar test, p = 0.031)", "overlap"),
    (40, "more than chance (exact McNemar test, p = 1.8e-12)", "do not overlap")])
def test_verdict(lost, chance, overlap):
    def row(correct):
        return {"interval95": script.wilson(correct, 100)}
    report = {"mcnemar": {"gained": 0, "lost": lost, "p": script.mcnemar(0, lost)}, "fp32": row(90), "int8": row(90 - lost)}
    assert script.verdict(report) == (f"INT8 corrects 0 and spoils {lost} of FP32's answers: {chance}; the two 95 % "
                                      f"intervals, which do not know that the pictures are the same, {overlap}")


# the run

@pytest.fixture(scope="module")
def swept(tmp_path_factory):
    place = Place(tmp_path_factory.mktemp("swept"))
    report, out = place.report(SWEEP_BITS=True)
    return place, report, out


def test_sweep_is_what_editing_bit_gives(swept, tmp_path):
    place, report, out = swept
    assert [row["bit"] for row in report["sweep_bits"]] == [8, 7, 6, 5, 4, 3, 2]
    for bit in (8, 3):
        edited, _ = Place(tmp_path / str(bit)).report(BIT=bit)
        row = report["sweep_bits"][8 - bit]
        assert row["top1"] == pytest.approx(edited["int8"]["top1"]) and row["agreement"] == pytest.approx(edited["agreement"])
        assert row["sqnr_db"] == pytest.approx(edited["logit_sqnr_db"], abs=1e-6)
        assert row["size_bytes"] == edited["size_bytes"]["int8"] and 0 < row["seconds"] < 60
        assert "sweep_bits" not in edited
    assert f"3     {report['sweep_bits'][5]['top1']:>6.2f} %" in out


def test_sweep_of_pictures_that_went(swept, monkeypatch):
    """What has gone since FP32 saw it is not compared."""
    place, _, _ = swept
    monkeypatch.setattr(script, "KEEP_BYTES", 0)
    monkeypatch.setattr(script, "BATCH_SIZE", 1)
    pictures = script.CatDogDataset(place.val)
    _, model = script.load_checkpoint(place.checkpoint)
    fp32 = script.calibrate(model, pictures)
    gone = (place.val / "dog.2.jpg").rename(place.folder / "dog.2.jpg")
    rows = script.sweep_bits(model, script.sample(pictures), pictures, fp32, "reference")
    gone.rename(place.val / "dog.2.jpg")
    assert {round(row["agreement"] * 5, 6) % 1 for row in rows} == {0}                          # fifths: of five pictures


def test_run_says_it_in_the_terminal_too(swept):
    _, report, out = swept
    marked = re_line(out, "<- hurts most")
    guilty = next(row for row in report["ledger"] if row["hurts_most"])
    assert marked.startswith(guilty["name"]) and f"{guilty['sqnr_db']['logits']:.1f}" in marked
    for row in report["ranges"]:
        assert re_line(out, f"{row['place']:<6} {row['range']:>9.5g}").endswith(f"{row['number']:>6} {row['file']}")
    assert report["calibration_curve"][-1]["pictures"] == 6 and report["calibration_curve"][-1]["as_last"] is True
    assert "SWEEP_BITS = True" in out and "report.png" in out.splitlines()[-1]


def re_line(out, text):
    return next(line for line in out.splitlines() if text in line)


def drawn(report, fp32, int8, folder, monkeypatch, histograms=None):
    """(Figure, its picture, {text written: its box in pixels}) of draw_report."""
    from matplotlib.figure import Figure
    from matplotlib.text import Text
    figures, texts, save, draw = [], [], Figure.savefig, Text.draw
    monkeypatch.setattr(Figure, "savefig", lambda self, *args, **kwargs: (figures.append(self), save(self, *args, **kwargs)))
    monkeypatch.setattr(Text, "draw", lambda self, renderer: (texts.append(self), draw(self, renderer)))
    histograms = histograms or {place: torch.ones(4 * script.BINS, dtype=torch.long) for place in oracle.PLACES}
    picture = Image.open(io.BytesIO(script.draw_report(report, histograms, fp32, int8, folder)))
    monkeypatch.undo()
    return figures[0], picture, [(text.get_text(), text.get_window_extent()) for text in texts if text.get_text().strip()]


@pytest.mark.parametrize("sweep, flips, guilty", [(True, 0, guilty) for guilty in range(7)] + [
    (sweep, flips, 4) for sweep in (True, False) for flips in (0, 3, 40)])
def test_no_text_in_the_picture_overlaps(swept, sweep, flips, guilty, monkeypatch):
    place, report, _ = swept
    report = dict(report) if sweep else {key: value for key, value in report.items() if key != "sweep_bits"}
    n = 60
    labels = torch.arange(n) % 2
    fp32 = torch.stack([1.0 - labels, labels.float()], 1) * torch.linspace(0.01, 12345, n)[:, None]
    int8 = fp32.clone()
    int8[:flips] = int8[:flips].flip(1)
    fp32, int8 = outcome(labels, fp32), outcome(labels, int8)
    fp32 = fp32._replace(files=[f"a dog $x_{{ 名前 {i}" * (i % 3 + 1) for i in range(n)])
    report["images"] = {"evaluated": 1234567, "calibrated": 6}
    report["flips"] = [None] * flips
    report["ledger"] = [row | {"hurts_most": i == guilty} for i, row in enumerate(report["ledger"])]
    report["calibration_curve"] = [report["calibration_curve"][0] | {"pictures": count} for count in (
        [1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000, 18000] if sweep else [1, 2, 5, 6])]
    _, picture, texts = drawn(report, fp32, int8, place.val, monkeypatch)
    assert picture.size == (1920, 1080)
    assert {"hurts most", "cv1", "same class"} <= {text for text, _ in texts} and len(texts) > 60
    for text, box in texts:
        assert box.x0 >= 0 and box.y0 >= 0 and box.x1 <= 1920 and box.y1 <= 1080, text
    for i, (text, box) in enumerate(texts):
        for other, its in texts[i + 1:]:
            assert min(box.x1, its.x1) - max(box.x0, its.x0) <= 1 or min(box.y1, its.y1) - max(box.y0, its.y0) <= 1, (text, other)


def test_picture_shows_what_changed(swept, monkeypatch):
    """Changed pictures first, the surest first; then those nearest to a change."""
    place, report, _ = swept
    margins = torch.tensor([5.0, 0.1, 3, 2, 0.2, 9])
    fp32 = outcome(torch.zeros(6, dtype=torch.long), torch.stack([margins, torch.zeros(6)], 1))
    int8 = fp32._replace(logits=torch.stack([margins * torch.tensor([1, 1, -1, -1, 1, 1]), torch.zeros(6)], 1))
    report = report | script.compare_answers(fp32, int8)
    texts = [text for text, _ in drawn(report, fp32, int8, place.val, monkeypatch)[2]]
    captions = [text for text in texts if "\nFP32 " in text]
    assert [caption.split(" (")[0][-5] for caption in captions] == list("231405")
    assert "FP32 cat by 3.000\nINT8 dog by 3.000" in captions[0]
    assert any("in red" in text for text in texts) and any("4 of 6 pictures" in text for text in texts)


def test_clipped_part_is_drawn_beyond_the_range(swept, monkeypatch):
    from matplotlib.colors import to_rgb
    place, report, _ = swept
    counts = torch.zeros(4 * script.BINS, dtype=torch.long)
    counts[2 * script.BINS:3 * script.BINS], counts[3 * script.BINS + 40] = 1, 7        # 40 bins beyond the range
    labels = torch.zeros(3, dtype=torch.long)
    fp32 = outcome(labels, torch.rand(3, 2))
    figure = drawn(report, fp32, fp32, place.val, monkeypatch, dict.fromkeys(oracle.PLACES, counts))[0]
    axes = next(axes for axes in figure.axes if axes.get_title(loc="left") == "cv1")
    kept = [patch for patch in axes.patches if patch.get_facecolor()[:3] == to_rgb(script.SKY)]
    clipped = [patch for patch in axes.patches if patch.get_facecolor()[:3] == to_rgb(script.RED)]
    values, edges, _ = clipped[0].get_data()
    assert values[(edges[:-1] >= 1)].tolist() == pytest.approx([0, 7 / 1031] + [0] * 30)
    assert kept[0].get_data()[1][-1] == 1 and kept[0].zorder >= clipped[0].zorder
    assert [line.get_xdata()[0] for line in axes.lines] == [1]


def test_names_that_would_move_the_cursor(capsys):
    assert script.shown("cats/\x1b[31mred\n.jpg") == r"cats/\x1b[31mred\n.jpg"
    assert script.shown("\u732b.jpg") == "\u732b.jpg"
    assert script.shown("a" * 20 + "cat.jpg", 15) == "...aaaaacat.jpg" and len(script.shown("b" * 15, 15)) == 15


def test_lists_are_cut_in_the_terminal_and_whole_in_the_report(tmp_path):
    place = Place(tmp_path)
    for i in range(30):
        (place.val / f"bird.{i}.jpg").write_bytes(b"")
    report, out = place.report()
    assert len(report["skipped"]) == 30 and out.count("left out val/bird") == 20
    assert "... and 10 more in report.json" in out and "30 files left out" in out
