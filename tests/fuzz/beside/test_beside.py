"""Sixty checkpoints with broken files beside the weights: a result, or an error of ours.

`make fuzz` does the same with 5,000.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from jaxwna16 import CheckpointError, InputError
from tests.fuzz.beside.bases import make_bases
from tests.fuzz.beside.check import Worker, check_bases, check_mutant, run
from tests.fuzz.beside.mutations import MUTATIONS
from tests.fuzz.beside.worker import _expect
from tests.fuzz.run import find_part, keep_part

SEED = int(os.environ.get("JAXWNA16_FUZZ_SEED", "5"))
EACH = -(-60 // len(MUTATIONS))

pytest.importorskip("tokenizers")
pytest.importorskip("jinja2")
pytestmark = pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(), reason="peak memory is read from /proc"
)


@pytest.fixture(scope="module")
def worker(tmp_path_factory) -> Iterator[Worker]:
    worker = Worker(seconds=0.2, megabytes=256)
    check_bases(tmp_path_factory.mktemp("bases"), worker)
    yield worker
    worker.stop()


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_every_mutant_has_a_result_or_an_error_of_ours(worker, mutation):
    print(f"JAXWNA16_FUZZ_SEED={SEED}")
    tally = run(mutation, EACH, SEED, worker)
    assert tally.distinct > EACH / 2
    assert tally.refused


def test_what_ends_the_worker_is_noticed_and_the_next_mutant_has_a_new_one(worker, tmp_path):
    files = dict(make_bases()["merges"])
    assert not any(check_mutant(files, tmp_path, worker)["outcome"].values())
    worker._process.kill()
    with pytest.raises(AssertionError, match="the worker ended: exit code -9"):
        check_mutant(files, tmp_path, worker)


def _raise(error: Exception) -> None:
    raise error


@pytest.mark.parametrize(
    "error",
    [ValueError("x"), InputError("x", ["x" * 3000] * 100), CheckpointError("x", [])],
)
def test_an_error_that_is_not_ours_or_too_long_ends_a_worker(error):
    if isinstance(error, CheckpointError):
        assert _expect(lambda: _raise(error)) == (None, str(error))
    else:
        with pytest.raises((ValueError, AssertionError)):
            _expect(lambda: _raise(error))


def test_a_part_of_the_report_is_replaced_and_kept():
    report = keep_part("# A\n", "b", "one\ntwo")
    assert report == "# A\n\n<!-- b -->\none\ntwo\n<!-- /b -->\n"
    assert find_part(report, "b") == "one\ntwo" and find_part(report, "c") == ""
    assert keep_part(report, "b", "three") == "# A\n\n<!-- b -->\nthree\n<!-- /b -->\n"
