"""`LanguageConfig`: what is asked of a configuration, whatever family it is of."""

from __future__ import annotations

from typing import Protocol


class LanguageConfig(Protocol):
    """What `load_model`, generation and the command line need to know of a model.

    Attributes:
      max_length: tokens of prompt and answer together that the model was made for.
      whole_prompts: whether a prompt must be run in one piece: its length changes all of it.
      tie_word_embeddings: whether the head is the embedding, so that files need hold none.
      dtype: the dtype the checkpoint says it was saved in, or None.
      eos_token_ids: tokens that end a text, possibly none.
      prediction_layers: how many layers may stand past the last in the files, for predicting
        several tokens at once.
    """

    @property
    def model_type(self) -> str: ...
    @property
    def vocab_size(self) -> int: ...
    @property
    def num_hidden_layers(self) -> int: ...
    @property
    def max_length(self) -> int: ...
    @property
    def whole_prompts(self) -> bool: ...
    @property
    def tie_word_embeddings(self) -> bool: ...
    @property
    def dtype(self) -> str | None: ...
    @property
    def eos_token_ids(self) -> tuple[int, ...]: ...
    @property
    def prediction_layers(self) -> int: ...
