"""Every way in which versions of compressed-tensors laid out integers is read exactly."""

from __future__ import annotations

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
from compressed_tensors.quantization import QuantizationArgs
from safetensors.numpy import load_file

from loaders.errors import CheckpointError
from loaders.modules.encoding import Encoding, widen
from loaders.modules.repack import pack
from loaders.plan import make_plan
from loaders.stream import load_params
from pallas_kernels.format.dequantize import dequantize
from pallas_kernels.format.layout import codes_from_words
from pallas_kernels.format.spec import QuantSpec
from pallas_kernels.matmul import quant_matmul
from tests.checkpoints import (
    assert_same_bits,
    compress,
    decompress,
    make_weight,
    to_numpy,
)
from tests.checkpoints import write_folder as write_modules
from tests.folders import (
    describe_linears,
    make_config,
    make_tensors,
    prefix_names,
    write_bit_stream,
    write_folder,
)
from tests.grids import sample

GOLDEN = Path(__file__).parents[1] / "golden"
ODD = (3, 5, 6, 7)


@pytest.mark.parametrize("version", ["0.8.1", "0.9.3", "0.17.0", "0.18.0"])
def test_files_of_old_versions_are_what_those_versions_make_of_them(tmp_path, version):
    tensors = load_file(GOLDEN / f"ct-{version}.safetensors")
    expected = {n: tensors.pop(n) for n in list(tensors) if n.endswith(".expected")}
    config = {"quantization_config": json.loads((GOLDEN / f"ct-{version}.json").read_text())}
    plan = make_plan(write_folder(tmp_path / "c", config, [tensors]))
    params = load_params(plan)
    assert set(plan.specs) == {name.removesuffix(".expected") for name in expected}
    for path, spec in plan.specs.items():
        assert_same_bits(dequantize(params[path], spec), expected[f"{path}.expected"])
    leaves = {f"{path}.{n}": leaf for path, tree in params.items() for n, leaf in tree.items()}
    described = plan.describe_leaves()
    assert {n: (a.shape, a.dtype) for n, a in leaves.items()} == {
        n: (a.shape, a.dtype) for n, a in described.items()
    }


def test_zero_points_that_an_old_version_left_out_are_zero_and_said_to_be(tmp_path):
    tensors = load_file(GOLDEN / "ct-0.8.1.safetensors")
    assert "zero_points_of_zero.weight_zero_point" not in tensors
    assert "w4_g32.weight_zero_point" in tensors
    tensors = {n: a for n, a in tensors.items() if not n.endswith(".expected")}
    config = {"quantization_config": json.loads((GOLDEN / "ct-0.8.1.json").read_text())}
    plan = make_plan(write_folder(tmp_path / "c", config, [tensors]))
    [warning] = [text for text in plan.warnings if "zero point" in text]
    assert warning.startswith("zero_points_of_zero: no zero points")
    assert not np.any(load_params(plan)["zero_points_of_zero"]["zero_point"])


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [4, 8])
def test_negative_scales_are_read_as_they_are(tmp_path, bits, symmetric):
    """AutoRound writes them, with compressed-tensors' own packing."""
    args = _make_args(bits, 32, symmetric, torch.float16)
    tensors = compress(make_weight((24, 96)), args)
    flipped = torch.arange(tensors["weight_scale"].numel()) % 2 * 2 - 1
    tensors["weight_scale"] *= flipped.reshape(tensors["weight_scale"].shape)
    plan = make_plan(write_modules(tmp_path / "c", {"m": (tensors, args)}))
    leaves = load_params(plan)["m"]
    found, expected = dequantize(leaves, plan.specs["m"]), to_numpy(decompress(tensors, args))
    assert_same_bits(found, expected)
    x = jnp.eye(96, dtype=jnp.float16)
    np.testing.assert_array_equal(quant_matmul(x, leaves, plan.specs["m"]).T, expected)


def _make_args(bits: int, group_size: int | None, symmetric: bool, scale_dtype: torch.dtype):
    facts = {
        "num_bits": bits,
        "group_size": group_size,
        "symmetric": symmetric,
        "strategy": "channel" if group_size is None else "group",
        "scale_dtype": scale_dtype,
    }
    return QuantizationArgs.model_validate(facts)


@pytest.mark.parametrize(
    ("bits", "shape", "group_size", "symmetric", "dtype"),
    sample(
        [
            (bits, *facts)
            for facts in (
                ((40, 96), 32, False, torch.bfloat16),
                ((33, 50), None, False, torch.float16),
                ((70, 90), 30, True, torch.float32),
                ((7, 130), None, True, torch.bfloat16),
            )
            for bits in range(1, 9)
        ],
        every=3,
    ),
)
def test_every_width_equals_decompress(tmp_path, bits, shape, group_size, symmetric, dtype):
    args = _make_args(bits, group_size, symmetric, dtype)
    tensors = compress(make_weight(shape, seed=bits), args)
    arrays = {role: to_numpy(tensor) for role, tensor in tensors.items()}
    config = describe_linears(args.model_dump(mode="json"))
    folder = write_folder(
        tmp_path / "c", {"quantization_config": config}, [prefix_names("m", arrays)]
    )
    plan = make_plan(folder)
    assert plan.specs["m"].bits == (4 if bits <= 4 else 8)
    leaves = load_params(plan)["m"]
    assert_same_bits(dequantize(leaves, plan.specs["m"]), decompress(tensors, args))


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("columns", [1, 5, 10, 11, 31, 32, 33, 64, 97])
def test_a_dense_stream_is_the_definition(bits, columns):
    rng = np.random.default_rng(bits * 100 + columns)
    codes = rng.integers(0, 2**bits, (3, columns)).astype(np.uint8)
    words = write_bit_stream(codes, bits).view(np.uint32)
    theirs = pack_to_int32(
        torch.from_numpy((codes.astype(int) - 2 ** (bits - 1)).astype(np.int8)), bits
    )
    np.testing.assert_array_equal(words, theirs.numpy().view(np.uint32))
    np.testing.assert_array_equal(codes_from_words(words, bits, columns), codes)
    if columns == 97:
        read = jax.jit(lambda words: codes_from_words(words, bits, columns))
        np.testing.assert_array_equal(read(words), codes)


def _write_aligned(codes: np.ndarray, bits: int) -> np.ndarray:
    """int32 [rows, words] with 32 // bits whole values in each, by Python's integers."""
    per_word = 32 // bits
    rows = [
        [
            sum(int(u) << (bits * i) for i, u in enumerate(row[start : start + per_word]))
            for start in range(0, len(row), per_word)
        ]
        for row in codes
    ]
    return np.array(rows, np.uint32).view(np.int32)


@pytest.mark.parametrize("bits", ODD)
@pytest.mark.parametrize("columns", [1, 6, 11, 33, 64])
def test_aligned_words_are_the_definition(bits, columns):
    codes = np.random.default_rng(0).integers(0, 2**bits, (3, columns)).astype(np.uint8)
    words = _write_aligned(codes, bits).view(np.uint32)
    np.testing.assert_array_equal(codes_from_words(words, bits, columns, aligned=True), codes)


def _make_odd(k: int, n: int, words: str, bits: int = 3) -> tuple[dict, np.ndarray, np.ndarray]:
    """Tensors of a module with one group, its codes, and its zero points [N, 1]."""
    rng = np.random.default_rng(k)
    codes, zeros = (rng.integers(0, 2**bits, shape).astype(np.uint8) for shape in ((n, k), (1, n)))
    write = _write_aligned if words == "aligned" else write_bit_stream
    tensors = {
        "weight_packed": write(codes, bits),
        "weight_scale": np.ones((n, 1), np.float32),
        "weight_shape": np.array([n, k]),
        "weight_zero_point": write(zeros, bits).T.copy(),
    }
    return tensors, codes, zeros.T


def _write_odd(folder: Path, tensors: dict, version: str | None, bits: int = 3) -> Path:
    weights = {"num_bits": bits, "symmetric": False, "strategy": "channel"}
    config = describe_linears(weights, version=version)
    return write_folder(folder, {"quantization_config": config}, [prefix_names("m", tensors)])


@pytest.mark.parametrize(
    ("words", "k", "n", "version"),
    [
        ("aligned", 64, 40, None),  # 7 or 6 words of K
        ("stream", 64, 40, None),
        ("aligned", 64, 40, "0.20.0"),
        ("stream", 64, 40, "0.17.0"),
        ("aligned", 10, 61, None),  # one word of K either way; N decides
        ("stream", 10, 61, None),
        ("stream", 10, 8, None),  # one word either way, and nothing differs
        ("stream", 20, 8, "0.18.0"),  # two words either way; the version decides
        ("aligned", 20, 8, "0.17.1.a20260101"),
    ],
)
def test_the_shape_decides_how_odd_bits_lie_and_then_the_version(tmp_path, words, k, n, version):
    tensors, codes, zeros = _make_odd(k, n, words)
    plan = make_plan(_write_odd(tmp_path / "c", tensors, version))
    found = dequantize(load_params(plan)["m"], plan.specs["m"])
    np.testing.assert_array_equal(found, codes.astype(np.float32) - zeros)


@pytest.mark.parametrize("version", [None, "", "new"])
def test_odd_bits_that_could_lie_in_two_ways_are_refused_with_the_way_out(tmp_path, version):
    tensors, codes, zeros = _make_odd(20, 8, "stream")
    with pytest.raises(CheckpointError) as caught:
        make_plan(_write_odd(tmp_path / "c", tensors, version))
    [fault] = caught.value.faults
    assert fault.tensor == "m.weight_packed"
    assert '"version": "0.17.0" or "0.18.0"' in fault.way_out
    plan = make_plan(_write_odd(tmp_path / "mended", tensors, "0.18.0"))
    found = dequantize(load_params(plan)["m"], plan.specs["m"])
    np.testing.assert_array_equal(found, codes.astype(np.float32) - zeros)


def test_words_that_fit_neither_way_are_a_contradiction(tmp_path):
    tensors, _, _ = _make_odd(64, 40, "stream")
    tensors["weight_packed"] = np.zeros((40, 9), np.int32)
    with pytest.raises(CheckpointError, match=r"expected int32 \[40, 6\], found int32 \[40, 9\]"):
        make_plan(_write_odd(tmp_path / "c", tensors, "0.20.0"))


def test_bits_are_marked_that_belong_to_a_value():
    aligned = Encoding(bits=3, words="aligned").mark_values(11)
    np.testing.assert_array_equal(aligned, np.array([0x3FFFFFFF, 0b111], np.uint32))
    stream = Encoding(bits=3).mark_values(11)
    np.testing.assert_array_equal(stream, np.array([0xFFFFFFFF, 0b1], np.uint32))
    assert [widen(bits) for bits in range(1, 9)] == [4, 4, 4, 4, 8, 8, 8, 8]


def _make_reordered(groups: np.ndarray) -> tuple[dict[str, np.ndarray], QuantSpec]:
    spec = QuantSpec(bits=4, group_size=32, symmetric=False, in_features=96, out_features=40)
    return make_tensors(spec) | {"weight_g_idx": groups.astype(np.int32)}, spec


def test_reordered_features_multiply_as_each_with_its_own_group():
    groups = np.random.default_rng(0).permutation(np.arange(96) // 32)
    tensors, spec = _make_reordered(groups)
    leaves = pack(tensors, spec, Encoding(bits=4, zero_points="words", reordered=True))
    codes = codes_from_words(tensors["weight_packed"].view(np.uint32), 4, 96).astype(np.float64)
    zeros = codes_from_words(tensors["weight_zero_point"].T.copy().view(np.uint32), 4, 40).T
    scale = tensors["weight_scale"].astype(np.float64)
    exact = (codes - zeros[:, groups]) * scale[:, groups]
    np.testing.assert_array_equal(dequantize(leaves, spec), exact.astype(np.float32))
    x = np.random.default_rng(1).standard_normal((5, 96)).astype(np.float32)
    product = quant_matmul(jnp.asarray(x), leaves, spec)
    # float32 sums of 96 products each: 96 units in the last place of the sum of magnitudes
    bound = 96 * 2.0**-24 * (np.abs(x).astype(np.float64) @ np.abs(exact).T)
    assert (np.abs(np.asarray(product, np.float64) - x @ exact.T) <= bound).all()


@pytest.mark.parametrize(
    ("groups", "what"),
    [
        (
            np.r_[np.arange(95) // 32, 3],
            "1 of 96 input features are in no group of 3, the first at [95]: 3",
        ),
        (
            np.r_[-1, np.arange(1, 96) // 32],
            "1 of 96 input features are in no group of 3, the first at [0]: -1",
        ),
        (np.r_[np.arange(64) // 32, np.ones(32)], "group 1 has 64 input features, expected 32"),
    ],
)
def test_groups_that_are_uneven_or_out_of_range_are_refused(tmp_path, groups, what):
    tensors, spec = _make_reordered(groups)
    plan = make_plan(write_folder(tmp_path / "c", make_config(spec), [prefix_names("m", tensors)]))
    with pytest.raises(CheckpointError) as caught:
        load_params(plan)
    assert [(f.tensor, f.what) for f in caught.value.faults] == [("m.weight_g_idx", what)]
