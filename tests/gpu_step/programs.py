"""Compiles one of the product's own programs for a GPU that is not there, and reads it."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from jaxwna16.generation import decoding
from jaxwna16.models.causal_lm import CausalLM
from tests import gpu_aot
from tests.gpu_step.configurations import Configuration, make_abstract
from tests.gpu_step.hlo import Module, count_command_buffers, read_module, read_thunks, sum_bytes
from tests.gpu_step.kernels import Load, list_kernels
from tests.gpu_step.readings import (
    DECODE_POSITION,
    DECODE_SLOTS,
    PREFILL_SLOTS,
    Program,
    Reading,
)

WIDTH = 128
"""Room for that many new tokens."""


def compile_program(program: Program) -> Reading:
    """Trace, lower and compile it, which takes seconds to minutes, and read what XLA made."""
    found = make_abstract(program.model, program.layers, **program.changes)
    load = _describe_load(program, found)
    arch = program.arch
    seconds, begin = {}, time.perf_counter()

    def take(name: str) -> None:
        nonlocal begin
        now = time.perf_counter()
        seconds[name], begin = round(now - begin, 2), now

    with gpu_aot.aim(arch), tempfile.TemporaryDirectory(prefix="gpu_step_") as folder:
        fn, arguments = _list_arguments(program, found.model, load)
        traced = fn.trace(*gpu_aot.place(arguments, arch))
        take("trace")
        lowered = traced.lower(lowering_platforms=("cuda",))
        take("lower")
        options = {"xla_dump_to": folder, "xla_dump_emitter_re": "thunk.*"}
        compiled = lowered.compile(compiler_options=options)
        take("compile")
        sequence = _read_dump(folder, "thunk_sequence_after_thunk_passes")
        thunks = read_thunks(sequence, _read_dump(folder, "thunk_metadata"))
    module = read_module(compiled.as_text())
    layer_bytes, end_bytes = count_must_move(module, load, found)
    draws = program.kind == "decode"
    return Reading(
        program=program,
        seconds=seconds,
        temporaries=compiled.memory_analysis().temp_size_in_bytes,
        command_buffers=count_command_buffers(sequence),
        kinds=list(found.kinds),
        whole_layers=found.whole_layers,
        tokens=load.tokens,
        layer_bytes=layer_bytes,
        end_bytes=end_bytes,
        kernels=list_kernels(module, thunks, load),
        sampled=list_kernels(module, thunks, load, greedy=False) if draws else [],
    )


def _describe_load(program: Program, found: Configuration) -> Load:
    if program.kind == "decode":
        sizes = program.size, 1, DECODE_SLOTS, DECODE_POSITION
    else:
        sizes = 1, program.size, PREFILL_SLOTS, program.size
    return Load(*sizes, top_k=found.top_k, experts=found.experts)


def _list_arguments(program: Program, model: CausalLM, load: Load) -> tuple[Any, tuple]:
    """The jitted function and what it is called with, as shapes."""
    rows, steps = load.rows, load.steps
    number = jax.ShapeDtypeStruct((), jnp.int32)
    each = jax.ShapeDtypeStruct((rows,), jnp.int32)
    facts = {"slots": load.slots, "width": WIDTH, "likeliest": None}
    progress = jax.eval_shape(lambda n: decoding.make_progress(model, n, **facts), each)
    options = jax.eval_shape(lambda: decoding.make_options(0.0, 0, 1.0, 0, ()))
    if program.kind == "prefill":
        piece = jax.ShapeDtypeStruct((rows, steps), jnp.int32)
        return decoding.prefill, (model, piece, each, each, progress, options)
    return decoding.decode, (model, progress, options, number)


def _read_dump(folder: str, kind: str) -> str:
    [path] = Path(folder).glob(f"*.{kind}.txt")
    return path.read_text()


def count_must_move(module: Module, load: Load, found: Configuration) -> tuple[list[float], float]:
    """Bytes that each layer and the rest must read and write, if nothing is moved twice.

    Weights once, of experts those that a token chose; of keys and values the slots that are seen
    (read) and those that are new (written); a delta net's state in and out; the stream in and out,
    twice a layer.
    """
    held = [i for i in module.computations[module.entry] if i.op == "parameter"]
    names = module.parameters
    stream = 4 * 2 * load.tokens * found.model.config.hidden_size
    layers, end = [float(stream)] * len(found.kinds), 0.0
    for parameter in held:
        name, size = names[int(parameter.argument)], sum_bytes(parameter.arrays)
        if "cache[" in name:
            part = (load.seen + load.steps) / load.slots if name.endswith((".k", ".v")) else 2
        elif ".experts." in name:
            part = load.touched
        elif "embed_tokens" in name and not found.model.config.tie_word_embeddings:
            part = load.tokens / parameter.arrays[0].dims[0]
        else:
            part = 1.0
        where = next((int(n) for n in _list_numbers(name)), None)
        if where is None:
            end += part * size
        else:
            layers[where] += part * size
    return layers, end


def _list_numbers(name: str) -> list[str]:
    return [text.split("]")[0] for text in name.split("[")[1:]]
