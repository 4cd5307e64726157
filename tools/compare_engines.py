"""Time the script's INT8 pass against the engines that people install, and compare their answers with FP32.

    pip install -r tools/requirements.txt
    python tools/compare_engines.py --calibration FOLDER --evaluation FOLDER [--rounds 15] [--batches 1 5 32]

Both folders hold pictures called cat.N.jpg and dog.N.jpg; without them, cat_dog/val is taken. Every engine gets the
same checkpoint, the same 100 calibration pictures at most, the same evaluation pictures and the same number of
threads. Each is given its batch in the form that it takes fastest; making that form is not timed. In each round every
engine runs every batch size over about 64 pictures, in a changing order, so that drift hits all alike. All of them run
with the memory settings that importing the script makes, which helps whatever uses torch. What is left out, and why,
is printed; the table is Markdown.
"""
import argparse
import contextlib
import logging
import os
import platform
import random
import shutil
import statistics
import sys
import tempfile
import time
import warnings
from pathlib import Path

os.environ.setdefault("TORCHINDUCTOR_FREEZING", "1")        # PT2E's INT8 kernels need constant weights
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np
import torch

import quantize_catdog as script
from compare_notebook import cpu_name

OURS = "this script INT8"


class Engine:
    """A way to run the network: compile(n)(prepare(uint8 pixels (n, 3, 224, 224))) -> logits (n, 2). size: file bytes."""

    def __init__(self, name, prepare, compile, size):
        self.name, self.prepare, self.compile, self.size = name, prepare, compile, size

    def logits(self, pixels, batch):
        whole = [self.compile(len(chunk))(self.prepare(chunk)) for chunk in pixels.split(batch)]
        return torch.cat([torch.as_tensor(np.asarray(logits)) for logits in whole]).float()


def floats(pixels):
    return pixels.float().contiguous()


def notebook_engines(pixels, checkpoint):
    """The notebook's own class: FP32 NCHW, and its float-simulated INT8, calibrated by its own observers."""
    cells = {}
    source = (ROOT / "tools" / "notebook_cells.py").read_text().split("class dataset")[0]
    exec(compile(source, "notebook_cells.py", "exec"), cells)
    models = []
    for quantized in (False, True):
        model = cells["CNN_Model"]().eval()
        model.load_state_dict(torch.load(checkpoint, weights_only=True)["model"])
        if quantized:
            for chunk in pixels.split(5):
                model(floats(chunk))
            model.cl_scale()
            model.Quantization = True
        models.append(model)
    size = checkpoint.stat().st_size
    # the notebook divides the logits by FC2's weight scale; with their own, they can be compared with FP32
    yield Engine("notebook FP32", floats, lambda batch: models[0], size)
    yield Engine("notebook INT8 (float simulation)", floats, lambda batch: lambda x: models[1](x) / models[1].scale_fc2,
                 size)


def script_engines(model, pixels, folder):
    """The script's own two passes, with the constants that it carries."""
    fp32 = model.fused()
    fp32.observe(len(pixels))
    for chunk in pixels.split(script.BATCH_SIZE):
        fp32(chunk)
    fp32.observing, model.maxima = False, fp32.maxima
    int8 = script.quantized(model, len(pixels), pixels[:20], "reference")
    exact = script.choose_engine(int8, pixels[:20])
    print(f"script: {int8.engine}, {exact['compared']:,} values compared with the reference, {exact['different']} differ")
    script.save_checkpoint(int8, folder / "int8.pth.tar")
    yield Engine("this script FP32", lambda x: x, lambda batch: fp32, (ROOT / script.CHECKPOINT).stat().st_size)
    yield Engine(OURS, lambda x: x, lambda batch: int8, (folder / "int8.pth.tar").stat().st_size)


def export_onnx(model, path):
    """The folded network as an ONNX file, NCHW floats, any batch size."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper
    nodes, constants, x = [], [], "pixels"
    for layer in script.LAYERS:
        part = getattr(model, layer.name)
        for key in ("weight", "bias"):
            value = getattr(part, key).detach().contiguous().numpy()
            constants.append(numpy_helper.from_array(value, f"{layer.name}.{key}"))
        inputs = [f"{layer.name}.weight", f"{layer.name}.bias"]
        if layer.bn:
            nodes += [helper.make_node("Conv", [x, *inputs], [layer.name]),
                      helper.make_node("Relu", [layer.name], [layer.relu]),
                      helper.make_node("MaxPool", [layer.relu], [layer.pool], kernel_shape=[2, 2], strides=[2, 2])]
            x = layer.pool
        else:
            if layer.source == "cv4":
                nodes.append(helper.make_node("Flatten", [x], ["flat"]))
                x = "flat"
            nodes.append(helper.make_node("Gemm", [x, *inputs], [layer.name], transB=1))
            x = layer.name
    graph = helper.make_graph(
        nodes, "catdog", [helper.make_tensor_value_info("pixels", TensorProto.FLOAT, ["n", 3, 224, 224])],
        [helper.make_tensor_value_info(x, TensorProto.FLOAT, ["n", 2])], constants)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10), path)


def onnxruntime_engines(path, pixels, folder):
    import onnxruntime
    from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(CalibrationDataReader):
        def __init__(self):
            self.batches = iter(pixels.split(5))

        def get_next(self):
            batch = next(self.batches, None)
            return None if batch is None else {"pixels": floats(batch).numpy()}

    def engine(name, path):
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        return Engine(name, lambda x: floats(x).numpy(), lambda batch: lambda x: session.run(None, {"pixels": x})[0],
                      path.stat().st_size)

    yield engine("ONNX Runtime FP32", path)
    quant_pre_process(path, folder / "prepared.onnx")
    quantize_static(folder / "prepared.onnx", folder / "default.onnx", Reader())
    yield engine("ONNX Runtime INT8, default", folder / "default.onnx")
    quantize_static(folder / "prepared.onnx", folder / "u8.onnx", Reader(), per_channel=True,
                    activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8)
    yield engine("ONNX Runtime INT8, u8 per channel", folder / "u8.onnx")


def openvino_engines(path, pixels, folder):
    import nncf
    import openvino
    from openvino.preprocess import PrePostProcessor
    core = openvino.Core()
    settings = {"INFERENCE_NUM_THREADS": torch.get_num_threads(), "PERFORMANCE_HINT": "LATENCY",
                "INFERENCE_PRECISION_HINT": "f32"}          # else FP32 runs as bfloat16 where the CPU has it

    def engine(name, model):
        openvino.save_model(model, folder / "openvino.xml", compress_to_fp16=False)
        size = sum((folder / f"openvino.{end}").stat().st_size for end in ("xml", "bin"))
        steps = PrePostProcessor(model)
        steps.input().tensor().set_element_type(openvino.Type.u8).set_layout(openvino.Layout("NHWC"))
        steps.input().model().set_layout(openvino.Layout("NCHW"))
        model, requests = steps.build(), {}

        def compile(batch):
            if batch not in requests:
                sized = model.clone()
                sized.reshape([batch, 224, 224, 3])
                requests[batch] = core.compile_model(sized, "CPU", settings).create_infer_request()
            request = requests[batch]
            return lambda x: request.infer({0: x}, share_inputs=True)[0].copy()

        return Engine(name, lambda x: x.permute(0, 2, 3, 1).contiguous().numpy(), compile, size)

    yield engine("OpenVINO FP32", core.read_model(path))
    for preset in (nncf.QuantizationPreset.PERFORMANCE, nncf.QuantizationPreset.MIXED):
        data = nncf.Dataset([floats(x[None]).numpy() for x in pixels])
        model = nncf.quantize(core.read_model(path), data, preset=preset, subset_size=len(pixels))
        default = " (default)" if preset == nncf.QuantizationPreset.PERFORMANCE else ""
        yield engine(f"OpenVINO, NNCF INT8, {preset.value}{default}", model)


def pt2e_engines(model, pixels, folder):
    from torchao.quantization.pt2e import move_exported_model_to_eval
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
    from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86
    parts = []
    for layer in script.LAYERS:
        parts += [torch.nn.Flatten()] * (layer.source == "cv4") + [getattr(model, layer.name)]
        parts += [torch.nn.ReLU(), torch.nn.MaxPool2d(2)] if layer.bn else []
    example = pixels[:2].float()
    batch = torch.export.Dim("batch", min=1, max=64)
    exported = torch.export.export(torch.nn.Sequential(*parts), (example,), dynamic_shapes=({0: batch},)).module()
    quantizer = x86.X86InductorQuantizer().set_global(x86.get_default_x86_inductor_quantization_config())
    prepared = prepare_pt2e(exported, quantizer)
    for chunk in pixels.split(5):
        prepared(chunk.float())
    converted = move_exported_model_to_eval(convert_pt2e(prepared))
    torch.export.save(torch.export.export(converted, (example,), dynamic_shapes=({0: batch},)), folder / "pt2e.pt2")
    has_compiler = shutil.which("c++") or shutil.which("g++")
    compiled = {}

    def compile(size):
        if size not in compiled:
            compiled[size] = torch.compile(converted, dynamic=False) if has_compiler else converted
        return compiled[size]

    yield Engine(f"PyTorch PT2E INT8, {'compiled' if has_compiler else 'not compiled'}", lambda x: x.float(), compile,
                 (folder / "pt2e.pt2").stat().st_size)


def multiply_adds(model):
    """Of one picture: each value of a place is a sum over one row of its layer's weights."""
    places = dict(model.activations(torch.zeros(1, 3, 224, 224)))
    return sum(places[layer.place].numel() * getattr(model, layer.name).weight[0].numel() for layer in script.LAYERS)


def gemm_rate(n=1024):
    """Multiply-adds a second of a large uint8 x int8 matrix product, the best of 20: what VNNI reaches on these cores."""
    weight = torch.randint(-127, 128, (n, n), dtype=torch.int8)
    x = torch.randint(0, 256, (n, n), dtype=torch.uint8)
    packed = script.pack(weight, torch.ones(n), torch.zeros(n))
    seconds = []
    for _ in range(20):
        start = time.perf_counter()
        script.kernel(x, packed, torch.float32, relu=False)
        seconds.append(time.perf_counter() - start)
    return n**3 / min(seconds)


def pictures(folder):
    """uint8 pixels (n, 3, 224, 224) and labels of a folder."""
    batches = list(script.CatDogDataset(folder).batches())
    return torch.cat([batch.pixels for batch in batches]), torch.cat([batch.labels for batch in batches])


@torch.inference_mode()         # as the script runs its own
def measure(engines, pixels, batches, rounds):
    """{(engine name, batch): [ms a picture of each round]}."""
    ready = {}
    for engine in engines:
        for batch in batches:
            starts = range(0, max(1, min(64, len(pixels)) // batch) * batch, batch)
            inputs = [engine.prepare(pixels[i:i + batch]) for i in starts if i + batch <= len(pixels)]
            ready[engine.name, batch] = engine.compile(batch), inputs
    times, order = {key: [] for key in ready}, list(ready)
    for _ in range(rounds):
        random.shuffle(order)
        for name, batch in order:
            run, inputs = ready[name, batch]
            time.sleep(0.05)            # the threads of the engine before this one stop spinning
            for x in (inputs * 3)[:3]:
                run(x)
            start = time.perf_counter()
            for x in inputs:
                run(x)
            times[name, batch].append(1e3 * (time.perf_counter() - start) / (len(inputs) * batch))
    return times


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--calibration", type=Path, default=ROOT / "cat_dog" / "val")
    parser.add_argument("--evaluation", type=Path, default=ROOT / "cat_dog" / "val")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 5, 32])
    args = parser.parse_args()
    for folder in (args.calibration, args.evaluation):
        if not folder.is_dir():
            parser.error(f"no folder {folder}")
    warnings.filterwarnings("ignore")
    random.seed(0)
    calibration = script.sample(script.CatDogDataset(args.calibration), 100)
    pixels, labels = pictures(args.evaluation)
    if args.rounds < 1 or not all(1 <= batch <= len(pixels) for batch in args.batches):
        parser.error(f"give at least one round, and batches of 1 to {len(pixels)} pictures, which is all there are")
    _, model = script.load_checkpoint(ROOT / script.CHECKPOINT)
    fused, engines, quality = model.fused(), [], {}
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        folder = Path(folder)
        for make, inputs in [(script_engines, (model, calibration, folder)),
                             (notebook_engines, (calibration, ROOT / script.CHECKPOINT)),
                             (onnxruntime_engines, (folder / "fp32.onnx", calibration, folder)),
                             (openvino_engines, (folder / "fp32.onnx", calibration, folder)),
                             (pt2e_engines, (fused, calibration, folder))]:
            try:
                if make is onnxruntime_engines:
                    export_onnx(fused, folder / "fp32.onnx")
                for engine in make(*inputs):
                    quality[engine.name] = engine.logits(pixels, 32)
                    engines.append(engine)
            except Exception as error:          # another's engine that is missing or fails is no reason to show no table
                if make is script_engines:
                    raise
                print(f"left out {make.__name__}: {type(error).__name__}: {' '.join(str(error).split())[:300]}")
        times = measure(engines, pixels, args.batches, args.rounds)
        macs, rate = multiply_adds(fused), gemm_rate()
    print(f"\n{' '.join(['python', *sys.argv])}\n{cpu_name()}, {torch.get_num_threads()} threads, Python "
          f"{platform.python_version()}, {versions()}\n{len(labels)} pictures; ms a picture: median (10th to 90th "
          f"percentile) of {args.rounds} rounds; x: times as long as this script's INT8\n")
    print_table(engines, quality, times, labels, args.batches)
    print(f"\nA 1024 x 1024 x 1024 uint8 x int8 matrix product reaches {rate / 1e12:.2f} T multiply-adds a second here; at "
          f"that rate the {macs / 1e6:.0f} M of a picture take {1e3 * macs / rate:.3f} ms. This script's INT8 pass reaches "
          + ", ".join(f"{100 * macs / rate / statistics.median(times[OURS, batch]) * 1e3:.0f} % of it at batch {batch}"
                      for batch in args.batches) + ".")


def print_table(engines, quality, times, labels, batches):
    """One Markdown row an engine, slowest first. quality: {engine name: logits}; FP32 is this script's."""
    middle = {key: statistics.median(values) for key, values in times.items()}
    reference = quality["this script FP32"]
    heads = [f"{what}, batch {batch}" for batch in batches for what in ("ms", "x")]
    print("| engine | " + " | ".join(heads) + " | Top-1 | same class | logit SQNR | file, KB |")
    print("|---" * (len(heads) + 5) + "|")
    for engine in sorted(engines, key=lambda engine: -middle[engine.name, batches[-1]]):
        cells = []
        for batch in batches:
            values = sorted(times[engine.name, batch])
            low, high = values[len(values) // 10], values[-1 - len(values) // 10]
            ratio = middle[engine.name, batch] / middle[OURS, batch]
            cells += [f"{middle[engine.name, batch]:.2f} ({low:.2f}-{high:.2f})", f"{ratio:.2f}"]
        logits = quality[engine.name]
        sqnr = script.sqnr_db(reference, logits)
        same = script.agreement(reference, logits)
        right = (logits.argmax(1) == labels).double().mean().item()
        print(f"| {engine.name} | " + " | ".join(cells) + f" | {100 * right:.1f} % | {100 * same:.1f} % | "
              f"{'-' if sqnr is None else f'{sqnr:.1f} dB'} | {engine.size / 1000:,.0f} |")


def versions():
    from importlib.metadata import PackageNotFoundError, version
    found = []
    for name in ("torch", "onnxruntime", "openvino", "nncf", "torchao", "numpy"):
        with contextlib.suppress(PackageNotFoundError):
            found.append(f"{name} {version(name)}")
    return ", ".join(found)


if __name__ == "__main__":
    logging.disable(logging.WARNING)
    main()
