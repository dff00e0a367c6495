"""Works jobs off, one at a time: starts the trainer, follows its log, takes its adapter in.

What is to be is in the store; what is, in the process table and the run directory. Each look compares them, so it goes
on after a restart of control or of the whole gateway as if nothing had been.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
import logging
import math
import shutil
import time
from pathlib import Path
from typing import Any

import msgspec
from sqlalchemy.exc import SQLAlchemyError

from backends.base import BackendError
from backends.process import EngineProcess
from gateway.adapters.package import KEPT, Part
from gateway.control.catalog import Cause, Version
from gateway.control.views import READY
from gateway.errors import Conflict, GatewayError
from gateway.tuning import progress
from gateway.tuning.jobs import Jobs
from gateway.tuning.records import Checkpoint, Event, Fault, Job, Status, new_id
from gateway.tuning.trainer import EXIT_PAUSED

_log = logging.getLogger(__name__)
_LOOK_S = 0.5  # while a job runs
_IDLE_S = 60.0  # how often expired files are looked for
_RETRY_S = 5.0
_CHECKPOINTS = 2  # the newest that are served, beside the result
_READY_S = 600.0  # for engines to load the result
_TAIL_CHARACTERS = 800  # of the trainer's output, where it did not say why it ended


class Runner:
    """The one worker of a gateway's jobs."""

    def __init__(self, jobs: Jobs) -> None:
        self._jobs = jobs
        self._job_id = ""  # of the process
        self._process: EngineProcess | None = None
        self._adopted = False  # what an earlier control left

    async def run(self) -> None:
        """Work until cancelled. Trainers are left running: their guards end them with the gateway."""
        while True:
            wait_s = _IDLE_S
            self._jobs.changed.clear()
            try:
                if await self._look():
                    wait_s = _LOOK_S
                else:
                    await self._jobs.files.delete_expired()
                    await self._jobs.sweep()
            except (GatewayError, SQLAlchemyError, OSError) as error:
                _log.error("fine-tuning stands still, trying again in %g s: %s", _RETRY_S, error)
                wait_s = _RETRY_S
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(wait_s):
                    await self._jobs.changed.wait()

    async def _look(self) -> bool:
        """One step. False when there is nothing to do."""
        if self._process is None:
            if not self._adopted and await self._adopt():
                return True
            waiting = await self._jobs.open_jobs()
            if not waiting:
                return False
            await self._begin(waiting[0])
            return True
        job = await self._follow(await self._jobs.get(self._job_id))
        process = self._process
        if await asyncio.to_thread(process.alive):
            await self._steer(job, process)
            return True
        job = await self._follow(job)  # what it wrote last
        self._process = None
        status = await asyncio.to_thread(process.exit_status)
        await self._ended(job, -9 if status is None else status)
        return True

    async def _adopt(self) -> bool:
        """Follow a trainer that an earlier control left, whatever its job is to do now; False when none lives."""
        for job in await self._jobs.unfinished():
            process = await asyncio.to_thread(self._jobs.trainer.adopt, job.id)
            if process is not None:
                self._process, self._job_id = process, job.id
                return True
        self._adopted = True
        return False

    async def _begin(self, job: Job) -> None:
        """Start the job's process."""
        jobs = self._jobs
        if _result(jobs.run_dir(job)).exists():  # it was done while nobody looked
            await self._publish(await self._follow(job))
            return
        config = jobs.folder(job) / "job.yaml"
        start = functools.partial(jobs.trainer.start, job.id, job.config["method"], config, jobs.run_dir(job))
        try:
            await asyncio.to_thread(jobs.trainer.prove)
            self._process = await asyncio.to_thread(start)
        except (BackendError, GatewayError) as error:
            await self._fail(job, "trainer_not_started", str(error))
            return
        self._job_id = job.id
        await jobs.change(job.id, _begun)

    async def _steer(self, job: Job, process: EngineProcess) -> None:
        """Have a living process do what its job's status says."""
        pause = self._jobs.run_dir(job) / "pause"
        if job.status is Status.CANCELLED:
            await asyncio.to_thread(process.stop, 0.0)
        elif job.status is Status.PAUSED:
            if pause.parent.is_dir():
                pause.touch()  # each time: a run that is only beginning forgets earlier requests
        elif job.status is Status.QUEUED:
            pause.unlink(missing_ok=True)
            await self._jobs.change(job.id, _to_running)

    async def _follow(self, job: Job) -> Job:
        """Tell what the trainer has logged since the last look."""
        log = self._jobs.run_dir(job) / "events.jsonl"
        lines, offset = await asyncio.to_thread(progress.read_log, log, job.log_bytes)
        if not lines:
            return job
        events: list[Event] = []
        saved: dict[int, dict[str, Any]] = {}
        seen, known = job, {checkpoint.step for checkpoint in job.checkpoints}
        for line in lines:
            seen = progress.after(seen, line)
            if event := progress.event(seen, line):
                events.append(event)
            if line["type"] == "checkpoint" and line["step"] < seen.total_steps and line["step"] not in known:
                saved[line["step"]] = line  # may be there twice: saved again where it turned out to be the best
        checkpoints = list(job.checkpoints)
        for line in list(saved.values())[-_CHECKPOINTS:]:
            checkpoint, event = await self._checkpoint(job, line)
            checkpoints += [checkpoint] if checkpoint else []
            events.append(event)
        for old in checkpoints[:-_CHECKPOINTS]:
            await self._jobs.drop_model(old)

        def change(now: Job) -> Job:
            return msgspec.structs.replace(
                now,
                total_steps=seen.total_steps,
                step=seen.step,
                estimated_finish=seen.estimated_finish if now.status is Status.RUNNING else None,
                checkpoints=tuple(checkpoints[-_CHECKPOINTS:]),
                log_bytes=offset,
            )

        return await self._jobs.change(job.id, change, events)

    async def _checkpoint(self, job: Job, line: dict[str, Any]) -> tuple[Checkpoint | None, Event]:
        """Make a model of a checkpoint, which can be called while the job goes on."""
        step, at = int(line["step"]), int(line["time"])
        name = f"{job.name}:ckpt-step-{step}"
        run = self._jobs.run_dir(job)
        if self._jobs.service.core.registry.at_start:
            said = f"Checkpoint at step {step}; this engine would start again for it, so it is not served"
            return None, Event(created_at=at, message=said)
        try:
            await self._take_in(job, name, run / "checkpoints" / str(line["path"]))
        except (GatewayError, OSError) as error:
            return None, Event(created_at=at, message=f"Checkpoint at step {step} is not served: {error}", level="warn")
        metrics = await asyncio.to_thread(progress.metrics_at, run / "events.jsonl", step)
        checkpoint = Checkpoint(new_id("ftckpt_"), at, name, step, metrics)
        return checkpoint, Event(created_at=at, message=f"Checkpoint created at step {step}: {name}")

    async def _ended(self, job: Job, status: int) -> None:
        """The process is gone: see what it left."""
        run = self._jobs.run_dir(job)
        if job.status is Status.CANCELLED:
            await self._jobs.forget_checkpoints(job)
            await asyncio.to_thread(shutil.rmtree, self._jobs.folder(job), True)
        elif _result(run).exists():
            await self._publish(job)
        elif status == EXIT_PAUSED:
            return  # as asked, or because the gateway ends: a running job is started again by the next look
        elif status < 0 and job.step > job.reached_step:
            said = f"The trainer was ended by signal {-status}; it goes on from its last checkpoint"
            await self._jobs.change(job.id, lambda now: now, [_event(said, "warn")])
        else:
            await self._fail(job, "training_failed", await asyncio.to_thread(self._why, job, status))

    async def _publish(self, job: Job) -> None:
        """Check the result, and make a model of it."""
        jobs, run = self._jobs, self._jobs.run_dir(job)
        manifest = await asyncio.to_thread(_manifest, run)
        figures = manifest["metrics"]
        if job.gate_eval_loss and (worse := _worse(figures, held_out=job.validation_file is not None)):
            await self._fail(job, "gate_failed", worse)
            return
        try:
            version, _ = await self._take_in(job, job.name, _result(run))
            # As if new: after a restart it is known already, and engines may refuse it still.
            shown = await jobs.service.settle(version, True, _READY_S)
        except GatewayError as error:
            await self._fail(job, error.code or "adapter_refused", error.message)
            return
        table = jobs.folder(job) / "step_metrics.csv"
        table.write_bytes(await asyncio.to_thread(progress.metrics_csv, run / "events.jsonl"))
        results = await jobs.files.add(table, "step_metrics.csv", "fine-tune-results")
        step = int(figures["step"])
        metrics = await asyncio.to_thread(progress.metrics_at, run / "events.jsonl", step)
        last = Checkpoint(new_id("ftckpt_"), int(time.time()), job.name, step, metrics)
        said = [_event(f"New fine-tuned model created: {job.name}")]
        if shown["state"] != READY:
            said.append(_event(f"It is {shown['state']}: {shown['reason'] or 'no replica is ready yet'}", "warn"))
        said.append(_event("The job has successfully completed"))

        def change(now: Job) -> Job:
            if now.status is Status.CANCELLED:
                raise Conflict(f"{now.id} was cancelled while its model was published")
            return msgspec.structs.replace(
                now,
                status=Status.SUCCEEDED,
                fine_tuned_model=job.name,
                finished_at=int(time.time()),
                estimated_finish=None,
                trained_tokens=int(figures["tokens"]),
                result_files=(results.id,),
                checkpoints=(*(one for one in now.checkpoints if one.step != step), last),
            )

        try:
            await jobs.change(job.id, change, said)
        except Conflict:
            await jobs.drop_model(last)
            await jobs.files.delete(results.id)
            await asyncio.to_thread(shutil.rmtree, jobs.folder(job), True)
            return
        await asyncio.to_thread(_tidy, run)

    async def _take_in(self, job: Job, name: str, directory: Path) -> tuple[Version, bool]:
        service = self._jobs.service
        parts = [Part(file, directory / file) for file in sorted(KEPT) if (directory / file).is_file()]
        with service.storage.staging() as work:
            return await service.take_in(name, parts, work, Cause(job.id, "fine-tuned"))

    async def _fail(self, job: Job, code: str, message: str) -> None:
        def change(now: Job) -> Job:
            if now.status is Status.CANCELLED:
                return now
            return msgspec.structs.replace(
                now,
                status=Status.FAILED,
                error=Fault(code, message[:2000]),
                finished_at=int(time.time()),
                estimated_finish=None,
            )

        await self._jobs.change(job.id, change, [_event(f"The job failed: {message[:2000]}", "error")])
        await self._jobs.forget_checkpoints(job)
        await asyncio.to_thread(_tidy, self._jobs.run_dir(job))

    def _why(self, job: Job, status: int) -> str:
        said = progress.failure(self._jobs.run_dir(job) / "events.jsonl")
        if status < 0:
            how = f"the trainer was ended by signal {-status}, twice at step {job.step}"
            return f"{how}: not enough memory?" if status == -9 else how
        if said:
            return said
        log = self._jobs.trainer.log_path(job.id)
        text = log.read_text(errors="replace") if log.exists() else ""
        own = "\n".join(line for line in text.splitlines() if not line.startswith("[guard]"))
        return f"the trainer ended with status {status}: {own.strip()[-_TAIL_CHARACTERS:]}"


def _begun(job: Job) -> Job:
    return msgspec.structs.replace(_to_running(job), reached_step=job.step)


def _to_running(job: Job) -> Job:
    return msgspec.structs.replace(job, status=Status.RUNNING) if job.status is Status.QUEUED else job


def _result(run: Path) -> Path:
    return run / "adapter"


def _manifest(run: Path) -> dict[str, Any]:
    return dict(json.loads((_result(run) / "manifest.json").read_text()))


def _worse(figures: dict[str, Any], held_out: bool) -> str:
    """Why the result is not to be served; empty when it is, or when nothing was held out."""
    tuned, base = ((figures.get(name) or {}).get("loss") for name in ("eval", "base_eval"))
    if held_out and (tuned is None or math.isnan(tuned)):
        return (
            "the tuned model's loss on the validation file is no number. Train with a lower learning rate, or set "
            "tunegate.gate.eval_loss to false"
        )
    if tuned is None or base is None or tuned <= base:
        return ""
    return (
        f"the tuned model is worse than the base on the validation file: loss {tuned:.4f}, the base's {base:.4f}. "
        "Train with a lower learning rate or fewer epochs, or set tunegate.gate.eval_loss to false"
    )


def _tidy(run: Path) -> None:
    """Keep what says how the model came to be, and drop the bulk."""
    for bulk in ("checkpoints", "data", "eval"):
        shutil.rmtree(run / bulk, ignore_errors=True)


def _event(message: str, level: str = "info") -> Event:
    return Event(created_at=int(time.time()), message=message, level=level)  # type: ignore[arg-type]  # one of three
