"""From the configuration to a core, its service and its web application."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fastapi import FastAPI

from backends import envs, registry
from backends.spec import EngineSpec
from gateway import models
from gateway.adapters.storage import AdapterStorage
from gateway.config import DEMO_MODEL, ServeConfig
from gateway.control import app
from gateway.control.core import Core, Setup
from gateway.control.hosting import AttachedHost, Host, LocalHost, Place, gpus_of
from gateway.control.publish import Public, key_digests
from gateway.control.registry import SPARE
from gateway.control.service import Policy, Service
from gateway.control.store import Store
from gateway.control.timings import Timings
from gateway.preflight import engine_spec

_STOP_GRACE_S = 10.0


@dataclass(frozen=True, slots=True)
class Control:
    """What runs in the control process."""

    core: Core
    app: FastAPI
    store: Store


def build(config: ServeConfig, run_dir: Path, main_pid: int) -> Control:
    """Put control together; nothing runs yet. Raises ConfigError, BackendError."""
    state = config.state_dir
    storage = AdapterStorage(state)
    store = Store(config.database_url or f"sqlite:///{state / 'registry.db'}")
    capacity = config.max_adapters + SPARE
    spec = None if config.attach else engine_spec(config).model_copy(update={"max_adapters": capacity})
    place = Place(run_dir, state / "logs", main_pid, _STOP_GRACE_S)
    setup = Setup(
        public=Public(config.public_name, key_digests(config.api_key), config.task),
        task=config.task,
        backend=registry.get(config.backend) if spec else None,
        capacity=capacity,
        run_dir=run_dir,
        hosts=_local_hosts(config.replicas, spec, place) if spec else _attached_hosts(config),
        timings=Timings(
            start_s=float(config.start_timeout_s), stop_grace_s=_STOP_GRACE_S, drain_s=float(config.drain_timeout_s)
        ),
    )
    core = Core(setup, store, storage)
    base_path = spec.model_path if spec else _attached_checkpoint(config)
    policy = Policy(
        base=config.public_name,
        base_path=base_path,
        slots=config.adapter_slots,
        max_rank=config.max_adapter_rank,
        max_upload_bytes=config.max_adapter_mb * 1_000_000,
    )
    service = Service(core, storage, policy, _created(base_path))
    return Control(core, app.create(service, _adapter_roots(config)), store)


def _local_hosts(count: int, spec: EngineSpec, place: Place) -> list[tuple[str, Host]]:
    backend = registry.get(spec.backend)
    executable = envs.executable(envs.find(spec.backend, spec.version, spec.device))
    share = spec.device == "cuda" and spec.version != envs.EMULATOR and count > 1
    hosts: list[tuple[str, Host]] = []
    for index in range(count):
        env = gpus_of(index, spec, os.environ.get("CUDA_VISIBLE_DEVICES")) if share else {}
        hosts.append((f"r{index}", LocalHost(f"r{index}", backend, spec, executable, place, env)))
    return hosts


def _attached_hosts(config: ServeConfig) -> list[tuple[str, Host]]:
    return [
        (f"r{index}", AttachedHost(url, config.attach_key, config.public_name))
        for index, url in enumerate(config.attach)
    ]


def _attached_checkpoint(config: ServeConfig) -> Path | None:
    """Where the attached engines' checkpoint lies here too, if --model says so; adapters are checked against it."""
    if config.model == DEMO_MODEL and config.model_name not in (None, DEMO_MODEL):
        return None  # --model was not given
    try:
        return models.resolve(config.model)
    except models.ModelError:
        return None


def _adapter_roots(config: ServeConfig) -> Sequence[Path]:
    if config.adapter_root:
        return [Path(root) for root in config.adapter_root]
    default = config.state_dir / "import"
    default.mkdir(mode=0o700, parents=True, exist_ok=True)
    return [default]


def _created(base_path: Path | None) -> int:
    return int((base_path / "config.json").stat().st_mtime if base_path else time.time())
