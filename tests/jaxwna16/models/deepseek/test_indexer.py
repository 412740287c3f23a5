"""Models with an indexer: it is left out, and rows are no longer than what it keeps."""

from __future__ import annotations

import json

import pytest

import jaxwna16
from jaxwna16.cli.main import main
from jaxwna16.errors import InputError
from jaxwna16.generation.tokens import generate_tokens
from tests.jaxwna16.models.family_rows import BASES, ROWS
from tests.jaxwna16.models.hf_checkpoints import load_reference, write_row
from tests.jaxwna16.models.hf_models import (
    forward,
    make_reference,
    random_tokens,
    reference_logits,
    relative_error,
)

TOPK = 12
REASON = "index_topk = 12: its indexer, which chooses so many tokens for each, is not run"


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    reference = make_reference(BASES["deepseek_v32"], index_topk=TOPK)
    return write_row(reference, ROWS["deepseek_v32"], tmp_path_factory.mktemp("v32"))


def test_rows_of_index_topk_tokens_are_exact_and_longer_ones_are_refused(folders):
    model = jaxwna16.load_model(folders.packed, dtype="float32")
    reference, tokens = load_reference(folders), random_tokens(2, TOPK + 4)
    expected = reference_logits(reference, tokens)
    whole = reference_logits(load_reference_without_indexer(folders), tokens)
    # the first that the indexer keeps from somebody is token 12
    assert relative_error(whole[:, :TOPK], expected[:, :TOPK]) < 1e-4
    assert relative_error(whole[:, TOPK:], expected[:, TOPK:]) > 0.01
    logits = forward(model, tokens[:, :TOPK])
    assert relative_error(logits, expected[:, :TOPK]) < 1e-4
    with pytest.raises(InputError, match="expected at most 12 in a row, got 13") as raised:
        model(tokens[:, : TOPK + 1])
    assert REASON in str(raised.value)
    with pytest.raises(InputError, match="12 this model was made for") as raised:
        generate_tokens(model, tokens[:1, :9].tolist(), max_new_tokens=4)
    assert REASON in str(raised.value)


def load_reference_without_indexer(folders):
    """The same model of transformers, whose indexer keeps all."""
    model = load_reference(folders)
    for layer in model.model.layers:
        layer.self_attn.indexer.index_topk = 1000
    return model


def test_a_warning_tells_the_longest_row_and_the_indexer_is_listed(folders, capsys):
    model = jaxwna16.load_model(folders.packed, dtype="float32")
    assert any(f"at most {TOPK} tokens are read: {REASON}" in text for text in model.warnings)
    assert any("indexer" in text and "not loaded" in text for text in model.warnings)
    assert main(["inspect", str(folders.packed), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert any(REASON in text for text in report["warnings"])
    assert [row["reason"][:10] for row in report["skipped"]] == ["an indexer"]
