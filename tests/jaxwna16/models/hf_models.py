"""Small random transformers models, and the same model as ours."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import torch
import transformers
from flax import nnx

from jaxwna16.models.causal_lm import CausalLM
from jaxwna16.models.families import find_family
from jaxwna16.models.filling.params import fill_model
from jaxwna16.models.llama.relatives import RELATIVES
from pallas_kernels.step.routing import route
from tests.jaxwna16.models.family_rows import MODELS, ROWS, SMALL

torch.set_num_threads(1)  # these models are too small for more

forward = jax.jit(CausalLM.__call__)
run_hidden = jax.jit(CausalLM.hidden)
run_logits = jax.jit(CausalLM.logits)


def run_pieces(model, tokens, sizes: Sequence[int], slots: int | None = None) -> jax.Array:
    """The stream [B, S, hidden] of full rows of tokens [B, S], run in pieces of these sizes."""
    batch, length = tokens.shape
    assert sum(sizes) == length
    cache, start, pieces = model.make_cache(batch, slots or length), 0, []
    for size in sizes:
        piece = jnp.asarray(tokens[:, start : start + size])
        places = jnp.full(batch, start, jnp.int32), jnp.full(batch, size, jnp.int32)
        hidden, cache = run_hidden(model, piece, *places, cache)
        pieces.append(hidden)
        start += size
    return jnp.concatenate(pieces, axis=1)


def run_padded(model, tokens: np.ndarray, lengths: np.ndarray, size: int) -> np.ndarray:
    """Logits of rows of these lengths, in pieces of `size` tokens with padding; one program."""
    cache, pieces = model.make_cache(len(tokens), tokens.shape[1]), []
    for start in range(0, tokens.shape[1], size):
        piece = np.zeros((len(tokens), size), np.int32)
        held = tokens[:, start : start + size]
        piece[:, : held.shape[1]] = held
        count = np.clip(lengths - start, 0, held.shape[1]).astype(np.int32)
        begin = np.minimum(lengths, start).astype(np.int32)
        hidden, cache = run_hidden(model, piece, jnp.asarray(begin), jnp.asarray(count), cache)
        pieces.append(hidden[:, : held.shape[1]])
    return np.asarray(run_logits(model, jnp.concatenate(pieces, axis=1)))


FAMILIES = {name: facts for name, facts in MODELS.items() if facts[0] in RELATIVES}
"""The relatives of Llama: name -> model_type, what differs from `SMALL`."""
SPARSE = [name for name, (model_type, _) in FAMILIES.items() if RELATIVES[model_type].experts]
"""Those with experts."""


def make_reference(name: str, seed: int = 0, **changes):
    """A random float32 transformers model; biases, norms and routers are random too.

    Args:
      name: one of `MODELS`.
      seed: of the weights.
      changes: of the language model's configuration.
    """
    model_type, own = MODELS[name]
    row = ROWS[model_type]
    facts = {**row.sizes, **own, **changes}
    kind = transformers.AutoModelForCausalLM
    if row.nest is not None:
        facts, kind = row.nest(facts), transformers.AutoModelForImageTextToText
    config = transformers.AutoConfig.for_model(model_type, **facts)
    torch.manual_seed(seed)
    model = kind.from_config(config, attn_implementation="eager")
    with torch.no_grad():
        for path, tensor in list_tensors(model):
            center = row.center(path) if tensor.ndim == 1 else None
            if center is not None:
                tensor.copy_(center + 0.3 * torch.randn(tensor.shape))
            elif path.endswith(
                ("mlp.gate.weight", "router.proj.weight", "block_sparse_moe.router.weight")
            ):
                tensor.copy_(0.3 * torch.randn(tensor.shape))
            elif path.endswith("moe_statics.e_score_correction_bias"):
                tensor.copy_(0.05 * torch.randn(tensor.shape))
    return model.float().eval()


def list_tensors(reference) -> Iterator[tuple[str, torch.Tensor]]:
    """What a checkpoint holds of a transformers model: no copy of tied weights, no frequencies."""
    yield from reference.named_parameters()
    for name, buffer in reference.named_buffers():
        if name.endswith(("e_score_correction_bias", "layer_scalar")):
            yield name, buffer


def cast_weights(reference, dtype: torch.dtype):
    """A transformers model with weights of a dtype, as it loads them: a few stay float32."""
    buffers = {name: buffer.clone() for name, buffer in reference.named_buffers()}
    wide = getattr(reference, "_keep_in_fp32_modules_strict", None) or ()
    kept = {
        name: weight.detach().clone()
        for name, weight in reference.named_parameters()
        if any(part in name for part in wide)
    }
    reference.to(dtype)
    for name, weight in kept.items():
        reference.get_parameter(name).data = weight
    for name, buffer in buffers.items():
        path, _, last = name.rpartition(".")
        setattr(reference.get_submodule(path), last, buffer)
    return reference


def list_leaves(reference) -> Iterator[tuple[str, np.ndarray]]:
    """The leaves of the params tree of our model; but for experts and what is fused in files,
    transformers' own names."""
    config = reference.config.to_dict()
    family = find_family(config)
    kinds = family.list_fused(family.read(config))
    for name, tensor in list_tensors(reference):
        name = name.replace(".experts.gate_up_proj", ".experts.w13.weight")
        name = name.replace(".experts.down_proj", ".experts.w2.weight")
        array = tensor.detach().numpy()
        path, _, role = name.rpartition(".")
        fused = [kind for kind in kinds if path.endswith(f".{kind.name}")]
        for part, rows in fused[0].parts.items() if fused else ():
            yield f"{path.rpartition('.')[0]}.{part}.{role}", array[rows]
        if not fused:
            yield name, array


def is_beside(name: str) -> bool:
    """Whether a tensor of a transformers model is no part of ours: of towers, or of an indexer."""
    parts = (
        "visual|vision_tower|mm_projector|multi_modal_projector|audio_tower|image_newline"
        "|embed_vision"
    )
    return re.match(rf"model\.({parts})(\.|$)|.*\.indexer\.", name) is not None


def nest_params(reference) -> dict:
    """The params tree of a transformers model, or of the language model beside a tower."""
    tree: dict = {}
    for name, array in list_leaves(reference):
        if is_beside(name):
            continue
        *path, leaf = name.split(".")
        node = tree
        for key in path:
            node = node.setdefault(key, {})
        node[leaf] = array
    return tree


def convert(reference, dtype=jnp.float32) -> CausalLM:
    """Our model with the weights of a transformers model."""
    config = reference.config.to_dict()
    family = find_family(config)
    make, config = family.open_class(), family.read(config)
    abstract = nnx.eval_shape(lambda: make(config, dtype=dtype))
    return fill_model(abstract, nest_params(reference), family.names)


def reference_logits(reference, tokens: np.ndarray) -> np.ndarray:
    """Float32 logits [B, S, V] of a transformers model."""
    with torch.no_grad():
        return reference(torch.from_numpy(tokens).long()).logits.float().numpy()


def generate_reference(reference, prompt: np.ndarray, length: int) -> np.ndarray:
    """Rows of this length: a prompt [B, S], and what transformers finds likeliest after it."""
    tokens = torch.from_numpy(prompt).long()
    with torch.no_grad():
        whole = reference.generate(
            tokens,
            attention_mask=torch.ones_like(tokens),  # a token like the padding's is none
            max_new_tokens=length - prompt.shape[1],
            do_sample=False,
        )
    return whole.numpy().astype(np.int32)


def random_tokens(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, SMALL["vocab_size"], shape).astype(np.int32)


def relative_error(ours, reference: np.ndarray) -> float:
    """Largest difference over the largest reference value."""
    return float(np.abs(np.asarray(ours, np.float32) - reference).max() / np.abs(reference).max())


class Routed(NamedTuple):
    """What a router saw and chose for T tokens: experts in ascending order, and their weights."""

    hidden: np.ndarray
    logits: np.ndarray
    ids: np.ndarray
    weights: np.ndarray


def record_routers(reference, tokens: np.ndarray) -> dict[int, Routed]:
    """Run a transformers model; what each sparse layer's router saw and chose."""
    seen: dict[int, Routed] = {}

    def record(layer: int):
        def hook(_, arguments, outputs):
            hidden, (logits, weights, ids) = arguments[0], outputs
            order = ids.argsort(dim=-1)
            seen[layer] = Routed(
                hidden.reshape(-1, hidden.shape[-1]).float().numpy(),
                logits.float().numpy(),
                ids.gather(-1, order).numpy(),
                weights.gather(-1, order).float().numpy(),
            )

        return hook

    routers = {
        i: layer.block_sparse_moe.router
        if hasattr(layer, "block_sparse_moe")
        else getattr(layer, "router", None) or getattr(layer.mlp, "gate", None)
        for i, layer in enumerate(reference.model.layers)
    }
    hooks = [r.register_forward_hook(record(i)) for i, r in routers.items() if r is not None]
    reference_logits(reference, tokens)
    for hook in hooks:
        hook.remove()
    return seen


def choose_experts(
    model: CausalLM, layer: int, hidden: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """The experts that our router chooses for hidden [T, H], ascending, and their weights."""
    moe = model.config.moe
    assert moe is not None
    block, x = model.model.layers[layer], jnp.asarray(hidden, model.dtype)
    if hasattr(block, "router"):
        ids, weights = block.router(x)
    else:
        gate = block.mlp.gate
        options = dataclasses.asdict(moe.routing)
        ids, weights = route(gate(x), correction_bias=gate.read_bias(), **options)
    order = np.argsort(ids, axis=-1)
    return np.take_along_axis(np.asarray(ids), order, -1), np.take_along_axis(
        np.asarray(weights), order, -1
    )
