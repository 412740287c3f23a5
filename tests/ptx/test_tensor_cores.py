"""Matrices in registers and shared memory, and the rules of asynchronous products.

Where an element stands is written out here lane by lane, as the PTX ISA's figures have it.
"""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from tests.ptx import Fault, Refused
from tests.ptx.matrices import BF16, FILL, draw, fill, load, name, place_both, store, swizzle
from tests.ptx.opcodes.descriptors import find_chunks
from tests.ptx.programs import run


def _spread(matrices: np.ndarray, registers: int, place) -> np.ndarray:
    """uint32 [registers, warps * 32] of [warps, ...] matrices; `place` of register, lane, half."""
    halves = np.zeros((registers, len(matrices), 32, 2), BF16)
    for register, lane, half in itertools.product(range(registers), range(32), range(2)):
        row, column = place(register, lane, half)
        halves[register, :, lane, half] = matrices[:, row, column]
    return halves.reshape(registers, -1).view(np.uint32)


def _place_left(register: int, lane: int, half: int) -> tuple[int, int]:
    """a0, a1: rows groupID; a2, a3: groupID + 8; a4 to a7 the same, columns 8 further."""
    i = 2 * register + half
    row = lane // 4 + (0 if i in (0, 1, 4, 5) else 8)
    return row, lane % 4 * 2 + (i & 1) + (8 if i >= 4 else 0)


def _place_right(register: int, lane: int, half: int) -> tuple[int, int]:
    """b0, b1: k from 2 threadID on; b2, b3: 8 further; columns groupID."""
    return lane % 4 * 2 + half + 8 * register, lane // 4


def _collect(sums: np.ndarray, columns: int) -> np.ndarray:
    """float32 [registers, warps * 32] -> [warps, 16, columns]."""
    sums = sums.reshape(sums.shape[0], -1, 32)
    out = np.zeros((sums.shape[1], 16, columns), np.float32)
    for register, lane in itertools.product(range(sums.shape[0]), range(32)):
        row = lane // 4 + (8 if register % 4 >= 2 else 0)
        out[:, row, register // 4 * 8 + lane % 4 * 2 + register % 2] = sums[register, :, lane]
    return out


def test_mma_multiplies_what_the_lanes_hold():
    a, b = draw((2, 16, 16), 1), draw((2, 16, 8), 2)
    start = np.random.default_rng(3).integers(-9, 10, (4, 64)).astype(np.float32)
    body = (
        load(4, 0, 0, 64)
        + load(2, 4, 1, 64)
        + load(4, 6, 2, 64)
        + "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
        + f"{name(10, 4)}, {name(0, 4)}, {name(4, 2)}, {name(6, 4)};"
        + store(4, 10, 3, 64)
    )
    inputs = [_spread(a, 4, _place_left), _spread(b, 2, _place_right), start]
    [out] = run(body, inputs, [np.zeros((4, 64), np.float32)], threads=64)
    right = a.astype(np.float64) @ b.astype(np.float64) + _collect(start, 8)
    np.testing.assert_array_equal(_collect(out, 8), right)


@pytest.mark.parametrize("trans", ["", ".trans"])
def test_ldmatrix_gives_each_lane_two_numbers_of_a_row(trans):
    """Lane l of matrix i holds row l / 4, columns 2 (l % 4) and the next; or of its transpose."""
    matrices = np.arange(4 * 64, dtype=np.uint16).reshape(4, 8, 8)
    body = (
        "mov.b64 d10, memory; cvt.u32.u64 r8, d10; mad.lo.u32 r8, t, 16, r8;"
        "mad.wide.u32 d20, t, 16, d0; ld.global.v4.b32 {r0, r1, r2, r3}, [d20];"
        f"st.shared.v4.b32 [r8], {name(0, 4)};"
        f"ldmatrix.sync.aligned.m8n8.x4{trans}.shared.b16 {name(4, 4)}, [r8];"
    )
    out = np.zeros((4, 32), np.uint32)
    [out] = run(body + store(4, 4, 1, 32), [matrices.view(np.uint32)], [out], threads=32)
    pairs = out.view(np.uint16).reshape(4, 32, 2)
    for i, lane, half in itertools.product(range(4), range(32), range(2)):
        at = (lane // 4, lane % 4 * 2 + half)
        assert pairs[i, lane, half] == matrices[i][at[::-1] if trans else at]
    # stmatrix puts back what ldmatrix took
    body += (
        f"stmatrix.sync.aligned.m8n8.x4{trans}.shared.b16 [r8], {name(4, 4)};"
        f"ld.shared.v4.b32 {name(12, 4)}, [r8]; mad.wide.u32 d20, t, 16, d1;"
        f"st.global.v4.b32 [d20], {name(12, 4)};"
    )
    [back] = run(body, [matrices.view(np.uint32)], [np.zeros(128, np.uint32)], threads=32)
    np.testing.assert_array_equal(back.view(np.uint16), matrices.reshape(-1))


@pytest.mark.parametrize("row_bytes", [32, 64, 128])
def test_a_swizzle_moves_chunks_within_eight_rows(row_bytes):
    """Chunk c of row r stands where chunk c ^ (r / rows per 128 bytes) would."""
    for step in range(row_bytes // 32):
        found = find_chunks(2048 + 32 * step, 8 * row_bytes, row_bytes, 24)
        for row, half in itertools.product(range(24), range(2)):
            turn = row % 8 // (128 // row_bytes)
            chunk = (2 * step + half) ^ turn
            assert found[row, half] == 2048 + row * row_bytes + 16 * chunk


_WGMMA = (
    "wgmma.mma_async.sync.aligned.m64n16k16.f32.bf16.bf16 "
    f"{name(4, 8)}, {name(0, 4)}, d11, KEEP, 1, 1, 0;"
)


def _write_wgmma(descriptor: int) -> str:
    return (
        load(4, 0, 0, 128) + FILL + f"mov.b64 d11, {descriptor}; mov.pred p1, 1;"
        "wgmma.fence.sync.aligned; "
        + _WGMMA.replace("KEEP", "0")
        + _WGMMA.replace("KEEP", "p1")
        + "wgmma.commit_group.sync.aligned; wgmma.wait_group.sync.aligned 0; bar.sync 0;"
        + store(8, 4, 2, 128)
    )


def _run_wgmma(change=lambda text: text) -> np.ndarray:
    a, b = draw((4, 16, 16), 1), draw((16, 16), 2)
    content, descriptor = swizzle(b, 3, 62)
    inputs = [_spread(a, 4, _place_left), content]
    [out] = run(change(_write_wgmma(descriptor)), inputs, [np.zeros((8, 128), np.float32)])
    return _collect(out, 16) - 2 * (a.astype(np.float64) @ b.astype(np.float64).T)


def test_wgmma_multiplies_registers_by_shared_memory():
    assert not _run_wgmma().any()


_SUM = "wgmma.commit_group.sync.aligned; wgmma.wait_group.sync.aligned 0;"


@pytest.mark.parametrize(
    ("old", "new", "what"),
    [
        (_SUM, "wgmma.commit_group.sync.aligned;", "register r4 is read before the wait"),
        ("wait_group.sync.aligned 0", "wait_group.sync.aligned 1", "read before the wait"),
        (_SUM, "wgmma.wait_group.sync.aligned 0;", "read before the wait"),
        (_SUM, "mov.b32 r2, 0;" + _SUM, "register r2 is overwritten before the wait for its use"),
        (_SUM, "mov.b32 r5, 0;" + _SUM, "register r5 is overwritten before the wait"),
        ("wgmma.fence.sync.aligned;", "", "written after the last wgmma.fence"),
        (_SUM, "st.shared.b32 [r51], 0;" + _SUM, "written while tensor cores read it"),
        (_SUM, _SUM + "st.shared.b32 [r51], 0;", "written that another warp read"),
        ("fence.proxy.async.shared::cta;", "", "no fence made visible"),
        ("shared::cta; bar.sync 0;", "shared::cta;", "written since the last barrier"),
        (
            _WGMMA.replace("KEEP", "0"),
            _WGMMA.replace("KEEP", "p1"),
            "added to and was never written",
        ),
        (
            _WGMMA.replace("KEEP", "p1"),
            _WGMMA.replace("KEEP", "p1").replace("r4,", "r12,"),
            "another shape",
        ),
    ],
)
def test_wgmma_is_held_to_its_rules(old, new, what):
    def change(text: str) -> str:
        assert old in text
        return text.replace(old, new, 1)

    with pytest.raises(Fault, match=what):
        _run_wgmma(change)


def test_negated_factors_are_refused():
    with pytest.raises(Refused, match="negated"):
        _run_wgmma(lambda text: text.replace("1, 1, 0;", "-1, 1, 0;"))


@pytest.mark.parametrize(("mode", "row_bytes"), [(1, 128), (2, 64), (3, 32)])
def test_wgmma_multiplies_transposed_factors(mode, row_bytes):
    """The left one fills one row of memory or two or four, the right one a part or all of it."""
    a, b = draw((64, 16), 1), draw((16, 16), 2)
    content, *descriptors = place_both(a, b, row_bytes, mode << 62)
    body = (
        fill(content)
        + f"mov.b64 d11, {descriptors[0]}; mov.b64 d12, {descriptors[1]}; wgmma.fence.sync.aligned;"
        "wgmma.mma_async.sync.aligned.m64n16k16.f32.bf16.bf16 "
        f"{name(4, 8)}, d11, d12, 0, 1, 1, 1, 1;"
        "wgmma.commit_group.sync.aligned; wgmma.wait_group.sync.aligned 0; bar.sync 0;"
        + store(8, 4, 1, 128)
    )
    [out] = run(body, [content], [np.zeros((8, 128), np.float32)], shared=8192)
    found = _collect(out, 16).reshape(64, 16)
    np.testing.assert_array_equal(found, a.astype(np.float64) @ b.astype(np.float64).T)
