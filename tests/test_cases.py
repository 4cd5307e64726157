"""Pictures, folders and checkpoints as people have them, and states of torch in which programs call the script."""
import argparse
import collections
import io
import os
import struct
import warnings
import zlib

import numpy as np
import pytest
import quantize_catdog as script
import torch
from PIL import Image

from helpers import SIZE, Place, loaded, python, refused
from helpers import png_chunk as chunk

y, x = np.mgrid[0:64, 0:96]
DRAWN = np.stack([x * 255 // 95, y * 255 // 63, (x + y) * 255 // 158], -1).astype(np.uint8)

# pictures whose pixels are fine, but what lies beside them is not

def png(*chunks):
    """A PNG file of DRAWN with more chunks."""
    rows = b"".join(b"\0" + row.tobytes() for row in DRAWN)
    head = struct.pack(">LLBBBBB", 96, 64, 8, 2, 0, 0, 0)
    return b"".join([b"\x89PNG\r\n\x1a\n", chunk(b"IHDR", head), *chunks, chunk(b"IDAT", zlib.compress(rows)),
                     chunk(b"IEND", b"")])

def exif(orientation, *entries):
    """An EXIF block; entries: (tag, type, count, bytes), each after the orientation."""
    found = [(0x112, 3, 1, struct.pack("<H", orientation)), *entries]
    head, data = struct.pack("<H", len(found)), b""
    for tag, kind, count, raw in found:
        at = 8 + 2 + 12 * len(found) + 4 + len(data)
        head += struct.pack("<HHL", tag, kind, count) + (raw.ljust(4, b"\0") if len(raw) < 5 else struct.pack("<L", at))
        data += raw if len(raw) > 4 else b""
    return b"II*\0\x08\0\0\0" + head + bytes(4) + data

def webp(block):
    file = io.BytesIO()
    Image.fromarray(DRAWN).save(file, "webp", lossless=True, exif=block)
    return file.getvalue()

RESOLUTION_AS_TEXT = 0x11a, 2, 8, b"300 dpi\0"
BESIDE = {
    "EXIF that is a Python string": (png(chunk(b"eXIf", b"b'Exif\\x00\\x00MM'")), 1),
    "EXIF that is JSON": (webp(b'{"prompt": "a dog"}'), 1),
    "EXIF cut in the middle": (png(chunk(b"eXIf", exif(6)[:15])), 1),
    "resolution as text, turned": (png(chunk(b"eXIf", exif(6, RESOLUTION_AS_TEXT))), 6),
    "resolution as text in WebP, turned": (webp(b"Exif\0\0" + exif(6, RESOLUTION_AS_TEXT)), 6),
    "a value far outside, turned": (png(chunk(b"eXIf", exif(3, (0x8769, 4, 1, struct.pack("<L", 2**31))))), 3),
    "orientation 77": (png(chunk(b"eXIf", exif(77))), 1),
    "a profile of 2 MB": (png(chunk(b"iCCP", b"x\0\0" + zlib.compress(bytes(2**21)))), 1),
    "a compressed text of 2 MB": (png(chunk(b"zTXt", b"x\0\0" + zlib.compress(b"x" * 2**21))), 1),
    "a text of 2 MB": (png(chunk(b"tEXt", b"x\0" + b"x" * 2**21)), 1),
    "an international text of 2 MB": (png(chunk(b"iTXt", b"x\0\1\0\0\0" + zlib.compress(b"x" * 2**21))), 1),
}

@pytest.mark.parametrize("kind", BESIDE)
def test_what_lies_beside_the_pixels_does_not_cost_the_picture(tmp_path, monkeypatch, kind):
    content, orientation = BESIDE[kind]
    monkeypatch.setattr(script.PngImagePlugin, "MAX_TEXT_CHUNK", 2**20)         # Pillow's own, and as it is in a run
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", torch.backends.cudnn.allow_tf32)
    with warnings.catch_warnings():
        script.prepare_process()
    turned = {1: DRAWN, 3: DRAWN[::-1, ::-1], 6: np.rot90(DRAWN, -1)}[orientation]
    expected = np.asarray(Image.fromarray(np.ascontiguousarray(turned)).resize(SIZE))
    (tmp_path / "cat").write_bytes(content)
    assert np.array_equal(script.decode(tmp_path / "cat", SIZE), expected)
    assert np.array_equal(script.decode(content, SIZE), expected)

@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_orientation(orientation):
    turned = {1: DRAWN, 2: DRAWN[:, ::-1], 3: DRAWN[::-1, ::-1], 4: DRAWN[::-1], 5: DRAWN.transpose(1, 0, 2),
              6: np.rot90(DRAWN, -1), 7: np.rot90(DRAWN, 2).transpose(1, 0, 2), 8: np.rot90(DRAWN)}[orientation]
    expected = np.asarray(Image.fromarray(np.ascontiguousarray(turned)).resize(SIZE))
    content = png(chunk(b"eXIf", exif(orientation)))
    assert np.array_equal(script.decode(content, SIZE), expected)
    with Image.open(io.BytesIO(content)) as image:
        assert np.array_equal(script.decode(image, SIZE), expected)
        assert np.array_equal(np.asarray(image), DRAWN)     # the caller's picture is not turned

MEMORY = """
import os, re, sys
os.environ["PILLOW_BLOCK_SIZE"] = "64m"
import quantize_catdog as script
script.NUM_WORKERS, script.LARGE_PIXELS = 8, 2**23
pictures = script.CatDogDataset(sys.argv[1])


def most():        # KB so far; ru_maxrss would begin with that of the process that started this one
    return int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1])


before = most()
assert len(pictures.__getitems__(range(8))) == 8
print((most() - before) // 1024)
"""

@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="Linux alone tells the most memory so")
def test_pixels_decoded_at_one_time_are_bounded(tmp_path):
    """8 pictures of 16 million pixels with transparency in 8 threads: one takes 200 to 330 MB, all take 2 GB."""
    Image.new("RGBA", (4000, 4000), (120, 100, 90, 200)).save(tmp_path / "cat.0.png", compress_level=1)
    for i in range(1, 8):
        os.link(tmp_path / "cat.0.png", tmp_path / f"cat.{i}.png")
    _, out, err = python("-c", MEMORY, tmp_path)
    assert err == "" and 100 < int(out) < 450

# checkpoints

SAVED = {
    "a bare state_dict": lambda state: state,
    "an OrderedDict": lambda state: {"model": collections.OrderedDict(state)},
    "more beside it": lambda state: {"epoch": 7, "model": state, "optimizer": {"lr": 0.1}, "state_dict": None},
    "half precision": lambda state: {"model": {name: value.half() if value.is_floating_point() else value
                                               for name, value in state.items()}},
    "no counts of batches, as of torch before 0.4.1": lambda state: {
        name: value for name, value in state.items() if not name.endswith("num_batches_tracked")},
}

@pytest.mark.parametrize("protocol", [2, 3])
@pytest.mark.parametrize("kind", SAVED)
def test_weights_as_they_are_saved(tmp_path, state, kind, protocol):
    """From a path or from memory, and ready to answer. Other kinds: test_convert.py."""
    torch.save(SAVED[kind](state), tmp_path / "c.pth", pickle_protocol=protocol)
    for file in (tmp_path / "c.pth", io.BytesIO((tmp_path / "c.pth").read_bytes())):
        model = script.load_checkpoint(file)
        assert not any(module.training for module in model.modules())
        found = model.state_dict()
        for name, value in state.items():
            if value.is_floating_point() and not name.startswith("range_"):
                assert torch.equal(found[name], value if kind != "half precision" else value.half().float()), name

WAYS_OUT = "save weights alone", "tools/convert_checkpoint.py"

def test_what_the_safe_loader_refuses_is_named_with_the_way_out(tmp_path, state):
    """None of these is damaged."""
    path = tmp_path / "c.pth"
    for value, words in ((np.float64(97.5), "multiarray.scalar"), (argparse.Namespace(lr=0.1), "argparse.Namespace")):
        torch.save({"model": state, "value": value}, path)
        refused(path, "cannot be loaded safely (it holds ", f"{words}): save weights alone", *WAYS_OUT)
    torch.save(loaded(state), path)
    refused(path, "cannot be loaded safely (it holds quantize_catdog.CNN_Model)", *WAYS_OUT)
    torch.save({"model": state}, path, pickle_protocol=4)
    refused(path, "cannot be loaded safely", *WAYS_OUT)
    torch.save({"weights": state}, path)
    refused(path, "cnn1.weight is missing, it holds weights: tools/convert_checkpoint.py")
    torch.save({"model": {"conv1.weight": state["cnn1.weight"], "conv1.bias": state["cnn1.bias"]}}, path)
    refused(path, "cnn1.weight is missing, it holds conv1.weight, conv1.bias: tools/convert_checkpoint.py")

# states of torch

def answers(place):
    """The bytes of a run's INT8 checkpoint, both networks' logits, and what `predict` says after loading."""
    train, val = script.CatDogDataset(place.train), script.CatDogDataset(place.val)
    folded = script.load_checkpoint(place.checkpoint).fused()
    script.calibrate(folded, train)
    _, int8 = script.quantize_network(folded, train.first_pixels(20), script.read_constants(script.LEGAL_RECIPE))
    rows = script.choose_engines(int8, val.first_pixels(20))
    content = script.int8_checkpoint(int8)
    model = script.load_int8_checkpoint(io.BytesIO(content))
    predicted = [model.predict(place.val / name) for name in ("cat.0.jpg", "dog.1.jpg")]
    return (content, script.evaluate("FP32", folded, val).logits.tolist(),
            script.evaluate("INT8", int8, val).logits.tolist(), predicted, [row["different"] for row in rows])

@pytest.fixture(scope="module")
def usual_answers(tmp_path_factory):
    place = Place(tmp_path_factory.mktemp("states"))
    return place, answers(place)

@pytest.mark.parametrize("kind", ["autocast", "float64", "bfloat16", "inference mode", "deterministic", "threads"])
def test_same_bits_in_every_state_of_torch(usual_answers, kind):
    place, expected = usual_answers
    dtype, threads = torch.get_default_dtype(), torch.get_num_threads()
    try:
        if kind in ("float64", "bfloat16"):
            torch.set_default_dtype(getattr(torch, kind))
        torch.use_deterministic_algorithms(kind == "deterministic")
        torch.set_num_threads(3 if kind == "threads" else threads)
        with torch.autocast("cpu", enabled=kind == "autocast"), torch.inference_mode(kind == "inference mode"):
            assert answers(place) == expected
    finally:
        torch.set_default_dtype(dtype)
        torch.use_deterministic_algorithms(False)
        torch.set_num_threads(threads)

# a program of one's own

def test_a_network_that_is_loaded_in_inference_mode_is_used_outside(usual_answers):
    place, expected = usual_answers
    with torch.inference_mode():
        model = script.load_int8_checkpoint(io.BytesIO(expected[0]))
    assert model.predict(place.val / "cat.0.jpg") == expected[3][0]

def test_limit_of_pixels_holds_wherever_decode_is_called(tmp_path):
    """Below Pillow's own limit, which is an importing program's."""
    Image.new("1", (8200, 8200)).save(tmp_path / "cat.png")
    with pytest.raises(script.InputError, match="67,240,000 .* 67,108,864"):
        script.decode(tmp_path / "cat.png", SIZE)
    with pytest.raises(script.InputError, match="has 0 pixels"):
        script.decode(np.zeros((0, 0, 3), np.uint8), SIZE)

@pytest.mark.parametrize("name", ["cpu", "cuda"])       # "auto": every other run
def test_device(place, name):
    if name == "cuda" and not torch.cuda.is_available():
        place.refuse("DEVICE", "cuda", "auto", DEVICE=name)
    else:
        assert place.report(DEVICE=name)[0]["device"] == name
