"""Requests that lose the only replica which has their adapter, and streams that wait."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import msgspec
import pytest
from relay_harness import Client, Relay, replica, until
from scripted_upstream import (
    DONE,
    END,
    STREAM_HEAD,
    Close,
    Hang,
    ScriptedUpstream,
    Step,
    answer,
    chunk,
    completion,
    token,
)

from backends.process import free_port
from gateway.relay.forward import KEEPALIVE_S
from gateway.relay.traffic import Limits
from gateway.snapshot import Delta, Model, NotLoaded

ENGINE_MODEL = "a-0123456789ab"
COLD = Model("french", "demo", ENGINE_MODEL, {}, "", on_demand=True)
ON_R0 = msgspec.structs.replace(COLD, engine_models={"r0": ENGINE_MODEL})
ON_R1 = msgspec.structs.replace(COLD, engine_models={"r1": ENGINE_MODEL})
WHOLE = answer(completion(model=ENGINE_MODEL))
STREAM = [STREAM_HEAD, chunk(token("bonjour", ENGINE_MODEL) + DONE), END]


@pytest.fixture
async def narrow(tmp_path: Path) -> AsyncIterator[Relay]:
    """A relay that lets a replica have one request at a time."""
    relay = Relay(tmp_path, Limits(100_000, request_timeout_s=60, max_in_flight=1))
    await relay.start()
    yield relay
    await relay.close()


async def serving(relay: Relay, adapter: Model, *scripts: list[Step], port: int | None = None) -> list[str]:
    """Replica r0 (at `port`, or an engine with these scripts) and r1, an engine that answers; what control is asked."""
    asked: list[str] = []
    relay.app._awaiting._ask = asked.append
    first = port or await relay.engine(*scripts, serve=False)
    second = await relay.engine([WHOLE], serve=False)
    base = Model("demo", None, None, {"r0": "demo", "r1": "demo"}, "")
    relay.serve(replica(first), replica(second, "r1", 1), models={"demo": base, "french": adapter})
    return asked


def change(relay: Relay, model: Model) -> None:
    relay.version += 1
    relay.app.apply(Delta(relay.version, {model.id: model}, ()))


async def parked(relay: Relay, stream: bool = False) -> Client:
    client = await relay.client()
    client.chat(model="french", stream=stream)
    await until(lambda: relay.app._awaiting.count == 1)
    return client


async def test_its_only_replica_cannot_be_reached_and_another_loads_it(relay: Relay) -> None:
    asked = await serving(relay, ON_R0, port=free_port())
    client = await parked(relay)
    relay.seconds(2)
    assert set(asked) == {"french"}
    change(relay, COLD)  # control has noticed
    await until(lambda: relay.app._awaiting.count == 1)
    change(relay, ON_R1)
    got = await client.answer()
    assert (got.status, got.json["model"], got.headers["x-tunegate-adapter"]) == (200, "french", "loaded")
    assert ((await relay.settled()).replica, relay.app._awaiting.count) == ("r1", 0)


async def test_its_only_replica_can_be_reached_again(relay: Relay) -> None:
    port = free_port()
    await serving(relay, ON_R0, port=port)
    client = await parked(relay)
    relay.seconds(1)
    assert relay.app._awaiting.count == 1  # the circuit is open: it is not asked every second
    back = ScriptedUpstream([WHOLE])
    await back.start(port=port)
    relay.upstreams.append(back)
    for engine in relay.app._engines.values():
        engine.health.avoid_until_s = 0.0
    relay.seconds(1)
    assert (await client.answer()).status == 200
    assert ((await relay.settled()).replica, relay.app._awaiting.count) == ("r0", 0)


async def test_it_waits_no_longer_than_others(relay: Relay) -> None:
    await serving(relay, ON_R0, port=free_port())
    client = await parked(relay)
    relay.app._awaiting._limit_s = 0.0
    change(relay, COLD)  # it is parked a second time, with the time of the first
    relay.seconds(1)
    late = await client.answer()
    assert (late.status, late.error["code"]) == (503, "adapter_not_loaded")
    assert (await relay.settled()).outcome == "adapter_not_loaded"


async def test_its_only_replica_dies_before_it_answers(relay: Relay) -> None:
    await serving(relay, ON_R0, [Close(reset=True)])
    client = await parked(relay)
    change(relay, ON_R1)
    assert (await client.answer()).status == 200
    assert (await relay.settled()).replica == "r1"


async def test_a_request_that_two_engines_died_of_is_not_tried_on_a_third(relay: Relay) -> None:
    await serving(relay, ON_R0, [Close(reset=True)])
    client = await parked(relay)
    relay.upstreams[1].scripts = [[Close(reset=True)]]
    change(relay, ON_R1)
    assert (await client.answer()).status == 502
    assert (await relay.settled()).outcome == "engine_error"


async def test_the_base_does_not_wait(relay: Relay) -> None:
    base = Model("demo", None, None, {"r0": "demo"}, "")
    relay.serve(replica(free_port()), models={"demo": base})
    assert (await relay.ask()).status == 503


async def test_its_adapter_is_unloaded_while_it_queues(narrow: Relay) -> None:
    await serving(narrow, ON_R0, [Hang()])
    first = await narrow.client()
    first.chat()
    second = await narrow.client()
    second.chat()  # both replicas have one request; r1 answers its own at once
    await second.answer()
    client = await narrow.client()
    client.chat(model="french")
    await until(lambda: narrow.app._traffic.admission.waiting == 1)
    change(narrow, COLD)
    assert (narrow.app._traffic.admission.waiting, narrow.app._awaiting.count) == (0, 1)
    change(narrow, ON_R1)
    assert (await client.answer()).status == 200


async def test_a_stream_that_waits_for_its_adapter_is_kept_open(relay: Relay) -> None:
    await serving(relay, COLD, STREAM)
    client = await parked(relay, stream=True)
    relay.seconds(KEEPALIVE_S - 1)
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.02):
            await client.reader.read(1)
    relay.seconds(1)
    status, headers = await client.head()
    assert (status, headers["x-tunegate-adapter"], await client.piece()) == (200, "loading", b": ka\n")
    change(relay, ON_R0)
    rest = b""
    while data := await client.piece():
        rest += data
    assert b'"model":"french"' in rest
    assert rest.endswith(DONE)
    assert (await relay.settled()).outcome == "ok"
    assert relay.counted("tunegate_keepalives") == {("0",): 1}


async def test_what_fails_after_a_keep_alive_is_an_event(relay: Relay) -> None:
    await serving(relay, COLD, STREAM)
    client = await parked(relay, stream=True)
    relay.seconds(KEEPALIVE_S)
    relay.app.not_loaded(NotLoaded("french", "no memory"))
    got = await client.answer()
    assert got.status == 200
    assert "no memory" in got.events[0]["error"]["message"]
    assert (await relay.settled()).status == 503


async def test_after_a_keep_alive_another_replica_is_tried_as_before(relay: Relay) -> None:
    await serving(relay, COLD, STREAM, port=free_port())
    relay.upstreams[0].scripts = [STREAM]
    client = await parked(relay, stream=True)
    relay.seconds(KEEPALIVE_S)
    change(relay, msgspec.structs.replace(ON_R1, engine_models={"r0": ENGINE_MODEL, "r1": ENGINE_MODEL}))
    got = await client.answer()
    assert got.events[0]["model"] == "french"
    assert (await relay.settled()).replica == "r1"


async def test_a_stream_that_waits_for_room_is_kept_open(narrow: Relay) -> None:
    gate = asyncio.Event()
    await narrow.engine([gate, answer(completion())], [STREAM_HEAD, chunk(token("hi") + DONE), END])
    first = await narrow.client()
    first.chat()
    await until(lambda: narrow.in_flight() == 1)
    clients = [await narrow.client() for _ in range(2)]
    for client, stream in zip(clients, (True, False), strict=True):
        client.chat(stream=stream)
    await until(lambda: narrow.app._traffic.admission.waiting == 2)
    narrow.seconds(KEEPALIVE_S)
    assert narrow.counted("tunegate_keepalives") == {("0",): 1}  # not to the one that wants no stream
    gate.set()
    assert (await first.answer()).status == 200
    streamed = await clients[0].answer()
    assert streamed.body.startswith(b": ka\n")
    assert streamed.events[-1] == "[DONE]"


async def test_a_stream_that_lost_its_engine_has_its_adapter_loaded_elsewhere(relay: Relay) -> None:
    begun = [STREAM_HEAD, chunk(token("bonjour", ENGINE_MODEL)), Close(reset=True)]
    asked = await serving(relay, ON_R0, begun)
    clients = [await relay.client() for _ in range(2)]
    for client in clients:
        client.chat(model="french", stream=True)
        await client.head()
        assert b"bonjour" in await client.piece()
    await until(lambda: relay.in_flight() == 0)
    change(relay, COLD)
    relay.seconds(2)
    assert asked == ["french"] * 2  # once a second for all of them
    assert not relay.entries
