"""How much is read ahead is the fastest of some sizes, and nothing where that gains too little."""

from __future__ import annotations

import pytest

from jaxwna16.bench import tune_ahead
from jaxwna16.bench.run import Deadline
from jaxwna16.bench.tune_ahead import SIZES, pick_ahead
from pallas_kernels.tiles.device import Device
from pallas_kernels.tiles.entries import TileTable
from pallas_kernels.tiles.tables import read_table, write_table

GPU = Device("an invented GPU", 132)
MIB = 1 << 20


@pytest.mark.parametrize(
    ("seconds", "best"),
    [
        ({0: 1.0, 2 * MIB: 0.9, 4 * MIB: 0.8, 8 * MIB: 0.85}, 4 * MIB),
        ({0: 1.0, 2 * MIB: 1.1}, 0),
        ({0: 1.0, 2 * MIB: 0.995}, 0),
    ],
)
def test_the_fastest_size_is_chosen_if_it_gains_enough(seconds, best):
    assert pick_ahead(seconds) == best


def tune(path, time_layer, monkeypatch, seconds=60.0) -> int:
    monkeypatch.setattr(tune_ahead, "time_layer", time_layer)
    return tune_ahead.tune_ahead(GPU, path, {"by": "a test"}, Deadline(seconds), lambda text: None)


def test_the_table_keeps_its_tiles_and_gets_the_size(tmp_path, monkeypatch):
    path = tmp_path / "table.json"
    seen = []
    best = tune(path, lambda size: seen.append(size) or 1.0 - size * 1e-9, monkeypatch)
    assert seen == list(SIZES)
    assert best == read_table(path).ahead == SIZES[-1]
    assert tune(path, lambda size: 1.0, monkeypatch) == read_table(path).ahead == 0


def test_without_time_or_with_a_failure_the_table_stays(tmp_path, monkeypatch):
    path = tmp_path / "table.json"
    write_table(path, TileTable(GPU.kind, (), {}, ahead=4 * MIB))
    before = path.read_bytes()

    def fail(size: int) -> float:
        raise RuntimeError("no memory")

    assert tune(path, fail, monkeypatch) == 4 * MIB
    assert tune(path, lambda size: 1.0, monkeypatch, seconds=0.0) == 4 * MIB
    assert path.read_bytes() == before
