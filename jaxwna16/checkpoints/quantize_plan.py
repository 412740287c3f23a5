"""What `quantize` is about to write: its specs, and whether it could be loaded.

All of this is known from headers, so that nothing is quantized in vain.
"""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Collection, Mapping
from typing import Any

from jaxwna16.checkpoints.left_alone import name_module
from jaxwna16.errors import InputError, ModelError
from loaders.errors import CheckpointError, Fault
from loaders.files.safetensors_file import TensorInfo
from loaders.modules.encoding import Encoding
from loaders.modules.experts import Stack, name_separately
from loaders.modules.modules import QuantizedModule
from loaders.plan import Plan
from pallas_kernels.errors import SpecError
from pallas_kernels.format.spec import QuantSpec
from pallas_kernels.format.weights import make_abstract

_ANOTHER = "choose another group size, or ignore it"
# experts are packed all or none
_ANOTHER_FOR_EXPERTS = r"choose another group size, or ignore all experts: re:.*\.experts\."
# the compressed-tensors version whose format is written; 4 and 8 bits are the same in all of them
FORMAT_VERSION = "0.20.0"


def check_experts(plan: Plan, linears: Collection[str]) -> None:
    """Refuse to quantize only some experts of a stack, which nobody could load."""
    reasons = []
    for path, stack in plan.stacks.items():
        names = [name for place in stack.places for name in name_separately(place)]
        weights = [name for name in names if name.endswith(".weight")]
        chosen = sum(name in linears for name in weights)
        if chosen not in (0, len(weights)):
            reasons.append(f"{path}: {chosen} of its {len(weights)} matrices")
    if reasons:
        summary = (
            f"{plan.folder}: the experts of a layer must all be quantized, or none: change "
            "`ignore`, with which only these would be"
        )
        raise InputError(summary, reasons)


def check_numbers(bits: int, group_size: int) -> None:
    """Refuse what is wrong with every weight before they are looked at.

    Raises:
      InputError: naming the argument.
    """
    features = group_size if isinstance(group_size, int) and group_size > 0 else 1
    try:
        QuantSpec(
            bits=bits,
            group_size=group_size,
            symmetric=True,
            in_features=features,
            out_features=1,
        )
    except SpecError as error:
        raise InputError(str(error)) from None


def make_specs(
    plan: Plan, linears: dict[str, TensorInfo], bits: int, group_size: int, symmetric: bool
) -> dict[str, QuantSpec]:
    """The specs of the linear weights by name.

    Raises:
      CheckpointError: listing every weight that the group size does not divide.
    """
    specs, faults = {}, []
    for name, info in linears.items():
        n, k = info.shape
        try:
            specs[name] = QuantSpec(
                bits=bits,
                group_size=group_size,
                symmetric=symmetric,
                in_features=k,
                out_features=n // len(name_separately(info.name)),
            )
        except SpecError as error:
            way_out = _ANOTHER_FOR_EXPERTS if info.name in plan.places else _ANOTHER
            faults.append(Fault(str(error), info.file.name, name, way_out))
    if faults:
        raise CheckpointError(plan.folder, faults)
    return specs


def check_model(plan: Plan, specs: Mapping[str, QuantSpec]) -> None:
    """Refuse a result that `load_model` would refuse, if it takes the source.

    Args:
      plan: of the source.
      specs: of the weights that will be quantized, by name.

    Raises:
      InputError: listing why.
    """
    from jaxwna16.models.filling.fit import plan_model  # with flax, which nothing else here needs

    try:
        plan_model(plan)
    except (ModelError, CheckpointError):
        return
    try:
        plan_model(_preview(plan, specs))
    except ModelError as error:
        summary = f"{plan.folder}: load_model could not load the result: change `ignore`"
        raise InputError(summary, error.reasons) from None


def _preview(plan: Plan, specs: Mapping[str, QuantSpec]) -> Plan:
    """The plan of what will be written, as far as a model can tell."""
    plain, tensors = dict(plan.plain), defaultdict(dict)
    for info in plan.plain.values():
        for name in name_separately(info.name):
            path = name_module(name)
            if f"{path}.weight" in specs:
                plain.pop(info.name, None)
                roles = ("bias",) if name.endswith(".bias") else ("weight_packed", "weight_scale")
                tensors[path] |= dict.fromkeys(roles, info)
    quantized = {}
    for path, found in tensors.items():
        spec = specs[f"{path}.weight"]
        quantized[path] = QuantizedModule(path, spec, found, Encoding(bits=spec.bits))
    stacks = {path: _preview_stack(stack, specs) for path, stack in plan.stacks.items()}
    return dataclasses.replace(plan, plain=plain, quantized=quantized, stacks=stacks)


def _preview_stack(stack: Stack, specs: Mapping[str, QuantSpec]) -> Stack:
    separate = {n: place for name, place in stack.places.items() for n in name_separately(name)}
    found = [name for name in separate if name in specs]
    if not found:
        return stack
    _, rows, _ = stack.leaves["weight"].shape
    spec = dataclasses.replace(specs[found[0]], out_features=rows)
    bias = stack.leaves.get("bias")
    leaves = make_abstract(
        spec,
        stack.leaves["weight"].dtype,
        None if bias is None else bias.dtype,
        experts=stack.experts,
    )
    places = {name_module(name): place for name, place in separate.items() if name in specs}
    return Stack(stack.experts, spec, leaves, places)


def describe_quantization(
    bits: int, group_size: int, symmetric: bool, ignore: list[str]
) -> dict[str, Any]:
    """The quantization_config as compressed-tensors writes it."""
    weights = {
        "num_bits": bits,
        "type": "int",
        "symmetric": symmetric,
        "strategy": "channel" if group_size == -1 else "group",
        "group_size": None if group_size == -1 else group_size,
        "dynamic": False,
        "actorder": None,
        "block_structure": None,
        "observer": "minmax",
        "observer_kwargs": {},
    }
    group = {
        "targets": ["Linear"],
        "weights": weights,
        "input_activations": None,
        "output_activations": None,
        "format": "pack-quantized",
    }
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "version": FORMAT_VERSION,
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": ignore,
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
    }
