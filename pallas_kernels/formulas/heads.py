"""`Heads`: how a layer of attention is divided."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True, kw_only=True)
class Heads:
    """The static facts of a layer.

    Attributes:
      head_dim: D.
      kv_heads: heads of keys and values; of queries there are a multiple.
      gated: of each query head, D features of the query are followed by D of a gate, whose sigmoid
        multiplies the result.
      norms_across: queries and keys are normalised over all heads together, not one by one.
      norms_last: a head is rotated first, and then normalised (not with `norms_across`).
      scale: of the scores; None is 1 / sqrt(D).
      paired: neighbouring features are rotated together, see `rotate`.
      softcap: c of scores c tanh(s / c), s a score with its scale; None is s itself.
      value_eps: of a norm of each head's value, which has no weight; None is no norm.
    """

    head_dim: int
    kv_heads: int
    gated: bool = False
    norms_across: bool = False
    norms_last: bool = False
    scale: float | None = None
    paired: bool = False
    softcap: float | None = None
    value_eps: float | None = None
