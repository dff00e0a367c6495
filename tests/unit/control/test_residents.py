"""More adapters than a replica holds: loaded when asked for, and giving way to each other."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import msgspec
import pytest

from gateway.control.catalog import VersionState
from gateway.control.residency import Rules
from gateway.observe.cells import Cells
from gateway.snapshot import Applied, Delta, Model, NotLoaded, Snapshot, ToRelay, Wanted
from tests.unit.control.conftest import Start, World, until


class Relay:
    """A relay's end of the socket: follows the picture and asks."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.models: dict[str, Model] = {}
        self.refused: list[NotLoaded] = []
        self.bytes = 0

    async def follow(self) -> None:
        path = self.world.run_dir / "snapshots.sock"
        reader, self.writer = await asyncio.open_unix_connection(path, limit=1 << 24)
        try:
            while line := await reader.readline():
                self.bytes += len(line)
                self.take(msgspec.json.decode(line, type=ToRelay))
        finally:
            self.writer.close()

    def take(self, said: Any) -> None:
        if isinstance(said, NotLoaded):
            self.refused.append(said)
            return
        if isinstance(said, Delta):
            for name in said.removed:
                del self.models[name]
            self.models.update(said.changed)
        elif isinstance(said, Snapshot):
            self.models = said.models
        self.writer.write(msgspec.json.encode(Applied(0, said.version)) + b"\n")

    def ask(self, name: str) -> bool:
        """Always False, so that it can stand in a condition that is looked at again."""
        self.writer.write(msgspec.json.encode(Wanted(0, name)) + b"\n")
        return False

    async def loaded(self, name: str) -> Model:
        """Ask until it is loaded."""

        def there() -> Model | None:
            model = self.models.get(name)
            if model is not None and model.engine_models:
                return model
            self.ask(name)
            return None

        model: Model = await until(there)
        return model


@asynccontextmanager
async def relay(world: World) -> AsyncIterator[Relay]:
    made = Relay(world)
    task = asyncio.create_task(made.follow())
    await until(lambda: made.models)
    yield made
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


EAGER = Rules(stay_s=0.02, unasked_s=0.02, patience_s=0.0, turn_s=0.02)


def eager(world: World) -> None:
    world.core.residents._rules = EAGER


async def uploaded(world: World, count: int) -> list[str]:
    names = [f"m{number}" for number in range(count)]
    for number, name in enumerate(names):
        assert (await world.upload(name, seed=number))[0]["state"] == "ready"
    return names


def on(world: World) -> list[set[str]]:
    return [set(host.engine.adapters) for host in world.hosts]


async def test_any_number_may_be_registered_and_each_is_loaded_when_it_is_asked_for(start: Start) -> None:
    async with start(replicas=2, capacity=3, script=eager) as world, relay(world) as asking:
        names = await uploaded(world, 7)
        for name in [*names, *names[::-1]]:
            model = await asking.loaded(name)
            assert set(model.engine_models.values()) == {world.content_id(name)}
            assert all(len(held) <= 3 for held in on(world))
        await until(lambda: sum(len(held) for held in on(world)) <= 4)
        assert sum(counts.loads for counts in world.core.residents.counts.values()) >= 14
        shown = {name: world.service.adapter(name) for name in names}
        assert {one["state"] for one in shown.values()} == {"ready", "unloaded"}
        assert "when a request asks" in next(one["reason"] for one in shown.values() if one["state"] == "unloaded")


async def test_everything_is_loaded_everywhere_while_it_fits(start: Start) -> None:
    async with start(replicas=2, capacity=4, script=eager) as world:
        names = await uploaded(world, 4)  # one too many
        assert world.core.registry.on_demand
        await world.service.delete(names[0])
        wanted = {world.content_id(name) for name in names[1:]}
        await until(lambda: on(world) == [wanted, wanted])


async def test_what_is_in_flight_is_never_unloaded(start: Start) -> None:
    async with start(capacity=2, script=eager) as world, relay(world) as asking:
        first, second, third = await uploaded(world, 3)
        model = await asking.loaded(first)
        cells = Cells(world.run_dir / "relay-0.cells")
        cells.values[model.rows["r0"]] += 1
        busy = world.content_id(first)
        await asking.loaded(second)  # the spare place: the first is drained, and has no requests to come
        assert not asking.models[first].engine_models
        asking.ask(third)
        await asyncio.sleep(0.1)
        assert busy in world.hosts[0].engine.adapters
        cells.values[model.rows["r0"]] -= 1
        await asking.loaded(third)
        await until(lambda: busy not in world.hosts[0].engine.adapters)
        cells.close()


async def test_requests_since_the_last_look_count_for_what_is_gone_by_then(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with start(capacity=2, script=eager) as world, relay(world) as asking:
        first, *_ = await uploaded(world, 3)
        model = await asking.loaded(first)
        cells, residents = Cells(world.run_dir / "relay-0.cells"), world.core.residents
        residents._decide(time.monotonic())
        served = residents.demand.served
        cells.values[model.rows["r0"] + 1] += 4
        monkeypatch.setattr(world.replicas[0], "_adapters", {})
        residents._decide(time.monotonic())
        assert residents.demand.served == served + 4
        cells.close()


async def test_versions_are_resolved_without_being_listed(start: Start) -> None:
    async with start(capacity=2, script=eager) as world, relay(world) as asking:
        await world.upload("pirate", seed=1)
        old = world.content_id("pirate")
        await world.upload("pirate", seed=2)
        await world.upload("other", seed=3)
        await asking.loaded("other")
        await until(lambda: "pirate@v1" not in asking.models)
        assert asking.models["pirate"].on_demand
        assert set((await asking.loaded("pirate@v1")).engine_models.values()) == {old}
        asking.ask("pirate@v9")
        await until(lambda: asking.refused)
        assert (asking.refused[0].name, asking.refused[0].exists) == ("pirate@v9", False)


async def test_restarted_engines_and_control_go_on(start: Start) -> None:
    async with start(replicas=2, capacity=2, script=eager) as old, relay(old) as asking:
        names = await uploaded(old, 4)
        await asking.loaded(names[0])
        old.hosts[0].engine.die()
        await until(lambda: len(old.hosts[0].engines) == 2)
        for name in names:
            await asking.loaded(name)
        await until(lambda: all(old.hosts[0].engine.adapters.keys() == {n} for n in old.replicas[0].adapters))
        engines = [host.engine for host in old.hosts]
        held = on(old)

        def adopt(world: World) -> None:
            for host, engine in zip(world.hosts, engines, strict=True):
                host.adoptable = engine
            eager(world)

        async with start(replicas=2, capacity=2, script=adopt) as world:
            await until(lambda: sum(len(r.adapters) for r in world.replicas) == sum(map(len, held)))
            assert [set(engine.adapters) for engine in engines] == held  # what was loaded stays


async def test_an_adapter_that_cannot_be_loaded_any_more_is_refused_with_the_reason(start: Start) -> None:
    async with start(capacity=2, script=eager) as world, relay(world) as asking:
        first, second, _ = await uploaded(world, 3)
        await asking.loaded(second)
        world.script.rejects = "no memory"
        asking.ask(first)
        await until(lambda: asking.refused)
        assert (asking.refused[0].name, asking.refused[0].reason) == (first, "no memory")
        assert world.core.registry.adapters[first].shown.state is VersionState.READY
        world.script.rejects = None
        await asking.loaded(second)  # and the others go on


@pytest.mark.parametrize("fault", ["keeps_unloaded", "dies_loading"])
async def test_engines_that_lie_or_die_are_started_again_and_serve_on(start: Start, fault: str) -> None:
    async with start(capacity=2, script=eager) as world, relay(world) as asking:
        names = await uploaded(world, 3)
        setattr(world.script, fault, True)
        asking.ask(names[0])
        await until(lambda: asking.ask(names[0]) or len(world.hosts[0].engines) == 2)
        setattr(world.script, fault, False)
        for name in names:
            await asking.loaded(name)


async def test_a_load_costs_bytes_for_what_changed(start: Start) -> None:
    async with start(capacity=3, script=eager) as world, relay(world) as asking:
        names = await uploaded(world, 6)
        await asking.loaded(names[0])
        await asking.loaded(names[1])
        before = asking.bytes
        await asking.loaded(names[2])
        await asking.loaded(names[3])
        assert asking.bytes - before < 6000
