"""A classifier of your own in NNX, on the first layers of a packed checkpoint.

    python examples/nnx_classifier.py [CHECKPOINT] [--layers 6]

Are the words of a passage in their order, or were some neighbours swapped? The model reads with a
few layers of a language model, whose packed weights come from the checkpoint by path and stay as
they are; only a linear head is trained. A head on the embeddings alone, which sees the words
without their order, can only guess.

CHECKPOINT is a Llama; by default SmolLM2 in 4 bits.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from fetch_smollm2 import fetch_packed
from flax import nnx

import jaxwna16

TEXT = Path(__file__).parent / "data" / "persuasion.txt"
WORDS, SWAPS = 16, 3
LENGTH, TRAIN, TEST = 16, 1024, 256  # tokens of a passage; passages of each kind
STEPS = 300


def load_dense(checkpoint: jaxwna16.Checkpoint, path: str) -> jaxwna16.QuantDense:
    """The packed linear layer at a path of the checkpoint."""
    return jaxwna16.QuantDense.from_weights(checkpoint.find(path), checkpoint.specs[path])


class Attention(nnx.Module):
    def __init__(self, checkpoint: jaxwna16.Checkpoint, path: str):
        self.heads = checkpoint.config["num_attention_heads"]
        self.kv_heads = checkpoint.config["num_key_value_heads"]
        self.theta = read_theta(checkpoint.config)
        self.q, self.k, self.v, self.o = (
            load_dense(checkpoint, f"{path}.{name}_proj") for name in "qkvo"
        )

    def __call__(self, x: jax.Array) -> jax.Array:
        q, k, v = jaxwna16.project(x, (self.q, self.k, self.v))  # one kernel on a GPU
        q = rotate(q.reshape(*x.shape[:2], self.heads, -1), self.theta)
        k = rotate(k.reshape(*x.shape[:2], self.kv_heads, -1), self.theta)
        mixed = jax.nn.dot_product_attention(q, k, v.reshape(k.shape), is_causal=True)
        return self.o(mixed.reshape(*x.shape[:2], -1))


class MLP(nnx.Module):
    def __init__(self, checkpoint: jaxwna16.Checkpoint, path: str):
        self.gate, self.up, self.down = (
            load_dense(checkpoint, f"{path}.{name}_proj") for name in ("gate", "up", "down")
        )

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.down(jaxwna16.gated(x, self.gate, self.up))


class Layer(nnx.Module):
    """Float32 [B, S, H] to the same: attention, then an MLP."""

    def __init__(self, checkpoint: jaxwna16.Checkpoint, path: str):
        self.eps = checkpoint.config["rms_norm_eps"]
        self.before_attention, self.before_mlp = (
            nnx.Param(checkpoint.find(f"{path}.{name}_layernorm.weight"))
            for name in ("input", "post_attention")
        )
        self.attention = Attention(checkpoint, f"{path}.self_attn")
        self.mlp = MLP(checkpoint, f"{path}.mlp")

    def __call__(self, x: jax.Array) -> jax.Array:
        x = x + self.attention(normalise(x, self.eps) * self.before_attention[...][None, None, :])
        return x + self.mlp(normalise(x, self.eps) * self.before_mlp[...][None, None, :])


class Classifier(nnx.Module):
    """Logits [B, 2] of int32 tokens [B, LENGTH]."""

    def __init__(self, checkpoint: jaxwna16.Checkpoint, layers: int, rngs: nnx.Rngs):
        self.embedding = nnx.Param(checkpoint.find("model.embed_tokens.weight"))
        self.layers = nnx.List(Layer(checkpoint, f"model.layers.{i}") for i in range(layers))
        self.head = nnx.Linear(checkpoint.config["hidden_size"], 2, rngs=rngs)

    def read(self, tokens: jax.Array) -> jax.Array:
        """What the frozen part makes of the tokens: float32 [B, H]."""
        x = self.embedding[...][tokens]
        for layer in self.layers:
            x = layer(x)
        # the first token is no word's: all others look at it when they look for nothing
        return normalise(x, 1e-6)[:, 1:].mean(1)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        return self.head(self.read(tokens))


def normalise(x: jax.Array, eps: float) -> jax.Array:
    """x [..., H] divided by its root mean square."""
    return x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + eps)


def rotate(x: jax.Array, theta: float) -> jax.Array:
    """Rotary positions 0 .. S-1 on heads [B, S, heads, D]."""
    half = x.shape[-1] // 2
    frequencies = theta ** (-jnp.arange(half) / half)
    angles = jnp.arange(x.shape[1], dtype=jnp.float32)[:, None] * frequencies[None, :]
    cos, sin = jnp.cos(angles)[None, :, None, :], jnp.sin(angles)[None, :, None, :]
    first, second = jnp.split(x, 2, -1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], -1)


def read_theta(config: Any) -> float:
    """The base of the rotary positions; `load_model` knows how to scale them, this does not."""
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if rope.get("rope_type", rope.get("type", "default")) != "default":
        raise SystemExit(f"this example has no scaled rotary positions, the model has {rope}")
    return rope.get("rope_theta") or config.get("rope_theta", 10000.0)


def make_passages(text: str, tokenizer: jaxwna16.Tokenizer) -> tuple[np.ndarray, np.ndarray]:
    """Passages int32 [n, LENGTH], each twice in turn, and their kinds [n]: 0 as it was, 1 mixed."""
    words, rng, rows = text.split(), np.random.default_rng(0), []
    for start in np.linspace(0, len(words) - WORDS, TRAIN + TEST).astype(int):
        mixed = words[start : start + WORDS]
        rows.append(tokenizer.encode(" ".join(mixed))[:LENGTH])
        for i in rng.choice(WORDS // 2 - 1, SWAPS, replace=False) * 2 + 1:
            mixed[i], mixed[i + 1] = mixed[i + 1], mixed[i]
        rows.append(tokenizer.encode(" ".join(mixed))[:LENGTH])
    return np.array(rows, np.int32), np.tile([0, 1], TRAIN + TEST)


def read_all(model: Classifier, tokens: np.ndarray) -> jax.Array:
    """`model.read`, 64 passages at a time."""
    read = nnx.jit(lambda model, tokens: model.read(tokens))
    return jnp.concatenate(
        [read(model, jnp.asarray(rows)) for rows in tokens.reshape(-1, 64, LENGTH)]
    )


def train_head(head: nnx.Linear, features: jax.Array, kinds: jax.Array) -> None:
    """Fit the head to features [n, H] and kinds [n]; what is frozen need not run again for that."""

    def compute_loss(head: nnx.Linear) -> jax.Array:
        return optax.softmax_cross_entropy_with_integer_labels(head(features), kinds).mean()

    @nnx.jit
    def step(head: nnx.Linear, optimizer: nnx.Optimizer) -> None:
        optimizer.update(head, nnx.grad(compute_loss)(head))

    optimizer = nnx.Optimizer(head, optax.adamw(3e-3, weight_decay=1.0), wrt=nnx.Param)
    for _ in range(STEPS):
        step(head, optimizer)


def main(arguments: list[str] | None = None) -> None:
    """Train two heads and print what they get right."""
    parser = argparse.ArgumentParser(description="Train a classifier on a packed model's layers.")
    parser.add_argument("checkpoint", nargs="?", help="default: SmolLM2-135M-Instruct in 4 bits")
    parser.add_argument("--layers", type=int, default=6, help="layers of the checkpoint to take")
    options = parser.parse_args(arguments)

    checkpoint = jaxwna16.load_checkpoint(options.checkpoint or fetch_packed(), dtype="float32")
    tokenizer = jaxwna16.Tokenizer.from_folder(checkpoint.folder)
    tokens, kinds = make_passages(TEXT.read_text(encoding="utf-8"), tokenizer)
    for layers in (0, options.layers):
        model = Classifier(checkpoint, layers, nnx.Rngs(0))
        features = read_all(model, tokens)
        train_head(model.head, features[: -2 * TEST], jnp.asarray(kinds[: -2 * TEST]))
        guesses = np.asarray(model.head(features).argmax(-1))
        seen, unseen = np.split(guesses == kinds, [-2 * TEST])
        print(f"{layers:2} layers: {seen.mean():.1%} right, of unseen passages {unseen.mean():.1%}")


if __name__ == "__main__":
    main()
