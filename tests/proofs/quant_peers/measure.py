"""What a run costs: a process and all below it, as the kernel counts them."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Cost:
    """Of one command, from its start to its end."""

    wall_s: float
    cpu_s: float  # user and system, of its whole tree
    peak_bytes: int  # resident memory of the largest process in it
    exit_code: int


def run(command: Sequence[str], log: Path, environment: Mapping[str, str]) -> Cost:
    """Run a command to its end, its output into `log`."""
    started = time.monotonic()
    with log.open("wb") as stream:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=stream, stderr=stream, env={**os.environ, **environment}
        )
        try:
            _, status, usage = os.wait4(process.pid, 0)
        except BaseException:
            process.kill()
            process.wait()
            raise
    process.returncode = os.waitstatus_to_exitcode(status)  # what wait4 took, Popen cannot ask for again
    wall_s = time.monotonic() - started
    return Cost(wall_s, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024, process.returncode)
