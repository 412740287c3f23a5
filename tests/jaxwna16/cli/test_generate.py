"""`jaxwna16 generate`."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from tokenizers import pre_tokenizers

from jaxwna16 import generate, load_model
from jaxwna16.programs import keep_programs
from tests.jaxwna16.cli.checkpoints import CHAT, edit_tensors

PROMPTS = ("A dark night", "Once")
ENCODED_O = sorted(pre_tokenizers.ByteLevel.alphabet()).index("O")


@pytest.fixture(scope="module")
def expected(packed_folder) -> list[str]:
    return generate(load_model(packed_folder), PROMPTS, max_new_tokens=12).texts


def test_one_prompt_prints_its_text_and_nothing_else(call, packed_folder, expected, monkeypatch):
    monkeypatch.setattr(
        "jaxwna16.generation.load_model.describe_unapplied", lambda *_, **__: ("num_beams is not",)
    )
    outcome = call("generate", packed_folder, "--prompt", PROMPTS[0], "--max-new-tokens", 12)
    assert outcome.code == 0
    assert outcome.out == expected[0] + "\n"
    assert "prefill 12 tokens" in outcome.err
    assert "decode 11 tokens" in outcome.err
    assert "warning: num_beams is not\n" in outcome.err


def test_several_prompts_print_a_text_under_each(call, packed_folder, expected):
    prompts = [argument for prompt in PROMPTS for argument in ("--prompt", prompt)]
    outcome = call("generate", packed_folder, *prompts, "--max-new-tokens", 12)
    assert outcome.code == 0
    assert all(text in outcome.out for text in expected)
    assert all(prompt in outcome.out for prompt in PROMPTS)


def test_the_report_has_texts_tokens_reasons_and_timings(call, packed_folder, expected):
    report = call(
        "generate", packed_folder, "--prompt", PROMPTS[1], "--max-new-tokens", 12, "--json"
    ).report
    assert report["texts"] == expected[1:]
    assert [len(tokens) for tokens in report["tokens"]] == [12]
    assert report["finish_reasons"] == ["length"]
    assert report["chat"] is False
    assert report["dtype"] == "float32"
    assert report["timings"]["prompt_tokens"] == len(PROMPTS[1])


def test_nan_logits_are_an_error_beside_the_report(call, broken):
    """The embedding of a letter is NaN, as where a quantizer went wrong."""

    def spoil(tensors):
        tensors["model.embed_tokens.weight"][ENCODED_O] = np.nan

    edit_tensors(broken, spoil)
    prompts = ["--prompt", PROMPTS[0], "--prompt", PROMPTS[1], "--max-new-tokens", 12]
    outcome = call("generate", broken, *prompts, "--json")
    assert outcome.code == 1
    report = outcome.report
    assert report["finish_reasons"][1] == "nan"
    assert report["tokens"][1] == [] and report["texts"][1] == ""
    assert len(report["tokens"][0]) > 0
    assert "the model's logits are not numbers" in report["error"]["message"]
    what = {fault["what"].partition(" the logits")[0] for fault in report["error"]["faults"]}
    assert "prompt 1: after 0 new tokens" in what
    outcome = call("generate", broken, "--prompt", PROMPTS[1], "--max-new-tokens", 12)
    assert (outcome.code, outcome.out) == (1, "\n")
    assert "prompt 0: after 0 new tokens the logits are no distribution" in outcome.err


def test_logprobs_are_in_the_report_token_by_token(call, packed_folder):
    argv = ["generate", packed_folder, "--prompt", PROMPTS[1], "--max-new-tokens", 12, "--json"]
    assert call(*argv).report["logprobs"] is None
    report = call(*argv, "--logprobs", 2).report
    (row,) = report["logprobs"]
    assert [entry["token"] for entry in row] == report["tokens"][0]
    for entry in row:  # greedy: the chosen one is the likeliest
        first, second = entry["top"]
        assert {**first, "top": entry["top"]} == entry
        assert 0 > first["logprob"] > second["logprob"]
    assert sum(math.exp(entry["top"][1]["logprob"]) for entry in row) < 12 / 2


def test_logprobs_have_no_place_but_the_report(call, packed_folder):
    outcome = call("generate", packed_folder, "--prompt", "a", "--logprobs", 2)
    assert (outcome.code, outcome.out) == (2, "")
    assert "add --json" in outcome.err


def test_a_file_of_prompts_is_a_batch(call, packed_folder, expected, tmp_path):
    prompts = (PROMPTS[0], "a\u2028b\x0c\x85c")
    (tmp_path / "prompts.txt").write_text(f"{prompts[0]}\r\n\n{prompts[1]}\n", newline="")
    argv = ["--prompts", tmp_path / "prompts.txt", "--max-new-tokens", 12, "--prefill-chunk", 5]
    report = call("generate", packed_folder, *argv, "--json").report
    assert report["prompts"] == list(prompts)
    assert report["texts"][0] == expected[0]


def test_the_text_ends_before_a_stop_string(call, packed_folder, expected):
    stop = expected[0][5:7]
    argv = ["--prompt", PROMPTS[0], "--max-new-tokens", 12, "--stop", "never", "--stop", stop]
    outcome = call("generate", packed_folder, *argv)
    assert outcome.out == expected[0][: expected[0].index(stop)] + "\n"


def test_compiled_programs_are_kept_in_the_users_cache(packed_folder, tmp_path):
    """In a process of its own: JAX looks once where, and the tests' own folder would be chosen."""
    environ = {
        **os.environ,
        "XDG_CACHE_HOME": str(tmp_path),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    del environ["JAX_COMPILATION_CACHE_DIR"]
    argv = "--prompt Hi --max-new-tokens 2 --json".split()
    subprocess.run(
        [sys.executable, "-m", "jaxwna16", "generate", packed_folder, *argv],
        env=environ,
        check=True,
        capture_output=True,
    )
    kept = {path.name for path in (tmp_path / "jaxwna16" / "compiled").iterdir()}
    for name in ("jit_prefill-", "jit_decode-"):
        assert any(file.startswith(name) for file in kept)


@pytest.mark.parametrize(("on", "own"), [(False, None), (True, "elsewhere")])
def test_no_folder_is_made_where_the_user_has_chosen(monkeypatch, tmp_path, on, own):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    names = ("jax_enable_compilation_cache", "jax_compilation_cache_dir")
    before = [getattr(jax.config, name) for name in names]
    try:
        for name, value in zip(names, (on, own), strict=True):
            jax.config.update(name, value)
        assert keep_programs() == (Path(own) if own else None)
        assert jax.config.jax_compilation_cache_dir == own
        assert list(tmp_path.iterdir()) == []
    finally:
        for name, value in zip(names, before, strict=True):
            jax.config.update(name, value)


def test_the_chat_template_is_used_where_there_is_one(call, broken):
    (broken / "chat_template.jinja").write_text(CHAT)
    (broken / "generation_config.json").write_text('{"repetition_penalty": 1.05}')
    counts = {}
    for choice in ("--chat", "--no-chat", None):
        argv = ["--prompt", "Hello", "--max-new-tokens", 1, *([choice] if choice else []), "--json"]
        report = call("generate", broken, *argv).report
        counts[choice] = report["timings"]["prompt_tokens"], report["chat"]
        assert "repetition_penalty 1.05 is not applied" in report["warnings"][0]
    assert counts == {"--chat": (7, True), "--no-chat": (5, False), None: (7, True)}


def test_draws_repeat_with_the_seed(call, packed_folder):
    argv = ["--prompt", "Hello", "--max-new-tokens", 12, "--temperature", 2, "--top-k", 50]
    texts = [call("generate", packed_folder, *argv, "--seed", seed).out for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


def test_the_dtype_and_backend_are_those_asked_for(call, packed_folder):
    argv = ["--prompt", "Hi", "--max-new-tokens", 2, "--dtype", "bfloat16", "--backend", "xla"]
    report = call("generate", packed_folder, *argv, "--json").report
    assert (report["dtype"], report["backend"]) == ("bfloat16", "xla")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--prompt", ""], "the prompt is empty"),
        (["--prompt", "a", "--max-new-tokens", "-3"], "max_new_tokens"),
        (["--prompt", "a", "--max-new-tokens", "1000"], "more than the 128"),
        (["--prompt", "a", "--temperature", "-1"], "temperature"),
        (["--prompt", "a", "--temperature", "nan"], "temperature"),
        (["--prompt", "a", "--top-k", "-1"], "top_k"),
        (["--prompt", "a", "--top-p", "0"], "top_p"),
        (["--prompt", "a", "--seed", "-1"], "seed"),
        (["--prompt", "a", "--stop", ""], "stop: expected strings"),
        (["--prompt", "a", "--prefill-chunk", "0"], "prefill_chunk"),
        (["--prompts", "/nowhere"], "/nowhere: cannot be read"),
        (["--prompts", os.devnull], "the file is empty"),
        (["--prompt", "a", "--chat"], "no chat template"),
        (["--prompt", "a", "--backend", "triton"], "triton"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_cannot_be_done_is_refused_in_one_error(call, packed_folder, options, message):
    outcome = call("generate", packed_folder, *options)
    assert outcome.code == 1
    assert outcome.out == ""
    assert outcome.err.startswith("error: ")
    assert message in outcome.err


def test_a_missing_tokenizer_is_found_before_the_weights_are_read(call, broken, monkeypatch):
    (broken / "tokenizer.json").unlink()
    monkeypatch.setattr("jaxwna16.cli.model.load_model", None)
    outcome = call("generate", broken, "--prompt", "Hello", "--json")
    assert outcome.code == 1
    assert "tokenizer.json" in json.loads(outcome.out)["error"]["message"]
