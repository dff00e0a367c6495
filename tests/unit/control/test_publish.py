"""Snapshots: what they say, and how relays get them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import msgspec
import pytest

from backends import registry as backends
from backends.base import Endpoint
from gateway.control import publisher as module
from gateway.control.catalog import Adapter, Version, VersionState
from gateway.control.publish import Public, build
from gateway.control.publisher import Publisher
from gateway.control.replica import AdapterState, Replica, State
from gateway.snapshot import Applied, Key, Snapshot
from tests.unit.control.conftest import until

PUBLIC = Public("base", {})


def replica(id: str, index: int, state: State = State.READY, backend: str = "vllm") -> Replica:
    made = Replica(id, index, lambda: None)
    made.backend = backends.get(backend)  # type: ignore[arg-type]
    made.endpoint = Endpoint("127.0.0.1", 8000 + index, f"key-{id}")
    made.become(state)
    return made


def version(name: str = "pirate", number: int = 1, state: VersionState = VersionState.READY) -> Version:
    content_id = f"a-{str(number) * 12}"
    reason = "too big" if state is VersionState.FAILED else ""
    return Version(name, number, content_id, str(number) * 64, "base", 8, ("q_proj",), 10, 1, state, reason)


def catalog(*versions: Version, current: int | None) -> dict[str, Adapter]:
    name = versions[0].name
    return {name: Adapter(name, current, {own.version: own for own in versions})}


def test_replicas_and_base() -> None:
    one, two, three = replica("r0", 0), replica("r1", 1), replica("r2", 2, State.LOADING)
    two.drain("operator")
    snapshot = build(7, PUBLIC, [one, two, three], {})
    assert snapshot.version == 7
    assert [(r.id, r.index, r.port, r.api_key, r.accepting) for r in snapshot.replicas] == [
        ("r0", 0, 8000, "key-r0", True),
        ("r1", 1, 8001, "key-r1", False),
    ]
    assert snapshot.models["base"].engine_models == {"r0": "base"}
    assert snapshot.models["base"].parent is None


def test_no_replica_is_ready() -> None:
    base = build(1, PUBLIC, [replica("r0", 0, State.LOADING), replica("r1", 1, State.FAILED)], {}).models["base"]
    assert (base.engine_models, base.unready_reason) == ({}, "r0 is loading, r1 is failed")


@pytest.mark.parametrize(("backend", "called"), [("vllm", "a-111111111111"), ("sglang", "base:a-111111111111")])
def test_adapter_is_called_by_its_content_id(backend: str, called: str) -> None:
    one, two = replica("r0", 0, backend=backend), replica("r1", 1, backend=backend)
    one.set_adapter("a-111111111111", AdapterState.READY)
    two.set_adapter("a-111111111111", AdapterState.VERIFYING)
    models = build(1, PUBLIC, [one, two], catalog(version(), current=1)).models
    assert set(models) == {"base", "pirate", "pirate@v1"}
    assert models["pirate"].engine_models == {"r0": called}
    assert (models["pirate"].parent, models["pirate"].adapter) == ("base", "a-111111111111")


def test_name_stays_with_the_current_version_until_the_next_is_promoted() -> None:
    one = replica("r0", 0)
    for number in (1, 2):
        one.set_adapter(f"a-{str(number) * 12}", AdapterState.READY)
    versions = version(number=1), version(number=2)
    before = build(1, PUBLIC, [one], catalog(*versions, current=1)).models
    after = build(2, PUBLIC, [one], catalog(*versions, current=2)).models
    assert before["pirate"].adapter == "a-111111111111"
    assert after["pirate"].adapter == "a-222222222222"
    assert {name: model.adapter for name, model in after.items() if "@" in name} == {
        "pirate@v1": "a-111111111111",
        "pirate@v2": "a-222222222222",
    }


def test_reasons_of_unready_adapters() -> None:
    one, two, three = replica("r0", 0), replica("r1", 1, State.UNHEALTHY), replica("r2", 2)
    one.set_adapter("a-111111111111", AdapterState.FAILED, "no memory")
    model = build(1, PUBLIC, [one, two, three], catalog(version(), current=1)).models["pirate"]
    assert model.unready_reason == "it is failed on r0: no memory, r1 is unhealthy, it is not loaded on r2"
    failed = catalog(version(state=VersionState.FAILED), current=None)
    assert build(1, PUBLIC, [one], failed).models["pirate"].unready_reason == "it failed: too big"


class Relay:
    """A relay's end of the socket."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    async def next(self) -> Snapshot:
        async with asyncio.timeout(20):
            return msgspec.json.decode(await self.reader.readline(), type=Snapshot)

    def say(self, version: int, index: int = 0) -> None:
        self.writer.write(msgspec.json.encode(Applied(index, version)) + b"\n")


@pytest.fixture
async def publisher(tmp_path: Path) -> AsyncIterator[Publisher]:
    made = Publisher(tmp_path / "snapshots.sock")
    await made.start()
    yield made
    await made.stop()


async def connect(tmp_path: Path) -> Relay:
    return Relay(*await asyncio.open_unix_connection(tmp_path / "snapshots.sock", limit=1 << 24))


def snapshot(number: int) -> Snapshot:
    return build(number, PUBLIC, [], {})


async def test_relay_gets_the_current_snapshot_and_every_change(publisher: Publisher, tmp_path: Path) -> None:
    early = await connect(tmp_path)
    await publisher.publish(snapshot(1))
    assert await early.next() == snapshot(1)
    late = await connect(tmp_path)
    assert await late.next() == snapshot(1)
    await publisher.publish(snapshot(2))
    assert [await relay.next() for relay in (early, late)] == [snapshot(2)] * 2
    assert (tmp_path / "snapshots.sock").stat().st_mode & 0o777 == 0o600
    for relay in (early, late):
        relay.writer.close()


async def test_wait_until_all_relays_route_by_it(publisher: Publisher, tmp_path: Path) -> None:
    await publisher.publish(snapshot(1))
    assert await publisher.wait_applied(1, 0.1)  # no relay: nobody to wait for
    relays = [await connect(tmp_path), await connect(tmp_path)]
    await until(lambda: len(publisher._links) == 2)
    waiting = asyncio.create_task(publisher.wait_applied(1, 20))
    relays[0].say(1, index=0)
    await until(lambda: repr(publisher) == "<Publisher v1: 0@1>")
    assert not waiting.done()
    relays[1].say(1, index=1)
    assert await waiting
    assert not await publisher.wait_applied(2, 0.01)
    relays[0].say(2)
    relays[1].writer.close()  # a relay that is gone routes nothing
    assert await publisher.wait_applied(2, 20)
    relays[0].writer.close()


async def test_slow_relay_gets_the_newest_and_misses_what_is_outdated(publisher: Publisher, tmp_path: Path) -> None:
    many = {f"key-{number}": Key("x" * 1000, frozenset()) for number in range(2000)}
    relay = await connect(tmp_path)
    for number in range(1, 30):
        await publisher.publish(build(number, Public("base", many), [], {}))
        await asyncio.sleep(0)
    seen = [(await relay.next()).version]
    while seen[-1] < 29:
        seen.append((await relay.next()).version)
    assert seen == sorted(seen)
    assert len(seen) < 29
    relay.writer.close()


async def test_a_relay_that_does_not_read_is_let_go(
    publisher: Publisher, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At once: everybody waits for all relays who wants a change to hold."""
    monkeypatch.setattr(module, "_SEND_LIMIT_S", 0.05)
    many = {f"key-{number}": Key("x" * 1000, frozenset()) for number in range(2000)}
    relay = await connect(tmp_path)
    relay.writer.transport.pause_reading()
    await until(lambda: publisher._links)
    await publisher.publish(build(1, Public("base", many), [], {}))
    await publisher.publish(build(2, Public("base", many), [], {}))
    assert await publisher.wait_applied(2, 20)
    assert not publisher._links
    relay.writer.close()


async def test_nonsense_from_a_relay_ends_its_connection_only(publisher: Publisher, tmp_path: Path) -> None:
    await publisher.publish(snapshot(1))
    relay = await connect(tmp_path)
    await relay.next()
    relay.writer.write(b"nonsense\n")
    async with asyncio.timeout(20):
        assert await relay.reader.read() == b""
    relay.writer.close()
    other = await connect(tmp_path)
    assert await other.next() == snapshot(1)
    other.writer.close()
