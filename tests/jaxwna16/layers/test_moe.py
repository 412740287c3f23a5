"""`QuantMoE` of NNX and of Linen against a float64 loop over tokens and experts."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.errors import ScopeParamShapeError
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import jaxwna16
from jaxwna16 import BackendError, QuantMoE, QuantParam, SpecError
from tests.jaxwna16.layers.expert_layers import (
    E,
    H,
    add_slowly,
    assert_loop,
    assert_same_program,
    call_linen,
    call_nnx,
    make_experts,
    make_input,
)

BIAS = jnp.asarray([0.9, -0.4, 0.0, 0.3, -0.8, 0.1], jnp.float32)
DEEPSEEK = {
    "scoring": "sigmoid",
    "groups": 3,
    "top_groups": 2,
    "group_score": "top2_sum",
    "scaling_factor": 2.5,
}


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ({}, ()),
        ({"activation": "gelu", "bias": True, "renormalize": False, "top_k": 3}, ()),
        ({"activation": "gelu_tanh", **DEEPSEEK}, ("correction_bias", "shared")),
        ({"activation": "relu2", "gated": False, "bias": True, "scoring": "sqrt_softplus"}, ()),
        ({"activation": "silu", "gated": False, "groups": 2, "top_groups": 1}, ("shared",)),
        ({"activation": "swigluoai", "interleaved": True, "bias": True, "top_k": 4}, ()),
        ({"activation": "swigluoai"}, ("shared", "shared_gate")),
        (
            {"weigh": "input", "scoring": "sigmoid", "renormalize": False, "top_k": 1},
            ("shared",),
        ),
        ({"weigh": "input", "bias": True, "interleaved": True, "backend": "xla"}, ()),
    ],
)
def test_both_layers_are_the_loop_whatever_the_options(options, names):
    experts = make_experts(**options)
    x, logits = make_input(2, 3, H), make_input(2, 3, E, seed=4)
    given = {
        "correction_bias": BIAS,
        # narrower than x: their product is float32 all the same
        "shared": make_input(2, 3, H, seed=5, dtype=jnp.bfloat16),
        "shared_gate": make_input(2, 3, 1, seed=6, dtype=jnp.bfloat16),
    }
    given = {name: given[name] for name in names}
    y = call_nnx(experts, x, logits, **given)
    assert_loop(y, experts, x, logits, **given)
    assert_same_program(experts, x, logits, **given)


@pytest.mark.parametrize(
    ("dtype", "options"),
    [
        (jnp.float16, {"backend": "xla", "scale_dtype": jnp.float16, "weigh": "input"}),
        (jnp.bfloat16, {"backend": "triton", "scale_dtype": jnp.bfloat16, "bias": True}),
        *(
            pytest.param(*case, marks=pytest.mark.thorough)
            for case in (
                (jnp.bfloat16, {"backend": "xla", "scale_dtype": jnp.bfloat16, "bias": True}),
                (
                    jnp.float16,
                    {"backend": "triton", "activation": "swigluoai", "interleaved": True},
                ),
                (
                    jnp.bfloat16,
                    {"backend": "triton", "activation": "gelu", "gated": False, "weigh": "input"},
                ),
            )
        ),
    ],
)
def test_16_bit_layers_are_the_loop_on_both_backends(dtype, options):
    """The bound holds W as rounded to 16 bits for both; the kernel's exact product is nearer."""
    experts = make_experts(4, **options)
    x, logits = make_input(3, H, dtype=dtype), make_input(3, 4, seed=4)
    y = call_nnx(experts, x, logits)
    assert_loop(y, experts, x, logits)
    assert_same_program(experts, x, logits)


def test_layers_that_hold_halves_of_the_experts_add_up_to_the_whole():
    experts = make_experts(bias=True)
    x, logits, shared = make_input(4, H), make_input(4, E, seed=4), make_input(4, H, seed=5)
    low, high = experts.take(0, 3), experts.take(3, 6)
    first = call_nnx(low, x, logits, shared=shared)
    second = call_linen(high, x, logits, expert_offset=jnp.int32(3))
    assert_same_program(high, x, logits, expert_offset=jnp.int32(3))
    assert_loop(first, low, x, logits, shared=shared)
    assert_loop(second, high, x, logits, offset=3)
    expected, bound = add_slowly(experts, x, logits, shared=shared)
    parts = [add_slowly(low, x, logits, shared=shared), add_slowly(high, x, logits, offset=3)]
    bound = parts[0][1] + parts[1][1] + 2.0**-24 * np.abs(expected)
    assert np.all(np.abs(np.asarray(first + second, np.float64) - expected) <= bound)


def test_a_token_with_a_broken_router_is_nan_and_no_other_is():
    experts = make_experts()
    x, logits = make_input(3, H), make_input(3, E, seed=4)
    y = np.asarray(call_nnx(experts, x, logits))
    broken = np.asarray(call_nnx(experts, x, logits.at[1, 4].set(jnp.nan)))
    assert np.isnan(broken[1]).all()
    # the broken token is in other blocks, so the others' places in theirs may differ
    _, bound = add_slowly(experts, x, logits)
    assert np.all(np.abs(broken - y)[::2] <= 2 * bound[::2])


def test_no_tokens_and_one_alone():
    experts = make_experts(bias=True)
    for shape in ((0,), (2, 0), ()):
        x, logits = make_input(*shape, H), make_input(*shape, E, seed=4)
        y = call_nnx(experts, x, logits)
        assert y.shape == (*shape, H)
    assert_loop(y, experts, x, logits)


def test_dtype_casts_the_input_and_says_so_in_the_output():
    x, logits = make_input(3, H), make_input(3, E, seed=4)
    experts, same = make_experts(dtype=jnp.bfloat16), make_experts()
    y = call_nnx(experts, x, logits)
    assert y.dtype == jnp.bfloat16
    np.testing.assert_array_equal(y, call_nnx(same, x.astype(jnp.bfloat16), logits))
    assert_same_program(experts, x, logits)


def test_shared_is_added_before_the_rounding():
    """What the experts and the shared ones give nearly cancels: its last bits would be lost."""
    experts = make_experts(4)
    x, logits = make_input(3, H, dtype=jnp.bfloat16), make_input(3, 4, seed=4)
    alone, _ = add_slowly(experts, x, logits)
    shared, gate = jnp.asarray(-2 * alone, jnp.float32), jnp.zeros((3, 1))
    rest = call_nnx(experts, x, logits)
    together = call_nnx(experts, x, logits, shared=shared, shared_gate=gate)
    size = np.abs(np.asarray(together, np.float64)).max()
    # half of `shared` is what the experts give, but for the roundings inside of them
    assert size < 2.0**-6 * np.abs(np.asarray(rest, np.float64)).max()
    assert np.any(together != rest + (shared / 2).astype(jnp.bfloat16))


def test_nnx_grad_and_optimizers_skip_the_integers():
    experts = make_experts(bias=True)
    layer = experts.make_nnx()
    x, logits = make_input(4, H), make_input(4, E, seed=4)

    @nnx.jit
    def find_gradients(layer):
        return nnx.value_and_grad(lambda layer: (layer(x, logits) ** 2).mean())(layer)

    before, gradients = find_gradients(layer)
    assert {name: set(part) for name, part in gradients.items()} == {
        "w13": {"scale", "bias"},
        "w2": {"scale", "bias"},
    }
    optimizer = nnx.Optimizer(layer, optax.sgd(1e-4), wrt=nnx.Param)
    optimizer.update(layer, gradients)
    assert find_gradients(layer)[0] < before
    np.testing.assert_array_equal(layer.w13.packed[...], experts.stacks[0]["packed"])
    np.testing.assert_array_equal(layer.w13.zero_point[...], experts.stacks[0]["zero_point"])


def test_abstract_construction_makes_no_array():
    experts = make_experts()
    make = lambda: QuantMoE(*experts.specs, experts=E, top_k=2, use_bias=True)  # noqa: E731
    leaves = jax.tree.leaves(nnx.state(nnx.eval_shape(make)))
    assert len(leaves) == 4 + 3
    assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in leaves)


def test_a_checkpoints_tree_loads_by_path_and_serves_linen_as_it_is():
    experts = make_experts(bias=True)
    options = {"experts": E, "top_k": 2, "use_bias": True}
    layer = nnx.eval_shape(lambda: QuantMoE(*experts.specs, **options))
    state = nnx.state(layer)
    assert {name: set(part) for name, part in nnx.to_pure_dict(state).items()} == {
        name: set(part) for name, part in experts.tree.items()
    }
    nnx.replace_by_pure_dict(state, experts.tree)
    nnx.update(layer, state)
    x, logits = make_input(4, H), make_input(4, E, seed=4)
    by_path = jax.jit(lambda x, logits: layer(x, logits))(x, logits)
    np.testing.assert_array_equal(by_path, call_nnx(experts, x, logits))
    np.testing.assert_array_equal(by_path, call_linen(experts, x, logits))


def test_a_new_layer_is_zero_and_init_of_linen_makes_the_same_tree():
    experts = make_experts(bias=True)
    options = {"experts": E, "top_k": 2, "use_bias": True, "scale_dtype": jnp.float16}
    fresh = QuantMoE(*experts.specs, **options, bias_dtype=jnp.float32)
    linen = jaxwna16.linen.QuantMoE(*experts.specs, **options, bias_dtype=jnp.float32)
    made = jax.jit(linen.init)(jax.random.key(0), make_input(1, H), make_input(1, E))["params"]
    shapes = lambda tree: jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), tree)  # noqa: E731
    twin = {"w13": fresh.w13.weights, "w2": fresh.w2.weights}
    assert shapes(made) == shapes(twin)
    assert jax.tree.map(jnp.shape, made) == jax.tree.map(jnp.shape, experts.tree)
    assert made["w13"]["scale"].dtype == jnp.float16
    assert made["w2"]["bias"].dtype == jnp.float32
    assert not any(np.asarray(leaf).any() for leaf in jax.tree.leaves((made, twin)))


def test_kinds_and_metadata_of_the_variables():
    experts = make_experts()
    layer = QuantMoE(
        *experts.specs, experts=2, top_k=1, use_bias=True, kernel_metadata={"note": "kernel"}
    )
    for stack in (layer.w13, layer.w2):
        assert type(stack.packed) is QuantParam
        assert type(stack.scale) is type(stack.bias) is nnx.Param
        assert stack.scale.get_metadata()["note"] == stack.packed.get_metadata()["note"] == "kernel"
        assert "note" not in stack.bias.get_metadata()
    assert type(layer.w13.zero_point) is QuantParam
    assert layer.w2.zero_point is None


@pytest.mark.parametrize("kind", ["nnx", "linen"])
def test_the_result_takes_the_sharding_that_is_asked_for(kind):
    experts = make_experts(4)
    sharding = NamedSharding(Mesh(np.array(jax.devices()[:1]), ("rows",)), PartitionSpec("rows"))
    x, logits = make_input(2, H), make_input(2, 4, seed=4)
    layer = experts.make_nnx()
    call = layer if kind == "nnx" else experts.make_linen().bind({"params": experts.tree})
    run = lambda x, logits: call(x, logits, out_sharding=sharding)  # noqa: E731
    *_, last = jax.make_jaxpr(run)(x, logits).eqns
    assert last.primitive.name == "sharding_constraint"
    assert last.params["sharding"] == sharding


def drop(stack: dict, name: str) -> dict:
    return {key: leaf for key, leaf in stack.items() if key != name}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a, b: (drop(a, "zero_point"), b), "w13: .*zero_point is missing"),
        (lambda a, b: (a, drop(b, "packed")), "w2: .*packed is missing"),
        (lambda a, b: (drop(a, "packed"), b), "w13: .*packed is missing"),
        (lambda a, b: (a, {**b, "scale": b["scale"][:3]}), r"w2: .*scale has shape \[3, "),
        (lambda a, b: (a, jax.tree.map(lambda leaf: leaf[:3], b)), r"w2: .*packed has shape \[3, "),
        (lambda a, b: (jax.tree.map(lambda leaf: leaf[0], a), b), "w13: .*packed has shape"),
        (lambda a, b: ({**a, "perm": jnp.zeros((4, H), jnp.int32)}, b), "w13: .*perm"),
        (lambda a, b: (drop(a, "bias"), b), "w13 and w2 must both have a bias, or neither"),
        (lambda a, b: (list(a.values()), b), "w13: weights must be the dict of arrays .* got list"),
    ],
)
def test_weights_that_contradict_the_specs_are_named(change, message):
    experts = make_experts(4, bias=True)
    with pytest.raises(SpecError, match=message):
        QuantMoE.from_weights(*change(*experts.stacks), *experts.specs, top_k=2)


@pytest.mark.parametrize("cls", [QuantMoE, jaxwna16.linen.QuantMoE])
@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"experts": 0}, SpecError, "experts must be an integer of at least 1, got 0"),
        ({"experts": 2.0}, SpecError, "experts must be an integer of at least 1, got 2.0"),
        ({"top_k": 0}, SpecError, "top_k must be an integer of at least 1, got 0"),
        ({"scoring": "tanh"}, SpecError, "scoring must be one of .* got 'tanh'"),
        ({"top_groups": 2}, SpecError, "top_groups = 2 must be at most groups = 1"),
        ({"activation": "swish"}, SpecError, "activation must be one of .* got 'swish'"),
        ({"weigh": "both"}, SpecError, "weigh must be one of .* got 'both'"),
        ({"gated": False}, SpecError, r"spec13 must have \[N, K\] = \[64, 64\] .* got \[128, 64\]"),
        ({"gated": False, "interleaved": True}, SpecError, "interleaved is for gated experts"),
        ({"gated": False, "activation": "swigluoai"}, SpecError, "is for gated experts"),
        ({"spec2": {"bits": 4}}, SpecError, "spec2 must be a QuantSpec, got dict"),
        ({"dtype": jnp.int32}, SpecError, "dtype must be .* got int32"),
        ({"scale_dtype": jnp.int32}, SpecError, "scale_dtype must be .* got int32"),
        ({"bias_dtype": jnp.float64}, SpecError, "bias_dtype must be .* got float64"),
        ({"backend": "cuda"}, BackendError, "backend must be None or one of .* got 'cuda'"),
        ({"backend": "triton", "dtype": jnp.float32}, BackendError, "x is float32"),
    ],
)
def test_impossible_options_are_refused_at_construction(cls, options, error, message):
    spec13, spec2 = make_experts(1).specs
    plain = {"spec13": spec13, "spec2": spec2, "experts": 4, "top_k": 2}
    with pytest.raises(error, match=message):
        cls(**(plain | options))


@pytest.mark.parametrize("kind", ["nnx", "linen"])
@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"x": (3, 32)}, r"x must be \[\.\.\., 64\], got \[3, 32\]"),
        ({"router_logits": (2, 4)}, r"router_logits must be \[3, 'E'\].* got \[2, 4\]"),
        ({"router_logits": (3, 2)}, r"router_logits must be .* 4 experts .* got \[3, 2\]"),
        ({"router_logits": (4,)}, r"router_logits must be .* got \[4\]"),
        ({"correction_bias": (3,)}, r"correction_bias must be float \[4\], got float32 \[3\]"),
        ({"shared": (3, 32)}, r"shared must be \[3, 64\], got \[3, 32\]"),
        ({"shared": (3, H), "shared_gate": (3,)}, r"shared_gate must be \[3, 1\], got \[3\]"),
        ({"shared": (3, H), "shared_gate": (3, H)}, r"shared_gate must be \[3, 1\], got \[3, 64\]"),
        ({"shared_gate": (3, 1)}, "shared_gate is given without shared"),
    ],
)
def test_arguments_that_do_not_fit_are_named(kind, changed, message):
    experts = make_experts(4)
    layer = experts.make_nnx()
    call = layer if kind == "nnx" else experts.make_linen().bind({"params": experts.tree})
    given = {"x": (3, H), "router_logits": (3, 4)} | changed
    with pytest.raises(SpecError, match=message):
        call(**{name: make_input(*shape) for name, shape in given.items()})


def test_whatever_becomes_an_array_is_one():
    experts = make_experts(4)
    layer, given = experts.make_nnx(), [make_input(3, H), make_input(3, 4)]
    shared = {"shared": make_input(3, H), "shared_gate": make_input(3, 1)}
    lists = {name: array.tolist() for name, array in shared.items()}
    found = layer(*(array.tolist() for array in given), **lists)
    np.testing.assert_array_equal(found, layer(*given, **shared))
    with pytest.raises(SpecError, match="router_logits must be an array, got NoneType"):
        layer(given[0], None)


def test_integers_are_no_input():
    experts = make_experts(4)
    layer = experts.make_nnx()
    with pytest.raises(SpecError, match="x must be float32, bfloat16 or float16, got int32"):
        layer(jnp.zeros((3, H), jnp.int32), make_input(3, 4))
    with pytest.raises(SpecError, match="router_logits must be float"):
        layer(make_input(3, H), jnp.zeros((3, 4), jnp.int32))


def test_linen_refuses_params_of_other_shapes():
    """Linen itself looks at shapes; what is missing or of another dtype it leaves to us."""
    experts = make_experts(4)
    layer, x, logits = experts.make_linen(), make_input(3, H), make_input(3, 4)
    wrong = {"w13": experts.tree["w13"], "w2": make_experts(3).tree["w2"]}
    with pytest.raises(ScopeParamShapeError, match="packed"):
        layer.apply({"params": wrong}, x, logits)
    wrong = jax.tree.map(lambda leaf: leaf, experts.tree)
    wrong["w2"]["packed"] = wrong["w2"]["packed"].astype(jnp.int16)
    with pytest.raises(SpecError, match=r"w2: .*packed is int16, expected uint16"):
        layer.apply({"params": wrong}, x, logits)
