"""What is said of a program between processes: no jax is needed to read it."""

from __future__ import annotations

import dataclasses
import json
import re
from typing import Any, TypeVar

T = TypeVar("T")

DECODE_SLOTS, DECODE_POSITION = 4096, 2048
PREFILL_SLOTS = 4224
"""No other dimension of the models, so that an array with such an axis is of scores."""

BEGIN = -1
"""The layer of what depends on none: embedding, rotation, keys of sampling."""
END = 1 << 20
"""The layer of what follows all: last norm, head, sampling."""


@dataclasses.dataclass(frozen=True)
class Kernel:
    """What an instruction became.

    Attributes:
      name: of the kernel.
      source: the Python function that it comes from.
      weights: names of the parameters that it reads, within their layer.
      layer: `BEGIN`, a layer's number, or `END`.
      launches: in one step; an instruction may be several kernels, or stand in a loop.
      programs: of the grid.
      read, written: bytes of all launches.
      flops: of the products in it.
      is_recorded: whether it stands in a command buffer.
      copies_cache: whether it writes as much as a whole layer's keys or values.
      scores: elements of a float array with an axis of C that is no cache; 0 without one.
    """

    name: str
    source: str
    weights: tuple[str, ...]
    layer: int
    launches: int
    programs: int
    read: int
    written: int
    flops: float
    is_recorded: bool
    copies_cache: bool
    scores: int

    @property
    def bytes(self) -> int:
        return self.read + self.written

    def describe(self) -> str:
        """A few words for a list: what it reads, or where it comes from."""
        name = re.sub(r"(__?\d+)+$", "", self.name)
        if self.weights:
            held = dict.fromkeys(re.sub(r"\.(packed|scale|zero_point|weight)$", "", w)
                                 for w in self.weights)  # fmt: skip
            return f"{name} ({', '.join(part.split('.')[-1] for part in held)})"
        return f"{name} ({self.source})" if self.source else name


@dataclasses.dataclass(frozen=True)
class Program:
    """What is compiled.

    Attributes:
      kind: "decode" or "prefill".
      size: rows of a batch that decodes, or tokens of a piece of one row.
      layers: the first so many of the model; None for all.
      changes: keys of the config.json that are not the model's own.
    """

    model: str
    arch: str
    kind: str
    size: int
    layers: int | None
    changes: dict[str, int] = dataclasses.field(default_factory=dict)

    def __str__(self) -> str:
        unit = "batch" if self.kind == "decode" else "piece"
        depth = f"{self.layers} layers" if self.layers else "all layers"
        return f"{self.model} {self.arch} {self.kind} {unit} {self.size} {depth}"


@dataclasses.dataclass(frozen=True)
class Reading:
    """What became of a program.

    Attributes:
      seconds: of "trace", "lower" and "compile".
      temporaries: bytes beside arguments and results.
      command_buffers: in the whole program.
      kinds: of each layer that was compiled.
      whole_layers: of the published model.
      tokens: that one step is of.
      must_move: bytes of a step for weights, "layers" and "ends" apart, each weight and each seen
        slot once: `layer_bytes` for each layer, `end_bytes` for the rest.
      kernels: of a step that picks the likeliest token.
      sampled: of one that draws it after top-k and top-p; empty for prefill.
    """

    program: Program
    seconds: dict[str, float]
    temporaries: int
    command_buffers: int
    kinds: list[str]
    whole_layers: int
    tokens: int
    layer_bytes: list[float]
    end_bytes: float
    kernels: list[Kernel]
    sampled: list[Kernel]

    def list_layer(self, layer: int) -> list[Kernel]:
        """The kernels of a layer."""
        return [kernel for kernel in self.kernels if kernel.layer == layer]

    def find_typical(self, kind: str) -> int:
        """A layer of a kind, which stands between others if it can."""
        inner = [i for i, each in enumerate(self.kinds) if each == kind]
        return next((i for i in inner if 0 < i < len(self.kinds) - 1), inner[-1])


def to_json(record: Any) -> str:
    """One line."""
    return json.dumps(dataclasses.asdict(record))


def from_json(kind: type[T], text: str) -> T:
    """A `Program` or `Reading` of such a line."""
    found = json.loads(text)
    if kind is Reading:
        found["program"] = Program(**found["program"])
        for name in ("kernels", "sampled"):
            found[name] = [Kernel(**k | {"weights": tuple(k["weights"])}) for k in found[name]]
    return kind(**found)
