"""Text that is printed while its tokens are generated: what is final, as soon as it is."""

from __future__ import annotations

import codecs
import functools
import json
import re
from collections.abc import Iterable
from typing import Any

from jaxwna16.generation.text import Tokenizer

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2}|\+[0-9A-Fa-f])>")
_SPACE = {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}
_STRIP = {"type": "Strip", "content": " ", "start": 1, "stop": 0}


class TextStream:
    """Turns ids into text as they come: what it returns is final and never half a character.

    All that `push` and `flush` return, joined, equals `Tokenizer.decode` of all the ids.

    With the decoders of language models, a token stands for the same bytes wherever it stands. Only
    the first can lose a leading space, and a run of byte tokens (`<0xE2>`, in SentencePiece
    vocabularies) becomes text or U+FFFD as a whole, when it ends. So an id costs one look-up. With
    any other decoder nothing is final before the end, so that all of the text comes with `flush`.

    Attributes:
      is_whole: whether that is so.
    """

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool = True):
        self._tokenizer = tokenizer
        self._skip_special_tokens = skip_special_tokens
        stages = _list_stages(tokenizer)
        self._kinds = {stage["type"] for stage in stages}
        self.is_whole = not _is_streamable(stages)
        self._pieces: dict[int, bytes | None] = {}
        self._reset()

    def push(self, ids: Iterable[int]) -> str:
        """Take the next ids and return the text that they complete: often a word, sometimes ""."""
        if self.is_whole:
            self._ids += ids
            return ""
        return self._finish(b"".join(map(self._take, ids)))

    def flush(self) -> str:
        """End the text and return its rest. A new text may follow."""
        if self.is_whole:
            rest = self.read_all()
        else:
            rest = self._finish(self._end_run(), final=True)
        self._reset()
        return rest

    def read_all(self) -> str:
        """The text of all ids so far, of a stream that `is_whole`."""
        return self._tokenizer.decode(self._ids, self._skip_special_tokens)

    def _reset(self) -> None:
        self._ids: list[int] = []
        self._run: list[int] = []
        self._begun = False
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def _finish(self, content: bytes, *, final: bool = False) -> str:
        text = self._utf8.decode(content, final)
        if "Strip" in self._kinds and text and not self._begun:
            self._begun = True
            text = text.removeprefix(" ")
        return text

    def _take(self, token: int) -> bytes:
        if token not in self._pieces:
            self._pieces[token] = self._find_piece(token)
        piece = self._pieces[token]
        if piece is None:
            return b""
        if "ByteFallback" in self._kinds and (byte := self._read_byte(token)) is not None:
            self._run.append(byte)
            return b""
        if "Strip" not in self._kinds and "ByteLevel" not in self._kinds and not self._begun:
            self._begun = True
            piece = self._decode(token).encode()  # without the space that decoders drop there
        return self._end_run() + piece

    def _end_run(self) -> bytes:
        """The text of the byte tokens since the last other token."""
        run, self._run = bytes(self._run), []
        try:
            run.decode()
        except UnicodeDecodeError:
            return "\ufffd".encode() * len(run)
        return run

    def _find_piece(self, token: int) -> bytes | None:
        """The bytes of a token that stands behind another one; None if it is left out."""
        name = self._tokenizer.backend.id_to_token(token)
        twice = self._decode(token, token)
        if name is None or (name and not twice):  # an id without a token, or one that is skipped
            return None
        if "ByteLevel" in self._kinds:
            return _read_byte_level(name)
        return twice[len(self._decode(token)) :].encode()

    def _read_byte(self, token: int) -> int | None:
        match = _BYTE_TOKEN.fullmatch(self._tokenizer.backend.id_to_token(token) or "")
        return int(match[1], 16) if match else None

    def _decode(self, *ids: int) -> str:
        return self._tokenizer.decode(ids, self._skip_special_tokens)


def _list_stages(tokenizer: Tokenizer) -> list[dict[str, Any]]:
    """The stages of the decoder, as JSON describes them."""
    state = tokenizer.describe_decoder()
    if state is None:
        return []
    stage = json.loads(state)
    return stage.get("decoders", [stage])


def _is_streamable(stages: list[dict[str, Any]]) -> bool:
    """Whether each token has its own bytes, whatever stands around it."""
    match stages:
        case [] | [{"type": "ByteLevel" | "WordPiece" | "Metaspace" | "Fuse" | "ByteFallback"}]:
            return True
        case [*replacements, {"type": "ByteFallback"}, {"type": "Fuse"}]:
            return all(stage == _SPACE for stage in replacements)
        case [*replacements, {"type": "ByteFallback"}, {"type": "Fuse"}, strip]:
            return strip == _STRIP and all(stage == _SPACE for stage in replacements)
    return False


@functools.cache
def _byte_level_alphabet() -> dict[str, int]:
    """GPT-2's alphabet of bytes: printable Latin-1 is itself, the others are U+0100, U+0101, …"""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = sorted(set(range(256)) - set(printable))
    return {chr(byte): byte for byte in printable} | {
        chr(0x100 + index): byte for index, byte in enumerate(others)
    }


def _read_byte_level(token: str) -> bytes:
    alphabet = _byte_level_alphabet()
    if all(character in alphabet for character in token):
        return bytes(alphabet[character] for character in token)
    return token.encode()  # an added token is written as it is
