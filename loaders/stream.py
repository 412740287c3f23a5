"""Stream a planned checkpoint, part by part, into arrays in the tile layout.

Memory bound on the host, beside the arrays that are returned: the part being repacked and the part
being read ahead, so at most twice the largest tensor. Each file is read once, in order.

Each expert is a part, also those in one stacked tensor. The arrays of all experts of a layer are
made once, and experts are repacked into their rows in place, in whatever order they come. So a
layer of experts takes its own arrays and two experts; if the arrays are on a device, the host holds
only the two experts.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from loaders.errors import CheckpointError, Fault
from loaders.files.host_memory import make_zeros
from loaders.files.memory import require_memory
from loaders.files.safetensors_file import TensorInfo, read_tensor, read_tensors
from loaders.modules.awq_gptq_modules import check_groups, check_zero_points, describe_zero_points
from loaders.modules.modules import QuantizedModule
from loaders.modules.repack import pack, pack_expert, write_rows
from loaders.plan import Plan
from loaders.schemes.module_names import describe_modules
from loaders.schemes.packings import TRANSPOSED
from pallas_kernels.format.dequantize import dequantize

_AGAIN = "quantize the model again"

Progress = Callable[[int, int, str], None]
"""Called as progress(bytes_done, bytes_total, name) after every part."""


def load_params(
    plan: Plan,
    *,
    dtype: Any = None,
    kept: Collection[str] = (),
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Read every tensor of a plan into a nested dict under the checkpoint's module paths.

    Experts stand in stacks, "….experts.w13" and "….experts.w2" (see `loaders.modules.experts`).

    Args:
      plan: what to read.
      dtype: float dtype to which tensors that are not quantized are cast; None leaves them as they
        are. Scales keep the dtype of the file, since it decides how weights round.
      kept: names of tensors that stay as they are, whatever `dtype` is.
      progress: told of the bytes read.

    Raises:
      CheckpointError: listing every tensor with scales that are zero or not finite, or with
        values too large for `dtype`; or if a file ends early; or, before any weight is read, if the
        arrays cannot fit into memory, or if experts are reordered.
    """
    require_memory_for(plan, dtype)
    if reordered := check_order(plan):
        raise CheckpointError(plan.folder, reordered)
    params: dict[str, Any] = {}
    stacks: dict[str, dict[str, Any]] = {}
    faults: list[Fault] = []
    done, total = 0, plan.nbytes
    for part, arrays in read_parts(plan):
        name = part.name if isinstance(part, TensorInfo) else part.path
        if isinstance(part, QuantizedModule):
            faults += check_values(part, arrays)
        if name in plan.places:
            path = plan.places[name]
            leaves = stacks.get(path) or make_stack(plan.stacks[path].leaves, dtype)
            place = plan.stacks[path].places[name]
            stacks[path], overflows = _place_expert(leaves, part, arrays, *place)
        elif isinstance(part, TensorInfo):
            wanted = None if name in kept else dtype
            leaf, overflows = place_tensor(arrays[name], wanted, part)
            put_leaf(params, name, leaf)
        else:
            leaves, overflows = _place_module(part, arrays, dtype)
            _put_all(params, name, leaves)
        faults += overflows
        done += part.nbytes
        if progress is not None:
            progress(done, total, name)
        del arrays
    for path, leaves in stacks.items():
        _put_all(params, path, jax.block_until_ready(jax.device_put(leaves)))
    if faults:
        raise CheckpointError(plan.folder, faults)
    return params


def require_memory_for(plan: Plan, dtype: Any = None) -> None:
    """`require_memory` for what `load_params` makes of a plan.

    A cast to a larger `dtype` is not counted, one to a smaller one is.
    """
    arrays = 0
    for leaf in plan.describe_leaves().values():
        itemsize = leaf.dtype.itemsize
        if dtype is not None and jnp.issubdtype(leaf.dtype, jnp.floating):
            itemsize = min(itemsize, jnp.dtype(dtype).itemsize)
        arrays += leaf.size * itemsize
    largest = max((part.nbytes for part in plan.list_parts()), default=0)
    require_memory(plan.folder, arrays, 2 * largest)


def check_scales(plan: Plan) -> list[Fault]:
    """Faults in the scales of every module, its groups and zero points; no weight is read."""
    faults: list[Fault] = []
    for module in plan.quantized.values():
        roles = [r for r in ("weight_scale", "weight_g_idx") if r in module.tensors]
        is_checked = module.encoding.words in TRANSPOSED or module.encoding.zero_points == "bytes"
        if is_checked and "weight_zero_point" in module.tensors:
            roles.append("weight_zero_point")
        faults += check_values(module, {r: read_tensor(module.tensors[r]) for r in roles})
    return faults


def check_values(module: QuantizedModule, arrays: dict[str, np.ndarray]) -> list[Fault]:
    """Faults in the numbers of one module, except the order of an expert's (`check_order`)."""
    transposed = module.encoding.words in TRANSPOSED
    info = module.tensors["weight_scale"]
    faults = _check_scale(arrays["weight_scale"], info)
    groups = arrays.get("weight_g_idx")
    if transposed and "weight_zero_point" in arrays:
        faults += check_zero_points(arrays["weight_zero_point"], module)
    elif module.encoding.zero_points == "bytes" and "weight_zero_point" in arrays:
        faults += _check_bytes(arrays["weight_zero_point"], module)
    if groups is None or (not transposed and (groups < 0).all()):
        return faults  # column order
    if transposed and not module.encoding.reordered:
        return faults + check_groups(groups, module)
    return faults + _check_groups(groups, module)


def _check_scale(scale: np.ndarray, info: TensorInfo) -> list[Fault]:
    """Scales that are NaN, infinite or zero.

    Negative ones are right: AutoRound, in each format that it writes, gives one to about half of
    the groups of symmetric weights, so that their largest weight uses the longer side.
    """
    with np.errstate(invalid="ignore"):  # comparing a bfloat16 NaN warns
        bad = ~(np.isfinite(scale) & (scale != 0))
    if not bad.any():
        return []
    first = tuple(int(i) for i in np.argwhere(bad)[0])
    what = (
        f"{int(bad.sum())} of {scale.size} scales are zero or not finite, "
        f"the first at {list(first)}: {scale[first]}"
    )
    return [Fault(what, info.file.name, info.name, _AGAIN)]


def _check_bytes(zero_points: np.ndarray, module: QuantizedModule) -> list[Fault]:
    """The fault of zero points, int8 in the file, that are out of the range of their bits."""
    info, limit = module.tensors["weight_zero_point"], 1 << module.encoding.bits - 1
    bad = (zero_points < -limit) | (zero_points >= limit)
    if not bad.any():
        return []
    first = tuple(int(i) for i in np.argwhere(bad)[0])
    what = (
        f"{int(bad.sum())} of {zero_points.size} zero points are outside of {-limit} to "
        f"{limit - 1}, the first at {list(first)}: {zero_points[first]}"
    )
    return [Fault(what, info.file.name, info.name, _AGAIN)]


def check_order(plan: Plan) -> list[Fault]:
    """The fault of packed experts whose input features are reordered, one for all of them.

    Where there may be such, their groups are read, and no weight.
    """
    infos = {
        path: module.tensors["weight_g_idx"]
        for path, module in plan.quantized.items()
        if path in plan.places and path not in plan.expanded and module.encoding.reordered
    }
    reordered = [p for p, info in infos.items() if _are_reordered(plan.quantized[p], info)]
    if not reordered:
        return []
    first = infos[reordered[0]]
    what = (
        "the input features of experts are reordered (act-order), which no kernel supports: "
        f"{describe_modules(reordered)}"
    )
    way_out = (
        "`jaxwna16 dequantize` makes a float copy of the checkpoint, which loads; or quantize the "
        'model again, with actorder "weight" or none (GPTQ: "desc_act": false)'
    )
    return [Fault(what, first.file.name, first.name, way_out)]


def _are_reordered(module: QuantizedModule, info: TensorInfo) -> bool:
    """Whether groups are those of some other order than the columns', and otherwise good."""
    groups = read_tensor(info)
    return bool((np.diff(groups) < 0).any()) and not _check_groups(groups, module)


def _check_groups(groups: np.ndarray, module: QuantizedModule) -> list[Fault]:
    """The fault of groups of unequal size; only the last one may be short."""
    info, count = module.tensors["weight_g_idx"], module.encoding.count_groups(module.spec)
    bad = (groups < 0) | (groups >= count)
    if bad.any():
        first = int(np.argmax(bad))
        what = (
            f"{int(bad.sum())} of {groups.size} input features are in no group of {count}, "
            f"the first at [{first}]: {groups[first]}"
        )
        return [Fault(what, info.file.name, info.name, _AGAIN)]
    counts = np.bincount(groups, minlength=count)
    expected = np.bincount(np.arange(groups.size) // module.group_size, minlength=count)
    if (counts != expected).any():
        first = int(np.argmax(counts != expected))
        what = f"group {first} has {counts[first]} input features, expected {expected[first]}"
        return [Fault(what, info.file.name, info.name, _AGAIN)]
    return []


def check_cast(array: np.ndarray, cast: Any, file: Path, name: str) -> list[Fault]:
    """The fault of a tensor with finite values that a cast makes infinite.

    Args:
      array: before.
      cast: the same after, a NumPy or JAX array; looked at only if its dtype has a smaller range.
      file: what the tensor was read from.
      name: of the tensor.
    """
    if jnp.finfo(cast.dtype).max >= jnp.finfo(array.dtype).max or jnp.isfinite(cast).all():
        return []
    count = np.count_nonzero(np.isfinite(array) & ~np.isfinite(np.asarray(cast)))
    what = f"{count} of {array.size} values are too large for {cast.dtype.name}"
    return [Fault(what, file.name, name, "choose another dtype, such as float32")] if count else []


def check_padding(module: QuantizedModule, arrays: dict[str, np.ndarray]) -> list[str]:
    """Warnings about bits that are set in the padding, past K or N in the last words.

    They change nothing, but the tool that wrote them does not pack as compressed-tensors does.
    """
    encoding, spec = module.encoding, module.spec
    if encoding.words in TRANSPOSED:  # which have no padding
        words = arrays.get("weight_zero_point")
        return [] if words is None else describe_zero_points(words, module)
    lines = {"weight_packed": (arrays["weight_packed"], spec.in_features)}
    if encoding.zero_points == "words":
        lines["weight_zero_point"] = (arrays["weight_zero_point"].T, spec.out_features)
    warnings = []
    for role, (words, length) in lines.items():
        dirty = np.count_nonzero(words.view(np.uint32) & ~encoding.mark_values(length))
        if dirty:
            name = module.tensors[role].name
            warnings.append(f"{name}: padding bits are set in {dirty} words")
    return warnings


def read_parts(plan: Plan) -> Iterator[tuple[QuantizedModule | TensorInfo, dict[str, np.ndarray]]]:
    """Yield each part of a plan with its arrays, in the order of the files; a thread reads ahead.

    The arrays of a module stand under their roles ("weight_packed", ..., "bias"), that of any other
    tensor under its name.

    Raises:
      CheckpointError: if a file ends early.
    """
    with ThreadPoolExecutor(1) as reader:
        previous = None
        for part in plan.list_parts():
            coming = (part, reader.submit(_read_part, part))
            if previous is not None:
                yield previous[0], previous[1].result()
            previous = coming
        if previous is not None:
            yield previous[0], previous[1].result()


def _read_part(part: QuantizedModule | TensorInfo) -> dict[str, np.ndarray]:
    tensors = {part.name: part} if isinstance(part, TensorInfo) else part.tensors
    return dict(zip(tensors, read_tensors(tensors.values()), strict=True))


def _place_module(
    module: QuantizedModule, arrays: dict[str, np.ndarray], dtype: Any
) -> tuple[dict[str, Any], list[Fault]]:
    bias = arrays.pop("bias", None)
    weights: dict[str, Any] = pack(arrays, module.spec, module.encoding)
    faults: list[Fault] = []
    if bias is not None:
        weights["bias"], faults = place_tensor(bias, dtype, module.tensors["bias"])
    # the host buffers may be freed only after they were used
    return jax.block_until_ready(weights), faults


def make_stack(leaves: Mapping[str, jax.ShapeDtypeStruct], dtype: Any = None) -> dict[str, Any]:
    """The leaves of a stack before any expert is there; `dtype` is for floats and biases.

    NumPy arrays where they will be on the host, otherwise JAX arrays on the default device.
    """
    device = next(iter(jnp.zeros(()).devices()))
    make = make_zeros if device.platform == "cpu" else jnp.zeros
    return {
        name: make(leaf.shape, dtype if dtype and name in ("weight", "bias") else leaf.dtype)
        for name, leaf in leaves.items()
    }


def _place_expert(
    leaves: dict[str, Any],
    part: QuantizedModule | TensorInfo,
    arrays: dict[str, np.ndarray],
    expert: int,
    row: int,
) -> tuple[dict[str, Any], list[Fault]]:
    """The leaves of a stack with one more part in them; the ones given are used up."""
    leaves = dict(leaves)
    if isinstance(part, TensorInfo):
        floats = {"weight" if len(part.shape) == 2 else "bias": (arrays[part.name], part)}
    else:
        floats = {"bias": (arrays["bias"], part.tensors["bias"])} if "bias" in leaves else {}
        # the plan has read the shape; a stacked one is that of all experts
        words = {r: a for r, a in arrays.items() if r not in ("bias", "weight_shape")}
        if "weight" in leaves:
            weight = dequantize(pack(words, part.spec, part.encoding), part.spec)
            floats["weight"] = np.asarray(weight), part.tensors["weight_packed"]
        else:
            words.pop("weight_g_idx", None)
            grouped = {name: leaf for name, leaf in leaves.items() if name != "bias"}
            leaves |= pack_expert(grouped, words, part.spec, expert, row, part.encoding)
    faults: list[Fault] = []
    for name, (array, info) in floats.items():
        wanted = leaves[name].dtype
        rows, overflows = place_tensor(array, wanted if wanted != array.dtype else None, info)
        leaves[name] = write_rows(leaves[name], rows, expert, row)
        faults += overflows
    # as in _place_module
    return jax.block_until_ready(leaves), faults


def place_tensor(
    array: np.ndarray, dtype: Any, info: TensorInfo
) -> tuple[jax.Array | np.ndarray, list[Fault]]:
    """The leaf of a tensor, and the fault if casting made values infinite."""
    if dtype is not None and jnp.issubdtype(array.dtype, jnp.floating):
        with np.errstate(over="ignore"):  # from float64, JAX casts to float32 on the host
            cast = jax.block_until_ready(jnp.asarray(array).astype(dtype))
        return cast, check_cast(array, cast, info.file, info.name)
    if jax.dtypes.canonicalize_dtype(array.dtype) != array.dtype:
        return array, []  # 64-bit numbers, which JAX would cut to 32 bits: they stay NumPy's
    # unlike jnp.asarray, this takes the buffer itself on a CPU, which nobody else holds
    return jax.block_until_ready(jax.device_put(array)), []


def _put_all(tree: dict[str, Any], path: str, leaves: dict[str, Any]) -> None:
    for name, leaf in leaves.items():
        put_leaf(tree, f"{path}.{name}", leaf)


def put_leaf(tree: dict[str, Any], name: str, leaf: jax.Array | np.ndarray) -> None:
    """Put a leaf into a nested dict under its name, whose parts are divided by dots."""
    *parents, last = name.split(".")
    for key in parents:
        tree = tree.setdefault(key, {})
    tree[last] = leaf
