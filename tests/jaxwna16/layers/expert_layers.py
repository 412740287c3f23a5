"""Layers of random packed experts, and a float64 loop over tokens and experts to hold them to."""

from __future__ import annotations

import dataclasses
import math
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jaxwna16
from jaxwna16 import QuantMoE, QuantSpec
from tests.pallas_kernels.products import UNIT, make_weights

E, H, I = 6, 64, 64  # noqa: E741 - the names of the specs' docstrings
U = 2.0**-24


@dataclasses.dataclass(frozen=True)
class Experts:
    """The weights of E experts and the options of their layer."""

    stacks: tuple[dict[str, jax.Array], dict[str, jax.Array]]
    specs: tuple[QuantSpec, QuantSpec]
    options: dict[str, Any]

    @property
    def count(self) -> int:
        return self.stacks[0]["packed"].shape[0]

    @property
    def tree(self) -> dict[str, dict[str, jax.Array]]:
        """As a checkpoint's tree has it below the path of the experts."""
        return {"w13": self.stacks[0], "w2": self.stacks[1]}

    def make_nnx(self) -> QuantMoE:
        return QuantMoE.from_weights(*self.stacks, *self.specs, **self.options)

    def make_linen(self) -> jaxwna16.linen.QuantMoE:
        bias = "bias" in self.stacks[0]
        return jaxwna16.linen.QuantMoE(
            *self.specs, experts=self.count, use_bias=bias, **self.options
        )

    def take(self, start: int, stop: int) -> Experts:
        """A part of the experts."""
        parts = jax.tree.map(lambda leaf: leaf[start:stop], self.stacks)
        return dataclasses.replace(self, stacks=parts)


def make_experts(
    experts=E,
    *,
    bits=(4, 8),
    symmetric=(False, True),
    bias=False,
    scale_dtype=jnp.float32,
    seed=0,
    **options,
) -> Experts:
    """Experts whose two weights are of different bits, groups and symmetry."""
    shapes = ((2 if options.get("gated", True) else 1) * I, H), (H, I)
    specs, stacks = [], []
    for part, (n, k) in enumerate(shapes):
        each = []
        for e in range(experts):
            spec, leaves = make_weights(
                bits[part],
                n,
                k,
                (32, -1)[part],
                symmetric=symmetric[part],
                scale_dtype=scale_dtype,
                seed=1000 * seed + 100 * part + e,
            )
            if bias:
                leaves["bias"] = jnp.asarray(np.random.default_rng(e).normal(size=n), scale_dtype)
            each.append(leaves)
        specs.append(spec)
        stacks.append(jax.tree.map(lambda *leaves: jnp.asarray(np.stack(leaves)), *each))
    return Experts(tuple(stacks), tuple(specs), {"top_k": 2} | options)


def make_input(*shape: int, dtype: Any = jnp.float32, seed=3) -> jax.Array:
    x = np.random.default_rng(seed).normal(size=shape).astype(np.float32)
    return jnp.asarray(x.astype(dtype))  # by NumPy, since XLA compiles a cast for every shape


def call_nnx(experts: Experts, x, logits, **arguments) -> jax.Array:
    layer = experts.make_nnx()
    return jax.jit(lambda *rows, **others: layer(*rows, **others))(x, logits, **arguments)


def call_linen(experts: Experts, x, logits, **arguments) -> jax.Array:
    layer = experts.make_linen()
    return jax.jit(layer.apply)({"params": experts.tree}, x, logits, **arguments)


def assert_same_program(experts: Experts, x, logits, **arguments) -> None:
    """Both layers are traced to one computation, which is more than equal results and is cheap."""
    linen = experts.make_linen()

    def run_nnx(tree, *rows, **others):
        return QuantMoE.from_weights(*tree.values(), *experts.specs, **experts.options)(
            *rows, **others
        )

    def run_linen(tree, *rows, **others):
        return linen.apply({"params": tree}, *rows, **others)

    given = experts.tree, x, logits
    programs = [jax.make_jaxpr(run)(*given, **arguments) for run in (run_nnx, run_linen)]
    # functions within are printed with their addresses
    ours, theirs = (re.sub(" at 0x[0-9a-f]+", "", str(program)) for program in programs)
    assert "custom_jvp_call" in ours
    assert ours == theirs


def assert_loop(
    y, experts: Experts, x, logits, *, correction_bias=None, shared=None, shared_gate=None, offset=0
) -> None:
    """Hold y to `add_slowly`, and its bound to being one that no other sum would meet."""
    expected, bound = add_slowly(
        experts, x, logits, correction_bias, shared, shared_gate, offset=offset
    )
    assert (y.dtype, y.shape) == (x.dtype, expected.shape)
    found = np.abs(np.asarray(y, np.float64) - expected)
    # a token without an expert here is exactly 0
    worst = np.max(found / np.maximum(bound, 1e-300))
    assert worst <= 1, f"{worst:.3f} times the error that rounding explains"
    size = np.sqrt((expected**2).mean())
    if x.dtype == jnp.float32:
        assert np.median(bound) < 0.01 * size
    else:
        # worst cases add up to a loose bound; independent roundings, of which there are seven (W,
        # h, gate and up, a, W2, y, the sum) of 0.42 v each, to 1.1 v, and a few more for silu
        assert np.sqrt((found**2).mean()) < 3 * UNIT[x.dtype.type] * size


def add_slowly(
    experts: Experts, x, logits, bias=None, shared=None, gate=None, *, offset=0
) -> tuple[np.ndarray, np.ndarray]:
    """y in float64, and how far the layer may be from it, entry by entry.

    With v the unit roundoff of x's dtype (counted only in 16 bits) and u that of float32:
    * A product errs by gamma_K + v (the weight) of |x| |W|, gamma for K and the padding of a tile;
      its result by v |h|, where a backend rounds it, and a bias or a factor by u.
    * A routing weight errs by 128 u: exp, log, root and quotients, sums over E and k.
    * An activation passes an error on by its slope, and errs itself by 16 u (|a| + |h|); see
      `_activate`. It is rounded to v.
    * The sum over k, with `shared`, is float32 and rounded once, to v.
    """
    v = UNIT.get(x.dtype.type, U)  # float64, for differences, counts as float32
    narrow, tiny = (0.0 if v == U else v), (2.0**-25 if x.dtype == jnp.float16 else 0.0)
    w13, w2 = (list_floats(*one) for one in zip(experts.stacks, experts.specs, strict=True))
    b13, b2 = (
        np.asarray(s["bias"] if "bias" in s else np.zeros((experts.count, p.out_features)), float)
        for s, p in zip(experts.stacks, experts.specs, strict=True)
    )
    rows, flat = np.asarray(x, np.float64).reshape(-1, H), np.asarray(logits, np.float64)
    total, error = np.zeros_like(rows), np.zeros_like(rows)

    def multiply(row, off, w):
        spread = np.abs(w) @ (np.abs(row) + off)
        return w @ row, np.abs(w) @ off + (_gamma(len(row) + 80) + narrow) * spread

    def weigh(y, dy, factor):
        return factor * y, np.abs(factor) * (dy + 129 * U * (np.abs(y) + dy))

    for t, row in enumerate(flat.reshape(-1, flat.shape[-1])):
        for e, factor in zip(*route_slowly(row, experts.options, bias), strict=True):
            if not 0 <= e - offset < experts.count:
                continue
            e, first = e - offset, experts.options.get("weigh") == "input"
            h, dh = multiply(rows[t], 0 * rows[t], w13[e])
            h, dh = weigh(h, dh, factor) if first else (h, dh)
            h = h + b13[e]
            dh = dh + (U + narrow) * (np.abs(h) + dh) + tiny
            a, da = _activate(h, dh, experts.options)
            da = da + narrow * (np.abs(a) + da) + tiny
            y, dy = multiply(a, da, w2[e])
            y = y + b2[e]
            dy = dy + (U + narrow) * (np.abs(y) + dy) + tiny
            y, dy = (y, dy) if first else weigh(y, dy, factor)
            total[t] += y
            error[t] += dy + _gamma(experts.options["top_k"] + 3) * (np.abs(y) + dy)
    if shared is not None:
        more = np.asarray(shared, np.float64).reshape(-1, H)
        more = (
            more if gate is None else more * _sigmoid(np.asarray(gate, np.float64)).reshape(-1, 1)
        )
        total, error = total + more, error + 16 * U * (np.abs(more) + np.abs(total))
    error = error + v * (np.abs(total) + error) + tiny
    return total.reshape(x.shape), error.reshape(x.shape)


def list_floats(stack: dict[str, jax.Array], spec: QuantSpec) -> np.ndarray:
    """[E, N, K] in float64, each expert by itself."""
    leaves = {name: leaf for name, leaf in stack.items() if name != "bias"}
    one = [jax.tree.map(lambda leaf, e=e: leaf[e], leaves) for e in range(len(leaves["packed"]))]
    return np.stack([np.asarray(jaxwna16.dequantize(each, spec), np.float64) for each in one])


def route_slowly(row: np.ndarray, options: dict[str, Any], bias) -> tuple[list[int], list[float]]:
    """Ids and weights of one token; its logits are far enough apart for float64 to say."""
    groups = options.get("groups", 1)
    scores = _SCORES[options.get("scoring", "softmax")](row)
    choice = scores + (0 if bias is None else np.asarray(bias, np.float64))
    best = np.sort(choice.reshape(groups, -1), axis=1)[:, ::-1]
    best = best[:, : _COUNTED[options.get("group_score", "max")]].sum(1)
    kept = np.argsort(-best)[: options.get("top_groups", 1)]
    allowed = np.isin(np.arange(len(row)) // (len(row) // groups), kept)
    ids = np.argsort(-np.where(allowed, choice, -np.inf))[: options["top_k"]]
    weights = scores[ids] / (scores[ids].sum() if options.get("renormalize", True) else 1)
    return ids.tolist(), (weights * options.get("scaling_factor", 1.0)).tolist()


def _activate(h, dh, options: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """|silu'| and |(h sigmoid(1.702 h))'| are below 1.1, |gelu'| below 1.13."""
    name = options.get("activation", "silu")
    gate, off, up, up_off = h, dh, np.ones_like(h), np.zeros_like(h)
    if options.get("gated", True):
        parts = (slice(None, None, 2), slice(1, None, 2))
        if not options.get("interleaved", False):
            parts = (slice(None, I), slice(I, None))
        (gate, up), (off, up_off) = ([both[part] for part in parts] for both in (h, dh))
    slope = 1.13
    if name == "silu":
        y = gate * _sigmoid(gate)
    elif name == "gelu":
        y = gate * np.array([math.erfc(-g / math.sqrt(2)) for g in gate]) / 2
    elif name == "gelu_tanh":
        y = gate * _sigmoid(2 * math.sqrt(2 / math.pi) * (gate + 0.044715 * gate**3))
    elif name == "relu2":
        y, slope = np.maximum(gate, 0) ** 2, 2 * (np.abs(gate) + off)
    elif name == "swigluoai":
        gate, up = np.minimum(gate, 7), np.clip(up, -7, 7) + 1
        y = gate * _sigmoid(1.702 * gate)
    else:
        raise ValueError(f"no activation of this name is known here: {name}")
    dy = slope * off + 16 * U * (np.abs(y) + np.abs(gate))
    return y * up, dy * (np.abs(up) + up_off) + np.abs(y) * (up_off + 4 * U * np.abs(up))


def _sigmoid(h: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-h))


_SCORES = {
    "softmax": lambda row: np.exp(row - row.max()) / np.exp(row - row.max()).sum(),
    "sigmoid": _sigmoid,
    "sqrt_softplus": lambda row: np.sqrt(np.log1p(np.exp(row))),
}
_COUNTED = {"max": 1, "top2_sum": 2}
"""How many of its best experts a group is as good as; both refuse names that they do not know."""


def _gamma(count: int) -> float:
    return count * U / (1 - count * U)
