"""The kernels of one step of a program, each with its layer and the bytes that it moves.

A kernel belongs to the last layer whose weights or cache it depends on, which follows from the
names of the program's parameters: "model.model.layers[3].mlp.gate_proj.packed", "cache[3].k".
"""

from __future__ import annotations

import collections
import dataclasses
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence

from tests.gpu_step.hlo import Array, Instruction, Module, Thunk
from tests.gpu_step.readings import BEGIN, END, Kernel

_SAME = ("bitcast", "copy", "copy-start", "copy-done", "optimization-barrier", "reshape")
_SLICES = ("dynamic-slice", "slice", "gather")
_TRIPS = r'known_trip_count"?:\{"n":"?(\d+)'
_UPDATES = {"dynamic-update-slice": 1, "scatter": 2}
"""Operations that change a part of their first operand -> which operand the new values are."""


@dataclasses.dataclass(frozen=True)
class Load:
    """What a program is run with, as far as its text does not say it.

    Attributes:
      rows, steps: B rows of S tokens each.
      slots: C of the cache; `seen` of them are read.
      top_k, experts: of each token; 0 without experts.
    """

    rows: int
    steps: int
    slots: int
    seen: int
    top_k: int = 0
    experts: int = 0

    @property
    def tokens(self) -> int:
        return self.rows * self.steps

    @property
    def touched(self) -> float:
        """Share of the experts that are chosen by any token, where all choose at random."""
        if not self.experts:
            return 1.0
        return 1 - (1 - self.top_k / self.experts) ** self.tokens

    def is_cache(self, array: Array) -> bool:
        """Whether an array has the shape of keys or values in the cache, [B * heads, C, D]."""
        return (
            len(array.dims) == 3
            and array.dims[1] == self.slots
            and array.dims[0] % self.rows == 0
            and array.dtype in ("bf16", "f16", "f32")
        )


@dataclasses.dataclass(frozen=True)
class _Fact:
    """Of a value: the parameter that it is, if it is one, and the layer it depends on."""

    parameter: str
    layer: int


_NOTHING = _Fact("", BEGIN)
_Facts = Sequence[_Fact]


def find_layer(parameter: str) -> int:
    """The layer of a parameter, by its name."""
    if found := re.search(r"(?:layers|cache)\[(\d+)\]", parameter):
        return int(found.group(1))
    return END if re.search(r"lm_head|model\.norm\b", parameter) else BEGIN


def list_kernels(
    module: Module, thunks: Sequence[Thunk], load: Load, *, greedy: bool = True
) -> list[Kernel]:
    """The kernels of a step in the order in which they are started.

    A step is one round of the loop of a program that generates, else all of it. Of branches
    the one with fewest kernels counts, or with `greedy=False` the one with most: drawing from the
    filtered distribution.
    """
    reader = _Reader(module, thunks, load, min if greedy else max)
    values = {number: [_Fact(name, find_layer(name))] for number, name in module.parameters.items()}
    return list(reader.walk(module.entry, values))


class _Reader:
    def __init__(
        self, module: Module, thunks: Sequence[Thunk], load: Load, choose: Callable
    ) -> None:
        self.module, self.load, self.choose = module, load, choose
        self.thunks: dict[str, list[Thunk]] = collections.defaultdict(list)
        for thunk in thunks:
            self.thunks[thunk.instruction].append(thunk)
        self.results: dict[str, _Facts] = {}
        # whatever shape and dtype a copy may have
        held = (a for i in module.computations[module.entry] for a in i.arrays)
        self.caches = {a.size for a in held if load.is_cache(a)}
        # the loop over tokens ends when the rows do, so nobody knows how often it runs
        loops = (i for i in module.computations[module.entry] if i.op == "while")
        self.loop = next((i.name for i in loops if not i.find(_TRIPS)), "")

    def walk(self, computation: str, values: Mapping[int, _Facts]) -> Iterator[Kernel]:
        """The kernels of a computation that is called with these values."""
        facts: dict[str, _Facts] = {}
        root: _Facts = []
        counts = computation != self.module.entry or not self.loop
        for i in self.module.computations[computation]:
            before = [facts[name] for name in i.operands if name in facts]
            if i.op == "parameter":
                found: _Facts = values.get(int(i.argument), [])
                facts[i.name] = found or [_NOTHING] * len(i.arrays)
            elif i.op == "get-tuple-element":
                index = int(i.find(r"index=(\d+)") or 0)
                facts[i.name] = [before[0][index] if index < len(before[0]) else _NOTHING]
            elif i.op == "tuple":
                facts[i.name] = [fact for each in before for fact in each]
            elif called := i.list_called():
                inner = list(self._enter(i, called, before))
                yield from inner if counts or i.name == self.loop else ()
                facts[i.name] = self.results[i.name]
            else:
                flat = [fact for each in before for fact in each]
                layer = max((fact.layer for fact in flat), default=BEGIN)
                same = i.op in _SAME and flat
                facts[i.name] = [flat[0]] if same else [_Fact("", layer)] * len(i.arrays)
                if i.name in self.thunks and counts:
                    operands = [facts.get(name, [_NOTHING]) for name in i.operands]
                    yield self._describe(computation, i, operands, layer)
            root = facts[i.name] if i.is_root else root
        self.results[computation] = root

    def _enter(self, i: Instruction, called: list[str], before: list[_Facts]) -> Iterator[Kernel]:
        if i.op == "while":
            trips = int(i.find(_TRIPS) or 1)
            kernels = [k for name in called for k in self.walk(name, {0: before[0]})]
            # counters of an inner loop depend on no layer, but the loop does
            least = BEGIN if i.name == self.loop else max(f.layer for f in before[0])
            for kernel in kernels:
                times = {name: trips * getattr(kernel, name) for name in _COUNTED}
                yield dataclasses.replace(kernel, layer=max(kernel.layer, least), **times)
            self.results[i.name] = _join(self.results[called[0]], before[0])
            return
        if i.op == "call":
            yield from self.walk(called[0], dict(enumerate(before)))
            self.results[i.name] = self.results[called[0]]
            return
        # the first operand is the predicate, the others are one for each branch
        branches = [
            list(self.walk(name, {0: before[min(n + 1, len(before) - 1)]}))
            for n, name in enumerate(called)
        ]
        yield from self.choose(branches, key=lambda ks: sum(k.launches for k in ks))
        layer = max((fact.layer for each in before for fact in each), default=BEGIN)
        self.results[i.name] = [_Fact("", layer)] * len(i.arrays)

    def _describe(
        self, computation: str, i: Instruction, operands: list[_Facts], layer: int
    ) -> Kernel:
        thunks = self.thunks[i.name]
        known = {j.name: j for j in self.module.computations[computation]}
        given = [(known[name], f[0]) for name, f in zip(i.operands, operands, strict=True)]
        held = [fact.parameter for _, fact in given if fact.parameter.startswith("model")]
        read, written = self._count_read(i, given), self._count_written(i)
        launches = len(thunks)
        return Kernel(
            name=thunks[0].name,
            source=self.module.describe_source(i),
            weights=tuple(
                re.sub(r"^model\.(model\.)?(layers\[\d+\]\.)?|\.value$", "", p) for p in held
            ),
            layer=layer,
            launches=launches,
            programs=thunks[0].programs,
            read=read * (launches if i.op == "sort" else 1),
            written=written * (launches if i.op == "sort" else 1),
            flops=self._count_flops(i, given, thunks[0].name),
            is_recorded=all(thunk.is_recorded for thunk in thunks),
            copies_cache=any(a.size in self.caches and written >= a.bytes for a in i.arrays),
            scores=max((a.size for a in i.arrays if self._is_scores(a)), default=0),
        )

    def _is_scores(self, array: Array) -> bool:
        if self.load.steps == 1:
            return False
        wide = array.dtype in ("bf16", "f16", "f32") and self.load.slots in array.dims
        least = self.load.slots * self.load.steps
        return wide and not self.load.is_cache(array) and array.size >= least

    def _count_read(self, i: Instruction, given: list[tuple[Instruction, _Fact]]) -> int:
        total = 0.0
        for index, (operand, fact) in enumerate(given):
            if i.op == "custom-call":
                share = self.load.touched if ".experts." in fact.parameter else 1.0
                if operand.arrays and self.load.is_cache(operand.arrays[0]):
                    share = self.load.seen / self.load.slots
                total += share * operand.bytes
            elif called := i.find(r"calls=%([\w.\-]+)"):
                total += self._count_used(called, index)
            else:
                total += min(operand.bytes, i.bytes) if i.op in _SLICES else operand.bytes
        return round(total)

    def _count_used(self, computation: str, index: int) -> int:
        """Bytes of a parameter that a fusion reads: all, or the slices that it takes of it."""
        body = self.module.computations[computation]
        [start] = [i for i in body if i.op == "parameter" and int(i.argument) == index]
        names, total = {start.name}, 0
        for i in body:
            if not names & set(i.operands):
                continue
            if i.op == "bitcast":
                names.add(i.name)
            elif i.op in _SLICES and i.operands[0] in names:
                total += i.bytes
            elif i.op in _UPDATES and i.operands[0] in names:
                total += 0
            elif i.op == "fusion" and (called := i.find(r"calls=%([\w.\-]+)")):
                places = [n for n, name in enumerate(i.operands) if name in names]
                total += sum(self._count_used(called, n) for n in places)
            elif i.op not in ("tuple", "get-tuple-element"):
                return start.bytes
        return min(total, start.bytes)

    def _count_written(self, i: Instruction) -> int:
        if i.op == "custom-call":
            aliased = "output_to_operand_aliasing" in i.attributes
            fresh = self.load.steps / self.load.slots
            return round(
                sum(a.bytes * (fresh if aliased and self.load.is_cache(a) else 1) for a in i.arrays)
            )
        if called := i.find(r"calls=%([\w.\-]+)"):
            body = {j.name: j for j in self.module.computations[called]}
            [root] = [j for j in body.values() if j.is_root]
            roots = [body[name] for name in root.operands] if root.op == "tuple" else [root]
            return sum(_count_fresh(j, body) for j in roots)
        return i.bytes

    def _count_flops(
        self, i: Instruction, given: list[tuple[Instruction, _Fact]], name: str
    ) -> float:
        if i.op == "fusion":
            return sum(self._count_dots(i.find(r"calls=%([\w.\-]+)") or ""))
        if i.op != "custom-call" or not given:
            return 0.0
        if contracted := i.find(r'lhs_contracting_dimensions"?:\["?(\d+)'):
            lhs = given[0][0].arrays[0]
            return 2.0 * max(a.size for a in i.arrays) * lhs.dims[int(contracted)]
        if any(operand.arrays and self.load.is_cache(operand.arrays[0]) for operand, _ in given):
            if self.load.steps == 1:
                return 0.0  # nothing beside its bytes
            # each query with the keys and the values that it sees
            mean = self.load.seen - (self.load.steps - 1) / 2
            return 4.0 * max(a.size for a in i.arrays if not self.load.is_cache(a)) * mean
        total = 0.0
        for operand, fact in given:
            if fact.parameter.endswith("packed.value") and "multiply" in name:
                values = operand.bytes * 2  # of 4 bits
                shares = self.load.top_k / self.load.experts if ".experts." in fact.parameter else 1
                total += 2.0 * self.load.tokens * values * shares
        return total

    def _count_dots(self, computation: str) -> Iterator[float]:
        body = {j.name: j for j in self.module.computations.get(computation, ())}
        for j in body.values():
            if j.op == "dot":
                lhs = body[j.operands[0]].arrays[0]
                axes = map(int, (j.find(r"lhs_contracting_dims=\{([\d,]+)\}") or "").split(","))
                yield 2.0 * j.arrays[0].size * math.prod(lhs.dims[axis] for axis in axes)
            elif j.op == "fusion":
                yield from self._count_dots(j.find(r"calls=%([\w.\-]+)") or "")


_COUNTED = ("launches", "read", "written", "flops")


def _count_fresh(i: Instruction, body: dict[str, Instruction]) -> int:
    """Bytes that a root of a fusion writes: of an update in place only what is new."""
    while i.op == "bitcast":
        i = body[i.operands[0]]
    if i.op in _UPDATES:
        return body[i.operands[_UPDATES[i.op]]].bytes
    return i.bytes


def _join(after: _Facts, before: _Facts) -> list[_Fact]:
    return [
        a if a.parameter == b.parameter else _Fact("", max(a.layer, b.layer))
        for a, b in zip(after, before, strict=False)
    ]
