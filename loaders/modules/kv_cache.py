"""Scales of a quantized key-value cache, which stand among the weights of some checkpoints.

The cache here holds floats, so nothing would read them. Their names by tool:

    self_attn.k_scale, .v_scale, .q_scale, .k_zero_point    compressed-tensors from 0.6 on
    k_proj.output_scale, v_proj.output_scale                the same before
    k_proj.k_scale, v_proj.v_scale                          ModelOpt
    attn.k_scale, .kv_scale, .prob_scale                    vLLM, also for the files of others
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping

from loaders.files.safetensors_file import TensorInfo

_KINDS = ("scale", "global_scale", "zero_point")
_KIND = f"(?:{'|'.join(_KINDS)})"
# what is quick to tell
_ENDS = (
    *(f"{of}_{kind}" for of in ("q", "k", "v", "p", "prob", "output") for kind in _KINDS),
    *("kv_cache_scale", "kv_cache_offset"),
)
_SCALE = re.compile(
    rf"(?:.*\.)?(?:\w*(?:attn|attention)(?:\.impl)?\.(?:[qkvp]|kv|prob|prob_output)_{_KIND}"
    rf"|(?:[qkv]|kv|qkv)_proj\.(?:(?:[qkv]|kv|output)_{_KIND}|kv_cache_(?:scale|offset)))"
)


def split_cache_scales(
    tensors: Mapping[str, TensorInfo],
) -> tuple[dict[str, TensorInfo], list[str]]:
    """The tensors of a quantized checkpoint without these scales; and the names of the scales.

    An `output_scale` could also be one of quantized activations, which the config then says.
    """
    scales = [name for name in tensors if name.endswith(_ENDS) and _SCALE.fullmatch(name)]
    left_out = set(scales)
    return {name: info for name, info in tensors.items() if name not in left_out}, scales


def describe_cache_scales(names: Collection[str]) -> list[str]:
    """A warning that they were left out, if there are any."""
    if not names:
        return []
    more = f" and {len(names) - 1} more tensors" if len(names) > 1 else ""
    return [
        f"{next(iter(names))}{more} not read: scales of a quantized key-value cache, and the cache "
        "here is not quantized"
    ]
