"""`LanguageConfig`: what every family's configuration says, and the keys all read alike."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from jaxwna16.models.config.config_reader import MAX_COUNT, ConfigReader
from jaxwna16.models.config.moe_config import MoeConfig
from jaxwna16.models.config.rope_config import RopeConfig

MAX_LAYERS = 1000  # each is made, abstractly, before it is looked for in the files
Activations = tuple[str, Mapping[str, str]]
"""The key that states the activation of the MLPs, and its values -> names of activations. The first
is that of an absent key."""
SILU: Activations = ("hidden_act", {"silu": "silu", "swish": "silu"})
GELU_TANH: Activations = ("hidden_activation", {"gelu_pytorch_tanh": "gelu_tanh"})
_DTYPES = ("float32", "bfloat16", "float16")


@dataclasses.dataclass(frozen=True, kw_only=True)
class LanguageConfig:
    """What a language model of any family is; a family's own class adds what only it has.

    Attributes:
      model_type: one of the family's (SmolLM2 calls itself "llama").
      intermediate_size: of the MLPs that are not experts.
      rotary_dim: features of a head that are rotated, from the first on.
      max_position_embeddings: tokens the model was made for; see `max_length`.
      tie_word_embeddings: whether the head is the embedding, so that files need hold none.
      dtype: the dtype the checkpoint says it was saved in, or None.
      eos_token_ids: tokens that end a text, possibly none.
      moe: experts and routing; None in a model without.
      prediction_layers: how many layers may stand past the last in the files, for predicting
        several tokens at once.
      embedding_multiplier: of the rows of the embedding, where they enter the stream.
      residual_multiplier: of what a layer's two parts add to the stream.
      attention_scale: of the scores; None is 1 / sqrt(head_dim).
      attention_softcap, final_softcap: c of scores and of logits c tanh(x / c); None is x itself.
      logit_scale: of the logits.
      activation: of the MLPs, see `pallas_kernels.formulas.activations`.
      is_tie_open: whether a head in the files counts, though embeddings are tied: config.json says
        nothing of the whole.
      media_tokens: keys of config.json and their tokens, which stand for images, videos or sound.
    """

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rotary_dim: int
    max_position_embeddings: int
    rms_norm_eps: float
    tie_word_embeddings: bool
    rope: RopeConfig
    dtype: str | None
    eos_token_ids: tuple[int, ...]
    moe: MoeConfig | None
    prediction_layers: int = 0
    embedding_multiplier: float = 1.0
    residual_multiplier: float = 1.0
    attention_scale: float | None = None
    attention_softcap: float | None = None
    final_softcap: float | None = None
    logit_scale: float = 1.0
    activation: str = "silu"
    is_tie_open: bool = False
    media_tokens: tuple[tuple[str, int], ...] = ()

    @property
    def max_length(self) -> int:
        """Tokens of prompt and answer together: as many as rope is stretched to (as in vLLM)."""
        if self.rope.rope_type in ("linear", "dynamic"):
            return int(self.max_position_embeddings * self.rope.factor)
        if self.rope.rope_type == "yarn":  # the number in config.json is of before or of after it
            stretched = int(self.rope.original_max_positions * self.rope.factor)
            return max(self.max_position_embeddings, stretched)
        return self.max_position_embeddings

    @property
    def length_reason(self) -> str:
        """Why `max_length` is less than what rope reaches; empty where it is not."""
        return ""

    @property
    def widest_features(self) -> int:
        """Features that a layer computes of one token at a time, at most, beside its stream."""
        heads = 2 * (self.num_attention_heads + self.num_key_value_heads)
        counts = [heads * self.head_dim, 3 * self.intermediate_size]
        if self.moe is not None:
            # of each expert: gate and up, their product, and its result
            each = 3 * self.moe.intermediate_size + self.hidden_size
            counts.append(self.moe.routing.top_k * each + 3 * self.moe.shared_intermediate_size)
        return max(counts)

    @property
    def left_out(self) -> Mapping[str, str]:
        """What files may have of layers and no part of the model reads: patterns -> the reason."""
        return {}

    @property
    def whole_prompts(self) -> bool:
        """Whether prompts must be run in one piece: dynamic rope turns all of it by its length."""
        return self.rope.rope_type == "dynamic"


def describe_length(config: LanguageConfig) -> list[str]:
    """A warning about a model that reads less than its rope reaches."""
    reason = config.length_reason
    return [f"rows of at most {config.max_length} tokens are read: {reason}"] if reason else []


def read_activation(reader: ConfigReader, activations: Activations) -> str:
    """The activation of the MLPs, one of the family's."""
    key, names = activations
    default = next(iter(names))
    return names[reader.choose(key, default, tuple(names)) or default]


def refuse_others(reader: ConfigReader) -> None:
    """Refuse what no definition here has: keys of single layers."""
    if layers := reader.config.get("per_layer_config"):
        reader.refuse("per_layer_config", layers, "none")


def read_saved_dtype(reader: ConfigReader) -> str | None:
    """`dtype`, which older checkpoints call `torch_dtype`."""
    return reader.choose("dtype" if reader.config.get("dtype") else "torch_dtype", None, _DTYPES)


def read_eos(reader: ConfigReader) -> tuple[int, ...]:
    """`eos_token_id`, one token or several."""
    value = reader.config.get("eos_token_id", [])
    ids = value if isinstance(value, list) else [value]
    if not all(isinstance(i, int) and 0 <= i < MAX_COUNT for i in ids):
        reader.refuse("eos_token_id", value, "a token or a list of tokens")
    return tuple(ids)
