"""Our side: a folder that a writer wrote loads, passes `verify --oracle`, and has its logits."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import re
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from safetensors import safe_open

import jaxwna16
from jaxwna16.cli.main import main
from jaxwna16.errors import Wna16Error
from tests.jaxwna16.models.hf_models import forward, relative_error
from tests.writers.orders import name_logits

CLOSE = 1e-4
"""float32 sums in another order; a wrong feature, group, position or norm gives more than 0.01."""
_ROLES = re.compile(r"\.(weight_packed|qweight)$")
_SETTINGS = ("quant_method", "format", "packing_format", "checkpoint_format", "version")


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What became of one folder.

    Attributes:
      writer_error: what the writer failed with; then there is nothing else.
      our_error: what is wrong on our side; "" if nothing is.
      modules: how many equal compressed-tensors bit for bit.
      difference: of the logits, over the largest.
      names: of packed weights, with N for every number.
      settings: what config.json says about the format.
    """

    writer_error: str = ""
    our_error: str = ""
    modules: int = 0
    difference: float = float("nan")
    names: frozenset[str] = frozenset()
    settings: str = ""


def check(folder: Path, tokens: Path) -> Outcome:
    """Verify and load a folder, and compare the logits of these tokens."""
    config = json.loads((folder / "config.json").read_text("utf-8"))
    outcome = Outcome(names=list_names(folder), settings=describe(config["quantization_config"]))
    verified = verify(folder)
    oracle = verified.get("oracle") or {}
    outcome = dataclasses.replace(outcome, modules=oracle.get("equal", 0))
    problems = []
    if "error" in verified:
        fault = next(iter(verified["error"]["faults"]), {"tensor": "", "what": ""})
        problems.append(
            f"verify: {verified['error']['message']} {fault['tensor']}: {fault['what']}"
        )
    elif not oracle["equal"] or oracle["different"] or oracle["not_comparable"]:
        problems.append(f"verify --oracle: {oracle}")
    elif not verified["model"]["checked"]:
        problems.append(f"verify: model not checked: {verified['model']['reason']}")
    try:
        model = jaxwna16.load_model(folder, dtype="float32")
    except Exception as error:  # of any kind: the other folders are to be checked too
        kind = "" if isinstance(error, Wna16Error) else f"{type(error).__name__}: "
        problems.append(f"load_model: {kind}{' '.join(str(error).split())}")
        return dataclasses.replace(outcome, our_error="; ".join(problems))
    ours = forward(model, jnp.asarray(np.load(tokens)))
    difference = relative_error(ours, np.load(name_logits(folder)))
    if not difference < CLOSE:
        problems.append(f"logits differ by {difference:.1e} of the largest")
    return dataclasses.replace(outcome, difference=difference, our_error="; ".join(problems))


def verify(folder: Path) -> dict[str, Any]:
    """The report of `jaxwna16 verify --oracle --json`."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        main(["verify", str(folder), "--oracle", "--json"])
    return json.loads(printed.getvalue())


def list_names(folder: Path) -> frozenset[str]:
    """Names of packed weights, N for every number: "model.layers.N.mlp.experts.N.gate_proj"."""
    names = set()
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "numpy") as file:
            names |= {_ROLES.sub("", name) for name in file.keys() if _ROLES.search(name)}
    return frozenset(re.sub(r"\d+(?=\.)", "N", name) for name in names)


def describe(quantization: dict[str, Any]) -> str:
    """Method, format and version in one line."""
    return ", ".join(f"{key} {quantization[key]}" for key in _SETTINGS if key in quantization)
