"""Programs that the trainer's and the quantizer's stages run; what they started ends with them."""

from __future__ import annotations

import contextlib
import functools
import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from backends import lifeline, proctree

_TOLD_CHARACTERS = 1500
_POLL_S = 0.2
_GONE_S = 20.0  # for what was killed to be gone: its device memory with it


class Ended(AssertionError):
    """A program failed, or took too long; the text has the end of its log."""


def run(
    command: Sequence[str],
    log: Path,
    limit_s: float,
    env: Mapping[str, str] | None = None,
    kill_when: Callable[[], bool] = lambda: False,
) -> bool:
    """Run to the end; True where it was killed because `kill_when` said so. Raises Ended."""
    with log.open("wb") as stream:
        process = subprocess.Popen(
            list(command),
            stdin=subprocess.DEVNULL,
            stdout=stream,
            stderr=stream,
            start_new_session=True,
            preexec_fn=functools.partial(lifeline.end_with_parent, signal.SIGTERM, os.getpid()),
            env=os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"} | dict(env or {}),
        )
    why, killed, until = "", False, time.monotonic() + limit_s
    try:
        while process.poll() is None and not (killed := kill_when()):
            if time.monotonic() > until:
                why = "not through in its time: ended. "
                break
            try:
                process.wait(_POLL_S)
            except subprocess.TimeoutExpired:
                continue
    finally:
        end(process)
    if killed:
        return True
    if process.returncode:
        raise Ended(why + last_words(process, log))
    return False


def end(process: subprocess.Popen[bytes]) -> None:
    """Unless it has ended by itself: kill it and all below it, in any group and session, and wait for their end."""
    if process.poll() is not None:
        return
    below = proctree.descendants(process.pid)
    born = {pid: proctree.start_ticks(pid) for pid in below}
    for pid in (*below, process.pid):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    process.wait()
    until = time.monotonic() + _GONE_S
    while time.monotonic() < until and any(start and proctree.start_ticks(pid) == start for pid, start in born.items()):
        time.sleep(_POLL_S)


def last_words(process: subprocess.Popen[bytes], log: Path) -> str:
    """How it ended, and the end of its log, without the many lines of a progress bar."""
    lines = log.read_text(errors="replace").replace("\r", "\n").splitlines()
    said = "\n".join(line for line in lines if "it/s]" not in line and "s/it]" not in line)
    return f"exit status {process.returncode}: {said[-_TOLD_CHARACTERS:]}"
