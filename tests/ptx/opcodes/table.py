"""The opcodes that are known, by their exact text."""

from __future__ import annotations

from collections.abc import Callable

import ml_dtypes
import numpy as np

from tests.ptx.block import Block
from tests.ptx.parse import Instruction, Refused

TYPES = {
    **{f"{letter}{8 * size}": np.dtype(f"u{size}") for size in (1, 2, 4, 8) for letter in "bu"},
    **{f"s{8 * size}": np.dtype(f"i{size}") for size in (1, 2, 4, 8)},
    "pred": np.dtype(np.bool_),
    "f16": np.dtype(np.float16),
    "bf16": np.dtype(ml_dtypes.bfloat16),
    "f32": np.dtype(np.float32),
}
"""The types that opcodes end with."""

Action = Callable[[Block, Instruction, "np.ndarray | None"], "np.ndarray | None"]
OPCODES: dict[str, Action] = {}


def opcode(*names: str) -> Callable[[Action], Action]:
    """Declare what some opcodes do. The action gets the threads that execute it: None for all."""

    def declare(action: Action) -> Action:
        for name in names:
            if name in OPCODES:
                raise ValueError(f"{name} is declared twice")
            OPCODES[name] = action
        return action

    return declare


def pure(name: str, result: str, *operands: str, more: int = 0) -> Callable[[Callable], Callable]:
    """Declare an opcode that computes its first operand from the others, thread by thread.

    Args:
      name: the opcode.
      result: type of the result; the function may return another of the same width.
      *operands: types of the others, in whose dtype the function gets their values.
      more: how many operands of the last type may follow.
    """
    dtypes, out = [TYPES[kind] for kind in operands], TYPES[result]

    def declare(function: Callable) -> Callable:
        def act(block: Block, instruction: Instruction, active) -> None:
            target, *sources = instruction.operands
            extra = len(sources) - len(dtypes)
            if not 0 <= extra <= more:
                raise Refused("number of operands")
            values = [
                block.read(source, dtype, active)
                for source, dtype in zip(sources, dtypes + dtypes[-1:] * extra, strict=True)
            ]
            block.write(target, _keep_bits(function(*values), out), active)

        opcode(name)(act)
        return function

    return declare


def _keep_bits(value: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """`value` in `dtype`, or the bits of it in the integer that `dtype` is kept in."""
    if value.dtype != dtype and value.dtype.itemsize != dtype.itemsize:
        raise TypeError(f"{value.dtype} for {dtype}")
    return value if dtype == np.bool_ else value.view(f"u{dtype.itemsize}")
