"""Which layers of a model see only a window of the tokens before, as a family's rule reads it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Literal

from jaxwna16.models.config.config_reader import ConfigReader

_FULL, _SLIDING = "full_attention", "sliding_attention"
_WINDOW, _SWITCH = "sliding_window", "use_sliding_window"
_TYPES, _LAST = "layer_types", "max_window_layers"


@dataclasses.dataclass(frozen=True, kw_only=True)
class WindowRule:
    """How the `config.json` of a family with windows says what they are.

    Numbers are what transformers' configuration class has where the key is absent.

    Attributes:
      size: of `sliding_window`, in tokens; None is no window. A null is no window either.
      has_switch: whether there are windows only where `use_sliding_window` is true.
      slides: whether a layer of a model with windows has one, of its number and
        `max_window_layers`; a list of `layer_types` comes before it. None is a window in every
        layer, without such a list. "unrotated" is one in every layer without rope, and such a list
        comes before it, too.
      max_window_layers: where `slides` is a function.
      full_every: of so many layers the last one sees all tokens and the others slide, in place of
        `slides`. A list of `layer_types` comes before it.
      pattern_key: the key that states `full_every`, as a number or as letters: "LLLG" is 4.
      is_needed: whether `sliding_window` must not be null.
    """

    size: int | None
    has_switch: bool = False
    slides: Callable[[int, int], bool] | Literal["unrotated"] | None = None
    max_window_layers: int = 0
    full_every: int | None = None
    pattern_key: str | None = None
    is_needed: bool = False


@dataclasses.dataclass(frozen=True)
class _NoKeys:
    """The rule of a family whose class in transformers reads past the keys of windows."""


UNREAD = _NoKeys()
"""No windows, whatever `config.json` says: the family's class in transformers reads no such key."""
Windows = WindowRule | _NoKeys | None
"""A family's rule. None is no windows, and an error where `config.json` asks for some."""


def slide_from(layer: int, last: int) -> bool:
    """Windows from layer `max_window_layers` on."""
    return layer >= last


def slide_every_other_until(layer: int, last: int) -> bool:
    """Windows in every other layer before layer `max_window_layers`."""
    return layer % 2 == 0 and layer < last


def read_windows(
    reader: ConfigReader, rule: Windows, layers: int, rotated: Sequence[bool] = ()
) -> tuple[int | None, ...]:
    """Sliding windows per layer, None for none.

    Args:
      rule: of the family.
      layers: how many there are.
      rotated: per layer, whether it has rope, where the rule asks for it.
    """
    if rule is None:
        _refuse_windows(reader)
    if not isinstance(rule, WindowRule):
        return (None,) * layers
    window = _read_window(reader, rule)
    types = reader.config.get(_TYPES)
    if rule.slides is None and rule.full_every is None:
        if types is not None:
            reader.refuse(_TYPES, types, f"none in a {reader.config['model_type']} model")
        return (window,) * layers
    if types is not None:
        return _read_types(reader, rule, window, layers)
    if rule.slides == "unrotated":
        return tuple(None if has_rope else window for has_rope in rotated)
    if rule.slides is None:
        step = _read_pattern(reader, rule, layers) if window is not None else 1
        return tuple(window if (i + 1) % step else None for i in range(layers))
    last = _read_last(reader, rule)
    return tuple(window if rule.slides(i, last) else None for i in range(layers))


def _refuse_windows(reader: ConfigReader) -> None:
    """Note every key that asks for windows."""
    config, expected = reader.config, "none: models of this family have no windows"
    if _WINDOW in config and config.get(_SWITCH) is not False:
        reader.refuse(_WINDOW, config[_WINDOW], expected)
    if config.get(_SWITCH, False) is not False:
        reader.refuse(_SWITCH, config[_SWITCH], "false: models of this family have no windows")
    types = config.get(_TYPES, [])
    if not isinstance(types, list) or any(kind != _FULL for kind in types):
        reader.refuse(_TYPES, types, f"{_FULL} alone: models of this family have no windows")


def _read_window(reader: ConfigReader, rule: WindowRule) -> int | None:
    """How many tokens a sliding layer sees; None if there is no such layer."""
    is_on = reader.flag(_SWITCH) if rule.has_switch else True
    if _WINDOW not in reader.config and (_WINDOW in reader.given or rule.size is None):
        if rule.is_needed:
            reader.refuse(_WINDOW, None, "an integer of at least 1")
        return None
    return reader.count(_WINDOW, rule.size) if is_on else None


def _read_last(reader: ConfigReader, rule: WindowRule) -> int:
    last = reader.config.get(_LAST, rule.max_window_layers)
    if isinstance(last, int):
        return last
    reader.refuse(_LAST, last, "an integer")
    return 0


def _read_pattern(reader: ConfigReader, rule: WindowRule, layers: int) -> int:
    """How many layers there are from one that sees all tokens to the next."""
    if rule.pattern_key is None:
        return rule.full_every or 1
    given = reader.config.get(rule.pattern_key)
    if not isinstance(given, str):
        return reader.count(rule.pattern_key, rule.full_every)
    # whether the last layer slides where letters end in between: implementations differ
    if given == "L" * (len(given) - 1) + "G" and layers % len(given) == 0:
        return len(given)
    reader.refuse(rule.pattern_key, given, f"a number, or letters as LLLG that divide {layers}")
    return 1


def _read_types(
    reader: ConfigReader, rule: WindowRule, window: int | None, layers: int
) -> tuple[int | None, ...]:
    """The windows that `layer_types` lists."""
    types = reader.config[_TYPES]
    known = isinstance(types, list) and all(kind in (_FULL, _SLIDING) for kind in types)
    if not known or len(types) != layers:
        reader.refuse(_TYPES, types, f"{layers} entries, each {_FULL} or {_SLIDING}")
        return (None,) * layers
    if _SLIDING in types and window is None:
        switch = f", or {_SWITCH} is off" if rule.has_switch else ""
        reader.refuse(_TYPES, types, f"{_FULL}: there is no {_WINDOW}{switch}")
    return tuple(window if kind == _SLIDING else None for kind in types)
