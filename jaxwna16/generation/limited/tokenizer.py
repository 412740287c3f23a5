"""A tokenizer in a process with limits, with the methods of `tokenizers.Tokenizer` that we use."""

from __future__ import annotations

import binascii
import contextlib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from jaxwna16.errors import InputError
from jaxwna16.extras import import_extra
from jaxwna16.generation.limited.child import Child

if TYPE_CHECKING:
    import tokenizers

SECONDS = 5
"""Of computing for one call, and one more for each 100,000 characters or tokens."""
DECODE_SECONDS = 1
"""The same of turning tokens into text, which may be asked for after each of them."""
_MEGABYTES = 2048
_PER_SECOND = 100_000


class Encoded(NamedTuple):
    """Ids of a text, and where in it each begins and ends."""

    ids: list[int]
    offsets: list[tuple[int, int]]


class LimitedTokenizer:
    """A tokenizer of which not every stage is known (`known_stages`).

    Every method raises an InputError if the tokenizer fails or meets a limit.

    Args:
      content: of a tokenizer.json.
      fault: what errors call it if it is none.
      source: what they call its folder otherwise.

    Attributes:
      prepared: what `tokenizer_calls.prepare` returns.
    """

    def __init__(self, content: bytes, fault: str, source: str):
        self._source = f"{source}: the tokenizer fails"
        self._child = Child("jaxwna16.generation.limited.tokenizer_calls", _MEGABYTES)
        text = binascii.b2a_base64(content, newline=False).decode()
        seconds = SECONDS + len(content) // _PER_SECOND
        with refuse_failures(fault):
            self.prepared = self._child.set_up("open_tokenizer", text, seconds=seconds)

    def encode(self, text: str, add_special_tokens: bool = True) -> Encoded:
        ids, offsets = self._call(len(text), "encode", text, add_special_tokens)
        return Encoded(ids, [(start, end) for start, end in offsets])

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        numbers, seconds = list(ids), DECODE_SECONDS + len(ids) // _PER_SECOND
        with refuse_failures(self._source):
            return self._child.call("decode", numbers, skip_special_tokens, seconds=seconds)

    def token_to_id(self, token: str) -> int | None:
        return self._call(0, "token_to_id", token)

    def tokens_to_ids(self, tokens: Sequence[str]) -> list[int | None]:
        return self._call(len(tokens), "tokens_to_ids", list(tokens))

    def id_to_token(self, id: int) -> str | None:
        return self._call(0, "id_to_token", id)

    def get_vocab(self) -> dict[str, int]:
        return dict(self._call(0, "list_vocabulary"))

    def get_added_tokens_decoder(self) -> dict[int, tokenizers.AddedToken]:
        package = import_extra("tokenizers", "text")
        found = self._call(0, "list_added_tokens")
        return {index: package.AddedToken(**state) for index, state in found}

    def add_tokens(self, tokens: Sequence[tokenizers.AddedToken]) -> int:
        states = [token.__getstate__() for token in tokens]
        with refuse_failures(self._source):
            return self._child.set_up("add_tokens", states, seconds=SECONDS)

    def _call(self, size: int, name: str, *arguments: Any) -> Any:
        with refuse_failures(self._source):
            return self._child.call(name, *arguments, seconds=SECONDS + size // _PER_SECOND)


@contextlib.contextmanager
def refuse_failures(source: str) -> Iterator[None]:
    """Turn whatever a tokenizer raises into an InputError that says where it comes from.

    The package `tokenizers` raises bare Exceptions, and lets panics of Rust out, which are none.
    """
    try:
        yield
    except InputError:
        raise
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__module__ != "pyo3_runtime":
            raise
        raise InputError(f"{source}: {str(error)[:1000] or type(error).__name__}") from error
