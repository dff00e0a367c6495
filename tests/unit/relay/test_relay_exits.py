"""Every way a request can end, in both modes: what the client sees, and that nothing is left behind."""

from __future__ import annotations

import asyncio
import socket

import pytest
from relay_harness import Relay, replica, until
from scripted_upstream import DONE, END, STREAM_HEAD, Close, Hang, answer, chunk, completion, token, usage

from gateway.relay.traffic import Limits
from gateway.snapshot import Model

STREAMED = [STREAM_HEAD, chunk(token("hel")), chunk(token("lo")), chunk(usage(3, 2)), chunk(DONE), END]
UNFIT = {"logprobs": True}  # of a stream that cannot go on elsewhere
BOTH = pytest.mark.parametrize("stream", [False, True], ids=["plain", "stream"])


def closed_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


# The good end


async def test_plain(relay: Relay) -> None:
    engine = await relay.engine([answer(completion("hello"))])
    got = await relay.ask(temperature=0)
    assert got.status == 200
    assert got.headers["content-type"] == "application/json"
    assert got.body == completion("hello")
    seen = await engine.request()
    assert seen.line == "POST /v1/chat/completions HTTP/1.1"
    assert seen.headers["authorization"] == "Bearer key-of-r0"
    assert seen.headers["x-request-id"] == got.headers["x-request-id"]
    assert seen.json == {"model": "demo", "messages": [{"role": "user", "content": "hi"}], "temperature": 0}
    entry = await relay.settled()
    assert (entry.status, entry.outcome, entry.replica, entry.model) == (200, "ok", "r0", "demo")
    assert (entry.prompt_tokens, entry.completion_tokens, entry.stream) == (3, 2, False)
    assert relay.counted("tunegate_requests") == {("/v1/chat/completions", "demo", "200"): 1}
    assert relay.counted("tunegate_prompt_tokens")["demo",] == 3
    assert relay.counted("tunegate_completion_tokens")["demo",] == 2


async def test_stream(relay: Relay) -> None:
    engine = await relay.engine(STREAMED)
    got = await relay.ask(stream=True)
    assert got.status == 200
    assert got.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert got.body == token("hel") + token("lo") + DONE
    assert (await engine.request()).json["stream_options"] == {"include_usage": True}
    entry = await relay.settled()
    assert (entry.prompt_tokens, entry.completion_tokens, entry.outcome, entry.stream) == (3, 2, "ok", True)
    assert entry.ttft_ms is not None
    assert entry.ttft_ms <= entry.duration_ms


async def test_stream_with_usage_asked_for(relay: Relay) -> None:
    await relay.engine(STREAMED)
    got = await relay.ask(stream=True, stream_options={"include_usage": True})
    assert got.body == token("hel") + token("lo") + usage(3, 2) + DONE


async def test_last_event_done_and_end_come_in_one_write(relay: Relay) -> None:
    await relay.engine([STREAM_HEAD, chunk(token("hi")) + chunk(DONE)])  # the engine has not ended its body yet
    async with relay.connected() as client:
        client.chat(stream=True)
        await client.head()
        data = await client.reader.read(65536)
        assert data == chunk(token("hi") + DONE) + END
    assert (await relay.settled()).outcome == "ok"


async def test_connection_to_the_engine_is_reused(relay: Relay) -> None:
    engine = await relay.engine(STREAMED, [answer(completion())])
    await relay.ask(stream=True)
    await until(lambda: len(relay.app._origins["127.0.0.1", engine.port].idle) == 1)
    await relay.ask()
    assert [seen.connection for seen in engine.seen] == [1, 1]


async def test_idle_connections_are_closed_before_the_engine_does(relay: Relay) -> None:
    engine = await relay.engine([answer(completion())])
    await relay.ask()
    relay.seconds(4)
    await relay.ask()
    assert [seen.connection for seen in engine.seen] == [1, 2]


# The client goes away


@BOTH
async def test_client_gone_while_connecting(relay: Relay, stream: bool) -> None:
    with socket.create_server(("127.0.0.1", 0), backlog=0) as full:
        fillers = [socket.socket() for _ in range(3)]
        for filler in fillers:  # a backlog that is full: connecting hangs
            filler.setblocking(False)
            filler.connect_ex(full.getsockname())
        relay.serve(replica(full.getsockname()[1]))
        async with relay.connected() as client:
            client.chat(stream=stream)
            await until(lambda: relay.in_flight() == 1)
        entry = await relay.settled()
        for filler in fillers:
            filler.close()
    assert (entry.status, entry.outcome) == (499, "client_gone")
    assert relay.counted("tunegate_client_disconnects") == {("(other)",): 0, ("demo",): 1}


@BOTH
async def test_client_gone_before_the_first_byte(relay: Relay, stream: bool) -> None:
    engine = await relay.engine([Hang()])
    async with relay.connected() as client:
        client.chat(stream=stream)
        seen = await engine.request()
        assert relay.in_flight() == 1
    await asyncio.wait_for(seen.gone.wait(), 1)  # the engine is told within a second
    assert (await relay.settled()).status == 499


@BOTH
async def test_client_gone_in_the_middle(relay: Relay, stream: bool) -> None:
    begun = [STREAM_HEAD, chunk(token("one")), chunk(token("two"))] if stream else [answer(completion())[:-20]]
    engine = await relay.engine([*begun, Hang()])
    async with relay.connected() as client:
        client.chat(stream=stream)
        if stream:
            await client.head()
            await client.piece()
        seen = await engine.request()
    await asyncio.wait_for(seen.gone.wait(), 1)
    entry = await relay.settled()
    assert (entry.status, entry.outcome) == (499, "client_gone")
    assert (entry.completion_tokens or 0) == (2 if stream else 0)  # what it was sent is accounted


async def test_client_gone_after_done_is_a_success(relay: Relay) -> None:
    await relay.engine([STREAM_HEAD, chunk(token("hi")), chunk(usage(3, 1)), chunk(DONE), Hang()])
    async with relay.connected() as client:
        client.chat(stream=True)
        await client.head()
        while DONE not in await client.piece():
            pass
    assert (await relay.settled()).outcome == "ok"


async def test_client_gone_while_sending_its_body(relay: Relay) -> None:
    engine = await relay.engine([Hang()])
    async with relay.connected() as client:
        client.writer.write(b"POST /v1/chat/completions HTTP/1.1\r\ncontent-length: 100\r\n\r\n{")
        await until(lambda: any(c._handler for c in relay.server.connections))
    entry = await relay.settled()
    assert (entry.status, entry.outcome, entry.model) == (499, "client_gone", None)
    assert engine.seen == []


# The engine fails


@BOTH
@pytest.mark.parametrize("reset", [False, True], ids=["closed", "reset"])
async def test_engine_lost_before_its_answer(relay: Relay, stream: bool, reset: bool) -> None:
    await relay.engine([Close(reset)])
    got = await relay.ask(stream=stream)
    assert got.status == 502
    assert got.headers["x-should-retry"] == "false"
    assert got.error["type"] == "server_error"
    entry = await relay.settled()
    assert (entry.status, entry.outcome) == (502, "engine_error")
    assert relay.counted("tunegate_upstream_errors") == {("r0", "lost"): 1}


@pytest.mark.parametrize("reset", [False, True], ids=["closed", "reset"])
async def test_engine_lost_in_the_middle_of_a_stream(relay: Relay, reset: bool) -> None:
    flushed = asyncio.Event()
    await relay.engine([STREAM_HEAD, chunk(token("one")), flushed, Close(reset)])
    async with relay.connected() as client:
        client.chat(stream=True, **UNFIT)
        assert (await client.head())[0] == 200
        assert await client.piece() == token("one")
        flushed.set()
        last = await client.piece()
        assert last.startswith(b'data: {"error":{"message":"')
        assert last.endswith(b"}}\n\n")
        assert await client.piece() == b""  # the body is whole, so that no client waits for more
    entry = await relay.settled()
    assert (entry.status, entry.outcome, entry.completion_tokens) == (502, "engine_error", 1)


async def test_stream_without_done_is_an_error(relay: Relay) -> None:
    await relay.engine([STREAM_HEAD, chunk(token("one")), END])
    got = await relay.ask(stream=True, **UNFIT)
    assert got.events[-1]["error"]["type"] == "server_error"
    assert "before its answer was complete" in got.events[-1]["error"]["message"]
    assert (await relay.settled()).status == 502
    assert relay.counted("tunegate_upstream_errors") == {("r0", "truncated"): 1}


async def test_half_an_event_is_never_passed_on(relay: Relay) -> None:
    await relay.engine([STREAM_HEAD, chunk(token("one") + token("two")[:30]), END])
    got = await relay.ask(stream=True, **UNFIT)
    assert got.body.startswith(token("one") + b'data: {"error":')


async def test_plain_answer_cut_short(relay: Relay) -> None:
    await relay.engine([answer(completion())[:-5], Close()])
    got = await relay.ask()
    assert (got.status, got.headers["x-should-retry"]) == (502, "false")
    assert (await relay.settled()).outcome == "engine_error"


@BOTH
async def test_engine_silent_before_its_answer(relay: Relay, stream: bool) -> None:
    engine = await relay.engine([Hang()])
    async with relay.connected() as client:
        client.chat(stream=stream)
        seen = await engine.request()
        relay.seconds(30)
        got = await client.answer()
        assert (got.status, got.headers["x-should-retry"]) == (504, "false")
        await asyncio.wait_for(seen.gone.wait(), 1)
    assert (await relay.settled()).status == 504


async def test_engine_silent_in_the_middle_of_a_stream(relay: Relay) -> None:
    engine = await relay.engine([STREAM_HEAD, chunk(token("one")), Hang()])
    async with relay.connected() as client:
        client.chat(stream=True, **UNFIT)
        await client.head()
        await client.piece()
        seen = await engine.request()
        relay.seconds(30)
        assert await client.piece() == b": ka\n"
        assert b"silent for 30 s" in await client.piece()
        assert await client.piece() == b""
        await asyncio.wait_for(seen.gone.wait(), 1)
    entry = await relay.settled()
    assert (entry.status, entry.outcome) == (504, "engine_error")


async def test_any_byte_of_the_engine_ends_its_silence(relay: Relay) -> None:
    more = asyncio.Event()
    await relay.engine([STREAM_HEAD, chunk(token("one")), more, chunk(token("two")), Hang()])
    async with relay.connected() as client:
        client.chat(stream=True)
        await client.head()
        await client.piece()
        relay.seconds(14)
        more.set()
        assert await client.piece() == token("two")
        relay.seconds(14)
    assert relay.counted("tunegate_keepalives") == {("0",): 0}


async def test_engine_speaks_no_http(relay: Relay) -> None:
    await relay.engine([b"SSH-2.0-OpenSSH_9.2\r\n"])
    got = await relay.ask()
    assert got.status == 502
    assert "not HTTP" in got.error["message"]
    assert (await relay.settled()).outcome == "engine_error"


async def test_engine_answers_no_json(relay: Relay) -> None:
    await relay.engine([answer(b"<html>oops</html>", content_type="text/html")])
    got = await relay.ask()
    assert got.status == 502
    assert relay.counted("tunegate_upstream_errors") == {("r0", "nonsense"): 1}
    await relay.settled()


async def test_error_event_of_the_engine(relay: Relay) -> None:
    error = (
        b'data: {"error": {"object": "error", "message": "out of memory", "type": "X", "param": null, "code": 500}}\n\n'
    )
    await relay.engine([STREAM_HEAD, chunk(token("one") + error + DONE), END])
    got = await relay.ask(stream=True, **UNFIT)
    message = "out of memory. The stream was not continued: only chats and completions of plain text are."
    assert got.events == [
        got.events[0],
        {"error": {"message": message, "type": "server_error", "param": None, "code": None}},
    ]
    entry = await relay.settled()
    assert (entry.status, entry.outcome) == (502, "engine_error")


async def test_error_as_the_first_event_is_a_proper_status(relay: Relay) -> None:
    error = b'data: {"error":{"message":"context is 8192 tokens","type":"BadRequestError","param":null,"code":400}}\n\n'
    await relay.engine([STREAM_HEAD, chunk(error + DONE), END])
    got = await relay.ask(stream=True)
    assert (got.status, got.error["message"]) == (400, "context is 8192 tokens")
    await relay.settled()


# Connecting


@BOTH
async def test_refused_connection_is_tried_on_another_replica(relay: Relay, stream: bool) -> None:
    engine = await relay.engine(STREAMED if stream else [answer(completion())], serve=False)
    relay.serve(replica(closed_port(), "r0", 0), replica(engine, "r1", 1))
    for _ in range(4):
        assert (await relay.ask(stream=stream)).status == 200
    assert relay.in_flight() == 0
    assert len(engine.seen) == 4
    assert relay.counted("tunegate_upstream_errors") == {("r0", "connect"): 1}  # from then on it came last
    assert relay.counted("tunegate_replica_ejections") == {("r0", "circuit"): 1}
    assert relay.counted("tunegate_retries") == {("connect",): 1}


@BOTH
async def test_no_replica_can_be_reached(relay: Relay, stream: bool) -> None:
    relay.serve(replica(closed_port(), "r0", 0), replica(closed_port(), "r1", 1), replica(closed_port(), "r2", 2))
    got = await relay.ask(stream=stream)
    assert (got.status, got.headers["retry-after"]) == (503, "1")
    assert "x-should-retry" not in got.headers  # nothing ran: the client may try again
    assert (await relay.settled()).status == 503
    assert sum(relay.counted("tunegate_upstream_errors").values()) == 2


@BOTH
async def test_reused_connection_that_the_engine_closed(relay: Relay, stream: bool) -> None:
    """The close crosses our request on the wire: nothing was received, so a fresh connection is tried, unseen."""
    ok = STREAMED if stream else [answer(completion())]
    engine = await relay.engine([answer(completion())], [Close()], ok)
    await relay.ask()
    got = await relay.ask(stream=stream)
    assert got.status == 200
    assert [seen.connection for seen in engine.seen] == [1, 1, 2]
    assert engine.seen[1].body == engine.seen[2].body
    assert relay.in_flight() == 0
    assert relay.counted("tunegate_upstream_errors") == {}


async def test_only_one_retry(relay: Relay) -> None:
    engine = await relay.engine([answer(completion())], [Close()], [Close()])
    await relay.ask()
    assert (await relay.ask()).status == 502
    assert len(engine.seen) == 3
    assert relay.in_flight() == 0


async def test_no_retry_once_bytes_came(relay: Relay) -> None:
    engine = await relay.engine([answer(completion())], [b"HTTP/1.1 200 OK\r\n", Close()])
    await relay.ask()
    assert (await relay.ask()).status == 502
    assert len(engine.seen) == 2


# The relay ends, the client stalls


@BOTH
async def test_drain_lets_requests_finish(relay: Relay, stream: bool) -> None:
    finish = asyncio.Event()
    script = [STREAM_HEAD, chunk(token("one")), finish, *STREAMED[1:]] if stream else [finish, answer(completion())]
    engine = await relay.engine(script)
    idle = await relay.client()
    client = await relay.client()
    client.chat(stream=stream)
    await engine.request()
    draining = asyncio.create_task(relay.server.drain(10))
    assert await idle.closed()
    with pytest.raises(ConnectionRefusedError):
        await asyncio.open_connection("127.0.0.1", relay.port)
    finish.set()
    assert (await client.answer()).status == 200
    assert await client.closed()
    await asyncio.wait_for(draining, 1)
    assert (await relay.settled()).outcome == "ok"


@BOTH
async def test_drain_ends_what_does_not_finish(relay: Relay, stream: bool) -> None:
    engine = await relay.engine([STREAM_HEAD, chunk(token("one")), Hang()] if stream else [Hang()])
    client = await relay.client()
    client.chat(stream=stream)
    seen = await engine.request()
    if stream:
        await client.head()
        await client.piece()
    await relay.server.drain(0.05)
    if stream:
        assert b"stopping" in await client.piece()
        assert await client.piece() == b""
    else:
        assert (await client.answer()).status == 503
    await asyncio.wait_for(seen.gone.wait(), 1)
    assert (await relay.settled()).outcome == "stopped"


async def test_slow_reader_is_held_back_not_buffered(relay: Relay) -> None:
    event = token("x" * 60_000)
    engine = await relay.engine([STREAM_HEAD, *[chunk(event)] * 400, chunk(DONE), END])
    async with relay.connected() as client:
        client.writer.transport.pause_reading()  # type: ignore[attr-defined]
        client.chat(stream=True)
        await engine.request()
        await until(lambda: any(c._handler._paused for c in relay.server.connections if c._handler))
        connection = next(iter(relay.server.connections))
        await asyncio.sleep(0.2)
        assert connection._transport.get_write_buffer_size() < 1_000_000  # of the 24 MB
        client.writer.transport.resume_reading()  # type: ignore[attr-defined]
        got = await client.answer()
    assert got.body == event * 400 + DONE
    assert (await relay.settled()).outcome == "ok"


async def test_reader_that_never_reads(relay: Relay) -> None:
    engine = await relay.engine([STREAM_HEAD, *[chunk(token("x" * 60_000))] * 400, chunk(DONE), END])
    async with relay.connected() as client:
        client.writer.transport.pause_reading()  # type: ignore[attr-defined]
        client.chat(stream=True)
        await engine.request()
        await until(lambda: any(c._handler._paused for c in relay.server.connections if c._handler))
        relay.seconds(30)
        entry = await relay.settled()
        assert (entry.status, entry.outcome) == (499, "client_stalled")
        assert relay.counted("tunegate_keepalives") == {("0",): 0}


async def test_body_too_large_while_it_comes(relay: Relay) -> None:
    engine = await relay.engine([Hang()])
    async with relay.connected() as client:
        client.writer.write(b"POST /v1/chat/completions HTTP/1.1\r\ntransfer-encoding: chunked\r\n\r\n")
        for _ in range(30):
            client.writer.write(chunk(b"x" * 10_000))
        got = await client.answer()
        assert got.status == 413
        assert "100000" in got.error["message"]
        assert got.headers["connection"] == "close"
        client.writer.write(END)
        assert await client.closed()
    assert (relay.entries[0].status, engine.seen) == (413, [])


async def test_unready_and_unknown_take_no_slot(relay: Relay) -> None:
    engine = await relay.engine([answer(completion())], serve=False)
    loading = Model("new", "demo", "a-000000000000", {}, "it is loading")
    relay.serve(replica(engine), models={"demo": Model("demo", None, None, {"r0": "demo"}, ""), "new": loading})
    unready = await relay.ask(model="new")
    assert (unready.status, unready.headers["retry-after"]) == (503, "1")
    assert "it is loading" in unready.error["message"]
    unknown = await relay.ask(model="dmo")
    assert (unknown.status, unknown.error["code"], unknown.error["param"]) == (404, "model_not_found", "model")
    assert "Did you mean `demo`?" in unknown.error["message"]
    assert relay.in_flight() == 0
    assert set(relay.counted("tunegate_requests")) == {
        ("/v1/chat/completions", "", "503"),
        ("/v1/chat/completions", "", "404"),
    }


async def test_limits_of_silence_are_the_operators(tmp_path_factory: pytest.TempPathFactory) -> None:
    relay = Relay(tmp_path_factory.mktemp("short"), Limits(1000, request_timeout_s=2))
    await relay.start()
    engine = await relay.engine([Hang()])
    async with relay.connected() as client:
        client.chat()
        await engine.request()
        relay.seconds(2)
        assert (await client.answer()).status == 504
    await relay.close()


async def test_settling_answers_on_and_tells_clients_to_leave(relay: Relay) -> None:
    """A load balancer gets the time to see that this gateway is not ready, and nobody is cut off meanwhile."""
    finish = asyncio.Event()
    engine = await relay.engine([finish, answer(completion())], [answer(completion())])
    busy, idle = await relay.client(), await relay.client()
    idle.send("GET", "/health")
    assert "connection" not in (await idle.answer()).headers
    busy.chat()
    await engine.request()
    relay.app.draining = True
    settling = asyncio.create_task(relay.server.settle(0.3))
    await until(lambda: relay.server.draining)
    idle.send("GET", "/ready")
    got = await idle.answer()
    assert (got.status, got.headers["connection"]) == (503, "close")
    fresh = await relay.client()  # connections are still accepted
    fresh.chat()
    got = await fresh.answer()
    assert (got.status, got.headers["connection"]) == (200, "close")
    finish.set()
    got = await busy.answer()
    assert (got.status, got.headers["connection"]) == (200, "close")
    await settling
    await relay.server.drain(1)
    with pytest.raises(ConnectionRefusedError):
        await asyncio.open_connection("127.0.0.1", relay.port)
