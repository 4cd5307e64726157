"""The programs that made the pictures and the checkpoint."""
import sys

import numpy as np
import pytest
import quantize_catdog as script
import torch
from PIL import Image

from helpers import ROOT

sys.path.insert(0, str(ROOT / "training"))
import draw_cat_dog  # noqa: E402
import train_checkpoint  # noqa: E402

SEEDS = {"val": 0, "train": 2}        # --seed of the shipped drawings

@pytest.mark.parametrize("split", SEEDS)
def test_the_hundred_pictures(split):
    for kind in ("cat", "dog"):
        for i in range(50):
            with Image.open(ROOT / "cat_dog" / split / f"{kind}.{i}.jpg") as image:
                assert image.format == "JPEG" and image.mode == "RGB"
                assert 250 <= min(image.size) <= max(image.size) <= 700
    assert len(list((ROOT / "cat_dog" / split).iterdir())) == 100

def test_a_seed_always_draws_the_same():
    first, again = draw_cat_dog.draw("cat", 7), draw_cat_dog.draw("cat", 7)
    assert first.tobytes() == again.tobytes()
    assert draw_cat_dog.draw("dog", 7).resize((32, 32)).tobytes() != first.resize((32, 32)).tobytes()
    assert draw_cat_dog.draw("cat", 8).resize((32, 32)).tobytes() != first.resize((32, 32)).tobytes()

@pytest.mark.parametrize("split, seed", SEEDS.items())
def test_shipped_pictures_are_the_tools(split, seed):
    """Up to JPEG's loss, the tool still draws what is in cat_dog. No drawing is there twice."""
    for kind, i in (("cat", 3), ("dog", 11)):
        drawn = draw_cat_dog.draw(kind, seed * draw_cat_dog.SEEDS_PER_RUN + i)
        with Image.open(ROOT / "cat_dog" / split / f"{kind}.{i}.jpg") as shipped:
            assert shipped.size == drawn.size
            assert np.abs(np.asarray(shipped, float) - np.asarray(drawn, float)).mean() < 6
    contents = [file.read_bytes() for other in SEEDS for file in (ROOT / "cat_dog" / other).iterdir()]
    assert len(set(contents)) == len(contents) == 200

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
    model = script.CNN_Model().eval()
    model.load_state_dict(train_checkpoint.fold_normalization(trained.state_dict()), strict=False)
    with torch.no_grad():
        expected = trained(train_checkpoint.normalize(pixels.float()))
        torch.testing.assert_close(model(pixels), expected, rtol=1e-4, atol=1e-4)

def train(monkeypatch, folder, *arguments):
    monkeypatch.setattr(sys, "argv", ["train_checkpoint.py", "--cache", str(folder / "cache"), "--batch", "16",
                                      "--output", str(folder / "c.pth.tar"), *arguments])
    train_checkpoint.main()

def test_training_goes_on_where_it_was_interrupted(tmp_path, monkeypatch):
    """To the same weights as without an interruption; and the script loads what it writes."""
    (tmp_path / "photos").mkdir()
    for i in range(21):
        for kind in ("cat", "dog"):
            Image.new("RGB", (40, 30), (40 * i % 256, 200, 30)).save(tmp_path / "photos" / f"{kind}.{i}.png")
    arguments = ["--photos", str(tmp_path / "photos"), "--drawn", "2", "--epochs", "2"]
    train(monkeypatch, tmp_path, *arguments)
    whole = torch.load(tmp_path / "c.pth.tar", weights_only=True)["model"]
    script.load_checkpoint(tmp_path / "c.pth.tar")
    (tmp_path / "c.pth.tar").unlink()
    (tmp_path / "c.pth.tar.training").unlink()

    count, step = [0], torch.optim.AdamW.step
    def interrupted(self, *args, **kwargs):
        count[0] += 1
        if count[0] == 4:                                   # in the second epoch of two batches each
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

@pytest.fixture
def folders(tmp_path):
    """A folder of 24 pictures, whose folders' names are their labels."""
    for i in range(12):
        for kind in ("cats", "dogs"):
            (tmp_path / "pets" / kind).mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (40, 30), (20 * i, 200 * (kind == "cats"), 30)).save(tmp_path / "pets" / kind / f"{i}.png")
    return tmp_path / "pets"

def test_own_photographs_are_trained_on_from_given_weights(folders, tmp_path, monkeypatch, capsys):
    """With a learning rate of almost 0 the weights stay those of --start; the shipped ones are not written over."""
    shipped = (ROOT / "BEST_checkpoint.pth.tar").read_bytes()
    train(monkeypatch, tmp_path, "--photos", str(folders), "--epochs", "1", "--lr", "1e-12", "--weight-decay", "0",
          "--start", str(ROOT / "BEST_checkpoint.pth.tar"))
    assert "22 pictures to train on, 2 held out" in capsys.readouterr().out
    start, end = [script.load_checkpoint(path).state_dict()
                  for path in (ROOT / "BEST_checkpoint.pth.tar", tmp_path / "c.pth.tar")]
    for name in ("cnn1.weight", "cnn1.bias", "bn2.weight", "fc1.weight", "fc2.bias"):
        torch.testing.assert_close(end[name], start[name], rtol=1e-4, atol=1e-5)
    assert (ROOT / "BEST_checkpoint.pth.tar").read_bytes() == shipped
    monkeypatch.setattr(sys, "argv", ["train_checkpoint.py", "--photos", str(folders), "--epochs", "0",
                                      "--cache", str(tmp_path / "cache"), "--batch", "16"])
    monkeypatch.setattr(train_checkpoint, "ROOT", tmp_path)
    train_checkpoint.main()
    assert (tmp_path / "results" / "trained_checkpoint.pth.tar").exists()

def test_what_cannot_train_is_refused_in_one_line(folders, tmp_path, monkeypatch):
    def refused(*arguments):
        with pytest.raises(SystemExit) as ended:
            train(monkeypatch, tmp_path, "--epochs", "1", *arguments)
        assert isinstance(ended.value.code, str) and "\n" not in ended.value.code
        return ended.value.code
    assert "fewer pictures than a batch of 64" in refused("--photos", str(folders), "--batch", "64")
    (tmp_path / "one").mkdir()
    for i in range(20):
        Image.new("RGB", (9, 9)).save(tmp_path / "one" / f"cat.{i}.png")
    assert "all are of one class" in refused("--photos", str(tmp_path / "one"))
    (tmp_path / "birds").mkdir()
    assert "no usable picture in" in refused("--photos", str(tmp_path / "birds"))
    assert "checkpoint" in refused("--photos", str(folders), "--start", str(tmp_path / "nowhere"))
    assert not (tmp_path / "c.pth.tar").exists()

def test_a_training_on_other_pictures_is_not_gone_on_with(folders, tmp_path, monkeypatch):
    """Unless that is asked for. A picture that was replaced is another one."""
    train(monkeypatch, tmp_path, "--photos", str(folders), "--epochs", "1")
    before = (tmp_path / "c.pth.tar").read_bytes()
    Image.new("RGB", (40, 30), "white").save(folders / "cats" / "0.png")
    with pytest.raises(SystemExit, match="of a training on other pictures: delete it, or give --resume"):
        train(monkeypatch, tmp_path, "--photos", str(folders), "--epochs", "2")
    assert (tmp_path / "c.pth.tar").read_bytes() == before
    train(monkeypatch, tmp_path, "--photos", str(folders), "--epochs", "2", "--resume")
    assert torch.load(tmp_path / "c.pth.tar", weights_only=True)["epochs"] == 2
