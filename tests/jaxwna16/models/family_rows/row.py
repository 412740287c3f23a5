"""`Row`: what the tests of a `model_type` are made of."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

Changes = Mapping[str, Any]

SMALL: Changes = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.3,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": 0,
}


def center_plain(name: str) -> float | None:
    """Weights of norms are around 1, all other vectors around 0."""
    return 1.0 if "norm" in name else 0.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """What the tests of a `model_type` are made of.

    Attributes:
      variants: name -> what differs from `sizes` in transformers' configuration. The whole suite
        runs on the first, the others have their logits compared.
      bits, group_size, symmetric, scale_dtype: how the weights of the first are packed; a
        group_size of -1 is one group for each row.
      is_repeated: whether another row has the same layers, under other names in files; then only
        logits in pieces are always compared, and the rest thoroughly.
      ignore: patterns of what stays plain beside heads and routers.
      needed: keys for which transformers' configuration has no default.
      bfloat16: what differs in the model whose logits in bfloat16 are compared; None is no such
        test. With experts all must be chosen, since the 16-bit logits of a router may choose
        others.
      length, piece: tokens of a row, and of the pieces it is cut into.
      sizes: of the configuration.
      nest: makes transformers' configuration of the text model's, where that is one of its parts.
      center: the value around which a vector is drawn, by its name; None leaves it as transformers
        draws it.
    """

    variants: Mapping[str, Changes]
    bits: int = 4
    group_size: int = 16
    symmetric: bool = False
    scale_dtype: str = "bfloat16"
    is_repeated: bool = False
    ignore: tuple[str, ...] = ()
    needed: Changes = dataclasses.field(default_factory=dict)
    bfloat16: Changes | None = None
    length: int = 24
    piece: int = 8
    sizes: Changes = dataclasses.field(default_factory=lambda: SMALL)
    nest: Callable[[dict[str, Any]], dict[str, Any]] | None = None
    center: Callable[[str], float | None] = center_plain


def rope(rope_type: str, **parameters) -> dict:
    """A configuration change that asks for this rope."""
    return {"rope_parameters": {"rope_type": rope_type, "rope_theta": 10000.0, **parameters}}
