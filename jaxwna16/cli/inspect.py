"""`jaxwna16 inspect`: what a checkpoint holds, without reading a weight.

It is meant to take 2 s for any checkpoint: headers only, and flax is not imported.
"""

from __future__ import annotations

import argparse
import gc
import math
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from jaxwna16.cli.arguments import DTYPES, add_checkpoint, add_json

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from jaxwna16.models.config.language_config import LanguageConfig
    from loaders.errors import Fault
    from loaders.plan import Plan

_BF16_BYTES = 2
_LISTED, _LINES = 3, 100
_MOST_ROWS = 2000


def configure(parser: argparse.ArgumentParser) -> None:
    parser.description = "Show what a checkpoint holds, layer by layer. No weight is read."
    add_checkpoint(parser)
    add_json(parser, sys.modules[__name__])


def run(args: argparse.Namespace) -> dict[str, Any]:
    with _without_collector():
        return _inspect(args.checkpoint, args.follow_links)


@contextmanager
def _without_collector() -> Iterator[None]:
    """Turn garbage collection off: a plan has no garbage, and the search takes half of the time."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _inspect(checkpoint: str, follow_links: bool) -> dict[str, Any]:
    from jaxwna16.checkpoints.load import resolve_folder
    from jaxwna16.cli import ignored, rows
    from jaxwna16.cli.backends import (
        describe_lack_of_devices,
        list_backends,
        spare_device_memory,
    )
    from jaxwna16.cli.faults import describe_error
    from jaxwna16.models.config.language_config import describe_length
    from jaxwna16.models.filling.skipped import find_skipped, list_rules
    from loaders.converted.converted import ConvertedPlan
    from loaders.errors import CheckpointError
    from loaders.open import open_survey

    spare_device_memory()
    folder = resolve_folder(checkpoint)
    survey = open_survey(folder, headers_only=True, follow_links=follow_links)
    plan = survey.plan
    model, support = _describe_support(plan)
    names = [*plan.quantized, *plan.plain]
    skipped = find_skipped(list_rules(model), names) if model is not None else {}
    architectures, odd = _read_architectures(plan)
    lack = describe_lack_of_devices()
    is_copy = isinstance(plan, ConvertedPlan)
    left_out = [] if is_copy else ignored.count_ignored(plan)
    quantized = rows.list_module_rows(plan, skipped, support["dtype"], lack)
    widths = sorted({module.spec.bits for module in plan.quantized.values()})
    report = {
        "folder": str(plan.folder),
        "converted_from": plan.source if is_copy else None,
        "model_type": plan.config.get("model_type"),
        "architectures": architectures,
        "load_model": support,
        "quantized": quantized,
        "plain": rows.list_tensor_rows(plan.plain, skipped),
        "ignored": left_out,
        "skipped": rows.list_skipped(plan, skipped),
        "unplanned": rows.list_tensor_rows(survey.unplanned, {}),
        "absent": rows.list_absent_rows(survey),
        "totals": _add_up(plan, quantized),
        "backends": [] if lack else list_backends(widths),
        "warnings": [
            *plan.warnings,
            *ignored.word_near(left_out),
            *([] if model is None else describe_length(model)),
        ],
    }
    if faults := [*survey.faults, *odd]:
        report["error"] = describe_error(CheckpointError(plan.folder, faults))
    return report


def _read_architectures(plan: Plan) -> tuple[list[str], list[Fault]]:
    """The names of the model's classes, which nothing else reads; and what is wrong with them."""
    from loaders.errors import Fault
    from loaders.files.small_files import CONFIG

    found = plan.config.get("architectures") or []
    if isinstance(found, list) and all(isinstance(name, str) for name in found):
        return found, []
    way_out = "write the name of the model's class, or nothing"
    return [], [
        Fault(f"expected a list of names, found {found!r}", CONFIG, "architectures", way_out)
    ]


def _describe_support(plan: Plan) -> tuple[LanguageConfig | None, dict[str, Any]]:
    """The configuration if `load_model` supports the model of config.json, and the report on it."""
    from jaxwna16.errors import ModelError
    from jaxwna16.models.families import parse_config

    stated = (plan.config.get(key) for key in ("dtype", "torch_dtype"))
    dtype = next((name for name in stated if name in DTYPES), "float32")
    try:
        model = parse_config(plan.config)
    except ModelError as error:
        reasons = list(error.reasons) or [error.summary]
        return None, {"supported": False, "reasons": reasons, "dtype": dtype}
    return model, {"supported": True, "reasons": [], "dtype": model.dtype or "float32"}


def _add_up(plan: Plan, quantized: list[dict[str, Any]]) -> dict[str, Any]:
    packed = sum(row["count"] * row["in_features"] * row["out_features"] for row in quantized)
    biases = sum(row["count"] * row["out_features"] for row in quantized if row["bias"])
    parameters = packed + biases + sum(math.prod(info.shape) for info in plan.plain.values())
    quantized_bytes = sum(row["bytes"] for row in quantized)
    nbytes = quantized_bytes + sum(info.nbytes for info in plan.plain.values())
    return {
        "parameters": parameters,
        "quantized_parameters": packed,
        "bytes": nbytes,
        "quantized_bytes": quantized_bytes,
        "plain_bytes": nbytes - quantized_bytes,
        "extra_bytes": sum(row["extra_bytes"] for row in quantized),
        "bits_per_weight": 8 * quantized_bytes / packed if packed else None,
        "bfloat16_bytes": _BF16_BYTES * parameters,
        "ratio": _BF16_BYTES * parameters / nbytes if nbytes else None,
    }


def show(report: dict[str, Any], console: Console) -> None:
    from jaxwna16.cli.screen import make_facts
    from loaders.errors import escape_line

    kind = ", ".join(map(str, report["architectures"])) or report["model_type"] or "no architecture"
    console.print(escape_line(f"{report['folder']}: {kind}"), style="bold")
    console.print()
    console.print(_make_table(report))
    console.print()
    console.print(make_facts(_list_facts(report)))


def _make_table(report: dict[str, Any]) -> Table:
    from jaxwna16.cli.screen import make_table

    table = make_table("", "module", "shape", "kind", "size", numbers=("", "size"))
    rows = [row for name in ("quantized", "plain", "unplanned") for row in report[name]]
    rows = sorted(rows, key=lambda row: bool(row["skipped"]))
    for row in rows[:_MOST_ROWS]:
        if "modules" in row:
            shape = (row["out_features"], row["in_features"])
            table.add_row(*_make_cells(row["modules"], shape, _name_scheme(row), row))
        else:
            name = row["tensors"].removesuffix(".weight")
            table.add_row(*_make_cells(name, row["shape"], row["dtype"], row))
    return table


def _list_facts(report: dict[str, Any]) -> list[tuple[str, str]]:
    from jaxwna16.cli.backends import word_choices
    from jaxwna16.cli.screen import count
    from loaders.errors import list_first

    facts = list(_word_sizes(report["totals"], report["quantized"]))
    listed = sum(len(report[name]) for name in ("quantized", "plain", "unplanned"))
    if listed > _MOST_ROWS:
        facts.append(("table", f"{listed - _MOST_ROWS:,} more rows, which --json has"))
    if report["converted_from"] is not None:
        facts.append(("converted", f"from {report['converted_from']}"))
    dtype = report["load_model"]["dtype"]
    facts += [
        ("backend", line) for line in word_choices(report["quantized"], report["backends"], dtype)
    ]
    if report["load_model"]["supported"]:
        facts.append(("load_model", f"supports this {report['model_type']} model"))
    else:
        facts.append(("load_model", "does not support this model (load_checkpoint reads it):"))
        facts += [("", reason) for reason in report["load_model"]["reasons"]]
    facts += [("ignored", _word_ignored(row)) for row in report["ignored"]]
    facts += [("skipped", _word_skipped(entry)) for entry in report["skipped"]]
    if tensors := sum(row["count"] for row in report["unplanned"]):
        facts.append(("faulty", f"{count(tensors, 'tensor')} in the table, see the errors"))
    facts += [("absent", line) for line in list_first(_word_absent(report["absent"]), _LINES)]
    return facts + [("warning", warning) for warning in report["warnings"]]


def _word_absent(rows: list[dict[str, Any]]) -> list[str]:
    from jaxwna16.cli.screen import count

    files: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        files.setdefault(row["file"], []).append(row)
    return [
        f"{file}: {count(sum(row['count'] for row in found), 'module')}, "
        + ", ".join(row["modules"] for row in found[:_LISTED])
        + (", …" if len(found) > _LISTED else "")
        for file, found in files.items()
    ]


def _word_ignored(row: dict[str, Any]) -> str:
    entries = f" ({row['entries']} entries)" if row["entries"] > 1 else ""
    share = f"{row['modules']} of {row['of']} modules" if row["modules"] else "no module"
    return f"{row['entry']}{entries}: {share}"


def _word_skipped(entry: dict[str, Any]) -> str:
    from rich.filesize import decimal

    from jaxwna16.cli.screen import count

    what = [
        count(entry[thing], name)
        for thing, name in (("modules", "quantized module"), ("tensors", "other tensor"))
        if entry[thing]
    ]
    return f"{' and '.join(what)}, {decimal(entry['bytes'])}, by load_model: {entry['reason']}"


def _word_sizes(totals: dict[str, Any], rows: list[dict[str, Any]]) -> Iterator[tuple[str, str]]:
    from rich.filesize import decimal

    parts = f"{decimal(totals['bytes'])} for {_round_count(totals['parameters'])} parameters"
    if totals["quantized_parameters"]:
        parts += (
            f": {decimal(totals['quantized_bytes'])} quantized at {totals['bits_per_weight']:.2f} "
            f"bits per weight, {decimal(totals['plain_bytes'])} not quantized"
        )
    yield "size", parts
    if totals["extra_bytes"]:
        ways = ["to 4 or 8 bits"] if any(row["widened_to"] for row in rows) else []
        ways += ["to whole groups"] if any(row["divided_to"] for row in rows) else []
        more = decimal(totals["extra_bytes"])
        yield "widened", f"{' and '.join(ways)} in memory: {more} more"
    if totals["bytes"]:
        yield "bfloat16", f"{decimal(totals['bfloat16_bytes'])}, {totals['ratio']:.2f} times that"


def _make_cells(name: str, shape: Iterable[int], kind: str, row: dict[str, Any]) -> tuple[str, ...]:
    from rich.filesize import decimal

    from loaders.errors import escape_line

    sizes = " x ".join(map(str, shape)) or "scalar"
    kind += ", skipped" if row["skipped"] else ""
    return str(row["count"]), escape_line(name), sizes, escape_line(kind), decimal(row["bytes"])


def _name_scheme(row: dict[str, Any]) -> str:
    """Such as "W4 g32 asym" or "W8 channel sym"; "W3 g32 sym as W4" if memory has another form."""
    group = "channel" if row["strategy"] == "channel" else f"g{row['group_size']}"
    words = [f"W{row['bits']} {group} {'sym' if row['symmetric'] else 'asym'}"]
    words += [row["packing"].upper()] if row["packing"] in ("awq", "gptq") else []
    words += ["act-order"] if row["act_order"] else []
    held = [f"W{row['widened_to']}"] if row["widened_to"] else []
    held += [f"g{row['divided_to']}"] if row["divided_to"] else []
    words += ["as", *held] if held else []
    return " ".join(words)


def _round_count(number: int) -> str:
    for unit, size in (("B", 10**9), ("M", 10**6), ("k", 10**3)):
        if number >= size:
            return f"{number / size:.1f} {unit}"
    return str(number)
