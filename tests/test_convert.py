"""tools/convert_checkpoint.py: checkpoints as people save them. Under attack: test_robustness.py."""
import argparse
import collections
import os
import subprocess
import sys

import convert_checkpoint
import pytest
import quantize_catdog as script
import torch

from helpers import (
    PICTURES,
    ROOT,
    Calls,
    beside_good_weights,
    load_converted,
    loaded,
    one_line,
    refused,
    run_here,
)

TOOL = ROOT / "tools" / "convert_checkpoint.py"

def with_prefix(prefix, state):
    return {f"{prefix}{name}": value for name, value in state.items()}

def changed(change):
    """A function of the state_dict -> the network, after this change of it."""
    def network(state):
        model = loaded(state)
        change(model)
        return model
    return network

SAVED = {
    "a bare state_dict": lambda state: state,
    "an OrderedDict": lambda state: {"model": collections.OrderedDict(state)},
    "state_dict": lambda state: {"state_dict": state, "epoch": 7},
    "model_state_dict": lambda state: {"epoch": 7, "model_state_dict": state, "optimizer": {"lr": 0.1}},
    "net": lambda state: {"net": state, "acc": 97.5},
    "DataParallel": lambda state: {"model": with_prefix("module.", state)},
    "torch.compile": lambda state: {"model": with_prefix("_orig_mod.", state)},
    "Lightning": lambda state: {"state_dict": with_prefix("model.", state), "epoch": 1},
    "both": lambda state: with_prefix("module._orig_mod.", state),
    "half precision": lambda state: {"model": {name: value.half() if value.is_floating_point() else value
                                               for name, value in state.items()}},
    "no counts of batches, as of torch before 0.4.1": lambda state: {
        name: value for name, value in state.items() if not name.endswith("num_batches_tracked")},
    "a count that is none": lambda state: state | {"bn1.num_batches_tracked": "many"},
    "a network": loaded,
    "a network under a key": lambda state: {"epoch": 7, "net": loaded(state)},
    "a network whose count is a layer": changed(lambda model: vars(model.bn1)["_buffers"].update(
        num_batches_tracked=torch.nn.ReLU())),
}

@pytest.mark.parametrize("protocol", [2, 3])
@pytest.mark.parametrize("kind", SAVED)
def test_weights_as_people_save_them(tmp_path, state, kind, protocol):
    """What is written is {"model": state_dict}, of the network's tensors alone."""
    torch.save(SAVED[kind](state), tmp_path / "c.pth", pickle_protocol=protocol)
    (tmp_path / "ours.pth").write_bytes(convert_checkpoint.convert(tmp_path / "c.pth"))
    saved = torch.load(tmp_path / "ours.pth", weights_only=True)
    found = script.load_checkpoint(tmp_path / "ours.pth").state_dict()
    assert list(saved) == ["model"] and set(saved["model"]) <= set(found)
    assert all(isinstance(value, torch.Tensor) for value in saved["model"].values())
    for name, value in found.items():
        if value.is_floating_point():
            assert torch.equal(value, state[name] if kind != "half precision" else state[name].half().float()), name

@pytest.mark.parametrize("kind", ["Lightning", "a network"])
def test_the_run_answers_as_with_the_original_weights(place, usual, state, kind):
    """To the same INT8 network, to the last bit."""
    torch.save(SAVED[kind](state), place.checkpoint)
    place.refuse("BEST_checkpoint.pth.tar", "tools/convert_checkpoint.py")
    theirs = place.checkpoint.rename(place.folder / "theirs.pth")
    found = run_here(TOOL, str(theirs), str(place.checkpoint))
    assert found == (0, f"wrote {place.checkpoint}, which quantize_catdog.py reads as CHECKPOINT\n", "")
    report, expected = place.report(BATCH_SIZE=4)[0], usual[1]
    for name in ("layers", "agreement", "flips", "logit_sqnr_db", "ranges"):
        assert report[name] == expected[name], name
    content = [folder / "INT8_checkpoint.pth.tar" for folder in (place.results, usual[0].results)]
    assert content[0].read_bytes() == content[1].read_bytes()

# networks

@pytest.mark.parametrize("eps", [1e-5, 1e-3, 0.5, 1])
def test_a_pickled_network_keeps_its_own_eps(tmp_path, state, eps):
    """The difference from the script's goes into the variance, and nothing else changes."""
    model = loaded(state)
    for layer in script.LAYERS[:4]:
        model.get_submodule(layer.bn).eps = eps
    torch.save({"model": model}, tmp_path / "c.pth")
    found, pixels = load_converted(tmp_path / "c.pth"), script.CatDogDataset(PICTURES).first_pixels(2)
    assert {layer.eps for layer in found.modules() if isinstance(layer, torch.nn.BatchNorm2d)} == {1e-5}
    for name, value in found.state_dict().items():
        if name.endswith("running_var"):
            expected = state[name].double() + eps - 1e-5
            torch.testing.assert_close(value.double(), expected, rtol=2e-7, atol=0)
        elif value.is_floating_point():
            assert torch.equal(value, state[name]), name
    with torch.no_grad():
        assert torch.allclose(found(pixels), model(pixels), rtol=0, atol=1e-5)
        assert torch.allclose(found.fused()(pixels), model(pixels), atol=1e-4)
        assert torch.equal(found(pixels), loaded(state)(pixels)) == (eps == 1e-5)

@pytest.fixture
def notebook_model(state):
    """The notebook's module to pickle, whose class lives in __main__, with modules and attributes of its own."""
    class CNN_Model(torch.nn.Module):
        pass
    CNN_Model.__module__, CNN_Model.__qualname__ = "__main__", "CNN_Model"
    sys.modules["__main__"].CNN_Model = CNN_Model
    model = CNN_Model()
    for name, part in loaded(state).named_children():
        kind = type(part).__mro__[1] if type(part).__module__ == "quantize_catdog" else type(part)      # torch's own
        other = kind.__new__(kind)
        other.__dict__.update(part.__dict__)
        model.add_module(name, other)
    for i in range(1, 5):
        model.add_module(f"relu{i}", torch.nn.ReLU())
        model.add_module(f"maxpool{i}", torch.nn.MaxPool2d(2))
    model.relu5, model.output = torch.nn.ReLU(), torch.nn.Softmax(dim=1)
    model.range_cv1, model.Quantization, model.bit = torch.tensor(1.0), False, 8
    yield model
    vars(sys.modules["__main__"]).pop("CNN_Model", None)

def test_the_notebooks_pickled_module(tmp_path, state, notebook_model):
    """Its classes need not be there. Other classes are refused."""
    torch.save({"model": notebook_model}, tmp_path / "notebook")
    notebook_model.extra = torch.nn.Dropout()
    torch.save({"model": notebook_model}, tmp_path / "c.pth")
    del sys.modules["__main__"].CNN_Model
    found = load_converted(tmp_path / "notebook").state_dict()
    assert all(torch.equal(found[name], value) for name, value in state.items() if value.is_floating_point())
    refused(tmp_path / "c.pth", "it holds torch.nn.modules.dropout.Dropout", load=convert_checkpoint.convert)

@pytest.mark.parametrize("name", convert_checkpoint.PICKLED)
def test_class_that_a_pickle_may_name_makes_nothing(tmp_path, monkeypatch, name):
    """A call of it with 20000, 20000 would take 1.6 GB, were it nn.Linear. What stands for it takes no arguments."""
    called = f"c{name.rpartition('.')[0]}\n{name.rpartition('.')[2]}\n".encode() + b"M\x20\x4eM\x20\x4e\x86R"
    path = tmp_path / "c.pth.tar"
    path.write_bytes(beside_good_weights((ROOT / "BEST_checkpoint.pth.tar").read_bytes(), called, b"model"))
    monkeypatch.setattr(torch.nn.Module, "__init__", lambda *_, **__: pytest.fail("a module is made"))
    refused(path, "cannot be loaded safely (TypeError", load=convert_checkpoint.convert)

def test_the_safe_loader_is_as_strict_afterwards(tmp_path, state):
    torch.save(loaded(state), tmp_path / "c.pth")
    before = set(torch.serialization.get_safe_globals())
    convert_checkpoint.convert(tmp_path / "c.pth")
    assert set(torch.serialization.get_safe_globals()) == before
    refused(tmp_path / "c.pth", "cannot be loaded safely (it holds quantize_catdog.CNN_Model)")

# bad input

def without(state, *names):
    return {name: value for name, value in state.items() if name not in names}

NO_WEIGHTS, NO_NETWORK = "cnn1.weight is missing, it holds no weights", "holds no network of this kind"
BAD = {
    "a value of a class": (lambda state: {"model": state, "args": argparse.Namespace(lr=1)},
                           "cannot be loaded safely (it holds argparse.Namespace): save weights alone"),
    "another network": (lambda state: {"net": {"conv1.weight": state["cnn1.weight"]}},
                        "cnn1.weight is missing, it holds conv1.weight"),
    "a weight is missing": (lambda state: {"state_dict": without(state, "fc2.bias")}, "fc2.bias is missing"),
    "another shape": (lambda state: state | {"fc1.weight": torch.zeros(512, 100)}, "fc1.weight is torch.float32 (512,"),
    "integers": (lambda state: state | {"cnn1.bias": torch.zeros(16).int()}, "cnn1.bias is torch.int32"),
    "NaN": (lambda state: with_prefix("module.", state | {"fc2.bias": torch.full((2,), torch.nan)}), "fc2.bias is not"),
    "without memory": (lambda state: state | {"fc2.bias": torch.empty(2, device="meta")}, "fc2.bias is missing"),
    "INT8": (lambda state: {"recipe": {}, "model": state}, "is the INT8 network of a run: give FP32 weights"),
    "a list": (lambda state: [state], NO_WEIGHTS),
    "a text": (lambda state: {"state_dict": "nothing"}, NO_WEIGHTS),
    "a layer": (lambda state: torch.nn.Conv2d(3, 16, 5), NO_WEIGHTS),
    "a module is None": (changed(lambda model: model._modules.update(bn1=None)), NO_NETWORK),
    "a module is a number": (changed(lambda model: model._modules.update(fc2=3)), NO_NETWORK),
    "no buffers": (changed(lambda model: vars(model.bn1).pop("_buffers")), NO_NETWORK),
    "buffers are a list": (changed(lambda model: vars(model.bn1).update(_buffers=[])), NO_NETWORK),
    "no statistics": (changed(lambda model: model.bn1._buffers.update(running_var=None)), "bn1.running_var is missing"),
    "sparse": (changed(lambda model: model.bn1._buffers.update(running_var=torch.ones(16).to_sparse())), NO_NETWORK),
    "eps is NaN": (changed(lambda model: setattr(model.bn1, "eps", torch.nan)), "bn1.running_var is not finite"),
}

@pytest.mark.parametrize("kind", BAD)
def test_bad_input_gives_one_clear_line(tmp_path, state, kind):
    """And writes nothing. Nobody who runs the program is told to run it."""
    content, words = BAD[kind]
    torch.save(content(state), tmp_path / "c.pth")
    status, out, err = run_here(TOOL, str(tmp_path / "c.pth"), str(tmp_path / "ours.pth"))
    one_line(status, err, f"checkpoint {tmp_path}/c.pth", words)
    assert out == "" and "convert_checkpoint" not in err and "in memory" not in err
    assert {file.name for file in tmp_path.iterdir()} == {"c.pth"}

def test_what_is_no_checkpoint_gives_one_line(tmp_path, state):
    for name, words in (("nowhere", "cannot be read: No such file"), (".", "cannot be read: Is a directory")):
        one_line(*run_here(TOOL, str(tmp_path / name), str(tmp_path / "ours.pth"))[::2], str(tmp_path / name), words)
    (tmp_path / "c.pth").write_bytes(b"text")
    torch.save(state, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    torch.save(state, tmp_path / "new.pth", pickle_protocol=4)
    damaged = ["is damaged, or was saved by torch before 1.6: save it anew"]
    unsafe = ["cannot be loaded safely", "save weights alone"]
    for name, words in (("c.pth", damaged), ("old.pth", damaged), ("new.pth", unsafe)):
        _, _, err = found = run_here(TOOL, str(tmp_path / name), str(tmp_path / "ours.pth"))
        one_line(*found[::2], f"checkpoint {tmp_path / name} ", *words)
        assert "convert_checkpoint" not in err
    assert not (tmp_path / "ours.pth").exists()

def test_nothing_in_a_network_is_executed(tmp_path, state, monkeypatch):
    """Neither by the conversion nor by what it writes: an attribute of a layer, a count of batches."""
    for target in ("attribute", "count"):
        model = loaded(state)
        if target == "attribute":
            model.cnn1.note = Calls(os.mkdir, str(tmp_path / "executed"))
        else:
            vars(model.bn1)["_buffers"]["num_batches_tracked"] = Calls(os.mkdir, str(tmp_path / "executed"))
        torch.save(model, tmp_path / "c.pth")
        refused(tmp_path / "c.pth", "it holds posix.mkdir", load=convert_checkpoint.convert)
        assert not (tmp_path / "executed").exists()

# its manners

@pytest.mark.parametrize("words, status", [
    ([], 2), (["--help"], 0), (["-h"], 0), (["a"], 2), (["a", "b", "c"], 2), (["a", "b", "--help"], 0)], ids=str)
def test_usage(words, status):
    """One path alone converts nothing, and its status says so."""
    assert run_here(TOOL, *words) == (status, f"{convert_checkpoint.__doc__}\n", "")

def test_results_are_whole_or_as_before(tmp_path, monkeypatch, state):
    """Where the disk is full; where a file or folder is there already; where its folder is none, or not there yet."""
    theirs, ours = tmp_path / "c.pth", tmp_path / "new" / "folder" / "ours.pth"
    torch.save({"state_dict": state}, theirs)
    content = theirs.read_bytes()
    assert run_here(TOOL, str(theirs), str(ours))[0] == 0 and script.load_checkpoint(ours)
    assert [file.name for file in ours.parent.iterdir()] == ["ours.pth"]
    for there in (theirs, ours, ours.parent):
        one_line(*run_here(TOOL, str(theirs), str(there))[::2], f"{there} exists already: name a new file")
    one_line(*run_here(TOOL, str(theirs), str(ours / "x"))[::2], f"cannot write in {ours}")
    write_bytes = type(tmp_path).write_bytes

    def full(path, data):
        if isinstance(data, bytes):
            write_bytes(path, data[:1000])
        raise OSError(28, "No space left on device")
    for where, name in ((type(tmp_path), "write_bytes"), (os, "replace")):
        with monkeypatch.context() as patch:
            patch.setattr(where, name, full)
            one_line(*run_here(TOOL, str(theirs), str(tmp_path / "x"))[::2], f"cannot write in {tmp_path}", "No space")
    assert theirs.read_bytes() == content
    assert {file.name for file in tmp_path.iterdir()} == {"c.pth", "new"}

def test_relative_paths_are_those_of_the_shell(tmp_path, state):
    """Whatever the file is called, in a process of its own."""
    name = os.fsdecode("猫\n".encode() + b"\xff.pth")
    torch.save(state, tmp_path / "c.pth")
    done = subprocess.run([sys.executable, TOOL, "c.pth", name], cwd=tmp_path, capture_output=True,
                          env=os.environ | {"PYTHONIOENCODING": "utf-8"})
    assert (done.returncode, done.stderr) == (0, b"") and len(done.stdout.splitlines()) == 1
    assert script.load_checkpoint(tmp_path / name)
