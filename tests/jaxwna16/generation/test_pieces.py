"""How long a piece of the prompts is: what pays off, and what there is memory for."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from jaxwna16.generation import pieces
from jaxwna16.generation.pieces import Room, choose_piece, limit_piece, measure_token
from jaxwna16.models.causal_lm import CausalLM
from jaxwna16.models.families import find_family

GIB = 1 << 30
run_hidden = jax.jit(CausalLM.hidden, donate_argnames="cache")
SMALL = {
    "num_hidden_layers": 2,
    "hidden_size": 512,
    "intermediate_size": 1024,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "vocab_size": 128,
    "max_position_embeddings": 1 << 20,
}
KINDS = {
    "llama": {},
    "qwen3_moe": {"num_experts": 16, "num_experts_per_tok": 4, "moe_intermediate_size": 256},
    "qwen3_5_text": {
        "linear_num_key_heads": 8,
        "linear_num_value_heads": 16,
        "linear_key_head_dim": 64,
        "linear_value_head_dim": 64,
        "layer_types": ["linear_attention", "full_attention"],
    },
}
LLAMA_8B = {
    "num_hidden_layers": 32,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
}


def _make(model_type: str = "llama", dtype="bfloat16", backend=None, **changes) -> CausalLM:
    """Without weights."""
    config = {"model_type": model_type, **SMALL, **KINDS[model_type], **changes}
    family = find_family(config)
    make, parsed = family.open_class(), family.read(config)
    return nnx.eval_shape(lambda: make(parsed, dtype=dtype, backend=backend))


def _fix_room(monkeypatch, platform: str, free: int | None = None) -> None:
    monkeypatch.setattr(pieces, "_find_room", lambda model: Room(platform, free))


def _choose(longest: int, batch: int = 1, asked: int | None = None, **changes) -> int:
    return choose_piece(_make(**changes), longest, batch, longest + 128, asked)


def test_pieces_are_as_long_as_each_other_and_shorter_in_a_wide_batch(monkeypatch):
    _fix_room(monkeypatch, "cpu")
    assert [_choose(n) for n in (3, 512, 513, 2000)] == [16, 512, 320, 512]
    assert [_choose(2000, batch) for batch in (16, 64, 4096)] == [512, 128, 16]
    assert [_choose(2000, 64, n) for n in (1, 300, 5000)] == [1, 300, 2048]


def test_pieces_on_a_gpu_are_long_enough_to_expand_weights(monkeypatch):
    _fix_room(monkeypatch, "gpu", 60 * GIB)
    found = [_choose(n, **LLAMA_8B) for n in (100, 2000, 2049, 5000, 100_000)]
    assert found == [112, 2048, 1280, 1792, 2048]
    assert [_choose(5000, batch, **LLAMA_8B) for batch in (4, 16, 64)] == [1792, 512, 128]


def test_a_prompt_is_one_piece_where_rope_wants_it(monkeypatch):
    _fix_room(monkeypatch, "cpu")
    rope = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    assert _choose(3000, rope_parameters=rope) == 3072


@pytest.mark.parametrize(("free", "expected"), [(40, 2048), (4.3, 1024), (4.1, 256), (0, 16)])
def test_pieces_are_shorter_where_memory_is_scarce(free, expected):
    """A cache of 2^15 slots takes 4 GiB, and a token 119 kB; half of the rest may be taken."""
    room = Room("gpu", int(free * GIB))
    assert limit_piece(_make(**LLAMA_8B), 1, 1 << 15, room) == expected


@pytest.mark.parametrize(
    ("changes", "room"),
    [
        ({"dtype": "float32"}, Room("gpu", 12 * GIB)),
        ({"backend": "xla"}, Room("gpu", 8 * GIB)),
        ({}, Room("tpu", 8 * GIB)),
        ({}, Room("cpu")),
    ],
)
def test_scores_count_where_there_is_no_kernel(changes, room):
    """Two float32 of each of 32 heads and 2^15 slots are 8 MiB a token; 2 GiB hold 249 of them."""
    model = _make(**LLAMA_8B, **changes)
    assert limit_piece(model, 1, 1 << 15, room) == 128
    assert limit_piece(model, 1, 1 << 10, room) >= 512


@pytest.mark.parametrize("kind", KINDS)
def test_a_token_takes_the_memory_that_is_said(kind):
    """XLA's own figure is at most that, and no less than half."""
    model, slots = _make(kind, "float32"), 1024

    def measure(steps: int) -> int:
        tokens, bound = (jax.ShapeDtypeStruct(shape, jnp.int32) for shape in ((1, steps), (1,)))
        cache = jax.eval_shape(functools.partial(model.make_cache, 1, slots))
        program = run_hidden.lower(model, tokens, bound, bound, cache).compile()
        return program.memory_analysis().temp_size_in_bytes

    said = measure_token(model.config, model.dtype, slots)
    assert said / 2 <= (measure(512) - measure(256)) / 256 <= said


class _Device:
    platform = "gpu"

    def __init__(self, stats):
        self.stats = stats

    def memory_stats(self):
        return self.stats


def test_the_fullest_device_decides(monkeypatch):
    told = [{"bytes_limit": 9, "bytes_in_use": n} for n in (2, 5, 3)]
    for stats, free in ((told, 4), ([None, {}], None), ([None, told[0]], 7)):
        devices = [_Device(each) for each in stats]
        monkeypatch.setattr(pieces, "list_devices", lambda model, found=devices: set(found))
        assert pieces._find_room(_make()) == Room("gpu", free)


def test_a_model_of_this_machine_has_a_room():
    model = nnx.merge(*nnx.split(jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), _make())))
    assert pieces._find_room(model) == Room("cpu")
