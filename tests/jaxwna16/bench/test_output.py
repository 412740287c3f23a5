"""Files are whole or not there, and a plot is one that can be seen."""

from __future__ import annotations

import json
import xml.etree.ElementTree

import pytest

from jaxwna16.bench import output
from jaxwna16.bench.output import write_plot, write_tables
from jaxwna16.bench.plot import draw
from jaxwna16.errors import InputError
from tests.jaxwna16.bench.results import make_cases, make_moe_cases, make_report, make_row


@pytest.fixture
def report():
    cases = make_cases("64x64,4096x4096", [1, 16, 256, 4096])
    rows = [
        make_row(c, ours=1e-5 * c.tokens, bf16=3e-5 * c.tokens, peers={"conch": 2e-5 * c.tokens})
        for c in cases
    ]
    rows[1]["engines"] = {"ours": {"error": "RuntimeError: no kernel"}}
    return make_report(rows)


def test_json_and_tables_are_written_and_nothing_else_is_left(report, tmp_path):
    files = write_tables(report, tmp_path / "new", "kernels")
    assert sorted(files) == sorted(str(path) for path in (tmp_path / "new").iterdir())
    assert json.loads((tmp_path / "new" / "kernels.json").read_text()) == report
    assert (tmp_path / "new" / "kernels.md").read_text().startswith("# Kernels")


def test_a_file_that_was_there_stays_whole_when_writing_fails(report, tmp_path, monkeypatch):
    write_tables(report, tmp_path, "kernels")

    def fail(report):
        raise OSError("disk full")

    monkeypatch.setattr(output, "write_markdown", fail)
    with pytest.raises(OSError, match="disk full"):
        write_tables(report | {"rows": []}, tmp_path, "kernels")
    assert json.loads((tmp_path / "kernels.json").read_text()) == report
    assert sorted(path.name for path in tmp_path.iterdir()) == ["kernels.json", "kernels.md"]


def test_the_plot_has_a_panel_a_weight_and_every_series(report, tmp_path):
    files = write_plot(report, tmp_path, "kernels")
    assert files == [str(tmp_path / "kernels.png")]
    png = (tmp_path / "kernels.png").read_bytes()
    assert png.startswith(b"\x89PNG")
    assert len(png) > 20_000
    draw(report, tmp_path / "kernels.svg")
    svg = (tmp_path / "kernels.svg").read_text()
    xml.etree.ElementTree.fromstring(svg)
    # matplotlib draws letters as shapes and leaves each text as a comment
    for text in ("K=64  N=64", "K=4096  N=4096", "jaxwna16", "bf16 product (jnp.dot)", "conch"):
        assert f"<!-- {text} -->" in svg or text in svg


def test_experts_are_drawn_with_what_they_are_compared_with(tmp_path):
    cases = make_moe_cases("64x32x8x2,mixtral-8x7b", [1, 16, 256], group_size=-1)
    rows = [
        make_row(c, ours=1e-5 * c.tokens, bf16=3e-5 * c.tokens, peers={"tokamax": 2e-5})
        for c in cases
    ]
    draw(make_report(rows), tmp_path / "moe.svg")
    svg = (tmp_path / "moe.svg").read_text()
    for text in (
        "64x32 E8 k2",
        "4096x14336 E8 k2",
        "4 bits, channel, asymmetric",
        "XLA: bf16, expert by expert",
        "tokamax",
    ):
        assert f"<!-- {text} -->" in svg or text in svg
    assert "jnp.dot" not in svg


def test_without_times_there_is_nothing_to_draw(tmp_path):
    rows = [make_row(case) for case in make_cases("64x64", [1])]
    assert write_plot(make_report(rows), tmp_path, "kernels") == []
    assert list(tmp_path.iterdir()) == []


def test_without_matplotlib_the_error_says_how_to_have_it(report, tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    with pytest.raises(InputError, match=r"jaxwna16\[plot\]"):
        write_plot(report, tmp_path, "kernels")
    assert list(tmp_path.iterdir()) == []
