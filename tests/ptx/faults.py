"""What a GPU would not tell."""

from __future__ import annotations


class Fault(Exception):
    """The kernel does what the PTX ISA leaves undefined, or what no correct kernel does."""


def check(fine, what: str) -> None:
    """Raise `Fault` unless `fine`, a bool or an array of them that must all hold."""
    if fine is not True and not (fine is not False and fine.all()):
        raise Fault(what)
