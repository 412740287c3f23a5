"""A process that takes mutants, one folder a line, through all that we do with a checkpoint.

It has limits, which end it: 2 GB of address space beyond what it starts with, and for each mutant
10 s of computing. Of each it says what became of it.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import resource
import signal
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jaxwna16.cli.main import main
from jaxwna16.generation import chat_template
from jaxwna16.generation.generate import generate
from jaxwna16.generation.limited import tokenizer
from jaxwna16.generation.load_model import load_model
from jaxwna16.generation.text import Tokenizer
from jaxwna16.models.causal_lm import CausalLM
from loaders.errors import escape_line
from pallas_kernels.errors import Wna16Error
from tests.peaks import begin_peak, read_peak, read_status

SECONDS = 10
ADDRESSES = 2 << 30
_MAX_MESSAGE = 50_000
_WARNINGS = ("`dropout`",)
_PROMPT, _COMPILED = "ab a é", 16
_MESSAGE = {"role": "user", "content": _PROMPT}
_loaded: dict[tuple[bytes, ...], CausalLM] = {}


def work() -> None:
    """Answer until there are no more mutants; the call has limits for templates and tokenizers."""
    chat_template.SECONDS = tokenizer.SECONDS = float(sys.argv[1])
    tokenizer.DECODE_SECONDS = min(tokenizer.SECONDS, tokenizer.DECODE_SECONDS)
    tokenizer._MEGABYTES = int(sys.argv[2])
    replies, printed = os.fdopen(os.dup(1), "w"), tempfile.TemporaryFile()
    os.dup2(printed.fileno(), 1)
    warnings.simplefilter("error")
    for order in sys.stdin:
        found = _try(Path(json.loads(order)))
        assert printed.seek(0, os.SEEK_END) == 0, "a library has printed something"
        replies.write(json.dumps(found) + "\n")
        replies.flush()


def _try(folder: Path) -> dict[str, Any]:
    before = begin_peak()
    limit = read_status("VmSize") + ADDRESSES
    resource.setrlimit(resource.RLIMIT_AS, (limit, resource.RLIM_INFINITY))
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    children = _count_children()
    start = time.process_time()
    try:
        outcome = _use(folder)
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
    seconds = time.process_time() - start + _count_children() - children
    nbytes = max(0, read_status("VmHWM") - before)
    return {"outcome": outcome, "seconds": seconds, "bytes": nbytes, "peak": read_peak()}


def _use(folder: Path) -> dict[str, str]:
    """What each step ended in: "" or the error, which has to be one of ours."""
    return {
        "inspect": _call("inspect", folder),
        "verify": _call("verify", folder),
        **_generate(folder),
    }


def _call(verb: str, folder: Path) -> str:
    """One verb with `--json`; its report has to be JSON, and what is printed has no control."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main([verb, str(folder), "--json"])
    report = json.loads(out.getvalue(), parse_constant=_refuse)
    assert code == ("error" in report), (code, report)
    text = err.getvalue()
    assert len(text) < _MAX_MESSAGE, f"{len(text)} characters: {text[:300]}"
    assert all(escape_line(line) == line for line in text.split("\n")), text
    if code:
        return report["error"]["message"] + str(report["error"]["faults"][:1])
    return ""


def _generate(folder: Path) -> dict[str, str]:
    model, refused = _expect(lambda: _load(folder))
    reader, unreadable = _expect(lambda: Tokenizer.from_folder(folder))
    found = {"load_model": refused, "tokenizer": unreadable}
    if model is None or reader is None:
        return found
    pieces: list[str] = []
    chat = reader.has_chat_template
    step = "chat" if chat else "generate"
    encode = reader.encode_chat if chat else reader.encode
    ids, failed = _expect(lambda: encode([_MESSAGE] if chat else _PROMPT))
    if ids is None or len(ids) > _COMPILED:  # a longer prompt would have XLA compile
        return found | {step: failed}
    answer, failed = _expect(
        lambda: generate(
            model,
            _PROMPT,
            tokenizer=reader,
            chat=chat,
            max_new_tokens=4,
            stop=["bab"],
            stream=lambda new: pieces.append(new[0]),
        )
    )
    if answer is not None:
        assert "".join(pieces) == answer.texts[0], (pieces, answer.texts)
    return found | {step: failed}


def _load(folder: Path) -> CausalLM:
    """The model; one of the same files that has been loaded is not loaded again."""
    names = ("config.json", "generation_config.json")
    if not all((folder / name).is_file() for name in names):
        return load_model(folder, progress=False)
    key = tuple((folder / name).read_bytes() for name in names)
    if key not in _loaded:
        _loaded.clear()
        _loaded[key] = load_model(folder, progress=False)
    return _loaded[key]


def _expect(action: Callable[[], Any]) -> tuple[Any, str]:
    """The result, or the text of an error of ours."""
    try:
        with warnings.catch_warnings():
            for message in _WARNINGS:
                warnings.filterwarnings("ignore", f".*{message}")
            warnings.filterwarnings("ignore", category=RuntimeWarning)  # NaN: it is told
            return action(), ""
    except Wna16Error as error:
        text = str(error)
        assert len(text) < _MAX_MESSAGE, f"{len(text)} characters: {text[:300]}"
        assert all(escape_line(line) == line for line in text.split("\n")), text
        return None, text[:300]


def _refuse(constant: str) -> None:
    raise AssertionError(f"{constant} is no JSON")


def _count_children() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


if __name__ == "__main__":
    work()
