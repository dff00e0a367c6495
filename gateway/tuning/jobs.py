"""Fine-tuning jobs: made, watched and changed by the API; worked off one after the other by `runner.py`."""

from __future__ import annotations

import asyncio
import contextlib
import re
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec

from gateway.control.service import Service
from gateway.errors import Conflict, InvalidRequest, NotFound
from gateway.tuning import request
from gateway.tuning.files import Files
from gateway.tuning.making import Maker
from gateway.tuning.records import Checkpoint, Event, Job, Status, new_id
from gateway.tuning.store import Objects
from gateway.tuning.trainer import Trainer

_PAUSABLE = (Status.QUEUED, Status.RUNNING)


class Jobs:
    """The jobs of one gateway."""

    def __init__(
        self, service: Service, objects: Objects, files: Files, trainer: Trainer, directory: Path, url: str
    ) -> None:
        """directory: a folder a job, with its data and the trainer's run.

        url: of the gateway itself, where trainers have answers sampled.
        """
        self.service = service
        self.files = files
        self.trainer = trainer
        self.url = url
        self._objects = objects
        self._directory = directory
        self._maker = Maker(service, files, trainer)
        self._lock = asyncio.Lock()  # one change at a time: each reads the record, then writes it
        self.changed = asyncio.Event()
        self._being_made: set[str] = set()

    def folder(self, job: Job) -> Path:
        """Where a job's data and run lie."""
        return self._directory / job.id

    def run_dir(self, job: Job) -> Path:
        """The trainer's run directory."""
        return self.folder(job) / "run"

    async def sweep(self) -> None:
        """Remove the folders of cancelled jobs, and of jobs that were never made."""
        await asyncio.to_thread(self._sweep)

    async def create(self, body: Any, key_id: str) -> Job:
        """Check everything that can be checked, then queue the job. Raises GatewayErrors."""
        asked = request.parse(body)
        job_id = new_id("ftjob-")
        folder = self._directory / job_id
        self._being_made.add(job_id)
        try:
            job, story = await self._maker.make(asked, key_id, job_id, folder)
            await asyncio.to_thread(self._objects.put, job, story)
        except BaseException:
            await asyncio.to_thread(shutil.rmtree, folder, True)
            raise
        finally:
            self._being_made.discard(job_id)
        self.changed.set()
        return job

    async def get(self, id: str) -> Job:
        """Raises NotFound."""
        job = await asyncio.to_thread(self._objects.get, id, Job)
        if job is None:
            raise NotFound(
                f"Could not find fine tune: {id[:100]}", param="fine_tuning_job_id", code="fine_tune_not_found"
            )
        return job

    async def page(self, after: str | None, limit: int, metadata: dict[str, str]) -> tuple[list[Job], bool]:
        """Jobs behind `after`, newest first, that carry this metadata; whether there are more."""

        def keep(job: Job) -> bool:
            return metadata.items() <= (job.metadata or {}).items()

        return await asyncio.to_thread(self._objects.page, Job, after, limit, keep)

    async def events(self, id: str, after: str | None, limit: int) -> tuple[list[Event], bool]:
        """A job's story behind the line `after`, newest first, and whether there is more. Raises NotFound."""
        await self.get(id)
        before = None
        if after is not None:
            number = after.removeprefix("ftevent-")
            if not re.fullmatch("[0-9]{1,18}", number):
                raise InvalidRequest(f"after is {after[:50]!r}; give the id of an event", param="after")
            before = int(number)
        return await asyncio.to_thread(self._objects.events, id, before, limit)

    async def checkpoints(self, id: str, after: str | None, limit: int) -> tuple[list[Checkpoint], bool]:
        """A job's checkpoints behind `after`, newest first, and whether there are more. Raises NotFound."""
        found = list(reversed((await self.get(id)).checkpoints))
        ids = [checkpoint.id for checkpoint in found]
        if after is not None and after not in ids:
            raise InvalidRequest(f"after is {after[:50]!r}, which is no checkpoint of {id}", param="after")
        rest = found[ids.index(after) + 1 :] if after is not None else found
        return rest[:limit], len(rest) > limit

    async def open_jobs(self) -> list[Job]:
        """What is to be worked on, in order: what runs already, what is held, the queue."""
        statuses = (Status.RUNNING, Status.QUEUED, Status.PAUSED)
        jobs = await asyncio.to_thread(self._objects.all, Job, statuses)
        jobs = [job for job in jobs if job.held or job.status is not Status.PAUSED]
        return sorted(jobs, key=lambda job: (job.status is not Status.RUNNING, not job.held))

    async def unfinished(self) -> list[Job]:
        """Whose trainer may still live, oldest first."""
        statuses = (Status.RUNNING, Status.QUEUED, Status.PAUSED, Status.CANCELLED)
        return await asyncio.to_thread(self._objects.all, Job, statuses)

    async def cancel(self, id: str) -> Job:
        """End a job for good; what it trained is dropped. Raises NotFound, Conflict."""

        def change(job: Job) -> Job:
            if job.status.over:
                raise Conflict(f"Job has already completed: {job.id} is {job.status}", code="invalid_job_state")
            return msgspec.structs.replace(
                job, status=Status.CANCELLED, finished_at=int(time.time()), estimated_finish=None, held=False
            )

        job = await self.change(id, change, [_said("Fine-tuning job cancelled")])
        await self.forget_checkpoints(job)
        return job

    async def forget_checkpoints(self, job: Job) -> None:
        """Serve none of a job's checkpoints any more."""
        known = (await self.get(job.id)).checkpoints
        await self.change(job.id, lambda now: msgspec.structs.replace(now, checkpoints=()))
        for checkpoint in known:
            await self.drop_model(checkpoint.model)

    async def drop_model(self, name: str) -> None:
        """Serve what a job made no more."""
        with contextlib.suppress(NotFound):  # the client may have deleted it
            await self.service.delete(name)

    async def pause(self, id: str) -> Job:
        """Have a job stop after its step, with a checkpoint. Raises NotFound, Conflict."""

        def change(job: Job) -> Job:
            if job.status not in _PAUSABLE and not job.held:
                raise Conflict(
                    f"{job.id} is {job.status}; only a queued or running job can pause", code="invalid_job_state"
                )
            return msgspec.structs.replace(job, status=Status.PAUSED, estimated_finish=None, held=False)

        return await self.change(id, change, [_said("Fine-tuning job paused")])

    async def hold(self, id: str, why: str) -> Job:
        """Have a running job stop as `pause` does, until the gateway lets it go on. Raises NotFound, Conflict."""

        def change(job: Job) -> Job:
            if job.status is not Status.RUNNING:
                raise Conflict(f"{job.id} is {job.status}; only a running job can be held")
            return msgspec.structs.replace(job, status=Status.PAUSED, estimated_finish=None, held=True)

        return await self.change(id, change, [_said(f"Fine-tuning job paused: {why}")])

    async def let_go(self, id: str, why: str) -> Job:
        """End a hold: the job is the next. Raises NotFound, Conflict."""

        def change(job: Job) -> Job:
            if not job.held:
                raise Conflict(f"{job.id} is {job.status}, and not held")
            return msgspec.structs.replace(job, status=Status.RUNNING, held=False)

        return await self.change(id, change, [_said(f"Fine-tuning job resumed: {why}")])

    async def resume(self, id: str) -> Job:
        """Queue a paused job again: it goes on where it stood. Raises NotFound, Conflict."""

        def change(job: Job) -> Job:
            if job.status is not Status.PAUSED:
                raise Conflict(f"{job.id} is {job.status}; only a paused job can be resumed", code="invalid_job_state")
            return msgspec.structs.replace(job, status=Status.QUEUED, held=False)

        return await self.change(id, change, [_said("Fine-tuning job resumed")])

    async def change(self, id: str, change: Callable[[Job], Job], events: Sequence[Event] = ()) -> Job:
        """Read a job, change it, write it with more lines of its story. Raises what `change` raises, NotFound."""
        return await asyncio.shield(self._change(id, change, events))

    async def _change(self, id: str, change: Callable[[Job], Job], events: Sequence[Event]) -> Job:
        async with self._lock:
            job = change(await self.get(id))
            await asyncio.to_thread(self._objects.put, job, events)
        self.changed.set()
        return job

    def _sweep(self) -> None:
        # In this order: a job made meanwhile has no folder in the list yet, is being made, or is in the store.
        folders = list(self._directory.glob("ftjob-*"))
        kept = set(self._being_made)
        kept |= {job.id for job in self._objects.all(Job) if job.status is not Status.CANCELLED}
        for folder in folders:
            if folder.name not in kept:
                shutil.rmtree(folder, ignore_errors=True)


def _said(message: str) -> Event:
    return Event(created_at=int(time.time()), message=message)
