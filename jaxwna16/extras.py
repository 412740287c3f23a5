"""Packages that only some of our features need, imported when one of them is used."""

from __future__ import annotations

import importlib.util
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
        raise _describe_lack(module, extra) from error


def check_extra(module: str, extra: str) -> None:
    """Refuse to go on without a module that another process is to import.

    Raises:
      InputError: as `import_extra`.
    """
    if importlib.util.find_spec(module) is None:
        raise _describe_lack(module, extra)


def _describe_lack(module: str, extra: str) -> InputError:
    return InputError(
        f"this needs the package {module.partition('.')[0]}, which is not installed: "
        f'pip install "jaxwna16[{extra}]"'
    )
