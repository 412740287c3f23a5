"""Tiles of experts: the rule of thumb, what the tuner tries, and the table before the rule."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels.moe import quant_moe
from pallas_kernels.tiles.dense_rules import fix_schedule
from pallas_kernels.tiles.device import Device
from pallas_kernels.tiles.expert_rules import (
    choose_block,
    choose_moe,
    combine,
    describe_moe,
    list_moe_candidates,
)
from pallas_kernels.tiles.expert_tiles import MoeTiles, find_moe_faults
from pallas_kernels.tiles.tables import write_table
from pallas_kernels.tiles.tiles import Tiles
from tests.pallas_kernels.products import make_weights
from tests.tables import H200, make_moe_entry, make_moe_specs, make_table

DEVICES = [H200, Device("NVIDIA A100-SXM4-80GB", 108), Device("NVIDIA L4", 58), Device("x", 1)]
MODELS = {
    "qwen3": (2048, 768, 128, 8),
    "mixtral": (4096, 14336, 8, 2),
    "qwen3.5": (3072, 1024, 256, 8),
    "deepseek": (7168, 2048, 256, 8),
}
BF16 = (jnp.bfloat16, jnp.bfloat16)


@pytest.fixture(autouse=True)
def _no_tables_of_this_machine(monkeypatch, tmp_path):
    monkeypatch.delenv("JAXWNA16_TILES", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def list_for(name, tokens, device=H200, **facts) -> list[MoeTiles]:
    hidden, middle, experts, top_k = MODELS[name]
    specs = make_moe_specs(hidden, middle, **facts)
    return list_moe_candidates(specs, experts, tokens, top_k, jnp.bfloat16, BF16, device)


@pytest.mark.parametrize("tokens", [1, 2, 4, 8, 16, 64, 128, 256, 512, 1024, 4096])
@pytest.mark.parametrize("name", MODELS)
def test_every_candidate_fits_and_the_rules_choice_comes_first(name, tokens):
    hidden, middle, experts, top_k = MODELS[name]
    for device in DEVICES:
        for bits, group in ((4, 128), (8, 128), (4, 32), (8, -1)):
            found = list_for(name, tokens, device, bits=bits, group_size=group)
            specs = make_moe_specs(hidden, middle, bits=bits, group_size=group)
            rule = choose_moe(specs, experts, tokens, top_k, jnp.bfloat16, BF16, device)
            assert found[0] == rule
            assert len(found) == len(set(found))
            assert len(found) > 5
            for tiles in found:
                assert find_moe_faults(tiles, specs, device, BF16) == []


@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_odd_shapes_have_candidates_that_fit(data):
    bits, group = data.draw(st.sampled_from([4, 8])), data.draw(st.sampled_from([16, 32, -1]))
    hidden, middle = (32 * data.draw(st.integers(1, 40)) for _ in range(2))
    experts = data.draw(st.integers(1, 40))
    facts = (experts, data.draw(st.integers(1, 3000)), data.draw(st.integers(1, experts)))
    specs = make_moe_specs(hidden, middle, bits=bits, group_size=group)
    scales = data.draw(st.sampled_from([BF16, (jnp.float32, jnp.bfloat16)]))
    device = data.draw(st.sampled_from(DEVICES))
    found = list_moe_candidates(specs, *facts, jnp.bfloat16, scales, device)
    assert found[0] == choose_moe(specs, *facts, jnp.bfloat16, scales, device)
    for tiles in found:
        assert find_moe_faults(tiles, specs, device, scales) == []
        if scales != BF16:
            assert tiles.first.scale_on == "sum"


def test_one_thing_at_a_time_is_varied():
    [rule, *others] = list_for("qwen3", 64)
    for tiles in others:
        changed = [
            part for part in ("first", "second") if getattr(tiles, part) != getattr(rule, part)
        ]
        if tiles.first.block_m == rule.first.block_m and tiles.direct == rule.direct:
            assert len(changed) == 1
    firsts = [tiles.first for tiles in others if tiles.second == rule.second]
    seconds = [tiles.second for tiles in others if tiles.first == rule.first]
    for parts, own in ((firsts, rule.first), (seconds, rule.second)):
        assert {(p.block_n, p.warps) for p in parts} >= {(64, 2), (64, 4), (128, 2), (256, 8)}
        assert {p.stages for p in parts} == {3, 4, own.stages}
        assert {p.block_k for p in parts} == {128, 256}
    assert {tiles.first.block_m for tiles in others} == {8, 16}


def test_splits_are_varied_where_few_experts_are_chosen():
    [rule, *others] = list_for("mixtral", 1)
    assert rule.second.splits == 5
    seconds = {tiles.second.splits for tiles in others if tiles.first == rule.first}
    assert {2, 5, 10} <= seconds
    assert {tiles.first.splits for tiles in others if tiles.second == rule.second} >= {1, 2}


@pytest.mark.parametrize(
    ("name", "tokens", "kinds"),
    [
        ("qwen3", 1, {True}),
        ("qwen3", 4, {True, False}),
        ("qwen3", 8, {True, False}),
        ("qwen3", 16, {True, False}),
        ("qwen3", 32, {False}),
        ("mixtral", 2, {True, False}),
        ("mixtral", 8, {False}),
    ],
)
def test_a_block_for_each_pair_is_tried_while_pairs_share_few_experts(name, tokens, kinds):
    assert {tiles.direct for tiles in list_for(name, tokens)} == kinds


def test_blocks_of_128_rows_are_tried_where_their_sums_fit():
    def list_blocks(device, tokens):
        return {tiles.first.block_m for tiles in list_for("qwen3", tokens, device)}

    assert list_blocks(H200, 4096) == {64, 128}
    assert list_blocks(H200, 512) == {32, 64, 128}
    assert list_blocks(DEVICES[1], 4096) == {32, 64}


def test_blocks_have_as_many_rows_as_an_expert_gets():
    assert [choose_block(pairs, 8) for pairs in (1, 57, 58, 115, 116, 10**6)] == [
        8,
        8,
        16,
        16,
        32,
        128,
    ]


def make_tiles(**changes) -> MoeTiles:
    tiles = Tiles(block_m=8, block_n=128, block_k=128)
    return MoeTiles(**{"first": tiles, "second": tiles, **changes})


def test_the_fastest_of_both_products_are_put_together():
    rule = make_tiles()
    wide, deep = (dataclasses.replace(rule.first, **c) for c in ({"block_n": 256}, {"stages": 4}))
    timed = [
        (rule, 5.0),
        (make_tiles(first=wide), 3.0),
        (make_tiles(first=deep), 4.0),
        (make_tiles(second=deep), 4.5),
        (make_tiles(second=wide), 6.0),
        (make_tiles(direct=True), 1.0),
    ]
    assert combine(rule, timed) == [
        make_tiles(first=wide, second=deep),
        make_tiles(first=deep, second=deep),
    ]
    assert combine(rule, timed[:1]) == []
    assert combine(rule, []) == []


def test_faults_name_the_product():
    good = Tiles(block_m=8, block_n=128, block_k=128)
    bad = dataclasses.replace(good, block_m=16, warps=3)
    faults = find_moe_faults(MoeTiles(first=good, second=bad), make_moe_specs())
    assert faults == [
        "second: warps must be one of (2, 4, 8), got 3",
        "block_m of both products must be the same, got 8 and 16",
    ]


def test_tiles_are_described_in_words():
    assert describe_moe(make_tiles(direct=True)).startswith("a block for each pair; first 128 feat")
    assert describe_moe(make_tiles()).startswith("blocks of 8 rows; first 128 features x 128 of K")


# The table


def test_the_table_comes_before_the_rule_and_fixed_tiles_before_both(monkeypatch, tmp_path):
    monkeypatch.setenv("JAXWNA16_TILES", str(tmp_path))
    facts = (make_moe_specs(), 128, 64, 8, jnp.bfloat16, BF16, H200)
    rule = choose_moe(*facts)
    tuned = make_tiles()
    assert rule != tuned
    write_table(tmp_path / "nvidia-h200.json", make_table(make_moe_entry(schedule=tuned)))
    assert choose_moe(*facts) == tuned
    # experts without a gate are not what was timed
    assert choose_moe(*facts, gated=False) != tuned
    assert list_moe_candidates(*facts)[0] == rule
    fixed = make_tiles(direct=True)
    with fix_schedule(fixed):
        assert choose_moe(*facts) == fixed
    with fix_schedule(fixed.first):
        assert choose_moe(*facts) == tuned


def test_candidates_give_the_same_result():
    """Interpreted; each kind of change once."""
    specs = make_moe_specs(128, 128, group_size=32)
    made = [
        [make_weights(4, s.out_features, s.in_features, 32, seed=e + 10 * i)[1] for e in range(4)]
        for i, s in enumerate(specs)
    ]
    stacks = [jax.tree.map(lambda *leaves: jnp.stack(leaves), *weights) for weights in made]
    x = jax.random.normal(jax.random.key(0), (3, 128), jnp.bfloat16)
    ids = jnp.array([[1, 3], [0, 1], [3, 1]], jnp.int32)
    weights = jnp.full((3, 2), 0.5, jnp.float32)

    def run(backend):
        call = (x, ids, weights, *stacks, *specs)
        return np.asarray(jax.jit(lambda: quant_moe(*call, backend=backend))(), np.float64)

    expected = run("xla")
    found = list_moe_candidates(specs, 4, 3, 2, jnp.bfloat16, BF16, H200)
    assert len(found) > 10
    for tiles in found[:: len(found) // 2]:
        with fix_schedule(tiles):
            y = run("triton")
        np.testing.assert_allclose(y, expected, atol=0.03 * np.abs(expected).max())
