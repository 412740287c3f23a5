"""`generate`: texts that continue prompts, by a model and its tokenizer."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from jaxwna16.errors import InputError
from jaxwna16.generation.streaming.stop_strings import StoppingText, find_stop_tokens
from jaxwna16.generation.text import Tokenizer
from jaxwna16.generation.tokens import GenerationResult, generate_tokens
from jaxwna16.models.causal_lm import CausalLM


@dataclasses.dataclass(frozen=True)
class Generation:
    """What `generate` wrote: one text per prompt, and the tokens and timings behind them.

    Of a text that a stop string ended, the tokens go up to the one that completed it.

    Example:
      ```python
      model = jaxwna16.load_model("path/to/checkpoint", dtype="float32")
      answer = jaxwna16.generate(model, ["One", "Two"], max_new_tokens=8)
      print(answer.texts[0], answer.result.tokens[0])
      ```
    """

    texts: list[str]
    result: GenerationResult


def generate(
    model: CausalLM,
    prompts: str | Sequence[str],
    *,
    tokenizer: Tokenizer | None = None,
    chat: bool = False,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
    stop: str | Sequence[str] = (),
    logprobs: int | None = None,
    prefill_chunk: int | None = None,
    stream: Callable[[list[str]], None] | None = None,
) -> Generation:
    """Continue each prompt, up to a stop token of the checkpoint, `stop` or `max_new_tokens`.

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
      stop: strings; a text ends before the first of them that is complete, wherever its tokens
        begin and end. One that is a token of the vocabulary by itself ("<|im_end|>") ends it, too.
      logprobs: as in `generate_tokens`: None for no scores, or how many of the likeliest tokens to
        score beside the chosen one (`result.logprobs`).
      prefill_chunk: as in `generate_tokens`: tokens of each prompt that are run at once.
      stream: called with the new text of each prompt as soon as it is decided, about ten times a
        second or for every token. Joined, it is the prompt's text: what may become a stop string
        or a character is held back until it is clear.

    Raises:
      InputError: listing what is wrong with the prompts or the options.

    Example:
      ```python
      model = jaxwna16.load_model("path/to/checkpoint", dtype="float32")
      answer = jaxwna16.generate(model, ["One", "Two"], max_new_tokens=8, stop=".")
      for text in answer.texts:
          print(text)
      ```
    """
    prompts, stop = _list_items(prompts), _list_items(stop)
    if strays := [prompt for prompt in prompts if not isinstance(prompt, str)]:
        raise InputError(
            f"prompts: expected texts, got {strays[0]!r:.60}: use generate_tokens for tokens, and "
            "tokenizer.encode_chat to turn messages into tokens"
        )
    if empty := [i for i, prompt in enumerate(prompts) if not prompt]:
        raise InputError(f"prompts {empty} are empty: give each at least one character")
    if tokenizer is None:
        if model.folder is None:
            raise InputError(
                "the model has no checkpoint folder: it was not loaded from one, or nnx.merge, "
                "jax.device_put or a jitted function made it from such a model; pass tokenizer=, "
                "or set model.folder"
            )
        tokenizer = Tokenizer.from_folder(model.folder, follow_links=model.follow_links)
    if chat:
        encoded = [tokenizer.encode_chat([{"role": "user", "content": p}]) for p in prompts]
    else:
        encoded = [tokenizer.encode(prompt) for prompt in prompts]
    return continue_tokens(
        model,
        tokenizer,
        encoded,
        stop=stop,
        stream=stream,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        seed=seed,
        logprobs=logprobs,
        prefill_chunk=prefill_chunk,
    )


def _list_items(value: Any) -> list[Any]:
    """What is in a list or the like; anything else is one item."""
    if isinstance(value, jax.Array | np.ndarray):
        value = value.tolist()
    several = isinstance(value, Iterable) and not isinstance(value, str | Mapping)
    return list(value) if several else [value]


def continue_tokens(
    model: CausalLM,
    tokenizer: Tokenizer,
    prompts: Sequence[Sequence[int]],
    *,
    stop: Sequence[str] = (),
    stream: Callable[[list[str]], None] | None = None,
    **options: Any,
) -> Generation:
    """Continue each prompt, given as tokens; otherwise as `generate`.

    Args:
      model: from `load_model`.
      tokenizer: what the prompts were encoded with.
      prompts: the ids of each.
      stop, stream: as in `generate`.
      options: all others of `generate_tokens`.

    Raises:
      InputError: as `generate`.
    """
    stop_tokens = tokenizer.stop_tokens | find_stop_tokens(tokenizer, stop)
    stop_tokens |= set(model.config.eos_token_ids)  # which a text_config can state alone
    rows = [StoppingText(tokenizer, stop) for _ in prompts]

    def push(new: list[list[int]]) -> dict[int, int]:
        running = [i for i, row in enumerate(rows) if not row.stopped]
        texts = [row.push(ids) for row, ids in zip(rows, new, strict=True)]
        if stream is not None:
            stream(texts)
        return {i: rows[i].tokens for i in running if rows[i].stopped}

    result = generate_tokens(
        model,
        prompts,
        stop_tokens=sorted(stop_tokens),
        stream=push if stop or stream is not None else None,
        **options,
    )
    rests = [row.flush() for row in rows]
    if stream is not None:
        stream(rests)
    texts = [
        row.text if row.stopped else tokenizer.decode(ids)
        for row, ids in zip(rows, result.tokens, strict=True)
    ]
    return Generation(texts, result)
