"""Names in files -> attribute paths of the definition, as a family's name map says.

Plans and errors of the loader keep the names of the files; a model's leaves have its own.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping
from typing import TypeVar

from jaxwna16.errors import ModelError

Leaf = TypeVar("Leaf")


def rename(name: str, names: Mapping[str, str]) -> str:
    """What a module or tensor is called in the model.

    Args:
      name: in the files.
      names: regular expressions -> what stands in place of what they find, one after the other.
    """
    for pattern, replacement in names.items():
        name = re.sub(pattern, replacement, name)
    return name


def rename_all(leaves: Mapping[str, Leaf], names: Mapping[str, str]) -> dict[str, Leaf]:
    """The same under the model's names; arguments as `rename`.

    Raises:
      ModelError: listing those that would have one name.
    """
    alike: dict[str, list[str]] = defaultdict(list)
    for name in leaves:
        alike[rename(name, names)].append(name)
    clashes = [
        f"{name}: expected one, found {' and '.join(found)}"
        for name, found in alike.items()
        if len(found) > 1
    ]
    if clashes:
        raise ModelError("several parts of the checkpoint have one place in the model", clashes)
    return {name: leaves[found] for name, [found] in alike.items()}
