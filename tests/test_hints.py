"""What tools/explain.py hints at, of networks with planted faults."""
import re
import sys

import pytest
import quantize_catdog as script
import torch

from helpers import ROOT

sys.path.insert(0, str(ROOT / "tools"))
from hints import hints as hints_of  # noqa: E402


def hints(calibrated=20, evaluated=100, interval=(85.0, 95.0), sqnr=30.0, recipe=None, biases=None, ranges=None):
    """What is hinted at of a network whose ranges are 1 and whose biases are 0, but for what is planted."""
    folded, int8 = script.CNN_Model(), script.INT8_Model(script.read_constants(script.LEGAL_RECIPE) | (recipe or {}))
    channels = {"input": 3} | {layer.output: len(int8.get_submodule(layer.name).bias) for layer in script.LAYERS}
    for name, count in channels.items():
        folded.ranges[name] = torch.ones(count)
    for name, values in (ranges or {}).items():
        folded.ranges[name][:len(values)] = torch.tensor(values)
    for layer, values in (biases or {}).items():
        int8.get_submodule(layer).bias[:len(values)] = torch.tensor(values, dtype=torch.int32)
    report = {"fp32": {"top1": 90.0, "interval95": interval}, "logit_sqnr_db": sqnr,
              "images": {"evaluated": evaluated, "calibrated": calibrated}}
    return hints_of(report, folded, int8)

# each hint as a pattern
FEW = "Only 19 calibration pictures: "
SILENT = r"Channels never active in calibration \(often harmless\): 2 of 8 in cv4, 1 of 512 in fc1\.$"
NOISY = r"Logit SQNR is below 20 dB: see where the error arises\.$"
STRONG = r"Logit SQNR is below 20 dB: .* cv2's strongest channel is 120 times its median one, "
CLIPPED = r"BIAS_BIT = 16 clips biases \(2 of 32 in cnn2, 1 of 2 in fc2\): "
WORSE, NEAR = [f"FP32 Top-1 of 90.0 % is {words}: " for words in ("worse than guessing", "near guessing")]
CLIPS = dict(recipe={"BIAS_BIT": 16}, biases={"cnn2": [32767, 5, -32767], "fc2": [-32767]})

@pytest.mark.parametrize("planted, expected", [
    ({}, []), (dict(calibrated=19), [FEW]), (dict(calibrated=1000), []),
    (dict(ranges={"cv4": [0, 1, 0], "fc1": [0]}), [SILENT]), (dict(ranges={"cv4": [1e-30]}), []),
    (dict(sqnr=19.99), [NOISY]), (dict(sqnr=20.0), []), (dict(sqnr=None), []), (dict(sqnr=-3.0), [NOISY]),
    (dict(sqnr=5.0, ranges={"cv2": [120.0]}), [STRONG]), (dict(sqnr=20.0, ranges={"cv2": [120.0]}), []),
    (dict(sqnr=5.0, ranges={"cv2": [99.0]}), [NOISY]), (dict(sqnr=5.0, ranges={"fc2": [5e3], "input": [5e3]}), [NOISY]),
    (dict(sqnr=5.0, ranges={"cv1": [110.0], "cv2": [120.0], "cv3": [115.0]}), [STRONG]),
    (dict(sqnr=5.0, ranges={"cv4": [0, 0, 0, 0, 0, 100.0]}), [
        STRONG.replace("cv2", "cv4").replace("120", "100"), r"Channels .* calibration .*: 5 of 8 in cv4\.$"]),
    (CLIPS, [CLIPPED]), (CLIPS | dict(recipe={"BIAS_BIT": 32}), []),
    (dict(recipe={"BIAS_BIT": 16}, biases={"cnn2": [32766, -32766]}), []),
    (dict(biases={"fc1": [2**31 - 1]}), [r"BIAS_BIT = 32 clips biases \(1 of 512 in fc1\): "]),
    (dict(interval=(10.0, 49.9)), [WORSE]), (dict(interval=(10.0, 49.9), evaluated=5), [WORSE]),
    (dict(interval=(10.0, 50.0)), [NEAR]), (dict(interval=(49.9, 70.0), evaluated=20), [NEAR]),
    (dict(interval=(49.9, 70.0), evaluated=19), []), (dict(interval=(50.0, 70.0)), []),
    (CLIPS | dict(interval=(0.0, 10.0), sqnr=1.0, calibrated=2, ranges={"cv1": [0]}), [WORSE, CLIPPED, NOISY]),
    (CLIPS | dict(sqnr=1.0, calibrated=19, ranges={"cv4": [0, 1, 0], "fc1": [0]}), [CLIPPED, NOISY, SILENT]),
    (dict(sqnr=1.0, calibrated=19, ranges={"cv4": [0, 1, 0], "fc1": [0]}), [NOISY, SILENT, FEW])],
    ids=lambda value: str(value)[:40] if isinstance(value, dict) else "")
def test_hints(planted, expected):
    """Each where it applies, and nowhere else; at most three, the gravest first."""
    found = hints(**planted)
    assert len(found) == len(expected) and all(map(re.match, expected, found)), found
