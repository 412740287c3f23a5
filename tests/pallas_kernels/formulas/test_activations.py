"""Activations of experts against their definitions in float64, and inside a kernel for a GPU."""

from __future__ import annotations

import math
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jax.sharding import AbstractDevice, AbstractMesh

from pallas_kernels.errors import SpecError
from pallas_kernels.formulas.activations import ACTIVATIONS, IN_KERNEL, apply, check

U = 2.0**-24
ALONE = [name for name in ACTIVATIONS if name != "swigluoai"]


def sigmoid(h: float) -> float:
    return 1 / (1 + math.exp(-h)) if h > -700 else 0.0


def compute_exactly(name: str, gate: float, up: float | None) -> float:
    """In float64 from the definition; `erfc` keeps the tail of gelu that 1 + erf would cancel."""
    if name == "swigluoai":
        assert up is not None
        gate, up = min(gate, 7.0), max(-7.0, min(up, 7.0))
        return gate * sigmoid(1.702 * gate) * (up + 1)
    if name == "silu":
        y = gate * sigmoid(gate)
    elif name == "gelu":
        y = gate * math.erfc(-gate / math.sqrt(2)) / 2
    elif name == "gelu_tanh":
        inner = math.sqrt(2 / math.pi) * (gate + 0.044715 * gate**3)
        y = gate * sigmoid(2 * inner)  # (1 + tanh a) / 2 = sigmoid(2 a)
    elif name == "relu2":
        y = gate * gate if gate > 0 else 0.0
    else:
        raise ValueError(f"no activation of this name is known here: {name}")
    return y if up is None else y * up


def make_points() -> np.ndarray:
    """Both sides of every bend and limit, and of where float32 saturates."""
    fixed = [0.0, -0.0, 1e-30, -1e-30, 6.999, 7.0, 7.001, -6.999, -7.0, -7.001, 100.0, -100.0]
    return np.concatenate([fixed, np.linspace(-12, 12, 97)]).astype(np.float32)


def bound_of(name: str, gate: np.ndarray, exact: np.ndarray, factor: np.ndarray) -> np.ndarray:
    """|y - exact| in float32, `factor` being what the activation is multiplied by.

    exp, tanh and erf are good to 8 u, and each of at most 8 operations to u: 24 u of the result,
    and of |h| where 1 + tanh or 1 + erf cancels (their sum, at most 2, is off by 24 u). An argument
    of exp or tanh of size a is off by 8 u a, which moves a sigmoid by as much of itself; |a| <= 2
    |h|^3 + 2 there, and past |h| = 5 the sum has saturated.
    """
    absolute = 24 * U * np.abs(gate * factor) if name.startswith("gelu") else 0.0
    argument = np.minimum(np.abs(gate), 5.0)
    size = 2 * argument**3 + 2 if name == "gelu_tanh" else 2 * np.abs(gate)
    # what is below 2^-126, sigmoid(-88) for instance, may be flushed to 0
    return (24 + 8 * size) * U * np.abs(exact) + absolute + 2.0**-119 * (np.abs(factor) + 1)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_a_gated_activation_is_its_definition_times_up(name, compiled):
    gates, ups = (grid.reshape(-1) for grid in np.meshgrid(make_points(), make_points()))
    run = jax.jit(apply, static_argnums=0) if compiled else apply
    y = run(name, jnp.asarray(gates), jnp.asarray(ups))
    exact = np.array(
        [compute_exactly(name, float(g), float(u)) for g, u in zip(gates, ups, strict=True)]
    )
    # of swigluoai the error of up + 1 counts, which cancels at -1
    factor = np.minimum(np.abs(ups), 7) + 1 if name == "swigluoai" else ups.astype(np.float64)
    bound = bound_of(name, gates.astype(np.float64), exact, factor)
    assert y.dtype == jnp.float32
    assert np.all(np.abs(np.asarray(y, np.float64) - exact) <= bound)


@pytest.mark.parametrize("name", ALONE)
def test_an_activation_without_up_is_its_definition(name):
    gates = make_points()
    y = np.asarray(apply(name, jnp.asarray(gates)), np.float64)
    exact = np.array([compute_exactly(name, float(g), None) for g in gates])
    assert np.all(np.abs(y - exact) <= bound_of(name, gates.astype(np.float64), exact, np.ones(1)))


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_are_told_apart(name):
    gate, up = jnp.float32([-2.5, -0.4, 0.7, 3.0, 9.0]), jnp.float32([0.5, -1.5, 2.0, -9.0, 8.0])
    mine = np.asarray(apply(name, gate, up))
    for other in set(ACTIVATIONS) - {name}:
        gap = np.abs(np.asarray(apply(other, gate, up)) - mine).max()
        assert gap > (1e-4 if {name, other} == {"gelu", "gelu_tanh"} else 0.1)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_nan_stays_nan(name):
    nan, one = jnp.float32([jnp.nan]), jnp.ones(1)
    assert np.isnan(apply(name, nan, one)).all()
    assert np.isnan(apply(name, one, nan)).all()


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_slopes_are_those_of_the_definition(name):
    """Central differences of step d in float64 are off by d^2 / 6 times a third derivative, which
    is below 100 here, and by 2^-52 |y| / d: below 1e-7 together. Points stay off the bends."""
    gates = np.array([-9.5, -3.1, -0.6, 0.3, 1.7, 6.2, 8.5], np.float32)
    ups = np.array([-8.3, -2.2, 0.4, 5.1, 9.4, -0.9, 3.3], np.float32)
    slopes = jax.grad(lambda g, u: apply(name, g, u).sum(), argnums=(0, 1))(
        jnp.asarray(gates), jnp.asarray(ups)
    )
    d = 1e-5
    for i, (gate, up) in enumerate(zip(gates.tolist(), ups.tolist(), strict=True)):
        by_gate = compute_exactly(name, gate + d, up) - compute_exactly(name, gate - d, up)
        by_up = compute_exactly(name, gate, up + d) - compute_exactly(name, gate, up - d)
        for slope, difference in zip(slopes, (by_gate, by_up), strict=True):
            assert abs(float(slope[i]) - difference / (2 * d)) <= 1e-5 + 1e-5 * abs(slope[i])


def lower_for_gpu(name: str) -> str:
    """The module of a Pallas-Triton kernel that applies an activation."""

    def kernel(gate, up, y):
        y[...] = apply(name, gate[...], up[...])

    def run(gate, up):
        shape = jax.ShapeDtypeStruct(gate.shape, gate.dtype)
        options = plgpu.CompilerParams(num_warps=4)
        return pl.pallas_call(kernel, out_shape=shape, compiler_params=options)(gate, up)

    zeros = jnp.zeros(64)
    # since jax 0.11 Pallas-Triton asks the mesh which GPU it lowers for, and warns of its end
    gpu = AbstractMesh((1,), ("x",), abstract_device=AbstractDevice("NVIDIA H100", 132, "cuda"))
    with jax.sharding.use_abstract_mesh(gpu), warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*Triton.*", DeprecationWarning)
        return jax.jit(run).trace(zeros, zeros).lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.parametrize("name", IN_KERNEL)
def test_a_kernel_for_a_gpu_can_apply_it_and_keeps_nan(name):
    """minnumf and maxnumf, to which minimum and maximum lower, give the operand that is no NaN."""
    module = lower_for_gpu(name)
    assert "triton" in module
    assert "mulf" in module  # the bytecode spells out names of operations
    assert "numf" not in module


def test_gelu_stays_outside_because_a_kernel_has_no_error_function():
    assert set(ACTIVATIONS) - set(IN_KERNEL) == {"gelu"}
    with pytest.raises(NotImplementedError, match="erf"):
        lower_for_gpu("gelu")


def test_impossible_activations_are_refused():
    for name in ACTIVATIONS:
        check(name, True)
    with pytest.raises(SpecError, match=r"activation must be one of \('silu', .* got 'swish'"):
        check("swish", True)
    with pytest.raises(SpecError, match="'swigluoai' is for gated experts"):
        check("swigluoai", False)
