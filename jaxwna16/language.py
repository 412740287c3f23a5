"""`load_model` and `generate`: from a checkpoint to text."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from flax import nnx

from jaxwna16.checkpoint import read_plan, resolve_folder
from jaxwna16.errors import InputError
from jaxwna16.generation import GenerationResult, generate_tokens
from jaxwna16.models.config import ModelConfig
from jaxwna16.models.llama import Llama
from jaxwna16.models.params import check_leaves, load_params
from jaxwna16.text import TextStream, Tokenizer
from loaders.plan import Plan, make_plan


@dataclasses.dataclass(frozen=True)
class Generation:
    """What `generate` wrote: one text per prompt, and the tokens and timings behind them."""

    texts: list[str]
    result: GenerationResult


def load_model(
    path_or_hub_id: str | os.PathLike[str],
    *,
    dtype: Any = None,
    backend: str | None = None,
    progress: bool | None = None,
) -> Llama:
    """Load a language model of one of `MODEL_TYPES`, with packed weights or without.

    Args:
      path_or_hub_id: a checkpoint folder, or a name on the Hugging Face hub.
      dtype: dtype of activations, cache and of all that is not quantized; None is the dtype that
        config.json states, float32 where it states none.
      backend: of the quantized layers: None, "triton" or "xla" (see `quant_matmul`).
      progress: True, False, or None for a bar on a terminal only.

    Returns:
      An NNX module: `model(tokens)` maps int32 [B, S] to float32 logits [B, S, V].

    Raises:
      CheckpointError: listing every fault of the checkpoint.
      ModelError: if the architecture is not supported, or listing every tensor that is missing,
        unexpected or of another shape.
    """
    plan = drop_prediction_layers(make_plan(resolve_folder(path_or_hub_id)))
    model = plan_model(plan, dtype=dtype, backend=backend)
    checkpoint = read_plan(plan, dtype=model.dtype, progress=progress)
    return load_params(model, checkpoint.params)


def plan_model(plan: Plan, *, dtype: Any = None, backend: str | None = None) -> Llama:
    """Make the model of a checkpoint without its arrays, and check that every tensor has its place.

    Raises:
      ModelError: as `load_model`; no weight has been read by then.
    """
    plan = drop_prediction_layers(plan)
    leaves, specs = plan.describe_leaves(), plan.specs
    config = ModelConfig.from_dict(plan.config).with_block_of(leaves)
    dtype = dtype or config.dtype or "float32"
    model = nnx.eval_shape(lambda: Llama(config, specs, dtype=dtype, backend=backend))
    check_leaves(model, leaves, f"{plan.folder}: tensors")
    model.folder = str(plan.folder)
    return model


def drop_prediction_layers(plan: Plan) -> Plan:
    """The plan without the layers past the last that predict several tokens at once (GLM).

    As in transformers they are not read: generation here is token by token.
    """
    config = ModelConfig.from_dict(plan.config)
    first, count = config.num_hidden_layers, config.prediction_layers
    dropped = tuple(f"model.layers.{first + i}." for i in range(count))

    def keep(parts: Mapping[str, Any]) -> dict[str, Any]:
        return {name: part for name, part in parts.items() if not name.startswith(dropped)}

    return dataclasses.replace(
        plan, quantized=keep(plan.quantized), plain=keep(plan.plain), stacks=keep(plan.stacks)
    )


def generate(
    model: Llama,
    prompts: str | Sequence[str],
    *,
    tokenizer: Tokenizer | None = None,
    chat: bool = False,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
    stream: Callable[[list[str]], None] | None = None,
) -> Generation:
    """Continue each prompt, up to a stop token of the checkpoint or `max_new_tokens`.

    Args:
      model: from `load_model`.
      prompts: one text or several, of any lengths.
      tokenizer: None is the one in the model's checkpoint folder.
      chat: put each prompt into the checkpoint's chat template, as a user's message.
      max_new_tokens: tokens per prompt at most.
      temperature: 0 is greedy.
      top_k: draw among the k most likely tokens; 0 is off.
      top_p: draw among the most likely tokens that together reach this probability; 1 is off.
      seed: of the draws; the same seed gives the same texts.
      stream: called with the new text of each prompt whenever a few tokens are ready.

    Raises:
      InputError: listing what is wrong with the prompts or the options.
    """
    prompts = [prompts] if isinstance(prompts, str) else list(prompts)
    if empty := [i for i, prompt in enumerate(prompts) if not prompt]:
        raise InputError(f"prompts {empty} are empty: give each at least one character")
    if tokenizer is None:
        if model.folder is None:
            raise InputError("the model was not loaded from a folder: pass tokenizer=")
        tokenizer = Tokenizer.from_folder(model.folder)
    if chat:
        encoded = [tokenizer.encode_chat([{"role": "user", "content": p}]) for p in prompts]
    else:
        encoded = [tokenizer.encode(prompt) for prompt in prompts]
    rows = [TextStream(tokenizer) for _ in prompts]
    result = generate_tokens(
        model,
        encoded,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        seed=seed,
        stop_tokens=sorted(tokenizer.stop_tokens),
        stream=stream
        and (lambda new: stream([row.push(ids) for row, ids in zip(rows, new, strict=True)])),
    )
    if stream is not None:
        stream([row.flush() for row in rows])
    return Generation([tokenizer.decode(ids) for ids in result.tokens], result)
