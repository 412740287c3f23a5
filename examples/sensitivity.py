"""Which weights suffer most from few bits? Quantize one part of a model at a time, and measure.

    python examples/sensitivity.py [FLOAT_CHECKPOINT] [--by kind|layer] [--bits 4] [--symmetric]

A part is a kind of linear layer (all q_proj, all down_proj …) or a layer of the decoder. Everything
else stays in floats, so what changes is that part's doing. For each part the table has

    MB           of the whole model, with the part packed
    perplexity   over windows of a text
    KL           mean over all tokens of sum_v p(v) log(p(v) / q(v)), p of the float model and q of
                 the quantized one: far less noisy than perplexity, which some errors even improve
    KL per GB    what a gigabyte saved there would cost

and last all of it, and all but the part where that is most: the first candidate to stay in floats.
The command that writes such a checkpoint is printed.

Quantized weights are expanded again and put into the float model, which gives the numbers that the
packed ones stand for. So every version is the same program, which is compiled once.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import re
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from fetch_smollm2 import fetch
from flax import nnx
from rich import box
from rich.console import Console
from rich.table import Table

import jaxwna16

TEXT = Path(__file__).parent / "data" / "persuasion.txt"


class Linear(NamedTuple):
    """What quantizing makes of a linear layer.

    Attributes:
      path: of the layer in the model.
      part: the part of the model that it belongs to, as it stands in names of modules.
      weight: [N, K], quantized and expanded again.
      saved: how many bytes smaller the packed weight is.
    """

    path: tuple
    part: str
    weight: jax.Array
    saved: int


def quantize_linears(
    model: nnx.Module, by: str, bits: int, group_size: int, symmetric: bool
) -> list[Linear]:
    """Quantize every linear layer of the decoder; the model itself stays as it is."""
    linears = []
    modules: list[tuple[Any, Any]] = list(nnx.iter_modules(model))
    if others := {"experts", "linear_attn"} & {path[-1] for path, _ in modules if path}:
        raise SystemExit(f"this example is for dense models with attention, not for {others}")
    for path, module in modules:
        if "layers" not in path or not str(path[-1]).endswith("_proj"):
            continue
        if isinstance(module, jaxwna16.QuantDense):
            raise SystemExit("the checkpoint is quantized already: give the float one")
        weight = module.weight[...]
        n, k = weight.shape
        spec = jaxwna16.QuantSpec(
            bits=bits,
            group_size=k if group_size == -1 else group_size,
            symmetric=symmetric,
            in_features=k,
            out_features=n,
        )
        packed = jaxwna16.quantize(weight, spec, scale_dtype=weight.dtype)
        rounded = jaxwna16.dequantize(packed, spec, weight.dtype)
        part = str(path[-1]) if by == "kind" else f"layers.{path[path.index('layers') + 1]}."
        saved = weight.nbytes - sum(leaf.nbytes for leaf in packed.values())
        linears.append(Linear(path, part, rounded, saved))
    return linears


@jax.jit
def compare(model: Any, version: Any, tokens: jax.Array) -> jax.Array:
    """Of int32 [B, S]: mean negative log-likelihood in `version`, and KL from `model` to it."""
    p, q = (jax.nn.log_softmax(m(tokens)[:, :-1], axis=-1) for m in (model, version))
    likelihoods = jnp.take_along_axis(q, tokens[:, 1:, None], axis=-1)
    return jnp.stack([-likelihoods.mean(), (jnp.exp(p) * (p - q)).sum(-1).mean()])


@dataclasses.dataclass(frozen=True)
class Row:
    """A version of the model: the figures of one row of the table."""

    name: str
    saved: int
    perplexity: float
    kl: float

    @property
    def price(self) -> float:
        """KL per GB saved."""
        return self.kl / self.saved * 1e9 if self.saved else 0.0


def measure(name: str, model: nnx.Module, linears: list[Linear], windows: np.ndarray) -> Row:
    """The row of the version in which these layers are quantized; windows are int32 [n, S]."""
    version = nnx.clone(model)  # other variables, the same arrays
    modules: dict[tuple, Any] = dict(nnx.iter_modules(version))
    for linear in linears:
        modules[linear.path].weight.set_value(linear.weight)
    scores = [compare(model, version, jnp.asarray(window[None])) for window in windows]
    loss, kl = np.asarray(scores, np.float64).mean(axis=0).tolist()
    return Row(name, sum(linear.saved for linear in linears), math.exp(loss), kl)


def measure_parts(
    model: nnx.Module, linears: list[Linear], windows: np.ndarray
) -> tuple[list[Row], str]:
    """All rows of the table, and the part where a byte saved costs most."""
    parts = {linear.part: [x for x in linears if x.part == linear.part] for linear in linears}
    rows = [measure(part, model, chosen, windows) for part, chosen in parts.items()]
    worst = max(rows, key=lambda row: row.price).name
    rest = [linear for linear in linears if linear.part != worst]
    rows.insert(0, measure("nothing", model, [], windows))
    rows.append(measure("all", model, linears, windows))
    rows.append(measure(f"all but {worst}", model, rest, windows))
    return rows, worst


def make_table(rows: list[Row], total: int) -> Table:
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("quantized")
    for column in ("MB", "perplexity", "KL", "KL per GB"):
        table.add_column(column, justify="right")
    for row in rows:
        size = f"{(total - row.saved) / 1e6:.1f}"
        table.add_row(row.name, size, f"{row.perplexity:.3f}", f"{row.kl:.4f}", f"{row.price:.3f}")
    return table


def main(arguments: list[str] | None = None) -> None:
    """Measure every part and print the table."""
    parser = argparse.ArgumentParser(description="Measure which weights suffer most from few bits.")
    parser.add_argument("checkpoint", nargs="?", type=Path, help="default: SmolLM2 in float32")
    parser.add_argument("--by", choices=("kind", "layer"), default="kind", help="what a part is")
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group-size", type=int, default=32, help="-1: a scale per channel")
    parser.add_argument("--symmetric", action="store_true")
    parser.add_argument("--text", type=Path, default=TEXT, help="default: a novel")
    parser.add_argument("--window", type=int, default=256, help="tokens a window")
    parser.add_argument("--windows", type=int, default=8)
    options = parser.parse_args(arguments)

    folder = options.checkpoint or fetch()
    model = jaxwna16.load_model(folder)
    text = options.text.read_text(encoding="utf-8")
    tokens = jaxwna16.Tokenizer.from_folder(folder).encode(text[len(text) // 2 :])
    count = options.window * options.windows
    windows = np.asarray(tokens[:count], np.int32).reshape(-1, options.window)
    linears = quantize_linears(
        model, options.by, options.bits, options.group_size, options.symmetric
    )
    rows, worst = measure_parts(model, linears, windows)
    total = sum(leaf.nbytes for leaf in jax.tree.leaves(nnx.state(model)))
    Console().print(make_table(rows, total))
    print(
        f"jaxwna16 quantize {folder} DST --bits {options.bits} --group-size {options.group_size}"
        f" --{'' if options.symmetric else 'a'}symmetric"
        f" --ignore 're:.*{re.escape(worst)}'"
    )


if __name__ == "__main__":
    main()
