"""The reference has every public name once, and the examples of their docstrings run."""

from __future__ import annotations

import importlib
import inspect
import re
import textwrap
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jax.experimental.compilation_cache import compilation_cache

import jaxwna16
from jaxwna16.checkpoints.quantize import quantize_checkpoint
from tests.jaxwna16.cli.checkpoints import write_float_checkpoint

ROOT = Path(__file__).parents[1]
DOORS = ("linen", "comparison", "lm_eval")
EXAMPLE = re.compile(r"^Example:\n  ```python\n(.*?)  ```", re.DOTALL | re.MULTILINE)
# what a call gives back, and what it raises
NOT_CALLED = {"comparison.Compared", "comparison.Divergence", "Generation"}


def _list_public() -> dict[str, Any]:
    """What users import, by its name behind "jaxwna16."."""
    found = {name: getattr(jaxwna16, name) for name in jaxwna16._MODULES}
    for door in DOORS:
        inside = vars(importlib.import_module(f"jaxwna16.{door}"))
        found |= {f"{door}.{name}": value for name, value in inside.items() if name[0] != "_"}
    return found


PUBLIC = _list_public()
EXAMPLES = {
    name: textwrap.dedent(example[1])
    for name, value in PUBLIC.items()
    if (example := EXAMPLE.search(inspect.getdoc(value) or ""))
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> Path:
    """What examples call path/to: floats, a packed checkpoint, and one without weights."""
    root = tmp_path_factory.mktemp("folders")
    write_float_checkpoint(root / "floats")
    quantize_checkpoint(root / "floats", root / "checkpoint", group_size=32, symmetric=False)
    (root / "broken").mkdir()
    (root / "broken" / "config.json").write_text("{}")
    return root


@pytest.fixture
def _same_cache():
    """`keep_programs` is for the whole process."""
    before = jax.config.jax_compilation_cache_dir
    yield
    if jax.config.jax_compilation_cache_dir != before:
        jax.config.update("jax_compilation_cache_dir", before)
        compilation_cache.reset_cache()


@pytest.mark.usefixtures("_same_cache")
@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_runs_as_it_stands(name, folders, tmp_path):
    made = re.compile(r"path/to/(?=converted|quantized|dequantized|programs)")
    code = made.sub(f"{tmp_path}/", EXAMPLES[name]).replace("path/to", str(folders))
    exec(code, {"jax": jax, "jnp": jnp, "jaxwna16": jaxwna16, "nnx": nnx})


def test_whatever_users_call_has_an_example():
    called = {
        name
        for name, value in PUBLIC.items()
        if not (inspect.isclass(value) and issubclass(value, Exception))
    }
    assert called - NOT_CALLED <= EXAMPLES.keys()


def test_the_reference_has_every_public_name_once():
    pages = (ROOT / "docs" / "api").glob("*.md")
    found = [
        name
        for page in pages
        for name in re.findall(r"^::: jaxwna16\.(\S+)$", page.read_text(), re.MULTILINE)
    ]
    assert sorted(found) == sorted(PUBLIC)


def test_examples_need_no_other_imports_than_the_reference_states():
    text = (ROOT / "docs" / "api" / "index.md").read_text()
    [imports] = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert imports == (
        "import jax\nimport jax.numpy as jnp\nimport jaxwna16\nfrom flax import nnx\n"
    )
