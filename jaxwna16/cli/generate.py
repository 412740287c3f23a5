"""`jaxwna16 generate`: continues prompts, and prints the text while it is generated."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING, Any

from jaxwna16.cli.arguments import CallError, add_json, add_model

if TYPE_CHECKING:
    from rich.console import Console

    from jaxwna16.generation.text import Tokenizer
    from jaxwna16.generation.tokens import GenerationResult


def configure(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Continue a prompt. The text goes to stdout while it is generated (for several prompts: at "
        "the end). The speed goes to stderr."
    )
    add_model(parser)
    prompts = parser.add_mutually_exclusive_group(required=True)
    prompts.add_argument(
        "--prompt", metavar="TEXT", action="append", help="text to continue; repeat it for a batch"
    )
    prompts.add_argument(
        "--prompts", metavar="FILE", help="text file with one prompt per line, for a wide batch"
    )
    parser.add_argument(
        "--chat",
        action=argparse.BooleanOptionalAction,
        help="use the checkpoint's chat template; default: if it has one",
    )
    parser.add_argument(
        "--max-new-tokens",
        metavar="N",
        type=int,
        default=128,
        help="largest number of new tokens (default: 128)",
    )
    parser.add_argument(
        "--temperature",
        metavar="T",
        type=float,
        default=0.0,
        help="sampling temperature; 0 (the default) is greedy",
    )
    parser.add_argument(
        "--top-k", metavar="K", type=int, default=0, help="sample from the K likeliest; 0: off"
    )
    parser.add_argument(
        "--top-p",
        metavar="P",
        type=float,
        default=1.0,
        help="sample from the likeliest tokens that together reach probability P",
    )
    parser.add_argument(
        "--seed", metavar="N", type=int, default=0, help="seed of the sampling (default: 0)"
    )
    parser.add_argument(
        "--stop",
        metavar="TEXT",
        action="append",
        default=[],
        help="end the text before this string; may be repeated",
    )
    parser.add_argument(
        "--raw",
        action="store_true",
        help="print control characters of the text as they are; a terminal obeys them. Default: "
        "they are shown as \\x1b and the like on a terminal, and unchanged elsewhere",
    )
    parser.add_argument(
        "--logprobs",
        metavar="N",
        type=int,
        help="with --json: log-probabilities of the tokens and of the N likeliest at each position",
    )
    parser.add_argument(
        "--prefill-chunk",
        metavar="N",
        type=int,
        help="prefill prompts in pieces of N tokens (default: as many as the device has use and "
        "memory for, at most 2048)",
    )
    add_json(parser, sys.modules[__name__])


def run(args: argparse.Namespace) -> dict[str, Any]:
    import warnings

    from jaxwna16.cli.model import open_model, open_tokenizer
    from jaxwna16.cli.screen import make_console, show_text
    from jaxwna16.errors import InputError, NanWarning
    from jaxwna16.generation.generate import generate

    if args.logprobs is not None and not args.json:
        raise CallError("--logprobs is printed only in the JSON report: add --json")
    prompts = args.prompt or _read_prompts(args.prompts)
    if not all(prompts):
        raise InputError("the prompt is empty: give it at least one character")
    tokenizer = open_tokenizer(args)
    chat = tokenizer.has_chat_template if args.chat is None else args.chat
    model, facts = open_model(args)
    streams = len(prompts) == 1 and not args.json
    with (
        make_console(stderr=True).status("compiling and generating") as status,
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore", NanWarning)  # they are in the report

        def print_piece(texts: list[str]) -> None:
            status.stop()
            print(show_text(texts[0], raw=args.raw), end="", flush=True)

        generation = generate(
            model,
            prompts,
            tokenizer=tokenizer,
            chat=chat,
            max_new_tokens=args.max_new_tokens,
            temperature=args.temperature,
            top_k=args.top_k,
            top_p=args.top_p,
            seed=args.seed,
            stop=args.stop,
            logprobs=args.logprobs,
            prefill_chunk=args.prefill_chunk,
            stream=print_piece if streams else None,
        )
    result = generation.result
    timings = {
        "load_seconds": facts.pop("load_seconds"),
        "compile_seconds": result.compile_seconds,
        "prefill_seconds": result.prefill_seconds,
        "decode_seconds": result.decode_seconds,
        "prompt_tokens": result.prompt_tokens,
        "decoded_tokens": result.decoded_tokens,
        "prefill_tokens_per_second": result.prefill_tokens_per_second,
        "decode_tokens_per_second": result.decode_tokens_per_second,
    }
    report = {
        **facts,
        "chat": chat,
        "raw": args.raw,
        "prompts": prompts,
        "texts": generation.texts,
        "tokens": result.tokens,
        "logprobs": _describe_logprobs(result, tokenizer),
        "finish_reasons": result.finish_reasons,
        "timings": timings,
        "warnings": list(model.warnings),
    }
    if result.failures:
        report["error"] = _describe_failures(facts["folder"], result.failures)
    return report


def _describe_failures(folder: str, failures: list[str]) -> dict[str, Any]:
    from jaxwna16.cli.faults import describe_error
    from jaxwna16.errors import InputError

    what = (
        f"{folder}: the model's logits are not numbers: `jaxwna16 verify` finds NaN in the files; "
        "float16 overflows above 65504 (use --dtype float32 or bfloat16)"
    )
    return describe_error(InputError(what, failures))


def _read_prompts(path: str) -> list[str]:
    """The lines of a file that are not blank."""
    from jaxwna16.errors import InputError
    from jaxwna16.evaluation.perplexity import read_text

    # splitlines() would cut at U+2028, form feeds and the like, which a prompt may hold
    prompts = [line for line in read_text(path).split("\n") if line.strip()]
    if not prompts:
        raise InputError(f"{path}: the file has no prompt: all its lines are blank")
    return prompts


def _describe_logprobs(result: GenerationResult, tokenizer: Tokenizer) -> list[list[Any]] | None:
    """Each token and the likeliest ones at its position, each with the text of the token alone."""
    if result.logprobs is None or result.top_logprobs is None:
        return None

    def describe(token: int, logprob: float) -> dict[str, Any]:
        text = tokenizer.decode([token], skip_special_tokens=False)
        return {"token": token, "text": text, "logprob": logprob}

    rows = zip(result.tokens, result.logprobs, result.top_logprobs, strict=True)
    return [
        [
            describe(token, logprob) | {"top": [describe(*pair) for pair in top]}
            for token, logprob, top in zip(*row, strict=True)
        ]
        for row in rows
    ]


def show(report: dict[str, Any], console: Console) -> None:
    from jaxwna16.cli.screen import escape_controls, make_console, show_text
    from loaders.errors import escape_line

    if len(report["texts"]) == 1:
        print()  # the text itself was printed during generation
    else:
        for prompt, text in zip(report["prompts"], report["texts"], strict=True):
            console.print(escape_controls(f"> {prompt}"), style="bold")
            print(show_text(text, raw=report["raw"]))
    times = report["timings"]
    stderr = make_console(stderr=True)
    for warning in report["warnings"]:
        stderr.print(escape_line(f"warning: {warning}"))
    stderr.print(
        f"prefill {times['prompt_tokens']} tokens, {times['prefill_tokens_per_second']:.1f}/s; "
        f"decode {times['decoded_tokens']} tokens, {times['decode_tokens_per_second']:.1f}/s; "
        f"load {times['load_seconds']:.1f} s, compile {times['compile_seconds']:.1f} s; "
        f"{report['dtype']}",
        style="dim",
    )
