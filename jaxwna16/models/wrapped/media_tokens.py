"""Tokens that stand for images, videos or sound: a model without its towers cannot read them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from jaxwna16.errors import InputError
from jaxwna16.models.config.language_config import LanguageConfig


def list_media_faults(config: LanguageConfig, rows: Mapping[str, Iterable[Any]]) -> Iterator[str]:
    """A line for each row of tokens with one that stands for something else than text.

    Args:
      config: of the model that is to read them.
      rows: how a line calls each row -> its tokens; what is no integer is passed over.
    """
    keys = {token: key for key, token in config.media_tokens}
    for name, row in rows.items() if keys else ():
        places = [
            (place, int(token))
            for place, token in enumerate(row)
            if isinstance(token, int | np.integer) and int(token) in keys
        ]
        if places:
            place, token = places[0]
            more = f" and {len(places) - 1} more places" if len(places) > 1 else ""
            yield (
                f"{name}: token {token} at place {place}{more} stands for what a tower sees or "
                f"hears ({keys[token]} in config.json), and load_model has the text model alone: "
                "give text without it"
            )


def refuse_media(model: Any, rows: Mapping[str, Iterable[Any]]) -> None:
    """Raise an `InputError` for such tokens; of a model without a configuration nothing is known.

    Args:
      model: a `CausalLM`, or anything that maps tokens to logits.
      rows: as in `list_media_faults`.
    """
    config = getattr(model, "config", None)
    if isinstance(config, LanguageConfig) and (faults := list(list_media_faults(config, rows))):
        raise InputError("the tokens are not of text alone", faults)
