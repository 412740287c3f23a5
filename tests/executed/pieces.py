"""Attention of a piece at shapes small enough to execute, with the tiles of a long piece.

The first row is in the middle of its prompt: its last tile has whole blocks, so many that the copy
pipeline goes round, and blocks that only some queries see; with a window, blocks that it begins in.
The second row is short, and ends within a tile; the third has no token.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.tiles.attention.flash_rules import FlashTiles, choose_flash
from pallas_kernels.triton.step.flash import attend_piece
from tests.executed.products import find_device
from tests.executed.work import Work
from tests.pallas_kernels.pieces import attend_exactly, draw_piece


@dataclasses.dataclass(frozen=True)
class PieceAttention:
    """The kernel.

    Attributes:
      group: query heads of a key head.
      kv_heads: of those.
      window: as in `attend_piece`; 0 is none.
      blocks: of slots, before the piece.
      softcap: of the scores; 0 is none.
    """

    arch: str
    head_dim: int
    group: int
    dtype: str
    kv_heads: int = 1
    window: int = 0
    blocks: int = 3
    softcap: float = 0.0

    @property
    def kind(self) -> str:
        return "piece"

    def choose(self) -> FlashTiles:
        return choose_flash(1 << 16, self.head_dim, find_device(self.arch))

    def prepare(self) -> Work:
        """Draw the data and say what must come out; slots that are not seen are NaN."""
        tiles = self.choose()
        # a tile, and one more row
        steps = tiles.block_m // self.group + 1
        before = self.blocks * tiles.block_n + 5
        piece = draw_piece(
            steps,
            (self.group * self.kv_heads, self.kv_heads),
            self.head_dim,
            before + steps + 3,
            [(before, steps), (1, 2), (0, 0)],
            window=self.window or None,
            dtype=self.dtype,
        )
        given = piece.poison()
        softcap = self.softcap or None
        run = functools.partial(_attend, window=piece.window, softcap=softcap, tiles=tiles)
        tokens = piece.is_token()[..., None]

        def take(output: np.ndarray) -> np.ndarray:
            """Padding is 0 in the oracle; a number that is missing there is one too many."""
            output = output.reshape(*tokens.shape[:2], -1)
            return np.where(tokens | ~np.isfinite(output.astype(np.float32)), output, 0)

        arrays = (given.q, given.k, given.v, given.start, given.count)
        return Work(run, arrays, (attend_exactly(piece, softcap=softcap),), take, False)


def _attend(q, k, v, start, count, *, window, softcap, tiles, interpret=False) -> jax.Array:
    return attend_piece(
        *map(jnp.asarray, (q, k, v)),
        start=start,
        count=count,
        window=window,
        softcap=softcap,
        tiles=tiles,
        interpret=interpret,
    )
