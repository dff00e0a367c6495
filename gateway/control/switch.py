"""Another engine under the same gateway: vLLM to SGLang and the like, while requests come.

    beside   start the new replicas -> wait until they have the adapters -> shift traffic -> drain the old -> stop them
    replace  drain the old -> stop them -> start the new: for a device that does not hold both

Between, `replace` answers 503 with retry-after. When the new engine does not come up, the old one serves on (beside),
or is started again (replace).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from typing import Any, Literal

from backends import registry
from gateway.config import ServeConfig
from gateway.control.estate import CannotStart, Estate, loaded
from gateway.control.replica import Replica
from gateway.control.running import Progress
from gateway.errors import InvalidRequest

_log = logging.getLogger(__name__)
_PURPOSE = "switch of engines"

Mode = Literal["beside", "replace"]


class Switch:
    """The one switch that may be under way."""

    def __init__(self, estate: Estate) -> None:
        self._estate = estate
        self._progress = estate.running.switch
        self._task: asyncio.Task[None] | None = None
        if self._progress is not None and self._progress.phase not in ("done", "failed"):
            self._interrupted(self._progress)

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
        change = contextlib.ExitStack()
        change.enter_context(self._estate.changing())
        self._progress = Progress(backend=config.backend, mode=mode, phase="starting", started_at=time.time())
        self._task = asyncio.create_task(self._run(change, config, mode, self._progress))
        self._task.add_done_callback(self._ended)

    async def wait(self, timeout_s: float) -> None:
        """Until the switch has ended, at most so long."""
        if self._task is not None:
            await asyncio.wait([self._task], timeout=timeout_s)

    async def _run(self, change: contextlib.ExitStack, config: ServeConfig, mode: Mode, progress: Progress) -> None:
        with change:
            _log.info("the switch to %s (%s) begins", config.backend, mode)
            self._estate.note_switch(progress)
            try:
                await (self._beside if mode == "beside" else self._replace)(config, progress)
                progress.phase = "done"
                _log.info("the switch to %s is done, after %.1f s", config.backend, time.time() - progress.started_at)
            except CannotStart as error:
                _log.error("the switch to %s failed: %s", config.backend, error)
                progress.phase, progress.reason = "failed", str(error)
            finally:
                progress.ended_at = time.time()
            self._estate.note_switch(progress)

    def _ended(self, task: asyncio.Task[None]) -> None:
        """Nobody else may look at how it ended: a defect would show as a switch that goes on for ever."""
        if task.cancelled() or (error := task.exception()) is None:
            return
        _log.error("the switch of engines met a defect", exc_info=error)
        if self._progress is not None:
            self._progress.phase = "failed"
            self._progress.reason = "the gateway has a defect; its log says more"
            self._estate.note_switch(self._progress)

    def _interrupted(self, progress: Progress) -> None:
        """Control ended within that switch; this one goes on with what was noted last."""
        progress.ended_at = time.time()
        if progress.shifted:
            progress.phase = "done"
        else:
            goes_on = self._estate.running.config.backend
            progress.phase = "failed"
            progress.reason = f"the gateway's control process was started again meanwhile, and goes on with {goes_on}"
        self._estate.note_switch(progress)

    async def _beside(self, config: ServeConfig, progress: Progress) -> None:
        estate, old = self._estate, self._estate.staying
        new = await self._start(config, loaded(old, estate.core.registry.desired))
        self._shift(config, new, progress)
        progress.phase = "draining"
        await estate.retire(old, _PURPOSE, config.drain_timeout_s)

    async def _replace(self, config: ServeConfig, progress: Progress) -> None:
        estate, old = self._estate, self._estate.staying
        before, wanted = estate.running.config, loaded(old, estate.core.registry.desired)
        progress.phase = "draining"
        await estate.retire(old, _PURPOSE, config.drain_timeout_s)
        await estate.vacated()
        progress.phase = "starting"
        try:
            self._shift(config, await self._start(config, wanted), progress)
        except CannotStart as error:
            progress.reason = f"{error}; {before.backend} is being started again"
            _log.error("the switch to %s failed: %s", config.backend, progress.reason)
            raise await self._bring_back(before, error) from error

    async def _bring_back(self, before: ServeConfig, why: CannotStart) -> CannotStart:
        """Start the engine again that was taken away; what became of that, behind the reason for it."""
        estate = self._estate
        try:
            replicas = await estate.add(before, before.replicas)
        except CannotStart as error:
            then = "nothing serves now: mend that and switch again, or restart the gateway"
            return CannotStart(f"{why}; and {before.backend} cannot be started again: {error}; {then}")
        estate.note(estate.running, replicas)
        try:
            await estate.ready(replicas, (), before.start_timeout_s)
        except CannotStart as error:
            then = "it is tried again, less and less often"
            return CannotStart(f"{why}; and {before.backend}, started again, does not come back: {error}; {then}")
        return CannotStart(f"{why}; {before.backend} is started again")

    async def _start(self, config: ServeConfig, wanted: frozenset[str]) -> list[Replica]:
        """New replicas, ready and without traffic. Raises CannotStart, with none of them left."""
        estate = self._estate
        new = await estate.add(config, config.replicas, hidden=_PURPOSE)
        try:
            await estate.ready(new, wanted, config.start_timeout_s)
        except CannotStart:
            for replica in new:
                await estate.core.remove(replica)
            raise
        return new

    def _shift(self, config: ServeConfig, new: list[Replica], progress: Progress) -> None:
        """Let traffic in; the relays hear of it together with what is drained next."""
        progress.shifted = True
        self._estate.note(self._estate.running.model_copy(update={"config": config}), new)
        self._estate.core.backend = registry.get(config.backend)
        for replica in new:
            replica.resume(_PURPOSE)
