"""Whatever stands under a key of config.json: a configuration, or an error of ours, and soon."""

from __future__ import annotations

import contextlib
import io
import json
import math
import time
import warnings
from typing import Any

import numpy as np
import pytest
from hypothesis import given, seed, settings
from hypothesis import strategies as st

from jaxwna16 import Wna16Error, load_model
from jaxwna16.cli import main
from jaxwna16.errors import ModelError
from jaxwna16.models.config.config_reader import ConfigReader
from jaxwna16.models.deepseek import config as deepseek_config
from jaxwna16.models.families import MODEL_TYPES, parse_config
from jaxwna16.models.filling.skipped import list_rules
from jaxwna16.models.llama.relatives import RELATIVES, Relative
from jaxwna16.models.parts.rope import attention_factor, inverse_frequencies
from jaxwna16.models.wrapped.table import WRAPPERS
from loaders.files.small_files import CONFIG
from tests.fuzz.bases import make_bases

SIZES = {
    "vocab_size": 32,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 64,
    "n_shared_experts": 1,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "first_k_dense_replace": 1,
}
ROPES = (
    {},
    {"rope_type": "linear", "factor": 2.0},
    {"rope_type": "dynamic", "factor": 2.0},
    {
        "rope_type": "llama3",
        "factor": 2.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    },
    {"rope_type": "yarn", "factor": 2.0, "beta_fast": 32, "beta_slow": 1, "mscale": 1.0},
    {"rope_type": "yarn", "mscale": 1.0, "mscale_all_dim": 0.5, "truncate": False},
    {"rope_type": "yarn", "attention_factor": 1.5, "partial_rotary_factor": 0.5},
)
ODD: tuple[Any, ...] = (
    *(None, True, False, 0, 1, 2, 3, -1, 7, 1000, 1001, 2**31 - 1, 2**31, 2**63, 10**400),
    *(0.0, 0.5, 1.0, 1.0000000000000002, 2.5, -0.5, 1e-308, 5e-324, 1e-30, 1e30, 1e308, 1.7e308),
    *(math.nan, math.inf, -math.inf, "", "x", "1", "\ud800", "linear_attention", [], [1], [None]),
    *([[]], [1e308], ["x"] * 3, {}, {"a": 1}, {"rope_type": []}, {"": {}}, [10**400], [-1], [True]),
)
"""What a file can hold that nobody expects there."""

GEMMA4 = ("gemma4_text", "gemma4_unified_text", "gemma4", "gemma4_unified")
TWO_ROPES = ("olmo3", "gemma3_text", "gemma3", *GEMMA4)
"""Those whose layers with windows have a rope of their own."""


LATENT = (*deepseek_config.KINDS, "kimi_k25")
"""Those with latent attention: the rotated part of a head is whole, and experts have 8 groups."""


WRAPPED = tuple(WRAPPERS)[2:]
"""Those whose sections other rows read, too."""


def _make_config(model_type: str, changes: dict[str, Any], rope: dict[str, Any]) -> dict[str, Any]:
    if rope and model_type in TWO_ROPES:
        rope = {"full_attention": rope, "sliding_attention": {"rope_type": "default"}}
    if rope and _find_row(model_type).rope.scales_queries:
        rope = {**rope, "llama_4_scaling_beta": 0.1}
    experts = {"n_routed_experts": 32} if model_type in LATENT else {}
    text = SIZES | experts | ({"rope_parameters": rope} if rope else {}) | changes
    if model_type in WRAPPERS:
        for key in reversed(WRAPPERS[model_type].path):
            text = {key: text}
    return {"model_type": model_type} | text


def _find_row(model_type: str) -> Relative:
    """The relative of Llama that a model type is of, or a plain one."""
    text = WRAPPERS[model_type].texts[0] if model_type in WRAPPERS else model_type
    return RELATIVES.get(text, Relative())


class _Noting(dict):
    """A dict that notes which keys it is asked for."""

    asked: set[str] = set()  # noqa: RUF012

    def get(self, key, default=None):
        self.asked.add(key)
        return super().get(key, default)

    def __contains__(self, key):
        self.asked.add(key)
        return super().__contains__(key)


@pytest.fixture(scope="module")
def keys() -> dict[str, set[str]]:
    """Model type -> all keys that its reader asks for."""
    found = {}
    make = ConfigReader.__init__

    def note(reader, *arguments):
        make(reader, *arguments)
        reader.config = _Noting(reader.config)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ConfigReader, "__init__", note)
        for model_type in MODEL_TYPES:
            _Noting.asked = set()
            for rope in ROPES:
                _try(_make_config(model_type, {}, rope))
            found[model_type] = _Noting.asked - {"model_type"}
    return found


def _try(config: dict[str, Any]) -> None:
    """Read a configuration, and compute all that is computed of it before any array is made."""
    try:
        model = parse_config(config)
    except ModelError as error:
        assert len(str(error)) < 20_000
        return
    assert 0 < model.max_length < 2**62
    assert all(0 <= token < 2**31 for token in model.eos_token_ids)
    assert len(list_rules(model)) < 10
    frequencies = inverse_frequencies(model.rope, model.rotary_dim)
    assert np.isfinite(frequencies).all() and (frequencies >= 0).all()
    assert 0 < attention_factor(model.rope) < 1e30


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_every_family_takes_its_own_values(model_type):
    for rope in _list_ropes(model_type):
        config = _make_config(model_type, {}, rope)
        if rope.get("rope_type") == "dynamic" and model_type.startswith(("qwen3_5", "qwen3_next")):
            continue
        takes_parts = model_type.startswith(("qwen3_5", "glm")) and model_type not in LATENT
        if takes_parts or "partial_rotary_factor" not in rope:
            assert parse_config(config).max_length >= 64


def _list_ropes(model_type: str) -> tuple[dict[str, Any], ...]:
    """The scalings that a model type has: all, or longrope alone."""
    if model_type in GEMMA4:
        return (*ROPES[:2], {"rope_type": "proportional", "factor": 2.0})
    if _find_row(model_type).rope.longrope is None:
        return ROPES
    return ({}, {"rope_type": "longrope", "short_factor": [1.0] * 8, "long_factor": [2.0] * 8})


@pytest.mark.parametrize(
    "model_type",
    [
        pytest.param(name, marks=[pytest.mark.thorough] if name in WRAPPED else [])
        for name in MODEL_TYPES
    ],
)
def test_every_key_with_every_odd_value_is_read_or_refused(keys, model_type):
    assert {"hidden_size", "rope_parameters", "eos_token_id"} <= keys[model_type]
    start = time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for key in sorted(keys[model_type]):
            for value in ODD:
                _try(_make_config(model_type, {key: value}, {}))
        for rope in ROPES:
            for key in ("rope_theta", "original_max_position_embeddings", "type", *rope):
                for value in ODD:
                    for sizes in ({}, {"max_position_embeddings": 2**31 - 1}):
                        _try(_make_config(model_type, sizes, rope | {key: value}))
    assert time.perf_counter() - start < 20


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A checkpoint of two layers, whose config.json the test below writes."""
    made = tmp_path_factory.mktemp("any") / "llama"
    made.mkdir()
    for name, content in make_bases()["llama"].items():
        (made / name).write_bytes(content)
    return made


OUTER = (
    *("architectures", "auto_map", "dtype", "torch_dtype", "is_causal", "text_config"),
    *("llm_config", "quantization_config", "compression_config", "transformers_version"),
)
"""Keys that are not of the model alone, or are read elsewhere."""


@seed(0)
@settings(max_examples=60, deadline=None, database=None)
@given(
    model_type=st.sampled_from(["llama", "llama", "glm4_moe", "qwen3_5", "qwen3_moe"]),
    data=st.data(),
)
def test_inspect_and_load_model_end_in_a_report_or_an_error_of_ours(keys, folder, model_type, data):
    key = data.draw(st.sampled_from([*OUTER, "model_type", *sorted(keys[model_type])]))
    value = data.draw(st.sampled_from(ODD))
    original = json.loads(make_bases()["llama"][CONFIG])
    if model_type != "llama":
        original |= _make_config(model_type, {}, {})
    (folder / CONFIG).write_text(json.dumps(original | {key: value}))
    for options in ([], ["--json"]):
        with contextlib.redirect_stdout(io.StringIO()) as out:
            assert main.main(["inspect", str(folder), *options]) in (0, 1)
        assert 0 < len(out.getvalue()) < 100_000
    try:
        load_model(folder)
    except Wna16Error as error:
        assert len(str(error)) < 100_000


def test_architectures_that_are_no_names_are_a_fault_in_inspect(folder, capsys):
    original = json.loads(make_bases()["llama"][CONFIG])
    (folder / CONFIG).write_text(json.dumps(original | {"architectures": 5}))
    assert main.main(["inspect", str(folder), "--json"]) == 1
    report = json.loads(capsys.readouterr().out)
    [fault] = report["error"]["faults"]
    assert (fault["file"], fault["tensor"]) == (CONFIG, "architectures")
    assert fault["what"] == "expected a list of names, found 5"
    assert report["totals"]["bytes"] > 0


@pytest.mark.parametrize("count", [1, 2, 1000])
def test_layers_that_predict_tokens_are_told_by_their_number(count):
    config = _make_config("glm4_moe", {"num_nextn_predict_layers": count}, {})
    rules = list_rules(parse_config(config))
    found = [any(rule.pattern.match(f"model.layers.{i}.x") for rule in rules) for i in range(1100)]
    assert found == [2 <= i < 2 + count for i in range(1100)]


def test_more_layers_that_predict_tokens_than_there_can_be_are_refused():
    config = _make_config("glm4_moe", {"num_nextn_predict_layers": 2**31 - 1}, {})
    with pytest.raises(ModelError, match=r"num_nextn_predict_layers: expected .* at most 1000"):
        parse_config(config)


def test_far_more_layers_than_the_files_have_are_refused_before_they_are_made(folder):
    original = json.loads(make_bases()["llama"][CONFIG])
    start = time.perf_counter()
    for layers in (102, 1000):
        (folder / CONFIG).write_text(json.dumps(original | {"num_hidden_layers": layers}))
        with pytest.raises(ModelError, match=f"expected the 1 layers of the files, found {layers}"):
            load_model(folder)
    assert time.perf_counter() - start < 2
