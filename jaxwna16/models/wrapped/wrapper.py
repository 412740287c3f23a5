"""`Wrapper`: how a model says where its text model is, and what that model inherits.

A model that sees or hears is a text model, with towers and what joins them. Its config.json has a
section for the text model, whose `model_type` is that of a family of ours, and the names of its
tensors begin otherwise. Both are data (`jaxwna16.models.wrapped.table`), so that every family can
stand inside of every wrapper.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from jaxwna16.errors import ModelError
from jaxwna16.models.config.config_reader import MAX_COUNT, ConfigReader, Section

_INHERITED = (("dtype", "torch_dtype"), ("eos_token_id",))
"""Keys of the whole, by all their names, that hold for its text model where that is silent."""
_TIED = "tie_word_embeddings"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Wrapper:
    """How a `model_type` differs from the others.

    Attributes:
      texts: what the `model_type` of its text model may be; the first where its section is silent.
      path: the keys that lead to the section, each inside of the one before.
      is_flat: whether the keys of the text model may stand outside, without a section.
      names: how names in files differ from those of the text model alone, see `rename`.
      tokens: what stands for an image, video or sound in a prompt -> its token where config.json is
        silent.
      is_tied: whether the head is the embedding where config.json is silent, and the files have no
        head.
      asks_text: whether the head is also the embedding where the section alone says so.
    """

    texts: tuple[str, ...]
    path: tuple[str, ...] = ("text_config",)
    is_flat: bool = False
    names: Mapping[str, str]
    tokens: Mapping[str, int]
    is_tied: bool = False
    asks_text: bool = False


@dataclasses.dataclass(frozen=True)
class Found:
    """The text model of a config.json.

    Attributes:
      text: its configuration, with what it inherits.
      beside: what else `LanguageConfig` says of it: fields and their values.
    """

    text: Section
    beside: Mapping[str, Any]


def find_text(config: Mapping[str, Any], wrapper: Wrapper) -> Found:
    """The text model inside of a whole.

    Args:
      config: config.json.
      wrapper: that of its `model_type`.

    Raises:
      ModelError: if there is no such section, if its text model is none of the wrapper's, or if
        a token is none.
    """
    parts = _walk(config, wrapper)
    reader = ConfigReader(parts[-1])
    text_type = wrapper.texts[0]
    if len(parts) > 1 or not wrapper.is_flat:
        text_type = reader.choose("model_type", text_type, wrapper.texts) or text_type
    text = dict(parts[-1]) | {"model_type": text_type}
    for keys in _INHERITED:
        if all(text.get(key) is None for key in keys):
            inner_first = [(key, part) for part in reversed(parts) for key in keys]
            stated = [(key, part[key]) for key, part in inner_first if _states(part, key)]
            text |= dict(stated[:1])
    tied, is_open = _read_tie(parts, wrapper)
    text[_TIED] = tied
    holder = ConfigReader(parts[max(len(parts) - 2, 0)])
    tokens = _read_tokens(holder, wrapper.tokens)
    if reasons := [*reader.reasons, *holder.reasons]:
        raise ModelError(f"this {config['model_type']} configuration is not supported", reasons)
    return Found(
        Section(text, reader.section),
        {"is_tie_open": is_open, "media_tokens": tokens},
    )


def _walk(config: Mapping[str, Any], wrapper: Wrapper) -> list[Section]:
    """The whole, and each section within the one before; the last is the text model's."""
    parts = [Section(config, "")]
    for key in wrapper.path:
        inner = parts[-1].get(key)
        if isinstance(inner, Mapping):
            parts.append(Section(inner, f"{parts[-1].path}{key}."))
            continue
        if inner is None and wrapper.is_flat:
            break
        found = None if inner is None else type(inner).__name__
        raise ModelError(
            f"this {config['model_type']} configuration is not supported",
            [f"{parts[-1].path}{key}: expected the configuration of the text model, found {found}"],
        )
    return parts


def _states(part: Mapping[str, Any], key: str) -> bool:
    return part.get(key) is not None


def _read_tie(parts: list[Section], wrapper: Wrapper) -> tuple[Any, bool]:
    """What is said of the head; and whether a head in the files may say otherwise.

    transformers asks the whole, whose class has a default, and some classes ask the section, too.
    A head in the files that differs from the embedding is then used by transformers.
    """
    *outside, text = parts
    inner = text.get(_TIED)
    outer = next((part[_TIED] for part in reversed(outside) if _states(part, _TIED)), None)
    if outer is None:
        tied = inner if inner is not None else wrapper.is_tied
        return tied, tied is True and len(parts) > 1
    return (
        (True, True) if outer is False and inner is True and wrapper.asks_text else (outer, False)
    )


def _read_tokens(reader: ConfigReader, kinds: Mapping[str, int]) -> tuple[tuple[str, int], ...]:
    """The key that states each token, and the token."""
    found = []
    for kind, default in kinds.items():
        keys = [f"{kind}_token_id", f"{kind}_token_index"]
        key = next((key for key in keys if key in reader.config), keys[0])
        found.append((reader.section + key, reader.count(key, default, least=0, most=MAX_COUNT)))
    return tuple(found)
