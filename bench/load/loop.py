"""The loop that sends jobs and reads answers: one thread, one poll object, no framework in between."""

from __future__ import annotations

import select
import ssl
import sys
import time
from collections import deque
from collections.abc import Callable
from typing import Any, cast

import msgspec

from bench.load.job import Job
from bench.load.sources import Source
from bench.wire.connection import KERNEL_STAMPS, Connection, Exchange
from bench.wire.http import Endpoint, render_post

HOUSEKEEPING_NS = 250_000_000
# Reading in rounds costs fewer wake-ups and, arrival times being the kernel's, no accuracy, unless two events of one
# stream come within a round: both then have the later one's time. So a round lasts an eighth of the time between such
# events, as answers that have ended had it, within these bounds.
ROUND_NS, LONGEST_ROUND_NS = 1_000_000, 4_000_000
_ROUNDS_PER_GAP = 8
_ROUND_RISE_NS = 100_000  # an answer: a fast stream shortens rounds at once, slow ones lengthen them bit by bit
BACKLOG_PIECES = 500_000  # more reads than this are not kept for later: they would be memory by the gigabyte
UNFINISHED = "unfinished when the run ended"
_FINE_NS = 2_000_000  # poll() counts in whole milliseconds; nearer than this, wait with select()

OnDone = Callable[[Job, Exchange], "str | None"]  # keeps the result; returns the text when it was a success


class Target(msgspec.Struct, frozen=True):
    """A server under load, with what every request to it carries."""

    name: str
    endpoint: Endpoint
    path: str
    headers: dict[str, str]


class LoopStats(msgspec.Struct):
    """What the loop did so far; `round_ns_max` is the longest it was away from the sockets, since last asked."""

    sent: int = 0
    done: int = 0
    in_flight: int = 0
    capped_ns: int = 0  # time for which due requests waited for a free place under the concurrency cap
    round_ns_max: int = 0


class _Held(msgspec.Struct):
    """An open connection, and the job it is busy with, if any."""

    connection: Connection
    target: Target
    job: Job | None = None


class Loop:
    """Sends what a source yields and hands every finished exchange to `on_done`."""

    def __init__(
        self,
        targets: list[Target],
        on_done: OnDone,
        timeout_s: float,
        max_in_flight: int | None = None,
        on_tick: Callable[[int], bool] | None = None,
    ) -> None:
        self.stats = LoopStats()
        self._targets = {target.name: target for target in targets}
        self._tls = {
            name: ssl.create_default_context() if target.endpoint.tls else None
            for name, target in self._targets.items()
        }
        self._idle: dict[str, list[_Held]] = {name: [] for name in self._targets}
        self._held: dict[int, _Held] = {}
        self._on_done = on_done
        self._on_tick = on_tick
        self._timeout_ns = int(timeout_s * 1e9)
        self._max_in_flight = max_in_flight or 1 << 60
        self._poller: Any = select.epoll() if sys.platform == "linux" else select.poll()
        self._source: Source | None = None
        self._stopped = False
        self._backlog: deque[tuple[Job, Exchange]] = deque()
        self._backlog_pieces = 0
        self._round_from_ns = 0
        self.round_ns = ROUND_NS

    def run(self, source: Source, deadline_ns: int) -> None:
        """Send and read until the source is empty and all is answered, or until the deadline, when what is left is
        ended as unfinished."""
        self._source = source
        self._stopped = False
        housekeeping_ns = 0
        while True:
            now_ns = time.monotonic_ns()
            due_ns = None if self._stopped else source.peek()
            while due_ns is not None and due_ns <= now_ns and self.stats.in_flight < self._max_in_flight:
                self._send(source.take(), time.monotonic_ns())
                due_ns = source.peek()
            if due_ns is None and not self.stats.in_flight:
                break
            if now_ns >= housekeeping_ns:
                housekeeping_ns = now_ns + HOUSEKEEPING_NS
                self._housekeep(now_ns, deadline_ns)
            self._read_round(due_ns, source)
        while self._backlog:
            self._settle_one()

    def close(self) -> None:
        """Close every connection."""
        for held in self._held.values():
            held.connection.close()
        self._held.clear()
        if sys.platform == "linux":
            self._poller.close()

    def _read_round(self, due_ns: int | None, source: Source) -> None:
        waited_from_ns = time.monotonic_ns()
        capped = self.stats.in_flight >= self._max_in_flight
        limit_ns = HOUSEKEEPING_NS if due_ns is None or capped else min(HOUSEKEEPING_NS, due_ns - waited_from_ns)
        if limit_ns > _FINE_NS:
            source.prepare()
            self._use_spare_time(waited_from_ns + limit_ns - _FINE_NS)
            limit_ns -= time.monotonic_ns() - waited_from_ns
        elif self._backlog_pieces > BACKLOG_PIECES:
            self._settle_one()
        ready = self._wait(limit_ns)
        now_ns = self._round_from_ns = time.monotonic_ns()
        if capped and due_ns is not None and due_ns <= now_ns:
            self.stats.capped_ns += now_ns - max(waited_from_ns, due_ns)
        offset_ns = time.time_ns() - now_ns
        held_by_fd = self._held
        for fd, mask in ready:
            held = held_by_fd[fd]
            if held.connection.advance(mask, now_ns, offset_ns):
                self._changed(fd, held, now_ns)
        self.stats.round_ns_max = max(self.stats.round_ns_max, time.monotonic_ns() - now_ns)

    def _use_spare_time(self, until_ns: int) -> None:
        """Take finished answers apart, or sleep, until this round has had its length, but not for longer."""
        end_ns = min(self._round_from_ns + self.round_ns, until_ns)
        spare_ns = end_ns - time.monotonic_ns()
        while self._backlog and (spare_ns > 0 or self._backlog_pieces > BACKLOG_PIECES):
            self._settle_one()
            spare_ns = end_ns - time.monotonic_ns()
        if KERNEL_STAMPS and spare_ns > 0:
            time.sleep(spare_ns / 1e9)

    def _wait(self, limit_ns: int) -> list[tuple[int, int]]:
        if sys.platform != "linux":
            return cast("list[tuple[int, int]]", self._poller.poll(max(0, limit_ns / 1e6)))
        if limit_ns <= 0:
            return cast("list[tuple[int, int]]", self._poller.poll(0))
        if limit_ns < _FINE_NS:
            select.select([self._poller], [], [], limit_ns / 1e9)
            return cast("list[tuple[int, int]]", self._poller.poll(0))
        return cast("list[tuple[int, int]]", self._poller.poll(limit_ns // 1_000_000 / 1e3))

    def _send(self, job: Job, now_ns: int) -> None:
        target = self._targets[job.target]
        idle = self._idle[job.target]
        held = idle.pop() if idle else self._open(target)
        self._begin(held, job, now_ns)
        self.stats.sent += 1
        self.stats.in_flight += 1

    def _open(self, target: Target) -> _Held:
        connection = Connection(target.endpoint, self._tls[target.name])
        self._poller.register(connection.fileno(), connection.interest)
        held = self._held[connection.fileno()] = _Held(connection, target)
        return held

    def _begin(self, held: _Held, job: Job, now_ns: int) -> None:
        target = held.target
        held.job = job
        held.connection.begin(render_post(target.endpoint, target.path, job.body, target.headers), now_ns)
        self._poller.modify(held.connection.fileno(), held.connection.interest)

    def _changed(self, fd: int, held: _Held, now_ns: int) -> None:
        connection = held.connection
        exchange = connection.exchange
        if exchange is not None and exchange.end_ns is not None:
            self._finish(fd, held, exchange, now_ns)
        elif connection.closed:
            self._idle[held.target.name].remove(held)
            self._forget(fd)
        else:
            self._poller.modify(fd, connection.interest)

    def _finish(self, fd: int, held: _Held, exchange: Exchange, now_ns: int) -> None:
        job, connection = held.job, held.connection
        assert job is not None and self._source is not None
        connection.release()
        held.job = None
        if exchange.complete and exchange.keep_alive and not connection.closed:
            self._idle[held.target.name].append(held)
        else:
            connection.close()
            self._forget(fd)
        if exchange.fault is not None and exchange.reused and exchange.first_byte_ns is None:
            # the server had closed a kept connection: send again on a new one, as any client does; the clock runs on
            self._begin(self._open(held.target), job, exchange.sent_ns)
            return
        self.stats.in_flight -= 1
        self.stats.done += 1
        self._keep_pace(exchange.pieces)
        if job.follow_up is not None:
            self._source.finished(job, self._on_done(job, exchange), now_ns)
            return
        # nobody waits for this answer's text: it is taken apart when there is time
        self._backlog.append((job, exchange))
        self._backlog_pieces += len(exchange.pieces)
        self._source.finished(job, None, now_ns)

    def _settle_one(self) -> None:
        job, exchange = self._backlog.popleft()
        self._backlog_pieces -= len(exchange.pieces)
        self._on_done(job, exchange)

    def _keep_pace(self, pieces: list[tuple[int, bytes]]) -> None:
        if len(pieces) > 1:
            gap_ns = (pieces[-1][0] - pieces[0][0]) // (len(pieces) - 1)
            wanted_ns = min(LONGEST_ROUND_NS, max(ROUND_NS, gap_ns // _ROUNDS_PER_GAP))
            self.round_ns = min(wanted_ns, self.round_ns + _ROUND_RISE_NS)

    def _housekeep(self, now_ns: int, deadline_ns: int) -> None:
        for fd, held in list(self._held.items()):
            exchange = held.connection.exchange
            if exchange is None:
                continue
            late = now_ns - exchange.sent_ns > self._timeout_ns
            if late or now_ns >= deadline_ns:
                held.connection.abort("timeout" if late else UNFINISHED, now_ns)
                exchange.reused = False  # never sent again
                self._finish(fd, held, exchange, now_ns)
        if now_ns >= deadline_ns or (self._on_tick is not None and not self._on_tick(now_ns)):
            self._stopped = True

    def _forget(self, fd: int) -> None:
        if sys.platform != "linux":  # closing a descriptor takes it out of an epoll set; poll() must be told
            self._poller.unregister(fd)
        del self._held[fd]
