"""A generation loop of your own: prefill and decode as two jitted functions.

    python examples/jit_generation.py [CHECKPOINT] [--prompt TEXT]... [--new-tokens 64]

`jaxwna16.generate` does this and more (sampling, stop tokens, streaming); start here to decode in a
way that it does not know: beams, speculation, constraints, a search. All it takes is

    cache = model.make_cache(batch, slots)                         a pytree of zeros
    hidden, cache = model.hidden(tokens, start, count, cache)      a piece of each row
    logits = model.logits(hidden)

where row b of a piece has count[b] tokens from position start[b] on, and padding behind. The model
is a pytree: an argument of `jax.jit`, so that its weights are no constants of the program.

CHECKPOINT is any that `load_model` takes; by default SmolLM2 in 4 bits.
"""

from __future__ import annotations

import argparse
import functools
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from fetch_smollm2 import fetch_packed
from jax import lax

import jaxwna16

PROMPTS = ("The capital of France is", "Once upon a time, there was a little girl who")


@jax.jit
def prefill(model: Any, tokens: jax.Array, count: jax.Array, cache: Any) -> tuple[jax.Array, Any]:
    """Read prompts int32 [B, S], padded on the right; returns the first new token of each [B]."""
    hidden, cache = model.hidden(tokens, jnp.zeros_like(count), count, cache)
    last = jnp.take_along_axis(hidden, count[:, None, None] - 1, axis=1)[:, 0]
    return choose(model.logits(last)), cache


# donated: the new cache is written into the memory of the old one
@functools.partial(jax.jit, static_argnames="steps", donate_argnames="cache")
def decode(
    model: Any, first: jax.Array, start: jax.Array, cache: Any, steps: int
) -> tuple[jax.Array, Any]:
    """Add `steps` tokens behind `first` [B], which has position `start` [B]: int32 [B, steps]."""

    def step(carry: Any, _: None) -> tuple[Any, jax.Array]:
        token, position, cache = carry
        one = jnp.ones_like(position)
        hidden, cache = model.hidden(token[:, None], position, one, cache)
        token = choose(model.logits(hidden[:, 0]))
        return (token, position + 1, cache), token

    (_, _, cache), tokens = lax.scan(step, (first, start, cache), length=steps)
    return tokens.T, cache


def choose(logits: jax.Array) -> jax.Array:
    """The next token of each row from logits [B, V]. This is the place for ideas of your own."""
    return logits.argmax(-1).astype(jnp.int32)


def generate(
    model: Any, prompts: list[list[int]], new_tokens: int
) -> tuple[np.ndarray, float, float]:
    """Returns new tokens int32 [B, new_tokens], and the seconds of prefill and of decode."""
    count = jnp.asarray([len(prompt) for prompt in prompts], jnp.int32)
    width = max(map(len, prompts))
    tokens = jnp.asarray([prompt + [0] * (width - len(prompt)) for prompt in prompts], jnp.int32)
    cache = model.make_cache(len(prompts), width + new_tokens)
    start = time.perf_counter()
    first, cache = jax.block_until_ready(prefill(model, tokens, count, cache))
    prefilled = time.perf_counter()
    # the last token chosen is never read, so there is one step less than tokens
    rest, _ = jax.block_until_ready(decode(model, first, count, cache, steps=new_tokens - 1))
    finished = time.perf_counter()
    generated = np.concatenate([np.asarray(first)[:, None], np.asarray(rest)], axis=1)
    return generated, prefilled - start, finished - prefilled


def main(arguments: list[str] | None = None) -> None:
    """Generate twice, since the first time compiles, and compare with `jaxwna16.generate`."""
    parser = argparse.ArgumentParser(description="Generate text in a loop of one's own.")
    parser.add_argument("checkpoint", nargs="?", help="default: SmolLM2-135M-Instruct in 4 bits")
    parser.add_argument("--prompt", action="append", help="may be given several times")
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--dtype", default="float32", help="of activations and cache")
    options = parser.parse_args(arguments)

    model = jaxwna16.load_model(options.checkpoint or fetch_packed(), dtype=options.dtype)
    tokenizer = jaxwna16.Tokenizer.from_folder(model.folder or "")
    texts = options.prompt or list(PROMPTS)
    prompts = [tokenizer.encode(text) for text in texts]
    generate(model, prompts, options.new_tokens)
    generated, prefill_seconds, decode_seconds = generate(model, prompts, options.new_tokens)

    _, library = (
        jaxwna16.generate(model, texts, max_new_tokens=options.new_tokens).result for _ in range(2)
    )
    for text, row, other in zip(texts, generated, library.tokens, strict=True):
        end = len(other)  # there, a stop token ends a row; here, it goes on
        print(f"{text}{tokenizer.decode(row[:end])}")
        print(f"-- {(row[:end] == other).mean():.0%} of {end} tokens as jaxwna16.generate has them")
    read, written = sum(map(len, prompts)), generated[:, 1:].size
    speeds = {
        "this loop": (read / prefill_seconds, written / decode_seconds),
        "jaxwna16.generate": (library.prefill_tokens_per_second, library.decode_tokens_per_second),
    }
    for name, (prefilled, decoded) in speeds.items():
        print(f"{name:17}   prefill {prefilled:6.0f} tokens/s   decode {decoded:6.1f} tokens/s")


if __name__ == "__main__":
    main()
