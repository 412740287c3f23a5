"""Opening the model of a checkpoint, for the verbs that compute with one."""

from __future__ import annotations

import argparse
import time
from typing import Any

import jax

from jaxwna16.checkpoint import resolve_folder
from jaxwna16.language import load_model
from jaxwna16.models.llama import Llama
from jaxwna16.text import Tokenizer
from loaders.converted import open_plan


def open_tokenizer(args: argparse.Namespace) -> Tokenizer:
    """The tokenizer of a checkpoint whose headers are in order: what takes no time comes first."""
    plan = open_plan(resolve_folder(args.checkpoint))
    return Tokenizer.from_folder(plan.folder)


def open_model(args: argparse.Namespace) -> tuple[Llama, dict[str, Any]]:
    """The model that `arguments.add_model` describes, and what a report says about it."""
    dtype = args.dtype
    if dtype == "auto":
        # most CPUs compute in 16 bits far more slowly than in 32
        dtype = "float32" if jax.default_backend() == "cpu" else None
    folder = resolve_folder(args.checkpoint)
    started = time.perf_counter()
    model = load_model(folder, dtype=dtype, backend=args.backend)
    facts = {
        "folder": str(folder),
        "dtype": jax.numpy.dtype(model.dtype).name,
        "backend": args.backend,
        "load_seconds": time.perf_counter() - started,
    }
    return model, facts
