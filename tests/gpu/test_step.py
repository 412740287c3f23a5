"""The kernels between the products on a GPU: the cases that the simulator executes, for real.

Run with `python -m pytest -m gpu tests/gpu` on a machine with an NVIDIA GPU; skipped elsewhere.
"""

from __future__ import annotations

import jax
import numpy as np
import pytest

from tests import gpu_aot
from tests.executed.cases import list_all, name
from tests.gpu.test_products import TENSOR_CORE

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(jax.default_backend() != "gpu", reason="there is no GPU"),
]

IN_OTHER_FILES = {"product", "expansion", "experts", "grouping"}


def find_arch() -> str:
    """The described GPU with the capability of this one, or else the newest that is not newer."""
    capability = getattr(jax.devices()[0], "compute_capability", "9.0")
    mine = tuple(int(part) for part in str(capability).split("."))
    known = {(t.major, t.minor): arch for arch, t in gpu_aot.TARGETS.items()}
    return known[max((found for found in known if found <= mine), default=(8, 0))]


CASES = [
    case for case in list_all() if case.arch == find_arch() and case.kind not in IN_OTHER_FILES
]


@pytest.mark.parametrize("case", CASES, ids=name)
def test_kernels_compute_what_they_must(case):
    work = case.prepare()
    outputs = jax.jit(work.fn)(*work.arguments)
    found = [np.asarray(output) for output in jax.tree.leaves(outputs)]
    # whole numbers leave no rounding open; other bounds are for sums in float32
    assert work.measure(found) <= (1 if work.settled else TENSOR_CORE)
