"""Progress bars: on stderr, and by default only on a terminal."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

from loaders.stream import Progress as Report


@contextmanager
def show_bytes(title: str, *, visible: bool | None = None) -> Iterator[Report]:
    """Show a bar of bytes while the block runs; `visible` None is: on a terminal only."""
    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
    )
    disable = not (console.is_terminal if visible is None else visible)
    with Progress(*columns, console=console, disable=disable, transient=visible is None) as bar:
        task = bar.add_task(title, total=None)

        def report(done: int, total: int, name: str) -> None:
            del name
            bar.update(task, completed=done, total=total)

        yield report
