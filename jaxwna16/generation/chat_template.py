"""A checkpoint's chat template: found, compiled in a sandbox, and given plain messages.

A template is a program that came with a checkpoint, so it runs in Jinja's immutable sandbox, set up
as `transformers.utils.chat_template_utils` sets it up, and it sees copies of JSON values only.
"""

from __future__ import annotations

import datetime
import functools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxwna16.errors import InputError
from jaxwna16.extras import import_extra

if TYPE_CHECKING:
    import jinja2

_REASONING = ("reasoning_content", "thinking", "reasoning")
_TAG = "CONTINUE_FINAL_MESSAGE_TAG "


def read_chat_templates(folder: Path, tokenizer_config: Mapping[str, Any]) -> dict[str, str]:
    """Find the Jinja sources by name: chat_template.jinja, or `chat_template` of the config.

    The config holds one source, or a list of {"name": …, "template": …}; a single one is "default".

    Raises:
      InputError: if what is there is neither.
    """
    path = folder / "chat_template.jinja"
    if path.is_file():
        try:
            return {"default": path.read_text(encoding="utf-8")}
        except UnicodeDecodeError as error:
            raise InputError(f"{path}: not UTF-8: {error}") from error
    found = tokenizer_config.get("chat_template") or []
    entries = found if isinstance(found, list) else [{"name": "default", "template": found}]
    templates = {}
    for entry in entries:
        match entry:
            case {"name": str(name), "template": str(template)}:
                templates[name] = template
            case _:
                raise InputError(
                    f"{folder / 'tokenizer_config.json'}: `chat_template` must be a string or a "
                    f"list of named strings, found {str(entry)[:80]}"
                )
    return templates


def compile_chat_template(source: str) -> jinja2.Template:
    """Compile a template; rendering it can raise anything.

    Raises:
      InputError: if it is not Jinja, or jinja2 is not installed.
    """
    environment = _make_environment()
    try:
        return environment.from_string(source)
    except Exception as error:  # TemplateSyntaxError, but also RecursionError and the like
        raise InputError(f"the chat template is broken: {error}") from error


def copy_messages(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Copy messages into fresh dicts of JSON values; keys whose value is None are left out.

    Reasoning may have one of three names. It also gets the two names that templates read.

    Raises:
      InputError: if there is no message, or one is not a dict of JSON values with a role.
    """
    try:
        plain = json.loads(json.dumps([dict(message) for message in messages]))
    except (TypeError, ValueError) as error:
        raise InputError(f"messages must be dicts of plain JSON values: {error}") from error
    if not plain:
        raise InputError("an empty conversation: give at least one message")
    for index, message in enumerate(plain):
        if not isinstance(message.get("role"), str):
            raise InputError(f"message {index} needs a role (a string), found {message}")
    return [
        _name_reasoning({k: v for k, v in message.items() if v is not None}) for message in plain
    ]


def _name_reasoning(message: dict[str, Any]) -> dict[str, Any]:
    found = [message[name] for name in _REASONING if name in message]
    if not found:
        return message
    # in the order of keys that transformers makes, as a template may print the whole message
    return {"thinking": found[0]} | message | {"reasoning_content": found[0]}


def mark_end(message: dict[str, Any]) -> str:
    """Put a mark behind the text of a message, for `cut_at_mark`; returns the text without it.

    Of a content in several blocks it is the last text.

    Raises:
      InputError: if there is no text.
    """
    content = message.get("content")
    blocks = content if isinstance(content, list) else [message]
    key = "text" if isinstance(content, list) else "content"
    texts = [block for block in blocks if isinstance(block, dict) and key in block]
    if not texts or not isinstance(text := texts[-1][key], str):
        raise InputError(f"the last message has no text to continue, its content is {content!r}")
    texts[-1][key] = text + _TAG
    return text


def cut_at_mark(chat: str, text: str) -> str:
    """A rendered chat up to the mark behind its last message's text.

    Where the template has trimmed the text, and so the space that ends the mark, the chat ends
    without space.

    Raises:
      InputError: if the template has left out the text or its end.
    """
    start = chat.rfind(_TAG.strip())
    if start < 0 or text.strip() not in chat:
        raise InputError(
            "the chat template leaves out a part of the last message, which therefore cannot be "
            f"continued: {text[:80]!r}"
        )
    return chat[:start] if chat.startswith(_TAG, start) else chat[:start].rstrip()


@functools.cache
def _make_environment() -> jinja2.Environment:
    import_extra("jinja2", "text")
    import jinja2.ext
    import jinja2.nodes
    import jinja2.sandbox

    class Generation(jinja2.ext.Extension):
        """`{% generation %}` marks the assistant's words for training; here it is a plain block."""

        tags = {"generation"}  # noqa: RUF012 (as jinja2 declares it)

        def parse(self, parser):
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return jinja2.nodes.Scope(body, lineno=line)

    class Namespace(jinja2.utils.Namespace):
        """Refuses names that Jinja or Python could take for methods of their own."""

        def __init__(*args, **kwargs):  # a template may well call namespace(self=…)
            jinja2.utils.Namespace.__init__(args[0])
            for name, value in dict(*args[1:], **kwargs).items():
                args[0][name] = value

        def __setitem__(self, name, value):
            if name.startswith("_"):
                raise jinja2.exceptions.SecurityError(f"a namespace cannot hold {name!r}")
            super().__setitem__(name, value)

    def raise_exception(message):
        raise jinja2.exceptions.TemplateError(message)

    def tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
        # Jinja's own filter escapes for HTML.
        return json.dumps(
            value,
            ensure_ascii=ensure_ascii,
            indent=indent,
            separators=separators,
            sort_keys=sort_keys,
        )

    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals["namespace"] = Namespace
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    return environment
