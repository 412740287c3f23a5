"""Peers for experts are asked for what we compute: their kernels need a GPU, stand-ins do not."""

from __future__ import annotations

import functools
import json
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxwna16.bench import peer_worker
from jaxwna16.bench.engines import make_weights
from jaxwna16.bench.moe_peers import RaggedDot, build_grouped, build_humming, group_rows
from jaxwna16.bench.peer_sources import UnservedError, draw_source
from jaxwna16.bench.peer_worker import PEERS, check, find_missing, serve
from jaxwna16.bench.timing import Effort
from tests.jaxwna16.bench.results import make_moe_cases

torch = pytest.importorskip("torch")
EFFORT = Effort(batch_seconds=1e-4, batches=3, layers=2, cold_bytes=20_000)
RAGGED = RaggedDot("tokamax", packed=False)


def make_source(tokens: int = 5, **facts):
    [case] = make_moe_cases("64x32x6x2", [tokens], **facts)
    return case, draw_source(torch, case, "cpu")


def test_a_source_computes_what_the_experts_do():
    """Expert after expert by hand, one token at a time."""
    case, source = make_source()
    x, ids, weights = source.draw_inputs(case, 0)
    first, second = (source.expand(place, torch.float32) for place in (0, 1))
    expected = torch.zeros(5, 64)
    for token in range(5):
        for expert, weight in zip(ids[token], weights[token], strict=True):
            h = first[expert] @ x[token].float()
            expected[token] += weight * second[expert] @ (h[:32].sigmoid() * h[:32] * h[32:])
    torch.testing.assert_close(source.compute((x, ids, weights)), expected)


def test_the_choices_are_those_of_our_own_figures():
    case, source = make_source()
    _, ids, weights = source.draw_inputs(case, 1)
    for theirs, ours in zip((ids, weights), case.draw_choices(1), strict=True):
        np.testing.assert_array_equal(theirs.numpy(), ours)
    assert not np.array_equal(ids, case.draw_choices(0)[0])


@pytest.mark.parametrize("tokens", [1, 7])
def test_pytorchs_grouped_product_gives_the_result(tokens):
    case, source = make_source(tokens)
    multiply, weight, prepare = build_grouped(source, torch.bfloat16)
    for number in range(3):
        inputs = source.draw_inputs(case, number)
        assert check(multiply(prepare(inputs), weight), source.compute(inputs)) < 0.02
    with pytest.raises(UnservedError, match="bfloat16 only"):
        build_grouped(source, torch.float16)


def test_rows_are_grouped_in_whole_blocks():
    ids = np.array([[2, 0], [2, 1], [2, 0]])
    pairs, owners, total = group_rows(ids, 4, 2)
    assert pairs.tolist() == [1, 5, 3, 6, 0, 2, 4, 6]
    assert owners.tolist() == [0, 1, 2, 2]
    assert total == 8


@pytest.fixture
def pretended_humming(monkeypatch):
    """A layer that reads rows by index, block by block, as humming's own tests do."""

    class Layer(torch.nn.Module):
        def __init__(self, shape_n, shape_k, weight_config, torch_dtype, num_experts):
            super().__init__()
            self.humming_config = (shape_n, shape_k)
            self.weight_config = weight_config

        def load_from_unquantized(self, weight):
            self.weight = torch.nn.Parameter(weight, requires_grad=False)

        def transform(self):
            pass

        def cuda(self):
            return self

        def forward(self, x, *, sorted_ids, expert_ids, num_tokens_padded, **facts):
            assert json.loads(facts["compute_config"]) == {"gemm_type": "indexed"}
            tunings = json.loads(facts["tuning_config"])
            [block] = [
                tuning["block_shape"][0]
                for least, most, tuning in tunings
                if least < facts["valid_shape_m"] <= most
            ]
            assert len(sorted_ids) == num_tokens_padded == block * len(expert_ids)
            total = facts["valid_shape_m"]
            out = torch.full((total, self.weight.shape[1]), float("nan"), dtype=x.dtype)
            for i, expert in enumerate(expert_ids):
                pairs = sorted_ids[i * block : (i + 1) * block]
                pairs = pairs[pairs < total]
                rows = x[pairs // facts["top_k"]].float()
                out[pairs] = (rows @ self.weight[expert].float().t()).to(x.dtype)
            return out

    def tune(layer_config, gemm_type):
        assert len(layer_config) == 2
        assert gemm_type == "indexed"
        tilings = [{"block_shape": [rows, 128, 64]} for rows in (8, 16)]
        return [[0, 12, tilings[0]], [12, 2**30, tilings[1]]]

    for name, facts in (
        ("humming.layer", {"HummingLayer": Layer}),
        ("humming.tune", {"get_heuristics_config": tune}),
    ):
        module = types.ModuleType(name)
        vars(module).update(facts)
        monkeypatch.setitem(sys.modules, name, module)


@pytest.mark.parametrize("tokens", [1, 6, 7])
def test_humming_is_given_rows_in_the_blocks_it_was_tuned_for(tokens, pretended_humming):
    case, source = make_source(tokens, bits=[8], symmetric=[True], group_size=-1)
    multiply, layers, prepare = build_humming(source, torch.bfloat16)
    assert layers[0].weight_config == {"dtype": "uint8", "group_size": 0, "has_zero_point": False}
    inputs = source.draw_inputs(case, 0)
    assert check(multiply(prepare(inputs), layers), source.compute(inputs)) < 0.02


@pytest.fixture
def pretended_tokamax(monkeypatch):
    asked = []

    def ragged_dot(lhs, rhs, *, group_sizes, preferred_element_type, implementation):
        asked.append(implementation)
        return jax.lax.ragged_dot(
            lhs, rhs, group_sizes, preferred_element_type=preferred_element_type
        )

    module = types.ModuleType("tokamax")
    module.__spec__ = types.SimpleNamespace()  # pyright: ignore[reportAttributeAccessIssue]
    module.ragged_dot = ragged_dot  # pyright: ignore[reportAttributeAccessIssue]
    monkeypatch.setitem(sys.modules, "tokamax", module)
    return asked


def test_ragged_dot_is_given_rows_sorted_by_expert(pretended_tokamax):
    [case] = make_moe_cases("64x32x6x2", [5])
    [weight, *_] = make_weights(RAGGED, case, EFFORT)
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), weight)
    assert shapes == RAGGED.describe_weight(case)
    compute = jax.jit(functools.partial(RAGGED.compute, case))
    y = compute(RAGGED.draw_inputs(case, 0), weight)
    exact = jax.jit(functools.partial(RAGGED.compute_exactly, case))(weight)
    assert exact.dtype == jnp.float32
    assert check(y, exact) < 0.02
    # never the one that computes every expert for every row
    assert set(pretended_tokamax) == {("mosaic", "triton")}


def test_a_peer_in_jax_is_timed_in_our_own_program(pretended_tokamax):
    said = []
    serve(PEERS["moe"]["tokamax"], make_moe_cases("64x32x6x2", [1]), EFFORT, said.append)
    [version, found] = said
    assert version == {"version": None}
    assert found["case"] == 0
    assert found["chained"]["median"] > 0
    assert found["layers"] == 2
    assert 0 < found["relative_error"] < 0.02


def test_peers_that_are_not_there_say_so():
    missing = {name: find_missing(peer) for name, peer in PEERS["moe"].items()}
    assert missing == {"torch grouped": None, "tokamax": "tokamax", "humming": "humming"}
    said = []
    serve(PEERS["moe"]["torch grouped"], make_moe_cases("64x32x6x2", [1]), EFFORT, said.append)
    assert said == [{"absent": "PyTorch sees no CUDA GPU"}]


def test_what_is_timed_in_pytorch_takes_turns(monkeypatch):
    """The CUDA graph is pretended: what is queued into it is what would be replayed."""
    queued = []

    class Pretended:
        def __init__(self, *_, **__):
            pass

        def __enter__(self):
            queued.append([])

        def __exit__(self, *_):
            pass

        def wait_stream(self, other):
            pass

        def replay(self):
            pass

    for name in ("Stream", "stream", "graph", "CUDAGraph", "current_stream"):
        monkeypatch.setattr(torch.cuda, name, Pretended)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    case, source = make_source(3)
    bench = peer_worker._TorchBench(PEERS["moe"]["torch grouped"], EFFORT, torch)
    multiply, weight, prepare = build_grouped(source, torch.bfloat16)

    def record(inputs, weight):
        if queued:
            queued[-1].append((float(inputs[0][0, 0]), id(weight)))
        return multiply(inputs, weight)

    weights = [weight, *(tuple(t.clone() for t in weight) for _ in range(4))]
    product = peer_worker.Product(record, weight, prepare)
    found = bench.run(case, (source, product, weights))
    assert found["layers"] == 5
    assert len(queued[-1]) == 5
    assert len({place for _, place in queued[-1]}) == 5
    assert len({x for x, _ in queued[-1]}) == 4
