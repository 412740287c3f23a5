"""Every test runs under JAX's strict rules: nothing is promoted, neither in dtype nor in rank.

Cases marked `thorough` run with `--thorough` only (`make thorough`): the rest of large grids.
`--at-most 1` runs that many cases of each test, as the gate does on a second Python. With
`--without-torch`, tests that need PyTorch or what comes with it are left out, where those are not
installed; otherwise they fail.
"""

import os
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
# what several tests compile is compiled once, and not kept in the user's own folder
os.environ["JAX_COMPILATION_CACHE_DIR"] = str(Path(__file__).parents[1] / ".cache" / "programs")
# Small operations too: they are most of what is compiled, and files compile the same ones
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"

# Most of the time goes into machine code that runs once. So it is left plain, which is a quarter
# less work (`make thorough` lets it be optimized), and it is not split for several threads: there
# is a worker for each core. XLA's older emitters, which jax 0.12 has no longer, need a third of the
# newer ones' time.
os.environ.setdefault(
    "XLA_FLAGS",
    "--xla_backend_optimization_level=0 --xla_cpu_parallel_codegen_split_count=1"
    + " --xla_cpu_use_fusion_emitters=false" * version("jaxlib").startswith("0.10."),
)

import jax

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

pytest_plugins = ["tests.memory", "tests.workers"]

ORACLES = ("accelerate", "compressed_tensors", "torch", "transformers")
"""What the extra `oracle` brings."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--thorough", action="store_true", help="every case of every grid, not a part of each"
    )
    parser.addoption(
        "--at-most",
        type=int,
        metavar="N",
        help="N cases of each test function, the first and the last among them",
    )
    parser.addoption(
        "--without-torch",
        action="store_true",
        help=f"leave out tests that need {', '.join(ORACLES)}, where these are not installed",
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("--thorough"):
        left_out = [item for item in items if item.get_closest_marker("thorough")]
        items[:] = [item for item in items if item not in left_out]
        config.hook.pytest_deselected(items=left_out)
    if (most := config.getoption("--at-most")) is not None:
        chosen = choose_cases(items, most)
        config.hook.pytest_deselected(items=[item for item in items if item not in chosen])
        items[:] = [item for item in items if item in chosen]
    # Real models need most memory, which a worker has most of at its start. Then come models, whose
    # files take longest: begun last, they would keep one worker busy alone.
    items.sort(
        key=lambda item: (item.path.parent != config.rootpath / "tests", -len(item.path.parts))
    )


def choose_cases(items: list[pytest.Item], most: int) -> set[pytest.Item]:
    """So many of each function's, evenly spread; their order in `items` is that of the grids."""
    cases: dict[str, list[pytest.Item]] = {}
    for item in items:
        cases.setdefault(item.nodeid.partition("[")[0], []).append(item)
    return {
        found[round(i * (len(found) - 1) / max(1, count - 1))]
        for found in cases.values()
        for count in [min(most, len(found))]
        for i in range(count)
    }


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(
    collector: pytest.Collector,
) -> Iterator[None]:
    """Files that cannot be imported without an oracle are skipped."""
    report = yield
    error = report.call.excinfo and report.call.excinfo.value
    return _skip(report, error, collector)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo) -> Iterator[None]:
    """So are tests that import one themselves."""
    report = yield
    return _skip(report, call.excinfo and call.excinfo.value, item)


def _skip(report, error: BaseException | None, node: pytest.Collector | pytest.Item):
    """The report of a failure turned into that of a skip where an oracle is missing."""
    missing = next((e.name for e in (error, error and error.__cause__) if _is_oracle(e)), None)
    if report.failed and missing and node.config.getoption("--without-torch"):
        report.outcome = "skipped"
        report.longrepr = (str(node.path), 0, f"Skipped: needs {missing}")
    return report


def _is_oracle(error: BaseException | None) -> bool:
    return isinstance(error, ModuleNotFoundError) and error.name in ORACLES
