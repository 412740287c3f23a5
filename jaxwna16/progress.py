"""Progress bars: on stderr, and by default only on a terminal."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from loaders.errors import escape_line
from loaders.stream import Progress as Report


@contextmanager
def show_bytes(title: str, *, visible: bool | None = None) -> Iterator[Report]:
    """Show a bar of bytes while the block runs; `visible` None is: on a terminal only."""
    with _make_bar(DownloadColumn(), TransferSpeedColumn(), visible=visible) as bar:
        task = bar.add_task(escape_line(title), total=None)

        def report(done: int, total: int, name: str) -> None:
            del name
            bar.update(task, completed=done, total=total)

        yield report


@contextmanager
def show_steps(
    title: str, total: int, *, visible: bool | None = None
) -> Iterator[Callable[[int], None]]:
    """Show a bar of `total` steps while the block runs; it calls with the number of new ones."""
    with _make_bar(MofNCompleteColumn(), TimeRemainingColumn(), visible=visible) as bar:
        task = bar.add_task(escape_line(title), total=total)
        yield lambda steps: bar.advance(task, steps)


def _make_bar(*columns: ProgressColumn, visible: bool | None) -> Progress:
    console = Console(stderr=True)
    return Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        *columns,
        console=console,
        disable=not (console.is_terminal if visible is None else visible),
        transient=visible is None,
    )
