"""A process that answers calls within limits: replies, errors, limits, ends and new beginnings."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from jaxwna16.generation.limited import child as child_module
from jaxwna16.generation.limited.child import Child, FailedCallError, LimitError

pytestmark = pytest.mark.skipif(os.name != "posix", reason="limits are the system's")
CALLED = "tests.jaxwna16.generation.limited.called"


@pytest.fixture
def child() -> Child:
    return Child(CALLED, 256)


def test_replies_are_what_the_function_returns(child):
    values = ["é\ud800\n\u2028", 10**30, None, {"a": [1.5, float("inf")]}, "x" * 3_000_000]
    for value in values:
        assert child.call("echo", value, seconds=5) == value


def test_what_a_library_prints_is_no_reply(child):
    assert child.call("print_below_python", seconds=5) == "returned"


def test_errors_of_every_class_come_back_by_name(child):
    for name in ("ValueError", "SystemExit", "KeyboardInterrupt", "RecursionError"):
        with pytest.raises(FailedCallError, match=r"^told$") as caught:
            child.call("fail", name, "told", seconds=5)
        assert caught.value.kind == name
    with pytest.raises(FailedCallError, match=r"^KeyError$"):
        child.call("fail_without_text", seconds=5)
    with pytest.raises(FailedCallError) as caught:
        child.call("fail", "ValueError", "x" * 10**6, seconds=5)
    assert len(str(caught.value)) == 2000
    assert child.call("echo", 1, seconds=5) == 1


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("spin", r"more than 0\.3 s"),
        ("fill", "more than 256 MB of memory$"),
        ("abort", "SIGABRT"),
        ("leave", "exit code 3"),
    ],
)
def test_what_meets_a_limit_is_ended_and_the_next_call_begins_anew(child, name, message):
    child.set_up("remember", "kept", seconds=5)
    with pytest.raises(LimitError, match=message):
        child.call(name, seconds=0.3)
    assert child.call("recall", seconds=5) == "kept"


def test_seconds_are_of_each_call_and_not_of_all(child):
    for _ in range(3):
        assert child.call("work", 0.2, seconds=0.3)


def test_one_that_waits_is_ended_by_the_clock(child, monkeypatch):
    monkeypatch.setattr(child_module, "_WAITING_SECONDS", 0.1)
    with pytest.raises(LimitError, match=r"no answer after 0\.4 s by the clock"):
        child.call("wait", seconds=0.3)


def test_what_is_no_json_is_refused_before_anything_is_sent(child):
    with pytest.raises(TypeError):
        child.call("echo", {1j}, seconds=0.3)
    assert child.call("echo", 1, seconds=0.3) == 1


def test_threads_take_turns(child):
    found = {}

    def call(i: int) -> None:
        found[i] = [child.call("echo", [i, n], seconds=5) for n in range(50)]

    threads = [threading.Thread(target=call, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {i: [[i, n] for n in range(50)] for i in range(4)}


def test_the_process_ends_with_what_started_it():
    child = Child(CALLED, 256)
    number = child.call("name_process", seconds=5)
    del child
    gc.collect()
    with pytest.raises(ProcessLookupError):
        os.kill(number, 0)


def test_an_interrupt_is_the_parents_and_a_reply_that_was_not_read_is_nobodys(child, monkeypatch):
    number = child.call("name_process", seconds=5)
    os.kill(number, signal.SIGINT)
    assert child.call("name_process", seconds=5) == number

    def interrupt(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(child_module, "_exchange", interrupt)
        with pytest.raises(KeyboardInterrupt):
            child.call("echo", "old", seconds=5)
    assert child.call("echo", "new", seconds=5) == "new"


_FORK = """
import os
from jaxwna16.generation.limited.child import Child
child = Child("tests.jaxwna16.generation.limited.called", 256)
first = child.call("name_process", seconds=5)
forked = os.fork()
second = child.call("name_process", seconds=5)
assert (second == first) == (forked != 0)
assert forked == 0 or os.waitpid(forked, 0)[1] == 0
assert child.call("name_process", seconds=5) == second
"""


def test_a_forked_process_starts_its_own():
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-c", _FORK], env=environment, check=True)


def test_a_call_costs_little_once_the_process_runs(child):
    child.call("echo", 0, seconds=5)
    start = time.process_time()
    for _ in range(50):
        child.call("echo", 0, seconds=5)
    assert (time.process_time() - start) / 50 < 0.005  # 0.2 ms on a free machine
