"""What can be wrong with a checkpoint: one error, which lists every fault that was found."""

from __future__ import annotations

import dataclasses
import math
import re
from collections import defaultdict
from collections.abc import Iterable, Sequence

from pallas_kernels.errors import Wna16Error

_FEW = 3
_SHOWN = 100  # of many faults, in the text of an error
_MOST_CHARACTERS = 4000
_UNSEEN = re.compile(
    "[\x00-\x1f\x7f-\x9f\xad\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb"
    "\ud800-\udfff\U000e0000-\U000e007f]"
)
"""What ends a line, moves the cursor, turns the direction of writing, or is not seen."""
# between dots, as layers and experts have them
_NUMBER = re.compile(r"(?:(?<=\.)|^)(?:0|[1-9][0-9]{0,8})(?=\.|$)")


@dataclasses.dataclass(frozen=True)
class Fault:
    """One thing that is wrong, and where.

    Attributes:
      what: the fault in one sentence, with what was expected and what was found.
      file: name of the file it was found in.
      tensor: name of the tensor or module, or of the field of config.json.
      way_out: what the reader can do about it.
    """

    what: str
    file: str = ""
    tensor: str = ""
    way_out: str = ""

    def __post_init__(self) -> None:
        for field in ("what", "file", "tensor"):  # which hold what stands in files
            object.__setattr__(self, field, cut_text(getattr(self, field)))

    def __str__(self) -> str:
        where = ": ".join(part for part in (self.file, self.tensor) if part)
        text = f"{where}: {self.what}" if where else self.what
        text += f" ({self.way_out})" if self.way_out else ""
        return escape_line(text)


class CheckpointError(Wna16Error, ValueError):
    """A checkpoint cannot be read. `faults` lists every reason, not the first; the text a hundred.

    Example:
      ```python
      try:
          jaxwna16.load_checkpoint("path/to/broken")
      except jaxwna16.CheckpointError as error:
          for fault in error.faults:
              print(fault.file, fault.tensor, fault.what)
      ```
    """

    def __init__(self, path, faults: Sequence[Fault]):
        self.path, self.faults = str(path), tuple(dict.fromkeys(faults))
        count = f"{len(self.faults)} faults" if len(self.faults) > 1 else "1 fault"
        super().__init__(
            "\n  - ".join(
                [escape_line(f"{path}: {count}"), *list_first(list(map(str, self.faults)), _SHOWN)]
            )
        )


def cut_text(text: str) -> str:
    """The same, or the beginning and the end of a text that is too long for a message."""
    rest = len(text) - _MOST_CHARACTERS
    if rest <= 0:
        return text
    return f"{text[: -rest - 500]} … ({rest:,} more characters) … {text[-500:]}"


def list_first(texts: Sequence[str], most: int) -> list[str]:
    """The same, or the first of too many for a message and how many more there are."""
    rest = len(texts) - most
    return [*map(cut_text, texts[:most]), *([f"… and {rest:,} more"] if rest > 0 else [])]


def limit_faults(faults: Sequence[Fault], most: int) -> list[Fault]:
    """The same, or the first of too many and one that says how many more there are."""
    rest = len(faults) - most
    more = [Fault(f"… and {rest:,} more", faults[most].file)] if rest > 0 else []
    return [*faults[:most], *more]


def escape_line(text: str) -> str:
    """Write a text as one line that shows what is in it: `\\n` and `\\u202e` in place of those.

    Names come from a stranger's files: none may look like a line of ours, or like another name.
    """
    return _UNSEEN.sub(lambda match: match[0].encode("unicode_escape").decode(), text)


def join_alike(faults: Iterable[Fault]) -> list[Fault]:
    """Join faults that say the same of more than three names into one.

    It has the first name, and lists all in short: "model.layers.0-27.mlp.up_proj".
    """
    alike: dict[tuple[str, str], list[Fault]] = defaultdict(list)
    for fault in faults:
        alike[fault.what, fault.way_out].append(fault)
    joined: list[Fault] = []
    for (what, _), same in alike.items():
        if len(same) > _FEW:
            names = shorten(fault.tensor for fault in same)
            text = f"{what}; the same of {len(same)} in all: {', '.join(names)}"
            same = [dataclasses.replace(same[0], what=text)]
        joined += same
    return joined


def shorten(names: Iterable[str]) -> list[str]:
    """Names that differ in numbers alone as one: "layers.0.up", "layers.1.up" -> "layers.0-1.up".

    If several numbers differ, and some combinations are not there, stars stand for the numbers.
    """
    alike: dict[tuple[str, ...], set[tuple[int, ...]]] = defaultdict(set)
    for name in names:
        alike[tuple(_NUMBER.split(name))].add(tuple(map(int, _NUMBER.findall(name))))
    return [_write_numbers(texts, numbers) for texts, numbers in alike.items()]


def _write_numbers(texts: tuple[str, ...], numbers: set[tuple[int, ...]]) -> str:
    columns = [set(column) for column in zip(*numbers, strict=True)]
    is_full = math.prod(map(len, columns)) == len(numbers)
    written = [write_ranges(c) if is_full or len(c) == 1 else "*" for c in columns]
    return "".join(text + number for text, number in zip(texts, [*written, ""], strict=True))


def suggest(faults: Iterable[Fault], way_out: str) -> list[Fault]:
    """The same faults, with a way out for those that name none."""
    return [f if f.way_out else dataclasses.replace(f, way_out=way_out) for f in faults]


def write_ranges(numbers: Iterable[int]) -> str:
    """[0, 1, 2, 5] -> "0-2,5"."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ",".join(str(r[0]) if len(r) == 1 else f"{r[0]}-{r[-1]}" for r in runs)
