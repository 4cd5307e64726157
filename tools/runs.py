"""All runs in one table, to compare what constants do.

    python tools/runs.py [OUTPUT_DIR=results]

Reads runs.jsonl, to which each run of quantize_catdog.py adds a line, and prints
the last runs that share evaluation pictures and weights with the last one. All
runs, with all constants, are written to runs.csv beside it, for a spreadsheet.
"""
import csv
import io
import json
import sys
from pathlib import Path

sys.path[:0] = [str(folder) for folder in Path(__file__).resolve().parents[:2]]
import quantize_catdog as script

PRINTED = 12    # rows
CRCS = ("evaluation_crc", "calibration_crc", "checkpoint_crc")
# {column: (heading, format)} of a run's figures
FIGURES = {"sqnr_db": ("SQNR dB", ".1f"), "same_class": ("same class", ".1f"),
           "top1": ("Top-1 %", ".1f"), "p": ("p", ".2g"), "ms": ("ms", ".2f"),
           "bytes": ("bytes", ",")}


def run_row(report):
    """{column: value} of a run: when, on what, its figures, its constants."""
    fp32, int8, sqnr = report["fp32"], report["int8"], report["logit_sqnr_db"]
    inputs = {name: int(report["inputs"][name]) for name in CRCS}
    row = {"when": report["when"], **inputs, "fp32_top1": float(fp32["top1"]),
           "sqnr_db": float("inf") if sqnr is None else sqnr,
           "same_class": 100 * report["agreement"], "top1": int8["top1"],
           "p": report["mcnemar"]["p"], "fp32_ms": fp32["ms_per_image"],
           "ms": int8["ms_per_image"], "bytes": int8["file_bytes"]}
    for column, (_, style) in FIGURES.items():
        format(row[column], style)                  # raises where it is no number
    constants = {name: script.printable(str(value)) for name, value in report["constants"].items()}
    return row | constants


def read_runs(path):
    """The rows of runs.jsonl; prints how many lines are no run of this version, if any."""
    rows, unreadable = [], 0
    for line in path.read_text("utf-8", errors="replace").splitlines():
        try:
            rows.append(run_row(json.loads(line)))
        except Exception:       # a damaged line raises nearly every type
            unreadable += bool(line.strip())
    if unreadable:
        print(f"{script.display_path(path)}: {unreadable} lines cannot be read and are left out")
    if not rows:
        raise script.InputError(f"{path} holds no run: run quantize_catdog.py first")
    return rows


def csv_bytes(rows):
    """A table for a spreadsheet; runs of versions with other constants have empty cells."""
    columns = dict.fromkeys(column for row in rows for column in row)
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode()


def print_runs(rows):
    """Print the last runs that share pictures and weights with the last row.

    Constants have a column where they differ. > marks the last run, * the best SQNR.
    """
    last = rows[-1]
    numbered = [(number, row) for number, row in enumerate(rows, 1)
                if row["evaluation_crc"] == last["evaluation_crc"]
                and row["checkpoint_crc"] == last["checkpoint_crc"]][-PRINTED:]
    same = [row for _, row in numbered]
    differ = [name for name in [*script.LEGAL, "calibration_crc"]
              if len({row.get(name) for row in same}) > 1]
    if {"DATA_DIR", "CALIBRATION_SPLIT"} & set(differ) and "calibration_crc" in differ:
        differ.remove("calibration_crc")            # the folder's name tells already
    best, table = max(row["sqnr_db"] for row in same), []
    for number, row in numbered:
        cells = {"run": f">{number}" if row is last else str(number)}
        cells |= {name: script.shorten(str(row.get(name, "")), 24) for name in differ}
        cells |= {heading: format(row[column], style)
                  for column, (heading, style) in FIGURES.items()}
        cells["SQNR dB"] += "*" if row["sqnr_db"] == best else " "
        table.append(cells)
    print("The last runs on these evaluation pictures and weights, FP32 Top-1 "
          f"{last['fp32_top1']:.3f} %\n"
          "(> last run, * best SQNR, same class in %; runs.csv has all runs and constants)")
    script.print_table(table)


def main():
    script.set_constants(sys.argv[1:], __doc__)
    script.prepare_process()
    output = script.resolve_path(script.OUTPUT_DIR)
    if not (output / "runs.jsonl").exists():
        raise script.InputError(f"{output} holds no runs.jsonl: run quantize_catdog.py first")
    rows = read_runs(output / "runs.jsonl")
    script.write_files(output, {"runs.csv": csv_bytes(rows)})
    print_runs(rows)


if __name__ == "__main__":
    sys.excepthook = script.end_in_one_line
    main()
