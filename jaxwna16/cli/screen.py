"""What a terminal is given to show: plain text and tables, no markup in names that come from files."""

from __future__ import annotations

import os
import re

from rich.console import Console
from rich.table import Table
from rich.text import Text

_PIPE_WIDTH = 200
_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def make_console(*, stderr: bool = False) -> Console:
    """A console that writes what it is given; in a pipe, lines are long enough not to be folded."""
    console = Console(stderr=stderr, markup=False, highlight=False, emoji=False)
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console.width = _PIPE_WIDTH
    return console


def make_table(*columns: str, numbers: tuple[str, ...] = ()) -> Table:
    """A table without lines, of these column titles; `numbers` are aligned to the right.

    The first column that holds no numbers gives way where the terminal is narrow.
    """
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    flexible = next(title for title in columns if title not in numbers)
    for title in columns:
        justify = "right" if title in numbers else "left"
        table.add_column(title, justify=justify, no_wrap=title != flexible, overflow="fold")
    return table


def escape_controls(text: str) -> str:
    """Write control characters, which a terminal would obey, as \\x escapes; keep newline and tab."""
    return _CONTROLS.sub(lambda match: f"\\x{ord(match[0]):02x}", text)


def bold(text: str) -> Text:
    """Text in bold."""
    return Text(escape_controls(text), style="bold")


def count(number: float, thing: str) -> str:
    """A number and what is counted: "1 module", "210 modules"."""
    return f"{number:,} {thing}" if number == 1 else f"{number:,} {thing}s"
