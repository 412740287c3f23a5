"""Launches of cases, compiled by a process of its own: it loads the CUDA plugin.

    python -m tests.executed.compiled FUNCTION NUMBER ...

prints, as JSON, the launches of the cases with these numbers in what a function of
`tests.executed.cases` lists. For the path that the compiler needs see `tests.gpu_aot`.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Collection
from pathlib import Path

import pytest

from tests.executed import cases
from tests.ptx.launch import Launch

_ROOT = Path(__file__).parents[2]
# in a folder of its own: beside jax it would complain about the missing GPU at every start
_PLUGIN = Path(sys.prefix) / "gpu-check"


def compile_cases(
    function: str, wanted: Collection[cases.Case] | None = None
) -> dict[cases.Case, Launch]:
    """The launch of each case that this function lists, or of the wanted ones among them.

    Skips the test without the plugin.
    """
    if not _PLUGIN.is_dir() and importlib.util.find_spec("jax_cuda13_plugin") is None:
        pytest.skip("the CUDA plugin is not installed: `make test` does it")
    listed = dict(enumerate(getattr(cases, function)()))
    chosen = {i: case for i, case in listed.items() if wanted is None or case in wanted}
    command = [sys.executable, "-m", "tests.executed.compiled", function, *map(str, chosen)]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(_PLUGIN)}
    environment["JAX_ENABLE_COMPILATION_CACHE"] = "false"  # what is not compiled leaves no code
    environment.pop("XLA_FLAGS", None)  # how well the tests' own programs are optimized
    done = subprocess.run(command, cwd=_ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    launches = map(Launch.from_dict, json.loads(done.stdout))
    return dict(zip(chosen.values(), launches, strict=True))


if __name__ == "__main__":
    listed = getattr(cases, sys.argv[1])()
    chosen = [listed[int(number)] for number in sys.argv[2:]]
    print(json.dumps([dataclasses.asdict(case.prepare().compile(case.arch)) for case in chosen]))
