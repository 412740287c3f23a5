"""Text in and out: a checkpoint's tokenizer, and text that is printed while it is generated.

The vocabulary is read by the package `tokenizers`, chat templates are rendered by `jinja2`; both
come with the extra `text` and are imported when first needed. No code of a checkpoint is executed.
"""

from __future__ import annotations

import codecs
import dataclasses
import functools
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxwna16.errors import InputError
from jaxwna16.extras import import_extra
from jaxwna16.generation.chat_template import (
    copy_messages,
    cut_at_mark,
    mark_end,
    read_chat_templates,
    render_chat_template,
)
from loaders.files.small_files import (
    CONFIG,
    GENERATION,
    SPECIAL_TOKENS,
    TOKENIZER,
    TOKENIZER_SETTINGS,
    is_there,
    read_bytes,
    read_settings,
)

if TYPE_CHECKING:
    import tokenizers

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_FLAGS = ("lstrip", "rstrip", "single_word", "normalized")
_CONFIGS_WITH_EOS = (GENERATION, CONFIG, TOKENIZER_SETTINGS)


@dataclasses.dataclass(frozen=True, eq=False)
class Tokenizer:
    """The tokenizer of one checkpoint; make one with `Tokenizer.from_folder`.

    Attributes:
      backend: the vocabulary and its rules, of the package `tokenizers`.
      stop_tokens: ids that end an answer: every `eos_token_id` of generation_config.json,
        config.json and tokenizer_config.json, and the `eos_token` by name.
      special_tokens: `bos_token`, `eos_token`, … by name, as the chat template sees them.
      chat_templates: Jinja sources by name; "default" is the one that is used.
      source: what errors call this tokenizer, its folder.

    Example:
      ```python
      tokenizer = jaxwna16.Tokenizer.from_folder("path/to/checkpoint")
      ids = tokenizer.encode("Hello")
      assert tokenizer.decode(ids) == "Hello"
      ```
    """

    backend: tokenizers.Tokenizer
    stop_tokens: frozenset[int]
    special_tokens: Mapping[str, str]
    chat_templates: Mapping[str, str]
    source: str

    @classmethod
    def from_folder(cls, path: str | Path, *, follow_links: bool = False) -> Tokenizer:
        """Read tokenizer.json and, where they exist, the files beside it.

        As in transformers, chat_template.jinja goes before the `chat_template` of
        tokenizer_config.json, special_tokens_map.json counts only if that config has no
        `added_tokens_decoder`, and truncation and padding in tokenizer.json are switched off,
        and what these files name a special token is one. Unlike there, one that is not in the
        vocabulary is not added to it: the model has no embedding of it.

        Args:
          path: the folder.
          follow_links: as in `load_checkpoint`.

        Raises:
          CheckpointError: if a file cannot be read, is too large or no JSON, or is a link that
            leaves the folder.
          InputError: if there is no tokenizer.json, a file is not what its name says, or the files
            contradict each other; or if the extra `text` is not installed.
        """
        folder = Path(path)
        read = functools.partial(read_settings, folder, follow_links=follow_links)
        backend = _read_backend(folder, follow_links)
        config = read(TOKENIZER_SETTINGS)
        if "added_tokens_decoder" in config:
            _add_tokens(backend, config["added_tokens_decoder"], folder / TOKENIZER_SETTINGS)
            named = config
        else:
            named = {**config, **read(SPECIAL_TOKENS)}
        if isinstance(extra := named.get("extra_special_tokens"), dict):
            named = {**named, **extra}
        special_tokens = {
            name: text
            for name, token in named.items()
            if name.endswith("_token") and (text := _read_token(token)) is not None
        }
        _add_special_tokens(backend, named)
        stop_tokens = {
            i for name in _CONFIGS_WITH_EOS for i in _read_eos_ids(folder / name, read(name))
        }
        # A token that is not in the vocabulary is never generated, so it stops nothing either.
        if (eos := backend.token_to_id(special_tokens.get("eos_token", ""))) is not None:
            stop_tokens.add(eos)
        return cls(
            backend=backend,
            stop_tokens=frozenset(stop_tokens),
            special_tokens=special_tokens,
            chat_templates=read_chat_templates(folder, config, follow_links=follow_links),
            source=str(folder),
        )

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Turn text into ids; `add_special_tokens` adds what tokenizer.json says, usually a BOS.

        A special token written out in the text, as "<|im_end|>", becomes that token.

        Raises:
          InputError: if the text has unpaired surrogates, as an argument that is not UTF-8 has.
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise InputError(f"the text is not valid Unicode at character {error.start}") from error
        return self.backend.encode(text, add_special_tokens=add_special_tokens).ids

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = True) -> str:
        """Turn ids into text; ids without a token (a padded vocabulary has them) yield nothing.

        Bytes that are not UTF-8 become U+FFFD. Spaces stay as the tokenizer's decoder writes them.
        """
        return self.backend.decode(list(ids), skip_special_tokens=skip_special_tokens)

    def find_special(self, name: str) -> int | None:
        """The id of "bos_token", "eos_token", …; None if it has no name or no id."""
        return self.backend.token_to_id(self.special_tokens.get(name, ""))

    @property
    def has_chat_template(self) -> bool:
        """Whether `render_chat` has a template to work with."""
        return "default" in self.chat_templates

    def render_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool = True,
        *,
        continue_final_message: bool = False,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """Write a conversation as the one text that the model was trained to read.

        Args:
          messages: [{"role": "user", "content": "…"}, …], plain JSON values. Which roles there are,
            and in which order, is the template's own business.
          add_generation_prompt: whether to end with the beginning of the assistant's answer.
          continue_final_message: whether to end with the text of the last message, for the model to
            go on with; without `add_generation_prompt`.
          variables: what else the template is to see, as {"enable_thinking": False}.

        Raises:
          InputError: if there is no template, it is broken or refuses the messages, or a message is
            not of this form; or if the last message cannot be continued.
        """
        plain = copy_messages(messages)
        if not continue_final_message:
            return self._render(plain, add_generation_prompt, variables)
        if add_generation_prompt:
            raise InputError(
                "continue_final_message leaves the last message open, so that no answer begins: "
                "pass add_generation_prompt=False"
            )
        text = mark_end(plain[-1])
        chat = self._render(plain, False, variables)
        try:
            return cut_at_mark(chat, text)
        except InputError as error:
            raise InputError(f"{self.source}: {error}") from error

    def _render(
        self,
        plain: list[dict[str, Any]],
        add_generation_prompt: bool,
        variables: Mapping[str, Any] | None,
    ) -> str:
        given = {"messages": plain, "add_generation_prompt": add_generation_prompt}
        seen = {**self.special_tokens, "tools": None, "documents": None, **(variables or {})}
        try:
            return render_chat_template(self._template, seen | given)
        except InputError as error:
            raise InputError(f"{self.source}: {error}") from error

    def encode_chat(
        self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True
    ) -> list[int]:
        """`render_chat` as ids. The template writes its own BOS, so none is added to it."""
        text = self.render_chat(messages, add_generation_prompt)
        return self.encode(text, add_special_tokens=False)

    @property
    def _template(self) -> str:
        if self.has_chat_template:
            return self.chat_templates["default"]
        named = f" (only {', '.join(self.chat_templates)})" if self.chat_templates else ""
        raise InputError(
            f"no chat template{named}, neither chat_template.jinja nor `chat_template` in "
            "tokenizer_config.json: give a plain prompt instead"
        )


class TextStream:
    """Turns ids into text as they come: what it returns is final and never half a character.

    All that `push` and `flush` return, joined, equals `Tokenizer.decode` of all the ids. There is
    one exception: of a malformed run of byte tokens (`<0xE2>`, in SentencePiece vocabularies)
    `decode` replaces the whole run, a stream only the malformed bytes: it cannot take text back.

    A token stands for the same bytes wherever it stands, except that the first can lose a leading
    space. So an id costs one look-up, and one incremental UTF-8 decoder holds the incomplete rest.
    """

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool = True):
        self._tokenizer = tokenizer
        self._skip_special_tokens = skip_special_tokens
        self._stages = _list_decoder_stages(tokenizer.backend)
        self._pieces: dict[int, bytes] = {}
        self._started = False
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, ids: Iterable[int]) -> str:
        """Take the next ids and return the text that they complete: often a word, sometimes ""."""
        return self._utf8.decode(b"".join(map(self._take, ids)))

    def flush(self) -> str:
        """End the text: U+FFFD if it stops inside a character, else "". A new text may follow."""
        self._started = False
        rest = self._utf8.decode(b"", final=True)
        self._utf8.reset()
        return rest

    def _take(self, token: int) -> bytes:
        if token not in self._pieces:
            self._pieces[token] = self._find_piece(token)
        piece = self._pieces[token]
        if not piece or self._started:
            return piece
        self._started = True
        first = self._decode(
            token
        ).encode()  # without the space that decoders drop at the beginning
        return first if piece.endswith(first) else piece  # unless it is cut out of a character

    def _find_piece(self, token: int) -> bytes:
        """The bytes of a token that stands behind another one."""
        twice = self._decode(token, token)
        name = self._tokenizer.backend.id_to_token(token)
        if not twice or name is None:  # a special token that is skipped, or an id without a token
            return b""
        if "ByteLevel" in self._stages:
            return _read_byte_level(name)
        if "ByteFallback" in self._stages and (match := _BYTE_TOKEN.fullmatch(name)):
            return bytes.fromhex(match[1])
        return twice[len(self._decode(token)) :].encode()

    def _decode(self, *ids: int) -> str:
        return self._tokenizer.decode(ids, self._skip_special_tokens)


def _read_backend(folder: Path, follow_links: bool) -> tokenizers.Tokenizer:
    package, path = import_extra("tokenizers", "text"), folder / TOKENIZER
    if not is_there(folder, TOKENIZER):
        raise InputError(f"{path}: no such file, so there is no tokenizer in {folder}")
    content = read_bytes(folder, TOKENIZER, follow_links=follow_links)
    try:
        backend = package.Tokenizer.from_buffer(content)
    except Exception as error:  # tokenizers raises a bare Exception, whatever it is
        raise InputError(f"{path}: not a tokenizer: {error}") from error
    backend.no_truncation()
    backend.no_padding()
    return backend


def _add_tokens(backend: tokenizers.Tokenizer, added: Any, path: Path) -> None:
    """Add the tokens that only tokenizer_config.json has, under the ids it gives them."""
    package = import_extra("tokenizers", "text")
    try:
        tokens = {int(index): package.AddedToken(**added[index]) for index in added}
    except (TypeError, ValueError) as error:
        raise InputError(f"{path}: `added_tokens_decoder` is malformed: {error}") from error
    backend.add_tokens([tokens[index] for index in sorted(tokens)])
    wrong = [
        f"{token.content!r} is {backend.token_to_id(token.content)}, not {index}"
        for index, token in sorted(tokens.items())
        if backend.token_to_id(token.content) != index
    ]
    if wrong:
        raise InputError(
            f"{path}: `added_tokens_decoder` contradicts tokenizer.json, where {'; '.join(wrong)}"
        )


def _add_special_tokens(backend: tokenizers.Tokenizer, named: Mapping[str, Any]) -> None:
    """Make special what is named so and is no more than a word of the vocabulary."""
    package = import_extra("tokenizers", "text")
    extra = named.get("extra_special_tokens") or named.get("additional_special_tokens")
    tokens = [token for name, token in named.items() if name.endswith("_token")]
    tokens += extra if isinstance(extra, list) else []
    added = {token.content for token in backend.get_added_tokens_decoder().values()}
    for token in tokens:
        text = _read_token(token)
        if text is None or text in added or backend.token_to_id(text) is None:
            continue
        flags = {n: bool(token[n]) for n in _FLAGS if n in token} if isinstance(token, dict) else {}
        backend.add_special_tokens([package.AddedToken(text, special=True, **flags)])


def _read_eos_ids(path: Path, settings: Mapping[str, Any]) -> list[int]:
    found = settings.get("eos_token_id")
    ids = found if isinstance(found, list) else [] if found is None else [found]
    if not all(type(token) is int and token >= 0 for token in ids):
        raise InputError(f"{path}: `eos_token_id` must be an id or a list of ids, found {found!r}")
    return ids


def _read_token(token: Any) -> str | None:
    """The text of a token written as a string or as {"content": string, …}."""
    text = token.get("content") if isinstance(token, dict) else token
    return text if isinstance(text, str) else None


def _list_decoder_stages(backend: tokenizers.Tokenizer) -> frozenset[str]:
    """Names of the decoder's stages, as "ByteLevel"; its pickled state is its JSON."""
    if backend.decoder is None:
        return frozenset()
    state = json.loads(backend.decoder.__getstate__())
    return frozenset(stage["type"] for stage in state.get("decoders", [state]))


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
