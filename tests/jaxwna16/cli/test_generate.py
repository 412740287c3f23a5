"""`jaxwna16 generate`."""

from __future__ import annotations

import json

import pytest

from jaxwna16 import generate, load_model
from tests.jaxwna16.cli.checkpoints import CHAT

PROMPTS = ("A dark night", "Once")


@pytest.fixture(scope="module")
def expected(packed_folder) -> list[str]:
    return generate(load_model(packed_folder), PROMPTS, max_new_tokens=12).texts


def test_one_prompt_prints_its_text_and_nothing_else(call, packed_folder, expected):
    outcome = call("generate", packed_folder, "--prompt", PROMPTS[0], "--max-new-tokens", 12)
    assert outcome.code == 0
    assert outcome.out == expected[0] + "\n"
    assert "prefill 12 tokens" in outcome.err
    assert "decode 11 tokens" in outcome.err


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


def test_the_chat_template_is_used_where_there_is_one(call, broken):
    (broken / "chat_template.jinja").write_text(CHAT)
    counts = {}
    for choice in ("--chat", "--no-chat", None):
        argv = ["--prompt", "Hello", "--max-new-tokens", 1, *([choice] if choice else []), "--json"]
        report = call("generate", broken, *argv).report
        counts[choice] = report["timings"]["prompt_tokens"], report["chat"]
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
