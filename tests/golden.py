"""Checkpoint folders of the recorded files that old versions of compressed-tensors wrote."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors.numpy import load_file

from tests.folders import write_folder

FOLDER = Path(__file__).parent / "loaders" / "golden"
VERSIONS = ("0.8.1", "0.9.3", "0.17.0", "0.18.0")


def write_golden(folder: Path, version: str) -> Path:
    """Write the modules of one version, without what it decompresses them to."""
    tensors = load_file(FOLDER / f"ct-{version}.safetensors")
    config = {"quantization_config": json.loads((FOLDER / f"ct-{version}.json").read_text())}
    modules = {name: array for name, array in tensors.items() if not name.endswith(".expected")}
    return write_folder(folder, config, [modules])
