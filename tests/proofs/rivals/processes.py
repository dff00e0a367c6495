"""CPU time and memory of a process and all below it, from /proc."""

from __future__ import annotations

import os
from pathlib import Path

from tests.support.gateway import descendants

_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")


def tree(pid: int) -> list[int]:
    """A process and its descendants. Look once: it reads all of /proc."""
    return [pid, *descendants(pid)]


def cpu(pids: list[int]) -> tuple[int, int, int]:
    """CPU time of these processes so far: of their living threads, in ns; its user and its system part, in ticks."""
    user = system = nanoseconds = 0
    for pid in pids:
        try:
            fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
            nanoseconds += sum(
                int(task.read_text().split()[0]) for task in Path(f"/proc/{pid}/task").glob("*/schedstat")
            )
        except OSError:
            continue
        user += int(fields[11])
        system += int(fields[12])
    return nanoseconds, user, system


def rss_bytes(pids: list[int]) -> int:
    """Resident memory, summed; what they share is counted for each."""
    total = 0
    for pid in pids:
        try:
            total += int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * _PAGE_BYTES
        except OSError:
            continue
    return total
