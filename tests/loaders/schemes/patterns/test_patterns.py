"""Patterns of a checkpoint: what tools write matches as ever, what never ends is refused."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path

import pytest
from hypothesis import given, seed, settings
from hypothesis import strategies as st

from jaxwna16 import CheckpointError, load_checkpoint
from loaders.files.folder import CONFIG
from loaders.schemes.patterns.patterns import compile_pattern
from tests.fuzz.bases import make_bases
from tests.fuzz.files import write_entries

REAL = (
    *(".*", ".*lm_head.*", "vision_tower.*", ".*mlp.gate$", "model.layers.1", "mtp\\..*", ""),
    *(".*mlp\\.experts\\.\\d+\\.(gate|up|down)_proj$", "(?!.*self_attn).*down_proj", "a+", "a|b"),
    ".*self_attn\\.(q_a_proj|q_b_proj|kv_a_proj_with_mqa|o_proj)$",
    ".*layers\\.\\d+\\..*experts\\.\\d+\\..*proj",
    "(?!.*a)(?!.*b)(?!.*c)(?!.*d)(?!.*e).*",
    "^(?:model\\.)?layers\\.([0-9]|[1-9][0-9]|1[0-2][0-9])\\..*(gate|up)_proj(\\.base)?$",
    "(?i).*MLP",
    "(?P<part>[^.]*\\.)mlp.*[qk]_proj",
    "(ab){2,3}c",
    "model\\.(layers|blocks)\\.[0-9]+\\.(?:mlp|self_attn)\\.[a-z_]+",
    "model\\.layers\\.[0-9]+\\.[a-z_]+\\.[a-z_]+\\.[0-9]+\\.[^.]+\\.weight",
)
ENDLESS = (
    *("(a+)+$", "(.*.*)*x", "(\\w+\\.?)*!", "(.|m)*!", "(.*)(.*)(.*)(.*)(.*)!", "(.+)+!"),
    *(
        "(?:.?){30}!",
        "(a|a)*b",
        "((a*)b?)*",
        ".*.*.*.*.*x",
        "(?:a?)*b",
        "(?:(?:x|y))+!",
        "((ab)*c)*",
    ),
    *(".{0,99}" * 5 + "!", "a?" * 40 + "a" * 40, "(?:[(]|.)*x", "(?:\\(|.)*x", "(?=(a+)+b)"),
)


@pytest.mark.parametrize("pattern", REAL)
def test_patterns_that_tools_write_are_compiled(pattern):
    assert compile_pattern(pattern).pattern == pattern


@pytest.mark.parametrize("pattern", ENDLESS)
def test_patterns_that_could_take_for_ever_are_refused(pattern):
    re.compile(pattern)  # Python has nothing against it
    with pytest.raises(ValueError, match="could take for ever"):
        compile_pattern(pattern)


def test_too_many_repeats_are_called_that():
    with pytest.raises(ValueError, match=r"repeats more than 4 parts .* .write \[\^\.\]\+ between"):
        compile_pattern(".*model.*layers.*mlp.*experts.*down_proj.*")


@pytest.mark.parametrize("pattern", ["(", "[", "*", "a{99999999999}", "(" * 3000, "(?P<x>", "\\"])
def test_what_is_no_pattern_is_refused(pattern):
    with pytest.raises(ValueError, match="not a regular expression"):
        compile_pattern(pattern)


PARTS = st.sampled_from(
    [
        *("a", "b", ".", "\\.", "[ab]", "[ab]+\\.", "[^.]*\\.", ".*", "(", "(?:", ")", "|"),
        *("*", "+", "?", "{2}", "{1,9}"),
    ]
)


@seed(0)
@settings(max_examples=300, deadline=None, database=None)
@given(st.lists(PARTS, min_size=1, max_size=14).map("".join))
def test_whatever_is_compiled_is_matched_soon(pattern):
    try:
        compiled = compile_pattern(pattern)
    except ValueError:
        return
    start = time.perf_counter()
    for name in ("a" * 40, "a" * 39 + "!", "a.b." * 10, "ab" * 20 + "!"):
        compiled.match(name)
        compiled.fullmatch(name)
    assert time.perf_counter() - start < 2


@pytest.mark.parametrize("where", ["ignore", "targets"])
def test_a_checkpoint_cannot_hang_the_loader_by_a_pattern(tmp_path, where):
    files = dict(make_bases()["asymmetric"])
    config = json.loads(files[CONFIG])
    section = config["quantization_config"]
    group = section["config_groups"]["group_0"]
    (section if where == "ignore" else group)[where] = ["re:(.*.*)*x", "Linear"]
    folder: Path = tmp_path / "c"
    write_entries(folder, files | {CONFIG: json.dumps(config).encode()})
    start = time.perf_counter()
    with pytest.raises(CheckpointError, match=r"config\.json: .*could take for ever"):
        load_checkpoint(folder)
    assert time.perf_counter() - start < 5
