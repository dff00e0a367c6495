"""Works jobs off, one at a time: starts the trainer, follows its log, has its adapter taken in, yields to serving.

What is to be is in the store; what is, in the process table and the run directory. Each look compares them, so it goes
on after a restart of control or of the whole gateway as if nothing had been.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import shutil
import time
from typing import Any

import msgspec
from sqlalchemy.exc import SQLAlchemyError

from backends.base import BackendError
from backends.process import EngineProcess
from gateway.control.keys import digest
from gateway.errors import Conflict, GatewayError
from gateway.scopes import ADAPTERS, INFER
from gateway.tuning import pressure, progress
from gateway.tuning.jobs import Jobs
from gateway.tuning.pressure import Pressure, Queues, Rule
from gateway.tuning.records import Event, Job, Status
from gateway.tuning.results import Results, event, result
from gateway.tuning.trainer import EXIT_PAUSED

_log = logging.getLogger(__name__)
_LOOK_S = 0.5  # while a job runs
_IDLE_S = 60.0  # how often expired files are looked for
_RETRY_S = 5.0
_CHECKPOINTS = 2  # the newest that are served, beside the result
_TAIL_CHARACTERS = 800  # of the trainer's output, where it did not say why it ended
_OPENS = frozenset({INFER, ADAPTERS})  # a trainer's key, which samples answers with the adapter as it stands


class Runner:
    """The one worker of a gateway's jobs."""

    def __init__(self, jobs: Jobs, results: Results, queues: Queues, rule: Rule | None) -> None:
        """rule: when training yields to serving; None: never."""
        self._jobs = jobs
        self._results = results
        self._queues = queues
        self._rule = rule
        self._pressure = Pressure()
        self._job_id = ""  # of the process
        self._process: EngineProcess | None = None
        self._adopted = False  # what an earlier control left

    async def open(self) -> None:
        """Let trainers that an earlier control left go on calling the gateway. Before relays are told of any keys."""
        for job in await self._jobs.unfinished():
            if job.pass_digest and await asyncio.to_thread(self._jobs.trainer.adopt, job.id) is not None:
                self._jobs.service.core.keys.lend_again(job.pass_digest, job.key_id, _OPENS)

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
                self._pressure = Pressure()
                return False
            first = await self._weigh(waiting[0])
            if not self._pressure.held:
                await self._begin(first)
            return True
        job = await self._follow(await self._jobs.get(self._job_id))
        process = self._process
        if await asyncio.to_thread(process.alive):
            await self._steer(await self._weigh(job), process)
            return True
        job = await self._follow(job)  # what it wrote last
        self._process = None
        status = await asyncio.to_thread(process.exit_status)
        await self._ended(job, -9 if status is None else status)
        return True

    async def _adopt(self) -> bool:
        """Follow a trainer that an earlier control left, whatever its job is to do now; False when none lives."""
        unfinished = await self._jobs.unfinished()
        self._pressure = Pressure(held=self._rule is not None and any(job.held for job in unfinished))
        for job in unfinished:
            process = await asyncio.to_thread(self._jobs.trainer.adopt, job.id)
            if process is not None:
                self._process, self._job_id = process, job.id
                return True
        self._adopted = True
        return False

    async def _weigh(self, job: Job) -> Job:
        """Look whether requests queue, and hold the job or let it go on accordingly; the job from now on."""
        rule, before = self._rule, self._pressure
        why = ""
        if rule is None:
            self._pressure = Pressure()
        else:
            # The answers that a job itself has sampled may be what engines queue; relays tell them from others'.
            look = await self._queues.look(engines=job.method != "reinforcement")
            self._pressure = pressure.after(before, look.busy, time.monotonic(), rule)
            why = f"{look.why(rule.wait_s)}; serving comes first"
        with contextlib.suppress(Conflict):  # its owner was faster
            if self._pressure.held and job.status is Status.RUNNING:
                return await self._jobs.hold(job.id, why)
            if self._pressure.held and not before.held and job.status is Status.QUEUED:
                return await self._jobs.change(job.id, lambda now: now, [event(f"Fine-tuning job waits: {why}")])
            if job.held and not self._pressure.held:
                calm = f"no request has queued for {rule.calm_s:g} s" if rule is not None else "nothing is to yield to"
                return await self._jobs.let_go(job.id, calm)
        return job

    async def _begin(self, job: Job) -> None:
        """Start the job's process."""
        jobs = self._jobs
        if result(jobs.run_dir(job)).exists():  # it was done while nobody looked
            await self._forget_trial(job)
            await self._results.publish(await self._follow(job))
            return
        config = jobs.folder(job) / "job.yaml"
        secret = await self._pass(job)
        # Known now alone: the gateway may have started again on another port since the job was made, or last ran.
        url = jobs.url if job.method == "reinforcement" else None
        method, run = job.config["method"], jobs.run_dir(job)
        start = functools.partial(jobs.trainer.start, job.id, method, config, run, url, secret)
        try:
            await asyncio.to_thread(jobs.trainer.prove)
            self._process = await asyncio.to_thread(start)
        except (BackendError, GatewayError) as error:
            await self._results.fail(job, "trainer_not_started", str(error))
            return
        self._job_id = job.id
        await jobs.change(job.id, _begun)

    async def _pass(self, job: Job) -> str | None:
        """A secret for a trainer that calls the gateway; None where it calls nothing, or access is open."""
        if job.method != "reinforcement" or not job.key_id:
            return None
        core = self._jobs.service.core
        secret = core.keys.lend(job.key_id, _OPENS)
        await self._jobs.change(job.id, lambda now: msgspec.structs.replace(now, pass_digest=digest(secret)))
        await core.published()
        return secret

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
        else:
            pause.unlink(missing_ok=True)

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
            if told := progress.event(seen, line):
                events.append(told)
            if line["type"] == "checkpoint" and line["step"] < seen.total_steps and line["step"] not in known:
                saved[line["step"]] = line  # may be there twice: saved again where it turned out to be the best
        checkpoints = list(job.checkpoints)
        for line in list(saved.values())[-_CHECKPOINTS:]:
            checkpoint, told = await self._results.checkpoint(job, line)
            checkpoints += [checkpoint] if checkpoint else []
            events.append(told)
        for old in checkpoints[:-_CHECKPOINTS]:
            await self._jobs.drop_model(old.model)

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

    async def _ended(self, job: Job, status: int) -> None:
        """The process is gone: see what it left."""
        run = self._jobs.run_dir(job)
        await self._forget_trial(job)
        if job.status is Status.CANCELLED:
            await self._jobs.forget_checkpoints(job)
            await asyncio.to_thread(shutil.rmtree, self._jobs.folder(job), True)
        elif result(run).exists():
            await self._results.publish(job)
        elif status == EXIT_PAUSED:
            return  # as asked, or because the gateway ends: a running job is started again by the next look
        elif status < 0 and job.step > job.reached_step:
            said = f"The trainer was ended by signal {-status}; it goes on from its last checkpoint"
            await self._jobs.change(job.id, lambda now: now, [event(said, "warn")])
        else:
            await self._results.fail(job, "training_failed", await asyncio.to_thread(self._why, job, status))

    async def _forget_trial(self, job: Job) -> None:
        """Take back what a trainer that calls the gateway had there: its secret, and the adapter it sampled with."""
        if job.method != "reinforcement":
            return
        if job.pass_digest:
            self._jobs.service.core.keys.take_back(job.pass_digest)
            await self._jobs.change(job.id, lambda now: msgspec.structs.replace(now, pass_digest=""))
        await self._jobs.drop_model(job.id)  # it deletes it itself, unless it was killed

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
