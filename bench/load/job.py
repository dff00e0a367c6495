"""What the loop sends: one request, ready as bytes, with what was meant by it."""

from __future__ import annotations

from collections.abc import Callable

import msgspec

FollowUp = Callable[[str], "tuple[float, Job]"]


class Job(msgspec.Struct):
    """One request to send. `follow_up` makes the next turn from the answer's text: (think time in seconds, job)."""

    index: int
    segment: int
    target: str
    model: str
    body: bytes
    output_tokens: int
    intended_ns: int | None = None
    prompt_tokens: int | None = None
    output_exact: bool = False
    phase: str = "load"
    turn: int = 0
    follow_up: FollowUp | None = None
