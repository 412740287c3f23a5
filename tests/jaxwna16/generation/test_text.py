"""Tokenizers made here, with the package `tokenizers`, and read by us and by transformers."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxwna16 import CheckpointError
from jaxwna16.errors import InputError
from jaxwna16.generation.streaming.text_stream import TextStream
from jaxwna16.generation.text import Tokenizer

tokenizers = pytest.importorskip("tokenizers")
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers  # noqa: E402

LINES = [
    "Sir Walter Elliot, of Kellynch Hall, in Somersetshire, was a man who, for his own amusement,",
    "never took up any book but the Baronetage; there he found occupation for an idle hour.",
    "Schöne Grüße, naïve café; 你好世界, こんにちは, Привет мир, 👩‍👩‍👧 🇩🇪 e\u0301",
]
SPECIAL = ["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>", "[INST]", "[/INST]"]
SPECIAL += ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]


def train(model, trainer, pre_tokenizer, decoder, normalizer=None):
    backend = tokenizers.Tokenizer(model)
    if normalizer is not None:
        backend.normalizer = normalizer
    if pre_tokenizer is not None:
        backend.pre_tokenizer = pre_tokenizer
    if decoder is not None:
        backend.decoder = decoder
    backend.train_from_iterator(LINES, trainer)
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)]
    )
    return backend


def make_byte_level():
    """As in GPT-2, Llama 3, Qwen and SmolLM2."""
    return train(
        models.BPE(),
        trainers.BpeTrainer(
            vocab_size=400,
            special_tokens=SPECIAL,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
        pre_tokenizers.ByteLevel(add_prefix_space=False),
        decoders.ByteLevel(),
    )


def make_byte_fallback():
    """As in Llama 2 and Mistral: spaces are U+2581, unknown characters become bytes."""
    to_space = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=SPECIAL, limit_alphabet=40, show_progress=False
    )
    trained = json.loads(train(models.BPE(), trainer, None, None, to_space).to_str())
    vocabulary = trained["model"]["vocab"]
    for byte in range(256):
        vocabulary[f"<0x{byte:02X}>"] = len(vocabulary)
    trained["model"] |= {"byte_fallback": True, "unk_token": "<unk>", "fuse_unk": True}
    backend = tokenizers.Tokenizer.from_str(json.dumps(trained))
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return backend


def make_metaspace():
    """As in T5 and the newer Llama 2 files, without bytes: what is unknown is lost."""
    return train(
        models.Unigram(),
        trainers.UnigramTrainer(
            vocab_size=200, special_tokens=SPECIAL, unk_token="<unk>", show_progress=False
        ),
        pre_tokenizers.Metaspace(),
        decoders.Metaspace(),
    )


def make_word_level():
    """No decoder at all: words are joined by spaces."""
    return train(
        models.WordLevel(unk_token="<unk>"),
        trainers.WordLevelTrainer(special_tokens=SPECIAL, show_progress=False),
        pre_tokenizers.Whitespace(),
        None,
    )


BACKENDS = {
    "byte_level": make_byte_level(),
    "byte_fallback": make_byte_fallback(),
    "metaspace": make_metaspace(),
    "word_level": make_word_level(),
}


def write_folder(folder: Path, backend=None, **files) -> Path:
    """Write a checkpoint's tokenizer files; names without a dot are .json."""
    (BACKENDS["byte_level"] if backend is None else backend).save(str(folder / "tokenizer.json"))
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")
    return folder


def read_with_transformers(folder: Path):
    transformers = pytest.importorskip("transformers")
    return transformers.PreTrainedTokenizerFast.from_pretrained(str(folder))


@pytest.fixture(params=BACKENDS)
def kind(request) -> str:
    return request.param


@pytest.fixture(scope="session")
def tokenizers_by_kind(tmp_path_factory) -> dict[str, Tokenizer]:
    return {
        kind: Tokenizer.from_folder(write_folder(tmp_path_factory.mktemp(kind), backend))
        for kind, backend in BACKENDS.items()
    }


class TestTokenizer:
    @pytest.mark.parametrize(
        "text", [*LINES, "", " ", "  two  spaces ", "a<|im_end|>b", "🇫🇷\x00\n\t"]
    )
    def test_ids_and_text_are_those_of_transformers(self, tmp_path, kind, text):
        tokenizer = Tokenizer.from_folder(write_folder(tmp_path, BACKENDS[kind]))
        reference = read_with_transformers(tmp_path)
        ids = tokenizer.encode(text)
        assert ids == reference(text)["input_ids"] and ids[0] == 1
        assert tokenizer.encode(text, False) == reference.encode(text, add_special_tokens=False)
        for skip in (False, True):
            assert tokenizer.decode(ids, skip) == reference.decode(ids, skip_special_tokens=skip)

    def test_truncation_and_padding_of_the_file_are_off(self, tmp_path):
        backend = tokenizers.Tokenizer.from_str(BACKENDS["byte_level"].to_str())
        backend.enable_truncation(4)
        backend.enable_padding(length=64)
        tokenizer = Tokenizer.from_folder(write_folder(tmp_path, backend))
        assert tokenizer.decode(tokenizer.encode(LINES[0])) == LINES[0]
        assert len(tokenizer.encode("a")) == 2

    def test_tokens_of_the_config_alone_are_added_as_in_transformers(self, tmp_path):
        size = BACKENDS["byte_level"].get_vocab_size()
        flags = {"lstrip": False, "rstrip": False, "normalized": False, "single_word": False}
        added = {
            "1": {"content": "<s>", "special": True, **flags},
            str(size): {"content": "<|new|>", "special": True, **flags},
            str(size + 1): {"content": "<tool>", "special": False, **flags},
        }
        write_folder(tmp_path, tokenizer_config={"added_tokens_decoder": added})
        tokenizer, reference = Tokenizer.from_folder(tmp_path), read_with_transformers(tmp_path)
        ids = tokenizer.encode("a<|new|>b<tool>c")
        assert size in ids and ids == reference.encode("a<|new|>b<tool>c")
        assert (
            tokenizer.decode(ids) == reference.decode(ids, skip_special_tokens=True) == "ab<tool>c"
        )

    @pytest.mark.parametrize(
        ("special", "files"),
        [
            ("[INST]", {"tokenizer_config": {"additional_special_tokens": ["[INST]"]}}),
            ("[INST]", {"tokenizer_config": {"extra_special_tokens": ["[INST]", "<none>"]}}),
            ("</s>", {"tokenizer_config": {"extra_special_tokens": {"image_token": "</s>"}}}),
            ("</s>", {"special_tokens_map": {"eos_token": {"content": "</s>", "lstrip": True}}}),
        ],
    )
    def test_a_word_that_is_named_special_is_as_in_transformers(self, tmp_path, special, files):
        content = json.loads(BACKENDS["byte_level"].to_str()) | {"added_tokens": []}
        write_folder(tmp_path, tokenizers.Tokenizer.from_str(json.dumps(content)), **files)
        tokenizer, reference = Tokenizer.from_folder(tmp_path), read_with_transformers(tmp_path)
        ids = tokenizer.encode("a [INST]b </s>")
        assert SPECIAL.index(special) in ids and ids == reference.encode("a [INST]b </s>")
        assert tokenizer.decode(ids) == reference.decode(ids, skip_special_tokens=True)

    def test_stop_tokens_are_the_union_of_all_files(self, tmp_path):
        write_folder(
            tmp_path,
            generation_config={"eos_token_id": [7, 2]},
            config={"eos_token_id": 3},
            tokenizer_config={"eos_token": {"content": "<|eot_id|>"}, "eos_token_id": None},
        )
        eot = SPECIAL.index("<|eot_id|>")
        assert Tokenizer.from_folder(tmp_path).stop_tokens == {2, 3, 7, eot}

    def test_an_eos_outside_the_vocabulary_stops_nothing(self, tmp_path):
        write_folder(tmp_path, tokenizer_config={"eos_token": "<nowhere>"})
        assert Tokenizer.from_folder(tmp_path).stop_tokens == frozenset()


class TestFaults:
    @pytest.mark.parametrize(
        ("name", "content", "message"),
        [
            ("tokenizer.json", b"{", "not a tokenizer"),
            ("tokenizer.json", b"{}", "not a tokenizer"),
            ("tokenizer_config.json", b"{", "not valid JSON"),
            ("tokenizer_config.json", b"\xff", "not valid JSON"),
            ("tokenizer_config.json", b"[" * 100_000, "not valid JSON"),
            (
                "tokenizer_config.json",
                b'{"a": 1, "b": 2, "a": 3}',
                "not valid JSON: duplicate keys: a",
            ),
            ("tokenizer_config.json", b'{"a": ' + b"[" * 65 + b"]" * 65 + b"}", "nested more than"),
            ("tokenizer_config.json", b"[]", "expected a JSON object, found list"),
            ("tokenizer_config.json", b'{"chat_template": 3}', "must be a string or a list"),
            ("tokenizer_config.json", b'{"chat_template": [{"name": "x"}]}', "list of named"),
            ("tokenizer_config.json", b'{"added_tokens_decoder": {"x": {}}}', "malformed"),
            ("tokenizer_config.json", b'{"added_tokens_decoder": {"1": 3}}', "malformed"),
            ("tokenizer_config.json", b'{"added_tokens_decoder": 3}', "malformed"),
            (
                "tokenizer_config.json",
                b'{"added_tokens_decoder": {"0": {"content": "<s>"}}}',
                "'<s>' is 1, not 0",
            ),
            ("special_tokens_map.json", b"nonsense", "not valid JSON"),
            ("generation_config.json", b'{"eos_token_id": "</s>"}', "eos_token_id"),
            ("config.json", b'{"eos_token_id": [1, true]}', "eos_token_id"),
            ("chat_template.jinja", b"\xff\xfe", "not UTF-8"),
        ],
    )
    def test_a_faulty_file_is_named(self, tmp_path, name, content, message):
        (write_folder(tmp_path) / name).write_bytes(content)
        with pytest.raises((CheckpointError, InputError), match=message) as caught:
            Tokenizer.from_folder(tmp_path)
        assert name.split(".")[0] in str(caught.value)

    def test_a_folder_without_a_tokenizer_is_named(self, tmp_path):
        with pytest.raises(InputError, match=r"tokenizer\.json: no such file"):
            Tokenizer.from_folder(tmp_path)

    def test_text_that_is_not_unicode_is_refused(self, tokenizers_by_kind):
        with pytest.raises(InputError, match="character 2"):
            tokenizers_by_kind["byte_level"].encode("ab\udcff")

    def test_a_missing_package_says_how_to_install_it(self, tmp_path, monkeypatch):
        monkeypatch.setitem(sys.modules, "tokenizers", None)
        with pytest.raises(InputError, match=r'tokenizers.*pip install "jaxwna16\[text\]"'):
            Tokenizer.from_folder(tmp_path)

    def test_importing_the_module_imports_no_extra(self):
        module = "jaxwna16.generation.text"
        code = f"import sys, {module}; print({{'tokenizers', 'jinja2'}} & set(sys.modules))"
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
        command = [sys.executable, "-c", code]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
        assert done.stdout.strip() == "set()"


UNICODE = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\ufffd"))
TEXTS = st.one_of(UNICODE, st.lists(st.sampled_from([*LINES, *SPECIAL, " ", "▁"])).map("".join))


def stream_in_splits(tokenizer: Tokenizer, ids: list[int], cuts: list[int], skip=True) -> list[str]:
    stream = TextStream(tokenizer, skip)
    edges = [0, *sorted(cut % (len(ids) + 1) for cut in cuts), len(ids)]
    pieces = [stream.push(ids[a:b]) for a, b in itertools.pairwise(edges)]
    return [*pieces, stream.flush()]


class TestTextStream:
    @settings(max_examples=150, deadline=None)
    @given(
        kind=st.sampled_from(sorted(BACKENDS)),
        text=TEXTS,
        cuts=st.lists(st.integers(0, 1000), max_size=8),
        skip=st.booleans(),
        bos=st.booleans(),
    )
    def test_the_pieces_joined_are_the_decoded_text(
        self, tokenizers_by_kind, kind, text, cuts, skip, bos
    ):
        tokenizer = tokenizers_by_kind[kind]
        ids = tokenizer.encode(text, bos)
        pieces = stream_in_splits(tokenizer, ids, cuts, skip)
        assert "".join(pieces) == tokenizer.decode(ids, skip)
        assert not any("\ufffd" in piece for piece in pieces)

    @settings(max_examples=150, deadline=None)
    @given(ids=st.lists(st.integers(0, 500)), cuts=st.lists(st.integers(0, 1000), max_size=8))
    def test_byte_level_ids_of_any_kind_give_the_decoded_text(self, tokenizers_by_kind, ids, cuts):
        tokenizer = tokenizers_by_kind["byte_level"]
        for skip in (False, True):
            pieces = stream_in_splits(tokenizer, ids, cuts, skip)
            assert "".join(pieces) == tokenizer.decode(ids, skip)

    @settings(max_examples=50, deadline=None)
    @given(text=TEXTS)
    def test_every_character_comes_with_the_token_that_completes_it(self, tokenizers_by_kind, text):
        tokenizer = tokenizers_by_kind["byte_level"]
        stream, ids, seen = TextStream(tokenizer), tokenizer.encode(text), ""
        for end in range(1, len(ids) + 1):
            seen += stream.push(ids[end - 1 : end])
            assert seen == tokenizer.decode(ids[:end]).removesuffix("\ufffd")

    def test_a_run_of_byte_tokens_comes_when_it_ends(self, tokenizers_by_kind):
        tokenizer = tokenizers_by_kind["byte_fallback"]
        ids = tokenizer.encode("a 🦜🦜 b", add_special_tokens=False)
        stream = TextStream(tokenizer)
        pieces = [stream.push([token]) for token in ids]
        assert "".join(pieces) == "a 🦜🦜 b" and pieces.count("🦜🦜 ") == 1

    def test_a_text_cut_inside_a_character_ends_with_replacements(self, tokenizers_by_kind):
        for kind, rest in (("byte_level", "\ufffd"), ("byte_fallback", 3 * "\ufffd")):
            ids = tokenizers_by_kind[kind].encode("ok🦜", add_special_tokens=False)[:-1]
            stream = TextStream(tokenizers_by_kind[kind])
            assert stream.push(ids) == "ok"
            assert stream.flush() == rest
            assert stream.flush() == ""

    def test_after_a_flush_a_new_text_begins(self, tokenizers_by_kind):
        stream = TextStream(tokenizers_by_kind["byte_fallback"])
        ids = tokenizers_by_kind["byte_fallback"].encode("the book", add_special_tokens=False)
        assert [stream.push(ids) + stream.flush() for _ in range(2)] == ["the book", "the book"]

    def test_each_id_is_decoded_once_however_long_the_text(self, tokenizers_by_kind, monkeypatch):
        tokenizer, calls, decode = tokenizers_by_kind["byte_fallback"], [], Tokenizer.decode
        ids = tokenizer.encode(LINES[0], add_special_tokens=False)
        expected = tokenizer.decode(ids * 50)
        monkeypatch.setattr(
            Tokenizer, "decode", lambda *args: calls.append(len(args[1])) or decode(*args)
        )
        stream = TextStream(tokenizer)
        assert "".join(stream.push([token]) for token in ids * 50) == expected
        assert max(calls) == 2 and len(calls) <= 2 * len(set(ids)) + 1
