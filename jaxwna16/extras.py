"""Packages that only some of our features need, imported when one of them is used."""

from __future__ import annotations

import importlib
from types import ModuleType

from jaxwna16.errors import InputError


def import_extra(module: str, extra: str) -> ModuleType:
    """Import a module that comes with an extra of ours.

    Raises:
      InputError: if its package is not installed; the message says how to install it.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise InputError(
            f"this needs the package {module.partition('.')[0]}, which is not installed: "
            f'pip install "jaxwna16[{extra}]"'
        ) from error
