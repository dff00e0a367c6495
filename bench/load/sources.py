"""Where jobs come from: a schedule (open loop) or a number of users who each wait for their answer (closed loop)."""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable, Iterator
from typing import Protocol

from bench.load.arrivals import Offsets
from bench.load.job import Job

MakeJob = Callable[[int], Job]  # a request's index -> the job


class Source(Protocol):
    """Jobs in order of their time."""

    def peek(self) -> int | None:
        """When the next job is due (monotonic ns), or None when none is waiting."""

    def prepare(self) -> None:
        """Called when there is nothing else to do: a chance to make the next job's bytes early."""

    def take(self) -> Job:
        """The job that `peek` told of."""

    def finished(self, job: Job, text: str | None, now_ns: int) -> None:
        """Told of every job's end, with its text when it succeeded."""


class _Later:
    """Jobs made by earlier ones, ordered by time."""

    def __init__(self) -> None:
        self._heap: list[tuple[int, int, Job]] = []
        self._ties = itertools.count()

    def push(self, due_ns: int, job: Job) -> None:
        heapq.heappush(self._heap, (due_ns, next(self._ties), job))

    def peek(self) -> int | None:
        return self._heap[0][0] if self._heap else None

    def pop(self) -> Job:
        return heapq.heappop(self._heap)[2]


class OpenSource:
    """Sends on an absolute schedule, whatever the server does. Every job carries the time it was meant for."""

    def __init__(self, indices: list[int], offsets_ns: Offsets, start_ns: int, make: MakeJob) -> None:
        self._schedule: Iterator[tuple[int, int]] = iter(
            [(start_ns + int(offset), index) for index, offset in zip(indices, offsets_ns, strict=True)]
        )
        self._make = make
        self._next = next(self._schedule, None)
        self._ready: Job | None = None
        self._later = _Later()

    def peek(self) -> int | None:
        due = self._later.peek()
        if self._next is None:
            return due
        return self._next[0] if due is None else min(due, self._next[0])

    def prepare(self) -> None:
        """Make the next scheduled job."""
        if self._ready is None and self._next is not None:
            self._ready = self._make(self._next[1])

    def take(self) -> Job:
        due = self._later.peek()
        if self._next is None or (due is not None and due < self._next[0]):
            return self._later.pop()
        intended_ns, index = self._next
        job = self._ready or self._make(index)
        job.intended_ns = intended_ns
        self._ready = None
        self._next = next(self._schedule, None)
        return job

    def finished(self, job: Job, text: str | None, now_ns: int) -> None:
        if job.follow_up is not None and text is not None:
            think_s, following = job.follow_up(text)
            due_ns = now_ns + int(think_s * 1e9)
            following.intended_ns = due_ns
            self._later.push(due_ns, following)


class ClosedSource:
    """Keeps a number of users busy until a time; each sends its next request when it has its answer."""

    def __init__(
        self, users: int, start_ns: int, stop_ns: int, ramp_ns: int, indices: Iterator[int], make: MakeJob
    ) -> None:
        self._stop_ns = stop_ns
        self._indices = indices
        self._next_index = next(indices, None)
        self._make = make
        self._due = [start_ns + ramp_ns * user // max(users, 1) for user in range(users)]
        self._later = _Later()

    def peek(self) -> int | None:
        later = self._later.peek()
        if not self._due or self._next_index is None:
            return later
        return self._due[0] if later is None else min(later, self._due[0])

    def prepare(self) -> None:
        """Nothing to prepare: when the next request goes out is for the server to say."""

    def take(self) -> Job:
        later = self._later.peek()
        if self._next_index is None or not self._due or (later is not None and later < self._due[0]):
            return self._later.pop()
        heapq.heappop(self._due)
        index, self._next_index = self._next_index, next(self._indices, None)
        return self._make(index)

    def finished(self, job: Job, text: str | None, now_ns: int) -> None:
        if now_ns >= self._stop_ns:
            return
        if job.follow_up is not None and text is not None:
            think_s, following = job.follow_up(text)
            self._later.push(now_ns + int(think_s * 1e9), following)
        else:
            heapq.heappush(self._due, now_ns)


class Merged:
    """Two sources as one, such as a load and a probe beside it. Jobs of the second are those of phase "probe"."""

    def __init__(self, first: Source, second: Source) -> None:
        self._first, self._second = first, second

    def peek(self) -> int | None:
        first, second = self._first.peek(), self._second.peek()
        return second if first is None else first if second is None else min(first, second)

    def prepare(self) -> None:
        self._first.prepare()
        self._second.prepare()

    def take(self) -> Job:
        first, second = self._first.peek(), self._second.peek()
        take_second = first is None or (second is not None and second < first)
        return (self._second if take_second else self._first).take()

    def finished(self, job: Job, text: str | None, now_ns: int) -> None:
        (self._second if job.phase == "probe" else self._first).finished(job, text, now_ns)
