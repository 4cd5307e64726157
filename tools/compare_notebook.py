"""Time quantize_catdog.py against the notebook's own cells, on the same pictures, in turns, and compare answers.

    python tools/compare_notebook.py --pictures FOLDER [--rounds 3]

FOLDER holds pictures called cat.N.jpg and dog.N.jpg; without it, cat_dog/val is taken. Both sides run as
whole programs; the time that their imports take is measured in the same rounds and given apart.
"""
import argparse
import json
import os
import platform
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
IMPORTS = "import json, numpy, torch, torchnet.meter, PIL.Image, PIL.ImageOps, zipfile"


def seconds(command, folder):
    """Wall time of a command, and what it printed."""
    start = time.perf_counter()
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True)
    return time.perf_counter() - start, done.stdout


def cpu_name():
    if Path("/proc/cpuinfo").exists():
        return re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())[1]
    return platform.processor()


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--pictures", type=Path, default=ROOT / "cat_dog" / "val")
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    if not args.pictures.is_dir():
        parser.error(f"no folder {args.pictures}")

    times, stages = {"notebook": [], "script": [], "imports": []}, []
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        (folder / "cat_dog").mkdir()
        (folder / "cat_dog" / "val").symlink_to(args.pictures.resolve())
        for file in ("quantize_catdog.py", "BEST_checkpoint.pth.tar", "tools/notebook_cells.py"):
            shutil.copy(ROOT / file, folder)
        for _ in range(args.rounds):
            for name, command in [("notebook", ["notebook_cells.py"]), ("script", ["quantize_catdog.py"]),
                                  ("imports", ["-c", IMPORTS])]:
                taken, out = seconds([sys.executable, *command], folder)
                times[name].append(taken)
                if name == "notebook":
                    notebook_fp32 = float(re.findall(r"FP32 Top1: ([\d.]+)", out)[-1])
                elif name == "script":
                    report = json.loads((folder / "results" / "report.json").read_text())
                    stages.append(report["seconds"])

    print("python tools/compare_notebook.py " + " ".join(sys.argv[1:]))
    print(f"{report['images']['evaluated']} pictures; Python {platform.python_version()}, torch {torch.__version__}; "
          f"{cpu_name()}, {os.cpu_count()} cores; {args.rounds} rounds in turns")
    median = {name: statistics.median(taken) for name, taken in times.items()}
    for name, taken in times.items():
        print(f"{name:<9} median {median[name]:7.2f} s, from {min(taken):.2f} to {max(taken):.2f}")
    print(f"ratio     {median['notebook'] / median['script']:.2f} with imports, "
          f"{(median['notebook'] - median['imports']) / (median['script'] - median['imports']):.2f} without")
    seconds_of = {stage: statistics.median(row[stage] for row in stages) for stage in stages[0]}
    print("script, without imports: " + ", ".join(f"{stage} {taken:.2f}" for stage, taken in seconds_of.items()))
    analysis = sum(seconds_of[stage] for stage in ("ledger, ranges", "drawing"))
    print(f"ratio     {(median['notebook'] - median['imports']) / (sum(seconds_of.values()) - analysis):.2f} without imports, "
          "ledger, ranges and drawing, which the notebook has not")
    print(f"FP32 Top1 notebook {notebook_fp32:.3f}, script {report['fp32']['top1']:.3f}")


if __name__ == "__main__":
    main()
