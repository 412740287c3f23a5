"""A checkpoint's chat template: found, given plain messages, and rendered.

A template is a program that came with a checkpoint. It runs in a sandbox (`limited.templates`) and
in a process with limits (`limited.child`): no sandbox of Jinja's bounds time, memory or output.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxwna16.errors import InputError
from jaxwna16.extras import check_extra
from jaxwna16.generation.limited.child import Child, FailedCallError, LimitError
from loaders.files.small_files import TEMPLATE, TOKENIZER_SETTINGS, is_there, read_text

_REASONING = ("reasoning_content", "thinking", "reasoning")
_FEW = 8
_TAG = "CONTINUE_FINAL_MESSAGE_TAG "

SECONDS = 3
"""Of computing for one chat; templates of models take milliseconds."""
_MEGABYTES = 512
_child = Child("jaxwna16.generation.limited.templates", _MEGABYTES)


def read_chat_templates(
    folder: Path, tokenizer_config: Mapping[str, Any], *, follow_links: bool = False
) -> dict[str, str]:
    """Find the Jinja sources by name: chat_template.jinja, or `chat_template` of the config.

    The config holds one source, or a list of {"name": …, "template": …}; a single one is "default".

    Raises:
      CheckpointError: if the file cannot be read.
      InputError: if what is there is neither.
    """
    if is_there(folder, TEMPLATE):
        return {"default": read_text(folder, TEMPLATE, follow_links=follow_links)}
    found = tokenizer_config.get("chat_template") or []
    entries = found if isinstance(found, list) else [{"name": "default", "template": found}]
    templates = {}
    for entry in entries:
        match entry:
            case {"name": str(name), "template": str(template)}:
                templates[name] = template
            case _:
                raise InputError(
                    f"{folder / TOKENIZER_SETTINGS}: `chat_template` must be a string or a "
                    f"list of named strings, found {str(entry)[:80]}"
                )
    return templates


def render_chat_template(source: str, variables: Mapping[str, Any]) -> str:
    """Render a template in a process of its own, with limits of time, memory and output.

    All templates share one process (20 MB), which the first of them starts.

    Args:
      source: a text in Jinja.
      variables: plain JSON values by name; `messages` among them.

    Raises:
      InputError: if it is not Jinja, raises an error or meets a limit; if a variable is no JSON
        value; or if jinja2 is not installed.
    """
    check_extra("jinja2", "text")
    try:
        return _child.call("render", source, dict(variables), seconds=SECONDS)
    except FailedCallError as error:
        if error.kind == "BrokenTemplateError":
            raise InputError(f"the chat template is broken: {error}") from error
        raise InputError(
            f"the chat template refused the messages{_name_roles(variables)}: {error}"
        ) from error
    except LimitError as error:
        raise InputError(f"the chat template was ended: {error}") from error
    except (TypeError, ValueError, RecursionError) as error:
        raise InputError(f"variables must be plain JSON values: {error}") from error
    except OSError as error:
        raise InputError(f"no process can be started for the chat template: {error}") from error


def _name_roles(variables: Mapping[str, Any]) -> str:
    roles = [message["role"] for message in variables.get("messages", ())]
    more = f" and {len(roles) - _FEW} more" if len(roles) > _FEW else ""
    return f" (roles: {', '.join(roles[:_FEW])}{more})"


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
