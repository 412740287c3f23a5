"""What the writers quantize: a small random model of each family that we have, and a real one."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from tests.jaxwna16.models.family_rows import BASES, MODELS, ROWS
from tests.jaxwna16.models.hf_models import cast_weights, make_reference
from tests.smollm2 import write_layers

SMOLLM2 = "SmolLM2"
NAMES = (SMOLLM2, *ROWS)
"""The real model has its first layers alone, as in our own tests; then each `model_type`."""
_LAYERS = 4
_TEXT = Path(__file__).parents[2] / "LICENSE"


@dataclasses.dataclass(frozen=True)
class Source:
    """A model for the writers.

    Attributes:
      folder: holds the model as transformers saves it, in bfloat16, and a tokenizer.
      kind: the name of transformers' class.
      ignore: patterns of what is left alone beside heads and routers.
      group_size: one that divides the width of every weight.
      calibration, tokens: files of token ids [rows, length], to calibrate with and to compare.
    """

    folder: Path
    kind: str
    ignore: tuple[str, ...]
    group_size: int
    calibration: Path
    tokens: Path


def write_source(name: str, root: Path) -> Source:
    """Write one of `NAMES` into a new folder below `root`."""
    folder = root / name / "model"
    folder.parent.mkdir(parents=True)
    if name == SMOLLM2:
        write_layers(_LAYERS, folder)
        kind, ignore, group_size = "LlamaForCausalLM", (), 64
        text = Tokenizer.from_file(str(folder / "tokenizer.json")).encode(_TEXT.read_text("utf-8"))
        rows = np.array(text.ids[: 20 * 64], np.int32).reshape(20, 64)
    else:
        reference = make_reference(BASES[name], **list_rounded_widths(name))
        cast_weights(reference, torch.bfloat16)
        for path, buffer in reference.named_buffers():
            if path.endswith("layer_scalar"):  # published files have all in 16 bits
                buffer.data = buffer.bfloat16()
        reference.config.dtype = torch.bfloat16
        reference.save_pretrained(folder)
        kind, ignore, group_size = type(reference).__name__, ROWS[name].ignore, 32
        words = ROWS[name].sizes["vocab_size"]
        vocabulary = models.WordLevel({str(word): word for word in range(words)}, unk_token="0")
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(vocabulary))
        tokenizer.save_pretrained(folder)
        rows = np.random.default_rng(0).integers(0, words, (18, 32)).astype(np.int32)
    files = folder.with_name("calibration.npy"), folder.with_name("tokens.npy")
    np.save(files[0], rows[2:])
    np.save(files[1], rows[:2])
    return Source(folder, kind, ignore, group_size, *files)


def list_rounded_widths(name: str) -> dict[str, int]:
    """Changes of a row's sizes, so that 32 divides all widths: writers skip other weights."""
    sizes = {**ROWS[name].sizes, **MODELS[BASES[name]][1]}
    return {
        key: -(-size // 32) * 32
        for key, size in sizes.items()
        if key.endswith(("intermediate_size", "head_dim", "lora_rank")) and (size or 0) % 32
    }
