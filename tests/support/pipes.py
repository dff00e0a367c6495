"""Pipes in the states that a slow reader leaves them in."""

from __future__ import annotations

import contextlib
import os


def full_pipe() -> tuple[int, int]:
    """Its reading and its writing end: lines of x fill it, so that the next write waits for a reader."""
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    with contextlib.suppress(BlockingIOError):
        while True:
            os.write(writing, b"x" * 4095 + b"\n")
    os.set_blocking(writing, True)
    return reading, writing
