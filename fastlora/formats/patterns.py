"""PEFT's `rank_pattern` and `alpha_pattern`: values by regular expressions over module paths."""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

from fastlora.formats.files import FormatError

# A path with or without escapes, "^" in front where it is a whole one: as nearly all keys are.
PATH = re.compile(r"\^?(?:[\w-]|\.|\\\W)*\$?")


class Patterns:
    r"""A path's value is that of the first key for which `(.*\.)?(key)$` matches the path.

    Keys that are paths are looked up, not tried one after the other, as files have thousands; the
    dots in them mean dots, where PEFT's would match any character. Raises FormatError naming the
    setting (`name`) and the key, for values that are no numbers and expressions that are none.
    """

    def __init__(self, name: str, patterns: Any = None) -> None:
        self._whole: dict[str, tuple[int, float]] = {}  # by path: place in the order, value
        self._ends: dict[str, tuple[int, float]] = {}
        self._others: list[tuple[int, re.Pattern[str], float]] = []
        if not isinstance(patterns, Mapping | None):
            raise FormatError(f"{name}: expected an object, got {patterns!r}")
        for place, (key, value) in enumerate((patterns or {}).items()):
            self._add(name, place, key, number(f"{name}: {key!r}", value))

    def _add(self, name: str, place: int, key: str, value: float) -> None:
        if PATH.fullmatch(key):
            path = re.sub(r"\\(\W)", r"\1", re.sub(r"(?<!\\)\$$", "", key.removeprefix("^")))
            table = self._whole if key.startswith("^") else self._ends
            table.setdefault(path, (place, value))
            return
        try:
            self._others.append((place, re.compile(rf"(.*\.)?({key})$"), value))
        except (re.error, OverflowError, RecursionError) as error:
            raise FormatError(f"{name}: {key!r} is no regular expression: {error}") from None

    def get(self, path: str) -> float | None:
        """The value for a module; None where no key matches it."""
        found = [self._ends[end] for end in ends(path) if end in self._ends]
        if path in self._whole:
            found.append(self._whole[path])
        first, value = min(found) if found else (math.inf, None)
        for place, expression, other in self._others:
            if place > first:
                break
            if expression.match(path):
                return other
        return value


def ends(path: str) -> Iterator[str]:
    """ "a.b.c", "b.c", "c"."""
    yield path
    at = path.find(".")
    while at >= 0:
        yield path[at + 1 :]
        at = path.find(".", at + 1)


def number(name: str, value: Any) -> float:
    """`value` where it is a finite number. Raises FormatError naming it."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        with contextlib.suppress(OverflowError):  # an integer beyond float64
            if math.isfinite(value):
                return value
    raise FormatError(f"{name}: expected a finite number, got {value!r}")
