"""The way into a checkpoint folder, original or converted."""

from __future__ import annotations

import os
from pathlib import Path

from loaders.converted.converted import plan_converted
from loaders.converted.manifest import MANIFEST, is_converted, read_manifest
from loaders.errors import CheckpointError, Fault
from loaders.plan import Plan, Survey, make_plan, survey_folder


def open_plan(folder: str | Path, *, follow_links: bool = False) -> Plan:
    """Plan a checkpoint folder, converted or not; `follow_links` as in `make_plan`.

    Raises:
      CheckpointError: listing every fault. It is a fault of a converted copy if its source is still
        at its place and has changed.
    """
    folder = Path(folder)
    make = plan_converted if is_converted(folder, follow_links=follow_links) else make_plan
    return make(folder, follow_links=follow_links)


def open_survey(
    folder: str | Path, *, headers_only: bool = False, follow_links: bool = False
) -> Survey:
    """Plan as much of a checkpoint folder as can be planned; of a converted one, all or nothing.

    Args:
      folder: the checkpoint folder.
      headers_only, follow_links: as in `survey_folder`.

    Raises:
      CheckpointError: as `survey_folder`; of a converted one, listing every fault.
    """
    folder = Path(folder)
    if is_converted(folder, follow_links=follow_links):
        return Survey(plan_converted(folder, follow_links=follow_links))
    return survey_folder(folder, headers_only=headers_only, follow_links=follow_links)


def plan_original(folder: str | os.PathLike[str], *, follow_links: bool = False) -> Plan:
    """Plan an original checkpoint folder, as its own tensors are needed; arguments as `make_plan`.

    Raises:
      CheckpointError: as `make_plan`, and if it is a converted one.
    """
    folder = Path(folder)
    if not is_converted(folder, follow_links=follow_links):
        return make_plan(folder, follow_links=follow_links)
    try:
        source = read_manifest(folder, follow_links=follow_links).source.folder
    except CheckpointError:
        source = "the checkpoint that it was made from"
    what = "this is a converted copy, which does not hold the original tensors"
    raise CheckpointError(folder, [Fault(what, MANIFEST, "", f"use {source}")])
