"""Wrong entries without number are counted and the first shown, in seconds and few megabytes."""

from __future__ import annotations

import contextlib
import io
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from jaxwna16 import Wna16Error, load_checkpoint
from jaxwna16.cli import main
from jaxwna16.errors import ModelError
from loaders.errors import CheckpointError, Fault, cut_text, limit_faults, list_first
from loaders.files.folder import INDEX
from loaders.files.small_files import CONFIG
from tests.fuzz.bases import make_bases

COUNT = 2000
GONE = "model-00001-of-00002.safetensors"


def _edit(name: str, base: str, change: Callable[[Any], object]) -> dict[str, bytes]:
    files = dict(make_bases()[base])
    tree = json.loads(files[name])
    change(tree)
    return files | {name: json.dumps(tree).encode()}


def _index(change: Callable[[int], tuple[str, str]]) -> Callable[[], dict[str, bytes]]:
    return lambda: _edit(
        INDEX,
        "symmetric, shards",
        lambda index: index["weight_map"].update(map(change, range(COUNT))),
    )


def _quantization(base: str, change: Callable[[Any], object]) -> Callable[[], dict[str, bytes]]:
    return lambda: _edit(CONFIG, base, lambda config: change(config["quantization_config"]))


def _many(value: Any = 1) -> dict[str, Any]:
    return {f"n{i}x": value for i in range(COUNT)}


CASES = {
    "tensors of the index": _index(lambda i: (f"a.{i}x.b", GONE)),
    "layers of experts in a missing file": _index(
        lambda i: (f"model.layers.{i}.mlp.experts.0.up_proj.weight", "gone.safetensors")
    ),
    "missing files": _index(lambda i: (f"a.{i}.b", f"{i}x.safetensors")),
    "groups": _quantization(
        "asymmetric",
        lambda q: q["config_groups"].update(
            _many({"targets": ["Linear"], "weights": {"num_bits": 99}})
        ),
    ),
    "groups that are none": _quantization(
        "asymmetric", lambda q: q["config_groups"].update(_many())
    ),
    "fields of a group": _quantization(
        "asymmetric", lambda q: q["config_groups"]["group_0"]["weights"].update(_many())
    ),
    "ignored names": _quantization("asymmetric", lambda q: q.update(ignore=list(_many()))),
    "one long name": _quantization("asymmetric", lambda q: q.update(ignore=["x" * 10**7])),
    "one long text": _quantization("asymmetric", lambda q: q.update(ignore="x" * 10**7)),
    "names of AWQ": _quantization("AWQ", lambda q: q.update(modules_to_not_convert=list(_many()))),
    "fields of AWQ": _quantization("AWQ", lambda q: q.update(_many())),
    "rules, beside fields": _quantization(
        "GPTQ, act-order", lambda q: q.update(dynamic=_many({"bits": 99}), **_many())
    ),
    "types of layers": lambda: _edit(
        CONFIG, "llama", lambda c: c.update(model_type="qwen3", layer_types=["x"] * 10**5)
    ),
    "dense layers": lambda: _edit(
        CONFIG,
        "llama",
        lambda c: c.update(
            model_type="qwen3_moe",
            num_hidden_layers=1000,
            mlp_only_layers=list(range(2000, 2000 + 10**5)),
        ),
    ),
    "values": lambda: (
        dict(make_bases()["asymmetric"]) | {CONFIG: b'{"a": [' + b"[]," * 10**7 + b"1]}"}
    ),
}


def _write(folder: Path, files: dict[str, bytes]) -> Path:
    folder.mkdir()
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder


@pytest.mark.parametrize("case", CASES)
def test_what_is_wrong_without_number_is_told_in_short_and_soon(tmp_path, case):
    folder = _write(tmp_path / "c", CASES[case]())
    start, said = time.perf_counter(), ""
    try:
        said = "\n".join(load_checkpoint(folder).warnings)
    except Wna16Error as error:
        said = str(error)
    assert len(said) < 100_000
    for options in (["inspect"], ["inspect", "--json"], ["verify", "--json"]):
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            assert main.main([*options, str(folder)]) in (0, 1)
        assert len(out.getvalue()) < 600_000
        assert len(err.getvalue()) < 500_000
    assert time.perf_counter() - start < 20


def test_all_faults_are_held_and_the_first_shown():
    faults = [Fault("is wrong", "f", f"t{i}") for i in range(100_000)]
    error = CheckpointError("c", faults)
    assert (len(error.faults), len(str(error).splitlines())) == (100_000, 102)
    assert str(error).endswith("… and 99,900 more")
    assert str(error).startswith("c: 100000 faults\n  - f: t0: is wrong\n")
    assert len(CheckpointError("c", faults[:1] * 9).faults) == 1
    assert limit_faults(faults, 2)[:2] == faults[:2]
    assert limit_faults(faults[:2], 2) == faults[:2]
    assert limit_faults(faults, 2)[2].what == "… and 99,998 more"
    error = ModelError("wrong", [f"key{i}: wrong" for i in range(100_000)])
    assert error.reasons[-1] == "… and 99,000 more"
    assert len(str(error).splitlines()) == 102
    assert str(error).endswith("… and 99,900 more")


def test_a_long_text_is_cut_in_the_middle():
    text = cut_text("a" * 5000 + "b" * 5000)
    assert len(text) < 4100
    assert text.startswith("aaa") and "(6,000 more characters)" in text and text.endswith("bbb")
    assert cut_text("a" * 4000) == "a" * 4000
    assert list_first(["a", "b"], 2) == ["a", "b"]
    assert len(Fault("x" * 10**7, "y" * 10**7, "z" * 10**7).what) < 4100
