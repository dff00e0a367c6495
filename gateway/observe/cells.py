"""Counters that outlive their process: a memory-mapped file of int64 cells, named by a list beside it.

    relay-0.cells    header | in-flight rows, one a replica | counters, gauges, histograms
    relay-0.series   one JSON line a series: metric, labels, first cell

One relay writes a file, anyone reads it. A count is a plain store into shared memory: no lock, no system call.
A relay that starts again goes on with its file: counters stay, gauges start from zero.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

import msgspec

from gateway.observe.series import METRICS, Metric

MAGIC = 0x7475_6E65_6361_0001  # of this layout; a file of another is started anew
IN_FLIGHT_ROW = 16  # first in-flight cell
MAX_REPLICAS = 1024
FIRST_FREE = IN_FLIGHT_ROW + MAX_REPLICAS
CAPACITY = 1 << 21  # cells; address space only, disk is taken a step at a time
_STEP = 1 << 14  # cells of disk reserved together, so that a full disk is an error and not a bus fault
_CELL_BYTES = 8
_FRESH_S = 0.005


class CellsFull(Exception):
    """No room for another series, on the disk or in the file."""


class Series(msgspec.Struct, frozen=True):
    """A line of the list: which metric and labels, and its first cell."""

    metric: str
    labels: dict[str, str]
    cell: int


class Cells:
    """The writing side: one relay's own file. `values[cell] += n` counts."""

    def __init__(self, path: Path) -> None:
        """Open or continue the file at `path`. Raises OSError."""
        self._list_path = path.with_suffix(".series")
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        os.ftruncate(self._fd, CAPACITY * _CELL_BYTES)
        self._reserved = 0
        self._reserve(FIRST_FREE)
        self.values = memoryview(mmap.mmap(self._fd, CAPACITY * _CELL_BYTES)).cast("q")
        if self.values[0] != MAGIC:
            self._list_path.unlink(missing_ok=True)
        self._series: dict[tuple[str, tuple[str, ...]], int] = {}
        self._free = FIRST_FREE
        self._list_fd = os.open(self._list_path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        self._continue()
        self.values[0] = MAGIC

    def close(self) -> None:
        """Close the files; what was counted stays in them."""
        self.values.release()
        os.close(self._fd)
        os.close(self._list_fd)

    def series(self, metric: Metric, *labels: str) -> int:
        """The first cell of a series, made on first use. Raises CellsFull."""
        key = (metric.name, labels)
        cell = self._series.get(key)
        if cell is None:
            cell = self._free
            if cell + metric.cells > CAPACITY:
                raise CellsFull(f"{self._list_path} names {len(self._series)} series, no room for more")
            self._reserve(cell + metric.cells)
            self._append(Series(metric.name, dict(zip(metric.labels, labels, strict=True)), cell))
            self._free += metric.cells
            self._series[key] = cell
        return cell

    def name_row(self, metric: Metric, replica_index: int, replica_id: str) -> None:
        """Say which replica an in-flight row counts. Raises CellsFull."""
        key = (metric.name, (replica_id,))
        cell = IN_FLIGHT_ROW + replica_index
        if not 0 <= replica_index < MAX_REPLICAS:
            raise CellsFull(f"replica {replica_id} has row {replica_index}, there are {MAX_REPLICAS}")
        if self._series.get(key) != cell:
            self._append(Series(metric.name, {metric.labels[0]: replica_id}, cell))
            self._series[key] = cell

    def _continue(self) -> None:
        """Take over what an earlier process of this relay named; drop a last line that it did not finish."""
        whole = 0
        with os.fdopen(os.dup(self._list_fd), "rb") as lines:
            for line in lines:
                if not line.endswith(b"\n"):
                    break
                whole += len(line)
                series = msgspec.json.decode(line, type=Series)
                metric = METRICS.get(series.metric)
                if metric is None:
                    continue
                self._series[(series.metric, tuple(series.labels.values()))] = series.cell
                if series.cell >= FIRST_FREE:
                    self._free = max(self._free, series.cell + metric.cells)
                if metric.kind == "gauge":
                    self.values[series.cell] = 0
        os.ftruncate(self._list_fd, whole)
        self._reserve(self._free)
        for row in range(IN_FLIGHT_ROW, FIRST_FREE):
            self.values[row] = 0

    def _append(self, series: Series) -> None:
        line = msgspec.json.encode(series) + b"\n"
        size = os.fstat(self._list_fd).st_size
        try:
            written = os.write(self._list_fd, line)
        except OSError as error:
            raise CellsFull(f"cannot add to {self._list_path}: {error.strerror}") from error
        if written != len(line):
            os.ftruncate(self._list_fd, size)
            raise CellsFull(f"cannot add to {self._list_path}: the disk is full")

    def _reserve(self, cells: int) -> None:
        """Own the disk blocks under the first `cells` cells: a store into a hole of a full disk kills the process."""
        while self._reserved < cells:
            try:
                os.posix_fallocate(self._fd, self._reserved * _CELL_BYTES, _STEP * _CELL_BYTES)
            except OSError as error:
                raise CellsFull(f"cannot grow the cells beside {self._list_path}: {error.strerror}") from error
            self._reserved += _STEP


def read_series(path: Path) -> Iterator[tuple[Metric, dict[str, str], memoryview]]:
    """Each series in a relay's file with its cells as they are now. Raises OSError.

    A row that changed its replica is yielded once, under the newest name.
    """
    named: dict[int, Series] = {}
    for line in path.with_suffix(".series").read_bytes().splitlines(keepends=True):
        if line.endswith(b"\n"):
            series = msgspec.json.decode(line, type=Series)
            named[series.cell] = series
    last = max(
        (series.cell + METRICS[series.metric].cells for series in named.values() if series.metric in METRICS), default=0
    )
    with path.open("rb") as file:
        values = memoryview(file.read(last * _CELL_BYTES)).cast("q")
    for series in named.values():
        metric = METRICS.get(series.metric)
        if metric is not None:
            yield metric, series.labels, values[series.cell : series.cell + metric.cells]


class Peers:
    """What the other relays have in flight, read from their files a few hundred times a second at most.

    So a request's cost does not grow with the number of relays, and what is read is never older than _FRESH_S.
    """

    def __init__(self, paths: Mapping[int, Path]) -> None:
        """paths: relay index -> cells file; one that does not exist yet counts as idle."""
        self._missing = dict(paths)
        self._rows: list[memoryview] = []
        self._totals = [0]
        self._read_s = 0.0
        self.find()

    def find(self) -> None:
        """Map the files that have come to exist since. Called about once a second."""
        for index, path in list(self._missing.items()):
            try:
                with path.open("rb") as file:
                    mapped = mmap.mmap(file.fileno(), FIRST_FREE * _CELL_BYTES, prot=mmap.PROT_READ)
            except (FileNotFoundError, ValueError):
                continue
            self._rows.append(memoryview(mapped).cast("q")[IN_FLIGHT_ROW:])
            del self._missing[index]

    def read(self, now_s: float) -> None:
        """Look at the others again, if the last look is no longer fresh. now_s: monotonic."""
        if now_s - self._read_s > _FRESH_S:
            self._read_s = now_s
            self._look(len(self._totals))

    def in_flight(self, replica_index: int) -> int:
        """Requests that the other relays had at that replica at the last look."""
        if replica_index >= len(self._totals):
            self._look(replica_index + 1)
        return self._totals[replica_index]

    def _look(self, replicas: int) -> None:
        self._totals = [0] * replicas
        for rows in self._rows:
            self._totals = [a + b for a, b in zip(self._totals, rows[:replicas].tolist(), strict=True)]
