"""`jaxwna16 eval perplexity`."""

from __future__ import annotations

import numpy as np
import pytest


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("The quick brown fox jumps over the lazy dog. " * 10)  # 450 bytes
    return path


def test_the_whole_text_is_scored(call, packed_folder, text):
    report = call(
        "eval", "perplexity", packed_folder, "--text", text, "--window", 32, "--json"
    ).report
    assert (report["windows"], report["tokens"]) == (14, 14 * 31)
    assert report["perplexity"] == pytest.approx(np.exp(report["nll"]))


def test_windows_are_taken_from_the_middle_of_the_text(call, packed_folder, text):
    argv = ["eval", "perplexity", packed_folder, "--window", 32, "--windows", 2, "--text", text]
    report = call(*argv, "--json").report
    half = text.with_name("half.txt")
    half.write_text(text.read_text()[225 : 225 + 64])
    whole = call("eval", "perplexity", packed_folder, "--window", 32, "--text", half, "--json")
    assert report["windows"] == 2
    assert report["nll"] == whole.report["nll"]


def test_the_perplexity_comes_first(call, packed_folder, text):
    argv = ["eval", "perplexity", packed_folder, "--text", text, "--window", 32, "--batch", 4]
    outcome = call(*argv)
    assert outcome.code == 0
    first, second = outcome.out.splitlines()
    assert first.startswith("perplexity ")
    assert second.startswith("14 windows of 32 tokens, 434 tokens scored in")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--window", "451"], "fewer than one window of 451"),
        (["--window", "1"], "at least 2 tokens"),
        (["--window", "32", "--windows", "8"], "has 7 windows of 32 tokens, not 8"),
        (["--window", "32", "--windows", "0"], "at least 1"),
        (["--window", "32", "--batch", "-2"], "batch must be at least 1"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_impossible_windows_are_refused(call, packed_folder, text, options, message):
    outcome = call("eval", "perplexity", packed_folder, "--text", text, *options)
    assert outcome.code == 1
    assert outcome.err.startswith("error: ")
    assert message in outcome.err


def test_a_text_that_is_missing_empty_or_not_utf8_is_refused(call, packed_folder, tmp_path):
    (tmp_path / "empty").touch()
    (tmp_path / "bytes").write_bytes(b"\xff\xfe\x00")
    for name, message in [("none", "cannot be read"), ("empty", "empty"), ("bytes", "not UTF-8")]:
        outcome = call("eval", "perplexity", packed_folder, "--text", tmp_path / name)
        assert outcome.code == 1
        assert message in outcome.err
