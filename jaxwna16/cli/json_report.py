"""A report as JSON that every reader takes: NaN and infinities, which are none, become null."""

from __future__ import annotations

import json
import math
from typing import Any

_FEW = 5


def write_report(report: dict[str, Any]) -> str:
    """The report as text in ASCII; if a number had to become null, a warning in it says where."""
    places: list[str] = []
    replaced = _replace(report, "", places)
    if places:
        more = f" and {len(places) - _FEW} more" if len(places) > _FEW else ""
        warning = f"null in place of NaN or an infinity: {', '.join(places[:_FEW])}{more}"
        replaced["warnings"] = [*(replaced.get("warnings") or []), warning]
    return json.dumps(replaced, indent=2, allow_nan=False)


def _replace(value: Any, place: str, places: list[str]) -> Any:
    """The same with null in place of what JSON has no number for, whose places are listed."""
    if isinstance(value, dict):
        return {
            k: _replace(v, f"{place}.{k}" if place else str(k), places) for k, v in value.items()
        }
    if isinstance(value, list | tuple):
        return [_replace(v, f"{place}[{i}]", places) for i, v in enumerate(value)]
    if isinstance(value, float) and not math.isfinite(value):
        places.append(place)
        return None
    return value
