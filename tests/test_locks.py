"""The lock files hold what pyproject.toml asks for; `make lock` makes them so again."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
LOCKS = sorted(ROOT.glob("locks/python*.txt"))
EXTRAS = ("demo", "docs", "eval", "gpu-check", "lint", "oracle", "plot", "test", "text")


def _list_requirements() -> list[Requirement]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = [project["optional-dependencies"][name] for name in EXTRAS]
    lines = [*project["dependencies"], *(line for extra in extras for line in extra)]
    return [r for r in map(Requirement, lines) if r.name != project["name"]]


def _read_versions(lock: Path) -> dict[str, str]:
    """What pip would take for the Python that the file is for, on Linux."""
    python = lock.stem.removeprefix("python")
    here = {"python_version": python, "python_full_version": f"{python}.0", "sys_platform": "linux"}
    pins = [Requirement(line) for line in lock.read_text(encoding="utf-8").splitlines()]
    return {
        canonicalize_name(pin.name): str(pin.specifier).removeprefix("==")
        for pin in pins
        if pin.marker is None or pin.marker.evaluate(here)
    }


def test_the_pythons_that_people_have_are_locked():
    assert {lock.stem for lock in LOCKS} >= {"python3.11", "python3.12", "python3.13"}


@pytest.mark.parametrize("lock", LOCKS, ids=lambda lock: lock.stem)
def test_a_lock_holds_all_that_is_asked_for(lock):
    versions = _read_versions(lock)
    missing = [
        str(asked)
        for asked in _list_requirements()
        if not asked.specifier.contains(versions.get(canonicalize_name(asked.name), "0"))
        or canonicalize_name(asked.name) not in versions
    ]
    assert missing == []


@pytest.mark.parametrize("lock", LOCKS, ids=lambda lock: lock.stem)
def test_the_compiler_of_gpu_kernels_is_that_of_jax(lock):
    versions = _read_versions(lock)
    assert versions["jax-cuda13-plugin"] == versions["jax-cuda13-pjrt"] == versions["jax"]
    assert versions["nvidia-nvvm"] == versions["nvidia-cuda-nvcc"]


def test_a_commit_is_checked_by_the_ruff_of_the_locks():
    config = (ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8")
    [rev] = re.findall(r"ruff-pre-commit\n +rev: v(.+)", config)
    assert {_read_versions(lock)["ruff"] for lock in LOCKS} == {rev}
