"""`jaxwna16 verify`: reads every tensor of a checkpoint and checks everything there is to check."""

from __future__ import annotations

import argparse
import sys
import time
from typing import TYPE_CHECKING, Any

from jaxwna16.cli.arguments import add_json

if TYPE_CHECKING:
    import numpy as np
    from rich.console import Console

    from loaders.errors import Fault
    from loaders.plan import Plan
    from loaders.safetensors_file import TensorInfo


def configure(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Read every tensor of a checkpoint and check the files, the scheme of each module, the "
        "numbers, and whether the model that config.json names finds all its tensors. Lists every "
        "fault; the exit code is 1 if there is one."
    )
    parser.add_argument("checkpoint", metavar="DIR", help="checkpoint folder, or a name on the hub")
    add_json(parser, sys.modules[__name__])


def run(args: argparse.Namespace) -> dict[str, Any]:
    from jaxwna16.checkpoint import resolve_folder
    from loaders.errors import CheckpointError
    from loaders.plan import make_plan

    started = time.perf_counter()
    plan = make_plan(resolve_folder(args.checkpoint))
    model, faults = _check_model(plan)
    number_faults, warnings = _check_numbers(plan)
    if faults or number_faults:
        raise CheckpointError(plan.folder, [*faults, *number_faults])
    return {
        "folder": str(plan.folder),
        "modules": len(plan.quantized),
        "tensors": len(plan.plain),
        "bytes": plan.nbytes,
        "seconds": time.perf_counter() - started,
        "model": model,
        "warnings": [*plan.warnings, *warnings],
    }


def show(report: dict[str, Any], console: Console) -> None:
    from rich.filesize import decimal

    from jaxwna16.cli.screen import count, escape_controls

    for warning in report["warnings"]:
        console.print(escape_controls(f"warning: {warning}"))
    if report["model"]["checked"]:
        console.print(f"the {report['model']['model_type']} model finds every tensor it needs")
    else:
        console.print(escape_controls(f"model not checked: {report['model']['reason']}"))
    console.print(
        f"good: {count(report['modules'], 'quantized module')} and "
        f"{count(report['tensors'], 'other tensor')}, {decimal(report['bytes'])} read "
        f"and checked in {report['seconds']:.1f} s"
    )


def _check_model(plan: Plan) -> tuple[dict[str, Any], list[Fault]]:
    """What became of the check of the model's tensors, and the faults that it found."""
    from jaxwna16.cli.faults import read_reason
    from jaxwna16.errors import ModelError
    from jaxwna16.language import plan_model
    from jaxwna16.models.config import ModelConfig

    facts = {"model_type": plan.config.get("model_type"), "checked": True, "reason": ""}
    try:
        ModelConfig.from_dict(plan.config)
    except ModelError as error:
        reason = "; ".join([error.summary, *error.reasons])
        return facts | {"checked": False, "reason": reason}, []
    try:
        plan_model(plan)
    except ModelError as error:
        return facts, [read_reason(reason) for reason in error.reasons]
    return facts, []


def _check_numbers(plan: Plan) -> tuple[list[Fault], list[str]]:
    """Faults and warnings about the values, read one module at a time."""
    from jaxwna16.progress import show_bytes
    from loaders.safetensors_file import TensorInfo
    from loaders.stream import check_padding, check_values, read_parts

    faults: list[Fault] = []
    warnings: list[str] = []
    done = 0
    with show_bytes(f"verifying {plan.folder.name}") as report:
        for part, arrays in read_parts(plan):
            if isinstance(part, TensorInfo):
                warnings += _check_finite(part, arrays[part.name])
            else:
                faults += check_values(part, arrays)
                warnings += check_padding(part, arrays)
                if "bias" in arrays:
                    warnings += _check_finite(part.tensors["bias"], arrays["bias"])
            done += part.nbytes
            report(done, plan.nbytes, "")
    return faults, warnings


def _check_finite(info: TensorInfo, array: np.ndarray) -> list[str]:
    """A warning about NaN and infinity in a tensor that is not quantized."""
    import jax.numpy as jnp
    import numpy as np

    if not jnp.issubdtype(array.dtype, jnp.floating):
        return []
    bad = array.size - np.count_nonzero(np.isfinite(array))
    return [f"{info.name}: {bad} of {array.size} values are not finite"] if bad else []
