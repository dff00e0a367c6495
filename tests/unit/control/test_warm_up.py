"""A started SGLang on CUDA samples once before it is called ready; an adopted one has done so."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx2
import pytest

from backends import envs, registry, upstream
from backends.base import Backend
from backends.spec import BackendName, Device, EngineSpec
from gateway.control.hosting import LocalHost, Place
from tests.support.checkpoints import write_checkpoint
from tests.support.peft_files import TINY
from tests.unit.control.conftest import until

Make = Callable[[BackendName, Device], LocalHost]


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Make]:
    """Hosts of one replica, as one control process after another has them; its engine is ended."""
    model = write_checkpoint(tmp_path / "tiny", TINY)
    place = Place(tmp_path / "run", tmp_path / "logs", os.getpid(), 1.0)
    place.run_dir.mkdir()
    made = []

    def host(engine: BackendName, device: Device) -> LocalHost:
        env = envs.find(engine, envs.EMULATOR, device)
        spec = EngineSpec(backend=engine, version=env.version, model_path=model, served_name="tiny", device=device)
        made.append(LocalHost("r0", registry.get(engine), spec, envs.executable(env), place, {}))
        return made[-1]

    yield host
    for one in made:
        one.close(1.0)


async def sampled(http: httpx2.AsyncClient) -> list[int]:
    """`top_k` of the completions that the engine saw."""
    sights = (await upstream.get(http, "/emulator/seen")).json()
    return [sight["body"]["top_k"] for sight in sights if sight["path"] == "/v1/completions"]


@pytest.mark.parametrize(
    ("engine", "device", "asked"), [("sglang", "cuda", [2]), ("sglang", "cpu", []), ("vllm", "cuda", [])]
)
async def test_warm_up(make: Make, engine: BackendName, device: Device, asked: list[int]) -> None:
    host = make(engine, device)
    running = host.start({})
    answered: list[Backend | None] = []
    async with upstream.connect(running.endpoint) as http:

        async def ready() -> bool:
            answered.append(await host.ready(http))
            return answered[-1] is not None

        while not await ready():
            assert running.alive()
            await asyncio.sleep(0.02)
        assert await sampled(http) == asked
        assert await ready()
        adopting = make(engine, device)
        assert adopting.adopt() is not None
        assert await adopting.ready(http) is not None
        assert await sampled(http) == asked
    running.stop(1.0)


async def test_an_engine_that_dies_of_it_is_not_ready(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    host = make("sglang", "cuda")
    monkeypatch.setenv("TUNEGATE_EMULATOR", '{"faults": [{"kind": "die"}]}')
    running = host.start({})
    async with upstream.connect(running.endpoint) as http:
        while running.alive():
            assert await host.ready(http) is None
        await until(lambda: running.exit_status() is not None)
