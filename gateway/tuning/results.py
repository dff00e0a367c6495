"""What a trainer leaves becomes models: checkpoints on the way, and the result at the end, once past the gates."""

from __future__ import annotations

import asyncio
import json
import math
import shutil
import time
from pathlib import Path
from typing import Any

import msgspec

from gateway.adapters.package import KEPT, Part
from gateway.control.canary import Policy
from gateway.control.catalog import Cause, Version
from gateway.control.score import ScoreCommand, ScoreFailed
from gateway.control.views import READY
from gateway.errors import Conflict, GatewayError
from gateway.tuning import progress
from gateway.tuning.jobs import Jobs
from gateway.tuning.records import Checkpoint, Event, Fault, Job, Status, new_id

_READY_S = 600.0  # for engines to load the result


class Results:
    """Takes adapters of jobs in, like uploads."""

    def __init__(self, jobs: Jobs, score: ScoreCommand | None) -> None:
        """score: the operator's judge of results, called with the base's name and the result's."""
        self._jobs = jobs
        self._score = score

    async def checkpoint(self, job: Job, line: dict[str, Any]) -> tuple[Checkpoint | None, Event]:
        """Make a model of a checkpoint, which can be called while the job goes on. line: of the trainer's log."""
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

    async def publish(self, job: Job) -> None:
        """Check the result, and make a model of it: the job is over, one way or the other."""
        jobs, run = self._jobs, self._jobs.run_dir(job)
        figures = (await asyncio.to_thread(_manifest, run))["metrics"]
        if job.gate_eval_loss and (worse := _worse(figures, held_out=job.validation_file is not None)):
            await self.fail(job, "gate_failed", worse)
            return
        try:
            version, _ = await self._take_in(job, job.name, result(run))
            # As if new: after a restart it is known already, and engines may refuse it still.
            shown = await jobs.service.settle(version, True, _READY_S)
        except GatewayError as error:
            await self.fail(job, error.code or "adapter_refused", error.message)
            return
        said = [event(f"New fine-tuned model created: {job.name}")]
        if shown["state"] != READY:
            said.append(event(f"It is {shown['state']}: {shown['reason'] or 'no replica is ready yet'}", "warn"))
        if self._score is not None:
            try:
                said.append(event(await self._judged(self._score, job)))
            except ScoreFailed as error:
                await jobs.drop_model(job.name)
                await self.fail(job, "gate_failed", str(error))
                return
        said += await self._hand_on(job)
        said.append(event("The job has successfully completed"))
        table = jobs.folder(job) / "step_metrics.csv"
        table.write_bytes(await asyncio.to_thread(progress.metrics_csv, run / "events.jsonl"))
        results = await jobs.files.add(table, "step_metrics.csv", "fine-tune-results", job.key_id)
        step = int(figures["step"])
        metrics = await asyncio.to_thread(progress.metrics_at, run / "events.jsonl", step)
        last = Checkpoint(new_id("ftckpt_"), int(time.time()), job.name, step, metrics)

        def change(now: Job) -> Job:
            if now.status is Status.CANCELLED:
                raise Conflict(f"{now.id} was cancelled while its model was published")
            return msgspec.structs.replace(
                now,
                status=Status.SUCCEEDED,
                fine_tuned_model=job.name,
                finished_at=int(time.time()),
                estimated_finish=None,
                held=False,  # it may have been at its end when it was to yield
                trained_tokens=int(figures["tokens"]),
                result_files=(results.id,),
                checkpoints=(*(one for one in now.checkpoints if one.step != step), last),
            )

        try:
            await jobs.change(job.id, change, said)
        except Conflict:
            await jobs.drop_model(job.name)
            await jobs.files.delete(results.id)
            await asyncio.to_thread(shutil.rmtree, jobs.folder(job), True)
            return
        await asyncio.to_thread(_tidy, run)

    async def fail(self, job: Job, code: str, message: str) -> None:
        """End a job that came to nothing; what it served on the way goes."""

        def change(now: Job) -> Job:
            if now.status is Status.CANCELLED:
                return now
            return msgspec.structs.replace(
                now,
                status=Status.FAILED,
                error=Fault(code, message[:2000]),
                finished_at=int(time.time()),
                estimated_finish=None,
                held=False,
            )

        await self._jobs.forget_checkpoints(job)
        await self._jobs.change(job.id, change, [event(f"The job failed: {message[:2000]}", "error")])
        await asyncio.to_thread(_tidy, self._jobs.run_dir(job))

    async def _judged(self, score: ScoreCommand, job: Job) -> str:
        """What the operator's command says of the result, in words. Raises ScoreFailed where it is not to be served."""
        found, _ = await score.run(job.model, job.name)
        if found < 0:
            raise ScoreFailed(f"the score command gives the tuned model {found:g}, and below 0 it is not served")
        return f"The score command gives it {found:g}"

    async def _hand_on(self, job: Job) -> list[Event]:
        """Make the result the next version of the adapter that the job names, if it names one; what came of it."""
        name, weight = job.settings.get("adapter"), job.settings.get("canary_weight")
        if name is None or (await self._jobs.get(job.id)).status is Status.CANCELLED:
            return []
        service = self._jobs.service
        try:
            if weight is not None:
                service.versions.adapter(name)  # one made anew would have nothing to be compared with
            version, _ = await self._take_in(job, name, result(self._jobs.run_dir(job)), points=weight is None)
            shown = await service.settle(version, False, _READY_S)
            if weight is None:
                when = "points to it" if shown["state"] == READY else "will point to it when replicas have it"
                return [event(f"It is version {version.version} of {name}, which {when}")]
            await service.versions.start_canary(name, version.version, weight, Policy(), job.id)
        except GatewayError as error:
            return [event(f"It was not made a version of {name}: {error.message}", "warn")]
        return [event(f"It is version {version.version} of {name}, as a canary of {weight:g} % of its requests")]

    async def _take_in(self, job: Job, name: str, directory: Path, *, points: bool = True) -> tuple[Version, bool]:
        """points: whether the name is to point to it."""
        service = self._jobs.service
        parts = [Part(file, directory / file) for file in sorted(KEPT) if (directory / file).is_file()]
        with service.storage.staging() as work:
            return await service.take_in(name, parts, work, Cause(job.id, "fine-tuned") if points else None)


def result(run: Path) -> Path:
    """Where a run's result lies once it is whole."""
    return run / "adapter"


def event(message: str, level: str = "info") -> Event:
    """A line of a job's story, of now."""
    return Event(created_at=int(time.time()), message=message, level=level)  # type: ignore[arg-type]  # one of three


def _manifest(run: Path) -> dict[str, Any]:
    return dict(json.loads((result(run) / "manifest.json").read_text()))


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
    rewards = [(figures[name] or {}).get("reward") for name in ("eval", "base_eval")]
    if None not in rewards:  # the loss is its negative
        how = f"mean reward {rewards[0]:.4f}, the base's {rewards[1]:.4f}"
    else:
        how = f"loss {tuned:.4f}, the base's {base:.4f}"
    return (
        f"the tuned model is worse than the base on the validation file: {how}. "
        "Train with a lower learning rate or fewer epochs, or set tunegate.gate.eval_loss to false"
    )


def _tidy(run: Path) -> None:
    """Keep what says how the model came to be, and drop the bulk."""
    for bulk in ("checkpoints", "data", "eval"):
        shutil.rmtree(run / bulk, ignore_errors=True)
