"""Whatever order uploads, requests, crashes, restarts, lies, hangs and deletes come in: adapters converge, and what
relays are told can be called is whole. Control's own code over engines in memory, in virtual time.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import types
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import httpx2
import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from sqlalchemy import create_engine, event
from sqlalchemy.pool import StaticPool

from backends import registry as backends
from backends.base import Endpoint
from gateway.adapters.intake import Accepted
from gateway.adapters.storage import AdapterStorage, Stored
from gateway.control import core as core_module
from gateway.control import reconcile, residents, store
from gateway.control.core import Core, Setup
from gateway.control.publish import Public
from gateway.control.replica import AdapterState, Replica, State
from gateway.control.residency import Rules
from gateway.control.store import Store
from gateway.control.timings import Timings
from gateway.observe.cells import ADAPTER_ROW
from gateway.snapshot import Wanted
from tests.support.virtual_time import VirtualLoop

REPLICAS, CAPACITY = 2, 3  # two places and the spare one
NAMES = [f"m{number}" for number in range(5)]
LASTING = ("forgets", "half", "keeps", "hangs_loading", "hangs_unloading", "busy", "rejects")


class Engine:
    """One life of an engine, with vLLM's surface."""

    def __init__(self, faults: set[str], in_use: Callable[[str], bool]) -> None:
        self.faults = faults
        self.alive = True
        self.loaded: set[str] = set()
        self.whole: set[str] = set()  # of these, those that answered a request since they were loaded
        self._in_use = in_use

    async def request(self, method: str, path: str, *, json: dict[str, Any] | None, timeout: float) -> httpx2.Response:
        """As httpx2.AsyncClient has it."""
        await asyncio.sleep(0.01)
        if not self.alive:
            raise httpx2.ConnectError("refused")
        status, body = await self._answer(path, json or {}, timeout)
        if not self.alive:
            raise httpx2.ReadError("closed")
        return httpx2.Response(status, json=body)

    base_url = "http://engine/"

    async def _answer(self, path: str, body: dict[str, Any], timeout: float) -> tuple[int, Any]:
        if path == "/v1/models":
            cards = [{"id": "base"}, *({"id": name, "parent": "base"} for name in sorted(self.loaded))]
            return 200, {"data": cards}
        name = body.get("lora_name") or body["model"]
        if path == "/v1/load_lora_adapter":
            await self._hang("hangs_loading", timeout)
            if "rejects" in self.faults:
                return 500, {"error": {"message": "no memory"}}
            if "forgets" not in self.faults:
                self.loaded.add(name)
            return 200, "Success"
        if path == "/v1/unload_lora_adapter":
            assert not self._in_use(name), f"{name} was unloaded under a request"
            await self._hang("hangs_unloading", timeout)
            if "keeps" not in self.faults:
                self.loaded.discard(name)
                self.whole.discard(name)
            return 200, "Success"
        if "busy" in self.faults:
            return 503, {"error": {"message": "queue is full"}}
        if "half" in self.faults or name not in self.loaded:
            return 500, {"error": {"message": "size mismatch"}}
        self.whole.add(name)
        return 200, {"choices": [{"text": "x"}]}

    async def _hang(self, fault: str, timeout: float) -> None:
        if fault in self.faults:
            await asyncio.sleep(timeout)
            raise httpx2.ReadTimeout("silence")


class Cells:
    """The relays' cells."""

    def __init__(self) -> None:
        self.values: Counter[int] = Counter()
        self.replicas: Counter[int] = Counter()

    def replica(self, index: int) -> int:
        return self.replicas[index]

    def adapter(self, cell: int) -> int:
        return self.values[cell]

    def adapters(self, end: int) -> list[int]:
        return [self.values[cell] for cell in range(ADAPTER_ROW, end)]


class Storage:
    """Contents, without a disk."""

    def __init__(self) -> None:
        self.contents: set[str] = set()

    def sweep(self, known: frozenset[str]) -> tuple[str, ...]:
        orphans, self.contents = self.contents - known, self.contents & known
        return tuple(orphans)

    def stored(self) -> frozenset[str]:
        return frozenset(self.contents)

    def path_of(self, content_id: str) -> Path:
        return Path("/adapters", content_id)

    def remove(self, content_id: str) -> None:
        self.contents.discard(content_id)


def make_store() -> Store:
    """A registry in memory, its tables made without migrations."""
    made = Store("sqlite://")
    made.close()
    made._engine = create_engine("sqlite://", poolclass=StaticPool, connect_args={"check_same_thread": False})
    event.listen(made._engine, "connect", store._configure_sqlite)
    store._Base.metadata.create_all(made._engine)
    return made


def there(replica: Replica) -> set[str]:
    """What control takes to be on a replica; a refusal stays readable, and is not."""
    return {name for name, status in replica.adapters.items() if status.state is not AdapterState.FAILED}


async def inline(function: Callable[..., Any], *arguments: Any) -> Any:
    """asyncio.to_thread, in the loop's own thread."""
    return function(*arguments)


async def _end(tasks: set[asyncio.Task[Any]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


class Adapters(RuleBasedStateMachine):
    """The machine that hypothesis drives."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = pytest.MonkeyPatch()
        self.loop = VirtualLoop()
        clock = types.SimpleNamespace(monotonic=self.loop.time)
        for module in (reconcile, residents):
            self.patch.setattr(module, "time", clock)
        self.cells = Cells()  # of relays that outlive control
        self.patch.setattr(core_module, "InFlight", lambda _: self.cells)
        self.patch.setattr(asyncio, "to_thread", inline)
        self.store = make_store()
        self.storage = Storage()
        self.faults: list[set[str]] = [set() for _ in range(REPLICAS)]
        self.engines: list[Engine] = []
        self.waiting: set[str] = set()
        self.requests: list[tuple[int, str, int]] = []  # replica, content id, cell

    # What runs

    @initialize()
    def start(self) -> None:
        self.engines = [self._engine(index) for index in range(REPLICAS)]
        self._start_control()

    def _engine(self, index: int) -> Engine:
        in_use = lambda name: any(r == index and c == name for r, c, _ in self.requests)  # noqa: E731
        return Engine(self.faults[index], in_use)

    def _start_control(self) -> None:
        timings = Timings(poll_s=0.1, resync_s=10.0, retry_s=5.0, last_retry_s=20.0, relays_s=1.0)
        setup = Setup(
            Public("base", {}), "generate", backends.get("vllm"), CAPACITY, Path("/run"), [], timings,
            rules=Rules(stay_s=0.5, unasked_s=0.5, patience_s=0.5, turn_s=2.0),
        )  # fmt: skip
        self.core = Core(setup, self.store, cast(AdapterStorage, self.storage))
        self.patch.setattr(self.store, "migrate", lambda: None)
        for index in range(REPLICAS):
            replica = Replica(f"r{index}", index, self.core._changed)
            replica.backend = backends.get("vllm")
            self.core.replicas.append(replica)
        self.tasks: list[asyncio.Task[None]] = []
        self.keepers: dict[int, asyncio.Task[None]] = {}

        async def begin() -> None:
            await self.core.registry.open()
            for index in range(REPLICAS):
                self._serve(index)
            runs = (self.core._refresh_on_change(), self.core.residents.run(), self.core._collect_garbage())
            self.tasks = [asyncio.ensure_future(run) for run in (*runs, self._supervise(), self._relay())]

        self.loop.run_until_complete(begin())
        self._run(0.5)

    def _stop_control(self) -> None:
        running = [*self.tasks, *self.keepers.values()]
        for task in running:
            task.cancel()
        self.loop.run_until_complete(asyncio.gather(*running, return_exceptions=True))
        for task in running:
            if not task.cancelled() and task.exception() is not None:
                raise cast(BaseException, task.exception())

    def _serve(self, index: int) -> None:
        replica = self.core.replicas[index]
        replica.connect(Endpoint("127.0.0.1", 1 + index, ""), cast(httpx2.AsyncClient, self.engines[index]))
        replica.become(State.READY)
        self.keepers[index] = self.loop.create_task(self.core._reconciler.keep(replica))

    async def _supervise(self) -> None:
        """Start again what died, or is to be started again."""
        while True:
            await asyncio.sleep(0.1)
            for index, replica in enumerate(self.core.replicas):
                if replica.state is State.UNHEALTHY:
                    self.engines[index] = self._engine(index)
                    replica.restarts += 1
                    self._serve(index)
                elif not self.engines[index].alive or replica.restart_wanted is not None:
                    self._end(index)
                elif self.keepers[index].done():
                    self.keepers[index].result()

    def _end(self, index: int) -> None:
        self.engines[index].alive = False
        self.core.replicas[index].become(State.UNHEALTHY, "it ended")
        self.keepers[index].cancel()
        for request in [request for request in self.requests if request[0] == index]:
            self._finish(request)  # its engine is gone: the relay counts it out

    async def _relay(self) -> None:
        """Ask every second for what requests wait for, as relays do."""
        while True:
            for name in sorted(self.waiting):
                if self._callable(name):
                    self.waiting.discard(name)
                elif self.core.residents.want(Wanted(0, name)) is not None:
                    self.waiting.discard(name)  # told that it is of no use
            await asyncio.sleep(1.0)

    def _callable(self, name: str) -> bool:
        picture = self.core.publisher.current
        return picture is not None and name in picture.models and bool(picture.models[name].engine_models)

    def _run(self, seconds: float) -> None:
        self.loop.run_until_complete(asyncio.sleep(seconds))
        for task in [*self.tasks, *self.keepers.values()]:
            if task.done() and not task.cancelled():
                task.result()

    # What happens

    @rule(name=st.sampled_from(NAMES), seed=st.integers(0, 7))
    def upload(self, name: str, seed: int) -> None:
        digest = hashlib.sha256(str(seed).encode()).hexdigest()
        content_id = f"a-{digest[:12]}"
        accepted = Accepted(Stored(content_id, digest, Path("/x"), 10), 8, ("q_proj",))

        async def take_in() -> None:
            async with self.core.registry.contents_lock:
                self.storage.contents.add(content_id)
                await self.core.registry.admit(name, "base", accepted)

        self.loop.run_until_complete(take_in())

    @rule(name=st.sampled_from(NAMES))
    def delete(self, name: str) -> None:
        if name in self.core.registry.adapters:
            self.loop.run_until_complete(self.core.registry.delete(name))
            self.waiting.discard(name)

    @rule(name=st.sampled_from(NAMES))
    def ask(self, name: str) -> None:
        if name in self.core.registry.adapters and not self._callable(name):
            self.waiting.add(name)
            self.core.residents.want(Wanted(0, name))

    @rule(name=st.sampled_from(NAMES), which=st.integers(0, REPLICAS - 1))
    def begin_request(self, name: str, which: int) -> None:
        picture = self.core.publisher.current
        model = picture.models.get(name) if picture is not None else None
        if model is not None and model.engine_models:
            replica = sorted(model.engine_models)[which % len(model.engine_models)]
            index, cell = int(replica[1:]), model.rows[replica]
            if self.engines[index].alive:
                assert model.adapter in self.engines[index].whole, "a request met what is not whole"
                self.cells.replicas[index] += 1
                self.cells.values[cell] += 1
                self.cells.values[cell + 1] += 1
                self.requests.append((index, str(model.adapter), cell))

    @precondition(lambda self: self.requests)
    @rule(data=st.data())
    def end_request(self, data: st.DataObject) -> None:
        self._finish(data.draw(st.sampled_from(self.requests)))

    def _finish(self, request: tuple[int, str, int]) -> None:
        self.requests.remove(request)
        self.cells.replicas[request[0]] -= 1
        self.cells.values[request[2]] -= 1

    @rule(index=st.integers(0, REPLICAS - 1))
    def crash(self, index: int) -> None:
        self._end(index)

    @rule(index=st.integers(0, REPLICAS - 1), fault=st.sampled_from(LASTING))
    def go_wrong(self, index: int, fault: str) -> None:
        self.faults[index].add(fault)

    @rule(index=st.integers(0, REPLICAS - 1))
    def heal(self, index: int) -> None:
        self.faults[index].clear()

    @rule()
    def restart_control(self) -> None:
        self._stop_control()
        self._start_control()

    @rule(seconds=st.sampled_from([0.05, 0.3, 2.0, 15.0]))
    def wait(self, seconds: float) -> None:
        self._run(seconds)

    # What must hold

    @invariant()
    def nothing_half_loaded_is_served(self) -> None:
        picture = self.core.publisher.current if self.engines else None
        for model in picture.models.values() if picture is not None else ():
            for replica in model.engine_models if model.adapter is not None else ():
                engine = self.engines[int(replica[1:])]
                assert not engine.alive or model.adapter in engine.whole, (model, replica)

    @invariant()
    def no_engine_holds_more_than_its_places(self) -> None:
        assert all(len(engine.loaded) <= CAPACITY for engine in self.engines)

    def teardown(self) -> None:
        try:
            if self.engines:
                self._converge()
                self._stop_control()
        finally:
            self.loop.run_until_complete(_end(asyncio.all_tasks(self.loop)))
            self.store.close()
            self.patch.undo()
            self.loop.close()

    def _converge(self) -> None:
        """Once nothing goes wrong any more, everybody gets what they wait for."""
        for faults in self.faults:
            faults.clear()
        for request in list(self.requests):
            self._finish(request)
        for name in self.core.registry.adapters:
            if not self._callable(name):
                self.waiting.add(name)
        for _ in range(60):
            self._run(20.0)
            if self._at_rest():
                break
        assert not self.waiting, f"{self.waiting} wait for ever: {self.core.residents!r}"
        for adapter in self.core.registry.adapters.values():
            assert adapter.target is None, f"{adapter.name} never became current: {json.dumps(str(adapter))}"
        for engine, replica in zip(self.engines, self.core.replicas, strict=True):
            assert engine.loaded == there(replica), f"{replica} {engine.loaded}"
        named = {v.content_id for a in self.core.registry.adapters.values() for v in a.versions.values()}
        loaded = {name for engine in self.engines for name in engine.loaded}
        assert self.storage.contents >= {name for name in named if self.core.registry.index.alive(name)}
        assert self.storage.contents <= named | loaded

    def _at_rest(self) -> bool:
        targets = [adapter.target for adapter in self.core.registry.adapters.values()]
        settled = all(e.loaded == there(r) for e, r in zip(self.engines, self.core.replicas, strict=True))
        return not self.waiting and settled and not any(targets)


TestAdapters = Adapters.TestCase
TestAdapters.settings = settings(
    max_examples=30, stateful_step_count=25, deadline=None, derandomize=True, phases=[Phase.generate],
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)  # fmt: skip
