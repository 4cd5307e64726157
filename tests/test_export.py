"""The ONNX file: its content, and the answers of two engines that share no code with the script."""
import copy
import importlib.util
import itertools
import json
import re
import sys
import textwrap

import numpy as np
import pytest
import quantize_catdog as script
import torch

from helpers import ROOT, python

onnx = pytest.importorskip("onnx", reason="tools/requirements.txt is not installed")
onnxruntime = pytest.importorskip("onnxruntime", reason="tools/requirements.txt is not installed")

sys.path.insert(0, str(ROOT / "tools"))
import compare_engines  # noqa: E402
import export_onnx  # noqa: E402

# without the methods that find better integers: they take time, and how integers are written does not depend on them
FAST = script.PRESETS["plain"]
RECIPES = {"default": {}, "weights of 4 bits": FAST | dict(WEIGHT_BIT=4), "activations of 5 bits": FAST | dict(BIT=5),
           "all of 2 bits": FAST | dict(BIT=2, WEIGHT_BIT=2), "signed activations": FAST | dict(UNSIGNED_RELU=False),
           "scales per layer": FAST | dict(PER_CHANNEL=False), "quantized logits": FAST | dict(QUANTIZE_LOGITS=True),
           "biases of 16 bits": FAST | dict(BIAS_BIT=16), "the notebook's": script.PRESETS["notebook"],
           "oblong pictures": FAST | dict(IMAGE_SIZE=(213, 220))}
DEFAULT = script.read_constants(script.LEGAL_RECIPE)
ENGINES = ["ONNX Runtime", "OpenVINO"]

@pytest.fixture(scope="module")
def pictures():
    return script.CatDogDataset(ROOT / "cat_dog" / "val").first_pixels(100)

@pytest.fixture(scope="module")
def folded(pictures):
    model = script.load_checkpoint(ROOT / "BEST_checkpoint.pth.tar").fused()
    model.reset_ranges()
    with torch.no_grad():
        for chunk in pictures.split(20):
            model(chunk, model.update_range)
    return model

@pytest.fixture(scope="module")
def network(folded, pictures):
    """Makes the INT8_Model of a recipe, once. All but the default's get ranges that the pictures exceed."""
    made, narrow = {}, copy.deepcopy(folded)
    for name in script.ACTIVATIONS[1:]:
        narrow.ranges[name] *= 0.1 if name == "fc1" else 0.3

    def make(name):
        if name not in made:
            model, recipe = folded if name == "default" else narrow, DEFAULT | RECIPES[name]
            width, height = recipe["IMAGE_SIZE"]
            _, made[name] = script.quantize_network(model, pictures[:10, :, :height, :width], recipe)
        return made[name]

    return make

@pytest.fixture(scope="module")
def checkpoint(network, tmp_path_factory):
    path = tmp_path_factory.mktemp("results") / "INT8_checkpoint.pth.tar"
    path.write_bytes(script.int8_checkpoint(network("default")))
    return path

@pytest.fixture(scope="module")
def exported(checkpoint, network):
    """The file of the default recipe, as the tool writes it, and what it printed."""
    skip_where_kernels_overflow(network("default"))
    path = checkpoint.with_name("INT8.onnx")
    status, out, err = python(ROOT / "tools" / "export_onnx.py", checkpoint, "--output", path)
    assert (status, err) == (0, "")
    return path, out

def engine_of(name, content):
    """What runs an ONNX file's bytes, pixels -> logits; skips where the engine is missing, or wrong on this CPU."""
    if name == "OpenVINO" and not importlib.util.find_spec("openvino"):
        pytest.skip("openvino is not installed")
    return {"ONNX Runtime": export_onnx.onnxruntime_engine, "OpenVINO": export_onnx.openvino_engine}[name](content)[1]

def skip_where_kernels_overflow(model):
    if export_onnx.overflowing(model):
        pytest.skip("this CPU adds pairs of products in 16 bits, and so do the engines: their answers are others")

def initializers_of(content):
    graph = onnx.load_from_string(content).graph
    return {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in graph.initializer}

@pytest.mark.parametrize("name", ["default", "scales per layer", "quantized logits"])
def test_initializers_are_the_checkpoints(name, network, checkpoint):
    """The same integers, and scales that are 1 / the script's except for their last two bits."""
    model = network(name)
    saved = model.state_dict()
    if name == "default":
        saved = torch.load(checkpoint, weights_only=True)["model"]
    found = initializers_of(export_onnx.onnx_bytes(model))
    for layer in script.LAYERS:
        for kind in ("weight", "bias"):
            expected, value = saved[f"{layer.name}.{kind}"].numpy(), found[f"{layer.name}.{kind}"]
            assert value.dtype == expected.dtype == (np.int8 if kind == "weight" else np.int32)
            np.testing.assert_array_equal(value, expected)
        w_scale, x_scale = found[f"{layer.name}.weight_scale"], found[f"{layer.input}_scale"]
        np.testing.assert_allclose(w_scale * saved[f"{layer.name}.w_scale"].numpy(), 1, rtol=3 * 2.0**-23)
        np.testing.assert_allclose(x_scale * saved[f"scale_{layer.input}"].numpy(), 1, rtol=2.0**-23)
        np.testing.assert_array_equal(found[f"{layer.name}.bias_scale"], x_scale * w_scale)
        assert not found[f"{layer.name}.weight_zero_point"].any()
    assert ("fc2_scale" in found) == (name == "quantized logits")

def test_file_has_the_integers_and_little_else(exported, checkpoint):
    path, _ = exported
    integers = sum(tensor.nbytes for tensor in torch.load(checkpoint, weights_only=True)["model"].values())
    assert integers < path.stat().st_size < 1.02 * integers

def test_metadata(exported):
    """Enough to use the file without anything else."""
    session = onnxruntime.InferenceSession(exported[0])
    metadata = {key: json.loads(text) for key, text in session.get_modelmeta().custom_metadata_map.items()}
    assert metadata.pop("recipe") == DEFAULT | {"IMAGE_SIZE": [224, 224]}
    assert metadata == {"classes": ["cat", "dog"], "image_size": [224, 224]}
    (pixels,), (logits,) = session.get_inputs(), session.get_outputs()
    assert (pixels.name, pixels.type, pixels.shape) == ("pixels", "tensor(uint8)", ["n", 3, 224, 224])
    assert (logits.name, logits.type, logits.shape) == ("logits", "tensor(float)", ["n", 2])

def answers(run, pixels, batch):
    return np.concatenate([run(chunk.contiguous().numpy()) for chunk in pixels.split(batch)])

@pytest.mark.parametrize("engine", ENGINES)
def test_engines_answer_as_the_script(engine, exported, network, pictures):
    """A rounding tie moves the logits of few of 100 pictures, by less than the INT8 network's own error."""
    model, run = network("default"), engine_of(engine, exported[0].read_bytes())
    with torch.inference_mode():
        expected = torch.cat([model(chunk) for chunk in pictures.split(20)]).numpy()
    for batch in (1, 5):
        logits = answers(run, pictures, batch)
        assert (logits.argmax(1) == expected.argmax(1)).all() and len(logits) == 100
        change = np.abs(logits - expected).max(1)
        assert (change > 1e-5).sum() <= 10 and change.max() < 0.01

@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", [name for name in RECIPES if name != "default"])
def test_engines_answer_as_the_script_with_every_recipe(engine, name, network, pictures):
    """With values that are clipped in every activation. A rounding tie may move one picture."""
    model = network(name)
    skip_where_kernels_overflow(model)
    width, height = model.recipe["IMAGE_SIZE"]
    pixels = pictures[:8, :, :height, :width]
    run = engine_of(engine, export_onnx.onnx_bytes(model))
    with torch.inference_mode():
        expected, found = model(pixels).numpy(), script.activations_of(model, pixels)
    for name in script.ACTIVATIONS[1:6]:
        assert (found[name] == model.integers[name].high).any()
    assert (found["fc1"] == model.integers["fc1"].low).any()
    for batch in (1, 5):
        logits = answers(run, pixels, batch)
        assert (logits.argmax(1) == expected.argmax(1)).all()
        moved = ~np.isclose(logits, expected, rtol=1e-5, atol=1e-5).all(1)
        assert moved.sum() <= 1 and np.abs(logits - expected).max() < 0.02

@pytest.mark.parametrize("engine", ENGINES)
def test_pixels_on_rounding_ties(engine, folded, pictures):
    """With an input range of 200: 20 * 255 / 200 is 25.5, and so on with each odd multiple of 20."""
    dark = copy.deepcopy(folded)
    dark.ranges["input"].fill_(200)
    _, model = script.quantize_network(dark, pictures[:2], DEFAULT | FAST)
    skip_where_kernels_overflow(model)
    pixels = torch.randint(0, 13, (3, 3, 224, 224), generator=torch.Generator().manual_seed(0)).mul(20).to(torch.uint8)
    with torch.inference_mode():
        expected = model(pixels).numpy()
    logits = engine_of(engine, export_onnx.onnx_bytes(model))(pixels.numpy())
    np.testing.assert_allclose(logits, expected, rtol=1e-5, atol=1e-5)

def test_onnxruntime_runs_only_integer_kernels(exported, tmp_path):
    """In the graph that it saves after optimization."""
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    options.log_severity_level = 3          # it warns that the saved file is only for this machine
    onnxruntime.InferenceSession(exported[0], options, providers=["CPUExecutionProvider"])
    graph = onnx.load(tmp_path / "optimized.onnx").graph
    operators = [node.op_type for node in graph.node]
    assert operators.count("QLinearConv") == 4 and operators.count("QGemm") == 2
    assert set(operators) <= {"QLinearConv", "QGemm", "NhwcMaxPool", "MaxPool", "Transpose", "Flatten", "Clip"}

def test_openvino_runs_only_integer_kernels(exported):
    """In the graph that it executes, all that computes reads integers of 8 bits."""
    openvino = pytest.importorskip("openvino", reason="openvino is not installed")
    compiled = openvino.Core().compile_model(exported[0], "CPU")
    rows = [{key: node.get_rt_info()[key].astype(str) for key in ("layerType", "runtimePrecision")}
            for node in compiled.get_runtime_model().get_ops()]
    kernels = {"Convolution": 4, "Pooling": 4, "FullyConnected": 2}
    for kind, count in kernels.items():
        assert [row["runtimePrecision"] for row in rows if row["layerType"] == kind] == ["u8"] * count
    others = {"Input", "Output", "Const", "Reorder", "Reshape"}
    assert {row["layerType"] for row in rows} <= kernels.keys() | others

def test_the_tool_prints_its_check(exported):
    path, out = exported
    found = re.search(rf"ONNX Runtime {onnxruntime.__version__}: 100 of 100 classes are the script's;\n  a rounding "
                      r"step moved (\d+) of 100 pictures; SQNR against FP32 ([\d.]+) dB \(script ([\d.]+) dB\)\n", out)
    assert int(found[1]) <= 10 and 35 < float(found[2]) == pytest.approx(float(found[3]), abs=0.11)
    assert out.splitlines()[-1] == f"wrote {path}, {path.stat().st_size:,} bytes"

def answers_of(kind):
    """(logits, by_script, fp32) of 100 pictures: the script is 40 dB away from FP32, an engine as `kind` says."""
    by_script = np.tile(np.float32([3, -3]), (100, 1))
    error = np.where(np.arange(200).reshape(100, 2) % 3, 0.03, -0.03).astype(np.float32)
    logits, fp32 = by_script.copy(), by_script + error
    if kind == "six moved":
        logits[:6] += np.float32([0.02, 0])
    elif kind == "another class":
        logits[50] = -logits[50]
    elif kind == "another class at a tie":
        by_script[50] = fp32[50] = [0.01, -0.01]
        logits[50] = [-0.01, 0.01]
    elif kind == "error doubled":
        logits -= error
    elif kind == "NaN":
        logits[99, 1] = np.nan
    return logits, by_script, fp32

@pytest.mark.parametrize("kind, same, moved, near", [
    ("the script's", 100, 0, True), ("six moved", 100, 6, True), ("another class", 99, 1, False),
    ("another class at a tie", 99, 1, True), ("error doubled", 100, 100, False), ("NaN", 99, 1, False)])
def test_bound_of_the_check(kind, same, moved, near, capsys, network, monkeypatch):
    """VNNI is named where kernels overflow, and there alone."""
    model, overflow = network("default"), []
    monkeypatch.setattr(script, "kernel_overflows", lambda layer: layer in overflow)
    if near:
        export_onnx.check_answers("engine", *answers_of(kind), model)
    else:
        with pytest.raises(script.InputError, match="^engine .* no file is written.$"):
            export_onnx.check_answers("engine", *answers_of(kind), model)
        overflow.append(model.cnn2)
        with pytest.raises(script.InputError, match="kernels of cnn2 overflow .*VNNI.*WEIGHT_BIT"):
            export_onnx.check_answers("engine", *answers_of(kind), model)
    assert (f"engine: {same} of 100 classes are the script's;\n  a rounding step moved {moved} of 100 pictures; "
            "SQNR against FP32 ") in capsys.readouterr().out

@pytest.fixture
def ten_pictures(tmp_path_factory, monkeypatch):
    """The script's pictures are only ten, for the tests that need no more, and a batch that cannot be decoded."""
    folder = tmp_path_factory.mktemp("pictures") / "val"
    folder.mkdir()
    for i in range(5):
        (folder / f"cat.{10 + i}.jpg").write_bytes(b"no picture")
        for kind in ("cat", "dog"):
            (folder / f"{kind}.{i}.jpg").symlink_to(ROOT / "cat_dog" / "val" / f"{kind}.{i}.jpg")
    monkeypatch.setattr(script, "DATA_DIR", str(folder.parent))
    monkeypatch.setattr(script, "BATCH_SIZE", 5)
    return folder

def stopped_with(monkeypatch, checkpoint, output):
    """Call the tool in this process; return the line that it ends with."""
    monkeypatch.setattr(sys, "argv", ["export_onnx.py", str(checkpoint), "--output", str(output)])
    with pytest.raises(SystemExit) as stopped:
        export_onnx.main()
    assert isinstance(stopped.value.code, str) and "\n" not in stopped.value.code
    return stopped.value.code

@pytest.mark.parametrize("layer, before", [("cnn1", None), ("cnn4", b"of a run before"), ("fc1", None),
                                           ("fc2", b"of a run before")])
def test_a_wrong_scale_is_refused(layer, before, checkpoint, ten_pictures, tmp_path, monkeypatch):
    """One that is 10 % too small: no file is written, and one that was there stays."""
    right = export_onnx.arrays_of

    def wrong(model):
        arrays = right(model)
        return arrays | {f"{layer}.w_scale": arrays[f"{layer}.w_scale"] * np.float32(0.9)}

    output = tmp_path / "INT8.onnx"
    if before:
        output.write_bytes(before)
    monkeypatch.setattr(export_onnx, "arrays_of", wrong)
    line = stopped_with(monkeypatch, checkpoint, output)
    assert re.match("ONNX Runtime [0-9.]+ .*no file is written", line)
    assert [file.read_bytes() for file in tmp_path.iterdir()] == ([before] if before else [])

def test_pictures_that_cannot_be_decoded_are_left_out(checkpoint, network, ten_pictures, tmp_path, monkeypatch, capsys):
    skip_where_kernels_overflow(network("default"))
    output = tmp_path / "INT8.onnx"
    export_onnx.export(checkpoint, output, ten_pictures)
    assert ": 10 of 10 classes are the script's" in capsys.readouterr().out and output.stat().st_size
    output.unlink()
    for file in ten_pictures.iterdir():
        if file.is_symlink():
            file.unlink()
    assert "no usable picture" in stopped_with(monkeypatch, checkpoint, output) and not list(tmp_path.iterdir())

@pytest.mark.parametrize("kind", ["missing", "damaged", "FP32"])
def test_a_checkpoint_that_cannot_be_used(kind, checkpoint, tmp_path, monkeypatch):
    """SystemExit with a text is one line on stderr and exit status 1."""
    bad = ROOT / "BEST_checkpoint.pth.tar" if kind == "FP32" else tmp_path / "bad.pth.tar"
    if kind == "damaged":
        bad.write_bytes(checkpoint.read_bytes()[:100_000])
    assert f"checkpoint {bad}" in stopped_with(monkeypatch, bad, tmp_path / "INT8.onnx")
    assert list(tmp_path.iterdir()) == [bad] * (kind == "damaged")

@pytest.mark.parametrize("engine, module", [("ONNX Runtime", "onnxruntime"), ("OpenVINO", "nncf")])
def test_rows_of_the_comparison(engine, module, network, folded, pictures, tmp_path):
    """tools/compare_engines.py runs FP32 and our integers in both engines, before it lets them quantize themselves."""
    pytest.importorskip(module, reason=f"{module} is not installed")
    model = network("default")
    skip_where_kernels_overflow(model)
    compare_engines.export_networks(folded, model, tmp_path)
    make = {"ONNX Runtime": compare_engines.onnxruntime_engines, "OpenVINO": compare_engines.openvino_engines}[engine]
    fp32, int8 = itertools.islice(make(pictures[:7], tmp_path), 2)
    assert (fp32.name, int8.name) == (f"{engine} FP32", f"{engine}, our integers")
    with torch.inference_mode():
        torch.testing.assert_close(fp32.logits(pictures[:7], 5), folded(pictures[:7]), atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(int8.logits(pictures[:7], 5), model(pictures[:7]), atol=1e-5, rtol=1e-5)
    assert int8.size == (tmp_path / "int8.onnx").stat().st_size

WITHOUT_TORCH = """
import importlib.abc, sys

class Refuse(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        assert name.split(".")[0] not in ("torch", "quantize_catdog"), f"{name} is imported"

sys.meta_path.insert(0, Refuse())
"""

def test_help_classifies_a_picture_without_torch(exported, network, tmp_path):
    """Its lines, in a process in which torch cannot be imported."""
    snippet = textwrap.dedent(export_onnx.__doc__.split("without torch:\n\n")[1].split("\n\n")[0])
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "INT8.onnx").write_bytes(exported[0].read_bytes())
    (tmp_path / "cat_dog").symlink_to(ROOT / "cat_dog")
    expected, _ = network("default").predict(ROOT / "cat_dog" / "val" / "cat.4.jpg")
    assert python("-c", WITHOUT_TORCH + snippet, cwd=tmp_path) == (0, f"{expected}\n", "")
    assert len(snippet.splitlines()) == 5
