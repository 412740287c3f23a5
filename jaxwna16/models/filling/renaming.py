"""Names in files -> attribute paths of the definition, as a family's name map says.

Plans and errors of the loader keep the names of the files; a model's leaves have its own.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from typing import TypeVar

from jaxwna16.errors import ModelError

Leaf = TypeVar("Leaf")

_LAYERS = "model.layers."
"""What the names of layers begin with in every definition."""
_LAYER = re.compile(r"((?:.*?\.)?layers\.)(\d+)\.")
_MANY = 100  # layers that are missing: fewer are listed tensor by tensor


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


def check_prefix(found: Iterable[str], names: Mapping[str, str], source: str) -> None:
    """Refuse a checkpoint all of whose layers stand under another name than the model's.

    Args:
      found: modules and tensors as the files call them.
      names: as `rename`.
      source: where they are, for the message.

    Raises:
      ModelError: one reason, with the prefix.
    """
    layers = [name for name in found if _LAYER.match(name)]
    if not layers or any(rename(name, names).startswith(_LAYERS) for name in layers):
        return
    prefixes = Counter(name[: match.end(1)] for name in layers if (match := _LAYER.match(name)))
    [(prefix, count)] = prefixes.most_common(1)
    raise ModelError(
        f"{source}: the names of its tensors are not the model's",
        [
            f"{prefix}: expected {_LAYERS}, found this before the names of {count} modules and "
            f"tensors, and {_LAYERS} nowhere (save the model again with the tool that wrote it, or "
            f"rename the tensors, `{prefix.removesuffix('layers.')}` to `model.`, in the files, "
            "their index and quantization_config)"
        ],
    )


def check_depth(found: Iterable[str], layers: int, source: str) -> None:
    """Refuse a config.json with far more layers than the files have, before each is made.

    Args:
      found: modules and tensors as the files call them.
      layers: as many as config.json says.
      source: where they are, for the message.

    Raises:
      ModelError: one reason, with both numbers.
    """
    count = len({match[2] for name in found if (match := _LAYER.match(name))})
    if layers > count + _MANY:
        reason = f"num_hidden_layers: expected the {count} layers of the files, found {layers}"
        raise ModelError(f"{source}: most layers are missing", [reason])
