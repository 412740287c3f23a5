"""The part of a `config.json` that families state in the same keys: sizes, rope, dtype, ends."""

from __future__ import annotations

from typing import Any

from jaxwna16.errors import ModelError
from jaxwna16.models.config.config_reader import ConfigReader
from jaxwna16.models.config.language_config import (
    MAX_LAYERS,
    SILU,
    Activations,
    read_activation,
    read_eos,
    read_saved_dtype,
    refuse_others,
)
from jaxwna16.models.config.rope_config import (
    PLAIN,
    RopeRule,
    read_rope,
    read_rotary_dim,
    read_stretched,
)


def read_stated(
    reader: ConfigReader,
    *,
    rms_norm_eps: float,
    rope_theta: float,
    states_kv_heads: bool = True,
    head_dim: int | None = None,
    partial_rotary_factor: float = 1.0,
    tied: bool = False,
    rotary_key: str | None = None,
    activations: Activations = SILU,
    rope: RopeRule = PLAIN,
) -> dict[str, Any]:
    """The fields of `LanguageConfig` but for those of experts and of layers that predict.

    Sizes must be stated, since defaults are those of one model. Numbers are what the family has
    where the key is absent.

    Args:
      states_kv_heads: whether `num_key_value_heads` must be there, too; otherwise there are as many
        as `num_attention_heads` where it is absent. Where it is null, there always are.
      head_dim: None is hidden_size / num_attention_heads.
      tied: `tie_word_embeddings` of the family.
      rotary_key: `key` of `read_rotary_dim`.
      activations: those that its MLPs may have.
      rope: how the family states rope, where not as the others.
    """
    refuse_others(reader)
    if not reader.given.get("is_causal", True):
        reader.refuse("is_causal", False, "only causal attention")
    sizes = _read_sizes(reader, states_kv_heads, head_dim)
    head_dim, positions = sizes["head_dim"], sizes["max_position_embeddings"]
    rotated = read_rotary_dim(reader, head_dim, partial_rotary_factor, rotary_key, rope)
    stretched = read_stretched(reader, positions, rope_theta, head_dim) if rope.stretches else None
    return sizes | {
        "model_type": reader.config["model_type"],
        "vocab_size": reader.count("vocab_size"),
        "intermediate_size": reader.count("intermediate_size"),
        "rotary_dim": rotated,
        "rms_norm_eps": reader.number("rms_norm_eps", rms_norm_eps),
        "tie_word_embeddings": reader.flag("tie_word_embeddings", tied),
        "activation": read_activation(reader, activations),
        "rope": stretched or read_rope(reader, positions, rope_theta, rope, rotated),
        "dtype": read_saved_dtype(reader),
        "eos_token_ids": read_eos(reader),
    }


def read_multipliers(reader: ConfigReader) -> dict[str, Any]:
    """The four multipliers of Granite, each 1 where it is absent, as fields of `LanguageConfig`."""
    return {
        "embedding_multiplier": reader.number("embedding_multiplier", 1.0),
        "residual_multiplier": reader.number("residual_multiplier", 1.0),
        "attention_scale": reader.number("attention_multiplier", 1.0),
        "logit_scale": 1 / reader.number("logits_scaling", 1.0),
    }


def check_reasons(reader: ConfigReader) -> None:
    """Raise a `ModelError` that lists what was refused, if anything was."""
    if reader.reasons:
        model_type = reader.config["model_type"]
        raise ModelError(f"this {model_type} configuration is not supported", reader.reasons)


def _read_sizes(reader: ConfigReader, states_kv_heads: bool, default: int | None) -> dict[str, int]:
    noted = len(reader.reasons)
    hidden, heads = reader.count("hidden_size"), reader.count("num_attention_heads")
    layers = reader.count("num_hidden_layers", most=MAX_LAYERS)
    is_silent = states_kv_heads and "num_key_value_heads" not in reader.given
    kv_heads = reader.count("num_key_value_heads", None if is_silent else heads)
    if "head_dim" in reader.given:  # a null is what it is in models without a default
        default = None
    head_dim = reader.count("head_dim", default or max(hidden // heads, 1))
    positions = reader.count("max_position_embeddings")
    if len(reader.reasons) == noted:  # else one of these is not what the file says
        if "head_dim" not in reader.config and default is None and hidden % heads:
            reader.refuse("hidden_size", hidden, f"a multiple of num_attention_heads = {heads}")
        if heads % kv_heads:
            reader.refuse("num_attention_heads", heads, f"a multiple of kv heads = {kv_heads}")
        if head_dim % 2:
            reader.refuse("head_dim", head_dim, "an even number")
    return {
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "max_position_embeddings": positions,
    }
