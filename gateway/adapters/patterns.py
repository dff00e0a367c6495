"""peft's rank_pattern and alpha_pattern: regular expressions over the end of a module's name, the first match wins.

They come from a client, so only such as cannot take long are let through.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Generic, TypeVar

MODULE_CHARS = 128  # the longest module name that is matched
_ALLOWED = re.compile(r"[\w.\\^$*\[\]-]{1,256}")  # a group, or a repetition of one, could make a match take for ever
_STARS_A_PATTERN = 2
_STARRED = 16  # patterns with a star; they cost a thousand times as much as plain names
_MOST = 4096

Value = TypeVar("Value")


class BadPattern(ValueError):
    """A pattern that is not let through; the message says why."""


class Patterns(Generic[Value]):
    """A mapping from patterns to values, looked up by module name as peft does."""

    def __init__(self, values: Mapping[str, Value]) -> None:
        """Raises BadPattern."""
        self._patterns: list[tuple[re.Pattern[str], Value]] = []
        if len(values) > _MOST or sum("*" in pattern for pattern in values) > _STARRED:
            raise BadPattern(f"more than {_MOST} patterns, or more than {_STARRED} with a '*'; name the modules")
        for pattern, value in values.items():
            if not _ALLOWED.fullmatch(pattern) or pattern.count("*") > _STARS_A_PATTERN:
                raise BadPattern(f"pattern {pattern[:200]!r} is too clever; use plain module names, '.' and '*'")
            try:
                self._patterns.append((re.compile(rf"(.*\.)?({pattern})$"), value))
            except re.error as error:
                raise BadPattern(f"pattern {pattern[:200]!r} is no regular expression: {error}") from error

    def __bool__(self) -> bool:
        return bool(self._patterns)

    def __iter__(self) -> Iterator[Value]:
        return (value for _, value in self._patterns)

    def of(self, module: str, default: Value) -> Value:
        """The value of the first pattern that matches a module's name without peft's prefix."""
        return next((value for pattern, value in self._patterns if pattern.match(module)), default)
