"""The replicas of this gateway as they come and go: each with its host and the supervisor that keeps it running."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Collection
from dataclasses import dataclass

from backends.base import Backend
from gateway.control.hosting import Host
from gateway.control.replica import Replica
from gateway.control.supervisor import Duties, Supervisor
from gateway.control.timings import Timings


@dataclass(frozen=True, slots=True)
class _Member:
    host: Host
    supervisor: Supervisor


class Fleet:
    """Adds, removes and supervises replicas. `replicas` is one list for as long as the fleet lives."""

    def __init__(
        self, duties: Callable[[Backend | None], Duties], timings: Timings, on_change: Callable[[], None]
    ) -> None:
        """duties: for replicas of a backend; None for attached ones, known only once they answer."""
        self.replicas: list[Replica] = []
        self._duties = duties
        self._timings = timings
        self._on_change = on_change
        self._members: dict[str, _Member] = {}
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._ending: list[Replica] = []  # no replicas any more; their engines are being stopped
        self._broken: asyncio.Future[None] | None = None  # while running: the first defect of a supervisor

    def __repr__(self) -> str:
        return f"<Fleet {self.replicas}>"

    def add(self, id: str, index: int, host: Host, backend: Backend | None, hidden: str | None = None) -> Replica:
        """Supervise another replica. index: its row in the relays' cells. hidden: why it gets no traffic yet."""
        replica = Replica(id, index, self._on_change)
        if hidden is not None:
            replica.drain(hidden)
        self.replicas.append(replica)
        self._members[id] = _Member(host, Supervisor(replica, host, self._duties(backend), self._timings))
        if self._broken is not None:
            self._supervise(id)
        self._on_change()
        return replica

    async def remove(self, replica: Replica) -> None:
        """End a replica for good, its engine with it. What is in flight there breaks: drain it first."""
        member, task = self._members.pop(replica.id), self._tasks.pop(replica.id, None)
        if task is not None:
            task.cancel()
            await asyncio.wait([task])
        self.replicas.remove(replica)
        self._ending.append(replica)
        self._on_change()
        try:
            await asyncio.to_thread(member.host.close, self._timings.stop_grace_s)
        finally:
            self._ending.remove(replica)

    async def run(self) -> None:
        """Keep all replicas running until cancelled, which leaves the engines running. Raises a supervisor's defect."""
        self._broken = asyncio.get_running_loop().create_future()
        for id in self._members:
            self._supervise(id)
        try:
            await self._broken
        finally:
            for task in self._tasks.values():
                task.cancel()
            if self._tasks:
                await asyncio.wait(self._tasks.values())

    async def close(self) -> None:
        """Stop every engine for good. Call it after `run` has ended."""
        hosts = [member.host for member in self._members.values()]
        await asyncio.gather(*(asyncio.to_thread(host.close, self._timings.stop_grace_s) for host in hosts))

    def free_indices(self, count: int, shares: int = 1, leaving: Collection[str] = ()) -> list[int]:
        """Rows that no replica has, for new ones: each with the share of the devices that fewest replicas use.

        shares: a replica uses the one of its row modulo this (hosting.shares_of). leaving: ids of replicas that drain
        to be stopped; theirs go before those of replicas that stay. Of equals the lowest. What is being stopped has
        its row until it is gone: the next of that number would find its engine, and take it for its own.
        """
        going = [*self._ending, *(replica for replica in self.replicas if replica.id in leaving)]
        staying = [replica for replica in self.replicas if replica.id not in leaving]
        taken = {replica.index for replica in [*going, *staying]}
        stay = Counter(replica.index % shares for replica in staying)
        leave = Counter(replica.index % shares for replica in going)
        chosen: list[int] = []
        for _ in range(count):
            free = [index for index in range((len(taken) + 1) * shares) if index not in taken]
            index = min(free, key=lambda index: (stay[index % shares], leave[index % shares], index))
            taken.add(index)
            stay[index % shares] += 1
            chosen.append(index)
        return chosen

    def _supervise(self, id: str) -> None:
        task = asyncio.create_task(self._members[id].supervisor.run())
        task.add_done_callback(self._ended)
        self._tasks[id] = task

    def _ended(self, task: asyncio.Task[None]) -> None:
        error = None if task.cancelled() else task.exception()
        if error is not None and self._broken is not None and not self._broken.done():
            self._broken.set_exception(error)
