"""Several checkpoints of one vocabulary side by side: size, perplexity, distance from the first.

At most two models are in memory: the first, which stays, and the one that is compared with it. The
logits of the first are computed again for each of the others: keeping them would take far more
memory than the model does.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import time
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxwna16.checkpoints.load import resolve_folder
from jaxwna16.errors import InputError
from jaxwna16.evaluation.perplexity import measure_perplexity
from jaxwna16.evaluation.text_windows import check_batch, check_finite, cut_windows
from jaxwna16.generation.load_model import load_model
from jaxwna16.generation.text import Tokenizer
from jaxwna16.models.wrapped.media_tokens import refuse_media
from jaxwna16.programs import trace_counts
from jaxwna16.progress import show_steps
from loaders.open import open_plan
from loaders.plan import Plan
from loaders.schemes.subconfigs import find_subconfigs


@dataclasses.dataclass(frozen=True)
class Divergence:
    """How far a model's predictions are from those of a reference.

    Attributes:
      kl_divergence: mean of KL(reference ‖ model) over the scored tokens, in nats.
      top1_agreement: share of the scored tokens for which both find the same token most likely.
      tokens: how many were scored.
    """

    kl_divergence: float
    top1_agreement: float
    tokens: int


@dataclasses.dataclass(frozen=True)
class Compared:
    """One checkpoint of a comparison.

    Attributes:
      name: its folder's name, or its path where two folders have the same name.
      folder: where it is.
      scheme: what its linear weights are: "W4 asymmetric g32", "float32".
      bytes: of all tensors in its files.
      dtype: of activations.
      load_seconds: loading it took.
      perplexity, nll: as in `Perplexity`.
      kl_divergence, top1_agreement: from the first checkpoint, as in `Divergence`.
      tokens_per_second: of the scoring, by this model alone.
    """

    name: str
    folder: str
    scheme: str
    bytes: int
    dtype: str
    load_seconds: float
    perplexity: float
    nll: float
    kl_divergence: float
    top1_agreement: float
    tokens_per_second: float


def measure_divergence(
    reference: nnx.Module,
    model: nnx.Module,
    tokens: Sequence[int] | np.ndarray,
    *,
    window: int = 512,
    stride: int | None = None,
    max_windows: int | None = None,
    batch: int = 1,
    progress: bool | None = False,
) -> Divergence:
    """Measure how far a model's predictions of a text are from those of another.

    One jitted function computes both models' logits for a batch of windows, and reduces them to two
    numbers per token, in float32. Windows and arguments are those of `measure_perplexity`.

    Raises:
      InputError: if the text is shorter than a window, or a number is out of range.
      ModelError: if a divergence is not finite.

    Example:
      ```python
      from jaxwna16.comparison import measure_divergence

      reference = jaxwna16.load_model("path/to/floats", dtype="float32")
      model = jaxwna16.load_model("path/to/checkpoint", dtype="float32")
      tokenizer = jaxwna16.Tokenizer.from_folder("path/to/floats")
      tokens = tokenizer.encode("It was a dark and stormy night. " * 8)
      found = measure_divergence(reference, model, tokens, window=16, max_windows=4)
      assert found.kl_divergence > 0
      ```
    """
    windows = cut_windows(np.asarray(tokens), window, max_windows, stride)
    for each in (reference, model):
        refuse_media(each, {"the text": np.asarray(tokens)})
    batch = check_batch(batch, windows)
    graphdefs, states = zip(nnx.split(reference), nnx.split(model), strict=True)
    diverge = functools.partial(_diverge, graphdefs, states)
    with show_steps("comparing", len(windows.tokens), visible=progress) as advance:
        divergences, agreement = windows.map(diverge, batch, advance)
    check_finite(divergences, windows, "divergences")
    mask = windows.mask()
    chosen = divergences[mask]
    return Divergence(
        kl_divergence=float(chosen.mean(dtype=np.float64)),
        top1_agreement=float(agreement[mask].mean()),
        tokens=chosen.size,
    )


@functools.partial(jax.jit, static_argnums=0)
def _diverge(
    graphdefs: tuple[nnx.GraphDef, nnx.GraphDef],
    states: tuple[nnx.State, nnx.State],
    tokens: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """KL divergences float32 [B, S - 1], and bool [B, S - 1]: whether the most likely agree."""
    trace_counts["divergence"] += 1
    reference, model = (
        nnx.merge(graphdef, state)(tokens)[:, :-1].astype(jnp.float32)
        for graphdef, state in zip(graphdefs, states, strict=True)
    )
    expected = jax.nn.log_softmax(reference, axis=-1)
    ratios = expected - jax.nn.log_softmax(model, axis=-1)
    # 0 log 0 is 0, also where the other model's logarithm is -inf as well
    terms = jnp.where(expected == -jnp.inf, 0.0, jnp.exp(expected) * ratios)
    agreement = jnp.argmax(reference, axis=-1) == jnp.argmax(model, axis=-1)
    # rounding can leave a sum just below 0
    return jnp.maximum(terms.sum(axis=-1), 0.0), agreement


def open_plans(
    names: Sequence[str | os.PathLike[str]], text: str, *, follow_links: bool = False
) -> list[Plan]:
    """Plan the checkpoints, and check that all have the first one's tokenizer and vocabulary.

    Args:
      names: folders, or names on the Hugging Face hub.
      text: the text to compare them on; all must tokenize it alike.
      follow_links: as in `load_checkpoint`.

    Raises:
      CheckpointError: listing the faults of a checkpoint.
      InputError: listing the checkpoints with another tokenizer or vocabulary, and where they
        differ; or if there are fewer than two.

    Example:
      ```python
      from jaxwna16.comparison import open_plans

      text = "It was a dark and stormy night. " * 8
      plans = open_plans(["path/to/floats", "path/to/checkpoint"], text)
      print([plan.folder for plan in plans])
      ```
    """
    if len(names) < 2:
        raise InputError(f"a comparison takes at least two checkpoints, got {len(names)}")
    plans = [open_plan(resolve_folder(name), follow_links=follow_links) for name in names]
    tokenizers = [
        Tokenizer.from_folder(plan.folder, follow_links=plan.follow_links) for plan in plans
    ]
    faults = [
        f"{plan.folder}: {fault}"
        for plan, tokenizer in zip(plans[1:], tokenizers[1:], strict=True)
        if (fault := _tell_apart(plans[0], plan, (tokenizers[0], tokenizer), text))
    ]
    if faults:
        raise InputError(
            f"only checkpoints with the vocabulary of {plans[0].folder} can be compared with it",
            faults,
        )
    return plans


def compare_checkpoints(
    plans: Sequence[Plan],
    tokens: Sequence[int],
    *,
    dtype: Any = None,
    backend: str | None = None,
    window: int = 512,
    stride: int | None = None,
    max_windows: int | None = None,
    batch: int = 1,
    progress: bool | None = False,
) -> Iterator[Compared]:
    """Load and measure one checkpoint after the other; the others are compared with the first.

    Args:
      plans: from `open_plans`.
      tokens: the ids of the text.
      dtype, backend: as in `load_model`.
      window, stride, max_windows, batch, progress: as in `measure_perplexity`.

    Raises:
      CheckpointError, ModelError: as `load_model` and `measure_perplexity`.

    Example:
      ```python
      from jaxwna16.comparison import compare_checkpoints, open_plans

      text = "It was a dark and stormy night. " * 8
      plans = open_plans(["path/to/floats", "path/to/checkpoint"], text)
      tokens = jaxwna16.Tokenizer.from_folder("path/to/floats").encode(text)
      for row in compare_checkpoints(plans, tokens, window=16, max_windows=4):
          print(row.name, row.scheme, row.perplexity, row.kl_divergence)
      ```
    """
    windows: dict[str, Any] = {
        "window": window,
        "stride": stride,
        "max_windows": max_windows,
        "batch": batch,
        "progress": progress,
    }
    names = _name_folders(plans)
    reference: nnx.Module | None = None
    for name, plan in zip(names, plans, strict=True):
        start = time.perf_counter()
        model = load_model(
            plan.folder,
            dtype=dtype,
            backend=backend,
            progress=progress,
            follow_links=plan.follow_links,
        )
        load_seconds = time.perf_counter() - start
        found = measure_perplexity(model, tokens, **windows)
        distance = Divergence(0.0, 1.0, found.tokens)
        if reference is None:
            reference = model
        else:
            distance = measure_divergence(reference, model, tokens, **windows)
        yield Compared(
            name=name,
            folder=str(plan.folder),
            scheme=describe_scheme(plan),
            bytes=plan.nbytes,
            dtype=jnp.dtype(model.dtype).name,
            load_seconds=load_seconds,
            perplexity=found.perplexity,
            nll=found.nll,
            kl_divergence=distance.kl_divergence,
            top1_agreement=distance.top1_agreement,
            tokens_per_second=found.tokens_per_second,
        )
        del model  # before the next one is loaded


def describe_scheme(plan: Plan) -> str:
    """What the linear weights are: "W4 asymmetric g32", "W8 symmetric channel" or "float32"."""
    kinds = {
        (m.encoding.bits, m.spec.symmetric, m.spec.groups == 1, m.group_size)
        for m in plan.quantized.values()
    }
    if kinds:
        return ", ".join(sorted({_word_scheme(*kind) for kind in kinds}))
    largest = max(plan.plain.values(), key=lambda tensor: tensor.nbytes)
    return np.dtype(largest.dtype).name


def _word_scheme(bits: int, symmetric: bool, channel: bool, group_size: int) -> str:
    symmetry = "symmetric" if symmetric else "asymmetric"
    return f"W{bits} {symmetry} {'channel' if channel else f'g{group_size}'}"


def _tell_apart(first: Plan, plan: Plan, tokenizers: tuple[Tokenizer, Tokenizer], text: str) -> str:
    """Why two checkpoints cannot be compared, or ""."""
    sizes = [_find_vocabulary_size(p) for p in (first, plan)]
    if sizes[0] != sizes[1]:
        return f"its model has a vocabulary of {sizes[1]}, not {sizes[0]} (`vocab_size`)"
    ours, theirs = ({i: t for t, i in x.backend.get_vocab().items()} for x in tokenizers)
    for token in sorted(ours.keys() | theirs.keys()):
        if ours.get(token) != theirs.get(token):
            return (
                f"its tokenizer is another one: token {token} is {theirs.get(token)!r}, "
                f"not {ours.get(token)!r}"
            )
    encoded = [tokenizer.encode(text) for tokenizer in tokenizers]
    return "" if encoded[0] == encoded[1] else "its tokenizer cuts the text into other tokens"


def _find_vocabulary_size(plan: Plan) -> Any:
    parts = (*find_subconfigs(plan.config).values(), plan.config)
    return next((part["vocab_size"] for part in parts if "vocab_size" in part), None)


def _name_folders(plans: Sequence[Plan]) -> list[str]:
    names = [plan.folder.resolve().name for plan in plans]
    return [
        name if names.count(name) == 1 else str(plan.folder)
        for name, plan in zip(names, plans, strict=True)
    ]
