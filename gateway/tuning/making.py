"""A job from the body that asks for it: everything that can be checked is checked before it is queued."""

from __future__ import annotations

import asyncio
import functools
import json
import os
import secrets
import time
from pathlib import Path
from typing import Any

import yaml

from gateway.adapters.names import check_name
from gateway.adapters.storage import full_disk_is_an_error
from gateway.control.service import Service
from gateway.control.versions import HIGHEST_WEIGHT, LOWEST_WEIGHT
from gateway.errors import Forbidden, InvalidRequest, ModelNotFound
from gateway.scopes import ADAPTERS, SCOPES
from gateway.tuning import request
from gateway.tuning.files import Files
from gateway.tuning.records import Event, File, Job, Status
from gateway.tuning.request import CreateJob
from gateway.tuning.trainer import Trainer

_PURPOSES = ("fine-tune", "user_data")


class Maker:
    """Checks what is asked for, and writes down what the trainer is told."""

    def __init__(self, service: Service, files: Files, trainer: Trainer) -> None:
        self._service = service
        self._files = files
        self._trainer = trainer
        self._checking = asyncio.Semaphore(1)  # a large file takes a while, and a thread

    async def make(self, asked: CreateJob, key_id: str, job_id: str, folder: Path) -> tuple[Job, list[Event]]:
        """The job and the beginning of its story; its data and configuration lie in `folder`. Raises GatewayErrors."""
        base_path = self._check(asked, key_id)
        training = await self._usable(asked.training_file, "training_file")
        validation = await self._usable(asked.validation_file, "validation_file") if asked.validation_file else None
        await asyncio.to_thread(self._trainer.prove)
        method = request.method_of(asked)
        grader = asked.method.reinforcement.grader if asked.method and asked.method.reinforcement else None
        kept = {"dataset": training} | ({"eval_dataset": validation} if validation else {})
        paths = await asyncio.to_thread(self._keep, folder, kept, grader)
        judge = folder / "grader.json" if grader is not None else None
        trained_by = request.TRAINER_METHODS[method]
        examples = await self._count(paths["dataset"], training, trained_by, judge, "training_file")
        if validation:
            await self._count(paths["eval_dataset"], validation, trained_by, judge, "validation_file")
        values = request.hyperparameters(asked, examples)
        config = request.trainer_config(asked, values, examples)
        policy = self._service.policy
        job = Job(
            id=job_id,
            created_at=int(time.time()),
            status=Status.QUEUED,
            model=asked.model,
            training_file=training.id,
            validation_file=validation.id if validation else None,
            method=method,
            hyperparameters=values,
            settings=asked.tunegate.model_dump(exclude_unset=True),
            seed=asked.seed if asked.seed is not None else secrets.randbelow(2**31),
            name=request.model_name(policy.base, asked.suffix, job_id),
            config=config,
            gate_eval_loss=asked.tunegate.gate.eval_loss,
            grader=grader,
            key_id=key_id,
            metadata=asked.metadata,
        )
        whole = config | {
            "model": str(base_path.absolute()),
            "device": self._trainer.device,
            "seed": job.seed,
            "output_dir": str(folder / "run"),
            **{name: [str(path)] for name, path in paths.items()},
        }
        if judge is not None:
            whole |= {"publish_as": job_id, "reward": [str(judge)]}
        await asyncio.to_thread((folder / "job.yaml").write_text, yaml.safe_dump(whole, sort_keys=False))
        told = (
            f"Created fine-tuning job: {job.id}",
            f"Validated {training.filename}: {examples} examples",
            "Files validated, job is queued",
        )
        return job, [Event(created_at=job.created_at, message=message) for message in told]

    def _check(self, asked: CreateJob, key_id: str) -> Path:
        """Refuse what would be refused whatever the files hold; where the base lies. Raises GatewayErrors."""
        policy, settings = self._service.policy, asked.tunegate
        self._check_model(asked.model)
        self._service.check_engines()
        if policy.base_path is None:
            raise InvalidRequest(
                "the base's checkpoint is not known here; restart with --model DIR, the checkpoint that the attached "
                "engine serves",
                param="model",
                code="unknown_base",
            )
        if settings.lora_rank > policy.max_rank:
            raise InvalidRequest(
                f"tunegate.lora_rank is {settings.lora_rank}; this gateway serves up to {policy.max_rank} "
                "(--max-adapter-rank)",
                param="tunegate.lora_rank",
            )
        if settings.adapter is not None:
            self._check_adapter(settings.adapter, settings.canary_weight, key_id)
        if request.method_of(asked) == "reinforcement" and self._service.core.registry.at_start:
            raise InvalidRequest(
                "reinforcement serves each step's adapter, and this engine would start again for each; serve with vllm",
                param="method.type",
            )
        return policy.base_path

    def _check_model(self, model: str) -> None:
        base = self._service.policy.base
        if model == base:
            return
        if any(known["id"] == model for known in self._service.models()):
            raise InvalidRequest(
                f"{model!r} is tuned already; training goes out from the base model, {base!r}", param="model"
            )
        raise ModelNotFound(f"The model `{model[:200]}` does not exist; {base!r} can be tuned", param="model")

    def _check_adapter(self, name: str, canary_weight: float | None, key_id: str) -> None:
        """Whether the job's result may become that adapter's next version. Raises InvalidRequest, Forbidden."""
        service = self._service
        if not service.core.keys.opens(key_id, ADAPTERS):
            raise Forbidden(
                f"The API key {key_id} lacks the scope `{ADAPTERS}` ({SCOPES[ADAPTERS]}); tunegate.adapter needs it.",
                param="tunegate.adapter",
            )
        check_name(name, frozenset({service.policy.base}))
        service.versions.check_new_name(name)
        if canary_weight is None:
            return
        if not LOWEST_WEIGHT <= canary_weight <= HIGHEST_WEIGHT:
            raise InvalidRequest(
                f"tunegate.canary_weight is {canary_weight:g}; give {LOWEST_WEIGHT:g} to {HIGHEST_WEIGHT:g} percent",
                param="tunegate.canary_weight",
            )
        known = service.core.registry.adapters.get(name)
        if known is None or known.current is None:
            raise InvalidRequest(
                f"there is no adapter {name!r} that serves, and a canary is compared with one; leave canary_weight out",
                param="tunegate.adapter",
            )

    async def _usable(self, id: str, param: str) -> File:
        file = await self._files.get(id, param)
        if file.purpose not in _PURPOSES:
            raise InvalidRequest(
                f"{param} {id!r} was uploaded for {file.purpose!r}; upload it with purpose='fine-tune'", param=param
            )
        return file

    def _keep(self, folder: Path, files: dict[str, File], grader: dict[str, Any] | None) -> dict[str, Path]:
        """The job's own names for its files, so that it keeps them when they are deleted."""
        paths = {}
        with full_disk_is_an_error():
            folder.mkdir(mode=0o700, parents=True)
            for name, file in files.items():
                paths[name] = folder / (f"{name}.jsonl.gz" if file.filename.endswith(".gz") else f"{name}.jsonl")
                os.link(self._files.path(file.id), paths[name])
            if grader is not None:
                (folder / "grader.json").write_text(json.dumps(grader))
        return paths

    async def _count(self, path: Path, file: File, method: str, grader: Path | None, param: str) -> int:
        check = functools.partial(self._trainer.check_data, path, file.filename, method, param, grader)
        async with self._checking:
            return await asyncio.to_thread(check)
