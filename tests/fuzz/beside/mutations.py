"""Mutations of what lies beside the weights; as those in `tests.fuzz.mutations`."""

from __future__ import annotations

import copy
import json
from typing import Any

from hypothesis import strategies as st

from tests.fuzz.files import FOLDER, PIPE, Link
from tests.fuzz.json_edits import dump, edit_tree, pick
from tests.fuzz.mutations import Draw, Files, Mutation

TOKENIZER, SETTINGS, TEMPLATE = "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"
SPECIAL, GENERATION, CONFIG = "special_tokens_map.json", "generation_config.json", "config.json"
_PATTERNS = (
    *("(a|a)*$", "(?:a|a)+(?!a)(?<!a)", r"\w*\w*\w*\W", "", "(", "a{1,99999}", r"\p{L}+", "[[a]"),
    *("(?<=a*)b", r"(a)\1\1\1", "(?:(?:(?:a?){30}){30}){30}", "\ud800", "a" * 10_000),
)
_GROW = {"type": "Replace", "pattern": {"String": "a"}, "content": "aa"}
_BYTES = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}
_STAGES: dict[str, tuple[dict[str, Any], ...]] = {
    "normalizer": (
        *(_GROW, _GROW | {"content": "a" * 3000}, _GROW | {"pattern": {"Regex": ""}}),
        *({"type": "Prepend", "prepend": "a" * 50_000}, {"type": "Prepend", "prepend": ""}),
        *(
            {"type": "Precompiled", "precompiled_charsmap": text}
            for text in ("", "AAAA", "BAAAAP8=")
        ),
        *({"type": kind} for kind in ("NFKD", "ByteLevel", "Lowercase", "Nmt", "Nothing")),
        *(_GROW | {"pattern": {"Regex": p}} for p in _PATTERNS),
    ),
    "pre_tokenizer": (
        *({"type": "FixedLength", "length": n} for n in (0, 1, 2**63)),
        *({"type": "Metaspace", "replacement": r, "prepend_scheme": "always"} for r in ("▁", "ab")),
        *({"type": "CharDelimiterSplit", "delimiter": d} for d in ("a", "")),
        *(_BYTES, {"type": "Whitespace"}, {"type": "UnicodeScripts"}),
        *(
            {"type": "Split", "pattern": {"Regex": p}, "behavior": "Isolated", "invert": True}
            for p in _PATTERNS
        ),
    ),
    "decoder": (
        *(_GROW, _GROW | {"content": "\x1b[2J\n"}, _GROW | {"pattern": {"Regex": "(a|a)*$"}}),
        *(
            {"type": "Strip", "content": "a", "start": n, "stop": m}
            for n, m in ((0, 1), (2**40, 9))
        ),
        *({"type": "BPEDecoder", "suffix": s} for s in ("", "</w>")),
        *({"type": "CTC", "pad_token": "", "word_delimiter_token": "", "cleanup": True},),
        *({"type": "WordPiece", "prefix": "", "cleanup": True}, {"type": "ByteFallback"}, _BYTES),
    ),
    "post_processor": (
        {"type": "BertProcessing", "sep": ["x", 2**31], "cls": ["y", 7]},
        {
            "type": "TemplateProcessing",
            "single": [{"Sequence": {"id": "A", "type_id": 0}}] * 50_000,
            "pair": [{"Sequence": {"id": "B", "type_id": 0}}],
            "special_tokens": {},
        },
    ),
}
_MEMBERS = {"normalizer": "normalizers", "pre_tokenizer": "pretokenizers", "decoder": "decoders"}
_MODEL: dict[str, tuple[Any, ...]] = {
    "dropout": (0.5, 1.0, 1e308, -1, "x"),
    "unk_token": ("a", "nowhere", "", 3),
    "continuing_subword_prefix": ("#" * 10, "é", ""),
    "end_of_word_suffix": ("</w>", "a"),
    "merges": ([], [["a", "nowhere"]], [["a"]], ["a b"], ["ab"], [["", ""]], [["a", "a"]] * 999),
    "vocab": (
        {},
        {"a": 2**32 - 1},
        {"a": 2**32},
        {"a": -1},
        {"": 0},
        [["a", 1e308], ["a", -1e308]],
    ),
    "type": ("WordPiece", "WordLevel", "Unigram", "BPE", "Nothing"),
    "byte_fallback": (True, 1),
    "ignore_merges": (True,),
    "max_input_chars_per_word": (2**63, 0),
}
_LOOP, _END = "{% for i in range(99999) %}", "{% endfor %}"
_PIECES = (
    *("{{ messages }}", "{{ messages[0].content }}", "a b", "\x1b[2J\r\n", "{{ x }}", "{{ f() }}"),
    *(f"{_LOOP}{_LOOP}{_END}{_END}", f"{_LOOP}{{{{ 'ab' * 9999 }}}}{_END}", f"{_LOOP}{_END}"),
    *("{% if x %}a{% else %}b{% endif %}", "{% macro f() %}{{ f() }}{% endmacro %}", "{# a #}"),
    *("{% set x = x ~ x ~ 'ab' %}", "{% set ns = namespace(x='ab') %}", "{{ ns.x | length }}"),
    *(
        "{% set ns.x = ns.x ~ ns.x %}",
        "{{ 'a' * 10 ** 9 }}",
        "{{ 9 ** 9 }}",
        "{{ raise_exception(x) }}",
    ),
    *("{{ '%900000000d' % 1 }}", "{{ '{:900000000d}'.format(1) }}", "{{ 'a'.center(10 ** 9) }}"),
    *("{{ [1] | slice(10 ** 9) | list }}", "{{ lipsum(n=10 ** 6) }}", "{{ strftime_now('%c') }}"),
    *("{{ ''.__class__.__mro__ }}", "{{ messages | tojson(indent=99) }}", "{{ dict(m=messages) }}"),
    *("{% generation %}a{% endgeneration %}", "{% include 'config.json' %}", "{{ 1 / 0 }}"),
    *("{{ range(99999) | list }}", "{{ 10 ** 10 ** 6 }}", "{{ messages[0].content | upper }}"),
    *("{{", "%}", "{% endfor %}", "{% if a %}", "\ud800"),
)
_STRANGE = (b"", b"\0", b"\xff\xfe", b"[]", b"null", b"{" * 3, b'{"a": 1, "a": 2}', b"[" * 10**5)


def _read(files: Files, name: str) -> Any:
    content = files[name]
    assert isinstance(content, bytes)
    return json.loads(content)


def _edit_json(draw: Draw, files: Files, name: str) -> str:
    """Change one or two nodes of a JSON file."""
    tree = _read(files, name)
    done = [edit_tree(draw, tree) for _ in range(draw(st.sampled_from([1, 1, 1, 2])))]
    files[name] = dump(tree)
    return f"{name}: {', '.join(done)}"


def change_tokenizer(draw: Draw, files: Files) -> str:
    return _edit_json(draw, files, TOKENIZER)


def change_stages(draw: Draw, files: Files) -> str:
    """Put hostile stages into a chain, some of them many times."""
    tree = _read(files, TOKENIZER)
    member = pick(draw, list(_STAGES))
    stages = draw(st.lists(st.sampled_from(_STAGES[member]), min_size=1, max_size=3))
    times = draw(st.sampled_from([1, 1, 2, 10, 40]))
    if member not in _MEMBERS:
        tree[member] = stages[0]
    elif (old := tree[member]) is not None and draw(st.booleans()):
        chain = old.get(_MEMBERS[member], [old]) + copy.deepcopy(stages) * times
        tree[member] = {"type": "Sequence", _MEMBERS[member]: chain}
    elif times == len(stages) == 1:
        tree[member] = stages[0]
    else:
        tree[member] = {"type": "Sequence", _MEMBERS[member]: copy.deepcopy(stages) * times}
    files[TOKENIZER] = dump(tree)
    return f"{member}: {times} times {stages!r:.200}"


def change_vocabulary(draw: Draw, files: Files) -> str:
    """Change the model, or the tokens beside it."""
    tree = _read(files, TOKENIZER)
    fields = draw(st.lists(st.sampled_from(sorted(_MODEL)), min_size=1, max_size=2))
    for field in fields:
        tree["model"][field] = pick(draw, _MODEL[field])
    if draw(st.booleans()):
        flags = ("single_word", "lstrip", "rstrip", "normalized", "special")
        content = draw(st.text("ab \n\x1b▁é", max_size=4))
        index = pick(draw, (0, 2, 8, 2**32 - 1, 2**32, -1))
        token = {"id": index, "content": content, **{f: draw(st.booleans()) for f in flags}}
        tree["added_tokens"].append(token)
    files[TOKENIZER] = dump(tree)
    return f"model: {fields}"


def change_template(draw: Draw, files: Files) -> str:
    """Another template of pieces of templates, or the old one with one put in."""
    pieces = draw(st.lists(st.sampled_from(_PIECES), min_size=1, max_size=3))
    text = "".join(pieces) * pick(draw, (1, 1, 1, 3, 2000))
    if draw(st.booleans()):
        old = _read(files, SETTINGS)["chat_template"]
        place = draw(st.integers(0, len(old)))
        text = old[:place] + text + old[place:]
    files[TEMPLATE] = text.encode("utf-8", "surrogatepass")
    return f"template {pieces!r:.300}"


def change_settings(draw: Draw, files: Files) -> str:
    return _edit_json(draw, files, pick(draw, (SETTINGS, SETTINGS, SPECIAL)))


def change_generation(draw: Draw, files: Files) -> str:
    return _edit_json(draw, files, GENERATION)


def change_config(draw: Draw, files: Files) -> str:
    """What config.json says of the model, not of the quantization."""
    tree = _read(files, CONFIG)
    quantization = tree.pop("quantization_config")
    done = edit_tree(draw, tree)
    if isinstance(tree, dict) and draw(st.booleans()):
        key = pick(draw, ("text_config", "rope_scaling", "rope_parameters", "eos_token_id"))
        tree[key] = pick(
            draw,
            (None, {}, [1], [2**70], {"rope_type": "yarn", "factor": 1e308}, {"type": "dynamic"}),
        )
        done += f", {key}"
    files[CONFIG] = dump({**tree, "quantization_config": quantization})
    return f"{CONFIG}: {done}"


def change_entries(draw: Draw, files: Files) -> str:
    """Another thing in the place of a file."""
    name = pick(draw, (TOKENIZER, SETTINGS, SPECIAL, GENERATION, TEMPLATE))
    entry = pick(draw, (None, FOLDER, PIPE, Link(name), Link("/dev/zero"), Link("../x"), *_STRANGE))
    if entry is None:
        files.pop(name, None)
    else:
        files[name] = entry
    return f"{name} is {entry!r:.60}"


def change_bytes(draw: Draw, files: Files) -> str:
    """Flip, cut or insert bytes."""
    name = pick(
        draw, [n for n in (TOKENIZER, SETTINGS, SPECIAL, GENERATION, TEMPLATE) if n in files]
    )
    content = files[name]
    assert isinstance(content, bytes)
    place = draw(st.integers(0, len(content)))
    inserted = draw(st.binary(max_size=4))
    removed = draw(st.integers(0, 8))
    files[name] = content[:place] + inserted + content[place + removed :]
    return f"{name}: {removed} bytes at {place} are now {inserted!r}"


MUTATIONS: dict[str, Mutation] = {
    "tokenizer JSON": change_tokenizer,
    "stages": change_stages,
    "vocabulary": change_vocabulary,
    "template": change_template,
    "token settings": change_settings,
    "generation settings": change_generation,
    "config of the model": change_config,
    "files and links": change_entries,
    "bytes": change_bytes,
}
