"""The families of models: which `model_type` has which configuration, definition and names.

A family is a row of `FAMILIES` and files of its own; docs/models.md shows how one is added. The
configurations are read without flax, so that `inspect` stays quick; definitions are imported when a
model is made.
"""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable, Mapping
from typing import Any

from jaxwna16.errors import ModelError
from jaxwna16.models.cohere import config as cohere_config
from jaxwna16.models.config.config_reader import ConfigReader
from jaxwna16.models.config.language_config import LanguageConfig
from jaxwna16.models.llama import config as llama_config
from jaxwna16.models.llama import names as llama_names
from jaxwna16.models.llama.relatives import RELATIVES
from jaxwna16.models.nearest import describe_unsupported
from jaxwna16.models.olmo2 import config as olmo2_config
from jaxwna16.models.qwen3_5 import config as qwen3_5_config
from jaxwna16.models.qwen3_5 import names as qwen3_5_names

Names = Mapping[str, str]
"""Parts of names as regular expressions -> what stands there in the model; see `rename`."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Family:
    """A definition that serves several values of `model_type`.

    Attributes:
      model_types: those values.
      read: makes the configuration of a config.json with such a value.
      model: the definition, "module:Class". The class is called as
        `Class(config, specs, dtype=, backend=, reordered=)` and makes a language model.
      names: how names in files differ from attribute paths of the definition.
    """

    model_types: tuple[str, ...]
    read: Callable[[Mapping[str, Any]], LanguageConfig]
    model: str
    names: Names = dataclasses.field(default_factory=dict)

    def open_class(self) -> Callable[..., Any]:
        """The class of the definition."""
        module, _, name = self.model.partition(":")
        return getattr(importlib.import_module(module), name)


FAMILIES = (
    Family(
        model_types=tuple(RELATIVES),
        read=llama_config.LlamaConfig.from_dict,
        model="jaxwna16.models.llama.definition:Llama",
        names=llama_names.NAMES,
    ),
    Family(
        model_types=tuple(qwen3_5_config.KINDS),
        read=qwen3_5_config.Qwen35Config.from_dict,
        model="jaxwna16.models.qwen3_5.definition:Qwen35",
        names=qwen3_5_names.NAMES,
    ),
    Family(
        model_types=("olmo2", "olmo3"),
        read=olmo2_config.Olmo2Config.from_dict,
        model="jaxwna16.models.olmo2.definition:Olmo2",
    ),
    Family(
        model_types=("exaone4",),
        read=olmo2_config.Olmo2Config.from_dict,
        model="jaxwna16.models.olmo2.definition:Exaone4",
    ),
    Family(
        model_types=tuple(cohere_config.KINDS),
        read=cohere_config.CohereConfig.from_dict,
        model="jaxwna16.models.cohere.definition:Cohere",
    ),
)
MODEL_TYPES = tuple(name for family in FAMILIES for name in family.model_types)


def find_family(config: Mapping[str, Any]) -> Family:
    """The family that a config.json is of.

    Raises:
      ModelError: if there is none.
    """
    reader = ConfigReader(config)
    model_type = reader.choose("model_type", None, MODEL_TYPES, required=True)
    if model_type is None:
        reads = {name: family.read for family in FAMILIES for name in family.model_types}
        reasons = [*reader.reasons, *describe_unsupported(config, reads)]
        raise ModelError("this model is not supported", reasons)
    return next(family for family in FAMILIES if model_type in family.model_types)


def parse_config(config: Mapping[str, Any]) -> LanguageConfig:
    """What a config.json says of its language model.

    Raises:
      ModelError: if no family is its own, or listing every key that asks for the unsupported.
    """
    return find_family(config).read(config)
