"""`jaxwna16 inspect`: what a checkpoint holds, without reading a weight."""

from __future__ import annotations

import argparse
import math
import re
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

from jaxwna16.cli.arguments import add_json

if TYPE_CHECKING:
    from rich.console import Console

    from loaders.modules import QuantizedModule
    from loaders.plan import Plan
    from loaders.safetensors_file import TensorInfo

_BF16_BYTES = 2


def configure(parser: argparse.ArgumentParser) -> None:
    parser.description = "Show what a checkpoint holds, layer by layer. No weight is read."
    parser.add_argument("checkpoint", metavar="DIR", help="checkpoint folder, or a name on the hub")
    add_json(parser, sys.modules[__name__])


def run(args: argparse.Namespace) -> dict[str, Any]:
    from jaxwna16.checkpoint import resolve_folder
    from jaxwna16.cli.backends import list_backends, spare_device_memory
    from loaders.plan import make_plan

    spare_device_memory()
    plan = make_plan(resolve_folder(args.checkpoint))
    widths = sorted({module.spec.bits for module in plan.quantized.values()})
    return {
        "folder": str(plan.folder),
        "model_type": plan.config.get("model_type"),
        "architectures": plan.config.get("architectures") or [],
        "load_model": _describe_support(plan),
        "quantized": _group_modules(plan.quantized.values()),
        "plain": _group_tensors(plan.plain.values()),
        "totals": _add_up(plan),
        "backends": list_backends(widths),
        "warnings": list(plan.warnings),
    }


def show(report: dict[str, Any], console: Console) -> None:
    from jaxwna16.cli.backends import word_backends
    from jaxwna16.cli.screen import escape_controls, make_facts, make_table

    kind = ", ".join(map(str, report["architectures"])) or report["model_type"] or "no architecture"
    console.print(escape_controls(f"{report['folder']}: {kind}"), style="bold")
    console.print()
    table = make_table("", "module", "shape", "kind", "size", numbers=("", "size"))
    for row in report["quantized"]:
        shape = (row["out_features"], row["in_features"])
        table.add_row(*_make_cells(row["modules"], shape, _name_scheme(row), row))
    for row in report["plain"]:
        name = row["tensors"].removesuffix(".weight")
        table.add_row(*_make_cells(name, row["shape"], row["dtype"], row))
    console.print(table)
    console.print()
    facts = [*_word_sizes(report["totals"])]
    facts += [("backend", line) for line in word_backends(report["backends"])]
    if report["load_model"]["supported"]:
        facts.append(("load_model", f"supports this {report['model_type']} model"))
    else:
        facts.append(("load_model", "does not support it (load_checkpoint does):"))
        facts += [("", reason) for reason in report["load_model"]["reasons"]]
    facts += [("warning", warning) for warning in report["warnings"]]
    console.print(make_facts(facts))


def _word_sizes(totals: dict[str, Any]) -> Iterator[tuple[str, str]]:
    from rich.filesize import decimal

    parts = f"{decimal(totals['bytes'])} for {_round_count(totals['parameters'])} parameters"
    if totals["quantized_parameters"]:
        parts += (
            f": {decimal(totals['quantized_bytes'])} quantized at {totals['bits_per_weight']:.2f} "
            f"bits a weight, {decimal(totals['plain_bytes'])} not quantized"
        )
    yield "size", parts
    if totals["bytes"]:
        yield "bfloat16", f"{decimal(totals['bfloat16_bytes'])}, {totals['ratio']:.2f} times that"


def _make_cells(name: str, shape: Iterable[int], kind: str, row: dict[str, Any]) -> tuple[str, ...]:
    from rich.filesize import decimal

    from jaxwna16.cli.screen import escape_controls

    sizes = " x ".join(map(str, shape)) or "scalar"
    return str(row["count"]), escape_controls(name), sizes, kind, decimal(row["bytes"])


def _name_scheme(row: dict[str, Any]) -> str:
    """As "W4 g32 asym" or "W8 channel sym"."""
    group = "channel" if row["strategy"] == "channel" else f"g{row['group_size']}"
    return f"W{row['bits']} {group} {'sym' if row['symmetric'] else 'asym'}"


def _group_modules(modules: Iterable[QuantizedModule]) -> list[dict[str, Any]]:
    """Modules that differ in layer and expert numbers alone, in the order of the files."""
    alike: dict[tuple, list[QuantizedModule]] = defaultdict(list)
    for module in modules:
        scale_dtype = module.tensors["weight_scale"].dtype.name
        key = (_make_pattern(module.path), module.spec, scale_dtype, "bias" in module.tensors)
        alike[key].append(module)
    return [
        {
            "modules": pattern,
            "count": len(found),
            "out_features": spec.out_features,
            "in_features": spec.in_features,
            "bits": spec.bits,
            "strategy": "channel" if spec.groups == 1 else "group",
            "group_size": spec.group_size,
            "symmetric": spec.symmetric,
            "scale_dtype": scale_dtype,
            "bias": bias,
            "bytes": sum(module.nbytes for module in found),
        }
        for (pattern, spec, scale_dtype, bias), found in alike.items()
    ]


def _group_tensors(tensors: Iterable[TensorInfo]) -> list[dict[str, Any]]:
    alike: dict[tuple, list[TensorInfo]] = defaultdict(list)
    for info in tensors:
        alike[_make_pattern(info.name), info.shape, info.dtype.name].append(info)
    return [
        {
            "tensors": pattern,
            "count": len(found),
            "shape": list(shape),
            "dtype": dtype,
            "bytes": sum(info.nbytes for info in found),
        }
        for (pattern, shape, dtype), found in alike.items()
    ]


def _make_pattern(name: str) -> str:
    """Stars in place of layer and expert numbers, also of the one in "experts.down_proj[3]"."""
    from jaxwna16.cli.names import star_numbers

    return re.sub(r"\[[0-9]+\]$", "[*]", star_numbers(name))


def _add_up(plan: Plan) -> dict[str, Any]:
    modules, tensors = plan.quantized.values(), plan.plain.values()
    packed = sum(module.spec.in_features * module.spec.out_features for module in modules)
    biases = sum(module.spec.out_features for module in modules if "bias" in module.tensors)
    parameters = packed + biases + sum(math.prod(info.shape) for info in tensors)
    quantized_bytes = sum(module.nbytes for module in modules)
    return {
        "parameters": parameters,
        "quantized_parameters": packed,
        "bytes": plan.nbytes,
        "quantized_bytes": quantized_bytes,
        "plain_bytes": plan.nbytes - quantized_bytes,
        "bits_per_weight": 8 * quantized_bytes / packed if packed else None,
        "bfloat16_bytes": _BF16_BYTES * parameters,
        "ratio": _BF16_BYTES * parameters / plan.nbytes if plan.nbytes else None,
    }


def _describe_support(plan: Plan) -> dict[str, Any]:
    """Whether `load_model` has a definition for what config.json describes."""
    from jaxwna16.errors import ModelError
    from jaxwna16.models.config import ModelConfig

    try:
        ModelConfig.from_dict(plan.config)
    except ModelError as error:
        return {"supported": False, "reasons": list(error.reasons) or [error.summary]}
    return {"supported": True, "reasons": []}


def _round_count(number: int) -> str:
    for unit, size in (("B", 10**9), ("M", 10**6), ("k", 10**3)):
        if number >= size:
            return f"{number / size:.1f} {unit}"
    return str(number)
