"""One quantized module: from its tensors in the files and its scheme to its spec, or to faults."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping

import numpy as np

from loaders.errors import CheckpointError, Fault
from loaders.files.safetensors_file import TensorInfo
from loaders.modules.encoding import Encoding, choose_encoding, widen
from loaders.modules.repack import expected_tensors
from loaders.schemes.config_groups import Scheme
from pallas_kernels.errors import SpecError
from pallas_kernels.format.spec import QuantSpec
from pallas_kernels.format.weights import SCALE_DTYPES

ROLES = ("weight_packed", "weight_scale", "weight_zero_point", "weight_shape", "weight_g_idx")
_SHAPE_DTYPES = ("int64", "int32")
MAX_EXPERTS = 10_000
PER_EXPERT = "quantize or save the experts one by one, as experts.0.gate_proj and so on"


@dataclasses.dataclass(frozen=True)
class QuantizedModule:
    """One quantized linear.

    The experts of a stacked (3-D) module are modules by themselves, "experts.down_proj[0]" and so
    on. The one `weight_shape` they have in common is the first one's.

    Attributes:
      path: the module's.
      spec: what it becomes; 4 or 8 bits, also where the files have other ones.
      tensors: where they lie by role ("weight_packed", …).
      encoding: how they hold it.
    """

    path: str
    spec: QuantSpec
    tensors: Mapping[str, TensorInfo]
    encoding: Encoding

    @property
    def group_size(self) -> int:
        """Of the files. The spec's is a part of it where the last group is short."""
        return self.encoding.group_size or self.spec.group_size

    @property
    def nbytes(self) -> int:
        """Bytes in the files."""
        return sum(info.nbytes for info in self.tensors.values())


def plan_modules(
    path: str,
    found: Mapping[str, TensorInfo],
    sizes: np.ndarray | None,
    scheme: Scheme | None,
    *,
    version: str,
    stacked: bool = False,
    joint: bool = False,
) -> list[QuantizedModule]:
    """Check a module's tensors against its scheme.

    Args:
      path: the module's.
      found: its tensors by role.
      sizes: what `weight_shape` holds, if it could be read.
      scheme: None if the config has none for it.
      version: of the compressed-tensors that wrote it, or "".
      stacked: whether the tensors are those of many experts, which are their first axis.
      joint: whether the rows of each are those of gate and then of up.

    Returns:
      The module; or one for each expert.

    Raises:
      CheckpointError: listing everything that is wrong with the module.
    """
    file = next(iter(found.values())).file
    faults = []
    if scheme is None:
        what = "the module is packed, but no target of config_groups matches it, or it is ignored"
        faults.append(Fault(what, file.name, path, "correct quantization_config in config.json"))
    if scheme is None or "weight_shape" not in found:
        faults += [
            Fault("the tensor is missing", file.name, f"{path}.{role}")
            for role in ("weight_packed", "weight_scale", "weight_shape")
            if role not in found
        ]
        raise CheckpointError(file.parent, faults)
    if not stacked:
        spec = make_spec(found["weight_shape"], _read_sizes(found["weight_shape"], sizes), scheme)
        parts = {path: found}
    else:
        spec, slices = _split(found, sizes, scheme)
        parts = {f"{path}[{i}]": tensors for i, tensors in enumerate(slices)}
    # all slices are alike, so that the faults of the first are those of all
    first, tensors = next(iter(parts.items()))
    encoding = choose_encoding(
        first, tensors, scheme, (spec.out_features, spec.in_features), version
    )
    if stacked and joint:
        _check_joint_zero_points(found.get("weight_zero_point"), spec, encoding)
    faults += _check_tensors(first, tensors, spec, encoding)
    faults += check_bias(tensors.get("bias"), spec)
    if stacked:
        faults = [dataclasses.replace(f, way_out=f.way_out or PER_EXPERT) for f in faults]
    if faults:
        raise CheckpointError(file.parent, faults)
    return [QuantizedModule(name, spec, tensors, encoding) for name, tensors in parts.items()]


def _split(
    found: Mapping[str, TensorInfo], sizes: np.ndarray | None, scheme: Scheme
) -> tuple[QuantSpec, list[dict[str, TensorInfo]]]:
    """The spec of the experts of a stacked module, and the tensors of each.

    compressed-tensors packs each expert's matrix by itself and stacks the results
    (`compressors/pack_quantized/helpers.py`), so that what belongs to an expert lies in one piece.
    """
    shape, slices = found["weight_shape"], split_experts(found)
    spec = make_spec(shape, _read_stacked_sizes(shape, sizes, len(slices)), scheme)
    slices[0]["weight_shape"] = shape
    return spec, slices


def split_experts(found: Mapping[str, TensorInfo]) -> list[dict[str, TensorInfo]]:
    """The tensors of each expert by role, from those of all experts; without `weight_shape`.

    Raises:
      CheckpointError: if the tensors are not of the same number of experts, at least one.
    """
    stacked = {role: info for role, info in found.items() if role != "weight_shape"}
    main = stacked["weight_packed" if "weight_packed" in stacked else "weight"]
    experts = main.shape[0]
    faults = [
        Fault(f"expected {experts} experts, found {_describe(info)}", info.file.name, info.name)
        for info in stacked.values()
        if info.shape[:1] != (experts,)
    ]
    if 0 in main.shape:
        faults = [Fault("expected at least one expert, found none", main.file.name, main.name)]
    elif experts > MAX_EXPERTS:  # each becomes an object, however few bytes it has
        what = f"more than {MAX_EXPERTS} experts: {_describe(main)}"
        faults = [Fault(what, main.file.name, main.name)]
    if faults:
        raise CheckpointError(main.file.parent, faults)
    split = {role: info.split() for role, info in stacked.items()}
    return [{role: infos[i] for role, infos in split.items()} for i in range(experts)]


def _read_sizes(info: TensorInfo, sizes: np.ndarray | None) -> tuple[int, int]:
    if sizes is None or info.dtype_name not in _SHAPE_DTYPES or info.shape != (2,):
        raise _error(info, f"expected int64 [2], found {_describe(info)}")
    return int(sizes[0]), int(sizes[1])


def _read_stacked_sizes(
    info: TensorInfo, sizes: np.ndarray | None, experts: int
) -> tuple[int, int]:
    """N and K of each expert.

    `weight_shape` is [E, N, K]; or, where a tool merged the shapes of separate experts, there is a
    row N, K for each, or I, K, I, K for gate and up.
    """
    if sizes is not None and info.dtype_name in _SHAPE_DTYPES:
        if info.shape == (3,) and sizes[0] == experts:
            return int(sizes[1]), int(sizes[2])
        if info.shape in ((experts, 2), (experts, 4)) and (sizes == sizes[:1]).all():
            n, k, *up = sizes[0].tolist()
            if up in ([], [n, k]):
                return (2 * n, k) if up else (n, k)
    held = "" if sizes is None else f" of {sizes.tolist()}"
    what = f"expected int64 [3] of [{experts}, N, K], found {_describe(info)}{held}"
    raise _error(info, what, PER_EXPERT)


def _check_joint_zero_points(info: TensorInfo | None, spec: QuantSpec, encoding: Encoding) -> None:
    """Refuse zero points of gate and up if nobody can tell how they were packed.

    compressed-tensors packs those of [E, 2I, K] together along 2I. A tool that merges packed
    experts puts the words of up behind those of gate. If I values fill whole words, both are the
    same. If not, the shape tells which it is, unless I values fill more than half of their last
    word.
    """
    if info is None or encoding.zero_points != "words":
        return
    half = spec.out_features // 2
    apart, together = 2 * encoding.count_words(half), encoding.count_words(2 * half)
    if apart == together and not encoding.fills_words(half):
        what = (
            f"zero points of {half} gate and {half} up features: packed together or one after the "
            "other, they fill equally many words with different meanings"
        )
        raise _error(info, what, PER_EXPERT)


def _check_tensors(
    path: str, found: Mapping[str, TensorInfo], spec: QuantSpec, encoding: Encoding
) -> list[Fault]:
    file, faults = found["weight_shape"].file, []
    expected = _expect(spec, encoding)
    for role in sorted(expected.keys() | found.keys() - {"bias", "weight_shape"}):
        if role not in found:
            way_out = "the config says asymmetric" if role == "weight_zero_point" else ""
            faults.append(Fault("the tensor is missing", file.name, f"{path}.{role}", way_out))
        elif role not in expected:
            way_out = "the config says symmetric" if role == "weight_zero_point" else ""
            info = found[role]
            faults.append(Fault("the tensor is not expected", info.file.name, info.name, way_out))
        else:
            faults += check_tensor(found[role], *expected[role])
    return faults


@functools.lru_cache(maxsize=64)  # modules are many, kinds of them few
def _expect(
    spec: QuantSpec, encoding: Encoding
) -> Mapping[str, tuple[tuple[str, ...], tuple[int, ...]]]:
    expected = expected_tensors(spec, encoding)
    del expected["weight_shape"]
    return expected


def check_bias(info: TensorInfo | None, spec: QuantSpec) -> list[Fault]:
    """The fault of a bias of another dtype or shape, if there is one."""
    return [] if info is None else check_tensor(info, SCALE_DTYPES, (spec.out_features,))


def check_tensor(info: TensorInfo, dtypes: tuple[str, ...], shape: tuple[int, ...]) -> list[Fault]:
    """The fault of a tensor that has none of these dtypes, or another shape."""
    if info.shape == shape and info.dtype_name in dtypes:
        return []
    what = f"expected {' or '.join(dtypes)} {list(shape)}, found {_describe(info)}"
    return [Fault(what, info.file.name, info.name)]


def make_spec(info: TensorInfo, sizes: tuple[int, int], scheme: Scheme) -> QuantSpec:
    """What a module of N and K becomes.

    Raises:
      CheckpointError: if its scheme does not go with the sizes; it names `info`.
    """
    try:
        return _join_spec(scheme, *sizes)
    except SpecError as error:
        raise _error(info, str(error)) from None


@functools.lru_cache(maxsize=64)
def _join_spec(scheme: Scheme, n: int, k: int) -> QuantSpec:
    group_size = scheme.group_size
    if group_size > k > 0:
        group_size = -1  # as compressed-tensors 0.9 wrote it: the whole row is one group
    return QuantSpec(
        bits=widen(scheme.bits),
        group_size=group_size,
        symmetric=scheme.symmetric,
        in_features=k,
        out_features=n,
    )


def _describe(info: TensorInfo) -> str:
    return f"{info.dtype_name} {list(info.shape)}"


def _error(info: TensorInfo, what: str, way_out: str = "") -> CheckpointError:
    return CheckpointError(info.file.parent, [Fault(what, info.file.name, info.name, way_out)])
