"""A process whose children convert and quantize, and are killed in the midst of it.

    python -m tests.jaxwna16.checkpoints.killed_writers < jobs > outcomes

One JSON object a line each way. The imports are made once, and no backend of JAX is started before
a child is there, so that a child takes milliseconds. One that is given the numbers computes none.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import jaxwna16.generation.load_model  # noqa: F401 - `quantize` imports it late, in each child
from jaxwna16.checkpoints import convert, quantize
from loaders.files.safetensors_file import read_header, read_tensors


def main() -> None:
    """Do the jobs, one after the other."""
    for line in sys.stdin:
        print(json.dumps(run(json.loads(line))), flush=True)


def run(job: dict[str, Any]) -> dict[str, Any]:
    """Do one job in a child.

    Args:
      job: "verb"; "source" and "destination"; "numbers", a folder that the verb has made, or None;
        and when to kill: at which "operation" on the destination, or how many "seconds" after the
        first one. With neither, it comes to its end.

    Returns:
      "status", negative if it was killed; "operations" and "seconds" if it came to its end.
    """
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        os.close(reader)
        work(job, writer)
    os.close(writer)
    os.read(reader, 1)
    started = time.perf_counter()
    if job["seconds"] is not None:
        time.sleep(job["seconds"])
        os.kill(child, signal.SIGKILL)
    operations = os.read(reader, 100)
    os.close(reader)
    _, status = os.waitpid(child, 0)
    return {
        "status": os.waitstatus_to_exitcode(status),
        "operations": int(operations or 0),
        "seconds": time.perf_counter() - started,
    }


def work(job: dict[str, Any], writer: int) -> None:
    """In the child: tells of the first operation and, at the end, of how many there were."""
    destination, operations = Path(job["destination"]), 0
    places = (str(destination), str(destination.with_name(f".{destination.name}.partial")))

    def watch(event: str, arguments: tuple) -> None:
        nonlocal operations
        paths = [str(a) for a in arguments if isinstance(a, str | os.PathLike)]
        if not any(path.startswith(places) for path in paths):
            return
        operations += 1
        if operations == 1:
            os.write(writer, b".")
        if operations == job["operation"]:
            os.kill(os.getpid(), signal.SIGKILL)

    try:
        if job["numbers"]:
            give_numbers(Path(job["numbers"]))
        sys.addaudithook(watch)
        if job["verb"] == "convert":
            convert.convert_checkpoint(job["source"], destination, progress=False)
        else:
            quantize.quantize_checkpoint(
                job["source"], destination, group_size=32, symmetric=False, progress=False
            )
        os.write(writer, str(operations).encode())
        os._exit(0)
    except BaseException:
        traceback.print_exc()
        os._exit(1)


def give_numbers(folder: Path) -> None:
    """Put what is in `folder` in the place of what would be computed."""
    tensors: dict[str, Any] = {}
    for path in folder.glob("*.safetensors"):
        infos = read_header(path)
        tensors |= zip(infos, read_tensors(infos.values()), strict=True)

    def load_params(part):
        return {name: tensors[name] for name in part.describe_leaves()}

    def quantize_part(part, dtype, specs):
        module = part.name.removesuffix(".weight")
        for name in tensors:
            if name == part.name or name.startswith(f"{module}.weight_"):
                yield name, tensors[name]

    convert.load_params = load_params
    quantize._quantize = quantize_part


if __name__ == "__main__":
    main()
