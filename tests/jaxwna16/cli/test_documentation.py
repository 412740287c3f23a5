"""docs/cli.md states the shape of every report, and is right."""

from __future__ import annotations

import importlib
import json
import re
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[3] / "docs" / "cli.md"
SHAPES = {
    section.partition("\n")[0]: json.loads(block[1])
    for section in re.split(r"^## ", DOCS.read_text(), flags=re.M)
    if (block := re.search(r"```json\n(.*?)```", section, re.S))
}


def list_keys(value) -> set[str]:
    """Paths of all keys, "timings.load_seconds"; of a list, those of its first entry."""
    if isinstance(value, list):
        return {f"[].{path}" for path in list_keys(value[0])} if value else set()
    if not isinstance(value, dict):
        return set()
    return {
        path
        for key, inner in value.items()
        for path in {key, *(f"{key}.{p}" for p in list_keys(inner))}
    }


@pytest.fixture
def calls(packed_folder, float_folder, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("It was a dark and stormy night. " * 4)
    two = (float_folder, packed_folder)
    return {
        "inspect": ["inspect", packed_folder],
        "verify": ["verify", "--oracle", packed_folder],
        "generate": [
            *["generate", packed_folder, "--prompt", "Hi"],
            *["--max-new-tokens", 2, "--logprobs", 1],
        ],
        "eval perplexity": [*"eval perplexity --window 16 --text".split(), text, packed_folder],
        "eval compare": ["eval", "compare", *"--window 16 --text".split(), text, *two],
        "quantize": ["quantize", float_folder, tmp_path / "q", "--group-size", 32],
        "dequantize": ["dequantize", packed_folder, tmp_path / "d"],
        "convert": ["convert", packed_folder, tmp_path / "c"],
        "bench": "bench --cpu --shapes 64x64 --tokens 1 --group-size 32".split(),
        "doctor": ["doctor"],
        "error": ["inspect", tmp_path / "nothing"],
    }


@pytest.mark.parametrize("title", SHAPES)
def test_a_report_has_the_documented_keys(call, calls, title):
    if title == "verify":  # which asks the oracle
        importlib.import_module("compressed_tensors")
    report = call(*calls[title], "--json").report
    unlike = {"extras"}  # its entries have the packages of one extra each as keys
    found = list_keys({key: value for key, value in report.items() if key not in unlike})
    documented = {key: value for key, value in SHAPES[title].items() if key not in unlike}
    assert found == list_keys(documented)


def test_every_verb_is_documented(calls):
    assert SHAPES.keys() == calls.keys()
