"""The arrows between the rooms, read from the imports; and what `import jaxwna16` costs."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ROOMS = ("jaxwna16", "loaders", "pallas_kernels")
FILES = [path for room in ROOMS for path in sorted((ROOT / room).rglob("*.py"))]
# what a room may import beside the standard library, itself and the rooms to its right
FOREIGN = {
    "pallas_kernels": {"jax", "numpy"},
    "loaders": {"jax", "numpy", "ml_dtypes", "safetensors"},
}


def _list_imports(path: Path) -> set[str]:
    """Every module that a file names in an import, wherever in the file it stands."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def _list_packages(path: Path) -> set[str]:
    names = {name.partition(".")[0] for name in _list_imports(path)}
    return names - sys.stdlib_module_names - {"__future__"}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_one_way_only(path):
    room = path.relative_to(ROOT).parts[0]
    packages = _list_packages(path)
    to_the_left = set(ROOMS[: ROOMS.index(room)])
    assert not packages & (to_the_left | {"tests", "examples", "benchmarks"})
    assert not packages & {"torch", "transformers", "compressed_tensors", "tensorflow"}
    if room in FOREIGN:
        assert packages <= FOREIGN[room] | set(ROOMS)


def test_pallas_triton_is_imported_in_one_folder():
    def imports_it(path: Path) -> bool:
        return any(
            name.startswith("jax.experimental.pallas.triton") or "jax_triton" in name
            for name in _list_imports(path)
        )

    folders = {path.relative_to(ROOT).parent for path in FILES if imports_it(path)}
    assert folders == {Path("pallas_kernels/triton")}


_IMPORT = """
import json, sys, time
import jax, flax.nnx, flax.linen
start = time.perf_counter()
import jaxwna16
for name in dir(jaxwna16):
    getattr(jaxwna16, name)
seconds = time.perf_counter() - start
import jaxwna16.cli.main
packages = sorted({name.partition(".")[0] for name in sys.modules})
from jax._src import xla_bridge
print(json.dumps([seconds, packages, bool(xla_bridge._backends)]))
"""


def test_import_is_quick_starts_no_backend_and_needs_no_heavy_package():
    """Beside jax and flax it reads 40 files of ours and rich: 3 s is ten times what that takes."""
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-W", "error", "-c", _IMPORT]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    seconds, packages, started = json.loads(done.stdout)
    assert seconds < 3
    assert not started
    heavy = {"torch", "transformers", "tokenizers", "huggingface_hub", "matplotlib", "pytest"}
    assert not heavy & set(packages)


_HELP = """
import sys
from jaxwna16.cli.main import main
main(["inspect", "--help"])
print(sorted({"jax", "flax", "numpy"} & sys.modules.keys()))
"""


def test_the_help_of_the_command_does_not_wait_for_jax():
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", _HELP]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_names_that_are_imported_when_used_are_those_that_type_checkers_see():
    import jaxwna16

    tree = ast.parse((ROOT / "jaxwna16" / "__init__.py").read_text())
    [block] = [node for node in tree.body if isinstance(node, ast.If)]
    seen = {
        alias.name: node.module
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert seen == {**jaxwna16._MODULES, "linen": "jaxwna16"}
    assert seen.keys() <= set(dir(jaxwna16))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = jaxwna16.nothing


def test_every_public_name_is_there():
    import jaxwna16

    wanted = """BackendError Checkpoint CheckpointError InputError ModelError QuantDense QuantSpec
    SpecError Wna16Error dequantize explain generate linen load_checkpoint load_model pack
    quant_matmul quantize unpack"""
    assert not [name for name in wanted.split() if not hasattr(jaxwna16, name)]
