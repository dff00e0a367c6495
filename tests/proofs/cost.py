"""What a run costs: a process and all below it, as the kernel counts them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

# The kernel counts the peak of a process from the memory of the one that started it: so a small one does.
_STARTER = """
import json, os, subprocess, sys
process = subprocess.Popen(sys.argv[2:])
_, status, usage = os.wait4(process.pid, 0)
cost = [os.waitstatus_to_exitcode(status), usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024]
os.write(int(sys.argv[1]), json.dumps(cost).encode())
"""


@dataclass(frozen=True)
class Cost:
    """Of one command, from its start to its end."""

    wall_s: float
    cpu_s: float  # user and system, of its whole tree
    peak_bytes: int  # resident memory of the largest process in it
    exit_code: int


def run(command: Sequence[str], log: Path, environment: Mapping[str, str], limit_s: float | None = None) -> Cost:
    """Run a command to its end, its output into `log`. Raises OSError; TimeoutError, when it ran for `limit_s`."""
    started = time.monotonic()
    reading, writing = os.pipe()
    with log.open("wb") as stream, open(reading, "rb") as answer:
        process = subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", _STARTER, str(writing), *command],
            stdin=subprocess.DEVNULL,
            stdout=stream,
            stderr=stream,
            env={**os.environ, **environment},
            pass_fds=(writing,),
            start_new_session=True,
        )
        os.close(writing)
        alarm = threading.Timer(limit_s or threading.TIMEOUT_MAX, os.killpg, (process.pid, signal.SIGKILL))
        alarm.daemon = True
        alarm.start()
        try:
            told = answer.read()
            process.wait()
        except BaseException:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            raise
        finally:
            alarm.cancel()
    if not told and limit_s and time.monotonic() - started >= limit_s:
        raise TimeoutError(f"not through after {limit_s:.0f} s: ended")
    if not told:
        raise OSError(f"{command[0]} cannot be started: {log} says why")
    exit_code, cpu_s, peak_bytes = json.loads(told)
    return Cost(time.monotonic() - started, cpu_s, peak_bytes, exit_code)
