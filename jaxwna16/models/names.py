"""Names in files -> attribute paths of the definition, as a family's name map says."""

from __future__ import annotations

import dataclasses
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping

from jaxwna16.errors import ModelError
from loaders.modules import QuantizedModule
from loaders.plan import Plan
from loaders.safetensors_file import TensorInfo


def rename_parts(plan: Plan, names: Mapping[str, str]) -> Plan:
    """The plan with its modules, tensors and stacks of experts under the model's names.

    Args:
      plan: of the checkpoint.
      names: regular expressions -> what stands in place of what they find, one after the other.

    Raises:
      ModelError: listing those that would have one name.
    """
    parts = [*plan.quantized, *plan.plain, *plan.stacks]
    if not any(re.search(pattern, name) for pattern in names for name in parts):
        return plan

    def rename(name: str) -> str:
        for pattern, replacement in names.items():
            name = re.sub(pattern, replacement, name)
        return name

    _check_distinct(parts, rename)
    stacks = {
        rename(path): dataclasses.replace(
            stack, places={rename(name): place for name, place in stack.places.items()}
        )
        for path, stack in plan.stacks.items()
    }
    return dataclasses.replace(
        plan,
        quantized={rename(p): _rename_module(m, rename) for p, m in plan.quantized.items()},
        plain={rename(name): _rename_tensor(info, rename) for name, info in plan.plain.items()},
        stacks=stacks,
    )


def _check_distinct(parts: Iterable[str], rename: Callable[[str], str]) -> None:
    alike: dict[str, list[str]] = defaultdict(list)
    for name in parts:
        alike[rename(name)].append(name)
    clashes = [
        f"{name}: expected one, found {' and '.join(found)}"
        for name, found in alike.items()
        if len(found) > 1
    ]
    if clashes:
        raise ModelError("several parts of the checkpoint have one place in the model", clashes)


def _rename_module(module: QuantizedModule, rename: Callable[[str], str]) -> QuantizedModule:
    tensors = {role: _rename_tensor(info, rename) for role, info in module.tensors.items()}
    return dataclasses.replace(module, path=rename(module.path), tensors=tensors)


def _rename_tensor(info: TensorInfo, rename: Callable[[str], str]) -> TensorInfo:
    return dataclasses.replace(info, name=rename(info.name))
