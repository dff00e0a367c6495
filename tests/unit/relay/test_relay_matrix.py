"""The matrix: every way in which a request can end, in every mode; after each of them nothing may be left.

A path is a function that makes one request end so, and says what the log must have. `Scene.settled` is the same for
all: no slot and no place in the queue is held, the engine works on nothing a second later, one line is in the log, one
request is counted, and the client's connection is as HTTP has it. Clients that do not read: test_relay_exits.py.
"""

from __future__ import annotations

import asyncio
import json
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from emulated import Emulated
from relay_harness import Client, Relay, replica, until

from backends.emulator.script import Fault
from gateway.relay.traffic import Limits

ABORTED_WITHIN_S = 10.0  # milliseconds, on a machine that has time
QUESTION = [{"role": "user", "content": "a long story"}]
MODES: dict[str, tuple[str, dict[str, Any]]] = {
    "chat": ("/v1/chat/completions", {"messages": QUESTION}),
    "chat stream": ("/v1/chat/completions", {"messages": QUESTION, "stream": True}),
    "completion": ("/v1/completions", {"prompt": "Once upon a time", "max_tokens": 20}),
    "completion stream": ("/v1/completions", {"prompt": "Once upon a time", "max_tokens": 20, "stream": True}),
    "responses": ("/v1/responses", {"input": "a long story"}),
    "responses stream": ("/v1/responses", {"input": "a long story", "stream": True}),
}
STREAMS = [mode for mode in MODES if "stream" in mode]


class Scene:
    """A relay, its engines and one client."""

    def __init__(self, relay: Relay, engines: list[Emulated], mode: str) -> None:
        self.relay = relay
        self.engines = engines
        self.path, self.members = MODES[mode]
        self.stream = mode in STREAMS
        self.open = True  # the connection can be used again
        self.others = 0  # requests made beside the one that is looked at

    @property
    def engine(self) -> Emulated:
        return self.engines[0]

    async def client(self) -> Client:
        self.asking = await self.relay.client()
        return self.asking

    async def ask(self, headers: dict[str, str] | None = None, **members: Any) -> Client:
        client = await self.client()
        body = {"model": "demo", **self.members, **members}
        client.send("POST", self.path, json.dumps(body).encode(), **(headers or {}))
        return client

    async def begun(self, client: Client) -> None:
        """The engine has it, and in a stream the client the first of it."""
        await until(lambda: any(engine.working for engine in self.engines))
        if self.stream:
            assert (await client.head())[0] == 200
            await client.piece()

    async def rest(self, client: Client) -> bytes:
        """What still comes of a body whose head was read."""
        body = b""
        while data := await client.piece():
            body += data
        return body

    async def leave(self, client: Client) -> None:
        client.go()
        self.open = False

    async def error(self, client: Client, status: int) -> dict[str, str]:
        """The client is told, by status or in band; the headers."""
        got = await client.answer()
        assert got.status == status, got.body
        assert got.error["message"]
        return got.headers

    async def settled(self) -> tuple[int, str]:
        over_s = time.monotonic()
        await until(lambda: len(self.relay.entries) == self.others + 1)
        await until(lambda: not any(engine.working for engine in self.engines))
        assert time.monotonic() - over_s < ABORTED_WITHIN_S
        assert self.relay.in_flight() == 0
        admission = self.relay.app._traffic.admission
        assert (admission.waiting, admission._queue.waiting, admission._queue.bytes) == (0, 0, 0)
        assert self.relay.counted("tunegate_queue_depth") == {("0",): 0}
        assert sum(self.relay.counted("tunegate_requests").values()) == self.others + 1
        if self.open:
            self.asking.send("GET", "/health")
            assert (await self.asking.answer()).status == 200
        else:
            assert await self.asking.closed() or self.asking.writer.is_closing()
        entry = self.relay.entries[-1] if not self.open else self.relay.entries[-2]
        assert len(self.relay.entries) == self.others + 1 + self.open
        return entry.status, entry.outcome


Path_ = Callable[[Scene], Awaitable[tuple[int, str]]]


async def ok(scene: Scene) -> tuple[int, str]:
    assert (await (await scene.ask()).answer()).status == 200
    return 200, "ok"


# The client goes


async def client_gone_in_the_queue(scene: Scene) -> tuple[int, str]:
    release = await fill(scene)
    client = await scene.ask()
    await until(lambda: scene.relay.app._traffic.admission.waiting == 1)
    await scene.leave(client)
    await until(lambda: scene.relay.app._traffic.admission.waiting == 0)
    await release(first=False)
    return 499, "client_gone"


async def client_gone_before_the_first_byte(scene: Scene) -> tuple[int, str]:
    scene.engine.fault("hang")
    client = await scene.ask()
    await until(lambda: scene.engine.working)
    await scene.leave(client)
    return 499, "client_gone"


async def client_gone_in_the_middle(scene: Scene) -> tuple[int, str]:
    scene.engine.fault("stream_hang", after_chunks=3)
    scene.engine.engine.script.inter_token_ms = 1 if scene.stream else 60_000
    client = await scene.ask()
    await scene.begun(client)
    await scene.leave(client)
    return 499, "client_gone"


# The engine fails


async def engine_refuses(scene: Scene) -> tuple[int, str]:
    scene.engine.fault("status", status=400)
    await scene.error(await scene.ask(), 400)
    return 400, "refused_by_engine"


async def engine_answers_500(scene: Scene) -> tuple[int, str]:
    scene.engine.fault("status", status=500)
    assert (await scene.error(await scene.ask(), 502))["x-should-retry"] == "false"
    return 502, "engine_error"


async def engine_lost_before_the_first_byte(scene: Scene) -> tuple[int, str]:
    scene.engine.fault("reset")
    assert (await scene.error(await scene.ask(), 502))["x-should-retry"] == "false"
    return 502, "engine_error"


async def engine_lost_in_the_middle(scene: Scene) -> tuple[int, str]:
    """Of what cannot go on elsewhere: it asks for more than text."""
    scene.engine.fault("stream_reset" if scene.stream else "close", after_chunks=3)
    unfit = {} if "responses" in scene.path else {"n": 2}
    client = await scene.ask(**unfit)
    if not scene.stream:
        await scene.error(client, 502)
    else:
        assert (await client.head())[0] == 200
        assert b'"error":{"message":"The connection to the engine was lost' in await scene.rest(client)
    return 502, "engine_error"


async def engine_cuts_the_stream_short(scene: Scene) -> tuple[int, str]:
    scene.engine.fault("stream_truncate" if scene.stream else "close", after_chunks=3)
    client = await scene.ask(**({} if "responses" in scene.path else {"n": 2}))
    if scene.stream:
        assert (await client.head())[0] == 200
        assert b'{"error":{"message":"The engine ended the stream' in await scene.rest(client)
    else:
        await scene.error(client, 502)
    return 502, "engine_error"


async def engine_hangs(scene: Scene) -> tuple[int, str]:
    scene.engine.fault("hang")
    client = await scene.ask()
    await until(lambda: scene.engine.working)
    scene.relay.seconds(30)
    await scene.error(client, 504)
    return 504, "engine_error"


async def engine_speaks_no_http(scene: Scene) -> tuple[int, str]:
    scene.engine.fault("garbage")
    await scene.error(await scene.ask(), 502)
    return 502, "engine_error"


async def retry_budget_spent(scene: Scene) -> tuple[int, str]:
    for engine in scene.engines:
        engine.fault("status", status=503)
    budget = scene.relay.app._traffic.budget
    while budget.take(time.monotonic()):
        pass
    assert (await scene.error(await scene.ask(), 503))["x-should-retry"] == "false"
    assert sum(len(engine.sights) for engine in scene.engines) == 1
    assert scene.relay.counted("tunegate_retries").get(("no_budget",), 0) == (scene.path != "/v1/responses")
    return 503, "engine_error"


# Time


async def deadline(scene: Scene) -> tuple[int, str]:
    scene.engine.fault("hang")
    client = await scene.ask(headers={"x-request-timeout-ms": "60"})
    await scene.error(client, 504)
    return 504, "deadline"


async def deadline_in_the_middle(scene: Scene) -> tuple[int, str]:
    scene.engine.script(inter_token_ms=500 if scene.stream else 60_000)
    client = await scene.ask(headers={"x-request-timeout-ms": "1200" if scene.stream else "60"})
    if scene.stream:
        assert (await client.head())[0] == 200
        assert b"no answer within 1200 ms" in await scene.rest(client)
    else:
        await scene.error(client, 504)
    return 504, "deadline"


async def deadline_in_the_queue(scene: Scene) -> tuple[int, str]:
    release = await fill(scene)
    client = await scene.ask(headers={"x-request-timeout-ms": "60"})
    await scene.error(client, 504)
    assert scene.relay.entries[-1].replica is None
    await release(first=False)
    return 504, "deadline"


async def waited_too_long(scene: Scene) -> tuple[int, str]:
    release = await fill(scene)
    client = await scene.ask(headers={"x-stainless-read-timeout": "0.05"})
    await until(lambda: scene.relay.app._traffic.admission.waiting == 1)
    await asyncio.sleep(0.06)
    scene.relay.seconds(1)
    headers = await scene.error(client, 503)
    assert int(headers["retry-after-ms"]) > 0
    await release(first=False)
    return 503, "refused"


async def queue_full(scene: Scene) -> tuple[int, str]:
    release = await fill(scene, waiting=2)
    client = await scene.ask()
    headers = await scene.error(client, 503)
    assert int(headers["retry-after-ms"]) > 0
    await release(first=False)
    return 503, "refused"


async def served_from_the_queue(scene: Scene) -> tuple[int, str]:
    release = await fill(scene)
    client = await scene.ask()
    await until(lambda: scene.relay.app._traffic.admission.waiting == 1)
    await release(first=True)
    assert (await client.answer()).status == 200
    return 200, "ok"


# The relay ends


async def drained(scene: Scene) -> tuple[int, str]:
    scene.engine.script(ttft_ms=50)
    client = await scene.ask()
    await until(lambda: scene.engine.working)
    draining = asyncio.create_task(scene.relay.server.drain(10))
    got = await client.answer()
    assert got.status == 200
    await draining
    scene.open = False
    return 200, "ok"


async def stopped(scene: Scene) -> tuple[int, str]:
    scene.engine.fault("hang")
    client = await scene.ask()
    await until(lambda: scene.engine.working)
    await scene.relay.server.drain(0.02)
    await scene.error(client, 503)
    scene.open = False
    return 503, "stopped"


async def stopped_in_the_queue(scene: Scene) -> tuple[int, str]:
    await fill(scene)
    client = await scene.ask()
    await until(lambda: scene.relay.app._traffic.admission.waiting == 1)
    stopping = asyncio.create_task(scene.relay.server.drain(0.02))
    await scene.error(client, 503)
    await stopping
    scene.open = False
    return 503, "stopped"


async def fill(scene: Scene, waiting: int = 0) -> Callable[..., Awaitable[None]]:
    """Take every place at the replicas, and some in the queue; how to give them back is returned."""
    for engine in scene.engines:
        engine.fault("hang")
    clients = []
    for _ in range(len(scene.engines) + waiting):
        client = await scene.relay.client()
        client.chat()
        clients.append(client)
        await until(lambda: scene.relay.in_flight() + scene.relay.app._traffic.admission.waiting == len(clients))
    await until(lambda: sum(engine.working for engine in scene.engines) == len(scene.engines))
    scene.others = len(clients)

    async def release(first: bool) -> None:
        for engine in scene.engines:
            engine.script()
        done = len(scene.relay.entries)
        for client in clients:
            client.go()
        await until(lambda: len(scene.relay.entries) >= done + len(clients))
        if not first:  # the entry looked at is the last
            entry = scene.relay.entries.pop(0)
            scene.relay.entries.append(entry)

    return release


EVERYWHERE: list[Path_] = [
    ok, client_gone_in_the_queue, client_gone_before_the_first_byte, client_gone_in_the_middle, engine_refuses,
    engine_answers_500, engine_lost_before_the_first_byte, engine_lost_in_the_middle, engine_cuts_the_stream_short,
    engine_hangs, engine_speaks_no_http, deadline, deadline_in_the_middle, deadline_in_the_queue, waited_too_long,
    queue_full, served_from_the_queue, drained, stopped, stopped_in_the_queue,
]  # fmt: skip


@pytest.fixture
async def narrow(tmp_path: Path) -> AsyncIterator[Relay]:
    """A relay that sends one request at a time to a replica, and lets two wait."""
    relay = Relay(tmp_path, Limits(100_000, request_timeout_s=30, max_in_flight=1, max_waiting=2, max_wait_s=10))
    await relay.start()
    yield relay
    await relay.close()


async def scene_of(relay: Relay, mode: str, engines: int) -> Scene:
    made = [Emulated("vllm", f"r{index}", index) for index in range(engines)]
    for engine in made:
        await engine.start()
        relay.upstreams.append(engine)  # type: ignore[arg-type]  # closed with the relay
    relay.serve(*(engine.replica for engine in made))
    return Scene(relay, made, mode)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("path", EVERYWHERE, ids=lambda path: path.__name__)
async def test_exit(narrow: Relay, path: Path_, mode: str) -> None:
    scene = await scene_of(narrow, mode, 1)
    expected = await path(scene)
    assert await scene.settled() == expected


@pytest.mark.parametrize("mode", MODES)
async def test_budget(narrow: Relay, mode: str) -> None:
    scene = await scene_of(narrow, mode, 2)
    expected = await retry_budget_spent(scene)
    assert await scene.settled() == expected


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", ["status", "reset", "close", "garbage"])
async def test_failure_before_the_first_byte_is_tried_elsewhere(narrow: Relay, mode: str, kind: str) -> None:
    """Unless the engine keeps something of what it ran: then the client is told, and decides."""
    scene = await scene_of(narrow, mode, 2)
    for engine in scene.engines:
        engine.script(Fault(kind, times=1, status=500))  # type: ignore[arg-type]
    scene.engines[0].engine.script.faults[0].times = None
    scene.engines[1].script()
    for _ in range(2):  # whichever comes first
        client = await scene.ask()
        got = await client.answer()
        assert got.status == 200 or "responses" in scene.path, got.body
    entries = narrow.entries
    assert len(entries) == 2
    assert narrow.in_flight() == 0
    if "responses" in scene.path:
        assert sorted(entry.status for entry in entries) == [200, 502]
        assert narrow.counted("tunegate_retries") == {}
    else:
        assert sum(narrow.counted("tunegate_retries").values()) == 1


async def test_client_gone_while_connecting(narrow: Relay) -> None:
    """See test_relay_exits: connecting hangs where a listener's backlog is full. Here with a deadline."""
    with socket.create_server(("127.0.0.1", 0), backlog=0) as full:
        fillers = [socket.socket() for _ in range(3)]
        for filler in fillers:
            filler.setblocking(False)
            filler.connect_ex(full.getsockname())
        narrow.serve(replica(full.getsockname()[1]))
        async with narrow.connected() as client:
            client.chat(headers={"x-request-timeout-ms": "50"})
            assert (await client.answer()).status == 504
        entry = await narrow.settled()
        for filler in fillers:
            filler.close()
    assert entry.outcome == "deadline"
