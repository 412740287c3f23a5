"""Ways to break the PTX of a kernel, one instruction at a time."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterator

Edit = Callable[[re.Match], str]


@dataclasses.dataclass(frozen=True)
class Mutation:
    """One broken text.

    Attributes:
      kind: key of `KINDS`.
      line: number of the changed line, from 0.
      before: the line as it was.
      text: the whole.
    """

    kind: str
    line: int
    before: str
    text: str


def _drop(_: re.Match) -> str:
    return ""


def _add_one(found: re.Match) -> str:
    return f"{found[1]}{int(found[2]) + 1};"


def _add_eight(found: re.Match) -> str:
    return f"{found[1]}{int(found[2]) + 8};"


KINDS: dict[str, tuple[str, Edit]] = {
    "wait for copies dropped": (r"cp\.async\.wait_group\s+\d+;", _drop),
    "wait for copies one group late": (r"(cp\.async\.wait_group\s+)(\d+);", _add_one),
    "group of copies not closed": (r"cp\.async\.commit_group;", _drop),
    "copy dropped": (r"cp\.async\.c[ag]\.shared\.global.*;", _drop),
    "barrier dropped": (r"bar\.sync\s+0;", _drop),
    "fence of the proxy dropped": (r"fence\.proxy\.async\S*;", _drop),
    "fence of wgmma dropped": (r"wgmma\.fence\S+;", _drop),
    "wait for wgmma dropped": (r"wgmma\.wait_group\S+\s+\d+;", _drop),
    "wait for wgmma one group late": (r"(wgmma\.wait_group\S+\s+)(\d+);", _add_one),
    "group of wgmma not closed": (r"wgmma\.commit_group\S+;", _drop),
    "wait for stores to tensor memory dropped": (r"tcgen05\.wait::st\S+;", _drop),
    "wait for loads of tensor memory dropped": (r"tcgen05\.wait::ld\S+;", _drop),
    "end of products not announced": (r"@\S+ tcgen05\.commit.*;", _drop),
    "product dropped": (r"(@\S+ )?(tcgen05\.mma|wgmma\.mma_async|mma\.sync)\..*;", _drop),
    "wait for products dropped": (r"@!complete bra\.uni waitLoop;", _drop),
    "half of a product of tensor memory": (r"(tcgen05\.mma.*\+ )8( \], %rd)", r"\g<1>0\2"),
    "matrix transposed": (r"(ldmatrix\.sync\.aligned\.m8n8\.x4)(\.shared)", r"\1.trans\2"),
    "matrix not transposed": (r"(matrix\.sync\.aligned\.m8n8\.x4)\.trans", r"\1"),
    "shift by one more": (r"(shl\.b32\s+%r\d+, %r\d+, )(\d+);", _add_one),
    "lane changed": (r"(shfl\.sync\.(?:up|bfly)\.b32\s+\S+ \S+ )(\d+)(, \d+, -1;)", r"\g<1>0\3"),
    "field of a word shifted": (r"(shr\.u32 t, %r\d+, )(\d+);", _add_one),
    "offset of one element": (r"(mul\.wide\.s32\s+%rd\d+, %r\d+, )2;", r"\g<1>4;"),
    "address one element further": (
        r"(cp\.async\S+ \[ %r\d+ \+ )0( \], \[ %rd\d+ \+ )0",
        r"\g<1>0\g<2>2",
    ),
    "mask removed": (r"@%p\d+ (st\.global\S+)", r"\1"),
    "mask turned round": (r"@(%p\d+) (st\.global\S+)", r"@!\1 \2"),
    "bytes of a masked copy": (r"(selp\.b32\s+%r\d+, )(4|8|16)(, )0(, %p\d+;)", r"\1\2\3\2\4"),
    "mask of a copy removed": (r"(cp\.async\.c[ag]\S+ .*, 0x\w+), %p\d+;", r"\1;"),
    "sums swapped": (r"(mma\S+\s+\{ ?)(%r\d+)(, )(%r\d+)", r"\1\4\3\2"),
    "factors swapped": (r"(mma\S+ \{[^}]*\}, \{ ?)(%r\d+)(,\s*)(%r\d+)", r"\1\4\3\2"),
    "sums of a group not multiplied": (
        r"fma\.rn\.f32 (%\w+), (%\w+), (%\w+), (%\w+);",
        r"mov.b32 \1, \2;",
    ),
    "mask of a tail later": (r"(setp\.(?:lt|gt)\.s32\s+%p\d+, %r\d+, )(\d{3,});", _add_eight),
}
"""What is changed: a pattern of one line, and what stands there then."""
MASKS_OF_COPIES = {"bytes of a masked copy", "mask of a copy removed"}
"""Kinds of which a compiler's code has one: jax 0.10 masks by the bytes, 0.12 by a predicate."""


def join_lines(text: str) -> str:
    """The same with one line for each product of `mma.sync`, of which jax 0.12 makes five."""
    return re.sub(r"mma\.sync[^;]*;", lambda found: " ".join(found[0].split()), text)


def list_mutations(text: str, kinds: list[str] | None = None) -> Iterator[Mutation]:
    """Every place of every kind, in the order of the kinds."""
    lines = text.split("\n")
    for kind in kinds or KINDS:
        pattern, edit = KINDS[kind]
        for number, line in enumerate(lines):
            if re.search(pattern, line):
                changed = re.sub(pattern, edit, line, count=1)
                body = "\n".join([*lines[:number], changed, *lines[number + 1 :]])
                yield Mutation(kind, number, line.strip(), body)


_EVENT = re.compile(
    r"bar\.sync|(ld|st)\.shared|(ld|st)matrix|cp\.async\.\w+|wgmma\.\w+|tcgen05\.\w+|mbarrier\.\w+|fence"
)


def find_reason(mutation: Mutation, original: str, is_noticed: Callable[[str], bool]) -> str:
    """Why a mutation changes nothing, "" if no reason is known.

    `is_noticed` says whether another text of this kernel breaks a rule or computes other numbers.
    """
    find = _REASONS.get(mutation.kind)
    return find(mutation, original, is_noticed) if find else ""


def _explain_group(mutation: Mutation, original: str, _) -> str:
    """Groups before the first wait are counted from the last one back."""
    lines = original.split("\n")
    waits = [i for i, line in enumerate(lines) if "cp.async.wait_group" in line]
    closed = [i for i in range(waits[0]) if "cp.async.commit_group" in lines[i]]
    left = int(re.findall(r"(\d+);", lines[waits[0]])[0])
    covered = closed[: len(closed) - left]
    joins = mutation.line in covered[:-1]
    return "its copies join the next group, and the first wait is for both" if joins else ""


def _explain_copy(mutation: Mutation, original: str, is_noticed) -> str:
    """Copies that are all inside need no mask, but must be made."""
    lines = original.split("\n")
    nothing = re.sub(r"(selp\S+\s+%r\d+, )\d+(?=, 0,)", r"\g<1>0", lines[mutation.line])
    nothing = re.sub(r", %p\d+;", ", 0;", nothing) if "cp.async" in nothing else nothing
    is_needed = is_noticed("\n".join(_replace(lines, mutation.line, nothing)))
    return "all of these bytes are inside" if is_needed else ""


def _explain_fence(mutation: Mutation, original: str, is_noticed) -> str:
    """Tensor cores that read copies alone need one fence after each wait for copies."""
    lines = original.split("\n")
    before = [i for i in range(mutation.line) if "fence.proxy.async" in lines[i]]
    if not before or any("cp.async.wait" in line for line in lines[before[-1] : mutation.line]):
        return ""
    without = [line for line in lines if "fence.proxy.async" not in line]
    fence = "; fence.proxy.async.shared::cta;"
    moved = [line.rstrip(";") + fence if "cp.async.wait" in line else line for line in without]
    enough = not is_noticed("\n".join(moved)) and is_noticed("\n".join(without))
    return "no copy has come since the fence before it, and no other is read" if enough else ""


def _explain_shift(mutation: Mutation, original: str, is_noticed) -> str:
    """One tile of tokens and one part of K: their numbers are 0."""
    lines = original.split("\n")
    zero = re.sub(r"shl(\.b32\s+%r\d+), .*", r"mov\1, 0;", lines[mutation.line])
    is_zero = not is_noticed("\n".join(_replace(lines, mutation.line, zero)))
    return "what is shifted is 0" if is_zero else ""


def _explain_lane(mutation: Mutation, original: str, is_noticed) -> str:
    """Counts of a part in which no pair, or every pair, has the expert of these blocks."""
    lines = original.split("\n")
    for other, reason in (
        (r"mov.b32 \1, 0;", "what moves is 0, or nothing reads it"),
        (r"shfl.sync.idx.b32 \1, \2, 0, 31, -1;", "every lane holds the same"),
    ):
        line = re.sub(r"shfl\S+\s+(%r\d+), (%r\d+), .*", other, lines[mutation.line])
        if not is_noticed("\n".join(_replace(lines, mutation.line, line))):
            return reason
    return ""


def _explain_mask(mutation: Mutation, original: str, is_noticed) -> str:
    """Places that are all inside, or all outside, need no mask, but must be (or not be) touched."""
    lines = original.split("\n")
    [predicate] = re.findall(r"setp\S+\s+(%p\d+)", lines[mutation.line])
    if re.search(rf"@!?{predicate} bra", original):
        return "a loop ends by it, which goes on by whole steps"
    for limit, reason in (
        (0, "all of these places are inside"),
        (1 << 30, "all of these places are further outside"),
    ):
        other = re.sub(r"\d+;", f"{limit};", lines[mutation.line])
        if is_noticed("\n".join(_replace(lines, mutation.line, other))):
            return reason
    return ""


def _explain_barrier(mutation: Mutation, original: str, _) -> str:
    """By what stands between it and the barriers on both sides."""
    events = [
        (i, found[0])
        for i, line in enumerate(original.split("\n"))
        if (found := _EVENT.search(line.strip()))
    ]
    place = next(n for n, (i, _) in enumerate(events) if i == mutation.line)
    before, after = (
        _take_until_barrier(names) for names in (events[:place][::-1], events[place + 1 :])
    )
    if not before or not after:
        return "the barrier beside it does the same"
    if after[0] == "mbarrier.try_wait":
        return "every thread waits for the mbarrier that the products announce"
    if after == ["tcgen05.dealloc"] and not any(name.startswith("tcgen05") for name in before):
        return "there was a barrier since the last access to tensor memory"
    begins = {"cp.async.cg", "cp.async.ca", "cp.async.commit_group", "cp.async.wait_group"}
    if set(after) <= begins:
        return "copies only begin after it, where the barrier before was after the last read"
    if before[0] == "cp.async.wait_group" and {*after} <= {"ld.shared", "st.shared"}:
        return "each warp reads the words that it copied itself"
    return ""


def _take_until_barrier(events: list[tuple[int, str]]) -> list[str]:
    names = [name for _, name in events]
    return names[: names.index("bar.sync")] if "bar.sync" in names else names


def _replace(lines: list[str], number: int, line: str) -> list[str]:
    return [*lines[:number], line, *lines[number + 1 :]]


_REASONS = {
    "group of copies not closed": _explain_group,
    "bytes of a masked copy": _explain_copy,
    "mask of a copy removed": _explain_copy,
    "fence of the proxy dropped": _explain_fence,
    "shift by one more": _explain_shift,
    "lane changed": _explain_lane,
    "mask of a tail later": _explain_mask,
    "barrier dropped": _explain_barrier,
}
"""Kinds that may change nothing. All others must be noticed wherever they stand."""
