"""Choosing the next token from logits: greedy, temperature, top-k, top-p."""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

Array = jax.Array


def sample(
    logits: Array, key: Array, temperature: Array, top_k: Array, top_p: Array
) -> tuple[Array, Array]:
    """Draw one token per row.

    The options are arrays of rank 0, so that other values do not trace anew; only the branch that
    they ask for runs, and greedy reads the logits once. The filters come in the order of
    transformers: temperature, top-k, top-p.

    Args:
      logits: float32 [B, V].
      key: a typed key. Row r draws with `fold_in(key, r)`, whatever the number of rows.
      temperature: float32; 0 is greedy, where equal logits give the smallest token.
      top_k: int32, draw among the k largest logits (and any equal to the k-th); 0 is off.
      top_p: float32, draw among the fewest tokens whose probabilities reach p; 1 is off.

    Returns:
      Tokens, int32 [B], and whether each row is a distribution, bool [B]. It is none if a logit is
      NaN or +inf, or if all are -inf; its token means nothing then. Some may be -inf: such tokens
      have the probability 0.
    """
    # compares in a way that takes NaN for the largest, on every platform; a maximum does not
    likeliest = jnp.argmax(logits, axis=-1).astype(jnp.int32)
    largest = jnp.take_along_axis(logits, likeliest[:, None], axis=-1)

    def draw() -> Array:
        # the largest at 0, so that a small temperature makes none infinite
        cooled = (logits - largest) / temperature
        keep = lambda: filter_logits(cooled, top_k, top_p)  # noqa: E731
        filtered = (top_k > 0) | (top_p < 1)
        return _draw(lax.cond(filtered, keep, lambda: cooled), key)

    tokens = lax.cond(temperature > 0, draw, lambda: likeliest)
    return tokens, jnp.isfinite(largest[:, 0])


def filter_logits(logits: Array, top_k: Array, top_p: Array) -> Array:
    """Set the logits that top-k and top-p leave out to -inf; shapes and options as in `sample`.

    Nothing is sorted: what is kept are the logits from a threshold on, so equal ones stay together.
    The likeliest always stays.
    """
    rows, vocab = logits.shape
    order = _order(logits)

    def find_kth() -> Array:
        least = vocab - jnp.minimum(top_k, vocab)  # so many may be left out
        return _find_largest(order, lambda below: below.sum(axis=-1, dtype=jnp.int32) <= least)

    def find_nucleus() -> Array:
        weights = jnp.exp(logits - jnp.max(logits, axis=-1, keepdims=True))
        measure = _weigh(jnp.where(order >= kth[:, None], weights, 0.0))
        whole, _ = measure(jnp.ones((1, 1, 1), bool))
        most, more = _cut((1 - top_p) * whole.astype(jnp.float32), vocab)

        def may_be_left_out(below: Array) -> Array:
            high, low = measure(below)
            return (high < most) | ((high == most) & (low <= more))

        return jnp.minimum(_find_largest(order, may_be_left_out), order.max(axis=-1))

    kth = lax.cond(top_k > 0, find_kth, lambda: jnp.full(rows, -(2**31), jnp.int32))
    smallest = lax.cond(top_p < 1, find_nucleus, lambda: kth)
    return jnp.where(order >= smallest[:, None], logits, -jnp.inf)


def _order(x: Array) -> Array:
    """Integers that are ordered as the floats: int32 of float32, 0 for both zeros."""
    bits = lax.bitcast_convert_type(x, jnp.int32)
    bits = jnp.where(bits == -(2**31), 0, bits)
    return bits ^ ((bits >> 31) & (2**31 - 1))


def _find_largest(order: Array, holds: Callable[[Array], Array]) -> Array:
    """The largest threshold whose smaller numbers `holds` allows, of each row; int32 [B].

    It is found digit by digit from the top, and each digit by trying all of its values at once. On
    a CPU a digit is one bit, since that is the least work; elsewhere four, since a pass over the
    vocabulary is a kernel or two. The result is the same: `holds` is exact, and once it is False it
    is so for all that are larger.

    Args:
      order: int32 [B, V].
      holds: takes what is below some thresholds, bool [B, n, V]; returns bool [B, n].
    """

    def search(order: Array, *, bits: int) -> Array:
        values = jnp.arange(1, 1 << bits, dtype=jnp.uint32)[None, :]

        def find_digit(number: Array, found: Array) -> Array:
            shift = (32 - bits * (number + 1)).astype(jnp.uint32)
            tried = found[:, None] | (values << shift)
            below = order[:, None, :] < _sign(tried)[:, :, None]
            digit = holds(below).sum(axis=1, dtype=jnp.uint32)
            return found | (digit << shift)

        found = jnp.zeros(len(order), jnp.uint32)
        # without a loop, a GPU plays the whole step back from one command buffer
        unroll = bits > 1
        return _sign(lax.fori_loop(0, 32 // bits, find_digit, found, unroll=unroll))

    return lax.platform_dependent(
        order, cpu=functools.partial(search, bits=1), default=functools.partial(search, bits=4)
    )


def _sign(x: Array) -> Array:
    """From 0 .. 2^32 - 1 to -2^31 .. 2^31 - 1, in the same order."""
    return lax.bitcast_convert_type(x ^ jnp.uint32(1 << 31), jnp.int32)


def _weigh(weights: Array) -> Callable[[Array], tuple[Array, Array]]:
    """What sums the weights of a selection, exactly: in any order, on any platform the same.

    The weights become integers of two digits, whose sums fit into 32 bits: the upper digits of a
    row sum to less than 2^31 and (unless V is 2^19 or more) at least to 2^29, a lower digit has
    `_count_bits` bits. A weight loses less than the last of these. Together that is less than
    V 2^(1 - 30 - bits) of the row's sum, and with V < 2^(32 - bits) less than 2^(3 - 2 bits):
    2^-25 for 151,936 tokens.

    Args:
      weights: float32 [B, V] from 0 to 1, the largest of each row 1.

    Returns:
      A function of bool [B, n, V] (or what broadcasts) to uint32 [B, n], both digits of the sums.
    """
    vocab = weights.shape[-1]
    bits = _count_bits(vocab)
    # the sum, rounded up: what is behind the second digit is less than 1 of it for each weight
    first, second = (x.sum(axis=-1) for x in _cut(weights * 2.0**bits, vocab))
    bound = first + (second >> bits) + ((vocab >> bits) + 2)
    room = (jnp.uint32(1) << lax.clz(bound)).astype(jnp.float32)
    high, low = _cut(weights * (room * 2.0 ** (bits - 1))[:, None], vocab)

    def measure(chosen: Array) -> tuple[Array, Array]:
        sums = (jnp.where(chosen, x[:, None, :], jnp.uint32(0)).sum(axis=-1) for x in (high, low))
        upper, lower = sums
        return upper + (lower >> bits), lower & ((1 << bits) - 1)

    return measure


def _cut(x: Array, vocab: int) -> tuple[Array, Array]:
    """The integer part, below 2^32, and the first bits of the rest; uint32. Float32 is exact."""
    whole = jnp.floor(x)
    rest = (x - whole) * 2.0 ** _count_bits(vocab)
    return whole.astype(jnp.uint32), rest.astype(jnp.uint32)


def _count_bits(vocab: int) -> int:
    """Of numbers that still fit into 32 bits when there is one for each token and all are added."""
    return 32 - vocab.bit_length()


def _draw(logits: Array, key: Array) -> Array:
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(logits.shape[0]))
    return jax.vmap(jax.random.categorical)(keys, logits).astype(jnp.int32)
