"""A head in files of models whose head is the embedding.

Old checkpoints have a copy of the embedding under `lm_head.weight`; leaving it out changes nothing.
What a head that differs means is not agreed on: transformers 5 computes with it, vLLM with the
embedding.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from jaxwna16.models.names import rename
from loaders.errors import CheckpointError, Fault
from loaders.plan import Plan
from loaders.safetensors_file import read_tensors

_HEAD, _EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


def drop_tied_head(plan: Plan, names: Mapping[str, str]) -> Plan:
    """The plan, of a model with tied embeddings, without the head.

    Both tensors are read if there is one; nothing is if there is none.

    Args:
      plan: of the checkpoint.
      names: how the files' names differ from the model's, see `rename`.

    Raises:
      CheckpointError: if the head is no copy of the embedding, or a file ends early.
    """
    found = {rename(name, names): info for name, info in plan.plain.items()}
    head, embedding = found.get(_HEAD), found.get(_EMBEDDING)
    if head is None:
        return plan
    if embedding is not None and (head.dtype, head.shape) == (embedding.dtype, embedding.shape):
        first, second = read_tensors([head, embedding])
        if first.tobytes() == second.tobytes():
            plain = {name: info for name, info in plan.plain.items() if info is not head}
            return dataclasses.replace(plan, plain=plain)
    what = "differs from the embedding, though config.json ties them"
    way_out = "set `tie_word_embeddings` to false to use the head, or remove the tensor"
    raise CheckpointError(plan.folder, [Fault(what, head.file.name, head.name, way_out)])
