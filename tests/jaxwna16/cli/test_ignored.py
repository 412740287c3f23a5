"""What `inspect` says of the ignore list: how many modules each entry means, and what it misses."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from compressed_tensors.utils.match import is_match
from transformers.quantizers.quantizers_utils import should_convert_module

from jaxwna16.cli.ignored import find_near
from loaders.schemes.quantization_config import parse_quantization
from pallas_kernels.format.spec import QuantSpec
from tests.folders import make_config, make_tensors, prefix_names, write_folder

SPEC = QuantSpec(bits=4, group_size=32, symmetric=True, in_features=64, out_features=32)
SHARED = [f"model.layers.{i}.mlp.shared_expert.{p}_proj" for i in range(3) for p in ("up", "down")]
GATES = [f"model.layers.{i}.mlp.gate" for i in range(3)]


@pytest.fixture
def folder(tmp_path):
    """Packed shared experts; the routers are plain but for that of layer 1, which was forgotten."""
    packed = [*SHARED, GATES[1]]
    tensors = {n: a for path in packed for n, a in prefix_names(path, make_tensors(SPEC)).items()}
    plain = [GATES[0], GATES[2], "lm_head"]
    tensors |= {f"{path}.weight": np.ones((32, 64), np.float32) for path in plain}
    tensors["model.norm.weight"] = np.ones(64, np.float32)
    ignore = ["lm_head", GATES[0], GATES[2], r"re:.*mlp\.shared_experts\..*", "re:.*visual.*"]
    return write_folder(tmp_path / "c", make_config(SPEC, ignore=ignore), [tensors])


def test_each_entry_is_counted_beside_what_is_alike(call, folder):
    report = call("inspect", folder, "--json").report
    counts = {
        row["entry"]: (row["entries"], row["modules"], row["of"]) for row in report["ignored"]
    }
    assert counts == {
        "lm_head": (1, 1, 1),
        "model.layers.*.mlp.gate": (2, 2, 3),
        r"re:.*mlp\.shared_experts\..*": (1, 0, 0),
        "re:.*visual.*": (1, 0, 0),
    }
    lines = [" ".join(line.split()) for line in call("inspect", folder).out.splitlines()]
    assert "ignored lm_head: 1 of 1 modules" in lines
    assert "model.layers.*.mlp.gate (2 entries): 2 of 3 modules" in " ".join(lines)
    assert r"re:.*mlp\.shared_experts\..*: no module" in " ".join(lines)


def test_a_spelling_that_is_almost_that_of_packed_modules_is_a_warning(call, folder):
    report = call("inspect", folder, "--json").report
    near = {row["entry"]: (row["near"], row["near_modules"]) for row in report["ignored"]}
    assert near.pop(r"re:.*mlp\.shared_experts\..*") == (r"re:.*mlp\.shared_expert\..*", 6)
    assert set(near.values()) == {("", 0)}
    [warning] = [text for text in report["warnings"] if "would match" in text]
    assert "'re:.*mlp\\\\.shared_expert\\\\..*' would match 6, which are quantized" in warning


@pytest.mark.parametrize(
    ("entry", "near"),
    [
        ("model.layers.*.mlp.shared_experts.up_proj", "model.layers.*.mlp.shared_expert.up_proj"),
        ("re:.*shared_expert_.up_proj$", "re:.*shared_expert.up_proj$"),
        ("re:.*mlp.shared_expert.q_proj", ""),
        ("re:.*experts.*", ""),
        ("re:(shared_experts", ""),
        ("Conv2d", ""),
    ],
)
def test_near_is_one_word_that_is_hardly_another(entry, near):
    assert find_near(entry, SHARED) == (near, 3 if near else 0)


def test_entries_match_what_they_match_in_compressed_tensors():
    entries = ["lm_head", GATES[1], "re:.*gate$", r"re:model\.layers\.[02].*up", "Linear", "mlp"]
    config = make_config(SPEC, ignore=entries)
    modules = [*SHARED, *GATES, "lm_head"]
    linear = torch.nn.Linear(1, 1)
    assert parse_quantization(config)[0].match_ignored(modules) == {
        entry: [name for name in modules if is_match(name, linear, [entry])] for entry in entries
    }


def test_entries_match_what_they_match_in_transformers():
    entries = ["lm_head", "gate", GATES[1], ".*expert.*up_proj", "layers.1"]
    config = {"quant_method": "awq", "bits": 4, "group_size": 32, "modules_to_not_convert": entries}
    modules = [*SHARED, *GATES, "lm_head"]
    assert parse_quantization({"quantization_config": config})[0].match_ignored(modules) == {
        entry: [name for name in modules if not should_convert_module(name, [entry])]
        for entry in entries
    }
