"""Names that other tools give a model's packed weights, where they are not transformers' own.

`make test-writers` lets the newest of those tools write; what it finds becomes a row here.
"""

from __future__ import annotations

import jax.numpy as jnp
import pytest
from safetensors.torch import load_file, save_file

import jaxwna16
from pallas_kernels import QuantSpec
from tests.checkpoints import make_args
from tests.jaxwna16.models.family_rows import BASES
from tests.jaxwna16.models.hf_checkpoints import load_reference, write_folders
from tests.jaxwna16.models.hf_models import (
    forward,
    make_reference,
    random_tokens,
    reference_logits,
    relative_error,
)

WRITTEN = {
    "llm-compressor 0.14, mixtral": {
        ".w1.": ".gate_proj.",
        ".w3.": ".up_proj.",
        ".w2.": ".down_proj.",
    },
}
"""Writer and model_type -> what it writes in place of parts of transformers' names."""


@pytest.mark.parametrize("name", WRITTEN)
def test_a_model_under_the_names_of_a_writer_has_the_logits_of_transformers(name, tmp_path):
    spec = QuantSpec(bits=4, group_size=16, symmetric=False, in_features=64, out_features=64)
    reference = make_reference(BASES[name.rpartition(" ")[2]])
    folders = write_folders(reference, tmp_path, make_args(spec, "bfloat16"))
    path = folders.packed / "model.safetensors"
    tensors = load_file(path)
    for old, new in WRITTEN[name].items():
        assert any(old in tensor for tensor in tensors)
        tensors = {tensor.replace(old, new): array for tensor, array in tensors.items()}
    save_file(tensors, path, metadata={"format": "pt"})
    tokens = random_tokens(2, 16)
    ours = forward(jaxwna16.load_model(folders.packed, dtype="float32"), jnp.asarray(tokens))
    expected = reference_logits(load_reference(folders), tokens)
    assert relative_error(ours, expected) < 1e-4
