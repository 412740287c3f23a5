"""Where config.json describes the language model: at its top, or in a section of its own.

A model that is one of several (beside a vision tower, say) has its configuration in a section,
which transformers calls a subconfig. Which names such sections have is known here alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

_NAMES = ("text_config", "llm_config", "language_config", "thinker_config")


def find_subconfigs(config: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """Key -> section, of those that config.json has for its language model.

    One inside of another ("thinker_config.text_config") comes after it.
    """
    found = {}
    for name in _NAMES:
        part = config.get(name)
        if isinstance(part, Mapping):
            found[name] = part
            found |= {f"{name}.{key}": inner for key, inner in find_subconfigs(part).items()}
    return found


def change_all(
    config: Mapping[str, Any], change: Callable[[Mapping[str, Any]], Mapping[str, Any]]
) -> dict[str, Any]:
    """config.json with a change made to it and to each of these sections."""
    parts = {name: config[name] for name in _NAMES if isinstance(config.get(name), Mapping)}
    return {**change(config), **{key: change_all(part, change) for key, part in parts.items()}}


def find_stated(config: Mapping[str, Any], key: str) -> Any:
    """What config.json states of its language model under a key, None if nothing.

    A value at the top counts before that of a section, as in transformers' multimodal classes.
    """
    parts = (config, *find_subconfigs(config).values())
    return next((part[key] for part in parts if part.get(key) is not None), None)


def are_tied(config: Mapping[str, Any]) -> bool | None:
    """Whether config.json says that the head is the embedding; None where it does not say."""
    tied = find_stated(config, "tie_word_embeddings")
    return None if tied is None else bool(tied)
