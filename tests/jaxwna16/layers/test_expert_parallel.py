"""Experts divided among devices with `jax.shard_map`: each adds its own, a sum adds the parts."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

_ROOT = Path(__file__).parents[3]
_PROGRAM = """
import functools
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import Mesh, PartitionSpec as P
import jaxwna16
from tests.pallas_kernels.experts import draw_choices, make_experts
from tests.pallas_kernels.products import make_x

experts = make_experts(8, 64, 64, bias=True)
x, (ids, weights) = make_x((12, 64)), draw_choices(12, 8, 3)
mesh = Mesh(np.array(jax.devices()), ("expert",))
assert mesh.size == 4

def one_device(x, ids, weights, w13, w2):
    offset = jax.lax.axis_index("expert") * w13["packed"].shape[0]
    part = jaxwna16.quant_moe(
        x, ids, weights, w13, w2, *experts.specs, expert_offset=offset
    )
    return jax.lax.psum(part, "expert")

split = jax.shard_map(
    one_device, mesh=mesh, in_specs=(P(), P(), P(), P("expert"), P("expert")), out_specs=P(),
    check_vma=False,
)
found = jax.jit(split)(x, ids, weights, *experts.stacks)
whole = jaxwna16.quant_moe(x, ids, weights, *experts.arguments)
# one float32 sum in two orders, of about a hundred terms each
assert np.abs(np.asarray(found - whole)).max() <= 256 * 2.0**-24 * np.abs(np.asarray(whole)).max()
print("good")
"""


def test_four_devices_with_two_experts_each_give_what_one_gives():
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=4",
        "PYTHONPATH": str(_ROOT),
    }
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", _PROGRAM],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "good"
