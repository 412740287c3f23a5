"""What each instruction does, by its exact text."""

from tests.ptx.opcodes import (
    copies,
    fragments,
    integers,
    loads,
    moves,
    tcgen05,
    warps,
    wgmma,
)
