"""From the configuration to a core, its service and its web application."""

from __future__ import annotations

import functools
import os
import shlex
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fastapi import FastAPI

from backends import envs, registry
from backends.base import Backend
from backends.spec import EngineSpec
from gateway import models
from gateway.acceptance import check_checkpoint
from gateway.adapters.shapes import is_quantized
from gateway.adapters.storage import AdapterStorage
from gateway.config import DEMO_MODEL, ConfigError, ServeConfig
from gateway.control import app
from gateway.control.core import Core, Setup
from gateway.control.estate import Estate
from gateway.control.gate import Gate, precision
from gateway.control.hosting import AttachedHost, Host, LocalHost, Place, gpu_names, gpus_of, shares_of
from gateway.control.publish import Public
from gateway.control.registry import SPARE
from gateway.control.replica import OPERATOR
from gateway.control.running import Notebook, Running
from gateway.control.score import ScoreCommand
from gateway.control.service import Policy, Service
from gateway.control.store import Store
from gateway.control.timings import Timings
from gateway.preflight import engine_spec
from gateway.tuning.desk import Desk, Training
from gateway.tuning.pressure import Rule
from gateway.tuning.trainer import Place as TrainerPlace
from gateway.tuning.trainer import Trainer

_STOP_GRACE_S = 10.0
_PAUSE_WAIT_MS = 2000  # on a device that jobs share with serving


@dataclass(frozen=True, slots=True)
class Control:
    """What runs in the control process."""

    core: Core
    app: FastAPI
    store: Store
    desk: Desk


def build(running: Running, run_dir: Path, main_pid: int, notebook: Notebook | None = None) -> Control:
    """Put control together; nothing runs yet. notebook: where changes are noted for the next control process.

    Raises ConfigError, BackendError.
    """
    config = running.config
    state = config.state_dir
    storage = AdapterStorage(state)
    store = Store(config.database_url or f"sqlite:///{state / 'registry.db'}")
    capacity = config.max_adapters + SPARE
    spec = None if config.attach else _spec(config)
    base_path = spec.model_path if spec else _attached_checkpoint(config)
    place = Place(run_dir, state / "logs", main_pid, _STOP_GRACE_S)
    setup = Setup(
        public=Public(config.public_name, {}, config.task),
        task=config.task,
        backend=registry.get(config.backend) if spec else None,
        capacity=capacity,
        run_dir=run_dir,
        hosts=_local_hosts(running.indices, config, spec, place) if spec else _attached_hosts(config),
        timings=Timings(
            start_s=float(config.start_timeout_s), stop_grace_s=_STOP_GRACE_S, drain_s=float(config.drain_timeout_s)
        ),
        api_keys=config.api_key,
        gate=_gate(config, spec, base_path),
        score=_score(config, "--canary-score", config.canary_score, config.canary_score_timeout_s),
        gauge=config.routing == "engine-load",
    )
    core = Core(setup, store, storage)
    for replica in core.replicas:
        if replica.index in running.drained:
            replica.drain(OPERATOR)
    policy = Policy(
        base=config.public_name,
        base_path=base_path,
        slots=config.adapter_slots,
        max_rank=config.max_adapter_rank,
        max_upload_bytes=config.max_adapter_mb * 1_000_000,
    )
    service = Service(core, storage, policy, _created(base_path))
    estate = Estate(core, None if config.attach else functools.partial(_make, place), running, notebook, _shares)
    trainers = TrainerPlace(state / "jobs" / "processes", state / "logs", main_pid)
    desk = Desk(service, store, config, _training(config, spec, trainers), _own_url(config))
    web = app.create(service, _adapter_roots(config), estate, desk.routes(config.max_file_mb * 1_000_000))
    return Control(core, web, store, desk)


def _spec(config: ServeConfig) -> EngineSpec:
    return engine_spec(config).model_copy(update={"max_adapters": config.max_adapters + SPARE})


def _make(place: Place, config: ServeConfig, indices: Sequence[int]) -> tuple[Backend, list[tuple[str, Host]]]:
    """Hosts for more replicas. Raises ConfigError, BackendError."""
    spec = _spec(config)
    backend = registry.get(spec.backend)
    backend.check(spec)
    check_checkpoint(spec)
    return backend, _local_hosts(indices, config, spec, place)


def _local_hosts(indices: Sequence[int], config: ServeConfig, spec: EngineSpec, place: Place) -> list[tuple[str, Host]]:
    """Hosts of these replica numbers. Raises ConfigError, BackendError."""
    backend = registry.get(spec.backend)
    executable = envs.executable(envs.find(spec.backend, spec.version, spec.device))
    alone = config.replicas == 1 and max(indices, default=0) == 0
    shares = [] if alone else _gpu_shares(config, spec)
    hosts: list[tuple[str, Host]] = []
    for index in indices:
        env = gpus_of(index, shares) if shares else {}
        hosts.append((f"r{index}", LocalHost(f"r{index}", backend, spec, executable, place, env)))
    return hosts


def _gpu_shares(config: ServeConfig, spec: EngineSpec) -> list[str]:
    """What replicas divide among them; empty where they use no GPUs. Raises ConfigError."""
    if spec.device != "cuda" or spec.version == envs.EMULATOR:
        return []
    return shares_of(config.replicas, spec, _engine_gpus(config, spec), envs.gpu_count())


def _shares(config: ServeConfig) -> int:
    """For the estate. Raises ConfigError, BackendError."""
    return len(_gpu_shares(config, _spec(config))) or 1


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


def _gate(config: ServeConfig, spec: EngineSpec | None, base_path: Path | None) -> Gate:
    """By how much replicas may differ from an adapter's golden prompts. Emulated engines compute no model."""
    if spec is not None and spec.version == envs.EMULATOR:
        return Gate(None, config.golden_tolerance)
    quantized = config.quantization is not None or (base_path is not None and is_quantized(base_path))
    return Gate(precision(config.dtype, quantized), config.golden_tolerance)


def _score(config: ServeConfig, flag: str, command: str | None, limit_s: int) -> ScoreCommand | None:
    """A judge of the operator's: from the configuration, never from the API, since it runs a program."""
    if command is None:
        return None
    try:
        argv = tuple(shlex.split(command))
    except ValueError as error:
        raise ConfigError(f"{flag} {command!r} is no command line: {error}") from error
    if not argv:
        raise ConfigError(f"{flag} is empty; give a command, or leave it out")
    return ScoreCommand(argv, _own_url(config), float(limit_s))


def _training(config: ServeConfig, spec: EngineSpec | None, place: TrainerPlace) -> Training:
    """How jobs are trained. Engines that others started may be anywhere: nothing is known to be shared with them."""
    device, _, own = config.train_device.partition(":")
    on = envs.default_device() if device == "auto" else device
    wait_ms = config.train_pause_wait_ms
    if wait_ms is None:
        wait_ms = _PAUSE_WAIT_MS if spec is not None and on == spec.device and not own else 0
    return Training(
        Trainer(config.trainer_python, device, place, _own_gpu(config, spec)),
        Rule(wait_ms / 1e3) if wait_ms else None,
        _score(config, "--train-score", config.train_score, config.canary_score_timeout_s),
    )


def _own_gpu(config: ServeConfig, spec: EngineSpec | None) -> str | None:
    """What CUDA calls the GPU that jobs have to themselves; None where they have none. Raises ConfigError."""
    _, _, own = config.train_device.partition(":")
    if not own:
        return None
    if spec is not None and spec.device == "cuda":
        used = config.replicas * spec.tensor_parallel * spec.pipeline_parallel
        if int(own) < used:
            raise ConfigError(f"--train-device {config.train_device}: replicas use the first {used} GPUs; give another")
    names = gpu_names(os.environ.get("CUDA_VISIBLE_DEVICES"), envs.gpu_count() or int(own) + 1)
    if int(own) >= len(names):
        raise ConfigError(f"--train-device {config.train_device}: there are {len(names)} GPUs, counted from 0")
    return names[int(own)]


def _engine_gpus(config: ServeConfig, spec: EngineSpec) -> str | None:
    """CUDA_VISIBLE_DEVICES for engines to share: without the GPU of jobs. Raises ConfigError."""
    visible, own = os.environ.get("CUDA_VISIBLE_DEVICES"), _own_gpu(config, spec)
    names = gpu_names(visible, envs.gpu_count())
    return ",".join(name for name in names if name != own) if own in names else visible


def _own_url(config: ServeConfig) -> str:
    """Where this gateway can be called from this machine."""
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(config.host, config.host)  # noqa: S104 - not bound here
    scheme = "https" if config.tls_cert else "http"
    return f"{scheme}://{f'[{host}]' if ':' in host else host}:{config.port}"


def _adapter_roots(config: ServeConfig) -> Sequence[Path]:
    if config.adapter_root:
        return [Path(root) for root in config.adapter_root]
    default = config.state_dir / "import"
    default.mkdir(mode=0o700, parents=True, exist_ok=True)
    return [default]


def _created(base_path: Path | None) -> int:
    return int((base_path / "config.json").stat().st_mtime if base_path else time.time())
