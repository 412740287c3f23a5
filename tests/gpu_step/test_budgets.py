"""Whole programs, compiled for an absent GPU, have no more kernels than `budgets` allows."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.gpu_step.budgets import BUDGETS, find_budget, find_faults
from tests.gpu_step.cases import list_core, list_programs
from tests.gpu_step.readings import Kernel, Program, Reading, from_json, to_json

_ROOT = Path(__file__).parents[2]
# in a folder of its own: beside jax it would complain about the missing GPU at every start
_PLUGIN = Path(sys.prefix) / "gpu-check"

_KERNEL = Kernel("add_norm", "add_norm", ("norm.weight",), 1, 1, 1, 10, 10, 0.0, True, False, 0)
_GOOD = Reading(
    program=Program("Llama-3.1-8B", "sm_90a", "decode", 1, 3),
    seconds={"trace": 1.0, "lower": 1.0, "compile": 1.0},
    temporaries=1,
    command_buffers=1,
    kinds=["attention"] * 3,
    whole_layers=32,
    tokens=1,
    layer_bytes=[10.0] * 3,
    end_bytes=10.0,
    kernels=[_KERNEL] * 9,
    sampled=[_KERNEL] * 9,
)


@pytest.fixture(scope="module")
def readings() -> dict[str, Reading]:
    """Of the core programs, from processes of their own: they load the CUDA plugin."""
    if not _PLUGIN.is_dir() and importlib.util.find_spec("jax_cuda13_plugin") is None:
        pytest.skip("the CUDA plugin is not installed: `make test` does it")
    command = [sys.executable, "-m", "tests.gpu_step", "--core", "--json"]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(_PLUGIN)}
    environment["JAX_ENABLE_COMPILATION_CACHE"] = "false"  # what is not compiled leaves no code
    environment.pop("XLA_FLAGS", None)  # how well the tests' own programs are optimized
    done = subprocess.run(command, cwd=_ROOT, env=environment, capture_output=True, text=True)
    assert done.stdout, done.stderr
    found = [from_json(Reading, json.dumps(each)) for each in json.loads(done.stdout)]
    assert len(found) == len(list_core()), done.stderr
    return {str(reading.program): reading for reading in found}


@pytest.mark.parametrize("program", list_core(), ids=str)
def test_core_programs_stay_within_their_budgets(readings, program):
    assert find_faults(readings[str(program)]) == []


@pytest.mark.parametrize("program", list_core(), ids=str)
def test_a_step_is_recorded_and_moves_little_more_than_it_must(readings, program):
    """Its kernels are played back by the GPU, and read each weight once.

    A tenth more is for partial sums and for what XLA cuts off; in a piece activations go through
    memory between kernels.
    """
    reading = readings[str(program)]
    outside = [kernel for kernel in reading.kernels if not kernel.is_recorded]
    assert len(outside) <= 2  # the loop's predicate, which the host reads
    layer = reading.find_typical(reading.kinds[0])
    moved = sum(kernel.bytes for kernel in reading.list_layer(layer))
    assert reading.layer_bytes[layer] <= moved
    if program.kind == "decode":
        assert moved <= 1.1 * reading.layer_bytes[layer]


def test_every_budget_is_of_a_program_that_is_compiled():
    models = {program.model for program in list_programs(4, whole=False)}
    assert {model for model, _ in BUDGETS} <= models


def test_a_budget_holds_for_decoding_few_rows():
    program = _GOOD.program
    assert find_budget(program, "attention") == 9
    assert find_budget(dataclasses.replace(program, size=64), "attention") is None
    assert find_budget(dataclasses.replace(program, kind="prefill"), "attention") is None


def test_a_good_program_has_no_faults_and_survives_the_way_between_processes():
    assert find_faults(_GOOD) == []
    assert from_json(Reading, to_json(_GOOD)) == _GOOD
    assert from_json(Program, to_json(_GOOD.program)) == _GOOD.program


@pytest.mark.parametrize(
    ("kernels", "fault"),
    [
        ([_KERNEL] * 10, "10 kernels a layer of attention, budget 9"),
        (
            [dataclasses.replace(_KERNEL, copies_cache=True)],
            "add_norm (add_norm) writes a whole cache",
        ),
        ([dataclasses.replace(_KERNEL, scores=99)], "add_norm (add_norm) writes 99 scores"),
    ],
)
def test_every_fault_is_found(kernels, fault):
    assert find_faults(dataclasses.replace(_GOOD, kernels=kernels)) == [fault]
