"""Where replicas come from: engines that we start on this machine, or URLs that someone else runs.

The supervisor sees only `Host`; tests give it a scripted one.
"""

from __future__ import annotations

import dataclasses
import secrets
import threading
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import httpx2

from backends import process, registry, upstream
from backends.base import Backend, BackendError, Endpoint, EngineUnreachable
from backends.spec import EngineSpec
from gateway.config import ConfigError

_OTHERS_GRACE_S = 5.0


class WrongModel(BackendError):
    """An attached engine serves something else."""


class Engine(Protocol):
    """A running engine, as far as its supervisor is concerned. `stop` blocks until it is gone."""

    @property
    def endpoint(self) -> Endpoint: ...
    def alive(self) -> bool: ...
    def exit_status(self) -> int | None: ...
    def log_tail(self) -> str: ...
    def stop(self, grace_s: float) -> None: ...


class Host(Protocol):
    """Starts and finds the engine of one replica. Blocking, but for `ready`."""

    def adopt(self) -> Engine | None:
        """The engine that an earlier control process started, if it still runs."""

    def start(self, adapters: Mapping[str, Path]) -> Engine:
        """Start it; `adapters` for engines that take them only then. Raises BackendError."""

    async def ready(self, client: httpx2.AsyncClient) -> Backend | None:
        """The backend that answers there, None while nothing does. Raises WrongModel."""

    def cause(self, log_tail: str) -> str | None:
        """Why a start failed, found in the engine's log; None if unknown."""

    def close(self, grace_s: float) -> None:
        """Stop the engine for good; nothing is started afterwards."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where engines of this gateway run."""

    run_dir: Path
    log_dir: Path
    main_pid: int  # engines end with this process
    stop_grace_s: float


class LocalHost:
    """Engines as guarded processes of this machine."""

    def __init__(
        self,
        replica_id: str,
        backend: Backend,
        spec: EngineSpec,
        executable: tuple[str, ...],
        place: Place,
        env: Mapping[str, str],
    ) -> None:
        """env: added to what the backend sets, e.g. which GPUs are this replica's."""
        self._env = env
        self._id = replica_id
        self._backend = backend
        self._spec = spec
        self._executable = executable
        self._place = place
        # A cancelled start goes on in its thread: closing waits for it, and then ends what it started.
        self._lock = threading.Lock()
        self._closed = False
        self._cold = False  # started by us and not warmed up yet; what is adopted may be busy, and most likely was

    def adopt(self) -> Engine | None:
        with self._lock:
            return process.adopt(self._place.run_dir, self._id)

    def start(self, adapters: Mapping[str, Path]) -> Engine:
        with self._lock:
            if self._closed:
                raise process.EngineStartError(f"{self._id} is not started: the gateway stops")
            self._cold = True
            try:
                return self._start(adapters)
            except OSError as error:  # no memory, descriptors or disk for another process, at this moment
                raise process.EngineStartError(f"cannot start {self._id}: {error}") from error

    def _start(self, adapters: Mapping[str, Path]) -> Engine:
        place = self._place
        endpoint = Endpoint("127.0.0.1", process.free_port(), secrets.token_urlsafe(32))
        launch = self._backend.launch(self._spec, self._executable, endpoint, adapters)
        launch = dataclasses.replace(launch, env={**launch.env, **self._env})
        log = place.log_dir / f"engine-{self._id}.log"
        return process.start(self._id, place.run_dir, log, launch, endpoint, place.main_pid, place.stop_grace_s)

    async def ready(self, client: httpx2.AsyncClient) -> Backend | None:
        if not await self._backend.is_ready(client):
            return None
        if self._cold:
            try:
                await self._backend.warm_up(client, self._spec)
            except EngineUnreachable:
                return None
            self._cold = False
        return self._backend

    def cause(self, log_tail: str) -> str | None:
        return self._backend.start_failure(log_tail)

    def close(self, grace_s: float) -> None:
        with self._lock:
            self._closed = True
            engine = process.adopt(self._place.run_dir, self._id)
            if engine is not None:
                engine.stop(grace_s)


class AttachedHost:
    """An engine that someone else runs: it can be asked, not started or stopped."""

    def __init__(self, url: str, api_key: str, model: str) -> None:
        """model: the name it must serve. Raises ConfigError for what is no URL of an engine."""
        self._engine = _Attached(_endpoint(url, api_key))
        self._model = model

    def adopt(self) -> Engine | None:
        return self._engine

    def start(self, adapters: Mapping[str, Path]) -> Engine:
        return self._engine

    async def ready(self, client: httpx2.AsyncClient) -> Backend | None:
        if await upstream.answers(client, "/v1/models") is None:
            return None
        backend = await registry.recognise(client)
        if not await backend.is_ready(client):
            return None
        names = [card.id for card in await upstream.list_models(client) if not card.parent]
        if self._model not in names:
            raise WrongModel(
                f"the {backend.name} at {client.base_url} serves {', '.join(names)}, not {self._model}; "
                "give --model-name the name that it serves"
            )
        return backend

    def cause(self, log_tail: str) -> str | None:
        return None

    def close(self, grace_s: float) -> None:
        return None


@dataclass(frozen=True, slots=True)
class _Attached:
    endpoint: Endpoint

    def alive(self) -> bool:
        return True

    def exit_status(self) -> int | None:
        return None

    def log_tail(self) -> str:
        return ""

    def stop(self, grace_s: float) -> None:
        return None


def end_others(run_dir: Path, replica_ids: Collection[str]) -> None:
    """End engines of this gateway that are none of these replicas: a change that control did not live to finish."""
    for path in run_dir.glob("replica-*.json"):
        replica_id = path.stem.removeprefix("replica-")
        if replica_id not in replica_ids and (engine := process.adopt(run_dir, replica_id)) is not None:
            engine.stop(_OTHERS_GRACE_S)


def gpu_names(visible: str | None, installed: int) -> list[str]:
    """What CUDA calls this gateway's GPUs, in order. visible: its CUDA_VISIBLE_DEVICES; None: all `installed` ones."""
    if visible is None:
        return [str(number) for number in range(installed)]
    return [name.strip() for name in visible.split(",") if name.strip()]


def shares_of(replicas: int, spec: EngineSpec, visible: str | None, installed: int) -> list[str]:
    """The GPUs of each replica that they hold side by side, as CUDA_VISIBLE_DEVICES has them.

    replicas: how many are to serve. visible: CUDA_VISIBLE_DEVICES as it is for the gateway; its order is kept. None:
    all `installed` ones (0: nobody knows, so there are taken to be enough). Raises ConfigError when there are too few
    for all: an engine would only say that there is no CUDA device.
    """
    count = spec.tensor_parallel * spec.pipeline_parallel
    names = gpu_names(visible, installed or replicas * count)
    shares = [",".join(names[first : first + count]) for first in range(0, len(names) - count + 1, count)]
    if len(shares) < replicas:
        where = "this machine" if visible is None else f"CUDA_VISIBLE_DEVICES={visible}"
        raise ConfigError(
            f"--replicas {replicas} needs {replicas * count} GPUs, {where} has {len(names)}; lower --replicas, --tp "
            "or --pp"
        )
    return shares


def gpus_of(index: int, shares: Sequence[str]) -> dict[str, str]:
    """The environment that gives the replica of this index its share of the GPUs.

    Indices beyond the last share begin at the first again: what takes over from others may run beside them for a while.
    """
    return {"CUDA_VISIBLE_DEVICES": shares[index % len(shares)]}


def _endpoint(url: str, api_key: str) -> Endpoint:
    try:
        parsed = httpx2.URL(url)
    except httpx2.InvalidURL as error:
        raise ConfigError(f"--attach {url}: {error}; give it as http://HOST:PORT") from error
    if parsed.scheme != "http" or not parsed.host or parsed.path not in ("", "/"):
        raise ConfigError(f"--attach {url} is not of the form http://HOST:PORT")
    return Endpoint(parsed.host, parsed.port or 80, api_key)
