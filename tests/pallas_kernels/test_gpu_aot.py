"""The kernel's machine code for a GPU, made and read on a machine without one."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels.spec import QuantSpec
from pallas_kernels.triton import matmul

_ROOT = Path(__file__).parents[2]
# in a folder of its own: beside jax it would complain about the missing GPU at every start
_PLUGIN = Path(sys.prefix) / "gpu-check"
_CASES = [  # bits, symmetric, M
    (4, True, 1),
    (4, False, 16),
    (8, True, 16),
    (8, False, 1),
]


def list_cases() -> dict:
    """The cases that `tests.gpu_aot` compiles, by name."""
    return {_name(*case): _build(*case) for case in _CASES}


def _name(bits: int, symmetric: bool, tokens: int) -> str:
    return f"w{bits}-{'symmetric' if symmetric else 'asymmetric'}-m{tokens}"


def _build(bits: int, symmetric: bool, tokens: int):
    spec = QuantSpec(
        bits=bits, group_size=128, symmetric=symmetric, in_features=4096, out_features=4096
    )

    def multiply(x, packed, scale, zero_point=None):
        return matmul(x, packed, scale, zero_point, spec, interpret=False)

    specs = [
        jax.ShapeDtypeStruct((tokens, spec.in_features), jnp.bfloat16),
        jax.ShapeDtypeStruct(spec.packed_shape, jnp.uint16),
        jax.ShapeDtypeStruct(spec.scale_shape, jnp.bfloat16),
    ]
    if not symmetric:
        specs.append(jax.ShapeDtypeStruct(spec.scale_shape, jnp.int8))
    return multiply, specs


@pytest.fixture(scope="module")
def kernels() -> dict[str, list[dict]]:
    """The reports for sm_90a, from one process of its own: it loads the CUDA plugin."""
    if not _PLUGIN.is_dir() and importlib.util.find_spec("jax_cuda13_plugin") is None:
        pytest.skip("the CUDA plugin is not installed: `make test` does it")
    cases = "tests.pallas_kernels.test_gpu_aot:list_cases"
    command = [sys.executable, "-m", "tests.gpu_aot", cases, "--json"]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(_PLUGIN)}
    done = subprocess.run(command, cwd=_ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("case", [_name(*case) for case in _CASES])
def test_kernel_compiles_for_a_hopper_gpu_without_spills(kernels, case):
    [kernel] = kernels[case]
    assert kernel["spill_bytes"] == 0
    assert 0 < kernel["shared_bytes"] <= kernel["shared_limit"]


@pytest.mark.parametrize("case", [_name(*case) for case in _CASES])
def test_main_loop_uses_tensor_cores_and_asynchronous_copies(kernels, case):
    [kernel] = kernels[case]
    assert any(opcode.startswith(("HMMA", "HGMMA")) for opcode in kernel["loop"])
    assert any(opcode.startswith("LDGSTS") for opcode in kernel["loop"])
