"""Small random checkpoints that the examples run on."""

from __future__ import annotations

import jax
import pytest

import jaxwna16
from examples.make_moe import make_moe
from tests.jaxwna16.cli.checkpoints import write_float_checkpoint


@pytest.fixture(scope="session")
def floats(tmp_path_factory):
    """A Llama of two layers that is not quantized."""
    folder = tmp_path_factory.mktemp("examples") / "floats"
    write_float_checkpoint(folder)
    return folder


@pytest.fixture(scope="session")
def packed(floats):
    """The same in 4 bits."""
    return quantize(floats, floats.parent / "packed")


@pytest.fixture(scope="session")
def packed_moe(floats):
    """A Mixtral made of it, whose experts differ, in 4 bits."""
    return quantize(
        make_moe(floats, floats.parent / "moe", noise=0.5), floats.parent / "packed_moe"
    )


@pytest.fixture
def usual_promotion():
    """optax does not keep the strict rules of our tests."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


def quantize(source, destination):
    jaxwna16.quantize_checkpoint(source, destination, group_size=32, symmetric=False)
    return destination
