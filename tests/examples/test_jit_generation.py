"""The decode loop of the example, run as a user runs it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_loop_writes_what_generate_writes_for_prompts_of_different_lengths(packed):
    command = [sys.executable, "-W", "error", "examples/jit_generation.py", str(packed)]
    prompts = ["--prompt", "The capital", "--prompt", "a", "--prompt", "Once upon a time"]
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [*command, *prompts, "--new-tokens", "40"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        encoding="utf-8",
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    shares = re.findall(r"^-- (\d+)% of (\d+) tokens", done.stdout, re.M)
    assert [share for share, _ in shares] == ["100"] * 3
    assert all(int(count) > 10 for _, count in shares)
    speeds = re.findall(r"decode +([\d.]+) tokens/s", done.stdout)
    assert len(speeds) == 2
    assert all(float(speed) > 0 for speed in speeds)
