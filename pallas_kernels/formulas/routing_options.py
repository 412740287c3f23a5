"""`Routing`, the options of `pallas_kernels.step.routing.route`."""

from __future__ import annotations

import dataclasses
import math

from pallas_kernels.errors import SpecError
from pallas_kernels.formulas.routing_scores import SCORINGS

GROUP_SCORES = {"max": 1, "top2_sum": 2}
"""Name -> how many of its best experts are added for the score of a group."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Routing:
    """The options of `route`, hashable.

    Attributes:
      top_k: experts of a token.
      scoring: one of `SCORINGS`.
      renormalize: whether the weights of a token add up to `scaling_factor`.
      groups: number of groups; each is a run of consecutive experts.
      top_groups: how many of the groups a token may choose from.
      group_score: one of `GROUP_SCORES`.
      scaling_factor: multiplies the weights.

    Raises:
      SpecError: if a value is impossible.
    """

    top_k: int
    scoring: str = "softmax"
    renormalize: bool = True
    groups: int = 1
    top_groups: int = 1
    group_score: str = "max"
    scaling_factor: float = 1.0

    def __post_init__(self):
        faults = [
            f"{name} must be an integer of at least 1, got {getattr(self, name)!r}"
            for name in ("top_k", "groups", "top_groups")
            if type(getattr(self, name)) is not int or getattr(self, name) < 1
        ]
        for name, table in (("scoring", SCORINGS), ("group_score", GROUP_SCORES)):
            names, found = tuple(table), getattr(self, name)
            if found not in names:
                faults.append(f"{name} must be one of {names}, got {found!r}")
        if not isinstance(self.renormalize, bool):
            faults.append(f"renormalize must be True or False, got {self.renormalize!r}")
        factor = self.scaling_factor
        if isinstance(factor, bool) or not isinstance(factor, int | float):
            faults.append(f"scaling_factor must be a number, got {factor!r}")
        elif not math.isfinite(factor):
            faults.append(f"scaling_factor must be finite, got {factor!r}")
        if not faults and self.top_groups > self.groups:
            faults.append(f"top_groups = {self.top_groups} must be at most groups = {self.groups}")
        if faults:
            raise SpecError("; ".join(faults))

    def check_experts(self, experts: int) -> None:
        """Raise a SpecError unless these options fit `experts` experts."""
        if experts % self.groups:
            raise SpecError(f"groups = {self.groups} must divide the {experts} experts")
        size = experts // self.groups
        if self.top_k > self.top_groups * size:
            raise SpecError(
                f"top_k = {self.top_k} must be at most {self.top_groups * size} "
                f"(top_groups = {self.top_groups}, groups of {size} experts)"
            )
        least = GROUP_SCORES[self.group_score]
        if self.groups > 1 and size < least:
            raise SpecError(
                f"group_score {self.group_score!r} needs groups of at least {least} experts, "
                f"got {size}"
            )
