"""Text and tables for the terminal. Names from files are printed as plain text, never as markup."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterable

from rich.console import Console
from rich.table import Table

from loaders.errors import escape_line

_PIPE_WIDTH = 200
_CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


def make_console(*, stderr: bool = False) -> Console:
    """A console that prints text unchanged; in a pipe, lines are wide enough not to be folded."""
    console = Console(stderr=stderr, markup=False, highlight=False, emoji=False)
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console.width = _PIPE_WIDTH
    return console


def make_table(*columns: str, numbers: tuple[str, ...] = ()) -> Table:
    """A table without lines, with these column titles; `numbers` are aligned to the right.

    If the terminal is narrow, the first column without numbers shrinks.
    """
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    flexible = next(title for title in columns if title not in numbers)
    for title in columns:
        justify = "right" if title in numbers else "left"
        table.add_column(title, justify=justify, no_wrap=title != flexible, overflow="fold")
    return table


def make_facts(rows: Iterable[tuple[str, str]]) -> Table:
    """A table of labels and texts, in two columns."""
    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for label, text in rows:
        table.add_row(label, escape_line(text))
    return table


def show_text(text: str, *, raw: bool = False) -> str:
    """A generated text as it is printed on stdout: unchanged if that is asked for, or in a pipe."""
    return text if raw or not sys.stdout.isatty() else escape_controls(text)


def escape_controls(text: str) -> str:
    """Write what a terminal obeys as escapes; newline and tab stay.

    These are control characters, and those that turn the direction of the text after them.
    """
    return _CONTROLS.sub(lambda match: match[0].encode("unicode_escape").decode(), text)


def count(number: float, thing: str) -> str:
    """A number and its noun: "1 module", "210 modules"."""
    return f"{number:,} {thing}" if number == 1 else f"{number:,} {thing}s"
