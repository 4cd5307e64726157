"""Time the script's INT8 pass against the engines that people install; compare answers with FP32.

    pip install -r tools/requirements.txt
    python tools/compare_engines.py --calibration FOLDER --evaluation FOLDER [--notebook FILE]
                                    [--rounds 15] [--batches 1 5 32]

Both folders hold pictures called cat.N.jpg and dog.N.jpg; without them, cat_dog/train and
cat_dog/val are taken. Every engine gets the same checkpoint, the same 100 calibration pictures at
most, the same evaluation pictures and the same number of threads. Each is given its batch in the
form that it takes fastest; making that form is not timed. In each round every engine runs every
batch size over about 64 pictures, in a changing order, so that drift affects all alike. All of them
run with GOMP_SPINCOUNT as the script's run sets it. "Our integers" are the script's INT8 network in
another engine, in the file that tools/export_onnx.py makes.
FILE is the notebook that the script ports, as for tools/compare_notebook.py: its class is cut out
of it and runs in a process of its own, which times itself when its turn comes. What is left out,
and why, is printed; the table is Markdown.
"""
import argparse
import contextlib
import logging
import multiprocessing
import os
import platform
import random
import shutil
import statistics
import sys
import tempfile
import time
import warnings
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

os.environ.setdefault("TORCHINDUCTOR_FREEZING", "1")    # PT2E's INT8 kernels need constant weights
if __name__ == "__main__" and "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")    # as in the script's run, for all engines
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np
import torch
from compare_notebook import code_of, cpu_name, network_of

import quantize_catdog as script

OURS = "this script INT8"


class Engine:
    """A way to run the network: compile(n)(prepare(pixels)) -> logits (n, 2).

    pixels: uint8 (n, 3, 224, 224); size: bytes of its file.
    """

    def __init__(self, name, prepare, compile, size):
        self.name, self.prepare, self.compile, self.size = name, prepare, compile, size
        self.ready = {}     # {batch: (what runs it, batches in the form that it takes)}

    def logits(self, pixels, batch):
        whole = [self.compile(len(chunk))(self.prepare(chunk)) for chunk in pixels.split(batch)]
        return torch.cat([torch.as_tensor(np.asarray(logits)) for logits in whole]).float()

    def get_ready(self, pixels, batch):
        """Compile for a batch size, and prepare the pixels in batches of it."""
        inputs = [self.prepare(chunk) for chunk in pixels.split(batch)]
        self.ready[batch] = self.compile(batch), inputs

    @torch.inference_mode()     # as the script runs its own
    def seconds(self, batch):
        """How long all its batches of a size take, after three that are not timed."""
        run, inputs = self.ready[batch]
        for x in (inputs * 3)[:3]:
            run(x)
        start = time.perf_counter()
        for x in inputs:
            run(x)
        return time.perf_counter() - start


class RemoteEngine:
    """An Engine of the notebook's process, in which it computes and times itself."""

    def __init__(self, process, name, size):
        self.process, self.name, self.size = process, name, size

    def logits(self, pixels, batch):
        task = self.process.submit(notebook_logits, self.name, pixels.numpy(), batch)
        return torch.from_numpy(task.result())

    def get_ready(self, pixels, batch):
        self.process.submit(notebook_get_ready, self.name, pixels.numpy(), batch).result()

    def seconds(self, batch):
        return self.process.submit(notebook_seconds, self.name, batch).result()


def floats(pixels):
    return pixels.float().contiguous()


def notebook_engines(notebook, pixels, folder):
    """The notebook's own class in a process of its own: FP32 NCHW, and its float-simulated INT8."""
    (folder / "notebook_network.py").write_text(network_of(code_of(notebook)), encoding="utf-8")
    process = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"))
    checkpoint = ROOT / script.CHECKPOINT
    for name in process.submit(load_notebook, folder, pixels.numpy(), checkpoint).result():
        yield RemoteEngine(process, name, checkpoint.stat().st_size)


NOTEBOOK_ENGINES = {}       # {name: Engine}, filled and used only in the notebook's process


@torch.no_grad()
def load_notebook(folder, pixels, checkpoint):
    """In the notebook's process: make its engines, calibrated by its observers; return names."""
    script.prepare_process()
    sys.path.insert(0, str(folder))
    from notebook_network import CNN_Model
    models = []
    for quantized in (False, True):
        model = CNN_Model().eval()
        model.load_state_dict(torch.load(checkpoint, weights_only=True)["model"])
        if quantized:
            for chunk in torch.from_numpy(pixels).split(5):
                model(floats(chunk))
            model.cl_scale()
            model.Quantization = True
        models.append(model)
    fp32, int8 = models

    def int8_logits(x):
        # the notebook divides them by FC2's weight scale; divided by their own they are like FP32's
        return int8(x) / int8.scale_fc2

    size = checkpoint.stat().st_size
    engines = [Engine("notebook FP32", floats, lambda batch: fp32, size),
               Engine("notebook INT8 (float simulation)", floats, lambda batch: int8_logits, size)]
    NOTEBOOK_ENGINES.update({engine.name: engine for engine in engines})
    return list(NOTEBOOK_ENGINES)


@torch.no_grad()
def notebook_logits(name, pixels, batch):
    return NOTEBOOK_ENGINES[name].logits(torch.from_numpy(pixels), batch).numpy()


def notebook_get_ready(name, pixels, batch):
    NOTEBOOK_ENGINES[name].get_ready(torch.from_numpy(pixels), batch)


def notebook_seconds(name, batch):
    return NOTEBOOK_ENGINES[name].seconds(batch)


def quantized(folded, pixels):
    """The script's INT8_Model by the recipe of its constants, calibrated on these pictures."""
    folded.reset_ranges()
    for chunk in pixels.split(script.BATCH_SIZE):
        folded(chunk, folded.update_range)
    sample, recipe = pixels[:script.SAMPLE], script.read_constants(script.LEGAL_RECIPE)
    _, int8_model = script.quantize_network(folded, sample, recipe)
    rows = script.choose_engines(int8_model, sample)
    kernels = [row["layer"] for row in rows if row["engine"] == "kernel"]
    print(f"script: INT8 kernels for {', '.join(kernels) or 'no layer'}, "
          f"{sum(row['compared'] for row in rows):,} values compared with the reference, "
          f"{sum(row['different'] for row in rows):,} differ")
    return int8_model


def script_engines(folded, int8_model):
    """The script's FP32 and INT8 networks."""
    fp32_size = script.resolve_path(script.CHECKPOINT).stat().st_size
    int8_size = len(script.int8_checkpoint(int8_model))
    yield Engine("this script FP32", lambda x: x, lambda batch: folded, fp32_size)
    yield Engine(OURS, lambda x: x, lambda batch: int8_model, int8_size)


def export_fp32(folded, path):
    """The folded network as an ONNX file, NCHW floats, any batch size."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper
    nodes, constants, x = [], [], "pixels"
    for layer in script.LAYERS:
        name = layer.name
        for key, value in folded.get_submodule(layer.name).state_dict().items():
            array = value.contiguous().numpy()
            constants.append(numpy_helper.from_array(array, f"{name}.{key}"))
        if name == "fc1":
            nodes.append(helper.make_node("Flatten", [x], ["flat"]))
            x = "flat"
        inputs = [x, f"{name}.weight", f"{name}.bias"]
        if layer.is_conv:
            nodes += [helper.make_node("Conv", inputs, [name]),
                      helper.make_node("Relu", [name], [f"{name}_relu"]),
                      helper.make_node("MaxPool", [f"{name}_relu"], [f"{name}_pooled"],
                                       kernel_shape=[2, 2], strides=[2, 2])]
            x = f"{name}_pooled"
        else:
            nodes.append(helper.make_node("Gemm", inputs, [name], transB=1))
            x = name
    width, height = script.IMAGE_SIZE
    pixels = helper.make_tensor_value_info("pixels", TensorProto.FLOAT, ["n", 3, height, width])
    logits = helper.make_tensor_value_info(x, TensorProto.FLOAT, ["n", 2])
    graph = helper.make_graph(nodes, "catdog", [pixels], [logits], constants)
    network = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.save(network, path)


def export_networks(folded, int8_model, folder):
    """fp32.onnx, which the engines' own quantizers start from, and int8.onnx, with our integers."""
    import export_onnx
    export_fp32(folded, folder / "fp32.onnx")
    (folder / "int8.onnx").write_bytes(export_onnx.onnx_bytes(int8_model))


def nchw(pixels):
    return pixels.contiguous().numpy()


def nchw_floats(pixels):
    return floats(pixels).numpy()


def nhwc(pixels):
    return pixels.permute(0, 2, 3, 1).contiguous().numpy()


def onnxruntime_engines(pixels, folder):
    import onnxruntime
    from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(CalibrationDataReader):
        def __init__(self):
            self.batches = iter(pixels.split(5))

        def get_next(self):
            batch = next(self.batches, None)
            return None if batch is None else {"pixels": nchw_floats(batch)}

    def engine(name, path, prepare):
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])

        def run(x):
            return session.run(None, {"pixels": x})[0]

        return Engine(name, prepare, lambda batch: run, path.stat().st_size)

    fp32, prepared = folder / "fp32.onnx", folder / "prepared.onnx"
    default, u8 = folder / "default.onnx", folder / "u8.onnx"
    yield engine("ONNX Runtime FP32", fp32, nchw_floats)
    yield engine("ONNX Runtime, our integers", folder / "int8.onnx", nchw)
    quant_pre_process(fp32, prepared)
    quantize_static(prepared, default, Reader())
    yield engine("ONNX Runtime INT8, default", default, nchw_floats)
    quantize_static(prepared, u8, Reader(), per_channel=True, activation_type=QuantType.QUInt8,
                    weight_type=QuantType.QInt8)
    yield engine("ONNX Runtime INT8, u8 per channel", u8, nchw_floats)


def openvino_engines(pixels, folder):
    import nncf
    import openvino
    from openvino.preprocess import PrePostProcessor
    core = openvino.Core()
    settings = {"INFERENCE_NUM_THREADS": torch.get_num_threads(), "PERFORMANCE_HINT": "LATENCY",
                "INFERENCE_PRECISION_HINT": "f32"}      # else some CPUs run FP32 as bfloat16

    def with_nhwc_input(model):
        processor, layout = PrePostProcessor(model), openvino.Layout
        processor.input().tensor().set_element_type(openvino.Type.u8).set_layout(layout("NHWC"))
        processor.input().model().set_layout(layout("NCHW"))
        return processor.build()

    def size_of(model):
        openvino.save_model(model, folder / "openvino.xml", compress_to_fp16=False)
        return sum((folder / f"openvino.{end}").stat().st_size for end in ("xml", "bin"))

    def engine(name, model, prepare, size):
        model, requests = with_nhwc_input(model) if prepare is nhwc else model, {}

        def compile(batch):
            if batch not in requests:
                sized = model.clone()
                sized.reshape(prepare(pixels[:1].expand(batch, -1, -1, -1)).shape)
                requests[batch] = core.compile_model(sized, "CPU", settings).create_infer_request()
            request = requests[batch]
            return lambda x: request.infer({0: x}, share_inputs=True)[0].copy()

        return Engine(name, prepare, compile, size)

    model = core.read_model(folder / "fp32.onnx")
    yield engine("OpenVINO FP32", model, nhwc, size_of(model))
    # without a change of layout, with which its first convolution would run in FP32
    int8 = folder / "int8.onnx"
    yield engine("OpenVINO, our integers", core.read_model(int8), nchw, int8.stat().st_size)
    for preset in (nncf.QuantizationPreset.PERFORMANCE, nncf.QuantizationPreset.MIXED):
        data = nncf.Dataset([nchw_floats(x[None]) for x in pixels])
        model = nncf.quantize(core.read_model(folder / "fp32.onnx"), data, preset=preset,
                              subset_size=len(pixels))
        default = " (default)" if preset == nncf.QuantizationPreset.PERFORMANCE else ""
        name = f"OpenVINO, NNCF INT8, {preset.value}{default}"
        yield engine(name, model, nhwc, size_of(model))


def pt2e_engines(folded, pixels, folder):
    from torchao.quantization.pt2e import move_exported_model_to_eval
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
    from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86
    parts = []
    for layer in script.LAYERS:
        part = folded.get_submodule(layer.name)
        if layer.is_conv:
            parts += [part, torch.nn.ReLU(), torch.nn.MaxPool2d(2)]
        else:
            plain = torch.nn.Linear(part.in_features, part.out_features)
            plain.load_state_dict(part.state_dict())
            parts += [torch.nn.Flatten(), plain] if layer.name == "fc1" else [plain]
    example = pixels[:2].float()
    sizes = ({0: torch.export.Dim("batch", min=1, max=64)},)
    network = torch.nn.Sequential(*parts)
    exported = torch.export.export(network, (example,), dynamic_shapes=sizes).module()
    config = x86.get_default_x86_inductor_quantization_config()
    prepared = prepare_pt2e(exported, x86.X86InductorQuantizer().set_global(config))
    for chunk in pixels.split(5):
        prepared(chunk.float())
    converted = move_exported_model_to_eval(convert_pt2e(prepared))
    saved = torch.export.export(converted, (example,), dynamic_shapes=sizes)
    torch.export.save(saved, folder / "pt2e.pt2")
    has_compiler = shutil.which("c++") or shutil.which("g++")
    compiled = {}

    def compile(size):
        if size not in compiled:
            compiled[size] = torch.compile(converted, dynamic=False) if has_compiler else converted
        return compiled[size]

    name = f"PyTorch PT2E INT8, {'compiled' if has_compiler else 'not compiled'}"
    yield Engine(name, lambda x: x.float(), compile, (folder / "pt2e.pt2").stat().st_size)


def multiply_adds(model):
    """Of one picture: each output of a layer is a sum over one row of its weights."""
    width, height = script.IMAGE_SIZE
    activations = script.activations_of(model, torch.zeros(1, 3, height, width))
    return sum(activations[layer.output].numel() * model.get_submodule(layer.name).weight[0].numel()
               for layer in script.LAYERS)


def gemm_rate(n=1024):
    """Multiply-adds per second of a large uint8 x int8 product, best of 20: what VNNI reaches."""
    weight = torch.randint(-127, 128, (n, n), dtype=torch.int8)
    x = torch.randint(0, 256, (n, n), dtype=torch.uint8)
    product = script.INT8Layer(weight.shape, 1, script.int_range(8, unsigned=True), outputs=None)
    product.weight.copy_(weight)
    product.prepare(in_scale=1, out_scale=1, use_kernel=True)
    seconds = []
    for _ in range(20):
        start = time.perf_counter()
        product(x)
        seconds.append(time.perf_counter() - start)
    return n**3 / min(seconds)


def pixels_and_labels(folder):
    """uint8 pixels (n, 3, height, width) and labels of a folder's pictures."""
    pictures = script.CatDogDataset(folder)
    items = pictures.__getitems__(range(len(pictures)))
    pictures.usable()       # at least one
    return pictures.collate_fn(items)


def measure(engines, pixels, batches, rounds):
    """{(engine name, batch): [ms per picture of each round]}."""
    count, turns = {}, []
    for batch in batches:
        count[batch] = max(1, min(64, len(pixels)) // batch) * batch
        for engine in engines:
            engine.get_ready(pixels[:count[batch]], batch)
            turns.append((engine, batch))
    times = {(engine.name, batch): [] for engine, batch in turns}
    for _ in range(rounds):
        random.shuffle(turns)
        for engine, batch in turns:
            time.sleep(0.05)            # until the threads of the engine before this one sleep
            times[engine.name, batch].append(1e3 * engine.seconds(batch) / count[batch])
    return times


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--calibration", type=Path, default=ROOT / "cat_dog" / "train")
    parser.add_argument("--evaluation", type=Path, default=ROOT / "cat_dog" / "val")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 5, 32])
    parser.add_argument("--notebook", type=Path, help="the notebook, .ipynb or Markdown")
    args = parser.parse_args()
    for folder in (args.calibration, args.evaluation):
        if not folder.is_dir():
            parser.error(f"no folder {folder}")
    if args.notebook and not args.notebook.is_file():
        parser.error(f"no file {args.notebook}")
    script.prepare_process()
    warnings.filterwarnings("ignore")
    random.seed(0)
    calibration = script.CatDogDataset(args.calibration).first_pixels(100)
    pixels, labels = pixels_and_labels(args.evaluation)
    if args.rounds < 1 or not all(1 <= batch <= len(pixels) for batch in args.batches):
        parser.error(f"give at least one round, and batches of 1 to {len(pixels)} pictures: there "
                     "are no more")
    folded = script.load_checkpoint(script.resolve_path(script.CHECKPOINT)).fused()
    engines, quality = [], {}
    with tempfile.TemporaryDirectory() as scratch, torch.no_grad():
        folder, int8_model = Path(scratch), quantized(folded, calibration)
        for make, inputs in [(script_engines, (folded, int8_model)),
                             (notebook_engines, (args.notebook, calibration, folder)),
                             (onnxruntime_engines, (calibration, folder)),
                             (openvino_engines, (calibration, folder)),
                             (pt2e_engines, (folded, calibration, folder))]:
            if make is notebook_engines and not args.notebook:
                print("left out the notebook's rows: give the notebook with --notebook FILE")
                continue
            try:
                if make is onnxruntime_engines:
                    export_networks(folded, int8_model, folder)
                for engine in make(*inputs):
                    quality[engine.name] = engine.logits(pixels, 32)
                    engines.append(engine)
            except Exception as error:      # another engine may be missing, or fail
                if make is script_engines:
                    raise
                reason = " ".join(str(error).split())[:300]
                print(f"left out {make.__name__}: {type(error).__name__}: {reason}")
        times = measure(engines, pixels, args.batches, args.rounds)
        macs, rate = multiply_adds(folded), gemm_rate()
    print(f"\n{' '.join(['python', *sys.argv])}\n{cpu_name()}, {torch.get_num_threads()} threads, "
          f"Python {platform.python_version()}, {versions()}\n{len(labels)} pictures; ms per "
          f"picture: median (10th to 90th percentile) of {args.rounds} rounds; x: times as long as "
          "this script's INT8\n")
    print_table(engines, quality, times, labels, args.batches)
    least = 1e3 * macs / rate
    reached = [f"{100 * least / statistics.median(times[OURS, batch]):.0f} % of it at batch {batch}"
               for batch in args.batches]
    print(f"\nA 1024 x 1024 x 1024 uint8 x int8 matrix product reaches {rate / 1e12:.2f} T "
          f"multiply-adds per second here; at that rate the {macs / 1e6:.0f} M of a picture take "
          f"{least:.3f} ms. This script's INT8 pass reaches {', '.join(reached)}.")


def print_table(engines, quality, times, labels, batches):
    """One Markdown row per engine, slowest first. quality: {engine's name: logits}."""
    middle = {key: statistics.median(values) for key, values in times.items()}
    fp32 = quality["this script FP32"]
    heads = [f"{what}, batch {batch}" for batch in batches for what in ("ms", "x")]
    print("| engine | " + " | ".join(heads)
          + " | Top-1 | same class | logit SQNR | file, KB |")
    print("|---" * (len(heads) + 5) + "|")
    for engine in sorted(engines, key=lambda engine: -middle[engine.name, batches[-1]]):
        cells = []
        for batch in batches:
            values = sorted(times[engine.name, batch])
            low, high = values[len(values) // 10], values[-1 - len(values) // 10]
            ratio = middle[engine.name, batch] / middle[OURS, batch]
            cells += [f"{middle[engine.name, batch]:.2f} ({low:.2f}-{high:.2f})", f"{ratio:.2f}"]
        logits = quality[engine.name]
        sqnr = script.sqnr_db(fp32, logits)
        same = (logits.argmax(1) == fp32.argmax(1)).double().mean().item()
        right = (logits.argmax(1) == labels).double().mean().item()
        noise = "-" if sqnr is None else f"{sqnr:.1f} dB"
        print(f"| {engine.name} | " + " | ".join(cells) + f" | {100 * right:.1f} % "
              f"| {100 * same:.1f} % | {noise} | {engine.size / 1000:,.0f} |")


def versions():
    from importlib.metadata import PackageNotFoundError, version
    found = []
    for name in ("torch", "onnxruntime", "openvino", "nncf", "torchao", "numpy"):
        with contextlib.suppress(PackageNotFoundError):
            found.append(f"{name} {version(name)}")
    return ", ".join(found)


if __name__ == "__main__":
    sys.excepthook = script.end_in_one_line
    logging.disable(logging.WARNING)
    main()
