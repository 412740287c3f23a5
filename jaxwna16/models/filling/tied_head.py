"""A head in the files of a model whose head is the embedding.

Old checkpoints have a copy of the embedding under `lm_head.weight`, and where llm-compressor packed
the embedding it could be written a second time as a packed head (vllm-project/llm-compressor#2798);
leaving a copy out changes nothing. Tools disagree about a head that differs: transformers 5
computes with it, vLLM with the embedding.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, TypeVar

import numpy as np

from jaxwna16.models.config.language_config import LanguageConfig
from jaxwna16.models.filling.renaming import rename
from loaders.converted.converted import read_weights
from loaders.errors import CheckpointError, Fault
from loaders.files.safetensors_file import TensorInfo, read_tensor
from loaders.modules.modules import QuantizedModule
from loaders.plan import Plan
from pallas_kernels.format.dequantize import dequantize

Config = TypeVar("Config", bound=LanguageConfig)

_HEAD, _EMBEDDING = "lm_head", "model.embed_tokens"


def settle_tie(config: Config, plan: Plan, names: Mapping[str, str]) -> Config:
    """The configuration, in which the head is the embedding only if the files have none.

    Args:
      config: of the model. Of one whose config.json settles it, nothing changes.
      plan, names: as in `drop_tied_head`.
    """
    if not config.is_tie_open:
        return config
    has_head = any(rename(path, names) == _HEAD for path in _list_weights(plan))
    return dataclasses.replace(config, tie_word_embeddings=not has_head, is_tie_open=False)


def drop_tied_head(plan: Plan, names: Mapping[str, str]) -> Plan:
    """The plan, of a model with tied embeddings, without the head.

    If the files have a head, it and the embedding are read and compared; otherwise nothing is read.
    A copy has the same floats, bit for bit. A packed one is dequantized for that.

    Args:
      plan: of the checkpoint.
      names: how the files' names differ from the model's, see `rename`.

    Raises:
      CheckpointError: if the head is no copy of the embedding, or a file ends early.
    """
    parts = {rename(path, names): part for path, part in _list_weights(plan).items()}
    head, embedding = parts.get(_HEAD), parts.get(_EMBEDDING)
    if head is None:
        return plan
    if embedding is not None and _are_same(head, embedding):
        return dataclasses.replace(
            plan, quantized=_leave_out(plan.quantized, head), plain=_leave_out(plan.plain, head)
        )
    what = "differs from the embedding, though config.json ties them"
    way_out = "set `tie_word_embeddings` to false to use the head, or remove the tensor"
    info = head if isinstance(head, TensorInfo) else head.tensors["weight_packed"]
    raise CheckpointError(plan.folder, [Fault(what, info.file.name, info.name, way_out)])


def _list_weights(plan: Plan) -> dict[str, QuantizedModule | TensorInfo]:
    """Path of each module with a weight, packed or not -> that."""
    plain = {
        name.removesuffix(".weight"): info
        for name, info in plan.plain.items()
        if name.endswith(".weight")
    }
    return plain | dict(plan.quantized)


def _leave_out(parts: Mapping[str, Any], head: QuantizedModule | TensorInfo) -> dict[str, Any]:
    return {name: part for name, part in parts.items() if part is not head}


def _are_same(head: QuantizedModule | TensorInfo, embedding: QuantizedModule | TensorInfo) -> bool:
    if _read_shape(head) != _read_shape(embedding):
        return False
    first, second = _read_floats(head), _read_floats(embedding)
    return first is not None and second is not None and _have_same_bytes(first, second)


def _have_same_bytes(first: np.ndarray, second: np.ndarray) -> bool:
    return first.dtype == second.dtype and first.tobytes() == second.tobytes()


def _read_shape(part: QuantizedModule | TensorInfo) -> tuple[int, ...]:
    if isinstance(part, TensorInfo):
        return part.shape
    return part.spec.out_features, part.spec.in_features


def _read_floats(part: QuantizedModule | TensorInfo) -> np.ndarray | None:
    """The weight; None where there is a bias, which a copy of an embedding cannot have."""
    if isinstance(part, TensorInfo):
        return read_tensor(part)
    weights = read_weights(part)
    bias = weights.pop("bias", None)
    if bias is not None and np.any(np.asarray(bias) != 0):
        return None
    return np.asarray(dequantize(weights, part.spec))
