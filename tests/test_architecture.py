"""The page about the way through the rooms, and its drawing."""

from __future__ import annotations

import itertools
import re
from xml.etree import ElementTree

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.architecture import DRAWING, choose_arrows, draw, is_free, join_twins, lay_out
from tests.imports import GRAPH, ROOT

PAGE = ROOT / "docs" / "architecture.md"


def test_the_drawing_is_that_of_the_imports():
    assert DRAWING.read_text(encoding="utf-8") == draw(), "`make drawing` makes it again"
    ElementTree.fromstring(draw())


def test_a_new_import_changes_the_drawing_unless_another_way_implies_it():
    def add(module: str, imported: str) -> dict[str, set[str]]:
        return {**GRAPH, module: {*GRAPH[module], imported}}

    assert draw(add("pallas_kernels.xla.dense", "pallas_kernels.triton.dense")) != draw()
    assert draw(add("loaders.schemes.presets", "pallas_kernels.tiles.tables")) != draw()
    assert draw(add("jaxwna16.cli.main", "pallas_kernels.format.spec")) == draw()


def test_the_page_names_files_and_folders_that_exist():
    named = re.findall(r"`((?:jaxwna16|loaders|pallas_kernels|tests)/[\w/.]*)`", PAGE.read_text())
    assert len(named) > 20
    assert not [name for name in named if not (ROOT / name).exists()]


@st.composite
def graphs(draw):
    """Graphs without circles: arrows go from a number to larger ones."""
    pairs = itertools.combinations("abcdefg", 2)
    arrows = [pair for pair in pairs if draw(st.booleans())]
    return {node: {end for start, end in arrows if start == node} for node in "abcdefg"}


def reach(arrows: dict[str, set[str]], nodes: str) -> np.ndarray:
    """Which node has a way to which, by powers of the matrix."""
    steps = np.array([[a == b or b in arrows.get(a, ()) for b in nodes] for a in nodes], int)
    return np.linalg.matrix_power(steps, len(nodes)) > 0


@given(graphs(), st.sets(st.sampled_from("abcdefg"), min_size=1))
@settings(max_examples=100, deadline=None)
def test_arrows_have_the_ways_of_the_imports_and_none_can_be_left_out(graph, chosen):
    arrows = choose_arrows(graph, chosen)
    kept = sorted(chosen)
    places = ["abcdefg".index(node) for node in kept]
    wanted = reach(graph, "abcdefg")[np.ix_(places, places)]
    assert (reach(arrows, kept) == wanted).all()
    for start, ends in arrows.items():
        for end in ends:
            fewer = {**arrows, start: ends - {end}}
            assert (reach(fewer, kept) != wanted).any()


def test_rooms_with_the_same_arrows_are_one_box():
    arrows = {"p.a": {"p.b", "p.c", "q.d"}, "p.b": {"p.e"}, "p.c": {"p.e"}, "q.d": {"p.e"}}
    joined = join_twins({**arrows, "p.e": set()})
    assert joined[("p.a",)] == {("p.b", "p.c"), ("q.d",)}
    assert joined[("p.b", "p.c")] == {("p.e",)}


def test_no_box_or_arrow_lies_on_a_box():
    boxes, arrows = lay_out(GRAPH)
    for one, other in itertools.combinations(boxes, 2):
        apart = abs(one.x - other.x) > (one.width + other.width) / 2
        assert apart or one.row != other.row
    for source, end in arrows:
        assert any(is_free(x, source, end, boxes) for x in (source.x, end.x))
        assert source.row < end.row
