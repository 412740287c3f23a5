"""The shapes that are timed: linear layers, experts and steps of known models, and squares.

A linear layer is written K x N, experts H x I x E x top_k.
"""

from __future__ import annotations

import argparse
import dataclasses
import re

TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)


@dataclasses.dataclass(frozen=True)
class Shape:
    """A weight W[N, K].

    Attributes:
      in_features: K.
      out_features: N.
      role: where it comes from, for people.
    """

    in_features: int
    out_features: int
    role: str = dataclasses.field(default="", compare=False)

    @property
    def label(self) -> str:
        """ "8192x28672": K, then N."""
        return f"{self.in_features}x{self.out_features}"


@dataclasses.dataclass(frozen=True)
class MoeShape:
    """Gated experts: gate and up [2 I, H], down [H, I], E of each.

    Attributes:
      hidden: H.
      intermediate: I.
      experts: E.
      top_k: how many a token chooses, at most E.
      role: where it comes from, for people.
    """

    hidden: int
    intermediate: int
    experts: int
    top_k: int
    role: str = dataclasses.field(default="", compare=False)

    @property
    def label(self) -> str:
        """ "2048x768 E128 k8": H, I, E and top_k."""
        return f"{self.hidden}x{self.intermediate} E{self.experts} k{self.top_k}"


def _list_layers(model: str, hidden: int, queries: int, keys: int, middle: int = 0) -> list[Shape]:
    layers = [
        Shape(hidden, queries, f"{model} q"),
        Shape(hidden, keys, f"{model} k, v"),
        Shape(queries, hidden, f"{model} o"),
    ]
    if middle:
        layers.append(Shape(hidden, middle, f"{model} gate, up"))
        layers.append(Shape(middle, hidden, f"{model} down"))
    return layers


MODELS = {
    "llama-3.1-8b": _list_layers("Llama-3.1-8B", 4096, 4096, 1024, 14336),
    "llama-3.3-70b": _list_layers("Llama-3.3-70B", 8192, 8192, 1024, 28672),
    # its experts are not dense, its router is not quantized
    "qwen3-30b-a3b": _list_layers("Qwen3-30B-A3B", 2048, 4096, 512),
}
MOE_MODELS = {
    "qwen3-30b-a3b": MoeShape(2048, 768, 128, 8, "Qwen3-30B-A3B experts"),
    "mixtral-8x7b": MoeShape(4096, 14336, 8, 2, "Mixtral-8x7B experts"),
    "qwen3.5-122b-a10b": MoeShape(3072, 1024, 256, 8, "Qwen3.5-122B-A10B experts"),
    "deepseek-v3": MoeShape(7168, 2048, 256, 8, "DeepSeek-V3 routed experts"),
}
SQUARES = [Shape(8192, 8192), Shape(8192, 28672), Shape(4096, 4096), Shape(16384, 16384)]
"""Shapes that other projects publish figures for."""


def list_default_shapes() -> list[Shape]:
    """Every shape once: what others publish first, so that it is timed if time runs out."""
    return _merge([*SQUARES[:3], *(s for shapes in MODELS.values() for s in shapes), SQUARES[3]])


def parse_shapes(text: str) -> list[Shape]:
    """Read "8192x28672,llama-3.1-8b": shapes K x N, and names of models.

    Raises:
      argparse.ArgumentTypeError: if a part is neither.
    """
    shapes: list[Shape] = []
    for part in text.split(","):
        pair = re.fullmatch(r"([1-9]\d*)[x×]([1-9]\d*)", part)
        if pair:
            shapes.append(Shape(int(pair[1]), int(pair[2])))
        elif part.lower() in MODELS:
            shapes += MODELS[part.lower()]
        else:
            raise argparse.ArgumentTypeError(
                f"{part!r} is neither KxN (8192x28672) nor one of {', '.join(MODELS)}"
            )
    return _merge(shapes)


def parse_moe_shapes(text: str) -> list[MoeShape]:
    """Read "mixtral-8x7b,2048x768x128x8": names of models, and shapes H x I x E x top_k.

    Raises:
      argparse.ArgumentTypeError: if a part is neither, or a token chooses more experts than there
        are.
    """
    shapes: list[MoeShape] = []
    for part in text.split(","):
        if part.lower() in MOE_MODELS:
            shapes.append(MOE_MODELS[part.lower()])
            continue
        if not re.fullmatch(r"[1-9]\d*([x×][1-9]\d*){3}", part):
            raise argparse.ArgumentTypeError(
                f"{part!r} is neither HxIxExtop_k (2048x768x128x8) nor one of "
                f"{', '.join(MOE_MODELS)}"
            )
        hidden, intermediate, experts, top_k = map(int, re.split("[x×]", part))
        shape = MoeShape(hidden, intermediate, experts, top_k)
        if shape.top_k > shape.experts:
            raise argparse.ArgumentTypeError(
                f"{part!r}: a token cannot choose {shape.top_k} of {shape.experts} experts"
            )
        shapes.append(shape)
    return list(dict.fromkeys(shapes))


def parse_counts(text: str) -> list[int]:
    """Read "1,16,256": positive numbers, each kept once, in ascending order.

    Raises:
      argparse.ArgumentTypeError: if a part is no positive integer.
    """
    parts = text.split(",")
    if not all(re.fullmatch(r"[1-9]\d*", part) for part in parts):
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of positive integers (1,16,256)")
    return sorted({int(part) for part in parts})


def parse_group_size(text: str) -> int:
    """Read a group size: a positive number, or "channel" for one group, which is -1.

    Raises:
      argparse.ArgumentTypeError: if it is neither.
    """
    if text == "channel":
        return -1
    if not re.fullmatch(r"[1-9]\d*", text):
        raise argparse.ArgumentTypeError(f'{text!r} is neither a positive integer nor "channel"')
    return int(text)


def _merge(shapes: list[Shape]) -> list[Shape]:
    """Each shape once, with the roles of all its namesakes."""
    roles: dict[Shape, list[str]] = {}
    for shape in shapes:
        known = roles.setdefault(shape, [])
        known += [role for role in [shape.role] if role and role not in known]
    return [dataclasses.replace(shape, role="; ".join(names)) for shape, names in roles.items()]


@dataclasses.dataclass(frozen=True)
class StepShape:
    """A language model's decode step.

    Attributes:
      name: of the model.
      hidden, inner, layers, heads, kv_heads, head_dim, vocabulary: its sizes; `inner` of one expert
        where there are experts.
      experts, top_k: how many, and how many a token chooses; 0 without.
      group_size: input features that share a scale.
    """

    name: str
    hidden: int
    inner: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    experts: int = 0
    top_k: int = 0
    group_size: int = 128

    @property
    def label(self) -> str:
        """Its name."""
        return self.name

    def describe_config(self) -> dict[str, object]:
        """A config.json."""
        config: dict[str, object] = {
            "model_type": "qwen3_moe" if self.experts else "llama",
            "hidden_size": self.hidden,
            "intermediate_size": self.inner,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.head_dim,
            "max_position_embeddings": 131072,
            "vocab_size": self.vocabulary,
            "tie_word_embeddings": False,
        }
        if self.experts:
            config |= {
                "num_experts": self.experts,
                "num_experts_per_tok": self.top_k,
                "moe_intermediate_size": self.inner,
                "norm_topk_prob": True,
                "decoder_sparse_step": 1,
            }
        return config


STEP_MODELS = {
    "llama-3.1-8b": StepShape("llama-3.1-8b", 4096, 14336, 32, 32, 8, 128, 128256),
    "qwen3-30b-a3b": StepShape("qwen3-30b-a3b", 2048, 768, 48, 32, 4, 128, 151936, 128, 8),
}
TINY_STEP = StepShape("tiny", 128, 128, 2, 4, 2, 64, 64, group_size=32)
"""For a CPU, to try the bench."""


def parse_step_models(text: str) -> list[StepShape]:
    """Models by name: "llama-3.1-8b,qwen3-30b-a3b"."""
    names = text.split(",")
    known = STEP_MODELS | {TINY_STEP.name: TINY_STEP}
    if unknown := [name for name in names if name not in known]:
        raise argparse.ArgumentTypeError(f"no model {unknown[0]!r}: there are {', '.join(known)}")
    return [known[name] for name in names]
