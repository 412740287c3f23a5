"""The families of models: which `model_type` has which configuration, definition and names.

A family is a row of `FAMILIES` and files of its own; docs/models.md shows how one is added. The
configurations are read without flax, so that `inspect` stays quick; definitions are imported when a
model is made.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
from collections.abc import Callable, Mapping
from typing import Any

from jaxwna16.errors import ModelError
from jaxwna16.models.cohere import config as cohere_config
from jaxwna16.models.config.config_reader import ConfigReader
from jaxwna16.models.config.fused import ListFused, fuse_nothing
from jaxwna16.models.config.language_config import LanguageConfig
from jaxwna16.models.deepseek import config as deepseek_config
from jaxwna16.models.gemma import config as gemma_config
from jaxwna16.models.gemma4 import config as gemma4_config
from jaxwna16.models.glm4 import config as glm4_config
from jaxwna16.models.llama import config as llama_config
from jaxwna16.models.llama import names as llama_names
from jaxwna16.models.llama.relatives import PARTS, RELATIVES
from jaxwna16.models.nearest import describe_unsupported
from jaxwna16.models.olmo2 import config as olmo2_config
from jaxwna16.models.qwen3_5 import config as qwen3_5_config
from jaxwna16.models.qwen3_5 import names as qwen3_5_names
from jaxwna16.models.wrapped.table import WRAPPERS
from jaxwna16.models.wrapped.wrapper import Wrapper, find_text

Names = Mapping[str, str]
"""Parts of names as regular expressions -> what stands there in the model; see `rename`."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Family:
    """A definition that serves several values of `model_type`.

    Attributes:
      model_types: those values. In a section of a config.json they may stand, too
        (`jaxwna16.models.wrapped`).
      read: makes the configuration of a config.json with such a value.
      model: the definition, "module:Class". The class is called as
        `Class(config, specs, dtype=, backend=, reordered=, has_head=)` and makes a language model.
      names: how names in files differ from attribute paths of the definition.
      list_fused: which modules of the files are several modules of the definition.
    """

    model_types: tuple[str, ...]
    read: Callable[[Mapping[str, Any]], LanguageConfig]
    model: str
    names: Names = dataclasses.field(default_factory=dict)
    list_fused: ListFused = fuse_nothing

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
        list_fused=llama_names.list_fused,
    ),
    Family(
        model_types=tuple(qwen3_5_config.KINDS),
        read=qwen3_5_config.Qwen35Config.from_dict,
        model="jaxwna16.models.qwen3_5.definition:Qwen35",
        list_fused=qwen3_5_names.list_fused,
    ),
    Family(
        model_types=("olmo2", "olmo3"),
        read=olmo2_config.Olmo2Config.from_dict,
        model="jaxwna16.models.olmo2.definition:Olmo2",
    ),
    Family(
        model_types=tuple(gemma_config.KINDS),
        read=gemma_config.GemmaConfig.from_dict,
        model="jaxwna16.models.gemma.definition:Gemma",
    ),
    Family(
        model_types=tuple(gemma4_config.KINDS),
        read=gemma4_config.Gemma4Config.from_dict,
        model="jaxwna16.models.gemma4.definition:Gemma4",
        names={r"(layers\.\d+)\.moe\.": r"\1."},
    ),
    Family(
        model_types=tuple(glm4_config.KINDS),
        read=glm4_config.Glm4Config.from_dict,
        model="jaxwna16.models.glm4.definition:Glm4",
        list_fused=glm4_config.list_fused,
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
    Family(
        model_types=tuple(deepseek_config.KINDS),
        read=deepseek_config.DeepseekConfig.from_dict,
        model="jaxwna16.models.deepseek.definition:Deepseek",
        list_fused=deepseek_config.list_fused,
    ),
)
TEXT_TYPES = tuple(name for family in FAMILIES for name in family.model_types)
MODEL_TYPES = (*(name for name in TEXT_TYPES if name not in PARTS | glm4_config.PARTS), *WRAPPERS)


def find_family(config: Mapping[str, Any]) -> Family:
    """The family that a config.json is of.

    Of a text model inside of a whole it is the text model's, with the names that it has there.

    Raises:
      ModelError: if there is none.
    """
    reader = ConfigReader(config)
    model_type = reader.choose("model_type", None, MODEL_TYPES, required=True)
    if model_type is None:
        reads = {name: family.read for family in FAMILIES for name in family.model_types}
        reasons = [*reader.reasons, *describe_unsupported(config, reads)]
        raise ModelError("this model is not supported", reasons)
    if model_type not in WRAPPERS:
        return _find_own(model_type)
    wrapper = WRAPPERS[model_type]
    family = _find_own(find_text(config, wrapper).text["model_type"])
    return dataclasses.replace(
        family,
        read=functools.partial(_read_inside, wrapper=wrapper, read=family.read),
        names={**wrapper.names, **family.names},
    )


def _find_own(model_type: str) -> Family:
    return next(family for family in FAMILIES if model_type in family.model_types)


def _read_inside(
    config: Mapping[str, Any], *, wrapper: Wrapper, read: Callable[..., LanguageConfig]
) -> LanguageConfig:
    """The configuration of the text model inside of a whole."""
    found = find_text(config, wrapper)
    return dataclasses.replace(read(found.text), **found.beside)


def parse_config(config: Mapping[str, Any]) -> LanguageConfig:
    """What a config.json says of its language model.

    Raises:
      ModelError: if no family is its own, or listing every key that asks for the unsupported.
    """
    return find_family(config).read(config)
