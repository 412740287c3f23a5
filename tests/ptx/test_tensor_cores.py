"""Matrices in registers, shared and tensor memory, and the rules of asynchronous products.

Where an element stands is written out here lane by lane, as the PTX ISA's figures have it.
"""

from __future__ import annotations

import itertools

import ml_dtypes
import numpy as np
import pytest

from tests.ptx import EarlyRead, Fault, Refused
from tests.ptx.opcodes.descriptors import find_chunks
from tests.ptx.opcodes.tcgen05 import Shape
from tests.ptx.programs import run

_BF16 = ml_dtypes.bfloat16


def _draw(shape: tuple[int, ...], seed: int) -> np.ndarray:
    """Small whole numbers: every sum is exact."""
    return np.random.default_rng(seed).integers(-9, 10, shape).astype(_BF16)


def _spread(matrices: np.ndarray, registers: int, place) -> np.ndarray:
    """uint32 [registers, warps * 32] of [warps, ...] matrices; `place` of register, lane, half."""
    halves = np.zeros((registers, len(matrices), 32, 2), _BF16)
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


def _load(registers: int, first: int, array: int, threads: int) -> str:
    """r<first>, ... from [registers, threads] uint32."""
    text = f"mad.wide.u32 d20, t, 4, d{array};"
    return text + "".join(
        f"ld.global.b32 r{first + i}, [d20+{4 * threads * i}];" for i in range(registers)
    )


def _store(registers: int, first: int, array: int, threads: int) -> str:
    text = f"mad.wide.u32 d20, t, 4, d{array};"
    return text + "".join(
        f"st.global.b32 [d20+{4 * threads * i}], r{first + i};" for i in range(registers)
    )


def _name(first: int, count: int) -> str:
    return "{" + ", ".join(f"r{first + i}" for i in range(count)) + "}"


def test_mma_multiplies_what_the_lanes_hold():
    a, b = _draw((2, 16, 16), 1), _draw((2, 16, 8), 2)
    start = np.random.default_rng(3).integers(-9, 10, (4, 64)).astype(np.float32)
    body = (
        _load(4, 0, 0, 64)
        + _load(2, 4, 1, 64)
        + _load(4, 6, 2, 64)
        + "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
        + f"{_name(10, 4)}, {_name(0, 4)}, {_name(4, 2)}, {_name(6, 4)};"
        + _store(4, 10, 3, 64)
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
        f"st.shared.v4.b32 [r8], {_name(0, 4)};"
        f"ldmatrix.sync.aligned.m8n8.x4{trans}.shared.b16 {_name(4, 4)}, [r8];"
    )
    out = np.zeros((4, 32), np.uint32)
    [out] = run(body + _store(4, 4, 1, 32), [matrices.view(np.uint32)], [out], threads=32)
    pairs = out.view(np.uint16).reshape(4, 32, 2)
    for i, lane, half in itertools.product(range(4), range(32), range(2)):
        at = (lane // 4, lane % 4 * 2 + half)
        assert pairs[i, lane, half] == matrices[i][at[::-1] if trans else at]
    # stmatrix puts back what ldmatrix took
    body += (
        f"stmatrix.sync.aligned.m8n8.x4{trans}.shared.b16 [r8], {_name(4, 4)};"
        f"ld.shared.v4.b32 {_name(12, 4)}, [r8]; mad.wide.u32 d20, t, 16, d1;"
        f"st.global.v4.b32 [d20], {_name(12, 4)};"
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


def _swizzle(matrix: np.ndarray, descriptor_mode: int, shift: int) -> tuple[np.ndarray, int]:
    """[rows, 16] as rows of 32 bytes from 1024 on, and its descriptor."""
    rows = len(matrix)
    content = np.zeros((rows, 2, 8), _BF16)
    for row, chunk in itertools.product(range(rows), range(2)):
        content[row, chunk ^ (row % 8 // 4)] = matrix[row, 8 * chunk : 8 * chunk + 8]
    return content.reshape(-1).view(
        np.uint32
    ), 1024 >> 4 | 256 >> 4 << 32 | descriptor_mode << shift


_FILL = """
mov.b64 d10, memory; cvt.u32.u64 r50, d10; mad.lo.u32 r51, t, 4, r50; mad.wide.u32 d20, t, 4, d1;
ld.global.b32 r52, [d20]; st.shared.b32 [r51], r52; fence.proxy.async.shared::cta; bar.sync 0;
"""
_WGMMA = (
    "wgmma.mma_async.sync.aligned.m64n16k16.f32.bf16.bf16 "
    f"{_name(4, 8)}, {_name(0, 4)}, d11, KEEP, 1, 1, 0;"
)


def _write_wgmma(descriptor: int) -> str:
    return (
        _load(4, 0, 0, 128) + _FILL + f"mov.b64 d11, {descriptor}; mov.pred p1, 1;"
        "wgmma.fence.sync.aligned; "
        + _WGMMA.replace("KEEP", "0")
        + _WGMMA.replace("KEEP", "p1")
        + "wgmma.commit_group.sync.aligned; wgmma.wait_group.sync.aligned 0; bar.sync 0;"
        + _store(8, 4, 2, 128)
    )


def _run_wgmma(change=lambda text: text) -> np.ndarray:
    a, b = _draw((4, 16, 16), 1), _draw((16, 16), 2)
    content, descriptor = _swizzle(b, 3, 62)
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


def _place_transposed(matrix: np.ndarray, row_bytes: int) -> tuple[np.ndarray, int, int]:
    """[rows, 16] from byte 1024 on as CUTLASS writes the layout: ((8, m, n), (8, k)).

    Of the rows, 8 stand side by side, m such chunks fill a row of memory, and n of these are the
    leading stride apart; of K, 8 are a row of memory apart and k the other stride. Returns the
    bytes as uint32, and both strides.
    """
    rows, numbers = len(matrix), row_bytes // 2
    lead, stride = 16 * row_bytes, 8 * row_bytes
    content = np.zeros((-(-rows // numbers), 16, row_bytes // 16, 8), _BF16)
    for row, k in itertools.product(range(rows), range(16)):
        chunk = row % numbers // 8
        turn = k % 8 // (128 // row_bytes)
        content[row // numbers, k, chunk ^ turn, row % 8] = matrix[row, k]
    return content.reshape(-1).view(np.uint32), lead, stride


def _fill(content: np.ndarray) -> str:
    """Shared memory from the first array."""
    return (
        "mov.b64 d10, memory; cvt.u32.u64 r50, d10; mad.lo.u32 r51, t, 4, r50;"
        "mad.wide.u32 d20, t, 4, d0;"
        + "".join(
            f"ld.global.b32 r52, [d20+{512 * i}]; st.shared.b32 [r51+{512 * i}], r52;"
            for i in range(content.size // 128)
        )
        + "fence.proxy.async.shared::cta; bar.sync 0;"
    )


def _place_both(a: np.ndarray, b: np.ndarray, row_bytes: int, mode: int) -> tuple:
    """Both in shared memory, one after the other, and their descriptors."""
    (left, *_), (right, lead, stride) = (_place_transposed(m, row_bytes) for m in (a, b))
    facts = lead >> 4 << 16 | stride >> 4 << 32 | mode
    starts = (1024, 1024 + left.nbytes)
    return np.concatenate([left, right]), *(facts | start >> 4 for start in starts)


@pytest.mark.parametrize(("mode", "row_bytes"), [(1, 128), (2, 64), (3, 32)])
def test_wgmma_multiplies_transposed_factors(mode, row_bytes):
    """The left one fills one row of memory or two or four, the right one a part or all of it."""
    a, b = _draw((64, 16), 1), _draw((16, 16), 2)
    content, *descriptors = _place_both(a, b, row_bytes, mode << 62)
    body = (
        _fill(content)
        + f"mov.b64 d11, {descriptors[0]}; mov.b64 d12, {descriptors[1]}; wgmma.fence.sync.aligned;"
        "wgmma.mma_async.sync.aligned.m64n16k16.f32.bf16.bf16 "
        f"{_name(4, 8)}, d11, d12, 0, 1, 1, 1, 1;"
        "wgmma.commit_group.sync.aligned; wgmma.wait_group.sync.aligned 0; bar.sync 0;"
        + _store(8, 4, 1, 128)
    )
    [out] = run(body, [content], [np.zeros((8, 128), np.float32)], shared=8192)
    found = _collect(out, 16).reshape(64, 16)
    np.testing.assert_array_equal(found, a.astype(np.float64) @ b.astype(np.float64).T)


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
    f"tcgen05.st.sync.aligned.32x32b.x8.b32 [r44+{column}], {_name(0, 8)}; " for column in (0, 8)
)


def _run_tcgen05(change=lambda text: text) -> np.ndarray:
    """A [128, 16] in tensor memory times B [16, 16] in shared memory, twice."""
    a, b = _draw((128, 16), 1), _draw((16, 16), 2)
    content, descriptor = _swizzle(b, 6, 61)
    text = _TCGEN05.replace("SOURCE", _name(0, 8)).replace("TARGET", _name(8, 16))
    text = text.replace("SHAPE", str(_SHAPE)).replace("\n", " ")
    body = (
        _load(8, 0, 0, 128) + _FILL + f"mov.b64 d11, {descriptor};" + text + _store(16, 8, 2, 128)
    )
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


@pytest.mark.parametrize(("mode", "row_bytes"), [(2, 128), (4, 64), (6, 32)])
@pytest.mark.parametrize("rows", [64, 128])
def test_tcgen05_multiplies_transposed_factors_in_shared_memory(mode, row_bytes, rows):
    a, b = _draw((rows, 16), 1), _draw((16, 16), 2)
    content, *descriptors = _place_both(a, b, row_bytes, mode << 61)
    shape = 1 << 4 | 0b001_001 << 7 | 0b11 << 15 | 2 << 17 | rows // 16 << 24
    text = _TCGEN05.replace("2048", "12288").replace("2056", "12296").replace("[r42+32]", "d12")
    text = text.replace("SOURCE", _name(0, 8)).replace("TARGET", _name(8, 16))
    text = text.replace("SHAPE", str(shape)).replace("\n", " ")
    body = (
        _fill(content)
        + "".join(f"mov.b32 r{i}, 0;" for i in range(8))
        + f"mov.b64 d12, {descriptors[0]}; mov.b64 d11, {descriptors[1]};"
        # lanes that no row of 64 is in hold nothing: zeros, as the others
        + text.replace("tcgen05.wait::st", _CLEAR + "tcgen05.wait::st", 1)
        + _store(16, 8, 1, 128)
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
