"""Of a model that is not supported: the nearest family, and what it asks for beyond that family.

Each family reads the `config.json` as if it were its own. The nearest is the one that refuses, and
leaves unread, the fewest keys. So nothing here has to be told when a family or a part is added.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from jaxwna16.errors import ModelError
from jaxwna16.models.config.asked_keys import note_keys
from loaders.errors import list_first

_NEEDED = ("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
_TEXT = ("thinker_config", "text_config", "llm_config", "language_config")
_LISTED = 12

_SILENT = re.compile(
    r"architectures|auto_map|.*_token_id|.*_token_index|quantization_config|transformers_version|"
    r"dtype|torch_dtype|use_cache|initializer_range|.*dropout|.*_pdrop|output_\w+|return_dict|"
    r"_\w+|name_or_path|attn_implementation|\w*aux_loss\w*|router_jitter_noise|problem_type|"
    r"pretraining_tp|id2label|label2id|is_encoder_decoder|is_decoder|chunk_size_feed_forward|"
    r"use_mrope|.*_init|seq_length|model_type"
)
"""Keys that change nothing that a trained model computes."""

MEANINGS = {
    r"kv_lora_rank|q_lora_rank|qk_nope_head_dim|qk_rope_head_dim|v_head_dim": (
        "multi-head latent attention (MLA)"
    ),
    r"index_(topk|n_heads|head_dim)": "an indexer that chooses which tokens attention sees",
    r"(mamba|ssm|ssd)_\w+|use_mamba\w*|mamba2?_?\w*|hybrid_override_pattern": (
        "state-space layers (Mamba)"
    ),
    r"conv_L_cache|block_(multiple_of|\w*ff\w*_dim\w*)|full_attn_idxs": (
        "short convolutions between layers of attention"
    ),
    r"linear_(num_\w+_heads|\w+_head_dim|conv_kernel_dim|attn_config)|full_attention_interval": (
        "layers of linear attention"
    ),
    r"(hidden_size|vocab_size)_per_layer_input|laurel_rank|altup_\w+": "embeddings of each layer",
    r"num_kv_shared_layers|num_self_decoder_layers": "layers that share keys and values",
    r"attention_k_eq_v|global_head_dim|num_global_key_value_heads": (
        "layers with heads of another size"
    ),
    r"(attn|final)_logit_softcapping": "softcaps",
    r"query_pre_attn_scalar|attention_multiplier|residual_multiplier|embedding_multiplier|"
    r"logits_scaling|logit_scale|scale_emb|scale_depth|dim_model_base": "multipliers",
    r"no_rope_layers?\w*|nope_layer_interval|position_embedding_type|alibi": (
        "layers without rotary positions"
    ),
    r"layer_norm_eps(ilon)?|layernorm_eps\w*|norm_eps|layer_norm_bias|norm_type": (
        "norms of another kind, or another key for their eps"
    ),
    r"parallel_attn|use_parallel_residual|parallel_block": "attention and MLP side by side",
    r"rotary_pct|rotary_dim|rotary_emb_base|partial_rotary_factor|rope_interleave\w*": (
        "another rotation of heads"
    ),
    r"attention_chunk_size|attn_temperature_tuning|attn_scale|floor_scale": (
        "attention in chunks, or scaled by position"
    ),
    r"sliding_window\w*|layer_types|use_sliding_window|max_window_layers": "sliding windows",
    r"n(um)?_(\w+_)?experts\w*|moe_\w+|\w+_moe|n_(shared|routed)_experts|topk_\w+|routed_scaling_factor|"
    r"norm_topk_prob|scoring_func|first_k_dense_replace|decoder_sparse_step|mlp_only_layers": (
        "experts"
    ),
    r"\w*(vision|visual|image|video|audio|vit)\w*|\w*projector\w*": "a tower for images or sound",
    r"num_nextn_predict_layers|mtp_\w+|num_mtp_\w+": "layers that predict several tokens",
}
"""Keys, as regular expressions -> the part of a model that they are about."""

LACKING = {
    "gpt_oss": "its experts are MXFP4, and its attention has sinks",
    "kimi_k3": "its experts are MXFP4 (mxfp4-pack-quantized)",
    "deepseek_v4": "its experts are FP4, and the rest FP8",
}
"""Models that are not WNA16 as published, and why."""

Read = Callable[[Mapping[str, Any]], Any]


@dataclasses.dataclass(frozen=True)
class Nearness:
    """How a family reads the `config.json` of another.

    Attributes:
      model_type: of the family.
      refused: the reasons why it refuses it.
      unread: keys that it does not look at, though they have a value.
      absent: how many keys it looks for in vain.
    """

    model_type: str
    refused: tuple[str, ...]
    unread: tuple[str, ...]
    absent: int


def describe_unsupported(config: Mapping[str, Any], reads: Mapping[str, Read]) -> list[str]:
    """What is to be said of a `model_type` that no family has, a line each.

    Args:
      config: config.json.
      reads: `model_type` of a text model -> what reads its config.json.
    """
    model_type = config.get("model_type")
    if isinstance(model_type, str) and model_type in LACKING:
        return [f"{model_type} is not WNA16 as published: {LACKING[model_type]}"]
    section, text = _find_text(config)
    inner, key = text.get("model_type"), f"{section}model_type"
    if section and isinstance(inner, str) and inner in reads:
        return [f"{key}: {inner} is supported, but not as a part of {model_type!r}"]
    found = find_nearest(text, reads)
    if found is None:
        return []
    beyond = [f"{section}{reason}" for reason in found.refused] + _word_parts(found.unread)
    if not beyond:
        beyond = ["its config.json asks for nothing more, so that the difference is in its code"]
    near = f"the nearest supported model_type is {found.model_type}; beyond it this one asks for:"
    return [near, *beyond, "docs/models.md shows how a family is added"]


def find_nearest(text: Mapping[str, Any], reads: Mapping[str, Read]) -> Nearness | None:
    """The family that comes nearest; None if this is no text model.

    Args:
      text: the configuration of a text model.
      reads: as in `describe_unsupported`.
    """
    if not all(isinstance(text.get(key), int) for key in _NEEDED):
        return None
    wanted = str(text.get("model_type"))
    found = [_measure(text, model_type, read) for model_type, read in reads.items()]
    return min(
        found,
        key=lambda near: (
            len(near.refused) + len(near.unread),
            near.absent,
            -difflib.SequenceMatcher(None, wanted, near.model_type).ratio(),
        ),
    )


def _measure(text: Mapping[str, Any], model_type: str, read: Read) -> Nearness:
    refused: tuple[str, ...] = ()
    with note_keys() as asked:
        try:
            read({**text, "model_type": model_type})
        except ModelError as error:
            refused = tuple(error.reasons)
    unread = [key for key, value in text.items() if key not in asked and _asks(key, value)]
    return Nearness(model_type, refused, tuple(unread), len(asked - text.keys()))


def _asks(key: str, value: Any) -> bool:
    """Whether a key may change what the model computes."""
    return value not in (None, False, [], {}, 0) and not _SILENT.fullmatch(key)


def _find_text(config: Mapping[str, Any]) -> tuple[str, Mapping[str, Any]]:
    """Where the text model's section is, "text_config.", and that section."""
    section = ""
    while True:
        inner = next((key for key in _TEXT if isinstance(config.get(key), Mapping)), None)
        if inner is None:
            return section, config
        section, config = f"{section}{inner}.", config[inner]


def _word_parts(keys: Iterable[str]) -> list[str]:
    """A line a part, "softcaps: attn_logit_softcapping"."""
    parts: dict[str, list[str]] = {}
    for key in keys:
        meaning = next((m for p, m in MEANINGS.items() if re.fullmatch(p, key)), None)
        parts.setdefault(meaning or "what these keys mean", []).append(key)
    return [f"{part}: {', '.join(list_first(keys, _LISTED))}" for part, keys in parts.items()]
