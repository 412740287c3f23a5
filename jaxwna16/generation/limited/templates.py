"""Rendering chat templates, in the child.

A template runs in Jinja's immutable sandbox, set up as `transformers.utils.chat_template_utils`
sets it up, and it sees copies of JSON values only.
"""

from __future__ import annotations

import datetime
import functools
import json
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.sandbox

MAX_CHARACTERS = 8_000_000
"""Of a chat: two million tokens, which take seconds to encode."""


class BrokenTemplateError(Exception):
    """A text that is no template."""


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


def render(source: str, variables: dict[str, Any]) -> str:
    """The text that a template makes of these variables.

    Raises:
      BrokenTemplateError: if it is not Jinja.
      Exception: whatever the template raises, and if the text is longer than `MAX_CHARACTERS`.
    """
    text = _compile(source).render(variables)
    if len(text) > MAX_CHARACTERS:
        raise ValueError(f"it writes {len(text):,} characters, more than {MAX_CHARACTERS:,}")
    return text


@functools.lru_cache(8)
def _compile(source: str) -> jinja2.Template:
    try:
        return _make_environment().from_string(source)
    except MemoryError:
        raise
    except Exception as error:  # TemplateSyntaxError, but also RecursionError and the like
        raise BrokenTemplateError(str(error)) from error


@functools.cache
def _make_environment() -> jinja2.Environment:
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _write_json
    environment.globals["namespace"] = Namespace
    environment.globals["raise_exception"] = _raise
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    return environment


def _raise(message):
    raise jinja2.exceptions.TemplateError(message)


def _write_json(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
    # Jinja's own filter escapes for HTML.
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )
