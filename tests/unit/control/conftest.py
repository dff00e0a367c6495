"""A core over scripted engines, with timings that make a test take milliseconds."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from backends import registry as backends
from backends.base import Backend, BackendError
from backends.spec import BackendName
from gateway.adapters.package import Part
from gateway.adapters.storage import AdapterStorage
from gateway.config import ServeConfig
from gateway.control.core import Core, Setup
from gateway.control.estate import Estate
from gateway.control.hosting import Host
from gateway.control.publish import Public
from gateway.control.replica import Replica
from gateway.control.running import Running
from gateway.control.score import ScoreCommand
from gateway.control.service import Policy, Service
from gateway.control.store import Store
from gateway.control.timings import Timings
from tests.support.archives import files_of
from tests.support.checkpoints import write_checkpoint
from tests.support.fake_engine import FakeHost, Script
from tests.support.peft_files import TINY, Adapter, write_adapter

FAST = Timings(
    start_s=20.0,
    stop_grace_s=0.1,
    poll_s=0.005,
    health_every_s=0.02,
    health_misses=2,
    steady_s=30.0,
    first_backoff_s=0.01,
    last_backoff_s=0.05,
    patience=3,
    resync_s=0.2,
    retry_s=0.05,
    last_retry_s=0.2,
    verify_s=20.0,
    relays_s=0.2,
    adopt_s=0.2,
    drain_s=0.05,
)


async def until(condition: Callable[[], Any], timeout_s: float = 20.0) -> Any:
    """The first truthy value of `condition`, looked at between other tasks."""
    deadline = asyncio.get_running_loop().time() + timeout_s
    while not (value := condition()):
        assert asyncio.get_running_loop().time() < deadline, f"not true within {timeout_s} s"
        await asyncio.sleep(0.002)
    return value


class World:
    """A core with its hosts and service, running."""

    def __init__(
        self,
        tmp_path: Path,
        backend: BackendName,
        replicas: int,
        capacity: int,
        timings: Timings,
        score: tuple[str, ...] = (),
    ) -> None:
        self.tmp_path = tmp_path
        self._loop = asyncio.get_running_loop()
        self.state = tmp_path / "state"
        self.run_dir = tmp_path / "run"
        self.run_dir.mkdir(exist_ok=True)
        self.base_path = tmp_path / "base"
        if not self.base_path.exists():
            write_checkpoint(self.base_path, TINY)
        self.hosts = [FakeHost(backends.get(backend), Script()) for _ in range(replicas)]
        self.store = Store(f"sqlite:///{tmp_path / 'registry.db'}")
        storage = AdapterStorage(self.state)
        setup = Setup(
            public=Public("base", {}),
            task="generate",
            backend=backends.get(backend),
            capacity=capacity,
            run_dir=self.run_dir,
            hosts=[(f"r{index}", host) for index, host in enumerate(self.hosts)],
            timings=timings,
            score=ScoreCommand(score, "http://gateway", 5.0) if score else None,
        )
        self.core = Core(setup, self.store, storage)
        self.config = ServeConfig(backend=backend, replicas=replicas, start_timeout_s=20, drain_timeout_s=20)
        self.estate = Estate(self.core, self._make, Running.of(self.config), None, lambda _: self.shares)
        self.shares = 1  # of the devices, as many replicas fit side by side
        self.refused: BackendError | None = None  # the next replicas cannot be made, for this
        self.next_script = Script()  # of the replicas that are started later
        policy = Policy("base", self.base_path, slots=4, max_rank=16, max_upload_bytes=1_000_000)
        self.service = Service(self.core, storage, policy, created=1)

    def _make(self, config: ServeConfig, indices: Sequence[int]) -> tuple[Backend, list[tuple[str, Host]]]:
        if self.refused is not None:
            raise self.refused
        backend = backends.get(config.backend)
        made = [FakeHost(backend, self.next_script, self._loop) for _ in indices]
        self.hosts += made
        return backend, [(f"r{index}", host) for index, host in zip(indices, made, strict=True)]

    @property
    def replicas(self) -> list[Replica]:
        return self.core.replicas

    @property
    def script(self) -> Script:
        """Of the first replica's engines."""
        return self.hosts[0].script

    async def ready(self) -> None:
        """Until every replica answers and relays would know it."""
        await until(lambda: all(replica.answers for replica in self.replicas))
        await self.core.published()

    def files(self, seed: int = 0, **config: Any) -> list[tuple[str, bytes]]:
        """An adapter's files; another seed makes other contents."""
        folder = self.tmp_path / f"adapter-{seed}"
        return files_of(write_adapter(folder, TINY, Adapter(seed=seed, config=config)))

    async def upload(self, name: str, seed: int = 0, wait_s: float = 20.0) -> tuple[dict[str, Any], bool]:
        with self.service.storage.staging() as work:
            parts = []
            for file, contents in self.files(seed):
                (work / file).write_bytes(contents)
                parts.append(Part(file, work / file))
            version, new = await self.service.take_in(name, parts, work)
        return await self.service.settle(version, new, wait_s), new

    def content_id(self, name: str) -> str:
        return self.core.registry.adapters[name].newest.content_id

    def model(self, name: str) -> Any:
        """A name as relays see it."""
        assert self.core.publisher.current is not None
        return self.core.publisher.current.models[name]


Start = Callable[..., "contextlib.AbstractAsyncContextManager[World]"]


@contextlib.asynccontextmanager
async def running(world: World, wait: bool = True) -> AsyncIterator[World]:
    """The world's core at work."""
    await world.core.open()
    task = asyncio.create_task(world.core.run())
    try:
        if wait:
            await world.ready()
        yield world
    finally:
        ended = task.done()
        task.cancel()
        await asyncio.wait([task])
        await world.core.stop_engines()
        for host in world.hosts:
            for engine in host.engines:
                engine.die()
                await engine.gone()
        world.store.close()
        if ended:
            task.result()


@pytest.fixture
def start(tmp_path: Path) -> Start:
    """`async with start(backend="vllm", replicas=1) as world`; again in one test: a restart of control."""

    @contextlib.asynccontextmanager
    async def start(
        backend: BackendName = "vllm",
        replicas: int = 1,
        capacity: int = 8,
        wait: bool = True,
        script: Callable[[World], None] = lambda _: None,
        score: tuple[str, ...] = (),
        **timings: Any,
    ) -> AsyncIterator[World]:
        world = World(tmp_path, backend, replicas, capacity, dataclasses.replace(FAST, **timings), score)
        script(world)
        async with running(world, wait):
            yield world

    return start
