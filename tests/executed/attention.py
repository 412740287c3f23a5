"""Decode attention and its combine, at shapes small enough to execute.

Blocks, warps and stages are those of the rule for a long cache. The first row has three blocks and
a piece of one in each split, so that the copy pipeline goes round; others are short, empty, or take
no part.
"""

from __future__ import annotations

import dataclasses
import functools

import numpy as np

from pallas_kernels.formulas.norms import Norm
from pallas_kernels.formulas.rotation import Rotation
from pallas_kernels.tiles.attention.decode_rules import Division, choose_division
from pallas_kernels.triton.parts import Parts
from pallas_kernels.triton.step.combine import Partials, combine_splits
from pallas_kernels.triton.step.decode_attention import Task, attend_splits
from pallas_kernels.triton.step.heads import Features
from tests.executed.bounds import DTYPES, Bounded, U
from tests.executed.products import find_device
from tests.executed.work import Work
from tests.pallas_kernels.attention import (
    EPS,
    Arguments,
    Expected,
    Step,
    add_up,
    draw,
    expect,
    expect_gate,
    name_arguments,
    to_float,
)


@dataclasses.dataclass(frozen=True)
class Attention:
    """The first kernel.

    Attributes:
      rotated: R, all of a head if 0.
      softcap: of the scores; 0 is none.
      the rest: as in `Step`.
    """

    arch: str
    head_dim: int
    group: int
    dtype: str
    splits: int = 1
    kv_heads: int = 1
    rotated: int = 0
    window: int | None = None
    norm: str = ""
    gated: bool = False
    bias: bool = False
    wide: bool = False
    parts: int = 1
    whole: bool = False
    softcap: float = 0.0

    @property
    def kind(self) -> str:
        return "attention"

    def choose(self) -> Division:
        """The rule's, with the splits of this case."""
        size, device = self.head_dim, find_device(self.arch)
        return dataclasses.replace(choose_division(8, 4096, size, size, device), splits=self.splits)

    @property
    def step(self) -> Step:
        last = self.splits * 3 * self.choose().block + 37
        return Step(
            self.head_dim,
            self.group,
            (last, 0, None, 20),
            last + 3,
            self.kv_heads,
            self.rotated or self.head_dim,
            self.window,
            self.norm,
            self.gated,
            self.bias,
            self.wide,
            self.parts,
            self.dtype,
            self.whole,
            softcap=self.softcap or None,
        )

    def prepare(self) -> Work:
        """Draw the data and say what must come out; slots that are not seen are NaN."""
        step, division = self.step, self.choose()
        given = draw(step)
        for cache in given.caches if not self.whole else ():
            for line in range(len(cache)):
                seen = step.find_seen(line // step.kv_heads)
                cache[line, : seen.start] = np.nan
                cache[line, seen.stop :] = np.nan
        task = Task(
            step.kv_heads,
            step.group,
            Features(step.head_dim, step.rotated),
            step.window,
            step.gated,
            step.scale,
            step.softcap,
        )
        return AttentionWork(
            functools.partial(_attend, norm=step.norm, task=task, division=division),
            name_arguments(given),
            (),
            lambda output: np.nan_to_num(to_float(output)),
            False,
            step,
            given,
            expect(step, given, division),
        )


def _attend(sums, biases, weights, rotation, position, active, caches, *, interpret=False, **facts):
    norms = [None if w is None else Norm(w, EPS, facts["norm"]) for w in weights]
    result, *caches = attend_splits(
        tuple(map(Parts, sums, biases)),
        tuple(norms),
        Rotation(*rotation),
        (position, active),
        caches,
        facts["task"],
        facts["division"],
        interpret=interpret,
    )
    return *caches, result


@dataclasses.dataclass(frozen=True)
class AttentionWork(Work):
    """Work whose outputs are the caches, and a result or `Partials`."""

    step: Step
    given: Arguments
    right: Expected

    def measure(self, outputs: list[np.ndarray]) -> float:
        """The worst error over its bound; infinity if a slot has changed that is not new."""
        keys, values, *result = outputs
        step, on = self.step, self.step.active > 0
        right = self.right.result if len(result) == 1 else self.right.mean
        shape = right.value.shape
        found = result[0] if len(result) == 1 else _join(*map(to_float, result))
        rows = [row for row, position in enumerate(step.positions) if position is not None]
        kept, new_keys, new_values = True, [], []
        for cache, before, new in zip(
            (keys, values), self.given.caches, (new_keys, new_values), strict=True
        ):
            cache = cache.copy()
            for row in rows:
                place = slice(row * step.kv_heads, (row + 1) * step.kv_heads), step.positions[row]
                new.append(cache[place].copy())
                cache[place] = before[place]
            kept &= np.array_equal(cache.view(np.uint16), before.view(np.uint16))
        kept &= np.array_equal(np.stack(new_values), self.right.value[rows])
        if not kept:
            return np.inf
        return max(
            right.choose(on).measure(found.reshape(shape)[on]),
            self.right.key.choose(on).measure(np.stack(new_keys)),
        )


def _join(mixed: np.ndarray, largest: np.ndarray, total: np.ndarray) -> np.ndarray:
    """The mean of each head in float64; splits that were not written have no part in it."""
    there = ~np.isnan(largest)
    weights = np.exp2(np.where(there, largest, -np.inf) - np.nanmax(largest, 1, keepdims=True))
    mixed = np.where(there[..., None], mixed, 0)
    mean = (mixed * weights[..., None]).sum(1)
    return mean / (np.where(there, total, 0) * weights).sum(1, keepdims=True)


@dataclasses.dataclass(frozen=True)
class Combination:
    """The second kernel."""

    arch: str
    head_dim: int
    splits: int
    dtype: str
    heads: int = 3
    gated: bool = False
    parts: int = 1

    @property
    def kind(self) -> str:
        return "combination"

    def prepare(self) -> Work:
        """Sums of splits, of which those without work are NaN; and a bound of their mean."""
        rng, dtype = np.random.default_rng(3), DTYPES[self.dtype]
        position = np.array([self.splits * 100, 0, 5, 40], np.int32)
        active = np.array([1, 1, 0, 1], np.int32)
        # 16 slots stay together
        each = 16 * np.ceil(np.ceil(position * active / self.splits) / 16)
        works = np.arange(self.splits) * np.maximum(each, 1)[:, None] < (position * active)[:, None]
        works[:, 0] = True
        works = np.repeat(works, self.heads, 0)
        rows = 4 * self.heads
        mixed, largest, total = (
            rng.standard_normal((rows, self.splits, *more)).astype(np.float32)
            for more in ((self.head_dim,), (), ())
        )
        total = np.abs(total) + 1
        exact = Bounded(*_bound(mixed, largest, total, works)).round_to(dtype)
        exact = Bounded(*(a.reshape(4, self.heads, -1) for a in (exact.value, exact.error)))
        gate = None
        if self.gated:
            features = 2 * self.heads * self.head_dim
            gate = rng.standard_normal((self.parts, 4, features)).astype(np.float32)
            gate = gate.astype(dtype) if self.parts == 1 else gate
            wide = add_up(gate, None, dtype).reshape(4, self.heads, -1)[..., self.head_dim :]
            exact = expect_gate(exact, wide.astype(np.float64), dtype)
        for array in (mixed, largest, total):
            array[~works] = np.nan
        return Work(
            functools.partial(_combine, dtype=dtype),
            ((mixed, largest, total), position, active, gate),
            (exact,),
            lambda output: output.reshape(4, self.heads, -1),
            False,
        )


def _bound(mixed, largest, total, works) -> tuple[np.ndarray, np.ndarray]:
    """2 roundings of each power, and those of products, sums and quotient."""
    weights = np.where(works, np.exp2(largest.astype(np.float64) - 9), 0)
    below = (total * weights).sum(1)[:, None]
    value, size = ((x * weights[..., None]).sum(1) / below for x in (mixed, np.abs(mixed)))
    return value, (2 * works.shape[1] + 24) * U * size


def _combine(partials, position, active, gate, *, dtype, interpret=False):
    return combine_splits(
        Partials(*partials),
        position,
        active,
        window=None,
        gate=None if gate is None else Parts(gate),
        dtype=dtype,
        interpret=interpret,
    )
