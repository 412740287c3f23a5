"""The suite that every family passes, one row of `family_rows` each: our model is transformers'.

compressed-tensors quantizes the weights of a small random model and decompresses them again. Our
model of the packed folder and that of the floats are compared with transformers' of the floats: at
once, in pieces, one by one, and in what they generate.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from flax import nnx

import jaxwna16
from jaxwna16.errors import ModelError
from jaxwna16.generation.tokens import generate_tokens
from jaxwna16.models.families import FAMILIES, MODEL_TYPES, find_family, parse_config
from jaxwna16.models.filling.renaming import rename
from jaxwna16.models.wrapped.table import WRAPPERS
from tests.jaxwna16.models.family_rows import BASES, MODELS, ROWS, SMALL, Row
from tests.jaxwna16.models.hf_checkpoints import load_reference, write_row
from tests.jaxwna16.models.hf_models import (
    cast_weights,
    convert,
    forward,
    generate_reference,
    is_beside,
    list_leaves,
    make_reference,
    random_tokens,
    reference_logits,
    relative_error,
    run_logits,
    run_padded,
    run_pieces,
)

CLOSE = 1e-4
"""float32 sums in another order; a wrong feature, group, position or norm gives more than 0.01."""
KINDS = ("packed", "plain")
DISTINCT = [f"{model_type}-packed" for model_type, row in ROWS.items() if not row.is_repeated]
PLAIN = [
    f"{model_type}-plain"
    for model_type, row in ROWS.items()
    if len(row.variants) == 1 and row.nest is None and not row.is_repeated
]
"""Those whose definition no variant compares with floats."""
AT_ONCE = [name for name in DISTINCT if name.replace("packed", "plain") in PLAIN] + ["llama-packed"]
"""Of the others, a variant is compared at once, and their packed weights in pieces."""
IN_PIECES = [
    f"{model_type}-packed"
    for model_type, row in ROWS.items()
    if row.nest is None or not row.is_repeated or model_type in ("qwen2_5_vl", "llava", "glm4v_moe")
]
"""All but wrappers of what another row has, of which a few stand for their ways to name tensors."""
ONE_BY_ONE = [
    f"{model_type}-packed"
    for model_type in ("llama", "phi3", "gemma2", "qwen3_next", "cohere2", "ministral3", "glm4_moe")
]
"""Of each kind of cache, rope and window one."""
GENERATING = ("llama-packed", "qwen3_5_moe-packed")
"""Of each kind of cache one: their decode loops are always compiled and run."""
EXTRAS = [name for name in MODELS if name not in BASES.values()]


class Case(NamedTuple):
    """A family's row, transformers' model, and ours of the same weights, packed or plain."""

    row: Row
    reference: Any
    model: Any


def list_cases(*always: str) -> list:
    """Each row, packed and plain; what `always` does not name, as "llama-packed", is thorough."""
    names = {f"{model_type}-{kind}": (model_type, kind) for model_type in ROWS for kind in KINDS}
    return [
        pytest.param(facts, id=name, marks=[] if name in always else [pytest.mark.thorough])
        for name, facts in names.items()
    ]


@pytest.fixture(scope="module")
def load(tmp_path_factory) -> Callable[[str, str], Case]:
    """Makes the folders of one family at a time, and the models of both."""

    @functools.lru_cache(maxsize=1)
    def write(model_type: str):
        folder = tmp_path_factory.mktemp(model_type)
        folders = write_row(make_reference(BASES[model_type]), ROWS[model_type], folder)
        return folders, load_reference(folders)

    @functools.lru_cache(maxsize=1)
    def load(model_type: str, kind: str) -> Case:
        folders, reference = write(model_type)
        folder = folders.packed if kind == "packed" else folders.floats
        return Case(ROWS[model_type], reference, jaxwna16.load_model(folder, dtype="float32"))

    return load


@pytest.fixture(scope="module")
def case(request, load) -> Case:
    return load(*request.param)


@pytest.mark.parametrize("case", list_cases(*AT_ONCE, *PLAIN), indirect=True, scope="module")
def test_logits_at_once_are_those_of_transformers(case):
    tokens = random_tokens(2, case.row.length)
    ours = forward(case.model, jnp.asarray(tokens))
    assert ours.dtype == jnp.float32
    assert relative_error(ours, reference_logits(case.reference, tokens)) < CLOSE


@pytest.mark.parametrize("case", list_cases(*IN_PIECES), indirect=True, scope="module")
def test_logits_of_rows_in_pieces_are_those_of_each_row_at_once(case):
    """A row ends within a piece, and another before it begins; windows end in and between them."""
    length, piece = case.row.length, case.row.piece
    tokens, lengths = random_tokens(3, length), np.array([length, piece + 3, 0])
    logits = run_padded(case.model, tokens, lengths, piece)
    for row, end in enumerate(lengths[:2]):
        expected = reference_logits(case.reference, tokens[row : row + 1, :end])
        assert relative_error(logits[row : row + 1, :end], expected) < CLOSE


@pytest.mark.parametrize("case", list_cases(*ONE_BY_ONE), indirect=True, scope="module")
def test_one_by_one_logits_and_greedy_tokens_are_those_of_transformers(case):
    length, piece = case.row.length, case.row.piece
    tokens = generate_reference(case.reference, random_tokens(3, piece), length)
    stream = run_pieces(case.model, tokens, [piece, *[1] * (length - piece)])
    logits = run_logits(case.model, stream)
    assert relative_error(logits, reference_logits(case.reference, tokens)) < CLOSE
    np.testing.assert_array_equal(logits[:, piece - 1 : -1].argmax(-1), tokens[:, piece:])


@pytest.mark.parametrize("case", list_cases(*GENERATING), indirect=True, scope="module")
def test_generated_tokens_are_those_of_transformers(case):
    expected = generate_reference(case.reference, random_tokens(1, 11), 43)[0, 11:].tolist()
    result = generate_tokens(case.model, random_tokens(1, 11).tolist(), max_new_tokens=32)
    assert result.tokens == [expected]
    assert len(set(expected)) > 3  # no loop of a few tokens


@pytest.mark.thorough
@pytest.mark.parametrize("model_type", ROWS)
def test_logits_of_1_7_64_and_257_tokens_are_those_of_transformers(model_type, tmp_path):
    """At once, in pieces, and the longest also one by one: past windows and original lengths."""
    reference = make_reference(BASES[model_type], max_position_embeddings=512)
    folders = write_row(reference, ROWS[model_type], tmp_path)
    reference = load_reference(folders)
    model = jaxwna16.load_model(folders.packed, dtype="float32")
    for length in (1, 7, 64, 257):
        tokens = random_tokens(2, length, seed=length)
        expected = reference_logits(reference, tokens)
        assert relative_error(forward(model, jnp.asarray(tokens)), expected) < CLOSE
        pieces = run_padded(model, tokens, np.array([length, length]), 48)
        assert relative_error(pieces, expected) < CLOSE
    stream = run_pieces(model, tokens, [1] * length)
    assert relative_error(run_logits(model, stream), expected) < CLOSE


@pytest.mark.parametrize("name", EXTRAS)
def test_logits_of_a_variant_are_those_of_transformers(name):
    reference = make_reference(name)
    tokens = random_tokens(2, 24)
    ours = forward(convert(reference), jnp.asarray(tokens))
    assert relative_error(ours, reference_logits(reference, tokens)) < CLOSE


@pytest.mark.thorough
@pytest.mark.parametrize("name", [name for name in EXTRAS if "rope past" not in name])
def test_a_variant_in_pieces_and_then_one_by_one_is_the_same(name):
    model = convert(make_reference(name))
    tokens = random_tokens(2, 24)
    stream = run_pieces(model, tokens, [8, 8, *[1] * 8])
    logits = forward(model, jnp.asarray(tokens))
    assert relative_error(run_logits(model, stream), np.asarray(logits)) < CLOSE


@pytest.mark.parametrize("model_type", [m for m in ROWS if ROWS[m].bfloat16 is not None])
def test_bfloat16_is_as_close_to_float32_as_transformers_in_bfloat16_is(model_type):
    reference = make_reference(BASES[model_type], seed=1, **ROWS[model_type].bfloat16)
    tokens = random_tokens(2, 24)
    exact = reference_logits(reference, tokens)
    ours = forward(convert(reference, dtype=jnp.bfloat16), jnp.asarray(tokens))
    theirs = reference_logits(cast_weights(reference, torch.bfloat16), tokens)
    assert ours.dtype == jnp.float32
    assert 1e-4 < relative_error(ours, exact) < 1.5 * relative_error(theirs, exact)


@pytest.mark.parametrize("model_type", ROWS)
def test_under_eval_shape_no_array_is_made_and_paths_are_the_checkpoints(model_type):
    reference = make_reference(BASES[model_type])
    config = reference.config.to_dict()
    family = find_family(config)
    make, parsed = family.open_class(), family.read(config)
    abstract = nnx.eval_shape(lambda: make(parsed, dtype=jnp.bfloat16))
    leaves = dict(nnx.to_flat_state(nnx.state(abstract)))
    assert all(isinstance(v.get_value(), jax.ShapeDtypeStruct) for v in leaves.values())
    found = {
        rename(name, family.names) for name, _ in list_leaves(reference) if not is_beside(name)
    }
    assert {".".join(map(str, path)) for path in leaves} == found


@pytest.mark.parametrize(
    "model_type", [name for name, row in ROWS.items() if row.sizes is SMALL and row.nest is None]
)
def test_absent_keys_take_the_defaults_of_transformers(model_type):
    needed = ROWS[model_type].needed
    sizes = {key: SMALL[key] for key in SMALL if key.endswith(("_size", "_heads", "_layers"))}
    saved = transformers.AutoConfig.for_model(model_type, **sizes, **needed).to_dict()
    sizes["max_position_embeddings"] = saved["max_position_embeddings"]
    ours = parse_config({"model_type": model_type, **sizes, **needed})
    # two that no number depends on: the dtype of a file, and where a text ends
    assert dataclasses.replace(ours, dtype=None, eos_token_ids=()) == dataclasses.replace(
        parse_config(saved), dtype=None, eos_token_ids=()
    )


def test_every_model_type_has_one_family_one_definition_and_one_row_of_tests():
    assert len(MODEL_TYPES) == len(set(MODEL_TYPES))
    # of a whole that has a thinker, `wrapped/test_thinkers.py` says more
    with_thinkers = {name for name, w in WRAPPERS.items() if w.path[0] == "thinker_config"}
    # and `deepseek/test_definition.py` of what transformers knows by another name
    assert set(MODEL_TYPES) - with_thinkers - {"kimi_k2"} == ROWS.keys()
    for family in FAMILIES:
        assert isinstance(family.open_class(), type)
    with pytest.raises(ModelError, match="model_type"):
        find_family({"model_type": "qwen3_6"})
