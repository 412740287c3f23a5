"""What documents say is supported is what the table of families has."""

from __future__ import annotations

import re
from pathlib import Path

from jaxwna16.models.families import MODEL_TYPES

ROOT = Path(__file__).parents[3]


def read_tables() -> dict[str, tuple[set[str], bool]]:
    """model_type -> the names of its models, and whether they have experts, of docs/models.md."""
    lines = (ROOT / "docs" / "models.md").read_text().splitlines()
    cells = [[cell.strip() for cell in line.strip("| ").split("|")] for line in lines]
    rows = [row for row in cells if re.fullmatch(r"`[a-z0-9_]+`", row[0])]
    rows = [row for row in rows if row[0] != "`model_type`"]  # the head of a table
    assert len({row[0] for row in rows}) == len(rows)
    return {row[0].strip("`"): (set(row[1].split(", ")), "experts" in row[3]) for row in rows}


def test_the_tables_of_the_page_on_models_have_a_row_for_each_model_type_and_no_other():
    assert read_tables().keys() == set(MODEL_TYPES)


def test_the_readme_names_the_models_of_these_tables_and_no_others():
    text = " ".join((ROOT / "README.md").read_text().split())
    found = re.search(r"It supports (.*?),? and these mixture-of-experts models: (.*?)\. \[", text)
    assert found
    dense, sparse = (set(re.split(r", | and ", part)) for part in found.groups())
    rows = read_tables().values()
    assert dense == set().union(*(names for names, has_experts in rows if not has_experts))
    assert sparse == set().union(*(names for names, has_experts in rows if has_experts))
