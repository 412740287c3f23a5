"""Small kernels written for a test."""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np

from tests.ptx.kernel import Kernel
from tests.ptx.memory import Part

_DECLARED = """
.reg .pred p<10>; .reg .b16 h<20>; .reg .b32 r<60>; .reg .b64 d<30>; .reg .b32 t;
mov.u32 t, %tid.x;
"""
"""Registers that every body has; `t` is the number of the thread."""


def run(
    body: str,
    inputs: Sequence[np.ndarray] = (),
    outputs: Sequence[np.ndarray] = (),
    *,
    threads: int = 128,
    shared: int = 1024,
) -> list[np.ndarray]:
    """Execute one block of a kernel.

    `body` finds the addresses of its arrays in d0, d1, ..., and shared memory at `memory`.
    """
    count = len(inputs) + len(outputs)
    parameters = ", ".join(f".param .u64 .ptr .align 16 a{i}" for i in range(count))
    loads = "".join(f"ld.param.b64 d{i}, [a{i}]; " for i in range(count))
    text = (
        f".extern .shared .align 16 .b8 memory[];\n.visible .entry test({parameters})\n"
        f".reqntid {threads}, 1, 1\n{{ {_DECLARED} {loads} {body} ret; }}"
    )
    kernel = Kernel(text, threads, shared)
    found = kernel.run([Part(a) for a in inputs], [Part(a) for a in outputs], range(1))
    return [array for array, _ in found]


def apply(instruction: str, *operands: np.ndarray, result) -> np.ndarray:
    """What one instruction makes of each of n values.

    Args:
      instruction: of `$0`, the result, and `$1`, `$2`, ..., the operands.
      *operands: [n], of 2, 4 or 8 bytes each, or bool for a predicate.
      result: dtype of the result; bool for a predicate.
    """
    count = operands[0].size
    padded = [np.resize(a.reshape(-1), count + -count % 32) for a in operands]
    bits = [a.astype(np.uint32) if a.dtype == bool else a for a in padded]
    out = np.zeros(padded[0].size, np.uint32 if result is bool else result)
    loads = "".join(
        _load(i, values, is_bool=operand.dtype == bool)
        for i, (values, operand) in enumerate(zip(bits, padded, strict=True))
    )
    size = 8 * out.itemsize
    target = "q0" if result is bool else "x0"
    text = re.sub(
        r"\$(\d)", lambda m: target if m[1] == "0" else _name(int(m[1]), padded), instruction
    )
    select = "selp.b32 x0, 1, 0, q0;" if result is bool else ""
    body = (
        f".reg .b{size} x0; .reg .pred q0; {loads} {text} {select} "
        f"mad.wide.u32 d20, t, {out.itemsize}, d{len(bits)}; st.global.b{size} [d20], x0;"
    )
    [found] = run(body, bits, [out], threads=out.size)
    return (found != 0 if result is bool else found)[:count]


def _name(number: int, operands: list[np.ndarray]) -> str:
    return f"{'q' if operands[number - 1].dtype == bool else 'x'}{number}"


def _load(number: int, values: np.ndarray, *, is_bool: bool) -> str:
    size = values.itemsize
    text = (
        f".reg .b{8 * size} x{number + 1}; mad.wide.u32 d20, t, {size}, d{number}; "
        f"ld.global.b{8 * size} x{number + 1}, [d20]; "
    )
    if is_bool:
        text += f".reg .pred q{number + 1}; setp.ne.b32 q{number + 1}, x{number + 1}, 0; "
    return text
