"""Draws what tools/explain.py found: the bytes of results/report.png.

It takes plain data: rows as explain.json holds them, histograms and pixels.
"""
import io
import warnings
from itertools import cycle

import numpy as np
from matplotlib.figure import Figure
from PIL import Image
from sweep_bits import decimal, with_unit

import quantize_catdog as script

# the colours are those of Okabe and Ito, which the colour-blind can tell apart
BLUE, SKY, ORANGE, RED = "#0072B2", "#56B4E9", "#E69F00", "#D55E00"
GREEN, PINK, GRAY = "#009E73", "#CC79A7", "#555555"
COLORS, MARKERS = (GRAY, BLUE, SKY, GREEN, ORANGE, RED, PINK), "xosD^vP"
BARS = 128          # of a drawn histogram, from -2 to 2 times the largest value not clipped
SHOWN = 8           # pictures at the bottom
JPEG_BYTES = 300_000    # at most, of the picture in a notebook, which saves it with the cell
EXACT_DB = 60       # height at which a curve of dB shows that there was no error


def axes_of(figure, where, title, **settings):
    axes = figure.add_subplot(where)
    axes.set_title(title, loc="left", fontsize=13, fontweight="bold")
    axes.set(**settings)
    axes.spines[["top", "right"]].set_visible(False)
    return axes


def legend_beside(axes):
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), fontsize=10, frameon=False)


def draw_activations(figure, grid, ledger, histograms):
    """A histogram per activation, on a logarithmic scale; what is clipped is red."""
    for i, (activation, row) in enumerate(zip(histograms, ledger)):
        counts = np.asarray(histograms[activation], np.float64).reshape(BARS, -1).sum(1)
        shares, edges = counts / counts.sum(), np.linspace(-2, 2, BARS + 1)
        within = slice(BARS // 4, 3 * BARS // 4)                # of the range
        lowest = -1.4 if activation.startswith("fc") else 0
        axes = axes_of(figure, grid[i], activation, yscale="log", xlim=(lowest, 1.4),
                       ylim=(1e-8, 30))
        axes.stairs(shares, edges, fill=True, color=SKY if row["clipped"] is None else RED)
        axes.stairs(shares[within], edges[BARS // 4:3 * BARS // 4 + 1], fill=True, color=SKY)
        for edge in [-1, 1] if lowest < 0 else [1]:
            axes.axvline(edge, color=RED, linestyle="--", ymax=0.85)
        clipped = "stays FP32"
        if row["clipped"] is not None:
            clipped = f"{100 * row['clipped']:.3g} % clipped"
        axes.text(0.5, 0.98, clipped, transform=axes.transAxes, ha="center", va="top", fontsize=11,
                  color=GRAY)
        axes.set_yticks([1e-8, 1e-6, 1e-4, 1e-2, 1], [] if i else None)
        axes.set_xlabel("value / range" if i == 0 else "")


def draw_curve(figure, where, curve):
    """How far each range has grown after so many calibration pictures."""
    axes = axes_of(figure, where, "Ranges, by calibration pictures", xscale="log",
                   xlabel="pictures", ylabel="% of the last range", ylim=(0, 108))
    pictures = [row["pictures"] for row in curve]
    for activation, color, marker in zip(curve[0]["ranges"], cycle(COLORS), cycle(MARKERS)):
        ranges = [100 * row["ranges"][activation] for row in curve]
        axes.plot(pictures, ranges, color=color, marker=marker, label=activation)
    same = [100 * row["agreement"] for row in curve]
    axes.plot(pictures, same, "k:", linewidth=2.5, label="same class")
    ticks = [count for count in pictures if len(pictures) < 9 or str(count)[0] == "1"]
    ticks = [count for count in ticks if 1.9 * count < pictures[-1]] + pictures[-1:]
    axes.set_xticks(ticks, ticks)
    axes.minorticks_off()
    legend_beside(axes)


def percent_of_signal(row, error):
    sqnr = row["sqnr_db"][error]
    return 0 if sqnr is None else 100 * 10**(-sqnr / 20)


def draw_ledger(figure, where, ledger):
    """Three bars per layer: the error it inherits, the error it adds, what that does to logits."""
    axes = axes_of(figure, where, "Where the error arises, in % of the signal")
    errors = [("inherited", SKY, "inherited from the input"), ("added", BLUE, "added by the layer"),
              ("logits", ORANGE, "what that does to the logits")]
    for i, (error, color, label) in enumerate(errors):
        heights = [percent_of_signal(row, error) for row in ledger]
        axes.bar(np.arange(len(ledger)) + 0.27 * (i - 1), heights, 0.25, color=color, label=label)
    top = max(percent_of_signal(row, error) for row in ledger for error, _, _ in errors) or 1
    axes.set_ylim(0, 1.95 * top)                # the legend lies above the bars
    for i, row in enumerate(ledger):
        if row["hurts_most"]:
            axes.annotate("hurts most", (i + 0.27, percent_of_signal(row, "logits")),
                          (i + 0.27, 1.15 * top), ha="center", fontsize=11, color=RED,
                          fontweight="bold", arrowprops={"arrowstyle": "->", "color": RED})
    axes.set_xticks(range(len(ledger)), [row["name"] for row in ledger])
    axes.legend(loc="upper left", fontsize=10, frameon=False)


def draw_bits(figure, where, bits):
    """A heat map: a cell per number of bits of the weights and of the activations."""
    axes = axes_of(figure, where, "Same class, %, and logit SQNR, dB, by bits",
                   xlabel="bits of activations", ylabel="bits of weights")
    sqnr = [[cell["sqnr_db"] for cell in row["cells"]] for row in bits]
    heat = [[40 if value is None else value for value in row] for row in sqnr]
    axes.imshow(heat, cmap="cividis", vmin=0, vmax=40, aspect="auto")
    for i, row in enumerate(bits):
        for j, cell in enumerate(row["cells"]):
            same, color = 100 * cell["agreement"], "black" if heat[i][j] > 20 else "white"
            axes.text(j, i, f"{same:.4g}\n{decimal(cell['sqnr_db'])}", ha="center", va="center",
                      fontsize=8.5, linespacing=1, color=color)
        axes.text(len(row["cells"]) - 0.4, i, f"{row['file_bytes']:,}", va="center", fontsize=10)
    axes.text(len(bits[0]["cells"]) - 0.4, len(bits) - 0.35, "file bytes", va="top", fontsize=10)
    axes.set_xticks(range(len(bits[0]["cells"])), [cell["BIT"] for cell in bits[0]["cells"]])
    axes.set_yticks(range(len(bits)), [row["WEIGHT_BIT"] for row in bits])


def draw_layer_bits(figure, where, layer_bits):
    """A curve per layer: the SQNR of the logits when its weights alone have fewer bits than 8."""
    axes = axes_of(figure, where, "Logit SQNR, dB, when one layer has fewer bits",
                   xlabel="bits of the layer's weights; all others have 8")

    for row, color, marker in zip(layer_bits["layers"], cycle(COLORS[1:]), cycle(MARKERS[1:])):
        bits = [cell["bit"] for cell in row["cells"]]
        heights = [EXACT_DB if cell["sqnr_db"] is None else cell["sqnr_db"]
                   for cell in row["cells"]]
        axes.plot(bits, heights, color=color, marker=marker, label=row["name"])
    spared = layer_bits["spared_db"]
    axes.axhline(heights[0] - spared, color=GRAY, linestyle="--", label=f"{spared} dB lost")
    axes.set_xticks(bits, bits)
    axes.invert_xaxis()             # from 8 bits down, as in the tables
    legend_beside(axes)


def draw_pictures(figure, grid, pictures, name):
    """Pictures with both networks' answers below; those whose class changed are red."""
    for cell, picture in zip(grid, pictures):
        axes = figure.add_subplot(cell)
        axes.imshow(picture["pixels"])
        axes.set_axis_off()
        file = picture["file"].encode("ascii", "backslashreplace").decode()     # as the font has it
        lines, answers = [f"{script.shorten(file, 15)} ({script.CLASSES[picture['label']]})"], []
        for network, logits in (("FP32", picture["fp32"]), (name, picture["int8"])):
            highest, second = sorted(logits, reverse=True)[:2]
            answers.append(script.CLASSES[logits.index(highest)])
            lines.append(f"{network} {answers[-1]} by {highest - second:.3f}")
        axes.text(0.5, -0.04, "\n".join(lines), fontsize=11, va="top", ha="center",
                  parse_math=False, transform=axes.transAxes,
                  color="black" if answers[0] == answers[1] else RED)


def draw_report(report, histograms, pictures):
    """The bytes of report.png.

    report: what explain.json holds. histograms: {activation: counts (n,) from -2 to 2 times the
    largest value not clipped}, n a multiple of BARS. pictures: at most SHOWN dicts of a "file",
    its "label", "pixels" uint8 (height, width, 3), and its logits in "fp32" and "int8".
    """
    with_bits = "bits" in report
    height = 12.6 if with_bits else 9           # inches; the rows below stay as high as they are
    figure = Figure(figsize=(16, height), dpi=120)
    n, flips = report["images"]["evaluated"], len(report["flips"])
    name, sizes = script.name_of(report["recipe"]), report["file_bytes"]
    heading = {"x": 0.05, "fontsize": 13, "fontweight": "bold"}
    figure.text(0.05, 1 - 0.36 / height, f"{name} gives FP32's answer for {n - flips:,} of {n:,} "
                f"pictures; Top-1 {report['fp32']['top1']:.2f} -> {report['int8']['top1']:.2f} %; "
                f"logit SQNR {with_unit(report['logit_sqnr_db'])}; "
                f"file {sizes['fp32'] / sizes['int8']:.1f} times smaller", fontsize=15)
    widened = " and ".join(script.FC_INPUTS)
    figure.text(y=1 - 0.765 / height, s="Activations: shares of the FP32 values; beyond the dashed "
                f"range they are clipped (HEADROOM multiplies that of {widened})", **heading)
    ratios = [1, 1.3, 1.3, 0.8] if with_bits else [1, 1.3, 0.8]
    rows = figure.add_gridspec(len(ratios), 1, left=0.05, right=0.985, top=1 - 1.125 / height,
                               bottom=0.72 / height, hspace=0.5, height_ratios=ratios)
    draw_activations(figure, rows[0].subgridspec(1, len(histograms), wspace=0.1),
                     report["ledger"], histograms)
    middle = rows[1].subgridspec(1, 2, wspace=0.4)
    draw_curve(figure, middle[0], report["calibration_curve"])
    draw_ledger(figure, middle[1], report["ledger"])
    if with_bits:
        middle = rows[2].subgridspec(1, 2, wspace=0.4)
        draw_layer_bits(figure, middle[0], report["layer_bits"])
        draw_bits(figure, middle[1].subgridspec(1, 2, width_ratios=[8, 1])[0], report["bits"])
    changed = "Pictures whose class changed, in red; then the" if flips else "No class changed; the"
    classes = " and ".join(f"{each}s" for each in script.CLASSES)
    figure.text(y=2.34 / height, s=f"{changed} {classes} with the smallest FP32 margin", **heading)
    draw_pictures(figure, rows[-1].subgridspec(1, SHOWN, wspace=0.1), pictures, name)
    file = io.BytesIO()
    with warnings.catch_warnings(action="ignore"):          # letters that the font has not
        figure.savefig(file, format="png")
    return file.getvalue()


def small_jpeg(png):
    """The bytes of a picture as JPEG, of at most JPEG_BYTES."""
    picture = Image.open(io.BytesIO(png)).convert("RGB")
    for quality in range(91, 0, -10):
        file = io.BytesIO()
        picture.save(file, "JPEG", quality=quality)
        if file.tell() <= JPEG_BYTES:
            break
    return file.getvalue()
