"""HTTP as clients really speak it: cut anywhere, pipelined, chunked, hesitant, old, wrong."""

from __future__ import annotations

import asyncio
import hashlib
import json

import pytest
from relay_harness import CHAT, Relay, replica, until
from scripted_upstream import DONE, END, STREAM_HEAD, Hang, answer, chunk, completion, token

from gateway.relay.app import ENDPOINTS
from gateway.relay.client import IDLE_LIMIT_S
from gateway.snapshot import Key, Model

BODY = b'{"model":"demo","messages":[]}'
REQUEST = b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n%b" % (len(BODY), BODY)
OK = [answer(completion())]


async def test_a_request_cut_at_every_byte(relay: Relay) -> None:
    engine = await relay.engine(OK)
    async with relay.connected() as client:
        for cut in range(1, len(REQUEST)):
            client.writer.write(REQUEST[:cut])
            await asyncio.sleep(0)
            client.writer.write(REQUEST[cut:])
            assert (await client.answer()).status == 200
    assert len(engine.seen) == len(REQUEST) - 1
    assert {seen.body for seen in engine.seen} == {BODY}


async def test_pipelined_requests_are_answered_in_order(relay: Relay) -> None:
    engine = await relay.engine(
        [answer(completion("one"))], [STREAM_HEAD, chunk(token("two") + DONE), END], [answer(completion("three"))]
    )
    streamed = REQUEST.replace(b'"messages":[]}', b'"stream":true}')
    async with relay.connected() as client:
        client.writer.write(REQUEST + streamed + REQUEST + b"GET /health HTTP/1.1\r\n\r\n")
        assert (await client.answer()).body == completion("one")
        assert (await client.answer()).body == token("two") + DONE
        assert (await client.answer()).body == completion("three")
        assert (await client.answer()).json == {"status": "ok"}
    assert engine.seen[0].body == BODY
    assert relay.in_flight() == 0


async def test_many_pipelined_requests_hold_the_client_back(relay: Relay) -> None:
    await relay.engine(OK)
    async with relay.connected() as client:
        client.writer.write(REQUEST * 300)
        for _ in range(300):
            assert (await client.answer()).status == 200


async def test_chunked_body(relay: Relay) -> None:
    engine = await relay.engine(OK)
    async with relay.connected() as client:
        client.writer.write(b"POST /v1/chat/completions HTTP/1.1\r\ntransfer-encoding: chunked\r\n\r\n")
        for start in range(0, len(BODY), 7):
            client.writer.write(chunk(BODY[start : start + 7]))
            await asyncio.sleep(0)
        client.writer.write(END)
        assert (await client.answer()).status == 200
    assert engine.seen[0].body == BODY


async def test_expect_100_continue(relay: Relay) -> None:
    await relay.engine(OK)
    async with relay.connected() as client:
        client.writer.write(
            b"POST /v1/chat/completions HTTP/1.1\r\nExpect: 100-continue\r\ncontent-length: %d\r\n\r\n" % len(BODY)
        )
        assert (await client.head())[0] == 100
        client.writer.write(BODY)
        assert (await client.answer()).status == 200


async def test_expect_100_continue_is_not_granted_to_a_body_too_large(relay: Relay) -> None:
    engine = await relay.engine(OK)
    async with relay.connected() as client:
        client.writer.write(
            b"POST /v1/chat/completions HTTP/1.1\r\nExpect: 100-continue\r\ncontent-length: 100001\r\n\r\n"
        )
        got = await client.answer()
        assert (got.status, got.error["type"]) == (413, "invalid_request_error")
    assert engine.seen == []


async def test_a_body_that_was_held_back_and_not_asked_for_ends_the_connection(relay: Relay) -> None:
    """Its client may send it all the same, or the next request: nobody could tell."""
    relay.serve(keys={hashlib.sha256(b"right").hexdigest(): Key("key-1", frozenset())})
    async with relay.connected() as client:
        client.writer.write(b"POST /v1/chat/completions HTTP/1.1\r\nExpect: 100-continue\r\ncontent-length: 9\r\n\r\n")
        got = await client.answer()
        assert (got.status, got.headers["connection"]) == (401, "close")
        client.writer.write(b"GET /health HTTP/1.1\r\n\r\n")
        assert await client.closed()


async def test_an_old_client_is_not_asked_for_its_body(relay: Relay) -> None:
    await relay.engine(OK)
    async with relay.connected() as client:
        head = b"POST /v1/chat/completions HTTP/1.0\r\nExpect: 100-continue\r\ncontent-length: %d\r\n\r\n" % len(BODY)
        client.writer.write(head + BODY)
        assert (await client.answer()).status == 200


async def test_a_declared_body_too_large_is_refused_at_once_and_is_the_connection_s_last(relay: Relay) -> None:
    await relay.engine(OK)
    async with relay.connected() as client:
        client.writer.write(b"POST /v1/chat/completions HTTP/1.1\r\ncontent-length: 5000000\r\n\r\n")
        got = await client.answer()
        assert (got.status, got.headers["connection"]) == (413, "close")
        for _ in range(50):  # a client that sends it all the same
            client.writer.write(b"x" * 100_000)
            await client.writer.drain()
        assert await client.closed()


async def test_a_trailer_without_end_closes_the_connection(relay: Relay) -> None:
    await relay.engine(OK)
    for key in ("", "authorization: Bearer wrong\r\n"):
        async with relay.connected() as client:
            head = f"POST {CHAT} HTTP/1.1\r\n{key}transfer-encoding: chunked\r\n\r\n0\r\nx: "
            client.writer.write(head.encode())
            for _ in range(100):
                if client.writer.transport.is_closing():
                    break
                client.writer.write(b"x" * 10_000)
                await asyncio.sleep(0.002)
            assert await client.closed()
        relay.serve(*relay.app._engines, keys={hashlib.sha256(b"right").hexdigest(): Key("key-1", frozenset())})
    await until(lambda: not relay.server.connections)


async def test_a_refused_body_is_read_before_the_connection_closes(relay: Relay) -> None:
    """Closing with bytes unread would reset the connection, and the client would never see the refusal."""
    await relay.engine(OK)
    async with relay.connected() as client:
        client.writer.write(
            b"POST /v1/chat/completions HTTP/1.1\r\nconnection: close\r\ncontent-length: 2000000\r\n\r\n"
        )
        await until(lambda: relay.entries)
        client.writer.write(b"x" * 2_000_000)
        await client.writer.drain()
        got = await client.answer()
        assert (got.status, got.headers["connection"]) == (413, "close")
        assert await client.closed()


async def test_a_refused_body_that_never_ends_is_not_read_for_ever(relay: Relay) -> None:
    await relay.engine(OK)
    async with relay.connected() as client:
        client.writer.write(
            b"POST /v1/chat/completions HTTP/1.1\r\nconnection: close\r\ncontent-length: 2000000\r\n\r\n"
        )
        assert (await client.answer()).status == 413
        relay.seconds(30)
        assert await client.closed()


async def test_close_and_old_clients(relay: Relay) -> None:
    await relay.engine(OK, [STREAM_HEAD, chunk(token("a") + DONE), END])
    for version, header in ((b"1.1", b"Connection: close\r\n"), (b"1.0", b"")):
        async with relay.connected() as client:
            client.writer.write(REQUEST.replace(b"HTTP/1.1\r\n", b"HTTP/%b\r\n%b" % (version, header)))
            got = await client.answer()
            assert got.status == 200
            assert got.headers["connection"] == "close"
            assert await client.closed()


async def test_a_stream_to_an_old_client_ends_with_its_connection(relay: Relay) -> None:
    await relay.engine([STREAM_HEAD, chunk(token("a") + DONE), END])
    async with relay.connected() as client:
        old = REQUEST.replace(b"HTTP/1.1", b"HTTP/1.0").replace(b'"messages":[]}', b'"stream":true}')
        client.writer.write(old)
        got = await client.answer()
        assert "transfer-encoding" not in got.headers
        assert got.body == token("a") + DONE


async def test_head_and_wrong_methods(relay: Relay) -> None:
    await relay.engine(OK)
    async with relay.connected() as client:
        client.send("HEAD", "/health")
        assert (await client.answer(no_body=True)).headers["content-length"] == "15"
        for endpoint in ENDPOINTS:
            client.send("GET", endpoint.decode())
            got = await client.answer()
            assert (got.status, got.headers["allow"]) == (405, "POST")
            assert got.error["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    "nonsense",
    [
        b"hello\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"x" * 60,  # TLS
        b"POST / HTTP/1.1\r\ncontent-length: x\r\n\r\n",
        b"POST / HTTP/1.1\r\ncontent-length: 3\r\ncontent-length: 4\r\n\r\n",
        b"POST / HTTP/1.1\r\ncontent-length: 3\r\ntransfer-encoding: chunked\r\n\r\n",
        b"GET / HTTP/9.9\r\n\r\n",
        b"GET / HTTP/1.1\r\nbad header: 1\r\n\r\n",
        b"GET / HTTP/1.1\r\na: " + b"b" * 70_000,
    ],
)
async def test_what_is_not_http(relay: Relay, nonsense: bytes) -> None:
    async with relay.connected() as client:
        client.writer.write(nonsense)
        got = await client.answer()
        assert got.status == 400
        assert got.error["type"] == "invalid_request_error"
        assert got.headers["x-request-id"]
        assert await client.closed()


UPGRADE = REQUEST.replace(
    b"\r\nHost", b"\r\nConnection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: A\r\nHost"
)


async def test_an_offer_of_another_protocol_is_ignored(relay: Relay) -> None:
    """As Java's HTTP client makes it with its first request, body and all."""
    engine = await relay.engine(OK)
    async with relay.connected() as client:
        for cut in range(0, len(UPGRADE), 5):
            client.writer.write(UPGRADE[:cut])
            await asyncio.sleep(0)
            client.writer.write(UPGRADE[cut:])
            assert (await client.answer()).status == 200
        client.writer.write(UPGRADE + REQUEST)
        assert (await client.answer()).status == 200
        assert (await client.answer()).status == 200
        client.writer.write(b"GET /health HTTP/1.1\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n")
        assert (await client.answer()).json == {"status": "ok"}
        client.writer.write(b"CONNECT example.org:443 HTTP/1.1\r\nHost: example.org:443\r\n\r\n")
        assert (await client.answer()).status == 400
    assert {seen.body for seen in engine.seen} == {BODY}


async def test_many_offers_of_another_protocol_at_once(relay: Relay) -> None:
    offer = b"GET /health HTTP/1.1\r\nConnection: Upgrade\r\nUpgrade: h2c\r\n\r\n"
    async with relay.connected() as client:
        client.writer.write(offer * 2000)
        for _ in range(2000):
            assert (await client.answer()).json == {"status": "ok"}


async def test_idle_and_stuck_connections_are_closed(relay: Relay) -> None:
    await relay.engine(OK)
    idle, slow_head, slow_body, used = [await relay.client() for _ in range(4)]
    slow_head.writer.write(b"POST /v1/chat/completions HT")
    slow_body.writer.write(b"POST /v1/chat/completions HTTP/1.1\r\ncontent-length: 10\r\n\r\n{")
    await until(lambda: any(c._handler for c in relay.server.connections))
    relay.seconds(IDLE_LIMIT_S - 1)
    used.writer.write(REQUEST)
    assert (await used.answer()).status == 200
    relay.seconds(1)
    for client in (idle, slow_head, slow_body):
        assert await client.closed()
    used.writer.write(REQUEST)
    assert (await used.answer()).status == 200
    assert [entry.outcome for entry in relay.entries] == ["ok", "client_gone", "ok"]


# Headers and identity


async def test_every_answer_has_an_id(relay: Relay) -> None:
    engine = await relay.engine(OK)
    async with relay.connected() as client:
        for sent, kept in (("my-id_1.x", True), ("x" * 64, True), ("x" * 65, False), ("a b", False), ("a/b", False)):
            client.chat(headers={"X-Request-Id": sent})
            got = await client.answer()
            assert (got.headers["x-request-id"] == sent) is kept
            assert engine.seen[-1].headers["x-request-id"] == got.headers["x-request-id"]
        ids = set()
        for path in ("/health", "/ready", "/v1/models", CHAT):
            client.send("GET", path)
            ids.add((await client.answer()).headers["x-request-id"])
        assert len(ids) == 4


async def test_no_client_header_reaches_an_engine_but_the_trace(relay: Relay) -> None:
    engine = await relay.engine(OK)
    trace = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    sent = {"Authorization": "Bearer mine", "X-Data-Parallel-Rank": "1", "Cookie": "a=b", "OpenAI-Organization": "o"}
    async with relay.connected() as client:
        client.chat(headers=sent | {"traceparent": trace})
        await client.answer()
        client.chat(headers={"traceparent": "00-nonsense"})
        await client.answer()
    expected = {"host", "content-type", "authorization", "x-request-id", "content-length"}
    assert set(engine.seen[0].headers) == expected | {"traceparent"}
    assert set(engine.seen[1].headers) == expected
    assert engine.seen[0].headers["authorization"] == "Bearer key-of-r0"


async def test_keys(relay: Relay) -> None:
    engine = await relay.engine(OK, serve=False)
    relay.serve(replica(engine), keys={hashlib.sha256(b"sekret").hexdigest(): Key("key-1", frozenset({"infer"}))})
    async with relay.connected() as client:
        for headers in ({}, {"authorization": "Bearer wrong"}):
            client.chat(model="no-such-model", headers=headers)  # the key is looked at first
            got = await client.answer()
            assert (got.status, got.error["code"]) == (401, "invalid_api_key")
            client.send("GET", "/v1/models", **headers)
            assert (await client.answer()).status == 401
        client.send("GET", "/ready")
        assert (await client.answer()).status == 200
        client.chat(headers={"authorization": "Bearer sekret"})
        assert (await client.answer()).status == 200
    assert relay.entries[-1].key_id == "key-1"
    assert "sekret" not in repr(relay.entries)


async def test_nothing_is_answered_before_the_first_snapshot(relay: Relay) -> None:
    """Until control has said which keys count, nobody gets in."""
    await relay.control([answer(b"{}")])
    async with relay.connected() as client:
        client.send("GET", "/health")
        assert (await client.answer()).status == 200
        for method, path in (("GET", "/ready"), ("POST", CHAT), ("GET", "/v1/models"), ("GET", "/metrics")):
            client.send(method, path, b"{}" if method == "POST" else None)
            got = await client.answer()
            assert (got.status, got.headers["retry-after"]) == (503, "1")
            assert "starting" in got.error["message"]


async def test_ready_says_why_not(relay: Relay) -> None:
    engine = await relay.engine(OK, serve=False)
    relay.serve(
        replica(engine, accepting=False), models={"demo": Model("demo", None, None, {}, "the engine loads its weights")}
    )
    async with relay.connected() as client:
        client.send("GET", "/ready")
        got = await client.answer()
        assert (got.status, got.error["message"]) == (503, "Not ready: the engine loads its weights")


# Bodies, as the endpoints see them


@pytest.mark.parametrize(
    "body", [b"", b"{", b"[]", b'{"model":1}', b"{}", b'{"model":"demo","lora_path":"x"}', b"\xff\xfe"]
)
async def test_bad_bodies(relay: Relay, body: bytes) -> None:
    engine = await relay.engine(OK)
    async with relay.connected() as client:
        for path in ENDPOINTS:
            client.send("POST", path.decode(), body)
            got = await client.answer()
            assert (got.status, got.error["type"]) == (400, "invalid_request_error")
        client.send("POST", CHAT, BODY)
        assert (await client.answer()).status == 200
    assert len(engine.seen) == 1


@pytest.mark.parametrize(
    "members",
    [b'"stream":true,"stream_options":{"\xff":1}', b'"prompt":1e999', b'"prompt":"\xff"', b'"x":' + b"[" * 50_000],
)
async def test_what_cannot_be_read_is_refused_before_it_takes_a_slot(relay: Relay, members: bytes) -> None:
    engine = await relay.engine(OK)
    async with relay.connected() as client:
        client.send("POST", "/v1/completions", b'{"model":"demo",%b}' % members)
        assert (await client.answer()).status == 400
    assert (relay.in_flight(), engine.seen) == (0, [])


async def test_every_endpoint_reaches_the_engine_by_its_own_path(relay: Relay) -> None:
    engine = await relay.engine([answer(b'{"ok":true}')], serve=False)
    async with relay.connected() as client:
        for path, endpoint in ENDPOINTS.items():
            relay.serve(replica(engine), task=endpoint.task or "generate")
            client.send("POST", path.decode() + "?x=1", BODY)
            assert (await client.answer()).json == {"ok": True}
    assert [seen.line for seen in engine.seen] == [f"POST {path.decode()} HTTP/1.1" for path in ENDPOINTS]


async def test_an_engine_meets_only_the_task_it_was_started_for(relay: Relay) -> None:
    """SGLang's server for embeddings dies of a chat request."""
    engine = await relay.engine([answer(b'{"ok":true}')], serve=False)
    async with relay.connected() as client:
        for task in ("generate", "embed"):
            relay.serve(replica(engine), task=task)
            for path, endpoint in ENDPOINTS.items():
                client.send("POST", path.decode(), BODY)
                got = await client.answer()
                assert got.status == (200 if endpoint.task in (None, task) else 404)
    assert len(engine.seen) == 3 + 1 + 2 * 2  # generation, embedding, and twice the two for any task


async def test_an_embedding_server_that_names_its_checkpoint(relay: Relay) -> None:
    engine = await relay.engine([answer(b'{"data":[],"model":"/models/secret path"}')], serve=False)
    relay.serve(replica(engine, backend="sglang"), task="embed")
    async with relay.connected() as client:
        client.send("POST", "/v1/embeddings", BODY)
        assert (await client.answer()).json["model"] == "demo"


async def test_lmdeploy_has_no_tokenizer_routes(relay: Relay) -> None:
    engine = await relay.engine(OK, backend="lmdeploy")
    async with relay.connected() as client:
        for path in ("/tokenize", "/detokenize"):
            client.send("POST", path, BODY)
            got = await client.answer()
            assert got.status == 404
            assert "lmdeploy has no such route" in got.error["message"]
    assert engine.seen == []
    assert relay.in_flight() == 0


async def test_errors_of_the_engine_in_openais_shape(relay: Relay) -> None:
    flat = json.dumps(
        {"object": "error", "message": "too long", "type": "BadRequest", "param": None, "code": 400}
    ).encode()
    await relay.engine([answer(flat, "400 Bad Request")], [answer(b'{"error":"Unauthorized"}', "401 Unauthorized")])
    got = await relay.ask()
    assert (got.status, got.error["message"]) == (400, "too long")
    assert (await relay.ask()).status == 502
    assert [entry.outcome for entry in relay.entries] == ["refused_by_engine", "engine_error"]
    assert relay.counted("tunegate_upstream_errors") == {("r0", "status"): 1}


async def test_a_disconnect_is_seen_while_requests_wait_in_the_pipe(relay: Relay) -> None:
    engine = await relay.engine([Hang()])
    async with relay.connected() as client:
        client.writer.write(REQUEST * 3)
        seen = await engine.request()
    await asyncio.wait_for(seen.gone.wait(), 1)
    await until(lambda: relay.in_flight() == 0)
    assert len(engine.seen) == 1


async def test_trailers_are_not_kept(relay: Relay) -> None:
    relay.serve(replica(9), keys={"0" * 64: Key("key-1", frozenset())})
    async with relay.connected() as client:
        client.writer.write(b"POST /v1/chat/completions HTTP/1.1\r\ntransfer-encoding: chunked\r\n\r\n0\r\n")
        assert (await client.answer()).status == 401
        [connection] = relay.server.connections
        for number in range(10):
            client.writer.write(b"t%d: %b\r\n" % (number, b"x" * 1_000))
        await until(lambda: connection._tail_bytes > 10_000)
        assert connection._headers == {}
        client.writer.write(b"\r\n")
        assert await client.closed()


async def test_a_body_that_waits_its_turn_is_not_gathered(relay: Relay) -> None:
    """Behind an answer that is not finished, a second body stays with its sender."""
    more = asyncio.Event()
    engine = await relay.engine([answer(b'{"first":1}')[:-5], more, b'rst":1}'[-5:]])
    async with relay.connected() as client:
        client.send("POST", CHAT, BODY)
        await engine.request()
        size = 8_000_000
        head = b'{"model":"demo","messages":"'
        client.writer.write(
            b"POST /v1/chat/completions HTTP/1.1\r\ncontent-length: %d\r\n\r\n" % (size + len(head) + 2)
        )
        client.writer.write(head + b"x" * size + b'"}')
        [connection] = relay.server.connections
        await until(lambda: not connection._transport.is_reading())
        assert sum(len(piece) for request in connection._waiting for piece in request.pieces) < 2_000_000
        more.set()
        assert (await client.answer()).status == 200
        assert (await client.answer()).status == 413


async def test_a_request_on_its_way_when_the_gateway_is_stopped(relay: Relay) -> None:
    """Its client cannot know yet, and cannot tell a connection that is closed now from a lost answer."""
    await relay.engine(OK)
    async with relay.connected() as client:
        client.chat()
        assert "connection" not in (await client.answer()).headers
        stopping = asyncio.create_task(stop(relay))
        await until(lambda: relay.server.draining)
        client.chat()
        got = await client.answer()
        assert (got.status, got.headers["connection"]) == (200, "close")
        assert await client.closed()
        await stopping


async def stop(relay: Relay) -> None:
    await relay.server.settle(0)
    await relay.server.drain(5)
