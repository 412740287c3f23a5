"""Experts: under which names files hold them, and the stacks that they become, or what is wrong.

    experts.3.gate_proj, .up_proj, .down_proj    one expert; or Mixtral's w1, w3 and w2
    experts.gate_up_proj, experts.down_proj      all of them, [E, 2I, H] and [E, H, I]
    block_sparse_moe.input_linear,
    block_sparse_moe.output_linear               the same, of Granite

become `experts.w13`, the rows of gate and then those of up, and `experts.w2`; of Granite
`block_sparse_moe.w13` and `.w2`. Without a gate, w13 is up alone. The second form are plain tensors
of that very name (transformers 5), quantized modules (`experts.gate_up_proj.weight_packed`), or,
written by llm-compressor 0.12, the same without the dot (`experts.gate_up_proj_packed`). The third
are modules, plain (`.weight`) or quantized. Rows stay in the order of the file, also where the
model interleaves gate and up.

Experts of which some are packed and others not, or in another way, are a stack of floats.
"""

from __future__ import annotations

import dataclasses
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from itertools import pairwise
from typing import Any

import jax
import numpy as np

from loaders.errors import Fault, write_ranges
from loaders.files.safetensors_file import TensorInfo
from loaders.modules.modules import MAX_EXPERTS, PER_EXPERT, QuantizedModule
from loaders.schemes.subconfigs import find_subconfigs
from pallas_kernels.format.spec import QuantSpec
from pallas_kernels.format.weights import SCALE_DTYPES, make_abstract

_JOINT = re.compile(
    r"((?:.*\.)?experts\.(?:gate_up|gate|up|down)_proj)(?:_(packed|scale|zero_point|shape|g_idx|bias))?"
)
_PARALLEL = re.compile(r"(?:.*\.)?block_sparse_moe\.(?:input|output)_linear")
_MEMBER = re.compile(
    r"((?:.*\.)?experts)\.(?:([0-9]+)\.)?(gate_up_proj|gate_proj|up_proj|down_proj|w1|w2|w3)"
    r"(?:\[([0-9]+)\])?"
)
_PARALLEL_MEMBER = re.compile(
    r"((?:.*\.)?block_sparse_moe)()\.(input_linear|output_linear)\[([0-9]+)\]"
)
_SLICE = re.compile(
    r"((?:.*\.)?experts)\.(gate_up_proj|gate_proj|up_proj|down_proj)(_bias)?\[([0-9]+)\]"
)
_PARALLEL_SLICE = re.compile(
    r"((?:.*\.)?block_sparse_moe)\.(input_linear|output_linear)\.weight()\[([0-9]+)\]"
)
_LAYER = re.compile(r"(?:.*\.)?(?:experts|block_sparse_moe(?!\.experts))(?=\.|$)")
# what files call a projection -> which it is
_KINDS = {"gate_up_proj": "gate_up", "gate_proj": "gate", "up_proj": "up", "down_proj": "down"}
_MIXTRAL = {"w1": "gate", "w3": "up", "w2": "down"}
_GRANITE = {"input_linear": "gate_up", "output_linear": "down"}
_ALL_KINDS = _KINDS | _MIXTRAL | _GRANITE
_PRODUCTS = {"w13": ("gate_up", "gate", "up"), "w2": ("down",)}
_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts")

Member = QuantizedModule | Mapping[str, TensorInfo]
"""A quantized module, or the tensors of one that is not, by role ("weight", "bias"); empty if they
have faults already."""
_Part = tuple[int, str]  # expert and kind of projection
_Parts = Mapping[_Part, tuple[str, Member]]


@dataclasses.dataclass(frozen=True)
class Stack:
    """The experts of one layer for one product, as the params tree holds them.

    Attributes:
      experts: E.
      spec: of each expert, None where they are floats in the tree. Modules among them that are
        packed in the files are then dequantized when they are loaded.
      leaves: name -> shape and dtype of the leaves, E in front.
      places: which expert and which first row are each module's (by path) or tensor's (by name).
    """

    experts: int
    spec: QuantSpec | None
    leaves: Mapping[str, jax.ShapeDtypeStruct]
    places: Mapping[str, tuple[int, int]]


def split_name(name: str) -> tuple[str, str]:
    """Path of the module and role of a tensor: "a.b.weight" -> ("a.b", "weight")."""
    path, _, role = name.rpartition(".")
    joint = _JOINT.fullmatch(name) if "_proj" in role else None
    if joint is None:
        return path, role
    role = joint[2] or "weight"
    return joint[1], role if role in ("weight", "bias") else f"weight_{role}"


def are_stacked(path: str, found: Mapping[str, TensorInfo]) -> bool:
    """Whether a module's tensors by role are those of all experts of a layer, in three axes."""
    main = found.get("weight_packed", found.get("weight"))
    if main is None or len(main.shape) != 3:
        return False
    if _PARALLEL.fullmatch(path) is not None:
        return True
    # under "….weight" it is some other module that has three axes
    is_named = "weight_packed" in found or main.name == path
    return is_named and _JOINT.fullmatch(path) is not None


def holds_gate_and_up(path: str) -> bool:
    """Whether a module of stacked experts has the rows of two projections."""
    return _ALL_KINDS[path.rpartition(".")[2]] == "gate_up"


def name_layer(path: str) -> str:
    """The path of the experts of a layer, of anything in it; "" of what is not among experts."""
    match = _LAYER.match(path)
    return "" if match is None else match[0]


def name_slices(path: str, found: Mapping[str, TensorInfo]) -> list[str]:
    """The paths of the experts of such a module: "experts.down_proj[0]" and so on."""
    shape = found["weight_packed" if "weight_packed" in found else "weight"].shape
    return [f"{path}[{i}]" for i in range(0 if 0 in shape else min(shape[0], MAX_EXPERTS))]


def name_separately(name: str) -> list[str]:
    """The names under which a tensor of one expert stands where experts are separate.

    Its rows are dealt out to them: "experts.gate_up_proj[3]" -> ["experts.3.gate_proj.weight",
    "experts.3.up_proj.weight"]. Any other name is its own.
    """
    joint, parallel = _SLICE.fullmatch(name), _PARALLEL_SLICE.fullmatch(name)
    match = joint or parallel
    if match is None:
        return [name]
    path, projection, bias, expert = match.groups()
    path, role = path if joint else f"{path}.experts", "bias" if bias else "weight"
    kind = _ALL_KINDS[projection]
    kinds = ("gate", "up") if kind == "gate_up" else (kind,)
    return [f"{path}.{expert}.{kind}_proj.{role}" for kind in kinds]


def plan_stacks(
    members: Mapping[str, Member], config: Mapping[str, Any]
) -> tuple[dict[str, Stack], list[Fault]]:
    """Find the experts among modules.

    Args:
      members: all modules by path; those of stacked experts one by one, as "experts.down_proj[3]".
      config: config.json, which may say how many experts there are.

    Returns:
      The stacks by path, "….experts.w13" and "….experts.w2", and what is wrong.
    """
    layers: dict[str, dict[tuple[int, str], list[str]]] = defaultdict(lambda: defaultdict(list))
    for path in members:
        match = _MEMBER.fullmatch(path) or _PARALLEL_MEMBER.fullmatch(path)
        if match is not None and bool(match[2]) != bool(match[4]):
            kind = _ALL_KINDS[match[3]]
            layers[match[1]][int(match[2] or match[4]), kind].append(path)
    if not layers:
        return {}, []
    count, faults = _read_count(config)
    stacks: dict[str, Stack] = {}
    for path, found in layers.items():
        parts = {part: (names[0], members[names[0]]) for part, names in found.items()}
        experts = count or 1 + max(expert for expert, _ in parts)
        wrong = list(_list_twice(path, found)) or [
            *_list_missing(path, parts, experts),
            *_list_unlike(path, parts),
        ]
        whole = all(member for _, member in parts.values())
        if whole and not wrong:
            wrong = list(_check_sizes(path, parts))
        if whole and not wrong:
            for product, kinds in _PRODUCTS.items():
                chosen = {part: held for part, held in parts.items() if part[1] in kinds}
                stacks[f"{path}.{product}"] = _make_stack(chosen, experts)
        faults += wrong
    return stacks, faults


def describe_mixed(
    stacks: Mapping[str, Stack], quantized: Mapping[str, QuantizedModule]
) -> list[str]:
    """Warnings about stacks of floats that are packed in the files, at least in part."""
    return [
        f"{path}: {packed} of {len(stack.places)} matrices are packed, but not all in one way: "
        "all are loaded as floats"
        for path, stack in stacks.items()
        if stack.spec is None and (packed := sum(name in quantized for name in stack.places))
    ]


def _read_count(config: Mapping[str, Any]) -> tuple[int | None, list[Fault]]:
    """How many experts config.json says a layer has, or None."""
    parts = {"": config, **{f"{key}.": part for key, part in find_subconfigs(config).items()}}
    counts = {
        prefix + name: part[name]
        for prefix, part in parts.items()
        for name in _COUNTS
        if type(part.get(name)) is int and part[name] > 0
    }
    for field, value in counts.items():
        if value > MAX_EXPERTS:  # what is missing of them is counted and written
            way_out = "correct config.json if it is wrong"
            return None, [Fault(f"more than {MAX_EXPERTS} experts", "config.json", field, way_out)]
    if len(set(counts.values())) > 1:
        fields = ", ".join(f"{field} = {value}" for field, value in counts.items())
        return None, [Fault(f"contradict each other: {fields}", "config.json")]
    return next(iter(counts.values()), None), []


def _list_twice(path: str, found: Mapping[_Part, list[str]]) -> Iterator[Fault]:
    """Modules that would take the same place."""
    for names in found.values():
        if len(names) > 1:
            yield Fault(f"takes the same place among the experts as {names[1]}", tensor=names[0])
    joint = [expert for expert, kind in found if kind == "gate_up"]
    separate = {expert for expert, kind in found if kind in ("gate", "up")}
    if joint and separate:
        what = (
            f"gate and up are one tensor in experts {write_ranges(joint)}, "
            f"and tensors of their own in experts {write_ranges(separate)}"
        )
        yield Fault(what, tensor=path)


def _list_missing(path: str, parts: _Parts, experts: int) -> Iterator[Fault]:
    numbers, kinds = {expert for expert, _ in parts}, {kind for _, kind in parts}
    known = sorted(number for number in numbers if number < experts)
    gaps = [range(a + 1, b) for a, b in pairwise([-1, *known, experts]) if b - a > 1]
    if gaps:
        named = ",".join(f"{gap[0]}-{gap[-1]}" if gap[-1] > gap[0] else str(gap[0]) for gap in gaps)
        what = f"{experts - len(known)} of {experts} experts are missing: {named}"
        yield Fault(what, tensor=path, way_out="download the checkpoint again")
    if excess := numbers.difference(known):
        what = f"expected the {experts} experts of config.json, found also {write_ranges(excess)}"
        yield Fault(what, tensor=path, way_out="correct config.json if it is wrong")
    first = ("gate_up",) if "gate_up" in kinds else ("gate", "up") if "gate" in kinds else ("up",)
    name, _ = next(iter(parts.values()))
    last = name.partition("[")[0].rpartition(".")[2]
    spellings = next(names for names in (_KINDS, _MIXTRAL, _GRANITE) if last in names)
    for projection, kind in spellings.items():
        lacking = [number for number in numbers if (number, kind) not in parts]
        if lacking and kind in (*first, "down"):
            what = f"{projection} is missing in experts {write_ranges(lacking)}"
            yield Fault(what, tensor=path, way_out="download the checkpoint again")


def _list_unlike(path: str, parts: _Parts) -> Iterator[Fault]:
    """What keeps the experts of a product from being one array."""
    for kinds in _PRODUCTS.values():
        alike: dict[str, dict[str, list[int]]] = defaultdict(lambda: defaultdict(list))
        shapes = set()
        for (expert, kind), (name, member) in parts.items():
            if kind not in kinds or not member:
                continue
            if not _can_be_stacked(member):
                what = f"expected a float weight [N, K], found {_describe(member)}"
                yield Fault(what, tensor=name, way_out=PER_EXPERT)
                continue
            shapes.add((_read_sizes(member), _read_bias(member)))
            projection = name.partition("[")[0].rpartition(".")[2]
            alike[_describe(member)][projection].append(expert)
        if len(shapes) > 1:
            found = "; ".join(f"{text} in {_list_experts(where)}" for text, where in alike.items())
            what = f"the experts of one product must have the same shape and bias, found {found}"
            yield Fault(what, tensor=path, way_out="quantize the model again")


def _list_experts(where: Mapping[str, list[int]]) -> str:
    return ", ".join(f"{name} of experts {write_ranges(n)}" for name, n in where.items())


def _can_be_stacked(member: Member) -> bool:
    if isinstance(member, QuantizedModule):
        return True
    shapes = {role: info.shape for role, info in member.items()}
    n = shapes.get("weight", (0,))[0]
    return (
        len(shapes.get("weight", ())) == 2
        and shapes.keys() <= {"weight", "bias"}
        and shapes.get("bias", (n,)) == (n,)
        and all(info.dtype_name in SCALE_DTYPES for info in member.values())
    )


def _describe(member: Member) -> str:
    """Everything that the experts of a stack must have in common."""
    if not isinstance(member, QuantizedModule):
        return ", ".join(
            f"{role} {info.dtype_name} {list(info.shape)}" for role, info in sorted(member.items())
        )
    spec, bias = member.spec, member.tensors.get("bias")
    group = "channel" if spec.groups == 1 else f"g{spec.group_size}"
    scale = member.tensors["weight_scale"]
    return (
        f"W{spec.bits} {group} {'sym' if spec.symmetric else 'asym'} "
        f"[{spec.out_features}, {spec.in_features}] with {scale.dtype_name} scales"
        + (f" and {bias.dtype_name} bias" if bias is not None else "")
    )


def _check_sizes(path: str, parts: _Parts) -> Iterator[Fault]:
    """Whether what the first product gives is what the second one takes."""
    sizes = {kind: _read_sizes(member) for (_, kind), (_, member) in parts.items()}
    down, first = sizes["down"], [sizes[kind] for kind in sizes if kind != "down"]
    rows, gated = sum(n for n, _ in first), "gate" in sizes or "gate_up" in sizes
    if (rows, first[0][1]) != (down[1] * (2 if gated else 1), down[0]):
        what = (
            f"expected {'[2I, H]' if gated else '[I, H]'} and [H, I] in each expert, "
            f"found [{rows}, {first[0][1]}] and {list(down)}"
        )
        yield Fault(what, tensor=path, way_out=PER_EXPERT)


def _make_stack(parts: _Parts, experts: int) -> Stack:
    sizes = {kind: _read_sizes(member)[0] for (_, kind), (_, member) in parts.items()}
    first_rows, rows = {}, 0
    for kind in ("gate_up", "gate", "up", "down"):
        first_rows[kind], rows = rows, rows + sizes.get(kind, 0)
    places: dict[str, tuple[int, int]] = {}
    for (expert, kind), (name, member) in parts.items():
        held = [name] if isinstance(member, QuantizedModule) else [i.name for i in member.values()]
        places |= dict.fromkeys(held, (expert, first_rows[kind]))
    members = [member for _, member in parts.values()]
    bias = _read_bias(first := members[0])
    if not isinstance(first, QuantizedModule) or len({_describe(m) for m in members}) > 1:
        # of several dtypes, float32 alone holds the numbers of all
        dtypes = {_read_dtype(member) for member in members}
        dtype = dtypes.pop() if len(dtypes) == 1 else np.dtype(np.float32)
        shape = (experts, rows, _read_sizes(first)[1])
        leaves = {"weight": jax.ShapeDtypeStruct(shape, dtype)}
        if bias is not None:
            leaves["bias"] = jax.ShapeDtypeStruct(shape[:2], bias)
        return Stack(experts, None, leaves, places)
    spec = dataclasses.replace(first.spec, out_features=rows)
    return Stack(
        experts, spec, make_abstract(spec, _read_dtype(first), bias, experts=experts), places
    )


def _read_dtype(member: Member) -> np.dtype:
    """Of its floats, packed or not."""
    if isinstance(member, QuantizedModule):
        return member.tensors["weight_scale"].dtype
    return member["weight"].dtype


def _read_bias(member: Member) -> np.dtype | None:
    """The dtype of the bias, if there is one."""
    tensors = member.tensors if isinstance(member, QuantizedModule) else member
    return tensors["bias"].dtype if "bias" in tensors else None


def _read_sizes(member: Member) -> tuple[int, int]:
    """N and K."""
    if isinstance(member, QuantizedModule):
        return member.spec.out_features, member.spec.in_features
    n, k = member["weight"].shape
    return n, k
