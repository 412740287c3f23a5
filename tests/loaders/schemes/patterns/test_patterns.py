"""Patterns of a checkpoint match what `re` says that they match, and soon, whatever they are."""

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
from loaders.schemes.patterns.linear_pattern import Budget, LinearPattern
from loaders.schemes.patterns.patterns import check_count, compile_pattern
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
    *("a?" * 12 + ".*.*.*.*b", ".*model.*layers.*mlp.*experts.*down_proj.*", "(a|b|ab)*c" * 3),
)
"""What `re` takes minutes for, or would never end."""


@pytest.mark.parametrize("pattern", REAL)
def test_patterns_that_tools_write_are_compiled(pattern):
    assert compile_pattern(pattern).pattern == pattern


@pytest.mark.parametrize("pattern", ENDLESS)
def test_patterns_that_would_take_for_ever_are_matched_soon(pattern):
    compiled, start = compile_pattern(pattern), time.process_time()
    for name in ("a" * 500, "a" * 499 + "!", "ab." * 160, "a\n" * 250, "(" * 400):
        compiled.match(name)
    assert time.process_time() - start < 2
    for text in ("", "a", "x", "abab", "aab!", "ab.c", "abcab"):
        assert bool(compiled.match(text)) == bool(re.match(pattern, text))


@pytest.mark.parametrize("pattern", REAL)
def test_what_tools_write_is_matched_by_re_but_for_what_it_could_be_slow_with(pattern):
    slow = {".*layers\\.\\d+\\..*experts\\.\\d+\\..*proj", "(ab){2,3}c"}
    assert isinstance(compile_pattern(pattern), re.Pattern) == (pattern not in slow)


@pytest.mark.parametrize(
    "pattern", ["(a|b)*.*.*\\1", "(?>a*)*.*.*b", "(?:a*+b?)*.*c", "(a)?.*.*.*(?(1)b|c)"]
)
def test_what_cannot_be_matched_in_linear_time_is_refused(pattern):
    re.compile(pattern)  # Python has nothing against it
    with pytest.raises(ValueError, match="could take forever"):
        compile_pattern(pattern)


@pytest.mark.parametrize("pattern", ["(.*.*)*" + "a" * 5000, "(?:(?:a{99}){99}b?)*.*c"])
def test_what_has_too_many_parts_is_refused(pattern):
    with pytest.raises(ValueError, match="more than 4000 parts"):
        compile_pattern(pattern)


def test_a_pattern_of_megabytes_is_refused_before_it_is_compiled():
    with pytest.raises(ValueError, match="has 9000000 characters"):
        compile_pattern("a" * 9_000_000)


def test_patterns_share_a_budget_and_end_in_an_error_of_ours():
    budget = Budget(1000)
    first, second = (compile_pattern(f"(a?{c}?)*.*.*x", budget) for c in "bc")
    assert not first.match("ab" * 20)
    with pytest.raises(CheckpointError, match=r"config\.json: the patterns take too long to match"):
        second.match("".join(map(chr, range(1000, 1300))))


def _combine(inner: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    """Larger patterns: sequences, choices, groups, repeats, looks ahead and behind."""
    repeats = st.sampled_from(["*", "+", "?", "*?", "+?", "??", "{2}", "{1,2}", "{,2}", "{2,}"])
    opening = st.sampled_from(["(", "(?:", "(?=", "(?!", "(?i:", "(?s:", "(?-i:", "(?m:"])
    return st.one_of(
        st.tuples(inner, inner).map("".join),
        st.tuples(inner, inner).map("|".join),
        st.builds(lambda part, repeat: f"(?:{part}){repeat}", inner, repeats),
        st.builds(lambda group, part: f"{group}{part})", opening, inner),
    )


ATOMS = st.sampled_from(
    [
        *(
            "a",
            "b",
            "A",
            ".",
            "\\.",
            "[ab]",
            "[^a]",
            "[a-b1]",
            "\\d",
            "\\w",
            "\\s",
            "\\W",
            "_",
            "ä",
            "",
        ),
        *(
            "^",
            "$",
            "\\b",
            "\\B",
            "\\A",
            "\\Z",
            "(?<=a)",
            "(?<!b)",
            "(?<=a.)",
            "\n",
            "a*",
            ".*",
            "[ab]+",
        ),
    ]
)
PATTERNS = st.recursive(ATOMS, _combine, max_leaves=8)
TEXTS = st.text("aabbAB.1_ä \n", max_size=7)


@seed(0)
@settings(max_examples=800, deadline=None, database=None)
@given(PATTERNS, st.sampled_from(["", "(?i)", "(?s)", "(?m)", "(?a)"]), st.lists(TEXTS, max_size=4))
def test_linear_patterns_match_what_re_matches(pattern, flags, texts):
    try:
        expected = re.compile(flags + pattern)
    except re.error:
        return
    found = LinearPattern(flags + pattern, Budget(10**6))
    for text in ["", *texts]:
        assert found.match(text) == bool(expected.match(text)), (flags + pattern, text)


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
    start = time.process_time()
    for name in ("a" * 99, "a" * 99 + "!", "a.b." * 25, "ab" * 50 + "!"):
        compiled.match(name)
    assert time.process_time() - start < 1


@pytest.mark.parametrize("where", ["ignore", "targets"])
@pytest.mark.parametrize("pattern", ["(.*.*)*x", "a?" * 12 + ".*.*.*.*b"])
def test_a_checkpoint_cannot_hang_the_loader_by_a_pattern(tmp_path, where, pattern):
    files = dict(make_bases()["asymmetric"])
    config = json.loads(files[CONFIG])
    section = config["quantization_config"]
    group = section["config_groups"]["group_0"]
    (section if where == "ignore" else group)[where] = [f"re:{pattern}"]
    folder: Path = tmp_path / "c"
    write_entries(folder, files | {CONFIG: json.dumps(config).encode()})
    start = time.process_time()
    if where == "ignore":
        assert any("matches no module" in warning for warning in load_checkpoint(folder).warnings)
    else:
        with pytest.raises(CheckpointError, match="no target of config_groups matches"):
            load_checkpoint(folder)
    assert time.process_time() - start < 5


@pytest.mark.parametrize("count, message", [(15_000, "not a regular exp"), (10**5, "at most 20,")])
@pytest.mark.parametrize(
    "base, field",
    [("asymmetric", "ignore"), ("AWQ", "modules_to_not_convert"), ("GPTQ, act-order", "dynamic")],
)
def test_patterns_without_number_are_refused_soon(tmp_path, base, field, count, message):
    files = dict(make_bases()[base])
    config = json.loads(files[CONFIG])
    names = {f"re:({i}" if field == "ignore" else f"({i}": {} for i in range(count)}
    config["quantization_config"][field] = names if field == "dynamic" else list(names)
    write_entries(tmp_path / "c", files | {CONFIG: json.dumps(config).encode()})
    start = time.process_time()
    with pytest.raises(CheckpointError, match=message) as caught:
        load_checkpoint(tmp_path / "c")
    assert len(str(caught.value)) < 30_000
    assert time.process_time() - start < 5


def test_more_patterns_than_can_be_matched_are_refused():
    assert (
        check_count(1000, ["model.layers.0.mlp.experts.11.gate_proj.weight_packed"] * 75_000) == []
    )
    [fault] = check_count(10_000, ["model.layers.0.mlp.experts.11.gate_proj"] * 75_000)
    assert "10,000 patterns for 2,925,000 characters" in fault.what
