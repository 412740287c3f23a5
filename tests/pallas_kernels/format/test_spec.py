"""`QuantSpec`: what it refuses and what it derives."""

from __future__ import annotations

import dataclasses

import pytest

from pallas_kernels.errors import SpecError
from pallas_kernels.format.spec import QuantSpec

GOOD = {"bits": 4, "group_size": 32, "symmetric": True, "in_features": 64, "out_features": 3}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bits": 3}, r"bits must be one of \(4, 8\), got 3"),
        ({"bits": 16}, r"bits must be one of \(4, 8\), got 16"),
        ({"bits": "4"}, "bits must be an int, got '4'"),
        ({"bits": 4.0}, r"bits must be an int, got 4\.0"),
        ({"symmetric": 1}, "symmetric must be a bool, got 1"),
        ({"in_features": True}, "in_features must be an int, got True"),
        ({"in_features": 0}, "in_features >= 1 and out_features >= 1, got 0 and 3"),
        ({"out_features": -3}, "in_features >= 1 and out_features >= 1, got 64 and -3"),
        ({"group_size": None}, "group_size must be an int, got None"),
        ({"group_size": 0}, "must divide in_features = 64 .*got 0"),
        ({"group_size": -2}, "must divide in_features = 64 .*got -2"),
        ({"group_size": 48}, "must divide in_features = 64 .*got 48"),
        ({"group_size": 128}, "must divide in_features = 64 .*got 128"),
        ({"layout_version": 0}, "version 0, this release reads version 1: load the original"),
        ({"layout_version": 2}, "version 2, this release reads version 1: load the original"),
    ],
)
def test_impossible_value_is_refused_by_name(change, message):
    with pytest.raises(SpecError, match=message):
        QuantSpec(**GOOD | change)


def test_channel_is_one_group_of_all_features():
    spec = QuantSpec(**GOOD | {"group_size": -1})
    assert spec.group_size == 64
    assert spec.groups == 1
    assert spec == QuantSpec(**GOOD | {"group_size": 64})


def test_spec_is_hashable_and_frozen():
    spec = QuantSpec(**GOOD)
    assert {spec: 1}[QuantSpec(**GOOD)] == 1
    with pytest.raises(dataclasses.FrozenInstanceError):
        spec.bits = 8


@pytest.mark.parametrize(
    ("bits", "n", "k", "packed", "offset"),
    [
        (4, 64, 128, (1, 1, 64, 32), 8),
        (4, 65, 129, (2, 2, 64, 32), 8),
        (8, 64, 64, (1, 1, 64, 32), 128),
        (8, 830, 544, (13, 9, 64, 32), 128),
        (4, 1, 1, (1, 1, 64, 32), 8),
    ],
)
def test_shapes_are_those_of_whole_tiles(bits, n, k, packed, offset):
    spec = QuantSpec(bits=bits, group_size=-1, symmetric=False, in_features=k, out_features=n)
    assert spec.packed_shape == packed
    assert spec.scale_shape == (1, packed[0] * 64)
    assert spec.offset == offset
    assert spec.planes * spec.bits == 16
    assert spec.tile_k == 32 * spec.planes
