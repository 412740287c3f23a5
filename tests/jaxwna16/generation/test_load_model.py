"""`load_model` asks each question about a checkpoint once, however large it is."""

from __future__ import annotations

import collections
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import CodeType

import pytest

import jaxwna16
from jaxwna16.models.families import find_family
from jaxwna16.models.filling.params import list_leaves
from loaders.converted.converted import ConvertedPlan
from loaders.plan import Plan
from tests.jaxwna16.models.hf_models import make_reference

# each runs over all modules or leaves, of which a large model has 75,000
CODES = {
    find_family.__code__: "find_family",
    list_leaves.__code__: "list_leaves",
    Plan.specs.func.__code__: "specs",
    Plan._described.func.__code__: "describe_leaves",
    ConvertedPlan._described.func.__code__: "describe_leaves",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("llama")
    make_reference("llama").save_pretrained(root / "floats")
    jaxwna16.quantize_checkpoint(root / "floats", root / "packed", group_size=32)
    jaxwna16.convert_checkpoint(root / "packed", root / "converted")
    return root


@contextmanager
def count_calls(names: Mapping[CodeType, str]) -> Iterator[collections.Counter[str]]:
    """How often functions run while the block does, by whatever name and from wherever."""
    counts: collections.Counter[str] = collections.Counter()

    def note(frame, event, argument):
        if event == "call" and frame.f_code in names:
            counts[names[frame.f_code]] += 1

    sys.setprofile(note)
    try:
        yield counts
    finally:
        sys.setprofile(None)


@pytest.mark.parametrize("kind", ["floats", "packed", "converted"])
def test_loading_runs_over_the_checkpoint_once(folder, kind):
    with count_calls(CODES) as counts:
        jaxwna16.load_model(folder / kind)
    assert counts == dict.fromkeys(CODES.values(), 1)
