"""Compiled programs that outlive the process: JAX's own persistent cache, in the user's folder."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import jax


def keep_compiled() -> None:
    """Let JAX keep what takes a second or more to compile, for the next call of the command.

    `JAX_COMPILATION_CACHE_DIR` names another folder, `JAX_ENABLE_COMPILATION_CACHE=false` turns it
    off; both are JAX's own. Where the folder cannot be made, nothing is kept.
    """
    config: Any = jax.config  # its settings are not known to type checkers
    if not config.jax_enable_compilation_cache or config.jax_compilation_cache_dir is not None:
        return
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    folder = Path(cache, "jaxwna16", "compiled")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return
    config.update("jax_compilation_cache_dir", str(folder))
