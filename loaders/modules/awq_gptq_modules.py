"""One module of AutoAWQ or GPTQ: its tensors under the roles of compressed-tensors' and its faults.

    qweight -> weight_packed    qzeros -> weight_zero_point
    scales -> weight_scale      g_idx -> weight_g_idx

There is no `weight_shape`: N and K follow from the shape of `qweight`. `TensorInfo.name` keeps what
the files call a tensor, and so do faults.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from loaders.errors import CheckpointError, Fault
from loaders.files.safetensors_file import TensorInfo
from loaders.modules.awq_gptq_words import list_tensors_of, read_zero_points
from loaders.modules.encoding import Encoding
from loaders.modules.modules import ROLES, QuantizedModule, check_bias, check_tensor, make_spec
from loaders.schemes.awq_gptq.config import AwqGptqConfig
from loaders.schemes.awq_gptq.schemes import TransposedScheme
from loaders.schemes.config_groups import Scheme
from loaders.schemes.packings import AWQ, GPTQ, LESS_ONE, MIDDLE, MIDDLE_LESS_ONE

_ROLES = {
    "qweight": "weight_packed",
    "scales": "weight_scale",
    "qzeros": "weight_zero_point",
    "g_idx": "weight_g_idx",
}
_NAMES = {role: name for name, role in _ROLES.items()}
# by which a module is known; other tools, too, may call a tensor "scales"
_MARKS = {"qweight", "qzeros", "g_idx"}
_AGAIN = "quantize the model again"

Modules = Mapping[str, dict[str, TensorInfo]]


def name_roles(
    by_module: Modules, config: Any
) -> tuple[dict[str, dict[str, TensorInfo]], list[Fault]]:
    """Give the tensors of AutoAWQ and GPTQ the roles of compressed-tensors.

    Args:
      by_module: the tensors of all modules by role, which is the end of their names.
      config: what config.json says of them, an `AwqGptqConfig` or another one.

    Returns:
      The same modules; and the tensors of one tool where config.json names another.
    """
    if getattr(config, "absent", ""):  # said once, of all modules
        return dict(by_module), []
    if not isinstance(config, AwqGptqConfig):
        return dict(by_module), [
            _refuse_role(found["qweight"], "AutoAWQ or GPTQ", '"awq" or "gptq"')
            for found in by_module.values()
            if "qweight" in found and not found.keys().isdisjoint(("qzeros", "scales"))
        ]
    faults = [
        _refuse_role(info, "compressed-tensors", '"compressed-tensors"')
        for found in by_module.values()
        for role, info in found.items()
        if role in ROLES
    ]
    named = {
        path: found
        if found.keys().isdisjoint(_MARKS)
        else {_ROLES.get(role, role): info for role, info in found.items()}
        for path, found in by_module.items()
    }
    return named, faults


def _refuse_role(info: TensorInfo, tool: str, method: str) -> Fault:
    what = f"is a tensor of {tool}, which quantization_config of config.json does not say"
    way_out = (
        f"put the tool's quantization_config into config.json, with quant_method {method}; it may "
        "stand in quantize_config.json or quant_config.json"
    )
    return Fault(what, info.file.name, info.name, way_out)


def is_transposed(found: Mapping[str, TensorInfo]) -> bool:
    """Whether a module's tensors by role are called as AutoAWQ and GPTQ call them."""
    return any(
        role in _NAMES and info.name.rpartition(".")[2] == _NAMES[role]
        for role, info in found.items()
    )


def plan_transposed(
    path: str, found: Mapping[str, TensorInfo], scheme: Scheme | None
) -> QuantizedModule:
    """Check a module's tensors against its scheme.

    Args:
      path: the module's.
      found: its tensors by role.
      scheme: a `TransposedScheme`, or None if the config says that it stays plain.

    Raises:
      CheckpointError: listing everything that is wrong with the module.
    """
    folder, file = (info := next(iter(found.values()))).file.parent, info.file.name
    if not isinstance(scheme, TransposedScheme):
        what = "the module is packed, but quantization_config says that it is not converted"
        way_out = "correct lm_head, modules_to_not_convert, dynamic or extra_config in config.json"
        raise CheckpointError(folder, [Fault(what, file, path, way_out)])
    packed, required = found.get("weight_packed"), ["weight_packed", "weight_scale"]
    if scheme.words == GPTQ or not scheme.symmetric:
        required.append("weight_zero_point")
    if scheme.reordered:
        required.append("weight_g_idx")
    faults = [
        Fault("the tensor is missing", file, f"{path}.{_NAMES[role]}")
        for role in required
        if role not in found
    ]
    if packed is None:
        raise CheckpointError(folder, faults)
    try:
        n, k = _read_sizes(packed, scheme)
        short = 0 < scheme.group_size < k and k % scheme.group_size > 0
        size = math.gcd(k, scheme.group_size) if short else scheme.group_size
        spec = make_spec(packed, (n, k), dataclasses.replace(scheme, group_size=size))
    except CheckpointError as error:
        raise CheckpointError(folder, [*faults, *error.faults]) from None
    encoding = Encoding(
        bits=scheme.bits,
        words=scheme.words,
        zero_points=scheme.zero_points,
        # in one group no order changes anything
        reordered=scheme.reordered and spec.groups > 1,
        group_size=scheme.group_size if short else None,
    )
    expected = list_tensors_of(spec, encoding)
    for role, info in found.items():
        if role in expected:
            faults += check_tensor(info, *expected[role])
        elif role != "bias":
            faults.append(Fault("the tensor is not expected", info.file.name, info.name))
    faults += check_bias(found.get("bias"), spec)
    if faults:
        raise CheckpointError(folder, faults)
    return QuantizedModule(path, spec, found, encoding)


def _read_sizes(packed: TensorInfo, scheme: TransposedScheme) -> tuple[int, int]:
    """N and K."""
    bits, along = scheme.bits, "K, N / 8" if scheme.words == AWQ else f"K * {scheme.bits} / 32, N"
    what = f"expected int32 [{along}], found {packed.dtype_name} {list(packed.shape)}"
    if packed.dtype_name != "int32" or len(packed.shape) != 2:
        raise CheckpointError(packed.file.parent, [Fault(what, packed.file.name, packed.name)])
    rows, columns = packed.shape
    if scheme.words == AWQ:
        return columns * 32 // bits, rows
    faults = []
    if rows * 32 % bits:
        what = f"{rows} words hold no whole number of {bits}-bit values"
        faults.append(Fault(what, packed.file.name, packed.name, _AGAIN))
    if columns * bits % 32:
        what = f"the zero points of {columns} output features do not fill whole words"
        faults.append(Fault(what, packed.file.name, packed.name, _AGAIN))
    if faults:
        raise CheckpointError(packed.file.parent, faults)
    return columns, rows * 32 // bits


def check_groups(groups: np.ndarray, module: QuantizedModule) -> list[Fault]:
    """The fault of a `g_idx` that says something else than config.json, where order is not read."""
    info = module.tensors["weight_g_idx"]
    wrong = groups != np.arange(module.spec.in_features) // module.group_size
    if not wrong.any():
        return []
    first = int(np.argmax(wrong))
    what = (
        f"{int(wrong.sum())} of {groups.size} input features are in another group than their order "
        f"says, the first at [{first}]: {groups[first]}"
    )
    way_out = 'set "desc_act": true in quantization_config, if that is how it was quantized'
    return [Fault(what, info.file.name, info.name, way_out)]


def check_zero_points(words: np.ndarray, module: QuantizedModule) -> list[Fault]:
    """Faults of zero points that do not mean what config.json says, or that nobody can tell.

    Where it says symmetric, all are 2^(bits-1). Format "gptq" stores one less, so that those of 0
    have no place: AutoGPTQ's and GPTQModel's versions and kernels make different numbers of them.

    Args:
      words: int32, as they lie in the file.
      module: of AutoAWQ or GPTQ.
    """
    encoding, middle = module.encoding, 1 << module.encoding.bits - 1
    if encoding.zero_points in (MIDDLE, MIDDLE_LESS_ONE):
        stored = _read_stored(words, module)
        if _are_all(stored, _list_middles(encoding)):
            return []
        said = middle - 1 if encoding.zero_points == MIDDLE_LESS_ONE else middle
        what = f"the config says symmetric, so that all zero points are stored as {said}, but"
        way_out = 'set "sym": false in quantization_config, if that is how it was quantized'
        if encoding.words == AWQ:
            way_out = way_out.replace('"sym": false', '"zero_point": true')
        return [_describe(what, stored, stored != said, module, way_out)]
    if encoding.zero_points == LESS_ONE:
        stored, top = _read_stored(words, module), 2 * middle - 1
        if not (stored == top).any():
            return []
        what = f"tools read zero points that are stored as {top} as {top + 1} or as 0;"
        way_out = "quantize it again, in format gptq_v2 if that is GPTQModel's"
        return [_describe(what, stored, stored == top, module, way_out)]
    return []


def describe_zero_points(words: np.ndarray, module: QuantizedModule) -> list[str]:
    """A warning about symmetric zero points that are stored as in another format than is said."""
    encoding, middle = module.encoding, 1 << module.encoding.bits - 1
    if encoding.zero_points != MIDDLE_LESS_ONE or (_read_stored(words, module) != middle).any():
        return []
    name = module.tensors["weight_zero_point"].name
    return [
        f"{name}: all are stored as {middle}, as in format gptq_v2, though checkpoint_format says "
        "gptq; the weight is symmetric, so that both mean the same"
    ]


def _list_middles(encoding: Encoding) -> tuple[int, ...]:
    """As what the middle may be stored: files that say "gptq" hold that of "gptq_v2", too."""
    middle = 1 << encoding.bits - 1
    return (middle,) if encoding.zero_points == MIDDLE else (middle - 1, middle)


def _are_all(stored: np.ndarray, values: tuple[int, ...]) -> bool:
    return any((stored == value).all() for value in values)


def _read_stored(words: np.ndarray, module: QuantizedModule) -> np.ndarray:
    """uint8 [G, N]: the numbers in the file."""
    plain = Encoding(bits=module.encoding.bits, words=module.encoding.words, zero_points="words")
    return read_zero_points(words.view(np.uint32), plain, module.spec.out_features).T


def _describe(
    what: str, stored: np.ndarray, bad: np.ndarray, module: QuantizedModule, way_out: str
) -> Fault:
    info, first = module.tensors["weight_zero_point"], tuple(map(int, np.argwhere(bad)[0]))
    found = f"{int(bad.sum())} of {stored.size}, the first at {list(first)}: {stored[first]}"
    return Fault(f"{what} {found}", info.file.name, info.name, way_out)
