"""How the integers of a module lie in its files, which differs by tool and version.

compressed-tensors packs values of 1, 2, 4 and 8 bits alike in all its versions. Other widths are
"aligned" up to 0.17 (32 // bits whole values in a word, the rest of it unused) and a dense "stream"
of bits from 0.18 on. Both fill ceil(length / (32 // bits)) or ceil(length * bits / 32) words, which
tells them apart except for small layers. There the version decides, and without it nothing does.

Zero points are packed like the weight from 0.9.4 on ("words"); before, they are int8 ("bytes"), and
up to 0.9.2 they are left out where all of a module are 0 ("zeros").

AutoAWQ ("awq") and GPTQ ("gptq") hold the transpose, see `loaders.modules.awq_gptq_words`. GPTQ's
zero points are there also where the weight is symmetric, and may be stored as one less
("less_one…").

What has no kernel of its own is widened exactly: 1, 2 and 3 bits to 4, 5, 6 and 7 to 8. The last
group of AutoAWQ and GPTQ is short if the group size does not divide K, which no kernel supports. So
groups are divided into smaller ones of equal size, each with the scale of its group.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np

from loaders.errors import CheckpointError, Fault
from loaders.files.safetensors_file import TensorInfo
from loaders.schemes.config_groups import Scheme
from loaders.schemes.packings import ALIGNED, STREAM
from loaders.schemes.presets import parse_version
from pallas_kernels.format.spec import QuantSpec

_WIDTHS = (4, 8)
_FIRST_STREAM = (0, 18)
_FIRST_PACKED_ZEROS = (0, 9, 4)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Encoding:
    """How the integers of one module lie in its files.

    Attributes:
      bits: of a value there, 1 to 8.
      words: "stream" or "aligned", the same where `bits` divides 32; "awq" or "gptq"; "tiles" in
        converted copies.
      zero_points: "words", "bytes" (int8), "zeros" (left out, as all are 0) or "none" (symmetric).
        Of AutoAWQ and GPTQ: "words"; "less_one", the same less 1; "less_one_borrowed", where 0
        borrowed from its neighbour; "middle", all 2^(bits-1), or "middle_less_one" (symmetric).
      reordered: whether `weight_g_idx` says which group each input feature is in.
      group_size: in the files, where the last group is short; None where it is that of the spec.
    """

    bits: int
    words: str = STREAM
    zero_points: str = "none"
    reordered: bool = False
    group_size: int | None = None

    def count_groups(self, spec: QuantSpec) -> int:
        """How many groups the files have along K, a short last one among them."""
        return -(-spec.in_features // (self.group_size or spec.group_size))

    def count_words(self, length: int) -> int:
        """How many 32-bit words that many values fill."""
        return count_words(length, self.bits, self.words)

    def fills_words(self, length: int) -> bool:
        """Whether that many values end where a word ends."""
        per_word = 32 // self.bits
        return length % per_word == 0 if self.words == ALIGNED else length * self.bits % 32 == 0

    def mark_values(self, length: int) -> np.ndarray:
        """uint32 words in which those bits are set that belong to one of `length` values."""
        per_word = 32 // self.bits
        first = np.arange(length) * self.bits
        if self.words == ALIGNED:
            first = np.arange(length) // per_word * 32 + np.arange(length) % per_word * self.bits
        used = np.zeros(32 * self.count_words(length), np.bool_)
        for bit in range(self.bits):
            used[first + bit] = True
        return np.packbits(used, bitorder="little").view("<u4")


def count_words(length: int, bits: int, words: str) -> int:
    """How many 32-bit words `length` values fill, in "stream" or "aligned"."""
    return -(-length // (32 // bits)) if words == ALIGNED else -(-length * bits // 32)


def widen(bits: int) -> int:
    """The width that values of 1 to 8 bits have in the tile layout: 4 or 8."""
    return next(width for width in _WIDTHS if bits <= width)


def choose_encoding(
    path: str, found: Mapping[str, TensorInfo], scheme: Scheme, sizes: tuple[int, int], version: str
) -> Encoding:
    """Tell how a module's integers are encoded, from the shapes and dtypes of its tensors.

    If they fit no encoding, any one is returned: the check of the tensors then reports the faults.

    Args:
      path: the module's.
      found: its tensors by role, those of one expert where it is one.
      scheme: what config.json says of it.
      sizes: N and K.
      version: of the compressed-tensors that wrote the files, "" if config.json does not say.

    Raises:
      CheckpointError: if values of 3, 5, 6 or 7 bits could lie in two ways.
    """
    encoding = Encoding(
        bits=scheme.bits,
        zero_points=_find_zero_points(found.get("weight_zero_point"), scheme, version),
        reordered=scheme.reordered or "weight_g_idx" in found,
    )
    if 32 % scheme.bits == 0 or "weight_packed" not in found:
        return encoding
    ways = [w for w in (STREAM, ALIGNED) if _fits(found, encoding, sizes, w)]
    n, k = sizes
    lengths = [k, n] if encoding.zero_points == "words" else [k]
    if len(ways) < 2 or all(length <= 32 // scheme.bits for length in lengths):
        return dataclasses.replace(encoding, words=ways[0] if ways else STREAM)
    number = parse_version(version)
    if number is None:
        what = (
            f"values of {scheme.bits} bits are packed in another way up to compressed-tensors 0.17 "
            "than from 0.18 on, which the shapes do not tell apart here"
        )
        way_out = 'put "version": "0.17.0" or "0.18.0" into quantization_config of config.json'
        info = found["weight_packed"]
        raise CheckpointError(info.file.parent, [Fault(what, info.file.name, info.name, way_out)])
    words = STREAM if number >= _FIRST_STREAM else ALIGNED
    return dataclasses.replace(encoding, words=words)


def _find_zero_points(info: TensorInfo | None, scheme: Scheme, version: str) -> str:
    if scheme.symmetric:
        return "none"
    if info is not None:
        return "bytes" if info.dtype_name == "int8" else "words"
    number = parse_version(version)
    return "zeros" if number is None or number < _FIRST_PACKED_ZEROS else "words"


def _fits(
    found: Mapping[str, TensorInfo], encoding: Encoding, sizes: tuple[int, int], words: str
) -> bool:
    n, k = sizes
    if found["weight_packed"].shape[-1:] != (count_words(k, encoding.bits, words),):
        return False
    if encoding.zero_points != "words" or "weight_zero_point" not in found:
        return True
    return found["weight_zero_point"].shape[:1] == (count_words(n, encoding.bits, words),)
