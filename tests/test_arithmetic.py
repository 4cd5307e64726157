"""The arithmetic of quantize_catdog.py against tests/oracle.py: observers, folding, scales, integers, INT8 pass.

Equal means equal: scales, weights, biases and each layer's integers have no tolerance. Figures of the FP32
network have one, since torch sums in another order than NumPy.
"""
import importlib.util
import sys
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import oracle
import pytest
import torch

import quantize_catdog as script

SCRIPT = Path(__file__).resolve().parent.parent / "quantize_catdog.py"


def import_script(path):
    spec = importlib.util.spec_from_file_location("quantize_catdog", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


LAYERS, PLACES, DEVICE = script.LAYERS, script.PLACES, script.DEVICE
KERNELS = DEVICE.type == "cpu" and torch.cpu._is_vnni_supported()      # where the INT8 kernels must be exact


def default(bit=8):
    return oracle.Recipe(bit, per_channel=True, unsigned=True, bias_bit=32, quantize_logits=False, headroom=2)


def notebook(bit=8):
    """The notebook's recipe; its biases have twice as many bits as its weights."""
    return oracle.Recipe(bit, per_channel=False, unsigned=False, bias_bit=2 * bit, quantize_logits=True, headroom=1)


CASES = [recipe(bit) for recipe in (default, notebook) for bit in range(2, 9)]


def case_name(recipe):
    return f"{'default' if recipe.per_channel else 'notebook'}-{recipe.bit}"


@contextmanager
def constants(recipe):
    """The script with this recipe in its constants."""
    with pytest.MonkeyPatch.context() as patch:
        for field in recipe._fields:
            patch.setattr(script, {"unsigned": "UNSIGNED_RELU"}.get(field, field.upper()), getattr(recipe, field))
        yield


# Networks and pictures

def random_state(seed=0):
    """Weights and batch-norm statistics of a size that training leaves, with the awkward cases among them."""
    rng = np.random.default_rng(seed)
    state = {}
    shapes = {"cnn1": (16, 3, 5, 5), "cnn2": (32, 16, 5, 5), "cnn3": (16, 32, 3, 3), "cnn4": (8, 16, 3, 3),
              "fc1": (512, 968), "fc2": (2, 512)}
    for layer, bn, _, _ in oracle.LAYERS:
        out, inputs = shapes[layer][0], np.prod(shapes[layer][1:])
        state[f"{layer}.weight"] = rng.normal(0, (2 / inputs)**0.5, shapes[layer])
        state[f"{layer}.bias"] = rng.normal(0, 0.2, out)
        if bn:
            state[f"{bn}.weight"] = rng.uniform(0.3, 1.5, out)
            state[f"{bn}.bias"] = rng.normal(0, 0.4, out)
            state[f"{bn}.running_mean"] = rng.normal(0, 0.3, out)
            state[f"{bn}.running_var"] = rng.uniform(0.2, 2, out)
            state[f"{bn}.weight"][1] *= -1          # a channel turned over
            state[f"{bn}.running_var"][2] = 0       # eps alone keeps this one finite ...
            state[f"{bn}.weight"][2] *= 1e-3        # ... and of ordinary size
    state["cnn1.weight"] /= 64                      # the network takes raw pixels
    return {name: value.astype(np.float32) for name, value in state.items()}


def random_pixels(n=2, seed=1):
    """uint8 (n, 3, 224, 224), channels-last in memory as the script's own batches; coarse shapes and noise."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (n, 14, 14, 3)).repeat(16, 1).repeat(16, 2)
    pixels = np.clip(coarse + rng.normal(0, 30, coarse.shape), 0, 255).astype(np.uint8)
    return torch.from_numpy(pixels).permute(0, 3, 1, 2)


def network(state):
    model = script.CNN_Model()
    model.load_state_dict({name: torch.from_numpy(value) for name, value in state.items()}, strict=False)
    return model.to(DEVICE).eval().to(memory_format=torch.channels_last)


@torch.no_grad()
def run(model, pixels):
    """({place: values}, logits) of an FP32 or INT8 model."""
    pixels = pixels.to(DEVICE)
    return {place: values.cpu() for place, values in model.activations(pixels)}, model(pixels).cpu()


@torch.no_grad()
def observe(model, *batches):
    """Show pictures to the observers and return the logits of the last batch."""
    model.observe(sum(map(len, batches)))
    for pixels in batches:
        logits = model(pixels.to(DEVICE)).cpu()
    model.observing = False
    return logits


def ranges_of(model):
    return {place: getattr(model, f"range_{place}").max().item() for place in PLACES}


def scales_of(model):
    return {place: getattr(model, f"scale_{place}").cpu().numpy() for place in PLACES}


def integers_of(model):
    parts = {layer.name: getattr(model, layer.name) for layer in LAYERS}
    return {name: (part.weight.cpu().numpy(), part.bias.cpu().numpy(), part.w_scale.cpu().numpy())
            for name, part in parts.items()}


def fused_weights(model):
    parts = {layer.name: getattr(model.fused(), layer.name) for layer in LAYERS}
    return {name: (part.weight.detach().cpu().numpy(), part.bias.detach().cpu().numpy())
            for name, part in parts.items()}


def assert_same_pass(recipe, int8, pixels):
    """Hold every layer's integers, and the logits, of both executors to the oracle's; return what was computed."""
    expected, totals, expected_logits = oracle.int8_pass(recipe, pixels.numpy(), scales_of(int8), integers_of(int8))
    places, logits = run(int8, pixels)
    assert list(places) == PLACES
    for place in expected:
        np.testing.assert_array_equal(places[place].numpy(), expected[place], err_msg=place)
    np.testing.assert_allclose(logits, expected_logits, rtol=1e-6, atol=1e-6 * np.abs(expected_logits).max())
    if KERNELS:
        int8.use_kernels()
        for place, values in run(int8, pixels)[0].items():
            assert values.dtype == places[place].dtype
            np.testing.assert_array_equal(values, places[place], err_msg=f"onednn, {place}")    # logits to the last bit
        int8.engine = "reference"
    return SimpleNamespace(places=places, logits=logits, totals=totals)


STATE = random_state()
PIXELS = random_pixels()


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """A second thread gains little on so few pictures, and costs minutes where other programs hold its core."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def calibrated():
    """A network whose observers have seen the pictures. Shared: no test changes it."""
    model = network(STATE)
    observe(model, PIXELS)
    return model


@pytest.fixture(scope="module")
def expected():
    """The oracle's FP32 forward of the same."""
    return oracle.forward(STATE, PIXELS.numpy())


@pytest.fixture(scope="module", params=CASES, ids=case_name)
def case(request, calibrated):
    """One recipe and bit width: the quantized network and both INT8 passes.

    All is computed here, with the recipe in the constants; other tests find the defaults again.
    """
    recipe = request.param
    with constants(recipe):
        int8 = calibrated.fused().cl_scale()
        both = assert_same_pass(recipe, int8, PIXELS)
        bits = {layer.name: int8.accumulator_bits(layer) for layer in LAYERS}
    return SimpleNamespace(recipe=recipe, int8=int8, scales=scales_of(int8), integers=integers_of(int8), bits=bits,
                           weights=fused_weights(calibrated), ranges=ranges_of(calibrated), **vars(both))


# The script

def test_importing_runs_nothing(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    copy = tmp_path / SCRIPT.name
    copy.write_bytes(SCRIPT.read_bytes())
    import_script(copy)                                 # a run would end here: no pictures, no checkpoint
    assert [path.name for path in tmp_path.iterdir()] == [SCRIPT.name]
    assert capfd.readouterr() == ("", "")


def test_constants_are_the_default_recipe():
    assert (script.BIT, script.PER_CHANNEL, script.UNSIGNED_RELU, script.BIAS_BIT, script.QUANTIZE_LOGITS,
            script.HEADROOM) == default()
    assert script.EQUALIZE and script.GPTQ and script.BIAS_CORRECTION


def test_layers_are_the_oracles():
    assert [(layer.name, layer.bn, layer.source, layer.place) for layer in LAYERS] == oracle.LAYERS
    assert PLACES == oracle.PLACES


# Arithmetic

@pytest.mark.parametrize("bit", range(2, 9))
def test_int_range(bit):
    half = 2**(bit - 1) - 1
    assert tuple(script.int_range(bit)) == (-half, half, torch.int8)
    assert tuple(script.int_range(bit, unsigned=True)) == (0, 2**bit - 1, torch.uint8)


def test_quantize_rounds_halves_to_even_and_clips():
    to = script.int_range(8)
    x = torch.tensor([-200.0, -127.4, -1.5, -0.5, 0.49, 0.5, 1.5, 2.5, 126.5, 128.0, 1e9])
    assert script.quantize(x, torch.tensor(1.0), to).tolist() == [-127, -127, -2, 0, 0, 0, 2, 2, 126, 127, 127]
    assert script.quantize(x, torch.tensor(1.0), script.int_range(8, unsigned=True)).tolist() == [
        0, 0, 0, 0, 0, 0, 2, 2, 126, 128, 255]


def test_requantize_rounds_product_and_sum_separately():
    # among a million values some lie at a tie, where (sums + bias) * multiplier would round to the other side
    rng = np.random.default_rng(2)
    sums, bias = rng.integers(-2**22, 2**22, 10**6), rng.integers(-2**22, 2**22, 10**6)
    multiplier = rng.uniform(1e-5, 3e-5, 10**6).astype(np.float32)
    real = np.rint(sums.astype(np.float32) * multiplier + bias.astype(np.float32) * multiplier)
    assert (real != np.rint((sums + bias).astype(np.float32) * multiplier)).any()
    for low in (-127, 0):                               # 0: a ReLU
        found = script.requantize(torch.from_numpy(sums).float(), torch.from_numpy(bias).int(),
                                  torch.from_numpy(multiplier), script.int_range(8)._replace(low=low))
        assert found.dtype == torch.int8
        np.testing.assert_array_equal(found, np.clip(real, low, 127))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8])
@pytest.mark.parametrize("height, width", [(4, 6), (5, 6), (4, 7), (7, 5), (2, 2), (3, 3)])
def test_max_pool_is_torchs(dtype, height, width):
    x = torch.randint(torch.iinfo(dtype).min, torch.iinfo(dtype).max + 1, (2, 3, height, width), dtype=dtype)
    pooled = script.MaxPool2d(2)(x)
    assert pooled.dtype == dtype
    assert torch.equal(pooled.float(), torch.nn.MaxPool2d(2)(x.float()))


# FP32 network and observers

def test_fp32_network(calibrated, expected):
    places, logits = run(calibrated, PIXELS)
    assert list(places) == PLACES
    for place, values in expected.items():
        np.testing.assert_allclose(places[place], values, rtol=0, atol=1e-5 * np.abs(values).max(), err_msg=place)
    np.testing.assert_array_equal(logits, places["fc2"])


def test_ranges(calibrated, expected):
    assert ranges_of(calibrated) == pytest.approx(oracle.ranges(expected), rel=1e-5)


def test_ranges_start_at_zero():
    assert set(ranges_of(script.CNN_Model()).values()) == {0.0}


def test_range_is_of_the_values_before_pooling():
    # brighter towards the last row, positive weights: cv3's 51st row holds its largest value, and pooling drops it
    state = {name: np.abs(value) for name, value in STATE.items()}
    pixels = torch.arange(224, dtype=torch.uint8).reshape(1, 1, 224, 1).expand(1, 3, 224, 224)
    places = oracle.forward(state, pixels.numpy())
    assert places["cv3"].max() > 1.001 * oracle.pool(places["cv3"]).max()
    model = network(state)
    observe(model, pixels)
    assert ranges_of(model) == pytest.approx(oracle.ranges(places), rel=1e-5)


def test_range_is_of_the_values_after_relu():
    # everything negative before the first ReLU: nothing behind it
    state = {**STATE, "bn1.bias": np.full(16, -1e4, np.float32)}
    model = network(state)
    observe(model, PIXELS)
    assert ranges_of(model)["cv1"] == 0
    assert ranges_of(model) == pytest.approx(oracle.ranges(oracle.forward(state, PIXELS.numpy())), rel=1e-5)


def test_observer_takes_magnitudes():
    model = script.CNN_Model()
    model.observe(1)
    for values, largest in [([-5.0, 2.0], 5.0), ([4.0, -4.5], 5.0), ([0.0, 6.0], 6.0)]:
        model.update_range("fc2", torch.tensor([values]))
        assert model.range_fc2.max().item() == largest
    assert model.range_fc1.max().item() == 0


def test_observers_keep_the_largest_of_all_batches():
    dim, bright = PIXELS // 4, PIXELS
    alone = []
    for batch in (dim, bright):
        model = network(STATE)
        observe(model, batch)
        alone.append(ranges_of(model))
    assert alone[0]["input"] < alone[1]["input"] and alone[0]["cv4"] != alone[1]["cv4"]
    both = {place: max(alone[0][place], alone[1][place]) for place in PLACES}
    model = network(STATE)
    for order in [(dim, bright), (bright, dim), (bright, dim, dim)]:
        observe(model, *order)
        assert ranges_of(model) == both
    observe(model, dim)                                 # and start anew
    assert ranges_of(model) == alone[0]


def test_observers_are_off_outside_calibration(calibrated):
    model = network(STATE)
    logits = run(model, PIXELS)[1]
    assert set(ranges_of(model).values()) == {0.0}
    assert torch.equal(logits, observe(model, PIXELS))  # and observing changes no logit


# Folding

def test_folding_weights(calibrated):
    # torch's square root is not NumPy's to the last digit, so nearly equal
    weights = fused_weights(calibrated)
    for layer, bn, _, _ in oracle.LAYERS:
        w, b = oracle.folded(STATE, layer, bn)
        np.testing.assert_allclose(weights[layer][0], w, rtol=1e-6, err_msg=layer)
        np.testing.assert_allclose(weights[layer][1], b, rtol=1e-6, atol=1e-6 * np.abs(b).max(), err_msg=layer)
        assert bn or np.array_equal(weights[layer][0], STATE[f"{layer}.weight"])


def test_folding_keeps_the_logits_and_the_model(calibrated, expected):
    before = {name: value.clone() for name, value in calibrated.state_dict().items()}
    places, _ = run(calibrated.fused(), PIXELS)
    for place, values in expected.items():
        np.testing.assert_allclose(places[place], values, rtol=0, atol=1e-5 * np.abs(values).max(), err_msg=place)
    assert all(torch.equal(before[name], value) for name, value in calibrated.state_dict().items())


def test_quantizing_before_folding_is_refused(calibrated):
    with pytest.raises(ValueError, match=r"fused\(\).cl_scale\(\)"):
        calibrated.cl_scale()


# Scales and integers, for each recipe and bit width

def test_scales(case):
    for place, scale in oracle.scales(case.recipe, case.ranges).items():
        assert case.scales[place] == scale, place
        largest = 2**case.recipe.bit - 1 if case.recipe.unsigned and place[:2] != "fc" else 2**(case.recipe.bit - 1) - 1
        room = case.recipe.headroom if place in ("cv4", "fc1") else 1
        assert case.ranges[place] * room * case.scales[place] == pytest.approx(largest, rel=1e-6)


def test_weights_and_biases(case):
    for layer in LAYERS:
        w, b = case.weights[layer.name]
        in_scale = case.scales[layer.source]
        wq, bq, w_scale = case.integers[layer.name]
        if not case.recipe.per_channel:
            formulas = oracle.notebook_weights(w, b, in_scale, case.recipe.bit)
        else:
            formulas = oracle.mended_weights(w, b, in_scale, case.recipe)
        assert w_scale.shape == ((len(w),) if case.recipe.per_channel else (1,))
        np.testing.assert_array_equal(w_scale, formulas[2], err_msg=layer.name)
        np.testing.assert_array_equal(wq, formulas[0], err_msg=layer.name)
        np.testing.assert_array_equal(bq, formulas[1], err_msg=layer.name)


def test_integers_stand_for_the_weights(case):
    """Without any formula: half a step away at most, and the largest integer is used."""
    for layer in LAYERS:
        w, b = case.weights[layer.name]
        wq, bq, w_scale = case.integers[layer.name]
        group = (len(w), -1) if case.recipe.per_channel else (1, -1)
        real = wq.reshape(group) / w_scale.reshape(-1, 1).astype(np.float64)
        assert (np.abs(real - w.reshape(group)) * w_scale.reshape(-1, 1)).max() < 0.5001
        assert (np.abs(wq).reshape(group).max(1) == 2**(case.recipe.bit - 1) - 1).all()
        steps = b * (w_scale.astype(np.float64) * case.scales[layer.source])
        largest = 2**(case.recipe.bias_bit - 1) - 1
        # a product of scales is an FP32 number, so a long bias is as long as those are precise
        assert (np.abs(bq - np.clip(steps, -largest, largest)) <= 0.5001 + 1e-6 * np.abs(steps)).all()


def test_dtypes(case):
    relu = torch.uint8 if case.recipe.unsigned else torch.int8
    places = case.places
    assert [places[place].dtype for place in PLACES[:5]] == [relu] * 5
    assert places["fc1"].dtype == torch.int8
    assert places["fc2"].dtype == (torch.int8 if case.recipe.quantize_logits else torch.float32)
    assert case.logits.dtype == torch.float32 and case.logits.shape == (len(PIXELS), 2)
    for layer in LAYERS:
        part = getattr(case.int8, layer.name)
        assert (part.weight.dtype, part.bias.dtype, part.w_scale.dtype) == (torch.int8, torch.int32, torch.float32)


# The INT8 pass. That every layer equals the oracle's is asserted where `case` is made.

def test_pixels_and_relu_are_never_negative_and_fc1_is(case):
    for place in PLACES[:5]:
        assert case.places[place].min() == 0, place
    assert case.places["input"].max() == oracle.limits(case.recipe, "input")[1]
    assert (case.places["fc1"] < 0).sum() > 10                      # a ReLU would leave none


def test_notebooks_requantization_differs_at_ties_alone(case):
    different = total = 0
    for layer in LAYERS:
        if case.places[layer.place].dtype == torch.float32:
            continue
        low, high = oracle.limits(case.recipe, layer.place)
        theirs = oracle.notebook_requantize(case.totals[layer.place], case.scales[layer.source], case.integers[
            layer.name][2], case.scales[layer.place], 0 if layer.bn else low, high)
        change = np.abs(theirs - case.places[layer.place].numpy())
        assert change.max() <= 1
        different, total = different + change.sum(), total + change.size
    assert different <= 1e-5 * total


def test_accumulator_bits(case):
    for layer in LAYERS:
        bound = oracle.largest_total(case.recipe, layer.name, case.integers)
        assert case.bits[layer.name] == bound.bit_length()
        assert np.abs(case.totals[layer.place]).max() <= bound


@pytest.mark.parametrize("recipe", [default(), notebook()], ids=case_name)
def test_int8_logits_are_close_to_fp32(recipe, calibrated, expected):
    with constants(recipe):
        logits = run(calibrated.fused().cl_scale(), PIXELS)[1].numpy()
    assert np.abs(logits - expected["fc2"]).max() < 0.03 * np.abs(expected["fc2"]).max()


def test_pixels_pass_unchanged(calibrated):
    """Raw pixels at scale 1 are integers already."""
    assert ranges_of(calibrated)["input"] == 255
    assert torch.equal(run(calibrated.fused().cl_scale(), PIXELS)[0]["input"], PIXELS)


def test_a_picture_alone_and_in_a_batch(calibrated):
    int8 = calibrated.fused().cl_scale()
    logits = run(int8, PIXELS)[1]
    for i in range(len(PIXELS)):
        assert torch.equal(run(int8, PIXELS[i:i + 1])[1], logits[i:i + 1])
    assert torch.equal(run(int8, PIXELS.contiguous())[1], logits)       # the memory's order does not matter either


def test_quantizing_leaves_the_fp32_network_and_gives_the_same_twice():
    checkpoint = {name: torch.from_numpy(value.copy()) for name, value in STATE.items()}
    model = network(STATE)
    model.load_state_dict(checkpoint, strict=False)
    logits = observe(model, PIXELS)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    first = model.fused().cl_scale()
    integers, outputs = {name: value.clone() for name, value in first.state_dict().items()}, run(first, PIXELS)[1]
    with constants(notebook(4)):
        model.fused().cl_scale()                                # another recipe in between changes nothing
    second = model.fused().cl_scale()
    for int8 in (first, second):
        assert all(torch.equal(integers[name], value) for name, value in int8.state_dict().items())
        assert torch.equal(run(int8, PIXELS)[1], outputs)
    after = model.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    assert torch.equal(run(model, PIXELS)[1], logits)
    assert all(np.array_equal(value, STATE[name]) for name, value in checkpoint.items())


# Sums too large for float32

def test_sums_beyond_24_bits_are_exact():
    """fc1 with large inputs and weights of one sign. Its scales are set so that the sums' last digits are seen."""
    rng = np.random.default_rng(3)
    int8 = observed(STATE).fused().cl_scale()
    inputs = torch.tensor([255, 253, 251, 254, 255, 249, 247, 253])     # cnn4 gives these, whatever it is shown
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
    places = run(int8, PIXELS.repeat(4, 1, 1, 1))[0]
    assert torch.equal(places["cv4"].float().amax((0, 2, 3)), inputs.float())
    # sum and bias are each rounded to float32, which above 2^24 holds every second integer
    exact = sums.astype(np.float32) + (middle - sums).astype(np.float32)
    np.testing.assert_array_equal(places["fc1"], np.tile(exact, (8, 1)))
    fc1 = next(layer for layer in LAYERS if layer.name == "fc1")
    assert int8.accumulator_bits(fc1) == oracle.largest_total(default(), "fc1", integers_of(int8)).bit_length() == 26


# Extreme pictures and weights

def observed(state, pixels=PIXELS):
    model = network(state)
    observe(model, pixels)
    return model


def plain(pixel):
    return torch.full((1, 3, 224, 224), pixel, dtype=torch.uint8)


def assert_close_to_fp32(model, pixels, share=0.05):
    """INT8 logits finite and within a share of the largest FP32 logit; return the INT8 network."""
    int8 = model.fused().cl_scale()
    for name, value in int8.state_dict().items():
        assert value.isfinite().all(), name
    fp32, found = run(model, pixels)[1], run(int8, pixels)[1]
    assert found.isfinite().all()
    assert (found - fp32).abs().max() <= share * fp32.abs().max()
    return int8


BOTH = pytest.mark.parametrize("recipe", [default(), notebook()], ids=case_name)


@BOTH
@pytest.mark.parametrize("pixel", [0, 255])
def test_plain_pictures(recipe, pixel, calibrated):
    with constants(recipe):
        assert_same_pass(recipe, calibrated.fused().cl_scale(), plain(pixel))           # calibrated on others
    recipe = recipe._replace(bias_bit=32)       # 16 bits clip the biases behind a range of 0
    with constants(recipe):
        model = observed(STATE, plain(pixel))                                   # and on this one alone
        assert ranges_of(model)["input"] == pixel
        assert_same_pass(recipe, assert_close_to_fp32(model, plain(pixel)), plain(pixel))


@BOTH
@pytest.mark.parametrize("sign", [1, -1])
def test_all_weights_at_their_largest(recipe, sign):
    state = {name: np.full_like(value, sign * 0.01) if name.startswith(("cnn", "fc")) else value
             for name, value in STATE.items()}
    with constants(recipe):
        int8 = observed(state).fused().cl_scale()
        assert set(int8.fc1.weight.unique().tolist()) == {sign * 127}
        assert_same_pass(recipe, int8, torch.cat([PIXELS, plain(255)]))


# Dead networks

def dead(**changes):
    """The weights with some set to one value: layer_key=value stands for layer.key."""
    names = {name.replace("_", ".", 1): value for name, value in changes.items()}
    assert names.keys() <= STATE.keys()
    return {name: np.full_like(value, names.get(name, 0)) if name in names else value for name, value in STATE.items()}


DEAD_CHANNEL = {**STATE, "bn1.weight": np.where(np.arange(16) == 5, 0, STATE["bn1.weight"])}
DEAD = {
    "first convolution": dead(cnn1_weight=0, cnn1_bias=0),
    "second convolution": dead(cnn2_weight=0, cnn2_bias=0),
    "second convolution's weights": dead(cnn2_weight=0),
    "fc1": dead(fc1_weight=0, fc1_bias=0),
    "fc2's weights": dead(fc2_weight=0),
    "fc2": dead(fc2_weight=0, fc2_bias=0),
    "batch norm": dead(bn3_weight=0, bn3_bias=0),
    "batch norm of one channel": DEAD_CHANNEL,
    "nothing passes a ReLU": dead(bn2_bias=-1e4),
    "no variance": dead(bn4_running_var=0, bn4_weight=1e-3),
    "everything": {name: np.zeros_like(value) for name, value in STATE.items()},
}


@BOTH
@pytest.mark.parametrize("name", DEAD)
def test_dead_networks(name, recipe):
    recipe = recipe._replace(bias_bit=32)       # 16 bits clip the biases behind a range of 0
    with constants(recipe):
        model = observed(DEAD[name], PIXELS)
        int8 = assert_close_to_fp32(model, PIXELS)
        assert_same_pass(recipe, int8, PIXELS)
        weights, integers, scales = fused_weights(model), integers_of(int8), scales_of(int8)
        for layer in LAYERS:
            formulas = oracle.mended_weights(*weights[layer.name], scales[layer.source], recipe)
            for found, formula in zip(integers[layer.name], formulas):
                np.testing.assert_array_equal(found, formula, err_msg=layer.name)


def test_ranges_of_zero():
    """Quantized before any picture was shown: useless, but finite."""
    model = network(STATE)
    int8 = model.fused().cl_scale()
    assert all(value.isfinite().all() for value in int8.state_dict().values())
    assert run(int8, PIXELS)[1].isfinite().all()
    assert scales_of(int8)["cv1"] == oracle.divide(255, 1e-12)


@pytest.mark.parametrize("weight", [0, 1e-13, 1e-9, 1e-6])
def test_a_channel_of_tiny_weights_keeps_its_bias(weight):
    state = {**{name: value.copy() for name, value in STATE.items()}}
    state["fc2.weight"][0], state["fc2.bias"][0] = weight, 0.5
    state["cnn1.weight"][3], state["cnn1.bias"][3] = weight, 0.5
    for key, value in [("weight", 1), ("bias", 0), ("running_mean", 0), ("running_var", 1 - 1e-5)]:
        state[f"bn1.{key}"][3] = value
    model = observed(state)
    int8 = model.fused().cl_scale()
    places, logits = run(int8, PIXELS)
    fp32, fp32_logits = run(model, PIXELS)
    assert fp32_logits[:, 0].numpy() == pytest.approx(0.5, rel=1e-3)
    assert logits[:, 0].numpy() == pytest.approx(0.5, rel=1e-3)
    assert (places["cv1"][:, 3] - fp32["cv1"][:, 3] * int8.scale_cv1.cpu()).abs().max() < 0.6
    _, bias, w_scale = integers_of(int8)["cnn1"]
    assert bias[3] / (scales_of(int8)["input"] * w_scale[3]) == pytest.approx(0.5, rel=1e-3)


# What each constant does, alone

def quantized(calibrated, **changes):
    recipe = default()._replace(**changes)
    with constants(recipe):
        int8 = calibrated.fused().cl_scale()
        return SimpleNamespace(int8=int8, integers=integers_of(int8), places=run(int8, PIXELS)[0],
                               logits=run(int8, PIXELS)[1])


def test_per_channel(calibrated):
    one, many = quantized(calibrated, per_channel=False).integers, quantized(calibrated).integers
    for layer in LAYERS:
        assert one[layer.name][2].shape == (1,)
        assert many[layer.name][2].shape == (len(one[layer.name][0]),)
        assert many[layer.name][2].min() == one[layer.name][2]          # the layer's scale is its widest channel's


def test_unsigned_relu(calibrated):
    signed, unsigned = quantized(calibrated, unsigned=False), quantized(calibrated)
    for place in PLACES[:5]:
        assert (signed.places[place].dtype, unsigned.places[place].dtype) == (torch.int8, torch.uint8)
    for place in PLACES[:4]:                            # cv4's range has headroom
        assert signed.places[place].max() <= 127 < unsigned.places[place].max()
    assert signed.places["fc1"].dtype == unsigned.places["fc1"].dtype == torch.int8


def test_bias_bit():
    model = observed({**STATE, "bn2.bias": STATE["bn2.bias"] * 5})          # past 16 bits
    wide = quantized(model).integers
    assert np.abs(wide["cnn2"][1]).max() > 2**15
    for bias_bit in (2, 8, 16, 24):
        cut, largest = quantized(model, bias_bit=bias_bit).integers, 2**(bias_bit - 1) - 1
        assert np.abs(cut["cnn2"][1]).max() == largest or bias_bit == 24    # 16: 32767
        for layer in LAYERS:
            np.testing.assert_array_equal(cut[layer.name][1], wide[layer.name][1].clip(-largest, largest))
            np.testing.assert_array_equal(cut[layer.name][0], wide[layer.name][0])


def test_bias_is_clipped_to_the_integer_that_fp32_cannot_hold(monkeypatch):
    monkeypatch.setattr(script, "BIAS_BIT", 28)
    bias = script.weight_quant(torch.full((2, 4), 1e-9), torch.tensor([0.5, -0.5]), torch.tensor(1.0), script.current_recipe())[1]
    assert bias.tolist() == [2**27 - 1, 1 - 2**27]


def test_quantize_logits(calibrated):
    rounded, real = quantized(calibrated, quantize_logits=True), quantized(calibrated)
    scale = rounded.int8.scale_fc2.cpu()
    assert rounded.places["fc2"].dtype == torch.int8
    np.testing.assert_array_equal(rounded.logits, rounded.places["fc2"] / scale)
    assert (real.logits * scale != (real.logits * scale).round()).any()
    assert ((rounded.logits - real.logits).abs() * scale).max() < 0.5001
    for place in PLACES[:-1]:
        assert torch.equal(rounded.places[place], real.places[place])


def test_bit(calibrated):
    """Fewer bits, larger error."""
    logits = run(calibrated, PIXELS)[1]
    errors = [(quantized(calibrated, bit=bit).logits - logits).square().mean().item() for bit in (2, 4, 6, 8)]
    assert errors == sorted(errors, reverse=True)


def test_headroom(calibrated):
    """Twice the range halves the integers where fully connected layers read, and nowhere else."""
    tight, wide = quantized(calibrated, headroom=1), quantized(calibrated, headroom=2)
    for net, cv4, fc1 in [(tight, 255, 127), (wide, 127.5, 63.5)]:
        assert net.places["cv4"].max() == pytest.approx(cv4, abs=3)
        assert net.places["fc1"].abs().max() == pytest.approx(fc1, abs=3)
    for place in PLACES[:4]:
        assert torch.equal(tight.places[place], wide.places[place])


# Closer to FP32

MANY = random_pixels(12, seed=4)


def plain_int8(state, pixels):
    """Folded network that has seen the pictures, and its INT8 network."""
    folded = observed(state, pixels).fused()
    return folded, folded.cl_scale()


def test_equalizing_keeps_the_logits_and_evens_the_ranges():
    state = {**STATE, "bn2.weight": STATE["bn2.weight"] * np.linspace(0.05, 1, 32, dtype=np.float32)}
    state["bn4.weight"], state["bn4.bias"] = state["bn4.weight"].copy(), state["bn4.bias"].copy()
    state["bn4.weight"][3] = state["bn4.bias"][3] = 0                           # a dead channel
    folded, _ = plain_int8(state, PIXELS)
    logits = run(folded, PIXELS)[1]
    before = {place: getattr(folded, f"range_{place}").clone() for place in PLACES}
    factors = script.equalize(folded)
    assert list(factors) == ["cv1", "cv2", "cv3", "cv4"]
    for place, found in factors.items():
        ranges = before[place].numpy()
        formula = np.sqrt(ranges.max() / np.maximum(ranges, ranges.max() / 16))
        np.testing.assert_allclose(found, formula, rtol=1e-6)
    assert factors["cv4"][3] == 4 and factors["cv2"].max() > 2
    np.testing.assert_allclose(run(folded, PIXELS)[1], logits, atol=1e-5 * logits.abs().max())
    # what observers would now see is what the rescaled ranges say; inputs and fully connected layers stay
    ranges = {place: getattr(folded, f"range_{place}").clone() for place in PLACES}
    for place in PLACES:
        getattr(folded, f"range_{place}").zero_()
    observe(folded, PIXELS)
    for place in PLACES:
        again = getattr(folded, f"range_{place}")
        np.testing.assert_allclose(again, ranges[place], rtol=1e-4, atol=1e-5 * again.max())
        if place in ("input", "fc1", "fc2"):
            np.testing.assert_allclose(again, before[place], rtol=1e-4, atol=1e-5 * again.max())


def test_equalizing_a_dead_network_stays_finite():
    for name in ("second convolution", "everything"):
        folded, _ = plain_int8(DEAD[name], PIXELS)
        script.equalize(folded)
        int8 = folded.cl_scale()
        script.refine(int8, folded, PIXELS)
        assert all(value.isfinite().all() for value in int8.state_dict().values())
        assert torch.allclose(run(int8, PIXELS)[1], run(folded, PIXELS)[1], rtol=0.01)


def optimal_rounding(w, scale, moments, low, high):
    """GPTQ's definition without its factorization: round one input, solve for the best values of all that follow."""
    damped = moments + 0.01 * moments.diagonal().mean() * np.eye(len(moments))
    w, out = w.copy(), np.zeros(w.shape, int)
    for k in range(w.shape[1]):
        out[:, k] = np.clip(np.rint(w[:, k] * scale), low, high)
        error = w[:, k] - out[:, k] / scale
        if k + 1 < w.shape[1]:      # min over d of (d, -error) damped (d, -error)': d = error * H_kr H_rr^-1
            rest = slice(k + 1, None)
            w[:, rest] += error[:, None] * np.linalg.solve(damped[rest, rest], damped[rest, k])
    return out


@pytest.mark.parametrize("bit", [3, 8])
def test_gptq_is_optimal_step_by_step(bit):
    rng = np.random.default_rng(5)
    x = rng.normal(size=(20, 400)).cumsum(0) + 3                    # inputs that go together
    w, to = rng.normal(size=(6, 20)), script.int_range(bit)
    scale, moments = to.high / np.abs(w).max(1), x @ x.T
    found = script.gptq(torch.from_numpy(w), torch.from_numpy(scale), torch.from_numpy(moments), to)
    assert found.dtype == torch.int8
    np.testing.assert_array_equal(found, optimal_rounding(w, scale, moments, to.low, to.high))
    nearest = np.clip(np.rint(w * scale[:, None]), to.low, to.high)
    error = [np.square((w - q / scale[:, None]) @ x).sum() for q in (found.numpy(), nearest)]
    assert error[0] < 0.4 * error[1]


def patch_moments(q, kernel):
    """Sums of products of the inputs of a convolution, over every sixth position of both axes."""
    windows = np.lib.stride_tricks.sliding_window_view(q.astype(np.float64), (kernel, kernel), axis=(2, 3))[:, :, ::6, ::6]
    patches = windows.transpose(1, 4, 5, 0, 2, 3).reshape(q.shape[1] * kernel**2, -1)
    return patches @ patches.T


def test_gptq_rounds_the_convolutions_and_nothing_else(monkeypatch):
    monkeypatch.setattr(script, "BIAS_CORRECTION", False)
    folded, int8 = plain_int8(STATE, MANY)
    before = integers_of(int8)
    before = {name: tuple(value.copy() for value in values) for name, values in before.items()}
    assert script.refine(int8, folded, MANY) == {}
    after = integers_of(int8)
    for layer in ("fc1", "fc2"):
        np.testing.assert_array_equal(after[layer][0], before[layer][0])
    weights, inputs = fused_weights(observed(STATE, MANY)), oracle.int8_pass(default(), MANY.numpy(), scales_of(int8), after)[0]
    for layer, _, source, place in oracle.LAYERS[:4]:
        w, q = weights[layer][0], inputs[source] if source == "input" else oracle.pool(inputs[source])
        expected = optimal_rounding(w.reshape(len(w), -1).astype(np.float64), after[layer][2].astype(np.float64),
                                    patch_moments(q, w.shape[2]), -127, 127)
        same = (after[layer][0].reshape(len(w), -1) == expected).mean()
        assert same > 0.999, (layer, same)                          # moments are summed in FP32: a tie may fall otherwise
        assert (after[layer][0] != before[layer][0]).mean() > 0.05
    for layer in before:
        np.testing.assert_array_equal(after[layer][1], before[layer][1])        # biases stay
        np.testing.assert_array_equal(after[layer][2], before[layer][2])


@pytest.mark.parametrize("recipe", [default(), default(4), notebook()], ids=case_name)
def test_bias_correction_is_the_mean_difference(recipe, monkeypatch):
    """Layer by layer against the oracle: FP32 outputs, and INT8 outputs behind INT8 layers that are corrected already."""
    monkeypatch.setattr(script, "GPTQ", False)
    recipe = recipe._replace(bias_bit=32)
    with constants(recipe):
        folded, int8 = plain_int8(STATE, MANY)
        plain = {name: tuple(value.copy() for value in values) for name, values in integers_of(int8).items()}
        moved = script.refine(int8, folded, MANY)
    scales, corrected = scales_of(int8), integers_of(int8)
    fp32 = oracle.forward(STATE, MANY.numpy())
    totals = oracle.int8_pass(recipe, MANY.numpy(), scales, corrected)[1]
    for layer, bn, source, place in oracle.LAYERS:
        unit = (scales[source] * corrected[layer][2]).astype(np.float64)
        sums = totals[place] - oracle.per_channel(corrected[layer][1] - plain[layer][1], totals[place])
        output = np.maximum(sums, 0) if bn else sums
        axes = (0, 2, 3) if bn else 0
        gap = fp32[place].mean(axes) - output.mean(axes) / unit
        np.testing.assert_allclose(corrected[layer][1] - plain[layer][1], gap * unit, rtol=1e-3,
                                   atol=1 + 1e-3 * np.abs(gap * unit).max(), err_msg=layer)
        assert moved[layer] == pytest.approx(np.abs(gap).max(), rel=1e-2)
        np.testing.assert_array_equal(corrected[layer][0], plain[layer][0])
    if recipe.bit == 4:     # there the logits' mean error is large enough to be seen to go
        with constants(recipe):
            wrong = [np.abs((run(net, MANY)[1].numpy() - fp32["fc2"]).mean(0)).max() for net in (folded.cl_scale(), int8)]
        assert wrong[1] < 0.2 * wrong[0]


def test_bias_correction_stays_in_bias_bit(monkeypatch):
    recipe = default(3)._replace(bias_bit=6)
    with constants(recipe):
        folded, int8 = plain_int8(STATE, PIXELS)
        script.refine(int8, folded, PIXELS)
    assert max(np.abs(bias).max() for _, bias, _ in integers_of(int8).values()) == 31


def test_refined_network_runs_on_both_executors():
    """All methods on: what comes out is an INT8 network as any other."""
    folded, _ = plain_int8(STATE, MANY)
    script.equalize(folded)
    int8 = folded.cl_scale()
    script.refine(int8, folded, MANY)
    assert_same_pass(default(), int8, torch.cat([MANY[:2], plain(0), plain(255)]))


def test_refining_where_fp32_overflows():
    """Means beyond FP32 move no bias; every integer stays one that a checkpoint may hold."""
    folded, int8 = plain_int8({**STATE, "fc1.weight": STATE["fc1.weight"] * np.float32(3e37)}, PIXELS)
    for x in (folded.fc2.weight, folded.fc1.bias):
        x.data.fill_(3e38)
    script.refine(int8, folded, PIXELS)
    assert all(np.abs(bias.astype(np.int64)).max() < 2**31 for _, bias, _ in integers_of(int8).values())


def test_refining_nothing(monkeypatch):
    monkeypatch.setattr(script, "GPTQ", False)
    monkeypatch.setattr(script, "BIAS_CORRECTION", False)
    folded, int8 = plain_int8(STATE, PIXELS)
    before = {name: value.clone() for name, value in int8.state_dict().items()}
    assert script.refine(int8, folded, PIXELS) == {}
    assert all(torch.equal(before[name], value) for name, value in int8.state_dict().items())
