"""What quantize_catdog.py must compute, written again from the notebook's formulas. NumPy alone, none of its code.

Two sets of formulas: the notebook's own, and the mended ones (scales per channel, unsigned activations, wider
biases, FP32 logits). Both are float32 where they decide an integer, in the notebook's order of operations, so
that the script's integers can be held to them exactly. np.rint rounds halves to even, as torch.round does.
"""
from collections import namedtuple

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

# layer, its batch norm, the place it reads from, the place it writes to
LAYERS = [("cnn1", "bn1", "input", "cv1"), ("cnn2", "bn2", "cv1", "cv2"), ("cnn3", "bn3", "cv2", "cv3"),
          ("cnn4", "bn4", "cv3", "cv4"), ("fc1", None, "cv4", "fc1"), ("fc2", None, "fc1", "fc2")]
ACTIVATIONS = ["input", "cv1", "cv2", "cv3", "cv4", "fc1", "fc2"]
TINY = np.float32(1e-12)            # a range below it counts as this

# bit: width of the integers at the places; weight_bit and bias_bit: of those of the weights and biases; layer_bits:
# {layer: width of its weights} where it is another than weight_bit
Recipe = namedtuple("Recipe", "bit weight_bit per_channel unsigned bias_bit quantize_logits headroom layer_bits",
                    defaults=[{}])


def linear(x, w):
    """Valid convolution (n, c, h, w) * (o, c, kh, kw), or the product with a matrix (o, c), without bias."""
    if w.ndim == 2:
        return x.reshape(len(x), -1) @ w.T
    n, c, height, _ = x.shape
    out, _, kh, kw = w.shape
    lines = np.ascontiguousarray(np.moveaxis(x, 1, 3)).reshape(n, height, -1)       # channels beside each other
    windows = sliding_window_view(lines, kw * c, axis=2)[:, :, ::c]                 # (n, h, w', kw * c)
    kernels = w.transpose(2, 3, 1, 0).reshape(kh, kw * c, out)                      # one for each line of a window
    y = sum(windows[:, i:i + height - kh + 1] @ kernels[i] for i in range(kh))
    return np.moveaxis(y, 3, 1)


def pool(x):
    """2 x 2 maximum; an odd last row or column has no window."""
    h, w = x.shape[2] // 2, x.shape[3] // 2
    return x[:, :, :2 * h, :2 * w].reshape(*x.shape[:2], h, 2, w, 2).max((3, 5))


def per_channel(values, x):
    """Values of shape (out,) or (1,) against x, whose channels are axis 1."""
    return np.asarray(values).reshape(-1, *[1] * (x.ndim - 2))


# The FP32 network, here in float64

def forward(state, pixels):
    """{place: values} of the network with the weights `state`: after ReLU and before pooling; fc1 has no ReLU."""
    state = {name: value.astype(np.float64) for name, value in state.items()}
    x = pixels.astype(np.float64)
    places = {"input": x}
    for layer, bn, _, place in LAYERS:
        x = linear(x, state[f"{layer}.weight"])
        x = x + per_channel(state[f"{layer}.bias"], x)
        if bn:
            gamma, beta = state[f"{bn}.weight"], state[f"{bn}.bias"]
            mean, var = state[f"{bn}.running_mean"], state[f"{bn}.running_var"]
            x = (x - per_channel(mean, x)) / per_channel(np.sqrt(var + 1e-5), x) * per_channel(gamma, x)
            x = np.maximum(x + per_channel(beta, x), 0)
        places[place] = x
        if bn:
            x = pool(x)
    return places


def ranges(places):
    """{place: largest magnitude in each channel}; pixels may reach 255, whatever these do."""
    return {place: np.abs(np.moveaxis(values, 1, 0)).reshape(values.shape[1], -1).max(1)
            for place, values in places.items()} | {"input": np.full(3, 255.0)}


def folded(state, layer, bn):
    """Weight and bias of the convolution that has taken in its batch norm, in float64."""
    w, b = state[f"{layer}.weight"].astype(np.float64), state[f"{layer}.bias"].astype(np.float64)
    if bn is None:
        return w, b
    gain = state[f"{bn}.weight"] / np.sqrt(state[f"{bn}.running_var"].astype(np.float64) + 1e-5)
    return w * gain[:, None, None, None], (b - state[f"{bn}.running_mean"]) * gain + state[f"{bn}.bias"]


def equalizing_factors(ranges):
    """What each channel of a place is scaled up by, 4 at most, from the largest magnitude in each."""
    return np.sqrt(ranges.max() / np.maximum(ranges, ranges.max() / 16))


# Scales and integers

def divide(integer, x):
    """integer / x as torch computes it for a tensor x: one division and one product, each rounded to float32."""
    return np.float32(1) / np.asarray(x, np.float32) * np.float32(integer)


def limits(recipe, place):
    """Smallest and largest integer at a place. A ReLU's output is never negative, whatever this allows."""
    if recipe.unsigned and place not in ("fc1", "fc2"):
        return 0, 2**recipe.bit - 1
    return -(2**(recipe.bit - 1) - 1), 2**(recipe.bit - 1) - 1


def largest_weight(recipe, layer):
    """Largest integer of a layer's weights."""
    return 2**(recipe.layer_bits.get(layer, recipe.weight_bit) - 1) - 1


def scales(recipe, ranges):
    """{place: scale} of {place: largest magnitude at it}."""
    room = {"cv4": recipe.headroom, "fc1": recipe.headroom}                     # what the fully connected layers read
    return {place: divide(limits(recipe, place)[1], np.maximum(np.float32(ranges[place] * room.get(place, 1)), TINY))
            for place in ACTIVATIONS}


def quantize(x, scale, low, high):
    return np.clip(np.rint(np.asarray(x, np.float32) * scale), np.float32(low), np.float32(high)).astype(np.int64)


def notebook_weights(w, b, in_scale, bit):
    """The notebook's weight_quant: one scale a layer, biases of 2 * bit bits."""
    largest, largest_b = 2**(bit - 1) - 1, 2**(2 * bit - 1) - 1
    w_scale = divide(largest, np.abs(w).max().reshape(1))
    return quantize(w, w_scale, -largest, largest), quantize(b, w_scale * in_scale, -largest_b, largest_b), w_scale


def mended_weights(w, b, in_scale, recipe, layer):
    """One scale per output channel or per layer, no scale so large that the bias leaves int32."""
    largest, largest_b = largest_weight(recipe, layer), 2**(recipe.bias_bit - 1) - 1
    group = (len(w), -1) if recipe.per_channel else (1, -1)
    w_scale = divide(largest, np.maximum(np.abs(w).reshape(group).max(1), TINY))
    bias_range = np.abs(b).reshape(group).max(1) * in_scale
    if recipe.bias_bit == 32:
        w_scale = np.minimum(w_scale, divide(2**30, np.maximum(bias_range, TINY)))
    wq = quantize(w, w_scale.reshape(-1, *[1] * (w.ndim - 1)), -largest, largest)
    return wq, quantize(b, w_scale * in_scale, -largest_b, largest_b), w_scale


# The INT8 pass

def notebook_requantize(total, scale_in, w_scale, scale_out, low, high):
    """The notebook's: bias added first, then two products. May differ from the mended one at a rounding tie."""
    out = total.astype(np.float32) * scale_out / per_channel(scale_in * w_scale, total)
    return np.clip(np.rint(out), low, high).astype(np.int64)


def int8_pass(recipe, pixels, scales, integers):
    """({place: int64 integers}, {place: int64 sums with bias}, float32 logits).

    scales: {place: scale}, integers: {layer: (weight, bias, w_scale)}. Products are summed in float64, which
    holds every integer up to 2^53: these sums stay below 2^26.
    """
    x = quantize(pixels, scales["input"], *limits(recipe, "input"))
    places, totals = {"input": x}, {}
    for layer, bn, source, place in LAYERS:
        wq, bq, w_scale = integers[layer]
        sums = linear(x.astype(np.float64), wq.astype(np.float64)).astype(np.int64)
        totals[place] = sums + per_channel(bq, sums)
        in_fp32 = place == "fc2" and not recipe.quantize_logits
        multiplier = np.float32(1 if in_fp32 else scales[place]) / (scales[source] * w_scale)
        real = sums.astype(np.float32) * per_channel(multiplier, sums) + per_channel(
            bq.astype(np.float32) * multiplier, sums)
        if in_fp32:
            return places, totals, real
        low, high = limits(recipe, place)
        x = np.clip(np.rint(real), 0 if bn else low, high).astype(np.int64)
        places[place] = x
        if bn:
            x = pool(x)
    return places, totals, x.astype(np.float32) / scales["fc2"]


def largest_totals(recipe, layer, integers):
    """Bound on |sum + bias| of a layer's outputs, (out,): every input at its largest, every sign at its worst."""
    source = next(row[2] for row in LAYERS if row[0] == layer)
    wq, bq, _ = integers[layer]
    weights = np.abs(wq.astype(np.int64)).reshape(len(wq), -1).sum(1)
    return weights * limits(recipe, source)[1] + np.abs(bq.astype(np.int64))
