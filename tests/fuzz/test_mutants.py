"""Five hundred broken checkpoints: each loads to the exact numbers, or is refused by name.

`make fuzz` does the same with 20,000. Mutants that once broke the loader stand at the end.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from loaders.files.folder import CONFIG, INDEX, SINGLE
from tests.fuzz.bases import join_file, make_bases
from tests.fuzz.check import check_mutant, load_bases
from tests.fuzz.files import PIPE, Entry
from tests.fuzz.generate import run
from tests.fuzz.json_edits import dump
from tests.fuzz.mutations import HARMLESS, MUTATIONS, split_file
from tests.fuzz.values import DEEP, HUGE

SEED = int(os.environ.get("JAXWNA16_FUZZ_SEED", "5"))
EACH = -(-500 // len(MUTATIONS))
Q = "model.layers.0.q_proj"
Files = dict[str, Entry]

pytestmark = pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(), reason="peak memory is read from /proc"
)


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_every_mutant_loads_to_the_exact_numbers_or_is_refused_by_name(mutation):
    print(f"JAXWNA16_FUZZ_SEED={SEED}")
    tally = run(mutation, EACH, SEED)
    assert tally.distinct > EACH / 2
    assert tally.loaded == tally.mutants or mutation not in HARMLESS


def _header(change: Callable[[dict[str, Any]], object]) -> Callable[[Files], None]:
    def edit(files: Files) -> None:
        content = files[SINGLE]
        assert isinstance(content, bytes)
        header, data = split_file(content)
        change(header)
        files[SINGLE] = join_file(dump(header), data)

    return edit


def _config(change: Callable[[dict[str, Any]], object]) -> Callable[[Files], None]:
    def edit(files: Files) -> None:
        content = files[CONFIG]
        assert isinstance(content, bytes)
        config = json.loads(content)
        change(config)
        files[CONFIG] = dump(config)

    return edit


def _rename(old: str, new: str) -> Callable[[dict[str, Any]], object]:
    def rename(header: dict[str, Any]) -> None:
        found = {name.replace(old, new): entry for name, entry in header.items()}
        header.clear()
        header.update(found)

    return rename


def _fill_groups(files: Files) -> None:
    """Negative group indices that differ: -1 and -2 in turn."""
    content = files[SINGLE]
    assert isinstance(content, bytes)
    header, data = split_file(content)
    start, end = header[f"{Q}.weight_g_idx"]["data_offsets"]
    groups = np.tile(np.array([-1, -2], np.int32), (end - start) // 8).tobytes()
    files[SINGLE] = join_file(dump(header), data[:start] + groups + data[end:])


def _break_a_pattern(config: dict[str, Any]) -> None:
    raw = config["quantization_config"]
    raw["ignore"] = ["re:("]
    raw["config_groups"]["group_0"]["weights"]["block_structure"] = [1, 1]


def _lengthen_the_version(config: dict[str, Any]) -> None:
    config["quantization_config"]["version"] = "9" * 5000 + ".9"


def _both(*changes: Callable[[Files], None]) -> Callable[[Files], None]:
    def change(files: Files) -> None:
        for one in changes:
            one(files)

    return change


def _change_a_dtype(header: dict[str, Any]) -> None:
    scale = header["model.layers.0.mlp.experts.1.up_proj.weight_scale"]
    scale["dtype"] = {"F16": "BF16", "BF16": "F16"}[scale["dtype"]]


# what each once did, and the kind of fault that it is now; None is loaded
BROKE: dict[str, tuple[str, Callable[[Files], None], int | None]] = {
    "negative groups were sorted as if without a sign: wrong numbers": (
        *("act-order", _fill_groups, None),
    ),
    "no zero point beside words of 3 bits: KeyError": (
        *("3 bits", _header(_rename("q_proj.weight_zero_point", "q_proj.bia")), 9),
    ),
    "10^30 experts: OverflowError": (
        *("experts", _config(lambda config: config.update(num_experts=10**30)), 14),
    ),
    "an expert of seven digits was none: it stood beside the stack": (
        *("experts", _header(_rename("experts.1.", "experts.1000000.")), 14),
    ),
    "scales of one expert in another dtype were refused": (
        *("experts", _header(_change_a_dtype), None),
    ),
    "a group refused and no pattern in ignore: re.error": (
        *("asymmetric", _config(_break_a_pattern), 13),
    ),
    "a version of 5000 digits: ValueError": (
        "asymmetric",
        _both(
            _config(_lengthen_the_version), _header(_rename("q_proj.weight_zero", "q_proj.zero"))
        ),
        7,
    ),
    "a shape nested deeply, which cannot be shown: RecursionError": (
        *("asymmetric", _header(lambda header: header["mask"].update(shape=DEEP)), 5),
    ),
    "offsets of 5000 digits": (
        *("asymmetric", _header(lambda header: header["mask"].update(data_offsets=[HUGE])), 3),
    ),
    "a name of 100,000 levels took gigabytes": (
        *("asymmetric", _header(_rename("mask", "a." * 100_000)), 5),
    ),
    "half a surrogate pair, which cannot be printed": (
        *("asymmetric", _header(_rename("mask", "\ud800")), 3),
    ),
    "a pipe as config.json was waited for": ("asymmetric", lambda f: f.update({CONFIG: PIPE}), 1),
    "a pipe as the index was waited for": ("asymmetric", lambda f: f.update({INDEX: PIPE}), 1),
}


@pytest.mark.parametrize("name", BROKE)
def test_what_once_broke_the_loader_does_so_no_more(tmp_path, name):
    base, change, kind = BROKE[name]
    files: Files = dict(make_bases()[base])
    change(files)
    load_bases(tmp_path)
    outcome = check_mutant(base, files, tmp_path, harmless=False)
    assert kind in outcome.kinds if kind else not outcome.kinds
