"""`ConfigReader`: typed access to a `config.json` that collects what is wrong with it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxwna16.models.config.asked_keys import AskedKeys
from loaders.errors import cut_text

MAX_COUNT = 2**31 - 1
POSITIVE = "a positive number that float32 can compute with"


class Section(dict[str, Any]):
    """A part of a config.json that describes a model by itself.

    Attributes:
      path: what stands before its keys where they are named, "text_config."; "" of the whole.
    """

    def __init__(self, values: Mapping[str, Any], path: str):
        super().__init__(values)
        self.path = path


class ConfigReader:
    """Reads values by key; a null counts as absent.

    Attributes:
      given: the config.json, or `Section` of one, as it is.
      config: the same without nulls.
      section: what stands before its keys in the reasons.
      reasons: what was refused so far, a line each.
    """

    def __init__(self, config: Mapping[str, Any]):
        self.given = AskedKeys(config)
        self.section = config.path if isinstance(config, Section) else ""
        self.config = AskedKeys({k: value for k, value in config.items() if value is not None})
        self.reasons: list[str] = []

    def refuse(self, key: str, found: object, expected: str) -> None:
        """Note that a key has a value that cannot be served."""
        reason = cut_text(f"{self.section}{key}: expected {expected}, found {found!r}")
        if reason not in self.reasons:
            self.reasons.append(reason)

    def count(
        self, key: str, default: int | None = None, least: int = 1, most: int = MAX_COUNT
    ) -> int:
        """An integer of at least `least` and at most `most`."""
        value = self.config.get(key, default)
        if isinstance(value, int) and not isinstance(value, bool) and least <= value <= most:
            return value
        expected = f"an integer of at least {least}"
        if isinstance(value, int) and value > most:
            expected += f" and at most {most}"
        self.refuse(key, value, expected)
        return least

    def count_either(self, keys: tuple[str, ...], default: int | None = None) -> int:
        """`count` of something that has several names; those that are given must agree."""
        given = [key for key in keys if key in self.config]
        for key in given[1:]:
            if self.config[key] != self.config[given[0]]:
                expected = f"the same as {given[0]} = {self.config[given[0]]!r}"
                self.refuse(key, self.config[key], expected)
        return self.count(given[0] if given else keys[0], default)

    def count_alike(self, key: str, default: int) -> int:
        """`count` of something that may be a list with the same number for each layer."""
        value = self.config.get(key, default)
        if not isinstance(value, list) or not value:
            return self.count(key, default)
        numbers = ConfigReader({key: value[0]})
        count = numbers.count(key)
        if numbers.reasons or any(other != value[0] for other in value):
            self.refuse(key, value, "an integer of at least 1, the same in every layer")
        return count

    def number(self, key: str, default: float) -> float:
        """A number above zero that float32 can compute with."""
        value = self.config.get(key, default)
        if is_positive(value):
            return float(value)
        self.refuse(key, value, POSITIVE)
        return default

    def number_or_none(self, key: str, default: float | None) -> float | None:
        """The same where a null is no number, and an absent key is `default`."""
        if key not in self.config:
            return None if key in self.given else default
        return self.number(key, 1.0)

    def flag(self, key: str, default: bool = False) -> bool:
        """True or false."""
        value = self.config.get(key, default)
        if not isinstance(value, bool):
            self.refuse(key, value, "true or false")
        return value is True

    def require(self, key: str, value: object) -> None:
        """Refuse another value than this one, or than a list of it; an absent key is right."""
        found = self.config.get(key, value)
        if found != value and not (isinstance(found, list) and all(x == value for x in found)):
            self.refuse(key, found, "nothing" if value is None else f"{value!r} in every layer")

    def choose(
        self, key: str, default: str | None, choices: tuple[str, ...], *, required: bool = False
    ) -> str | None:
        """One of `choices`; None of a key that is absent, or where the value is refused."""
        value = self.config.get(key, default)
        if value in choices or (value is None and not required):
            return value
        self.refuse(key, value, f"one of {', '.join(choices)}")
        return None


def is_positive(value: object, least: float = 1e-30, most: float = 1e30) -> bool:
    """Whether a value read from JSON is a number from `least` to `most`.

    Those are far from the ends of float32, so that products and logarithms of a few are finite.
    """
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return least <= value <= most
