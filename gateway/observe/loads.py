"""What the engines say of themselves, from control to the relays: a mapped file of int64 cells, a row a replica.

    engines.load    for each replica: when it was asked (monotonic ms) | requests that it queues | KV cache used, 1e-6

Control writes it about once a second, relays read it without a system call. What is old counts as nothing.
"""

from __future__ import annotations

import mmap
import os
import time
from collections.abc import Sequence
from pathlib import Path

from gateway.observe.cells import MAX_REPLICAS

NAME = "engines.load"
_ROW = 3
_BYTES = MAX_REPLICAS * _ROW * 8
_STALE_MS = 5_000
_PER_UNIT = 1_000_000


class Loads:
    """The file, for its one writer and its readers alike; made empty by whoever comes first."""

    def __init__(self, path: Path) -> None:
        """Raises OSError."""
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            os.posix_fallocate(fd, 0, _BYTES)
            self._cells = memoryview(mmap.mmap(fd, _BYTES)).cast("q")
        finally:
            os.close(fd)

    def write(self, row: int, waiting: int, kv_used: float) -> None:
        """Note what the replica of that row said just now."""
        at = row * _ROW
        self._cells[at + 1] = waiting
        self._cells[at + 2] = round(kv_used * _PER_UNIT)
        self._cells[at] = round(time.monotonic() * 1e3)

    def of(self, rows: Sequence[int], now_s: float) -> tuple[list[int], list[float]]:
        """(requests queued, share of KV cache used) of each; 0 where nothing new is known. now_s: monotonic."""
        cells = self._cells
        oldest_ms = now_s * 1e3 - _STALE_MS
        waiting, kv_used = [], []
        for row in rows:
            at = row * _ROW
            known = cells[at] >= oldest_ms
            waiting.append(cells[at + 1] if known else 0)
            kv_used.append(cells[at + 2] / _PER_UNIT if known else 0.0)
        return waiting, kv_used
