"""Several processes of one run on this machine: what torchrun does, with the run's own exit status."""

from __future__ import annotations

import functools
import math
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType

from backends import lifeline
from trainer.control import SIGNALS

# Set beside torchrun's variables: the descriptor of the socket where they meet, which the first has; empty for others.
MEETING = "TUNEGATE_MEETING_FD"
EXIT_PAUSED = 75  # EX_TEMPFAIL: run `train resume` to go on
_GRACE_S = 30.0  # for the others, once one has failed; they hear of it by the connection that it held
_POLL_S = 0.1

Process = subprocess.Popen[bytes]


def launch(count: int, arguments: Sequence[str]) -> int:
    """Run `python -m trainer ARGUMENTS` as so many processes; 0, or 75 where the run paused, or 1 where one failed."""
    threads = str(max(1, (os.cpu_count() or 1) // count))
    processes: list[Process] = []
    with _passed_on(processes):
        # Where they meet. It listens already and is handed to the first of them: nobody can take its port meanwhile.
        with socket.create_server(("127.0.0.1", 0)) as meeting:
            world = {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1"}
            world["MASTER_PORT"] = str(meeting.getsockname()[1])
            for rank in range(count):
                # They pause where this process dies.
                tied = functools.partial(lifeline.end_with_parent, signal.SIGTERM, os.getpid())
                handed = () if rank else (meeting.fileno(),)
                place = {"RANK": str(rank), "LOCAL_RANK": str(rank), MEETING: ",".join(map(str, handed))}
                # A group of its own, so that Ctrl-C reaches it once: through here.
                processes.append(
                    subprocess.Popen(
                        [sys.executable, "-m", "trainer", *arguments],
                        env={"OMP_NUM_THREADS": threads} | os.environ | world | place,
                        process_group=0,
                        preexec_fn=tied,
                        pass_fds=handed,
                    )
                )
        statuses = _ended(processes)
    return 1 if set(statuses) - {0, EXIT_PAUSED} else max(statuses)


def _ended(processes: list[Process]) -> list[int]:
    """The status of each; where one fails, the others are killed unless they end soon."""
    killing_at = math.inf
    while None in (statuses := [process.poll() for process in processes]):
        if set(statuses) - {None, 0, EXIT_PAUSED}:
            killing_at = min(killing_at, time.monotonic() + _GRACE_S)
        if time.monotonic() > killing_at:
            for process in processes:
                process.kill()
        time.sleep(_POLL_S)
    return [process.returncode for process in processes]


@contextmanager
def _passed_on(processes: list[Process]) -> Iterator[None]:
    """Inside, signals that pause a run go to all of its processes."""

    def forward(number: int, frame: FrameType | None) -> None:
        for process in processes:
            process.send_signal(number)

    before = {number: signal.signal(number, forward) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
