"""What we print: nothing of a stranger's moves the cursor or forges a line; JSON is valid."""

from __future__ import annotations

import json
import math
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxwna16 import CheckpointError, InputError, ModelError
from jaxwna16.cli.json_report import write_report
from jaxwna16.cli.screen import escape_controls
from jaxwna16.generation import generate as generate_module
from loaders.errors import Fault, escape_line
from tests.fuzz.bases import join_file
from tests.fuzz.mutations import split_file

CLEAR = "\x1b[2J\x1b]0;title\x07\r\x9b31m\u202e"
FORGED = (
    "x\ngood: 9 quantized modules and 2 other tensors\r\u2028\u202ereverof\x1b[1A\u200b\U000e0041"
)
SHOWN = (
    r"x\ngood: 9 quantized modules and 2 other tensors\r\u2028\u202ereverof\x1b[1A\u200b\U000e0041"
)


@pytest.fixture
def says(monkeypatch):
    """Make every model say a text, piece by piece."""

    def say(text: str) -> None:
        generate = generate_module.generate

        def fake(model, prompts, *, stream: Any = None, **options: Any):
            options["max_new_tokens"] = 1
            found = generate(model, prompts, **options)
            for piece in text if stream else "":
                stream([piece] * len(prompts))
            return generate_module.Generation([text] * len(prompts), found.result)

        monkeypatch.setattr(generate_module, "generate", fake)

    return say


@pytest.mark.parametrize("prompts", [1, 2])
def test_control_characters_of_a_text_are_shown_on_a_terminal(
    call, packed_folder, says, monkeypatch, prompts
):
    says(f"one\n\ttwo é {CLEAR}")
    order = ["generate", packed_folder, *["--prompt", "Hi"] * prompts]
    assert CLEAR in call(*order).out
    monkeypatch.setattr(sys.stdout.__class__, "isatty", lambda _: True)
    shown = call(*order).out
    assert "one\n\ttwo é" in shown
    assert r"\x1b[2J\x1b]0;title\x07\r\x9b31m\u202e" in shown
    own = shown.replace("\x1b[1m", "").replace("\x1b[0m", "")  # the prompt is bold
    assert not set("\x1b\x07\r\x9b\u202e") & set(own)
    assert CLEAR in call(*order, "--raw").out


@pytest.mark.parametrize("verb", ["verify", "inspect"])
def test_a_name_cannot_forge_a_line(call, packed_folder, tmp_path, verb):
    folder = Path(shutil.copytree(packed_folder, tmp_path / "forged"))
    name = "model.layers.0.mlp.up_proj.weight_scale"
    header, data = split_file((folder / "model.safetensors").read_bytes())
    header[FORGED] = header.pop(name)
    (folder / "model.safetensors").write_bytes(join_file(json.dumps(header).encode(), data))
    config = json.loads((folder / "config.json").read_text())
    config["architectures"] = [FORGED]
    config["quantization_config"]["ignore"] += [FORGED]
    (folder / "config.json").write_text(json.dumps(config))
    outcome = call(verb, folder)
    printed = outcome.out + outcome.err
    assert SHOWN in printed.replace("\n", "")
    assert not [line for line in printed.split("\n") if line.startswith("good: 9")]
    assert not set("\r\u2028\u202e\x1b\u200b\U000e0041") & set(printed)


def test_the_texts_of_errors_have_a_line_for_each_fault():
    fault = Fault(FORGED, FORGED, FORGED, FORGED)
    for error in (
        CheckpointError(FORGED, [fault, Fault(FORGED)]),
        ModelError(FORGED, [FORGED] * 2),
        InputError(FORGED, [FORGED] * 2),
    ):
        assert len(str(error).splitlines()) == 3
        assert SHOWN in str(error)


@given(st.text())
def test_an_escaped_line_is_one_line_that_can_be_printed(text):
    line = escape_line(text)
    line.encode()
    assert len(line.splitlines()) <= 1 and line.isascii() >= text.isascii()
    assert escape_line(line) == line
    if text.isprintable():
        assert line == text


@given(st.text())
def test_escaped_controls_leave_the_lines_of_a_text(text):
    shown = escape_controls(text)
    assert shown.count("\n") == text.count("\n") and shown.count("\t") == text.count("\t")
    assert not any((ord(c) < 32 and c not in "\n\t") or 127 <= ord(c) < 160 for c in shown)


def refuse(constant: str) -> None:
    raise AssertionError(f"{constant} is no JSON")


LEAVES = st.one_of(st.floats(), st.integers(), st.text(), st.none(), st.booleans())
TREES = st.recursive(LEAVES, lambda t: st.lists(t) | st.dictionaries(st.text(), t), max_leaves=20)


@given(st.dictionaries(st.sampled_from(["a", "é", "\ud800"]), TREES))
def test_a_report_is_json_with_null_for_what_is_no_number(report):
    text = write_report(report)
    assert text.isascii()
    found = json.loads(text, parse_constant=refuse)
    lost = found.pop("warnings", [])
    assert bool(lost) == has_lost(report)
    assert repr(found) == repr(replace(report))


def has_lost(value: Any) -> bool:
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return any(map(has_lost, inner)) or (isinstance(value, float) and not math.isfinite(value))


def replace(value: Any) -> Any:
    """By definition: what Python's own writer has to call a constant is null."""
    return json.loads(json.dumps(value), parse_constant=lambda _: None)


def test_a_warning_says_where_null_is(call, packed_folder, tmp_path):
    folder = Path(shutil.copytree(packed_folder, tmp_path / "odd"))
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": math.nan, "architectures": ["\ud800"]}
    (folder / "config.json").write_text(json.dumps(config))
    outcome = call("inspect", folder, "--json")
    report = json.loads(outcome.out, parse_constant=refuse)
    assert report["model_type"] is None and report["architectures"] == ["\ud800"]
    [warning] = [w for w in report["warnings"] if "null" in w]
    assert warning == "null in place of NaN or an infinity: model_type"
