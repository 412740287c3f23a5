"""`jaxwna16 eval compare`."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import pytest

from jaxwna16.comparison import Compared
from jaxwna16.evaluation.comparison_plot import draw
from tests.jaxwna16.cli.checkpoints import edit_config


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("The quick brown fox jumps over the lazy dog. " * 10)
    return path


def test_checkpoints_are_measured_side_by_side(call, float_folder, packed_folder, text, tmp_path):
    plot = tmp_path / "plot.svg"
    argv = ["--text", text, "--window", 32, "--windows", 4, "--batch", 2]
    outcome = call("eval", "compare", float_folder, packed_folder, *argv, "--plot", plot, "--json")
    first, second = outcome.report["rows"]
    alone = call("eval", "perplexity", packed_folder, *argv, "--json").report
    assert second["perplexity"] == alone["perplexity"]
    assert [row["scheme"] for row in (first, second)] == ["float32", "W4 asymmetric g32"]
    assert (first["kl_divergence"], first["top1_agreement"]) == (0.0, 1.0)
    assert second["kl_divergence"] > 0
    assert 0 < second["top1_agreement"] < 1
    sizes = [call("inspect", f, "--json").report for f in (float_folder, packed_folder)]
    assert [row["bytes"] for row in (first, second)] == [s["totals"]["bytes"] for s in sizes]
    # two folders of one name are told apart by their paths
    assert [row["name"] for row in (first, second)] == [str(float_folder), str(packed_folder)]
    picture = plot.read_text()
    for words in ("W4 asymmetric", "KL divergence", f"{first['perplexity']:.4g}", "checkpoint, MB"):
        assert f"<!-- {words}" in picture or words in picture


def test_the_table_has_a_line_for_each(call, float_folder, packed_folder, text):
    outcome = call("eval", "compare", float_folder, packed_folder, "--text", text, "--window", 32)
    title, *lines = outcome.out.splitlines()
    assert title.split()[:3] == ["checkpoint", "weights", "MB"]
    assert len(lines) == 2
    assert "100.0%" in lines[0]
    assert "W4 asymmetric g32" in lines[1]


def rename_a_token(folder):
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text())
    vocabulary = content["model"]["vocab"]
    vocabulary["A"], vocabulary["B"] = vocabulary["B"], vocabulary["A"]
    path.write_text(json.dumps(content))


def split_otherwise(folder):
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text())
    content["pre_tokenizer"]["add_prefix_space"] = True
    path.write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            lambda f: edit_config(f, lambda c: c.update(vocab_size=300)),
            "vocabulary of 300, not 257",
        ),
        (rename_a_token, "its tokenizer is another one: token 32 is 'B', not 'A'"),
        (split_otherwise, "cuts the text into other tokens"),
    ],
)
def test_another_vocabulary_is_refused_by_name(call, float_folder, tmp_path, text, damage, message):
    other = tmp_path / "other"
    shutil.copytree(float_folder, other)
    damage(other)
    outcome = call("eval", "compare", float_folder, float_folder, other, "--text", text)
    assert outcome.code == 1
    assert f"{other}: " in outcome.err
    assert message in outcome.err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--plot", "nowhere/plot.png"], "there is no folder nowhere"),
        (["--plot", "plot.jpeg"], "must end in one of .png"),
        (["--plot", "folder.png"], "folder.png: this is a folder"),
        (["--plot", "locked/plot.png"], "locked/plot.png: cannot be written"),
        (["--window", 130], "was made for 128 tokens, so a window has at most 129"),
    ],
)
def test_the_impossible_is_refused_before_the_work(
    call, float_folder, text, options, message, monkeypatch
):
    monkeypatch.chdir(text.parent)
    for name in ("folder.png", "locked"):
        Path(name).mkdir()
    monkeypatch.setattr("os.access", lambda path, mode: "locked" not in str(path))  # also for root
    monkeypatch.setattr("jaxwna16.evaluation.comparison.load_model", None)
    outcome = call("eval", "compare", float_folder, float_folder, "--text", text, *options)
    assert outcome.code == 1
    assert message in outcome.err


ROW = Compared(
    name="tiny",
    folder="tiny",
    scheme="float32",
    bytes=1000,
    dtype="float32",
    load_seconds=0.1,
    perplexity=9.0,
    nll=2.2,
    kl_divergence=0.0,
    top1_agreement=1.0,
    tokens_per_second=5.0,
)


def test_equal_checkpoints_are_drawn_without_a_divergence(tmp_path):
    draw([dataclasses.asdict(ROW)] * 2, tmp_path / "plot.svg")
    assert "none above 0" in (tmp_path / "plot.svg").read_text()


def test_the_figures_outlive_a_plot_that_cannot_be_written(
    call, float_folder, text, tmp_path, monkeypatch
):
    def fail(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(
        "jaxwna16.evaluation.comparison.compare_checkpoints", lambda *_, **__: [ROW, ROW]
    )
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", fail)
    argv = ["--text", text, "--window", 32, "--plot", tmp_path / "plot.png", "--json"]
    outcome = call("eval", "compare", float_folder, float_folder, *argv)
    assert outcome.code == 1
    assert len(outcome.report["rows"]) == 2
    assert "No space left on device" in outcome.report["error"]["message"]


def test_one_checkpoint_is_no_comparison(call, float_folder, text):
    outcome = call("eval", "compare", float_folder, "--text", text)
    assert outcome.code == 1
    assert "at least two checkpoints, got 1" in outcome.err
