"""OLMo 2."""

from __future__ import annotations

from tests.jaxwna16.models.family_rows.row import Row

ROWS: dict[str, Row] = {
    "olmo2": Row(variants={"": {"attention_bias": True}}, group_size=32, bfloat16={}),
}
