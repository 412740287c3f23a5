"""The rope parameters of a `config.json`."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from jaxwna16.models.config.config_reader import MAX_COUNT, ConfigReader, Section, is_positive

_MAX_THETA = 1e15
_FACTORS = (1e-6, 1e6)  # of the frequencies: float32 divides by products of two of them
_POSITIONS = (1, MAX_COUNT)
_NEEDED = {
    "default": (),
    "linear": ("factor",),
    "proportional": ("factor",),
    "dynamic": ("factor",),
    "yarn": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    "longrope": ("factor",),
}
"""`rope_type` -> the keys that it must have."""
ROPE_TYPES = tuple(kind for kind in _NEEDED if kind not in ("longrope", "proportional"))
_LONGROPE = ("longrope", "su", "yarn")
"""What it is called in files of families that have it: older names of Phi-3's stand for it, too."""
_OPTIONAL = ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim")
_ORIGINAL = "original_max_position_embeddings"
_OWN = {
    "yarn": (*_OPTIONAL, "truncate", _ORIGINAL),
    "llama3": (_ORIGINAL,),
    "longrope": ("short_factor", "long_factor", "attention_factor", _ORIGINAL),
}
"""`rope_type` -> the keys that it may have beside those."""
_ALWAYS = ("rope_type", "type", "rope_theta", "partial_rotary_factor")
_BETA = "llama_4_scaling_beta"
MROPE = ("mrope_section", "mrope_interleaved")
"""They deal the frequencies out to positions in time, height and width. For text all three are the
same number."""
_NEW, _OLD = "rope_parameters", "rope_scaling"
_FULL, _SLIDING = "full_attention", "sliding_attention"


@dataclasses.dataclass(frozen=True, kw_only=True)
class RopeConfig:
    """Rope parameters as `config.json` names them; what a `rope_type` does not use has a default.

    Attributes:
      theta: `rope_theta`, the base of the frequencies.
      original_max_positions: P in the formulas of `jaxwna16.models.parts.rope`; for "dynamic"
        always the model's max_position_embeddings.
      attention_factor: multiplies cos and sin (yarn, longrope); None is by the factor or, of yarn,
        by the mscales.
      query_beta: `llama_4_scaling_beta`; 0 where queries are not scaled by their position.
      short_factors, long_factors: what divides each frequency (longrope), in rows of up to P tokens
        and in longer ones.
      proportion: the share of pairs that turn at all (proportional).
      span: features of a head that have a frequency, where not all layers have `rotary_dim`; or 0.
    """

    rope_type: str
    theta: float
    original_max_positions: int
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    attention_factor: float | None = None
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True
    query_beta: float = 0.0
    short_factors: tuple[float, ...] = ()
    long_factors: tuple[float, ...] = ()
    proportion: float = 1.0
    span: int = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class RopeRule:
    """How the `config.json` of a family states rope where that differs from others.

    Attributes:
      unread: keys of the parameters that change nothing in a text.
      aliases: names of "default" in older files.
      absent: the parameters where config.json has none.
      rotates_parts: whether a part of a head may be rotated, where all of it is if config.json is
        silent.
      scales_queries: whether queries are scaled by their position, see `query_scales`.
      longrope: of a family that has longrope, no other scaling, and may rotate a part of a head: of
        `original_max_position_embeddings` beside the parameters.
      stretches: whether an `alpha` may stretch the base, see `read_stretched`.
      proportional: whether a part of the pairs may have a frequency of zero (Gemma 4).
    """

    unread: tuple[str, ...] = ()
    aliases: tuple[str, ...] = ()
    absent: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    rotates_parts: bool = False
    scales_queries: bool = False
    longrope: int | None = None
    stretches: bool = False
    proportional: bool = False


PLAIN = RopeRule()


def read_rotary_dim(
    reader: ConfigReader,
    head_dim: int,
    default: float,
    key: str | None = None,
    rule: RopeRule = PLAIN,
) -> int:
    """How many features of a head are rotated: head_dim times `partial_rotary_factor`.

    Args:
      default: the factor of the family.
      key: what the family's files call the number itself, if they state it.
      rule: of the family. One that states no part of a head knows no other factor than 1.
    """
    may_be_part = rule.rotates_parts or rule.longrope is not None
    is_whole = default == 1.0 and key is None and not may_be_part
    given = reader.config.get("partial_rotary_factor")
    _, values = _find_rope(reader)
    if isinstance(values, Mapping) and values.get("partial_rotary_factor") is not None:
        given = values["partial_rotary_factor"]
    factor = default if given is None else given
    if key is not None and key in reader.config:
        count = reader.count(key, least=2, most=head_dim)
        if given is None:
            factor = count / head_dim
        elif not is_positive(given) or int(head_dim * given) != count:
            reader.refuse("partial_rotary_factor", given, f"{key} = {count} of {head_dim}")
    if is_whole:
        if factor != 1.0:
            reader.refuse("partial_rotary_factor", factor, "1.0")
        return head_dim
    rotated = int(head_dim * factor) if is_positive(factor, most=1.0) else 0
    if 2 <= rotated <= head_dim and rotated % 2 == 0:
        return rotated
    reader.refuse("partial_rotary_factor", factor, f"an even part of head_dim = {head_dim}")
    return head_dim


def read_rope(
    reader: ConfigReader,
    max_positions: int,
    theta: float,
    rule: RopeRule = PLAIN,
    rotated: int = 0,
) -> RopeConfig:
    """Rope parameters: `rope_parameters`, or `rope_theta` beside `rope_scaling` with `type`.

    A key that nothing here reads is refused, since it may ask for another computation.

    Args:
      theta: `rope_theta` of the family where it is absent.
      rule: of the family.
      rotated: features of a head that are rotated; read for longrope.
    """
    config, noted = reader.config, len(reader.reasons)
    lists: dict[str, tuple[float, ...]] = {}
    where, given = _find_rope(reader)
    if not isinstance(given, Mapping) or any(isinstance(v, Mapping) for v in given.values()):
        reader.refuse(where, given, "one flat set of parameters for all layers")
        return RopeConfig(rope_type="default", theta=1e4, original_max_positions=max_positions)
    given = given or rule.absent
    values = {key: value for key, value in given.items() if value is not None}
    rope_type = values.get("rope_type", values.get("type", "default"))
    theta = values.get("rope_theta", config.get("rope_theta", theta))
    original = max_positions
    known = ROPE_TYPES if rule.longrope is None else ("default", *_LONGROPE)
    known = (*known, "proportional") if rule.proportional else known
    if rope_type in rule.aliases:
        rope_type = "default"
    if rope_type == "proportional":
        values.setdefault("factor", 1.0)
    if rope_type not in known:
        reader.refuse(f"{where}.rope_type", rope_type, f"one of {', '.join(known)}")
        rope_type = "default"
    else:
        rope_type = rope_type if rule.longrope is None or rope_type == "default" else "longrope"
        _refuse_unread(reader, where, values, rope_type, rule)
    if rope_type in ("llama3", "yarn") or rule.scales_queries:
        original = values.get(_ORIGINAL, original)
        original = config.get(_ORIGINAL, original)
    if rope_type == "longrope":
        original = reader.count(_ORIGINAL, rule.longrope, least=2)
        lists = _read_factors(reader, where, values, rotated)
    if rope_type in ("yarn", "longrope") and is_positive(original, *_POSITIONS):
        values.setdefault("factor", max_positions / original)
    if not is_positive(theta, most=_MAX_THETA) or theta <= 1:
        key = f"{where}.rope_theta" if "rope_theta" in values else "rope_theta"
        limit = f" and at most {_MAX_THETA:g}" if is_positive(theta, _MAX_THETA, math.inf) else ""
        reader.refuse(key, theta, f"a number above 1{limit}")
        theta = 1e4
    numbers = {key: values.get(key) for key in _NEEDED[rope_type]}
    numbers |= {key: values[key] for key in _OPTIONAL if key in values}
    for key, value in numbers.items():
        if not is_positive(value, *_FACTORS):
            reader.refuse(
                f"{where}.{key}", value, "a positive number from {:g} to {:g}".format(*_FACTORS)
            )
    if not is_positive(original, *_POSITIONS):
        expected = "a number of positions"
        reader.refuse(f"{where}.{_ORIGINAL}", original, expected)
    if rope_type == "llama3" and len(reader.reasons) == noted:
        low, high = values["low_freq_factor"], values["high_freq_factor"]
        if high <= low * (1 + 1e-6):  # they are divided by their difference, in float32
            reader.refuse(f"{where}.high_freq_factor", high, f"more than low_freq_factor = {low}")
    truncate = given.get("truncate", True)
    if not isinstance(truncate, bool | None):
        reader.refuse(f"{where}.truncate", truncate, "true or false")
    return RopeConfig(
        rope_type=rope_type,
        theta=theta,
        original_max_positions=original,
        truncate=truncate is True,  # null is off, as in transformers
        query_beta=_read_beta(reader, where, values) if rule.scales_queries else 0.0,
        **lists,
        **{key: values[key] for key in (*_OPTIONAL, *_NEEDED[rope_type]) if key in values},
    )


def divide_rope(reader: ConfigReader) -> tuple[Any, Any]:
    """The rope parameters of layers that see all tokens, and those of layers with a window.

    `rope_parameters` has a part for each. In older files `rope_scaling` is of layers that see all
    tokens.
    """
    given, scaling = (reader.config.get(key) or {} for key in (_NEW, _OLD))
    parts = given if isinstance(given, Mapping) else {_NEW: given}
    if isinstance(parts.get(_FULL), Mapping) and isinstance(parts.get(_SLIDING), Mapping):
        # GPTQModel writes these beside the two sets, which are all that transformers reads then
        parts = {key: part for key, part in parts.items() if key not in ("rope_theta", "rope_type")}
    if parts.keys() - {_FULL, _SLIDING}:
        reader.refuse(_NEW, given, f"one set of parameters for {_FULL} and one for {_SLIDING}")
    elif given and scaling:
        reader.refuse(_OLD, scaling, f"nothing beside {_NEW}")
    elif isinstance(scaling, Mapping) and scaling and "rope_type" not in scaling:
        # transformers then scales nothing, others do
        reader.refuse(_OLD, scaling, "a rope_type")
    else:
        return parts.get(_FULL) or scaling, parts.get(_SLIDING) or {}
    return {}, {}


def replace_rope(reader: ConfigReader, part: Any, section: str = "", **others: Any) -> ConfigReader:
    """A reader of the same with one set of rope parameters, and with these other keys.

    Args:
      section: what stands before the keys in its reasons, beside the reader's own.
    """
    config = {**reader.given, _OLD: None, _NEW: part, **others}
    return ConfigReader(Section(config, reader.section + section))


def _read_factors(
    reader: ConfigReader, where: str, values: Mapping[str, Any], rotated: int
) -> dict[str, tuple[float, ...]]:
    """The factors of longrope, one for each frequency."""
    lists: dict[str, tuple[float, ...]] = {}
    for name in ("short", "long"):
        given: Any = values.get(f"{name}_factor")
        is_list = isinstance(given, list) and len(given) == rotated // 2
        if not is_list or not all(is_positive(value, *_FACTORS) for value in given):
            expected = "{} positive numbers from {:g} to {:g}".format(rotated // 2, *_FACTORS)
            reader.refuse(f"{where}.{name}_factor", given, expected)
            given = [1.0] * (rotated // 2)
        lists[f"{name}_factors"] = tuple(map(float, given))
    return lists


def read_rotated(reader: ConfigReader, layers: int) -> tuple[bool, ...]:
    """Per layer, whether it rotates heads: `no_rope_layers`, a 1 where it does (SmolLM3).

    Where that is absent, all but every `no_rope_layer_interval`-th layer do.
    """
    step, given = reader.count("no_rope_layer_interval", 4), reader.config.get("no_rope_layers")
    if given is None:
        return tuple((i + 1) % step != 0 for i in range(layers))
    if not isinstance(given, list) or len(given) < layers or any(n not in (0, 1) for n in given):
        expected = f"at least {layers} entries, each 1 for a layer with rope or 0 for one without"
        reader.refuse("no_rope_layers", given, expected)
        return (True,) * layers
    return tuple(n == 1 for n in given[:layers])


def read_stretched(
    reader: ConfigReader, max_positions: int, theta: float, head_dim: int
) -> RopeConfig | None:
    """The rope of a family whose "dynamic" one may have an `alpha` (Hunyuan); None if it has none.

    Such a rope depends on no length: of it, theta alpha^(d / (d - 2)) is the base, d = head_dim.
    All else that may stand beside `alpha` is not read, as in transformers.
    """
    where, given = _find_rope(reader)
    if not isinstance(given, Mapping) or not given.get("alpha"):
        return None
    if given.get("rope_type", given.get("type")) != "dynamic":
        return None
    alpha, theta = given["alpha"], given.get("rope_theta", reader.config.get("rope_theta", theta))
    if not is_positive(theta, 1.0, _MAX_THETA):
        reader.refuse("rope_theta", theta, f"a number above 1 and at most {_MAX_THETA:g}")
        theta = 1e4
    largest = (_MAX_THETA / theta) ** ((head_dim - 2) / head_dim)
    if not is_positive(alpha, 1.0, largest) or head_dim <= 2:
        reader.refuse(f"{where}.alpha", alpha, f"a number from 1 to {largest:g}")
        alpha, head_dim = 1.0, 4
    base = theta * alpha ** (head_dim / (head_dim - 2))
    return RopeConfig(rope_type="default", theta=base, original_max_positions=max_positions)


def _refuse_unread(
    reader: ConfigReader, where: str, values: Mapping[str, Any], rope_type: str, rule: RopeRule
) -> None:
    """Note keys that no part of the model reads."""
    read = {*_ALWAYS, *_NEEDED[rope_type], *_OWN.get(rope_type, ()), *rule.unread}
    if rule.scales_queries:
        read |= {_BETA, _ORIGINAL}
    for key in values:
        if key not in read:
            expected = f"nothing: no part of a {reader.config['model_type']} model reads it"
            reader.refuse(f"{where}.{key}", values[key], f"{expected} with {rope_type} rope")


def _read_beta(reader: ConfigReader, where: str, values: Mapping[str, Any]) -> float:
    """How much queries grow with their position."""
    beta = values.get(_BETA)
    if is_positive(beta, *_FACTORS) or (beta == 0 and not isinstance(beta, bool)):
        return float(beta)  # pyright: ignore[reportArgumentType]
    reader.refuse(f"{where}.{_BETA}", beta, "0, or a number from {:g} to {:g}".format(*_FACTORS))
    return 0.0


def _find_rope(reader: ConfigReader) -> tuple[str, Any]:
    """The key that has the rope parameters, and these.

    transformers 5 writes `rope_parameters`, and reads `rope_scaling` alone where both are given.
    """
    new, old = (reader.config.get(key) or {} for key in ("rope_parameters", "rope_scaling"))
    if not new:
        return "rope_scaling", old
    if old and not (isinstance(old, Mapping) and isinstance(new, Mapping)):
        reader.refuse("rope_scaling", old, "nothing beside rope_parameters")
    elif old:
        same = {"rope_type" if key == "type" else key: value for key, value in old.items()}
        if any(new.get(key) != value for key, value in same.items()):
            reader.refuse("rope_scaling", old, f"the same as rope_parameters = {new!r}, or nothing")
    return "rope_parameters", new
