"""The plan of a checkpoint: every module with its scheme and tensors, before any weight is read.

Only config.json, the headers and the 16-byte `weight_shape` tensors are read, so a plan of a 100 GB
checkpoint takes a second. All faults of all modules come in one error.
"""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax

from loaders.errors import CheckpointError, Fault
from loaders.folder import list_tensors, read_config
from loaders.quantization_config import QuantizationConfig, Scheme, parse_quantization
from loaders.repack import expected_tensors
from loaders.safetensors_file import TensorInfo, read_tensor
from pallas_kernels.errors import SpecError
from pallas_kernels.spec import QuantSpec
from pallas_kernels.weights import SCALE_DTYPES, make_abstract

_ROLES = ("weight_packed", "weight_scale", "weight_zero_point", "weight_shape", "weight_g_idx")


@dataclasses.dataclass(frozen=True)
class QuantizedModule:
    """One quantized linear: its spec, and where its tensors lie by role ("weight_packed", …)."""

    path: str
    spec: QuantSpec
    tensors: Mapping[str, TensorInfo]

    @property
    def nbytes(self) -> int:
        """Bytes in the files."""
        return sum(info.nbytes for info in self.tensors.values())


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a checkpoint holds.

    Attributes:
      folder: the checkpoint folder.
      config: config.json.
      quantized: the quantized modules by path, in the order of the files.
      plain: all other tensors by name, in the order of the files.
      warnings: remarks that are no faults, one sentence each.
    """

    folder: Path
    config: Mapping[str, Any]
    quantized: Mapping[str, QuantizedModule]
    plain: Mapping[str, TensorInfo]
    warnings: tuple[str, ...] = ()

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors in the files."""
        return sum(part.nbytes for part in self.list_parts())

    @property
    def specs(self) -> dict[str, QuantSpec]:
        """Module path -> spec of each quantized module."""
        return {path: module.spec for path, module in self.quantized.items()}

    def describe_leaves(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Path -> shape and dtype of every leaf of the params tree that the plan will become."""
        leaves = {
            info.name: jax.ShapeDtypeStruct(info.shape, info.dtype) for info in self.plain.values()
        }
        for path, module in self.quantized.items():
            bias = module.tensors.get("bias")
            scale_dtype = module.tensors["weight_scale"].dtype
            for leaf, shape in make_abstract(
                module.spec, scale_dtype, None if bias is None else bias.dtype
            ).items():
                leaves[f"{path}.{leaf}"] = shape
        return leaves

    def list_parts(self) -> Iterator[QuantizedModule | TensorInfo]:
        """The modules and tensors in the order in which they lie in the files."""
        parts = [*self.quantized.values(), *self.plain.values()]
        yield from sorted(parts, key=_locate)


def make_plan(folder: str | Path) -> Plan:
    """Plan a checkpoint folder.

    Raises:
      CheckpointError: listing every fault of the config, the files and the modules.
    """
    folder = Path(folder)
    config = read_config(folder)
    quantization, faults = parse_quantization(config)
    try:
        tensors = list_tensors(folder)
    except CheckpointError as error:
        raise CheckpointError(folder, [*faults, *error.faults]) from None
    if faults:
        raise CheckpointError(folder, faults)
    by_module: dict[str, dict[str, TensorInfo]] = defaultdict(dict)
    for name, info in tensors.items():
        module, _, role = name.rpartition(".")
        by_module[module][role] = info
    parents = {path for module in by_module for path in _list_prefixes(module)}
    faults += [
        Fault("this is the name of a tensor and the path of others", info.file.name, name)
        for name, info in tensors.items()
        if name in parents
    ]
    quantized, plain = {}, {}
    for path, found in by_module.items():
        if not any(role in found for role in _ROLES):
            plain |= {info.name: info for info in found.values()}
            continue
        try:
            quantized[path] = _plan_module(path, found, quantization)
        except CheckpointError as error:
            faults += error.faults
    if faults:
        raise CheckpointError(folder, faults)
    modules = set(by_module) | ({"lm_head"} if config.get("tie_word_embeddings") else set())
    return Plan(folder, config, quantized, plain, tuple(_list_warnings(quantization, modules)))


def _plan_module(
    path: str, found: dict[str, TensorInfo], config: QuantizationConfig
) -> QuantizedModule:
    file = next(iter(found.values())).file
    scheme = config.find_scheme(path)
    faults = []
    if scheme is None:
        what = "the module is packed, but no target of config_groups matches it, or it is ignored"
        faults.append(Fault(what, file.name, path, "mend quantization_config in config.json"))
    if "weight_g_idx" in found:
        what = "activation order (weight_g_idx) is not supported yet"
        faults.append(Fault(what, file.name, path, 'quantize with actorder "weight" or none'))
    if scheme is None or "weight_shape" not in found:
        faults += [
            Fault("the tensor is missing", file.name, f"{path}.{role}")
            for role in ("weight_packed", "weight_scale", "weight_shape")
            if role not in found
        ]
        raise CheckpointError(file.parent, faults)
    spec = _make_spec(path, found, scheme)
    expected = expected_tensors(spec)
    for role in sorted(expected.keys() | found.keys() - {"bias", "weight_g_idx"}):
        tensor = f"{path}.{role}"
        if role not in found:
            way_out = "the config says asymmetric" if role == "weight_zero_point" else ""
            faults.append(Fault("the tensor is missing", file.name, tensor, way_out))
        elif role not in expected:
            way_out = "the config says symmetric" if role == "weight_zero_point" else ""
            faults.append(
                Fault("the tensor is not expected", found[role].file.name, tensor, way_out)
            )
        else:
            dtypes, shape = expected[role]
            if found[role].dtype.name not in dtypes or found[role].shape != shape:
                what = (
                    f"expected {' or '.join(dtypes)} {list(shape)}, "
                    f"found {found[role].dtype.name} {list(found[role].shape)}"
                )
                faults.append(Fault(what, found[role].file.name, tensor))
    bias = found.get("bias")
    if bias is not None and (
        bias.shape != (spec.out_features,) or bias.dtype.name not in SCALE_DTYPES
    ):
        what = (
            f"expected {' or '.join(SCALE_DTYPES)} [{spec.out_features}], "
            f"found {bias.dtype.name} {list(bias.shape)}"
        )
        faults.append(Fault(what, bias.file.name, f"{path}.bias"))
    if faults:
        raise CheckpointError(file.parent, faults)
    return QuantizedModule(path, spec, found)


def _make_spec(path: str, found: dict[str, TensorInfo], scheme: Scheme) -> QuantSpec:
    info = found["weight_shape"]
    tensor = f"{path}.weight_shape"
    if info.dtype.name not in ("int64", "int32") or info.shape != (2,):
        what = f"expected int64 [2], found {info.dtype.name} {list(info.shape)}"
        raise CheckpointError(info.file.parent, [Fault(what, info.file.name, tensor)])
    n, k = (int(size) for size in read_tensor(info))
    try:
        return QuantSpec(
            bits=scheme.bits,
            group_size=scheme.group_size,
            symmetric=scheme.symmetric,
            in_features=k,
            out_features=n,
        )
    except SpecError as error:
        raise CheckpointError(
            info.file.parent, [Fault(str(error), info.file.name, tensor)]
        ) from None


def _list_warnings(config: QuantizationConfig, modules: Collection[str]) -> Iterator[str]:
    for pattern in [*(target for target, _ in config.targets), *config.ignore]:
        one = QuantizationConfig(targets=((pattern, Scheme(4, -1, True)),))
        if not any(one.find_scheme(path) for path in modules):
            yield f"config.json: pattern {pattern!r} matches no module"


def _list_prefixes(path: str) -> Iterator[str]:
    """The path itself and the paths of its parents: "a.b" -> "a.b", "a"."""
    while path:
        yield path
        path = path.rpartition(".")[0]


def _locate(part: QuantizedModule | TensorInfo) -> tuple[str, int]:
    first = part if isinstance(part, TensorInfo) else part.tensors["weight_packed"]
    return first.file.name, first.start
