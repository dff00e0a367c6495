"""Admission in a running relay: order, refusals, shares of several relays, and what a flood costs another key."""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from relay_harness import CHAT, Client, Relay, replica, until
from scripted_upstream import Hang, ScriptedUpstream, answer, completion

from gateway.observe.cells import PRESSING, WAITING, Cells, InFlight, Peers
from gateway.relay import admit
from gateway.relay.traffic import Limits
from gateway.snapshot import Key

ROOM = 2


@pytest.fixture
async def narrow(tmp_path: Path) -> AsyncIterator[Relay]:
    relay = await started(tmp_path)
    yield relay
    await relay.close()


async def started(folder: Path, **limits: Any) -> Relay:
    given = {"request_timeout_s": 30, "max_in_flight": ROOM, "max_waiting": 4, "max_wait_s": 10} | limits
    relay = Relay(folder, Limits(100_000, **given))
    await relay.start()
    return relay


def waiting(relay: Relay) -> int:
    return relay.app._traffic.admission.waiting


async def ask(relay: Relay, number: int, **headers: str) -> Client:
    """A request that is in flight or in the queue when this returns."""
    before = relay.in_flight() + waiting(relay)
    client = await relay.client()
    body = {"model": "demo", "messages": [{"role": "user", "content": str(number)}]}
    client.send("POST", CHAT, json.dumps(body).encode(), **headers)
    await until(lambda: relay.in_flight() + waiting(relay) == before + 1)
    return client


def order(engine: ScriptedUpstream) -> list[int]:
    return [int(seen.json["messages"][0]["content"]) for seen in engine.seen]


async def test_never_more_than_there_is_room_for(narrow: Relay) -> None:
    gate = asyncio.Event()
    engine = await narrow.engine([gate, answer(completion())])
    clients = [await ask(narrow, n) for n in range(6)]
    assert (narrow.in_flight(), waiting(narrow)) == (ROOM, 4)
    await engine.request(1)
    assert len(engine.seen) == ROOM
    gate.set()
    for client in clients:
        assert (await client.answer()).status == 200
    assert order(engine)[ROOM:] == [2, 3, 4, 5]
    assert narrow.counted("tunegate_queue_wait_seconds")
    assert (narrow.in_flight(), waiting(narrow)) == (0, 0)


async def test_batch_comes_last(narrow: Relay, tmp_path: Path) -> None:
    gate = asyncio.Event()
    engine = await narrow.engine([gate, answer(completion())])
    clients = [await ask(narrow, n) for n in range(2)]
    clients += [await ask(narrow, 2, x_priority="batch"), await ask(narrow, 3), await ask(narrow, 4)]
    assert (waiting(narrow), InFlight(tmp_path).pressing()) == (3, 2)
    gate.set()
    for client in clients:
        assert (await client.answer()).status == 200
    assert sorted(order(engine)[2:4]) == [3, 4]
    assert order(engine)[4] == 2


async def test_a_new_replica_is_room(narrow: Relay) -> None:
    full = await narrow.engine([Hang()])
    clients = [await ask(narrow, n) for n in range(3)]
    assert waiting(narrow) == 1
    fresh = await narrow.engine([answer(completion())], serve=False)
    narrow.serve(replica(full), replica(fresh, "r1", 1))
    assert (await clients[2].answer()).status == 200
    assert len(fresh.seen) == 1


async def test_what_cannot_start_in_time_is_told_at_once(narrow: Relay) -> None:
    """One answer in 0.2 s and two before it: a client that waits for a tenth of that is told so."""
    gates = [asyncio.Event() for _ in range(20)]
    await narrow.engine(*[[gate, answer(completion())] for gate in gates])
    for n in range(5):
        await ask(narrow, n)
    for gate in gates[:2]:
        await asyncio.sleep(0.2)
        gate.set()
    await until(lambda: waiting(narrow) == 1)
    await ask(narrow, 5)
    client = await narrow.client()
    body = {"model": "demo", "messages": []}
    client.send("POST", CHAT, json.dumps(body).encode(), x_stainless_read_timeout="0.05")
    got = await client.answer()
    assert (got.status, got.error["code"]) == (503, "overloaded")
    assert int(got.headers["retry-after-ms"]) >= 250
    assert int(got.headers["retry-after"]) >= 1
    assert "x-should-retry" not in got.headers
    assert narrow.counted("tunegate_queue_refusals") == {("too_late",): 1}  # it never waited, else it is `expired`


async def test_clients_that_retry_are_told_not_to_once_the_budget_is_spent(narrow: Relay) -> None:
    await narrow.engine([Hang()])
    for n in range(6):
        await ask(narrow, n)
    for attempt in range(12):
        client = await narrow.client()
        client.chat(headers={"x-stainless-retry-count": str(attempt % 3)})
        got = await client.answer()
        assert got.status == 503
        if attempt == 0:
            assert "x-should-retry" not in got.headers
    for _ in range(10):
        client = await narrow.client()
        client.chat(headers={"x-stainless-retry-count": "2"})
        got = await client.answer()
    assert got.headers["x-should-retry"] == "false"


async def test_a_flood_of_one_key_does_not_keep_another_waiting(tmp_path: Path) -> None:
    relay = await started(tmp_path, max_waiting=50)
    try:
        engine = await relay.engine([answer(completion())])
        gate = asyncio.Event()
        engine.scripts = [[gate, answer(completion())]] * 2 + [[answer(completion())]]
        keys = {name: Key(name, frozenset({"infer"})) for name in ("flood", "small")}
        digests = {hashlib.sha256(name.encode()).hexdigest(): key for name, key in keys.items()}
        relay.serve(replica(engine), keys=digests)
        clients = [await ask(relay, 1, authorization="Bearer flood") for _ in range(52)]  # the queue is full
        small = await relay.client()
        body = {"model": "demo", "messages": [{"content": "2"}]}
        small.send("POST", CHAT, json.dumps(body).encode(), authorization="Bearer small")
        await until(lambda: any(ticket.key == "small" for ticket in relay.app._traffic.admission._queue))
        assert relay.counted("tunegate_queue_refusals") == {("yielded",): 1}  # the flood's newest made room
        gate.set()
        assert (await small.answer()).status == 200
        assert order(engine).index(2) <= 4
        statuses = [(await client.answer()).status for client in clients]
        assert (statuses.count(200), statuses.count(429)) == (51, 1)
    finally:
        await relay.close()


async def test_relays_share_a_replica(tmp_path: Path) -> None:
    """Two relays, one replica with room for two: never more than that, and neither waits for ever."""
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    first, second = await started(tmp_path / "a", max_waiting=40), await started(tmp_path / "b", max_waiting=40)
    try:
        first.meter._peers = Peers({1: tmp_path / "b" / "relay-0.cells"})
        second.meter._peers = Peers({0: tmp_path / "a" / "relay-0.cells"})
        most = 0

        def look() -> int:
            nonlocal most
            most = max(most, first.in_flight() + second.in_flight())
            return most

        engine = await first.engine([answer(completion())])
        second.serve(replica(engine))
        gates = [asyncio.Event() for _ in range(40)]
        engine.scripts = [[gate, answer(completion())] for gate in gates]
        clients = []
        for n in range(20):
            clients += [await ask(first, n), await ask(second, 100 + n)]
        assert first.in_flight() + second.in_flight() == ROOM
        for count, gate in enumerate(gates):
            await until(lambda count=count: len(engine.seen) > count)
            gate.set()
            look()
        for client in clients:
            assert (await client.answer()).status == 200
            look()
        assert most == ROOM
        halves = [sum(number < 100 for number in order(engine)[start : start + 10]) for start in (0, 10, 20)]
        assert all(2 <= half <= 8 for half in halves), halves  # both are served all along
        assert waiting(first) == waiting(second) == 0
    finally:
        await first.close()
        await second.close()


def test_a_relay_that_died_waits_for_nothing(tmp_path: Path) -> None:
    """Others would leave it its share of the replicas."""
    dead = Cells(tmp_path / "relay-1.cells")
    dead.values[WAITING] = dead.values[PRESSING] = 5
    peers = Peers({1: tmp_path / "relay-1.cells"})
    assert (peers.waiting(), InFlight(tmp_path).pressing()) == (1, 5)
    dead.close()
    Cells(tmp_path / "relay-1.cells").close()  # it is started again
    assert (peers.waiting(), InFlight(tmp_path).pressing()) == (0, 0)


async def test_the_bound_of_bytes_holds_whatever_yields(narrow: Relay, monkeypatch: pytest.MonkeyPatch) -> None:
    """A large newcomer displaces as many small ones as it needs, or none."""
    monkeypatch.setattr(admit, "_WAITING_BYTES", 10_000)
    narrow.app._traffic.admission._room = admit.Room(ROOM, 1000, 10.0)
    await narrow.engine([Hang()])
    for number in range(ROOM):
        await ask(narrow, number)
    for number in range(20):
        await ask(narrow, number, x_priority="batch")
    queue = narrow.app._traffic.admission._queue
    before = queue.bytes
    refused = await narrow.ask(messages=[{"role": "user", "content": "x" * 20_000}])
    assert (refused.status, queue.waiting, queue.bytes) == (503, 20, before)
    large = await narrow.client()
    large.chat(messages=[{"role": "user", "content": "x" * 9_500}])
    await until(lambda: any(ticket.bytes > 9_500 for ticket in queue))
    assert queue.bytes <= 10_000
