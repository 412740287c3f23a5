"""`load_checkpoint`: a checkpoint folder or hub name -> params, specs and config."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from jaxwna16.dtypes import read_dtype
from jaxwna16.errors import InputError
from jaxwna16.extras import import_extra
from jaxwna16.programs import refuse_fork
from jaxwna16.progress import show_bytes
from loaders.converted.converted import ConvertedPlan, load_leaves
from loaders.open import open_plan
from loaders.plan import Plan
from loaders.stream import Progress, load_params
from pallas_kernels.format.spec import QuantSpec


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A loaded checkpoint.

    Attributes:
      params: nested dict under the checkpoint's module paths. A quantized module is a leaf dict
        (packed, scale, zero_point, bias) in the tile layout, any other tensor stands under its own
        name: `params["model"]["norm"]["weight"]`. The experts of a layer are two stacks under their
        path, "w13" (rows of gate, then of up) and "w2", whatever they are called in the files.
      specs: module path -> `QuantSpec` of each quantized module; of one expert, for a stack.
      config: config.json.
      folder: where it was read from.
      warnings: remarks of the loader, one sentence each.

    Example:
      ```python
      checkpoint = jaxwna16.load_checkpoint("path/to/checkpoint")
      print(checkpoint.config["model_type"], len(checkpoint.specs), "packed weights")
      norm = checkpoint.find("model.norm.weight")
      for warning in checkpoint.warnings:
          print(warning)
      ```
    """

    params: dict[str, Any]
    specs: Mapping[str, QuantSpec]
    config: Mapping[str, Any]
    folder: Path
    warnings: tuple[str, ...] = ()

    def find(self, path: str) -> Any:
        """The part of `params` at a path: "model.layers.0", or "model.norm.weight".

        A packed linear layer is `QuantDense.from_weights(c.find(path), c.specs[path])`.

        Raises:
          InputError: if there is nothing at the path; it says what is there instead.
        """
        node: Any = self.params
        names = path.split(".")
        for i, name in enumerate(names):
            if not isinstance(node, Mapping) or name not in node:
                above = ".".join(names[:i])
                there = f"has {', '.join(node)}" if isinstance(node, Mapping) else "is an array"
                reason = f"{above or 'the checkpoint'} {there}"
                raise InputError(f"{self.folder}: nothing at {path}", [reason])
            node = node[name]
        return node


def load_checkpoint(
    path_or_hub_id: str | os.PathLike[str],
    *,
    dtype: Any = None,
    progress: bool | Progress | None = None,
    follow_links: bool = False,
) -> Checkpoint:
    """Load a checkpoint: compressed-tensors `pack-quantized`, AutoAWQ, GPTQ, or not quantized.

    A copy made by `convert_checkpoint` gives the same arrays, and loads faster.

    Args:
      path_or_hub_id: a folder, or the name of a repository on the Hugging Face hub (downloaded with
        `huggingface_hub`, which the extra `text` brings).
      dtype: float dtype for the tensors that are not quantized; None leaves them as they are.
        Scales keep the dtype of the file, since it decides how weights round.
      progress: True for a bar of bytes on stderr, False for none, None for a bar on a terminal
        only; or a function called as progress(bytes_done, bytes_total, name).
      follow_links: read files also where they are links that leave the folder, as in Hugging Face's
        older `local_dir` layout; without it they are refused.

    Returns:
      The arrays, on JAX's default device.

    Raises:
      CheckpointError: listing every fault of the files, the config and the modules.
      InputError: if there is no such folder and the name cannot be fetched, or `dtype` is not
        float32, bfloat16 or float16; or in a process that is a fork of one with a checkpoint.

    Example:
      ```python
      checkpoint = jaxwna16.load_checkpoint("path/to/checkpoint")
      path = "model.layers.0.mlp.up_proj"
      layer = jaxwna16.QuantDense.from_weights(checkpoint.find(path), checkpoint.specs[path])
      ```
    """
    dtype = read_dtype(dtype)
    plan = open_plan(resolve_folder(path_or_hub_id), follow_links=follow_links)
    return read_plan(plan, dtype=dtype, progress=progress)


def read_plan(
    plan: Plan,
    *,
    dtype: Any = None,
    kept: Collection[str] = (),
    progress: bool | Progress | None = None,
) -> Checkpoint:
    """Read everything a plan names; arguments and errors as `load_checkpoint`.

    Tensors named in `kept` stay as they are, whatever `dtype` is.
    """
    refuse_fork(loads=True)
    if callable(progress):
        params = _read(plan, dtype, kept, progress)
    else:
        with show_bytes(f"loading {plan.folder.name}", visible=progress) as report:
            params = _read(plan, dtype, kept, report)
    return Checkpoint(params, plan.specs, plan.config, plan.folder, plan.warnings)


def _read(plan: Plan, dtype: Any, kept: Collection[str], progress: Progress) -> dict[str, Any]:
    if isinstance(plan, ConvertedPlan):
        return load_leaves(plan, dtype=dtype, kept=kept, progress=progress)
    return load_params(plan, dtype=dtype, kept=kept, progress=progress)


def resolve_folder(path_or_hub_id: str | os.PathLike[str]) -> Path:
    """The local folder of a checkpoint; a hub name is downloaded into the hub's own cache first.

    Raises:
      InputError: if it is neither a folder nor a hub name that can be fetched.
    """
    path = Path(path_or_hub_id)
    name = os.fspath(path_or_hub_id)
    if not name:  # a variable that is not set; as a path it would be the working folder
        raise InputError("the checkpoint's name is empty: name a folder (. is this one)")
    if path.exists() or name.count("/") != 1 or name.startswith((".", "/", "~")):
        return path
    hub = import_extra("huggingface_hub", "text")
    try:
        patterns = ["*.json", "*.safetensors", "*.jinja", "*.txt", "*.model"]
        return Path(hub.snapshot_download(name, allow_patterns=patterns))
    except (OSError, ValueError) as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise InputError(f"{name}: no such folder, and the hub did not give it", [reason]) from None
