"""Train the cat/dog CNN in FP32 and write results/trained_checkpoint.pth.tar.

    python training/train_checkpoint.py --photos train-0.tar train-1.tar ... --drawn 5000 --epochs 40

`--photos` takes folders and tar files of pictures, whose labels are found in their paths as
quantize_catdog.py finds them; `--drawn` adds freshly drawn ones (training/draw_cat_dog.py, with
seeds that cat_dog/val never uses). One twentieth of the photographs and of the drawings is held
out, and the accuracy on it is printed after each epoch. `--start` trains from given weights on
instead of random ones. Everything needed to go on after an interruption is in `<output>.training`:
give the same command again. With `--resume` the pictures may be others than before; the learning
rate follows the share of the epochs that is done. Decoded pictures are saved in `--cache`.

The other defaults are those that made BEST_checkpoint.pth.tar.

The network that is trained is the one that quantize_catdog.py runs, in an order that trains faster:
pool -> batch norm -> ReLU instead of batch norm -> ReLU -> pool. ReLU is monotone, and so is batch
norm while gamma > 0, which a clamp after every batch ensures; then the maximum may be taken first,
and batch norm and ReLU see a quarter of the values. The pixels are normalized for training; the
normalization is folded into cnn1 when the checkpoint is written, exactly, because no convolution
pads.
"""
import argparse
import ctypes
import math
import os
import sys
import tarfile
import time
import zlib
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

from draw_cat_dog import draw

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import quantize_catdog as script  # noqa: E402

PIXEL_MEAN, PIXEL_STD = 120.0, 64.0     # of the raw 0..255 pixels, all channels alike
TRAINING_SEEDS = 1_000_000_000          # drawings of the training set start at this seed
CONVOLUTIONS = [layer for layer in script.LAYERS if layer.is_conv]


class TrainingNet(nn.Module):
    """The layers and state-dict names of `CNN_Model`, with pooling before batch norm (see above)."""

    def __init__(self, dropout):
        super().__init__()
        model = script.CNN_Model()
        for layer in CONVOLUTIONS:
            self.add_module(layer.name, model.get_submodule(layer.name))
            self.add_module(layer.bn, model.get_submodule(layer.bn))
        self.fc1 = nn.Linear(model.fc1.in_features, model.fc1.out_features)
        self.fc2 = nn.Linear(model.fc2.in_features, model.fc2.out_features)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x):                                   # normalized pixels, (N, 3, 224, 224)
        for layer in CONVOLUTIONS:
            x = F.max_pool2d(self.get_submodule(layer.name)(x), 2)
            x = F.relu(self.get_submodule(layer.bn)(x))
        x = self.fc1(self.dropout(x.flatten(1)))            # no ReLU after fc1, as in the notebook
        return self.fc2(self.dropout(x))                    # (N, 2): cat, dog

    @torch.no_grad()
    def keep_gamma_positive(self):
        for layer in CONVOLUTIONS:
            self.get_submodule(layer.bn).weight.clamp_(min=1e-2)


def photographs(path):
    """Yield (path inside it, bytes) of the pictures in a folder or a tar file."""
    path = Path(path)
    if path.is_dir():
        for file in sorted(path.rglob("*")):
            if file.is_file():
                yield file.relative_to(path), file.read_bytes()
    else:
        with tarfile.open(path) as tar:
            for member in tar:
                if member.isfile():
                    yield Path(member.name), tar.extractfile(member).read()


def fingerprint(source):
    """Eight hex digits of a folder or a tar file: others when what is in it changes."""
    files = sorted(Path(source).rglob("*")) if Path(source).is_dir() else [Path(source)]
    found = [(str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    return f"{zlib.crc32(repr(found).encode()):08x}"


def build_cache(folder, photos, drawn):
    """Decode every picture once into files on disk; return pixels (N, 224, 224, 3), labels, is_photo.

    Raises InputError where there is none.
    """
    folder.mkdir(parents=True, exist_ok=True)
    parts = []
    for source in photos:
        cached = folder / f"{Path(source).stem}-{fingerprint(source)}.npz"
        if not cached.exists():
            pixels, labels = [], []
            for name, data in photographs(source):
                try:
                    label = script.label_of(name)
                    pixels.append(script.decode(data, script.IMAGE_SIZE))
                    labels.append(label)
                except script.InputError as error:
                    print(f"left out {source}: {script.printable(str(name))}: {error}")
                if len(labels) % 500 == 0:
                    print(f"decoding {source}: {len(labels)}", end="\r", flush=True)
            if not labels:
                raise script.InputError(f"no usable picture in {source}")
            write_npz(cached, pixels, labels)
        parts.append((*read_npz(cached), True))
    if drawn:
        cached = folder / f"drawn-{drawn}.npz"
        if not cached.exists():
            pixels, labels = [], []
            for i in range(drawn):
                picture = draw(("cat", "dog")[i % 2], TRAINING_SEEDS + i)
                pixels.append(np.asarray(picture.resize(script.IMAGE_SIZE)))
                labels.append(i % 2)
                if i % 50 == 0:
                    print(f"drawing: {i} of {drawn}", end="\r", flush=True)
            write_npz(cached, pixels, labels)
        parts.append((*read_npz(cached), False))
    pixels = torch.from_numpy(np.concatenate([p for p, _, _ in parts]))
    labels = torch.from_numpy(np.concatenate([l for _, l, _ in parts]))
    is_photo = torch.cat([torch.full((len(l),), photo) for _, l, photo in parts])
    return pixels, labels, is_photo


def write_npz(path, pixels, labels):
    temporary = path.with_suffix(".tmp")
    with open(temporary, "wb") as file:
        np.savez(file, pixels=np.stack(pixels), labels=np.array(labels, dtype=np.int64))
    os.replace(temporary, path)


def read_npz(path):
    with np.load(path) as file:
        return file["pixels"], file["labels"]


def augment(pixels, generator):
    """uint8 (N, 224, 224, 3) -> float (N, 3, 224, 224), normalized and changed at random."""
    n = len(pixels)

    def uniform(low, high, *shape):
        return torch.empty(n, *shape).uniform_(low, high, generator=generator)

    scale = uniform(math.log(0.65), math.log(1.1)).exp()            # of the side that is shown
    aspect = uniform(math.log(0.85), math.log(1 / 0.85)).exp().sqrt()
    angle = uniform(-12, 12) * (math.pi / 180)
    flip = torch.where(uniform(0, 1) < 0.5, -1.0, 1.0)
    across, down = scale * aspect, scale / aspect
    room_x, room_y = (1 - across).abs(), (1 - down).abs()           # so that the crop stays inside
    theta = torch.stack([
        torch.stack([across * angle.cos() * flip, -down * angle.sin(), uniform(-1, 1) * room_x], 1),
        torch.stack([across * angle.sin() * flip, down * angle.cos(), uniform(-1, 1) * room_y], 1)], 1)
    x = pixels.permute(0, 3, 1, 2).float()
    x = F.grid_sample(x, F.affine_grid(theta, list(x.shape), align_corners=False),
                      padding_mode="reflection", align_corners=False)
    # small copies of photographs are scaled up to 224 and soft; full-size photographs are scaled down and crisp
    crispness = uniform(-1, 1, 1, 1, 1).clamp_(min=0)
    x += crispness * (x - F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False))
    gain = uniform(math.log(0.75), math.log(1.33), 1, 1, 1).exp() * uniform(0.93, 1.07, 3, 1, 1)
    contrast = uniform(0.75, 1.25, 1, 1, 1)
    mean = x.mean((2, 3), keepdim=True)
    x = ((x - mean) * contrast + mean).mul_(gain).clamp_(0, 255)
    return normalize(x)


def normalize(x):
    return x.sub(PIXEL_MEAN).div(PIXEL_STD).contiguous(memory_format=torch.channels_last)


@torch.no_grad()
def accuracy(model, pixels, labels):
    """Share in percent of right answers on raw pictures, in FP32."""
    model.eval()
    right = sum((model(normalize(p.permute(0, 3, 1, 2).float())).argmax(1) == l).sum().item()
                for p, l in zip(pixels.split(64), labels.split(64)))
    return 100 * right / max(1, len(labels))


def one_cycle(done, warm_up=0.1):
    """Share of the highest learning rate when the share `done` of the training is over (cosine)."""
    phase = done / warm_up if done < warm_up else 1 + (done - warm_up) / (1 - warm_up)
    return max(0.002, (1 - math.cos(math.pi * phase)) / 2)


def moving_average(average, value, count):
    """Exponential moving average over about 1,000 batches, over fewer of them in the beginning."""
    return torch.lerp(average.float(), value.float(), 1 - min(0.999, (1 + count) / (10 + count))).to(value.dtype)


def fold_normalization(state):
    """Weights for normalized pixels -> weights for raw 0..255 pixels: (x - mean)/std goes into cnn1."""
    state = {name: value.clone() for name, value in state.items()}
    weight, bias = state["cnn1.weight"].double(), state["cnn1.bias"].double()
    state["cnn1.weight"] = (weight / PIXEL_STD).float()
    state["cnn1.bias"] = (bias - weight.sum((1, 2, 3)) * PIXEL_MEAN / PIXEL_STD).float()
    return state


def unfold_normalization(state):
    """The inverse of `fold_normalization`."""
    state = {name: value.clone() for name, value in state.items()}
    weight, bias = state["cnn1.weight"].double() * PIXEL_STD, state["cnn1.bias"].double()
    state["cnn1.weight"] = weight.float()
    state["cnn1.bias"] = (bias + weight.sum((1, 2, 3)) * PIXEL_MEAN / PIXEL_STD).float()
    return state


def keep_memory():
    """Let glibc keep big buffers mapped: a step uses the memory of the step before."""
    if sys.platform == "linux" and hasattr(ctypes.CDLL(None), "mallopt"):
        m_mmap_max, m_trim_threshold = -4, -1
        ctypes.CDLL(None).mallopt(m_mmap_max, 0)
        ctypes.CDLL(None).mallopt(m_trim_threshold, 2**31 - 1)


def save(value, path):
    temporary = Path(f"{path}.tmp")
    torch.save(value, temporary)
    os.replace(temporary, path)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--photos", nargs="*", default=[], help="folders or tar files of pictures")
    parser.add_argument("--drawn", type=int, default=0, help="how many pictures to draw in addition")
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--lr", type=float, default=4e-3)
    parser.add_argument("--weight-decay", type=float, default=0.05)
    parser.add_argument("--dropout", type=float, default=0.1)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--cache", type=Path, default=ROOT / "results" / "training-cache")
    parser.add_argument("--start", type=Path, help="a checkpoint whose weights are trained on")
    parser.add_argument("--resume", action="store_true", help="go on with other pictures, too")
    parser.add_argument("--output", type=Path, default=ROOT / "results" / "trained_checkpoint.pth.tar")
    args = parser.parse_args()
    try:
        train(args, parser)
    except script.InputError as error:
        sys.exit(str(error))


def train(args, parser):
    if not args.photos and not args.drawn:
        parser.error("nothing to train on: give --photos, --drawn or both")
    for source in args.photos:
        if not Path(source).exists():
            parser.error(f"--photos: no folder or tar file {source}")

    script.prepare_process()
    keep_memory()
    torch.manual_seed(args.seed)

    pixels, labels, is_photo = build_cache(args.cache, args.photos, args.drawn)
    number = torch.arange(len(labels))
    is_held_out = (number % 40 == 0) | (number % 40 == 21)      # one even, one odd: cats and dogs alternate
    held_out, to_train = number[is_held_out], number[~is_held_out]
    print(f"{len(to_train)} pictures to train on, {len(held_out)} held out")
    if len(to_train) < args.batch:
        raise script.InputError(f"fewer pictures than a batch of {args.batch}: give more, or a smaller --batch")
    if len(labels[to_train].unique()) < len(script.CLASSES):
        raise script.InputError(f"all are of one class: give pictures of {' and '.join(script.CLASSES)}")
    measures = {name: (pixels[index], labels[index]) for name, index in
                [("photos", held_out[is_photo[held_out]]), ("drawn", held_out[~is_photo[held_out]])] if len(index)}

    model = TrainingNet(args.dropout).to(memory_format=torch.channels_last)
    if args.start:
        start = script.load_checkpoint(args.start).state_dict()
        model.load_state_dict(unfold_normalization(start), strict=False)
        if any((start[f"{layer.bn}.weight"] <= 0).any() for layer in CONVOLUTIONS):
            print("some gammas are not positive: these channels start anew")
        model.keep_gamma_positive()
    average = torch.optim.swa_utils.AveragedModel(model, avg_fn=moving_average, use_buffers=True)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=args.weight_decay)
    batches = len(to_train) // args.batch
    resume, first = Path(f"{args.output}.training"), 0
    args.output.parent.mkdir(parents=True, exist_ok=True)
    of_these = [zlib.crc32(labels.numpy().tobytes()), zlib.crc32(pixels[::7, ::32, ::32].numpy().tobytes())]
    if resume.exists():
        saved = torch.load(resume, weights_only=True)
        if saved.get("pictures") != of_these and not args.resume:
            raise script.InputError(f"{resume} is of a training on other pictures: delete it, or give --resume to go "
                                    "on from it with these")
        model.load_state_dict(saved["model"])
        average.load_state_dict(saved["average"])
        optimizer.load_state_dict(saved["optimizer"])
        first = saved["epoch"]
        print(f"resuming after epoch {first}")

    for epoch in range(first, args.epochs):
        torch.manual_seed(args.seed * 1000 + epoch)                             # the same after a resume
        generator = torch.Generator().manual_seed(args.seed * 1000 + epoch)
        shuffled = to_train[torch.randperm(len(to_train), generator=generator)]
        model.train()
        start, total, right = time.perf_counter(), 0.0, 0
        for i in range(batches):
            index = shuffled[i * args.batch:(i + 1) * args.batch]
            x, y = augment(pixels[index], generator), labels[index]
            with torch.autocast("cpu", torch.bfloat16):
                logits = model(x).float()
            loss = F.cross_entropy(logits, y, label_smoothing=0.05)
            optimizer.zero_grad()
            loss.backward()
            for group in optimizer.param_groups:
                group["lr"] = args.lr * one_cycle((epoch + i / batches) / args.epochs)
            optimizer.step()
            model.keep_gamma_positive()
            average.update_parameters(model)
            total, right, done = total + loss.item(), right + (logits.argmax(1) == y).sum().item(), i + 1
            if done % 20 == 0 or done == batches:
                pace = (time.perf_counter() - start) / done
                print(f"epoch {epoch + 1}/{args.epochs}  {done}/{batches}  loss {total / done:.4f}  "
                      f"train {100 * right / done / args.batch:.2f} %  {pace / args.batch * 1e3:.1f} ms per picture  "
                      f"{pace * (batches * (args.epochs - epoch) - done) / 60:.0f} min left ",
                      end="\r" if sys.stdout.isatty() and done < batches else "\n" if done == batches else "",
                      flush=True)
        for name, data in measures.items():
            print(f"  held-out {name}: {accuracy(average.module, *data):.2f} % of {len(data[1])}", flush=True)
        save({"model": model.state_dict(), "average": average.state_dict(), "optimizer": optimizer.state_dict(),
              "epoch": epoch + 1, "pictures": of_these}, resume)

    save({"model": fold_normalization(average.module.state_dict()), "epochs": args.epochs}, args.output)
    print(f"wrote {args.output}")


if __name__ == "__main__":
    main()
