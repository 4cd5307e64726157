"""Time quantize_catdog.py against the notebook that it ports, on the same pictures, in turns.

    python tools/compare_notebook.py --notebook FILE [--pictures FOLDER] [--before SCRIPT]
                                     [--rounds 3]

FILE is the notebook (.ipynb), or a Markdown file with its code. Its code runs unchanged in a folder
of its own, except for one line: our checkpoint holds a state_dict, not a pickled module. FOLDER
holds pictures called cat.N.jpg and dog.N.jpg, and nothing else; without it, cat_dog/val is taken.
SCRIPT is another version of quantize_catdog.py.

All run as whole programs, timed from the start of their process to its end. The time of their
imports is measured in the same rounds and given separately. The floor is what no run can do
without: imports, decoding, one FP32 pass and one INT8 pass, each timed alone in the same rounds.
"""
import argparse
import ast
import json
import multiprocessing
import os
import platform
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from concurrent.futures import ProcessPoolExecutor
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CHECKPOINT = "BEST_checkpoint.pth.tar"
PARTS = ("decoding", "FP32 pass", "INT8 pass")
FENCED = re.compile(r"^(```+|~~~+) *(\w*)[^\n]*\n(.*?)^\1 *$", re.MULTILINE | re.DOTALL)
LANGUAGES = ("", "py", "python", "python3", "ipython3")
PROMPT = re.compile(r"^In ?\[[\d ]*\]: *\n", re.MULTILINE)


def code_of(path):
    """The code of a notebook, its cells in order.

    An .ipynb says which of its cells are code. In a Markdown file they are the fenced blocks; in
    one without fences, what follows each line `In [n]:`. Raises ValueError, one line to put after
    the file's name, where there is no Python code.
    """
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".ipynb":
        try:
            cells = ["".join(cell["source"]) for cell in json.loads(text)["cells"]
                     if cell["cell_type"] == "code"]
        except (ValueError, KeyError, TypeError):
            raise ValueError("is no Jupyter notebook, though it is called .ipynb") from None
    elif FENCED.search(text):
        cells = [block for _, language, block in FENCED.findall(text)
                 if language.lower() in LANGUAGES]
    else:
        cells = [leading_python(part) for part in PROMPT.split(text)[1:]]
    code = "\n\n".join(cells)
    if not code.strip():
        raise ValueError("holds no code: give an .ipynb, or Markdown with fenced blocks or In [n]:")
    if not is_python(code):
        raise ValueError("holds code that is not plain Python: take out %magic lines and the like")
    return code


def leading_python(text):
    """The longest beginning of a text that ends at an empty line and is Python.

    Outputs and prose follow the code of a cell unmarked; with them it would not be Python.
    """
    lines = text.split("\n")
    for end in range(len(lines), 0, -1):
        at_empty_line = end == len(lines) or not lines[end].strip()
        if at_empty_line and is_python("\n".join(lines[:end])):
            return "\n".join(lines[:end])
    return ""


def is_python(text):
    try:
        ast.parse(text)
        return True
    except SyntaxError:
        return False


def with_state_dict(code):
    """The code with its one line changed. Raises ValueError where that line is not there."""
    code, changed = re.subn(r"\bbest_model\.state_dict\(\)", "best_model", code)
    if changed != 1:
        raise ValueError(f"has best_model.state_dict() {changed} times: it must be there once, "
                         "where the checkpoint is loaded")
    return code


def network_of(code):
    """The code up to the end of its class CNN_Model. Raises ValueError where it has none."""
    for node in ast.parse(code).body:
        if isinstance(node, ast.ClassDef) and node.name == "CNN_Model":
            return "\n".join(code.split("\n")[:node.end_lineno])
    raise ValueError("has no class CNN_Model")


def imports_of(code):
    """The import statements of a program, as a program."""
    return "\n".join(ast.unparse(node) for node in ast.parse(code).body
                     if isinstance(node, (ast.Import, ast.ImportFrom)))


def furnish(folder, pictures, name, code):
    """Make a folder that a program can run in: its code, the pictures and the checkpoint."""
    (folder / "cat_dog").mkdir(parents=True)
    (folder / "cat_dog" / "val").symlink_to(pictures.resolve(), target_is_directory=True)
    shutil.copy(ROOT / CHECKPOINT, folder)
    (folder / name).write_text(code, encoding="utf-8")


def run_python(arguments, folder):
    """Wall seconds of a Python process in a folder, and what it printed. Exits where it fails."""
    start = time.perf_counter()
    done = subprocess.run([sys.executable, *arguments], cwd=folder, capture_output=True, text=True,
                          check=False)
    seconds = time.perf_counter() - start
    if done.returncode:
        last = (done.stderr.strip() or "no message").splitlines()[-1]
        sys.exit(f"{folder.name}: python {arguments[0]} ended with {done.returncode}: {last}")
    return seconds, done.stdout


def parts_alone(folder):
    """[seconds] of PARTS, with the script in a folder and the INT8 network of its last run.

    For a process of its own, since it changes its process as a run of the script does.
    """
    sys.path.insert(0, str(folder))
    import torch

    import quantize_catdog as script
    script.prepare_process()
    start = time.perf_counter()
    pictures = script.CatDogDataset(folder / "cat_dog" / "val")
    batches = pictures.first_pixels(len(pictures)).split(script.BATCH_SIZE)
    seconds = [time.perf_counter() - start]
    fp32 = script.load_checkpoint(folder / CHECKPOINT).fused()
    int8 = script.load_int8_checkpoint(folder / "results" / "INT8_checkpoint.pth.tar")
    script.choose_engines(int8, batches[0])
    with torch.inference_mode():
        for network in (fp32, int8):
            start = time.perf_counter()
            for pixels in batches:
                network(pixels).cpu()           # .cpu() waits for a GPU
            seconds.append(time.perf_counter() - start)
    return seconds


def measure(programs, rounds):
    """Run {name: (folder, arguments of Python)} in turns, and then the script's parts.

    Returns {name or part: [seconds of each round]} and {name: what its last run printed}.
    """
    times, printed = defaultdict(list), {}
    for _ in range(rounds):
        for name, (folder, arguments) in programs.items():
            seconds, printed[name] = run_python(arguments, folder)
            times[name].append(seconds)
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
            parts = process.submit(parts_alone, programs["script"][0]).result()
        for part, seconds in zip(PARTS, parts, strict=True):
            times[part].append(seconds)
    return times, printed


def print_times(times):
    """Print a row for each, then the ratios of the medians."""
    median = {name: statistics.median(seconds) for name, seconds in times.items()}
    for name, seconds in times.items():
        print(f"{name:<17} {median[name]:7.2f} s, from {min(seconds):.2f} to {max(seconds):.2f}")
    script, imports = median["script"], median["script, imports"]
    if "notebook" in times:
        notebook = median["notebook"]
        apart = (notebook - median["notebook, imports"]) / (script - imports)
        print(f"notebook / script {notebook / script:.2f}, both without imports {apart:.2f}")
    if "before" in times:
        print(f"script / before   {script / median['before']:.2f}")
    floor = imports + sum(median[part] for part in PARTS)
    print(f"script / floor    {script / floor:.2f}; floor {floor:.2f} s: imports, "
          + ", ".join(PARTS))


def print_answers(reports, printed):
    """Print each one's Top-1; not the notebook's for INT8, which counts its FP32 answers too."""
    for name, report in reports.items():
        fp32, int8 = report["fp32"]["top1"], report["int8"]["top1"]
        print(f"{name:<17} FP32 Top1 {fp32:.3f}, INT8 Top1 {int8:.3f}")
    if "notebook" in printed:
        top1 = re.findall(r"FP32 Top1: ([\d.]+)", printed["notebook"]) or ["not printed"]
        print(f"{'notebook':<17} FP32 Top1 {top1[-1]}")


def cpu_name():
    if Path("/proc/cpuinfo").exists():
        name = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
        if name:
            return name[1]
    return platform.processor()


def parsed_arguments():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--notebook", type=Path, help="the notebook, .ipynb or Markdown")
    parser.add_argument("--pictures", type=Path, default=ROOT / "cat_dog" / "val")
    parser.add_argument("--before", type=Path, help="another version of quantize_catdog.py")
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    if not args.pictures.is_dir():
        parser.error(f"no folder {args.pictures}")
    for file in (args.notebook, args.before):
        if file and not file.is_file():
            parser.error(f"no file {file}")
    if args.rounds < 1:
        parser.error("give at least one round")
    return args


def main():
    args = parsed_arguments()
    scripts = {"script": ROOT / "quantize_catdog.py"}
    if args.before:
        scripts["before"] = args.before
    if args.notebook:
        try:
            notebook = with_state_dict(code_of(args.notebook))
        except ValueError as error:
            sys.exit(f"{args.notebook} {error}")

    with tempfile.TemporaryDirectory() as folder:
        scratch, programs = Path(folder), {}
        for name, file in scripts.items():
            code = file.read_text(encoding="utf-8")
            furnish(scratch / name, args.pictures, "quantize_catdog.py", code)
            # the notebook calibrates on the pictures that it counts
            programs[name] = scratch / name, ["quantize_catdog.py", "CALIBRATION_SPLIT=val"]
        programs["script, imports"] = scratch / "script", ["-c", "import quantize_catdog"]
        if args.notebook:
            furnish(scratch / "notebook", args.pictures, "notebook.py", notebook)
            programs["notebook"] = scratch / "notebook", ["notebook.py"]
            programs["notebook, imports"] = scratch / "notebook", ["-c", imports_of(notebook)]
        times, printed = measure(programs, args.rounds)
        reports = {name: json.loads((scratch / name / "results" / "report.json").read_text())
                   for name in scripts}

    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "numpy", "pillow"))
    print(f"python tools/compare_notebook.py {' '.join(sys.argv[1:])}\n"
          f"{reports['script']['images']['evaluated']} pictures, medians of {args.rounds} rounds; "
          f"Python {platform.python_version()}, {packages}; {cpu_name()}, {os.cpu_count()} cores")
    if not args.notebook:
        print("no --notebook FILE, so the notebook's rows are left out")
    print_times(times)
    print_answers(reports, printed)


if __name__ == "__main__":
    main()
