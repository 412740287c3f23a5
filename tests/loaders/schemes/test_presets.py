"""Presets: names in `config_groups` that stand for the fields of a group."""

from __future__ import annotations

import pytest

from loaders.schemes.config_groups import Scheme
from loaders.schemes.presets import find_preset, parse_version
from loaders.schemes.quantization_config import parse_quantization


def test_presets_are_those_of_compressed_tensors():
    schemes = pytest.importorskip("compressed_tensors.quantization.quant_scheme")
    for name in schemes.PRESET_SCHEMES:
        group = find_preset(name.lower(), "")
        expected = schemes.preset_name_to_scheme(name, ["Linear"])
        parsed = schemes.QuantizationScheme(targets=["Linear"], **(group or {}))
        for side in ("weights", "input_activations", "output_activations"):
            ours, theirs = getattr(parsed, side), getattr(expected, side)
            assert (ours is None) == (theirs is None)
            for key in ("num_bits", "type", "symmetric", "strategy", "group_size", "dynamic"):
                assert getattr(ours, key, None) == getattr(theirs, key, None), (name, key)
    assert find_preset("W9A16", "") is None


@pytest.mark.parametrize(
    ("version", "size"), [("0.9.0", -1), ("0.15.1", -1), ("0.16.0", 128), ("1.0", 128), ("", 128)]
)
def test_preset_w8a16_means_what_it_did_in_its_version(version, size):
    raw = {"config_groups": {"W8A16": ["Linear"]}, "version": version}
    parsed, faults = parse_quantization({"quantization_config": raw})
    assert not faults and parsed.find_scheme("m") == Scheme(8, size, True)


def test_a_version_is_read_from_its_first_two_numbers():
    assert parse_version("0.17.1.a20260101") == (0, 17, 1)
    assert parse_version("quantlab 0.1") is None
    assert parse_version("0." + "9" * 5000) == (0, 999999999, 0)
