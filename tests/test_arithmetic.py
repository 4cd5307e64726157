"""The arithmetic of quantize_catdog.py against tests/oracle.py: observers, folding, scales, integers, INT8 pass.

Equal means equal: scales, weights, biases and each layer's integers have no tolerance. Figures of the FP32
network have one, since torch sums in another order than NumPy.
"""
import copy
import doctest
import importlib.util
import io
import pickle
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from types import SimpleNamespace

import numpy as np
import pytest
import quantize_catdog as script
import torch

import oracle
from helpers import (
    ACTIVATIONS,
    DEVICE,
    KERNELS,
    LAYERS,
    MANY,
    METHODS,
    PIXELS,
    SCRIPT,
    STATE,
    Pictures,
    as_constants,
    case_name,
    default,
    integers_of,
    network,
    notebook,
    observe,
    observed,
    scales_of,
)

ENGINES = ["reference", "onednn"] if KERNELS else ["reference"]
MIXED = default()._replace(layer_bits={"cnn2": 2, "cnn4": 3, "fc1": 4})        # the others have 8
CASES = [recipe(bit) for recipe in (default, notebook) for bit in range(2, 9)]
CASES += [default(8, 4), default(8, 7), default(4, 8), notebook(8, 4), notebook(4, 8)]
CASES += [MIXED, default(8, 4)._replace(layer_bits={"cnn1": 8, "fc2": 8}), notebook()._replace(layer_bits={"fc1": 4})]
BOTH = pytest.mark.parametrize("recipe", [default(), notebook()], ids=case_name)


def import_script(path):
    spec = importlib.util.spec_from_file_location("quantize_catdog", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@contextmanager
def constants(recipe):
    """The script with this recipe in its constants."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in as_constants(recipe).items():
            if name not in METHODS:
                patch.setattr(script, name, value)
        yield


@torch.no_grad()
def values_of(model, pixels):
    """{activation: values} of an FP32 or INT8 model."""
    return {name: values.cpu() for name, values in script.activations_of(model, pixels.to(DEVICE)).items()}


@torch.no_grad()
def run(model, pixels):
    """({activation: values}, logits); the logits come from a pass without an observer."""
    return values_of(model, pixels), model(pixels.to(DEVICE)).cpu()


def channel_ranges_of(model):
    """A copy of {activation: largest magnitude of each channel}."""
    return {name: model.ranges[name].cpu().numpy().copy() for name in ACTIVATIONS}


def ranges_of(model):
    return {name: ranges.max().item() for name, ranges in channel_ranges_of(model).items()}


def assert_ranges(model, expected, rtol=1e-5):
    """The ranges of every channel are those of {activation: ranges}."""
    for name, ranges in channel_ranges_of(model).items():
        np.testing.assert_allclose(ranges, expected[name], rtol=rtol, atol=rtol * max(expected[name]), err_msg=name)


def state_of(model):
    """A copy of {name: tensor}, with an FP32 network's ranges."""
    ranges = {f"range_{name}": values for name, values in getattr(model, "ranges", {}).items()}
    return {name: value.clone() for name, value in (model.state_dict() | ranges).items()}


def assert_same_state(model, state):
    """Every tensor of the model is this, bit for bit."""
    found = state_of(model)
    assert found.keys() == state.keys()
    for name, value in state.items():
        assert found[name].dtype == value.dtype and torch.equal(found[name], value), name


def weights_of(folded):
    modules = {layer.name: folded.get_submodule(layer.name) for layer in LAYERS}
    return {name: (module.weight.detach().cpu().numpy(), module.bias.detach().cpu().numpy())
            for name, module in modules.items()}


def assert_same_values(found, expected):
    """{activation: values} of one pass and another, to the last bit."""
    assert list(found) == list(expected) == ACTIVATIONS
    for name, values in expected.items():
        assert found[name].dtype == values.dtype, name
        np.testing.assert_array_equal(found[name], values, err_msg=name)


def assert_same_pass(recipe, int8, pixels):
    """Every layer's integers, and the logits, of both engines are the oracle's; return what was computed."""
    expected, totals, expected_logits = oracle.int8_pass(recipe, pixels.numpy(), scales_of(int8), integers_of(int8))
    found, logits = run(int8.prepare("reference"), pixels)
    assert list(found) == ACTIVATIONS
    for name in expected:
        np.testing.assert_array_equal(found[name].numpy(), expected[name], err_msg=name)
    np.testing.assert_allclose(logits, expected_logits, rtol=1e-6, atol=1e-6 * np.abs(expected_logits).max())
    if KERNELS:
        fast, fast_logits = run(int8.prepare("onednn"), pixels)
        assert_same_values(fast, found)
        assert torch.equal(fast_logits, logits)
    return SimpleNamespace(activations=found, logits=logits, totals=totals)


@pytest.fixture(scope="module")
def calibrated():
    """A folded network whose observers have seen the pictures. Shared: no test changes it."""
    return observed(STATE, PIXELS)


@pytest.fixture(scope="module")
def expected():
    """The oracle's FP32 forward of the same."""
    return oracle.forward(STATE, PIXELS.numpy())


@pytest.fixture(scope="module", params=CASES, ids=case_name)
def case(request, calibrated):
    """One recipe and its widths: the quantized network, whose INT8 pass is the oracle's with both engines."""
    recipe = request.param
    int8 = calibrated.cl_scale(as_constants(recipe))
    both = assert_same_pass(recipe, int8, PIXELS)
    return SimpleNamespace(recipe=recipe, int8=int8, scales=scales_of(int8), integers=integers_of(int8),
                           weights=weights_of(calibrated), ranges=ranges_of(calibrated), **vars(both))


# The script

def test_importing_runs_nothing(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    copy = tmp_path / SCRIPT.name
    copy.write_bytes(SCRIPT.read_bytes())
    import_script(copy)                                 # a run would end here: no pictures, no checkpoint
    assert [path.name for path in tmp_path.iterdir()] == [SCRIPT.name]
    assert capfd.readouterr() == ("", "")


def test_doctests():
    found = doctest.DocTestFinder().find(script)
    assert {test.name.split(".")[1]: len(test.examples) for test in found if test.examples} == {
        "quantize": 1, "requantize": 1, "fusion_conv_bn": 3, "weight_quant": 2}
    assert doctest.testmod(script) == (0, 7)            # failed, attempted


def test_constants_are_the_default_recipe():
    assert script.read_constants(script.LEGAL_RECIPE) == as_constants(default(), *METHODS)
    for recipe in (notebook(5, 3), MIXED):
        with constants(recipe):
            found, before = script.read_constants(script.LEGAL_RECIPE), dict(recipe.layer_bits)
            assert found == as_constants(recipe, *METHODS)
            found["LAYER_BITS"]["fc2"] = 2              # of a copy: the constant stays
            assert script.LAYER_BITS == before


@pytest.mark.parametrize("cores, threads", [(None, 1), (2, 2), (16, 16), (64, 16)])
def test_threads_are_at_most_sixteen(monkeypatch, cores, threads):
    monkeypatch.setattr("os.cpu_count", lambda: cores)
    assert import_script(SCRIPT).NUM_WORKERS == threads


def test_layers_are_the_oracles():
    assert [(layer.name, layer.bn, layer.input, layer.output) for layer in LAYERS] == oracle.LAYERS
    assert [layer.is_conv for layer in LAYERS] == [True] * 4 + [False] * 2
    assert ACTIVATIONS == oracle.ACTIVATIONS


# Arithmetic

@pytest.mark.parametrize("bit", range(2, 9))
def test_int_range(bit):
    half = 2**(bit - 1) - 1
    assert tuple(script.int_range(bit)) == (-half, half, torch.int8)
    assert tuple(script.int_range(bit, unsigned=True)) == (0, 2**bit - 1, torch.uint8)


def test_quantize_rounds_halves_to_even_and_clips():
    x = torch.tensor([-200.0, -127.4, -1.5, -0.5, 0.49, 0.5, 1.5, 2.5, 126.5, 128.0, 1e9])
    for integers, expected in [(script.int_range(8), [-127, -127, -2, 0, 0, 0, 2, 2, 126, 127, 127]),
                               (script.int_range(8, unsigned=True), [0, 0, 0, 0, 0, 0, 2, 2, 126, 128, 255])]:
        q = script.quantize(x, torch.tensor(1.0), integers)
        assert q.tolist() == expected and q.dtype == integers.dtype


def test_requantize_rounds_product_and_sum_separately():
    # among a million values some lie at a tie, where (sums + bias) * multiplier would round to the other side
    rng = np.random.default_rng(2)
    sums, bias = rng.integers(-2**22, 2**22, 10**6), rng.integers(-2**22, 2**22, 10**6)
    multiplier = rng.uniform(1e-5, 3e-5, 10**6).astype(np.float32)
    real = np.rint(sums.astype(np.float32) * multiplier + bias.astype(np.float32) * multiplier)
    assert (real != np.rint((sums + bias).astype(np.float32) * multiplier)).any()
    for low in (-127, 0):                               # 0: a ReLU
        offset = torch.from_numpy(bias).int() * torch.from_numpy(multiplier)
        found = script.requantize(torch.from_numpy(sums).float(), torch.from_numpy(multiplier), offset,
                                  script.int_range(8)._replace(low=low))
        assert found.dtype == torch.int8
        np.testing.assert_array_equal(found, np.clip(real, low, 127))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8])
@pytest.mark.parametrize("height, width", [(4, 6), (5, 6), (4, 7), (7, 5), (2, 2), (3, 3)])
def test_max_pool_is_torchs(dtype, height, width):
    x = torch.randint(torch.iinfo(dtype).min, torch.iinfo(dtype).max + 1, (2, 3, height, width), dtype=dtype)
    pooled = script.MaxPool2d(2)(x)
    assert pooled.dtype == dtype
    assert torch.equal(pooled.float(), torch.nn.MaxPool2d(2)(x.float()))


# FP32 network and folding

@pytest.mark.parametrize("is_folded", [False, True])
def test_fp32_network(is_folded, expected):
    model = network(STATE)
    before = state_of(model)
    found, logits = run(model.fused() if is_folded else model, PIXELS)
    assert list(found) == ACTIVATIONS
    for name, values in expected.items():
        np.testing.assert_allclose(found[name], values, rtol=0, atol=1e-5 * np.abs(values).max(), err_msg=name)
    np.testing.assert_array_equal(logits, found["fc2"])
    assert_same_state(model, before)                    # folding changes a copy


def test_folding_weights(calibrated):
    # torch's square root is not NumPy's to the last digit, so nearly equal
    weights = weights_of(calibrated)
    for layer, bn, _, _ in oracle.LAYERS:
        w, b = oracle.folded(STATE, layer, bn)
        np.testing.assert_allclose(weights[layer][0], w, rtol=1e-6, err_msg=layer)
        np.testing.assert_allclose(weights[layer][1], b, rtol=1e-6, atol=1e-6 * np.abs(b).max(), err_msg=layer)
        assert bn or np.array_equal(weights[layer][0], STATE[f"{layer}.weight"])


@pytest.mark.parametrize("methods", [(), METHODS])
def test_networks_that_are_not_folded_or_not_calibrated_are_refused(methods):
    recipe, unfolded, folded = as_constants(default(), *methods), network(STATE), network(STATE).fused()
    with pytest.raises(script.InputError, match="fold"):
        unfolded.cl_scale(recipe)
    observe(unfolded, PIXELS)
    with pytest.raises(script.InputError, match="fold"):
        script.quantize_network(unfolded, PIXELS.to(DEVICE), recipe)
    for ranges in ({}, {"input": torch.tensor([255.0])}, {**unfolded.ranges}):
        ranges.pop("fc2", None)
        folded.ranges = ranges
        with pytest.raises(script.InputError, match="calibrate"):
            script.quantize_network(folded, PIXELS.to(DEVICE), recipe)


# Observers

def test_ranges(calibrated, expected):
    """Every activation has one for each channel."""
    assert {name: ranges.shape for name, ranges in channel_ranges_of(calibrated).items()} == {
        "input": (3,), "cv1": (16,), "cv2": (32,), "cv3": (16,), "cv4": (8,), "fc1": (512,), "fc2": (2,)}
    assert_ranges(calibrated, oracle.ranges(expected))


def test_ranges_are_empty_until_calibration_but_for_the_input():
    """Pixels reach 255, whatever those in calibration reach: no scale of the input depends on them."""
    model = script.CNN_Model()
    assert model.ranges == {} and not [name for name in model.state_dict() if "range" in name]
    model.reset_ranges()
    assert {name: ranges.tolist() for name, ranges in model.ranges.items()} == {"input": [255]}
    for largest in (0, 230, 255):
        model = observed(STATE, PIXELS.clip(max=largest))
        assert model.ranges["input"].tolist() == [255] * 3 and ranges_of(model)["fc2"] > 0


def test_notebooks_integers_are_those_of_ranges_that_only_the_pictures_set():
    """Where the pictures reach 255, as the notebook's do."""
    model = observed(STATE, PIXELS)
    integers, expected = state_of(model.cl_scale(as_constants(notebook()))), channel_ranges_of(model)
    assert PIXELS.amax((0, 2, 3)).tolist() == [255] * 3
    model.ranges = {}
    with torch.no_grad():
        model(PIXELS.to(DEVICE), model.update_range)
    assert_ranges(model, expected, rtol=0)
    assert_same_state(model.cl_scale(as_constants(notebook())), integers)


def test_range_is_of_the_values_before_pooling():
    # brighter towards the last row, positive weights: cv3's 51st row holds its largest value, and pooling drops it
    state = {name: np.abs(value) for name, value in STATE.items()}
    pixels = torch.arange(224, dtype=torch.uint8).reshape(1, 1, 224, 1).expand(1, 3, 224, 224)
    values = oracle.forward(state, pixels.numpy())
    assert values["cv3"].max() > 1.001 * oracle.pool(values["cv3"]).max()
    assert_ranges(observed(state, pixels), oracle.ranges(values))


def test_range_is_of_the_values_after_relu():
    # everything negative before the first ReLU: nothing after it
    state = {**STATE, "bn1.bias": np.full(16, -1e4, np.float32)}
    model = observed(state, PIXELS)
    assert ranges_of(model)["cv1"] == 0
    assert_ranges(model, oracle.ranges(oracle.forward(state, PIXELS.numpy())))


@pytest.mark.parametrize("name", ["fc1", "fc2"])
def test_observer_takes_magnitudes(name):
    model = script.CNN_Model()
    for values, largest in [([-5.0, 2.0], [5.0, 2.0]), ([4.0, -4.5], [5.0, 4.5]), ([0.0, 6.0], [5.0, 6.0])]:
        data = torch.tensor([values, [1.0, -1.0]]).repeat(1, 5)
        assert model.update_range(name, data) is data                   # goes on as it is
        assert model.ranges[name].tolist() == largest * 5
    assert list(model.ranges) == [name]


@pytest.mark.parametrize("memory", [torch.contiguous_format, torch.channels_last])
def test_observer_of_maps_looks_at_every_position(memory):
    """The largest of a channel, wherever it is, of whatever sign and in whichever picture."""
    rng = np.random.default_rng(6)
    model = script.CNN_Model()
    largest = np.zeros(8)
    for picture, channel, row, column, value in [(0, 0, 0, 0, 9), (1, 0, 4, 6, -8), (1, 7, 4, 0, -7), (0, 3, 2, 6, 5)]:
        data = rng.uniform(-1, 1, (2, 8, 5, 7)).astype(np.float32)
        data[picture, channel, row, column] = value
        before = torch.from_numpy(data.copy())
        data = torch.from_numpy(data).contiguous(memory_format=memory)
        assert model.update_range("cv4", data) is data and torch.equal(data, before)
        largest = np.maximum(largest, np.abs(before.numpy()).max((0, 2, 3)))
        np.testing.assert_array_equal(model.ranges["cv4"], largest)
    assert largest[[0, 7, 3]].tolist() == [9, 7, 5]


def test_observers_take_the_largest_of_all_batches(monkeypatch):
    monkeypatch.setattr(script, "BATCH_SIZE", 2)
    dim, bright = PIXELS // 4, PIXELS
    alone = [channel_ranges_of(observed(STATE, batch)) for batch in (dim, bright)]
    assert (alone[0]["cv1"] < alone[1]["cv1"]).any() and (alone[0]["fc2"] != alone[1]["fc2"]).any()
    both = {name: np.maximum(alone[0][name], alone[1][name]) for name in ACTIVATIONS}
    model = network(STATE).fused()
    for order in [(dim, bright), (bright, dim), (bright, dim, dim)]:
        observe(model, *order)
        assert_ranges(model, both, rtol=0)
    observe(model, dim)                                 # and start anew
    assert_ranges(model, alone[0], rtol=0)


def test_only_calibration_observes():
    model = network(STATE).fused()
    logits, before = run(model, PIXELS)[1], state_of(model)
    assert model.ranges == {}
    found = script.calibrate(model, Pictures(torch.cat([PIXELS, PIXELS[:1]]), [1, 1, 1]))
    assert torch.equal(torch.cat([logits, logits[:1]]), found.logits)           # observing changes no logit
    assert torch.equal(found.classes, found.logits.argmax(1))
    assert found.labels.tolist() == [1, 1, 1] and found.files == ["cat.0.jpg", "cat.1.jpg", "cat.2.jpg"]
    assert found.top1 == pytest.approx(100 * (found.logits[:, 1] > found.logits[:, 0]).double().mean().item())
    assert list(model.ranges) == ACTIVATIONS and min(ranges_of(model).values()) > 0
    after = state_of(model)
    assert all(torch.equal(after[name], value) for name, value in before.items())


# The same values in any batch

SIZES = [(224, 224), (212, 227), (227, 213), (219, 226)]        # height, width


def rows_of_outputs(height):
    """How many rows the output of each of the four convolutions has."""
    found = []
    for kernel in (5, 5, 3, 3):
        found.append(height - kernel + 1)
        height = found[-1] // 2
    return found


def test_sizes_have_odd_and_even_rows_at_every_convolution():
    parities = [[rows % 2 for rows in rows_of_outputs(height)] for height, _ in SIZES]
    assert [set(column) for column in zip(*parities)] == [{0, 1}] * 4


@pytest.mark.parametrize("height, width, threads", [(*size, 1) for size in SIZES] + [(*SIZES[0], 2)])
def test_fp32_of_a_picture_is_the_same_to_the_last_bit_in_any_batch(height, width, threads, calibrated):
    rng = np.random.default_rng(7)
    pixels = torch.from_numpy(rng.integers(0, 256, (4, height, width, 3), np.uint8)).permute(0, 3, 1, 2)
    torch.set_num_threads(threads)
    try:
        for model in (network(STATE), calibrated):
            values = values_of(model, pixels)
            assert values["cv4"].shape[2:] == (rows_of_outputs(height)[-1], rows_of_outputs(width)[-1])
            for batch in (slice(1), slice(3, 4), slice(2), slice(1, 4)):
                same = {name: value[batch] for name, value in values.items()}
                assert_same_values(values_of(model, pixels[batch]), same)
                if len(pixels[batch]) == 1:                                     # nor does the memory's order matter
                    assert_same_values(values_of(model, pixels[batch].contiguous()), same)
    finally:
        torch.set_num_threads(1)


@pytest.mark.parametrize("kernel", [3, 5])
def test_convolution_of_one_picture_is_torchs(kernel):
    """From the smallest map on, whose halves read the same rows."""
    conv = script.Conv2d(3, 4, kernel).to(DEVICE)
    for height in range(kernel, kernel + 6):
        for pictures in (0, 1, 2):
            x = torch.randn(pictures, 3, height, 9, device=DEVICE)
            y = torch.nn.functional.conv2d(x, conv.weight, conv.bias)
            assert conv(x).shape == y.shape
            assert torch.allclose(conv(x), y, rtol=0, atol=1e-5), (height, pictures)


@pytest.mark.parametrize("engine", ENGINES)
def test_int8_of_a_picture_is_the_same_in_any_batch(engine, calibrated):
    int8 = calibrated.cl_scale(as_constants(default())).prepare(engine)
    values = values_of(int8, PIXELS)
    for i in range(len(PIXELS)):
        assert_same_values(values_of(int8, PIXELS[i:i + 1]), {name: x[i:i + 1] for name, x in values.items()})
    assert_same_values(values_of(int8, PIXELS.contiguous()), values)       # the memory's order does not matter either


# What `observe` sees and returns

@pytest.fixture(params=["FP32", "folded", *ENGINES])
def any_network(request, calibrated):
    """Each network whose forward takes `observe`."""
    if request.param == "FP32":
        return network(STATE)
    if request.param == "folded":
        return calibrated
    return calibrated.cl_scale(as_constants(default())).prepare(request.param)


@torch.no_grad()
def test_each_activation_is_observed_once_in_order(any_network):
    seen = []

    def remember(name, values):
        seen.append((name, tuple(values.shape)))
        return values

    logits = any_network(PIXELS.to(DEVICE), remember)
    assert seen == [("input", (2, 3, 224, 224)), ("cv1", (2, 16, 220, 220)), ("cv2", (2, 32, 106, 106)),
                    ("cv3", (2, 16, 51, 51)), ("cv4", (2, 8, 23, 23)), ("fc1", (2, 512)), ("fc2", (2, 2))]
    assert torch.equal(logits, any_network(PIXELS.to(DEVICE)))          # observing changes nothing


@torch.no_grad()
@pytest.mark.parametrize("taken", ACTIVATIONS)
def test_what_observe_returns_goes_on(any_network, taken):
    """After the activation that is replaced by other pictures', all is these pictures'."""
    ours, theirs = PIXELS.to(DEVICE), 255 - PIXELS.to(DEVICE)
    our_values, their_values = script.activations_of(any_network, ours), script.activations_of(any_network, theirs)
    found = {}

    def replace(name, values):
        found[name] = values
        return their_values[name] if name == taken else values

    logits = any_network(ours, replace)
    assert torch.equal(logits, any_network(theirs)) and not torch.equal(logits, any_network(ours))
    for index, name in enumerate(ACTIVATIONS):
        values = our_values if index <= ACTIVATIONS.index(taken) else their_values
        assert torch.equal(found[name], values[name]), name


# Scales and integers, for each recipe and its widths

def test_scales(case):
    for name, scale in oracle.scales(case.recipe, case.ranges).items():
        assert case.scales[name] == scale, name
        largest = 2**case.recipe.bit - 1 if case.recipe.unsigned and name[:2] != "fc" else 2**(case.recipe.bit - 1) - 1
        room = case.recipe.headroom if name in ("cv4", "fc1") else 1
        assert case.ranges[name] * room * case.scales[name] == pytest.approx(largest, rel=1e-6)


def test_weights_and_biases(case):
    for layer in LAYERS:
        w, b = case.weights[layer.name]
        in_scale = case.scales[layer.input]
        wq, bq, w_scale = case.integers[layer.name]
        if case.recipe.per_channel or case.recipe.layer_bits:
            formulas = oracle.mended_weights(w, b, in_scale, case.recipe, layer.name)
        else:
            formulas = oracle.notebook_weights(w, b, in_scale, case.recipe.weight_bit)
        assert w_scale.shape == ((len(w),) if case.recipe.per_channel else (1,))
        np.testing.assert_array_equal(w_scale, formulas[2], err_msg=layer.name)
        np.testing.assert_array_equal(wq, formulas[0], err_msg=layer.name)
        np.testing.assert_array_equal(bq, formulas[1], err_msg=layer.name)


def test_integers_stand_for_the_weights(case):
    """Without any formula: half an integer away at most, and the largest integer is used."""
    for layer in LAYERS:
        w, b = case.weights[layer.name]
        wq, bq, w_scale = case.integers[layer.name]
        group = (len(w), -1) if case.recipe.per_channel else (1, -1)
        real = wq.reshape(group) / w_scale.reshape(-1, 1).astype(np.float64)
        assert (np.abs(real - w.reshape(group)) * w_scale.reshape(-1, 1)).max() < 0.5001
        width = case.recipe.layer_bits.get(layer.name, case.recipe.weight_bit)
        assert (np.abs(wq).reshape(group).max(1) == 2**(width - 1) - 1).all()
        exact = b * (w_scale.astype(np.float64) * case.scales[layer.input])
        largest = 2**(case.recipe.bias_bit - 1) - 1
        # a product of scales is an FP32 number, so a long bias is as long as those are precise
        assert (np.abs(bq - np.clip(exact, -largest, largest)) <= 0.5001 + 1e-6 * np.abs(exact)).all()
        assert np.abs(bq.astype(np.int64)).max() <= largest


def test_types_and_limits(case):
    """BIT says which integers an activation may have. ReLU outputs are never negative, fc1 without a ReLU is."""
    half = 2**(case.recipe.bit - 1) - 1
    high, relu = (2**case.recipe.bit - 1, torch.uint8) if case.recipe.unsigned else (half, torch.int8)
    for name in ACTIVATIONS[:5]:
        values = case.activations[name]
        assert values.dtype == relu and values.min() == 0 and values.max() <= high, name
    assert case.activations["input"].max() == high
    fc1 = case.activations["fc1"]
    assert fc1.dtype == torch.int8 and -half <= fc1.min() and fc1.max() <= half and (fc1 < 0).sum() > 10
    assert case.activations["fc2"].dtype == (torch.int8 if case.recipe.quantize_logits else torch.float32)
    assert case.logits.dtype == torch.float32 and case.logits.shape == (len(PIXELS), 2)
    for wq, bq, w_scale in case.integers.values():
        assert (wq.dtype, bq.dtype, w_scale.dtype) == (np.int8, np.int32, np.float32)


def test_notebooks_requantization_differs_only_at_ties(case):
    different = total = 0
    for layer in LAYERS:
        if case.activations[layer.output].dtype == torch.float32:
            continue
        low, high = oracle.limits(case.recipe, layer.output)
        theirs = oracle.notebook_requantize(case.totals[layer.output], case.scales[layer.input], case.integers[
            layer.name][2], case.scales[layer.output], 0 if layer.bn else low, high)
        change = np.abs(theirs - case.activations[layer.output].numpy())
        assert change.max() <= 1
        different, total = different + change.sum(), total + change.size
    assert different <= 1e-5 * total


def test_largest_sums_and_table(case):
    rows = [dict(zip(table, row)) for table in [script.layer_table(case.int8)] for row in zip(*table.values())]
    for layer, row in zip(LAYERS, rows, strict=True):
        bounds = oracle.largest_totals(case.recipe, layer.name, case.integers)
        np.testing.assert_array_equal(case.int8.int8_layer(layer).largest_sum.cpu(), bounds)
        totals = np.abs(np.moveaxis(case.totals[layer.output], 1, 0)).reshape(len(bounds), -1).max(1)
        assert (totals <= bounds).all()
        wq, _, w_scale = case.integers[layer.name]
        room = case.recipe.headroom if layer.output in ("cv4", "fc1") else 1
        fp32_logits = layer.output == "fc2" and not case.recipe.quantize_logits
        assert row == {
            "layer": layer.name, "weight shape": "x".join(str(size) for size in wq.shape),
            "output range": pytest.approx(case.ranges[layer.output] * room, rel=1e-6),
            "scale in": case.scales[layer.input], "scale out": "FP32" if fp32_logits else case.scales[layer.output],
            "smallest weight scale": w_scale.min(), "largest weight scale": w_scale.max(),
            "bits of sum": int(bounds.max()).bit_length()}


@BOTH
def test_int8_logits_are_close_to_fp32(recipe, calibrated, expected):
    logits = run(calibrated.cl_scale(as_constants(recipe)), PIXELS)[1].numpy()
    assert np.abs(logits - expected["fc2"]).max() < 0.03 * np.abs(expected["fc2"]).max()


@pytest.mark.parametrize("recipe, largest, pixels", [
    (default(), 255, PIXELS),                                                           # integers already
    (default(), 127, (PIXELS.double() * 255 / 127).round().clip(max=255).byte()),       # scaled, bright ones clipped
    (default(4), 15, PIXELS.clip(max=15))], ids=["scale 1", "scale 2", "4 bits at scale 1"])
def test_pixels(recipe, largest, pixels, calibrated):
    """Also of other ranges than 255, as older checkpoints may have them."""
    folded = copy.deepcopy(calibrated)
    folded.ranges["input"] = torch.tensor([largest], dtype=torch.float32, device=DEVICE)
    int8 = folded.cl_scale(as_constants(recipe))
    assert scales_of(int8)["input"] == pytest.approx((2**recipe.bit - 1) / largest)
    assert torch.equal(assert_same_pass(recipe, int8, PIXELS).activations["input"], pixels)


def test_quantizing_leaves_the_fp32_network_and_gives_the_same_twice():
    checkpoint = {name: torch.from_numpy(value.copy()) for name, value in STATE.items()}
    model = network(STATE)
    model.load_state_dict(checkpoint, strict=False)
    folded = model.fused()
    logits = observe(folded, PIXELS)
    before, recipe = state_of(folded), as_constants(default())
    first = folded.cl_scale(recipe)
    integers, outputs = state_of(first), run(first, PIXELS)[1]
    with constants(notebook(4)):                                # another recipe in between changes nothing
        folded.cl_scale(as_constants(notebook(4)))
        second = folded.cl_scale(recipe)                        # nor do constants: the recipe is what is given
    for int8 in (first, second):
        assert_same_state(int8, integers)
        assert torch.equal(run(int8, PIXELS)[1], outputs)
    assert recipe == as_constants(default())
    assert_same_state(folded, before)
    assert torch.equal(run(folded, PIXELS)[1], logits)
    assert all(np.array_equal(value, STATE[name]) for name, value in checkpoint.items())


# What an INT8_Model takes

@pytest.mark.parametrize("prepared", [False, True])
def test_pixels_of_another_type_or_size_are_refused(prepared, calibrated):
    int8 = calibrated.cl_scale(as_constants(default()))
    if prepared:
        int8.prepare("reference")
    for pixels in (PIXELS / 255, PIXELS.float(), PIXELS.char(), PIXELS[..., 1:], PIXELS[:, :, 1:], PIXELS[:, :1],
                   PIXELS[0], PIXELS.permute(0, 2, 3, 1)):
        with pytest.raises(script.InputError, match=r"uint8 .*\(n, 3, 224, 224\)"):
            int8(pixels.to(DEVICE))
    oblong = calibrated.cl_scale(as_constants(default()) | {"IMAGE_SIZE": (227, 212)})      # width, height
    pixels = PIXELS[:, :, :212].repeat(1, 1, 1, 2)[..., :227].to(DEVICE)
    assert oblong(pixels).shape == (2, 2)
    with pytest.raises(script.InputError, match=r"\(n, 3, 212, 227\)"):
        oblong(pixels.transpose(2, 3))


@pytest.mark.parametrize("name, value", [
    ("BIT", 9), ("BIT", 1), ("BIT", 8.0), ("WEIGHT_BIT", True), ("HEADROOM", -2), ("HEADROOM", 0.5),
    ("HEADROOM", float("nan")), ("BIAS_BIT", 33), ("PER_CHANNEL", 1), ("GPTQ", None), ("IMAGE_SIZE", (224, 228)),
    ("IMAGE_SIZE", [224, 224]), ("LAYER_BITS", {"fc3": 4}), ("LAYER_BITS", {"fc1": 9}), ("HEADROM", 2), ("BIAS_BIT", ...)])
def test_illegal_recipes_are_refused(name, value, calibrated):
    recipe = as_constants(default()) | {name: value}
    if value is ...:
        del recipe[name]                                                        # missing
    for make in (script.INT8_Model, calibrated.cl_scale):
        with pytest.raises(script.InputError, match=name):
            make(recipe)


def test_editing_a_recipe_afterwards_changes_nothing(calibrated):
    recipe = as_constants(MIXED)
    int8 = calibrated.cl_scale(recipe)
    recipe["LAYER_BITS"]["fc1"], recipe["LAYER_BITS"]["cnn1"] = 2, 2
    recipe |= {"BIT": 4, "UNSIGNED_RELU": False, "QUANTIZE_LOGITS": True, "IMAGE_SIZE": (212, 212)}
    try:
        assert int8.recipe == as_constants(MIXED._replace(layer_bits={"cnn2": 2, "cnn4": 3, "fc1": 4}))
        assert_same_pass(MIXED._replace(layer_bits={}), int8, PIXELS)
    finally:
        recipe["LAYER_BITS"] |= {"fc1": 4}


# The engines

def fresh(int8):
    """Another network of the same integers, with no engine yet."""
    other = script.INT8_Model(int8.recipe).to(DEVICE)
    other.load_state_dict(int8.state_dict())
    return other


@pytest.mark.parametrize("engine", ENGINES)
def test_prepared_again_a_network_runs_the_tensors_that_it_has_now(engine, calibrated):
    int8 = calibrated.cl_scale(as_constants(default()._replace(quantize_logits=True)))
    assert int8.run is int8.engine is None
    assert int8.prepare(engine) is int8 and int8.engine == engine and list(int8.run) == [layer.name for layer in LAYERS]
    kernels = [layer.packed is not None for layer in int8.run.values()]
    assert kernels == [engine == "onednn"] * 5 + [False]                        # fc2's two outputs need no kernel
    pixels = PIXELS[:1]
    values = values_of(int8, pixels)
    for name, tensor in int8.named_buffers():
        before = tensor.clone()
        tensor.copy_(tensor * 0.8 if tensor.is_floating_point() else -tensor)
        changed = values_of(int8.prepare(engine), pixels)
        assert_same_values(changed, values_of(fresh(int8).prepare(engine), pixels))
        assert not torch.equal(changed["fc2"], values["fc2"]) or name == "scale_fc2", name
        tensor.copy_(before)
    assert_same_values(values_of(int8.prepare(engine), pixels), values)


COPIES = {"copy": copy.copy, "deepcopy": copy.deepcopy, "pickle": lambda int8: pickle.loads(pickle.dumps(int8)),
          "checkpoint": lambda int8: script.INT8_Model.load(io.BytesIO(script.int8_checkpoint(int8)))}


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("kind", COPIES)
def test_copies_have_no_engine_until_one_is_verified(kind, engine, calibrated, monkeypatch):
    int8 = calibrated.cl_scale(as_constants(default())).prepare(engine)
    values, logits = run(int8, PIXELS)
    prepared, other = int8.run, COPIES[kind](int8)
    assert other.run is other.engine is None
    verified, choose_engine = [], script.choose_engine
    monkeypatch.setattr(script, "choose_engine", lambda model: verified.append(model) or choose_engine(model))
    found, found_logits = run(other, PIXELS)
    assert_same_values(found, values)
    assert torch.equal(found_logits, logits) and verified == [other] and other.engine == ENGINES[-1]
    assert int8.run is prepared and int8.engine == engine
    if kind != "copy":                                                          # its tensors are its own
        other.fc1.weight.neg_()
        assert not torch.equal(values_of(other.prepare(engine), PIXELS)["fc1"], values["fc1"])
        assert_same_values(values_of(int8.prepare(engine), PIXELS), values)


def test_a_fresh_network_does_not_use_kernels_that_are_wrong(calibrated, monkeypatch):
    """Wrong in a single integer, and only where it is brought to the output's scale: nothing overflows."""
    int8 = calibrated.cl_scale(as_constants(default()))
    values = values_of(fresh(int8).prepare("reference"), PIXELS)

    def wrong(layer, x):
        y = layer.rescale(layer.sums(x))
        if layer.outputs is not None:
            y.view(-1)[-1] ^= 1
        return y

    monkeypatch.setattr(script.INT8Layer, "pack", lambda layer, weight: weight)
    monkeypatch.setattr(script.INT8Layer, "kernel", wrong)
    assert not script.kernels_overflow(int8)
    assert_same_values(values_of(int8, PIXELS), values)
    assert int8.engine == "reference"


def test_two_threads_on_a_fresh_network(calibrated, monkeypatch):
    """The second comes while the first prepares the layers, or both come at once."""
    int8 = calibrated.cl_scale(as_constants(default()))
    logits = run(int8, PIXELS)[1]
    preparing = threading.Event()

    class Slow(script.INT8Layer):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            if not preparing.is_set():
                preparing.set()
                time.sleep(0.2)

    with ThreadPoolExecutor(2) as pool:
        with monkeypatch.context() as patch:
            patch.setattr(script, "INT8Layer", Slow)
            first, other = fresh(int8), None
            answers = [pool.submit(run, first, PIXELS)]
            assert preparing.wait(60)
            answers.append(pool.submit(run, first, PIXELS))
            assert all(torch.equal(answer.result()[1], logits) for answer in answers)
        for _ in range(5):
            other = fresh(int8)
            assert all(torch.equal(found, logits) for _, found in pool.map(run, [other] * 2, [PIXELS] * 2))


def sums_of_pairs(layer, x, largest):
    """A layer's outputs where products are added in pairs that saturate, and the pairs without a limit."""
    weight = layer.weight.flatten(1).double()                                           # (out, K)
    inputs = torch.nn.functional.unfold(x.double(), layer.weight.shape[2:]) if layer.is_conv else x.double()[..., None]
    products = weight[None, :, :, None] * inputs[:, None]                               # (n, out, K, positions)
    products = torch.nn.functional.pad(products, (0, 0, 0, products.shape[2] % 2))
    sums = products.unflatten(2, (-1, 2)).sum(3).clip(-largest - 1, largest).sum(2)
    exact = layer.sums(x)
    return layer.rescale(sums.float().reshape(exact.shape))


@pytest.mark.parametrize("layer", LAYERS[:-1], ids=lambda layer: layer.name)
def test_kernels_that_add_pairs_in_16_bits_overflow(layer, calibrated, monkeypatch):
    """As x86 without VNNI does, in any single layer; 7-bit weights and signed activations stay below 2^15."""
    def overflows(**changes):
        int8 = calibrated.cl_scale(as_constants(default()._replace(**changes)))
        for other in set(LAYERS) - {layer}:
            int8.get_submodule(other.name).weight.zero_()
        return script.kernels_overflow(int8)

    assert not KERNELS or not overflows()                                               # this CPU's own
    monkeypatch.setattr(script.INT8Layer, "pack", lambda layer, weight: weight)
    monkeypatch.setattr(script.INT8Layer, "kernel", lambda layer, x: sums_of_pairs(layer, x, 2**15 - 1))
    assert overflows() is True
    assert overflows(weight_bit=7) is False and overflows(unsigned=False) is False
    monkeypatch.setattr(script.INT8Layer, "kernel", lambda layer, x: sums_of_pairs(layer, x, 2**31 - 1))
    assert overflows() is False


def test_quantizing_and_running_in_inference_mode(calibrated):
    recipe = as_constants(default(), *METHODS)
    int8 = script.quantize_network(calibrated, PIXELS.to(DEVICE), recipe)[1]
    with torch.inference_mode():
        again = script.quantize_network(calibrated, PIXELS.to(DEVICE), recipe)[1]
        assert_same_state(again, state_of(int8))
        assert_same_values(values_of(again, PIXELS), values_of(int8, PIXELS))


# Sums too large for float32

def test_sums_beyond_24_bits_are_exact():
    """fc1 with large inputs and weights of one sign. Its scales are set so that the sums' last digits are seen."""
    rng = np.random.default_rng(3)
    int8 = observed(STATE, PIXELS).cl_scale(as_constants(default()))
    inputs = torch.tensor([255, 253, 251, 254, 255, 249, 247, 253])     # cnn4 gives these for any picture
    int8.cnn4.weight.zero_()
    int8.cnn4.bias.copy_(inputs)
    weight = torch.from_numpy(rng.integers(110, 128, (512, 968)).astype(np.int8))
    sums = weight.numpy().astype(np.int64) @ inputs.numpy().repeat(121)
    assert sums.min() > 2**24
    int8.fc1.weight.copy_(weight)
    for one in (int8.scale_cv4, int8.scale_fc1, int8.fc1.w_scale):      # a multiplier of 1
        one.fill_(1)
    int8.cnn4.w_scale.copy_((1 / int8.scale_cv3).expand(8))
    middle = rng.integers(-120, 121, 512)
    int8.fc1.bias.copy_(torch.from_numpy(middle - sums))
    # eight pictures: with fewer, float32 kernels add in an order that happens to round nothing
    found = run(int8.prepare("reference"), PIXELS.repeat(4, 1, 1, 1))[0]
    assert torch.equal(found["cv4"].float().amax((0, 2, 3)), inputs.float())
    # sum and bias are each rounded to float32, which above 2^24 holds every second integer
    exact = sums.astype(np.float32) + (middle - sums).astype(np.float32)
    np.testing.assert_array_equal(found["fc1"], np.tile(exact, (8, 1)))
    largest = int8.int8_layer(LAYERS[4]).largest_sum
    np.testing.assert_array_equal(largest.cpu(), oracle.largest_totals(default(), "fc1", integers_of(int8)))
    assert int(largest.max()).bit_length() == 26


@pytest.mark.parametrize("layer, operation", [(LAYERS[0], "conv2d"), (LAYERS[4], "linear")])
def test_a_gpu_whose_products_are_not_whole(layer, operation, calibrated, monkeypatch):
    """A convolution that is computed by a transform gives sums a little off in FP64: they are rounded."""
    run_layer = calibrated.cl_scale(as_constants(default())).int8_layer(layer)
    x = torch.randint(0, 256, (2, *run_layer.weight.shape[1:]), dtype=torch.uint8)
    expected = run_layer.sums(x)
    run_layer.fits_fp32, run_layer.weight = False, run_layer.weight.double()
    exact = getattr(script.F, operation)
    monkeypatch.setattr(script.F, operation, lambda *arguments: exact(*arguments) + 1e-3)
    assert torch.equal(run_layer.sums(x), expected)


# Extreme pictures and weights

def plain(pixel):
    return torch.full((1, 3, 224, 224), pixel, dtype=torch.uint8)


def assert_close_to_fp32(folded, recipe, pixels, share=0.05):
    """INT8 logits finite and within a share of the largest FP32 logit; return the INT8 network."""
    int8 = folded.cl_scale(as_constants(recipe))
    for name, value in int8.state_dict().items():
        assert value.isfinite().all(), name
    fp32, found = run(folded, pixels)[1], run(int8, pixels)[1]
    assert found.isfinite().all()
    assert (found - fp32).abs().max() <= share * fp32.abs().max()
    return int8


@BOTH
@pytest.mark.parametrize("pixel", [0, 255])
def test_plain_pictures(recipe, pixel, calibrated):
    assert_same_pass(recipe, calibrated.cl_scale(as_constants(recipe)), plain(pixel))   # calibrated on others
    recipe = recipe._replace(bias_bit=32)       # 16 bits clip the biases after a range of 0
    folded = observed(STATE, plain(pixel))                                              # and only on this one
    assert_same_pass(recipe, assert_close_to_fp32(folded, recipe, plain(pixel)), plain(pixel))


@BOTH
@pytest.mark.parametrize("sign", [1, -1])
def test_all_weights_at_their_largest(recipe, sign):
    state = {name: np.full_like(value, sign * 0.01) if name.startswith(("cnn", "fc")) else value
             for name, value in STATE.items()}
    int8 = observed(state, PIXELS).cl_scale(as_constants(recipe))
    assert set(int8.fc1.weight.unique().tolist()) == {sign * 127}
    assert_same_pass(recipe, int8, torch.cat([PIXELS, plain(255)]))


def dead(**changes):
    """The weights with some set to one value: layer_key=value stands for layer.key."""
    names = {name.replace("_", ".", 1): value for name, value in changes.items()}
    assert names.keys() <= STATE.keys()
    return {name: np.full_like(value, names.get(name, 0)) if name in names else value for name, value in STATE.items()}


DEAD = {
    "first convolution": dead(cnn1_weight=0, cnn1_bias=0),
    "second convolution": dead(cnn2_weight=0, cnn2_bias=0),
    "second convolution's weights": dead(cnn2_weight=0),
    "fc1": dead(fc1_weight=0, fc1_bias=0),
    "fc2's weights": dead(fc2_weight=0),
    "fc2": dead(fc2_weight=0, fc2_bias=0),
    "batch norm": dead(bn3_weight=0, bn3_bias=0),
    "batch norm of one channel": STATE | {"bn1.weight": np.where(np.arange(16) == 5, 0, STATE["bn1.weight"])},
    "nothing passes a ReLU": dead(bn2_bias=-1e4),
    "no variance": dead(bn4_running_var=0, bn4_weight=1e-3),
    "everything": {name: np.zeros_like(value) for name, value in STATE.items()},
}


@BOTH
@pytest.mark.parametrize("name", DEAD)
def test_dead_networks(name, recipe):
    recipe = recipe._replace(bias_bit=32)       # 16 bits clip the biases after a range of 0
    folded = observed(DEAD[name], PIXELS[:1])
    int8 = assert_close_to_fp32(folded, recipe, PIXELS[:1])
    assert_same_pass(recipe, int8, PIXELS[:1])
    weights, integers, scales = weights_of(folded), integers_of(int8), scales_of(int8)
    assert scales == oracle.scales(recipe, ranges_of(folded))           # of ranges of 0, too
    for layer in LAYERS:
        formulas = oracle.mended_weights(*weights[layer.name], scales[layer.input], recipe, layer.name)
        for found, formula in zip(integers[layer.name], formulas):
            np.testing.assert_array_equal(found, formula, err_msg=layer.name)


@pytest.mark.parametrize("value", [-0.0, 0.0, 1e-40, 1e-13])
def test_ranges_of_nearly_zero(value):
    """Ranges below SMALLEST, of either zero, count as it."""
    assert script.scale_of(255, torch.tensor([value])).item() == pytest.approx(255e12, rel=1e-6)


@pytest.mark.parametrize("weight", [0, 1e-13, 1e-9, 1e-6])
def test_a_channel_of_tiny_weights_has_its_bias(weight):
    state = {name: value.copy() for name, value in STATE.items()}
    state["fc2.weight"][0], state["fc2.bias"][0] = weight, 0.5
    state["cnn1.weight"][3], state["cnn1.bias"][3] = weight, 0.5
    for key, value in [("weight", 1), ("bias", 0), ("running_mean", 0), ("running_var", 1 - 1e-5)]:
        state[f"bn1.{key}"][3] = value
    folded = observed(state, PIXELS)
    int8 = folded.cl_scale(as_constants(default()))
    found, (fp32, fp32_logits) = assert_same_pass(default(), int8, PIXELS), run(folded, PIXELS)
    assert fp32_logits[:, 0].numpy() == pytest.approx(0.5, rel=1e-3)
    assert found.logits[:, 0].numpy() == pytest.approx(0.5, rel=1e-3)
    assert (found.activations["cv1"][:, 3] - fp32["cv1"][:, 3] * int8.scale_cv1.cpu()).abs().max() < 0.6
    _, bias, w_scale = integers_of(int8)["cnn1"]
    assert bias[3] / (scales_of(int8)["input"] * w_scale[3]) == pytest.approx(0.5, rel=1e-3)


# Ranges beyond FP32

def overflowing(folded, headroom=2):
    """The activation that quantizing names as it refuses."""
    with pytest.raises(script.InputError, match="overflows FP32") as error:
        folded.cl_scale(as_constants(default()._replace(headroom=headroom)))
    return str(error.value).split()[1]


@pytest.mark.parametrize("value", [np.inf, np.nan])
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_a_range_that_overflows_is_refused(name, value, calibrated):
    folded = copy.deepcopy(calibrated)
    folded.ranges = {each: ranges.clone() for each, ranges in folded.ranges.items()}
    folded.ranges[name][-1] = value                     # one channel is enough
    before = state_of(folded)
    assert overflowing(folded) == name
    for key, tensor in state_of(folded).items():
        assert torch.equal(tensor.nan_to_num(), before[key].nan_to_num())
    folded.ranges[ACTIVATIONS[-1]][0] = np.inf          # the first in order is named
    assert overflowing(folded) == name


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_headroom_that_overflows_is_refused(name, calibrated):
    """Twice 2e38 is more than FP32 holds; headroom multiplies only the ranges of the FC layers' inputs."""
    folded = copy.deepcopy(calibrated)
    folded.ranges[name] = folded.ranges[name].clip(min=2e38)
    assert scales_of(folded.cl_scale(as_constants(default()._replace(headroom=1))))[name] > 0
    if name in ("cv4", "fc1"):
        assert overflowing(folded) == overflowing(folded, headroom=1.75) == name
        folded.cl_scale(as_constants(default()._replace(headroom=1.5)))         # 3e38 is still a number
    else:
        folded.cl_scale(as_constants(default()))


@pytest.mark.parametrize("layer, name", [("cnn1", "cv1"), ("cnn4", "cv4"), ("fc1", "fc1"), ("fc2", "fc2")])
def test_weights_that_overflow_are_refused(layer, name):
    """A network whose values overflow as it runs, with and without equalization."""
    folded = observed({**STATE, f"{layer}.weight": STATE[f"{layer}.weight"] * np.float32(1e38)}, PIXELS)
    assert overflowing(folded) == name
    for methods in (METHODS, METHODS[1:]):
        with pytest.raises(script.InputError, match=f"activation {name} overflows FP32"):
            script.quantize_network(folded, PIXELS.to(DEVICE), as_constants(default(), *methods))


# What each constant does, alone

def quantized(calibrated, **changes):
    int8 = calibrated.cl_scale(as_constants(default()._replace(**changes)))
    found, logits = run(int8, PIXELS)
    return SimpleNamespace(int8=int8, integers=integers_of(int8), activations=found, logits=logits)


def test_per_channel(calibrated):
    one, many = quantized(calibrated, per_channel=False).integers, quantized(calibrated).integers
    for layer in LAYERS:
        assert one[layer.name][2].shape == (1,)
        assert many[layer.name][2].shape == (len(one[layer.name][0]),)
        assert many[layer.name][2].min() == one[layer.name][2]          # the layer's scale is its widest channel's


def test_unsigned_relu(calibrated):
    signed, unsigned = quantized(calibrated, unsigned=False).activations, quantized(calibrated).activations
    for name in ACTIVATIONS[:5]:
        assert (signed[name].dtype, unsigned[name].dtype) == (torch.int8, torch.uint8)
    for name in ACTIVATIONS[:4]:                            # cv4's range has headroom
        assert signed[name].max() <= 127 < unsigned[name].max()
    assert signed["fc1"].dtype == unsigned["fc1"].dtype == torch.int8


def test_bias_bit():
    model = observed({**STATE, "bn2.bias": STATE["bn2.bias"] * 5}, PIXELS)  # past 16 bits
    wide = quantized(model).integers
    assert np.abs(wide["cnn2"][1]).max() > 2**15
    for bias_bit in (2, 8, 16, 24):
        cut, largest = quantized(model, bias_bit=bias_bit).integers, 2**(bias_bit - 1) - 1
        assert np.abs(cut["cnn2"][1]).max() == largest or bias_bit == 24    # 16: 32767
        for layer in LAYERS:
            np.testing.assert_array_equal(cut[layer.name][1], wide[layer.name][1].clip(-largest, largest))
            np.testing.assert_array_equal(cut[layer.name][0], wide[layer.name][0])


def test_bias_is_clipped_to_the_integer_that_fp32_cannot_hold():
    recipe = as_constants(default()._replace(bias_bit=28))
    bias = script.weight_quant(torch.full((2, 4), 1e-9), torch.tensor([0.5, -0.5]), torch.tensor(1.0), 8, recipe)[1]
    assert bias.tolist() == [2**27 - 1, 1 - 2**27]


def test_quantize_logits(calibrated):
    rounded, real = quantized(calibrated, quantize_logits=True), quantized(calibrated)
    scale = rounded.int8.scale_fc2.cpu()
    assert rounded.activations["fc2"].dtype == torch.int8
    np.testing.assert_array_equal(rounded.logits, rounded.activations["fc2"] / scale)
    assert (real.logits * scale != (real.logits * scale).round()).any()
    assert ((rounded.logits - real.logits).abs() * scale).max() < 0.5001
    for name in ACTIVATIONS[:-1]:
        assert torch.equal(rounded.activations[name], real.activations[name])


@pytest.mark.parametrize("name", ["bit", "weight_bit"])
def test_fewer_bits_make_a_larger_error(name, calibrated):
    logits = run(calibrated, PIXELS)[1]
    errors = [(quantized(calibrated, **{name: bit}).logits - logits).square().mean().item() for bit in (2, 4, 6, 8)]
    assert errors == sorted(errors, reverse=True) and len(set(errors)) == 4


def test_bit_is_of_activations_and_weight_bit_of_weights(calibrated):
    both, weights, inputs = quantized(calibrated), quantized(calibrated, weight_bit=4), quantized(calibrated, bit=4)
    assert scales_of(weights.int8) == scales_of(both.int8)
    for name in ACTIVATIONS[:-1]:
        ratio = 15 / 255 if name != "fc1" else 7 / 127
        assert scales_of(inputs.int8)[name] == pytest.approx(ratio * scales_of(both.int8)[name], rel=1e-6)
    assert torch.equal(weights.activations["input"], both.activations["input"])
    assert inputs.activations["input"].max() == 15
    for layer in LAYERS:
        wq, _, w_scale = both.integers[layer.name]
        same_wq, _, same_scale = inputs.integers[layer.name]
        np.testing.assert_array_equal(same_wq, wq)
        np.testing.assert_array_equal(same_scale, w_scale)
        wq4, _, w_scale4 = weights.integers[layer.name]
        np.testing.assert_allclose(w_scale4, w_scale * (7 / 127), rtol=1e-6)
        assert np.abs(wq4).max() == 7 and np.abs(wq).max() == 127
        largest, of_weights, of_inputs = [int(net.int8.int8_layer(layer).largest_sum.max())
                                          for net in (both, weights, inputs)]
        assert of_weights == pytest.approx(largest * 7 / 127, rel=0.3)          # some four bits fewer, either way
        assert of_inputs == pytest.approx(largest / 17, rel=0.1)


def test_headroom(calibrated):
    """Twice the range halves the integers of the FC layers' inputs, and of no other activation."""
    tight, wide = quantized(calibrated, headroom=1).activations, quantized(calibrated, headroom=2).activations
    for found, cv4, fc1 in [(tight, 255, 127), (wide, 127.5, 63.5)]:
        assert found["cv4"].max() == pytest.approx(cv4, abs=3)
        assert found["fc1"].abs().max() == pytest.approx(fc1, abs=3)
    for name in ACTIVATIONS[:4]:
        assert torch.equal(tight[name], wide[name])


# Closer to FP32

SIX = MANY[:6]                      # two chunks, the second smaller


def before_refining(state, recipe, *methods):
    """Folded network that has seen the pictures, and its INT8 network before `refine`."""
    folded = observed(state, PIXELS)
    return folded, folded.cl_scale(as_constants(recipe, *methods))


def test_equalization_changes_no_logit_and_evens_the_ranges():
    state = {**STATE, "bn2.weight": STATE["bn2.weight"] * np.linspace(0.05, 1, 32, dtype=np.float32)}
    state["bn4.weight"], state["bn4.bias"] = state["bn4.weight"].copy(), state["bn4.bias"].copy()
    state["bn4.weight"][3] = state["bn4.bias"][3] = 0                           # a dead channel
    folded = observed(state, PIXELS)
    logits, before, original = run(folded, PIXELS)[1], channel_ranges_of(folded), state_of(folded)
    equalized, factors = script.equalize(folded)
    assert_same_state(folded, original)                                         # the argument stays as it was
    storages = [{tensor.data_ptr() for tensor in net.state_dict().values()} for net in (folded, equalized)]
    assert storages[0].isdisjoint(storages[1])
    assert list(factors) == ["cv1", "cv2", "cv3", "cv4", "fc1"]
    for name, found in factors.items():
        np.testing.assert_allclose(found, oracle.equalizing_factors(before[name]), rtol=1e-6)
    assert factors["cv4"][3] == 4 and factors["cv2"].max() > 2
    np.testing.assert_allclose(run(equalized, PIXELS)[1], logits, atol=1e-5 * logits.abs().max())
    # the rescaled ranges are those that observers would now see; the input's and the logits' stay
    ranges = channel_ranges_of(equalized)
    observe(equalized, PIXELS)
    assert_ranges(equalized, ranges)
    for name in ACTIVATIONS:
        factor = factors[name].numpy() if name in factors else 1
        np.testing.assert_allclose(ranges[name], before[name] * factor, rtol=1e-6)


@pytest.mark.parametrize("name", ["second convolution", "everything"])
def test_equalization_of_a_dead_network_stays_finite(name):
    folded = observed(DEAD[name], PIXELS)
    _, int8 = script.quantize_network(folded, PIXELS.to(DEVICE), as_constants(default(), *METHODS))
    assert all(value.isfinite().all() for value in int8.state_dict().values())
    assert torch.allclose(run(int8, PIXELS)[1], run(folded, PIXELS)[1], rtol=0.01)


@pytest.mark.parametrize("changed", [(0, 0), (1, 0), (1, 1)])
@pytest.mark.parametrize("sign", [1, -1])
def test_check_unchanged_refuses_the_largest_change_beyond_its_tolerance(changed, sign, capsys):
    """A quarter of the largest logit, -4, is 1: exactly that much passes, and nothing larger, in any logit."""
    logits = torch.tensor([[3.0, -0.5], [-4.0, 2.0]])

    def check(change, tolerance=0.25):
        other = logits + 0.125
        other[changed] = logits[changed] + sign * change
        script.check_unchanged("folding", lambda pixels: logits, lambda pixels: other, PIXELS, tolerance)

    check(1)
    out = capsys.readouterr().out
    assert "folding" in out and " 1," in out and " 2 pictures" in out
    for change, tolerance in [(1.0001, 0.25), (1, 0.2499), (float("nan"), 0.25), (float("inf"), 0.25)]:
        with pytest.raises(script.InputError, match="folding changed a logit"):
            check(change, tolerance)


def test_check_unchanged_without_a_tolerance(calibrated):
    """Of networks: a loaded one must give the same logits to the last bit."""
    pixels, int8 = PIXELS.to(DEVICE), calibrated.cl_scale(as_constants(default()))
    script.check_unchanged("loading", int8, fresh(int8), pixels, 0)
    script.check_unchanged("folding", network(STATE), calibrated, pixels, script.ROUNDING)
    other = fresh(int8)
    other.fc2.bias[1] += 1
    with pytest.raises(script.InputError, match="loading changed a logit"):
        script.check_unchanged("loading", int8, other, pixels, 0)


def optimal_rounding(w, scale, hessian, low, high):
    """GPTQ without its factorization: round one input, solve for the best values of all that follow."""
    damped = hessian + 0.01 * hessian.diagonal().mean() * np.eye(len(hessian))
    w, out = w.copy(), np.zeros(w.shape, int)
    for k in range(w.shape[1]):
        out[:, k] = np.clip(np.rint(w[:, k] * scale), low, high)
        error = w[:, k] - out[:, k] / scale
        if k + 1 < w.shape[1]:      # min over d of (d, -error) damped (d, -error)': d = error * H_kr H_rr^-1
            rest = slice(k + 1, None)
            # torch's solver: NumPy's takes ten times as long where other programs hold the cores
            share = torch.linalg.solve(torch.from_numpy(damped[rest, rest]), torch.from_numpy(damped[rest, k]))
            w[:, rest] += error[:, None] * share.numpy()
    return out


@pytest.mark.parametrize("bit", [3, 8])
def test_gptq_is_optimal_input_by_input(bit):
    rng = np.random.default_rng(5)
    x = rng.normal(size=(20, 400)).cumsum(0) + 3                    # inputs that are alike
    w, integers = rng.normal(size=(6, 20)), script.int_range(bit)
    scale, hessian = integers.high / np.abs(w).max(1), x @ x.T
    found = script.gptq(torch.from_numpy(w), torch.from_numpy(scale), torch.from_numpy(hessian), integers)
    assert found.dtype == torch.int8
    np.testing.assert_array_equal(found, optimal_rounding(w, scale, hessian, integers.low, integers.high))
    nearest = np.clip(np.rint(w * scale[:, None]), integers.low, integers.high)
    error = [np.square((w - q / scale[:, None]) @ x).sum() for q in (found.numpy(), nearest)]
    assert error[0] < 0.4 * error[1]


def hessian_of_patches(q, kernel):
    """Sums of products of the inputs of a convolution, over every sixth position of both axes."""
    windows = np.lib.stride_tricks.sliding_window_view(q.astype(np.float64), (kernel, kernel), axis=(2, 3))
    patches = windows[:, :, ::6, ::6].transpose(1, 4, 5, 0, 2, 3).reshape(q.shape[1] * kernel**2, -1)
    return patches @ patches.T


def assert_refined(recipe, methods, weights, fp32, before, int8):
    """Layer by layer, `refine` did what its two methods say, with inputs from the refined INT8 layers before.

    weights, fp32: {layer: (weight, bias)} and {activation: values} of the FP32 network; before: the first integers.
    """
    scales, after = scales_of(int8), integers_of(int8)
    inputs, totals, _ = oracle.int8_pass(recipe, SIX.numpy(), scales, after)
    for layer, bn, source, name in oracle.LAYERS:
        largest = oracle.largest_weight(recipe, layer)
        (wq, bq, w_scale), (plain_wq, plain_bq, plain_scale) = after[layer], before[layer]
        np.testing.assert_array_equal(w_scale, plain_scale, err_msg=layer)
        if bn and "GPTQ" in methods:
            w, q = weights[layer][0], inputs[source] if source == "input" else oracle.pool(inputs[source])
            expected = optimal_rounding(w.reshape(len(w), -1).astype(np.float64),
                                        np.broadcast_to(w_scale, len(w)).astype(np.float64),
                                        hessian_of_patches(q, w.shape[2]), -largest, largest)
            same = (wq.reshape(len(w), -1) == expected).mean()
            assert same > 0.999, (layer, same)          # the script's Hessian is summed in FP32: ties may differ
            assert (wq != plain_wq).mean() > 0.05
            assert np.abs(wq).max() == largest, layer           # no further, though the errors made up for push there
        else:
            np.testing.assert_array_equal(wq, plain_wq, err_msg=layer)
        moved = bq - plain_bq
        if "BIAS_CORRECTION" in methods:
            unit = (scales[source] * w_scale).astype(np.float64)
            sums = totals[name] - oracle.per_channel(moved, totals[name])
            output = np.maximum(sums, 0) if bn else sums
            axes = (0, 2, 3) if bn else 0
            gap = (fp32[name].mean(axes) - output.mean(axes) / unit) * unit
            # rounded to a whole number, and FP32's means are a little off
            np.testing.assert_allclose(moved, gap, rtol=0, atol=0.55, err_msg=layer)
            assert (moved != 0).any(), layer
        else:
            np.testing.assert_array_equal(moved, 0, err_msg=layer)


REFINED = [(default(), ["GPTQ"]), (MIXED, ["GPTQ"]), (default(8, 2), ["GPTQ"]), (default(), ["BIAS_CORRECTION"]),
           (default(4), ["BIAS_CORRECTION"]), (notebook()._replace(bias_bit=32), ["GPTQ", "BIAS_CORRECTION"])]


@pytest.fixture(scope="module")
def six():
    """A folded network that has seen SIX, and the oracle's FP32 forward of them. Shared: no test changes it."""
    return SimpleNamespace(folded=observed(STATE, SIX), activations=oracle.forward(STATE, SIX.numpy()))


@pytest.mark.parametrize("recipe, methods", REFINED, ids=[f"{case_name(r)}-{'-'.join(m)}" for r, m in REFINED])
def test_refining_is_what_both_methods_say(recipe, methods, six):
    folded, original = six.folded, state_of(six.folded)
    int8 = folded.cl_scale(as_constants(recipe, *methods))
    before = {name: tuple(value.copy() for value in values) for name, values in integers_of(int8).items()}
    rough = run(int8, SIX)[1]
    assert script.refine(int8, folded, SIX.to(DEVICE)) is None
    assert script.CHUNK < len(SIX) < 2 * script.CHUNK
    assert_same_state(folded, original)
    assert_refined(recipe, methods, weights_of(folded), six.activations, before, int8)
    fine = run(int8, SIX)[1]                                    # prepared anew, though it has run before
    assert torch.equal(fine, run(fresh(int8), SIX)[1]) and not torch.equal(fine, rough)
    if recipe.bit == 4:     # there the logits' mean error is large enough to be seen to go
        wrong = [np.abs((logits.numpy() - six.activations["fc2"]).mean(0)).max() for logits in (rough, fine)]
        assert wrong[1] < 0.2 * wrong[0]


def test_from_fp32_weights_to_refined_integers(six):
    """The default recipe against the oracle alone: equalization, scales, rounding, refining, and the INT8 pass."""
    recipe = default()
    weights, ranges = weights_of(six.folded), oracle.ranges(six.activations)
    weights = {name: (w.astype(np.float64), b.astype(np.float64)) for name, (w, b) in weights.items()}
    fp32 = dict(six.activations)
    for (layer, _, _, name), (reader, *_) in zip(oracle.LAYERS, oracle.LAYERS[1:]):
        factors = oracle.equalizing_factors(ranges[name])
        ranges[name] = ranges[name] * factors
        fp32[name] = fp32[name] * oracle.per_channel(factors, fp32[name])
        (w, b), (read, read_b) = weights[layer], weights[reader]
        weights[layer] = w * factors.reshape(-1, *[1] * (w.ndim - 1)), b * factors
        divisor = factors.repeat(read.shape[1] // len(factors)) if read.ndim == 2 else factors[:, None, None]
        weights[reader] = read / divisor, read_b
    fp32_model, int8 = script.quantize_network(six.folded, SIX.to(DEVICE), as_constants(recipe, *METHODS))
    for name, (w, b) in weights_of(fp32_model).items():
        np.testing.assert_allclose(w, weights[name][0], rtol=1e-5, err_msg=name)
        np.testing.assert_allclose(b, weights[name][1], rtol=1e-5, err_msg=name)
    scales = oracle.scales(recipe, {name: largest.max() for name, largest in ranges.items()})
    assert scales_of(int8) == {name: pytest.approx(scale, rel=1e-5) for name, scale in scales.items()}
    # where a weight lies at a tie FP32's last digit decides, so what is rounded from here on has the script's
    before = {name: oracle.mended_weights(w, b, scales_of(int8)[source], recipe, name)
              for (name, (w, b)), (_, _, source, _) in zip(weights_of(fp32_model).items(), oracle.LAYERS)}
    assert_refined(recipe, METHODS, weights_of(fp32_model), fp32, before, int8)
    assert_same_pass(recipe, int8, torch.cat([MANY[:2], plain(0), plain(255)]))


def test_bias_correction_stays_in_bias_bit():
    folded, int8 = before_refining(STATE, default(3)._replace(bias_bit=6), *METHODS)
    script.refine(int8, folded, PIXELS.to(DEVICE))
    assert max(np.abs(bias).max() for _, bias, _ in integers_of(int8).values()) == 31


def test_bias_correction_is_clipped_to_the_integers_that_fp32_cannot_hold():
    """A move beyond int32 ends at its limit, not on the other side."""
    folded, int8 = before_refining(STATE, default(), "BIAS_CORRECTION")
    folded.fc2.bias.data.copy_(torch.tensor([1e15, -1e15]))
    script.refine(int8, folded, PIXELS.to(DEVICE))
    assert integers_of(int8)["fc2"][1].tolist() == [2**31 - 1, 1 - 2**31]


def test_refining_where_fp32_overflows():
    """Means beyond FP32 move no bias; every integer stays one that a checkpoint may hold."""
    state = {**STATE, "fc1.weight": STATE["fc1.weight"] * np.float32(3e36)}
    folded, int8 = before_refining(state, default(), *METHODS)
    for x in (folded.fc2.weight, folded.fc1.bias):
        x.data.fill_(3e38)
    before = integers_of(int8)["fc2"][1].copy()
    assert not run(folded, PIXELS)[1].isfinite().any()
    script.refine(int8, folded, PIXELS.to(DEVICE))
    np.testing.assert_array_equal(integers_of(int8)["fc2"][1], before)
    assert all(np.abs(bias.astype(np.int64)).max() < 2**31 for _, bias, _ in integers_of(int8).values())


@pytest.mark.parametrize("methods", [METHODS, METHODS[1:], METHODS[:1], ()], ids="-".join)
def test_quantize_network_does_what_the_recipe_names(methods):
    folded, recipe = observed(STATE, PIXELS), as_constants(default(), *methods)
    logits, before, pixels = run(folded, PIXELS)[1], state_of(folded), PIXELS.clone()
    fp32_model, int8 = script.quantize_network(folded, pixels.to(DEVICE), recipe)
    assert_same_state(folded, before)                                           # as it was, bit for bit
    assert torch.equal(run(folded, PIXELS)[1], logits) and torch.equal(pixels, PIXELS)
    assert recipe == int8.recipe == as_constants(default(), *methods)
    assert (fp32_model is folded) == ("EQUALIZE" not in methods)
    expected = script.equalize(folded)[0] if "EQUALIZE" in methods else folded
    assert_same_state(fp32_model, state_of(expected))
    integers = expected.cl_scale(recipe)
    plain_state = state_of(integers)
    script.refine(integers, expected, PIXELS.to(DEVICE))                        # does nothing where none is named
    assert_same_state(int8, state_of(integers))
    changed = {name for name, value in plain_state.items() if not torch.equal(value, int8.state_dict()[name])}
    convolutions, biases = {f"cnn{i}.weight" for i in range(1, 5)}, {f"{layer.name}.bias" for layer in LAYERS}
    assert changed == (convolutions | biases if "GPTQ" in methods else set())
    with constants(notebook(4)):                                                # twice gives the same twice
        fp32_again, again = script.quantize_network(folded, pixels.to(DEVICE), recipe)
    assert_same_state(fp32_again, state_of(fp32_model))
    assert_same_state(again, state_of(int8))
    assert_same_state(folded, before)
