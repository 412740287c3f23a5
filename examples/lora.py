"""LoRA on a packed model: small adapters learn, the packed weights stay as they are.

    python examples/lora.py [CHECKPOINT] [--text FILE] [--steps 40] [--rank 8] [--out FILE]

An adapter adds x A B to a linear layer's y = x W^T (https://arxiv.org/abs/2106.09685), with A
[K, r] and B [r, N], which starts at zero. Gradients reach the adapters of the first layers through
the packed products of the later ones, whose weights are expanded again in the backward pass rather
than kept. Adam has moments of the adapters only.

The text is cut into its first three quarters, to train on, and the rest, which shows whether more
was learned than by heart. Here it is a novel; the model is SmolLM2 in 4 bits.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from fetch_smollm2 import fetch_packed
from flax import nnx
from safetensors.numpy import save_file

import jaxwna16

TEXT = Path(__file__).parent / "data" / "persuasion.txt"
ADAPTED = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def attach_adapters(model: nnx.Module, rank: int, seed: int = 0) -> int:
    """Put an `nnx.LoRA` around every packed linear layer; returns how many there are."""
    rngs = nnx.Rngs(seed)
    places = [
        (module, name, layer)
        for _, module in nnx.iter_modules(model)
        for name in ADAPTED
        if isinstance(layer := getattr(module, name, None), jaxwna16.QuantDense)
    ]
    for module, name, layer in places:
        k, n = layer.spec.in_features, layer.spec.out_features
        # parameters in float32, the product in the model's own dtype
        adapter = nnx.LoRA(k, rank, n, base_module=layer, dtype=layer.dtype, rngs=rngs)
        setattr(module, name, adapter)
    return len(places)


def compute_loss(model: nnx.Module, rows: jax.Array) -> jax.Array:
    """Mean negative log-likelihood of each token of int32 [B, S] after those before it, in nats."""
    logits = model(rows[:, :-1])  # type: ignore[operator]
    return optax.softmax_cross_entropy_with_integer_labels(logits, rows[:, 1:]).mean()


@nnx.jit
def train_step(model: nnx.Module, optimizer: nnx.Optimizer, rows: jax.Array) -> jax.Array:
    """One step of the adapters; the loss before it."""
    adapters = nnx.DiffState(0, nnx.LoRAParam)  # with respect to nothing else
    loss, gradients = nnx.value_and_grad(compute_loss, argnums=adapters)(model, rows)
    optimizer.update(model, gradients)
    return loss


def train(
    model: nnx.Module, tokens: np.ndarray, *, steps: int, batch: int, length: int, rate: float
) -> list[float]:
    """Train on random pieces of the text; returns the loss of each step."""
    schedule = optax.cosine_decay_schedule(rate, steps)
    optimizer = nnx.Optimizer(model, optax.adam(schedule), wrt=nnx.LoRAParam)
    rng, losses = np.random.default_rng(0), []
    for step in range(steps):
        places = rng.integers(0, len(tokens) - length, batch)
        rows = jnp.asarray(tokens[places[:, None] + np.arange(length + 1)])
        losses.append(float(train_step(model, optimizer, rows)))
        if step % 10 == 0 or step == steps - 1:
            print(f"step {step:4}   loss {losses[-1]:.3f}", flush=True)
    return losses


def save_adapters(model: nnx.Module, path: Path) -> None:
    """Write A and B of every adapter, under the paths of the checkpoint."""
    leaves = nnx.to_flat_state(nnx.state(model, nnx.LoRAParam))
    save_file({".".join(map(str, at)): np.asarray(leaf[...]) for at, leaf in leaves}, path)


def main(arguments: list[str] | None = None) -> None:
    """Train, and measure the model on unseen text before and after."""
    parser = argparse.ArgumentParser(description="Train LoRA adapters on a packed model.")
    parser.add_argument("checkpoint", nargs="?", help="default: SmolLM2-135M-Instruct in 4 bits")
    parser.add_argument("--text", type=Path, default=TEXT, help="default: a novel")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--batch", type=int, default=4, help="rows a step")
    parser.add_argument("--length", type=int, default=128, help="tokens a row")
    parser.add_argument("--rate", type=float, default=1e-3, help="learning rate of Adam")
    parser.add_argument("--dtype", default="float32", help="of activations")
    parser.add_argument("--out", type=Path, help="where to save the adapters (safetensors)")
    options = parser.parse_args(arguments)

    model = jaxwna16.load_model(options.checkpoint or fetch_packed(), dtype=options.dtype)
    tokenizer = jaxwna16.Tokenizer.from_folder(model.folder or "")
    tokens = np.asarray(tokenizer.encode(options.text.read_text(encoding="utf-8")), np.int32)
    seen, unseen = np.split(tokens, [len(tokens) * 3 // 4])
    settings = {"window": options.length + 1, "max_windows": 16}
    before = jaxwna16.measure_perplexity(model, unseen, **settings)

    count = attach_adapters(model, options.rank)
    trained = sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model, nnx.LoRAParam)))
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(nnx.state(model)))
    print(f"{count} adapters, {trained / 1e6:.2f} M parameters; all weights {size / 1e6:.1f} MB")
    train(
        model,
        seen,
        steps=options.steps,
        batch=options.batch,
        length=options.length,
        rate=options.rate,
    )
    after = jaxwna16.measure_perplexity(model, unseen, **settings)
    print(f"perplexity of unseen text: {before.perplexity:.2f} -> {after.perplexity:.2f}")
    if options.out is not None:
        save_adapters(model, options.out)


if __name__ == "__main__":
    main()
