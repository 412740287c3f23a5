"""Compare a family with transformers, while it is being added: the first command to run.

    python -m tests.jaxwna16.models.compare_family olmo2 [VARIANT]

Writes a small random checkpoint of the family's row in `family_rows`, quantized by
compressed-tensors, and prints how far our model of it is from transformers' of the same weights:
the stream behind each layer, logits at once, in pieces and token by token, chosen experts, and
greedy tokens. Without a definition it prints what transformers' model consists of. The exit code is
1 if anything differs.
"""

from __future__ import annotations

import argparse
import re
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import jax.numpy as jnp
import numpy as np
import torch
import transformers
from rich.console import Console
from rich.table import Table

import jaxwna16
from jaxwna16.errors import ModelError, Wna16Error
from jaxwna16.generation.tokens import generate_tokens
from jaxwna16.models.causal_lm import CausalLM
from jaxwna16.models.families import MODEL_TYPES, find_family
from jaxwna16.models.parts import decoder
from tests.jaxwna16.models.family_rows import MODELS, ROWS, name_model
from tests.jaxwna16.models.hf_checkpoints import load_reference, write_row
from tests.jaxwna16.models.hf_models import (
    choose_experts,
    generate_reference,
    make_reference,
    random_tokens,
    record_routers,
    reference_logits,
    relative_error,
    run_logits,
    run_padded,
    run_pieces,
)

CLOSE = 1e-4
"""As in `test_families`."""
_ROW = """Add a row to tests/jaxwna16/models/family_rows/ first:

    "{model_type}": Row(variants={{"": {{}}}}, group_size=32, bfloat16={{}}),
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("model_type")
    parser.add_argument("variant", nargs="?", default="", help="of its row; the first if absent")
    args = parser.parse_args()
    console = Console()
    if args.model_type not in ROWS:
        console.print(_ROW.format(model_type=args.model_type), markup=False)
        return 1
    first = next(iter(ROWS[args.model_type].variants))
    name = name_model(args.model_type, args.variant or first)
    if name not in MODELS:
        console.print(f"variants: {', '.join(ROWS[args.model_type].variants)}", markup=False)
        return 1
    reference = make_reference(name)
    if args.model_type not in MODEL_TYPES:
        describe_reference(reference, console)
        return 1
    with tempfile.TemporaryDirectory() as folder:
        folders = write_row(reference, ROWS[args.model_type], Path(folder))
        try:
            model = jaxwna16.load_model(folders.packed, dtype="float32")
        except Wna16Error as error:
            console.print(str(error), markup=False)
            return 1
        return compare(model, load_reference(folders), ROWS[args.model_type].length, console)


def describe_reference(reference, console: Console) -> None:
    """What a definition must have a place for: the tensors, those of layers once."""
    try:
        find_family(reference.config.to_dict())
    except ModelError as error:
        console.print(*error.reasons[1:], sep="\n", markup=False)
    table = Table("tensors", "shape", "count")
    found = Counter(
        (re.sub(r"\.\d+\.", ".N.", name), tuple(tensor.shape))
        for name, tensor in reference.named_parameters()
    )
    for (name, shape), count in found.items():
        table.add_row(name, " x ".join(map(str, shape)), str(count))
    console.print(table)
    console.print("its layers:", type(reference).__module__, markup=False)


def compare(model: CausalLM, reference, length: int, console: Console) -> int:
    """Print a table of differences; 1 if one is too large."""
    table, faults = Table("compared", "difference", "allowed"), 0
    for what, found, allowed in measure(model, reference, length):
        wrong = not found <= allowed
        faults += wrong
        table.add_row(what, f"{found:.1e}", f"{allowed:.0e}", style="red" if wrong else "")
    console.print(table)
    console.print(f"{faults} differ" if faults else "all agree")
    return int(faults > 0)


def measure(model: CausalLM, reference, length: int) -> Iterator[tuple[str, float, float]]:
    """What is compared, how far it is off, and how far it may be."""
    tokens = random_tokens(3, length)
    expected = reference_logits(reference, tokens)
    yield from measure_layers(model, reference, tokens)
    yield "logits at once", relative_error(model(jnp.asarray(tokens)), expected), CLOSE
    piece = length // 3
    lengths = np.array([length, piece + 3, 0])
    logits = run_padded(model, tokens, lengths, piece)
    rows = [relative_error(logits[:1], expected[:1])]
    short = reference_logits(reference, tokens[1:2, : piece + 3])
    rows.append(relative_error(logits[1:2, : piece + 3], short))
    yield f"logits in pieces of {piece}, with padding", max(rows), CLOSE
    stream = run_pieces(model, tokens, [piece, *[1] * (length - piece)])
    yield "logits token by token", relative_error(run_logits(model, stream), expected), CLOSE
    yield from measure_choices(model, reference, tokens)
    prompt, new = tokens[:1, :piece], length - piece
    ours = generate_tokens(model, prompt.tolist(), max_new_tokens=new).tokens[0]
    theirs = generate_reference(reference, prompt, length)[0, piece:]
    yield f"greedy tokens that differ, of {new}", float((theirs != ours).sum()), 0


def measure_layers(
    model: CausalLM, reference, tokens: np.ndarray
) -> Iterator[tuple[str, float, float]]:
    """The stream behind the embedding and behind each layer but the last, which is normalised."""
    ours: list[np.ndarray] = []

    def record(layer, stream, *arguments):
        ours.append(np.asarray(stream.x))
        return layer(stream, *arguments)

    with torch.no_grad():
        text = getattr(reference.model, "language_model", reference.model)
        theirs = text(torch.from_numpy(tokens).long(), output_hidden_states=True).hidden_states
    with mock.patch.object(decoder, "run_layer", record):
        model(jnp.asarray(tokens))
    for i, (mine, wanted) in enumerate(zip(ours, theirs, strict=False)):
        what = f"stream behind layer {i - 1}" if i else "embedding"
        yield what, relative_error(mine, wanted.float().numpy()), CLOSE


def measure_choices(
    model: CausalLM, reference, tokens: np.ndarray
) -> Iterator[tuple[str, float, float]]:
    """Experts chosen otherwise, of what each router of transformers saw."""
    if model.config.moe is None or hasattr(reference.model, "language_model"):
        return
    for layer, routed in record_routers(reference, tokens).items():
        ids, weights = choose_experts(model, layer, routed.hidden)
        yield f"other experts in layer {layer}", float((ids != routed.ids).sum()), 0
        yield f"weights of experts in layer {layer}", relative_error(weights, routed.weights), CLOSE


if __name__ == "__main__":
    transformers.utils.logging.set_verbosity_error()
    sys.exit(main())
