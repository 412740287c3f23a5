"""Stop strings: a text ends before one, even if the string spans several tokens."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from jaxwna16.errors import InputError
from jaxwna16.generation.streaming.text_stream import TextStream
from jaxwna16.generation.text import Tokenizer


class StoppingText:
    """The text of one row as it comes, up to the stop string that is complete first.

    What `push` and `flush` return is final: the beginning of what may become a stop string is held
    back until it does or cannot any more. Where several stop strings end with the same character,
    the text ends before the longest. It does not matter how the text is divided into tokens.

    Where a text is final only as a whole (`TextStream.is_whole`), stop strings are looked for in
    the text of all tokens so far, whenever one is added.

    Attributes:
      text: all that was returned.
      tokens: how many tokens were taken, at most up to the one that completed a stop string.
      stopped: whether there was a stop string. Everything after it is ignored.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = ()):
        self.text = ""
        self.tokens = 0
        self.stopped = False
        self._stop = sorted(stop, key=len, reverse=True)
        self._stream = TextStream(tokenizer)
        self._held = ""

    def push(self, ids: Iterable[int]) -> str:
        """Take the next tokens and return the text that they make final."""
        new = ""
        for token in ids:
            if self.stopped:
                break
            self.tokens += 1
            text = self._stream.push([token])
            new += self._look() if self._stream.is_whole else self._take(text)
        self.text += new
        return new

    def flush(self) -> str:
        """End the text and return what was held back, unless a stop string ended it before."""
        rest = "" if self.stopped else self._held + self._stream.flush()
        self._held = ""
        self.text += rest
        return rest

    def _look(self) -> str:
        """The text of all tokens so far if a stop string ends it, else ""."""
        if not self._stop:
            return ""
        text = self._stream.read_all()
        ends = [(at + len(s), -len(s)) for s in self._stop if (at := text.find(s)) >= 0]
        self.stopped = bool(ends)
        return text[: sum(min(ends))] if ends else ""

    def _take(self, text: str) -> str:
        if not self._stop:
            return text
        final = ""
        for character in text:
            self._held += character
            for stop in self._stop:
                if self._held.endswith(stop):
                    self.stopped = True
                    return final + self._held[: -len(stop)]
            keep = self._count_kept()
            cut = len(self._held) - keep
            final, self._held = final + self._held[:cut], self._held[cut:]
        return final

    def _count_kept(self) -> int:
        """How many characters at the end of the held text can be the beginning of a stop string."""
        longest = min(len(self._held), len(self._stop[0]) - 1)
        for length in range(longest, 0, -1):
            if any(stop.startswith(self._held[-length:]) for stop in self._stop):
                return length
        return 0


def find_stop_tokens(tokenizer: Tokenizer, stop: Sequence[str]) -> set[int]:
    """The ids of stop strings that are added tokens themselves, as "<|im_end|>": texts omit them.

    Raises:
      InputError: if a stop string is empty, or not a string.
    """
    if strays := [text for text in stop if not isinstance(text, str) or not text]:
        raise InputError(f"stop: expected strings of at least one character, got {strays[0]!r}")
    added = tokenizer.backend.get_added_tokens_decoder().items()
    return {token for token, entry in added if entry.content in stop}
