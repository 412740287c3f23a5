"""Programs: shared by folders of one architecture, compiled at the same time, kept in a folder."""

from __future__ import annotations

import os
import signal
import threading
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx
from jax.experimental.compilation_cache import compilation_cache

import jaxwna16
from jaxwna16 import programs
from jaxwna16.checkpoints.quantize import quantize_checkpoint
from jaxwna16.errors import InputError
from jaxwna16.generation.tokens import generate_tokens
from jaxwna16.programs import Compilation, keep_programs, trace_counts
from tests.jaxwna16.cli.checkpoints import edit_tensors, write_float_checkpoint

PROMPTS = [[5, 6, 7], [8, 9], [10]]
TEXT = np.arange(40) * 7 % 256


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> list[Path]:
    """Two packed checkpoints of one architecture: the second's head has its rows reversed."""
    root = tmp_path_factory.mktemp("programs")

    def reverse(tensors: dict) -> None:
        tensors["lm_head.weight"] = np.ascontiguousarray(tensors["lm_head.weight"][::-1])

    for name in ("first", "second"):
        write_float_checkpoint(root / f"{name}-floats")
        if name == "second":
            edit_tensors(root / f"{name}-floats", reverse)
        quantize_checkpoint(
            root / f"{name}-floats", root / name, bits=4, group_size=32, symmetric=False
        )
    return [root / "first", root / "second"]


@pytest.fixture(scope="module")
def models(folders):
    return [jaxwna16.load_model(folder, dtype="float32") for folder in folders]


def test_a_second_folder_of_one_architecture_traces_nothing_anew(models, folders):
    first, second = models
    second.warnings = ("of the second alone",)
    trace_counts.clear()
    begun = [
        generate_tokens(first, PROMPTS, max_new_tokens=4).tokens,
        jaxwna16.measure_perplexity(first, TEXT, window=16).perplexity,
    ]
    before = dict(trace_counts)
    assert before == {"prefill": 1, "decode": 1, "perplexity": 1}
    found = [
        generate_tokens(second, PROMPTS, max_new_tokens=4).tokens,
        jaxwna16.measure_perplexity(second, TEXT, window=16).perplexity,
    ]
    assert dict(trace_counts) == before
    # its own weights: a token of the one head is the same row of the other, counted from the end
    assert [row[0] for row in found[0]] == [256 - row[0] for row in begun[0]]
    assert found[1] != begun[1]
    assert [model.folder for model in models] == list(map(str, folders))


def test_what_is_made_of_a_model_has_no_folder_rather_than_another_ones(models, folders):
    touch = nnx.jit(lambda model: model.lm_head.weight.set_value(model.lm_head.weight[...]))
    for model, folder in zip(models, folders, strict=True):
        touch(model)
        assert model.folder == str(folder)
    copy = nnx.clone(models[0])
    assert (copy.folder, copy.warnings) == (None, ())
    with pytest.raises(InputError, match=r"set model\.folder"):
        jaxwna16.generate(copy, "Hi")


@pytest.mark.parametrize("committed", [False, True])
def test_what_was_compiled_ahead_is_what_is_called(models, caplog, committed):
    """Compiling in a thread is not logged here: what JAX's context says holds for one thread."""
    model = jax.device_put(models[0], jax.devices()[0]) if committed else models[0]
    pieces = []
    with jax.log_compiles():
        result = generate_tokens(model, PROMPTS, max_new_tokens=4, stream=pieces.append)
    assert [[t for piece in pieces for t in piece[row]] for row in range(3)] == result.tokens
    for name in ("prefill", "decode"):
        assert f"Finished XLA compilation of jit({name})" not in caplog.text


def test_the_first_tokens_come_before_the_loop_is_waited_for(models, monkeypatch):
    events = []
    wait = Compilation.wait

    def watch(compilation, *names):
        events.append(names)
        wait(compilation, *names)

    monkeypatch.setattr(Compilation, "wait", watch)
    for new in (4, 1):
        generate_tokens(
            models[0], PROMPTS, max_new_tokens=new, stream=lambda new: events.append(len(new[0]))
        )
    assert events[:3] == [("prefill",), 1, ("decode",)]
    assert events[-3:] == [("prefill",), 1, ()]  # one token needs no loop


class Slow:
    """A lowered program whose compiling is what a test makes of it."""

    def __init__(self, compile):
        self.compile = compile


def compile_all(programs: dict) -> Compilation:
    compilation = Compilation()
    for name, program in programs.items():
        compilation.start(name, program)
    return compilation


def test_programs_are_compiled_at_the_same_time_where_there_are_cores(monkeypatch):
    monkeypatch.setattr(programs, "_count_cores", lambda: 4)
    barrier = threading.Barrier(2, timeout=60)  # breaks unless both are there at once
    compile_all({"a": Slow(barrier.wait), "b": Slow(barrier.wait)}).wait()
    monkeypatch.setattr(programs, "_count_cores", lambda: 2)
    order = []
    compile_all({name: Slow(lambda name=name: order.append(name)) for name in "abc"}).wait()
    assert order == ["a", "b", "c"]


def test_an_error_of_the_compiler_comes_as_it_is():
    error = RuntimeError("RESOURCE_EXHAUSTED")

    def fail():
        raise error

    compilation = compile_all({"good": Slow(int), "bad": Slow(fail)})
    compilation.wait("good", "not among them")
    with pytest.raises(RuntimeError) as caught:
        compilation.wait("bad")
    assert caught.value is error


@pytest.fixture
def _own_ctrl_c():
    """Python's own handler of SIGINT, which a test worker does not have."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("_own_ctrl_c")
def test_waiting_can_be_interrupted():
    go_on = threading.Event()
    compilation = compile_all({"long": Slow(lambda: go_on.wait(60))})
    threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT)).start()
    with pytest.raises(KeyboardInterrupt):
        compilation.wait()
    go_on.set()
    compilation.wait()


@pytest.fixture
def _own_cache():
    """JAX's settings of its cache, put back afterwards."""
    names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    before = {name: getattr(jax.config, name) for name in names}
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    yield
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


@pytest.mark.usefixtures("_own_cache")
def test_programs_are_kept_in_the_folder_named_last(tmp_path):
    jax.jit(lambda x: x - 3)(1.0)  # JAX has opened another folder by now
    for number, name in enumerate(("a", "b")):
        assert jaxwna16.keep_programs(tmp_path / name) == tmp_path / name
        jax.jit(lambda x, number=number: x * 3 + number)(1.0)
        assert keep_programs() == tmp_path / name
    kept = [{p.name for p in (tmp_path / name).iterdir()} for name in ("a", "b")]
    assert all(any(file.startswith("jit__lambda") for file in files) for files in kept)
    assert not kept[0] & kept[1]
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="file: cannot be made"):
        keep_programs(tmp_path / "file")
