"""What a checkpoint holds beside its language model, and `load_model` therefore leaves out.

Only what a rule names is left out, and all of it is listed in the plan's warnings; anything else
that the model has no place for stays an error.
"""

from __future__ import annotations

import dataclasses
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

from jaxwna16.models.config.language_config import LanguageConfig
from loaders.plan import Plan

_PREDICTS = "predicts several tokens at once, generation here is token by token"
# reason -> patterns of the names that such parts have, outermost or in `model`: those of Qwen-VL,
# GLM-V, LLaVA, Mistral 3, Gemma 3, InternVL, Llama 4, Pixtral, Phi-3.5, Kimi-VL; Qwen-Audio, Gemma
# 3n; Qwen-Omni; Qwen3-Next and later, LongCat, MiMo, ERNIE 4.5
BESIDE = {
    "the vision tower": (
        *("visual", "vision_tower", "vision_model", "vision_encoder", "vision_language_adapter"),
        *("vision_embed_tokens", "embed_vision", "image_newline"),
        *("vision_embedder",),
        *("multi_modal_projector", "mm_projector"),
    ),
    "the audio tower": (
        *("audio_tower", "audio_model", "audio_encoder", "audio_projector", "embed_audio"),
    ),
    "what speaks": ("talker", "token2wav", "code2wav"),
    _PREDICTS: (r"mtp(_\w+)?",),
}
_WITHIN = r"(?:(?:thinker|model|language_model)\.)*"
"""What may stand before such names, and before those of layers."""


@dataclasses.dataclass(frozen=True)
class Rule:
    """What is left out: names of modules and tensors that begin so, and why."""

    pattern: re.Pattern[str]
    reason: str


def list_rules(config: LanguageConfig) -> list[Rule]:
    """The rules for a model, which config.json decides where layers are concerned."""
    rules = [
        Rule(re.compile(rf"{_WITHIN}({'|'.join(names)})(\.|$)"), reason)
        for reason, names in BESIDE.items()
    ]
    first, count = config.num_hidden_layers, config.prediction_layers
    if count:
        layers = "|".join(str(first + i) for i in range(count))
        reason = f"past the last of {first} layers: it {_PREDICTS}"
        rules.append(Rule(re.compile(rf"{_WITHIN}layers\.({layers})\."), reason))
    return rules + [
        Rule(re.compile(_WITHIN + pattern), reason) for pattern, reason in config.left_out.items()
    ]


def find_skipped(rules: Iterable[Rule], names: Iterable[str]) -> dict[str, str]:
    """Each name that a rule matches -> the rule's reason."""
    rules = list(rules)
    any_rule = re.compile("|".join(f"(?:{rule.pattern.pattern})" for rule in rules))
    return {
        name: next(rule.reason for rule in rules if rule.pattern.match(name))
        for name in names
        if any_rule.match(name)
    }


def drop_skipped(plan: Plan, config: LanguageConfig) -> Plan:
    """The plan without what the rules name; its warnings say what that was."""
    names = [*plan.quantized, *plan.plain, *plan.stacks]
    skipped = find_skipped(list_rules(config), names)
    if not skipped:
        return plan

    def keep(parts: Mapping[str, Any]) -> dict[str, Any]:
        return {name: part for name, part in parts.items() if name not in skipped}

    return dataclasses.replace(
        plan,
        quantized=keep(plan.quantized),
        plain=keep(plan.plain),
        stacks=keep(plan.stacks),
        warnings=(*plan.warnings, *_describe(plan, skipped)),
    )


def _describe(plan: Plan, skipped: Mapping[str, str]) -> list[str]:
    alike: dict[str, list[str]] = defaultdict(list)
    for name, reason in skipped.items():
        if name not in plan.stacks:
            alike[reason].append(name)
    sentences = []
    parts = {**plan.quantized, **plan.plain}
    for reason, names in alike.items():
        nbytes = sum(parts[name].nbytes for name in names)
        more = f" and {len(names) - 1} more parts" if len(names) > 1 else ""
        sentences.append(f"{names[0]}{more} not loaded ({nbytes:,} bytes): {reason}")
    return sentences
