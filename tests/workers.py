"""Workers that hold much are replaced, so that memory has a bound however many tests there are.

A pytest plugin of pytest-xdist's controller. What `tests.memory` gives back after a file is not
all that the file took: modules of its imports stay, as does compiled code that something holds.
"""

from __future__ import annotations

import pytest
from xdist.scheduler import LoadFileScheduling

KEPT_MB = 900
"""What a worker may hold between files: a new one has about 700, and one test adds 360 (of the real
models, which come first, 720). It still runs the file, or the two, that it was given meanwhile."""

_leaving: set = set()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--replace-above",
        type=int,
        default=KEPT_MB,
        metavar="MB",
        help=f"replace a worker that holds more between files (default: {KEPT_MB})",
    )


class ReplacingScheduling(LoadFileScheduling):
    """`--dist loadfile`, with workers that begin while others run."""

    def _reschedule(self, node) -> None:
        """As there, but a worker that has not collected its tests yet cannot be given any."""
        if node in self.registered_collections:
            super()._reschedule(node)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log) -> ReplacingScheduling | None:
    return ReplacingScheduling(config, log) if config.getvalue("dist") == "loadfile" else None


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Give a worker no more files once its report says that it holds too much."""
    node = getattr(report, "node", None)
    if node is None or node.shutting_down:
        return
    waiting = getattr(_find_session(node).sched, "workqueue", None)  # only with loadfile
    if waiting and getattr(report, "kept_mb", 0) > node.config.getoption("--replace-above"):
        _leaving.add(node)
        node.shutdown()


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node, error) -> None:
    """Start a new worker for one that has left, and end the process of the old one."""
    if node in _leaving:
        _leaving.remove(node)
        if error is None:  # after a crash pytest-xdist does this itself, by no public name
            _find_session(node)._clone_node(node)
            node.ensure_teardown()


def _find_session(node):
    return node.config.pluginmanager.getplugin("dsession")
