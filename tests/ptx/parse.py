"""PTX text -> one kernel's instructions, with every name resolved.

Source: PTX ISA, chapters "Syntax" and "State Spaces, Types, and Variables". Registers of a nested
`{ ... }` are visible in it alone, and so are its labels: inline assembly declares the same names
again and again. Directives that carry no meaning (`.loc`, `.pragma`) are skipped, others refused.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator


class Refused(ValueError):
    """The text says something that this package does not know; it never guesses."""


@dataclasses.dataclass(frozen=True)
class Register:
    """A register by a name that no other scope has; `kind` is the type it was declared with."""

    name: str
    kind: str


@dataclasses.dataclass(frozen=True)
class Negated:
    """`!p`."""

    register: Register


@dataclasses.dataclass(frozen=True)
class Literal:
    """A number; of a float its bits."""

    value: int


@dataclasses.dataclass(frozen=True)
class Symbol:
    """A special register, a parameter, a variable or a label."""

    name: str


@dataclasses.dataclass(frozen=True)
class Vector:
    """`{a, b}`."""

    items: tuple


@dataclasses.dataclass(frozen=True)
class Address:
    """`[base + offset]`."""

    base: Register | Symbol
    offset: int


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One instruction.

    Attributes:
      opcode: with all its suffixes, the exact text.
      operands: as they stand; `a|b` are two.
      guard: the predicate after `@`, if any.
      text: the whole, for messages.
      target: where a branch leads, a number of an instruction.
    """

    opcode: str
    operands: tuple
    guard: Register | Negated | None
    text: str
    target: int | None = None


@dataclasses.dataclass(frozen=True)
class Variable:
    """A variable of the module. Size 0 is what the launch adds; `data` fills it from its start."""

    name: str
    space: str
    align: int
    size: int
    data: bytes = b""


@dataclasses.dataclass(frozen=True)
class Program:
    """One kernel."""

    name: str
    parameters: tuple[str, ...]
    threads: int
    variables: tuple[Variable, ...]
    registers: dict[str, str]
    code: tuple[Instruction, ...]


_NAME = r"[%$\w][%$\w.]*"
_VARIABLE = re.compile(
    r"\.(shared|global)\s+\.align\s+(\d+)\s+\.b8\s+([\w$]+)\[(\d*)\](?:\s*=\s*\{([^}]*)\})?"
)
_LABEL = re.compile(r"([$\w]+):(?!:)")
_MEANINGLESS = {".loc", ".pragma", ".file"}


def parse(text: str) -> Program:
    """Read the one kernel of a module.

    Raises:
      Refused: naming what is not known.
    """
    text = re.sub(r"//[^\n]*", "", text)
    if text.count(".entry") != 1:
        raise Refused(f"{text.count('.entry')} kernels in a module")
    before, kernel = text.split(".entry")
    head, _, rest = kernel.partition("{")
    body = Body(rest[: rest.rindex("}")])
    [name] = re.findall(r"^\s*([\w$]+)", head)
    [threads] = re.findall(r"\.(?:req|max)ntid\s+(\d+)(?:,\s*1)*\s", head)
    parameters = re.findall(
        r"\.param\s+\.u64\s+\.ptr\s+(?:\.global\s+)?\.align\s+\d+\s+([\w$]+)", head
    )
    if len(parameters) != head.count(".param"):
        raise Refused(f"parameters that are no pointers: {head}")
    variables = [_read_variable(found) for found in _VARIABLE.finditer(before)]
    return Program(
        name,
        tuple(parameters),
        int(threads),
        (*variables, *body.variables),
        body.registers,
        body.link(),
    )


def _read_variable(found: re.Match) -> Variable:
    space, align, name, size, data = found.groups()
    values = bytes(int(value, 0) for value in (data or "").split(",") if value.strip())
    return Variable(name, space, int(align), int(size or 0), values)


class Body:
    """The statements between the braces of a kernel, or of a piece of inline assembly."""

    def __init__(self, text: str, registers: dict[str, str] | None = None):
        """`registers`: names declared outside -> types."""
        self.registers = dict(registers or {})
        self.variables: list[Variable] = []
        self._scopes = [{name: Register(name, kind) for name, kind in self.registers.items()}]
        self._labels: list[dict[str, int]] = [{}]
        self._code: list[tuple[Instruction, list[dict[str, int]]]] = []
        self._count = 0
        for kind, statement in _split(text):
            getattr(self, f"_take_{kind}")(statement)

    def link(self) -> tuple[Instruction, ...]:
        """The instructions, with the targets of branches."""
        return tuple(_set_target(instruction, labels) for instruction, labels in self._code)

    def _take_open(self, _: str) -> None:
        self._count += 1
        self._scopes.append({})
        self._labels.append({})

    def _take_close(self, _: str) -> None:
        self._scopes.pop()
        self._labels.pop()

    def _take_label(self, name: str) -> None:
        self._labels[-1][name] = len(self._code)

    def _take_statement(self, text: str) -> None:
        if text.startswith(".reg"):
            self._declare(text)
        elif found := _VARIABLE.fullmatch(text):
            self.variables.append(_read_variable(found))
        elif not text.startswith("."):
            self._code.append((self._read_instruction(text), list(self._labels)))
        elif text.split()[0] not in _MEANINGLESS:
            raise Refused(text)

    def _declare(self, text: str) -> None:
        """`.reg .b32 %r<3>, t;`"""
        found = re.fullmatch(r"\.reg\s+\.(\w+)\s+(.*)", text)
        if not found:
            raise Refused(text)
        kind, names = found.groups()
        for name in map(str.strip, names.split(",")):
            many = re.fullmatch(r"(.*)<(\d+)>", name)
            each = [f"{many[1]}{i}" for i in range(int(many[2]))] if many else [name]
            for one in each:
                unique = f"{one}@{self._count}" if len(self._scopes) > 1 else one
                self._scopes[-1][one] = Register(unique, kind)
                self.registers[unique] = kind

    def _read_instruction(self, text: str) -> Instruction:
        found = re.fullmatch(rf"(?:@(!?{_NAME})\s+)?([\w.:]+)\s*(.*)", text)
        if not found:
            raise Refused(text)
        guard, opcode, rest = found.groups()
        operands = tuple(self._read_operand(operand) for operand in _split_operands(rest))
        return Instruction(opcode, operands, self._read_operand(guard) if guard else None, text)

    def _read_operand(self, text: str):
        if text.startswith("{"):
            return Vector(tuple(self._read_operand(item) for item in _split_operands(text[1:-1])))
        if text.startswith("["):
            return self._read_address(text)
        if text.startswith("!"):
            return Negated(self._find(text[1:]))
        if re.fullmatch(r"0[fF][0-9A-Fa-f]{8}", text):
            return Literal(int(text[2:], 16))
        if re.fullmatch(r"-?(0[xX][0-9A-Fa-f]+|0|[1-9]\d*)U?", text):
            return Literal(int(text.removesuffix("U"), 0))
        if re.fullmatch(_NAME, text) and not text[0].isdigit():
            return self._find(text)
        raise Refused(f"operand {text}")

    def _read_address(self, text: str) -> Address:
        found = re.fullmatch(rf"\[\s*({_NAME})\s*(?:\+\s*(-?\w+))?\s*\]", text)
        if not found:
            raise Refused(f"address {text}")
        return Address(self._find(found[1]), int(found[2] or "0", 0))

    def _find(self, name: str) -> Register | Symbol:
        scope = next((scope for scope in reversed(self._scopes) if name in scope), None)
        return Symbol(name) if scope is None else scope[name]


def _split(text: str) -> Iterator[tuple[str, str]]:
    """Statements, labels and the braces of scopes, in order."""
    place = 0
    while True:
        while place < len(text) and text[place].isspace():
            place += 1
        if place == len(text):
            return
        if text[place] in "{}":
            yield ("open" if text[place] == "{" else "close"), ""
            place += 1
        elif found := _LABEL.match(text, place):
            yield "label", found[1]
            place = found.end()
        else:
            end = text.find(";", place)
            if end < 0:
                raise Refused(f"no semicolon after {text[place:].strip()}")
            if statement := " ".join(text[place:end].split()):
                yield "statement", statement
            place = end + 1


def _split_operands(text: str) -> list[str]:
    """At commas, and at the bar of two results, outside of braces and brackets."""
    items, depth, start = [], 0, 0
    for place, letter in enumerate(text):
        depth += (letter in "{[") - (letter in "}]")
        if letter in ",|" and depth == 0:
            items.append(text[start:place])
            start = place + 1
    items.append(text[start:])
    return [item.strip() for item in items if item.strip()]


def _set_target(instruction: Instruction, labels: list[dict[str, int]]) -> Instruction:
    if not instruction.opcode.startswith("bra"):
        return instruction
    [label] = instruction.operands
    places = [scope[label.name] for scope in reversed(labels) if label.name in scope]
    if not places:
        raise Refused(f"no label for {instruction.text}")
    return dataclasses.replace(instruction, target=places[0])
