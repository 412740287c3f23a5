"""What `tests.gpu_check` compiles: products, experts, and what lies between, for absent GPUs.

A product is what `pallas_kernels.tiles.dense_rules.choose` makes of a 4096 x 4096 weight with zero
points, for a number of tokens that fills its tile or leaves masked rows in it; an expert's is one
of both products of Qwen3-30B-A3B. Where the group does not divide K, the weight is somewhat
smaller.
"""

from __future__ import annotations

import dataclasses
import itertools
import random
from collections.abc import Iterator

from pallas_kernels.format.spec import QuantSpec
from pallas_kernels.tiles.dense_rules import choose, list_candidates
from pallas_kernels.tiles.device import Device
from pallas_kernels.tiles.expert_rules import choose_moe, list_moe_candidates
from pallas_kernels.tiles.expert_tiles import MoeTiles
from pallas_kernels.tiles.tiles import Schedule, Tiles
from pallas_kernels.triton.dense import can_pair
from pallas_kernels.triton.grouping import MOST_PAIRS
from tests import gpu_aot
from tests.gpu_attention import Decode, list_attention, list_core_attention
from tests.gpu_small import list_small

SIZE = 4096
GROUPS = (32, 64, 128, SIZE)
MIXED_GROUPS = (8, 16, 48, 80)
EXPERTS, TOP_K = 128, 8
FIRST, SECOND = "gate and up", "down"
_FULL, _MASKED, _MANY = (1, 8, 16, 32, 64), (5, 15, 31), (250, 2000)
_EXPERT_TOKENS = (1, 8, 64, 256, 1024, 4096)
_OTHERS = [arch for arch in gpu_aot.TARGETS if arch != "sm_90a"]


@dataclasses.dataclass(frozen=True)
class Case:
    """One kernel of a product for one GPU.

    Attributes:
      group_size: `SIZE` for channels.
      scale_dtype: "" for that of x.
      experts: "" for a dense product, `FIRST` or `SECOND` for one of a Mixture-of-Experts.
      drawn: the tuner's candidate of this number, counted in a circle; None for the rule's choice.
    """

    arch: str
    tokens: int
    bits: int
    dtype: str
    group_size: int
    symmetric: bool = False
    gated: bool = False
    experts: str = ""
    scale_dtype: str = ""
    drawn: int | None = None

    def __post_init__(self):
        object.__setattr__(self, "scale_dtype", self.scale_dtype or self.dtype)

    @property
    def spec(self) -> QuantSpec:
        """Of the weight; of one expert's."""
        divides = SIZE % self.group_size == 0
        hidden, inner = (2048, 768) if divides else (1920, 960)
        n, k = {
            "": (SIZE, SIZE if divides else 3840),
            FIRST: (2 * inner, hidden),
            SECOND: (hidden, inner),
        }[self.experts]
        return QuantSpec(
            bits=self.bits,
            group_size=k if self.group_size == SIZE else self.group_size,
            symmetric=self.symmetric,
            in_features=k,
            out_features=n,
        )

    @property
    def device(self) -> Device:
        target = gpu_aot.TARGETS[self.arch]
        return Device(target.device_kind, target.cores)

    def choose(self) -> tuple[Schedule, bool]:
        """The schedule, and whether one program computes gate and up."""
        if self.experts == SECOND:
            return self._choose_moe().second, False
        schedule = self._choose_moe().first if self.experts else self._choose_dense()
        if not isinstance(schedule, Tiles) or not (self.gated or self.experts):
            return schedule, False
        schedule = schedule if self.experts else dataclasses.replace(schedule, splits=1)
        fits = can_pair(self.spec, schedule, self.scale_dtype, self.device)
        return schedule, schedule.splits == 1 and fits

    def _choose_dense(self) -> Schedule:
        facts = (self.spec, self.tokens, self.dtype, self.scale_dtype, self.device)
        if self.drawn is None:
            return choose(*facts)
        found = [tiles for tiles in list_candidates(*facts) if isinstance(tiles, Tiles)]
        return found[self.drawn % len(found)]

    def _choose_moe(self) -> MoeTiles:
        specs = tuple(dataclasses.replace(self, experts=part).spec for part in (FIRST, SECOND))
        dtypes = (self.scale_dtype, self.scale_dtype)
        facts = (specs, EXPERTS, self.tokens, TOP_K, self.dtype, dtypes, self.device)
        if self.drawn is None:
            return choose_moe(*facts)
        found = list_moe_candidates(*facts)
        return found[self.drawn % len(found)]


@dataclasses.dataclass(frozen=True)
class Grouping:
    """The kernel that groups few pairs by expert."""

    arch: str
    experts: int
    pairs: int
    block: int


@dataclasses.dataclass(frozen=True)
class Between:
    """A kernel between the products: a name of `tests.gpu_small.list_small`."""

    arch: str
    name: str


AnyCase = Case | Grouping | Between | Decode


_CORE_SMALL = (
    "add and norm, Llama-3.1-8B, batch 1",
    "add and norm, 8 MiB ahead, Llama-3.1-8B, batch 1",
    "add experts and norm, Qwen3-30B-A3B, batch 1",
    "attention of 2048 tokens, Llama-3.1-8B",
    "attention of 2048 tokens, gemma-4, wide heads",
    "routing, DeepSeek-V3",
    "routing, the most experts",
    "delta rule, Qwen3.6-27B, batch 1",
)


def list_core() -> list[AnyCase]:
    """Some of the budgeted cases, and of the other schedules and GPUs."""
    return [
        *(Case("sm_90a", tokens, 4, "bfloat16", 128) for tokens in (8, 64, 250)),
        Case("sm_90a", 8, 4, "float16", 64),
        Case("sm_80", 64, 4, "bfloat16", 32),
        Case("sm_100a", 64, 4, "float16", 64),
        Case("sm_90a", 16, 4, "bfloat16", 128, gated=True),
        Case("sm_90a", 64, 4, "bfloat16", 128, experts=FIRST),
        Case("sm_90a", 256, 4, "bfloat16", 128, experts=SECOND),
        Case("sm_90a", 16, 4, "bfloat16", 16),
        Case("sm_89", 256, 4, "bfloat16", 80, experts=FIRST, scale_dtype="float32"),
        Grouping("sm_90a", 512, 4096, 8),
        *(Between("sm_90a", name) for name in _CORE_SMALL),
        *list_core_attention(),
    ]


def list_all() -> list[AnyCase]:
    """Every kind of kernel for every GPU, with the numbers of tokens that users run."""
    archs, tokens = tuple(gpu_aot.TARGETS), (*_FULL, *_MANY)
    products = (
        itertools.product(archs, tokens, (4, 8), ("bfloat16",), GROUPS),
        itertools.product(archs, tokens, (4, 8), ("float16",), (128,)),
        itertools.product(("sm_90a", "sm_100a"), tokens, (4, 8), ("float16",), (64,)),
        itertools.product(archs, _MASKED, (4, 8), ("bfloat16",), (128,)),
        itertools.product(("sm_90a",), tokens, (4, 8), ("bfloat16",), (128,), (True,)),
        itertools.product(("sm_90a",), (8, 16, 32), (4, 8), ("bfloat16",), GROUPS, (False,), (1,)),
        itertools.product(archs, (16, 64), (4,), ("bfloat16",), MIXED_GROUPS),
        itertools.product(archs, (16, 64), (8,), ("bfloat16",), (16, 80)),
    )
    return [
        *(Case(*facts) for facts in itertools.chain(*products)),
        *(
            Case(*facts, scale_dtype="float32")
            for facts in itertools.product(archs, (16, 64), (4,), ("bfloat16",), (16, 80, 128))
        ),
        *_list_experts(),
        *(Grouping(arch, *facts) for arch in archs for facts in _list_groupings()),
        *(Between(arch, name) for arch in archs for name in list_small()),
        *list_attention(),
    ]


def _list_experts() -> Iterator[Case]:
    """On Hopper as many as of dense weights, on the others the typical ones."""
    archs, bfloat16 = tuple(gpu_aot.TARGETS), ("bfloat16",)
    for facts in (
        *itertools.product(("sm_90a",), _EXPERT_TOKENS, (4, 8), bfloat16, (32, 128, SIZE)),
        *itertools.product(("sm_90a",), _EXPERT_TOKENS[::2], (4, 8), ("float16",), (128,)),
        *itertools.product(_OTHERS, (8, 256, 4096), (4, 8), bfloat16, (32, 128)),
        *itertools.product(archs, (256,), (4,), bfloat16, MIXED_GROUPS),
    ):
        yield Case(*facts, experts=FIRST)
        yield Case(*facts, experts=SECOND)
    for facts in itertools.product(archs, (256,), (4,), bfloat16, (16, 128)):
        yield Case(*facts, experts=FIRST, scale_dtype="float32")
        yield Case(*facts, experts=SECOND, scale_dtype="float32")


def _list_groupings() -> list[tuple[int, int, int]]:
    """Experts, pairs and block: the shapes of Qwen3, Kimi-K2, Qwen3.5-397B, and the largest."""
    return [(128, 512, 8), (384, 512, 8), (512, 640, 8), (1024, MOST_PAIRS, 8)]


def draw_cases(number: int, seed: int) -> list[Case]:
    """Candidates of the tuner for products drawn at random."""
    draw = random.Random(seed)
    cases = []
    for _ in range(number):
        dtype, experts = draw.choice(("bfloat16", "float16")), draw.choice(("", "", FIRST, SECOND))
        cases.append(
            Case(
                draw.choice(list(gpu_aot.TARGETS)),
                int(2 ** draw.uniform(0, 12 if experts else 8.5)),
                draw.choice((4, 8)),
                dtype,
                draw.choice((*GROUPS, *MIXED_GROUPS, 24, 40, 96)),
                symmetric=draw.random() < 0.3,
                gated=not experts and draw.random() < 0.3,
                experts=experts,
                scale_dtype=draw.choice((dtype, "float32")),
                drawn=draw.randrange(1000),
            )
        )
    return cases
