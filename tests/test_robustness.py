"""Any folder, any file, any size: layouts, broken pictures, broken and hostile checkpoints, same in same out, scale."""
import io
import itertools
import os
import pickle
import random
import shutil
import struct
import subprocess
import sys
import zipfile

import numpy as np
import pytest
import quantize_catdog as script
import torch
from PIL import Image, ImageFilter

from helpers import (
    LONE_IS_EXACT,
    MUTATIONS,
    PICTURES,
    ROOT,
    Calls,
    Pictures,
    Place,
    beside_good_weights,
    figures_of,
    load_converted,
    mutated,
    png_header_that_promises,
    quantized,
    refused,
    started,
    stopped,
    with_parts,
)

SEED = 20              # of all mutations
pytestmark = pytest.mark.filterwarnings("ignore:::PIL")        # as the script ignores them
MEGABYTE = 2**20

# layouts

def test_which_files_are_pictures_of_a_folder(tmp_path, monkeypatch):
    """Classes alternate, in file names or in folders, whatever the folder itself is called and in whatever order it is
    listed. Folders whose names begin with . or @ and links to folders are passed over; the folder itself may be a
    link, and so may a file."""
    folder = tmp_path / "cat_dog" / "dogs"
    for kind in ("Cat", "Dog/deep/er", ".hidden/Cat", "@eaDir/Cat", "Cat/@eaDir"):
        (folder / kind).mkdir(parents=True)
        for i in range(12):
            (folder / kind / f"{i}.jpg").touch()
    (folder / "dog.3.jpg").touch()
    (folder / "Cat" / "again").symlink_to(folder)
    (folder / "dogs").symlink_to(PICTURES)
    (folder / "Dog" / "12.jpg").symlink_to(PICTURES / "dog.0.jpg")
    (tmp_path / "linked").symlink_to(folder)
    expected = [f"{kind}/{i}.jpg" for i in range(12) for kind in ("Cat", "Dog/deep/er")] + ["Dog/12.jpg"]
    expected.insert(8, "dog.3.jpg")
    walk = os.walk
    for order in (1, -1):
        monkeypatch.setattr(os, "walk", lambda *args, order=order, **options: (
            (top, folders, sorted(files)[::order]) for top, folders, files in walk(*args, **options)))
        for path in (folder, tmp_path / "linked"):
            pictures = script.CatDogDataset(path)
            assert pictures.files == expected and pictures.labels == [int("og" in file) for file in expected]
            assert pictures.skipped == {}

# pictures under attack

def bases():
    """[(ending, bytes)]: small pictures of every format and mode."""
    with Image.open(PICTURES / "cat.0.jpg") as image:
        image = image.resize((64, 48))
    exif = Image.Exif()
    exif[0x0112] = 6
    frames = [image, image.filter(ImageFilter.BLUR)]
    ways = [("jpg", image, {}), ("jpg", image, {"progressive": True}), ("jpg", image.convert("CMYK"), {}),
            ("jpg", image, {"exif": exif}), ("jpg", image.convert("L"), {}), ("png", image, {}),
            ("png", image.convert("RGBA"), {}), ("png", image.quantize(16), {}),
            ("png", Image.fromarray(np.full((48, 64), 999, np.uint16)), {}),
            ("gif", image, {}), ("gif", frames[0], {"save_all": True, "append_images": frames[1:]}),
            ("webp", image, {}), ("webp", frames[0], {"save_all": True, "append_images": frames[1:]}),
            ("png", frames[0], {"save_all": True, "append_images": frames[1:]}),
            ("bmp", image, {}), ("tif", image, {}), ("tif", image, {"compression": "tiff_lzw"}), ("ppm", image, {})]
    found = []
    for ending, picture, options in ways:
        file = io.BytesIO()
        picture.save(file, {"jpg": "jpeg", "tif": "tiff"}.get(ending, ending), **options)
        found.append((ending, file.getvalue()))
    return found

def jpeg_that_promises(width, height):
    with Image.open(PICTURES / "cat.0.jpg") as image:
        file = io.BytesIO()
        image.resize((16, 16)).save(file, "jpeg")
    data = bytearray(file.getvalue())
    at = data.index(b"\xff\xc0")
    data[at + 5:at + 9] = struct.pack(">HH", height, width)
    return bytes(data)

@pytest.fixture(scope="module")
def attacked(tmp_path_factory):
    """A place with good pictures in cat_dog/val, and the same among more than 200 bad ones in cat_dog/attacked."""
    place, rng = Place(tmp_path_factory.mktemp("attacked"), 10), random.Random(SEED)
    folder = place.val.parent / "attacked"
    folder.mkdir()
    for file in place.val.iterdir():
        shutil.copy(file, folder / f"good.{file.name}")
    originals = bases()
    for i, ((ending, data), kind) in enumerate(itertools.product(originals, [*range(MUTATIONS)] * 2)):
        ending = rng.choice(["jpg", "png", "gif"]) if i % 11 == 0 else ending                     # wrong extension
        name = rng.choice(["cat.{}", "dog {}", "кот cat {}", "猫 dog {}", "قط-cat-{}", "dog_{}\n"]).format(i)
        (folder / f"{name}.{ending}").write_bytes(mutated(data, rng, kind))
    special = [b"", b"\0" * 5000, png_header_that_promises(60000, 60000), png_header_that_promises(8000, 8000),
               png_header_that_promises(0, 5), jpeg_that_promises(60000, 60000), jpeg_that_promises(8000, 8000),
               jpeg_that_promises(1, 60000), b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EOF\n"]
    for i, data in enumerate(special):
        (folder / f"cat.special {i}.jpg").write_bytes(data)
    (folder / "dog.nowhere.jpg").symlink_to("nowhere")
    (folder / "dog.itself.jpg").symlink_to("dog.itself.jpg")
    (folder / "dog.long.jpg").symlink_to("x" * 300)
    os.mkfifo(folder / "dog.pipe.jpg")
    (folder / os.fsdecode(b"cat.\xff\xfe.jpg")).write_bytes(b"not a name in UTF-8")
    (folder / "cat.forbidden.jpg").write_bytes(originals[0][1])
    (folder / "cat.forbidden.jpg").chmod(0)
    return place, folder

def run_measured(place, **constants):
    """(exit status, stderr, most memory in bytes) of a run."""
    script = place.edit(**constants)
    with open(place.folder / "out.txt", "wb") as out, open(place.folder / "err.txt", "wb") as err:
        process = subprocess.Popen([sys.executable, script], stdout=out, stderr=err)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    return process.returncode, (place.folder / "err.txt").read_text(errors="replace"), usage.ru_maxrss * 1024

def test_three_hundred_bad_pictures(attacked):
    """The run ends well, within the memory that the README states; each file is used or named with its reason."""
    place, folder = attacked
    status, err, clean_memory = run_measured(place)
    clean = place.last_report()
    assert (status, err) == (0, "")
    status, err, memory = run_measured(place, EVALUATION_SPLIT="attacked", BATCH_SIZE=20)
    assert status == 0 and "Traceback" not in err and "quantize_catdog" not in err      # libtiff writes there by itself
    assert memory < clean_memory + 1000 * MEGABYTE
    report = place.last_report()
    reasons = {row["file"]: row["reason"] for row in report["skipped"]}
    assert report["images"]["evaluated"] + len(reasons) == len(os.listdir(folder)) > 300
    assert len(reasons) > 80 and all(reason and "\n" not in reason for reason in reasons.values())
    assert report["layers"] == clean["layers"]                                  # calibrated on the good ones

def test_bad_pictures_change_nothing_about_the_good_ones(attacked):
    """To the last bit, in FP32 and in INT8."""
    place, folder = attacked
    clean, mixed = script.CatDogDataset(place.val), script.CatDogDataset(folder)
    folded = script.load_checkpoint(place.checkpoint).fused()
    script.calibrate(folded, script.CatDogDataset(place.train))
    int8 = folded.cl_scale(script.read_constants(script.LEGAL_RECIPE))
    script.choose_engines(int8, clean.first_pixels(2))
    for network in (folded, int8):
        expected, found = script.evaluate("", network, clean), script.evaluate("", network, mixed)
        rows = dict(zip(found.files, found.logits))
        assert len(expected.files) == 10 and len(rows) > 80
        for name, logits in zip(expected.files, expected.logits):
            assert torch.equal(rows[f"good.{name}"], logits), name

# checkpoints under attack

@pytest.fixture(scope="module", params=[script.load_checkpoint, load_converted, script.load_int8_checkpoint],
                ids=["FP32", "converted", "INT8"])
def checkpoint(request, state):
    """(bytes, tensors, the function that loads it) of a good checkpoint."""
    if request.param is script.load_int8_checkpoint:
        int8 = quantized(state)[0]
        return script.int8_checkpoint(int8), int8.state_dict(), request.param
    path = ROOT / "BEST_checkpoint.pth.tar"
    return path.read_bytes(), script.load_checkpoint(path).state_dict(), request.param

def loads_the_same(path, load, expected):
    """Whether a checkpoint is loaded, and then with exactly these values; else it is refused in one line."""
    try:
        found = load(path).state_dict()
    except script.InputError as error:
        assert "\n" not in str(error) and str(path) in str(error)
        return False
    assert list(found) == list(expected) and all(torch.equal(found[name], value) for name, value in expected.items())
    return True

def test_mutated_checkpoints(checkpoint, tmp_path):
    """Also a single flipped bit in a weight, which torch's loader would take for the weight."""
    data, expected, load = checkpoint
    rng, path, loaded = random.Random(SEED), tmp_path / "c.pth.tar", 0
    for kind in [*range(MUTATIONS)] * 5:
        path.write_bytes(mutated(data, rng, kind))
        loaded += loads_the_same(path, load, expected)
    for _ in range(20):
        changed = bytearray(data)
        for _ in range(rng.choice([1, 1, 5])):                      # in the archive's lists of names and sizes
            changed[-rng.randrange(1, 4000)] ^= 1 << rng.randrange(8)
        path.write_bytes(changed)
        loaded += loads_the_same(path, load, expected)
    assert 0 < loaded < 30                                          # what loads has its damage where nothing lies
    flipped = bytearray(data)
    flipped[len(data) // 2] ^= 1
    path.write_bytes(flipped)
    assert not loads_the_same(path, load, expected)

def test_mutated_pickles_with_right_checksums(checkpoint, tmp_path, monkeypatch):
    """Nothing but InputError comes out, nothing not finite comes in, and nothing is executed."""
    data, expected, load = checkpoint
    rng, path = random.Random(SEED), tmp_path / "c.pth.tar"
    for name in ("system", "mkdir", "remove"):
        monkeypatch.setattr(os, name, lambda *_: pytest.fail("executed"))
    for kind in [*range(MUTATIONS)] * 4:
        path.write_bytes(with_parts(data, {"data.pkl": lambda content, kind=kind: mutated(content, rng, kind)}))
        try:
            found = load(path).state_dict()
        except script.InputError as error:
            assert "\n" not in str(error)
        else:
            for name, value in expected.items():
                assert found[name].shape == value.shape and found[name].float().isfinite().all(), name

def opcodes(value):
    """A value's pickle, without its frame."""
    return pickle.dumps(value, 2)[2:-1]

HOSTILE = {     # opcodes, and what is there where they have been executed
    "os.mkdir": lambda path: opcodes(Calls(os.mkdir, str(path))),
    "open": lambda path: opcodes(Calls(open, str(path), "w")),
    "exec": lambda path: opcodes(Calls(exec, f"open({str(path)!r}, 'w')")),
    "inst": lambda path: b"(S" + repr(str(path)).encode() + b"\nios\nmkdir\n",
    "as a list's item": lambda path: opcodes([1, {"a": Calls(os.mkdir, str(path))}]),
    "attributes of a class": lambda path: opcodes(Calls(setattr, torch.nn.Conv2d, "forward", None)),
}

@pytest.mark.parametrize("key", [b"note", b"model", b"recipe"])
@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_pickles(tmp_path, monkeypatch, checkpoint, name, key):
    """Beside all weights, or in their place, so that nothing but the safe loader refuses them: another one executes
    them."""
    (data, expected, load), target, path = checkpoint, tmp_path / "executed", tmp_path / "c.pth.tar"
    path.write_bytes(beside_good_weights(data, b"N"))
    assert loads_the_same(path, load, expected)
    path.write_bytes(beside_good_weights(data, HOSTILE[name](target), key))
    forward = torch.nn.Conv2d.forward
    monkeypatch.setattr(torch.nn.Conv2d, "forward", forward)
    refused(path, "cannot be loaded safely", load=load)
    assert not target.exists() and torch.nn.Conv2d.forward is forward
    torch.load(path, weights_only=False)
    assert target.exists() or torch.nn.Conv2d.forward is None

def test_hostile_pickle_in_the_format_of_torch_before_1_6(tmp_path, state):
    path = tmp_path / "c.pth.tar"
    torch.save({"model": state, "note": Calls(os.mkdir, str(tmp_path / "executed"))}, path,
               _use_new_zipfile_serialization=False)
    for load in (script.load_checkpoint, load_converted):
        refused(path, "is damaged, or was saved by torch before 1.6", load=load)
    assert not (tmp_path / "executed").exists()

@pytest.mark.parametrize("value", [b"(" * 100_000 + b"t" * 100_000, b"(" + b"K\x01" * 10**5 + b"t"],
                         ids=["nested deep", "a huge tuple"])
def test_large_pickles(tmp_path, checkpoint, value):
    """What is harmless beside the weights changes none."""
    data, expected, load = checkpoint
    (tmp_path / "c.pth.tar").write_bytes(beside_good_weights(data, value))
    assert loads_the_same(tmp_path / "c.pth.tar", load, expected)

def test_parts_that_are_too_small(tmp_path):
    path = tmp_path / "c.pth.tar"
    path.write_bytes(with_parts((ROOT / "BEST_checkpoint.pth.tar").read_bytes(), {"/data/0": lambda part: part[:8]}))
    refused(path, "cannot be loaded safely")

@pytest.mark.parametrize("packed", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_a_checkpoint_that_fills_the_memory(tmp_path, packed, monkeypatch, state):
    """But for its size it would be loaded."""
    file, path = io.BytesIO(), tmp_path / "c.pth.tar"
    torch.save({"model": state, "more": torch.zeros(5 * MEGABYTE, dtype=torch.uint8)}, file)
    path.write_bytes(with_parts(file.getvalue(), {}, packed))
    assert script.load_checkpoint(path) and (packed == zipfile.ZIP_STORED or path.stat().st_size < 4 * MEGABYTE)
    monkeypatch.setattr(script, "LARGEST_CHECKPOINT", 4 * MEGABYTE)
    refused(path, "cannot be loaded safely (ValueError: too large when unpacked)")

# same in, same out

@pytest.fixture(scope="module")
def eleven(tmp_path_factory):
    """Eleven pictures, so that some batch sizes leave one over, or twelve where torch computes a lone one otherwise:
    (place, report, tensors of the INT8 checkpoint)."""
    place = Place(tmp_path_factory.mktemp("eleven"), 12)
    if LONE_IS_EXACT:
        (place.val / "dog.5.jpg").unlink()
    return place, *run_of(place)

def run_of(place, **constants):
    report, _ = place.report(**constants)
    return report, torch.load(place.results / "INT8_checkpoint.pth.tar", weights_only=True)["model"]

@pytest.mark.parametrize("constants", [
    dict(BATCH_SIZE=1), dict(BATCH_SIZE=2, NUM_WORKERS=1, DECODED_TOGETHER=4), dict(BATCH_SIZE=4096, NUM_WORKERS=7),
    dict(BATCH_SIZE=10, INT8_ENGINE="reference"), dict(BATCH_SIZE=3, KEEP_BYTES=5 * 224 * 224 * 3)], ids=str)
def test_batches_workers_and_engines_change_nothing(eleven, constants):
    """Not one bit of ranges, integers, classes or flips. Nor does it where pictures are decoded again for each pass."""
    if constants["BATCH_SIZE"] == 1 and not LONE_IS_EXACT:
        pytest.skip("torch computes a lone picture otherwise here")
    place, expected, tensors = eleven
    report, found = run_of(place, **constants)
    assert figures_of(report) == figures_of(expected)
    assert all(torch.equal(found[name], value) for name, value in tensors.items()) and len(found) == len(tensors)

def test_order_of_the_pictures_changes_nothing(eleven, monkeypatch):
    """Ranges and logits of pictures that come in another order, and so beside others, to the last bit."""
    place, *_ = eleven
    monkeypatch.setattr(script, "BATCH_SIZE", 4)
    found = []
    for shuffle in (False, True):
        pictures = script.CatDogDataset(place.val)
        if shuffle:
            both = list(zip(pictures.files, pictures.labels))
            random.Random(SEED).shuffle(both)
            pictures.files, pictures.labels = map(list, zip(*both))
        folded = script.load_checkpoint(place.checkpoint).fused()
        calibrated = script.calibrate(folded, pictures)
        int8 = folded.cl_scale(script.read_constants(script.LEGAL_RECIPE))
        answers = script.evaluate("", int8, pictures)
        found.append(([folded.ranges[name] for name in script.ACTIVATIONS],
                      {name: (label, fp32.tolist(), logits.tolist()) for name, label, fp32, logits in
                       zip(calibrated.files, calibrated.labels.tolist(), calibrated.logits, answers.logits)},
                      list(int8.state_dict().values())))
    assert all(torch.equal(a, b) for a, b in zip(found[0][0] + found[0][2], found[1][0] + found[1][2]))
    assert found[0][1] == found[1][1]

# progress, Ctrl-C, closed pipes, full disks

@pytest.mark.parametrize("seconds, lines", [
    (0.001, ["x Top1: 100.000, 100 of 100 pictures of planted"]),
    (5, ["x: 20 of 100 pictures, 40 seconds left",
         "x: 40 of 100 pictures, 30 seconds left",
         "x: 60 of 100 pictures, 20 seconds left",
         "x: 80 of 100 pictures, 10 seconds left",
         "x: 100 of 100 pictures, 0 seconds left",
         "x Top1: 100.000, 100 of 100 pictures of planted"]),
])
def test_progress(monkeypatch, capsys, seconds, lines):
    """Every ten seconds a line."""
    monkeypatch.setattr(script.time, "perf_counter", itertools.count(0, seconds).__next__)
    for name in ("BATCH_SIZE", "DECODED_TOGETHER"):
        monkeypatch.setattr(script, name, 10)
    pictures = Pictures(torch.zeros(100, 3, 2, 2))
    script.evaluate("x", lambda pixels, observe: torch.tensor([[1.0, 0.0]]).expand(len(pixels), 2), pictures)
    assert capsys.readouterr().out == "".join(f"{line}\n" for line in lines)

@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """(place with the results of a run, these)."""
    place = Place(tmp_path_factory.mktemp("done"), 20)
    place.report()
    return place, place.files()

@pytest.mark.parametrize("step", ["Load and fold", "Save"])
def test_ctrl_c_in_the_run(done, step):
    stopped(started(done[0].edit((step, "import signal\nos.kill(os.getpid(), signal.SIGINT)"))), *done)

@pytest.mark.parametrize("lines", [0, 43])
def test_closed_pipe(done, lines):
    """`python quantize_catdog.py | head -3`: silence, a status that says so, and the results of before."""
    place, before = done
    process = started(place.edit())
    for _ in range(lines):
        assert process.stdout.readline()
    process.stdout.close()
    assert process.stderr.read() == ""
    assert process.wait(timeout=300) == 1
    assert place.files() == before

def test_full_disk(tmp_path):
    """A real one, where the tests may mount it."""
    place = Place(tmp_path)
    place.results.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=200k", "none", place.results]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mount is not allowed")
    try:
        place.refuse("cannot write", str(place.results), "No space left on device", "OUTPUT_DIR")
    finally:
        subprocess.run(["umount", place.results], check=True)

# scale

def test_memory_does_not_grow_with_the_number_of_pictures(tmp_path):
    """Four times as many, of which KEEP_BYTES lets 10 MB of each split be kept. With a small SAMPLE: the maps of its
    pictures take more than all else."""
    memory = []
    for count in (100, 400):
        place = Place(tmp_path / str(count), 2)
        for split in (place.train, place.val):
            with Image.open(split / "cat.0.jpg") as image:
                image.resize((64, 64)).save(split / "cat.1.jpg")
            for i in range(2, count):
                os.link(split / "cat.1.jpg", split / f"{'cat' if i % 2 else 'dog'}.{i}.jpg")
        status, err, most = run_measured(place, KEEP_BYTES=10**7, SAMPLE=2)
        assert (status, err) == (0, "")
        assert place.last_report()["images"] == {"evaluated": count + 1, "calibrated": count + 1}
        memory.append(most)
    assert memory[1] < memory[0] + 40 * MEGABYTE, memory        # what is decoded takes 90 MB more
