"""The matrix of kernels that are executed: every kind, schedule and width for every GPU."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator

from pallas_kernels.formulas.norms import KINDS as NORMS
from pallas_kernels.tiles.tiles import Tiles
from tests import gpu_aot
from tests.executed.add_norm import AddNorm
from tests.executed.attention import Attention, Combination
from tests.executed.experts import Experts, Grouping
from tests.executed.pieces import PieceAttention
from tests.executed.products import Expansion, Product
from tests.executed.step import DeltaStep, Routed

Case = (
    Product
    | Expansion
    | Experts
    | Grouping
    | AddNorm
    | Attention
    | Combination
    | PieceAttention
    | Routed
    | DeltaStep
)
ARCHS = tuple(gpu_aot.TARGETS)
_B, _F = "bfloat16", "float16"
_BITS, _DTYPES = (4, 8), (_B, _F)


def name(case: Case) -> str:
    """What it is, without the architecture: `product tokens=5 bits=4 bfloat16 group 128 ...`."""
    facts = dataclasses.asdict(case)
    del facts["arch"]
    words = [case.kind]
    for key, value in facts.items():
        if key == "dtype":
            words.append(value)
        elif key == "group_size":
            words.append(f"group {value}" if value else "channel")
        elif key == "first":
            words.append("gate and up" if value else "down")
        elif key == "scale_dtype" and value:
            words.append(f"{value} scales")
        elif value is True:
            words.append(key)
        elif value and key != "tiles" and (key, value) != ("splits", 1):
            words.append(f"{key} {value}")
    return " ".join(words)


def list_core() -> list[Case]:
    """What `make test` executes: each kind of instruction on each GPU that has it."""
    return [
        Product("sm_80", 5, 4, _B, 32),
        Product("sm_80", 31, 8, _F, 128, symmetric=True, bias=True),
        Product("sm_80", 16, 4, _B, 48),
        Experts("sm_80", 8, 4, _B, 128, symmetric=True),
        Product("sm_89", 50, 4, _B, 128, splits=2),
        Expansion("sm_89", 8, _B, 128),
        Product("sm_90a", 8, 8, _B, 0, joined=True, bias=True),
        Product("sm_90a", 15, 4, _F, 64, whole=True),
        Product("sm_90a", 16, 4, _B, 16, scale_dtype="float32"),
        Product("sm_90a", 32, 4, _B, 128, gated=True),
        Product("sm_90a", 130, 4, _B, 128),
        Experts("sm_90a", 256, 4, _B, 32, first=False, weigh="result", bias=True),
        Expansion("sm_90a", 4, _F, 48),
        Grouping("sm_90a", 257, 50, 8),
        Product("sm_100a", 5, 4, _F, 128, splits=2),
        Product("sm_100a", 31, 4, _B, 64),
        Product("sm_100a", 50, 8, _B, 128, whole=True),
        Product("sm_100a", 16, 4, _B, 48),
        Product("sm_100a", 130, 4, _B, 32),
        Grouping("sm_100a", 8, 140, 8),
        AddNorm("sm_80", 3, 320, _F, late="wide", early=""),
        AddNorm("sm_90a", 2, 96, _B, splits=3),
        AddNorm("sm_90a", 2, 80, _F, late="centered", early="centered"),
        AddNorm("sm_100a", 2, 128, _B, splits=2, top_k=4, shared=True, early="offset"),
        *_list_core_attention(),
        PieceAttention("sm_80", 64, 4, _B, window=40),
        PieceAttention("sm_90a", 64, 4, _F),
        PieceAttention("sm_100a", 64, 3, _B),
        Routed("sm_80", 2, 24, 3, _B, "sqrt_softplus", groups=4, group_score="top2_sum"),
        Routed("sm_90a", 2, 128, 8, _B),
        Routed("sm_100a", 2, 40, 8, "float32", "sigmoid", bias=True, groups=2),
        DeltaStep("sm_80", 1, 2, 1, 24, 40, _F, parts=2, bias=True),
        DeltaStep("sm_90a", 2, 1, 1, 128, 128, _B, parts=2),
        DeltaStep("sm_100a", 2, 2, 1, 64, 64, "float32", width=2),
    ]


def _list_core_attention() -> Iterator[Attention | Combination]:
    """Of few heads (mma on all GPUs) and of many (wgmma, tcgen05), and of whole numbers."""
    yield Attention("sm_80", 64, 4, _B, splits=2, norm="rounded", parts=2)
    yield Attention("sm_89", 80, 6, _F, rotated=32, window=40, wide=True, bias=True)
    yield Attention("sm_90a", 64, 16, _B, gated=True, norm="offset", parts=3)
    yield Attention("sm_90a", 64, 4, _B, splits=2, whole=True)
    yield Attention("sm_100a", 64, 16, _F, splits=2, norm="wide")
    yield Combination("sm_80", 64, 8, _B, gated=True, parts=2)
    yield Combination("sm_90a", 192, 32, _F)


def list_mutated() -> list[Case]:
    """Small kernels with what each architecture has, which `make test` breaks on purpose."""
    sizes = {"sm_80": (5, 8, 64), "sm_90a": (16, 16, 64), "sm_100a": (16, 16, 128)}
    products = [
        Product(arch, tokens, 4, _B, 32, tiles=Tiles(block_m=m, block_n=n, block_k=128))
        for arch, (tokens, m, n) in sizes.items()
    ]
    return [*products, Grouping("sm_90a", 250, 400, 1)]


def list_all() -> list[Case]:
    """Every kind of kernel on every GPU."""
    return [case for arch in ARCHS for case in _list_for(arch)]


def _list_for(arch: str) -> Iterator[Case]:
    yield from (Product(arch, *facts, **more) for facts, more in _list_products())
    yield from (
        Expansion(arch, *facts) for facts in itertools.product(_BITS, _DTYPES, (32, 128, 0, 48))
    )
    yield Expansion(arch, 4, _B, 128, symmetric=True)
    yield Expansion(arch, 4, _B, 48, scale_dtype="float32")
    yield from (Experts(arch, *facts, **more) for facts, more in _list_experts())
    for facts in (
        *((1, 5, 8), (4, 1, 8), (8, 40, 8), (5, 257, 128), (60, 700, 64), (128, 300, 16)),
        *((256, 130, 8), (257, 300, 8), (384, 512, 8), (512, 640, 8)),
    ):
        yield Grouping(arch, *facts)
    yield from (Attention(arch, *facts, **more) for facts, more in _list_attention())
    for facts in itertools.product((64, 80, 128, 192, 512), (2, 32), _DTYPES):
        yield Combination(arch, *facts)
    yield Combination(arch, 256, 64, _B, gated=True, parts=3)
    yield Combination(arch, 128, 4, _F, gated=True)
    for dtype, early in itertools.product(_DTYPES, NORMS):
        yield AddNorm(arch, 2, 96, dtype, splits=3, early=early)
        yield AddNorm(arch, 3, 1024, dtype, late=early, early="")
        yield AddNorm(arch, 2, 128, dtype, splits=2, top_k=8, shared=True, early=early)
    yield AddNorm(arch, 1, 4096, _B, splits=8)
    yield from (PieceAttention(arch, *facts, **more) for facts, more in _list_pieces())
    yield from (Routed(arch, *facts, **more) for facts, more in _list_routed())
    yield from (DeltaStep(arch, *facts, **more) for facts, more in _list_steps())


def _list_routed() -> Iterator[tuple[tuple, dict]]:
    """Tokens, experts, top_k and dtype: those of published models among them; and the rest."""
    wide = "float32"
    groups = {"groups": 8, "group_score": "top2_sum"}
    yield (3, 128, 8, _B), {}
    yield (3, 256, 8, _F), {"renormalize": False}
    yield (2, 160, 6, wide), {"groups": 8, "renormalize": False}
    yield (3, 256, 8, wide), {"scoring": "sigmoid", "bias": True, **groups}
    yield (3, 384, 8, wide), {"scoring": "sigmoid", "bias": True}
    yield (3, 256, 6, wide), {"scoring": "sqrt_softplus", "bias": True}
    yield (1, 2, 1, wide), {}
    yield (2, 1024, 32, wide), {}
    for scoring in ("softmax", "sigmoid", "sqrt_softplus"):
        yield (3, 24, 5, _B), {"scoring": scoring, "groups": 3}
        yield (3, 24, 5, _F), {"scoring": scoring, "groups": 4, "group_score": "top2_sum"}


def _list_steps() -> Iterator[tuple[tuple, dict]]:
    """Rows, value heads, key heads, Dk, Dv and dtype; and the rest."""
    for dtype in (_B, _F, "float32"):
        yield (2, 3, 1, 128, 128, dtype), {"parts": 2}
        yield (2, 4, 2, 64, 64, dtype), {"width": 2, "bias": True}
        yield (1, 2, 2, 24, 40, dtype), {"width": 3, "parts": 3, "bias": True}
    yield (1, 1, 1, 256, 136, _B), {}


def _list_pieces() -> Iterator[tuple[tuple, dict]]:
    """Size of a head, query heads of a key head, dtype; and the rest."""
    grids = (
        (((64, 128), (1, 4), _DTYPES), {}),
        (((64, 128), (4,), (_B,)), {"window": 90}),
        (((80, 96), (7,), _DTYPES), {"kv_heads": 2}),
        (((256,), (6,), _DTYPES), {}),
        (((256,), (2,), (_B,)), {"window": 100, "blocks": 1}),
        (((512,), (8,), (_B,)), {}),
    )
    for axes, more in grids:
        for facts in itertools.product(*axes):
            yield facts, more


def _list_attention() -> Iterator[tuple[tuple, dict]]:
    """Size of a head, query heads of a key head, dtype; and the rest."""
    grids = (
        (((64, 128), (1, 4, 8, 16), (_B,)), {"splits": 2, "parts": 2}),
        (((64, 80, 96, 112, 128, 192), (5,), _DTYPES), {"norm": "rounded", "parts": 3}),
        (((256,), (6, 16), _DTYPES), {"rotated": 64, "norm": "offset", "gated": True}),
        (((256,), (4,), (_B,)), {"rotated": 64, "norm": "offset", "gated": True, "splits": 2}),
        (((512,), (8, 16), (_B,)), {"splits": 2, "norm": "wide", "window": 90}),
        (((128,), (4, 16), _DTYPES), {"window": 70, "bias": True, "parts": 2, "kv_heads": 2}),
        (((128,), (4,), _DTYPES), {"wide": True, "splits": 4}),
        (((64,), (40,), (_B,)), {"splits": 2, "gated": True}),
        (((64, 128), (4, 16), _DTYPES), {"whole": True, "splits": 2}),
        (((64,), (4, 16), (_B,)), {"whole": True}),
    )
    for axes, more in grids:
        for facts in itertools.product(*axes):
            yield facts, more


def _list_products() -> Iterator[tuple[tuple, dict]]:
    """Tokens, bits, dtype, group; and the rest."""
    grids = (
        (((1, 5, 8, 15, 16, 31, 32, 50, 64, 130), _BITS, (_B,), (128,)), {}),
        (((5, 16, 50), _BITS, _DTYPES, (32, 64, 0)), {}),
        (((8, 31, 64, 130), _BITS, (_F,), (128,)), {}),
        (((1, 16, 64, 130), _BITS, (_B,), (128,)), {"symmetric": True}),
        (((8, 15, 32, 50), _BITS, (_B,), (32, 128)), {"gated": True}),
        (((5,), _BITS, (_F,), (128,)), {"gated": True, "splits": 2}),
        (((3, 16), _BITS, (_B,), (32, 0)), {"joined": True, "bias": True}),
        (((5, 16, 50, 130), _BITS, (_B,), (32, 128)), {"splits": 2}),
        (((5, 50), (4,), (_F,), (0,)), {"splits": 2}),
        (((16, 50), (4,), (_B,), (8, 16, 48, 80)), {}),
        (((16,), (8,), (_F,), (16, 80)), {}),
        (((16, 64), (4,), (_B,), (16, 80, 128)), {"scale_dtype": "float32"}),
        (((5, 16, 50), _BITS, _DTYPES, (64,)), {"whole": True}),
        (((130,), (4,), (_B,), (128,)), {"whole": True}),
    )
    for axes, more in grids:
        for facts in itertools.product(*axes):
            yield facts, more


def _list_experts() -> Iterator[tuple[tuple, dict]]:
    first, second = {"first": True}, {"first": False, "weigh": "result"}
    grids = (
        (((8, 64, 256, 4096), _BITS, (_B,), (32, 128)), first),
        (((8, 64, 256, 4096), _BITS, (_B,), (32, 128)), second),
        (((8, 256), _BITS, (_F,), (0,)), first),
        (((8, 256), _BITS, (_F,), (0,)), {**second, "bias": True}),
        (((1,), (4,), _DTYPES, (128,)), first),
        (((1,), (4,), _DTYPES, (128,)), {**second, "splits": 2, "bias": True}),
        (((64,), _BITS, (_B,), (128,)), {"apart": True, "activation": "relu2", "weigh": "sum"}),
        (((64,), _BITS, (_B,), (128,)), {"apart": True, "bias": True}),
        (((256,), (4,), (_B,), (8, 16, 48, 80)), first),
        (((256,), (4,), (_B,), (8, 16, 48, 80)), second),
        (((256,), (4,), (_B,), (16, 128)), {"scale_dtype": "float32"}),
        (((8, 256), (4,), (_B,), (128,)), {**second, "symmetric": True, "whole": True}),
    )
    for axes, more in grids:
        for facts in itertools.product(*axes):
            yield facts, more
