"""What a GPU would not tell."""

from __future__ import annotations


class Fault(Exception):
    """The kernel does what the PTX ISA leaves undefined, or what no correct kernel does."""


class EarlyRead(Fault):
    """A register is read between `tcgen05.ld`, which fills it, and the wait.

    The PTX ISA leaves that undefined. XLA's compiler does it for sm_100a since jax 0.12, where
    LLVM knows the load but not what the wait is for. NVIDIA's assembler saves it: it makes the
    first use wait for the load, as for a load of any other memory.
    """


def check(fine, what: str) -> None:
    """Raise `Fault` unless `fine`, a bool or an array of them that must all hold."""
    if fine is not True and not (fine is not False and fine.all()):
        raise Fault(what)
