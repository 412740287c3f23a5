"""Entries of experts in tables of tuned tiles: which one serves, and what is refused."""

from __future__ import annotations

import dataclasses
import json

import jax.numpy as jnp
import pytest

from pallas_kernels.errors import TableError
from pallas_kernels.tiles import tables as tile_tables
from pallas_kernels.tiles.device import UNKNOWN
from pallas_kernels.tiles.entries import find_moe_schedule, find_schedule
from pallas_kernels.tiles.tables import load_moe_schedule, read_table, write_table
from pallas_kernels.tiles.tiles import Tiles
from tests.tables import (
    FEW,
    H200,
    SMALL,
    make_entry,
    make_moe_entry,
    make_moe_specs,
    make_spec,
    make_table,
)

DIRECT = dataclasses.replace(FEW, direct=True)


def _find_moe(table, tokens=64, *, hidden=2048, middle=768, experts=128, top_k=8, **facts):
    bits, second_bits = facts.get("bits", (4, 4))
    groups = facts.get("groups", (128, 128))
    specs = (
        make_spec(hidden, 2 * middle, bits=bits, group_size=groups[0]),
        make_spec(middle, hidden, bits=second_bits, group_size=groups[1]),
    )
    scales = facts.get("scales", (jnp.bfloat16, jnp.bfloat16))
    return find_moe_schedule(table, H200, specs, experts, tokens, top_k, jnp.bfloat16, scales)


def test_experts_have_entries_of_their_own():
    wanted = dataclasses.replace(FEW, first=_split(3))
    others = [make_moe_entry(tokens) for tokens in (16, 32)]
    table = make_table(*others, make_moe_entry(schedule=wanted))
    for tokens in (33, 50, 64):
        assert _find_moe(table, tokens) == wanted
    assert _find_moe(table, 32) == FEW
    assert _find_moe(make_table(make_entry(2048, 1536, 64)), 64) is None
    dense = (make_spec(2048, 1536), 16, jnp.bfloat16, jnp.bfloat16)
    assert find_schedule(make_table(make_moe_entry(16)), H200, *dense) is None


@pytest.mark.parametrize(
    ("facts", "near"),
    [
        ({"hidden": 4096}, True),
        ({"hidden": 1024}, True),
        ({"hidden": 4224}, False),
        ({"middle": 1536}, True),
        ({"middle": 256}, False),
        ({"experts": 256}, True),
        ({"experts": 60}, False),
        ({"top_k": 4}, True),
        ({"top_k": 2}, False),
        ({"bits": (8, 8)}, False),
        ({"bits": (4, 8)}, False),
        ({"groups": (128, 768)}, True),
        ({"groups": (64, 64)}, False),
        ({"groups": (128, 64)}, False),
    ],
)
def test_experts_within_a_factor_of_two_are_near(facts, near):
    assert _find_moe(make_table(make_moe_entry()), **facts) == (FEW if near else None)


@pytest.mark.parametrize(
    ("timed", "tokens", "serves"),
    [
        ((64, FEW), 128, True),  # 8 pairs an expert fill one block, as 4 do
        ((64, FEW), 32, True),
        ((128, FEW), 256, False),  # 16 need two
        ((128, FEW), 100, True),
        ((4, DIRECT), 4, True),
        ((4, DIRECT), 2, True),
        ((4, DIRECT), 8, False),  # would read experts more often than was timed
    ],
)
def test_an_entry_serves_where_an_expert_is_read_as_often(timed, tokens, serves):
    table = make_table(make_moe_entry(*timed))
    assert _find_moe(table, tokens) == (timed[1] if serves else None)


def test_a_block_for_each_pair_needs_as_many_experts():
    table = make_table(make_moe_entry(4, DIRECT))
    assert _find_moe(table, 4, experts=256) == DIRECT
    assert _find_moe(table, 4, experts=64) is None


def test_the_nearest_experts_come_first():
    other = dataclasses.replace(FEW, first=_split(2))
    table = make_table(make_moe_entry(), make_moe_entry(hidden=3072, schedule=other))
    assert _find_moe(table, hidden=2176) == FEW
    assert _find_moe(table, hidden=2944) == other


@pytest.mark.parametrize("part", ["first", "second"])
def test_scales_of_another_dtype_need_sums_in_both_products(part):
    heavy = dataclasses.replace(SMALL, scale_on="weight")
    table = make_table(make_moe_entry(schedule=dataclasses.replace(FEW, **{part: heavy})))
    place = ("first", "second").index(part)
    for i in (0, 1):
        scales = [jnp.bfloat16, jnp.bfloat16]
        scales[i] = jnp.float32
        assert (_find_moe(table, scales=scales) is None) == (i == place)


def test_tiles_that_similar_experts_cannot_run_are_left_out():
    many = dataclasses.replace(FEW, second=_split(12))  # two a step of 768
    table = make_table(make_moe_entry(schedule=many))
    assert _find_moe(table) == many
    assert _find_moe(table, middle=512) is None


def _split(splits: int) -> Tiles:
    return dataclasses.replace(SMALL, splits=splits)


def test_experts_are_looked_for_in_the_same_table(monkeypatch, tmp_path):
    facts = (make_moe_specs(), 128, 64, 8, jnp.bfloat16, (jnp.bfloat16,) * 2)
    monkeypatch.setenv("JAXWNA16_TILES", str(tmp_path))
    assert load_moe_schedule(H200, *facts) is None
    write_table(tmp_path / "nvidia-h200.json", make_table(make_moe_entry()))
    assert load_moe_schedule(H200, *facts) == FEW
    assert load_moe_schedule(UNKNOWN, *facts) is None


def _set_moe(*names):
    """Put the last of the names at the place in the first entry of experts that the others name."""
    *outer, last, value = names

    def change(content):
        holder = content["experts"][0]
        for name in outer:
            holder = holder[name]
        holder[last] = value

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.__setitem__("experts", {}), r"experts must be a list, found {}"),
        (lambda c: c["experts"].append(7), r"experts\[1\] must be an object, found 7"),
        (lambda c: c["experts"][0].pop("top_k"), r"experts\[0\] lacks top_k"),
        (_set_moe("in_features", 3), r"experts\[0\] has an unknown 'in_features'"),
        (_set_moe("bits", 5), r"experts\[0\]\.bits must be one of 4, 8, found 5"),
        (_set_moe("tokens", 65), r"experts\[0\]\.tokens must be one of 1, .*, found 65"),
        (_set_moe("hidden", 0), r"experts\[0\]\.hidden must be an integer from 1 .*, found 0"),
        (_set_moe("experts", True), r"experts\[0\]\.experts must be an integer .*, found True"),
        (_set_moe("top_k", 8.0), r"experts\[0\]\.top_k must be an integer .*, found 8\.0"),
        (_set_moe("schedule", "prefill"), r"experts\[0\]\.schedule must be an object, found 'pre"),
        (_set_moe("schedule", "third", {}), r"experts\[0\]\.schedule has an unknown 'third'"),
        (_set_moe("schedule", "direct", 1), r"schedule\.direct must be true or false, found 1"),
        (_set_moe("schedule", "first", None), r"schedule\.first must be an object, found None"),
        (
            _set_moe("schedule", "second", "warps", "4"),
            r"schedule\.second\.warps must be an integer .*, found '4'",
        ),
        (
            _set_moe("schedule", "second", "block_k", 96),
            r"experts\[0\]\.schedule: second: block_k must be a multiple of 128, got 96",
        ),
        (
            _set_moe("schedule", "first", "block_k", 8192),
            r"schedule: first: \d+ bytes of shared memory are needed",
        ),
        (
            _set_moe("schedule", "second", "splits", 13),
            r"schedule: second: splits must be at most 12, two for each step of K, found 13",
        ),
        (
            _set_moe("schedule", "second", "block_m", 32),
            r"schedule: block_m of both products must be the same, got 8 and 32",
        ),
        (
            lambda c: c["experts"].append(c["experts"][0]),
            r"2 experts for \(4, 128, 2048, 768, 128, 8, 64, 'bfloat16'\)",
        ),
    ],
)
def test_wrong_experts_are_refused_by_place_and_value(change, message, tmp_path):
    content = json.loads(tile_tables._format(make_table(make_entry(), make_moe_entry())))
    path = tmp_path / "t.json"
    path.write_text(json.dumps(content))
    assert read_table(path).experts == (make_moe_entry(),)
    change(content)
    path = tmp_path / "wrong.json"
    path.write_text(json.dumps(content))
    with pytest.raises(TableError, match=message):
        read_table(path)
