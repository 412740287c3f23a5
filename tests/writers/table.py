"""The part of docs/reliability.md about other tools' writers."""

from __future__ import annotations

import dataclasses
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping

from tests.writers.check import CLOSE, Outcome
from tests.writers.orders import CALIBRATED, METHODS, NEAREST, SETTINGS, Setting

MARK = "writers"
_MOST_CHARACTERS = 160


@dataclasses.dataclass(frozen=True, order=True)
class Key:
    """A writer and a model; their folders are one row of the table."""

    model: str
    writer: str


Outcomes = Mapping[Key, Mapping[Setting, Outcome]]


def describe(
    outcomes: Outcomes, versions: Mapping[str, Mapping[str, str]], date: str, minutes: float
) -> str:
    """The whole part."""
    few = min(len(found) for found in outcomes.values())
    used = [f"| {writer} | {_list_versions(facts)} |" for writer, facts in versions.items()]
    methods = [
        f"| {writer} | {METHODS[writer][NEAREST]} | {METHODS[writer][CALIBRATED]} |"
        for writer in versions
    ]
    lines = [
        *_INTRODUCTION.format(
            date=date, minutes=minutes, close=CLOSE, settings=len(SETTINGS), few=few
        ).splitlines(),
        *used,
        "",
        "| writer | nearest | calibrated |",
        "| --- | --- | --- |",
        *methods,
        *_TABLE.splitlines(),
        *(_describe_row(key, found) for key, found in outcomes.items()),
        *_ERRORS.splitlines(),
        *_list_errors(outcomes),
        *_NAMES.splitlines(),
        *_list_names(outcomes),
        *_SETTINGS.splitlines(),
        *_list_settings(outcomes),
    ]
    return "\n".join(lines)


def _list_versions(facts: Mapping[str, str]) -> str:
    return ", ".join(f"{name} {version}" for name, version in facts.items()) or "does not start"


def _describe_row(key: Key, found: Mapping[Setting, Outcome]) -> str:
    written = [outcome for outcome in found.values() if not outcome.writer_error]
    good = [outcome for outcome in written if not outcome.our_error]
    cells = (
        key.model,
        key.writer,
        f"{len(written)} of {len(found)}",
        f"{len(good)}",
        f"{sum(outcome.modules for outcome in written):,}",
        f"{max(outcome.difference for outcome in good):.1e}" if good else "",
    )
    return f"| {' | '.join(cells)} |"


def _list_errors(outcomes: Outcomes) -> Iterator[str]:
    """Who failed with what, as one line for each message."""
    alike: dict[tuple[str, str], dict[Key, list[Setting]]] = defaultdict(dict)
    for key, found in outcomes.items():
        for setting, outcome in found.items():
            if outcome.writer_error or outcome.our_error:
                whose = f"{key.writer} fails" if outcome.writer_error else "jaxwna16 fails"
                text = shorten(outcome.writer_error or f"{key.writer}: {outcome.our_error}")
                alike[whose, text].setdefault(key, []).append(setting)
    if not alike:
        yield "None."
    for (whose, text), where in sorted(alike.items()):
        places = (
            f"{key.model} ({name_settings(settings, list(outcomes[key]))})"
            for key, settings in where.items()
        )
        yield f"- {whose} at {'; '.join(places)}: `{text}`"


def name_settings(settings: list[Setting], tried: list[Setting]) -> str:
    """Those of the ones that were tried, in a few words: "all", "calibrated", "W4A16 channel"."""
    if len(settings) == len(tried):
        return "all"
    alike, words = tried, []
    for field, word in _WORDS.items():
        values = {getattr(setting, field) for setting in settings}
        if len(values) == 1:
            value = values.pop()
            alike = [setting for setting in alike if getattr(setting, field) == value]
            words.append(word[value])
    if len(alike) == len(settings):
        return " ".join(words)
    return f"{len(settings)} of {len(tried)}, such as {settings[0]}"


_WORDS = {
    "symmetric": {True: "W4A16", False: "W4A16_ASYM"},
    "channel": {True: "channel", False: "groups"},
    "method": {NEAREST: NEAREST, CALIBRATED: CALIBRATED},
}


def shorten(text: str) -> str:
    """A message on one line, without what differs from run to run."""
    text = re.sub(r"/[\w./+-]*/", "…/", text.replace("`", "'").replace("|", "/"))
    text = re.sub(r"\b\d+\.\d+\b(?!\.)", "N", re.sub(r"layers\.\d+", "layers.N", text))
    return text if len(text) <= _MOST_CHARACTERS else f"{text[: _MOST_CHARACTERS - 1]}…"


def _list_names(outcomes: Outcomes) -> Iterator[str]:
    """For each model the names of packed weights, and which writers use them."""
    for model in dict.fromkeys(key.model for key in outcomes):
        users: dict[frozenset[str], list[str]] = defaultdict(list)
        for key, found in outcomes.items():
            names = {outcome.names for outcome in found.values() if outcome.names}
            for each in names if key.model == model else ():
                users[each].append(key.writer)
        for names, writers in users.items():
            yield f"| {model} | {', '.join(sorted(set(writers)))} | {fold(names)} |"


def fold(names: frozenset[str]) -> str:
    """ "a.q_proj", "a.k_proj" -> "`a.{k,q}_proj`"; the part before is left out if all have it."""
    parents: dict[str, list[str]] = defaultdict(list)
    for name in sorted(names):
        parent, _, last = name.rpartition(".")
        parents[parent].append(last)
    return ", ".join(
        f"`{parent}.{lasts[0] if len(lasts) == 1 else '{' + ','.join(lasts) + '}'}`"
        for parent, lasts in parents.items()
    )


def _list_settings(outcomes: Outcomes) -> Iterator[str]:
    counts: Counter[tuple[str, str]] = Counter()
    for key, found in outcomes.items():
        counts.update((key.writer, o.settings) for o in found.values() if o.settings)
    for (writer, settings), count in sorted(counts.items()):
        yield f"| {writer} | {settings} | {count} |"


_INTRODUCTION = """\
## What other tools write

Made by `make test-writers` on {date}, in {minutes:.0f} minutes; not edited by hand.

Names and settings of checkpoints change with the releases of the tools that write them. So these
tools, each the newest that a package index has, quantize the first layers of SmolLM2 and a small
random model of each `model_type` here, in up to {settings} ways: round to nearest and calibrated,
W4A16 and W4A16_ASYM, in groups and by channel. Llama and Mixtral are written in all of them, others
in two, one of each method, and those whose layers another model has in {few}: the settings decide
what is written for a weight, and the model what its weights are called.

Each folder must load, pass `jaxwna16 verify --oracle` (every weight is bit for bit what
compressed-tensors makes of it), and give the logits of the writer's own model. These are
transformers', computed in the writer's process: its weights dequantized by the writer, in float32.
They differ by less than {close:.0e} of the largest.

| writer | versions |
| --- | --- |"""
_TABLE = """
A writer that does not know a model, or fails at it, has no folder there to check; the list below
the table says why. "Good" are the folders that pass all checks, "weights" those that are equal to
compressed-tensors' bit for bit, and "difference" is the largest of the logits.

| model | writer | written | good | weights | difference |
| --- | --- | ---: | ---: | ---: | ---: |"""
_ERRORS = """
### What failed
"""
_NAMES = """
### Names that they used

Of packed weights, with N for a number.

| model | writer | names |
| --- | --- | --- |"""
_SETTINGS = """
### Formats that they named

| writer | in `quantization_config` | folders |
| --- | --- | ---: |"""
