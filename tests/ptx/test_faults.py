"""Small kernels that each break one rule, and what is said of them."""

from __future__ import annotations

import numpy as np
import pytest

from tests.ptx import Fault, Refused
from tests.ptx.kernel import Kernel
from tests.ptx.memory import Part
from tests.ptx.programs import run

_IN, _OUT = np.arange(256, dtype=np.uint32), np.zeros(256, np.uint32)
# thread t has its own 4 bytes of each array in d8, d9, and of shared memory in r8
_OWN = """
mad.wide.u32 d8, t, 4, d0; mad.wide.u32 d9, t, 4, d1;
mov.b64 d10, memory; cvt.u32.u64 r7, d10; mad.lo.u32 r8, t, 4, r7; mad.lo.u32 r9, t, 16, r7;
"""
_COPY = "cp.async.ca.shared.global [r8], [d8], 4, 4; cp.async.commit_group; "


def _run(body: str, threads: int = 128, shared: int = 4096) -> np.ndarray:
    return run(_OWN + body, [_IN], [_OUT], threads=threads, shared=shared)[0]


def _expect(body: str, what: str, **options) -> None:
    with pytest.raises(Fault, match=what):
        _run(body, **options)


@pytest.mark.parametrize(
    ("body", "what"),
    [
        ("ld.global.b32 r1, [d8+2];", "global address is not aligned to 4"),
        ("ld.global.v4.b32 {r1, r2, r3, r4}, [d8];", "global address is not aligned to 16"),
        ("ld.global.b32 r1, [d8+1024];", "global memory is read out of bounds"),
        ("ld.global.b32 r1, [d8+-4];", "global memory is read out of bounds"),
        ("ld.global.b32 r1, [d10];", "global address is out of bounds"),
        ("ld.global.b32 r1, [d9];", "before it is written"),
        ("st.global.b32 [d8], t;", "global memory is written out of bounds"),
        ("st.global.b32 [d1], t;", "two values are stored in one place"),
        ("st.global.b32 [d9], t; st.global.b32 [d9], r8;", "two values are stored in one place"),
        ("ld.shared.b32 r1, [r8+2];", "shared address is not aligned"),
        ("st.shared.b32 [r8+4096], t;", "shared address is out of bounds"),
        ("st.shared.b32 [t], t;", "shared address"),
        ("ld.shared.b32 r1, [r8];", "shared memory is read and was never written"),
        ("st.shared.b32 [r7], t;", "two threads write different values"),
        ("add.s32 r1, r2, 1;", "register r2 is read and was never written"),
        (
            "mov.b16 h1, 7; mov.b32 r1, {h1, h2}; add.s32 r2, r1, 1;",
            "a part of it was never written",
        ),
        ("mov.b16 h1, 7; mov.b32 r1, {h1, h2}; mov.b32 {_, h3}, r1;", "a part of it was never"),
        ("div.s32 r1, t, t;", "division by zero"),
        (
            "setp.lt.u32 p1, t, 7; @p1 mov.b32 r1, 0; mov.b32 r2, r1;",
            "register r1 is read by threads that never wrote it",
        ),
        ("trap;", "a trap"),
    ],
)
def test_memory_and_registers(body, what):
    _expect(body, what)


def test_what_keeps_the_rules_runs():
    body = _COPY + (
        "cp.async.wait_group 0; bar.sync 0; xor.b32 r1, r8, 128; ld.shared.b32 r2, [r1];"
        "setp.lt.u32 p1, t, 7; @p1 mov.b32 r3, 0; @!p1 mov.b32 r3, 1; add.s32 r2, r2, r3;"
        "bar.sync 0; st.shared.b32 [r8], r2; st.global.b32 [d9], r2;"
    )
    # shared memory begins at 1024, so the exchange is between threads t and t ^ 32
    t = np.arange(128)
    np.testing.assert_array_equal(_run(body)[:128], (t ^ 32) + (t >= 7))


def test_a_part_without_value_may_be_dropped():
    body = (
        "mov.b16 h1, 7; mov.b32 r1, {h1, h2}; mov.b32 {h3, _}, r1; mov.b32 r2, {h3, h3};"
        "st.global.b32 [d9], r2;"
    )
    assert set(_run(body)[:128]) == {7 << 16 | 7}


@pytest.mark.parametrize(
    ("body", "what"),
    [
        (
            "st.shared.b32 [r8], t; xor.b32 r1, r8, 128; ld.shared.b32 r2, [r1];",
            "read that another warp wrote since the last barrier",
        ),
        (
            "st.shared.b32 [r8], 5; bar.sync 0; xor.b32 r1, r8, 128; ld.shared.b32 r2, [r1];"
            "st.shared.b32 [r8], t;",
            "written that another warp read since the last barrier",
        ),
        (
            "st.shared.b32 [r7], 5; bar.sync 0; ld.shared.b32 r2, [r7]; setp.eq.u32 p1, t, 0;"
            "@p1 st.shared.b32 [r7], 6;",
            "written that another warp read since the last barrier",
        ),
        (
            "st.shared.b32 [r8], t; xor.b32 r1, r8, 128; st.shared.b32 [r1], 7;",
            "two warps write to one place",
        ),
    ],
)
def test_races_between_warps(body, what):
    _expect(body, what)


def test_one_value_may_be_written_by_several_warps():
    _run("st.shared.b32 [r7], 5; st.global.b32 [d1], 5;")


@pytest.mark.parametrize(
    ("body", "what"),
    [
        (_COPY + "ld.shared.b32 r1, [r8];", "read before the wait for a copy"),
        (_COPY + "st.shared.b32 [r8], t;", "written before the wait for a copy"),
        (_COPY + "bar.sync 0;", "a copy was never waited for"),
        (_COPY + "cp.async.wait_group 1; ld.shared.b32 r1, [r8];", "before the wait for a copy"),
        (
            _COPY.replace("cp.async.commit_group;", "") + "cp.async.wait_group 0;",
            "a copy was never waited for",
        ),
        (
            _COPY + "cp.async.wait_group 0; xor.b32 r1, r8, 128; ld.shared.b32 r2, [r1];",
            "read that another warp wrote since the last barrier",
        ),
        ("cp.async.ca.shared.global [r8], [d9], 4, 4;", "before it is written"),
        ("cp.async.cg.shared.global [r9], [d8], 16, 16;", "not aligned to 16"),
    ],
)
def test_asynchronous_copies(body, what):
    _expect(body, what)


def test_copies_of_nothing_write_zeros_and_read_nothing():
    body = (
        "mov.b32 r1, 0; cp.async.ca.shared.global [r8], [d9], 4, r1; cp.async.wait_all;"
        "ld.shared.b32 r2, [r8]; st.global.b32 [d9], r2;"
    )
    assert not _run(body).any()


@pytest.mark.parametrize(
    ("body", "what"),
    [
        ("setp.lt.u32 p1, t, 7; @p1 shfl.sync.idx.b32 r1, t, 0, 31, -1;", "a part of it"),
        ("shfl.sync.idx.b32 r1, t, 0, 31, 15;", "without some threads"),
        ("again: bra again;", "no end"),
    ],
)
def test_threads(body, what, monkeypatch):
    monkeypatch.setattr("tests.ptx.schedule._MOST_STEPS", 1000)
    _expect(body, what)


_ONE = "setp.eq.u32 p1, t, 0; "


def test_a_wait_that_nobody_ends_is_found():
    body = _ONE + (
        "@p1 mbarrier.init.shared::cta.b64 [r7], 1; bar.sync 0; mov.b32 r1, 0;"
        "again: mbarrier.try_wait.parity.shared::cta.b64 p2, [r7], r1; @!p2 bra again;"
    )
    _expect(body, "threads wait for each other for ever")
    _run(body.replace("mov.b32 r1, 0", "mov.b32 r1, 1"))  # the phase before the first is over


@pytest.mark.parametrize(
    ("body", "what"),
    [
        ("vote.sync.any.pred p1, p2, -1;", "vote.sync.any.pred"),
        ("add.u32.sat r1, t, 1;", "add.u32.sat"),
        ("mov.b64 d9, t;", "read as"),
        ("mov.b32 r1, %clock;", "%clock"),
        ("bar.sync 1;", "bar.sync 1"),
        (".local .align 4 .b8 spill[4];", "local"),
        ("setp.lt.u32 p1, t, 7; @p1 bra away;", "no label"),
        ("ld.global.b32 r1, [d8*4];", "address"),
    ],
)
def test_what_is_not_known_is_refused_by_name(body, what):
    with pytest.raises(Refused, match=what):
        _run(body)


def test_threads_part_and_meet_again():
    """A loop that each thread leaves at its own time."""
    body = """
    mov.b32 r1, 0; mov.b32 r2, t;
    more: setp.eq.b32 p1, r2, 0; @p1 bra done;
    add.s32 r1, r1, r2; sub.s32 r2, r2, 1; bra more;
    done: bar.sync 0; st.global.b32 [d9], r1;
    """
    t = np.arange(128)
    np.testing.assert_array_equal(_run(body)[:128], t * (t + 1) // 2)


def test_names_in_braces_are_of_that_place_alone():
    body = """
    mov.b32 r1, 5; { .reg .b32 r1; mov.b32 r1, 6; skip: } { bra skip; trap; skip: }
    st.global.b32 [d9], r1;
    """
    assert (_run(body)[:128] == 5).all()


# each block of 32 threads has 32 numbers of an array of 128; d11 is where its own stand
_MINE = """
mov.u32 r1, %ctaid.x; mad.lo.u32 r2, r1, 32, t; mad.wide.u32 d11, r2, 4, d0;
ld.global.b32 r3, [d11]; add.s32 r3, r3, 1;
"""


def _update(body: str) -> np.ndarray:
    """Four blocks of a kernel whose output is its input, updated in place."""
    text = (
        ".visible .entry test(.param .u64 .ptr .align 16 a0, .param .u64 .ptr .align 16 a1)\n"
        ".reqntid 32, 1, 1\n{ .reg .pred p<10>; .reg .b32 r<60>; .reg .b64 d<30>; .reg .b32 t;"
        f"mov.u32 t, %tid.x; ld.param.b64 d0, [a0]; ld.param.b64 d1, [a1]; {_MINE} {body} ret; }}"
    )
    array = np.arange(128, dtype=np.int32)
    [(found, written)] = Kernel(text, 32, 0).run(
        [Part(array)], [Part(np.zeros_like(array))], range(4), {0: 0}
    )
    np.testing.assert_array_equal(array, np.arange(128))
    assert (written.reshape(-1, 4).all(1) == (found != array)).all()
    return found


def test_an_output_may_be_an_input_updated_in_place():
    found = _update("mad.wide.u32 d12, r2, 4, d1; st.global.b32 [d12], r3;")
    np.testing.assert_array_equal(found, np.arange(1, 129))
    # what nobody writes stays
    some = _update("setp.lt.u32 p1, r2, 50; @p1 st.global.b32 [d11], r3;")
    np.testing.assert_array_equal(some, np.arange(128) + (np.arange(128) < 50))


@pytest.mark.parametrize(
    "body",
    [
        "st.global.b32 [d11], r3; ld.global.b32 r4, [d0];",
        "ld.global.b32 r4, [d0+384]; st.global.b32 [d11], r3;",
        "st.global.b32 [d0], 7;",
    ],
)
def test_blocks_keep_off_what_others_update(body):
    """Written before it is read, after, or by both with one value."""
    with pytest.raises(Fault, match="another one touches"):
        _update(body)
