"""Counters that outlive their process: a memory-mapped file of int64 cells, named by a list beside it.

    relay-0.cells    header | in-flight rows, one a replica | adapter rows | counters, gauges, histograms
    relay-0.series   one JSON line a series: metric, labels, first cell; the newest line of a cell holds

One relay writes a file, anyone reads it. A count is a plain store into shared memory: no lock, no system call.
A relay that starts again goes on with its file: counters stay, gauges start from zero.
"""

from __future__ import annotations

import mmap
import os
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path

import msgspec

from gateway.observe.series import METRICS, Metric

MAGIC = 0x7475_6E65_6361_0002  # of this layout; a file of another is started anew
WAITING = 1  # requests that wait at this relay for room at a replica
PRESSING = 2  # those of them that are no batch's
IN_FLIGHT_ROW = 16  # first in-flight cell
MAX_REPLICAS = 1024
ADAPTER_ROW = IN_FLIGHT_ROW + MAX_REPLICAS  # first cell of the first adapter row: requests in flight, requests ever
ADAPTER_ROW_CELLS = 2
MAX_ADAPTER_ROWS = 1 << 15  # one for what is loaded on a replica, given by control; the first is shared by the rest
FIRST_FREE = ADAPTER_ROW + ADAPTER_ROW_CELLS * MAX_ADAPTER_ROWS
CAPACITY = 1 << 21  # cells; address space only, disk is taken a step at a time
_STEP = 1 << 14  # cells of disk reserved together, so that a full disk is an error and not a bus fault
_CELL_BYTES = 8
_LIST_BYTES = 1 << 20  # of the list; it is written anew at four times what that left, if that is more
_DROPPED = ""  # in place of the metric: the cells from there are free, as many as `labels` say
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
        self._spare: dict[int, list[int]] = defaultdict(list)  # number of cells -> dropped series of that size
        self._rewrite_at = _LIST_BYTES
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
            spare = self._spare[metric.cells]
            cell = spare[-1] if spare else self._free
            if cell + metric.cells > CAPACITY:
                raise CellsFull(f"{self._list_path} names {len(self._series)} series, no room for more")
            self._reserve(cell + metric.cells)
            for number in range(cell, cell + metric.cells):
                self.values[number] = 0
            self._append(Series(metric.name, dict(zip(metric.labels, labels, strict=True)), cell))
            if spare:
                spare.pop()
            else:
                self._free += metric.cells
            self._series[key] = cell
        return cell

    def drop(self, metric: Metric, *labels: str) -> None:
        """Forget a series: another takes its cells. Fine if there is none. Raises CellsFull."""
        cell = self._series.get((metric.name, labels))
        if cell is not None:
            self._append(Series(_DROPPED, {"cells": str(metric.cells)}, cell))
            del self._series[metric.name, labels]
            self._spare[metric.cells].append(cell)

    def labels(self, metric: Metric) -> list[tuple[str, ...]]:
        """Of each of its series, those of an earlier process too."""
        return [labels for name, labels in self._series if name == metric.name]

    def name_row(self, metric: Metric, replica_index: int, replica_id: str) -> None:
        """Say which replica an in-flight row counts. Raises CellsFull."""
        if not 0 <= replica_index < MAX_REPLICAS:
            raise CellsFull(f"replica {replica_id} has row {replica_index}, there are {MAX_REPLICAS}")
        self.name_cell(metric, IN_FLIGHT_ROW + replica_index, replica_id)

    def name_cell(self, metric: Metric, cell: int, label: str) -> None:
        """Say what a cell counts whose place is fixed. Raises CellsFull."""
        key = (metric.name, (label,))
        if self._series.get(key) != cell:
            self._append(Series(metric.name, {metric.labels[0]: label}, cell))
            self._series = {other: at for other, at in self._series.items() if at != cell}
            self._series[key] = cell

    def _continue(self) -> None:
        """Take over what an earlier process of this relay named; drop a last line that it did not finish."""
        whole = 0
        named: dict[int, Series] = {}
        with os.fdopen(os.dup(self._list_fd), "rb") as lines:
            for line in lines:
                if not line.endswith(b"\n"):
                    break
                whole += len(line)
                series = msgspec.json.decode(line, type=Series)
                named[series.cell] = series
        for cell, series in named.items():
            metric = METRICS.get(series.metric)
            if series.metric == _DROPPED:
                cells = int(series.labels["cells"])
                self._spare[cells].append(cell)
                self._free = max(self._free, cell + cells)
            elif metric is not None:
                self._series[series.metric, tuple(series.labels.values())] = cell
                if cell >= FIRST_FREE:
                    self._free = max(self._free, cell + metric.cells)
                if metric.kind == "gauge":
                    self.values[cell] = 0
        os.ftruncate(self._list_fd, whole)
        self._reserve(self._free)
        self.values[WAITING] = self.values[PRESSING] = 0
        zeroes = bytes((FIRST_FREE - IN_FLIGHT_ROW) * _CELL_BYTES)
        self.values[IN_FLIGHT_ROW:FIRST_FREE] = memoryview(zeroes).cast("q")

    def _append(self, series: Series) -> None:
        line = msgspec.json.encode(series) + b"\n"
        size = os.fstat(self._list_fd).st_size
        try:
            if size > self._rewrite_at:
                self._rewrite()
                size = os.fstat(self._list_fd).st_size
            written = os.write(self._list_fd, line)
        except OSError as error:
            raise CellsFull(f"cannot add to {self._list_path}: {error.strerror}") from error
        if written != len(line):
            os.ftruncate(self._list_fd, size)
            raise CellsFull(f"cannot add to {self._list_path}: the disk is full")

    def _rewrite(self) -> None:
        """Leave out of the list what no longer holds. Not synced: like the cells, it outlives processes alone."""
        lines = [
            Series(metric, dict(zip(METRICS[metric].labels, labels, strict=True)), cell)
            for (metric, labels), cell in self._series.items()
        ]
        lines += [Series(_DROPPED, {"cells": str(size)}, cell) for size, spare in self._spare.items() for cell in spare]
        data = b"".join(msgspec.json.encode(line) + b"\n" for line in lines)
        aside = self._list_path.with_suffix(".series-new")
        aside.unlink(missing_ok=True)
        new_fd = os.open(aside, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        if os.write(new_fd, data) != len(data):
            os.close(new_fd)
            raise CellsFull(f"cannot write {aside}: the disk is full")
        aside.replace(self._list_path)
        os.close(self._list_fd)
        self._list_fd = new_fd
        self._rewrite_at = max(_LIST_BYTES, 4 * len(data))

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


def forget_surplus(run_dir: Path, relays: int) -> None:
    """Nothing is in flight at relays of an earlier run with more of them, whatever they left; their counts stay.

    relays: how many run now. Raises OSError, CellsFull.
    """
    running = {f"relay-{index}.cells" for index in range(relays)}
    for path in run_dir.glob("relay-*.cells"):
        if path.name not in running:
            Cells(path).close()


class InFlight:
    """What all relays have in flight, for control: a few bytes of each relay's file, read when asked."""

    def __init__(self, run_dir: Path) -> None:
        self._run_dir = run_dir

    def replica(self, index: int) -> int:
        """Requests at a replica. Raises OSError."""
        return self._sum(IN_FLIGHT_ROW + index, 1)[0]

    def pressing(self) -> int:
        """Requests that wait for room at a replica, without those of batches. Raises OSError."""
        return self._sum(PRESSING, 1)[0]

    def adapter(self, cell: int) -> int:
        """Requests in flight of the adapter row that begins at this cell. Raises OSError."""
        return self._sum(cell, 1)[0]

    def adapters(self, end: int) -> list[int]:
        """All cells of the adapter rows before this cell. Raises OSError."""
        return self._sum(ADAPTER_ROW, end - ADAPTER_ROW)

    def _sum(self, first: int, count: int) -> list[int]:
        totals = [0] * count
        for path in self._run_dir.glob("relay-*.cells"):
            with path.open("rb", buffering=0) as file:
                data = os.pread(file.fileno(), count * _CELL_BYTES, first * _CELL_BYTES)
            if len(data) == count * _CELL_BYTES:  # otherwise it is being made
                totals = [a + b for a, b in zip(totals, memoryview(data).cast("q"), strict=True)]
        return totals


class Peers:
    """What the other relays have in flight, read from their files a few hundred times a second at most.

    So a request's cost does not grow with the number of relays, and what is read is never older than _FRESH_S.
    """

    def __init__(self, paths: Mapping[int, Path]) -> None:
        """paths: relay index -> cells file; one that does not exist yet counts as idle."""
        self._missing = dict(paths)
        self._rows: list[memoryview] = []
        self._heads: list[memoryview] = []
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
            cells = memoryview(mapped).cast("q")
            self._heads.append(cells[:IN_FLIGHT_ROW])
            self._rows.append(cells[IN_FLIGHT_ROW:ADAPTER_ROW])
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

    def in_flight_now(self, replica_index: int) -> int:
        """As `in_flight`, looked up now; costs a look at each relay."""
        return sum(rows[replica_index] for rows in self._rows)

    def waiting(self) -> int:
        """Other relays at which requests wait for room, now."""
        return sum(1 for head in self._heads if head[WAITING])

    @property
    def any(self) -> bool:
        """Whether there are other relays."""
        return bool(self._rows)

    def _look(self, replicas: int) -> None:
        self._totals = [0] * replicas
        for rows in self._rows:
            self._totals = [a + b for a, b in zip(self._totals, rows[:replicas].tolist(), strict=True)]
