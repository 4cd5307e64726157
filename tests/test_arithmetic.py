"""The arithmetic of quantize_catdog.py against tests/oracle.py: observers, folding, scales, integers, INT8 pass.

Equal means equal: scales, weights, biases and each layer's integers have no tolerance. Figures of the FP32
network have one, since torch sums in another order than NumPy.
"""
import copy
import doctest
import io
import pickle
import re
import runpy
import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest
import quantize_catdog as script
import torch

import oracle
from helpers import (
    ACTIVATIONS,
    DEVICE,
    EVERY_LAYER,
    KERNELS,
    LAYERS,
    LONE_IS_EXACT,
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
    with_kernel,
)

ENGINES = {"reference": [], "kernel": EVERY_LAYER} if KERNELS else {"reference": []}     # layers with kernels
MIXED = default()._replace(layer_bits={"cnn2": 2, "cnn4": 3, "fc1": 4})        # the others have 8
NOTEBOOKS = [*[notebook(bit) for bit in range(2, 9)], notebook(8, 4), notebook(4, 8)]
CASES = [*[default(bit) for bit in range(2, 9)], default(8, 4), default(8, 7), default(4, 8), *NOTEBOOKS]
CASES += [MIXED, default(8, 4)._replace(layer_bits={"cnn1": 8, "fc2": 8}), notebook()._replace(layer_bits={"fc1": 4})]
CASES += [default()._replace(**{name: value}) for name, value in [      # one change each
    ("per_channel", False), ("unsigned", False), ("bias_bit", 6), ("quantize_logits", True), ("headroom", 1.5)]]
BOTH = pytest.mark.parametrize("recipe", [default(), notebook()], ids=case_name)

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
    found, logits = run(int8.prepare(), pixels)
    assert list(found) == ACTIVATIONS
    for name in expected:
        np.testing.assert_array_equal(found[name].numpy(), expected[name], err_msg=name)
    np.testing.assert_allclose(logits, expected_logits, rtol=1e-6, atol=1e-6 * np.abs(expected_logits).max())
    if KERNELS:
        fast, fast_logits = run(int8.prepare(EVERY_LAYER), pixels)
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

def test_doctests():
    found = doctest.DocTestFinder().find(script)
    assert {test.name.split(".")[1]: len(test.examples) for test in found if test.examples} == {
        "quantize": 1, "requantize": 1, "fusion_conv_bn": 3, "weight_quant": 2}
    assert doctest.testmod(script) == (0, 7)            # failed, attempted

def test_constants_are_the_default_recipe(monkeypatch):
    assert script.read_constants(script.LEGAL_RECIPE) == as_constants(default(), *METHODS)
    for recipe in (notebook(5, 3), MIXED):
        for name, value in as_constants(recipe).items():
            monkeypatch.setattr(script, name, copy.copy(value))
        found = script.read_constants(script.LEGAL_RECIPE)
        assert found == as_constants(recipe)
        found["LAYER_BITS"]["fc2"] = 2                  # of a copy: the constant stays
        assert script.LAYER_BITS == recipe.layer_bits

@pytest.mark.parametrize("cores, threads", [(None, 1), (2, 2), (64, 16)])
def test_threads_are_at_most_sixteen(monkeypatch, cores, threads):
    monkeypatch.setattr("os.cpu_count", lambda: cores)
    assert runpy.run_path(str(SCRIPT))["NUM_WORKERS"] == threads

# Arithmetic

def test_scales_and_integers_of_single_values():
    """Halves are rounded to even, larger values are clipped, and ranges of nearly 0 count as 1e-12."""
    x = torch.tensor([-200.0, -127.4, -1.5, -0.5, 0.49, 0.5, 1.5, 2.5, 126.5, 128.0, 1e9])
    for integers, expected in [(script.int_range(8), [-127, -127, -2, 0, 0, 0, 2, 2, 126, 127, 127]),
                               (script.int_range(8, unsigned=True), [0, 0, 0, 0, 0, 0, 2, 2, 126, 128, 255])]:
        q = script.quantize(x, torch.tensor(1.0), integers)
        assert q.tolist() == expected and q.dtype == integers.dtype
    scales = script.scale_of(255, torch.tensor([-0.0, 0.0, 1e-40, 1e-13]))
    assert scales.tolist() == pytest.approx([255e12] * 4, rel=1e-6)

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
def test_max_pool_is_torchs(dtype):
    for height, width in [(4, 6), (5, 6), (4, 7), (7, 5), (2, 2), (3, 3)]:
        x = torch.randint(torch.iinfo(dtype).min, torch.iinfo(dtype).max + 1, (2, 3, height, width), dtype=dtype)
        pooled = script.maxpool(x)
        assert pooled.dtype == dtype and torch.equal(pooled.float(), torch.nn.MaxPool2d(2)(x.float()))

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
    observe(unfolded, PIXELS)
    for quantize in (unfolded.cl_scale, lambda recipe: script.quantize_network(unfolded, PIXELS.to(DEVICE), recipe)):
        with pytest.raises(script.InputError, match="fold"):
            quantize(recipe)
    for names in ([], ["input"], ACTIVATIONS[:-1]):
        folded.ranges = {name: unfolded.ranges[name] for name in names}
        with pytest.raises(script.InputError, match="calibrate"):
            script.quantize_network(folded, PIXELS.to(DEVICE), recipe)

# Observers

def test_ranges(calibrated, expected):
    """The input's is 255 without pictures and whatever they reach: no scale of the input depends on them."""
    model = script.CNN_Model()
    assert model.ranges == {} and not [name for name in model.state_dict() if "range" in name]
    model.reset_ranges()
    assert {name: ranges.tolist() for name, ranges in model.ranges.items()} == {"input": [255]}
    for largest in (0, 230):
        model = observed(STATE, PIXELS.clip(max=largest))
        assert model.ranges["input"].tolist() == [255] * 3 and ranges_of(model)["fc2"] > 0
    assert_ranges(calibrated, oracle.ranges(expected))

def test_ranges_are_of_the_values_before_pooling_and_after_relu():
    # brighter towards the last row, positive weights: cv3's 51st row holds its largest value, and pooling drops it
    state = {name: np.abs(value) for name, value in STATE.items()}
    pixels = torch.arange(224, dtype=torch.uint8).reshape(1, 1, 224, 1).expand(1, 3, 224, 224)
    values = oracle.forward(state, pixels.numpy())
    assert values["cv3"].max() > 1.001 * oracle.pool(values["cv3"]).max()
    assert_ranges(observed(state, pixels), oracle.ranges(values))
    # everything negative before the first ReLU: nothing after it
    state = STATE | {"bn1.bias": np.full(16, -1e4, np.float32)}
    model = observed(state, PIXELS)
    assert ranges_of(model)["cv1"] == 0
    assert_ranges(model, oracle.ranges(oracle.forward(state, PIXELS.numpy())))

@pytest.mark.parametrize("shape, memory", [((2, 8), torch.contiguous_format), ((2, 8, 5, 7), torch.contiguous_format),
                                           ((2, 8, 5, 7), torch.channels_last)])
def test_observer_takes_the_largest_magnitude_of_each_channel(shape, memory):
    """In whichever picture and at whichever position it is, of whatever sign; the values go on as they are."""
    rng, model, largest = np.random.default_rng(6), script.CNN_Model(), np.zeros(8)
    for picture, channel, row, column, value in [(0, 0, 0, 0, 9), (1, 0, 4, 6, -8), (1, 7, 4, 0, -7), (0, 3, 2, 6, 5)]:
        data = rng.uniform(-1, 1, shape).astype(np.float32)
        data[(picture, channel, row, column)[:len(shape)]] = value
        found = torch.from_numpy(data.copy()).contiguous(memory_format=memory)
        assert model.update_range("cv4", found) is found and np.array_equal(found, data)
        largest = np.maximum(largest, np.abs(data).max((0, 2, 3)[:len(shape) - 1]))
        np.testing.assert_array_equal(model.ranges["cv4"], largest)
    assert largest[[0, 7, 3]].tolist() == [9, 7, 5] and list(model.ranges) == ["cv4"]

def test_observers_take_the_largest_of_all_batches(monkeypatch):
    monkeypatch.setattr(script, "BATCH_SIZE", 2)
    dim, bright, model = PIXELS // 4, PIXELS, network(STATE).fused()
    alone = [channel_ranges_of(observed(STATE, batch)) for batch in (dim, bright)]
    assert (alone[0]["cv1"] < alone[1]["cv1"]).any() and (alone[0]["fc2"] != alone[1]["fc2"]).any()
    both = {name: np.maximum(alone[0][name], alone[1][name]) for name in ACTIVATIONS}
    for order in [(dim, bright), (bright, dim), (bright, dim, dim)]:
        observe(model, *order)
        assert_ranges(model, both, rtol=0)
    observe(model, dim)                                 # and start anew
    assert_ranges(model, alone[0], rtol=0)

def test_only_calibration_observes():
    model = network(STATE).fused()
    logits, weights = run(model, PIXELS)[1], model.state_dict()
    before = copy.deepcopy(weights)
    assert model.ranges == {}
    found = script.calibrate(model, Pictures(torch.cat([PIXELS, PIXELS[:1]]), [1, 1, 1]))
    assert torch.equal(torch.cat([logits, logits[:1]]), found.logits)           # observing changes no logit
    assert found.labels.tolist() == [1, 1, 1] and found.files == ["cat.0.jpg", "cat.1.jpg", "cat.2.jpg"]
    assert found.top1 == pytest.approx(100 * (found.logits[:, 1] > found.logits[:, 0]).double().mean().item())
    assert torch.equal(found.classes, found.logits.argmax(1))
    assert list(model.ranges) == ACTIVATIONS and min(ranges_of(model).values()) > 0
    assert all(torch.equal(weights[name], value) for name, value in before.items())

# The same values in any batch

SIZES = [(224, 224), (212, 227), (227, 213), (219, 226)]    # height, width: odd and even rows at every convolution

@pytest.mark.parametrize("height, width, threads", [(*size, 1) for size in SIZES] + [(*SIZES[0], 2)])
def test_a_picture_has_the_same_values_to_the_last_bit_in_any_batch(height, width, threads, calibrated):
    rng = np.random.default_rng(7)
    pixels = torch.from_numpy(rng.integers(0, 256, (4, height, width, 3), np.uint8)).permute(0, 3, 1, 2)
    int8 = calibrated.cl_scale(as_constants(default()) | {"IMAGE_SIZE": (width, height)})
    torch.set_num_threads(threads)
    try:
        for model in (network(STATE), calibrated, *[fresh(int8).prepare(kernels) for kernels in ENGINES.values()]):
            values = values_of(model, pixels)
            for batch in (slice(1), slice(3, 4), slice(2), slice(1, 4)):
                if len(pixels[batch]) == 1 and not LONE_IS_EXACT and not isinstance(model, script.INT8_Model):
                    continue
                same = {name: value[batch] for name, value in values.items()}
                assert_same_values(values_of(model, pixels[batch]), same)
                if len(pixels[batch]) == 1:                                     # nor does the memory's order matter
                    assert_same_values(values_of(model, pixels[batch].contiguous()), same)
    finally:
        torch.set_num_threads(1)

# What `observe` sees and returns

@pytest.fixture(params=["FP32", "folded", *ENGINES])
def any_network(request, calibrated):
    """Each network whose forward takes `observe`."""
    if request.param == "FP32":
        return network(STATE)
    if request.param == "folded":
        return calibrated
    return calibrated.cl_scale(as_constants(default())).prepare(ENGINES[request.param])

@torch.no_grad()
@pytest.mark.parametrize("taken", ACTIVATIONS)
def test_what_observe_returns_goes_on(any_network, taken):
    """After the activation that is replaced by other pictures', all is these pictures'. Each is seen once, in order."""
    ours, theirs = PIXELS.to(DEVICE), 255 - PIXELS.to(DEVICE)
    our_values, their_values = script.activations_of(any_network, ours), script.activations_of(any_network, theirs)
    seen = []

    def replace(name, values):
        seen.append((name, values))
        return their_values[name] if name == taken else values

    logits = any_network(ours, replace)
    assert torch.equal(logits, any_network(theirs)) and not torch.equal(logits, any_network(ours))
    assert [name for name, _ in seen] == list(our_values) == ACTIVATIONS
    for index, (name, values) in enumerate(seen):
        assert torch.equal(values, (our_values if index <= ACTIVATIONS.index(taken) else their_values)[name]), name

# Scales and integers, for each recipe and its widths

def test_scales_weights_and_biases(case):
    assert case.scales == oracle.scales(case.recipe, case.ranges)
    for layer in LAYERS:
        weight_and_bias, in_scale = case.weights[layer.name], case.scales[layer.input]
        if case.recipe in NOTEBOOKS:
            formulas = oracle.notebook_weights(*weight_and_bias, in_scale, case.recipe.weight_bit)
        else:
            formulas = oracle.mended_weights(*weight_and_bias, in_scale, case.recipe, layer.name)
        for found, formula in zip(case.integers[layer.name], formulas, strict=True):
            np.testing.assert_array_equal(found, formula, err_msg=layer.name)

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
    for layer, row in zip(LAYERS, script.layer_table(case.int8), strict=True):
        bounds = oracle.largest_totals(case.recipe, layer.name, case.integers)
        np.testing.assert_array_equal(case.int8.get_submodule(layer.name).largest_sum().cpu(), bounds)
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
def test_int8_is_close_to_fp32(recipe, calibrated, expected):
    """The logits, and the share of the integers that headroom leaves to the inputs of the FC layers."""
    found, logits = run(calibrated.cl_scale(as_constants(recipe)), PIXELS)
    assert np.abs(logits.numpy() - expected["fc2"]).max() < 0.03 * np.abs(expected["fc2"]).max()
    assert found["cv4"].max() == pytest.approx(127.5 if recipe.unsigned else 127, abs=3)
    assert found["fc1"].abs().max() == pytest.approx(63.5 if recipe.unsigned else 127, abs=3)

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

# What an INT8_Model takes

def test_pixels_of_another_type_or_size_are_refused(calibrated):
    int8 = calibrated.cl_scale(as_constants(default()))
    for _ in range(2):
        for pixels in (PIXELS / 255, PIXELS.float(), PIXELS.char(), PIXELS[..., 1:], PIXELS[:, :, 1:], PIXELS[:, :1],
                       PIXELS[0], PIXELS.permute(0, 2, 3, 1)):
            with pytest.raises(script.InputError, match=r"uint8 .*\(n, 3, 224, 224\)"):
                int8(pixels.to(DEVICE))
        int8.prepare()
    oblong = calibrated.cl_scale(as_constants(default()) | {"IMAGE_SIZE": (227, 212)})      # width, height
    pixels = torch.zeros(2, 3, 212, 227, dtype=torch.uint8, device=DEVICE)
    assert oblong(pixels).shape == (2, 2)
    with pytest.raises(script.InputError, match=r"\(n, 3, 212, 227\)"):
        oblong(pixels.transpose(2, 3))

def test_editing_a_recipe_afterwards_changes_nothing(calibrated):
    recipe = copy.deepcopy(as_constants(MIXED))
    int8 = calibrated.cl_scale(recipe)
    recipe["LAYER_BITS"]["fc1"] = recipe["LAYER_BITS"]["cnn1"] = 2
    recipe |= {"BIT": 4, "UNSIGNED_RELU": False, "QUANTIZE_LOGITS": True, "IMAGE_SIZE": (212, 212)}
    assert int8.recipe == as_constants(MIXED)
    assert_same_pass(MIXED, int8, PIXELS)

# The engines

def fresh(int8):
    """Another network of the same integers, with no engine yet."""
    other = script.INT8_Model(int8.recipe).to(DEVICE)
    other.load_state_dict(int8.state_dict())
    return other

@pytest.mark.parametrize("kernels", ENGINES.values(), ids=ENGINES)
def test_prepared_again_a_network_runs_the_tensors_that_it_has_now(kernels, calibrated):
    int8 = calibrated.cl_scale(as_constants(default()._replace(quantize_logits=True)))
    assert not int8.is_prepared
    assert int8.prepare(kernels) is int8 and int8.is_prepared and with_kernel(int8) == kernels
    pixels, values = PIXELS[:1], values_of(int8, PIXELS[:1])
    for name, tensor in int8.named_buffers():
        before = tensor.clone()
        tensor.copy_(tensor * 0.8 if tensor.is_floating_point() else -tensor)
        changed = values_of(int8.prepare(kernels), pixels)
        assert_same_values(changed, values_of(fresh(int8).prepare(kernels), pixels))
        assert not torch.equal(changed["fc2"], values["fc2"]) or name == "scale_fc2", name
        tensor.copy_(before)
    assert_same_values(values_of(int8.prepare(kernels), pixels), values)

COPIES = {"copy": copy.copy, "deepcopy": copy.deepcopy, "pickle": lambda int8: pickle.loads(pickle.dumps(int8)),
          "checkpoint": lambda int8: script.load_int8_checkpoint(io.BytesIO(script.int8_checkpoint(int8)))}

@pytest.mark.parametrize("kernels", ENGINES.values(), ids=ENGINES)
@pytest.mark.parametrize("kind", COPIES)
def test_copies_have_no_engine_until_one_is_verified(kind, kernels, calibrated, monkeypatch):
    int8 = calibrated.cl_scale(as_constants(default())).prepare(kernels)
    values, logits = run(int8, PIXELS)
    other = COPIES[kind](int8)
    assert not other.is_prepared
    verified, choose_engines = [], script.choose_engines
    monkeypatch.setattr(script, "choose_engines", lambda model: verified.append(model) or choose_engines(model))
    found, found_logits = run(other, PIXELS)
    assert_same_values(found, values)
    assert torch.equal(found_logits, logits) and verified == [other] and other.is_prepared
    assert "cnn2" in with_kernel(other) or not KERNELS
    assert int8.is_prepared and torch.equal(run(int8, PIXELS)[1], logits) and verified == [other]
    if kind != "copy":                                                          # its layers are its own
        assert with_kernel(int8) == kernels
        other.fc1.weight.neg_()
        assert not torch.equal(values_of(other.prepare(kernels), PIXELS)["fc1"], values["fc1"])
        assert_same_values(values_of(int8.prepare(kernels), PIXELS), values)

@pytest.mark.parametrize("kind", COPIES)
def test_copies_have_no_kernel(kind, calibrated, monkeypatch):
    """They may be used on another CPU. A shallow copy has the layers themselves."""
    monkeypatch.setattr(script.INT8Layer, "pack_kernel", lambda layer: "a kernel")
    int8 = calibrated.cl_scale(as_constants(default())).prepare(EVERY_LAYER)
    assert with_kernel(COPIES[kind](int8)) == (EVERY_LAYER if kind == "copy" else [])
    assert with_kernel(int8) == EVERY_LAYER

def test_two_threads_on_a_fresh_network(calibrated, monkeypatch):
    """Both choose its engines: the second runs no layer with a kernel, here a wrong one, that the first only tries."""
    int8 = calibrated.cl_scale(as_constants(default()))
    logits, first = run(int8.prepare(), PIXELS)[1], []
    judge, prepare = script.judge_kernel, script.INT8_Model.prepare
    choosing, chosen, tried, answered = [threading.Event() for _ in range(4)]

    def judged(*arguments):
        if not first:
            first.append(threading.get_ident())
            choosing.set()
            chosen.wait(0.5)
        return judge(*arguments)

    def wrong(layer, x):
        if threading.get_ident() in first and not tried.is_set():
            tried.set()
            answered.wait(0.5)
        return layer.reference(x) + 1

    def prepared(*arguments):
        prepare(*arguments)
        chosen.set()
        tried.wait(0.5)

    monkeypatch.setattr(script.INT8Layer, "pack_kernel", lambda layer: "a kernel")
    monkeypatch.setattr(script.INT8Layer, "run_kernel", wrong)
    monkeypatch.setattr(script.INT8_Model, "prepare", prepared)
    monkeypatch.setattr(script, "judge_kernel", judged)
    other = fresh(int8)
    with ThreadPoolExecutor(2) as pool:
        answers = [pool.submit(run, other, PIXELS)]
        assert choosing.wait(60)
        answers.append(pool.submit(run, other, PIXELS))
        answers[1].add_done_callback(lambda _: answered.set())
    assert [torch.equal(answer.result()[1], logits) for answer in answers] == [True, True]

def sums_of_pairs(layer, x, largest):
    """A layer's outputs where products are added in pairs that saturate, and the pairs without a limit."""
    weight = layer.weight.flatten(1).double()                                           # (out, K)
    inputs = torch.nn.functional.unfold(x.double(), layer.weight.shape[2:]) if layer.is_conv else x.double()[..., None]
    products = weight[None, :, :, None] * inputs[:, None]                               # (n, out, K, positions)
    products = torch.nn.functional.pad(products, (0, 0, 0, products.shape[2] % 2))
    sums = products.unflatten(2, (-1, 2)).sum(3).clip(-largest - 1, largest).sum(2)
    exact = layer.sums(x)
    return layer.rescale(sums.float().reshape(exact.shape))

@pytest.mark.parametrize("layer", LAYERS, ids=lambda layer: layer.name)
def test_kernels_that_add_pairs_in_16_bits_overflow(layer, calibrated, monkeypatch):
    """As x86 without VNNI does, in any single layer; 7-bit weights and signed activations stay below 2^15."""
    def overflows(**changes):
        int8 = calibrated.cl_scale(as_constants(default()._replace(**changes)))
        return script.kernel_overflows(int8.get_submodule(layer.name))

    assert not KERNELS or not overflows()                                               # this CPU's own
    monkeypatch.setattr(script.INT8Layer, "pack_kernel", lambda layer: None)
    monkeypatch.setattr(script.INT8Layer, "run_kernel", lambda layer, x: sums_of_pairs(layer, x, 2**15 - 1))
    assert overflows() is (layer.name != "fc2")                                        # whose inputs are signed
    assert overflows(weight_bit=7) is False and overflows(unsigned=False) is False
    monkeypatch.setattr(script.INT8Layer, "run_kernel", lambda layer, x: sums_of_pairs(layer, x, 2**31 - 1))
    assert overflows() is False

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
    found = run(int8.prepare(), PIXELS.repeat(4, 1, 1, 1))[0]
    assert torch.equal(found["cv4"].float().amax((0, 2, 3)), inputs.float())
    # sum and bias are each rounded to float32, which above 2^24 holds every second integer
    exact = sums.astype(np.float32) + (middle - sums).astype(np.float32)
    np.testing.assert_array_equal(found["fc1"], np.tile(exact, (8, 1)))
    largest = int8.fc1.largest_sum()
    np.testing.assert_array_equal(largest.cpu(), oracle.largest_totals(default(), "fc1", integers_of(int8)))
    assert int(largest.max()).bit_length() == 26

@pytest.mark.parametrize("layer, operation", [(LAYERS[0], "conv2d"), (LAYERS[4], "linear")])
def test_a_gpu_whose_products_are_not_whole(layer, operation, calibrated, monkeypatch):
    """A convolution that is computed by a transform gives sums a little off in FP64: they are rounded."""
    int8_layer = calibrated.cl_scale(as_constants(default())).prepare_layer(layer)
    x = torch.randint(0, 256, (2, *int8_layer.weight.shape[1:]), dtype=torch.uint8)
    expected = int8_layer.sums(x)
    int8_layer.fp32_is_exact, int8_layer.float_weight = False, int8_layer.float_weight.double()
    exact = getattr(script.F, operation)
    monkeypatch.setattr(script.F, operation, lambda *arguments: exact(*arguments) + 1e-3)
    assert torch.equal(int8_layer.sums(x), expected)

# Extreme pictures and weights

def plain(pixel):
    return torch.full((1, 3, 224, 224), pixel, dtype=torch.uint8)

def assert_close_to_fp32(folded, recipe, pixels, share=0.05):
    """INT8 logits within a share of the largest FP32 logit, hence finite; return the INT8 network."""
    int8 = folded.cl_scale(as_constants(recipe))
    for name, value in int8.state_dict().items():
        assert value.isfinite().all(), name
    fp32, found = run(folded, pixels)[1], run(int8, pixels)[1]
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
        for found, formula in zip(integers[layer.name], formulas, strict=True):
            np.testing.assert_array_equal(found, formula, err_msg=layer.name)
    if recipe.per_channel and name in ("second convolution", "everything"):
        _, int8 = script.quantize_network(folded, PIXELS[:1].to(DEVICE), as_constants(recipe, *METHODS))
        assert torch.allclose(run(int8, PIXELS[:1])[1], run(folded, PIXELS[:1])[1], rtol=0.01)

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

@pytest.mark.parametrize("name", ACTIVATIONS)
def test_ranges_that_overflow_are_refused(name, calibrated):
    """One channel's is enough. Headroom multiplies those of the FC layers' inputs, where twice 2e38 is too much."""
    def refused(value, headroom=1, logits=1):
        """The activation that is named, the first of them in order."""
        folded = copy.deepcopy(calibrated)
        for each, largest in {"fc2": logits, name: value}.items():
            folded.ranges[each] = torch.cat([folded.ranges[each][:-1], torch.tensor([largest], device=DEVICE)])
        try:
            return folded.cl_scale(as_constants(default()._replace(headroom=headroom))) and None
        except script.InputError as error:
            return re.fullmatch("activation (.*) overflows FP32: .*", str(error))[1]

    assert refused(np.inf) == refused(np.nan) == refused(np.inf, logits=np.inf) == name
    assert refused(2e38) is refused(2e38, headroom=1.5) is None
    assert refused(2e38, headroom=1.75) == refused(2e38, headroom=2) == (name if name in ("cv4", "fc1") else None)

@pytest.mark.parametrize("methods", [METHODS, METHODS[1:], ()])
@pytest.mark.parametrize("layer", [LAYERS[0], *LAYERS[3:]], ids=lambda layer: layer.name)
def test_weights_that_overflow_are_refused(layer, methods):
    """A network whose values overflow as it runs."""
    weight = f"{layer.name}.weight"
    folded = observed({**STATE, weight: STATE[weight] * np.float32(1e38)}, PIXELS)
    with pytest.raises(script.InputError, match=f"activation {layer.output} overflows FP32"):
        script.quantize_network(folded, PIXELS.to(DEVICE), as_constants(default(), *methods))

def test_biases_are_clipped_to_the_integer_that_fp32_cannot_hold():
    """Those that are quantized, and those that bias correction would move beyond int32."""
    recipe = as_constants(default()._replace(bias_bit=28))
    _, bias, w_scale = script.weight_quant(torch.full((2, 4), 1e-9), torch.tensor([0.5, -0.5]), 1, 8, recipe)
    assert bias.tolist() == [2**27 - 1, 1 - 2**27] and w_scale.tolist() == pytest.approx([127e9] * 2)
    folded = observed(STATE, PIXELS)
    int8 = folded.cl_scale(as_constants(default(), "BIAS_CORRECTION"))
    folded.fc2.bias.data.copy_(torch.tensor([1e15, -1e15]))
    script.refine(int8, folded, PIXELS.to(DEVICE))
    assert integers_of(int8)["fc2"][1].tolist() == [2**31 - 1, 1 - 2**31]
    folded = observed(STATE, PIXELS)                    # and that stays in BIAS_BIT
    recipe = as_constants(default(3)._replace(bias_bit=6), *METHODS)
    int8 = script.quantize_network(folded, PIXELS.to(DEVICE), recipe)[1]
    assert max(np.abs(bias).max() for _, bias, _ in integers_of(int8).values()) == 31

# Closer to FP32

SIX = MANY[:6]                      # two chunks, the second smaller

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

@pytest.mark.parametrize("changed", [(0, 0), (1, 0), (1, 1)])
@pytest.mark.parametrize("sign", [1, -1])
def test_check_unchanged(changed, sign, capsys):
    """It takes the largest change of any logit. A quarter of the largest logit, -4, is 1: more is refused."""
    logits = torch.tensor([[3.0, -0.5], [-4.0, 2.0]])

    def check(change, tolerance=0.25, others=0.125):
        other = logits + others
        other[changed] = logits[changed] + sign * change
        script.check_unchanged("folding", lambda pixels: logits, lambda pixels: other, PIXELS, tolerance)

    check(1)
    assert re.search("folding changed a logit by at most 1, .* 2 pictures", capsys.readouterr().out)
    check(0, 0, others=0)
    for change, tolerance in [(1.0001, 0.25), (1, 0.2499), (1e-6, 0), (float("nan"), 0.25), (float("inf"), 0.25)]:
        with pytest.raises(script.InputError, match="folding changed a logit"):
            check(change, tolerance, others=0)

@pytest.mark.parametrize("bit", [3, 8])
def test_gptq_is_optimal_input_by_input(bit):
    rng = np.random.default_rng(5)
    x = rng.normal(size=(20, 400)).cumsum(0) + 3                    # inputs that are alike
    w, integers = rng.normal(size=(6, 20)), script.int_range(bit)
    scale, hessian = integers.high / np.abs(w).max(1), x @ x.T
    found = script.gptq(torch.from_numpy(w), torch.from_numpy(scale), torch.from_numpy(hessian), integers)
    assert found.dtype == torch.int8
    np.testing.assert_array_equal(found, oracle.gptq(w, scale, hessian, integers.low, integers.high))
    nearest = np.clip(np.rint(w * scale[:, None]), integers.low, integers.high)
    error = [np.square((w - q / scale[:, None]) @ x).sum() for q in (found.numpy(), nearest)]
    assert error[0] < 0.4 * error[1]

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
            expected = oracle.gptq(w.reshape(len(w), -1).astype(np.float64),
                                   np.broadcast_to(w_scale, len(w)).astype(np.float64),
                                   oracle.hessian_of_patches(q, w.shape[2]), -largest, largest)
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
    weights, fp32 = oracle.equalized(weights_of(six.folded), six.activations)
    fp32_model, int8 = script.quantize_network(six.folded, SIX.to(DEVICE), as_constants(recipe, *METHODS))
    for name, (w, b) in weights_of(fp32_model).items():
        np.testing.assert_allclose(w, weights[name][0], rtol=1e-5, err_msg=name)
        np.testing.assert_allclose(b, weights[name][1], rtol=1e-5, err_msg=name)
    scales = oracle.scales(recipe, {name: largest.max() for name, largest in oracle.ranges(fp32).items()})
    assert scales_of(int8) == {name: pytest.approx(scale, rel=1e-5) for name, scale in scales.items()}
    # where a weight lies at a tie FP32's last digit decides, so what is rounded from here on has the script's
    before = {name: oracle.mended_weights(w, b, scales_of(int8)[source], recipe, name)
              for (name, (w, b)), (_, _, source, _) in zip(weights_of(fp32_model).items(), oracle.LAYERS)}
    assert_refined(recipe, METHODS, weights_of(fp32_model), fp32, before, int8)
    assert_same_pass(recipe, int8, torch.cat([MANY[:2], plain(0), plain(255)]))

def test_refining_where_fp32_overflows():
    """Means beyond FP32 move no bias; every integer stays one that a checkpoint may hold."""
    folded = observed({**STATE, "fc1.weight": STATE["fc1.weight"] * np.float32(3e36)}, PIXELS)
    int8 = folded.cl_scale(as_constants(default(), *METHODS))
    for x in (folded.fc2.weight, folded.fc1.bias):
        x.data.fill_(3e38)
    before = integers_of(int8)["fc2"][1].copy()
    assert not run(folded, PIXELS)[1].isfinite().any()
    script.refine(int8, folded, PIXELS.to(DEVICE))
    np.testing.assert_array_equal(integers_of(int8)["fc2"][1], before)
    assert all(np.abs(bias.astype(np.int64)).max() < 2**31 for _, bias, _ in integers_of(int8).values())

@pytest.mark.parametrize("methods", [METHODS, METHODS[1:], METHODS[:1], ()], ids="-".join)
def test_quantize_network_does_what_the_recipe_names(methods, monkeypatch):
    folded, recipe, pixels = observed(STATE, PIXELS), as_constants(default(), *methods), PIXELS.to(DEVICE)
    before = state_of(folded)
    fp32_model, int8 = script.quantize_network(folded, pixels, recipe)
    assert (fp32_model is folded) == ("EQUALIZE" not in methods)
    expected = script.equalize(folded)[0] if "EQUALIZE" in methods else folded
    assert_same_state(fp32_model, state_of(expected))
    integers = expected.cl_scale(recipe)
    rounded = state_of(integers)
    script.refine(integers, expected, pixels)                                   # does nothing where none is named
    assert_same_state(int8, state_of(integers))
    changed = {name for name, value in rounded.items() if not torch.equal(value, int8.state_dict()[name])}
    convolutions, biases = {f"cnn{i}.weight" for i in range(1, 5)}, {f"{layer.name}.bias" for layer in LAYERS}
    assert changed == (convolutions | biases if "GPTQ" in methods else set())
    for name, value in as_constants(notebook(4)).items():                       # the recipe counts, not the constants
        monkeypatch.setattr(script, name, value)
    fp32_again, again = script.quantize_network(folded, pixels, recipe)         # twice gives the same twice
    assert_same_state(fp32_again, state_of(fp32_model))
    assert_same_state(again, state_of(int8))
    assert_same_state(folded, before)                                           # all arguments are as they were
    assert recipe == int8.recipe == as_constants(default(), *methods) and torch.equal(pixels.cpu(), PIXELS)
