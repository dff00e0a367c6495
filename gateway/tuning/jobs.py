"""Fine-tuning jobs: made, watched and changed by the API; worked off one after the other by `runner.py`."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import os
import re
import secrets
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec
import yaml

from gateway.adapters.storage import full_disk_is_an_error
from gateway.control.service import Service
from gateway.errors import Conflict, InvalidRequest, ModelNotFound, NotFound
from gateway.tuning import request
from gateway.tuning.files import Files
from gateway.tuning.records import Checkpoint, Event, File, Job, Status, new_id
from gateway.tuning.store import Objects
from gateway.tuning.trainer import Trainer

_PURPOSES = ("fine-tune", "user_data")
_PAUSABLE = (Status.QUEUED, Status.RUNNING)


class Jobs:
    """The jobs of one gateway."""

    def __init__(self, service: Service, objects: Objects, files: Files, trainer: Trainer, directory: Path) -> None:
        """directory: a folder a job, with its data and the trainer's run."""
        self.service = service
        self.files = files
        self.trainer = trainer
        self._objects = objects
        self._directory = directory
        self._lock = asyncio.Lock()  # one change at a time: each reads the record, then writes it
        self._checking = asyncio.Semaphore(1)  # a large file takes a while, and a thread
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

    async def create(self, body: Any) -> Job:
        """Check everything that can be checked, then queue the job. Raises GatewayErrors."""
        asked = request.parse(body)
        policy = self.service.policy
        self._check_model(asked.model)
        self.service.check_engines()
        if policy.base_path is None:
            raise InvalidRequest(
                "the base's checkpoint is not known here; restart with --model DIR, the checkpoint that the attached "
                "engine serves",
                param="model",
                code="unknown_base",
            )
        if asked.tunegate.lora_rank > policy.max_rank:
            raise InvalidRequest(
                f"tunegate.lora_rank is {asked.tunegate.lora_rank}; this gateway serves up to {policy.max_rank} "
                "(--max-adapter-rank)",
                param="tunegate.lora_rank",
            )
        training = await self._usable(asked.training_file, "training_file")
        validation = await self._usable(asked.validation_file, "validation_file") if asked.validation_file else None
        await asyncio.to_thread(self.trainer.prove)
        job_id = new_id("ftjob-")
        folder = self._directory / job_id
        method = "sft" if request.method_of(asked) == "supervised" else "dpo"
        self._being_made.add(job_id)
        kept = {"dataset": training} | ({"eval_dataset": validation} if validation else {})
        try:
            paths = await asyncio.to_thread(self._keep, folder, kept)
            examples = await self._check(paths["dataset"], training, method, "training_file")
            if validation:
                await self._check(paths["eval_dataset"], validation, method, "validation_file")
            values = request.hyperparameters(asked, examples)
            config = request.trainer_config(asked, values, examples)
            seed = asked.seed if asked.seed is not None else secrets.randbelow(2**31)
            job = Job(
                id=job_id,
                created_at=int(time.time()),
                status=Status.QUEUED,
                model=asked.model,
                training_file=training.id,
                validation_file=validation.id if validation else None,
                method=request.method_of(asked),
                hyperparameters=values,
                settings=asked.tunegate.model_dump(exclude_unset=True),
                seed=seed,
                name=request.model_name(policy.base, asked.suffix, job_id),
                config=config,
                gate_eval_loss=asked.tunegate.gate.eval_loss,
                metadata=asked.metadata,
            )
            whole = config | {
                "model": str(policy.base_path.absolute()),
                "device": self.trainer.device,
                "seed": seed,
                "output_dir": str(self.run_dir(job)),
                **{name: [str(path)] for name, path in paths.items()},
            }
            await asyncio.to_thread((folder / "job.yaml").write_text, yaml.safe_dump(whole, sort_keys=False))
            created = [
                _said(f"Created fine-tuning job: {job.id}"),
                _said(f"Validated {training.filename}: {examples} examples"),
                _said("Files validated, job is queued"),
            ]
            await asyncio.to_thread(self._objects.put, job, created)
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
        """What is to be worked on, in order: first what runs already, then the queue."""
        jobs = await asyncio.to_thread(self._objects.all, Job, (Status.RUNNING, Status.QUEUED))
        return sorted(jobs, key=lambda job: job.status is not Status.RUNNING)

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
                job, status=Status.CANCELLED, finished_at=int(time.time()), estimated_finish=None
            )

        job = await self.change(id, change, [_said("Fine-tuning job cancelled")])
        await self.forget_checkpoints(job)
        return job

    async def forget_checkpoints(self, job: Job) -> None:
        """Serve none of a job's checkpoints any more."""
        known = (await self.get(job.id)).checkpoints
        await self.change(job.id, lambda now: msgspec.structs.replace(now, checkpoints=()))
        for checkpoint in known:
            await self.drop_model(checkpoint)

    async def drop_model(self, checkpoint: Checkpoint) -> None:
        """Serve a checkpoint no more."""
        with contextlib.suppress(NotFound):  # the client may have deleted it
            await self.service.delete(checkpoint.model)

    async def pause(self, id: str) -> Job:
        """Have a job stop after its step, with a checkpoint. Raises NotFound, Conflict."""

        def change(job: Job) -> Job:
            if job.status not in _PAUSABLE:
                raise Conflict(
                    f"{job.id} is {job.status}; only a queued or running job can pause", code="invalid_job_state"
                )
            return msgspec.structs.replace(job, status=Status.PAUSED, estimated_finish=None)

        return await self.change(id, change, [_said("Fine-tuning job paused")])

    async def resume(self, id: str) -> Job:
        """Queue a paused job again: it goes on where it stood. Raises NotFound, Conflict."""

        def change(job: Job) -> Job:
            if job.status is not Status.PAUSED:
                raise Conflict(f"{job.id} is {job.status}; only a paused job can be resumed", code="invalid_job_state")
            return msgspec.structs.replace(job, status=Status.QUEUED)

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

    def _check_model(self, model: str) -> None:
        if model == self.service.policy.base:
            return
        base = self.service.policy.base
        if any(known["id"] == model for known in self.service.models()):
            raise InvalidRequest(
                f"{model!r} is tuned already; training goes out from the base model, {base!r}", param="model"
            )
        raise ModelNotFound(f"The model `{model[:200]}` does not exist; {base!r} can be tuned", param="model")

    async def _usable(self, id: str, param: str) -> File:
        file = await self.files.get(id, param)
        if file.purpose not in _PURPOSES:
            raise InvalidRequest(
                f"{param} {id!r} was uploaded for {file.purpose!r}; upload it with purpose='fine-tune'", param=param
            )
        return file

    def _sweep(self) -> None:
        # In this order: a job made meanwhile has no folder in the list yet, is being made, or is in the store.
        folders = list(self._directory.glob("ftjob-*"))
        kept = set(self._being_made)
        kept |= {job.id for job in self._objects.all(Job) if job.status is not Status.CANCELLED}
        for folder in folders:
            if folder.name not in kept:
                shutil.rmtree(folder, ignore_errors=True)

    def _keep(self, folder: Path, files: dict[str, File]) -> dict[str, Path]:
        """The job's own names for its files, so that it keeps them when they are deleted."""
        paths = {}
        with full_disk_is_an_error():
            folder.mkdir(mode=0o700, parents=True)
            for name, file in files.items():
                paths[name] = folder / (f"{name}.jsonl.gz" if file.filename.endswith(".gz") else f"{name}.jsonl")
                os.link(self.files.path(file.id), paths[name])
        return paths

    async def _check(self, path: Path, file: File, method: str, param: str) -> int:
        check = functools.partial(self.trainer.check_data, path, file.filename, method, param)
        async with self._checking:
            return await asyncio.to_thread(check)


def _said(message: str) -> Event:
    return Event(created_at=int(time.time()), message=message)
