"""`Gemma4Config`: what `config.json` says about a Gemma 4, checked."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from jaxwna16.models.config.config_reader import ConfigReader, Section, is_positive
from jaxwna16.models.config.language_config import GELU_TANH, LanguageConfig
from jaxwna16.models.config.moe_config import MoeConfig, check_choice
from jaxwna16.models.config.rope_config import (
    RopeConfig,
    RopeRule,
    divide_rope,
    read_rope,
    read_rotary_dim,
    replace_rope,
)
from jaxwna16.models.config.stated import check_reasons, read_stated
from jaxwna16.models.config.windows import WindowRule, read_windows
from pallas_kernels.formulas.routing_options import Routing

_LAYERS = "per_layer_config"
_GLOBAL = {"head_dim": "global_head_dim", "num_key_value_heads": "num_global_key_value_heads"}
_ROPES = {
    "full_attention": {
        "rope_type": "proportional",
        "partial_rotary_factor": 0.25,
        "rope_theta": 1e6,
    },
    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
}
"""What transformers' configuration class has where there are no `rope_parameters`."""
_RULE = RopeRule(proportional=True)
_ROPE_TYPES = ("default", "linear", "proportional")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Kind:
    """How a `model_type` differs from the others; numbers are of absent keys.

    Attributes:
      window: of `sliding_window`.
      per_layer: of `hidden_size_per_layer_input`; None is a type without such embeddings, and
        without experts.
    """

    window: int
    per_layer: int | None = None


KINDS = {
    "gemma4_text": Kind(window=512, per_layer=256),
    "gemma4_unified_text": Kind(window=1024),
}
"""`model_type` -> what is its own."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Gemma4Config(LanguageConfig):
    """Everything the definition in `jaxwna16.models.gemma4.definition` needs to know; hashable.

    `head_dim`, `num_key_value_heads` and `rope` are those of layers with a window.

    Attributes:
      attention_bias: whether the linears of attention have a bias.
      windows: per layer, how many tokens a query sees (itself included), or None for all before it.
      global_head_dim: of layers that see all tokens.
      kv_heads: per layer.
      keys_are_values: whether layers that see all tokens have no projection of values: these are
        the keys, before their norm.
      global_rope: of layers that see all tokens.
      sources: per layer, the layer whose keys and values it attends to, or None for its own.
      inner: per layer, the features of its MLP.
      per_layer_size: features of what each layer takes of a token beside the stream; 0 is nothing.
      per_layer_vocab: rows of the embedding of that.
    """

    attention_bias: bool
    windows: tuple[int | None, ...]
    global_head_dim: int
    kv_heads: tuple[int, ...]
    keys_are_values: bool
    global_rope: RopeConfig
    sources: tuple[int | None, ...]
    inner: tuple[int, ...]
    per_layer_size: int
    per_layer_vocab: int

    def find_head_dim(self, layer: int) -> int:
        """Features of a head of a layer."""
        return self.global_head_dim if self.windows[layer] is None else self.head_dim

    @property
    def max_length(self) -> int:
        """As many tokens as config.json says, which is of after a scaling of rope."""
        return self.max_position_embeddings

    @property
    def widest_features(self) -> int:
        layers = range(self.num_hidden_layers)
        heads = (
            2 * (self.num_attention_heads + self.kv_heads[i]) * self.find_head_dim(i)
            for i in layers
        )
        beside = self.num_hidden_layers * self.per_layer_size
        return max(super().widest_features, *heads, 3 * max(self.inner), 3 * beside)

    @property
    def left_out(self) -> Mapping[str, str]:
        parts = r"self_attn\.(k_proj|v_proj|k_norm|v_norm)(\.|$)"
        groups = {
            source: "|".join(str(i) for i, found in enumerate(self.sources) if found == source)
            for source in self.sources
            if source is not None
        }
        return {
            rf"layers\.({layers})\.{parts}": f"these layers attend to the keys of layer {source}"
            for source, layers in groups.items()
        }

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> Gemma4Config:
        """Read a `config.json`; absent keys take the defaults of transformers, but for sizes.

        Raises:
          ModelError: listing every key that is missing, malformed or asks for the unsupported.
        """
        kind = KINDS[config["model_type"]]
        whole = ConfigReader(config)
        full, sliding = _divide_rope(whole)
        reader = replace_rope(whole, sliding, per_layer_config=None)
        stated = read_stated(
            reader,
            rms_norm_eps=1e-6,
            rope_theta=1e4,
            head_dim=256,
            tied=True,
            activations=GELU_TANH,
        )
        layers = stated["num_hidden_layers"]
        if stated["rope"].rope_type not in _ROPE_TYPES:
            reader.refuse("rope_type", stated["rope"].rope_type, " or ".join(_ROPE_TYPES[:2]))
        reader.reasons += whole.reasons
        if reader.config.get("use_bidirectional_attention") not in (None, "vision"):
            found = reader.config["use_bidirectional_attention"]
            reader.refuse("use_bidirectional_attention", found, "none in a text")
        if "attn_logit_softcapping" in reader.config:
            found = reader.config["attn_logit_softcapping"]
            reader.refuse("attn_logit_softcapping", found, "none in this family")
        windows = _read_windows(reader, kind, layers)
        keys_are_values = reader.flag("attention_k_eq_v")
        sizes = _read_heads(whole, stated, windows, keys_are_values)
        reader.reasons += [reason for reason in whole.reasons if reason not in reader.reasons]
        global_rope = _read_global_rope(reader, full, sizes[0], stated["max_position_embeddings"])
        sources = _read_sources(reader, windows)
        is_wide, inner = reader.flag("use_double_wide_mlp"), stated["intermediate_size"]
        per_layer = _read_per_layer(reader, kind)
        parsed = cls(
            **stated,
            attention_bias=reader.flag("attention_bias"),
            windows=windows,
            global_head_dim=sizes[0],
            kv_heads=sizes[1],
            keys_are_values=keys_are_values,
            global_rope=global_rope,
            sources=sources,
            inner=tuple(inner * (2 if is_wide and s is not None else 1) for s in sources),
            per_layer_size=per_layer,
            per_layer_vocab=reader.count("vocab_size_per_layer_input", 262144) if per_layer else 0,
            moe=_read_moe(reader, kind, layers),
            embedding_multiplier=stated["hidden_size"] ** 0.5,
            attention_scale=1.0,
            final_softcap=reader.number_or_none("final_logit_softcapping", None),
        )
        check_reasons(reader)
        return parsed


def _divide_rope(reader: ConfigReader) -> tuple[Any, Any]:
    """The rope parameters of layers that see all tokens, and of those with a window."""
    for key in ("rope_scaling", "rope_theta", "rope_local_base_freq", "partial_rotary_factor"):
        if key in reader.config:
            expected = "nothing: this family has rope_parameters for each kind of layers"
            reader.refuse(key, reader.config[key], expected)
    if not reader.config.get("rope_parameters"):
        return _ROPES["full_attention"], _ROPES["sliding_attention"]
    return divide_rope(reader)


def _read_global_rope(reader: ConfigReader, part: Any, head_dim: int, positions: int) -> RopeConfig:
    """The rope of layers that see all tokens, which are `head_dim` features wide."""
    own = replace_rope(reader, part, "full_attention: ")
    rope = read_rope(own, positions, 1e6, _RULE)
    proportion = 1.0
    if rope.rope_type == "proportional":
        proportion = part.get("partial_rotary_factor") or 1.0
        if not is_positive(proportion, most=1.0):
            own.refuse("partial_rotary_factor", proportion, "a number above 0 and at most 1")
            proportion = 1.0
    elif rope.rope_type in _ROPE_TYPES:
        read_rotary_dim(own, head_dim, 1.0)
    else:
        own.refuse("rope_type", rope.rope_type, " or ".join(_ROPE_TYPES))
    reader.reasons += [reason for reason in own.reasons if reason not in reader.reasons]
    return dataclasses.replace(rope, proportion=float(proportion), span=head_dim)


def _read_windows(reader: ConfigReader, kind: Kind, layers: int) -> tuple[int | None, ...]:
    """Five of six layers slide; the last one never does."""
    rule = WindowRule(size=kind.window, full_every=6, is_needed=True)
    windows = read_windows(reader, rule, layers)
    if windows[-1] is not None and "layer_types" in reader.config:
        reader.refuse("layer_types", reader.config["layer_types"], "full_attention in the end")
    return (*windows[:-1], None)


def _read_heads(
    reader: ConfigReader,
    stated: Mapping[str, Any],
    windows: tuple[int | None, ...],
    keys_are_values: bool,
) -> tuple[int, tuple[int, ...]]:
    """Features of a head that sees all tokens, and each layer's number of keys.

    transformers 5 writes `per_layer_config`, what single layers have; then it reads nothing else.
    """
    base = {key: stated[key] for key in _GLOBAL}
    given = reader.config.get(_LAYERS)
    if given is None:
        own = {"head_dim": reader.count(_GLOBAL["head_dim"], 512)}
        if keys_are_values and _GLOBAL["num_key_value_heads"] in reader.config:
            key = "num_key_value_heads"
            own[key] = reader.count(_GLOBAL[key])
        found = [base if window is not None else base | own for window in windows]
    else:
        found = _read_each(reader, given, base, len(windows))
    full = {sizes["head_dim"] for sizes, w in zip(found, windows, strict=True) if w is None}
    local = {sizes["head_dim"] for sizes, w in zip(found, windows, strict=True) if w is not None}
    if len(full) > 1 or local - {base["head_dim"]}:
        expected = f"head_dim = {base['head_dim']} in layers with a window, and one in the others"
        reader.refuse(_LAYERS, given, expected)
    for key, name in _GLOBAL.items():
        stated_globally = reader.config.get(name)
        values = {sizes[key] for sizes, w in zip(found, windows, strict=True) if w is None}
        is_read = key == "head_dim" or keys_are_values
        if is_read and stated_globally is not None and given is not None:
            if values != {stated_globally}:
                reader.refuse(name, stated_globally, f"what {_LAYERS} says, {sorted(values)}")
    size, heads = min(full), stated["num_attention_heads"]
    if size % 2:
        reader.refuse(_GLOBAL["head_dim"], size, "an even number")
        size = 2
    counts = tuple(sizes["num_key_value_heads"] for sizes in found)
    if any(heads % count for count in counts) and not heads % stated["num_key_value_heads"]:
        reader.refuse("num_attention_heads", heads, f"a multiple of kv heads = {set(counts)}")
    return size, counts


def _read_each(
    reader: ConfigReader, given: Any, base: Mapping[str, int], layers: int
) -> list[dict[str, int]]:
    """Sizes of each layer from `per_layer_config`."""
    found = [dict(base) for _ in range(layers)]
    names = {str(i): i for i in range(layers)}
    if not isinstance(given, Mapping) or not {str(key) for key in given} <= names.keys():
        reader.refuse(_LAYERS, given, f"sizes of layers, by their numbers below {layers}")
        return found
    for name, part in given.items():
        path = f"{_LAYERS}.{name}."
        if not isinstance(part, Mapping) or part.keys() - _GLOBAL.keys():
            reader.refuse(path[:-1], part, " and ".join(_GLOBAL))
            continue
        own = ConfigReader(Section(part, reader.section + path))
        for key in own.config:
            found[names[str(name)]][key] = own.count(key)
        reader.reasons += own.reasons
    return found


def _read_sources(reader: ConfigReader, windows: tuple[int | None, ...]) -> tuple[int | None, ...]:
    """The last `num_kv_shared_layers` take keys of the last layer of their kind before these."""
    key, layers = "num_kv_shared_layers", len(windows)
    shared = reader.count(key, 0, least=0)
    first = layers - shared
    last = {window is None: i for i, window in enumerate(windows[: max(first, 0)])}
    kinds = {window is None for window in windows}
    if shared and (first < 1 or kinds - last.keys()):
        reader.refuse(key, shared, f"fewer of the {layers} layers, so that both kinds have keys")
        return (None,) * layers
    return tuple(last[w is None] if i >= first else None for i, w in enumerate(windows))


def _read_per_layer(reader: ConfigReader, kind: Kind) -> int:
    key = "hidden_size_per_layer_input"
    if kind.per_layer is None:
        if reader.config.get(key):
            reader.refuse(key, reader.config[key], "none in this family")
        return 0
    is_null = key in reader.given and key not in reader.config
    return 0 if is_null else reader.count(key, kind.per_layer, least=0)


def _read_moe(reader: ConfigReader, kind: Kind, layers: int) -> MoeConfig | None:
    """Experts beside the MLP of each layer."""
    if not reader.flag("enable_moe_block"):
        return None
    if kind.per_layer is None:
        reader.refuse("enable_moe_block", True, "false: this family has no experts")
        return None
    noted = len(reader.reasons)
    experts, inner = reader.count("num_experts"), reader.count("moe_intermediate_size")
    routing = Routing(top_k=reader.count("top_k_experts"))
    if len(reader.reasons) == noted:
        check_choice(reader, experts, routing, "top_k_experts")
    return MoeConfig(
        sparse=(True,) * layers, experts=experts, intermediate_size=inner, routing=routing
    )
