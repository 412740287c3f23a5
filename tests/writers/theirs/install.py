"""Install a writer, by its name in the package index, into the environment of this interpreter.

    .venv-writers/auto-round/bin/python tests/writers/theirs/install.py auto-round torch==2.13.0

torch comes first and stays: a writer that asks for a newer one would bring gigabytes for GPUs. Such
a writer is installed without what it depends on, and that by itself, but for torch.
"""

from __future__ import annotations

import importlib.metadata
import re
import subprocess
import sys

PIP = (sys.executable, "-m", "pip", "install", "--quiet", "--no-compile")
EXTRAS = {"auto-round": ["compressed-tensors"]}
"""What a writer needs for the formats that we ask for."""


def install(name: str, torch: str) -> None:
    """Install this writer, at its newest version."""
    subprocess.run([*PIP, torch], check=True)
    subprocess.run([*PIP, "--no-deps", name], check=True)
    needed = importlib.metadata.requires(name) or []
    others = [line for line in needed if not re.match(r"torch\b(?!-)", line)]
    others = [line for line in others if "extra ==" not in line]
    subprocess.run([*PIP, *others, *EXTRAS.get(name, []), torch], check=True)


if __name__ == "__main__":
    install(*sys.argv[1:])
