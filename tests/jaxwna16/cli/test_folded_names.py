"""Names with numbers, folded for people and still exact."""

from __future__ import annotations

import itertools
import re

from hypothesis import given
from hypothesis import strategies as st

from jaxwna16.cli.folded_names import fold_names, star_numbers

NAMES = st.lists(
    st.tuples(st.integers(0, 5), st.sampled_from(["q", "k"]), st.integers(0, 3)).map(
        lambda parts: "layers.{}.{}.experts.{}".format(*parts)
    ),
    unique=True,
)


def unfold(folded: str) -> list[str]:
    """All the names that a folded one stands for."""
    places = []
    for text in re.split(r"({[^}]*})", folded):
        if not text.startswith("{"):
            places.append([text])
            continue
        ranges = [part.split("-") for part in text.strip("{}").split(",")]
        places.append([str(n) for r in ranges for n in range(int(r[0]), int(r[-1]) + 1)])
    return ["".join(parts) for parts in itertools.product(*places)]


@given(NAMES)
def test_folded_names_stand_for_exactly_the_names(names):
    folded = fold_names(names)
    assert sorted(name for text in folded for name in unfold(text)) == sorted(names)


def test_the_layers_of_a_model_become_one_name():
    names = [f"model.layers.{i}.mlp.up_proj" for i in (0, 1, 2, 10, 12)]
    assert fold_names([*names, "lm_head"]) == ["model.layers.{0-2,10,12}.mlp.up_proj", "lm_head"]


def test_numbers_inside_a_word_are_no_layers():
    assert star_numbers("model.layers.12.conv1.weight") == "model.layers.*.conv1.weight"
