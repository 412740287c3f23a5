"""Every error this project raises on purpose descends from `Wna16Error`."""


class Wna16Error(Exception):
    """Base of all errors of this package. The command line prints them without a traceback."""


class SpecError(Wna16Error, ValueError):
    """A `QuantSpec` is impossible, or arrays contradict it."""


class BackendError(Wna16Error, ValueError):
    """The named backend cannot run this call. No other backend is tried instead."""


class TableError(Wna16Error, ValueError):
    """A table of tuned tiles cannot be used; the message names the file and the entry."""
