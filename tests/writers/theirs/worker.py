"""What runs in a writer's own environment: it quantizes as it is told, and knows nothing of us.

    .venv-writers/llmcompressor/bin/python tests/writers/theirs/worker.py by_llmcompressor

Reads an order of each line (JSON), and answers with a line of its own: what the writer failed with,
or nothing. A folder then holds what the writer wrote, and `logits.npy` beside it those of the
writer's own model: dequantized by the writer, in float32, before it was saved.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import os
import signal
import sys
import traceback
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

VERSIONS = ("transformers", "torch")
MOST_CHARACTERS = 2000


def load_model(order: dict[str, Any], dtype: Any = "auto") -> torch.nn.Module:
    """The model of an order, as users load it: in the dtype of its files.

    Other implementations of attention than the eager one leave out softcaps.
    """
    make = getattr(transformers, order["class"])
    options = {"dtype": dtype, "attn_implementation": "eager"}
    return make.from_pretrained(order["source"], **options).eval()


def load_rows(order: dict[str, Any]) -> torch.Tensor:
    """Tokens [rows, length] to calibrate with."""
    return torch.from_numpy(np.load(order["calibration"])).long()


def widen(
    order: dict[str, Any], model: torch.nn.Module, tensors: dict[str, torch.Tensor]
) -> torch.nn.Module:
    """A writer's model in float32, with these tensors and, of all others, the source's by name.

    Writers cast all of a model to 16 bits, also what files do not hold: the frequencies of the
    rotation, and multipliers of embeddings.
    """
    model, plain = model.float(), load_model(order, torch.float32)
    held = {**dict(plain.named_parameters()), **dict(plain.named_buffers()), **tensors}
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if name in held and held[name].shape == tensor.shape:
            tensor.data = held[name].detach().float()
    return model


def save_logits(order: dict[str, Any], model: torch.nn.Module) -> None:
    """Write the float32 logits of a model whose weights are what its packed ones stand for."""
    tokens = torch.from_numpy(np.load(order["tokens"])).long()
    with torch.no_grad():
        logits = model.float()(input_ids=tokens, use_cache=False).logits
    np.save(order["logits"], logits.float().numpy())


def answer_apart(write: Any, order: dict[str, Any]) -> dict[str, str]:
    """What became of one order, in a process of its own: a failed one may leave a library's state.

    A fork costs nothing, where an import of these libraries takes half a minute of computing.
    """
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        found = attempt(write, order)
        os.write(writer, json.dumps(found).encode())
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader, "rb") as answers:
        found = answers.read()
    _, status = os.waitpid(child, 0)
    return json.loads(found) if found else {"error": f"its process ended with status {status}"}


def attempt(write: Any, order: dict[str, Any]) -> dict[str, str]:
    """Nothing, or what the writer failed with."""
    signal.alarm(order["seconds"])  # ends the process
    Path(order["folder"]).parent.mkdir(parents=True, exist_ok=True)
    try:
        write(order)
    except BaseException as error:  # a library may also exit
        traceback.print_exc()
        text = " ".join(str(error).split())[:MOST_CHARACTERS]
        return {"error": f"{type(error).__name__}: {text}"}
    finally:
        signal.alarm(0)
    return {}


def main() -> None:
    """Answers go to what was standard output; whatever libraries print goes to standard error."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    warnings.simplefilter("ignore")
    module = importlib.import_module(sys.argv[1])
    versions = {name: importlib.metadata.version(name) for name in (*module.VERSIONS, *VERSIONS)}
    print(json.dumps(versions), file=answers)
    answer = answer_apart if module.CAN_FORK else attempt
    for line in sys.stdin:
        print(json.dumps(answer(module.write, json.loads(line))), file=answers)


if __name__ == "__main__":
    main()
