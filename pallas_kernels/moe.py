"""`quant_moe` and `float_moe`: the chosen experts of every token, added.

    y[t] = sum_j weights[t, j] * (act(x[t] @ W13[e].T + b13[e]) @ W2[e].T + b2[e]),  e = ids[t, j]

As for `quant_matmul` the backend is chosen when the function is lowered.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.arguments import check_float_dtype, convert_array
from pallas_kernels.backends import check_backend
from pallas_kernels.errors import BackendError, SpecError
from pallas_kernels.format.spec import QuantSpec
from pallas_kernels.format.weights import check_weights
from pallas_kernels.formulas.activations import check as check_activation
from pallas_kernels.lowering import choose_at_lowering, has_symbolic
from pallas_kernels.vmap_rule import fold_vmap
from pallas_kernels.xla.dense import matmul
from pallas_kernels.xla.experts import add_experts

Weights = Mapping[str, jax.Array]
_WEIGH = ("output", "input")


def quant_moe(
    x: jax.Array,
    ids: jax.Array,
    weights: jax.Array,
    w13: Weights,
    w2: Weights,
    spec13: QuantSpec,
    spec2: QuantSpec,
    *,
    activation: str = "silu",
    gated: bool = True,
    interleaved: bool = False,
    weigh: str = "output",
    expert_offset: jax.Array | int = 0,
    shared: jax.Array | None = None,
    backend: str | None = None,
) -> jax.Array:
    """Run the chosen experts of every token and add their results.

    Differentiable with respect to x, `weights`, `shared`, scales and biases, in both modes and to
    any order.

    Args:
      x: [..., H] float32, bfloat16 or float16.
      ids: int32 [..., top_k], the experts of each token; one may be chosen twice. Ids outside
        expert_offset .. expert_offset + E - 1 contribute nothing, so that devices with other
        experts can add their parts (expert parallelism).
      weights: float [..., top_k], the weight of each choice, see `route`.
      w13: leaf dict of gate and up; every leaf has a leading axis E. Rows of gate come first, then
        those of up.
      w2: leaf dict of down.
      spec13: of one expert, N = 2 I (I if not gated) and K = H.
      spec2: of one expert, N = H and K = I; bits and groups may differ from those of `spec13`.
      activation: "silu", "gelu", "gelu_tanh", "relu2" or "swigluoai", see
        `pallas_kernels.formulas.activations`.
      gated: act(gate) * up; otherwise act(h) of one product.
      interleaved: rows of gate and up alternate in w13, gate first.
      weigh: "output" multiplies an expert's result by its weight, "input" its input.
      expert_offset: id of the first of the E experts.
      shared: [..., H], added to the sum (the result of shared experts).
      backend: None, "triton" or "xla", see `quant_matmul`.

    Returns:
      [..., H] in the dtype of x. Sums are float32, rounded once at the end. `docs/numerics.md`
      states what each backend rounds before that.

    Raises:
      SpecError: if arrays or options contradict each other.
      BackendError: if the named backend cannot do it, or the number of tokens is symbolic (in
        `jax.export`).
      TableError: if this GPU has a table of tuned tiles that cannot be used.

    Example:
      ```python
      spec13 = jaxwna16.QuantSpec(
          bits=4, group_size=32, symmetric=True, in_features=64, out_features=128
      )
      spec2 = jaxwna16.QuantSpec(
          bits=4, group_size=32, symmetric=True, in_features=64, out_features=64
      )
      w13 = jaxwna16.quantize(jax.random.normal(jax.random.key(0), (4, 128, 64)), spec13)
      w2 = jaxwna16.quantize(jax.random.normal(jax.random.key(1), (4, 64, 64)), spec2)
      x = jnp.ones((3, 64), jnp.bfloat16)
      ids, weights = jaxwna16.route(jnp.zeros((3, 4)), top_k=2)
      y = jaxwna16.quant_moe(x, ids, weights, w13, w2, spec13, spec2)
      assert y.shape == (3, 64)
      ```
    """
    options = Options(activation, gated, interleaved, weigh)
    call = check_call(x, ids, weights, w13, w2, spec13, spec2, options, shared, backend)
    x, ids, weights, shared = _read(x, ids, weights, shared)
    by_xla, by_triton = functools.partial(run_by_xla, call), functools.partial(_run_by_triton, call)
    run = choose_at_lowering(by_xla, by_triton, backend, x.dtype)
    return _fold(run, x, ids, weights, expert_offset, shared, (w13, w2))


def float_moe(
    x: jax.Array,
    ids: jax.Array,
    weights: jax.Array,
    w13: jax.Array,
    w2: jax.Array,
    *,
    b13: jax.Array | None = None,
    b2: jax.Array | None = None,
    activation: str = "silu",
    gated: bool = True,
    interleaved: bool = False,
    weigh: str = "output",
    expert_offset: jax.Array | int = 0,
    shared: jax.Array | None = None,
) -> jax.Array:
    """`quant_moe` for experts that are not quantized, expert by expert in XLA on every device.

    Args:
      w13: [E, 2 I, H], or [E, I, H] if not gated.
      w2: [E, H, I].
      b13, b2: biases [E, N]; None for no bias.

    Other arguments, result and errors are those of `quant_moe`.

    Example:
      ```python
      w13 = jax.random.normal(jax.random.key(0), (4, 128, 64), jnp.bfloat16)
      w2 = jax.random.normal(jax.random.key(1), (4, 64, 64), jnp.bfloat16)
      ids, weights = jaxwna16.route(jnp.zeros((3, 4)), top_k=2)
      y = jaxwna16.float_moe(jnp.ones((3, 64), jnp.bfloat16), ids, weights, w13, w2)
      assert y.shape == (3, 64)
      ```
    """
    options = Options(activation, gated, interleaved, weigh)
    x, ids, weights, shared = _read(x, ids, weights, shared)
    stacks = _read_stack("13", w13, b13), _read_stack("2", w2, b2)
    w13, w2 = (stack["weight"] for stack in stacks)
    if w13.shape[0] != w2.shape[0]:
        raise SpecError(
            f"w13 and w2 must have equally many experts, got {w13.shape[0]} and {w2.shape[0]}"
        )
    _check_arrays(x, ids, weights, (w13.shape[1:], w2.shape[1:]), options, shared)

    def run(x, ids, weights, offset, stacks):
        return add_experts(
            x,
            ids,
            weights,
            stacks,
            (_multiply_floats, _multiply_floats),
            experts=w13.shape[0],
            features=w2.shape[1],
            offset=offset,
            **dataclasses.asdict(options),
        )

    return _fold(run, x, ids, weights, expert_offset, shared, stacks)


def _multiply_floats(x: jax.Array, leaves: Any) -> jax.Array:
    w = leaves["weight"].astype(x.dtype)
    precision = lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    contract = (((1,), (1,)), ((), ()))
    return lax.dot_general(x, w, contract, precision=precision, preferred_element_type=jnp.float32)


@dataclasses.dataclass(frozen=True)
class Options:
    """What happens around the two products; see `quant_moe`."""

    activation: str = "silu"
    gated: bool = True
    interleaved: bool = False
    weigh: str = "output"


@dataclasses.dataclass(frozen=True)
class Call:
    """The static facts of one call."""

    spec13: QuantSpec
    spec2: QuantSpec
    experts: int
    options: Options
    backend: str | None


def check_call(x, ids, weights, w13, w2, spec13, spec2, options: Options, shared, backend) -> Call:
    """The static facts of a call; raise what `quant_moe` raises if its arguments are impossible."""
    experts = _count_experts(w13)
    for name, leaves, spec in (("w13", w13, spec13), ("w2", w2, spec2)):
        try:
            check_weights(leaves, spec, experts)
        except SpecError as error:
            raise SpecError(f"{name}: {error}") from error
        if "perm" in leaves:
            raise SpecError(f"{name}: experts with reordered features (perm) are not supported")
    sizes = (spec13.out_features, spec13.in_features), (spec2.out_features, spec2.in_features)
    x, ids, weights, shared = _read(x, ids, weights, shared)
    _check_arrays(x, ids, weights, sizes, options, shared)
    check_backend(backend, x.dtype)
    return Call(spec13, spec2, experts, options, backend)


def _count_experts(w13: Any) -> int:
    packed = w13.get("packed") if isinstance(w13, Mapping) else None
    if packed is None or getattr(packed, "ndim", 0) != 5 or packed.shape[0] < 1:
        found = None if packed is None else list(getattr(packed, "shape", []))
        raise SpecError(f"w13: packed must be [E, tiles of N, tiles of K, 64, 32], got {found}")
    return packed.shape[0]


def _read(x, ids, weights, shared) -> tuple[Any, ...]:
    """All of them as arrays; `shared` may be None."""
    named = {"x": x, "ids": ids, "weights": weights}
    arrays = [convert_array(name, array) for name, array in named.items()]
    return *arrays, None if shared is None else convert_array("shared", shared)


def _read_stack(number: str, w, b) -> dict[str, jax.Array]:
    """Float experts and their biases."""
    w = convert_array(f"w{number}", w)
    if w.ndim != 3 or not w.shape[0] or not jnp.issubdtype(w.dtype, jnp.floating):
        raise SpecError(f"w{number} must be float [E, N, K], got {w.dtype} {list(w.shape)}")
    if b is None:
        return {"weight": w}
    b = convert_array(f"b{number}", b)
    if b.shape != w.shape[:2] or not jnp.issubdtype(b.dtype, jnp.floating):
        wanted = list(w.shape[:2])
        raise SpecError(f"b{number} must be float {wanted}, got {b.dtype} {list(b.shape)}")
    return {"weight": w, "bias": b}


def _check_arrays(x, ids, weights, sizes, options: Options, shared) -> None:
    """Raise a SpecError that lists all contradictions, or a BackendError for symbolic tokens."""
    check_float_dtype("x", x.dtype)
    check_activation(options.activation, options.gated)
    (n13, k13), (n2, k2) = sizes
    wanted = k2 * (2 if options.gated else 1)
    faults = []
    if options.weigh not in _WEIGH:
        faults.append(f"weigh must be one of {_WEIGH}, got {options.weigh!r}")
    if options.interleaved and not options.gated:
        faults.append("interleaved is for gated experts")
    if n13 != wanted:
        what = "gate and up" if options.gated else "no gate"
        faults.append(f"N of w13 must be {wanted} ({what}, K of w2 is {k2}), got {n13}")
    if n2 != k13:
        faults.append(f"K of w13 and N of w2 must both be H, got {k13} and {n2}")
    if x.ndim < 1 or x.shape[-1] != k13:
        faults.append(f"x must be [..., {k13}], got {list(x.shape)}")
    lead = x.shape[:-1]
    if not jnp.issubdtype(ids.dtype, jnp.integer) or ids.shape[:-1] != lead or ids.ndim != x.ndim:
        faults.append(f"ids must be int32 {[*lead, 'top_k']}, got {ids.dtype} {list(ids.shape)}")
    elif ids.shape[-1] < 1:
        faults.append("ids must choose at least one expert")
    if weights.shape != ids.shape or not jnp.issubdtype(weights.dtype, jnp.floating):
        faults.append(
            f"weights must be float {list(ids.shape)}, got {weights.dtype} {list(weights.shape)}"
        )
    if shared is not None and shared.shape != (*lead, n2):
        faults.append(f"shared must be {[*lead, n2]}, got {list(shared.shape)}")
    if faults:
        raise SpecError("; ".join(faults))
    if has_symbolic(x.shape):
        raise BackendError(
            f"experts need a known number of tokens, got x {list(x.shape)}: export the function "
            "once for each number of tokens"
        )


def _fold(run, x, ids, weights, offset, shared, stacks) -> jax.Array:
    """Fold the leading dimensions, run, add `shared`, round."""
    lead, top_k = x.shape[:-1], ids.shape[-1]
    rows = x.reshape(-1, x.shape[-1])
    features = (*lead, rows.shape[-1])
    if rows.shape[0]:
        plain = tuple(dict(stack) for stack in stacks)
        flat = ids.reshape(-1, top_k), weights.reshape(-1, top_k)
        y = run(rows, *flat, jnp.asarray(offset, jnp.int32), plain).reshape(features)
    else:
        y = jnp.zeros(features, jnp.float32)
    return (y if shared is None else y + shared.astype(jnp.float32)).astype(x.dtype)


def run_by_xla(call: Call, x, ids, weights, offset, stacks) -> jax.Array:
    """The sum over the chosen experts, float32 [T, H]."""

    def make_product(spec: QuantSpec):
        def run(x, leaves):
            # the loop adds the bias
            return matmul(x, {n: a for n, a in leaves.items() if n != "bias"}, spec)

        return run

    return add_experts(
        x,
        ids,
        weights,
        stacks,
        (make_product(call.spec13), make_product(call.spec2)),
        experts=call.experts,
        features=call.spec2.out_features,
        offset=offset,
        **dataclasses.asdict(call.options),
    )


def _run_by_triton(call: Call, x, ids, weights, offset, stacks, *, interpret) -> jax.Array:
    # imported here, so that all else works where a later jax has no Pallas-Triton
    from pallas_kernels.triton.experts import add_experts as add_by_triton

    def run(rows, others):
        return add_by_triton(call, rows, *others, interpret=interpret)

    return fold_vmap(run)((x, ids, weights), (offset, stacks))
