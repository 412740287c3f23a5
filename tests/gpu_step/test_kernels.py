"""Reading a small program whose kernels, layers and bytes are known by hand."""

from __future__ import annotations

import pytest

from tests.gpu_step.hlo import count_command_buffers, read_module, read_thunks
from tests.gpu_step.kernels import Load, list_kernels
from tests.gpu_step.readings import BEGIN, END

# two layers around a cache of 2 heads, 64 slots, 8 features; a branch and an inner loop of 3 rounds
_TEXT = """HloModule jit_decode, is_scheduled=true

FunctionNames
1 "attend"
2 "<module>"

FileLocations
1 {file_name_id=1 function_name_id=1 line=1}

StackFrames
1 {file_location_id=1 parent_frame_id=1}

%write (p: bf16[2,64,8], n: bf16[2,1,8], z: s32[]) -> bf16[2,64,8] {
  %p = bf16[2,64,8]{2,1,0} parameter(0)
  %n = bf16[2,1,8]{2,1,0} parameter(1)
  %z = s32[] parameter(2)
  ROOT %u = bf16[2,64,8]{2,1,0} dynamic-update-slice(%p, %n, %z, %z, %z)
}

%look (t: bf16[1000,16], at: s32[]) -> bf16[1,16] {
  %t = bf16[1000,16]{1,0} parameter(0)
  %at = s32[] parameter(1)
  ROOT %s = bf16[1,16]{1,0} dynamic-slice(%t, %at, %at), dynamic_slice_sizes={1,16}
}

%scores (k: bf16[2,64,8]) -> f32[2,64] {
  %k = bf16[2,64,8]{2,1,0} parameter(0)
  %q = bf16[2,8]{1,0} constant({...})
  ROOT %d = f32[2,64]{1,0} dot(%k, %q), lhs_contracting_dims={2}, rhs_contracting_dims={1}
}

%few (a: (bf16[1,16])) -> bf16[1,16] {
  %a = (bf16[1,16]{1,0}) parameter(0)
  %a.0 = bf16[1,16]{1,0} get-tuple-element(%a), index=0
  ROOT %pick = bf16[1,16]{1,0} negate(%a.0)
}

%many (b: (bf16[1,16])) -> bf16[1,16] {
  %b = (bf16[1,16]{1,0}) parameter(0)
  %b.0 = bf16[1,16]{1,0} get-tuple-element(%b), index=0
  %draw.1 = bf16[1,16]{1,0} negate(%b.0)
  ROOT %draw.2 = bf16[1,16]{1,0} negate(%draw.1)
}

%turn (c: (s32[], bf16[1,16])) -> (s32[], bf16[1,16]) {
  %c = (s32[], /*index=1*/bf16[1,16]{1,0}) parameter(0)
  %c.0 = s32[] get-tuple-element(%c), index=0
  %c.1 = bf16[1,16]{1,0} get-tuple-element(%c), index=1
  %next = s32[] negate(%c.0)
  ROOT %c.2 = (s32[], bf16[1,16]{1,0}) tuple(%next, %c.1)
}

%more (d: (s32[], bf16[1,16])) -> pred[] {
  %d = (s32[], bf16[1,16]{1,0}) parameter(0)
  ROOT %known = pred[] constant(true)
}

%step (e: (s32[], bf16[1000,16], u16[4,16], bf16[2,64,8], bf16[16])) -> (s32[], bf16[1000,16]) {
  %e = (s32[], bf16[1000,16]{1,0}, u16[4,16]{1,0}, bf16[2,64,8]{2,1,0}, bf16[16]{0}) parameter(0)
  %e.0 = s32[] get-tuple-element(%e), index=0
  %e.1 = bf16[1000,16]{1,0} get-tuple-element(%e), index=1
  %e.2 = u16[4,16]{1,0} get-tuple-element(%e), index=2
  %e.3 = bf16[2,64,8]{2,1,0} get-tuple-element(%e), index=3
  %e.4 = bf16[16]{0} get-tuple-element(%e), index=4
  %embed = bf16[1,16]{1,0} fusion(%e.1, %e.0), kind=kLoop, calls=%look
  %x = bf16[1,16]{1,0} bitcast(%embed)
  %call.1 = (f32[1,16]{1,0}, f32[1,16]{1,0}) custom-call(%x, %e.2), custom_call_target="triton"
  %call.1.0 = f32[1,16]{1,0} get-tuple-element(%call.1), index=0
  %new = bf16[2,1,8]{2,1,0} bitcast(%call.1.0)
  %put = bf16[2,64,8]{2,1,0} fusion(%e.3, %new, %e.0), kind=kLoop, calls=%write
  %see = f32[2,64]{1,0} fusion(%put), kind=kCustom, calls=%scores, metadata={stack_frame_id=1}
  %flash = bf16[1,16]{1,0} custom-call(%see, %put), custom_call_target="triton"
  %copy.1 = bf16[2,64,8]{2,1,0} copy(%put)
  %head = bf16[1,16]{1,0} multiply(%flash, %e.4)
  %arg = (bf16[1,16]{1,0}) tuple(%head)
  %cond = bf16[1,16]{1,0} conditional(%e.0, %arg, %arg), branch_computations={%many, %few}
  %init = (s32[], bf16[1,16]{1,0}) tuple(%e.0, %flash)
  %inner = (s32[], bf16[1,16]{1,0}) while(%init), condition=%more, body=%turn, \
backend_config={"known_trip_count":{"n":"3"}}
  ROOT %out = (s32[], bf16[1000,16]{1,0}) tuple(%e.0, %e.1)
}

%again (f: (s32[], bf16[1000,16])) -> pred[] {
  %f = (s32[], bf16[1000,16]{1,0}) parameter(0)
  %f.0 = s32[] get-tuple-element(%f), index=0
  ROOT %test = pred[] compare(%f.0, %f.0), direction=LT
}

ENTRY %main (a: s32[]) -> s32[] {
  %a = s32[] parameter(0), metadata={op_name="progress.step"}
  %b = bf16[1000,16]{1,0} parameter(1), metadata={op_name="model.model.embed_tokens.weight.value"}
  %c = u16[4,16]{1,0} parameter(2), \
metadata={op_name="model.model.layers[1].self_attn.k_proj.packed.value"}
  %d = bf16[2,64,8]{2,1,0} parameter(3), metadata={op_name="progress.cache[1].k"}
  %g = bf16[16]{0} parameter(4), metadata={op_name="model.model.norm.weight.value"}
  %once = s32[] negate(%a)
  %init = (s32[], bf16[1000,16]{1,0}, u16[4,16]{1,0}, bf16[2,64,8]{2,1,0}, bf16[16]{0}) \
tuple(%once, %b, %c, %d, %g)
  ROOT %loop = (s32[], bf16[1000,16]{1,0}) while(%init), condition=%again, body=%step
}
"""
_NAMES = ("once embed call.1 put see flash copy.1 head draw.1 draw.2 pick next test").split()
_SEQUENCE = "\n".join(
    ["000: kCopy [source | sink] kCopy", "001: kWhile [source | sink]  "]
    + ["  body:", "    000: kCommandBuffer [source | sink]"]
    + [
        f"      {n:03}: kCustomKernel [source | next=002 (1)] {name.replace('.', '_')}_7 "
        f"grid: [{n}, 2, 1] threads: [64, 1, 1]  shared_memory: 0 bytes"
        for n, name in enumerate(_NAMES)
        if name not in ("once", "test", "copy.1")
    ]
    + ["      006: kCopy [source | sink] kCopy", "  condition:"]
    + ["    012: kCustomKernel [source | sink] test grid: [1, 1, 1] threads: [1, 1, 1]"]
)
_METADATA = "\n".join(
    f'thunk_info {{\n    profile_annotation: "{name}"\n    thunk_id: {n}\n  }}'
    for n, name in enumerate(_NAMES)
)
_LOAD = Load(rows=1, steps=1, slots=64, seen=16)


def read(**options) -> dict:
    kernels = list_kernels(read_module(_TEXT), read_thunks(_SEQUENCE, _METADATA), _LOAD, **options)
    return {kernel.name: kernel for kernel in kernels}


def test_a_step_is_one_round_of_the_loop_over_tokens():
    assert list(read()) == [
        "embed_7", "call_1_7", "put_7", "see_7", "flash_7", "kCopy", "head_7", "pick_7", "next_7",
        "test",
    ]  # fmt: skip


def test_of_branches_the_one_with_fewest_kernels_counts_or_that_with_most():
    assert "pick_7" in read() and "draw_1_7" not in read()
    assert {"draw_1_7", "draw_2_7"} <= set(read(greedy=False))
    assert "pick_7" not in read(greedy=False)


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("embed_7", BEGIN),
        ("call_1_7", 1),
        ("put_7", 1),
        ("flash_7", 1),
        ("head_7", END),
        ("pick_7", END),
        ("next_7", 1),
        ("test", BEGIN),
    ],
)
def test_a_kernel_is_of_the_last_layer_that_it_depends_on(name, layer):
    assert read()[name].layer == layer


def test_what_is_sliced_updated_or_not_seen_does_not_count_as_read_or_written():
    kernels = read()
    moved = {name: (kernel.read, kernel.written) for name, kernel in kernels.items()}
    # a row of the embedding, and the scalar that says which
    assert moved["embed_7"] == (2 * 16 + 4, 2 * 16)
    assert moved["call_1_7"] == (2 * 16 + 2 * 64, 2 * 4 * 16)
    # of the cache only the new line is written, and none of it read
    assert moved["put_7"] == (2 * 16 + 4, 2 * 16)
    # XLA reads every slot, a kernel of ours the 16 of 64 that are seen
    assert moved["see_7"] == (2 * 1024, 4 * 128)
    assert moved["flash_7"] == (4 * 128 + 2 * 1024 // 4, 2 * 16)


def test_a_round_of_an_inner_loop_counts_as_often_as_it_runs():
    inner = read()["next_7"]
    assert (inner.launches, inner.read, inner.written) == (3, 3 * 4, 3 * 4)


def test_a_copy_of_a_cache_is_found_and_an_update_in_place_is_none():
    assert [name for name, kernel in read().items() if kernel.copies_cache] == ["kCopy"]


def test_kernels_outside_of_command_buffers_are_known():
    assert [name for name, kernel in read().items() if not kernel.is_recorded] == ["test"]
    assert count_command_buffers(_SEQUENCE) == 1


def test_a_kernel_says_what_it_reads_and_which_function_made_it():
    kernels = read()
    assert kernels["call_1_7"].weights == ("self_attn.k_proj.packed",)
    assert kernels["call_1_7"].describe() == "call (k_proj)"
    assert kernels["see_7"].describe() == "see (attend)"
    assert kernels["see_7"].flops == 2 * 128 * 8
    assert kernels["call_1_7"].programs == 4


def test_an_array_with_an_axis_of_slots_is_scores_if_it_is_as_large_as_the_piece():
    module, thunks = read_module(_TEXT), read_thunks(_SEQUENCE, _METADATA)

    def find(steps: int) -> list[str]:
        kernels = list_kernels(module, thunks, Load(rows=1, steps=steps, slots=64, seen=16))
        return [kernel.name for kernel in kernels if kernel.scores]

    assert find(steps=2) == ["see_7"]
    assert find(steps=3) == []


def test_of_experts_those_count_that_any_token_touches():
    one = Load(rows=1, steps=1, slots=64, seen=16, top_k=2, experts=8)
    assert one.touched == pytest.approx(2 / 8)
    assert Load(rows=2, steps=1, slots=64, seen=16, top_k=2, experts=8).touched == pytest.approx(
        1 - (6 / 8) ** 2
    )
    text = _TEXT.replace("self_attn.k_proj", "mlp.experts.w13")
    kernels = list_kernels(read_module(text), read_thunks(_SEQUENCE, _METADATA), one)
    [kernel] = [kernel for kernel in kernels if kernel.weights == ("mlp.experts.w13.packed",)]
    assert kernel.read == 2 * 16 + 2 * 64 // 4
