"""Stream a planned checkpoint, part by part, into arrays in the tile layout.

Memory bound on the host, beside the arrays that are returned: the part being repacked and the part
being read ahead, so at most twice the largest tensor. Each file is read once, in order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from loaders.errors import CheckpointError, Fault
from loaders.plan import Plan, QuantizedModule
from loaders.repack import pack
from loaders.safetensors_file import TensorInfo, read_tensor

Progress = Callable[[int, int, str], None]
"""Called as progress(bytes_done, bytes_total, name) after every part."""


def load_params(
    plan: Plan, *, dtype: Any = None, progress: Progress | None = None
) -> dict[str, Any]:
    """Read every tensor of a plan into a nested dict under the checkpoint's module paths.

    Args:
      plan: what to read.
      dtype: float dtype to which tensors that are not quantized are cast; None leaves them as they
        are. Scales keep the dtype of the file, since it decides how weights round.
      progress: told of the bytes read.

    Raises:
      CheckpointError: listing every scale that is not finite and above zero; or if a file ends
        early.
    """
    params: dict[str, Any] = {}
    faults: list[Fault] = []
    done, total = 0, plan.nbytes
    for part, arrays in read_parts(plan):
        if isinstance(part, TensorInfo):
            _put(params, part.name, _place(arrays[part.name], dtype))
        else:
            faults += check_values(part, arrays)
            for leaf, array in _place_module(part, arrays, dtype).items():
                _put(params, f"{part.path}.{leaf}", array)
        done += part.nbytes
        if progress is not None:
            progress(done, total, part.name if isinstance(part, TensorInfo) else part.path)
        del arrays
    if faults:
        raise CheckpointError(plan.folder, faults)
    return params


def check_values(module: QuantizedModule, arrays: dict[str, np.ndarray]) -> list[Fault]:
    """Faults in the numbers of one module: scales that are NaN, infinite, negative or zero."""
    scale, info = arrays["weight_scale"], module.tensors["weight_scale"]
    with np.errstate(invalid="ignore"):  # comparing a bfloat16 NaN warns
        bad = ~(np.isfinite(scale) & (scale > 0))
    if not bad.any():
        return []
    first = tuple(int(i) for i in np.argwhere(bad)[0])
    what = (
        f"{int(bad.sum())} of {scale.size} scales are not finite and above 0, "
        f"the first at {list(first)}: {scale[first]}"
    )
    return [Fault(what, info.file.name, info.name, "quantize the model again")]


def check_padding(module: QuantizedModule, arrays: dict[str, np.ndarray]) -> list[str]:
    """Warnings about bits that are set where no value stands, past K or N in the last words.

    They change nothing, but whoever wrote them does not pack as compressed-tensors does.
    """
    spec = module.spec
    last_words = {"weight_packed": (arrays["weight_packed"][:, -1], spec.in_features)}
    if not spec.symmetric:
        last_words["weight_zero_point"] = (arrays["weight_zero_point"][-1], spec.out_features)
    warnings = []
    for role, (words, length) in last_words.items():
        used = length * spec.bits % 32
        dirty = np.count_nonzero(words.view(np.uint32) >> np.uint32(used)) if used else 0
        if dirty:
            name = module.tensors[role].name
            warnings.append(f"{name}: padding bits are set in {dirty} of {words.size} last words")
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
    return {name: read_tensor(info) for name, info in tensors.items()}


def _place_module(
    module: QuantizedModule, arrays: dict[str, np.ndarray], dtype: Any
) -> dict[str, Any]:
    bias = arrays.pop("bias", None)
    weights: dict[str, Any] = pack(arrays, module.spec)
    if bias is not None:
        weights["bias"] = _place(bias, dtype)
    # the host buffers may be freed only after they were used
    return jax.block_until_ready(weights)


def _place(array: np.ndarray, dtype: Any) -> jax.Array | np.ndarray:
    if dtype is not None and jnp.issubdtype(array.dtype, jnp.floating):
        return jax.block_until_ready(jnp.asarray(array).astype(dtype))
    if jax.dtypes.canonicalize_dtype(array.dtype) != array.dtype:
        return array  # 64-bit numbers, which JAX would cut to 32 bits: they stay NumPy's
    return jax.block_until_ready(jnp.asarray(array))


def _put(tree: dict[str, Any], name: str, leaf: jax.Array | np.ndarray) -> None:
    *parents, last = name.split(".")
    for key in parents:
        tree = tree.setdefault(key, {})
    tree[last] = leaf
