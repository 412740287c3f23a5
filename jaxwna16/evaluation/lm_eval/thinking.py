"""Models that think before they answer: the answer is what follows the end of the thinking."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lm_eval.models.utils import postprocess_generated_text

from jaxwna16.errors import InputError
from jaxwna16.evaluation.lm_eval.options import read_number
from jaxwna16.generation.text import Tokenizer

End = str | int | None
"""What ends the thinking: a text, a token, or nothing, which is a model that does not think."""


def read_end(value: Any, enabled: bool | None, tokenizer: Tokenizer, vocab_size: int) -> End:
    """Read `think_end_token`; the text of a special token, which texts omit, is that token.

    Raises:
      InputError: if it is neither a text nor a token, or missing where thinking is enabled.
    """
    if value is None and enabled:
        raise InputError(
            "model_args: enable_thinking=True needs think_end_token= as well, the text or the "
            "token that ends the thinking (</think>): the answer begins after it"
        )
    if value is None or (isinstance(value, str) and value and not value.isdecimal()):
        special = tokenizer.backend.get_added_tokens_decoder().items()
        ids = [token for token, entry in special if entry.special and entry.content == value]
        return ids[0] if ids else value
    return read_number("think_end_token", value, 0, vocab_size - 1)


def cut_answer(
    tokenizer: Tokenizer, tokens: Sequence[int], end: str | int, stop: Sequence[str]
) -> str:
    """The text after the last end of the thinking, or all of it, up to the first stop string.

    As the harness's models do it: space before the answer is dropped.
    """
    if isinstance(end, str):
        return postprocess_generated_text(tokenizer.decode(tokens), list(stop), end)
    ends = [place for place, token in enumerate(tokens) if token == end]
    answer = tokenizer.decode(tokens[ends[-1] + 1 :] if ends else tokens)
    return postprocess_generated_text(answer.lstrip(), list(stop), None)
