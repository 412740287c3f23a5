"""Tables of tuned tiles: JSON files, one for each kind of GPU, that come before the rules of thumb.

    {"device_kind": "NVIDIA H200", "kernel_version": 1, "layout_version": 1, "made": {...},
     "entries": [{"bits": 4, "group_size": 128, "in_features": 4096, "out_features": 4096,
                  "tokens": 16, "x_dtype": "bfloat16", "schedule": {"block_m": 16, ...}}, ...],
     "experts": [{"bits": 4, "group_size": 128, "hidden": 2048, "intermediate": 768, "experts": 128,
                  "top_k": 8, "tokens": 16, "x_dtype": "bfloat16",
                  "schedule": {"first": {...}, "second": {...}, "direct": false}}, ...]}

`experts` may be missing, and so may `ahead`, a number of bytes (`pallas_kernels.tiles.ahead`).
`pallas_kernels.tiles.entries` says which entry serves a product. A table
is looked for in $JAXWNA16_TILES (a file, or a folder of files), the user's cache folder, and this
package, in that order. It is used as a whole or refused as a whole. A GPU that nobody described
(`device.UNKNOWN`) has no table.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import functools
import json
import os
import re
import reprlib
import typing
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, NoReturn

from pallas_kernels.errors import TableError
from pallas_kernels.format.spec import LAYOUT_VERSION, QuantSpec
from pallas_kernels.tiles.device import UNKNOWN, Device
from pallas_kernels.tiles.entries import (
    GROUP_CLASSES,
    MAX_TOKENS,
    Entry,
    MoeEntry,
    TileTable,
    find_moe_schedule,
    find_schedule,
)
from pallas_kernels.tiles.expert_tiles import MoeTiles, Specs
from pallas_kernels.tiles.tiles import PREFILL, Schedule, Tiles

KERNEL_VERSION = 1
"""Version of the kernels that tiles are tuned for; it changes when timings would be misleading."""

FOLDER_VARIABLE = "JAXWNA16_TILES"
_PACKAGED = Path(__file__).parent
_MAX_BYTES = 4 << 20
_MAX_AHEAD = 128 << 20
_MAX_INTEGER = 2**31 - 1
_MAX_FAULTS = 20
_WAY_OUT = "delete or correct the file; `jaxwna16 bench --tune` makes a new table"
_HEADER = ("device_kind", "kernel_version", "layout_version", "made")
_LISTS = ("entries", "experts")
_ALLOWED = {
    "bits": (4, 8),
    "group_size": GROUP_CLASSES,
    "tokens": tuple(1 << i for i in range(MAX_TOKENS.bit_length())),
    "x_dtype": ("bfloat16", "float16"),
}
_TILE_TYPES = typing.get_type_hints(Tiles)


def load_schedule(
    device: Device, spec: QuantSpec, tokens: int, x_dtype, scale_dtype
) -> Schedule | None:
    """The schedule of a product in the device's table, None if there is no table or no entry.

    Raises:
      TableError: if the table is wrong or stale, or is one for another device.
    """
    table = _load_table(device)
    return table and find_schedule(table, device, spec, tokens, x_dtype, scale_dtype)


def load_moe_schedule(
    device: Device,
    specs: Specs,
    experts: int,
    tokens: int,
    top_k: int,
    x_dtype,
    scale_dtypes: Sequence,
) -> MoeTiles | None:
    """The tiles of gated experts in the device's table, as `load_schedule`.

    Raises:
      TableError: as `load_schedule`.
    """
    table = _load_table(device)
    facts = (specs, experts, tokens, top_k, x_dtype, scale_dtypes)
    return table and find_moe_schedule(table, device, *facts)


def load_ahead(device: Device) -> int:
    """`ahead` of the device's table; 0 without a table.

    Raises:
      TableError: as `load_schedule`.
    """
    table = _load_table(device)
    return 0 if table is None else table.ahead


def _load_table(device: Device) -> TileTable | None:
    path = None if device.kind == UNKNOWN.kind else find_table_path(device.kind)
    if path is None:
        return None
    table = read_table(path)
    if table.device_kind != device.kind:
        _refuse(path, [f"device_kind must be {device.kind!r}, found {_show(table.device_kind)}"])
    return table


def find_table_path(device_kind: str) -> Path | None:
    """The table of this kind of GPU, None if there is none.

    Raises:
      TableError: if $JAXWNA16_TILES names a path that does not exist.
    """
    chosen = os.environ.get(FOLDER_VARIABLE)
    if chosen and not os.path.exists(os.path.expanduser(chosen)):
        raise TableError(
            f"{FOLDER_VARIABLE} names {chosen!r}, which does not exist: name a table or a folder "
            "of tables, or unset it"
        )
    name = name_file(device_kind)
    places = (user_table_path(device_kind), _cache_folder() / name, _PACKAGED / name)
    # not Path.is_file, which raises for a folder that may not be read
    return next((place for place in places if os.path.isfile(place)), None)


def user_table_path(device_kind: str) -> Path:
    """Where the tuner writes by default: $JAXWNA16_TILES, else the user's cache folder.

    The variable names a file if there is one or its name ends in .json, else a folder.
    """
    chosen = os.environ.get(FOLDER_VARIABLE)
    place = Path(os.path.expanduser(chosen)) if chosen else _cache_folder()
    is_file = os.path.isfile(place) or (place.suffix == ".json" and not os.path.isdir(place))
    return place if is_file else place / name_file(device_kind)


def _cache_folder() -> Path:
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(cache) / "jaxwna16" / "tiles"


def name_file(device_kind: str) -> str:
    """The name of a table in its folder: "NVIDIA H200" -> "nvidia-h200.json"."""
    return re.sub(r"[^a-z0-9]+", "-", device_kind.lower()).strip("-") + ".json"


def write_table(path: str | os.PathLike, table: TileTable) -> None:
    """Write a table beside its final name, then rename it. Equal tables give equal files.

    Raises:
      TableError: if `read_table` would refuse it, or it cannot be written. Nothing is changed then.
    """
    path = Path(path)
    text = _format(table)
    _parse(text.encode(), path)
    beside = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        beside.write_text(text, encoding="utf-8")
        beside.replace(path)
    except OSError as error:
        raise TableError(f"{path}: this table cannot be written: {error}") from error
    finally:
        with contextlib.suppress(OSError):  # the fault above says more
            beside.unlink()


def _format(table: TileTable) -> str:
    """JSON with one line for each entry, so that tables can be compared line by line."""
    values = (table.device_kind, KERNEL_VERSION, LAYOUT_VERSION, dict(table.made))
    header = [
        f"  {json.dumps(name)}: {json.dumps(value, sort_keys=True)}"
        for name, value in zip(_HEADER, values, strict=True)
    ]
    header += [f'  "ahead": {table.ahead}'] if table.ahead else []
    lists = [
        "\n".join([f'  "{name}": [', ",\n".join(_format_entries(getattr(table, name))), "  ]"])
        for name in _LISTS
    ]
    return "{\n" + ",\n".join([*header, *lists]) + "\n}\n"


def _format_entries(entries: Sequence[Entry | MoeEntry]) -> list[str]:
    ordered = sorted(entries, key=lambda entry: entry.key)
    return ["    " + json.dumps(dataclasses.asdict(entry), sort_keys=True) for entry in ordered]


def read_table(path: str | os.PathLike) -> TileTable:
    """Read a table and check all of it; a file that has not changed is not read again.

    Raises:
      TableError: listing everything that is wrong with the file.
    """
    path = Path(path).absolute()
    try:
        status = path.stat()
        if not path.is_file():
            _refuse(path, ["it is not a file"])
        return _read(path, status.st_mtime_ns, status.st_size)
    except OSError as error:
        raise TableError(f"{path}: this table cannot be read: {error}") from error


@functools.lru_cache(maxsize=8)
def _read(path: Path, modified_ns: int, size: int) -> TileTable:
    del modified_ns, size  # they tell one state of the file from another
    with path.open("rb") as file:
        return _parse(file.read(_MAX_BYTES + 1), path)


def _parse(text: bytes, path: Path) -> TileTable:
    if len(text) > _MAX_BYTES:
        _refuse(path, [f"a table has at most {_MAX_BYTES} bytes, this file has more"])
    try:
        content = json.loads(text, object_pairs_hook=_make_object)
    except (ValueError, RecursionError) as error:
        _refuse(path, [f"it cannot be read as JSON: {error}"])
    faults = _find_wrong_names(
        content, (*_HEADER, "entries"), "the table", optional=("experts", "ahead")
    )
    if not faults:
        faults = _find_header_faults(content)
    if faults:
        _refuse(path, faults)
    # the number of cores has no influence on what can run
    device = Device(content["device_kind"], UNKNOWN.cores)
    entries, found = _parse_entries(content["entries"], Entry, device, "entries")
    experts, more = _parse_entries(content.get("experts", []), MoeEntry, device, "experts")
    if faults := [*found, *more]:
        _refuse(path, faults)
    ahead = content.get("ahead", 0)
    return TileTable(content["device_kind"], entries, content["made"], experts, ahead)


def _make_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    counts = collections.Counter(name for name, _ in pairs)
    if twice := [name for name, count in counts.items() if count > 1]:
        raise ValueError(f"{_show(twice[0])} appears twice in one object")
    return dict(pairs)


def _find_wrong_names(
    raw: Any, names: Collection[str], where: str, optional: Collection[str] = ()
) -> list[str]:
    if not isinstance(raw, dict):
        return [f"{where} must be an object, found {_show(raw)}"]
    missing = [f"{where} lacks {name}" for name in names if name not in raw]
    known = {*names, *optional}
    return missing + [f"{where} has an unknown {_show(n)}" for n in raw if n not in known]


def _find_header_faults(content: dict[str, Any]) -> list[str]:
    faults = []
    for name, wanted in (("kernel_version", KERNEL_VERSION), ("layout_version", LAYOUT_VERSION)):
        found = content[name]
        if type(found) is not int or found != wanted:
            faults.append(f"{name} must be {wanted}, found {_show(found)}: the table is stale")
    kind, made = content["device_kind"], content["made"]
    if not isinstance(kind, str) or not kind.isprintable():
        faults.append(f"device_kind must be printable text, found {_show(kind)}")
    if not isinstance(made, dict) or not all(isinstance(text, str) for text in made.values()):
        faults.append(f"made must map names to text, found {_show(made)}")
    ahead = content.get("ahead", 0)
    if type(ahead) is not int or not 0 <= ahead <= _MAX_AHEAD:
        faults.append(f"ahead must be 0 to {_MAX_AHEAD} bytes, found {_show(ahead)}")
    for name in _LISTS:
        if not isinstance(content.get(name, []), list):
            faults.append(f"{name} must be a list, found {_show(content[name])}")
    return faults


def _parse_entries(raws: list, kind: type, device: Device, name: str) -> tuple[tuple, list[str]]:
    """The valid entries of a list, and the faults of the others."""
    entries, faults = [], []
    for i, raw in enumerate(raws):
        entry, found = _parse_entry(raw, kind, device, f"{name}[{i}]")
        entries += [entry] if entry else []
        faults += found
    counts = collections.Counter(entry.key for entry in entries)
    twice = [f"{count} {name} for {key}" for key, count in counts.items() if count > 1]
    return tuple(entries), faults + twice


def _parse_entry(raw: Any, kind: type, device: Device, where: str) -> tuple[Any, list[str]]:
    """The entry, of class `kind` (`Entry` or `MoeEntry`), or None and its faults."""
    if faults := _find_wrong_names(raw, [f.name for f in dataclasses.fields(kind)], where):
        return None, faults
    for name, allowed in _ALLOWED.items():
        if type(raw[name]) is not type(allowed[0]) or raw[name] not in allowed:
            wanted = ", ".join(map(str, allowed))
            faults.append(f"{where}.{name} must be one of {wanted}, found {_show(raw[name])}")
    for name in kind.SIZES:
        faults += _find_wrong_type(raw[name], int, f"{where}.{name}")
    parse = _parse_schedule if kind is Entry else _parse_moe_tiles
    schedule, found = parse(raw["schedule"], f"{where}.schedule")
    if faults := [*faults, *found]:
        return None, faults
    entry = kind(**{**raw, "schedule": schedule})
    if found := entry.find_faults(device):
        return None, [f"{where}.schedule: {fault}" for fault in found]
    return entry, []


def _parse_schedule(raw: Any, where: str) -> tuple[Schedule | None, list[str]]:
    return (PREFILL, []) if raw == PREFILL else _parse_tiles(raw, where)


def _parse_moe_tiles(raw: Any, where: str) -> tuple[MoeTiles | None, list[str]]:
    if faults := _find_wrong_names(raw, ("first", "second", "direct"), where):
        return None, faults
    first, faults = _parse_tiles(raw["first"], f"{where}.first")
    second, found = _parse_tiles(raw["second"], f"{where}.second")
    faults = [*faults, *found, *_find_wrong_type(raw["direct"], bool, f"{where}.direct")]
    if first is None or second is None or faults:
        return None, faults
    return MoeTiles(first=first, second=second, direct=raw["direct"]), []


def _parse_tiles(raw: Any, where: str) -> tuple[Tiles | None, list[str]]:
    faults = _find_wrong_names(raw, _TILE_TYPES, where)
    if not faults:
        for name, kind in _TILE_TYPES.items():
            faults += _find_wrong_type(raw[name], kind, f"{where}.{name}")
    return (None, faults) if faults else (Tiles(**raw), [])


def _find_wrong_type(value: Any, kind: type, where: str) -> list[str]:
    if kind is not int:
        wanted, is_good = {str: "text", bool: "true or false"}[kind], type(value) is kind
    else:
        wanted = f"an integer from 1 to {_MAX_INTEGER}"
        is_good = type(value) is int and 1 <= value <= _MAX_INTEGER
    return [] if is_good else [f"{where} must be {wanted}, found {_show(value)}"]


def _refuse(path: Path, faults: Sequence[str]) -> NoReturn:
    more = len(faults) - _MAX_FAULTS
    listed = [*faults[:_MAX_FAULTS], *([f"and {more} more"] if more > 0 else [])]
    summary = f"{path}: this table of tuned tiles cannot be used: {_WAY_OUT}"
    raise TableError("\n  - ".join([summary, *listed]))


_show = reprlib.Repr().repr
