"""Inline assembly by itself: what the few instructions do that the kernels write by hand.

It runs on the package that runs whole kernels, with the arguments in threads of their own.
"""

from __future__ import annotations

import numpy as np

from tests.ptx.block import LANES, Block
from tests.ptx.faults import Fault
from tests.ptx.memory import Global
from tests.ptx.parse import Body, Instruction, Program, Refused, Register
from tests.ptx.registers import Registers
from tests.ptx.schedule import Schedule, link

_RESULT = "$0"


def run(asm: str, *arguments: np.ndarray) -> np.ndarray:
    """Run one block of inline PTX.

    Args:
      asm: instructions on `$0` (the result), `$1`, ... (the arguments) and declared registers.
      *arguments: uint32 [n], the values of `$1` and following.

    Returns:
      uint32 [n], the value of `$0`.

    Raises:
      ValueError: naming the instruction that is not known, or does what it must not.
    """
    try:
        return _run(asm, arguments)
    except (Fault, Refused) as error:
        raise ValueError(f"cannot evaluate: {error}") from None


def _run(asm: str, arguments: tuple[np.ndarray, ...]) -> np.ndarray:
    names = [f"${i}" for i in range(1, len(arguments) + 1)]
    body = Body(asm, dict.fromkeys((_RESULT, *names), "b32"))
    code = body.link()
    for place, instruction in enumerate(code):
        _expect_fair(code[:place], instruction, names)
    count = len(arguments[0])
    program = Program("inline", (), count + -count % LANES, (), body.registers, code)
    block = Block(program, Global((), ()), 0)
    for name, values in zip(names, arguments, strict=True):
        _fill(block.registers, name, values.astype(np.uint32))
    Schedule(block, code, link(code)).run(returns=False)
    return block.registers.read(_RESULT, None)[:count]


def _fill(registers: Registers, name: str, values: np.ndarray) -> None:
    """Threads past the end repeat the last value."""
    more = np.full(registers.threads - len(values), values[-1])
    registers.write(name, np.concatenate([values, more]), None)


def _expect_fair(before: tuple[Instruction, ...], instruction: Instruction, names: list) -> None:
    """Arguments are not written, and not read after the result, which may share a register."""
    target, *sources = instruction.operands
    late = any(_is_named(i.operands[0], [_RESULT]) for i in before)
    late = late and any(_is_named(source, names) for source in sources)
    if late or not isinstance(target, Register) or _is_named(target, names):
        raise Refused(instruction.text)


def _is_named(operand, names: list[str]) -> bool:
    return isinstance(operand, Register) and operand.name in names
