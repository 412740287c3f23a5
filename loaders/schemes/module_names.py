"""Names of modules: what matches them, what contains them, and many of them in few words."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator

# the last name of an embedding's path; all other modules with a weight count as Linear
_EMBEDDING = re.compile(
    r"embed|embeddings?|embed_in|embed_tokens(_\w+)?|embed_positions|wte|wpe|pos_embed"
    r"|(tok|word|token_type|position)_embeddings?"
)
_LISTED = 3


def name_classes(path: str) -> tuple[str, ...]:
    """The classes of torch that targets can name a module by, told from its path."""
    kind = "Embedding" if _EMBEDDING.fullmatch(path.rpartition(".")[2]) else "Linear"
    return kind, "Module"


def describe_modules(paths: Collection[str]) -> str:
    """How many, and which in short: "32 modules, model.layers.*.mlp.up_proj, …"."""
    names = list(dict.fromkeys(map(star_numbers, paths)))
    count = f"{len(paths)} modules" if len(paths) > 1 else "1 module"
    return ", ".join([count, *names[:_LISTED], *(["…"] if len(names) > _LISTED else [])])


def list_prefixes(path: str) -> Iterator[str]:
    """The path itself and the paths of its parents: "a.b" -> "a.b", "a"."""
    while path:
        yield path
        path = path.rpartition(".")[0]


def star_numbers(path: str) -> str:
    """Replace the numbers in a dotted name: "layers.3.mlp" -> "layers.*.mlp"."""
    return ".".join("*" if part.isdecimal() else part for part in path.split("."))
