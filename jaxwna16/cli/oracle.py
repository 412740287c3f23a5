"""`verify --oracle`: every packed weight, decompressed by us and by compressed-tensors itself.

The extra "oracle" installs compressed-tensors, which installs torch. No other module of this
package imports them. Our side of the comparison is the result of loading: `dequantize` reads the
leaves of a module in the tile layout, and those of an expert in its rows of a stack.

Forms that compressed-tensors 0.20 cannot read are first brought into its own form, if that only
moves integers. Its own functions do this where it has them (it packs, unpacks, converts AutoAWQ):

    int8 or missing zero points         packed; the scheme is symmetric
    weight_g_idx                        the input features are sorted by group, and back again
    32 // bits values to a word (0.17)  packed as a stream of bits
    N <= 8 at 4 bits, several groups    other strides of the zero points, which trip it up
    AutoAWQ, GPTQ                       transposed
    a short last group                  groups divided into smaller ones with the same scale
"""

from __future__ import annotations

from collections import Counter, defaultdict
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from jaxwna16.errors import InputError
from jaxwna16.extras import import_extra
from loaders.errors import Fault
from loaders.modules.modules import QuantizedModule
from loaders.modules.repack import pack, pack_expert
from loaders.plan import Plan
from loaders.schemes.packings import ALIGNED, AWQ, GPTQ, LESS_ONE, LESS_ONE_BORROWED
from loaders.stream import make_stack
from pallas_kernels.format.dequantize import dequantize

_VERSION = "0.20"
_AWQ_NAMES = {"weight_packed": "qweight", "weight_scale": "scales", "weight_zero_point": "qzeros"}
_APART = ("bias", "weight_shape")
_REPORT = "do not use it, and report this: one of the two is wrong"
Arrays = dict[str, np.ndarray]
_Part = tuple[QuantizedModule, Arrays]


class Oracle:
    """Compares the modules of a plan, one by one, and counts.

    Memory: the packed parts of experts that are not complete yet, and one expanded weight.

    Raises:
      InputError: if compressed-tensors 0.20 is not installed.
    """

    def __init__(self, plan: Plan):
        self._reader = _Reader()
        self._plan = plan
        self._missing = Counter(
            (path, expert)
            for path, stack in plan.stacks.items()
            for expert, _ in stack.places.values()
            if stack.spec is not None
        )
        self._waiting: dict[tuple[str, int], list[_Part]] = defaultdict(list)
        self._counts: Counter[str] = Counter(equal=0, different=0, converted=0)
        self._reasons: Counter[str] = Counter()

    def compare(self, module: QuantizedModule, arrays: Arrays) -> list[Fault]:
        """Compare a module, or an expert if this module is the last of its parts.

        Args:
          module: of the plan.
          arrays: its tensors by role.

        Returns:
          A fault for each module with other weights.
        """
        if module.path not in self._plan.places or module.path in self._plan.expanded:
            packed = {role: a for role, a in arrays.items() if role != "bias"}
            leaves = pack(packed, module.spec, module.encoding)
            return self._judge(module, arrays, np.asarray(dequantize(leaves, module.spec)))
        stack = self._plan.places[module.path]
        expert, _ = self._plan.stacks[stack].places[module.path]
        self._waiting[stack, expert].append((module, arrays))
        if len(self._waiting[stack, expert]) < self._missing[stack, expert]:
            return []
        return self._compare_expert(stack, self._waiting.pop((stack, expert)))

    def finish(self) -> list[Fault]:
        """Compare experts that are not complete."""
        faults: list[Fault] = []
        for (stack, _), parts in self._waiting.items():
            faults += self._compare_expert(stack, parts)
        self._waiting.clear()
        return faults

    def leave_out(self, reason: str) -> None:
        """Count a module that is not compared."""
        self._reasons[reason] += 1

    def describe(self) -> dict[str, Any]:
        """The result, in the form of `verify --json`."""
        left_out = [{"reason": reason, "modules": n} for reason, n in self._reasons.items()]
        return {"version": self._reader.version, **self._counts, "not_comparable": left_out}

    def _compare_expert(self, path: str, parts: list[_Part]) -> list[Fault]:
        stack = self._plan.stacks[path]
        assert stack.spec is not None  # float stacks are compared one module at a time
        one = {
            name: jax.ShapeDtypeStruct((1, *leaf.shape[1:]), leaf.dtype)
            for name, leaf in stack.leaves.items()
            if name != "bias"
        }
        leaves = make_stack(one)
        for module, arrays in parts:
            _, row = stack.places[module.path]
            words = {r: a for r, a in arrays.items() if r not in (*_APART, "weight_g_idx")}
            leaves = pack_expert(leaves, words, module.spec, 0, row, module.encoding)
        ours = np.asarray(dequantize(jax.device_put(leaves), stack.spec))[0]
        faults: list[Fault] = []
        for module, arrays in parts:
            _, row = stack.places[module.path]
            rows = ours[row : row + module.spec.out_features]
            faults += self._judge(module, arrays, rows)
        return faults

    def _judge(self, module: QuantizedModule, arrays: Arrays, ours: np.ndarray) -> list[Fault]:
        try:
            theirs, converted = self._reader.decompress(module, arrays)
        except (RuntimeError, ValueError, TypeError, IndexError, AssertionError) as error:
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
            self.leave_out(f"compressed-tensors cannot decompress it: {reason}")
            return []
        differ = find_differences(ours, theirs)
        self._counts["different" if differ.any() else "equal"] += 1
        self._counts["converted"] += converted
        if not differ.any():
            return []
        first = tuple(int(i) for i in np.argwhere(differ)[0])
        what = (
            f"{int(differ.sum())} of {differ.size} weights differ from compressed-tensors "
            f"{self._reader.version}, the first at {list(first)}: {ours[first]} instead of "
            f"{theirs[first]}"
        )
        return [Fault(what, module.tensors["weight_packed"].file.name, module.path, _REPORT)]


def find_differences(ours: np.ndarray, theirs: np.ndarray) -> np.ndarray:
    """Where two arrays of floats differ in any bit, bool of their shape.

    XLA flushes numbers below float32's smallest normal one to zero on a CPU: they count as equal.
    """
    if ours.dtype != theirs.dtype or ours.shape != theirs.shape:
        return np.ones(ours.shape, np.bool_)
    bits = np.dtype(f"u{ours.dtype.itemsize}")
    differ = ours.view(bits) != np.ascontiguousarray(theirs).view(bits)
    if ours.dtype != np.float16:
        differ &= ~((ours == 0) & (np.abs(theirs) < jnp.finfo(ours.dtype).smallest_normal))
    return differ


class _Reader:
    """compressed-tensors, asked for the floats of one module."""

    def __init__(self):
        self._torch = import_extra("torch", "oracle")
        package = import_extra("compressed_tensors", "oracle")
        self.version: str = package.__version__
        if not self.version.startswith(f"{_VERSION}."):
            raise InputError(
                f"--oracle needs compressed-tensors {_VERSION}, found {self.version}: "
                'pip install "jaxwna16[oracle]"'
            )
        name = "compressed_tensors.compressors.pack_quantized"
        self._compressor = import_extra(f"{name}.base", "oracle").PackedQuantizationCompressor
        words = import_extra(f"{name}.helpers", "oracle")
        self._pack, self._unpack = words.pack_to_int32, words.unpack_from_int32

    def decompress(self, module: QuantizedModule, arrays: Arrays) -> tuple[np.ndarray, bool]:
        """The weight [N, K] in the scale's dtype, and whether its integers had to be moved."""
        tensors = {role: self._to_torch(a) for role, a in arrays.items() if role not in _APART}
        groups, encoding = tensors.pop("weight_g_idx", None), module.encoding
        order = None
        if groups is not None and encoding.reordered and not (groups < 0).any():
            order = self._torch.argsort(groups, stable=True)
        state, converted = self._convert(module, tensors, order)
        spec = module.spec
        if encoding.group_size is not None:
            state |= self._divide_groups(state, module)
        state["weight_shape"] = self._torch.tensor([spec.out_features, spec.in_features])
        scheme = self._make_scheme(
            encoding.bits,
            spec.group_size if spec.groups > 1 else None,
            "weight_zero_point" not in state,
        )
        weight = self._compressor.decompress(state, scheme)["weight"]
        if order is not None:
            weight = weight[:, self._torch.argsort(order)]
        return self._to_numpy(weight), converted

    def _make_scheme(self, bits: int, group_size: int | None, symmetric: bool) -> Any:
        quantization = import_extra("compressed_tensors.quantization", "oracle")
        args = quantization.QuantizationArgs(
            num_bits=bits,
            symmetric=symmetric,
            strategy="group" if group_size else "channel",
            group_size=group_size,
        )
        return quantization.QuantizationScheme(targets=["Linear"], weights=args)

    def _convert(
        self, module: QuantizedModule, tensors: dict[str, Any], order: Any
    ) -> tuple[dict[str, Any], bool]:
        """The tensors in the form of compressed-tensors 0.20, and whether they had another one."""
        encoding, spec = module.encoding, module.spec
        bits, aligned = encoding.bits, encoding.words == ALIGNED and 32 % encoding.bits != 0
        if encoding.words == AWQ:
            return self._convert_awq(module, tensors), True
        zero_point = tensors.pop("weight_zero_point", None)
        if encoding.words == GPTQ:
            tensors = {role: tensor.T.contiguous() for role, tensor in tensors.items()}
            zero_point = self._read_gptq_zeros(module, zero_point)
        elif zero_point is not None and aligned:
            zero_point = self._read(zero_point.T, bits, spec.out_features, aligned).T
        moved = aligned or order is not None or encoding.words == GPTQ
        if moved:
            q = self._read(tensors["weight_packed"], bits, spec.in_features, aligned)
            q = q if order is None else q[:, order]
            tensors["weight_packed"] = self._pack(q.contiguous(), bits)
        moved = moved or encoding.zero_points == "zeros"
        if zero_point is not None:
            if zero_point.dtype == self._torch.int8:
                zero_point, moved = self._pack(zero_point.contiguous(), bits, packed_dim=0), True
            elif bits == 4 and zero_point.shape[0] == 1 < zero_point.shape[1]:
                zero_point, moved = zero_point.as_strided(zero_point.shape, (1, 1)), True
            tensors["weight_zero_point"] = zero_point
        return tensors, moved

    def _divide_groups(self, state: dict[str, Any], module: QuantizedModule) -> dict[str, Any]:
        """Scales and zero points of a group, repeated for each of the smaller groups in it."""
        spec, parts = module.spec, module.group_size // module.spec.group_size
        return {
            role: state[role].repeat_interleave(parts, 1)[:, : spec.groups].contiguous()
            for role in ("weight_scale", "weight_zero_point")
            if role in state
        }

    def _convert_awq(self, module: QuantizedModule, tensors: dict[str, Any]) -> dict[str, Any]:
        name = "compressed_tensors.entrypoints.convert.converters.autoawq"
        convert = import_extra(name, "oracle").AutoAWQConverter(
            group_size=module.spec.group_size, zero_point=not module.spec.symmetric, ignore=()
        )
        found = convert.process({f"m.{_AWQ_NAMES[role]}": t for role, t in tensors.items()})
        return {role: found[f"m.{role}"] for role in _AWQ_NAMES if f"m.{role}" in found}

    def _read_gptq_zeros(self, module: QuantizedModule, words: Any) -> Any:
        """int8 [N, G] with a sign; None where the weight is symmetric."""
        encoding, spec = module.encoding, module.spec
        if spec.symmetric or words is None:
            return None
        bits = encoding.bits
        less_one = encoding.zero_points in (LESS_ONE, LESS_ONE_BORROWED)
        if less_one and 32 % bits == 0:  # a word is one number, which wraps around
            ones = sum(1 << shift for shift in range(0, 32, bits))
            words = words + (ones if ones < 2**31 else ones - 2**32)
        values = self._read(words, bits, spec.out_features, False)
        if less_one and 32 % bits:
            values = ((values + 2 ** (bits - 1) + 1) % 2**bits - 2 ** (bits - 1)).to(values.dtype)
        return values.T

    def _read(self, words: Any, bits: int, length: int, aligned: bool) -> Any:
        """int32 words [rows, …] -> the signed values in them, int8 [rows, length]."""
        if not aligned:
            return self._unpack(words.contiguous(), bits, (words.shape[0], length))
        shifts = self._torch.arange(0, 32 // bits) * bits
        values = (words.contiguous()[:, :, None] >> shifts) & (2**bits - 1)
        values = values.reshape(words.shape[0], -1)[:, :length] - 2 ** (bits - 1)
        return values.to(self._torch.int8)

    def _to_torch(self, array: np.ndarray) -> Any:
        if array.dtype == ml_dtypes.bfloat16:
            return self._torch.from_numpy(array.view(np.int16)).view(self._torch.bfloat16)
        return self._torch.from_numpy(array)

    def _to_numpy(self, tensor: Any) -> np.ndarray:
        tensor = tensor.contiguous()
        if tensor.dtype == self._torch.bfloat16:
            return tensor.view(self._torch.int16).numpy().view(ml_dtypes.bfloat16)
        return tensor.numpy()
