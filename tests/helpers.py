"""What several test files use: a folder with a copy of the script, networks of random weights, processes to stop."""
import contextlib
import io
import json
import os
import re
import runpy
import shutil
import signal
import struct
import subprocess
import sys
import warnings
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import quantize_catdog as script
import torch
from PIL import PngImagePlugin
from torch.utils.data import DataLoader

import oracle

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tools"))
import convert_checkpoint  # noqa: E402

SCRIPT = ROOT / "quantize_catdog.py"
README = (ROOT / "README.md").read_text()
PICTURES = ROOT / "cat_dog" / "val"
SIZE = (224, 224)
LAYERS, ACTIVATIONS, DEVICE = script.LAYERS, script.ACTIVATIONS, script.device()
METHODS = ("EQUALIZE", "GPTQ", "BIAS_CORRECTION")
EVERY_LAYER = [layer.name for layer in LAYERS]

@torch.inference_mode()
def lone_picture_is_exact():
    """Whether torch's own convolutions give a picture the same bits alone as in a batch: some CPUs' do not."""
    torch.manual_seed(0)
    for channels, size in ((16, 110), (32, 53), (16, 25)):
        conv = torch.nn.Conv2d(channels, 8, 3).to(memory_format=torch.channels_last)
        x = torch.rand(2, channels, size, size).to(memory_format=torch.channels_last)
        if not torch.equal(conv(x)[:1], conv(x[:1])):
            return False
    return True

LONE_IS_EXACT = lone_picture_is_exact()
KERNELS = DEVICE.type == "cpu" and torch.cpu._is_vnni_supported()      # where the INT8 kernels must be exact

def blocks(text, language=""):
    """The code blocks of a Markdown text in this language."""
    return [code for name, code in re.findall(r"(?ms)^```(\w*)\n(.*?)^```$", text) if name == language]

# runs of the script

def python(*arguments, cwd="/", environment=None):
    """(exit status, stdout, stderr) of Python in a process of its own, which finds the script and the tests."""
    paths = {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    done = subprocess.run([sys.executable, *arguments], cwd=cwd, capture_output=True, text=True, timeout=300,
                          env=os.environ | paths | (environment or {}))
    return done.returncode, done.stdout, done.stderr

class Printed(io.BytesIO):
    """What a program prints, until it is more than any prints that ends."""

    def write(self, content):
        assert self.tell() < 10**6, "it prints without end"
        return super().write(content)

def run_here(path, *words):
    """(exit status, stdout, stderr) of a program that is run in this process, from another folder: no time for imports.

    Warnings count as stderr. What a run changes in its process is afterwards as it was.
    """
    out, err = [io.TextIOWrapper(Printed(), "utf-8", write_through=True) for _ in range(2)]
    status = 0
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings(record=True) as warned:
        patch.chdir("/")
        patch.setattr(sys, "argv", [str(path), *words])
        patch.setattr(sys, "excepthook", sys.__excepthook__)
        patch.setattr(PngImagePlugin, "MAX_TEXT_CHUNK", PngImagePlugin.MAX_TEXT_CHUNK)
        patch.setenv("GOMP_SPINCOUNT", "10000")
        patch.setenv("PILLOW_BLOCK_SIZE", "64m")
        patch.setattr(torch.backends.cudnn, "allow_tf32", torch.backends.cudnn.allow_tf32)
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                runpy.run_path(str(path), run_name="__main__")
            except SystemExit as ended:
                status = ended.code or 0
            except Exception:
                sys.excepthook(*sys.exc_info())
                status = 1
            for warning in warned:
                print(warning.message, file=sys.stderr)
    return status, *[stream.buffer.getvalue().decode() for stream in (out, err)]

class Place:
    """A folder with a copy of the script, the checkpoint, and a few pictures of each split: no picture is in both.

    In cat_dog/train are as many as in cat_dog/val, or `calibration`.
    """

    def __init__(self, folder, pictures=6, calibration=None):
        self.folder, self.results, self.checkpoint = folder, folder / "results", folder / "BEST_checkpoint.pth.tar"
        self.train, self.val = [folder / "cat_dog" / split for split in ("train", "val")]
        for split, count in ((self.train, calibration or pictures), (self.val, pictures)):
            split.mkdir(parents=True)
            for i in range(count // 2):
                for kind in ("cat", "dog"):
                    shutil.copy(ROOT / "cat_dog" / split.name / f"{kind}.{i}.jpg", split)
        shutil.copy(ROOT / "BEST_checkpoint.pth.tar", self.checkpoint)
        shutil.copy(SCRIPT, folder)

    def edit(self, inserted=None, **constants):
        """Edit constants as a user would, and return the copy's path. inserted: (step, code to run before it)."""
        text = SCRIPT.read_text()
        if inserted:
            assert text.count(f"# ### {inserted[0]}\n") == 1
            text = text.replace(f"# ### {inserted[0]}\n", f"{inserted[1]}\n# ### {inserted[0]}\n")
        for name, value in constants.items():
            text, count = re.subn(rf"(?m)^{name} = .*?(  +# .*)?$",
                                  lambda found, line=f"{name} = {value!r}": line + (found[1] or ""), text)
            assert count == 1, f"{name} is not one assignment on one line"
        (self.folder / SCRIPT.name).write_text(text)
        return self.folder / SCRIPT.name

    def run(self, *words, environment=None, **constants):
        """Run the copy with these constants in a process of its own, and return (exit status, stdout, stderr)."""
        # from another folder: relative paths must be taken from the script's
        return python(self.edit(**constants), *words, environment=environment)

    def report(self, *words, **constants):
        """(report.json, stdout) of a run in this process."""
        status, out, err = run_here(self.edit(**constants), *words)
        assert (status, err) == (0, ""), err
        return self.last_report(), out

    def last_report(self):
        return json.loads((self.results / "report.json").read_text())

    def refuse(self, *words, arguments=(), **constants):
        """The run must end with one line that holds the words, status 1, and the results of before."""
        before = self.files()
        status, _, err = run_here(self.edit(**constants), *arguments)
        one_line(status, err, *words)
        assert self.files() == before
        return err

    def files(self):
        """{name: bytes or None} of what is in results/."""
        if not self.results.is_dir():
            return {}
        return {file.name: file.read_bytes() if file.is_file() else None for file in self.results.iterdir()}

def one_line(status, err, *words):
    assert status == 1
    assert len(err.strip().splitlines()) == 1 and err.strip().isprintable() and "Traceback" not in err, err
    for word in words:
        assert word in err

def figures_of(report):
    """All of a report that other batches, threads, engines and layouts of the same pictures must leave as it is."""
    networks = {kind: {key: report[kind][key] for key in ("top1", "correct", "confusion", "interval95", "file_bytes")}
                for kind in ("fp32", "int8")}
    keys = ("images", "layers", "recipe", "agreement", "flips", "logit_sqnr_db", "mcnemar", "skipped", "inputs")
    return networks | {key: report[key] for key in keys}

# processes that Ctrl-C ends

def started(program):
    """The process of a program that writes into two pipes, as Python does it where nothing else is asked for."""
    usual = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    before = signal.signal(signal.SIGINT, signal.default_int_handler)       # tests in the background: it is ignored
    process = subprocess.Popen([sys.executable, program], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                               env=usual)
    signal.signal(signal.SIGINT, before)
    return process

def stopped(process, place, before):
    """The process ends as one that Ctrl-C ends, with one line, and the results are those of before."""
    _, err = process.communicate(timeout=300)
    assert err == "stopped by Ctrl-C\n"
    assert process.returncode == -signal.SIGINT             # so that a shell ends a loop over runs
    assert place.files() == before

# pictures and checkpoints

def to_tensor(pictures):
    """n times uint8 (height, width, 3) -> uint8 (n, 3, height, width), channels last in memory."""
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2)

class Pictures(script.CatDogDataset):
    """A CatDogDataset of these pixels, without files. All are cats where no labels say otherwise."""

    def __init__(self, pixels, labels=None):
        self.pixels, self.size = pixels, tuple(pixels.shape[:1:-1])
        self.folder, self.skipped, self.kept = script.ROOT / "planted", {}, {}
        self.labels = [0] * len(pixels) if labels is None else list(labels)
        self.files = [f"cat.{i}.jpg" for i in range(len(pixels))]

    def __getitems__(self, indices):
        return [(self.pixels[i], self.labels[i]) for i in indices]

def batches(pictures, size=5):
    """(pixels, labels) of a CatDogDataset, batch by batch, as the run's DataLoader gives them."""
    return DataLoader(pictures, size, collate_fn=pictures.collate_fn)

def png_chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

def png_header_that_promises(width, height):
    return b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)) + png_chunk(
        b"IDAT", b"") + png_chunk(b"IEND", b"")

MUTATIONS = 8

def mutated(data, rng, kind):
    """The bytes after an accident of one of MUTATIONS kinds."""
    data = bytearray(data)
    at = rng.randrange(len(data))
    if kind == 0:
        del data[at:]                                               # cut off
    elif kind == 1:
        for _ in range(rng.choice([1, 3, 30])):                     # flipped bits
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    elif kind == 2:
        data[at:at + rng.randrange(1, 200)] = b""                   # a hole
    elif kind == 3:
        data[at:at] = rng.randbytes(rng.randrange(1, 200))          # something put in
    elif kind == 4:
        data[at:at + 64] = bytes(64)                                # zeros
    elif kind == 5:
        head = rng.randrange(min(64, len(data)))                    # header fields at their largest
        data[head:head + 2] = rng.choice([b"\xff\xff", b"\x7f\xff", b"\xea\x60"])
    elif kind == 6:
        data += rng.randbytes(rng.randrange(1, 100))                # a tail
    else:
        data[at:] = data[:len(data) - at]                           # its own beginning again
    return bytes(data)

class Calls:
    """Pickled, it is a call of a function."""

    def __init__(self, function, *arguments):
        self.function, self.arguments = function, arguments

    def __reduce__(self):
        return self.function, self.arguments

def refused(path, *words, load=script.load_checkpoint):
    """A checkpoint is refused in one line that holds its path and the words."""
    with pytest.raises(script.InputError) as error:
        load(path)
    message = str(error.value)
    assert "\n" not in message
    for word in (*words, str(path)):
        assert word in message

def with_parts(data, change, packed=zipfile.ZIP_STORED):
    """The archive with its parts changed, checksums right again. change: {name's end: function of bytes}."""
    file = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(file, "w", packed) as new:
        for name in old.namelist():
            content = old.read(name)
            for end, function in change.items():
                content = function(content) if name.endswith(end) else content
            new.writestr(name, content)
    return file.getvalue()

def beside_good_weights(data, value, key=b"note"):
    """A good checkpoint's bytes with one more entry beside the weights: a value in pickle's opcodes."""
    entry = b"X" + struct.pack("<I", len(key)) + key + value + b"s."
    return with_parts(data, {"data.pkl": lambda content: content[:-1] + entry})

def load_converted(path):
    return script.load_checkpoint(io.BytesIO(convert_checkpoint.convert(path)))

def loaded(state):
    """The FP32 network of {name: tensor}."""
    model = script.CNN_Model().eval()
    model.load_state_dict(state, strict=False)
    return model

def quantized(state, **recipe):
    """(INT8_Model, pixels): calibrated on one picture by the recipe in the constants, and that picture."""
    folded = loaded(state).fused()
    recipe = script.read_constants(script.LEGAL_RECIPE) | recipe
    pixels = to_tensor([script.decode(PICTURES / "cat.0.jpg", recipe["IMAGE_SIZE"])])
    folded.reset_ranges()
    with torch.no_grad():
        folded(pixels, folded.update_range)
    return folded.cl_scale(recipe), pixels

# recipes, for the oracle and for the script

def default(bit=8, weight_bit=None):
    """The default recipe; weights have as many bits as the activations unless told otherwise."""
    return oracle.Recipe(bit, weight_bit or bit, per_channel=True, unsigned=True, bias_bit=32, quantize_logits=False,
                         headroom=2)

def notebook(bit=8, weight_bit=None):
    """The notebook's recipe; its biases have twice as many bits as its weights."""
    weight_bit = weight_bit or bit
    return oracle.Recipe(bit, weight_bit, per_channel=False, unsigned=False, bias_bit=2 * weight_bit,
                         quantize_logits=True, headroom=1)

def case_name(recipe):
    layers = "".join(f"-{name}W{bit}" for name, bit in recipe.layer_bits.items())
    return f"{'default' if recipe.per_channel else 'notebook'}-W{recipe.weight_bit}A{recipe.bit}{layers}"

def as_constants(recipe, *methods):
    """{constant: value} of a recipe, as the script takes it; of its three methods those that are named."""
    return {"IMAGE_SIZE": (224, 224), "BIT": recipe.bit, "WEIGHT_BIT": recipe.weight_bit,
            "LAYER_BITS": recipe.layer_bits, "PER_CHANNEL": recipe.per_channel, "UNSIGNED_RELU": recipe.unsigned,
            "BIAS_BIT": recipe.bias_bit, "QUANTIZE_LOGITS": recipe.quantize_logits, "HEADROOM": recipe.headroom,
            **{method: method in methods for method in METHODS}}

# networks of random weights

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

STATE, PIXELS, MANY = random_state(), random_pixels(), random_pixels(12, seed=4)

def network(state):
    """The FP32 network of {name: array}."""
    return loaded({name: torch.from_numpy(value) for name, value in state.items()}).to(DEVICE).to(
        memory_format=torch.channels_last)

def observe(model, *batches):
    """Show pictures to the observers and return the logits."""
    return script.calibrate(model, Pictures(torch.cat(batches))).logits

def observed(state, pixels):
    """The folded network of these weights whose observers have seen the pictures."""
    model = network(state).fused()
    observe(model, pixels)
    return model

def scales_of(model):
    return {name: model.scale(name).cpu().numpy() for name in ACTIVATIONS}

def with_kernel(int8):
    """The names of the layers of a prepared INT8_Model that use their kernels."""
    return [name for name in EVERY_LAYER if int8.get_submodule(name).kernel]

def integers_of(model):
    modules = {layer.name: model.get_submodule(layer.name) for layer in LAYERS}
    return {name: (module.weight.cpu().numpy(), module.bias.cpu().numpy(), module.w_scale.cpu().numpy())
            for name, module in modules.items()}
