"""A loaded model and other processes: a fork is refused at once, a spawned one computes alike."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.fuzz.bases import make_bases

ROOT = Path(__file__).parents[1]
_SCRIPT = """
import multiprocessing, os, sys, warnings
import numpy as np
import jaxwna16
from jaxwna16.generation.tokens import generate_tokens

def compute(folder, results=None):
    model = jaxwna16.load_model(folder)
    logits = np.asarray(model([[1, 2, 3]]))
    if results is not None:
        results.put(logits.tolist())
    return model, logits

def list_errors(model, folder):
    calls = (
        lambda: model([[1, 2, 3]]),
        lambda: generate_tokens(model, [[1, 2]], max_new_tokens=2),
        lambda: jaxwna16.load_checkpoint(folder),
        lambda: jaxwna16.load_model(folder),
        lambda: jaxwna16.convert_checkpoint(folder, folder + "2"),
        lambda: jaxwna16.quantize_checkpoint(folder, folder + "2"),
        lambda: jaxwna16.dequantize_checkpoint(folder, folder + "2"),
        lambda: jaxwna16.measure_perplexity(model, [1] * 9, window=4),
    )
    for call in calls:
        try:
            call()
            print("none", flush=True)
        except jaxwna16.InputError as error:
            print(error, flush=True)

if __name__ == "__main__":
    folder, way = sys.argv[1:]
    if way == "fork":  # one from before anything was loaded can load
        if not os.fork():
            compute(folder)
            os._exit(0)
        assert os.wait()[1] == 0
    model, logits = compute(folder)
    if way == "fork":
        warnings.simplefilter("ignore")  # of JAX, which says what may happen
        if not os.fork():
            list_errors(model, folder)
            os._exit(0)
        os.wait()
    else:
        spawn = multiprocessing.get_context("spawn")
        results = spawn.Queue()
        process = spawn.Process(target=compute, args=(folder, results))
        process.start()
        assert results.get(timeout=60) == logits.tolist()
        process.join()
    model([[1, 2, 3]])  # the first process goes on
"""


def _run(tmp_path: Path, way: str) -> list[str]:
    folder, script = tmp_path / "c", tmp_path / "script.py"
    folder.mkdir()
    for name, content in make_bases()["llama"].items():
        (folder / name).write_bytes(content)
    script.write_text(_SCRIPT)
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(script), str(folder), way]
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, check=False, timeout=100
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="a system without fork")
def test_a_fork_of_a_process_with_a_model_is_told_so_and_does_not_hang(tmp_path):
    lines = _run(tmp_path, "fork")
    assert len(lines) == 8
    assert all("forked from one that had loaded" in line and "'spawn'" in line for line in lines)


def test_a_spawned_process_loads_and_computes_the_same(tmp_path):
    assert _run(tmp_path, "spawn") == []
