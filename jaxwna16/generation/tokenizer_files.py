"""A tokenizer's files: what tokenizer.json is, and what those beside it add to it."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxwna16.errors import InputError
from jaxwna16.extras import import_extra
from jaxwna16.generation.limited.known_stages import MAX_ADDED, is_plain
from jaxwna16.generation.limited.tokenizer import LimitedTokenizer, refuse_failures
from loaders.files.small_files import TOKENIZER, is_there, read_bytes

if TYPE_CHECKING:
    import tokenizers

    Backend = tokenizers.Tokenizer | LimitedTokenizer

_FLAGS = ("lstrip", "rstrip", "single_word", "normalized")
_FEW = 3
_MAX_EOS = 10_000  # each is compared with each new token


def open_backend(folder: Path, follow_links: bool) -> Backend:
    """Read tokenizer.json, in a process with limits unless every stage of it is known.

    Raises:
      CheckpointError: if the file cannot be read.
      InputError: if there is none, or it is no tokenizer; or if `tokenizers` is not installed.
    """
    package, path = import_extra("tokenizers", "text"), folder / TOKENIZER
    if not is_there(folder, TOKENIZER):
        raise InputError(f"{path}: no such file, so there is no tokenizer in {folder}")
    content = read_bytes(folder, TOKENIZER, follow_links=follow_links)
    if is_plain(content):
        from jaxwna16.generation.limited.tokenizer_calls import prepare

        with refuse_failures(f"{path}: not a tokenizer"):
            backend = package.Tokenizer.from_buffer(content)
            prepared = prepare(backend)
    else:
        backend = LimitedTokenizer(content, f"{path}: not a tokenizer", str(folder))
        prepared = backend.prepared
    if prepared["dropout"]:
        warnings.warn(
            f"{path}: `dropout` {prepared['dropout']:.3g} is for training and switched off",
            stacklevel=3,
        )
    return backend


def add_tokens(backend: Backend, added: Any, path: Path) -> None:
    """Add the tokens that only tokenizer_config.json has, under the ids it gives them.

    Raises:
      InputError: if they are malformed, too many, or contradict tokenizer.json.
    """
    try:
        tokens = {int(index): _make_token(added[index]) for index in added}
    except (AttributeError, TypeError, ValueError) as error:
        raise InputError(f"{path}: `added_tokens_decoder` is malformed: {error}") from error
    _limit(tokens.values(), path)
    with refuse_failures(f"{path}: `added_tokens_decoder`"):
        backend.add_tokens([tokens[index] for index in sorted(tokens)])
        found = {token.content: i for i, token in backend.get_added_tokens_decoder().items()}
    wrong = [
        f"{token.content!r:.80} is {found.get(token.content)}, not {index}"
        for index, token in sorted(tokens.items())
        if found.get(token.content) != index
    ]
    if wrong:
        more = f"; and {len(wrong) - _FEW} more" if len(wrong) > _FEW else ""
        raise InputError(
            f"{path}: `added_tokens_decoder` contradicts tokenizer.json, where "
            f"{'; '.join(wrong[:_FEW])}{more}"
        )


def add_special_tokens(backend: Backend, named: Mapping[str, Any], path: Path) -> None:
    """Make special what is named so and is no more than a word of the vocabulary.

    Raises:
      InputError: if that is too much.
    """
    extra = named.get("extra_special_tokens") or named.get("additional_special_tokens")
    tokens = [token for name, token in named.items() if name.endswith("_token")]
    tokens += extra if isinstance(extra, list) else []
    added = {token.content for token in backend.get_added_tokens_decoder().values()}
    texts = {text for token in tokens if (text := read_token(token)) is not None} - added
    known = _find_known(backend, texts)
    new = []
    for token in tokens:
        text = read_token(token)
        if text is None or text not in known:
            continue
        flags = {n: bool(token[n]) for n in _FLAGS if n in token} if isinstance(token, dict) else {}
        new.append(_make_token({"content": text, "special": True, **flags}))
    _limit(new, path)
    if new:
        with refuse_failures(f"{path}: special tokens"):
            backend.add_tokens(new)


def find_id(backend: Backend, token: str) -> int | None:
    """The id of a token; None if it has none, as half a surrogate pair, which no vocabulary has."""
    return backend.token_to_id(token) if _is_unicode(token) else None


def _find_known(backend: Backend, texts: Iterable[str]) -> set[str]:
    """Those that the vocabulary has, in one call: there may be a million."""
    words = list(filter(_is_unicode, texts))
    if isinstance(backend, LimitedTokenizer):
        ids = backend.tokens_to_ids(words)
    else:
        ids = map(backend.token_to_id, words)
    return {word for word, index in zip(words, ids, strict=True) if index is not None}


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def read_eos_ids(path: Path, settings: Mapping[str, Any]) -> list[int]:
    """The ids of `eos_token_id`.

    Raises:
      InputError: if it is neither an id nor a list of ids, or too long a list.
    """
    found = settings.get("eos_token_id")
    ids = found if isinstance(found, list) else [] if found is None else [found]
    if not all(type(token) is int and token >= 0 for token in ids):
        raise InputError(
            f"{path}: `eos_token_id` must be an id or a list of ids, found {found!r:.200}"
        )
    if len(ids) > _MAX_EOS:
        raise InputError(
            f"{path}: `eos_token_id` has {len(ids):,} ids, expected {_MAX_EOS:,} at most"
        )
    return ids


def read_token(token: Any) -> str | None:
    """The text of a token written as a string or as {"content": string, …}."""
    text = token.get("content") if isinstance(token, dict) else token
    return text if isinstance(text, str) else None


def _make_token(entry: Mapping[str, Any]) -> tokenizers.AddedToken:
    """A token of what it knows of an entry: what it does not know it would print on stdout."""
    package = import_extra("tokenizers", "text")
    known = ("content", "special", *_FLAGS)
    return package.AddedToken(**{name: entry[name] for name in known if name in entry})


def _limit(tokens: Iterable[tokenizers.AddedToken], path: Path) -> None:
    """Refuse what would take gigabytes in the automaton that finds added tokens in a text."""
    size = sum(len(token.content) for token in tokens)
    if size > MAX_ADDED:
        raise InputError(
            f"{path}: the added tokens have {size:,} characters, expected {MAX_ADDED:,} at most"
        )
