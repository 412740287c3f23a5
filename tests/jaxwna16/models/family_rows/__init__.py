"""A row for each `model_type` that jaxwna16 has: the small models its suite compares.

There is a file for each definition; small ones share one. `tests/jaxwna16/models/test_families.py`
runs the suite, and fails where a row is missing.
"""

from __future__ import annotations

from tests.jaxwna16.models.family_rows import (
    cohere_glm4,
    deepseek,
    gemma,
    llama,
    olmo2,
    qwen3_5,
    wrapped,
)
from tests.jaxwna16.models.family_rows.row import SMALL as SMALL
from tests.jaxwna16.models.family_rows.row import Changes
from tests.jaxwna16.models.family_rows.row import Row as Row

ROWS: dict[str, Row] = {
    model_type: row
    for family in (cohere_glm4, deepseek, gemma, llama, olmo2, qwen3_5, wrapped)
    for model_type, row in family.ROWS.items()
}


def name_model(model_type: str, variant: str) -> str:
    """The name that a small model has in tests: "llama", "llama, yarn rope"."""
    return f"{model_type}, {variant}" if variant else model_type


MODELS: dict[str, tuple[str, Changes]] = {
    name_model(model_type, variant): (model_type, changes)
    for model_type, row in ROWS.items()
    for variant, changes in row.variants.items()
}
"""Name -> model_type, what differs from the row's `sizes`."""
BASES: dict[str, str] = {
    model_type: name_model(model_type, next(iter(row.variants))) for model_type, row in ROWS.items()
}
"""model_type -> the name of its first model."""
