"""Killing `convert` and `quantize` 50 times leaves nothing, or everything, under the final name."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

import jaxwna16
from tests.folders import write_folder
from tests.jaxwna16.checkpoints.converted import assert_same, write_source

ROOT = Path(__file__).parents[3]
KILLS_AT_OPERATIONS, KILLS_AT_TIMES, KILLS_WHILE_COMPUTING = 10, 9, 6  # of each verb: 50
LONGEST = 0.5  # seconds that a child takes which computes its numbers


def write_floats(folder: Path) -> Path:
    """Two shards with three linear weights and a norm."""
    numbers = np.random.default_rng(0)
    names = [f"model.layers.{i}.q_proj.weight" for i in range(3)]
    weights = {name: numbers.standard_normal((64, 96), np.float32) for name in names}
    norm = {"model.norm.weight": np.ones(64, ml_dtypes.bfloat16)}
    return write_folder(folder, {"model_type": "none"}, [weights, norm])


@pytest.fixture(scope="module")
def do():
    """Give the process a job, and get what came of it."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-m", "tests.jaxwna16.checkpoints.killed_writers"]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, env=environment, text=True, cwd=ROOT, **pipes) as process:

        def do(**job) -> dict:
            process.stdin.write(json.dumps(job) + "\n")
            process.stdin.flush()
            return json.loads(process.stdout.readline())

        yield do
        process.stdin.close()


@pytest.mark.parametrize("verb", ["convert", "quantize"])
def test_killed_writer_leaves_all_or_nothing_and_the_next_one_cleans_up(do, tmp_path, verb):
    source, whole, out = tmp_path / "source", tmp_path / "whole", tmp_path / "out"
    partial = tmp_path / ".out.partial"
    (write_source if verb == "convert" else write_floats)(source)
    never = {"operation": None, "seconds": None}
    job = {"verb": verb, "source": str(source), "destination": str(out), "numbers": str(whole)}
    made = do(**job | never | {"destination": str(whole), "numbers": None})
    assert made["status"] == 0
    expected = jaxwna16.load_checkpoint(whole)
    kept = {path.name: path.read_bytes() for path in whole.iterdir() if path.suffix != ".json"}

    normal = do(**job | never)
    assert normal["status"] == 0
    shutil.rmtree(out)
    chance = random.Random(verb)
    moments = [
        {"operation": chance.randint(1, normal["operations"]), "seconds": None}
        for _ in range(KILLS_AT_OPERATIONS)
    ]
    moments += [
        {"operation": None, "seconds": 1.2 * normal["seconds"] * chance.random()}
        for _ in range(KILLS_AT_TIMES)
    ]
    moments += [
        {"operation": None, "seconds": LONGEST * chance.random(), "numbers": None}
        for _ in range(KILLS_WHILE_COMPUTING)
    ]
    killed = left = 0
    for moment in moments:
        outcome = do(**job | moment)
        assert outcome["status"] in (0, -signal.SIGKILL)
        killed += outcome["status"] != 0
        left += partial.exists()
        if out.exists():
            assert_same(jaxwna16.load_checkpoint(out), expected)
            shutil.rmtree(out)
    assert killed >= KILLS_AT_OPERATIONS
    assert left >= KILLS_AT_OPERATIONS // 2

    assert do(**job | never)["status"] == 0
    assert not partial.exists()
    assert kept == {path.name: path.read_bytes() for path in out.iterdir() if path.name in kept}
    assert_same(jaxwna16.load_checkpoint(out), expected)
