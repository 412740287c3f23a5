"""The gated delta rule and its convolution against transformers' torch functions and float64."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers.models.qwen3_5 import modeling_qwen3_5 as theirs

from pallas_kernels.xla.delta_rule import CHUNK, convolve, run_delta_rule

ROWS, KEY_HEADS, HEADS, DK, DV = 2, 2, 4, 16, 8
run = jax.jit(run_delta_rule)
STEP = 2.0**-24
"""Relative rounding error of one float32 operation."""


def draw(steps: int, seed: int = 0, decay: float = 1.0) -> dict[str, np.ndarray]:
    """Inputs as the layer makes them: g = -exp(A) softplus(a), beta in (0, 1)."""
    random = np.random.default_rng(seed)

    def normal(*shape: int) -> np.ndarray:
        return random.standard_normal((ROWS, steps, *shape)).astype(np.float32)

    return {
        "q": normal(KEY_HEADS, DK),
        "k": normal(KEY_HEADS, DK),
        "v": normal(HEADS, DV),
        "g": -decay * np.log1p(np.exp(normal(HEADS))),
        "beta": 1 / (1 + np.exp(-normal(HEADS))),
    }


def draw_state(seed: int = 9) -> np.ndarray:
    shape = (ROWS, HEADS, DK, DV)
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def run_exactly(q, k, v, g, beta, state) -> tuple[np.ndarray, np.ndarray]:
    """The recurrence of the module's docstring, in float64."""

    def normalise(x):
        x = x.astype(np.float64)
        return np.repeat(x / np.sqrt((x * x).sum(-1, keepdims=True) + 1e-6), HEADS // KEY_HEADS, 2)

    q, k, state, out = normalise(q) * DK**-0.5, normalise(k), state.astype(np.float64), []
    for t in range(q.shape[1]):
        state = state * np.exp(g[:, t].astype(np.float64))[..., None, None]
        delta = beta[:, t, :, None] * (v[:, t] - np.einsum("bhkv,bhk->bhv", state, k[:, t]))
        state = state + k[:, t][..., None] * delta[:, :, None]
        out.append(np.einsum("bhkv,bhk->bhv", state, q[:, t]))
    return np.stack(out, axis=1), state


def run_torch(name: str, inputs: dict[str, np.ndarray], state: np.ndarray):
    tensors = [torch.from_numpy(inputs[key]) for key in ("q", "k", "v")]
    with torch.no_grad():
        out, state = getattr(theirs, name)(
            *tensors,
            g=torch.from_numpy(inputs["g"]),
            beta=torch.from_numpy(inputs["beta"]),
            initial_state=torch.from_numpy(state.copy()),
            output_final_state=True,
            use_qk_l2norm_in_kernel=True,
        )
    return out.numpy(), state.numpy()


def full(steps: int) -> np.ndarray:
    return np.full(ROWS, steps, np.int32)


def bound(steps: int) -> float:
    """How far two float32 computations may be apart, over the largest value.

    alpha <= 1 and |I - beta k k^T| <= 1: what a token rounds is never amplified later, so that the
    errors of all tokens at most add up. A token's is that of sums of Dk products, and of a chunk's
    C products beside them where it is one system; rounding to nearest has no preferred sign, so
    that n of them add up to about sqrt(n), of which this is twice.
    """
    return 2 * (steps * (DK + min(steps, CHUNK))) ** 0.5 * STEP


def apart(ours, expected: np.ndarray) -> float:
    return float(np.abs(np.asarray(ours) - expected).max() / np.abs(expected).max())


@pytest.mark.parametrize("decay", [0.01, 1.0, 16.0])
@pytest.mark.parametrize("steps", [1, 2, 64, 257])
def test_pieces_equal_float64_and_both_functions_of_transformers(steps, decay):
    inputs, start = draw(steps, decay=decay), draw_state()
    out, state = run(**inputs, state=start, count=full(steps))
    exact_out, exact_state = run_exactly(**inputs, state=start)
    assert apart(out, exact_out) < bound(steps)
    assert apart(state, exact_state) < bound(steps)
    for name in ("torch_chunk_gated_delta_rule", "torch_recurrent_gated_delta_rule"):
        their_out, their_state = run_torch(name, inputs, start)
        assert apart(out, their_out) < 2 * bound(steps)
        assert apart(state, their_state) < 2 * bound(steps)


def test_keys_that_are_all_alike_are_no_less_exact():
    """The system of a chunk is then as far from the identity as it can be."""
    steps = 128
    inputs, start = draw(steps), draw_state()
    inputs["k"] = np.broadcast_to(inputs["k"][:, :1], inputs["k"].shape).copy()
    inputs["beta"] = np.full_like(inputs["beta"], 0.999)
    inputs["g"] = np.full_like(inputs["g"], -1e-4)
    out, state = run(**inputs, state=start, count=full(steps))
    exact_out, exact_state = run_exactly(**inputs, state=start)
    assert apart(out, exact_out) < bound(steps)
    assert apart(state, exact_state) < bound(steps)


@pytest.mark.parametrize("cuts", [(64, 64, 12), (1, 100, 39)])
def test_a_piece_after_a_piece_continues_it(cuts):
    steps, start = 140, draw_state()
    inputs = draw(steps)
    whole, last = run(**inputs, state=start, count=full(steps))
    pieces, state, first = [], jnp.asarray(start), 0
    for length in cuts:
        part = {name: x[:, first : first + length] for name, x in inputs.items()}
        out, state = run(**part, state=state, count=full(length))
        pieces.append(out)
        first += length
    assert apart(jnp.concatenate(pieces, axis=1), np.asarray(whole)) < bound(steps)
    assert apart(state, np.asarray(last)) < bound(steps)


@pytest.mark.parametrize("steps", [1, 70])
def test_padding_leaves_the_state_of_each_row_as_it_is_whatever_it_holds(steps):
    start, count = draw_state(), np.array([0, steps // 2], np.int32)
    inputs = draw(steps)
    for name, x in inputs.items():
        for row, length in enumerate(count):
            x[row, length:] = np.nan if name != "g" else -np.inf
    out, state = run(**inputs, state=start, count=count)
    np.testing.assert_array_equal(state[0], start[0])
    clean = {
        name: np.nan_to_num(x[:, : max(steps // 2, 1)], neginf=0) for name, x in inputs.items()
    }
    alone, expected = run_exactly(**clean, state=start)
    if steps > 1:
        assert apart(state[1], expected[1]) < bound(steps)
        assert apart(out[1, : count[1]], alone[1]) < bound(steps)
    else:
        np.testing.assert_array_equal(state, start)


def test_a_piece_is_widened_a_chunk_at_a_time():
    """A token of it takes at most twice what comes in and goes out, in 16 bits."""
    key_heads, heads, width = 2, 8, 32

    def measure(steps: int) -> tuple[int, int]:
        def shape(*sizes: int, dtype="bfloat16") -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct((1, *sizes), dtype)

        keys, values = shape(steps, key_heads, width), shape(steps, heads, width)
        g, state = shape(steps, heads, dtype="float32"), shape(heads, width, width, dtype="float32")
        inputs = (keys, keys, values, g, shape(steps, heads), state, shape(dtype="int32"))
        memory = run.lower(*inputs).compile().memory_analysis()
        return memory.temp_size_in_bytes, (
            memory.argument_size_in_bytes + memory.output_size_in_bytes
        )

    (less, few), (more, many) = measure(512), measure(1024)
    assert more - less <= 2 * (many - few)


FEATURES, WIDTH = 6, 4


def draw_convolution(steps: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    random = np.random.default_rng(steps)
    shapes = (ROWS, steps, FEATURES), (FEATURES, WIDTH), (ROWS, WIDTH - 1, FEATURES)
    x, weight, before = (random.standard_normal(shape).astype(np.float32) for shape in shapes)
    return x, weight, before


@pytest.mark.parametrize("steps", [1, 2, 3, 9])
def test_the_convolution_and_its_state_are_those_of_transformers(steps):
    x, weight, before = draw_convolution(steps)
    y, after = convolve(x, weight, before, full(steps))
    state = torch.from_numpy(before).transpose(1, 2).contiguous()
    expected = theirs.causal_conv1d_update(
        torch.from_numpy(x).transpose(1, 2), state, torch.from_numpy(weight), None, "silu"
    )
    # sums of WIDTH products, and silu, whose slope is at most 1.1
    limit = (
        2 * WIDTH * STEP * np.abs(weight).sum(1).max() * max(np.abs(x).max(), np.abs(before).max())
    )
    np.testing.assert_allclose(y, expected.transpose(1, 2).numpy(), rtol=8 * STEP, atol=limit)
    np.testing.assert_array_equal(after, state.transpose(1, 2).numpy())


@pytest.mark.parametrize("count", [(0, 1), (2, 5), (3, 4)])
def test_the_convolution_keeps_the_last_inputs_that_are_no_padding(count):
    x, weight, before = draw_convolution(5)
    y, after = convolve(x, weight, before, np.array(count, np.int32))
    for row, length in enumerate(count):
        line = np.concatenate([before[row], x[row, :length]])
        np.testing.assert_array_equal(after[row], line[len(line) - WIDTH + 1 :])
        part = slice(row, row + 1)
        if length:
            alone, _ = convolve(x[part, :length], weight, before[part], full(length)[:1])
            np.testing.assert_array_equal(y[row, :length], alone[0])
