"""Tables of tuned tiles: which entry serves, and where a table is looked for."""

from __future__ import annotations

import dataclasses
import itertools

import jax.numpy as jnp
import pytest

from pallas_kernels.errors import TableError
from pallas_kernels.tiles import tables as tile_tables
from pallas_kernels.tiles.dense_rules import choose
from pallas_kernels.tiles.device import UNKNOWN
from pallas_kernels.tiles.entries import classify_group, find_schedule, round_up_bucket
from pallas_kernels.tiles.tables import (
    find_table_path,
    load_schedule,
    name_file,
    user_table_path,
    write_table,
)
from pallas_kernels.tiles.tiles import PREFILL, Tiles
from tests.tables import H200, TILES, WIDE, make_entry, make_spec, make_table


def _find(table, spec, tokens, x_dtype=jnp.bfloat16, scale_dtype=jnp.bfloat16):
    return find_schedule(table, H200, spec, tokens, x_dtype, scale_dtype)


@pytest.fixture(autouse=True)
def _no_tables_of_this_machine(monkeypatch, tmp_path):
    monkeypatch.delenv("JAXWNA16_TILES", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def test_the_exact_shape_in_its_bucket_is_used():
    others = [make_entry(k, n, m) for k in (2048, 4096) for n in (4096, 8192) for m in (8, 16, 32)]
    others = [e for e in others if (e.in_features, e.out_features, e.tokens) != (4096, 4096, 16)]
    wanted = dataclasses.replace(TILES, splits=7)
    table = make_table(*others, make_entry(schedule=wanted))
    for tokens in range(9, 17):
        assert _find(table, make_spec(), tokens) == wanted
    assert _find(table, make_spec(), 17) == TILES


@pytest.mark.parametrize(
    "other",
    [
        {"bits": 8, "schedule": dataclasses.replace(TILES, block_k=64)},
        {"group_size": 64},
        {"x_dtype": "float16"},
    ],
)
def test_an_entry_of_another_kind_does_not_serve(other):
    assert _find(make_table(make_entry(**other)), make_spec(), 16) is None
    assert _find(make_table(make_entry(**other), make_entry()), make_spec(), 16) == TILES


@pytest.mark.parametrize(
    ("k", "n", "near"),
    [
        (8192, 4096, True),
        (2048, 8192, True),
        (2048, 2048, True),
        (8320, 4096, False),
        (4096, 2047, False),
        (1920, 4096, False),
    ],
)
def test_a_shape_within_a_factor_of_two_is_near(k, n, near):
    assert _find(make_table(make_entry()), make_spec(k, n), 16) == (TILES if near else None)


def test_the_nearest_shape_comes_before_the_nearest_bucket():
    farther = dataclasses.replace(TILES, splits=5)
    table = make_table(make_entry(4096, 4096, 8, _small(1)), make_entry(4096, 6144, 4, farther))
    assert _find(table, make_spec(4096, 4224), 4) == _small(1)
    assert _find(table, make_spec(4096, 5900), 4) == farther


def _small(splits: int) -> Tiles:
    return Tiles(block_m=8, block_n=128, block_k=128, splits=splits)


@pytest.mark.parametrize(
    ("tuned", "tokens", "expected"),
    [
        ({1: _small(1), 8: _small(2)}, 2, _small(1)),
        ({1: _small(1), 8: _small(2)}, 3, _small(2)),
        ({2: _small(1), 8: _small(2)}, 4, _small(2)),  # equally far: the larger
        ({8: _small(2)}, 2, None),
        ({8: _small(2)}, 16, None),  # tiles of 8 tokens would read each weight twice
        ({128: WIDE}, 64, None),
        ({2048: PREFILL}, 4096, PREFILL),
        ({2048: PREFILL}, 9999999, PREFILL),
        ({1024: PREFILL}, 512, None),  # may not pay for fewer tokens
        ({}, 16, None),
    ],
)
def test_a_bucket_that_was_not_tuned_takes_a_neighbour_that_suits(tuned, tokens, expected):
    entries = [make_entry(tokens=m, schedule=schedule) for m, schedule in tuned.items()]
    for order in itertools.permutations(entries):
        assert _find(make_table(*order), make_spec(), tokens) == expected


def test_scale_on_the_weight_serves_only_scales_of_the_dtype_of_x():
    heavy = dataclasses.replace(TILES, block_m=128, splits=1, scale_on="weight")
    other = make_entry(4096, 6144, 256, WIDE)
    table = make_table(make_entry(tokens=256, schedule=heavy), other)
    assert _find(table, make_spec(), 256) == heavy
    assert _find(table, make_spec(), 256, scale_dtype=jnp.float16) == WIDE
    assert _find(make_table(table.entries[0]), make_spec(), 256, scale_dtype=jnp.float32) is None


def test_tiles_that_a_similar_shape_cannot_run_are_left_out():
    """32 splits divide the 16 steps of K = 2048; at K = 1024 that would be four a step."""
    table = make_table(make_entry(2048, schedule=dataclasses.replace(TILES, splits=32)))
    assert _find(table, make_spec(2048), 16) is not None
    assert _find(table, make_spec(1024), 16) is None


@pytest.mark.parametrize(
    ("group_size", "size_class"),
    [(1, 32), (24, 32), (32, 32), (33, 64), (64, 64), (96, 128), (128, 128), (256, 128)],
)
def test_group_sizes_fall_into_three_classes(group_size, size_class):
    assert classify_group(group_size) == size_class
    assert make_entry(k=768, group_size=group_size).group_size == size_class
    spec = make_spec(768 if 768 % group_size == 0 else group_size, group_size=group_size)
    entry = make_entry(spec.in_features, schedule=_small(1), tokens=8, group_size=size_class)
    assert _find(make_table(entry), spec, 8) == _small(1)


@pytest.mark.parametrize(
    ("tokens", "bucket"), [(1, 1), (2, 2), (3, 4), (16, 16), (17, 32), (4096, 4096), (4097, 4096)]
)
def test_tokens_are_rounded_up_to_a_power_of_two(tokens, bucket):
    assert round_up_bucket(tokens) == bucket
    assert make_entry(tokens=tokens).tokens == bucket


# Where it is looked for


def test_a_table_is_named_after_its_device():
    assert name_file("NVIDIA H200") == "nvidia-h200.json"
    assert name_file("NVIDIA A100-SXM4-40GB") == "nvidia-a100-sxm4-40gb.json"
    assert name_file("../../etc/passwd") == "etc-passwd.json"


def test_the_variable_comes_before_the_cache_and_the_package(monkeypatch, tmp_path):
    folders = [tmp_path / name for name in ("chosen", "cache/jaxwna16/tiles", "package")]
    monkeypatch.setattr(tile_tables, "_PACKAGED", folders[2])
    folders[0].mkdir()
    monkeypatch.setenv("JAXWNA16_TILES", str(folders[0]))
    assert find_table_path(H200.kind) is None
    for folder in reversed(folders):
        write_table(folder / "nvidia-h200.json", make_table())
        assert find_table_path(H200.kind) == folder / "nvidia-h200.json"
        assert find_table_path("NVIDIA L4") is None
    monkeypatch.delenv("JAXWNA16_TILES")
    assert find_table_path(H200.kind) == folders[1] / "nvidia-h200.json"


def test_the_variable_may_name_one_file(monkeypatch, tmp_path):
    for name in ("mine.json", "mine.table"):
        write_table(tmp_path / name, make_table())
        monkeypatch.setenv("JAXWNA16_TILES", str(tmp_path / name))
        assert find_table_path(H200.kind) == tmp_path / name
        assert user_table_path(H200.kind) == tmp_path / name


@pytest.mark.parametrize("name", ["gone.json", "gone"])
def test_a_variable_that_names_nothing_is_refused(name, monkeypatch, tmp_path):
    monkeypatch.setenv("JAXWNA16_TILES", str(tmp_path / name))
    with pytest.raises(TableError, match=rf"JAXWNA16_TILES names '.*{name}', which does not exist"):
        find_table_path(H200.kind)


def test_the_tuner_writes_where_tables_are_looked_for_first(monkeypatch, tmp_path):
    path = user_table_path(H200.kind)
    assert path == tmp_path / "cache" / "jaxwna16" / "tiles" / "nvidia-h200.json"
    write_table(path, make_table())
    assert find_table_path(H200.kind) == path
    for name, expected in (("new", "new/nvidia-h200.json"), ("new.json", "new.json")):
        monkeypatch.setenv("JAXWNA16_TILES", str(tmp_path / name))
        path = user_table_path(H200.kind)
        assert path == tmp_path / expected
        write_table(path, make_table())
        assert find_table_path(H200.kind) == path
    monkeypatch.delenv("JAXWNA16_TILES")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert user_table_path(H200.kind).parent == tmp_path / ".cache" / "jaxwna16" / "tiles"


def test_the_table_comes_before_the_rule(monkeypatch, tmp_path):
    facts = (make_spec(), 16, jnp.bfloat16, jnp.bfloat16)
    rule = choose(*facts, H200)
    assert load_schedule(H200, *facts) is None
    tuned = dataclasses.replace(TILES, splits=7)
    assert rule != tuned
    monkeypatch.setenv("JAXWNA16_TILES", str(tmp_path))
    write_table(tmp_path / "nvidia-h200.json", make_table(make_entry(schedule=tuned)))
    assert load_schedule(H200, *facts) == tuned
    assert choose(*facts, H200) == tuned
    far = (make_spec(64, 64, group_size=32), *facts[1:])
    assert choose(*far, H200) == choose(*far, dataclasses.replace(H200, kind="NVIDIA H100"))


def test_a_table_of_another_device_is_refused(monkeypatch, tmp_path):
    path = tmp_path / "mine.json"
    write_table(path, make_table(kind="NVIDIA B200"))
    monkeypatch.setenv("JAXWNA16_TILES", str(path))
    with pytest.raises(TableError, match=r"mine\.json(?s:.*)'NVIDIA H200', found 'NVIDIA B200'"):
        load_schedule(H200, make_spec(), 16, jnp.bfloat16, jnp.bfloat16)


def test_a_machine_without_a_gpu_needs_no_table(monkeypatch, tmp_path):
    path = tmp_path / "mine.json"
    write_table(path, make_table(make_entry()))
    monkeypatch.setenv("JAXWNA16_TILES", str(path))
    facts = (make_spec(), 16, jnp.bfloat16, jnp.bfloat16)
    assert load_schedule(H200, *facts) == TILES
    assert load_schedule(UNKNOWN, *facts) is None
