"""The 19 kinds of faults of a checkpoint, by number: each is refused, or warned of, by name.

The kinds are `tests.fault_kinds.TITLES`. Here is at least one hand-made checkpoint for each; more,
in detail: 1 and 2 `files/test_folder.py`, `files/test_outside.py`, 3 to 5
`files/test_safetensors_file.py`, 6, 7 and 9 `test_plan.py`, 8 and 10 `modules/test_encoding.py`, 11
and 15 `test_stream.py`, 12 `tests/jaxwna16/cli/test_verify.py`, 13
`schemes/test_quantization_config.py`, `schemes/test_refused_groups.py`, 14
`modules/test_experts.py`, 16 `tests/jaxwna16/checkpoints/test_convert.py`, 17
`files/test_memory.py`, 19
`tests/jaxwna16/models/filling/test_params.py`.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jaxwna16 import ModelError, load_checkpoint, load_model
from jaxwna16.cli import main
from loaders.converted.manifest import MANIFEST
from loaders.errors import CheckpointError
from loaders.files.folder import CONFIG, INDEX, SINGLE
from tests.fault_kinds import TITLES, find_kind
from tests.fuzz.bases import join_file, make_bases, write_file
from tests.fuzz.files import FOLDER, PIPE, Entry, Link, write_entries
from tests.fuzz.mutations import split_file

Files = dict[str, Entry]
Q, FIRST = "model.layers.0.q_proj", "model-00001-of-00002.safetensors"
EXPERTS = "model.layers.0.mlp.experts"


def _edit(name: str, change: Callable[[Any], object]) -> Callable[[Files], None]:
    """Change a JSON file, or the header of a safetensors file."""

    def edit(files: Files) -> None:
        content = files[name]
        assert isinstance(content, bytes)
        tree, data = (json.loads(content), b"") if name.endswith(".json") else split_file(content)
        change(tree)
        text = json.dumps(tree).encode()
        files[name] = text if name.endswith(".json") else join_file(text, data)

    return edit


def _entry(name: str, **changes: Any) -> Callable[[Files], None]:
    """Change a tensor's entry in the header."""
    return _edit(SINGLE, lambda header: header[name].update(changes))


def _numbers(name: str, change: Callable[[np.ndarray], object], dtype: Any) -> Any:
    """Change the numbers of a tensor."""

    def edit(files: Files) -> None:
        content = files[SINGLE]
        assert isinstance(content, bytes)
        header, data = split_file(content)
        start, end = header[name]["data_offsets"]
        array = np.frombuffer(data[start:end], dtype).copy()
        change(array)
        whole = data[:start] + array.tobytes() + data[end:]
        files[SINGLE] = join_file(json.dumps(header).encode(), whole)

    return edit


def _weights(**changes: Any) -> Callable[[Files], None]:
    """Change the `weights` of the one config group."""
    return _quantization(lambda raw: raw["config_groups"]["group_0"]["weights"].update(changes))


def _quantization(change: Callable[[Any], object]) -> Callable[[Files], None]:
    return _edit(CONFIG, lambda config: change(config["quantization_config"]))


def _put(name: str, entry: Entry) -> Callable[[Files], None]:
    return lambda files: files.update({name: entry})


def _raw_header(text: bytes) -> Callable[[Files], None]:
    return _put(SINGLE, join_file(text, b""))


def _drop(*names: str) -> Callable[[Files], None]:
    """Leave tensors out of the one file."""

    def edit(files: Files) -> None:
        content = files[SINGLE]
        assert isinstance(content, bytes)
        header, data = split_file(content)
        kept, rest = {}, b""
        for name, entry in header.items():
            if not name.startswith(names):
                start, end = entry["data_offsets"]
                kept[name] = entry | {"data_offsets": [len(rest), len(rest) + end - start]}
                rest += data[start:end]
        files[SINGLE] = join_file(json.dumps(kept).encode(), rest)

    return edit


def _point(shard: str) -> Callable[[Files], None]:
    """Let the index name another file for a tensor."""
    return _edit(INDEX, lambda index: index["weight_map"].update({f"{Q}.bias": shard}))


SHARDS, DENSE, ODD = "symmetric, shards", "asymmetric", "3 bits of 0.17"
REFUSED: list[tuple[int, str, Callable[[Files], None], str]] = [
    (1, SHARDS, _point("/etc/passwd.safetensors"), "'/etc/passwd.safetensors': a shard must be"),
    (1, SHARDS, _point("../outside/model.safetensors"), "a shard must be a plain file name"),
    (1, SHARDS, _point("a\0.safetensors"), r"'a\\x00.safetensors': a shard must be a plain file"),
    (
        1,
        SHARDS,
        _put(FIRST, Link("../outside/model.safetensors")),
        f"{FIRST}: .* a link that leaves",
    ),
    (1, DENSE, _put(CONFIG, Link("../outside/config.json")), "config.json: .* a link that leaves"),
    (1, DENSE, _put(SINGLE, PIPE), "model.safetensors: this is not a file"),
    (1, DENSE, _put(CONFIG, PIPE), "config.json: this is not a file"),
    (1, DENSE, _put(SINGLE, FOLDER), "model.safetensors: this is not a file"),
    (2, SHARDS, _point("gone.safetensors"), "gone.safetensors: the file is missing"),
    (2, SHARDS, lambda files: files.pop(INDEX), f"so is {INDEX}, which {FIRST} needs"),
    (2, SHARDS, _edit(INDEX, lambda i: i["weight_map"].pop("mean")), "mean: .* not in the index"),
    (2, SHARDS, _edit(INDEX, lambda i: i["weight_map"].update(x=FIRST)), "x: the index says"),
    (
        3,
        DENSE,
        _put(SINGLE, (2**63).to_bytes(8, "little")),
        "the header claims 9223372036854775808",
    ),
    (3, DENSE, _raw_header(b"{" * 9), "the header is not valid JSON: Expecting"),
    (3, DENSE, _raw_header(b'{"a":{},"a":{}}'), "duplicate keys: a"),
    (3, DENSE, _raw_header(b'{"a":' + b"9" * 5000 + b"}"), "not valid JSON: Exceeds the limit"),
    (3, DENSE, _raw_header(b'{"a":' + b"[" * 10**5), "not valid JSON: maximum recursion"),
    (3, DENSE, _raw_header('{"a":1}'.encode("utf-16")), "not valid JSON: it does not begin"),
    (3, DENSE, _raw_header(b'{"\\ud800":1}'), "not valid JSON: .*surrogates not allowed"),
    (3, DENSE, _put(CONFIG, b'{"a":' + b"[" * 65 + b"]" * 65 + b"}"), "nested more than 64 levels"),
    (4, DENSE, _entry("mask", data_offsets=[-1, 1]), r"mask: data_offsets \[-1, 1\] are not"),
    (4, DENSE, _entry("mask", data_offsets=[2, 0]), "mask: .*data_offsets .* hold -2"),
    (4, DENSE, _entry("mask", data_offsets=[0, 2]), "overlaps the tensor before it"),
    (4, DENSE, _entry("mask", data_offsets=[9999, 10001]), "mask: leaves a hole before it"),
    (4, DENSE, lambda files: files.update({SINGLE: files[SINGLE][:-1]}), "mask: ends at byte"),
    (4, DENSE, lambda files: files.update({SINGLE: files[SINGLE] + b"x"}), "1 bytes at the end"),
    (5, DENSE, _entry("mask", shape=[-2]), r"mask: shape \[-2\] is not a list of sizes"),
    (5, DENSE, _entry("mask", shape=[2**40, 2**40]), "mask: shape .* too large for any array"),
    (5, DENSE, _entry("mask", shape=[2**64]), "mask: shape .* is not a list of sizes"),
    (6, DENSE, _entry("mask", dtype="F4"), "mask: unknown dtype 'F4'"),
    (6, DENSE, _entry(f"{Q}.weight_packed", dtype="F32"), "expected int32 .*, found float32"),
    (6, DENSE, _entry(f"{Q}.weight_scale", dtype="I16"), "weight_scale: expected float16 or"),
    (
        7,
        DENSE,
        _numbers(f"{Q}.weight_shape", lambda a: a.put(0, 8), "i8"),
        "packed: expected int32",
    ),
    (
        7,
        DENSE,
        _numbers(f"{Q}.weight_shape", lambda a: a.put(1, -1), "i8"),
        "needs in_features >= 1",
    ),
    (7, DENSE, _weights(group_size=48), r"weight_scale: expected .* \[9, 2\], found .* \[9, 3\]"),
    (7, DENSE, _drop(f"{Q}.weight_scale"), "q_proj.weight_scale: the tensor is missing"),
    (8, ODD, _quantization(lambda raw: raw.pop("version")), "packed in another way up to .* 0.17"),
    (9, DENSE, _drop(f"{Q}.weight_zero_point"), "is missing .the config says asymmetric"),
    (9, DENSE, _weights(symmetric=True), "is not expected .the config says symmetric"),
    (
        10,
        "act-order",
        _numbers(f"{Q}.weight_g_idx", lambda a: a.put(0, 2), "i4"),
        "in no group of 2",
    ),
    (10, "act-order", _numbers(f"{Q}.weight_g_idx", lambda a: a.fill(0), "i4"), "group 0 has 64"),
    (10, DENSE, _weights(actorder="group"), "weight_g_idx: the tensor is missing"),
    *(
        (11, DENSE, _numbers(f"{Q}.weight_scale", lambda a, b=bad: a.put(3, b), "f2"), what)
        for bad, what in [
            (np.nan, r"1 of 27 scales .* the first at \[1, 0\]: nan"),
            (np.inf, "1 of 27 scales are zero or not finite"),
            (0, "1 of 27 scales are zero or not finite"),
        ]
    ),
    (
        13,
        DENSE,
        _quantization(lambda raw: raw.update(format="nvfp4-pack-quantized")),
        "format: exp",
    ),
    (13, DENSE, _weights(strategy="block"), "strategy: expected group or channel, found 'block'"),
    (13, DENSE, _quantization(lambda raw: raw.update(ignore=["re:.*"])), "or it is ignored"),
    (14, "experts", _drop(f"{EXPERTS}.1."), "1 of 2 experts are missing: 1"),
    (14, "experts", _drop(f"{EXPERTS}.1.up_proj"), "up_proj is missing in experts 1"),
    (
        16,
        "converted",
        _edit(MANIFEST, lambda m: m["modules"].clear()),
        "changed after it was written",
    ),
    (16, "converted", lambda files: files.pop(MANIFEST), "this is a converted checkpoint"),
    (
        18,
        DENSE,
        lambda f: f.update({"pytorch_model.bin": f.pop(SINGLE)}),
        "pytorch_model.bin is a p",
    ),
]
SHOWN_BELOW = {12, 15, 17, 19}


def _write(folder: Path, base: str, change: Callable[[Files], object]) -> Path:
    files: Files = dict(make_bases()[base])
    change(files)
    write_entries(folder, files)
    return folder


@pytest.mark.parametrize(
    ("kind", "base", "change", "expected"),
    REFUSED,
    ids=[f"{kind}-{i}" for i, (kind, *_) in enumerate(REFUSED)],
)
def test_each_kind_is_refused_with_the_file_the_tensor_and_the_way_out(
    tmp_path, kind, base, change, expected
):
    write_entries(tmp_path / "outside", make_bases()[DENSE])
    folder = _write(tmp_path / "c", base, change)
    with pytest.raises(CheckpointError, match=expected) as caught:
        load_checkpoint(folder)
    assert kind in {find_kind(fault) for fault in caught.value.faults}
    for fault in caught.value.faults:
        assert (fault.file or fault.tensor) and fault.way_out


def test_all_kinds_are_shown_here():
    assert {kind for kind, *_ in REFUSED} | SHOWN_BELOW == set(TITLES)


@pytest.mark.parametrize("base", make_bases())
def test_what_is_broken_here_was_whole_before(tmp_path, base):
    load_checkpoint(_write(tmp_path / "c", base, lambda _: None))


def test_12_set_padding_bits_are_a_warning_of_verify(tmp_path, capsys):
    fill = _numbers(f"{Q}.weight_zero_point", lambda a: a.put(-1, -1), "i4")
    folder = _write(tmp_path / "c", DENSE, fill)
    assert main.main(["verify", str(folder), "--json"]) == 0
    assert f"{Q}.weight_zero_point: padding bits are set in 1" in capsys.readouterr().out


def test_13_a_pattern_that_matches_nothing_is_a_warning(tmp_path):
    ignore = _quantization(lambda raw: raw.update(ignore=["re:.*visual.*"]))
    [warning] = load_checkpoint(_write(tmp_path / "c", DENSE, ignore)).warnings
    assert "'re:.*visual.*' matches no module" in warning


def test_15_a_file_that_is_cut_off_while_it_is_read_names_the_tensor(tmp_path):
    folder = _write(tmp_path / "c", "llama", lambda _: None)

    def cut(done: int, total: int, name: str) -> None:
        with (folder / SINGLE).open("r+b") as file:
            file.truncate(3000)

    with pytest.raises(
        CheckpointError, match=r"expected \d+ bytes, the file ended after"
    ) as caught:
        load_checkpoint(folder, progress=cut)
    [fault] = caught.value.faults
    assert find_kind(fault) == 15
    assert fault.file == SINGLE and fault.tensor and fault.way_out


def test_17_what_memory_cannot_hold_is_refused_before_anything_is_read(tmp_path, monkeypatch):
    folder = _write(tmp_path / "c", "llama", lambda _: None)
    monkeypatch.setattr("loaders.files.memory.find_available", lambda _: 10_000)
    monkeypatch.setattr("loaders.stream.read_parts", lambda _: pytest.fail("something was read"))
    with pytest.raises(CheckpointError, match=r"its arrays take .* are available on cpu") as caught:
        load_checkpoint(folder)
    assert [find_kind(fault) for fault in caught.value.faults] == [17]


def test_18_code_that_the_config_names_is_a_warning(tmp_path):
    def add_code(files: Files) -> None:
        files["modeling_x.py"] = b"raise SystemExit(1)"
        _edit(CONFIG, lambda config: config.update(auto_map={"AutoModel": "modeling_x.X"}))(files)

    warnings = load_checkpoint(_write(tmp_path / "c", DENSE, add_code)).warnings
    assert "config.json: auto_map names code of the checkpoint, which is never run here" in warnings


def test_19_all_tensors_that_the_model_lacks_or_does_not_know_are_listed(tmp_path):
    def swap(files: Files) -> None:
        _drop("model.norm", "model.layers.0.mlp.up_proj")(files)
        extra, _ = split_file(write_file({"model.extra.weight": np.ones(0, np.float32)}))
        _edit(SINGLE, lambda header: header.update(extra))(files)

    folder = _write(tmp_path / "c", "llama", swap)
    with pytest.raises(ModelError) as caught:
        load_model(folder)
    names = ("model.norm.weight", "model.layers.0.mlp.up_proj", "model.extra.weight")
    assert all(name in str(caught.value) for name in names)
