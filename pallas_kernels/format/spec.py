"""`QuantSpec`: the static facts of a packed weight."""

from __future__ import annotations

import dataclasses

from pallas_kernels.errors import SpecError

LAYOUT_VERSION = 1
"""Version of `pallas_kernels.format.layout`; it changes when a stored tree would be misread."""

TILE_N = 64
SLAB_K = 32
WORD_BITS = 16
_BITS = (4, 8)


@dataclasses.dataclass(frozen=True, kw_only=True)
class QuantSpec:
    """The static facts of one quantized weight W[N, K] with `W = (q - zero_point) * scale`.

    Frozen and hashable, so it can be a static argument of `jax.jit`. It is never in a param tree.

    Attributes:
      bits: width of the integers q, 4 or 8; q lies in [-2^(bits-1), 2^(bits-1) - 1].
      group_size: consecutive input features that share a scale; it divides `in_features`. -1 (one
        group, "channel") is accepted and becomes `in_features`.
      symmetric: whether there is no zero point.
      in_features: K, the inner dimension of x @ W.T.
      out_features: N.
      layout_version: version of the tile layout the arrays are in.

    Raises:
      SpecError: if the values are not integers in range or the group does not divide K.

    Example:
      ```python
      spec = jaxwna16.QuantSpec(
          bits=4, group_size=32, symmetric=False, in_features=64, out_features=128
      )
      assert spec.groups == 2
      ```
    """

    bits: int
    group_size: int
    symmetric: bool
    in_features: int
    out_features: int
    layout_version: int = LAYOUT_VERSION

    def __post_init__(self):
        for name in ("bits", "group_size", "in_features", "out_features", "layout_version"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int):
                raise SpecError(f"QuantSpec.{name} must be an int, got {value!r}")
        if not isinstance(self.symmetric, bool):
            raise SpecError(f"QuantSpec.symmetric must be a bool, got {self.symmetric!r}")
        if self.bits not in _BITS:
            raise SpecError(f"QuantSpec.bits must be one of {_BITS}, got {self.bits}")
        if self.in_features < 1 or self.out_features < 1:
            raise SpecError(
                f"QuantSpec needs in_features >= 1 and out_features >= 1, "
                f"got {self.in_features} and {self.out_features}"
            )
        if self.group_size == -1:
            object.__setattr__(self, "group_size", self.in_features)
        if self.group_size < 1 or self.in_features % self.group_size:
            raise SpecError(
                f"QuantSpec.group_size must divide in_features = {self.in_features} "
                f"(-1 for one group per channel), got {self.group_size}"
            )
        if self.layout_version != LAYOUT_VERSION:
            raise SpecError(
                f"the arrays have tile layout version {self.layout_version}, this release reads "
                f"version {LAYOUT_VERSION}: load the original checkpoint again"
            )

    @property
    def groups(self) -> int:
        """G, the number of groups along K."""
        return self.in_features // self.group_size

    @property
    def planes(self) -> int:
        """How many values one 16-bit word holds: 4 at 4 bits, 2 at 8."""
        return WORD_BITS // self.bits

    @property
    def tile_k(self) -> int:
        """Input features of one tile: `planes` slabs of 32."""
        return self.planes * SLAB_K

    @property
    def is_mixed(self) -> bool:
        """Whether a slab of 32 input features may span two groups."""
        return self.groups > 1 and self.group_size % SLAB_K != 0

    @property
    def tiles_n(self) -> int:
        """Tiles along N, the last one padded."""
        return -(-self.out_features // TILE_N)

    @property
    def tiles_k(self) -> int:
        """Tiles along K, the last one padded."""
        return -(-self.in_features // self.tile_k)

    @property
    def packed_shape(self) -> tuple[int, int, int, int]:
        """Shape of `packed` (uint16): [ceil(N / 64), ceil(K / tile_k), 64, 32]."""
        return (self.tiles_n, self.tiles_k, TILE_N, SLAB_K)

    @property
    def scale_shape(self) -> tuple[int, int]:
        """Shape of `scale` and `zero_point`: [G, N padded to whole tiles]."""
        return (self.groups, self.tiles_n * TILE_N)

    @property
    def offset(self) -> int:
        """2^(bits-1), which is added to q to store it without a sign."""
        return 1 << (self.bits - 1)
