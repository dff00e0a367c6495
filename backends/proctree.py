"""The process table: who lives, who is below whom, and what a killed guard left behind. Standard library only."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import time
from pathlib import Path
from typing import NamedTuple

MARK_VARIABLE = "TUNEGATE_REPLICA"  # in an engine's environment: the replica's state file
TRACKER_GRACE_S = 2.0  # for resource trackers, once all else was killed
_LEFTOVERS_S = 10.0
_POLL_S = 0.05


class Process(NamedTuple):
    """A row of the process table."""

    state: str  # Z: its first thread has ended, others may not have
    parent: int
    start_ticks: int  # since boot


def read_process(pid: int) -> Process | None:
    """One process; None if there is none of that pid."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    fields = stat.rpartition(")")[2].split()  # the command's name before it may hold spaces
    return Process(fields[0], int(fields[1]), int(fields[19]))


def start_ticks(pid: int) -> int | None:
    """When a process started, in clock ticks since boot; None if it has ended.

    With the pid it names a process for good: pids are reused, this pair is not.
    """
    process = read_process(pid)
    return process.start_ticks if process and process.state not in "ZX" else None


def read_processes() -> dict[int, Process]:
    """All processes by pid."""
    pids = [int(name) for name in os.listdir("/proc") if name.isdigit()]  # noqa: PTH208 - half the cost of iterdir
    return {pid: process for pid in pids if (process := read_process(pid))}


def descendants(*roots: int) -> list[int]:
    """All processes below `roots`, zombies too."""
    children: dict[int, list[int]] = {}
    for pid, process in read_processes().items():
        children.setdefault(process.parent, []).append(pid)
    found, queue = [], list(roots)
    while queue:
        below = children.get(queue.pop(), [])
        found += below
        queue += below
    return found


def leftovers(state_path: Path) -> list[int]:
    """What a killed guard left of its engine: what carries the mark or writes to the engine's output, and below these.

    Two signs, because vLLM's workers overwrite the memory that holds their environment, mark and all, and a worker
    may have turned its output elsewhere.
    """
    mark = f"{MARK_VARIABLE}={state_path}".encode()
    output = _output_of(state_path)
    found = {
        pid
        for pid, process in read_processes().items()
        if process.state not in "ZX" and (_environment_holds(pid, mark) or (output and _writes_to(pid, output)))
    }
    return sorted(found.union(descendants(*found)))


def _output_of(state_path: Path) -> str | None:
    """The pipe that the engine of a state file writes to; None without one, or when the machine has restarted since."""
    try:
        state = json.loads(state_path.read_text())
    except (OSError, ValueError):
        return None
    return state.get("output") if state.get("boot") == boot_id() else None


def boot_id() -> str:
    """Names this run of the machine."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def _writes_to(pid: int, pipe: str) -> bool:
    for fd in (1, 2):
        with contextlib.suppress(OSError):
            if os.readlink(f"/proc/{pid}/fd/{fd}") == pipe:  # noqa: PTH115 - a pipe's name is no path
                return True
    return False


def _environment_holds(pid: int, entry: bytes) -> bool:
    try:
        return entry in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:
        return False  # another user's, or gone


def end_leftovers(state_path: Path) -> int:
    """SIGKILL what an earlier, killed guard left of this replica, wait until it is gone; how many there were."""
    seen: set[int] = set()
    started = time.monotonic()
    while (left := leftovers(state_path)) and time.monotonic() < started + _LEFTOVERS_S:
        seen.update(left)
        kill(left, spare_trackers=time.monotonic() < started + TRACKER_GRACE_S)
        time.sleep(_POLL_S)
    return len(seen)


def kill(pids: list[int], spare_trackers: bool) -> None:
    """SIGKILL. Python's resource trackers, spared, end by themselves when the others are gone, and remove the shared
    memory that these left: half a gigabyte for one vLLM."""
    for pid in pids:
        if not (spare_trackers and _is_tracker(pid)):
            send([pid], signal.SIGKILL)


def _is_tracker(pid: int) -> bool:
    try:
        return b"multiprocessing.resource_tracker" in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False


def send(pids: list[int], number: signal.Signals) -> None:
    """Signal processes; those that have ended meanwhile are fine."""
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)
