"""A language model of your own in Linen, whose parameter tree is the checkpoint's tree.

    python examples/linen_model.py [CHECKPOINT] [--prompt TEXT]

Modules are named as in the checkpoint ("model", "layers", "0", "self_attn", "q_proj"), so that

    jax.jit(LanguageModel(...).apply)({"params": checkpoint.params}, tokens)

needs no conversion, and a module finds the spec of a packed weight by its own path. The model
continues a prompt, one token at a time and without a cache, and is compared with `load_model`'s.

CHECKPOINT is a Llama or a Mixtral (`examples/make_moe.py` makes one); by default SmolLM2 in 4 bits.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from fetch_smollm2 import fetch_packed
from flax import linen as nn
from nnx_classifier import read_theta, rotate

import jaxwna16
from jaxwna16.linen import QuantDense, QuantMoE

PROMPT, NEW_TOKENS = "Once upon a time, there was a", 24


class Weight(nn.Module):
    """A plain tensor of the checkpoint, "….weight"."""

    shape: tuple[int, ...]

    @nn.compact
    def __call__(self) -> jax.Array:
        return self.param("weight", nn.initializers.zeros, self.shape)


class Part(nn.Module):
    """What all modules of the model have: config.json, and the specs of packed weights by path."""

    config: Mapping[str, Any]
    specs: Mapping[str, jaxwna16.QuantSpec]

    def find_spec(self, name: str) -> jaxwna16.QuantSpec:
        """The spec of a module inside of this one."""
        return self.specs[".".join((*self.path, name))]

    def make_linears(self, *names: str) -> list[QuantDense]:
        """Packed linear layers, used as any other module."""
        return [QuantDense(self.find_spec(name), name=name) for name in names]

    def normalise(self, x: jax.Array, name: str) -> jax.Array:
        """x [B, S, H] divided by its root mean square, times the weight `name`."""
        weight = Weight(x.shape[-1:], name=name)()[None, None, :]
        variance = jnp.mean(x * x, -1, keepdims=True)
        return x * jax.lax.rsqrt(variance + self.config["rms_norm_eps"]) * weight


class Attention(Part):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        *inputs, output = self.make_linears("q_proj", "k_proj", "v_proj", "o_proj")
        q, k, v = jaxwna16.project(x, inputs)  # one kernel on a GPU
        q = q.reshape(*x.shape[:2], self.config["num_attention_heads"], -1)
        k = k.reshape(*x.shape[:2], self.config["num_key_value_heads"], -1)
        q, k = (rotate(y, read_theta(self.config)) for y in (q, k))
        mixed = jax.nn.dot_product_attention(q, k, v.reshape(k.shape), is_causal=True)
        return output(mixed.reshape(*x.shape[:2], -1))


class MLP(Part):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        gate, up, down = self.make_linears("gate_proj", "up_proj", "down_proj")
        return down(jaxwna16.gated(x, gate, up))


class SparseBlock(Part):
    """Mixtral's: a router, and experts of which every token takes some."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        experts, top_k = self.config["num_local_experts"], self.config["num_experts_per_tok"]
        logits = x @ Weight((experts, x.shape[-1]), name="gate")().T
        specs = self.find_spec("experts.w13"), self.find_spec("experts.w2")
        return QuantMoE(*specs, experts=experts, top_k=top_k, name="experts")(x, logits)


class Layer(Part):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        shared = self.config, self.specs
        x = x + Attention(*shared, name="self_attn")(self.normalise(x, "input_layernorm"))
        sparse = self.config["model_type"] == "mixtral"
        block = (
            SparseBlock(*shared, name="block_sparse_moe") if sparse else MLP(*shared, name="mlp")
        )
        return x + block(self.normalise(x, "post_attention_layernorm"))


class Layers(Part):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        for i in range(self.config["num_hidden_layers"]):
            x = Layer(self.config, self.specs, name=str(i))(x)
        return x


class Decoder(Part):
    """The checkpoint's "model": its last stream [B, S, H], and the embedding [V, H]."""

    @nn.compact
    def __call__(self, tokens: jax.Array) -> tuple[jax.Array, jax.Array]:
        shape = self.config["vocab_size"], self.config["hidden_size"]
        embedding = Weight(shape, name="embed_tokens")()
        x = Layers(self.config, self.specs, name="layers")(embedding[tokens])
        return self.normalise(x, "norm"), embedding


class LanguageModel(Part):
    """Logits [B, S, V] of int32 tokens [B, S]."""

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        x, embedding = Decoder(self.config, self.specs, name="model")(tokens)
        if self.config.get("tie_word_embeddings"):
            return x @ embedding.T
        return x @ Weight(embedding.shape, name="lm_head")().T


def main(arguments: list[str] | None = None) -> None:
    """Continue the prompt, and compare with the model of the library."""
    parser = argparse.ArgumentParser(description="Run a packed checkpoint in a Linen model.")
    parser.add_argument("checkpoint", nargs="?", help="default: SmolLM2-135M-Instruct in 4 bits")
    parser.add_argument("--prompt", default=PROMPT)
    options = parser.parse_args(arguments)

    checkpoint = jaxwna16.load_checkpoint(options.checkpoint or fetch_packed(), dtype="float32")
    tokenizer = jaxwna16.Tokenizer.from_folder(checkpoint.folder)
    prompt = tokenizer.encode(options.prompt)
    forward = jax.jit(LanguageModel(checkpoint.config, checkpoint.specs).apply)
    variables = {"params": checkpoint.params}

    tokens = np.zeros((1, len(prompt) + NEW_TOKENS), np.int32)  # one shape, so compiled once
    tokens[0, : len(prompt)] = prompt
    for i in range(len(prompt), tokens.shape[1]):
        tokens[0, i] = forward(variables, jnp.asarray(tokens))[0, i - 1].argmax()
    print(tokenizer.decode(tokens[0]))

    model = jaxwna16.load_model(checkpoint.folder, dtype="float32")
    expected = np.asarray(jax.jit(lambda model, tokens: model(tokens))(model, jnp.asarray(tokens)))
    logits = np.asarray(forward(variables, jnp.asarray(tokens)))
    difference = np.abs(logits - expected).max() / np.abs(expected).max()
    print(f"load_model's logits differ by {difference:.0e} of the largest")


if __name__ == "__main__":
    main()
