"""One word for each thing, the field's own: the words that would name it otherwise stand nowhere."""
import re

import pytest

from helpers import ROOT

FILES = ["quantize_catdog.py", "README.md", "docs/results.md", "training/README.md",
         *[f"tools/{path.name}" for path in sorted((ROOT / "tools").glob("*.py"))]]

# a pattern, and what is written for it; contexts in which the word has another use are not matched
WORDS = {
    r"\bplaces?\b(?! (of|where|in)\b)(?<!in place)(?<!decimal places)": "activation",
    r"\bPLACES\b|\bplace_\w+|\w+(?<!\bin)_place\b": "activation",
    r"by the definition|\bthe definition('s)?\b(?! of the network)": "reference",
    r"\b(prove[sdn]?|proven|proofs?)\b": "verify, check",
    r"(?<!os\.)\bwalks?\b": "pass",
    r"\bcodes\b": "integer levels",
    r"\bmoments\b": "Hessian",
    r"\bwhat leaves (it|a|the)\b": "output",
    r"\bwas made into\b|\bbecomes one of\b|\bbecomes integers?\b|\bbecome integers?\b": "is quantized to",
    r"\b(part8|located|unwatched|values_at|(?-i:Outcome))\b|\bspread\(": "a name that says what it is",
    r"\b(ms|pictures|pixels|bytes|bits|milliseconds) an? (picture|step|second|batch|pixel|layer|thread)\b": "per",
    r"\bone (scale|kernel|word|row|cell|line|value|position) an? (layer|channel|picture|place|step|run)\b": "per",
    r"\b(can be|due to) chance\b": "could be chance",
    r"\bspoils\b": "breaks",
    r"\bchanges (only )?speed and memory alone\b": "affects only speed and memory",
    r"\bwidens? the ranges?\b": "multiplies the ranges",
}

@pytest.mark.parametrize("name", FILES)
def test_words(name):
    text = (ROOT / name).read_text()
    found = [f"{text[:match.start()].count(chr(10)) + 1}: {match[0]!r}: write {better!r}"
             for pattern, better in WORDS.items() for match in re.finditer(pattern, text, re.IGNORECASE)]
    assert found == []

@pytest.mark.parametrize("name", FILES)
def test_equalization_is_called_by_its_name(name):
    """In prose; EQUALIZE is the constant, which is named as one of several, set, or in backquotes."""
    for line in (ROOT / name).read_text().splitlines():
        assert not re.search(r"\bEQUALIZE (has|multiplies|rescales|scales|included|does|makes)\b", line), line
