"""What an operator changes while the gateway runs: how many replicas there are, and of which engine."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Collection, Iterator, Sequence

from backends.base import Backend, BackendError
from gateway.config import ConfigError, ServeConfig
from gateway.control.core import Core
from gateway.control.hosting import Host
from gateway.control.replica import OPERATOR, AdapterState, Replica, State
from gateway.control.running import Notebook, Progress, Running
from gateway.errors import Conflict

_log = logging.getLogger(__name__)
_QUIET_POLL_S = 0.1

# The backend of a configuration, and id and host of each of these replica numbers. Raises ConfigError, BackendError.
Make = Callable[[ServeConfig, Sequence[int]], tuple[Backend, list[tuple[str, Host]]]]
# How many replicas of a configuration the devices hold side by side; 1 where they are not told apart. Raises the same.
Shares = Callable[[ServeConfig], int]


class CannotStart(Exception):
    """New replicas do not come up; the message says why."""


class Estate:
    """Adds replicas and takes them away without losing a request. One change at a time: hold `changing`."""

    def __init__(
        self,
        core: Core,
        make: Make | None,
        running: Running,
        notebook: Notebook | None,
        shares: Shares = lambda _: 1,
    ) -> None:
        """make: None where engines are attached. notebook: None to forget changes with this process."""
        self.core = core
        self.running = running
        self._changing = False
        self._make = make
        self._shares = shares
        self._leaving: set[str] = set()  # ids of replicas that drain to be stopped
        self._retiring: set[asyncio.Task[None]] = set()  # that nobody waits for
        self._notebook = notebook

    @property
    def owned(self) -> bool:
        """Whether we start the engines."""
        return self._make is not None

    @contextlib.contextmanager
    def changing(self) -> Iterator[None]:
        """What a change is made in, from where it reads what runs. Raises Conflict while another is under way."""
        if self._changing:
            raise Conflict(
                "another change of the replicas is under way; try again when GET /admin/backend shows its end"
            )
        self._changing = True
        try:
            yield
        finally:
            self._changing = False

    @property
    def staying(self) -> list[Replica]:
        """The replicas that are not on their way out."""
        return [replica for replica in self.core.replicas if replica.id not in self._leaving]

    async def add(self, config: ServeConfig, count: int, hidden: str | None = None) -> list[Replica]:
        """Start more replicas. hidden: the purpose for which they get no traffic. Raises CannotStart."""
        assert self._make is not None, "attached engines are not started"
        fleet = self.core.fleet
        try:
            shares = await asyncio.to_thread(self._shares, config)
            indices = fleet.free_indices(count, shares, self._leaving)
            backend, hosts = await asyncio.to_thread(self._make, config, indices)
        except (ConfigError, BackendError) as error:
            raise CannotStart(str(error)) from error
        return [fleet.add(id, index, host, backend, hidden) for index, (id, host) in zip(indices, hosts, strict=True)]

    async def retire(self, replicas: Collection[Replica], purpose: str, limit_s: float) -> None:
        """Take replicas out of traffic, let what is in flight there finish for up to `limit_s`, and stop them."""
        ids = {replica.id for replica in replicas}
        self._leaving |= ids
        try:
            for replica in replicas:
                replica.drain(purpose)
            await self.core.published()
            await asyncio.gather(*(self._stop(replica, limit_s) for replica in replicas))
        finally:
            self._leaving -= ids

    def begin_to_retire(self, replicas: Collection[Replica], purpose: str, limit_s: float) -> None:
        """As `retire`, without waiting for it."""
        task = asyncio.create_task(self.retire(replicas, purpose, limit_s))
        self._retiring.add(task)
        task.add_done_callback(self._retiring.discard)

    async def vacated(self) -> None:
        """Until replicas that began to retire are gone: what starts next may need the memory that they hold."""
        if self._retiring:
            await asyncio.wait(self._retiring)

    async def ready(self, replicas: Collection[Replica], wanted: Collection[str], limit_s: float) -> None:
        """Until all of them answer and have the wanted adapters. Raises CannotStart with the reason.

        What is deleted or replaced meanwhile is wanted no more.
        """

        def still_wanted() -> set[str]:
            return set(wanted).intersection(self.core.registry.desired)

        def failure() -> str | None:
            for replica in replicas:
                if replica.state is State.FAILED:
                    return f"{replica.id} did not start: {replica.reason}"
                for content_id in still_wanted():
                    status = replica.status(content_id)
                    if status is not None and status.state is AdapterState.FAILED:
                        return f"{replica.id} does not take the adapter {content_id}: {status.reason}"
            return None

        def there() -> bool:
            return all(replica.answers and all(map(replica.adapter_ready, still_wanted())) for replica in replicas)

        await self.core.wait_for(lambda: there() or failure() is not None, limit_s)
        if (reason := failure()) is not None:
            raise CannotStart(reason)
        if not there():
            states = ", ".join(f"{replica.id} is {replica.state} {replica.reason}".strip() for replica in replicas)
            raise CannotStart(f"they are not ready after {limit_s:g} s (--start-timeout-s): {states}")

    def note(self, running: Running, replicas: Collection[Replica]) -> None:
        """Go by this from now on; the next control process too. Replicas that are not named, it stops."""
        indices = tuple(sorted(replica.index for replica in replicas))
        self.running = running.model_copy(update={"replicas": indices if self.owned else None})
        self.note_drained()

    def note_drained(self) -> None:
        """Have the next control process keep those out of traffic that an operator has taken out."""
        drained = tuple(sorted(replica.index for replica in self.staying if replica.is_drained(OPERATOR)))
        self.running = self.running.model_copy(update={"drained": drained})
        self._write()

    def note_switch(self, progress: Progress) -> None:
        """Have the next control process know of this switch, as far as it is by then noted."""
        self.running = self.running.model_copy(update={"switch": progress})
        self._write()

    def _write(self) -> None:
        if self._notebook is not None:
            self._notebook.write(self.running)

    async def _stop(self, replica: Replica, limit_s: float) -> None:
        deadline = time.monotonic() + limit_s
        while (left := await self.core.in_flight(replica)) > 0:
            if time.monotonic() > deadline:
                _log.warning("%s is stopped with %d requests in flight, after %g s", replica.id, left, limit_s)
                break
            await asyncio.sleep(_QUIET_POLL_S)
        await self.core.remove(replica)
        _log.info("%s is stopped", replica.id)


def loaded(replicas: Collection[Replica], desired: Collection[str]) -> frozenset[str]:
    """Adapter contents that some replica answers with and that should stay loaded."""
    return frozenset(
        content_id for replica in replicas for content_id in replica.adapters if replica.adapter_ready(content_id)
    ) & frozenset(desired)
