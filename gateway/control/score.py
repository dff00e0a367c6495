"""The operator's own judge of a canary: a command of theirs that compares two versions, run with a time limit."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
import math
import os
import signal
from dataclasses import dataclass
from typing import Any

from backends import lifeline

_SHOWN_CHARACTERS = 500  # of what the command printed, in messages


class ScoreFailed(Exception):
    """The command gave no score; the message says why."""


@dataclass(frozen=True, slots=True)
class ScoreCommand:
    """`COMMAND BASELINE CANARY URL` prints by how much the canary is better: a number, or JSON with one as `score`."""

    command: tuple[str, ...]
    url: str  # of the gateway
    limit_s: float

    async def run(self, baseline: str, canary: str) -> tuple[float, dict[str, Any]]:
        """The score, and all that the command printed as JSON. Names as in `name@v2`. Raises ScoreFailed."""
        argv = [*self.command, baseline, canary, self.url]
        try:
            process = await asyncio.create_subprocess_exec(
                *argv,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.PIPE,
                start_new_session=True,
                preexec_fn=functools.partial(lifeline.end_with_parent, signal.SIGKILL, os.getpid()),
            )
        except OSError as error:
            raise ScoreFailed(f"{argv[0]} cannot be started: {error.strerror}") from error
        try:
            async with asyncio.timeout(self.limit_s):
                output, errors = await process.communicate()
        except TimeoutError as error:
            raise ScoreFailed(f"{argv[0]} did not answer within {self.limit_s:g} s") from error
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # and what it left running
        if process.returncode != 0:
            raise ScoreFailed(f"{argv[0]} ended with status {process.returncode}: {_tail(errors)}")
        return _read(output)


def _read(output: bytes) -> tuple[float, dict[str, Any]]:
    try:
        answer = json.loads(output)
        figures = answer if isinstance(answer, dict) else {"score": answer}
        score = float(figures["score"])
    except (ValueError, KeyError, TypeError) as error:
        raise ScoreFailed(
            f"it must print a number, or JSON with a number as `score`; printed {_tail(output)}"
        ) from error
    if not math.isfinite(score):
        raise ScoreFailed(f"the score is {score}; it must be a number that is below zero, zero or above")
    return score, figures


def _tail(output: bytes) -> str:
    return repr(output.decode(errors="replace").strip()[-_SHOWN_CHARACTERS:])
