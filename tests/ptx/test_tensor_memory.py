"""Tensor memory, products that it holds the sums of, and what puts them in order.

Where an element stands is written out here lane by lane, as the PTX ISA's figures have it.
"""

from __future__ import annotations

import numpy as np
import pytest

from tests.ptx import EarlyRead, Fault, Refused
from tests.ptx.matrices import FILL, draw, fill, load, name, place_both, store, swizzle
from tests.ptx.opcodes.tcgen05 import Shape
from tests.ptx.programs import run

_TCGEN05 = """
add.s32 r40, r50, 2048; add.s32 r41, r50, 2056; setp.lt.u32 p1, t, 32; setp.eq.u32 p2, t, 0;
mov.pred p3, 1; mov.pred p4, 0; mov.b32 r43, 0;
@p1 tcgen05.alloc.cta_group::1.sync.aligned.shared::cta.b32 [r40], 64;
@p1 tcgen05.relinquish_alloc_permit.cta_group::1.sync.aligned;
@p2 mbarrier.init.shared::cta.b64 [r41], 1; bar.sync 0;
ld.shared.b32 r42, [r40]; shr.u32 r44, t, 5; shl.b32 r44, r44, 21; add.s32 r44, r44, r42;
tcgen05.st.sync.aligned.32x32b.x8.b32 [r44+32], SOURCE;
tcgen05.wait::st.sync.aligned; bar.sync 0;
@p2 tcgen05.mma.cta_group::1.kind::f16 [r42], [r42+32], d11, SHAPE, p4;
@p2 tcgen05.mma.cta_group::1.kind::f16 [r42], [r42+32], d11, SHAPE, p3;
@p2 tcgen05.commit.cta_group::1.mbarrier::arrive::one.shared::cluster.b64 [r41]; bar.sync 0;
again: mbarrier.try_wait.parity.shared::cta.b64 p5, [r41], r43; @!p5 bra again;
bar.sync 0; @p2 mbarrier.inval.shared::cta.b64 [r41];
tcgen05.ld.sync.aligned.32x32b.x16.b32 TARGET, [r44];
tcgen05.wait::ld.sync.aligned; bar.sync 0;
@p1 tcgen05.dealloc.cta_group::1.sync.aligned.b32 r42, 64;
"""
_COMMIT = "@p2 tcgen05.commit.cta_group::1.mbarrier::arrive::one.shared::cluster.b64 [r41];"
_SHAPE = 1 << 4 | 0b001_001 << 7 | 2 << 17 | 8 << 24

_FACTORS = f"[r42+32], d11, {_SHAPE}"
_CLEAR = "".join(
    f"tcgen05.st.sync.aligned.32x32b.x8.b32 [r44+{column}], {name(0, 8)}; " for column in (0, 8)
)


def _run_tcgen05(change=lambda text: text) -> np.ndarray:
    """A [128, 16] in tensor memory times B [16, 16] in shared memory, twice."""
    a, b = draw((128, 16), 1), draw((16, 16), 2)
    content, descriptor = swizzle(b, 6, 61)
    text = _TCGEN05.replace("SOURCE", name(0, 8)).replace("TARGET", name(8, 16))
    text = text.replace("SHAPE", str(_SHAPE)).replace("\n", " ")
    body = load(8, 0, 0, 128) + FILL + f"mov.b64 d11, {descriptor};" + text + store(16, 8, 2, 128)
    inputs = [np.ascontiguousarray(a.view(np.uint32).T), content]
    [out] = run(change(body), inputs, [np.zeros((16, 128), np.float32)], shared=4096)
    return out.T - 2 * (a.astype(np.float64) @ b.astype(np.float64).T)


def test_tcgen05_multiplies_tensor_memory_by_shared_memory():
    assert not _run_tcgen05().any()


@pytest.mark.parametrize(
    ("old", "new", "what"),
    [
        ("tcgen05.wait::st.sync.aligned; ", "", "read before the wait for a store"),
        ("wait::st.sync.aligned; bar.sync 0; ", "wait::st.sync.aligned; ", "another warp wrote"),
        ("tcgen05.wait::ld.sync.aligned; ", "", "register r8 is read before the wait"),
        ("again: ", "bra there; again: ", "before its product is done"),
        (_COMMIT, "", "wait for each other for ever"),
        ("@p2 mbarrier.init", "@p1 mbarrier.init", "32 threads"),
        ("[r44+32], ", "[r44], ", "never written"),
        (f"[r42], {_FACTORS}, p4", f"[r42+32], {_FACTORS}, p4", "reads"),
        (f"[r42], {_FACTORS}, p4", f"[r42+8], {_FACTORS}, p4", "never"),
        ("p4; ", "p3; ", "never written"),
        ("[r44]; ", "[r44+60]; ", "out of bounds|not allocated"),
        ("[r44]; ", "[r42]; ", "reaches for lanes"),
        ("fence.proxy.async.shared::cta;", "", "no fence made visible"),
        ("@p1 tcgen05.dealloc.cta_group::1.sync.aligned.b32 r42, 64;", "", "never freed"),
        ("r42, 64;", "r42, 32;", "never freed"),
        ("[r40], 64", "[r40], 48", "48 columns"),
        ("@p1 tcgen05.dealloc", "tcgen05.dealloc", "several warps"),
        ("bar.sync 0; ld.shared.b32 r42", "ld.shared.b32 r42", "another warp wrote"),
        ("again: ", "st.shared.b32 [r51], 0; again: ", "while tensor cores read it"),
        (
            "again: ",
            "tcgen05.st.sync.aligned.32x32b.x1.b32 [r44+32], {r0}; again: ",
            "that uses it",
        ),
        ("@p2 mbarrier.inval", "bar.sync 0; @p2 mbarrier.inval", None),
        ("bar.sync 0; @p2 mbarrier.inval", "@p2 mbarrier.inval", "another warp read"),
    ],
)
def test_tcgen05_is_held_to_its_rules(old, new, what):
    def change(text: str) -> str:
        assert old in text
        text = text.replace(old, new, 1)
        return text.replace("bar.sync 0; @p2 mbarrier", "there: bar.sync 0; @p2 mbarrier")

    if what is None:
        assert not _run_tcgen05(change).any()
    else:
        with pytest.raises(Fault, match=what):
            _run_tcgen05(change)


_WAIT = "again: mbarrier.try_wait.parity.shared::cta.b64 p5, [r41], r43; @!p5 bra again; "
_WAIT_IN_ONE_WARP = f"setp.ge.u32 p6, t, 32; @p6 bra over; {_WAIT} over: "
_LOAD = (
    f"tcgen05.ld.sync.aligned.32x32b.x16.b32 {name(8, 16)}, [r44]; tcgen05.wait::ld.sync.aligned; "
)
_ZEROS = "mov.b32 r30, 0; tcgen05.st.sync.aligned.32x32b.x16.b32 [r44], {" + "r30, " * 15 + "r30}; "
_CLEARED = f"{_ZEROS} tcgen05.wait::st.sync.aligned; "
_OTHER_FACTOR = "st.shared.b32 [r51], 0;"
_AGAIN = (
    f"@p2 tcgen05.mma.cta_group::1.kind::f16 [r42], {_FACTORS}, p3; " * 2
    + f"{_COMMIT} mov.b32 r43, 1; {_WAIT.replace('again', 'once')}"
)


@pytest.mark.parametrize(
    ("middle", "what"),
    [
        (f"{_WAIT} {_LOAD}", None),
        (f"bar.sync 0; {_LOAD}", "before its product is done"),
        (f"{_WAIT_IN_ONE_WARP} bar.sync 0; {_LOAD}", None),
        (f"{_WAIT_IN_ONE_WARP} {_LOAD}", "before its product is done"),
        (f"{_WAIT} {_CLEARED} bar.sync 0; {_AGAIN} {_LOAD}", None),
        (f"{_WAIT} {_CLEARED} {_AGAIN} {_LOAD}", "another warp wrote since the last barrier"),
        (f"bar.sync 0; {_CLEARED} {_WAIT} {_LOAD}", "before the product that uses it is done"),
        (f"{_WAIT} {_OTHER_FACTOR} {_LOAD}", None),
        (f"{_WAIT_IN_ONE_WARP} {_OTHER_FACTOR} {_LOAD}", "written while tensor cores read it"),
        (f"{_WAIT_IN_ONE_WARP} bar.sync 0; {_OTHER_FACTOR} {_LOAD}", None),
        (
            f"{_WAIT} {_OTHER_FACTOR} fence.proxy.async.shared::cta; {_AGAIN} {_LOAD}",
            "tensor cores read what was written since the last barrier",
        ),
    ],
)
def test_a_product_is_before_all_that_follows_the_wait_for_it(middle, what):
    """Its mbarrier takes the place of a barrier, for its sums and factors and for them alone."""

    def change(text: str) -> str:
        before, after = text.split(_COMMIT)
        _, after = after.split("tcgen05.wait::ld.sync.aligned;")
        return f"{before} {_COMMIT} {middle} {after}"

    if what is None:
        assert not _run_tcgen05(change).any()
    else:
        with pytest.raises(Fault, match=what):
            _run_tcgen05(change)


@pytest.mark.parametrize(("mode", "row_bytes"), [(2, 128), (4, 64), (6, 32)])
@pytest.mark.parametrize("rows", [64, 128])
def test_tcgen05_multiplies_transposed_factors_in_shared_memory(mode, row_bytes, rows):
    a, b = draw((rows, 16), 1), draw((16, 16), 2)
    content, *descriptors = place_both(a, b, row_bytes, mode << 61)
    shape = 1 << 4 | 0b001_001 << 7 | 0b11 << 15 | 2 << 17 | rows // 16 << 24
    text = _TCGEN05.replace("2048", "12288").replace("2056", "12296").replace("[r42+32]", "d12")
    text = text.replace("SOURCE", name(0, 8)).replace("TARGET", name(8, 16))
    text = text.replace("SHAPE", str(shape)).replace("\n", " ")
    body = (
        fill(content)
        + "".join(f"mov.b32 r{i}, 0;" for i in range(8))
        + f"mov.b64 d12, {descriptors[0]}; mov.b64 d11, {descriptors[1]};"
        # lanes that no row of 64 is in hold nothing: zeros, as the others
        + text.replace("tcgen05.wait::st", _CLEAR + "tcgen05.wait::st", 1)
        + store(16, 8, 1, 128)
    )
    [out] = run(body, [content], [np.zeros((16, 128), np.float32)], shared=16384)
    right = 2 * (a.astype(np.float64) @ b.astype(np.float64).T)
    lanes = Shape.read(shape).find_lanes(0)[:, 0]
    np.testing.assert_array_equal(out.T[lanes], right)


def test_a_load_is_not_read_before_its_wait():
    with pytest.raises(EarlyRead, match="before the wait for its load"):
        _run_tcgen05(lambda text: text.replace("tcgen05.wait::ld.sync.aligned;", ""))


def test_rows_of_64_have_16_of_each_32_lanes():
    """Layout F: row r in lane 32 (r / 16) + r % 16, or 16 lanes further."""
    shape = Shape.read(1 << 4 | 2 << 17 | 4 << 24)
    assert (shape.rows, shape.columns, shape.kind) == (64, 16, "f16")
    for first in (0, 16):
        lanes = shape.find_lanes(first)[:, 0].tolist()
        assert lanes == [first + 32 * (r // 16) + r % 16 for r in range(64)]
    assert Shape.read(_SHAPE | 1 << 16).turned == (False, True)
    with pytest.raises(Refused, match="instruction descriptor"):
        Shape.read(_SHAPE | 1 << 13)  # the first factor negated
