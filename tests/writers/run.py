"""Other tools quantize models, and what they write is checked; a table of what became of it.

    python -m tests.writers.run                            all; writes a part of docs/reliability.md
    python -m tests.writers.run --model mixtral olmo2      these models alone, and writes nothing
    python -m tests.writers.run --writer AutoRound         this writer alone, and writes nothing
    python -m tests.writers.run --every-setting            for all models, three hours
    python -m tests.writers.run --keep FOLDER              the checkpoints stay there

`make test-writers` makes the environments of the writers first. The exit code is 1 if a folder that
was written does not load, does not pass `verify --oracle`, or gives other logits. A writer that
fails by itself is no fault of ours, and the table says so.
"""

from __future__ import annotations

import argparse
import datetime
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")

import jax

from tests.fuzz.run import REPORT, keep_part
from tests.writers.check import Outcome, check
from tests.writers.orders import (
    SETTINGS,
    WRITERS,
    Setting,
    Writer,
    WriterError,
    list_settings,
    report,
)
from tests.writers.sources import NAMES, Source, write_source
from tests.writers.table import MARK, Key, describe


def main() -> int:
    """Run everything and print, or write, this part of the report; the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--model", nargs="+", choices=NAMES, default=NAMES)
    parser.add_argument("--writer", nargs="+", choices=WRITERS, default=tuple(WRITERS))
    parser.add_argument("--every-setting", action="store_true")
    parser.add_argument("--keep", type=Path, metavar="FOLDER")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary) if args.keep is None else args.keep
        chosen = {
            model: SETTINGS if args.every_setting else list_settings(model) for model in args.model
        }
        part, faulty = run(root, chosen, args.writer, is_kept=args.keep is not None)
    if not faulty and len(args.model) == len(NAMES) and len(args.writer) == len(WRITERS):
        REPORT.write_text(keep_part(REPORT.read_text("utf-8"), MARK, part), encoding="utf-8")
    print(part)
    return 1 if faulty else 0


def run(root: Path, chosen: dict[str, list[Setting]], writers, *, is_kept: bool) -> tuple[str, int]:
    """This part of the report, and how many folders were faulty."""
    start = time.perf_counter()
    root.mkdir(parents=True, exist_ok=True)
    outcomes: dict[Key, dict[Setting, Outcome]] = {}
    hands = {name: start_writer(name, root / f"{name}.log") for name in writers}
    for model, settings in chosen.items():
        source = write_source(model, root)
        for name, writer in hands.items():
            outcomes[Key(model, name)] = {
                setting: try_setting(writer, name, source, setting, is_kept=is_kept)
                for setting in settings
            }
        if not is_kept:
            shutil.rmtree(root / model)
        jax.clear_caches()  # of programs, one for each kind of scheme, which no other model shares
    versions = {}
    for name, writer in hands.items():
        versions[name] = writer.versions if isinstance(writer, Writer) else {}
        if isinstance(writer, Writer):
            writer.stop()
    minutes = (time.perf_counter() - start) / 60
    faulty = sum(bool(o.our_error) for found in outcomes.values() for o in found.values())
    return describe(outcomes, versions, f"{datetime.date.today():%d %B %Y}", minutes), faulty


def start_writer(name: str, log: Path) -> Writer | str:
    """The writer's process, or why there is none."""
    try:
        return Writer(name, log)
    except WriterError as error:
        report(f"{name}: {error}")
        return str(error)


def try_setting(
    writer: Writer | str, name: str, source: Source, setting: Setting, *, is_kept: bool
) -> Outcome:
    """Have one folder written, and check it."""
    folder = source.folder.with_name(f"{name} {setting}".replace(" ", "-"))
    error = writer if isinstance(writer, str) else writer.write(source, setting, folder)
    outcome = Outcome(writer_error=error) if error else check(folder, source.tokens)
    words = error or outcome.our_error or f"good, {outcome.difference:.1e}"
    report(f"{source.folder.parent.name}, {name}, {setting}: {words}")
    if not is_kept:
        shutil.rmtree(folder, ignore_errors=True)
    return outcome


if __name__ == "__main__":
    sys.exit(main())
