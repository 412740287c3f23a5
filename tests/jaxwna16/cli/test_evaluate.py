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


def test_a_stride_scores_every_token_also_by_word_and_byte(call, packed_folder, text):
    argv = ["eval", "perplexity", packed_folder, "--text", text, "--window", 32, "--stride", 31]
    report = call(*argv, "--json").report
    assert (report["tokens"], report["words"], report["bytes"]) == (450, 91, 450)
    total = report["nll"] * 450
    assert report["word_perplexity"] == pytest.approx(np.exp(total / 91))
    assert report["byte_perplexity"] == pytest.approx(report["perplexity"])  # a token is a byte
    assert report["bits_per_byte"] == pytest.approx(total / 450 / np.log(2))
    # of two windows, whose text ends where they do
    some = call(*argv, "--windows", 2, "--json").report
    assert (some["windows"], some["tokens"], some["bytes"]) == (2, 62, 62)
    half = text.read_text()[225 : 225 + 62]
    assert some["words"] == len(half.split(" "))
    assert "by word" in call(*argv).out


def test_words_and_bytes_are_left_out_where_not_every_token_is_scored(call, packed_folder, text):
    argv = ["eval", "perplexity", packed_folder, "--text", text, "--window", 32]
    report = call(*argv, "--json").report
    assert report["stride"] == 32
    names = ("words", "bytes", "word_perplexity", "byte_perplexity", "bits_per_byte")
    assert [report[name] for name in names] == [None] * 5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--window", "130"], "a window has at most 129"),
        (["--window", "32", "--stride", "33"], "--stride"),
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
