"""The rules that divide a product, for GPUs that are not there."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AbstractDevice, AbstractMesh

from pallas_kernels.backends import explain
from pallas_kernels.errors import BackendError
from pallas_kernels.format.spec import QuantSpec
from pallas_kernels.tiles.dense_rules import (
    check_prefer,
    choose,
    fix_schedule,
    list_candidates,
    round_up_tokens,
)
from pallas_kernels.tiles.device import UNKNOWN, Device, find_device
from pallas_kernels.tiles.tiles import PREFILL, Tiles, find_faults, measure_shared_memory

_DEVICES = [
    Device("NVIDIA H200", 132),
    Device("NVIDIA A100-SXM4-80GB", 108),
    Device("NVIDIA L4", 58),
    Device("NVIDIA B200", 148),
    UNKNOWN,
]


@pytest.fixture(autouse=True)
def _no_tables(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("JAXWNA16_TILES", raising=False)


def _spec(k=4096, n=4096, group=128, bits=4) -> QuantSpec:
    return QuantSpec(bits=bits, group_size=group, symmetric=False, in_features=k, out_features=n)


def _choose(spec, tokens, device=_DEVICES[0], scale=jnp.bfloat16, prefer="speed"):
    return choose(spec, tokens, jnp.bfloat16, scale, device, prefer)


@settings(deadline=None)
@given(
    tokens=st.integers(1, 5000),
    slabs=st.integers(1, 300),
    features=st.integers(1, 40_000),
    slabs_per_group=st.integers(1, 300),
    bits=st.sampled_from([4, 8]),
    device=st.sampled_from(_DEVICES),
    scale=st.sampled_from([jnp.bfloat16, jnp.float32]),
    mixed=st.sampled_from([None, 8, 16, 24, 40, 48, 80]),
)
def test_every_choice_and_candidate_can_run(
    tokens, slabs, features, slabs_per_group, bits, device, scale, mixed
):
    """Groups that 32 does not divide among them, and none without a copy pipeline."""
    group = 32 * slabs_per_group if slabs % slabs_per_group == 0 else 32 * slabs
    group = mixed if mixed and 32 * slabs % mixed == 0 else group
    spec = _spec(32 * slabs, features, group, bits)
    choice = _choose(spec, tokens, device, scale, "memory")
    candidates = list_candidates(spec, tokens, jnp.bfloat16, scale, device)
    assert candidates[0] == _choose(spec, tokens, device, scale)
    assert len(candidates) == len(set(candidates))
    for tiles in [choice, *candidates]:
        if tiles == PREFILL:
            continue
        assert isinstance(tiles, Tiles)
        assert find_faults(tiles, spec, device, scale) == []
        assert tiles.stages > 1
        assert tiles.scale_on == "sum" or scale == jnp.bfloat16
        # no program is left without a step
        steps = -(-spec.tiles_k * spec.tile_k // tiles.block_k)
        per_split = -(-steps // tiles.splits)
        assert (tiles.splits - 1) * per_split < steps


@pytest.mark.parametrize(
    ("tokens", "block_m"),
    [(1, 8), (8, 8), (9, 16), (16, 16), (17, 32), (33, 64), (64, 64), (65, 64), (129, 128)],
)
def test_token_tiles_are_the_next_power_of_two(tokens, block_m):
    assert _choose(_spec(), tokens).block_m == block_m
    assert tokens > 64 or round_up_tokens(tokens) == block_m


@pytest.mark.parametrize("tokens", [1, 16, 33, 64, 65, 256])
@pytest.mark.parametrize("bits", [4, 8])
def test_the_tuner_has_tiles_to_choose_from_for_every_number_of_tokens(tokens, bits):
    found = list_candidates(_spec(bits=bits), tokens, jnp.bfloat16, jnp.bfloat16, _DEVICES[0])
    assert len(found) > 5
    # with as many tokens the scale may be better on the weight
    places = {tiles.scale_on for tiles in found if isinstance(tiles, Tiles)}
    assert places == ({"sum", "weight"} if tokens > 32 else {"sum"})


def test_many_tokens_expand_the_weight_unless_memory_is_preferred():
    assert _choose(_spec(), 1023) != PREFILL
    assert _choose(_spec(), 1024) == PREFILL
    assert isinstance(_choose(_spec(), 1024, prefer="memory"), Tiles)
    with pytest.raises(BackendError, match="prefer must be one of"):
        check_prefer("size")


def test_few_features_are_split_along_k_until_the_cores_are_busy():
    narrow, wide = _choose(_spec(n=1024), 1), _choose(_spec(n=57_344), 1)
    assert narrow.splits * (1024 // narrow.block_n) >= 64
    assert wide.splits == 1


def test_one_program_a_core_is_planned_where_it_fills_the_tensor_memory():
    """4096 features are 32 programs of 128; seen by the compiler: 512, 128 and 256 columns."""
    blackwell = Device("NVIDIA B200", 148)
    full, apart = (
        choose(_spec(14_336, 4096, group), 64, jnp.float16, jnp.float16, blackwell)
        for group in (64, 128)
    )
    half = choose(_spec(14_336, 4096, 64), 32, jnp.float16, jnp.float16, blackwell)
    assert (full.scale_on, full.splits, full.splits * 32 // 148) == ("weight", 5, 1)
    assert (apart.scale_on, apart.splits, apart.splits * 32 // 148) == ("sum", 10, 2)
    assert (half.scale_on, half.splits, half.splits * 32 // 148) == ("weight", 10, 2)


@pytest.mark.parametrize("device", _DEVICES[:4], ids=lambda device: device.kind)
@pytest.mark.parametrize("group", [8, 16, 40, 48, 80])
def test_scales_of_groups_that_32_does_not_divide_have_room_in_the_copy_pipeline(group, device):
    """16 tokens, 4 bits: a weight's scale and zero point take 2.5 to 10 times its own bytes."""
    for scale, its_bytes in ((jnp.bfloat16, 3), (jnp.float32, 5)):
        tiles = _choose(_spec(3840, group=group), 16, device, scale)
        waiting = (tiles.stages - 1) * tiles.block_n * tiles.block_k * its_bytes
        assert tiles.stages > 1
        assert waiting < measure_shared_memory(tiles, _spec(3840, group=group), scale)
        assert find_faults(tiles, _spec(3840, group=group), device, scale) == []


def test_tiles_shrink_to_the_shared_memory_of_the_device():
    large = Tiles(block_m=64, block_n=256, block_k=256, warps=8, stages=4)
    assert (
        measure_shared_memory(large, _spec(), jnp.bfloat16) > Device("NVIDIA L4", 58).shared_memory
    )
    [fault] = find_faults(large, _spec(), Device("NVIDIA L4", 58))
    assert "bytes of shared memory" in fault
    assert large not in list_candidates(_spec(), 64, jnp.bfloat16, jnp.bfloat16, _DEVICES[2])


def test_a_fixed_schedule_comes_before_everything_and_ends_with_its_block():
    tiles = Tiles(block_m=8, block_n=64, block_k=128)
    before = _choose(_spec(), 1)
    with fix_schedule(tiles):
        assert _choose(_spec(), 4000) == tiles
    assert _choose(_spec(), 1) == before


def test_the_described_gpu_is_found_and_else_the_unknown_one():
    assert find_device() == UNKNOWN
    gpu = AbstractDevice("NVIDIA H100", 114, "cuda")
    with jax.sharding.use_abstract_mesh(AbstractMesh((1,), ("x",), abstract_device=gpu)):
        assert find_device() == Device("NVIDIA H100", 114)
    assert Device("NVIDIA H100 80GB HBM3", 132).is_hopper
    assert not Device("NVIDIA A100-SXM4-80GB", 108).is_hopper


@pytest.mark.parametrize(
    ("tokens", "words"),
    [(None, None), (1, "decode: 8 tokens"), (200, "middle: 64 tokens"), (4096, "prefill: expand")],
)
def test_explain_names_the_schedule_of_a_number_of_tokens(tokens, words):
    choice = explain(_spec(), jnp.bfloat16, platform="cuda", tokens=tokens)
    assert choice.schedule is None if words is None else choice.schedule.startswith(words)
    assert explain(_spec(), jnp.float32, platform="cuda", tokens=tokens).schedule is None
