"""Reads what XLA made of a program: optimised HLO as text, and the list of its thunks."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator, Sequence

_BYTES = {
    "pred": 1, "s4": 0.5, "u4": 0.5, "s8": 1, "u8": 1, "f8e4m3fn": 1, "f8e5m2": 1, "bf16": 2,
    "f16": 2, "s16": 2, "u16": 2, "f32": 4, "s32": 4, "u32": 4, "f64": 8, "s64": 8, "u64": 8,
}  # fmt: skip
_ARRAY = re.compile(rf"\b({'|'.join(_BYTES)})\[([\d,]*)\]")
_NAME = re.compile(r"%([\w.\-]+)")
_HEAD = re.compile(r"(?:(ENTRY) )?%([\w.\-]+) .*\{$")


@dataclasses.dataclass(frozen=True)
class Array:
    """Dtype and dimensions of a value."""

    dtype: str
    dims: tuple[int, ...]

    @property
    def size(self) -> int:
        return math.prod(self.dims)

    @property
    def bytes(self) -> int:
        return round(self.size * _BYTES[self.dtype])


@dataclasses.dataclass(frozen=True)
class Instruction:
    """A line of a computation.

    Attributes:
      arrays: its value, or those of its tuple.
      operands: names of instructions of the same computation.
      argument: what stands in the parentheses, for `parameter(3)` and constants.
      attributes: what stands behind them.
    """

    name: str
    arrays: tuple[Array, ...]
    op: str
    operands: tuple[str, ...]
    argument: str
    attributes: str
    is_root: bool

    @property
    def bytes(self) -> int:
        return sum(array.bytes for array in self.arrays)

    def find(self, pattern: str) -> str | None:
        """The first group of a pattern in the attributes."""
        found = re.search(pattern, self.attributes)
        return found and found.group(1)

    def list_called(self) -> list[str]:
        """The computations that a `while`, `conditional` or `call` runs, in order of its operands.

        Of a `while` first the body, then the condition.
        """
        if self.op == "while":
            return [self.find(r"body=%([\w.\-]+)") or "", self.find(r"condition=%([\w.\-]+)") or ""]
        if self.op == "call":
            return [self.find(r"to_apply=%([\w.\-]+)") or ""]
        if self.op != "conditional":
            return []
        if several := self.find(r"branch_computations=\{([^}]*)\}"):
            return _NAME.findall(several)
        return [self.find(rf"{kind}_computation=%([\w.\-]+)") or "" for kind in ("true", "false")]


@dataclasses.dataclass(frozen=True)
class Thunk:
    """Something that XLA's runtime starts.

    Attributes:
      name: of the kernel.
      instruction: what it was made from.
      programs: of the grid, 0 where it is no kernel of XLA's own.
      is_recorded: whether it stands in a command buffer, which the GPU plays back by itself.
    """

    name: str
    instruction: str
    programs: int
    is_recorded: bool


@dataclasses.dataclass(frozen=True)
class Module:
    """All computations of a program by name, and which function made which instruction."""

    computations: dict[str, tuple[Instruction, ...]]
    entry: str
    frames: dict[int, str]

    @property
    def parameters(self) -> dict[int, str]:
        """How the function calls its arguments: "model.layers[3].mlp.gate"."""
        found = [i for i in self.computations[self.entry] if i.op == "parameter"]
        return {int(i.argument): i.find(r'op_name="([^"]*)"') or i.name for i in found}

    def describe_source(self, instruction: Instruction) -> str:
        """The Python function that an instruction comes from."""
        return self.frames.get(int(instruction.find(r"stack_frame_id=(\d+)") or 0), "")


def read_module(text: str) -> Module:
    """Parse optimised HLO as XLA prints it."""
    computations: dict[str, tuple[Instruction, ...]] = {}
    entry, current, lines = "", "", list[Instruction]()
    for line in text.splitlines():
        if current and line.startswith("}"):
            computations[current], current = tuple(lines), ""
        elif current:
            if instruction := _read_instruction(line):
                lines.append(instruction)
        elif head := _HEAD.match(line):
            current, lines = head.group(2), []
            entry = current if head.group(1) else entry
    return Module(computations, entry, _read_frames(text))


def _read_instruction(line: str) -> Instruction | None:
    head = re.match(r"\s+(ROOT )?%([\w.\-]+) = ", line)
    if head is None:
        return None
    rest = line[head.end() :]
    end = _close(rest) if rest.startswith("(") else rest.index(" ")
    kind, rest = rest[:end], rest[end:].lstrip()
    op, _, rest = rest.partition("(")
    end = _close(f"({rest}") - 1
    argument = rest[: end - 1]
    return Instruction(
        name=head.group(2),
        arrays=read_arrays(kind),
        op=op,
        operands=tuple(_NAME.findall(argument)),
        argument=argument,
        attributes=rest[end:],
        is_root=bool(head.group(1)),
    )


def read_arrays(text: str) -> tuple[Array, ...]:
    """Every array that a type names, in order: "(f32[2,3], s32[])"."""
    return tuple(
        Array(dtype, tuple(map(int, filter(None, dims.split(",")))))
        for dtype, dims in _ARRAY.findall(text)
    )


def _close(text: str) -> int:
    """The index behind the parenthesis that closes the one at the start."""
    depth = 0
    for i, letter in enumerate(text):
        depth += (letter == "(") - (letter == ")")
        if not depth:
            return i + 1
    raise ValueError(f"a parenthesis stays open: {text[:80]}")


def _read_frames(text: str) -> dict[int, str]:
    """Number of a stack frame -> the innermost function, by the tables at the top of a module."""

    def table(title: str) -> Iterator[tuple[int, str]]:
        _, found, rest = text.partition(f"\n{title}\n")
        for line in rest.splitlines() if found else ():
            if not (row := re.match(r"(\d+) (.*)$", line)):
                return
            yield int(row.group(1)), row.group(2)

    names = {number: row.strip('"') for number, row in table("FunctionNames")}
    locations = {
        number: names.get(int(found.group(1)), "")
        for number, row in table("FileLocations")
        if (found := re.search(r"function_name_id=(\d+)", row))
    }
    return {
        number: locations.get(int(found.group(1)), "")
        for number, row in table("StackFrames")
        if (found := re.search(r"file_location_id=(\d+)", row))
    }


_THUNK = re.compile(r"(\s*)(\d+): k(\w+)\s+\[[^\]]*\]\s*(\S*)(?:\s+grid: \[([\d, ]*)\])?")
_NOT_KERNELS = ("While", "Conditional", "Sequential", "CommandBuffer", "Call", "WaitForStreams")


def read_thunks(sequence: str, metadata: str) -> list[Thunk]:
    """The kernels, copies and calls of libraries, from two dumps: the sequence after all passes of
    thunks, and the metadata that names the instruction of each."""
    instructions = {
        int(number): name
        for name, number in re.findall(r'profile_annotation: "([^"]*)"\s+thunk_id: (\d+)', metadata)
    }
    thunks, buffers = list[Thunk](), list[int]()
    for line in sequence.splitlines():
        found = re.match(
            r"(\s*)(\d+): k(\w+)\s+\[[^\]]*\]\s*(\S*)(?:\s+grid: \[([\d, ]*)\])?", line
        )
        if found is None:
            continue
        depth, number, kind, name, grid = len(found[1]), int(found[2]), found[3], found[4], found[5]
        while buffers and depth <= buffers[-1]:
            buffers.pop()
        if kind == "CommandBuffer":
            buffers.append(depth)
        if kind in _NOT_KERNELS:
            continue
        programs = math.prod(map(int, grid.split(","))) if grid else 0
        # what has no name of its own is printed with a remark in parentheses
        name = kind if name.startswith("(") else name
        thunks.append(Thunk(name, instructions.get(number, name), programs, bool(buffers)))
    return thunks


def count_command_buffers(sequence: str) -> int:
    """How many there are in a dump of the sequence."""
    return len(re.findall(r"\d+: kCommandBuffer\b", sequence))


def sum_bytes(arrays: Sequence[Array]) -> int:
    """Of several values."""
    return sum(array.bytes for array in arrays)
