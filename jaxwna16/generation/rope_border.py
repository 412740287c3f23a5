"""Rows that outgrow the length up to which longrope has its short factors: they are run anew.

Past it the whole row has the long factors, and so have the keys of all tokens before. transformers
drops its cache there (`prepare_inputs_for_generation` of Phi-3). Here the row that is over runs
again, and no other: a row does not depend on its neighbours.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import jax
import numpy as np

from jaxwna16.generation.decoding import Progress, renew
from jaxwna16.generation.pieces import choose_piece
from jaxwna16.models.causal_lm import CausalLM


class Border:
    """The steps of generation at which rows outgrow it.

    Args:
      model: of any rope; with others than longrope there is no border.
      prompts: tokens of each row.
      slots: of the cache.
      prefill_chunk: as in `generate_tokens`.
    """

    def __init__(
        self,
        model: CausalLM,
        prompts: Sequence[Sequence[int]],
        slots: int,
        prefill_chunk: int | None,
    ):
        rope = model.config.rope
        self._limit = rope.original_max_positions
        self._prompts, self._slots, self._chunk = prompts, slots, prefill_chunk
        self._rows: dict[int, list[int]] = defaultdict(list)
        for row, prompt in enumerate(prompts):
            if rope.rope_type == "longrope" and len(prompt) <= self._limit:
                self._rows[self._limit - len(prompt) + 1].append(row)

    def cut(self, step: int, until: int) -> int:
        """Until which step rows may go on from this one: not past one at which some are over."""
        return min([until, *(border for border in self._rows if border > step)])

    def cross(self, model: CausalLM, progress: Progress, done: np.ndarray) -> Progress:
        """Run the rows again that have more tokens than the limit with the newest one.

        Args:
          model: as before.
          progress: of the generation; it is used up.
          done: bool [B], rows that have ended.
        """
        generated, step = jax.device_get((progress.tokens, progress.step))
        rows = [row for row in self._rows.pop(int(step), []) if not done[row]]
        if not rows:
            return progress
        batch, limit = len(self._prompts), self._limit
        chunk = choose_piece(model, limit, batch, self._slots, self._chunk)
        tokens = np.zeros((batch, -(-limit // chunk) * chunk), np.int32)
        lengths = np.zeros(batch, np.int32)
        for row in rows:
            # the newest token is not in the cache: it comes with the next step
            tokens[row, :limit] = [*self._prompts[row], *generated[row, : step - 1]]
            lengths[row] = limit
        for begin in range(0, limit, chunk):
            start = np.minimum(begin, lengths)
            count = np.minimum(lengths - start, chunk)
            piece = (tokens[:, begin : begin + chunk], start, count, lengths + 1)
            progress = renew(model, *jax.device_put(piece), progress)
        return progress
