"""The tools that made the pictures and the checkpoint, and the one that compares engines."""
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import quantize_catdog

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tools"))
import compare_engines      # noqa: E402
import draw_cat_dog     # noqa: E402
import train_checkpoint     # noqa: E402


def test_the_hundred_pictures():
    for kind in ("cat", "dog"):
        for i in range(50):
            with Image.open(ROOT / "cat_dog" / "val" / f"{kind}.{i}.jpg") as image:
                assert image.format == "JPEG" and image.mode == "RGB" and 250 <= min(image.size) <= max(image.size) <= 700
    assert len(list((ROOT / "cat_dog" / "val").iterdir())) == 100


def test_a_seed_always_draws_the_same():
    first, again = draw_cat_dog.draw("cat", 7), draw_cat_dog.draw("cat", 7)
    assert first.tobytes() == again.tobytes()
    assert draw_cat_dog.draw("dog", 7).resize((32, 32)).tobytes() != first.resize((32, 32)).tobytes()
    assert draw_cat_dog.draw("cat", 8).resize((32, 32)).tobytes() != first.resize((32, 32)).tobytes()


def test_shipped_pictures_are_the_tools():
    """Up to JPEG's loss: the tool still draws what lies in cat_dog/val."""
    for kind, i in (("cat", 3), ("dog", 11)):
        drawn = draw_cat_dog.draw(kind, i)
        with Image.open(ROOT / "cat_dog" / "val" / f"{kind}.{i}.jpg") as shipped:
            assert shipped.size == drawn.size
            assert np.abs(np.asarray(shipped, float) - np.asarray(drawn, float)).mean() < 6


def test_trained_network_is_the_scripts():
    """Pooling before batch norm, and the normalization folded into cnn1, change no logit."""
    torch.manual_seed(0)
    trained = train_checkpoint.TrainingNet(dropout=0.5).eval()
    for i in range(1, 5):
        bn = getattr(trained, f"bn{i}")
        bn.weight.data.uniform_(-0.5, 2)
        bn.bias.data.normal_()
        bn.running_mean.normal_()
        bn.running_var.uniform_(0.2, 2)
    trained.keep_gamma_positive()
    pixels = torch.randint(0, 256, (2, 3, 224, 224), dtype=torch.uint8)
    model = quantize_catdog.CNN_Model().eval()
    model.load_state_dict(train_checkpoint.fold_normalization(trained.state_dict()), strict=False)
    with torch.no_grad():
        expected = trained(train_checkpoint.normalize(pixels.float()))
        torch.testing.assert_close(model(pixels), expected, rtol=1e-4, atol=1e-4)


def train(monkeypatch, folder, *arguments):
    monkeypatch.setattr(sys, "argv", ["train_checkpoint.py", "--cache", str(folder / "cache"), "--batch", "16", "--output",
                                      str(folder / "c.pth.tar"), *arguments])
    train_checkpoint.main()


def test_training_goes_on_where_it_was_interrupted(tmp_path, monkeypatch):
    """To the same weights as in one go; and what it writes is what the script loads."""
    (tmp_path / "photos").mkdir()
    for i in range(21):
        for kind in ("cat", "dog"):
            Image.new("RGB", (40, 30), (40 * i % 256, 200, 30)).save(tmp_path / "photos" / f"{kind}.{i}.png")
    arguments = ["--photos", str(tmp_path / "photos"), "--drawn", "2", "--epochs", "2"]
    train(monkeypatch, tmp_path, *arguments)
    whole = torch.load(tmp_path / "c.pth.tar", weights_only=True)["model"]
    quantize_catdog.load_checkpoint(tmp_path / "c.pth.tar")
    (tmp_path / "c.pth.tar").unlink()
    (tmp_path / "c.pth.tar.training").unlink()

    count, step = [0], torch.optim.AdamW.step
    def interrupted(self, *args, **kwargs):
        count[0] += 1
        if count[0] == 4:                                   # in the second epoch of two steps each
            raise KeyboardInterrupt
        return step(self, *args, **kwargs)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(torch.optim.AdamW, "step", interrupted)
        train(monkeypatch, tmp_path, *arguments)
    assert not (tmp_path / "c.pth.tar").exists()
    train(monkeypatch, tmp_path, *arguments)
    resumed = torch.load(tmp_path / "c.pth.tar", weights_only=True)["model"]
    for name, value in whole.items():
        torch.testing.assert_close(resumed[name], value, rtol=1e-3, atol=1e-5)


def test_notebooks_engines_are_the_scripts_own_under_its_recipe(monkeypatch):
    """Two programs, one arithmetic: the notebook's class, and the script with the notebook's recipe."""
    for name, value in dict(PER_CHANNEL=False, UNSIGNED_RELU=False, BIAS_BIT=16, QUANTIZE_LOGITS=True, HEADROOM=1,
                            EQUALIZE=False, GPTQ=False, BIAS_CORRECTION=False, BATCH_SIZE=5).items():
        monkeypatch.setattr(quantize_catdog, name, value)
    pixels, labels = (values[:7] for values in compare_engines.pictures(ROOT / "cat_dog" / "val"))
    assert pixels.shape == (7, 3, 224, 224) and labels.tolist() == [0, 1, 0, 1, 0, 1, 0]
    _, model = quantize_catdog.load_checkpoint(ROOT / "BEST_checkpoint.pth.tar")
    with torch.no_grad():
        fp32, int8 = compare_engines.notebook_engines(pixels, ROOT / "BEST_checkpoint.pth.tar")
        model.observe(len(pixels))
        model(pixels)
        model.observing = False
        own = model.fused().cl_scale()
        assert torch.allclose(fp32.logits(pixels, 5), model(pixels), atol=1e-5)
        # its integers are the script's up to ties, so its logits are, up to one step of theirs
        assert (int8.logits(pixels, 5) - own(pixels)).abs().max() < 1.5 / own.scale_fc2


def test_table_of_engines(capsys):
    """Two pictures, one answer turned over: an SQNR and an agreement that are known."""
    reference = torch.tensor([[3.0, 0.0], [0.0, 4.0]])
    logits = torch.tensor([[3.0, 0.0], [0.5, 0.0]])
    engines = [compare_engines.Engine(name, None, None, size) for name, size in
               [("this script FP32", 2000), ("other", 1_234_567), ("this script INT8", 1000)]]
    quality = {"this script FP32": reference, "other": logits, "this script INT8": reference}
    times = {(engine.name, 5): [ms, 9.0, ms / 2] for engine, ms in zip(engines, [2.0, 3.0, 1.0])}
    compare_engines.print_table(engines, quality, times, torch.tensor([0, 1]), [5])
    lines = capsys.readouterr().out.splitlines()
    assert lines[2] == "| other | 3.00 (1.50-9.00) | 3.00 | 50.0 % | 50.0 % | 1.9 dB | 1,235 |"     # 25 / 16.25
    assert lines[4].startswith("| this script INT8 | 1.00 (0.50-9.00) | 1.00 | 100.0 % | 100.0 % | - |")


def test_multiply_adds():
    expected = 16 * 75 * 220**2 + 32 * 400 * 106**2 + 16 * 288 * 51**2 + 8 * 144 * 23**2 + 968 * 512 + 512 * 2
    assert compare_engines.multiply_adds(quantize_catdog.CNN_Model().eval()) == expected


def test_engines_take_turns():
    """Each round runs every engine at every batch size, on batches of that size alone."""
    seen = []

    def engine(name):
        return compare_engines.Engine(name, lambda x: x * 2, lambda batch: lambda x: seen.append((name, batch, len(x))), 0)
    times = compare_engines.measure([engine("a"), engine("b")], torch.ones(10, 1), [1, 4], rounds=3)
    assert {key: len(values) for key, values in times.items()} == {(name, batch): 3 for name in "ab" for batch in (1, 4)}
    assert all(batch == size for _, batch, size in seen)
    assert seen.count(("a", 1, 1)) == 3 * (3 + 10) and seen.count(("b", 4, 4)) == 3 * (3 + 2)
