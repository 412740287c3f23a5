"""Settings of generation_config.json that are not applied: they are named, as they change texts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from loaders.files.small_files import GENERATION, read_settings

_IDLE: dict[str, tuple[Any, ...]] = {
    "bad_words_ids": (),
    "begin_suppress_tokens": (),
    "encoder_no_repeat_ngram_size": (0,),
    "encoder_repetition_penalty": (1,),
    "exponential_decay_length_penalty": (),
    "forced_bos_token_id": (),
    "forced_eos_token_id": (),
    "guidance_scale": (1,),
    "max_time": (),
    "min_length": (0,),
    "min_new_tokens": (0,),
    "no_repeat_ngram_size": (0,),
    "num_beams": (1,),
    "repetition_penalty": (1,),
    "sequence_bias": (),
    "stop_strings": (),
    "suppress_tokens": (),
    "token_healing": (False,),
    "watermarking_config": (),
}
"""Settings that change greedy texts of transformers, with the values that change nothing; null and
empty values never do. Settings of sampling are arguments of `generate`."""


def describe_unapplied(folder: Path, *, follow_links: bool = False) -> tuple[str, ...]:
    """Name the settings of a checkpoint's generation_config.json that would change greedy texts.

    Returns:
      One sentence, or none.

    Raises:
      CheckpointError: if the file cannot be read, or is not a JSON object.
    """
    found = read_settings(folder, GENERATION, follow_links=follow_links)
    settings = [
        f"{name} {json.dumps(found[name])[:60]}"
        for name, idle in _IDLE.items()
        if found.get(name) not in (None, [], {}, *idle)
    ]
    if not settings:
        return ()
    verb = "is" if len(settings) == 1 else "are"
    return (
        f"{GENERATION}: {', '.join(settings)} {verb} not applied, so that texts can differ from "
        "those of transformers",
    )
