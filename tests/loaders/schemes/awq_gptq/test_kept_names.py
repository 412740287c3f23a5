"""Names that are looked up mean what they mean as patterns that are tried one by one."""

from __future__ import annotations

import re
import time

import pytest
from hypothesis import given, seed, settings
from hypothesis import strategies as st

from loaders.schemes.awq_gptq.kept_names import KeptNames, is_plain

PATHS = st.text("ab.", min_size=1, max_size=6)


def _keeps(name: str, module: str) -> bool:
    """`should_convert_module` of transformers, but that a name ends at a dot or the end."""
    pattern = rf"(?:{name})(?:(?<=\.)|(?=\.|$))"
    return module.endswith(name) or re.match(pattern, module) is not None


@seed(0)
@settings(max_examples=500, deadline=None, database=None)
@given(st.lists(PATHS, max_size=6), PATHS)
def test_names_are_found_that_match_one_by_one(names, module):
    assert KeptNames(names).find(module) == {name for name in names if _keeps(name, module)}


@pytest.mark.parametrize("name", ["lm_head", "model.layers.0.mlp-1", "."])
def test_names_are_told_from_patterns(name):
    assert is_plain(name)
    assert not is_plain(f"{name}*") and not is_plain("") and not is_plain(f"({name})")


def test_thousands_of_names_take_no_time():
    names = [f"model.layers.{i}.mlp.experts.{j}.up_proj" for i in range(48) for j in range(128)]
    kept = KeptNames(names)
    assert kept.kinds == 6
    start = time.perf_counter()
    assert all(kept.find(name) == {name} for name in names)
    assert not any(kept.find(f"{name[:-7]}down_proj") for name in names)
    assert time.perf_counter() - start < 2
