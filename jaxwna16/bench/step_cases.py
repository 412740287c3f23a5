"""What lies between the products of a decode step, and the step as a whole, as cases to time.

* attention: all of it between its products: rotation, the write into the cache, the seen slots.
* add_norm: a product's sum with the stream, and the norm after it.
* layer: a decoder layer, from stream to stream.
* step: embedding, layers, head and the likeliest token.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from jaxwna16.bench.cases import count_bytes
from jaxwna16.bench.models import describe_model, draw_weights
from jaxwna16.bench.shapes import StepShape
from jaxwna16.bench.timing import Effort
from pallas_kernels.formulas.heads import Heads
from pallas_kernels.formulas.norms import Norm, Onto
from pallas_kernels.formulas.rotation import Rotation
from pallas_kernels.step.attention import project_and_attend
from pallas_kernels.step.residual import add_onto

OPERATIONS = ("attention", "add_norm", "layer", "step")
_MOST_COPIES = 32
_CHAIN = 4
"""Layers of which the time of one is the mean."""

State = Any
"""A tree of arrays that a round takes from the one before."""


@dataclasses.dataclass(frozen=True)
class StepCase:
    """An operation of a model's decode step.

    Attributes:
      operation: one of `OPERATIONS`.
      model: its sizes.
      rows: B, each of which gets one token.
      slots: C of the cache; half of them are seen.
      dtype: of activations and cache.
    """

    operation: str
    model: StepShape
    rows: int
    slots: int
    dtype: str

    @property
    def shape(self) -> str:
        """ "attention llama-3.1-8b C=4096"."""
        return f"{self.operation} {self.model.name} C={self.slots}"

    @property
    def seen(self) -> int:
        return self.slots // 2

    @property
    def label(self) -> str:
        return f"{self.shape} B={self.rows} {self.dtype}"

    def describe(self) -> dict[str, Any]:
        """The facts of the case, for a report."""
        return {
            "shape": self.shape,
            "role": self.model.name,
            "tokens": self.rows,
            "slots": self.slots,
            "seen": self.seen,
            "bits": 4,
            "group_size": self.model.group_size,
            "symmetric": False,
            "dtype": self.dtype,
            "bytes": self.count_bytes(),
            "flops": self.count_flops(),
        }

    def count_bytes(self) -> int:
        """What must be read and written, each once."""
        size, m = jnp.dtype(self.dtype).itemsize, self.model
        cache = 2 * self.rows * m.kv_heads * m.head_dim * (self.seen + 1) * size
        if self.operation == "attention":
            return cache + self.rows * 2 * (m.heads + m.kv_heads) * m.head_dim * size
        if self.operation == "add_norm":
            return (4 * self.rows + 1) * m.hidden * size
        model = self._describe_model()
        if self.operation == "layer":
            layer = nnx.state(model.model.layers[0])
            return self._count_weights(layer) + cache + 2 * self.rows * m.hidden * size
        embedding = (m.vocabulary - self.rows) * m.hidden * size
        return self._count_weights(nnx.state(model)) - embedding + m.layers * cache

    def _count_weights(self, state: Any) -> int:
        """Of experts those that are touched on average, if each token chooses at random."""
        m, total = self.model, 0.0
        touched = 1 - (1 - m.top_k / m.experts) ** self.rows if m.experts else 1.0
        for path, variable in nnx.to_flat_state(state):
            share = touched if "experts" in map(str, path) else 1.0
            total += share * count_bytes(variable.get_value())
        return round(total)

    def count_flops(self) -> int:
        """Multiplications and additions of the products and of attention."""
        m = self.model
        mix = 4 * self.rows * m.heads * m.head_dim * (self.seen + 1)
        if self.operation == "attention":
            return mix
        if self.operation == "add_norm":
            return 5 * self.rows * m.hidden
        width = m.hidden * m.head_dim * (2 * m.heads + 2 * m.kv_heads)
        width += 3 * m.hidden * m.inner * max(m.top_k, 1)
        layer = 2 * self.rows * width + mix
        if self.operation == "layer":
            return layer
        return m.layers * layer + 2 * self.rows * m.hidden * m.vocabulary

    def count_chain(self, effort: Effort) -> int:
        """How many follow each other in a round, each with a cache or layer of its own."""
        if self.operation == "attention":
            copies = math.ceil(effort.cold_bytes / self.count_bytes())
            room = effort.most_bytes // (2 * self.count_bytes())
            return max(1, min(copies, room, _MOST_COPIES))
        if self.operation == "add_norm":
            return min(effort.layers, _MOST_COPIES)
        return min(_CHAIN, self.model.layers) if self.operation == "layer" else 1

    def build(
        self, chain: int, backend: str | None
    ) -> tuple[Any, State, Callable[[Any, State], State]]:
        """What stays the same, the first state, and a round of `chain` operations."""
        if self.operation == "attention":
            return self._build_attention(chain, backend)
        if self.operation == "add_norm":
            return self._build_norm(chain, backend)
        return self._build_model(chain, backend)

    def _build_attention(self, chain: int, backend: str | None):
        m = self.model
        heads = Heads(head_dim=m.head_dim, kv_heads=m.kv_heads)
        keys = jax.random.split(jax.random.key(0), 3)
        q, k, v = (
            jax.random.normal(key, (self.rows, 1, count * m.head_dim), self.dtype)
            for key, count in zip(keys, (m.heads, m.kv_heads, m.kv_heads), strict=True)
        )
        angles = jnp.ones((self.rows, 1, m.head_dim // 2), self.dtype)
        start, count = jnp.full(self.rows, self.seen, jnp.int32), jnp.ones(self.rows, jnp.int32)
        line = (self.rows * m.kv_heads, self.slots, m.head_dim)

        def advance(fixed, state):
            k, v, rotation, start, count = fixed
            # what comes out is the next queries, so that each waits for the one before
            (q, held), caches = state, []
            for cache in held:
                q, cache = project_and_attend(
                    q,
                    (q, k, v),
                    (None, None),
                    rotation,
                    start,
                    count,
                    None,
                    cache,
                    heads=heads,
                    backend=backend,
                )
                caches.append(cache)
            return q, tuple(caches)

        caches = tuple(
            tuple(jax.random.normal(jax.random.key(2 * i + j), line, self.dtype) for j in range(2))
            for i in range(chain)
        )
        return (k, v, Rotation(angles, angles), start, count), (q, caches), advance

    def _build_norm(self, chain: int, backend: str | None):
        shape = (self.rows, self.model.hidden)
        residual, y = (jax.random.normal(jax.random.key(i), shape, self.dtype) for i in range(2))
        weight = jnp.ones(shape[1], self.dtype)

        def advance(fixed, state):
            residual, weight = fixed
            y = state
            for _ in range(chain):
                onto = Onto(residual, None, Norm(weight, 1e-5, "rounded"))
                # the stream is a result, too: it must be written
                _, y = lax.optimization_barrier(add_onto(y, onto, backend=backend))
            return y

        return (residual, weight), y, advance

    def _build_model(self, chain: int, backend: str | None):
        whole = self.operation == "step"
        model = draw_weights(self._describe_model(None if whole else chain, backend))
        start, count = jnp.full(self.rows, self.seen, jnp.int32), jnp.ones(self.rows, jnp.int32)

        def advance(fixed, state):
            model, start, count = fixed
            tokens, cache = state
            hidden, cache = model.hidden(tokens, start, count, cache)
            if whole:
                likeliest = jnp.argmax(model.logits(hidden[:, 0]), axis=-1)
                return likeliest.astype(jnp.int32)[:, None], cache
            # the next round waits for this one, though nothing of its result is so large
            return (hidden[:, :, 0] > 1e30).astype(jnp.int32), cache

        tokens = jnp.zeros((self.rows, 1), jnp.int32)
        cache = model.make_cache(self.rows, self.slots)
        return (model, start, count), (tokens, cache), advance

    def _describe_model(self, layers: int | None = None, backend: str | None = None):
        m = self.model
        config = m.describe_config() | {"num_hidden_layers": layers or m.layers}
        return describe_model(config, group_size=m.group_size, dtype=self.dtype, backend=backend)


def plan_step_cases(
    models: Iterable[StepShape], rows: Iterable[int], slots: Iterable[int], dtype: str
) -> list[StepCase]:
    """Every operation with every number of rows and slots."""
    rows, slots = list(rows), list(slots)
    return [
        StepCase(operation, model, batch, room, dtype)
        for model in models
        for operation in OPERATIONS
        for batch in rows
        for room in slots
    ]
