"""Draw the demo pictures of cats and dogs that the classifier is shown.

No photograph is shipped with this project (no licence to track, no download),
so the pictures under ``cat_dog/val`` are drawn by this program, from a seed:

    python training/draw_cat_dog.py                 # cat_dog/val/{cat,dog}.0-49.jpg
    python training/draw_cat_dog.py --output /tmp/more --count 500 --seed 7

Picture ``i`` of a kind is ``draw(kind, seed * 100000 + i)``; the shipped hundred
are ``--seed 0``, that is picture seeds 0 to 49 of each kind, so a program that
wants other drawings (to train on) takes picture seeds of 100000 and above.

How a picture comes about: a scene is chosen (the same way for both kinds), its
backdrop painted, an animal built as a list of parts (body, head, ears, muzzle,
eyes) in its own units, every part painted with fur, coat and light, something
may be put in front, and a "camera" adds blur, exposure, tint and noise.
"""
import argparse
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

KINDS = ("cat", "dog")
SEEDS_PER_RUN = 100_000
SIZES = ((500, 375), (500, 375), (500, 333), (480, 360), (375, 500), (400, 400), (450, 338), (333, 500))
# Both kinds draw from the same colours: a coat alone must not tell them apart.
COATS = {"black": (44, 41, 42), "charcoal": (88, 86, 90), "blue": (128, 132, 142), "ginger": (205, 128, 62),
         "cream": (228, 205, 166), "white": (238, 234, 226), "chocolate": (104, 68, 46), "fawn": (190, 150, 106),
         "golden": (214, 164, 92), "brown": (134, 100, 70), "silver": (170, 168, 166)}
F32 = np.float32


# ---------------------------------------------------------------- geometry
def frame(x=0.0, y=0.0, scale=1.0, angle=0.0, flip=False):
    """An affine map (matrix, offset) from a part's own units to its parent's."""
    c, s = np.cos(angle) * scale, np.sin(angle) * scale
    sign = -1.0 if flip else 1.0
    return np.array([[c * sign, -s], [s * sign, c]]), np.array([x, y], float)


def join(outer, inner):
    """A part's frame seen from the outer frame's parent."""
    return outer[0] @ inner[0], outer[0] @ inner[1] + outer[1]


def apply(f, points):
    """The points in the parent's units."""
    return np.asarray(points, float) @ f[0].T + f[1]


def smooth(points, steps=7):
    """A closed Catmull-Rom curve through the points."""
    p = np.asarray(points, float)
    a, b, c, d = np.roll(p, 1, 0), p, np.roll(p, -1, 0), np.roll(p, -2, 0)
    t = np.linspace(0, 1, steps, endpoint=False)[None, :, None]
    a, b, c, d = (q[:, None, :] for q in (a, b, c, d))
    out = 0.5 * (2 * b + (c - a) * t + (2 * a - 5 * b + 4 * c - d) * t**2 + (3 * b - a - 3 * c + d) * t**3)
    return out.reshape(-1, 2)


def mirror(right_half):
    """The outline whose right half, top to bottom, is given (ends on the axis)."""
    half = np.asarray(right_half, float)
    return np.vstack([half, (half * [-1, 1])[-2:0:-1]])


def blob(x, y, rx, ry, angle=0.0, n=28):
    """An ellipse, possibly turned."""
    t = np.linspace(0, 2 * np.pi, n, endpoint=False)
    return apply(frame(x, y, 1, angle), np.c_[rx * np.cos(t), ry * np.sin(t)])


def limb(points, widths):
    """A tube along a bent line, with a round end."""
    p, w = np.asarray(points, float), np.asarray(widths, float)[:, None]
    t = np.gradient(p, axis=0)
    t /= np.linalg.norm(t, axis=1, keepdims=True) + 1e-9
    n = np.c_[-t[:, 1], t[:, 0]]
    return smooth(np.vstack([p + n * w, p[-1:] + t[-1:] * w[-1:] * 0.9, (p - n * w)[::-1]]))


def ramp(x, lo, hi):
    """0 below lo, 1 above hi, a smooth step between."""
    t = np.clip((x - lo) / (hi - lo), 0, 1)
    return t * t * (3 - 2 * t)


def rgb(colour):
    """A 0-255 colour as floats from 0 to 1."""
    return np.array(colour, F32) / 255


# ---------------------------------------------------------------- textures
def cloud_tile(rng, cells, size=256):
    """Smooth noise in -1..1 that repeats every `size` samples."""
    g = rng.standard_normal((cells, cells)).astype(F32)
    g = np.pad(g, 2, mode="wrap")
    step = size // cells
    big = np.asarray(Image.fromarray(g).resize((g.shape[1] * step,) * 2, Image.BICUBIC))
    return np.clip(big[2 * step:2 * step + size, 2 * step:2 * step + size] / 1.6, -1, 1)


def streak_tile(rng, size=256, length=13):
    """Noise combed along x: the hairs of a coat; it repeats every `size` samples."""
    g = rng.standard_normal((size, size)).astype(F32)
    f = np.fft.rfft2(g)
    kx, ky = np.fft.rfftfreq(size)[None, :], np.fft.fftfreq(size)[:, None]
    f *= np.exp(-(kx * length) ** 2 * 2 - (ky * 1.1) ** 2 * 6)
    g = np.fft.irfft2(f, s=(size, size)).astype(F32)
    return np.clip(g / g.std() / 2.2, -1, 1)


def sample(tile, u, v):
    """Look a repeating tile up at any coordinates."""
    return tile[v.astype(np.int32) & 255, u.astype(np.int32) & 255]


# ---------------------------------------------------------------- backdrop
def floor_part(rng, kind, img, top, tiles):
    """Paint a floor in perspective below the line `top` of the float image."""
    h, w = img.shape[:2]
    y = np.arange(top, h, dtype=F32)[:, None]
    z = 60.0 / (y - top + 0.12 * h)
    x = (np.arange(w, dtype=F32)[None, :] - w * rng.uniform(0.2, 0.8)) * z / 60 * 4
    z = np.broadcast_to(z * 12, x.shape)
    fine = sample(tiles.cloud, x * 90, z * 70 + 40)
    near = (y - top) / (h - top)
    if kind == "wood":
        c = rgb([(150, 106, 70), (182, 142, 100), (112, 76, 52)][rng.integers(3)])
        plank = np.floor(x * 5)
        tone = 0.94 + 0.08 * np.sin(plank * 12.9) + 0.05 * fine
        tone = tone * (1 - 0.35 * (np.abs(x * 5 - plank - 0.5) > 0.47))
    elif kind == "tiles":
        c = rgb([(205, 200, 192), (168, 150, 132), (196, 208, 212)][rng.integers(3)])
        gx, gz = x * 2.5, z * 0.9
        line = (np.abs(gx - np.rint(gx)) < 0.025) | (np.abs(gz - np.rint(gz)) < 0.03)
        check = (np.floor(gx + .5) + np.floor(gz + .5)) % 2 * rng.choice([0.0, 0.0, 0.45])
        tone = 1 - check - 0.28 * line + 0.05 * fine
    elif kind == "carpet":
        c = rgb([(150, 62, 58), (96, 108, 134), (176, 160, 138), (98, 118, 92), (126, 104, 128)][rng.integers(5)])
        motif = np.sin(x * 9) * np.sin(z * 3.2) * rng.choice([0.0, 0.18])
        tone = 0.95 + motif + 0.12 * rng.standard_normal(x.shape).astype(F32)
    elif kind == "grass":
        c = rgb([(92, 128, 52), (112, 138, 66), (76, 112, 58)][rng.integers(3)])
        blades = sample(tiles.streak, np.broadcast_to(y * 1.2, x.shape), x * 60 + 0 * y)
        tone = 0.95 + 0.28 * blades * near + 0.14 * fine + 0.1 * rng.standard_normal(x.shape).astype(F32) * near
    else:
        c = rgb({"asphalt": (116, 116, 118), "snow": (226, 232, 240), "sand": (212, 188, 146)}[kind])
        grain = {"asphalt": 0.09, "snow": 0.03, "sand": 0.06}[kind]
        tone = 0.97 + 0.07 * fine + grain * rng.standard_normal(x.shape).astype(F32)
    img[top:] = (c * (tone * (0.82 + 0.22 * near))[..., None]).clip(0, 1)


def wall_part(rng, kind, size, top, tiles):
    """Paint what stands behind the floor: a wall, a sofa, a garden, a street..."""
    w, h = size
    soft = rgb([(206, 196, 178), (178, 190, 196), (196, 180, 172), (164, 176, 156), (214, 208, 204),
                (120, 128, 142), (150, 118, 104)][rng.integers(7)]) * 255
    paint = lambda c: tuple(int(np.clip(v, 0, 255)) for v in c)  # noqa: E731
    img = Image.new("RGB", size, paint(soft))
    d = ImageDraw.Draw(img)
    if kind in ("wall", "kitchen", "curtains"):
        if kind == "kitchen":
            for ty in range(0, top, 14):
                d.line((0, ty, w, ty), fill=paint(soft * 0.86))
            for tx in range(int(rng.integers(14)), w, 14):
                d.line((tx, 0, tx, top), fill=paint(soft * 0.86))
            d.rectangle((0, top * 0.55, w, top), fill=paint(soft * rng.uniform(0.55, 1.1)))
            for tx in range(int(rng.integers(60)), w, 62):
                d.rectangle((tx, top * 0.6, tx + 54, top * 0.96), outline=paint(soft * 0.6))
        elif kind == "wall":
            for _ in range(rng.integers(0, 3)):
                x, y, s = rng.uniform(0, w), rng.uniform(0.02, 0.3) * h, rng.uniform(0.15, 0.3) * h
                d.rectangle((x, y, x + s, y + s * 1.2), fill=(88, 66, 48))
                d.rectangle((x + 4, y + 4, x + s - 4, y + s * 1.2 - 4), fill=paint(rng.uniform(90, 235, 3)))
        d.rectangle((0, top - 7, w, top), fill=paint(soft * 1.12))
    elif kind == "sofa":
        c = 0.45 * rng.uniform(40, 190, 3) + 0.55 * rng.uniform(70, 150)
        y = top * rng.uniform(0.25, 0.5)
        d.rounded_rectangle((-20, y, w + 20, h), 14, fill=paint(c))
        for x in np.arange(rng.uniform(0, 0.4), 1.5, 0.45) * w:  # back cushions, lighter in the middle
            for k in range(6):
                d.rounded_rectangle((x - (0.44 - .012 * k) * w, y - 6 + 3 * k, x - .012 * k * w, top - 10 - 2 * k),
                                    14, fill=paint(c * (.8 + .07 * k)))
        d.rounded_rectangle((-20, top - 12, w + 20, top + 20), 8, fill=paint(c * 0.95))
    elif kind == "street":
        x = 0
        while x < w:
            bw, c = int(rng.integers(25, 70)), rng.uniform(0.7, 1.15) * np.array([160, 138, 122])
            d.rectangle((x, rng.integers(0, max(2, top // 3)), x + bw, top), fill=paint(c))
            for wx in range(x + 5, x + bw - 8, 14):
                for wy in range(top // 3, top - 18, 20):
                    d.rectangle((wx, wy, wx + 7, wy + 11), fill=paint(c * rng.choice([0.5, 0.6, 1.3])))
            x += bw
    else:  # open air: sky, hills or greenery
        sky = rgb([(168, 200, 228), (206, 216, 224), (232, 214, 186)][rng.integers(3)]) * 255
        d.rectangle((0, 0, w, h), fill=paint(sky))
        green = np.array([(70, 104, 56), (98, 124, 70), (120, 116, 66)][rng.integers(3)], float)
        if kind == "hills":
            for k, base in enumerate((0.62, 0.82)):
                ys = top * (base + 0.12 * np.sin(np.arange(0, w + 9, 8) / w * rng.uniform(3, 9) + rng.uniform(0, 6)))
                tint = sky * 0.5 + green * 0.5 if k == 0 else green
                d.polygon([(0, h), *zip(range(0, w + 9, 8), ys), (w + 9, h)], fill=paint(tint))
        else:
            d.rectangle((0, top * rng.uniform(0, 0.3), w, h), fill=paint(green))
            for _ in range(60):
                x, y, r = rng.uniform(0, w), rng.uniform(0, 1) * top, rng.uniform(3, 17)
                d.ellipse((x - r, y - r, x + r, y + r), fill=paint(green * rng.uniform(0.55, 1.7) + rng.uniform(0, 25,
                        3)))
            for _ in range(rng.integers(0, 25)):  # flowers and sun through leaves
                x, y, r = rng.uniform(0, w), rng.uniform(0.1, 1) * top, rng.uniform(1.5, 6)
                d.ellipse((x - r, y - r, x + r, y + r), fill=paint(rng.uniform(120, 250, 3)))
    out = np.asarray(img, F32) / 255
    yy, xx = np.mgrid[0:h, 0:w].astype(F32)
    if kind == "curtains":
        out = out * (0.85 + 0.16 * np.sin(xx * rng.uniform(0.12, 0.3) + 2 * np.sin(xx * 0.03)))[..., None]
    tone = 1 + 0.08 * sample(tiles.cloud, xx * 0.7, yy * 0.7) + rng.uniform(-0.2, 0.2) * (xx / w - 0.5)
    return out * tone[..., None]


BACKDROPS = (("wall", "wood"), ("wall", "carpet"), ("curtains", "wood"), ("curtains", "carpet"), ("sofa", "carpet"),
             ("sofa", "wood"), ("kitchen", "tiles"), ("wall", "tiles"), ("garden", "grass"), ("garden", "asphalt"),
             ("hills", "grass"), ("hills", "snow"), ("hills", "sand"), ("street", "asphalt"), ("garden", "snow"))


def backdrop(rng, w, h, horizon, tiles):
    """The scene without the animal, at half size and then enlarged (it is out of focus)."""
    wall, floor = BACKDROPS[rng.integers(len(BACKDROPS))]
    hw, hh, top = w // 2, h // 2, int(horizon * h / 2)
    img = np.array(wall_part(rng, wall, (hw, hh), top, tiles), F32)
    haze = Image.fromarray((img.clip(0, 1) * 255).astype(np.uint8)).filter(ImageFilter.GaussianBlur(rng.uniform(0.8,
            4)))
    img = np.array(haze, F32) / 255
    if top < hh - 2:
        floor_part(rng, floor, img, top, tiles)
    img = Image.fromarray((img.clip(0, 1) * 255).astype(np.uint8)).filter(ImageFilter.GaussianBlur(rng.uniform(0.3,
            1.2)))
    return np.array(img.resize((w, h), Image.BICUBIC), F32) / 255


# ---------------------------------------------------------------- coat
def choose_coat(rng, kind):
    """A pattern and its colours. The two kinds share most of both."""
    names = ("solid", "bicolor", "patches", "tabby", "points", "spots", "tan", "husky", "saddle")
    odds = {"cat": (.26, .17, .13, .30, .12, .02, 0, 0, 0), "dog": (.28, .14, .15, .05, .06, .07, .10, .07,
                                                                    .08)}[kind]
    pattern = names[rng.choice(len(names), p=odds)]
    pick = lambda *keys: rgb(COATS[keys[rng.integers(len(keys))]])  # noqa: E731
    base, second = pick(*COATS), pick("ginger", "charcoal", "brown", "golden")
    pale = rgb(COATS["white"])
    if pattern == "bicolor":
        base = pick("black", "charcoal", "blue", "ginger", "chocolate", "golden", "brown")
    elif pattern == "patches":
        base, second, third = pale, pick("ginger", "brown", "golden"), pick("black", "charcoal", "chocolate")
        return SimpleNamespace(pattern=pattern, base=base, second=second, third=third, pale=pale,
                               phase=rng.uniform(0, 99, 4), cut=rng.uniform(-0.1, 0.25))
    elif pattern == "tabby":
        base = pick("ginger", "silver", "brown", "fawn", "golden", "brown")
        second = base * rng.uniform(0.35, 0.62)
        pale = base * 0.35 + pale * 0.65
    elif pattern == "points":
        base, second = pick("cream", "white", "fawn"), pick("chocolate", "charcoal", "black", "brown")
    elif pattern == "spots":
        grounds = ("golden", "silver", "fawn", "cream") if kind == "cat" else ("white", "white", "silver", "cream")
        base, second = pick(*grounds), pick("black", "chocolate")
        if kind == "cat":  # a spotted cat's spots are darker fur, not a Dalmatian's ink
            second = base * F32(0.34)
    elif pattern in ("tan", "husky"):
        base = pick("black", "chocolate") if pattern == "tan" else pick("charcoal", "blue", "black", "brown")
        pale = rgb((186, 116, 58)) if pattern == "tan" else pale
    elif pattern == "saddle":
        base, second = pick("golden", "fawn", "brown"), pick("black", "charcoal")
    jitter = F32(rng.uniform(0.88, 1.12)) + rng.uniform(-0.025, 0.025, 3).astype(F32)
    return SimpleNamespace(pattern=pattern, base=base * jitter, second=second, third=second, pale=pale,
                           bold=rng.uniform(0.6, 0.9) if kind == "cat" else rng.uniform(0.35, 0.6),
                           phase=rng.uniform(0, 99, 4), cut=rng.uniform(-0.1, 0.25))


def coat_colour(coat, part, x, y, tiles):
    """The coat's colour at the part's own coordinates, before light."""
    out = np.empty(x.shape + (3,), F32)
    out[:] = coat.base
    def mix(colour, weight):
        nonlocal out
        out += np.asarray(weight, F32)[..., None] * (np.asarray(colour, F32) - out)
    if part.colour is not None:
        out[:] = part.colour
        return out
    p, kind = coat.phase, coat.pattern
    warp = sample(tiles.cloud, x * 60 + p[0], y * 60 + p[1])
    tip = 1 - ramp(np.hypot(x - part.tip[0], y - part.tip[1]), 0.25, 0.75) if part.tip is not None else 0.0
    if part.pale is not None:
        cx, cy, rx, ry = part.pale
        belly = 1 - ramp(np.hypot((x - cx) / rx, (y - cy) / ry) + 0.12 * warp, 0.8, 1.1)
    else:
        belly = 0.0
    head = part.region == "head"
    if kind == "solid":
        mix(coat.base * 0.6 + 0.4 * coat.pale, 0.35 * np.asarray(belly) * (coat.base.mean() > 0.25))
    elif kind == "tabby":
        if head:
            lines = np.sin(x * 15) * ramp(-y, 0.2, 0.5) + np.sin(y * 13 - np.abs(x) * 7) * ramp(np.abs(x), 0.5,
                    0.75) * ramp(y, -.3, 0)
        elif part.tip is not None:
            lines = np.sin(np.hypot(x - part.tip[0], y - part.tip[1]) * 13) * (part.region != "ear")
        else:
            ax, ay = part.fur[:2] if len(part.fur) == 2 else (0, 1)
            lines = np.sin((x * ax + y * ay) * 8.5 + 1.6 * warp + 0.5 * np.sin((x * ay - y * ax) * 3))
        mix(coat.second, ramp(lines, 0.0, 0.75) * coat.bold)
        mix(coat.pale, np.asarray(belly) * 0.75)
    elif kind in ("bicolor", "husky", "tan"):
        mix(coat.pale, belly)
        if head and kind != "tan" and not part.side:
            blaze = 0.10 + 0.42 * ramp(y, -0.35, 0.45) - 0.1 * (kind == "husky")
            mix(coat.pale, 1 - ramp(np.abs(x + 0.03 * warp), blaze, blaze + 0.07))
        if head and kind != "bicolor":  # the dots above the eyes
            ex = x - 0.4 if part.side else np.abs(x) - 0.3
            mix(coat.pale, 0.9 * (1 - ramp(np.hypot(ex, (y + 0.40 + 0.05 * part.side) * 1.5), 0.07, 0.14)))
        if part.region == "leg":
            mix(coat.pale, tip)
    elif kind == "patches":
        other = np.sin(x * 2.3 + p[0] + 1.4 * np.sin(y * 1.9 + p[1])) * np.sin(y * 2.1 + p[2] + np.sin(x * 2.6))
        some = np.sin(x * 1.9 + p[3] + 1.2 * np.sin(y * 2.4 + p[2])) * np.sin(y * 2.5 + p[1] + np.sin(x * 1.7))
        mix(coat.second, ramp(other + 0.08 * warp, coat.cut - 0.06, coat.cut + 0.06))
        mix(coat.third, ramp(some + 0.08 * warp, coat.cut + 0.12, coat.cut + 0.24))
        mix(coat.pale, np.asarray(belly) * 0.9)
        if part.region == "ear":
            mix(coat.second if part.tip[0] > 0 else coat.third, 1.0)
    elif kind == "points":
        if head:
            mix(coat.second, 0.9 * (1 - ramp(np.hypot(x * 1.05 - 0.75 * part.side, y - 0.22), 0.25, 0.72)))
        elif part.region in ("ear", "muzzle", "tail"):
            mix(coat.second, 0.9)
        else:
            mix(coat.second, 0.85 * np.asarray(tip))
    elif kind == "spots":
        k = 4.2 if head else 3.0
        u, v = x * k + p[0], y * k + p[1]
        iu, iv = np.floor(u), np.floor(v)
        r1, r2 = np.sin(iu * 12.9 + iv * 78.2) * 0.5, np.sin(iu * 39.3 + iv * 11.1) * 0.5
        far = np.hypot(u - iu - 0.5 - 0.5 * r1, v - iv - 0.5 - 0.5 * r2) + 0.1 * warp
        mix(coat.second, 1 - ramp(far, 0.2 + 0.12 * r2, 0.3 + 0.12 * r2))
        if part.region == "ear":
            mix(coat.second, 0.85)
    else:  # saddle
        if head:
            mix(coat.second, 0.8 * (1 - ramp(np.hypot(x * 1.2 - 1.2 * part.side, y - 0.45 + 0.3 * part.side), 0.25,
                                             0.6)))
        elif part.region == "muzzle":
            mix(coat.second, 0.8)
        elif part.region == "body":
            mix(coat.second, ramp(-y + 0.15 * warp, -0.1, 0.2) * 0.9 if part.side else 0.35 * ramp(np.abs(x), 0.5, 1))
        elif part.region in ("ear", "tail"):
            mix(coat.second, 0.55)
    return out


# ---------------------------------------------------------------- animal
class Animal:
    """An animal's looks, and the list of parts that one pose makes of it."""

    def __init__(self, rng, kind):
        self.rng, self.kind, self.cat = rng, kind, kind == "cat"
        self.parts, self.coat = [], choose_coat(rng, kind)
        self.fluff = rng.choice([0.03, 0.035, 0.05, 0.085])
        self.stout = rng.uniform(0.9, 1.15)
        self.yaw = rng.uniform(-0.32, 0.32)
        self.tilt = rng.normal(0, 0.09)
        self.whisker = int(rng.integers(90, 235))
        self.collar = rgb(rng.uniform(30, 220, 3)) if rng.random() < 0.28 else None
        dark = self.coat.base.mean() < 0.3
        if self.cat:
            self.wedge = rng.choice([-0.35, 0.0, 0.0, 0.1, 0.45])
            self.ears = rng.choice(["up", "up", "up", "tuft", "fold"], p=[.4, .2, .18, .14, .08])
            self.iris = [(150, 178, 66), (214, 176, 56), (96, 160, 206), (204, 122, 44),
                         (120, 170, 110)][rng.integers(5)]
            if self.coat.pattern == "points":
                self.iris = (92, 158, 214)
            self.pupil = rng.choice([0.16, 0.3, 0.55, 0.78])
            self.nose = rgb((74, 52, 52)) if dark and rng.random() < 0.6 else rgb((214, 128, 122))
        else:
            self.wedge = 0.0
            self.breed = ["long", "medium", "short"][rng.choice(3, p=[.3, .52, .18])]
            if self.coat.pattern in ("saddle", "husky"):
                self.ears = "point"
            else:
                self.ears = ["flop", "spaniel", "button", "point"][rng.choice(4, p=[.5, .16, .17, .17])]
            self.iris = (126, 170, 206) if self.coat.pattern == "husky" and rng.random() < 0.6 else \
                [(78, 46, 24), (60, 36, 22), (104, 64, 30)][rng.integers(3)]
            self.tongue = rng.random() < 0.45
            self.nose = rgb((32, 28, 30)) if self.coat.base.mean() > 0.3 or rng.random() < 0.8 else rgb((84, 54, 44))

    def add(self, outline, region, at, fur=(0, 1), pale=None, tip=None, fuzz=None, colour=None, side=False, bump=1.0):
        """One part: its outline in the units of the frame `at`.

        fur: the direction hair lies in, or (x, y, 0) for hair that grows away from a point;
        pale: the ellipse (x, y, rx, ry) of the belly, chest or chin; tip: the far end of a leg,
        tail or ear, where socks and rings begin; colour: given for what has no coat;
        side: seen from the side; bump: how round it is lit (negative: hollow).
        """
        self.parts.append(SimpleNamespace(
            outline=np.asarray(outline, float), region=region, at=at, fur=fur, pale=pale, tip=tip, side=side,
            fuzz=self.fluff if fuzz is None else fuzz, colour=colour, ink=None, bump=bump))

    def ink(self, marks, at):
        """Sharp details (eyes, nose, mouth, whiskers): ('poly' | 'line', points, rgba, width)."""
        points = np.vstack([m[1] for m in marks])
        self.parts.append(SimpleNamespace(outline=points, at=at, ink=marks))

    def nose_tint(self, k):
        """The nose's colour, darker or lighter; a dark wet nose gets a grey shine."""
        return tuple(int(v) for v in np.clip(self.nose * 255 * k + (k - 1) * 22, 0, 255)) + (255,)

    # ---- head
    def turned(self, points, depth):
        """Move what stands out of the face sideways as the head turns."""
        p = np.array(points, float)
        p[:, 0] = p[:, 0] * (1 - 0.16 * np.abs(self.yaw) - 0.18 * self.yaw * np.sign(p[:, 0])) + self.yaw * depth
        return p

    def eye(self, x, y, r, side, high, low, slant, gaze):
        """Marks of one eye; side is +1 or -1, high and low how far the lids open."""
        at = frame(x, y, 1, slant * side)
        def between_lids(pts, grow=1.0):
            a = r * grow
            q = np.array(pts, float)
            q[:, 0] = np.clip(q[:, 0], -a, a)
            arch = np.sqrt(np.clip(1 - (q[:, 0] / a) ** 2, 0, 1)) ** 1.25
            q[:, 1] = np.clip(q[:, 1], -high * a * arch, low * a * arch)
            return apply(at, q)
        iris = np.array(self.iris)
        g = gaze * r * 0.2
        wide = r * (0.98 if self.cat else 0.86)
        pupil = (wide * self.pupil, wide * 0.86) if self.cat else (wide * 0.56, wide * 0.56)
        white = tuple(iris // 2) if self.cat else (150, 138, 128)
        ring = lambda rx, ry, dy=0.0: blob(g, dy, rx, ry)  # noqa: E731
        marks = [("poly", between_lids(blob(0, 0, r * 2, r * 2, n=60), 1.24), (26, 20, 20, 255), 0),
                 ("poly", between_lids(blob(0, 0, r * 2, r * 2, n=60)), white + (255,), 0),
                 ("poly", between_lids(ring(wide, wide)), tuple(iris * 6 // 10) + (255,), 0),
                 ("poly", between_lids(ring(wide * .9, wide * .88, .05 * r)), tuple(iris) + (255,), 0),
                 ("poly", between_lids(ring(wide * .62, wide * .6, .2 * r)),
                  tuple(np.minimum(iris * 12 // 10 + 12, 255)) + (255,), 0),
                 ("poly", between_lids(ring(*pupil)), (12, 10, 12, 255), 0)]
        for dx, dy, s, a in ((-0.3, -0.34, 0.2, 255), (0.28, 0.3, 0.1, 150)):
            marks.append(("poly", apply(frame(x, y), blob(g + dx * r, dy * r, s * r, s * r, n=14)),
                          (255, 255, 255, a), 0))
        return marks

    def head(self, x, y, scale=1.0, view="front"):
        """The head as the kind and the view want it, centred on (x, y)."""
        at = frame(x, y, scale, self.tilt)
        {("cat", "front"): self.cat_front, ("dog", "front"): self.dog_front,
         ("cat", "side"): self.cat_side, ("dog", "side"): self.dog_side}[self.kind, view](at)
        self.face = (x, y, scale)

    def ear(self, at, base_in, tip, base_out, inner=True):
        """An upright ear between two points of the skull."""
        b, t, c = (np.array(q, float) for q in (base_in, tip, base_out))
        bow_in, bow_out = (b + t) / 2 + (b - c) * 0.06, (c + t) / 2 + (c - b) * 0.10
        low = (b + c) / 2 + ((b + c) / 2 - t) * 0.2
        near = np.abs(t - low).sum() * 0.05 * (b - c) / (np.linalg.norm(b - c) + 1e-6)
        self.add(smooth([b, bow_in, t + near, t - near, bow_out, c, low], 5), "ear", at,
                 tuple((t - low) / np.linalg.norm(t - low)),
                 tip=tuple(t), fuzz=min(0.03, self.fluff * 0.6))
        if inner:
            mid = (b + c) / 2
            pts = np.array([b, bow_in, t, bow_out, c, low]) * 0.66 + (mid * 0.66 + t * 0.34) * 0.34
            skin = 0.55 * rgb((212, 150, 142)) + 0.45 * self.coat.base * 0.8
            self.add(smooth(pts, 5), "inner", at, (0, -1), colour=skin * 0.86, fuzz=0.04, bump=-0.7)

    def cat_front(self, at):
        """Ears, skull and face of a cat that looks at the viewer."""
        w, f = self.wedge, self.fluff * 1.6
        for s in (-1, 1):
            if self.ears != "fold":
                up = 1.28 + 0.16 * w + (0.08 if self.ears == "tuft" else 0) - 0.14 * (w < -0.2)
                out = 0.74 + 0.12 * w + 0.05 * (w < -0.2)
                pts = self.turned([(s * .20, -.70), (s * out, -up), (s * .95, -.22)], -0.08)
                self.ear(at, *pts)
                if self.ears == "tuft":
                    t = pts[1]
                    self.ink([("line", np.array([t + [0, .1], t + [s * k, -.17]]), (40, 34, 32, 200),
                               .03) for k in (0, .06, -.04)], at)
        wide = 1.0 - 0.10 * w
        outline = mirror([(0, -.80), (.42, -.76), (.80 * wide, -.46), (.98 * wide, -.02),
                          ((.94 - .1 * w) * wide + f, .32),
                          (.66 - .16 * w + f, .64 + .05 * w), (.30, .82 + .08 * w), (0, .88 + .1 * w)])
        self.add(smooth(self.turned(outline, 0.05)), "head", at, (self.yaw * .4, .2, 0),
                 pale=(self.yaw * .42, .55, .52, .45))
        if self.ears == "fold":
            for s in (-1, 1):
                ear = np.array([(.26, -.70), (.56, -.86), (.86, -.72), (.80, -.50), (.62, -.40), (.38, -.52)]) * [s,
                        1]
                self.add(smooth(self.turned(ear, -.03)), "ear", at, (0, 1), tip=(s * .7, -.42), fuzz=.02)
        self.cat_face(at)

    def cat_face(self, at):
        """Whisker pads, eyes, nose, mouth and whiskers."""
        w, flat = self.wedge, self.wedge < -0.2
        ny = 0.17 if flat else 0.27 + 0.1 * max(w, 0)
        nose_x = self.yaw * 0.46
        for s in (-1, 1):
            self.add(self.turned(blob(s * .165, ny + .22, .23, .175), .44), "muzzle", at, (self.yaw * .46, ny, 0),
                     pale=(nose_x, ny + .3, .6, .5), fuzz=.02, bump=.7)
        marks = []
        r = 0.235 + 0.03 * flat - 0.02 * w
        high = self.rng.uniform(0.3, 0.55) if self.rng.random() < 0.12 else self.rng.uniform(0.62, 0.95)
        gaze = self.rng.uniform(-1, 1)
        for s in (-1, 1):
            (ex, ey), = self.turned([(s * .42, -.06)], .26)
            marks += self.eye(ex, ey, r, s, high, 0.78, -0.2 - 0.2 * w, gaze)
        tri = np.array([(-.14, -.02), (-.07, -.05), (.07, -.05), (.14, -.02), (.06, .07), (0, .11), (-.06, .07)])
        marks.append(("poly", self.turned(smooth(tri * 1.05 + [0, ny], 4), .46), self.nose_tint(.8), 0))
        marks.append(("poly", self.turned(smooth(tri * .8 + [0, ny - .012], 4), .46), self.nose_tint(1.0), 0))
        dark = (52, 36, 34, 220)
        marks.append(("line", self.turned([(0, ny + .10), (0, ny + .2)], .46), dark, .022))
        for s in (-1, 1):
            t = np.linspace(0, 1, 7)
            marks.append(("line", self.turned(np.c_[s * .26 * t, ny + .2 + .12 * np.sin(t * 2.4)], .46), dark, .024))
            for k in range(4):
                a = -0.22 + 0.17 * k + self.rng.normal(0, .03)
                t = np.linspace(0, 1, 6)
                whisk = np.c_[s * (.22 + .95 * t), ny + .2 + .03 * k + t * a + .12 * t * t]
                marks.append(("line", self.turned(whisk, .42), (246, 244, 238, self.whisker), .013))
            for k in range(6):
                marks.append(("poly", self.turned(blob(s * (.14 + .07 * (k % 3)), ny + .2 + .06 * (k // 3), .012,
                                                       .012, n=8), .46), (60, 44, 40, 150), 0))
        self.ink(marks, at)

    def dog_front(self, at):
        """Ears, skull and face of a dog that looks at the viewer."""
        s_w = {"long": .88, "medium": 1.0, "short": 1.15}[self.breed]
        if self.ears == "point":
            for s in (-1, 1):
                self.ear(at, *self.turned([(s * .20, -.62), (s * .60, -1.42), (s * .84, -.26)], -.1))
        wide = .84 * (s_w * .5 + .5)
        outline = mirror([(0, -.80), (.40, -.76), (wide * .92, -.48), (wide, -.06), (wide * .9, .32),
                          (.54 * s_w, .66), (.30 * s_w, .9), (0, .96)])
        self.add(smooth(self.turned(outline, .05)), "head", at, (self.yaw * .4, .1, 0),
                 pale=(self.yaw * .5, .62, .5, .5))
        self.dog_face(at)
        for s in (-1, 1):
            if self.ears in ("flop", "spaniel"):
                drop = .55 if self.ears == "flop" else 1.0
                ear = np.array([(.42, -.70), (.78, -.72), (1.04, -.30), (1.12, .05 + drop * .45),
                                (.98, .1 + drop * .75), (.78, drop * .6), (.70, -.05)])
                self.add(smooth(self.turned(ear * [s, 1], -.06)), "ear", at, (s * .15, 1), tip=(s * .95, drop * .9),
                         fuzz=self.fluff * (1.2 if drop > .8 else .6))
            elif self.ears == "button":
                ear = np.array([(.30, -.74), (.62, -.92), (.98, -.66), (1.0, -.36), (.86, -.06), (.70, -.30),
                                (.46, -.52)])
                self.add(smooth(self.turned(ear * [s, 1], -.06)), "ear", at, (s * .3, 1), tip=(s * .85, -.1),
                         fuzz=self.fluff * .6)

    def dog_face(self, at):
        """Muzzle, tongue, eyes, nose and lips."""
        long, short = self.breed == "long", self.breed == "short"
        ny = .18 if short else (.46 if long else .36)
        m = {"long": (.36, .50), "medium": (.44, .46), "short": (.54, .38)}[self.breed]
        cy = .42 if short else .5
        depth = .35 if short else .62
        marks = []
        if self.tongue:  # the open jaw and tongue lie below the upper lip
            jaw = smooth([(-.28, ny + .3), (.28, ny + .3), (.25, ny + .56), (0, ny + .7), (-.25, ny + .56)])
            self.add(self.turned(jaw, depth * .8), "muzzle", at, (0, 1), pale=(0, .6, 1, 1), fuzz=.03)
            inside = smooth([(-.22, ny + .3), (.22, ny + .3), (.19, ny + .5), (0, ny + .6), (-.19, ny + .5)])
            self.ink([("poly", self.turned(inside, depth * .85), (62, 28, 30, 255), 0)], at)
            lick = smooth([(-.13, ny + .34), (.13, ny + .34), (.16, ny + .62), (.1, ny + .8), (-.04, ny + .82),
                           (-.13, ny + .7)])
            self.add(self.turned(lick, depth), "tongue", at, (0, 1), colour=rgb((226, 118, 124)), fuzz=.008, bump=.6)
        bridge = smooth(mirror([(0, -.42), (.17, -.36), (m[0] * .62, .02), (m[0] * .95, cy - .02), (m[0], cy + .14),
                                (m[0] * .72, cy + m[1] * .72), (.12, cy + m[1] * .80), (0, cy + m[1] * .74)]))
        if self.tongue:
            bridge[:, 1] = np.minimum(bridge[:, 1], ny + .42)
        self.add(self.turned(bridge, depth * .75), "head", at, (self.yaw * .5, ny, 0),
                 pale=(self.yaw * .5, .62, .6, .62), fuzz=.035, bump=.8)
        r = .165 if short else .135
        high, gaze = self.rng.uniform(.7, .98), self.rng.uniform(-1, 1)
        for s in (-1, 1):
            (ex, ey), = self.turned([(s * (.40 if short else .36), -.14)], .26)
            marks += self.eye(ex, ey, r, s, high, .85, .12, gaze)
        nw = .2 if long else .23
        pad = np.array([(-1, -.2), (-.6, -.62), (0, -.7), (.6, -.62), (1, -.2), (.8, .3), (.3, .55), (0, .8),
                        (-.3, .55), (-.8, .3)]) * nw
        place = lambda pts: self.turned(np.asarray(pts) + [0, ny], depth)  # noqa: E731
        marks.append(("poly", place(smooth(pad, 5)), self.nose_tint(1.0), 0))
        marks.append(("poly", place(blob(0, -.38 * nw, .55 * nw, .2 * nw)), self.nose_tint(2.6), 0))
        for s in (-1, 1):
            marks.append(("poly", place(blob(s * .48 * nw, .1 * nw, .24 * nw, .17 * nw, .3 * s)), (8, 6, 8, 255), 0))
        dark = (34, 24, 24, 230)
        lip = min(ny + .36, ny + m[1] * .62 + .12)
        marks.append(("line", place([(0, .6 * nw), (0, lip - ny)]), dark, .03))
        for s in (-1, 1):
            t = np.linspace(0, 1, 8)
            marks.append(("line", place(np.c_[s * m[0] * .86 * t, lip - ny + .10 * np.sin(t * 3.0) - .06 * t]), dark,
                          .032))
            for k in range(4):
                marks.append(("poly", place(blob(s * (.16 + .07 * (k % 2)), .2 + .07 * (k // 2), .013, .013, n=8)),
                              (40, 30, 28, 150), 0))
        if short:  # the folds of a flat face
            for s in (-1, 1):
                t = np.linspace(0, 1, 7)
                marks.append(("line", place(np.c_[s * (.12 + .36 * t), -.26 + .3 * t * t]), (50, 36, 30, 150), .04))
        self.ink(marks, at)

    def cat_side(self, at):
        """A cat's head in profile, facing right."""
        w = self.wedge
        folded = self.ears == "fold"
        if not folded:
            self.ear(at, (.22, -.62), (.10, -1.28), (-.30, -.70), inner=False)
        k = 1 + .08 * w
        outline = [(-.86, .20), (-.86, -.25), (-.56, -.68), (-.05, -.82), (.38, -.68), (.62 * k, -.38),
                   (.80 * k, -.14), (1.0 * k, .08),
                   (1.0 * k, .24), (.92 * k, .42), (.74, .56), (.34, .68), (-.15, .78), (-.62, .66)]
        self.add(smooth(outline), "head", at, (.95, .15, 0), pale=(.75, .42, .5, .36), side=True)
        if folded:
            flap = [(-.40, -.70), (-.10, -.92), (.22, -.72), (.26, -.46), (.02, -.40), (-.28, -.50)]
            self.add(smooth(flap), "ear", at, (.3, 1), tip=(.2, -.42), fuzz=.02)
        else:
            self.ear(at, (.10, -.66), (-.22, -1.32), (-.56, -.42))
        self.add(blob(.80, .30, .24, .2), "muzzle", at, (.9, .2, 0), pale=(.8, .4, .5, .5), fuzz=.02, bump=.6)
        marks = self.eye(.52, -.12, .18, 1, .8, .75, .18, 1.0)
        nose = [(.90 * k, .04), (1.02 * k, .06), (1.04 * k, .15), (.96 * k, .19)]
        marks.append(("poly", smooth(nose, 5), self.nose_tint(1.0), 0))
        marks.append(("line", np.array([(.97 * k, .2), (.94, .32), (.82, .4), (.66, .38)]), (52, 36, 34, 220), .026))
        for i in range(5):
            t = np.linspace(0, 1, 6)
            marks.append(("line", np.c_[.80 + (.1 - .8 * t) * (i % 2 * 2 - 1) * -.75,
                                        .28 + .03 * i + t * (.12 * i - .1) + .1 * t * t],
                                        (246, 244, 238, self.whisker), .013))
        self.ink(marks, at)

    def dog_side(self, at):
        """A dog's head in profile, facing right."""
        n = {"long": 1.52, "medium": 1.36, "short": 1.02}[self.breed]
        if self.ears == "point":
            self.ear(at, (.20, -.62), (.12, -1.36), (-.30, -.62), inner=False)
        if self.tongue:
            self.add(smooth([(n - .5, .4), (n - .2, .38), (n - .14, .72), (n - .28, .92), (n - .45, .74)]), "tongue",
                     at, (0, 1), colour=rgb((226, 118, 124)), fuzz=.008)
        stop = min(.60, n - .44)
        outline = [(-.82, .20), (-.82, -.30), (-.50, -.70), (.02, -.80), (.42, -.64), (stop, -.36),
                   (n * .5 + .26, -.14),
                   (n - .10, -.07), (n + .05, .08), (n + .02, .34), (n - .20, .52), (.56, .64), (.1, .78), (-.5, .80)]
        self.add(smooth(outline), "head", at, (n, .1, 0), pale=(n * .72, .42, n * .42, .34), side=True)
        flews = [(.50, .10), (n - .30, .06), (n - .02, .16), (n + .02, .36), (n - .3, .47), (.62, .50)]
        self.add(smooth(flews), "head", at, (n, .05, 0), pale=(n * .72, .42, n * .42, .34), side=True, fuzz=.03,
                 bump=.6)
        marks = self.eye(.34, -.22, .135, 1, .85, .8, -.1, .8)
        pad = [(n - .20, -.10), (n - .02, -.13), (n + .11, .0), (n + .09, .15), (n - .03, .18), (n - .14, .06)]
        marks.append(("poly", smooth(pad, 5), self.nose_tint(1), 0))
        marks.append(("poly", blob(n - .03, -.06, .07, .03), self.nose_tint(2.6), 0))
        marks.append(("poly", blob(n + .02, .07, .05, .035), (8, 6, 8, 255), 0))
        t = np.linspace(0, 1, 8)
        marks.append(("line", np.c_[n - .02 - (n - .56) * t, .36 + .11 * np.sin(t * 2.9) - .06 * t],
                      (34, 24, 24, 230), .034))
        self.ink(marks, at)
        if self.ears == "point":
            self.ear(at, (.02, -.66), (-.16, -1.42), (-.58, -.40))
        else:
            d = {"flop": .75, "spaniel": 1.1, "button": .25}[self.ears]
            self.add(smooth([(-.06, -.58), (-.42, -.62), (-.66, -.1), (-.62, d * .75), (-.38, d), (-.14, d * .6),
                             (-.02, -.1)]), "ear", at, (-.1, 1), tip=(-.4, d), fuzz=self.fluff * .8)

    # ---- body
    def collared(self, points, at):
        """A collar along the points with its tag, if this animal wears one."""
        if self.collar is not None:
            points = np.asarray(points) + [0, 0 if self.cat else .12]  # a dog's jaw hangs lower
            self.add(limb(points, [.1] * len(points)), "collar", at, (1, 0), colour=self.collar, fuzz=.006)
            x, y = points[len(points) // 2]
            self.add(blob(x, y + .17, .09, .1), "collar", at, (1, 0), colour=rgb((214, 184, 92)), fuzz=.006)

    def paw(self, x, y, at, rx=.3, toes=True):
        """A front paw with its toes."""
        self.add(blob(x, y, rx, rx * .6), "leg", at, (0, 1), tip=(x, y), fuzz=.025)
        if toes:
            self.ink([("line", np.array([(x + d * rx, y + .05), (x + d * rx * 1.15, y + rx * .5)]), (40, 30, 28, 150),
                       .025) for d in (-.33, .05, .4)], at)

    def tail(self, points, at, width):
        """A tail along the points: even for a cat, tapering for a dog."""
        p = np.asarray(points, float)
        if self.cat:
            widths = np.full(len(p), width) * np.linspace(1, .8, len(p))
        else:
            widths = width * np.linspace(1.25, .55, len(p))
        self.add(limb(p, widths), "tail", at, (.7, .7), tip=tuple(p[-1]), fuzz=self.fluff * 1.5)

    def pose_portrait(self, view="front"):
        """Head and shoulders."""
        at, k = frame(), self.stout
        if view == "side":  # the neck slopes back, the chest stands forward
            body = np.array([(-.3, .0), (.42, .3), (.46, .9), (.72, 1.6), (.86, 2.6), (.7, 4.6), (-2.6 * k, 4.6),
                             (-2.45 * k, 3.2), (-1.9 * k, 2.0), (-1.2 * k, 1.2), (-.88, .5), (-.76, .1)])
            pale, band = (.75, 2.0, .6, 1.4), [(-.98, .74), (-.6, 1.06), (-.15, 1.2), (.25, 1.14), (.50, .98)]
        else:
            body = mirror([(0, .2), (.62 * k, .3), (.82 * k, 1.1), (1.38 * k, 1.8), (1.7 * k, 2.8), (1.78 * k, 4.4),
                           (0, 4.6)])
            pale, band = (0, 2.4, .75, 1.7), [(-.74 * k, .9), (-.4 * k, 1.12), (0, 1.2), (.4 * k, 1.12),
                                              (.74 * k, .9)]
        self.add(smooth(body), "body", at, (-.25 * (view == "side"), 1), pale=pale)
        self.collared(band, at)
        self.head(0, 0, 1, view)
        self.ground, self.width = 9.0, 2.0

    def pose_sit(self, view="front"):
        """Sitting, seen from the front."""
        at, k = frame(), self.stout
        h = 3.1 if self.cat else 3.6
        rump = 1.15 * k if self.cat else 1.0 * k
        s = self.rng.choice([-1, 1])
        if self.cat:
            self.tail(np.array([(.5, h - .25), (1.5, h - .1), (1.9, h - .35), (1.75, h - .8)]) * [s, 1], at, .17)
        else:
            self.tail(np.array([(.5, h - .3), (1.3, h - .45), (1.75, h - .95), (1.8, h - 1.4)]) * [s, 1], at, .19)
        body = mirror([(0, .1), (.55, .4), (.78 * k, 1.1), (.95 * k, 1.9), (rump, h - .7), (rump * .9, h - .05),
                       (0, h)])
        self.add(smooth(body), "body", at, (0, 1), pale=(0, 1.7, .5, 1.0))
        for s in (-1, 1):
            self.add(blob(s * rump * .84, h - .5, .48, .62, s * -.25), "body", at, (0, 1))
            self.paw(s * (rump * .92), h - .02, at, .3)
        leg_top = 1.5 if self.cat else 1.4
        for s in (-1, 1):
            self.add(limb([(s * .42, leg_top), (s * .40, (leg_top + h) / 2), (s * .36, h - .05)], [.34, .25, .22]),
                     "leg", at, (0, 1), tip=(s * .36, h))
            self.paw(s * .38, h + .02, at, .29)
        self.collared([(-.62, .82), (-.3, 1.0), (0, 1.06), (.3, 1.0), (.62, .82)], at)
        self.head(0, 0, 1 if self.cat else 1.02, view)
        self.ground, self.width = h + .15, 1.7

    def pose_stand(self, view="front"):
        """Standing, seen from the side."""
        at, k = frame(), self.stout
        leg = 1.25 if self.cat else 1.85
        foot = .55 + leg
        back = [(-1.7, .1), (-1.35, 0), (1.2, .05), (1.5, .1)]
        for (x, y), far in zip([back[1], back[2]], (.28, .3)):  # the far legs first, in shade
            self.leg(x + far, y + .1, foot - .1, at, x < 0, shade=.72)
        if self.cat:
            end = [(-3.0, -1.4), (-2.7, -1.9)] if self.rng.random() < .6 else [(-3.1, .3), (-3.5, .1)]
            self.tail([(-1.6, -.35), (-2.3, -.45), (-2.8, -.8 if end[0][1] < 0 else 0), *end], at, .15)
        else:
            ends = ([(-2.5, -.9), (-2.7, -1.5)], [(-2.4, .3), (-2.6, .9)],
                    [(-2.2, -1.2), (-1.7, -1.3)])[self.rng.integers(3)]
            self.tail([(-1.5, -.35), (-2.1, -.5 if ends[0][1] < 0 else -.2), *ends], at, .19)
        if self.cat:
            outline = [(-1.95, -.15), (-1.6, -.62), (-.6, -.66), (.5, -.62), (1.4, -.72), (1.9, -.3), (1.8, .35),
                       (1.1, .66), (0, .62 * k), (-1.0, .55), (-1.75, .45)]
            neck, head = [(1.35, -.1), (1.9, -.75), (2.15, -1.05)], (2.25, -1.2)
        else:
            outline = [(-1.95, -.2), (-1.6, -.70), (-.6, -.66), (.5, -.70), (1.4, -.85), (1.95, -.3), (1.85, .5),
                       (1.1, .85), (0, .62 * k), (-.9, .42), (-1.75, .45)]
            neck, head = [(1.2, -.05), (1.75, -.75), (2.05, -1.15)], (2.15, -1.42)
        self.add(smooth(outline), "body", at, (1, .12), pale=(.2, .75, 1.6, .35), side=True)
        for x, y in (back[1], back[2]):
            self.leg(x, y, foot, at, x < 0)
        self.add(limb(neck, [.72, .60, .55]), "body", at, (-.6, .8), pale=(2.2, -.2, .5, .6), side=True)
        nx, ny = np.array(neck[1]) * .45 + np.array(neck[2]) * .55
        self.collared([(nx - .55, ny - .05), (nx - .05, ny + .42), (nx + .5, ny + .55)], at)
        self.head(head[0] + .1, head[1], .84, view)
        self.ground, self.width = foot + .05, 2.0

    def leg(self, x, y, foot, at, hind, shade=None):
        """One leg of a standing animal; shade darkens the far ones."""
        colour = None if shade is None else self.coat.base * shade
        mid = (y + foot) / 2
        if hind:
            line, wid = [(x - .05, y), (x + .12, mid - .1), (x - .2, mid + .3), (x - .1, foot - .1)], [.50, .32, .17,
                    .15]
        else:
            line, wid = [(x, y), (x + .02, mid), (x, foot - .1)], [.38, .21, .16]
        self.add(limb(line, wid), "leg", at, (0, 1), tip=(x, foot), colour=colour)
        self.add(blob(x + .08, foot - .06, .25, .14), "leg", at, (1, 0), tip=(x, foot), fuzz=.02, colour=colour)

    def pose_lie(self, view="front"):
        """Lying with the forelegs stretched out, seen from the side."""
        at, k = frame(), self.stout
        g = 1.0
        if self.cat:
            self.tail([(-1.9, g - .25), (-2.6, g - .15), (-3.0, g - .2), (-3.2, g - .45)], at, .16)
        else:
            self.tail([(-1.9, g - .25), (-2.5, g - .2), (-3.0, g - .15)], at, .2)
        far = [(1.2, g - .35), (2.2, g - .3), (3.0, g - .26)]
        self.add(limb(far, [.3, .22, .2]), "leg", at, (1, 0), tip=far[-1])
        outline = [(-2.2, .3), (-1.9, -.45), (-1.0, -.74 * k), (.3, -.64), (1.2, -.85), (1.85, -.3), (1.9, .5),
                   (1.5, .95), (0, g), (-1.6, g)]
        self.add(smooth(outline), "body", at, (1, .15), pale=(1.7, .35, .5, .8), side=True)
        self.add(blob(-1.35, .32, .78, .66, -.2), "body", at, (.6, .8), side=True)
        self.add(limb([(-1.4, g - .12), (-.8, g - .08), (-.5, g - .08)], [.2, .2, .18]), "leg", at, (1, 0),
                 tip=(-.5, g - .1))
        near = [(.95, g - .3), (1.8, g - .16), (2.6, g - .14)]
        self.add(limb(near, [.34, .22, .2]), "leg", at, (1, 0), tip=near[-1])
        self.paw(2.72, g - .13, at, .27, toes=False)
        top = -1.05 if self.cat else -1.3
        self.add(limb([(1.1, .1), (1.5, -.5), (1.75, top + .2)], [.8, .68, .58]), "body", at, (-.4, .9),
                 pale=(1.9, .2, .5, .8), side=True)
        self.collared([(1.1, top + .65), (1.6, top + .95), (2.2, top + .85)], at)
        self.head(1.8, top, .9, view)
        self.ground, self.width = g, 2.3

    def pose_sphinx(self, view="front"):
        """Lying, seen from the front."""
        at, k = frame(), self.stout
        s = self.rng.choice([-1, 1])
        self.tail(np.array([(.9, 1.45), (1.7, 1.5), (2.2, 1.35), (2.4, 1.1)]) * [s, 1], at, .17)
        self.add(smooth(mirror([(0, .0), (.6, .08), (1.02 * k, .55), (1.18 * k, 1.15), (1.05 * k, 1.6), (0, 1.65)])),
                 "body", at, (0, 1), side=True)
        self.add(smooth(mirror([(0, .1), (.6, .3), (.86, .9), (.75, 1.5), (0, 1.7)])), "body", at, (0, 1),
                 pale=(0, 1.0, .48, .8))
        for q in (-1, 1):
            self.add(limb([(q * .85, 1.1), (q * .72, 1.5), (q * .6, 1.72)], [.34, .3, .26]), "leg", at, (0, 1),
                     tip=(q * .6, 1.75))
            self.paw(q * .58, 1.76, at, .33)
        self.collared([(-.6, .8), (-.3, .98), (0, 1.03), (.3, .98), (.6, .8)], at)
        self.head(0, 0, 1, view)
        self.ground, self.width = 1.9, 1.6


# ---------------------------------------------------------------- painting
class Painter:
    """Paints parts on a picture: outline -> mask -> rounded relief -> lit fur."""

    def __init__(self, picture, tiles, light):
        self.picture, self.tiles, self.light = picture, tiles, light
        self.cover = np.zeros(picture.shape[:2], F32)

    def box(self, points, pad):
        """The pixels around the points, within the picture; None if there are none."""
        h, w = self.cover.shape
        x0, y0 = np.maximum(np.floor(points.min(0) - pad), 0).astype(int)
        x1, y1 = np.minimum(np.ceil(points.max(0) + pad) + 1, (w, h)).astype(int)
        return (x0, y0, x1, y1) if x1 - x0 > 1 and y1 - y0 > 1 else None

    def part(self, part, place, coat):
        """Paint one part over what is already there."""
        full = join(place, part.at)
        points = apply(full, part.outline)
        scale = float(np.sqrt(abs(np.linalg.det(full[0]))))
        if part.ink is not None:
            return self.ink(part, full, points, scale)
        fuzz = float(max(0.6, part.fuzz * scale))
        box = self.box(points, fuzz * 2 + 2)
        if box is None:
            return None
        x0, y0, x1, y1 = box
        flat = Image.new("L", (x1 - x0, y1 - y0))
        ImageDraw.Draw(flat).polygon([tuple(p) for p in points - (x0, y0)], fill=255)
        mask = np.asarray(flat.filter(ImageFilter.GaussianBlur(fuzz)), F32) / 255
        inverse = np.linalg.inv(full[0]).astype(F32)
        px = np.arange(x0, x1, dtype=F32)[None, :] - F32(full[1][0])
        py = np.arange(y0, y1, dtype=F32)[:, None] - F32(full[1][1])
        x, y = inverse[0, 0] * px + inverse[0, 1] * py, inverse[1, 0] * px + inverse[1, 1] * py
        hair = self.hair(part, x, y, scale)
        alpha = np.clip((mask - 0.5 + 1.3 * hair * mask * (1 - mask) * (part.fuzz > 0.015)) * max(1.0,
                fuzz * 0.9) + 0.5, 0, 1)
        shade = self.relief(flat, points, part, box)
        shade *= 1 + (0.20 if part.fuzz > 0.015 else 0.03) * hair
        colour = coat_colour(coat, part, x, y, self.tiles)
        colour *= (self.light.shadow + (self.light.lit - self.light.shadow) * shade[..., None])
        self.cast(alpha, box, min(12.0, 0.12 * scale))
        under = self.picture[y0:y1, x0:x1]
        under += alpha[..., None] * (colour - under)
        cover = self.cover[y0:y1, x0:x1]
        np.maximum(cover, alpha, out=cover)
        return None

    def hair(self, part, x, y, scale):
        """Combed noise along the fur: away from a point (three numbers) or along a direction."""
        k = scale / max(1.0, scale / 75)
        if len(part.fur) == 3:
            dx, dy = x - part.fur[0], y - part.fur[1]
            u, v = np.hypot(dx, dy) * k, np.arctan2(dy, dx) * (0.8 * k)
        else:
            fx, fy = np.array(part.fur) / (np.hypot(*part.fur) + 1e-9)
            u, v = (x * fx + y * fy) * k, (x * fy - y * fx) * k
            v = v + 4 * np.sin(u * 0.06)
        return sample(self.tiles.streak, u, v)

    def relief(self, flat, points, part, box):
        """Light on the part as if its outline were blown up like a cushion."""
        size = np.ptp(points, axis=0).min()
        radius = float(max(1.5, 0.22 * size))
        step = max(1, int(radius / 4))
        w, h = flat.size
        small = flat.resize((max(2, w // step), max(2, h // step)),
                            Image.BOX).filter(ImageFilter.GaussianBlur(radius / step))
        height = np.asarray(small, F32) / 255
        gy, gx = np.gradient(height)
        k = part.bump * 2.2 * radius / step
        nx, ny = -gx * k, -gy * k
        lx, ly, lz = self.light.way
        tone = (nx * lx + ny * ly + lz) / np.sqrt(1 + nx * nx + ny * ny)
        tone = np.clip(tone, 0, 1.2) * (0.55 + 0.5 * height)
        return np.asarray(Image.fromarray(tone.astype(F32)).resize((w, h), Image.BICUBIC)).copy()

    def cast(self, alpha, box, reach):
        """Darken the animal itself just behind the new part, away from the light."""
        x0, y0, x1, y1 = box
        soft = Image.fromarray((alpha * 255).astype(np.uint8)).filter(ImageFilter.GaussianBlur(max(0.8, reach * .6)))
        dx, dy = int(-self.light.way[0] * reach), int(abs(self.light.way[1]) * reach)
        dark = np.roll(np.asarray(soft, F32) / 255, (dy, dx), (0, 1))
        self.picture[y0:y1, x0:x1] *= (1 - 0.42 * dark * self.cover[y0:y1, x0:x1])[..., None]

    def ink(self, part, full, points, scale):
        """Draw sharp marks enlarged and bring them down, so that edges are smooth."""
        box = self.box(points, 3)
        if box is None:
            return
        x0, y0, x1, y1 = box
        ss = 3 if max(x1 - x0, y1 - y0) < 160 else 2
        patch = Image.new("RGBA", ((x1 - x0) * ss, (y1 - y0) * ss), (128, 128, 128, 0))
        pen = ImageDraw.Draw(patch)
        for kind, pts, colour, width in part.ink:
            pts = [tuple(p) for p in (apply(full, pts) - (x0, y0)) * ss]
            if kind == "poly":
                pen.polygon(pts, fill=tuple(int(c) for c in colour))
            else:
                pen.line(pts, fill=colour, width=max(1, round(width * scale * ss)), joint="curve")
        patch = np.asarray(patch.resize((x1 - x0, y1 - y0), Image.BOX), F32) / 255
        alpha = patch[..., 3:]
        under = self.picture[y0:y1, x0:x1]
        under += alpha * (patch[..., :3] * (0.35 * self.light.shadow + 0.65 * self.light.lit) - under)

    def ground_shadow(self, x, y, rx, ry):
        """The soft dark spot an animal stands on."""
        box = self.box(np.array([(x - rx * 1.6, y - ry * 1.6), (x + rx * 1.6, y + ry * 1.6)]), 0)
        if box is not None:
            x0, y0, x1, y1 = box
            u = (np.arange(x0, x1, dtype=F32)[None, :] - x) / rx
            v = (np.arange(y0, y1, dtype=F32)[:, None] - y) / ry
            self.picture[y0:y1, x0:x1] *= (1 - 0.55 * np.exp(-1.3 * (u * u + v * v) ** 1.5))[..., None]


# ---------------------------------------------------------------- scene
POSES = ("portrait", "portrait", "profile", "sit", "sit", "stand", "stand", "stand_profile", "lie", "lie", "sphinx")


def place_animal(rng, animal, pose, w, h):
    """Where and how large: from a close-up to small in the scene; returns the map to pixels."""
    corners = np.vstack([apply(p.at, p.outline) for p in animal.parts])
    lo, hi = corners.min(0), corners.max(0)
    fx, fy, _ = animal.face
    if pose in ("portrait", "profile"):
        scale = min(w, h) * rng.uniform(0.19, 0.31)
        x, y = w * rng.uniform(0.36, 0.64), h * rng.uniform(0.38, 0.52)
        x, y = np.clip(x, scale * .9, w - scale * .9), max(y, 1.15 * scale)
    else:
        far = rng.random() < 0.14
        fill = rng.uniform(0.42, 0.54) if far else rng.uniform(0.62, 1.02)
        scale = fill * min(w / (hi - lo)[0], h / (hi - lo)[1])
        middle = (lo + hi) / 2
        room = np.maximum(0.0, (np.array([w, h]) - scale * (hi - lo)) / 2)
        x = w / 2 + rng.uniform(-1, 1) * (room[0] + 0.05 * w)
        y = h / 2 + rng.uniform(-.1, 1) * room[1] * .9
    scale = max(scale, 0.075 * min(w, h))  # never too small to name
    flip = rng.random() < 0.5
    place = frame(0, 0, scale, 0, flip)
    anchor = place[0] @ (np.array([fx, fy]) if pose in ("portrait", "profile") else middle)
    return place[0], np.array([x, y]) - anchor


def foreground(rng, picture, small):
    """Sometimes something out of focus stands in front: blades, bars, a toy, an edge."""
    h, w = picture.shape[:2]
    what = ("none", "grass", "bars", "ball", "edge", "leaves")[rng.choice(6, p=[.56, .13, .08, .08, .08, .07])]
    if what == "none" or (small and what in ("bars", "leaves")):  # these would hide a far animal
        return
    layer = Image.new("RGBA", (w, h), (90, 90, 70, 0))
    pen = ImageDraw.Draw(layer)
    tone = rng.uniform(0.6, 1.3)
    tint = lambda c: tuple(int(min(255, v * tone)) for v in c) + (255,)  # noqa: E731
    if what in ("grass", "leaves"):
        wide, tall = (3, .26) if what == "grass" else (16, .34)
        for _ in range(70 if what == "grass" else 7):
            x, t, lean = rng.uniform(0, w), h * tall * rng.uniform(.3, 1), rng.normal(0, 18)
            b = wide * rng.uniform(.6, 1.5)
            shade = rng.uniform(0.7, 1.2)
            pen.polygon([tuple(q) for q in smooth([(x - b * .5, h + 5), (x - b + lean * .4, h - t * .5),
                                                   (x + lean, h - t), (x + b + lean * .4, h - t * .5),
                                                   (x + b * .5, h + 5)], 4)],
                        fill=tint(np.array((84, 124, 50)) * shade))
    elif what == "bars":
        gap, thick = w * rng.uniform(.16, .26), w * rng.uniform(.008, .02)
        c = [(120, 96, 70), (70, 72, 76), (214, 212, 206)][rng.integers(3)]
        for x in np.arange(rng.uniform(0, gap), w, gap):
            pen.rectangle((x - thick, 0, x + thick, h), fill=tint(c))
            pen.rectangle((x - thick * .4, 0, x - thick * .1, h), fill=tint(np.array(c) * 1.2))
    elif what == "ball":
        r, x, y = h * rng.uniform(.06, .11), w * rng.uniform(.1, .9), h * rng.uniform(.9, .97)
        c = rng.uniform(40, 230, 3)
        for k in range(8):
            q = r * (1 - k / 9)
            pen.ellipse((x - q - k * r * .04, y - q - k * r * .05, x + q - k * r * .04, y + q - k * r * .05),
                        fill=tint(c * (.65 + .07 * k)))
    else:
        c, side, t = rng.uniform(50, 170, 3), rng.integers(3), rng.uniform(.06, .15)
        edge = [(0, 0, w * t, h), (w * (1 - t), 0, w, h), (0, h * (1 - t), w, h)][side]
        pen.rectangle(edge, fill=tint(c))
    layer = np.asarray(layer.filter(ImageFilter.GaussianBlur(rng.uniform(.8, 3.5))), F32) / 255
    picture += layer[..., 3:] * (layer[..., :3] - picture)


def camera(rng, picture):
    """Exposure, tint, vignette, blur and noise, the way a small camera would."""
    h, w = picture.shape[:2]
    hard = rng.random() < 0.15
    exposure = rng.choice([0.55, 1.45]) if hard and rng.random() < 0.6 else rng.uniform(0.84, 1.18)
    warm = rng.normal(0, 0.05)
    picture *= np.array([1 + warm, 1 + rng.normal(0, .01), 1 - warm], F32) * F32(exposure)
    v = ((np.arange(h, dtype=F32) / h - .5) ** 2)[:, None] + ((np.arange(w, dtype=F32) / w - .5) ** 2)[None, :]
    picture *= (1 - rng.uniform(0, .75) * v)[..., None]
    image = Image.fromarray((np.clip(picture, 0, 1) * 255).astype(np.uint8))
    blur = rng.uniform(1.4, 2.8) if rng.random() < 0.12 else rng.uniform(0, .7)
    if blur > 0.25:
        image = image.filter(ImageFilter.GaussianBlur(blur))
    grain = rng.standard_normal((h, w), F32) * rng.uniform(1, 5 if not hard else 13)
    noisy = np.asarray(image, F32) + grain[..., None]
    return Image.fromarray(np.clip(noisy, 0, 255).astype(np.uint8))


def draw(kind, seed):
    """The picture of one cat or dog; the same (kind, seed) gives the same picture."""
    rng = np.random.default_rng((int(seed), KINDS.index(kind)))
    w, h = SIZES[rng.integers(len(SIZES))]
    tiles = SimpleNamespace(streak=streak_tile(rng), cloud=cloud_tile(rng, 16))
    pose = POSES[rng.integers(len(POSES))]
    animal = Animal(rng, kind)
    name, _, profile = pose.partition("_")
    if name == "profile":
        animal.pose_portrait("side")
    else:
        getattr(animal, "pose_" + name)("side" if profile else "front")
    place = place_animal(rng, animal, pose, w, h)
    scale = np.sqrt(abs(np.linalg.det(place[0])))
    foot = apply(place, [(0, animal.ground)])[0]
    horizon = rng.uniform(.55, 1.05) if name in ("portrait", "profile") else (foot[1] - scale * rng.uniform(.25,
            1.6)) / h
    picture = backdrop(rng, w, h, float(np.clip(horizon, .12, .97)), tiles)
    side = rng.choice([-1, 1])
    way = np.array([side * rng.uniform(.25, .75), -rng.uniform(.3, .8), 0.75])
    strength = rng.uniform(.25, .5)
    light = SimpleNamespace(way=way / np.linalg.norm(way), shadow=rgb((214, 220, 235)) * F32(1 - strength) * .72,
                            lit=rgb((255, 248, 236)) * F32(1.28 + .3 * strength))
    painter = Painter(picture, tiles, light)
    if animal.ground < 8:
        centre = apply(place, [(0, animal.ground - .05)])[0]
        painter.ground_shadow(centre[0] - side * .25 * scale, centre[1], animal.width * scale * 1.1, .3 * scale)
    for part in animal.parts:
        painter.part(part, place, animal.coat)
    foreground(rng, picture, scale < 0.1 * h)
    return camera(rng, picture)


# ---------------------------------------------------------------- command
def save(image, path, **options):
    """Write under a temporary name first: a broken run leaves no half picture."""
    part = path.with_name(path.name + ".part")
    try:
        image.save(part, **options)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def contact_sheet(images, cell=(200, 160), columns=10):
    """All the pictures, small, on one page."""
    rows = -(-len(images) // columns)
    sheet = Image.new("RGB", (cell[0] * columns, cell[1] * rows), "white")
    for i, image in enumerate(images):
        small = image.copy()
        small.thumbnail((cell[0] - 4, cell[1] - 4))
        sheet.paste(small, (i % columns * cell[0] + (cell[0] - small.width) // 2,
                            i // columns * cell[1] + (cell[1] - small.height) // 2))
    return sheet


def main(argv=None):
    """Draw the pictures the command line asks for; returns the exit status."""
    default = Path(__file__).resolve().parent.parent / "cat_dog" / "val"
    parser = argparse.ArgumentParser(description="Draw pictures of cats and dogs from a seed.")
    parser.add_argument("--output", type=Path, default=default, help="folder for the pictures (default: cat_dog/val)")
    parser.add_argument("--count", type=int, default=50, help="pictures of each kind (default: 50)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the run (default: 0, the shipped pictures)")
    parser.add_argument("--sheet", type=Path, metavar="FILE", help="also write a contact sheet, ten pictures a row")
    args = parser.parse_args(argv)
    if not 1 <= args.count <= SEEDS_PER_RUN:
        parser.error(f"--count must be from 1 to {SEEDS_PER_RUN}")
    if args.seed < 0:
        parser.error("--seed must not be negative")
    shown = []
    try:
        args.output.mkdir(parents=True, exist_ok=True)
        for kind in KINDS:
            for i in range(args.count):
                image = draw(kind, args.seed * SEEDS_PER_RUN + i)
                save(image, args.output / f"{kind}.{i}.jpg", format="JPEG", quality=85 + i % 8)
                if args.sheet:
                    shown.append(image)
        if args.sheet:
            save(contact_sheet(shown), args.sheet, format="JPEG" if args.sheet.suffix.lower() in (".jpg",
                    ".jpeg") else "PNG")
    except OSError as error:
        print(f"draw_cat_dog: cannot write: {error}", file=sys.stderr)
        return 1
    print(f"wrote {args.count} cats and {args.count} dogs to {args.output} (seed {args.seed})")
    return 0


if __name__ == "__main__":
    sys.exit(main())
