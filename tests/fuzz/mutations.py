"""Mutations of checkpoints: each takes the files of one and breaks, or only rewrites, something.

A mutation is a function of Hypothesis' `draw` and of the files; it changes them in place and says
in a few words what it did. `MUTATIONS` lists all of them by name; those in `HARMLESS` change no
number, so that what they make has to load.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from hypothesis import strategies as st

from loaders.converted.manifest import MANIFEST, hash_table
from loaders.files.folder import CONFIG, INDEX, SINGLE
from tests.fuzz.bases import describe_weights, join_file
from tests.fuzz.files import FOLDER, PIPE, Entry, Link
from tests.fuzz.json_edits import dump, edit_tree, pick
from tests.fuzz.values import (
    BOUNDARIES,
    CODES,
    FIELDS,
    NAMES,
    OUTSIDE,
    SIZES,
    TARGETS,
    TOP,
    TRANSPOSED,
    WEIRD,
)

# what a mutation runs into where another one was before it
_NOTHING_TO_CHANGE = (
    *(AssertionError, AttributeError, LookupError, RecursionError, TypeError, ValueError),
)
Draw = Callable[[st.SearchStrategy], Any]
Files = dict[str, Entry]
Mutation = Callable[[Draw, Files], str]


def split_file(content: bytes) -> tuple[dict[str, Any], bytes]:
    """The header of a safetensors file, without its metadata, and the rest."""
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    header.pop("__metadata__", None)
    return header, content[8 + length :]


def _pick_weights(draw: Draw, files: Files) -> tuple[str, bytes]:
    name = pick(draw, [n for n, f in files.items() if n.endswith(".safetensors")])
    content = files[name]
    assert isinstance(content, bytes)
    return name, content


def _read(files: Files, name: str) -> Any:
    content = files[name]
    assert isinstance(content, bytes)
    return json.loads(content)


def _edit_bytes(draw: Draw, content: bytes, start: int, end: int) -> tuple[bytes, str]:
    """Replace, insert or delete a few bytes between two places."""
    at = draw(st.integers(start, max(start, end - 1)))
    new = draw(st.binary(max_size=8))
    kind = pick(draw, ["replace", "insert", "delete"])
    kept = at + {"replace": len(new), "insert": 0, "delete": draw(st.integers(1, 8))}[kind]
    new = b"" if kind == "delete" else new
    return content[:at] + new + content[min(kept, end) :], f"{kind} at {at}: {new!r}"


def change_header_bytes(draw: Draw, files: Files) -> str:
    name, content = _pick_weights(draw, files)
    length = int.from_bytes(content[:8], "little")
    header, what = _edit_bytes(draw, content[8 : 8 + length], 0, length)
    if draw(st.booleans()):
        files[name] = join_file(header, content[8 + length :])
    else:
        files[name] = content[:8] + header + content[8 + length :]
    return f"{name}: {what}"


def change_header_length(draw: Draw, files: Files) -> str:
    name, content = _pick_weights(draw, files)
    real = int.from_bytes(content[:8], "little")
    near = st.integers(max(0, real - 9), real + 9)
    length = draw(st.sampled_from(BOUNDARIES) | near | st.integers(0, 2**64 - 1))
    files[name] = length.to_bytes(8, "little") + content[8:]
    return f"{name}: header length {real} -> {length}"


def change_header_json(draw: Draw, files: Files) -> str:
    name, content = _pick_weights(draw, files)
    header, data = split_file(content)
    what = edit_tree(draw, header)
    files[name] = join_file(dump(header), data)
    return f"{name}: {what}"


def change_tensor_entry(draw: Draw, files: Files) -> str:
    """Another dtype, shape, place or name for one tensor, or those of another one."""
    name, content = _pick_weights(draw, files)
    header, data = split_file(content)
    key = pick(draw, sorted(header))
    entry, other = header[key], pick(draw, sorted(header))
    shape, offsets = entry["shape"], entry["data_offsets"]
    kind = pick(draw, ["dtype", "dim", "dims", "shape", "offset", "swap", "rename", "same bytes"])
    if kind == "dtype":
        entry["dtype"] = pick(draw, CODES)
    elif kind == "dim" and shape:
        at = draw(st.integers(0, len(shape) - 1))
        shape[at] = draw(st.sampled_from(SIZES) | st.just(shape[at] + 1) | st.just(shape[at] - 1))
    elif kind == "dims":
        entry["shape"] = pick(draw, [shape[::-1], [*shape, 1], [1, *shape], shape[1:], shape * 20])
    elif kind == "shape":
        entry["shape"] = draw(st.lists(st.sampled_from(SIZES), max_size=4))
    elif kind == "offset":
        at = draw(st.integers(0, 1))
        offsets[at] = draw(st.sampled_from(SIZES) | st.integers(0, len(data) + 8))
    elif kind == "swap":
        header[key], header[other] = header[other], header[key]
    elif kind == "rename":
        header[_rename(draw, key)] = header.pop(key)
    else:  # the same bytes as numbers of another width
        widths = {"I32": 4, "F32": 4, "I64": 8, "BF16": 2, "F16": 2, "I8": 1, "U8": 1}
        entry["dtype"] = pick(draw, sorted(widths))
        entry["shape"] = [(offsets[1] - offsets[0]) // widths[entry["dtype"]]]
    files[name] = join_file(dump(header), data)
    return f"{name}: {key}: {kind} {other if kind == 'swap' else ''}"


def _rename(draw: Draw, key: str) -> str:
    roles = ("weight_packed", "weight_scale", "weight_zero_point", "weight_g_idx", "bias", "weight")
    path, _, role = key.rpartition(".")
    options = [f"{path}.{other}" for other in roles]
    options += [key.replace("q_proj", "k_proj"), key.replace(".0.", ".1."), role, f"x.{key}"]
    options += [path, f"{key}.x", "", ".", "..", "a\nb", "\0", "é", key.upper(), "." * 3000]
    options += [key.replace("experts", "experts.experts"), key.replace("down_proj", "up_proj")]
    return pick(draw, options)


def change_tensor_bytes(draw: Draw, files: Files) -> str:
    """Other numbers: a few bytes, or a whole tensor."""
    name, content = _pick_weights(draw, files)
    header, data = split_file(content)
    key = pick(draw, sorted(header))
    start, end = header[key]["data_offsets"]
    if draw(st.booleans()):
        at = draw(st.integers(start, max(start, end - 1)))
        new = draw(st.binary(min_size=1, max_size=8))[: end - at]
    else:
        at, unit = start, draw(st.binary(min_size=1, max_size=8))
        new = (unit * (end - start))[: end - start]
    data = data[:at] + new + data[at + len(new) :]
    files[name] = join_file(dump(header), data)
    return f"{name}: {key}: {new[:8]!r} at {at - start}"


def permute_groups(draw: Draw, files: Files) -> str:
    """Another order of the numbers of one tensor."""
    name, content = _pick_weights(draw, files)
    header, data = split_file(content)
    key = pick(draw, sorted(k for k in header if "g_idx" in k) or sorted(header))
    start, end = header[key]["data_offsets"]
    words = [data[i : i + 4] for i in range(start, end, 4)]
    words = draw(st.permutations(words))
    files[name] = join_file(dump(header), data[:start] + b"".join(words) + data[end:])
    return f"{name}: {key}: permuted"


def cut_or_extend(draw: Draw, files: Files) -> str:
    name = pick(draw, sorted(files))
    content = files[name]
    assert isinstance(content, bytes)
    size = draw(st.integers(0, len(content)) | st.sampled_from([0, 1, 7, 8, len(content) - 1]))
    if draw(st.booleans()):
        files[name] = content[: max(size, 0)]
        return f"{name}: cut to {size}"
    files[name] = content + draw(st.binary(min_size=1, max_size=16)) * draw(st.integers(1, 64))
    return f"{name}: extended"


def change_index(draw: Draw, files: Files) -> str:
    if INDEX not in files:
        name, content = _pick_weights(draw, files)
        shard = pick(draw, [name, "model-00001-of-00001.safetensors"])
        files[shard] = files.pop(name)
        files[INDEX] = dump({"weight_map": dict.fromkeys(split_file(content)[0], shard)})
    index = _read(files, INDEX)
    names = index["weight_map"]
    key = pick(draw, sorted(names))
    kind = pick(draw, ["target", "all", "missing", "extra", "rename", "tree", "list", "other"])
    if kind == "target":
        names[key] = pick(draw, NAMES)
    elif kind == "all":
        index["weight_map"] = dict.fromkeys(names, pick(draw, NAMES))
    elif kind == "missing":
        del names[key]
    elif kind == "extra":
        names[pick(draw, ["x", "", "a.b", "\ud800", "x" * 600])] = pick(draw, [names[key], *NAMES])
    elif kind == "rename":
        names[_rename(draw, key)] = names.pop(key)
    elif kind == "list":
        index["weight_map"] = pick(draw, [[], sorted(names), {}, None, {key: None}, {key: [1]}])
    elif kind == "other":
        names[key] = pick(draw, sorted(files))
    what = edit_tree(draw, index) if kind == "tree" else str(index["weight_map"])[:200]
    files[INDEX] = dump(index)
    return f"{INDEX}: {kind} {what}"


def change_config_json(draw: Draw, files: Files) -> str:
    config = _read(files, CONFIG)
    what = edit_tree(draw, config)
    files[CONFIG] = dump(config)
    return f"{CONFIG}: {what}"


def change_config_bytes(draw: Draw, files: Files) -> str:
    content = files[CONFIG]
    assert isinstance(content, bytes)
    files[CONFIG], what = _edit_bytes(draw, content, 0, len(content))
    return f"{CONFIG}: {what}"


def change_quantization(draw: Draw, files: Files) -> str:
    """Fields of quantization_config that mean something, with values that mean something else."""
    config = _read(files, CONFIG)
    raw = config["quantization_config"]
    what = []
    for _ in range(draw(st.integers(1, 3))):
        groups = raw["config_groups"] if isinstance(raw.get("config_groups"), dict) else {}
        group = next((g for g in groups.values() if isinstance(g, dict)), {})
        weights = group.get("weights")
        kinds = ["weights", "top", "targets", "side", "group", "elsewhere"]
        kind = pick(draw, kinds if groups else ["awq or gptq", "top", "elsewhere"])
        if kind == "weights" and isinstance(weights, dict):
            field = pick(draw, sorted(FIELDS))
            weights[field] = pick(draw, FIELDS[field])
            if draw(st.booleans()):
                weights.pop(pick(draw, sorted(weights)))
        elif kind == "awq or gptq":
            field = pick(draw, sorted(TRANSPOSED))
            raw[field] = pick(draw, TRANSPOSED[field])
        elif kind == "top":
            field = pick(draw, sorted(TOP))
            raw[field] = pick(draw, TOP[field])
        elif kind == "targets":
            field = "targets"
            group["targets"] = pick(draw, TARGETS)
        elif kind == "side":
            field = pick(draw, ["input_activations", "output_activations", "format", "weights"])
            group[field] = pick(draw, [None, {}, {"num_bits": 8}, "int-quantized", 3, []])
        elif kind == "group":
            field = pick(draw, ["W4A16", "w4a16_asym", "W8A8", "group_9", "", "W3A16"])
            other = {"targets": pick(draw, TARGETS), "weights": describe_weights(8, False, 16)}
            groups[field] = pick(draw, [["Linear"], other, [], None])
        else:
            field = pick(draw, ["compression_config", "text_config", "num_experts", "tie"])
            nested = {"quantization_config": raw, "num_experts": draw(st.integers(0, 4))}
            config |= {field: pick(draw, [raw, nested, {}, None, *WEIRD])}
        what.append(f"{kind} {field}")
    files[CONFIG] = dump(config)
    return f"{CONFIG}: {', '.join(what)}"


def change_manifest(draw: Draw, files: Files) -> str:
    """What a converted copy says of itself; its own checksum is right again in half of them."""
    if MANIFEST not in files:
        name = pick(draw, sorted(files))
        files[MANIFEST] = pick(draw, [files[name], b"{}", Link(name), dump({"format": "x"})])
        return f"{MANIFEST}: made of {name}"
    table = _read(files, MANIFEST)
    what = edit_tree(draw, table)
    if draw(st.booleans()) and what != "nothing":
        try:
            table["sha256"] = hash_table(table)
        except (RecursionError, ValueError):
            what += " not signed"
    files[MANIFEST] = dump(table)
    return f"{MANIFEST}: {what}"


def change_experts(draw: Draw, files: Files) -> str:
    """How many experts config.json names, and which there are."""
    config = _read(files, CONFIG)
    names = ["num_experts", "num_local_experts", "n_routed_experts"]
    config[pick(draw, names)] = pick(draw, [*range(5), 2**20, 10**30, *WEIRD])
    files[CONFIG] = dump(config)
    if draw(st.booleans()):
        return f"{CONFIG}: experts"
    name, content = _pick_weights(draw, files)
    header, data = split_file(content)
    old, new = pick(draw, ["0", "1"]), pick(draw, ["0", "1", "2", "999999", "1000000", "01", "x"])
    moved = {key.replace(f"experts.{old}.", f"experts.{new}."): e for key, e in header.items()}
    files[name] = join_file(dump(moved), data)
    return f"{name}: expert {old} -> {new}"


def change_files(draw: Draw, files: Files) -> str:
    """Files that are gone, exchanged, or no files."""
    name, other = pick(draw, sorted(files)), pick(draw, [*sorted(files), "sub"])
    kind = pick(draw, ["delete", "swap", "rename", "link", "outside", "folder", "pipe", "extra"])
    if kind == "delete":
        del files[name]
    elif kind == "swap" and other in files:
        files[name], files[other] = files[other], files[name]
    elif kind == "rename":
        other = pick(draw, ["model-00001-of-00002.safetensors", "x.safetensors", "a.bin", SINGLE])
        files[other] = files.pop(name)
    elif kind == "link":
        files["real.safetensors"] = files[name]
        files[name] = Link(pick(draw, ["real.safetensors", name, "gone", "../c/real.safetensors"]))
    elif kind == "outside":
        files[name] = Link(pick(draw, OUTSIDE))
    elif kind in ("folder", "pipe"):
        files[name] = FOLDER if kind == "folder" else PIPE
    else:
        other = pick(draw, ["model.py", "pytorch_model.bin", "x.safetensors", INDEX, "README.md"])
        files[other] = pick(draw, [b"", b"raise SystemExit", files[name]])
    return f"{name}: {kind} {other}"


def rewrite_harmlessly(draw: Draw, files: Files) -> str:
    """Another spelling of the same checkpoint: white space, order, texts that mean nothing."""
    name, content = _pick_weights(draw, files)
    header, data = split_file(content)
    kind = pick(draw, ["spaces", "order", "metadata", "entry", "config", "quantization", "tensors"])
    if kind == "spaces":
        text = json.dumps(header, indent=draw(st.integers(0, 3))).encode()
        files[name] = join_file(text + b" " * draw(st.integers(0, 20)), data)
    elif kind == "order":
        files[name] = join_file(dump(dict(draw(st.permutations(list(header.items()))))), data)
    elif kind == "metadata":
        texts = draw(st.dictionaries(st.text(max_size=4), st.text(max_size=4), max_size=3))
        files[name] = join_file(dump({"__metadata__": texts} | header), data)
    elif kind == "entry":
        header[pick(draw, sorted(header))] |= {"note": pick(draw, [None, "x", [1], {"a": 0.5}])}
        files[name] = join_file(dump(header), data)
    elif kind == "tensors":  # the same tensors in another order of their bytes
        moved, rest = {}, b""
        for key, entry in draw(st.permutations(list(header.items()))):
            start, end = entry["data_offsets"]
            moved[key] = entry | {"data_offsets": [len(rest), len(rest) + end - start]}
            rest += data[start:end]
        files[name] = join_file(dump(moved), rest)
    else:
        config = _read(files, CONFIG)
        place = config if kind == "config" else config["quantization_config"]
        place["global_compression_ratio"] = draw(st.floats(0, 9) | st.none())
        files[CONFIG] = json.dumps(config, indent=draw(st.integers(0, 3))).encode()
    return f"{name}: {kind}"


def mutate_twice(draw: Draw, files: Files) -> str:
    """Two of the others, one after the other, where the second still finds what it takes."""
    what = []
    for _ in range(2):
        name = pick(draw, [n for n in MUTATIONS if n != "two of these"])
        try:
            what.append(MUTATIONS[name](draw, files))
        except _NOTHING_TO_CHANGE:
            what.append("nothing")
    return "; ".join(what)


MUTATIONS: dict[str, Mutation] = {
    "header bytes": change_header_bytes,
    "header length": change_header_length,
    "header JSON": change_header_json,
    "tensor entry": change_tensor_entry,
    "tensor bytes": change_tensor_bytes,
    "order of numbers": permute_groups,
    "cut or extended": cut_or_extend,
    "index": change_index,
    "config JSON": change_config_json,
    "config bytes": change_config_bytes,
    "quantization_config": change_quantization,
    "manifest": change_manifest,
    "experts": change_experts,
    "files and links": change_files,
    "harmless": rewrite_harmlessly,
    "two of these": mutate_twice,
}
HARMLESS = {"harmless"}
