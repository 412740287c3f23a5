"""`Qwen35Config`: what `config.json` says about a Qwen3-Next, Qwen3.5 or Qwen3.6, checked."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from jaxwna16.errors import ModelError
from jaxwna16.models.config.config_reader import ConfigReader
from jaxwna16.models.config.language_config import (
    MAX_LAYERS,
    SILU,
    LanguageConfig,
    read_activation,
    read_eos,
    read_saved_dtype,
    refuse_others,
)
from jaxwna16.models.config.moe_config import MoeConfig, SoftmaxExperts, read_moe
from jaxwna16.models.config.rope_config import MROPE, RopeRule, read_rope, read_rotary_dim

_LINEAR, _FULL = "linear_attention", "full_attention"
_INTERVAL = 4
_ROTATED = 0.25


@dataclasses.dataclass(frozen=True, kw_only=True)
class Kind:
    """How a model type differs from the others.

    Attributes:
      experts: how config.json states experts; None where each layer has one MLP.
      interleaves_heads: whether files have the projections of a delta net as two, of which rows are
        key head by key head.
      layers, hidden_size, inner, kv_heads, vocab_size: where config.json is silent; `inner` is the
        features of an MLP.
    """

    experts: SoftmaxExperts | None = None
    interleaves_heads: bool = False
    layers: int = 32
    hidden_size: int = 4096
    inner: int = 12288
    kv_heads: int = 4
    vocab_size: int = 248320


_SPARSE = Kind(
    experts=SoftmaxExperts(
        experts=256, top_k=8, inner=512, has_steps=False, renormalize=True, shared=512
    ),
    layers=40,
    hidden_size=2048,
    kv_heads=2,
)
KINDS = {
    "qwen3_5_text": Kind(),
    "qwen3_5_moe_text": _SPARSE,
    "qwen3_next": dataclasses.replace(
        _SPARSE,
        experts=SoftmaxExperts(experts=512, top_k=10, inner=512, norm_topk_prob=True, shared=512),
        interleaves_heads=True,
        layers=48,
        inner=5632,
        vocab_size=151936,
    ),
}
"""`model_type` -> its row."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class DeltaNetConfig:
    """Sizes of the gated delta-net layers.

    Attributes:
      key_heads, value_heads: each key head serves value_heads / key_heads value heads in a row.
      key_dim, value_dim: features of one head.
      width: tokens that the convolution spans.
    """

    key_heads: int
    value_heads: int
    key_dim: int
    value_dim: int
    width: int

    @property
    def key_features(self) -> int:
        return self.key_heads * self.key_dim

    @property
    def value_features(self) -> int:
        return self.value_heads * self.value_dim

    @property
    def features(self) -> int:
        """Of queries, keys and values together: what the convolution runs over."""
        return 2 * self.key_features + self.value_features


@dataclasses.dataclass(frozen=True, kw_only=True)
class Qwen35Config(LanguageConfig):
    """Everything the definition in `jaxwna16.models.qwen3_5.definition` needs to know; hashable.

    Layers that predict several tokens at once do not stand among the others: they are called `mtp`.

    Attributes:
      model_type: one of `KINDS`.
      intermediate_size: of the MLPs; 0 where all layers have experts.
      is_full: per layer, whether it is full attention; the others are gated delta nets.
    """

    attention_bias: bool
    is_full: tuple[bool, ...]
    delta: DeltaNetConfig

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> Qwen35Config:
        """Read a `config.json`.

        Absent keys take the defaults of transformers' configuration classes.

        Raises:
          ModelError: listing every key that is missing, malformed or asks for the unsupported.
        """
        model_type = config["model_type"]
        reader = ConfigReader(config)
        parsed = _read(reader, model_type)
        if reader.reasons:
            raise ModelError(f"this {model_type} configuration is not supported", reader.reasons)
        return parsed


def _read(reader: ConfigReader, model_type: str) -> Qwen35Config:
    kind = KINDS[model_type]
    refuse_others(reader)
    read_activation(reader, SILU)
    if not reader.flag("attn_output_gate", True):
        reader.refuse("attn_output_gate", False, "true")
    heads = reader.count("num_attention_heads", 16)
    kv_heads = reader.count("num_key_value_heads", kind.kv_heads)
    if heads % kv_heads:
        reader.refuse("num_attention_heads", heads, f"a multiple of kv heads = {kv_heads}")
    head_dim = reader.count("head_dim", 256)
    layers = reader.count("num_hidden_layers", kind.layers, most=MAX_LAYERS)
    max_positions = reader.count("max_position_embeddings", 32768)
    rope = read_rope(reader, max_positions, 10000.0, RopeRule(unread=MROPE))
    if rope.rope_type == "dynamic":
        reader.refuse("rope_parameters.rope_type", "dynamic", "a rope that is not dynamic")
    moe = None if kind.experts is None else _read_experts(reader, kind.experts, layers)
    is_sparse = moe is not None and all(moe.sparse)
    return Qwen35Config(
        model_type=model_type,
        vocab_size=reader.count("vocab_size", kind.vocab_size),
        hidden_size=reader.count("hidden_size", kind.hidden_size),
        intermediate_size=0 if is_sparse else reader.count("intermediate_size", kind.inner),
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        rotary_dim=read_rotary_dim(reader, head_dim, _ROTATED),
        max_position_embeddings=max_positions,
        rms_norm_eps=reader.number("rms_norm_eps", 1e-6),
        tie_word_embeddings=reader.flag("tie_word_embeddings"),
        attention_bias=reader.flag("attention_bias"),
        is_full=_read_types(reader, layers),
        delta=_read_delta(reader),
        rope=rope,
        dtype=read_saved_dtype(reader),
        eos_token_ids=read_eos(reader),
        moe=moe,
    )


def _read_types(reader: ConfigReader, layers: int) -> tuple[bool, ...]:
    interval = reader.count("full_attention_interval", _INTERVAL)
    types = reader.config.get("layer_types")
    if types is None:
        return tuple((i + 1) % interval == 0 for i in range(layers))
    known = isinstance(types, list) and all(kind in (_LINEAR, _FULL) for kind in types)
    if not known or len(types) != layers:
        reader.refuse("layer_types", types, f"{layers} entries, each {_LINEAR} or {_FULL}")
        return (True,) * layers
    return tuple(kind == _FULL for kind in types)


def _read_delta(reader: ConfigReader) -> DeltaNetConfig:
    keys = reader.count("linear_num_key_heads", 16)
    values = reader.count("linear_num_value_heads", 32)
    if values % keys:
        reader.refuse("linear_num_value_heads", values, f"a multiple of key heads = {keys}")
    return DeltaNetConfig(
        key_heads=keys,
        value_heads=values,
        key_dim=reader.count("linear_key_head_dim", 128),
        value_dim=reader.count("linear_value_head_dim", 128),
        width=reader.count("linear_conv_kernel_dim", 4, least=2),
    )


def _read_experts(reader: ConfigReader, rule: SoftmaxExperts, layers: int) -> MoeConfig | None:
    if not rule.has_steps and reader.config.get("mlp_only_layers"):
        reader.refuse("mlp_only_layers", reader.config["mlp_only_layers"], "none")
    return read_moe(reader, rule, layers)
