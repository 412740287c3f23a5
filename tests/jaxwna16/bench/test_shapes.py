"""Which shapes and numbers of tokens a call asks for."""

from __future__ import annotations

import argparse

import pytest

from jaxwna16.bench.shapes import (
    MODELS,
    MOE_MODELS,
    MoeShape,
    Shape,
    list_default_shapes,
    parse_counts,
    parse_group_size,
    parse_moe_shapes,
    parse_shapes,
)


def test_a_shape_is_written_input_features_first():
    assert parse_shapes("8192x28672") == [Shape(in_features=8192, out_features=28672)]
    assert Shape(8192, 28672).label == "8192x28672"


def test_models_stand_for_their_layers_and_each_shape_comes_once():
    shapes = parse_shapes("4096x4096,llama-3.1-8b")
    assert [shape.label for shape in shapes] == [
        "4096x4096",
        "4096x1024",
        "4096x14336",
        "14336x4096",
    ]
    assert shapes[0].role == "Llama-3.1-8B q; Llama-3.1-8B o"


def test_the_default_is_every_model_and_every_square_once():
    shapes = list_default_shapes()
    assert len(shapes) == len(set(shapes)) == 12
    assert {shape for layers in MODELS.values() for shape in layers} < set(shapes)
    assert [shape.label for shape in shapes[:3]] == ["8192x8192", "8192x28672", "4096x4096"]


@pytest.mark.parametrize("text", ["", "8192", "0x8", "8x-8", "8x8,", "llama-9", "8x8x8"])
def test_what_is_no_shape_is_refused_by_name(text):
    with pytest.raises(argparse.ArgumentTypeError, match="neither KxN"):
        parse_shapes(text)


def test_experts_are_written_hidden_intermediate_experts_top_k():
    assert parse_moe_shapes("2048x768x128x8") == [MoeShape(2048, 768, 128, 8)]
    assert parse_moe_shapes("Mixtral-8x7B,64x32x8x2,64x32x8x2") == [
        MOE_MODELS["mixtral-8x7b"],
        MoeShape(hidden=64, intermediate=32, experts=8, top_k=2),
    ]
    assert MoeShape(2048, 768, 128, 8).label == "2048x768 E128 k8"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("64x32", "neither HxIxExtop_k"),
        ("64x32x8x0", "neither HxIxExtop_k"),
        ("64x32x8x2x1", "neither HxIxExtop_k"),
        ("llama-3.1-8b", "nor one of qwen3-30b-a3b, mixtral-8x7b"),
        ("mixtral-8x7b,", "neither HxIxExtop_k"),
        ("64x32x8x9", "a token cannot choose 9 of 8 experts"),
    ],
)
def test_what_are_no_experts_is_refused_by_name(text, says):
    with pytest.raises(argparse.ArgumentTypeError, match=says):
        parse_moe_shapes(text)


def test_counts_are_sorted_and_each_comes_once():
    assert parse_counts("16,1,16") == [1, 16]


@pytest.mark.parametrize("text", ["", "0", "-1", "1.5", "1,,2", "a"])
def test_what_is_no_count_is_refused(text):
    with pytest.raises(argparse.ArgumentTypeError, match="positive integers"):
        parse_counts(text)


def test_a_group_size_is_a_number_or_channel():
    assert [parse_group_size("64"), parse_group_size("channel")] == [64, -1]
    with pytest.raises(argparse.ArgumentTypeError, match="channel"):
        parse_group_size("-1")
