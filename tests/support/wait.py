"""Wait for a condition with a deadline: the only form of waiting in the tests."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

Value = TypeVar("Value")


def eventually(condition: Callable[[], Value], timeout_s: float = 30.0, every_s: float = 0.02) -> Value:
    """The first truthy value of `condition`. Raises AssertionError when the time is over."""
    deadline = time.monotonic() + timeout_s
    while True:
        value = condition()
        if value:
            return value
        if time.monotonic() > deadline:
            raise AssertionError(f"not true within {timeout_s:g} s; last value {value!r}")
        time.sleep(every_s)
