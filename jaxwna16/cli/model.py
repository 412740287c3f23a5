"""Opening the model of a checkpoint, for the verbs that compute with one."""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from jaxwna16.checkpoints.load import resolve_folder
from jaxwna16.dtypes import choose_dtype
from jaxwna16.errors import InputError
from jaxwna16.evaluation.perplexity import find_prefix, read_text
from jaxwna16.evaluation.text_windows import cut_windows
from jaxwna16.generation.load_model import load_model
from jaxwna16.generation.text import Tokenizer
from jaxwna16.models.causal_lm import CausalLM
from jaxwna16.models.families import parse_config
from jaxwna16.programs import keep_programs
from loaders.open import open_plan
from loaders.plan import Plan


def open_tokenizer(args: argparse.Namespace) -> Tokenizer:
    """The tokenizer of a checkpoint, after a check of the headers: fast checks come first."""
    plan = open_plan(resolve_folder(args.checkpoint), follow_links=args.follow_links)
    return Tokenizer.from_folder(plan.folder, follow_links=plan.follow_links)


def read_scored_text(
    args: argparse.Namespace, tokenizer: Tokenizer, plans: Sequence[Plan]
) -> tuple[str, list[int]]:
    """The text that `arguments.add_windows` describes, and its tokens.

    If every token is scored, the first needs a token before it. The tokens then begin with BOS, or
    with EOS if the tokenizer has no BOS. It is not added if it is there already.

    Raises:
      InputError: if the text cannot be read or has fewer windows than asked for, or if a window is
        longer than one of the models reads.
      ModelError: if a model is not supported.
    """
    text = read_text(args.text)
    if args.windows is not None:
        text = text[len(text) // 2 :]
    tokens = tokenizer.encode(text)
    if args.stride not in (None, args.window):
        prefix = find_prefix(tokenizer)
        if prefix is not None and tokens[:1] != [prefix]:
            tokens = [prefix, *tokens]
    windows = len(cut_windows(np.asarray(tokens), args.window, args.windows, args.stride).tokens)
    if args.windows is not None and windows < args.windows:
        raise InputError(
            f"{args.text}: its second half has {windows} windows of {args.window} tokens, not "
            f"{args.windows}: ask for fewer (--windows), for smaller ones (--window) or leave out "
            "--windows to score the whole text"
        )
    for plan in plans:
        limit = parse_config(plan.config).max_length
        if args.window > limit + 1:  # the output at a window's last token is not used
            raise InputError(
                f"--window {args.window}: {plan.folder} was made for {limit} tokens, so a window "
                f"has at most {limit + 1}, the last of which is only predicted"
            )
    return text, tokens


def open_model(args: argparse.Namespace) -> tuple[CausalLM, dict[str, Any]]:
    """The model that `arguments.add_model` describes, and what a report says about it."""
    keep_programs()
    dtype = choose_dtype(args.dtype)
    folder = resolve_folder(args.checkpoint)
    started = time.perf_counter()
    model = load_model(folder, dtype=dtype, backend=args.backend, follow_links=args.follow_links)
    facts = {
        "folder": str(folder),
        "dtype": jax.numpy.dtype(model.dtype).name,
        "backend": args.backend,
        "load_seconds": time.perf_counter() - started,
    }
    return model, facts
