"""A Mixture-of-Experts model of your own: trained in floats, then packed, in NNX and in Linen.

    python examples/own_moe.py

The model guesses the next character of a novel from the 16 before it: embeddings, one linear
layer, four experts of which each character asks two, and a head. It is trained for some seconds;
then the linear layer and the experts are rounded to 8 and to 4 bits and do the same work packed.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from flax import nnx

import jaxwna16

TEXT = Path(__file__).parent / "data" / "persuasion.txt"
CONTEXT, EMBEDDING = 16, 16
HIDDEN, INNER, EXPERTS, TOP_K = 256, 128, 4, 2
STEPS, BATCH = 300, 256


class FloatExperts(nnx.Module):
    """Experts to train: called as `QuantMoE` is, so that one can stand for the other."""

    def __init__(self, rngs: nnx.Rngs):
        init = nnx.initializers.lecun_normal(in_axis=-1, out_axis=-2, batch_axis=0)
        self.w13 = nnx.Param(init(rngs.params(), (EXPERTS, 2 * INNER, HIDDEN)))  # gate, then up
        self.w2 = nnx.Param(init(rngs.params(), (EXPERTS, HIDDEN, INNER)))

    def __call__(self, x: jax.Array, router_logits: jax.Array) -> jax.Array:
        ids, weights = jaxwna16.route(router_logits, top_k=TOP_K)
        return jaxwna16.float_moe(x, ids, weights, self.w13[...], self.w2[...])


class Model(nnx.Module):
    """Logits [B, V] of the character after int32 [B, CONTEXT]."""

    def __init__(self, vocab: int, rngs: nnx.Rngs):
        self.embed = nnx.Embed(vocab, EMBEDDING, rngs=rngs)
        self.mix: Any = nnx.Linear(CONTEXT * EMBEDDING, HIDDEN, use_bias=False, rngs=rngs)
        self.gate = nnx.Linear(HIDDEN, EXPERTS, use_bias=False, rngs=rngs)
        self.experts: Any = FloatExperts(rngs)
        self.head = nnx.Linear(HIDDEN, vocab, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        h = self.mix(self.embed(x).reshape(len(x), -1))
        h = h + self.experts(h, self.gate(h))
        return self.head(h)


def pack(model: Model, bits: int) -> Model:
    """The same model with its large weights packed; the router and the head stay as they are."""
    packed = nnx.clone(model)
    spec = make_spec(bits, HIDDEN, CONTEXT * EMBEDDING)
    weights = jaxwna16.quantize(model.mix.kernel[...].T, spec)  # [N, K], as checkpoints have it
    packed.mix = jaxwna16.QuantDense.from_weights(weights, spec)
    spec13, spec2 = make_spec(bits, 2 * INNER, HIDDEN), make_spec(bits, HIDDEN, INNER)
    w13 = jaxwna16.quantize(model.experts.w13[...], spec13)
    w2 = jaxwna16.quantize(model.experts.w2[...], spec2)
    packed.experts = jaxwna16.QuantMoE.from_weights(w13, w2, spec13, spec2, top_k=TOP_K)
    return packed


def make_spec(bits: int, out_features: int, in_features: int) -> jaxwna16.QuantSpec:
    """Asymmetric, in groups of 32."""
    return jaxwna16.QuantSpec(
        bits=bits,
        group_size=32,
        symmetric=False,
        in_features=in_features,
        out_features=out_features,
    )


class LinenModel(nn.Module):
    """The packed model in Linen; `QuantDense` and `QuantMoE` have the same trees there."""

    bits: int
    vocab: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        mix = make_spec(self.bits, HIDDEN, CONTEXT * EMBEDDING)
        spec13 = make_spec(self.bits, 2 * INNER, HIDDEN)
        spec2 = make_spec(self.bits, HIDDEN, INNER)
        h = nn.Embed(self.vocab, EMBEDDING, name="embed")(x).reshape(len(x), -1)
        h = jaxwna16.linen.QuantDense(mix, name="mix")(h)
        logits = nn.Dense(EXPERTS, use_bias=False, name="gate")(h)
        experts = jaxwna16.linen.QuantMoE(
            spec13, spec2, experts=EXPERTS, top_k=TOP_K, name="experts"
        )
        return nn.Dense(self.vocab, name="head")(h + experts(h, logits))


def compute_loss(model: Model, x: jax.Array, y: jax.Array) -> jax.Array:
    """Mean negative log-likelihood of the characters y [B] after x [B, CONTEXT], in nats."""
    return optax.softmax_cross_entropy_with_integer_labels(model(x), y).mean()


@nnx.jit
def train_step(model: Model, optimizer: nnx.Optimizer, x: jax.Array, y: jax.Array) -> jax.Array:
    loss, gradients = nnx.value_and_grad(compute_loss)(model, x, y)
    optimizer.update(model, gradients)
    return loss


def train(text: str, alphabet: list[str]) -> Model:
    """Train on random places of the first nine tenths of the text."""
    ids = encode(text[: len(text) * 9 // 10], alphabet)
    model = nnx.jit(lambda: Model(len(alphabet), nnx.Rngs(0)))()
    optimizer = nnx.Optimizer(
        model, optax.adam(optax.cosine_decay_schedule(3e-3, STEPS)), wrt=nnx.Param
    )
    rng = np.random.default_rng(0)
    for _ in range(STEPS):
        places = rng.integers(0, len(ids) - CONTEXT, BATCH)
        x, y = cut(ids, places)
        train_step(model, optimizer, x, y)
    return model


def encode(text: str, alphabet: list[str]) -> np.ndarray:
    """Characters as int32 ids."""
    return np.searchsorted(alphabet, list(text)).astype(np.int32)


def cut(ids: np.ndarray, places: np.ndarray) -> tuple[jax.Array, jax.Array]:
    """CONTEXT characters from each place on, and the one behind them."""
    windows = ids[places[:, None] + np.arange(CONTEXT + 1)]
    return jnp.asarray(windows[:, :-1]), jnp.asarray(windows[:, -1])


def continue_text(model: Model, start: str, alphabet: list[str], length: int = 60) -> str:
    """Add the likeliest character `length` times."""
    forward = nnx.jit(lambda model, x: model(x).argmax(-1))
    text = start
    for _ in range(length):
        x = jnp.asarray(encode(text[-CONTEXT:], alphabet)[None])
        text += alphabet[int(forward(model, x)[0])]
    return text


def main() -> None:
    """Train, pack, compare."""
    text = " ".join(TEXT.read_text(encoding="utf-8").split())
    alphabet = sorted(set(text))
    model = train(text, alphabet)
    held_out = encode(text[len(text) * 9 // 10 :], alphabet)
    x, y = cut(held_out, np.arange(0, 16_000, 4))
    versions = {"float32": model, "8 bits": pack(model, 8), "4 bits": pack(model, 4)}
    forward = nnx.jit(lambda model, x: model(x))
    for name, version in versions.items():
        logits = forward(version, x)
        right = float((logits.argmax(-1) == y).mean())
        loss = float(optax.softmax_cross_entropy_with_integer_labels(logits, y).mean())
        size = sum(leaf.nbytes for leaf in jax.tree.leaves(nnx.state(version)))
        print(f"{name:8} {size / 1e3:5.0f} kB   {loss:.3f} nats a character   {right:.1%} right")
    print(continue_text(versions["4 bits"], "She could not help ", alphabet))

    params = nnx.to_pure_dict(nnx.state(versions["4 bits"]))
    linen = jax.jit(LinenModel(4, len(alphabet)).apply)({"params": params}, x)
    difference = np.abs(np.asarray(linen) - np.asarray(forward(versions["4 bits"], x))).max()
    print(f"the same tree in Linen: logits differ by {difference:.0e} at most")


if __name__ == "__main__":
    main()
