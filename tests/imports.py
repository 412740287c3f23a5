"""What imports what: our modules and the imports between them, read from the files."""

from __future__ import annotations

import ast
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGES = ("jaxwna16", "loaders", "pallas_kernels")
FILES = [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]


def list_imports(path: Path) -> set[str]:
    """Every module that a file names in an import, wherever in the file it stands."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def _name_module(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def _resolve(name: str, modules: Mapping[str, object]) -> str | None:
    """The module that an imported name is or stands in."""
    while name not in modules:
        name, _, last = name.rpartition(".")
        if not last:
            return None
    return name


def _read_graph() -> dict[str, set[str]]:
    """Each of our modules -> those it imports, also inside functions and for type checkers."""
    modules = {_name_module(path): path for path in FILES}
    found = {name: {_resolve(n, modules) for n in list_imports(p)} for name, p in modules.items()}
    return {name: {n for n in names if n not in (None, name)} for name, names in found.items()}


GRAPH = _read_graph()
