"""Tables of tuned tiles as files: what is written comes back, all else is refused."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import json
import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels.errors import TableError
from pallas_kernels.tiles import tables as tile_tables
from pallas_kernels.tiles.dense_rules import list_candidates
from pallas_kernels.tiles.device import Device
from pallas_kernels.tiles.entries import (
    Entry,
    MoeEntry,
    TileTable,
    find_moe_schedule,
    find_schedule,
)
from pallas_kernels.tiles.expert_rules import list_moe_candidates
from pallas_kernels.tiles.tables import name_file, read_table, write_table
from tests.tables import (
    FEW,
    H200,
    TILES,
    WIDE,
    make_entry,
    make_moe_entry,
    make_moe_specs,
    make_spec,
    make_table,
)


def _entries(device: Device) -> st.SearchStrategy[Entry]:
    def list_schedules(spec, tokens, dtype):
        return list_candidates(spec, tokens, dtype, dtype, device)

    @st.composite
    def draw_entry(draw):
        bits, group = draw(st.sampled_from([4, 8])), draw(st.sampled_from([32, 64, 128, -1]))
        k = 128 * draw(st.integers(1, 300))
        spec = make_spec(k, draw(st.integers(1, 40000)), bits=bits, group_size=group)
        tokens = draw(st.integers(1, 5000))
        dtype = draw(st.sampled_from(["bfloat16", "float16"]))
        return Entry(
            bits=bits,
            group_size=spec.group_size,
            in_features=k,
            out_features=spec.out_features,
            tokens=tokens,
            x_dtype=dtype,
            schedule=draw(st.sampled_from(list_schedules(spec, tokens, dtype))),
        )

    return draw_entry()


def _moe_entries(device: Device) -> st.SearchStrategy[MoeEntry]:
    @st.composite
    def draw_entry(draw):
        bits, group = draw(st.sampled_from([4, 8])), draw(st.sampled_from([32, 64, 128, -1]))
        hidden, middle = (128 * draw(st.integers(1, 60)) for _ in range(2))
        experts, tokens = draw(st.integers(1, 300)), draw(st.integers(1, 5000))
        top_k = draw(st.integers(1, min(experts, 16)))
        dtype = draw(st.sampled_from(["bfloat16", "float16"]))
        specs = make_moe_specs(hidden, middle, bits=bits, group_size=group)
        facts = (specs, experts, tokens, top_k, dtype, (dtype, dtype), device)
        return MoeEntry(
            bits=bits,
            group_size=specs[0].group_size,
            hidden=hidden,
            intermediate=middle,
            experts=experts,
            top_k=top_k,
            tokens=tokens,
            x_dtype=dtype,
            schedule=draw(st.sampled_from(list_moe_candidates(*facts))),
        )

    return draw_entry()


_numbers = itertools.count()


def _name_new_file(factory) -> Path:
    """A file that was never read: two of one size within a tick of the clock look alike."""
    return factory.getbasetemp() / f"{next(_numbers)}.json"


@settings(deadline=None, max_examples=60)
@given(data=st.data(), kind=st.sampled_from(["NVIDIA H200", "NVIDIA A100-SXM4-80GB", "NVIDIA L4"]))
def test_what_the_tuner_may_choose_is_written_and_read_back(data, kind, tmp_path_factory):
    device = Device(kind, data.draw(st.integers(1, 200)))
    entries = data.draw(st.lists(_entries(device), max_size=5, unique_by=lambda entry: entry.key))
    unique = {"max_size": 4, "unique_by": lambda entry: entry.key}
    experts = data.draw(st.lists(_moe_entries(device), **unique))
    made = data.draw(st.dictionaries(st.text(), st.text(), max_size=3))
    ahead = data.draw(st.integers(0, 1 << 27))
    table = TileTable(kind, tuple(entries), made, tuple(experts), ahead)
    path = _name_new_file(tmp_path_factory)
    write_table(path, table)
    back = read_table(path)
    assert (back.device_kind, back.ahead) == (kind, ahead)
    assert back.made == made
    assert back.entries == tuple(sorted(entries, key=lambda entry: entry.key))
    assert back.experts == tuple(sorted(experts, key=lambda entry: entry.key))
    first = path.read_bytes()
    turned = {"entries": table.entries[::-1], "experts": table.experts[::-1]}
    write_table(path, dataclasses.replace(table, **turned))
    assert path.read_bytes() == first
    for entry in entries:
        spec = make_spec(entry.in_features, entry.out_features, bits=entry.bits, group_size=-1)
        spec = dataclasses.replace(spec, group_size=min(spec.in_features, entry.group_size))
        found = find_schedule(back, device, spec, entry.tokens, entry.x_dtype, entry.x_dtype)
        assert found == entry.schedule
    for entry in experts:
        specs = make_moe_specs(entry.hidden, entry.intermediate, bits=entry.bits, group_size=-1)
        specs = tuple(
            dataclasses.replace(spec, group_size=min(spec.in_features, entry.group_size))
            for spec in specs
        )
        facts = (specs, entry.experts, entry.tokens, entry.top_k, entry.x_dtype)
        assert find_moe_schedule(back, device, *facts, (entry.x_dtype,) * 2) == entry.schedule


def test_every_line_is_one_entry(tmp_path):
    write_table(tmp_path / "t.json", make_table(make_entry(8192), make_entry(4096)))
    lines = (tmp_path / "t.json").read_text().splitlines()
    assert [i for i, line in enumerate(lines) if '"in_features": 4096' in line] == [6]
    assert [i for i, line in enumerate(lines) if '"in_features": 8192' in line] == [7]


def test_a_table_made_before_there_were_experts_is_read(tmp_path):
    content = _content()
    assert content.pop("experts") == []
    path = tmp_path / "t.json"
    path.write_text(json.dumps(content))
    table = read_table(path)
    assert table.entries == (make_entry(),)
    assert table.experts == ()


def test_a_table_that_could_not_be_read_is_not_written(tmp_path):
    path = tmp_path / "t.json"
    write_table(path, make_table(make_entry()))
    before = path.read_bytes()
    for bad in (make_entry(bits=3), make_entry(schedule=dataclasses.replace(TILES, warps=3))):
        with pytest.raises(TableError, match=r"t\.json"):
            write_table(path, make_table(bad))
    with pytest.raises(TableError, match="2 entries for"):
        write_table(path, make_table(make_entry(tokens=15), make_entry(tokens=16)))
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["t.json"]


def test_a_place_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "folder").mkdir()
    for name in ("file/t.json", "folder"):
        with pytest.raises(TableError, match=f"{name}: this table cannot be written"):
            write_table(tmp_path / name, make_table())
    assert sorted(os.listdir(tmp_path)) == ["file", "folder"]


def test_a_file_is_read_again_only_when_it_has_changed(tmp_path):
    path = tmp_path / "t.json"
    write_table(path, make_table(make_entry()))
    first = read_table(path)
    assert read_table(path) is first
    write_table(path, make_table(make_entry(), make_entry(tokens=32)))
    assert len(read_table(path).entries) == 2


# What is refused


def _content(*entries: Entry | MoeEntry) -> dict:
    """A good table as JSON gives it, to be spoiled."""
    return json.loads(tile_tables._format(make_table(*entries or [make_entry()])))


def _spoil(change) -> dict:
    content = _content()
    change(content)
    return content


def _set(name, value):
    return lambda content: content.__setitem__(name, value)


def _set_entry(name, value):
    return lambda content: content["entries"][0].__setitem__(name, value)


def _set_tiles(name, value):
    return lambda content: content["entries"][0]["schedule"].__setitem__(name, value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_set("kernel_version", 0), r"kernel_version must be 1, found 0: the table is stale"),
        (_set("layout_version", 2), r"layout_version must be 1, found 2: the table is stale"),
        (_set("layout_version", True), "layout_version must be 1, found True"),
        (_set("device_kind", 200), "device_kind must be printable text, found 200"),
        (_set("device_kind", "\x1b[2J"), r"device_kind must be printable text, found '.x1b"),
        (_set("made", {"jax": 10}), r"made must map names to text, found {'jax': 10}"),
        (_set("entries", {}), r"entries must be a list, found {}"),
        (_set("ahead", -1), r"ahead must be 0 to 134217728 bytes, found -1"),
        (_set("ahead", True), r"ahead must be 0 to 134217728 bytes, found True"),
        (_set("extra", 1), "the table has an unknown 'extra'"),
        (lambda content: content.pop("made"), "the table lacks made"),
        (lambda content: content["entries"].append(7), r"entries\[1\] must be an object, found 7"),
        (lambda c: c["entries"][0].pop("bits"), r"entries\[0\] lacks bits"),
        (_set_entry("comment", ""), r"entries\[0\] has an unknown 'comment'"),
        (_set_entry("bits", 3), r"entries\[0\]\.bits must be one of 4, 8, found 3"),
        (_set_entry("bits", 4.0), r"entries\[0\]\.bits must be one of 4, 8, found 4\.0"),
        (_set_entry("group_size", 256), r"group_size must be one of 32, 64, 128, found 256"),
        (_set_entry("tokens", 100), r"tokens must be one of 1, 2, 4, .*4096, found 100"),
        (_set_entry("tokens", True), r"tokens must be one of .*, found True"),
        (_set_entry("x_dtype", "float32"), "x_dtype must be one of bfloat16, float16, found 'fl"),
        (_set_entry("in_features", 0), "in_features must be an integer from 1 to 2147483647, fou"),
        (_set_entry("out_features", 10**4000), "out_features must be an integer from 1 to 2147"),
        (_set_entry("schedule", "decode"), r"schedule must be an object, found 'decode'"),
        (_set_tiles("block_m", 12), r"schedule: block_m must be one of .*, got 12"),
        (_set_tiles("block_m", 16.0), r"schedule\.block_m must be an integer from 1 .*found 16\.0"),
        (_set_tiles("block_k", 96), r"schedule: block_k must be a multiple of 128, got 96"),
        (_set_tiles("warps", None), r"schedule\.warps must be an integer .*, found None"),
        (_set_tiles("splits", 65), "schedule: splits must be at most 64, two for each step of K"),
        (_set_tiles("scale_on", "x"), "schedule: scale_on must be one of"),
        (_set_tiles("scale_on", 1), "schedule.scale_on must be text, found 1"),
        (_set_tiles("clusters", 2), r"schedule has an unknown 'clusters'"),
        (_set_tiles("block_k", 4096), r"schedule: \d+ bytes of shared memory are needed"),
        (lambda c: c["entries"].append(c["entries"][0]), r"2 entries for \(4, 128, 4096, 4096, 16"),
    ],
)
def test_a_wrong_table_is_refused_by_place_and_value(change, message, tmp_path):
    path = tmp_path / "t.json"
    path.write_text(json.dumps(_spoil(change)))
    with pytest.raises(TableError, match=message) as caught:
        read_table(path)
    assert str(caught.value).startswith(f"{path}: this table of tuned tiles cannot be used: delete")
    assert "`jaxwna16 bench --tune`" in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"", "cannot be read as JSON: Expecting value"),
        (b"{", "cannot be read as JSON"),
        (b"\xff\xfe\x00\xd8", "cannot be read as JSON"),
        (b"[" * 200_000, "cannot be read as JSON"),
        (b"9" * 5000, "cannot be read as JSON"),
        (b"[]", r"the table must be an object, found \[\]"),
        (b'{"made": {"a": "1", "a": "2"}}', "'a' appears twice in one object"),
        (b" " * ((4 << 20) + 1), "a table has at most 4194304 bytes, this file has more"),
    ],
)
def test_a_file_that_is_no_table_is_refused(text, message, tmp_path):
    path = tmp_path / "t.json"
    path.write_bytes(text)
    with pytest.raises(TableError, match=message):
        read_table(path)


def test_a_path_that_is_no_file_is_refused(tmp_path):
    with pytest.raises(TableError, match="it is not a file"):
        read_table(tmp_path)
    with pytest.raises(TableError, match=r"gone\.json: this table cannot be read: .*No such file"):
        read_table(tmp_path / "gone.json")


def test_all_faults_are_listed_together(tmp_path):
    content = _content(*(make_entry(128 * i) for i in range(1, 31)))
    for entry in content["entries"]:
        entry["tokens"] = 3
    content["entries"][0]["bits"] = 5
    path = tmp_path / "t.json"
    path.write_text(json.dumps(content))
    with pytest.raises(TableError) as caught:
        read_table(path)
    lines = str(caught.value).split("\n  - ")
    assert lines[1].startswith("entries[0].bits must be")
    assert [line.partition(" ")[0] for line in lines[2:21]] == [
        f"entries[{i}].tokens" for i in range(19)
    ]
    assert lines[21:] == ["and 11 more"]


_JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.sampled_from([0, 1, 2, 3, 5, 8, 32, 64, 100, 128, 2048, 2**31, 10**4200, -(10**4200)])
    | st.floats()
    | st.text(max_size=6)
    | st.sampled_from(["prefill", "sum", "weight", "float16", "\ud800", "NVIDIA L4"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=4,
)


def _list_places(value, place=()):
    """The path to everything within a JSON value."""
    inner = value.items() if isinstance(value, dict) else enumerate(value)
    for name, part in inner:
        yield (*place, name)
        if isinstance(part, (dict, list)):
            yield from _list_places(part, (*place, name))


def _read_back(path: Path) -> str | None:
    """The table in the file as one text without order, None if it is refused."""
    try:
        table = read_table(path)
    except TableError as error:
        assert str(path) in str(error)
        str(error).encode()
        return None
    for entry in table.entries:
        spec = make_spec(entry.in_features, entry.out_features, bits=entry.bits, group_size=-1)
        find_schedule(table, H200, spec, entry.tokens, entry.x_dtype, entry.x_dtype)
    for entry in table.experts:
        specs = make_moe_specs(entry.hidden, entry.intermediate, bits=entry.bits, group_size=-1)
        facts = (specs, entry.experts, entry.tokens, entry.top_k, entry.x_dtype)
        find_moe_schedule(table, H200, *facts, (entry.x_dtype,) * 2)
    for k, n in ((1, 1), (4096, 4096), (28672, 8192)):
        find_schedule(table, H200, make_spec(k, n, group_size=-1), 16, "bfloat16", "bfloat16")
    return _normalize(json.loads(tile_tables._format(table)))


def _normalize(content: dict) -> str:
    lists = {
        name: sorted(json.dumps(entry, sort_keys=True) for entry in content.get(name, []))
        for name in ("entries", "experts")
    }
    return json.dumps({**content, **lists}, sort_keys=True)


@settings(deadline=None, max_examples=400)
@given(data=st.data())
def test_a_changed_field_is_refused_or_means_what_it_says(data, tmp_path_factory):
    """Whatever stands there: the table is as the file says, to the type, or a TableError."""
    good = _content(
        make_entry(),
        make_entry(tokens=64, schedule=WIDE),
        make_entry(tokens=4096, schedule="prefill"),
        make_moe_entry(),
        make_moe_entry(tokens=1, schedule=dataclasses.replace(FEW, direct=True)),
    )
    content = copy.deepcopy(good)
    *outer, last = data.draw(st.sampled_from(list(_list_places(good))))
    holder = content
    for name in outer:
        holder = holder[name]
    action = data.draw(st.sampled_from(["replace", "replace", "remove", "add"]))
    if action == "remove":
        del holder[last]
    elif action == "replace":
        holder[last] = data.draw(_JSON)
    elif isinstance(holder, dict):
        holder[data.draw(st.text(max_size=4))] = data.draw(_JSON)
    else:
        holder.append(data.draw(_JSON))
    path = _name_new_file(tmp_path_factory)
    path.write_text(json.dumps(content))
    found = _read_back(path)
    assert found is None or found == _normalize(content)


@settings(deadline=None, max_examples=200)
@given(data=st.data())
def test_changed_bytes_are_refused_or_a_table(data, tmp_path_factory):
    table = make_table(make_entry(), make_moe_entry())
    text = tile_tables._format(table).encode()
    start = data.draw(st.integers(0, len(text)))
    end = min(len(text), start + data.draw(st.integers(0, 20)))
    changed = text[:start] + data.draw(st.binary(max_size=8)) + text[end:]
    path = _name_new_file(tmp_path_factory)
    path.write_bytes(changed)
    found = _read_back(path)
    assert found is None or found == _normalize(json.loads(changed))


@pytest.mark.parametrize("path", sorted(tile_tables._PACKAGED.glob("*.json")), ids=lambda p: p.name)
def test_a_packaged_table_is_good_and_named_after_its_device(path):
    table = read_table(path)
    assert table.entries
    assert path.name == name_file(table.device_kind)
