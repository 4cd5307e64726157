"""Write the INT8 network as one ONNX file that ONNX Runtime and OpenVINO answer as the script does.

    pip install -r tools/requirements.txt
    python tools/export_onnx.py [results/INT8_checkpoint.pth.tar] [--output results/INT8.onnx]

    input      pixels   uint8 (n, 3, height, width): RGB, 0..255, any n, of the recipe's IMAGE_SIZE
    output     logits   FP32 (n, 2): cat, dog
    metadata   classes, recipe, image_size (width, height), each as JSON

How to use it without torch:

    import numpy, onnxruntime, PIL.Image
    picture = PIL.Image.open("cat_dog/val/cat.4.jpg").convert("RGB").resize((224, 224))
    pixels = numpy.array(picture).transpose(2, 0, 1)[None]
    logits, = onnxruntime.InferenceSession("results/INT8.onnx").run(None, {"pixels": pixels})
    print(("cat", "dog")[logits.argmax()])      # cat

Weights and biases are the checkpoint's own int8 and int32 tensors; a scale is 1 / the script's.
Each operator on floats stands between DequantizeLinear (DQ) and QuantizeLinear (Q), a group that
both engines run as one integer kernel. Pooling takes the uint8 integers as they are:

    pixels -> DQ Conv Relu Q -> MaxPool -> DQ Conv ... -> Flatten -> DQ Gemm Q -> Clip -> DQ Gemm

All three round the same real numbers, each by FP32 operations of its own. Next to a rounding tie
they may differ, and then some logits of that picture change by a rounding step, far less than INT8
itself changes them.

Before it is written, ONNX Runtime and, where it is installed, OpenVINO answer the pictures of
EVALUATION_SPLIT with it. The file is refused where they are further from the FP32 network (of
CHECKPOINT) than the script is, or answer with another class where that is no tie.
"""
import argparse
import importlib.util
import json
import math
import sys
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader

try:
    import onnx
    import onnxruntime
    from onnx import TensorProto, helper, numpy_helper
except ImportError as missing:
    sys.exit(f"{missing}: pip install -r tools/requirements.txt")

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import quantize_catdog as script

OPSET = 17          # 12 brought pooling of uint8, 13 scales per channel; known since 2022
IR_VERSION = 8      # the file format of that time
SIGNED_ZERO = 128   # uint8 that stands for 0.0 where values may be negative: kernels want uint8
SAME = 1e-5         # of the largest logit: FP32's rounding; a rounding step changes more
LOST_DB = 1         # of the SQNR against FP32, at most


class Graph:
    """Nodes and initializers of an ONNX graph, in the order in which they are added."""

    def __init__(self):
        self.nodes, self.initializers = [], []

    def constant(self, name, value):
        self.initializers.append(numpy_helper.from_array(np.asarray(value), name))
        return name

    def node(self, operator, inputs, output, **attributes):
        node = helper.make_node(operator, inputs, [output], name=output, **attributes)
        self.nodes.append(node)
        return output

    def add_activation(self, name, scale, zero_point):
        """The constants that quantize and dequantize an activation. scale: the script's."""
        self.constant(f"{name}_scale", 1 / scale)
        self.constant(f"{name}_zero_point", np.uint8(zero_point))

    def quantize(self, x, name, output):
        return self.node("QuantizeLinear", [x, f"{name}_scale", f"{name}_zero_point"], output)

    def dequantize(self, x, name, output):
        return self.node("DequantizeLinear", [x, f"{name}_scale", f"{name}_zero_point"], output)


def arrays_of(model):
    """{name: array} of an INT8_Model's tensors."""
    return {name: tensor.cpu().numpy() for name, tensor in model.state_dict().items()}


def integer_limits(model, layer):
    """Smallest and largest integer of a layer's output; 0 as the smallest is its ReLU."""
    integers = model.integers[layer.output]
    return integers.low, integers.high


def add_input(graph, model):
    """Pixels -> the integers of the input, by a table of all 256 where they differ."""
    high, scale = model.integers["input"].high, arrays_of(model)["scale_input"]
    graph.add_activation("input", scale, 0)
    if high == 255 and scale == 1:
        return "pixels"
    table = np.rint(np.arange(256, dtype=np.float32) * scale).clip(0, high).astype(np.uint8)
    indices = graph.node("Cast", ["pixels"], "indices", to=TensorProto.INT32)
    return graph.node("Gather", [graph.constant("input_table", table), indices], "input_quantized")


def add_layer(graph, model, layer, x):
    """One layer: the integers of its input -> those of its output before pooling, or logits."""
    name, output, arrays = layer.name, layer.output, arrays_of(model)
    x_scale, w_scale = 1 / arrays[f"scale_{layer.input}"], 1 / arrays[f"{name}.w_scale"]
    if len(w_scale) == 1:
        w_scale = w_scale[0]                                # ONNX wants one for all as a scalar
    zeros = np.zeros(w_scale.shape, np.int8)    # without them ONNX Runtime fuses no Gemm
    weight = [graph.constant(f"{name}.weight", arrays[f"{name}.weight"]),
              graph.constant(f"{name}.weight_scale", w_scale),
              graph.constant(f"{name}.weight_zero_point", zeros)]
    bias = [graph.constant(f"{name}.bias", arrays[f"{name}.bias"]),
            graph.constant(f"{name}.bias_scale", x_scale * w_scale)]
    inputs = [graph.dequantize(x, layer.input, f"{name}_input"),
              graph.node("DequantizeLinear", weight, f"{name}_weight", axis=0),
              graph.node("DequantizeLinear", bias, f"{name}_bias", axis=0)]
    if model.is_fp32(output):
        return graph.node("Gemm", inputs, "logits", transB=1)
    if layer.is_conv:
        x = graph.node("Relu", [graph.node("Conv", inputs, name)], f"{name}_relu")
        zero_point = 0
    else:
        x = graph.node("Gemm", inputs, name, transB=1)
        zero_point = SIGNED_ZERO
    graph.add_activation(output, arrays[f"scale_{output}"], zero_point)
    x = graph.quantize(x, output, f"{output}_quantized")
    low, high = (zero_point + limit for limit in integer_limits(model, layer))
    if (low, high) == (0, 255):                             # QuantizeLinear itself clips there
        return x
    bounds = [graph.constant(f"{output}_low", np.uint8(low)),
              graph.constant(f"{output}_high", np.uint8(high))]
    return graph.node("Clip", [x, *bounds], f"{output}_clipped")


def onnx_bytes(model):
    """The ONNX file of an INT8_Model."""
    graph = Graph()
    x = add_input(graph, model)
    for layer in script.LAYERS:
        if layer.name == "fc1":
            x = graph.node("Flatten", [x], "flat")
        x = add_layer(graph, model, layer, x)
        if layer.is_conv:
            x = graph.node("MaxPool", [x], f"{layer.output}_pooled", kernel_shape=[2, 2],
                           strides=[2, 2])
    if not model.is_fp32(script.LOGITS):
        graph.dequantize(x, script.LOGITS, "logits")
    width, height = model.recipe["IMAGE_SIZE"]
    pixels = helper.make_tensor_value_info("pixels", TensorProto.UINT8, ["n", 3, height, width])
    logits = helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["n", len(script.CLASSES)])
    network = helper.make_model(
        helper.make_graph(graph.nodes, "catdog", [pixels], [logits], graph.initializers),
        opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION,
        producer_name="quantize_catdog")
    helper.set_model_props(network, {"classes": json.dumps(script.CLASSES),
                                     "recipe": json.dumps(model.recipe),
                                     "image_size": json.dumps([width, height])})
    onnx.checker.check_model(network, full_check=True)
    return network.SerializeToString(deterministic=True)


def onnxruntime_engine(content):
    """(name and version, function from uint8 pixels to logits) of an ONNX file's bytes."""
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])

    def run(pixels):
        return session.run(["logits"], {"pixels": pixels})[0]

    return f"ONNX Runtime {onnxruntime.__version__}", run


def openvino_engine(content):
    """The same in OpenVINO."""
    import openvino
    core = openvino.Core()
    compiled = core.compile_model(core.read_model(content), "CPU")

    def run(pixels):
        return compiled(pixels)["logits"]

    return f"OpenVINO {openvino.__version__.split('-')[0]}", run


def overflowing(model):
    """The names of the layers whose INT8 kernels overflow on this CPU."""
    return [layer.name for layer in script.LAYERS
            if script.kernel_overflows(model.get_submodule(layer.name))]


def check_answers(name, logits, by_script, fp32, model):
    """Print how near an engine's logits are to the script's and to FP32's, all FP32 (n, 2).

    Raises InputError where a picture has another class, although the script's two logits differ by
    more than twice the script's own error (root mean square) against FP32; and where the engine's
    SQNR against FP32 is more than LOST_DB below the script's.
    """
    logits, by_script, fp32 = (torch.from_numpy(each) for each in (logits, by_script, fp32))
    change = (logits - by_script).abs().amax(1)
    moved = int((~(change <= SAME * by_script.abs().max())).sum())          # a NaN has moved
    other = logits.argmax(1) != by_script.argmax(1)
    error = (by_script - fp32).square().mean().sqrt()
    tie = (by_script[:, 0] - by_script[:, 1]).abs() <= 2 * error
    ours, theirs = ((math.inf if db is None else db) for db in
                    (script.sqnr_db(fp32, by_script), script.sqnr_db(fp32, logits)))
    print(f"{name}: {len(other) - int(other.sum())} of {len(other)} classes are the script's;\n"
          f"  a rounding step moved {moved} of {len(other)} pictures; "
          f"SQNR against FP32 {theirs:.1f} dB (script {ours:.1f} dB)")
    if (other & ~tie).any() or not theirs >= ours - LOST_DB:
        kernels = overflowing(model)
        advice = (f" The INT8 kernels of {', '.join(kernels)} overflow on this CPU (no VNNI): "
                  "quantize with WEIGHT_BIT = 7." if kernels else "")
        raise script.InputError(f"{name} does not answer as the script does: no file is written."
                                + advice)


def export(checkpoint, output, folder):
    """Write the ONNX file of an INT8 checkpoint, checked on a folder's pictures.

    Raises InputError, and leaves what is at `output`, where an input cannot be used or the check
    fails.
    """
    model = script.load_int8_checkpoint(checkpoint)
    pictures, content = script.CatDogDataset(folder, model.recipe["IMAGE_SIZE"]), onnx_bytes(model)
    engines = dict([onnxruntime_engine(content)])
    if importlib.util.find_spec("openvino"):
        engines |= dict([openvino_engine(content)])
    else:
        print("OpenVINO is not installed: not compared")
    folded = script.load_checkpoint(script.resolve_path(script.CHECKPOINT)).fused()
    fp32, by_script, by_engine = [], [], {name: [] for name in engines}
    with torch.inference_mode():
        for pixels, _ in DataLoader(pictures, script.BATCH_SIZE, collate_fn=pictures.collate_fn):
            if len(pixels) == 0:        # none of the batch could be decoded
                continue
            for answers, network in ((fp32, folded), (by_script, model)):
                answers.append(network(pixels.to(script.device())).cpu().numpy())
            for name, run in engines.items():
                by_engine[name].append(run(pixels.contiguous().numpy()))
    pictures.usable()                   # at least one
    for name, logits in by_engine.items():
        check_answers(name, *map(np.concatenate, (logits, by_script, fp32)), model)
    script.write_files(output.parent, {output.name: content})
    print(f"wrote {output}, {len(content):,} bytes")


def main():
    results = script.resolve_path(script.OUTPUT_DIR)
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", nargs="?", type=Path,
                        default=results / "INT8_checkpoint.pth.tar")
    parser.add_argument("--output", type=Path, default=results / "INT8.onnx")
    args = parser.parse_args()
    folder = script.resolve_path(script.DATA_DIR, script.EVALUATION_SPLIT)
    try:
        export(args.checkpoint, args.output, folder)
    except script.InputError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
