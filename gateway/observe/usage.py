"""What each API key has used, in shared memory: a mapped file a relay, a row of int64 cells a key.

    relay-0.usage    header | row 0 | row 1 | …      control gives each key its row

One relay writes a file; the other relays and control read it. Counts only grow and outlive their process, so that
a relay that starts again goes on where it was. What is in flight starts from zero.
"""

from __future__ import annotations

import functools
import mmap
import os
import zlib
from collections.abc import Collection
from pathlib import Path

MAGIC = 0x7475_6E65_7573_0001  # of this layout; a file of another is started anew
MAX_KEYS = 16_384
ROW_CELLS = 8
_HEADER_CELLS = 8
_BOOT = 1  # header cell: which boot of the machine the times belong to
_CELL_BYTES = 8
_FILE_BYTES = (_HEADER_CELLS + MAX_KEYS * ROW_CELLS) * _CELL_BYTES

# Cells of a row. A due time is when a bucket will be empty again, in monotonic microseconds.
OWNER, REQUESTS, TOKENS, IN_FLIGHT, REQUESTS_DUE_US, TOKENS_DUE_US = range(6)


class Usage:
    """The writing side: one relay's own rows, and the other relays' for reading."""

    def __init__(self, path: Path, relays: int = 1) -> None:
        """Open or continue the file at `path`. relays: how many run; files of more are of an earlier run.

        Raises OSError.
        """
        self._path = path
        self._live = {path.with_name(f"relay-{index}.usage") for index in range(relays)}
        self.cells = _map_own(path)
        self.peers: list[memoryview] = []  # every other relay's rows, those of relays that no longer run too
        self.live_peers: list[memoryview] = []
        self._heads: list[memoryview] = []  # of the peers, in their order
        self._found: set[Path] = set()
        self.find()

    def close(self) -> None:
        """Let go of the mapping; what was counted stays in the file."""
        for cells in (self.cells, *self.peers, *self._heads):
            cells.release()

    def find(self) -> None:
        """Map the files that have come to exist since. Called about once a second."""
        for path in self._path.parent.glob("relay-*.usage"):
            if path != self._path and path not in self._found and (mapped := _map(path)) is not None:
                head, cells = mapped
                self._found.add(path)
                self.peers.append(cells)
                self._heads.append(head)
                if path in self._live:
                    self.live_peers.append(cells)

    def due_us(self, cell: int) -> int:
        """The latest of the due times in a cell. Those of another boot are of another clock."""
        boot = _boot()
        others = (cells[cell] for head, cells in zip(self._heads, self.peers, strict=True) if head[_BOOT] == boot)
        return max(self.cells[cell], *others, 0)

    def claim(self, row: int, key_id: str) -> None:
        """Begin to write a row for a key; what an earlier key of this row left in flight or due is not this one's."""
        cells, first = self.cells, row * ROW_CELLS
        owner = zlib.crc32(key_id.encode())
        if cells[first + OWNER] != owner:
            for cell in (IN_FLIGHT, REQUESTS_DUE_US, TOKENS_DUE_US):
                cells[first + cell] = 0
            cells[first + OWNER] = owner


def totals(run_dir: Path, rows: Collection[int]) -> dict[int, tuple[int, int]]:
    """row -> (requests, tokens), added over all relays' files, those of relays that no longer run too."""
    mapped = [file for path in run_dir.glob("relay-*.usage") if (file := _map(path)) is not None]
    files = [cells for _, cells in mapped]
    try:
        return {
            row: (
                sum(cells[row * ROW_CELLS + REQUESTS] for cells in files),
                sum(cells[row * ROW_CELLS + TOKENS] for cells in files),
            )
            for row in rows
        }
    finally:
        for head, cells in mapped:
            head.release()
            cells.release()


def _map_own(path: Path) -> memoryview:
    """The rows of a file that this process writes."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        os.posix_fallocate(fd, 0, _FILE_BYTES)  # a store into a hole of a full disk would kill the process
        cells = memoryview(mmap.mmap(fd, _FILE_BYTES)).cast("q")
    finally:
        os.close(fd)
    boot = _boot()
    rows = cells[_HEADER_CELLS:]
    if cells[0] != MAGIC:
        rows[:] = memoryview(bytes(len(rows) * _CELL_BYTES)).cast("q")
    for first in range(0, len(rows), ROW_CELLS):
        rows[first + IN_FLIGHT] = 0
        if cells[_BOOT] != boot:
            rows[first + REQUESTS_DUE_US] = rows[first + TOKENS_DUE_US] = 0
    cells[_BOOT] = boot
    cells[0] = MAGIC
    return rows


@functools.cache
def _boot() -> int:
    """This boot of the machine."""
    return zlib.crc32(Path("/proc/sys/kernel/random/boot_id").read_bytes())


def _map(path: Path) -> tuple[memoryview, memoryview] | None:
    """The header and the rows of another process's file, for reading; None while it is being made."""
    try:
        with path.open("rb") as file:
            cells = memoryview(mmap.mmap(file.fileno(), _FILE_BYTES, prot=mmap.PROT_READ)).cast("q")
    except (FileNotFoundError, ValueError):
        return None
    return (cells[:_HEADER_CELLS], cells[_HEADER_CELLS:]) if cells[0] == MAGIC else None
