"""Tables of tuned tiles: JSON files, one for each kind of GPU, that come before the rules of thumb.

    {"device_kind": "NVIDIA H200", "kernel_version": 1, "layout_version": 1, "made": {...},
     "entries": [{"bits": 4, "group_size": 128, "in_features": 4096, "out_features": 4096,
                  "tokens": 16, "x_dtype": "bfloat16", "schedule": {"block_m": 16, ...}}, ...]}

An entry stands for what is near the shape that was timed: K, N and M within a factor of two, groups
of the same class. The nearest one is used. A table is looked for in $JAXWNA16_TILES (a file, or a
folder of files), the user's cache folder, and this package, in that order. It is used as a whole or
refused as a whole; a GPU that nobody described (`device.UNKNOWN`) has none.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import functools
import json
import math
import os
import re
import reprlib
import typing
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import jax.numpy as jnp

from pallas_kernels.device import UNKNOWN, Device
from pallas_kernels.errors import TableError
from pallas_kernels.schedule import PREFILL, Schedule, Tiles, find_faults
from pallas_kernels.spec import LAYOUT_VERSION, QuantSpec

KERNEL_VERSION = 1
"""Version of the kernels that tiles are tuned for; it changes when timings would be misleading."""

FOLDER_VARIABLE = "JAXWNA16_TILES"
_PACKAGED = Path(__file__).parent / "tiles"
_MAX_TOKENS = 4096
_MAX_BYTES = 4 << 20
_MAX_INTEGER = 2**31 - 1
_MAX_FAULTS = 20
_WAY_OUT = "delete or mend the file; `jaxwna16 bench --tune` makes a table anew"
_HEADER = ("device_kind", "kernel_version", "layout_version", "made")
_ALLOWED = {
    "bits": (4, 8),
    "group_size": (32, 64, 128),
    "tokens": tuple(1 << i for i in range(_MAX_TOKENS.bit_length())),
    "x_dtype": ("bfloat16", "float16"),
}
_TILE_TYPES = typing.get_type_hints(Tiles)


@dataclasses.dataclass(frozen=True)
class Entry:
    """One tuned shape, and what was fastest for it.

    Attributes:
      bits: 4 or 8.
      group_size: 32, 64 or 128; any other becomes its class, see `classify_group`.
      in_features, out_features: K and N that were timed.
      tokens: M that was timed, as a power of two up to 4096; any other is rounded up.
      x_dtype: "bfloat16" or "float16".
      schedule: the fastest.
    """

    bits: int
    group_size: int
    in_features: int
    out_features: int
    tokens: int
    x_dtype: str
    schedule: Schedule

    def __post_init__(self):
        object.__setattr__(self, "group_size", classify_group(self.group_size))
        object.__setattr__(self, "tokens", round_up_bucket(self.tokens))

    @property
    def key(self) -> tuple[int, int, int, int, int, str]:
        """All but the schedule; a table has each once."""
        shape = (self.in_features, self.out_features, self.tokens)
        return (self.bits, self.group_size, *shape, self.x_dtype)


@dataclasses.dataclass(frozen=True)
class TileTable:
    """All entries for one kind of GPU; `made` says by what and when."""

    device_kind: str
    entries: tuple[Entry, ...]
    made: Mapping[str, str]


def classify_group(group_size: int) -> int:
    """The class of a group size, 32, 64 or 128: the next one up, and the last for all above.

    Groups differ to a kernel by how many scales it meets in a step along K, and a step is hardly
    longer than 128.
    """
    return next((size for size in _ALLOWED["group_size"] if group_size <= size), 128)


def round_up_bucket(tokens: int) -> int:
    """The bucket of M: the next power of two, at most 4096."""
    return min(_MAX_TOKENS, 1 << max(0, tokens - 1).bit_length())


def load_schedule(
    device: Device, spec: QuantSpec, tokens: int, x_dtype, scale_dtype
) -> Schedule | None:
    """What the device's table says of a product, None where there is no table or no entry.

    Raises:
      TableError: if the table is wrong or stale, or is one for another device.
    """
    path = None if device.kind == UNKNOWN.kind else find_table_path(device.kind)
    if path is None:
        return None
    table = read_table(path)
    if table.device_kind != device.kind:
        _refuse(path, [f"device_kind must be {device.kind!r}, found {_show(table.device_kind)}"])
    return find_schedule(table, device, spec, tokens, x_dtype, scale_dtype)


def find_schedule(
    table: TileTable, device: Device, spec: QuantSpec, tokens: int, x_dtype, scale_dtype
) -> Schedule | None:
    """The schedule of the nearest entry that can run, None if no entry is near.

    Nearest is the least distance in K and N (as logarithms), and among equals the nearest M.
    """
    kind = (spec.bits, classify_group(spec.group_size), jnp.dtype(x_dtype).name)
    scales_fit = jnp.dtype(scale_dtype) == jnp.dtype(x_dtype)
    bucket = round_up_bucket(tokens)
    near = [
        entry
        for entry in table.entries
        if (entry.bits, entry.group_size, entry.x_dtype) == kind
        and _is_near(entry, spec, bucket)
        and (scales_fit or not _multiplies_weight(entry.schedule))
        and not _find_schedule_faults(entry.schedule, spec, device)
    ]
    return min(near, key=lambda entry: _rank(entry, spec, bucket)).schedule if near else None


def _is_near(entry: Entry, spec: QuantSpec, bucket: int) -> bool:
    here = (spec.in_features, spec.out_features, bucket)
    there = (entry.in_features, entry.out_features, entry.tokens)
    if any(max(pair) > 2 * min(pair) for pair in zip(here, there, strict=True)):
        return False
    if not isinstance(entry.schedule, Tiles):
        return bucket >= entry.tokens  # expanding pays the more the more tokens share it
    # each weight is to be read as often as when this was timed
    block = entry.schedule.block_m
    return -(-bucket // block) == -(-entry.tokens // block)


def _multiplies_weight(schedule: Schedule) -> bool:
    return isinstance(schedule, Tiles) and schedule.scale_on == "weight"


def _rank(entry: Entry, spec: QuantSpec, bucket: int) -> tuple[float, ...]:
    away = (
        abs(math.log2(spec.in_features / entry.in_features)),
        abs(math.log2(spec.out_features / entry.out_features)),
    )
    away_in_tokens = abs(math.log2(bucket / entry.tokens))
    return (sum(away), away_in_tokens, -entry.tokens, entry.in_features, entry.out_features)


def _find_schedule_faults(schedule: Schedule, spec: QuantSpec, device: Device) -> list[str]:
    """Everything that keeps a kernel from running `schedule` on weights of `spec`."""
    if not isinstance(schedule, Tiles):
        return []
    faults = find_faults(schedule, spec, device)
    steps = 0 if faults else -(-spec.tiles_k * spec.tile_k // schedule.block_k)
    if not faults and schedule.splits > 2 * steps:
        faults = [f"splits must be at most {2 * steps}, two a step of K, found {schedule.splits}"]
    return faults


def find_table_path(device_kind: str) -> Path | None:
    """The table of this kind of GPU, None if there is none.

    Raises:
      TableError: if $JAXWNA16_TILES names nothing that exists.
    """
    chosen = os.environ.get(FOLDER_VARIABLE)
    if chosen and not os.path.exists(os.path.expanduser(chosen)):
        raise TableError(
            f"{FOLDER_VARIABLE} names {chosen!r}, which does not exist: name a table or a folder "
            "of tables, or unset it"
        )
    name = name_file(device_kind)
    places = (user_table_path(device_kind), _cache_folder() / name, _PACKAGED / name)
    # not Path.is_file, which stops at a folder that may not be read
    return next((place for place in places if os.path.isfile(place)), None)


def user_table_path(device_kind: str) -> Path:
    """Where the tuner writes by default: as $JAXWNA16_TILES says, else the user's cache folder.

    What the variable names is a file if it is one or ends in .json, else a folder.
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
    """Write a table, beside its final name and then renamed; equal tables give equal files.

    Raises:
      TableError: if `read_table` would refuse it, or the file system does; nothing is changed then.
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
        f"  {json.dumps(name)}: {json.dumps(value, sort_keys=True)},"
        for name, value in zip(_HEADER, values, strict=True)
    ]
    entries = [
        "    " + json.dumps(dataclasses.asdict(entry), sort_keys=True)
        for entry in sorted(table.entries, key=lambda entry: entry.key)
    ]
    return "\n".join(["{", *header, '  "entries": [', ",\n".join(entries), "  ]", "}", ""])


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
        _refuse(path, [f"a table has at most {_MAX_BYTES} bytes, this file more"])
    try:
        content = json.loads(text, object_pairs_hook=_make_object)
    except (ValueError, RecursionError) as error:
        _refuse(path, [f"it is not JSON as expected: {error}"])
    faults = _find_wrong_names(content, (*_HEADER, "entries"), "the table")
    if not faults:
        faults = _find_header_faults(content)
    if faults:
        _refuse(path, faults)
    # how many cores it has does not decide what can run
    device = Device(content["device_kind"], UNKNOWN.cores)
    entries = []
    for i, raw in enumerate(content["entries"]):
        entry, found = _parse_entry(raw, device, f"entries[{i}]")
        entries += [entry] if entry else []
        faults += found
    counts = collections.Counter(entry.key for entry in entries)
    faults += [f"{count} entries for {key}" for key, count in counts.items() if count > 1]
    if faults:
        _refuse(path, faults)
    return TileTable(content["device_kind"], tuple(entries), content["made"])


def _make_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    counts = collections.Counter(name for name, _ in pairs)
    if twice := [name for name, count in counts.items() if count > 1]:
        raise ValueError(f"{_show(twice[0])} stands twice in one object")
    return dict(pairs)


def _find_wrong_names(raw: Any, names: Collection[str], where: str) -> list[str]:
    if not isinstance(raw, dict):
        return [f"{where} must be an object, found {_show(raw)}"]
    missing = [f"{where} lacks {name}" for name in names if name not in raw]
    return missing + [f"{where} has an unknown {_show(n)}" for n in raw if n not in names]


def _find_header_faults(content: dict[str, Any]) -> list[str]:
    faults = []
    for name, wanted in (("kernel_version", KERNEL_VERSION), ("layout_version", LAYOUT_VERSION)):
        found = content[name]
        if type(found) is not int or found != wanted:
            faults.append(f"{name} must be {wanted}, found {_show(found)}: the table is stale")
    kind, made, entries = content["device_kind"], content["made"], content["entries"]
    if not isinstance(kind, str) or not kind.isprintable():
        faults.append(f"device_kind must be printable text, found {_show(kind)}")
    if not isinstance(made, dict) or not all(isinstance(text, str) for text in made.values()):
        faults.append(f"made must map names to text, found {_show(made)}")
    if not isinstance(entries, list):
        faults.append(f"entries must be a list, found {_show(entries)}")
    return faults


def _parse_entry(raw: Any, device: Device, where: str) -> tuple[Entry | None, list[str]]:
    """The entry, or None and what is wrong with it."""
    if faults := _find_wrong_names(raw, [f.name for f in dataclasses.fields(Entry)], where):
        return None, faults
    for name, allowed in _ALLOWED.items():
        if type(raw[name]) is not type(allowed[0]) or raw[name] not in allowed:
            wanted = ", ".join(map(str, allowed))
            faults.append(f"{where}.{name} must be one of {wanted}, found {_show(raw[name])}")
    for name in ("in_features", "out_features"):
        faults += _find_wrong_type(raw[name], int, f"{where}.{name}")
    schedule = raw["schedule"]
    if schedule != PREFILL:
        where = f"{where}.schedule"
        found = _find_wrong_names(schedule, _TILE_TYPES, where)
        if not found:
            for name, kind in _TILE_TYPES.items():
                found += _find_wrong_type(schedule[name], kind, f"{where}.{name}")
        faults += found
        schedule = schedule if faults else Tiles(**schedule)
    if faults:
        return None, faults
    spec = QuantSpec(
        bits=raw["bits"],
        group_size=-1,  # its class need not divide K
        symmetric=False,
        in_features=raw["in_features"],
        out_features=raw["out_features"],
    )
    found = _find_schedule_faults(schedule, spec, device)
    if found:
        return None, [f"{where}: {fault}" for fault in found]
    return Entry(**{**raw, "schedule": schedule}), []


def _find_wrong_type(value: Any, kind: type, where: str) -> list[str]:
    if kind is not int:
        wanted, is_good = "text", type(value) is kind
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
