"""Turns on a GPU that stages share: what measures waits until nothing else is busy there.

Engines take minutes to start and seconds to measure. So they start side by side, each with its share of the memory, and
stand idle while one of them is measured. Each GPU has a file lock in the suite's directory, which ends with its holder;
suites with other directories do not see it. While a stage waits, DIR/STAGE.waits exists, and its limit does not count.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def busy(out: Path, stage: str) -> Iterator[None]:
    """Work that would disturb a measurement: any number of stages at a time, none while one measures."""
    with _locked(out, stage, fcntl.LOCK_SH):
        yield


@contextlib.contextmanager
def quiet(out: Path, stage: str) -> Iterator[None]:
    """A measurement: one stage at a time, and nothing busy beside it."""
    with _locked(out, stage, fcntl.LOCK_EX):
        yield


def mark(out: Path, stage: str) -> Path:
    """What exists while the stage waits."""
    return out / f"{stage}.waits"


@contextlib.contextmanager
def _locked(out: Path, stage: str, how: int) -> Iterator[None]:
    with contextlib.ExitStack() as held:
        mark(out, stage).touch()
        for gpu in sorted((os.environ.get("CUDA_VISIBLE_DEVICES") or "none").split(",")):  # in one order
            lock = held.enter_context((out / f"gpu-{gpu}.lock").open("w"))
            fcntl.flock(lock, how)
        mark(out, stage).unlink()
        yield
