"""The arrows between packages, wings and rooms, read from imports; what `import jaxwna16` costs."""

from __future__ import annotations

import ast
import graphlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from tests.imports import FILES, GRAPH, PACKAGES, ROOT, list_imports

# what a room may import beside the standard library, itself and the rooms to its right
FOREIGN = {
    "pallas_kernels": {"jax", "numpy"},
    "loaders": {"jax", "numpy", "ml_dtypes", "safetensors"},
}
# Each folder from top to bottom: a room or wing imports what stands in lines below its own, and
# nothing else of its folder. FAMILY is every folder with a definition.
FAMILY = "FAMILY"
WINGS = {
    "pallas_kernels": """
        __init__
        step
        matmul moe
        lowering
        backends vmap_rule
        xla triton
        tiles
        format
        formulas
        arguments
        errors
    """,
    "loaders": """
        __init__
        open write
        converted
        stream
        plan
        grouping
        modules
        schemes
        files
        errors
    """,
    "loaders/schemes": """
        __init__
        quantization_config
        awq_gptq compressed_tensors
        config_groups
        module_names packings patterns presets subconfigs
    """,
    "jaxwna16": """
        __init__ __main__
        cli
        bench
        comparison linen lm_eval
        evaluation
        generation
        checkpoints
        models
        layers
        dtypes extras programs progress
        errors version
    """,
    "jaxwna16/models": """
        __init__
        filling
        families
        nearest wrapped
        FAMILY
        causal_lm
        parts
        config
    """,
}
MOST_LINES = 400
MOST_ROOMS = 9
LARGE_WINGS = {"jaxwna16/bench", "jaxwna16/cli", "jaxwna16/generation"}


def _list_packages(path: Path) -> set[str]:
    names = {name.partition(".")[0] for name in list_imports(path)}
    return names - sys.stdlib_module_names - {"__future__"}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_one_way_only(path):
    room = path.relative_to(ROOT).parts[0]
    packages = _list_packages(path)
    to_the_left = set(PACKAGES[: PACKAGES.index(room)])
    assert not packages & (to_the_left | {"tests", "examples", "benchmarks"})
    assert not packages & {"torch", "transformers", "compressed_tensors", "tensorflow"}
    if room in FOREIGN:
        assert packages <= FOREIGN[room] | set(PACKAGES)


def _read_levels(folder: str) -> dict[str, int]:
    """Each room and wing of a folder -> its line in WINGS, 0 at the top."""
    levels = {
        name: level for level, line in enumerate(WINGS[folder].split("\n")) for name in line.split()
    }
    families = [path.parent.name for path in (ROOT / folder).glob("*/definition.py")]
    family = levels.pop(FAMILY, None)
    return levels if family is None else levels | dict.fromkeys(families, family)


def _find_room(module: str, folder: str) -> str | None:
    """The room or wing of a folder that a module is in."""
    within = folder.replace("/", ".")
    if module == within:
        return "__init__"
    return module[len(within) + 1 :].split(".")[0] if module.startswith(f"{within}.") else None


def _list_upward(folder: str, graph: Mapping[str, set[str]]) -> Iterator[str]:
    """The imports within a folder that do not go down."""
    levels = _read_levels(folder)
    for module, imported in graph.items():
        for other in imported:
            room, others = _find_room(module, folder), _find_room(other, folder)
            if room and others and room != others and levels[room] >= levels[others]:
                yield f"{module} -> {other}"


def _find_circle(graph: Mapping[str, set[str]]) -> list[str]:
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        return error.args[1]
    return []


def _list_rooms(folder: Path) -> set[str]:
    inner = [path for path in folder.iterdir() if path.is_dir() and any(path.glob("*.py"))]
    return {path.stem for path in folder.glob("*.py")} | {path.name for path in inner}


@pytest.mark.parametrize("folder", WINGS)
def test_wings_import_only_wings_below_them(folder):
    assert _list_rooms(ROOT / folder) == set(_read_levels(folder))
    assert not list(_list_upward(folder, GRAPH))


def test_no_imports_go_in_a_circle():
    assert not _find_circle(GRAPH)


@pytest.mark.parametrize(
    "module, imported",
    [
        ("pallas_kernels.format.spec", "pallas_kernels.tiles.tiles"),
        ("pallas_kernels.triton.experts", "pallas_kernels.xla.experts"),
        ("loaders.files.new_folder", "loaders.plan"),
        ("jaxwna16.models.config.rope_config", "jaxwna16.models.parts.rope"),
        ("jaxwna16.models.llama.config", "jaxwna16.models.qwen3_5.config"),
        ("jaxwna16.checkpoints.convert", "jaxwna16"),
    ],
)
def test_an_import_upwards_or_sideways_is_found(module, imported):
    planted = {**GRAPH, module: {*GRAPH[module], imported}}
    assert [arrow for folder in WINGS for arrow in _list_upward(folder, planted)] == [
        f"{module} -> {imported}"
    ]


def test_a_circle_is_found():
    tables, rules = "pallas_kernels.tiles.tables", "pallas_kernels.tiles.dense_rules"
    assert set(_find_circle({**GRAPH, tables: {*GRAPH[tables], rules}})) >= {tables, rules}


def test_wings_have_few_rooms_and_rooms_few_lines():
    rooms: dict[str, int] = {}
    for path in FILES:
        if not path.stem.startswith("__"):
            folder = str(path.parent.relative_to(ROOT))
            rooms[folder] = rooms.get(folder, 0) + 1
    crowded = {folder for folder, count in rooms.items() if count > MOST_ROOMS}
    assert crowded <= LARGE_WINGS
    folders = (*PACKAGES, "tests", "examples", "benchmarks")
    texts = [path for folder in folders for path in (ROOT / folder).rglob("*.py")]
    lines = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in texts}
    assert not [f"{path}: {count}" for path, count in lines.items() if count > MOST_LINES]


def test_pallas_triton_is_imported_in_one_folder():
    def imports_it(path: Path) -> bool:
        return any(
            name.startswith("jax.experimental.pallas.triton") or "jax_triton" in name
            for name in list_imports(path)
        )

    paths = [path.relative_to(ROOT) for path in FILES if imports_it(path)]
    assert paths
    assert all(path.is_relative_to("pallas_kernels/triton") for path in paths)


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
