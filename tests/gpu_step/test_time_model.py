"""The predictions of `time_model`, against sums done by hand, and what the report says of them."""

from __future__ import annotations

import dataclasses

import pytest

from tests.gpu_step.readings import BEGIN, END, Kernel, Program, Reading
from tests.gpu_step.report import list_kernels_of, write_report
from tests.gpu_step.time_model import (
    GUESSES,
    Guesses,
    Machine,
    count_must_move,
    find_limit,
    predict_kernel,
    predict_step,
)

_MACHINE = Machine("none", 1e12, 1e14)
_GUESSES = Guesses(0.5, 1e10, 0.5, 2.0, 3.0, 1.0, 5.0, 7)


def make_kernel(layer: int = 0, **changes) -> Kernel:
    known = Kernel("f", "g", (), layer, 1, 1000, 500_000, 500_000, 0.0, True, False, 0)
    return dataclasses.replace(known, **changes)


@pytest.mark.parametrize(
    ("changes", "microseconds"),
    [
        ({}, 1e6 / 0.5e12 * 1e6 + 2 + 1),
        ({"is_recorded": False}, 1e6 / 0.5e12 * 1e6 + 2 + 5),
        # the smallest kernel
        ({"read": 0, "written": 8}, 3 + 1),
        # one program has 10 GB/s
        ({"programs": 1}, 1e6 / 1e10 * 1e6 + 2 + 1),
        # a library's kernel, whose programs nobody knows
        ({"programs": 0}, 1e6 / 0.5e12 * 1e6 + 2 + 1),
        # products that take longer than the bytes
        ({"flops": 1e9}, 1e9 / 0.5e14 * 1e6 + 2 + 1),
        # two launches: their bytes are those of both
        ({"launches": 2}, 1e6 / 0.5e12 * 1e6 + 2 * 2 + 2 * 1),
    ],
)
def test_a_kernel_takes_its_bytes_or_products_and_what_goes_with_a_launch(changes, microseconds):
    found = predict_kernel(make_kernel(**changes), _MACHINE, _GUESSES)
    assert found == pytest.approx(microseconds * 1e-6)


@pytest.fixture
def reading() -> Reading:
    """Of four layers, the first and the last of which have other kernels than those between."""
    kernels = [make_kernel(BEGIN), make_kernel(END, read=0)]
    kernels += [make_kernel(0), make_kernel(0), make_kernel(1, flops=1.0), make_kernel(2)]
    kernels += [make_kernel(3)] * 3
    return Reading(
        program=Program("Llama-3.1-8B", "sm_90a", "decode", 16, 4),
        seconds={"trace": 1.0, "lower": 2.0, "compile": 3.0},
        temporaries=2_000_000,
        command_buffers=1,
        kinds=["delta net", "delta net", "delta net", "attention"],
        whole_layers=40,
        tokens=16,
        layer_bytes=[1e6, 1e6, 1e6, 2e6],
        end_bytes=3e6,
        kernels=kernels,
        sampled=[*kernels, make_kernel(END)],
    )


def test_a_step_counts_typical_layers_as_often_as_the_model_has_them(reading):
    each = [predict_kernel(kernel, _MACHINE, _GUESSES) for kernel in reading.kernels]
    begin, end, _, _, delta, _, attention, *_ = each
    wanted = begin + end + 30 * delta + 10 * 3 * attention + 7e-6
    found = predict_step(reading, reading.kernels, _MACHINE, _GUESSES)
    assert found == pytest.approx(wanted)


def test_the_limit_is_what_must_move_or_the_products(reading):
    assert count_must_move(reading) == 10 * 5e6 + 3e6
    assert find_limit(reading, _MACHINE) == pytest.approx(53e6 / 1e12)
    slow = dataclasses.replace(_MACHINE, flops=1e3)
    assert find_limit(reading, slow) == pytest.approx(30 * 1.0 / 1e3)


def test_each_guess_is_worse_than_the_one_before(reading):
    times = [predict_step(reading, reading.kernels, _MACHINE, g) for g in GUESSES.values()]
    assert list(GUESSES) == ["optimistic", "central", "pessimistic"]
    assert times == sorted(times)


def test_the_report_names_predictions_and_every_fault(reading):
    other = dataclasses.replace(reading.program, size=64)
    text = write_report([(reading.program, reading), (other, "not compiled in 900 s")], "0.0")
    assert "**Times are predictions of a model with guesses,\nnever measurements.**" in text
    assert f"- {other}: not compiled in 900 s" in text
    assert "| Llama-3.1-8B, delta net |  | 1 |" in text
    assert "| Llama-3.1-8B, attention | 9 | 3 |" in text
    # 2 kernels around the layers, 30 + 30 in them
    assert "| Llama-3.1-8B, sm_90a, decode 16 | 62 | 63 | 0 |" in text
    assert all(line.isascii() or "µ" in line or "·" in line for line in text.splitlines())


def test_a_list_for_the_terminal_has_every_layer_once(reading):
    lines = list(list_kernels_of(reading))
    assert "  a layer: delta net: 1 kernels" in lines
    assert "  a layer: attention: 3 kernels" in lines
