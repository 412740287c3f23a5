"""What lm-evaluation-harness asks of a model, answered by ours."""

from __future__ import annotations

import hashlib
import json
import logging
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm

from jaxwna16.checkpoints.load import resolve_folder
from jaxwna16.dtypes import choose_dtype
from jaxwna16.errors import InputError
from jaxwna16.evaluation.lm_eval.batches import BatchSize, read_batch_size
from jaxwna16.evaluation.lm_eval.options import (
    Options,
    read_flag,
    read_number,
    read_options,
    read_template_args,
)
from jaxwna16.evaluation.lm_eval.scoring import Request, Scored, score_requests
from jaxwna16.evaluation.lm_eval.thinking import cut_answer, read_end
from jaxwna16.evaluation.perplexity import find_prefix
from jaxwna16.generation.generate import Generation, continue_tokens
from jaxwna16.generation.load_model import load_model
from jaxwna16.generation.streaming.stop_strings import find_stop_tokens
from jaxwna16.generation.text import Tokenizer
from jaxwna16.models.families import parse_config
from jaxwna16.models.wrapped.media_tokens import refuse_media
from loaders.open import open_plan

_log = logging.getLogger(__name__)


@register_model("jaxwna16")
class JaxWNA16LM(TemplateLM):
    """A checkpoint of ours as a model of the harness.

    Texts are tokenized as in the harness's own model `hf`, so that figures are comparable.
    Requests are sorted by length and padded to a few shapes, each of which is compiled once.

    Args:
      pretrained: checkpoint folder, or a name on the Hugging Face hub.
      dtype: of activations; "auto" is float32 on a CPU, the checkpoint's own elsewhere.
      backend: of the quantized layers, as in `load_model`.
      batch_size: rows at once; "auto" is as many as have logits of 512 MiB, 64 at most.
      max_batch_size: an upper bound for "auto".
      max_length: tokens that the model reads at most; None is what config.json says, which is also
        the most it can be.
      max_gen_toks: new tokens of a request that does not say how many.
      add_bos_token: whether a text begins with the tokenizer's special tokens; None is as
        tokenizer.json says. True puts a BOS there also if tokenizer.json does not.
      prefix_token_id: stands before a text without a context; None is BOS, else EOS.
      enable_thinking: what the chat template sees under this name; None is nothing. With True only
        generative tasks can be run, and `think_end_token` is needed.
      think_end_token: the text or the token that ends the thinking; the answer is what follows the
        last of them, and stop strings end the answer alone.
      chat_template_args: other variables of the chat template, as an object or its JSON.
      seed: of the draws, where a task asks for them.
      follow_links: as in `load_model`.
      device: ignored, JAX has chosen (JAX_PLATFORMS).

    Raises:
      InputError: if an option is not one of these, or a value is out of range.
      CheckpointError, ModelError: as `load_model`.

    Example:
      ```python
      from jaxwna16.lm_eval import JaxWNA16LM

      lm = JaxWNA16LM("path/to/checkpoint")
      assert lm.tok_encode("Hello")
      # results = lm_eval.simple_evaluate(model=lm, tasks=["wikitext"])
      ```
    """

    def __init__(
        self,
        pretrained: str,
        *,
        dtype: str = "auto",
        backend: str | None = None,
        batch_size: int | str = 1,
        max_batch_size: int | None = None,
        max_length: int | None = None,
        max_gen_toks: int = 256,
        add_bos_token: bool | str | None = None,
        prefix_token_id: int | None = None,
        enable_thinking: bool | str | None = None,
        think_end_token: str | int | None = None,
        chat_template_args: Mapping[str, Any] | str | None = None,
        seed: int = 0,
        follow_links: bool = False,
        device: str | None = None,
        **unknown: Any,
    ):
        super().__init__()
        del device
        if unknown:
            raise InputError(f"model_args: the model jaxwna16 has no {', '.join(sorted(unknown))}")
        self.add_bos_token = read_flag("add_bos_token", add_bos_token)
        self.enable_thinking = read_flag("enable_thinking", enable_thinking)
        self.chat_template_args = read_template_args(chat_template_args)
        if self.enable_thinking is not None:
            self.chat_template_args["enable_thinking"] = self.enable_thinking
        folder = resolve_folder(pretrained)
        config = parse_config(open_plan(folder, follow_links=follow_links).config)
        limit, vocab_size = config.max_length, config.vocab_size
        if max_length is None:
            max_length = limit
        if prefix_token_id is not None:
            prefix_token_id = read_number("prefix_token_id", prefix_token_id, 0, vocab_size - 1)
        self.max_length = read_number("max_length", max_length, 1, limit)
        self.max_gen_toks = read_number("max_gen_toks", max_gen_toks, 1)
        self.seed = read_number("seed", seed, 0, 2**31 - 1)
        self._batch_size = BatchSize(
            rows=read_batch_size(batch_size),
            most=read_number("max_batch_size", 64 if max_batch_size is None else max_batch_size, 1),
            vocab_size=vocab_size,
            slots=self.max_length,
        )
        self._batches = 0
        self.tokenizer = Tokenizer.from_folder(folder, follow_links=follow_links)
        self._prefix = find_prefix(self.tokenizer) if prefix_token_id is None else prefix_token_id
        self.think_end_token = read_end(
            think_end_token, self.enable_thinking, self.tokenizer, vocab_size
        )
        self.model = load_model(
            folder, dtype=choose_dtype(dtype), backend=backend, follow_links=follow_links
        )
        for warning in self.model.warnings:
            _log.warning("%s: %s", folder, warning)

    @property
    def eot_token_id(self) -> int:
        """The tokenizer's `eos_token`."""
        token = self.tokenizer.find_special("eos_token")
        if token is None:
            raise InputError(f"{self.tokenizer.source}: the tokenizer has no `eos_token`")
        return token

    @property
    def prefix_token_id(self) -> int:
        """The token that stands before a text without a context."""
        if self._prefix is None:
            raise InputError(
                f"{self.tokenizer.source}: the tokenizer has neither `bos_token` nor `eos_token` "
                "to stand before a text: give model_args prefix_token_id="
            )
        return self._prefix

    @property
    def tokenizer_name(self) -> str:
        """What the harness's cache of requests calls the tokenizer and its chat template."""
        name = self.tokenizer.source.replace("/", "__")
        if not self.chat_template_args:
            return name
        variables = json.dumps(self.chat_template_args, sort_keys=True, default=str)
        return f"{name}__{hashlib.sha256(variables.encode()).hexdigest()[:8]}"

    def get_model_info(self) -> dict[str, Any]:
        """What the harness writes into its results beside the figures."""
        from jaxwna16.version import __version__

        return {
            "model_dtype": jnp.dtype(self.model.dtype).name,
            "jaxwna16_version": __version__,
            "jaxwna16_platform": jax.default_backend(),
        }

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        """Turn text into tokens; a text that is written with its BOS gets no second one."""
        del kwargs
        if add_special_tokens is not None:
            return self._encode(string, add_special_tokens)
        prefix = self.tokenizer.decode([self.prefix_token_id], skip_special_tokens=False)
        return self._encode(string, None if not string.startswith(prefix) else False)

    def _encode(self, string: str, special: bool | None) -> list[int]:
        if special is None or self.add_bos_token is False:
            special = self.add_bos_token
        tokens = self.tokenizer.encode(string, add_special_tokens=special is not False)
        if special and self.add_bos_token:
            bos = self.tokenizer.find_special("bos_token")
            tokens = tokens if bos is None or tokens[:1] == [bos] else [bos, *tokens]
        return tokens

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The Jinja source that `apply_chat_template` uses, None if the harness asks for none.

        Raises:
          InputError: if another template than the default is named, or there is none.
        """
        if chat_template in (False, None):
            return None
        if chat_template not in (True, "default"):
            raise InputError(
                f"{self.tokenizer.source}: only the default chat template can be applied, "
                f"not {chat_template!r} (--apply_chat_template)"
            )
        if not self.tokenizer.has_chat_template:
            raise InputError(f"{self.tokenizer.source}: there is no default chat template")
        return self.tokenizer.chat_templates["default"]

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """Write a conversation as a text; without a generation prompt its last message stays open.

        A template that refuses a system message gets the others alone.
        """
        try:
            return self._render(chat_history, add_generation_prompt)
        except InputError:
            others = [message for message in chat_history if message["role"] != "system"]
            if len(others) == len(chat_history):
                raise
            _log.warning("the chat template refused the messages: the system message is left out")
            return self._render(others, add_generation_prompt)

    def _render(self, messages: list[dict[str, str]], add_generation_prompt: bool) -> str:
        return self.tokenizer.render_chat(
            messages,
            add_generation_prompt,
            continue_final_message=not add_generation_prompt,
            variables=self.chat_template_args,
        )

    def loglikelihood(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[tuple[float, bool]]:
        """Log-likelihood of each continuation after its context, and whether it is the greedy one.

        Raises:
          InputError: with `enable_thinking`, and if there is nothing to score.
        """
        if self.enable_thinking:
            names = sorted({name for request in requests if (name := request.task_name)})
            raise InputError(
                "enable_thinking=True is for generative tasks alone: choices are scored directly "
                f"after the prompt, without room for thinking (tasks: {', '.join(names)})"
            )
        for number, request in enumerate(requests):
            if not any(request.args):
                raise InputError(f"request {number}: context and continuation are empty")
        return super().loglikelihood(requests, disable_tqdm=disable_tqdm)

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Tokens of both; a context without tokens becomes the prefix token, as an empty one does.

        Blanks at the end of a context belong to the continuation. So a context of blanks has no
        tokens, unless a BOS is put before it.
        """
        if context:
            before, after = super()._encode_pair(context, continuation)
        else:
            before, after = [], self.tok_encode(continuation, add_special_tokens=False)
        if before:
            return before, after
        if after[:1] == [self.prefix_token_id]:
            return after[:1], after[1:]
        return [self.prefix_token_id], after

    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        """Log-likelihood of each whole text, in windows of `max_length` tokens with one of context.

        The first token stands after `prefix_token_id`; the last window reaches back.
        """
        owners: list[int] = []
        windows: list[Request] = []
        for number, request in enumerate(requests):
            tokens = self.tok_encode(request.args[0])
            pairs = get_rolling_token_windows(tokens, self.prefix_token_id, self.max_length, 1)
            for context, continuation in map(make_disjoint_window, pairs):
                owners.append(number)
                windows.append((None, context, continuation))
        totals = [0.0] * len(requests)
        scored = self._loglikelihood_tokens(windows, disable_tqdm=disable_tqdm)
        for owner, (loglikelihood, _) in zip(owners, scored, strict=True):
            totals[owner] += loglikelihood
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def _loglikelihood_tokens(
        self, requests: Sequence[Request], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[Scored]:
        """For each request its continuation's log-likelihood, and whether it is the greedy one."""
        del kwargs
        refuse_media(
            self.model,
            {f"request {i}": [*before, *after] for i, (_, before, after) in enumerate(requests)},
        )
        answers: dict[int, Scored] = {}
        scored = score_requests(
            self.model, requests, max_length=self.max_length, batch_size=self._batch_size
        )
        for number, answer in tqdm(
            scored, "Scoring", total=len(requests), disable=disable_tqdm, leave=False
        ):
            answers[number] = answer
            if (key := requests[number][0]) is not None:
                self.cache_hook.add_partial("loglikelihood", key, answer)
        return [answers[number] for number in range(len(requests))]

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Continue each context up to a stop string, a stop token, or `max_gen_toks`.

        Contexts that leave no room for `max_gen_toks` lose their beginning.

        Raises:
          InputError: if a task asks for an option of generation that we do not have.
        """
        asked: list[Any] = [request.args for request in requests]
        groups: dict[str, list[int]] = defaultdict(list)
        for number, (_, gen_kwargs) in enumerate(asked):
            groups[json.dumps(gen_kwargs, sort_keys=True)].append(number)
        texts = [""] * len(requests)
        with tqdm(total=len(requests), desc="Generating", disable=disable_tqdm, leave=False) as bar:
            for numbers in groups.values():
                options = read_options(asked[numbers[0]][1], self.max_gen_toks)
                prompts = {n: self._encode_prompt(asked[n][0], options) for n in numbers}
                numbers.sort(key=lambda n, prompts=prompts: -len(prompts[n]))
                for batch in self._batch_size.plan([len(prompts[n]) for n in numbers]):
                    chunk = numbers[batch.start : batch.stop]
                    rows = [prompts[n] for n in chunk]
                    # filled up with copies, so that the last batch is not another program
                    rows += rows[-1:] * (batch.rows - len(rows))
                    # the same seed again would draw the same numbers for the same row
                    self._batches += 1
                    seed = self.seed + self._batches
                    found = self._continue(rows, options, seed)
                    for n, text in zip(chunk, found, strict=False):
                        texts[n] = text
                        self.cache_hook.add_partial("generate_until", asked[n], text)
                    bar.update(len(chunk))
        return texts

    def _continue(self, rows: list[list[int]], options: Options, seed: int) -> list[str]:
        """Continue prompts; for a model that thinks, without the thinking."""
        if self.think_end_token is None:
            return self._generate(rows, options, seed).texts
        # in the thinking a stop string is a word like any other, unless it is a token by itself
        stop = tuple(s for s in options.stop if find_stop_tokens(self.tokenizer, [s]))
        found = self._generate(rows, options._replace(stop=stop), seed)
        return [
            cut_answer(self.tokenizer, tokens, self.think_end_token, options.stop)
            for tokens in found.result.tokens
        ]

    def _generate(self, rows: list[list[int]], options: Options, seed: int) -> Generation:
        return continue_tokens(self.model, self.tokenizer, rows, seed=seed, **options._asdict())

    def _encode_prompt(self, text: str, options: Options) -> list[int]:
        room = self.max_length - options.max_new_tokens
        if room < 1:
            raise InputError(
                f"max_gen_toks={options.max_new_tokens} leaves no room for a context: "
                f"the model reads {self.max_length} tokens"
            )
        return self.tok_encode(text)[-room:] or [self.prefix_token_id]
