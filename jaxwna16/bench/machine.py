"""The machine, versions, commit and date that a result must carry to be read later."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

_PACKAGES = ("jax", "jaxlib", "numpy", "torch", "triton")
_DRIVER = Path("/proc/driver/nvidia/version")


def describe_machine() -> dict[str, Any]:
    """Device, driver, versions, commit of this source and date; None where it is not known."""
    import jax

    from jaxwna16.version import __version__

    device = jax.devices()[0]
    changes = _run_git("status", "--porcelain", "--untracked-files=no") if _is_ours() else None
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": find_commit(),
        "uncommitted_changes": None if changes is None else bool(changes),
        "device": {"platform": device.platform, "kind": device.device_kind},
        "driver": _read_driver(),
        "processors": os.cpu_count(),
        "python": platform.python_version(),
        "versions": {
            "jaxwna16": __version__,
            **{name: _find_version(name) for name in (*_PACKAGES, *_list_plugins())},
        },
    }


def find_commit() -> str | None:
    """The commit of this source: git's, or $JAXWNA16_COMMIT where git does not know it."""
    known = _run_git("rev-parse", "HEAD") if _is_ours() else None
    return known or os.environ.get("JAXWNA16_COMMIT")


def _is_ours() -> bool:
    """A copy installed inside another repository must not carry that one's commit."""
    return _run_git("ls-files", "--error-unmatch", Path(__file__).name) is not None


def _list_plugins() -> list[str]:
    names = (f"jax-cuda{major}-plugin" for major in (12, 13))
    return [name for name in names if _find_version(name)]


def _find_version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _read_driver() -> str | None:
    """The first line of what the NVIDIA driver says about itself."""
    try:
        return _DRIVER.read_text(encoding="utf-8", errors="replace").splitlines()[0].strip()
    except (OSError, IndexError):
        return None


def _run_git(*arguments: str) -> str | None:
    """What git says about the folder this file is in; None without git or a repository."""
    try:
        done = subprocess.run(
            ["git", *arguments],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            check=False,
        )
    except OSError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None
