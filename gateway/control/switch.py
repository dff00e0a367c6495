"""Another engine under the same gateway: vLLM to SGLang and the like, while requests come.

    beside   start the new replicas -> wait until they have the adapters -> shift traffic -> drain the old -> stop them
    replace  drain the old -> stop them -> start the new: for a device that does not hold both

Between, `replace` answers 503 with retry-after. When the new engine does not come up, the old one serves on (beside),
or is started again (replace).
"""

from __future__ import annotations

import asyncio
import logging
import time
from dataclasses import dataclass
from typing import Any, Literal

from backends import registry
from gateway.config import ServeConfig
from gateway.control.estate import CannotStart, Estate, loaded
from gateway.control.replica import Replica
from gateway.errors import Conflict, InvalidRequest

_log = logging.getLogger(__name__)
_PURPOSE = "switch of engines"

Mode = Literal["beside", "replace"]
Phase = Literal["none", "starting", "draining", "done", "failed"]


@dataclass(slots=True)
class _Progress:
    backend: str
    mode: Mode
    phase: Phase
    started_at: float
    reason: str | None = None
    ended_at: float | None = None


class Switch:
    """The one switch that may be under way."""

    def __init__(self, estate: Estate) -> None:
        self._estate = estate
        self._progress: _Progress | None = None
        self._task: asyncio.Task[None] | None = None

    def show(self) -> dict[str, Any]:
        """The engine that serves, and how the last switch went."""
        config, progress = self._estate.running.config, self._progress
        last = None
        if progress is not None:
            last = {
                "backend": progress.backend,
                "mode": progress.mode,
                "phase": progress.phase,
                "reason": progress.reason,
                "seconds": round((progress.ended_at or time.time()) - progress.started_at, 1),
            }
        version = config.engine_version
        return {"object": "backend", "backend": config.backend, "engine_version": version, "switch": last}

    def begin(self, config: ServeConfig, mode: Mode) -> None:
        """Start to switch to the engine of this configuration. Raises InvalidRequest, Conflict."""
        if not self._estate.owned:
            raise InvalidRequest(
                "the engines are attached: start the other one yourself and attach it at the next start"
            )
        if self._estate.lock.locked():
            raise Conflict("another change of the replicas is under way; GET /admin/backend says how far it is")
        self._progress = _Progress(config.backend, mode, "starting", time.time())
        self._task = asyncio.create_task(self._run(config, mode, self._progress))

    async def wait(self, timeout_s: float) -> None:
        """Until the switch has ended, at most so long."""
        if self._task is not None:
            await asyncio.wait([self._task], timeout=timeout_s)

    async def _run(self, config: ServeConfig, mode: Mode, progress: _Progress) -> None:
        async with self._estate.lock:
            try:
                await (self._beside if mode == "beside" else self._replace)(config, progress)
                progress.phase = "done"
            except CannotStart as error:
                _log.error("the switch to %s failed: %s", config.backend, error)
                progress.phase, progress.reason = "failed", str(error)
            finally:
                progress.ended_at = time.time()

    async def _beside(self, config: ServeConfig, progress: _Progress) -> None:
        estate, old = self._estate, self._estate.staying
        new = await self._start(config, len(old), loaded(old, estate.core.registry.desired))
        self._shift(config, new)
        progress.phase = "draining"
        await estate.retire(old, _PURPOSE, config.drain_timeout_s)

    async def _replace(self, config: ServeConfig, progress: _Progress) -> None:
        estate, old = self._estate, self._estate.staying
        before, wanted = estate.running.config, loaded(old, estate.core.registry.desired)
        progress.phase = "draining"
        await estate.retire(old, _PURPOSE, config.drain_timeout_s)
        await estate.vacated()
        progress.phase = "starting"
        try:
            self._shift(config, await self._start(config, len(old), wanted))
        except CannotStart as error:
            estate.note(estate.running, await estate.add(before, len(old)))
            raise CannotStart(f"{error}; {before.backend} is started again") from error

    async def _start(self, config: ServeConfig, count: int, wanted: frozenset[str]) -> list[Replica]:
        """New replicas, ready and without traffic. Raises CannotStart, with none of them left."""
        estate = self._estate
        new = await estate.add(config, count, hidden=_PURPOSE)
        try:
            await estate.ready(new, wanted, config.start_timeout_s)
        except CannotStart:
            for replica in new:
                await estate.core.remove(replica)
            raise
        return new

    def _shift(self, config: ServeConfig, new: list[Replica]) -> None:
        """Let traffic in; the relays hear of it together with what is drained next."""
        self._estate.note(self._estate.running.model_copy(update={"config": config}), new)
        self._estate.core.backend = registry.get(config.backend)
        for replica in new:
            replica.resume(_PURPOSE)
