"""Text in and out: a checkpoint's tokenizer.

The vocabulary is read by the package `tokenizers`, chat templates are rendered by `jinja2`; both
come with the extra `text` and are imported when first needed. No code of a checkpoint is executed,
and what its files make these packages do has limits (`jaxwna16.generation.limited`).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxwna16.errors import InputError
from jaxwna16.generation.chat_template import (
    copy_messages,
    cut_at_mark,
    mark_end,
    read_chat_templates,
    render_chat_template,
)
from jaxwna16.generation.limited.lengths import check_length
from jaxwna16.generation.limited.tokenizer import LimitedTokenizer, refuse_failures
from jaxwna16.generation.tokenizer_files import (
    add_special_tokens,
    add_tokens,
    find_id,
    open_backend,
    read_eos_ids,
    read_token,
)
from loaders.files.small_files import (
    CONFIG,
    GENERATION,
    SPECIAL_TOKENS,
    TOKENIZER_SETTINGS,
    read_settings,
)

if TYPE_CHECKING:
    import tokenizers

_CONFIGS_WITH_EOS = (GENERATION, CONFIG, TOKENIZER_SETTINGS)


@dataclasses.dataclass(frozen=True, eq=False)
class Tokenizer:
    """The tokenizer of one checkpoint; make one with `Tokenizer.from_folder`.

    Attributes:
      backend: the vocabulary and its rules: of the package `tokenizers`, or of a process with
        limits, where one of its rules is not known to have an end (`limited.known_stages`).
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

    backend: tokenizers.Tokenizer | LimitedTokenizer
    stop_tokens: frozenset[int]
    special_tokens: Mapping[str, str]
    chat_templates: Mapping[str, str]
    source: str

    @classmethod
    def from_folder(cls, path: str | Path, *, follow_links: bool = False) -> Tokenizer:
        """Read tokenizer.json and, where they exist, the files beside it.

        As in transformers, chat_template.jinja goes before the `chat_template` of
        tokenizer_config.json, and special_tokens_map.json counts only if that config has no
        `added_tokens_decoder`. Truncation and padding in tokenizer.json are switched off. A token
        that one of these files names as special is special. Unlike in transformers, a special token
        outside the vocabulary is not added to it: the model has no embedding of it. Nor is a
        `dropout` of merges applied, with which the same text would be other ids each time.

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
        backend = open_backend(folder, follow_links)
        config = read(TOKENIZER_SETTINGS)
        if "added_tokens_decoder" in config:
            add_tokens(backend, config["added_tokens_decoder"], folder / TOKENIZER_SETTINGS)
            named = config
        else:
            named = {**config, **read(SPECIAL_TOKENS)}
        if isinstance(extra := named.get("extra_special_tokens"), dict):
            named = {**named, **extra}
        special_tokens = {
            name: text
            for name, token in named.items()
            if name.endswith("_token") and (text := read_token(token)) is not None
        }
        add_special_tokens(backend, named, folder / TOKENIZER_SETTINGS)
        stop_tokens = {
            i for name in _CONFIGS_WITH_EOS for i in read_eos_ids(folder / name, read(name))
        }
        # A token that is not in the vocabulary is never generated, so it stops nothing either.
        if (eos := find_id(backend, special_tokens.get("eos_token", ""))) is not None:
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
          InputError: if the text has unpaired surrogates, as an argument that is not UTF-8 has; or
            if the tokenizer fails, or takes more time or memory than it may.
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise InputError(f"the text is not valid Unicode at character {error.start}") from error
        with refuse_failures(f"{self.source}: the tokenizer fails"):
            return self.backend.encode(text, add_special_tokens=add_special_tokens).ids

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = True) -> str:
        """Turn ids into text; ids without a token (a padded vocabulary has them) yield nothing.

        Bytes that are not UTF-8 become U+FFFD. Spaces stay as the tokenizer's decoder writes them.

        Raises:
          InputError: if the tokenizer fails, or takes more time or memory than it may; or if the
            text has thousands of characters for each token.
        """
        with refuse_failures(f"{self.source}: the tokenizer fails"):
            numbers = list(ids)
            text = self.backend.decode(numbers, skip_special_tokens=skip_special_tokens)
            check_length(text, len(numbers))
            return text

    def describe_decoder(self) -> str | None:
        """What turns tokens into text, as JSON; None if they are joined by spaces."""
        if isinstance(self.backend, LimitedTokenizer):
            return self.backend.prepared["decoder"]
        decoder = self.backend.decoder  # its pickled state is its JSON
        return None if decoder is None else decoder.__getstate__().decode()

    def find_special(self, name: str) -> int | None:
        """The id of "bos_token", "eos_token", …; None if it has no name or no id."""
        return find_id(self.backend, self.special_tokens.get(name, ""))

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
