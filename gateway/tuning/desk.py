"""Files, jobs and batches of one gateway, put together."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass

from fastapi import APIRouter

from gateway.api import batches as batches_api
from gateway.api import files as files_api
from gateway.api import fine_tuning
from gateway.config import ServeConfig
from gateway.control.score import ScoreCommand
from gateway.control.service import Service
from gateway.control.store import Store
from gateway.tuning.batch_runner import BatchRunner
from gateway.tuning.batches import Batches
from gateway.tuning.files import Files
from gateway.tuning.jobs import Jobs
from gateway.tuning.pressure import Queues, Rule
from gateway.tuning.results import Results
from gateway.tuning.runner import Runner
from gateway.tuning.store import Objects
from gateway.tuning.trainer import Trainer


@dataclass(frozen=True, slots=True)
class Training:
    """How jobs are trained here."""

    trainer: Trainer
    rule: Rule | None  # when they yield to serving; None: never
    score: ScoreCommand | None  # asked before a result is served


class Desk:
    """Opened and run beside the core."""

    def __init__(self, service: Service, store: Store, config: ServeConfig, training: Training, url: str) -> None:
        """url: of the gateway itself."""
        objects = Objects(store)
        self.files = Files(objects, config.state_dir / "files", int(config.max_files_gb * 1e9))
        self.jobs = Jobs(service, objects, self.files, training.trainer, config.state_dir / "jobs", url)
        self.batches = Batches(objects, self.files, config.state_dir / "batches")
        batch_runner = BatchRunner(self.batches, service.core, url)
        queues = Queues(service.core, lambda: batch_runner.in_flight)
        self._runner = Runner(self.jobs, Results(self.jobs, training.score), queues, training.rule)
        self._runners = (self._runner, batch_runner)

    def routes(self, file_limit_bytes: int) -> Sequence[APIRouter]:
        """What control's application has of them."""
        return (
            files_api.routes(self.files, self.jobs.service.storage, file_limit_bytes),
            fine_tuning.routes(self.jobs),
            batches_api.routes(self.batches),
        )

    async def open(self) -> None:
        """Clear the directories of what a crash left. The store's schema must be up to date."""
        await self.files.open()
        await self.batches.open()
        await self._runner.open()

    async def run(self) -> None:
        """Work until cancelled."""
        async with asyncio.TaskGroup() as tasks:
            for runner in self._runners:
                tasks.create_task(runner.run())
