"""Full-size truth without weights: published configurations plan, are inspected, and compile."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from jaxwna16.cli.main import main
from tests.jaxprs import find_kernels
from tests.jaxwna16.models.published_decode import decode, describe_decode
from tests.jaxwna16.models.published_models import NAMES, read_bytes, read_published, write_headers

DENSE = (
    "qwen3.6-27b",
    "qwen2.5-vl-72b",
    "mistral-small-3.2-24b",
    "devstral-small-2-24b",
    "smollm3-3b",
    "phi-4",
    "gemma-3-27b",
    "gemma-4-31b",
)
_QWEN = ("qwen3-coder-next", "qwen3-vl-30b-a3b", "qwen3.5-122b-a10b")
LARGE = ("minimax-m2.7", "gemma-4-26b-a4b", "deepseek-v3", "kimi-k2-thinking", *_QWEN)
"""Those whose many tensors (up to 140,000 modules) take long."""
ALIKE = ("mistral-small-3.2-24b", "smollm3-3b", "qwen3-vl-30b-a3b", "gemma-3-27b")
"""Those whose layers are another's."""
LOWERED = ("qwen3-30b-a3b", "qwen3-coder-next", "phi-4", "gemma-4-26b-a4b", "glm-4.7-flash")
"""One of each kind of block: of experts, hybrid with shared ones, dense, both in a layer, and
latent."""
BLOCK = 4
"""Layers of one block of the hybrid pattern."""
_MLP, _ATTENTION, _DELTA = 3, 5, 2
_SPARSE = _MLP + 1
_SHARED = 2
_LATENT = 4
_END = 1
_PACKED = 2
KERNELS = {
    "qwen3.6-27b": 3 * (_DELTA + _MLP) + _ATTENTION + _MLP,
    "qwen3.5-122b-a10b": 3 * (_DELTA + _SPARSE + _SHARED) + _ATTENTION + _SPARSE + _SHARED,
    "qwen3-30b-a3b": 4 * (_ATTENTION + _SPARSE),
    "gemma-4-26b-a4b": 4 * (_ATTENTION + _MLP + _SPARSE - 1),
    "minimax-m2.7": 4 * (_ATTENTION + _SPARSE),
    "qwen3-coder-next": 3 * (_DELTA + _PACKED) + _ATTENTION + 4 * (_SPARSE + _SHARED),
    "qwen3-vl-30b-a3b": 4 * (_ATTENTION + _SPARSE),
    "glm-4.7-flash": 4 * _LATENT + _MLP + 3 * (_SPARSE + _SHARED),
    "deepseek-v3": 4 * _LATENT + 3 * _MLP + _SPARSE + _SHARED,
    "kimi-k2-thinking": 4 * _END + _END + 3 * _SPARSE,
    **dict.fromkeys(DENSE[1:], 4 * (_ATTENTION + _MLP)),
}
"""In a block: gate and up, down, and the end of it; of experts the router's choice, too, and of
shared ones the two products; q/k/v, attention and its combine, o and the end of it. The products of
delta nets are ignored by most of these checkpoints, as heads are: their rule and the end of it
remain. Where they are packed, they are two more. Gemma 4's MLP and experts have one end. Of latent
attention three products and the end; of Kimi K2 experts alone are packed, and the ends of all else
remain."""
_ROOT = Path(__file__).parents[3]
_PLUGIN = Path(sys.prefix) / "gpu-check"


@pytest.fixture(scope="module")
def block(tmp_path_factory):
    """Writes the headers of a model's first block."""
    base = tmp_path_factory.mktemp("published")

    def write(name: str) -> Path:
        folder = base / name
        return folder if folder.exists() else write_headers(folder, read_published(name, BLOCK))

    return write


def inspect(folder: Path, capsys) -> dict:
    assert main(["inspect", str(folder), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[pytest.mark.thorough] if name in LARGE + ALIKE else [])
        for name in NAMES
    ],
)
def test_a_model_of_full_size_is_planned_and_inspected_from_headers(name, tmp_path, capsys):
    folder = write_headers(tmp_path / "c", read_published(name))
    report = inspect(folder, capsys)
    assert report["load_model"]["supported"]
    totals = report["totals"]
    assert 2 * totals["parameters"] == pytest.approx(read_bytes(name), rel=5e-3)
    assert totals["quantized_bytes"] + totals["plain_bytes"] == totals["bytes"]
    parts = [row["bytes"] for row in (*report["quantized"], *report["plain"])]
    assert sum(parts) == totals["bytes"]
    describe_decode(folder)


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[] if name in LOWERED else [pytest.mark.thorough]) for name in NAMES],
)
def test_the_decode_step_of_a_block_has_the_kernels_when_lowered_for_a_gpu(name, block, capsys):
    folder = block(name)
    report = inspect(folder, capsys)
    reasons = {entry["reason"] for entry in report["skipped"]}
    has_tower = "vision_config" in read_published(name)
    predicts = "qwen3.5" in name or "qwen3.6" in name
    assert len(reasons) == has_tower + predicts
    assert any("vision tower" in reason for reason in reasons) == bool(reasons)
    arguments = describe_decode(folder)
    assert len(find_kernels(decode, *arguments)) == KERNELS[name]
    lowered = jax.jit(decode).trace(*arguments).lower(lowering_platforms=("cuda",))
    assert "__gpu$xla.gpu.triton" in lowered.as_text()


@pytest.mark.thorough
@pytest.mark.parametrize("name", NAMES)
def test_the_decode_step_of_a_block_compiles_for_an_h200(name, block):
    """In a process of its own, since it loads the CUDA plugin."""
    if not _PLUGIN.is_dir() and importlib.util.find_spec("jax_cuda13_plugin") is None:
        pytest.skip("the CUDA plugin is not installed: `make test` does it")
    folder = str(block(name))
    command = [sys.executable, "-m", "tests.jaxwna16.models.published_decode", folder]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(_PLUGIN)}
    done = subprocess.run(command, cwd=_ROOT, env=environment, capture_output=True, text=True)
    assert done.stdout, done.stderr[-3000:]
    kernels = json.loads(done.stdout)[folder]
    wanted = set() if name == "kimi-k2-thinking" else {"_multiply_tile"}
    wanted |= set() if name in DENSE else {"_multiply_block"}
    assert {re.sub(r"__\d+$", "", kernel) for kernel in kernels} >= wanted
