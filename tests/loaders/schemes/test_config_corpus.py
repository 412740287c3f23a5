"""Configs as they are in the wild: each module has the scheme that compressed-tensors gives it.

`quantization_configs/` holds them, each for a model of two layers; `models.json` holds the models'
modules by class. Only linears and embeddings are compared, as nothing else is ever packed.
"""

from __future__ import annotations

import copy
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from loaders.files.safetensors_file import TensorInfo
from loaders.schemes.module_names import name_classes
from loaders.schemes.quantization_config import parse_quantization
from tests.skeletons import QUANTIZABLE, apply_config, build_skeleton, expand_names

FOLDER = Path(__file__).parent / "quantization_configs"
MODELS = {
    model: {kind: expand_names(names) for kind, names in classes.items()}
    for model, classes in json.loads((FOLDER / "models.json").read_text()).items()
}
REFUSED = json.loads((FOLDER / "refused.json").read_text())
READ = [
    entry
    for file in sorted(FOLDER.glob("*.json"))
    if file.name not in ("models.json", "refused.json")
    for entry in json.loads(file.read_text())
]


def _each(entries):
    return pytest.mark.parametrize("entry", entries, ids=[entry["name"] for entry in entries])


def _list_modules(entry) -> list[str]:
    return [path for kind in QUANTIZABLE for path in MODELS[entry["model"]].get(kind, [])]


def _describe(scheme) -> str:
    size = "channel" if scheme.group_size == -1 else scheme.group_size
    return f"{scheme.bits} bits, {size}{'' if scheme.symmetric else ', asymmetric'}"


def _find_groups(config: dict) -> dict:
    """The dict that has the groups, in a form that compressed-tensors 0.20 takes."""
    nested = next(
        value
        for name in ("quantization_config", "text_config", "compression_config")
        if (value := config.get(name)) is not None
    )
    while "quantization_config" in nested:
        nested = nested["quantization_config"]
    nested = copy.deepcopy(nested)
    for group in nested["config_groups"].values():
        weights = group.get("weights") if isinstance(group, dict) else None
        if weights and weights.get("actorder") in (True, "group", "dynamic"):
            weights.pop("actorder")  # removed in 0.20
    return nested


def _store(modules) -> dict[str, dict[str, TensorInfo]]:
    """Headers that say that each module is quantized somehow."""
    return {
        path: {
            role: TensorInfo(f"{path}.{role}", Path("f"), np.dtype("f4"), (8, 8), 0)
            for role in ("weight", "weight_scale")
        }
        for path in modules
    }


def test_the_corpus_is_large_and_its_names_differ():
    assert len(READ) >= 40
    names = [entry["name"] for entry in READ + REFUSED]
    assert len(set(names)) == len(names)
    assert {entry["model"] for entry in READ + REFUSED} == MODELS.keys()


@pytest.mark.parametrize("model", MODELS)
def test_the_class_of_a_module_is_told_from_its_name(model):
    for kind in QUANTIZABLE:
        assert {name_classes(path)[0] for path in MODELS[model].get(kind, [])} <= {kind}


@_each(READ)
def test_config_gives_these_schemes(entry):
    parsed, faults = parse_quantization(entry["config"])
    modules = _list_modules(entry)
    assert not faults and not parsed.check_groups(_store(modules))[0]
    found = [scheme for path in modules if (scheme := parsed.find_scheme(path))]
    assert Counter(map(_describe, found)) == entry["schemes"]


@_each(READ)
def test_groups_of_other_formats_without_modules_are_warnings(entry):
    parsed, _ = parse_quantization(entry["config"])
    _, warnings = parsed.check_groups(_store(_list_modules(entry)))
    fields = [warning.partition("config.json: quantization_config.")[2] for warning in warnings]
    assert [field.partition(":")[0] for field in fields] == entry.get("warned", [])


@pytest.mark.filterwarnings("ignore")
@_each([entry for entry in READ if entry.get("oracle", True)])
def test_config_gives_the_schemes_of_compressed_tensors(entry):
    pytest.importorskip("compressed_tensors")
    expected = apply_config(build_skeleton(MODELS[entry["model"]]), _find_groups(entry["config"]))
    parsed, _ = parse_quantization(entry["config"])
    weights = {path: s.weights for path, s in expected.items() if s.weights is not None}
    modules = _list_modules(entry)
    schemes = {path: scheme for path in modules if (scheme := parsed.find_scheme(path))}
    assert schemes.keys() == weights.keys()
    for path, scheme in schemes.items():
        args = weights[path]
        size = -1 if args.strategy == "channel" else args.group_size
        assert (scheme.bits, scheme.group_size) == (args.num_bits, size), path
        assert scheme.symmetric == args.symmetric and args.type == "int", path


@_each(REFUSED)
def test_what_cannot_be_read_is_named_with_its_modules(entry):
    parsed, faults = parse_quantization(entry["config"])
    named = {fault.tensor: fault for fault in faults}
    refused = {
        fault.tensor: fault for fault in parsed.check_groups(_store(_list_modules(entry)))[0]
    }
    place = entry.get("place", "quantization_config")
    for field, count in entry["refused"].items():
        fault = (named if count is None else refused)[f"{place}.{field}"]
        assert fault.file == "config.json" and fault.way_out
        assert count is None or f": {count} modules, " in fault.what
    if None in entry["refused"].values():
        assert named.keys() == {f"{place}.{f}" for f, n in entry["refused"].items() if n is None}


@pytest.mark.filterwarnings("ignore")
@_each([e for e in REFUSED if e.get("oracle", True) and None not in e["refused"].values()])
def test_groups_that_cannot_be_read_have_the_modules_of_compressed_tensors(entry):
    quantization = pytest.importorskip("compressed_tensors.quantization")
    match = pytest.importorskip("compressed_tensors.utils.match")
    config = quantization.QuantizationConfig.model_validate(_find_groups(entry["config"]))
    groups = {t: name for name, group in config.config_groups.items() for t in group.targets}
    model = build_skeleton(MODELS[entry["model"]])
    counts = Counter(
        groups[match.match_targets(path, module, groups)[0]]
        for path, module in match.match_named_modules(model, groups, config.ignore)
        if type(module).__name__.endswith((*QUANTIZABLE, "Attention"))
    )
    for field, count in entry["refused"].items():
        if field.startswith("config_groups."):
            assert counts[field.split(".")[1]] == count, field
