"""What quantize_catdog.py must compute, written again from the notebook's formulas in NumPy, without its code.

Two sets of formulas: the notebook's own, and the mended ones (scales per channel, unsigned activations, wider
biases, FP32 logits). Both use float32 where they decide an integer, in the notebook's order of operations, so
that the script's integers can be compared with them exactly. np.rint rounds halves to even, as torch.round does.
"""
from collections import namedtuple

import numpy as np
import torch
from numpy.lib.stride_tricks import sliding_window_view

# layer, its batch norm, the activation that it reads, the activation that it computes
LAYERS = [("cnn1", "bn1", "input", "cv1"), ("cnn2", "bn2", "cv1", "cv2"), ("cnn3", "bn3", "cv2", "cv3"),
          ("cnn4", "bn4", "cv3", "cv4"), ("fc1", None, "cv4", "fc1"), ("fc2", None, "fc1", "fc2")]
ACTIVATIONS = ["input", "cv1", "cv2", "cv3", "cv4", "fc1", "fc2"]
TINY = np.float32(1e-12)            # smaller ranges count as this

# bit: of an activation; weight_bit and bias_bit: of a weight and of a bias; layer_bits: {layer: bits of its weights}
# where they are not weight_bit
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
    kernels = w.transpose(2, 3, 1, 0).reshape(kh, kw * c, out)                      # one per line of a window
    y = sum(windows[:, i:i + height - kh + 1] @ kernels[i] for i in range(kh))
    return np.moveaxis(y, 3, 1)

def pool(x):
    """2 x 2 maximum; an odd last row or column is dropped."""
    h, w = x.shape[2] // 2, x.shape[3] // 2
    return x[:, :, :2 * h, :2 * w].reshape(*x.shape[:2], h, 2, w, 2).max((3, 5))

def per_channel(values, x):
    """Values of shape (out,) or (1,) against x, whose channels are axis 1."""
    return np.asarray(values).reshape(-1, *[1] * (x.ndim - 2))

# The FP32 network, here in float64

def forward(state, pixels):
    """{activation: values} of the network with the weights `state`: after ReLU, before pooling; fc1 has no ReLU."""
    state = {name: value.astype(np.float64) for name, value in state.items()}
    x = pixels.astype(np.float64)
    activations = {"input": x}
    for layer, bn, _, name in LAYERS:
        x = linear(x, state[f"{layer}.weight"])
        x = x + per_channel(state[f"{layer}.bias"], x)
        if bn:
            gamma, beta = state[f"{bn}.weight"], state[f"{bn}.bias"]
            mean, var = state[f"{bn}.running_mean"], state[f"{bn}.running_var"]
            x = (x - per_channel(mean, x)) / per_channel(np.sqrt(var + 1e-5), x) * per_channel(gamma, x)
            x = np.maximum(x + per_channel(beta, x), 0)
        activations[name] = x
        if bn:
            x = pool(x)
    return activations

def ranges(activations):
    """{activation: largest magnitude of each channel}; the input's is 255, however dark the pixels are."""
    return {name: np.abs(np.moveaxis(values, 1, 0)).reshape(values.shape[1], -1).max(1)
            for name, values in activations.items()} | {"input": np.full(3, 255.0)}

def folded(state, layer, bn):
    """Weight and bias of a convolution with its batch norm folded into it, in float64."""
    w, b = state[f"{layer}.weight"].astype(np.float64), state[f"{layer}.bias"].astype(np.float64)
    if bn is None:
        return w, b
    gain = state[f"{bn}.weight"] / np.sqrt(state[f"{bn}.running_var"].astype(np.float64) + 1e-5)
    return w * gain[:, None, None, None], (b - state[f"{bn}.running_mean"]) * gain + state[f"{bn}.bias"]

def equalizing_factors(ranges):
    """Equalization's factor for each channel of an activation, at most 4, from the channels' ranges."""
    return np.sqrt(ranges.max() / np.maximum(ranges, ranges.max() / 16))

def equalized(weights, activations):
    """{layer: (weight, bias)} and {activation: values}, folded, after equalization by the activations' own ranges."""
    weights, activations = dict(weights), dict(activations)
    for (layer, _, _, name), (reader, *_) in zip(LAYERS, LAYERS[1:]):
        factors = equalizing_factors(ranges(activations)[name])
        activations[name] = activations[name] * per_channel(factors, activations[name])
        (w, b), (read, read_b) = weights[layer], weights[reader]
        weights[layer] = w * factors.reshape(-1, *[1] * (w.ndim - 1)), b * factors
        divisor = factors.repeat(read.shape[1] // len(factors)) if read.ndim == 2 else factors[:, None, None]
        weights[reader] = read / divisor, read_b
    return weights, activations

# Scales and integers

def divide(integer, x):
    """integer / x as torch computes it for a tensor x: one division and one product, each rounded to float32."""
    return np.float32(1) / np.asarray(x, np.float32) * np.float32(integer)

def limits(recipe, name):
    """Smallest and largest integer of an activation. A ReLU's output is never negative, whatever this allows."""
    if recipe.unsigned and name not in ("fc1", "fc2"):
        return 0, 2**recipe.bit - 1
    return -(2**(recipe.bit - 1) - 1), 2**(recipe.bit - 1) - 1

def largest_weight(recipe, layer):
    """Largest integer of a layer's weights."""
    return 2**(recipe.layer_bits.get(layer, recipe.weight_bit) - 1) - 1

def scales(recipe, ranges):
    """{activation: scale} of {activation: largest magnitude}."""
    room = {"cv4": recipe.headroom, "fc1": recipe.headroom}             # the inputs of the fully connected layers
    return {name: divide(limits(recipe, name)[1], np.maximum(np.float32(ranges[name] * room.get(name, 1)), TINY))
            for name in ACTIVATIONS}

def quantize(x, scale, low, high):
    return np.clip(np.rint(np.asarray(x, np.float32) * scale), np.float32(low), np.float32(high)).astype(np.int64)

def notebook_weights(w, b, in_scale, bit):
    """The notebook's weight_quant: one scale per layer, biases of 2 * bit bits."""
    largest, largest_b = 2**(bit - 1) - 1, 2**(2 * bit - 1) - 1
    w_scale = divide(largest, np.abs(w).max().reshape(1))
    return quantize(w, w_scale, -largest, largest), quantize(b, w_scale * in_scale, -largest_b, largest_b), w_scale

def mended_weights(w, b, in_scale, recipe, layer):
    """One scale per output channel or per layer; none so large that the bias would not fit in int32."""
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
    """The notebook's: the bias is added first, then two products. May differ from the mended one at a rounding tie."""
    out = total.astype(np.float32) * scale_out / per_channel(scale_in * w_scale, total)
    return np.clip(np.rint(out), low, high).astype(np.int64)

def int8_pass(recipe, pixels, scales, integers):
    """({activation: int64 integers}, {activation: int64 sums with bias}, float32 logits).

    scales: {activation: scale}, integers: {layer: (weight, bias, w_scale)}. Products are summed in float64, which
    holds every integer up to 2^53: these sums stay below 2^26.
    """
    x = quantize(pixels, scales["input"], *limits(recipe, "input"))
    activations, totals = {"input": x}, {}
    for layer, bn, source, name in LAYERS:
        wq, bq, w_scale = integers[layer]
        sums = linear(x.astype(np.float64), wq.astype(np.float64)).astype(np.int64)
        totals[name] = sums + per_channel(bq, sums)
        in_fp32 = name == "fc2" and not recipe.quantize_logits
        multiplier = np.float32(1 if in_fp32 else scales[name]) / (scales[source] * w_scale)
        real = sums.astype(np.float32) * per_channel(multiplier, sums) + per_channel(
            bq.astype(np.float32) * multiplier, sums)
        if in_fp32:
            return activations, totals, real
        low, high = limits(recipe, name)
        x = np.clip(np.rint(real), 0 if bn else low, high).astype(np.int64)
        activations[name] = x
        if bn:
            x = pool(x)
    return activations, totals, x.astype(np.float32) / scales["fc2"]

def largest_totals(recipe, layer, integers):
    """Bound on |sum + bias| of a layer's outputs, (out,): each input at its largest, each sign at its worst."""
    source = next(row[2] for row in LAYERS if row[0] == layer)
    wq, bq, _ = integers[layer]
    weights = np.abs(wq.astype(np.int64)).reshape(len(wq), -1).sum(1)
    return weights * limits(recipe, source)[1] + np.abs(bq.astype(np.int64))

# GPTQ

def hessian_of_patches(q, kernel):
    """Sums of products of a convolution's inputs q, over every sixth position of both axes."""
    windows = sliding_window_view(q.astype(np.float64), (kernel, kernel), axis=(2, 3))
    patches = windows[:, :, ::6, ::6].transpose(1, 4, 5, 0, 2, 3).reshape(q.shape[1] * kernel**2, -1)
    return patches @ patches.T

def gptq(w, scale, hessian, low, high):
    """Integers of w (out, K), without factorization: round one input, solve for the best values of all that follow."""
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
