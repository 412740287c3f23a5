"""`load_model`: a checkpoint folder or hub name -> the language model in it."""

from __future__ import annotations

import os
from typing import Any

from jaxwna16.checkpoints.load import read_plan, resolve_folder
from jaxwna16.dtypes import read_dtype
from jaxwna16.generation.generation_config import describe_unapplied
from jaxwna16.models.causal_lm import CausalLM
from jaxwna16.models.filling.fit import fit_model
from loaders.open import open_plan


def load_model(
    path_or_hub_id: str | os.PathLike[str],
    *,
    dtype: Any = None,
    backend: str | None = None,
    progress: bool | None = None,
    follow_links: bool = False,
) -> CausalLM:
    """Load a language model of one of `families.MODEL_TYPES`, with packed weights or without.

    Other parts of a checkpoint (a vision tower, layers that predict several tokens at once) are
    left out by the rules in `jaxwna16.models.filling.skipped`. The model's `warnings` list them,
    and the settings of generation_config.json that `generate` does not apply.

    Args:
      path_or_hub_id: a checkpoint folder, or a name on the Hugging Face hub.
      dtype: dtype of activations, cache and of all that is not quantized; None is the dtype that
        config.json states, float32 where it states none.
      backend: of the quantized layers: None, "triton" or "xla" (see `quant_matmul`).
      progress: True, False, or None for a bar on a terminal only.
      follow_links: as in `load_checkpoint`.

    Returns:
      An NNX module: `model(tokens)` maps int32 [B, S] to float32 logits [B, S, V].

    Raises:
      CheckpointError: listing every fault of the checkpoint. A tied head that differs from the
        embedding is one, and so is a generation_config.json that is not a JSON object.
      ModelError: if the architecture is not supported, or listing every tensor that is missing,
        unexpected or of another shape.
      InputError: if `dtype` is not float32, bfloat16 or float16.
      BackendError: if there is no such backend, or it does not support this dtype.

    Example:
      ```python
      model = jaxwna16.load_model("path/to/checkpoint", dtype="float32")
      logits = model(jnp.asarray([[1, 2, 3]]))
      assert logits.shape == (1, 3, model.config.vocab_size)
      ```
    """
    dtype = read_dtype(dtype)
    opened = open_plan(resolve_folder(path_or_hub_id), follow_links=follow_links)
    fit = fit_model(opened, dtype=dtype, backend=backend)
    warnings = (*fit.warnings, *describe_unapplied(opened.folder, follow_links=follow_links))
    read = read_plan(fit.plan, dtype=fit.model.dtype, kept=fit.kept, progress=progress)
    model = fit.fill(read.params)
    model.folder, model.warnings = str(opened.folder), warnings
    model.follow_links = follow_links
    return model
