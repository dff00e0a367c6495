"""What is not inference, and goes to control."""

from __future__ import annotations

import asyncio
import hashlib
from unittest.mock import Mock

from relay_harness import Relay, replica, until
from scripted_upstream import END, STREAM_HEAD, Close, Hang, answer, chunk

from gateway.relay.client import ClientConnection, Handler
from gateway.relay.http import Request
from gateway.relay.server import Server
from gateway.scopes import SCOPES
from gateway.snapshot import Key

SEKRET = {"authorization": "Bearer sekret"}
UPLOAD = b"POST /v1/files HTTP/1.1\r\ncontent-length: 20\r\n\r\n0123456789"


async def start(relay: Relay) -> None:
    relay.serve(replica(9), keys={hashlib.sha256(b"sekret").hexdigest(): Key("key-1", frozenset(SCOPES))})


async def test_a_request_and_its_answer_pass_as_they_are(relay: Relay) -> None:
    await start(relay)
    control = await relay.control(
        [answer(b"[1]", "201 Created", "text/x", extra="x-a: b\r\ndate: now\r\nserver: s\r\n")]
    )
    async with relay.connected() as client:
        own = {"x_custom": "1", "te": "gzip", "x_tunegate_key_id": "somebody-else"}
        client.send("PUT", "/v1/models/org%2Fname?a=%20", b"body", **SEKRET, **own)
        got = await client.answer()
    assert (got.status, got.body) == (201, b"[1]")
    assert set(got.headers) == {"content-type", "x-a", "content-length", "x-request-id"}
    seen = control.seen[0]
    assert seen.line == "PUT /v1/models/org%2Fname?a=%20 HTTP/1.1"
    assert seen.body == b"body"
    assert seen.headers == {
        "host": "relay",
        "x-custom": "1",
        "x-request-id": got.headers["x-request-id"],
        "x-tunegate-key-id": "key-1",
        "content-length": "4",
    }
    assert relay.counted("tunegate_requests") == {("control", "", "201"): 1}
    assert relay.entries[0].route == "/v1/models/org%2Fname"


async def test_an_upload_streams_through(relay: Relay) -> None:
    relay.serve(replica(9))
    control = await relay.control([answer(b"{}")])
    size = 20_000_000  # far above the limit of inference bodies
    async with relay.connected() as client:
        client.writer.write(b"POST /v1/files HTTP/1.1\r\ncontent-length: %d\r\n\r\n" % size)
        for _ in range(200):
            client.writer.write(b"x" * (size // 200))
            await client.writer.drain()
        assert (await client.answer()).status == 200
    assert len(control.seen[0].body) == size


async def test_a_chunked_upload_with_expect(relay: Relay) -> None:
    relay.serve(replica(9))
    control = await relay.control([answer(b"{}")])
    async with relay.connected() as client:
        client.writer.write(b"POST /v1/files HTTP/1.1\r\nexpect: 100-continue\r\ntransfer-encoding: chunked\r\n\r\n")
        assert (await client.head())[0] == 100
        for _ in range(5):
            client.writer.write(chunk(b"abc"))
            await asyncio.sleep(0)
        client.writer.write(END)
        assert (await client.answer()).status == 200
    assert control.seen[0].body == b"abc" * 5


async def test_answers_without_a_body(relay: Relay) -> None:
    relay.serve(replica(9))
    await relay.control(
        [b"HTTP/1.1 204 No Content\r\n\r\n"], [b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\n"], [answer(b"x")]
    )
    async with relay.connected() as client:
        client.send("DELETE", "/v1/x")
        assert (await client.answer(no_body=True)).status == 204
        client.send("HEAD", "/v1/x")
        assert (await client.answer(no_body=True)).headers["content-length"] == "5"
        client.send("GET", "/v1/x")
        assert (await client.answer()).body == b"x"


async def test_a_stream_passes_at_once(relay: Relay) -> None:
    relay.serve(replica(9))
    more = asyncio.Event()
    await relay.control([STREAM_HEAD, chunk(b"data: 1\n\n"), more, chunk(b"data: 2\n\n"), END])
    async with relay.connected() as client:
        client.send("GET", "/v1/fine_tuning/jobs/1/events")
        await client.head()
        assert await client.piece() == b"data: 1\n\n"
        more.set()
        assert await client.piece() == b"data: 2\n\n"
        assert await client.piece() == b""


async def test_an_answer_that_ends_with_its_connection(relay: Relay) -> None:
    relay.serve(replica(9))
    await relay.control([b"HTTP/1.1 200 OK\r\n\r\nall of it", Close()])
    async with relay.connected() as client:
        client.send("GET", "/")
        assert (await client.answer()).body == b"all of it"


async def test_control_is_away(relay: Relay) -> None:
    relay.serve(replica(9))
    async with relay.connected() as client:
        client.send("POST", "/v1/adapters", b"x" * 10)
        got = await client.answer()
        assert (got.status, got.error["type"], got.headers["retry-after"]) == (503, "server_error", "1")
        assert "control" in got.error["message"]
        client.send("GET", "/health")
        assert (await client.answer()).status == 200


async def test_control_breaks_off(relay: Relay) -> None:
    relay.serve(replica(9))
    await relay.control([Close()], [answer(b"x" * 100)[:-50], Close()])
    async with relay.connected() as client:
        client.send("GET", "/v1/models")
        assert (await client.answer()).status == 500
    async with relay.connected() as client:
        client.send("GET", "/v1/models")
        await client.head()
        assert len(await client.reader.read()) < 100  # cut, so that nobody takes it for whole
    assert [entry.outcome for entry in relay.entries] == ["control_error"] * 2


async def test_a_client_that_goes_lets_go_of_control(relay: Relay) -> None:
    relay.serve(replica(9))
    control = await relay.control([STREAM_HEAD, chunk(b"data: 1\n\n"), Hang()])
    async with relay.connected() as client:
        client.send("GET", "/v1/events")
        await client.head()
        seen = await control.request()
    await asyncio.wait_for(seen.gone.wait(), 1)
    await until(lambda: relay.entries)
    assert relay.entries[0].status == 499


async def test_control_is_silent(relay: Relay) -> None:
    relay.serve(replica(9))
    control = await relay.control([Hang()])
    async with relay.connected() as client:
        client.send("GET", "/v1/models")
        await control.request()
        relay.seconds(30)
        assert (await client.answer()).status == 504


async def test_control_answers_before_the_body_is_read(relay: Relay) -> None:
    """A full disk is told while the upload still comes; what is behind it on the connection must not hang."""
    relay.serve(replica(9))

    async def refuse(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        await until(lambda: paused(relay))  # so much of the body waits here that the client was held back
        writer.write(answer(b"no", "507 Insufficient Storage"))
        await writer.drain()
        writer.close()

    control = await asyncio.start_unix_server(refuse, relay.folder / "control.sock")
    async with control, relay.connected() as client:
        size = 5_000_000
        client.writer.write(b"POST /v1/files HTTP/1.1\r\ncontent-length: %d\r\n\r\n" % size + b"x" * size)
        assert (await client.answer()).status == 507
        client.send("GET", "/health")
        assert (await client.answer()).status == 200


def paused(relay: Relay) -> bool:
    return any(not connection._transport.is_reading() for connection in relay.server.connections)


async def test_a_slow_reader_of_controls_answer_is_held_back(relay: Relay) -> None:
    relay.serve(replica(9))
    control = await relay.control([answer(b"x" * 30_000_000)])
    async with relay.connected() as client:
        client.writer.transport.pause_reading()  # type: ignore[attr-defined]
        client.send("GET", "/v1/files/f/content")
        await control.request()
        await until(lambda: relay.server.connections)
        await asyncio.sleep(0.2)
        assert next(iter(relay.server.connections))._transport.get_write_buffer_size() < 1_000_000
        client.writer.transport.resume_reading()  # type: ignore[attr-defined]
        assert len((await client.answer()).body) == 30_000_000


async def test_an_answer_that_comes_before_the_body_is_whole(relay: Relay) -> None:
    """Control refuses a method without reading the body, which is still on its way."""
    heads: list[bytes] = []

    async def refuse(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        heads.append(await reader.readuntil(b"\r\n\r\n"))
        writer.write(answer(b'{"error":null}', "405 Method Not Allowed"))
        if b"connection: close" in heads[-1]:
            writer.close()
        else:
            await reader.read()
            writer.close()

    control = await asyncio.start_unix_server(refuse, relay.folder / "control.sock")
    relay.serve()
    client = await relay.client()
    for _ in range(3):
        client.writer.write(b"GET /v1/files HTTP/1.1\r\nhost: a\r\ncontent-length: 200000\r\n\r\n")
        await until(lambda: len(heads))
        client.writer.write(b"x" * 200_000)
        result = await client.answer()
        assert (result.status, result.body) == (405, b'{"error":null}')
        heads.clear()
    control.close()


async def test_a_pipelined_body_waits_until_it_is_wanted() -> None:
    """A handler that wants no body yet, as one that still connects to control, gets none read."""
    reading = True

    def read(on: bool) -> None:
        nonlocal reading
        reading = on

    def begin(connection: ClientConnection, request: Request) -> Handler | None:
        if begun:
            connection.pause_body()
        begun.append(request)
        return Mock()

    begun: list[Request] = []
    transport = Mock(is_closing=lambda: False, pause_reading=lambda: read(False), resume_reading=lambda: read(True))
    client = ClientConnection(Server(begin, asyncio.get_running_loop()))
    client.connection_made(transport)
    client.data_received(UPLOAD + b"0123456789" + UPLOAD)
    client.answer(200, b"", b"")
    await until(lambda: len(begun) == 2)
    assert not reading
