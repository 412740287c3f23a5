"""The table of the example: its last row is what the checkpoint of its command measures."""

from __future__ import annotations

import re
import shlex

import numpy as np
import pytest

import jaxwna16
from examples import sensitivity
from jaxwna16.cli.main import main as run_command


def test_the_command_makes_the_checkpoint_of_the_last_row(floats, tmp_path, capsys):
    sensitivity.main([str(floats), "--window", "64", "--windows", "4"])
    out = capsys.readouterr().out
    rows = dict(
        re.findall(r"^ +(\w+(?: but \w+)?) +\d+\.\d +([\d.]+) +[\d.]+ +[\d.]+ *$", out, re.M)
    )
    worst = list(rows)[-1].removeprefix("all but ")
    kinds = [f"{name}_proj" for name in ("down", "gate", "up", "k", "o", "q", "v")]
    assert list(rows) == ["nothing", *kinds, "all", f"all but {worst}"]
    assert worst in kinds

    command = shlex.split(out.splitlines()[-1].replace("DST", str(tmp_path / "packed")))
    assert run_command([*command[1:], "--json"]) == 0
    model = jaxwna16.load_model(tmp_path / "packed", dtype="float32")
    text = sensitivity.TEXT.read_text(encoding="utf-8")
    tokens = jaxwna16.Tokenizer.from_folder(floats).encode(text[len(text) // 2 :])
    found = jaxwna16.measure_perplexity(model, tokens, window=64, max_windows=4).perplexity
    # three decimals are shown; float32 products of packed and of expanded weights
    assert float(rows[f"all but {worst}"]) == pytest.approx(found, rel=1e-4)


def test_parts_are_layers_if_asked_and_kl_grows_with_what_is_quantized(floats):
    model = jaxwna16.load_model(floats)
    linears = sensitivity.quantize_linears(model, "layer", 4, -1, True)
    windows = np.arange(60, dtype=np.int32).reshape(2, 30)
    rows, worst = sensitivity.measure_parts(model, linears, windows)
    assert [row.name for row in rows[:3]] == ["nothing", "layers.0.", "layers.1."]
    assert worst in ("layers.0.", "layers.1.")
    nothing, first, second, everything, rest = (row.kl for row in rows)
    assert nothing == 0
    assert everything > max(first, second) > 0
    assert rest in (first, second)
    assert rows[3].saved == rows[1].saved + rows[2].saved


@pytest.mark.parametrize(
    ("name", "reason"), [("packed", "give the float one"), ("packed_moe", "not for {'experts'}")]
)
def test_what_the_table_would_not_be_right_for_is_refused(name, reason, request):
    with pytest.raises(SystemExit, match=reason):
        sensitivity.main([str(request.getfixturevalue(name))])
