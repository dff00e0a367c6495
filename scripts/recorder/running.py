"""The engines that are being recorded: each in a session of its own, all ended at once when time is up."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import threading
from collections.abc import Mapping
from typing import IO

_STOP_S = 20


class Running:
    """The engines that run now, so that all can be ended at once."""

    def __init__(self) -> None:
        self._processes: set[subprocess.Popen[bytes]] = set()
        self._over = False
        self._lock = threading.Lock()

    def start(self, command: list[str], log: IO[bytes], env: Mapping[str, str]) -> subprocess.Popen[bytes]:
        """Start one in a session of its own. Raises InterruptedError after `end`."""
        with self._lock:
            self._check()
            process = subprocess.Popen(
                command, stdout=log, stderr=subprocess.STDOUT, env=dict(env), start_new_session=True
            )
            self._processes.add(process)
            return process

    def stop(self, process: subprocess.Popen[bytes]) -> None:
        """End one with all that it started."""
        _signal(process, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_STOP_S)
        _signal(process, signal.SIGKILL)
        process.wait()
        with self._lock:
            self._processes.discard(process)

    def check(self) -> None:
        """Raises InterruptedError after `end`: what was answered since then was answered by no engine."""
        with self._lock:
            self._check()

    def _check(self) -> None:
        if self._over:
            raise InterruptedError("the recording was ended")

    def end(self) -> None:
        """Kill all; questions that are being asked then fail at once, and nothing is started any more."""
        with self._lock:
            self._over = True
            for process in self._processes:
                _signal(process, signal.SIGKILL)


def _signal(process: subprocess.Popen[bytes], number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, number)
