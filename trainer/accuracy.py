"""The reward `accuracy`: 1 where the answer's mathematics equals the row's `solution`. Runs in the reward worker."""

from __future__ import annotations

from typing import Any

from math_verify import parse, verify


def accuracy(completions: list[Any], solution: list[str], **_: Any) -> list[float]:
    """1 for a right answer, 0 for a wrong or unreadable one. `solution`: LaTeX, a number, or text with `$…$`."""
    return [float(_equal(parts[-1]["content"], gold)) for parts, gold in zip(completions, solution, strict=True)]


def _equal(answer: str, gold: str) -> bool:
    # Plain numbers are read as mathematics too.
    known = parse(str(gold)) or parse(f"${gold}$")
    # The time limits of math-verify use alarms; the worker's caller limits the whole call instead.
    return bool(verify(known, parse(answer, parsing_timeout=None), timeout_seconds=None))
