"""`jaxwna16 verify`: reads every tensor of a checkpoint and checks all of it."""

from __future__ import annotations

import argparse
import dataclasses
import sys
import time
from typing import TYPE_CHECKING, Any

from jaxwna16.cli.arguments import add_checkpoint, add_json

if TYPE_CHECKING:
    import numpy as np
    from rich.console import Console

    from jaxwna16.cli.oracle import Oracle
    from loaders.converted.converted import ConvertedPlan
    from loaders.errors import Fault
    from loaders.files.safetensors_file import TensorInfo
    from loaders.modules.modules import QuantizedModule
    from loaders.plan import Plan, Survey

_MOST_WARNINGS = 1000


def configure(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Read every tensor of a checkpoint and check the files, the scheme of each module, the "
        "numbers, and whether the model that config.json names finds all its tensors. Lists every "
        "fault; the exit code is 1 if there is one."
    )
    add_checkpoint(parser)
    parser.add_argument(
        "--oracle",
        action="store_true",
        help="also let compressed-tensors decompress every module, and compare bit for bit; needs "
        'pip install "jaxwna16[oracle]"',
    )
    add_json(parser, sys.modules[__name__])


def run(args: argparse.Namespace) -> dict[str, Any]:
    from jaxwna16.checkpoints.load import resolve_folder
    from jaxwna16.cli.faults import describe_error
    from jaxwna16.cli.oracle import Oracle
    from loaders.converted.converted import ConvertedPlan
    from loaders.errors import CheckpointError, list_first
    from loaders.files.small_files import list_settings_faults
    from loaders.open import open_survey

    started = time.perf_counter()
    survey = open_survey(resolve_folder(args.checkpoint), follow_links=args.follow_links)
    plan = survey.plan
    oracle = Oracle(plan) if args.oracle else None
    model, faults = _check_model(survey)
    sound = _leave_out_unsound(survey)
    if isinstance(plan, ConvertedPlan):
        number_faults, warnings = _check_leaves(plan, oracle)
    else:
        number_faults, warnings = _check_numbers(sound, oracle)
    beside = list_settings_faults(plan.folder, follow_links=args.follow_links)
    faults = [*survey.faults, *beside, *faults, *number_faults]
    report = {
        "folder": str(plan.folder),
        "modules": len(sound.quantized),
        "tensors": len(sound.plain),
        "bytes": sound.nbytes,
        "seconds": time.perf_counter() - started,
        "model": model,
        "oracle": None if oracle is None else oracle.describe(),
        "warnings": list_first([*plan.warnings, *warnings], _MOST_WARNINGS),
    }
    if faults:
        report["error"] = describe_error(CheckpointError(plan.folder, faults))
    return report


def show(report: dict[str, Any], console: Console) -> None:
    from rich.filesize import decimal

    from jaxwna16.cli.screen import count
    from loaders.errors import escape_line

    for warning in report["warnings"]:
        console.print(escape_line(f"warning: {warning}"))
    if not report["model"]["checked"]:
        console.print(escape_line(f"model not checked: {report['model']['reason']}"))
    elif "error" not in report:
        console.print(f"the {report['model']['model_type']} model finds every tensor it needs")
    if report["oracle"] is not None:
        console.print(escape_line(_word_oracle(report["oracle"])))
    console.print(
        f"{'faulty' if 'error' in report else 'good'}: "
        f"{count(report['modules'], 'quantized module')} and "
        f"{count(report['tensors'], 'other tensor')}, {decimal(report['bytes'])} read "
        f"and checked in {report['seconds']:.1f} s"
    )


def _word_oracle(oracle: dict[str, Any]) -> str:
    compared = oracle["equal"] + oracle["different"]
    words = f"oracle: {oracle['equal']} of {compared} modules equal compressed-tensors "
    words += f"{oracle['version']} bit for bit"
    words += f", {oracle['converted']} through a conversion" if oracle["converted"] else ""
    for entry in oracle["not_comparable"]:
        words += f"; {entry['modules']} not comparable: {entry['reason']}"
    return words


def _check_model(survey: Survey) -> tuple[dict[str, Any], list[Fault]]:
    """The result of the check of the model's tensors, and the faults that it found.

    A tensor that has faults of its own is not reported as missing.
    """
    from jaxwna16.cli.faults import read_reason
    from jaxwna16.errors import ModelError
    from jaxwna16.models.families import parse_config
    from jaxwna16.models.filling.fit import plan_model
    from loaders.schemes.module_names import list_prefixes

    plan = survey.plan
    facts = {"model_type": plan.config.get("model_type"), "checked": True, "reason": ""}
    try:
        parse_config(plan.config)
    except ModelError as error:
        reason = "; ".join([error.summary, *error.reasons])
        return facts | {"checked": False, "reason": reason}, []
    try:
        plan_model(plan)
    except ModelError as error:
        faults = [read_reason(reason) for reason in error.reasons]
        known = survey.incomplete
        return facts, [f for f in faults if known.isdisjoint(list_prefixes(f.tensor))]
    return facts, []


def _leave_out_unsound(survey: Survey) -> Plan:
    """The plan without the tensors in unsound files, of which only the header should be read."""
    from loaders.modules.modules import QuantizedModule

    def is_sound(part: QuantizedModule | TensorInfo) -> bool:
        infos = part.tensors.values() if isinstance(part, QuantizedModule) else [part]
        return survey.unsound.isdisjoint(info.file.name for info in infos)

    plan = survey.plan
    if not survey.unsound:
        return plan
    return dataclasses.replace(
        plan,
        quantized={path: part for path, part in plan.quantized.items() if is_sound(part)},
        plain={name: part for name, part in plan.plain.items() if is_sound(part)},
    )


def _check_numbers(plan: Plan, oracle: Oracle | None) -> tuple[list[Fault], list[str]]:
    """Faults and warnings about the values, read one module at a time."""
    from jaxwna16.progress import show_bytes
    from loaders.files.safetensors_file import TensorInfo
    from loaders.stream import check_order, read_parts

    faults = check_order(plan)
    warnings: list[str] = []
    done = 0
    with show_bytes(f"verifying {plan.folder.name}") as report:
        for part, arrays in read_parts(plan):
            if isinstance(part, TensorInfo):
                warnings += _check_finite(part, arrays[part.name])
            else:
                wrong, remarks = _check_module(part, arrays, oracle)
                faults += wrong
                warnings += remarks
            done += part.nbytes
            report(done, plan.nbytes, "")
        if oracle is not None:
            faults += oracle.finish()
    return faults, warnings


def _check_module(
    module: QuantizedModule, arrays: dict[str, np.ndarray], oracle: Oracle | None
) -> tuple[list[Fault], list[str]]:
    from loaders.stream import check_padding, check_values

    faults = check_values(module, arrays)
    warnings = check_padding(module, arrays)
    if "bias" in arrays:
        warnings += _check_finite(module.tensors["bias"], arrays["bias"])
    if oracle is not None and faults:
        oracle.leave_out("the numbers are faulty")
    elif oracle is not None:
        faults = oracle.compare(module, arrays)
    return faults, warnings


def _check_leaves(plan: ConvertedPlan, oracle: Oracle | None) -> tuple[list[Fault], list[str]]:
    """The same for a converted checkpoint, whose numbers were checked before they were written."""
    from jaxwna16.progress import show_bytes
    from loaders.converted.converted import check_leaf, read_leaves

    faults: list[Fault] = []
    warnings: list[str] = []
    done = 0
    with show_bytes(f"verifying {plan.folder.name}") as report:
        for info, array in read_leaves(plan):
            faults += check_leaf(plan, info, array)
            warnings += _check_finite(info, array)
            done += info.nbytes
            report(done, plan.nbytes, "")
    if oracle is not None:
        for _ in plan.quantized:
            oracle.leave_out("a converted copy holds no words to decompress: verify the original")
    return faults, warnings


def _check_finite(info: TensorInfo, array: np.ndarray) -> list[str]:
    """A warning about NaN and infinity in a tensor that is not quantized."""
    import jax.numpy as jnp
    import numpy as np

    if not jnp.issubdtype(array.dtype, jnp.floating):
        return []
    bad = array.size - np.count_nonzero(np.isfinite(array))
    return [f"{info.name}: {bad} of {array.size} values are not finite"] if bad else []
