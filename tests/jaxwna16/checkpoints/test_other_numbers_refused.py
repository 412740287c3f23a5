"""FP8 beside packed integers is refused by everything that reads a checkpoint."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file

from jaxwna16 import (
    CheckpointError,
    convert_checkpoint,
    dequantize_checkpoint,
    load_checkpoint,
    load_model,
    quantize_checkpoint,
)
from jaxwna16.cli.main import main
from tests.loaders.modules.test_other_numbers import HEADS, KINDS, write


@pytest.mark.parametrize("work", ["load_checkpoint", "load_model", "convert", "rewrite", "verify"])
def test_everything_that_reads_a_checkpoint_says_so(tmp_path, capsys, work):
    folder, out = write(tmp_path / "c", KINDS["block"][0]), tmp_path / "out"
    if work == "verify":
        assert main(["verify", str(folder)]) == main(["inspect", str(folder)]) == 1
        text = " ".join(capsys.readouterr().err.split())
        assert text.count("FP8 weights (float8_e4m3fn): only packed integers are read") == 2
        return
    calls = {
        "load_checkpoint": [lambda: load_checkpoint(folder)],
        "load_model": [lambda: load_model(folder)],
        "convert": [lambda: convert_checkpoint(folder, out)],
        "rewrite": [
            lambda: dequantize_checkpoint(folder, out),
            lambda: quantize_checkpoint(folder, out),
        ],
    }
    for call in calls[work]:
        with pytest.raises(CheckpointError, match=r"1 fault\n.*FP8 weights.* 8 modules"):
            call()
    assert not out.exists()


def test_the_way_out_of_the_fault_works(tmp_path):
    """Products of FP8 and a power of two are exact in bfloat16."""
    folder = write(tmp_path / "c", KINDS["tensor"][0])
    tensors = load_file(folder / "model.safetensors")
    for path in HEADS:
        scale = tensors.pop(f"{path}.weight_scale")[0, 0] * 2.0**-4
        weight = torch.linspace(-400, 400, 4096).reshape(64, 64).to(torch.float8_e4m3fn)
        tensors[f"{path}.weight"] = (weight.float() * scale).to(torch.bfloat16)
    save_file(tensors, folder / "model.safetensors")
    read = load_checkpoint(folder).find(f"{HEADS[0]}.weight")
    assert torch.equal(torch.tensor(read.tolist()), tensors[f"{HEADS[0]}.weight"].float())
