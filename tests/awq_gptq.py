"""Modules and configs of AutoAWQ and GPTQ, packed by Python's integers from the definition.

The definitions are those that autoawq 0.2.9 (`awq/modules/linear/gemm.py`), auto_gptq 0.7.1
(`nn_modules/qlinear/qlinear_cuda.py`) and gptqmodel 7.7 (`utils/model.py`) document by their code.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from loaders.errors import CheckpointError, Fault
from loaders.plan import make_plan
from loaders.stream import load_params
from tests.fault_kinds import find_kind
from tests.folders import describe_linears

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""Which of eight output features lies at bits 4 i of a word."""


@dataclasses.dataclass(frozen=True)
class Linear:
    """A quantized linear in plain numbers.

    Attributes:
      codes: uint8 [N, K], without a sign.
      zeros: [N, G], the same.
      scales: [N, G].
      groups: int32 [K], the group of each input feature.
      bits: of a value.
    """

    codes: np.ndarray
    zeros: np.ndarray
    scales: np.ndarray
    groups: np.ndarray
    bits: int

    @property
    def group_size(self) -> int:
        """As a config has it: -1 for one group."""
        return -1 if self.scales.shape[1] == 1 else int((self.groups == 0).sum())

    @property
    def floats(self) -> torch.Tensor:
        """[N, K], by AutoAWQ's and AutoGPTQ's formula, in the dtype of the scales.

            weights = scales[g_idx.long()] * (weight - zeros[g_idx.long()])

        The difference is an integer; torch turns it into the scales' dtype and multiplies there.
        """
        codes, zeros = (torch.from_numpy(a.T.astype(np.int32)) for a in (self.codes, self.zeros))
        scales, groups = (
            torch.from_numpy(self.scales.T.copy()),
            torch.from_numpy(self.groups).long(),
        )
        return (scales[groups] * (codes - zeros[groups])).T.contiguous()


def make_linear(
    n: int,
    k: int,
    *,
    bits: int = 4,
    group_size: int = 32,
    symmetric: bool = False,
    act_order: bool = False,
    lowest_zero: int = 1,
    seed: int = 0,
) -> Linear:
    """A random one; scales are float16, and negative ones are among them where symmetric."""
    rng = np.random.default_rng(seed)
    size = k if group_size == -1 else group_size
    grouped = (n, -(-k // size))  # the last one may be short
    groups = np.arange(k, dtype=np.int32) // size
    zeros = rng.integers(lowest_zero, 2**bits, grouped)
    scales = rng.uniform(0.005, 0.02, grouped)
    return Linear(
        rng.integers(0, 2**bits, (n, k)).astype(np.uint8),
        (np.full(grouped, 2 ** (bits - 1)) if symmetric else zeros).astype(np.uint8),
        (scales * (rng.choice([-1, 1], grouped) if symmetric else 1)).astype(np.float16),
        rng.permutation(groups) if act_order else groups,
        bits,
    )


def quantize_linear(weight: np.ndarray, **facts: Any) -> Linear:
    """The nearest one to float weights [N, K], with the groups of `make_linear`'s."""
    linear = make_linear(*weight.shape, **facts)
    top = 2**linear.bits - 1
    scales, zeros = linear.scales.copy(), linear.zeros.copy()
    codes = np.empty_like(linear.codes)
    for g in range(zeros.shape[1]):
        columns = weight[:, linear.groups == g]
        low, high = np.minimum(columns.min(1), 0), np.maximum(columns.max(1), 0)
        if facts.get("symmetric"):
            high = np.maximum(high, -low)
            low = -high
        scales[:, g] = np.maximum((high - low) / top, 1e-4)
        if not facts.get("symmetric"):
            zeros[:, g] = np.clip(np.round(-low / scales[:, g]), 1, top)
        whole = np.round(columns / scales[:, g, None].astype(np.float32)) + zeros[:, g, None]
        codes[:, linear.groups == g] = np.clip(whole, 0, top)
    return dataclasses.replace(linear, codes=codes, zeros=zeros, scales=scales)


def pack_gptq(linear: Linear, *, format: str = "gptq") -> dict[str, np.ndarray]:
    """The tensors of AutoGPTQ ("gptq") or of "gptq_v2", by the ends of their names."""
    zeros = linear.zeros.astype(int) - (format == "gptq")
    return {
        "qweight": _pack_rows(linear.codes, linear.bits).T.copy(),
        "qzeros": _pack_rows(zeros.T % 2**linear.bits, linear.bits),
        "scales": linear.scales.T.copy(),
        "g_idx": linear.groups,
    }


def pack_gptqmodel(linear: Linear) -> dict[str, np.ndarray]:
    """The tensors of GPTQModel in format "gptq": 1 is taken from words (3 bits: from values)."""
    if linear.bits == 3:
        return pack_gptq(linear)
    tensors = pack_gptq(linear, format="gptq_v2")
    ones = sum(1 << shift for shift in range(0, 32, linear.bits))
    words = tensors["qzeros"].view(np.uint32).astype(np.int64)
    return tensors | {"qzeros": ((words - ones) % 2**32).astype(np.uint32).view(np.int32)}


def pack_awq(linear: Linear) -> dict[str, np.ndarray]:
    """The tensors of AutoAWQ's GEMM layout."""
    return {
        "qweight": _interleave(linear.codes.T),
        "qzeros": _interleave(linear.zeros.T),
        "scales": linear.scales.T.copy(),
    }


def describe_gptq(linear: Linear, **changes: Any) -> dict[str, Any]:
    """A `quantization_config` as AutoGPTQ writes it."""
    return {
        "bits": linear.bits,
        "group_size": linear.group_size,
        "damp_percent": 0.01,
        "desc_act": bool((np.diff(linear.groups) < 0).any()),
        "static_groups": False,
        "sym": bool((linear.zeros == 2 ** (linear.bits - 1)).all()),
        "true_sequential": True,
        "model_name_or_path": None,
        "model_file_base_name": "model",
        "is_marlin_format": False,
        "quant_method": "gptq",
    } | changes


def describe_awq(linear: Linear, **changes: Any) -> dict[str, Any]:
    """A `quantization_config` as AutoAWQ writes it."""
    return {
        "quant_method": "awq",
        "zero_point": True,
        "group_size": linear.group_size,
        "bits": 4,
        "version": "gemm",
        "modules_to_not_convert": None,
    } | changes


def describe_auto_round(linear: Linear, **changes: Any) -> dict[str, Any]:
    """A `quantization_config` as AutoRound 0.9 writes it for its own format."""
    return {
        "autoround_version": "0.9.3",
        "bits": linear.bits,
        "block_name_to_quantize": "model.layers",
        "data_type": "int",
        "group_size": linear.group_size,
        "iters": 200,
        "packing_format": "auto_round:auto_gptq",
        "quant_method": "auto-round",
        "sym": bool((linear.zeros == 2 ** (linear.bits - 1)).all()),
    } | changes


def convert_to_pack_quantized(linear: Linear, *, symmetric: bool = False) -> dict[str, np.ndarray]:
    """The same numbers as compressed-tensors packs them, by role."""
    n, k = linear.codes.shape
    tensors = {
        "weight_packed": _pack_rows(linear.codes, linear.bits),
        "weight_scale": linear.scales,
        "weight_shape": np.array([n, k]),
    }
    if not symmetric:
        tensors["weight_zero_point"] = _pack_rows(linear.zeros.T, linear.bits).T.copy()
    if (np.diff(linear.groups) < 0).any():
        tensors["weight_g_idx"] = linear.groups
    return tensors


def describe_pack_quantized(linear: Linear, *, symmetric: bool = False) -> dict[str, Any]:
    """The `quantization_config` that goes with it."""
    count = linear.scales.shape[1]
    weights: Mapping[str, Any] = {
        "num_bits": linear.bits,
        "symmetric": symmetric,
        "strategy": "group" if count > 1 else "channel",
        "group_size": linear.codes.shape[1] // count if count > 1 else None,
    }
    return describe_linears(weights)


def list_faults(folder: Path) -> list[Fault]:
    """What is wrong with a folder in these formats, each of a kind that they can have."""
    with pytest.raises(CheckpointError) as caught:
        load_params(make_plan(folder))
    assert all(find_kind(fault) in (6, 7, 9, 10, 11, 13) for fault in caught.value.faults)
    return list(caught.value.faults)


def _pack_rows(values: np.ndarray, bits: int) -> np.ndarray:
    """int32 [rows, columns * bits / 32]: value i of a row at bits `bits` i of one long number."""
    rows = [
        sum(int(value) << (bits * i) for i, value in enumerate(row)).to_bytes(
            values.shape[1] * bits // 8, "little"
        )
        for row in values
    ]
    return np.frombuffer(b"".join(rows), "<i4").reshape(len(rows), -1).copy()


def _interleave(values: np.ndarray) -> np.ndarray:
    """int32 [rows, columns / 8] in AutoAWQ's order."""
    words = [
        [
            sum(int(row[start + feature]) << (4 * i) for i, feature in enumerate(AWQ_ORDER))
            for start in range(0, len(row), 8)
        ]
        for row in values
    ]
    return np.array(words, np.uint32).view(np.int32)
