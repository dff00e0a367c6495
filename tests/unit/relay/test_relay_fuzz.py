"""What hostile or merely odd bytes do to the relay: nothing breaks, nothing is smuggled, nothing is injected.

`TUNEGATE_FUZZ=20000 python -m pytest tests/unit/relay/test_relay_fuzz.py --timeout 0` runs it for as long as one likes.
"""

from __future__ import annotations

import itertools
import json
import os
import re
from types import SimpleNamespace
from typing import Any

import httptools
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from relay_harness import Relay
from scripted_upstream import DONE, answer, completion, event, token, usage

from gateway.relay.client import ClientConnection
from gateway.relay.http import Request, request_id
from gateway.relay.sse import EventStream
from gateway.relay.upstream import Connection, Origin

EXAMPLES = int(os.environ.get("TUNEGATE_FUZZ", "150"))
fuzz = settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck))


class Wire:
    """A transport that keeps what is written."""

    def __init__(self) -> None:
        self.written = b""
        self.closed = False

    def write(self, data: bytes) -> None:
        self.written += data

    def writelines(self, parts: list[bytes]) -> None:
        self.written += b"".join(parts)

    def is_closing(self) -> bool:
        return self.closed

    def close(self) -> None:
        self.closed = True

    abort = close

    def pause_reading(self) -> None: ...

    def resume_reading(self) -> None: ...


class Echo:
    """Takes a request's body and answers when it is complete."""

    def __init__(self, seen: list[tuple[bytes, bytes, bytes]], client: ClientConnection, request: Request) -> None:
        self.seen, self.client, self.request, self.data = seen, client, request, b""

    def body(self, data: bytes) -> None:
        self.data += data

    def body_end(self) -> None:
        self.seen.append((self.request.method, self.request.target, self.data))
        self.client.answer(200, b"", b"ok")

    def client_gone(self) -> None: ...

    client_paused = client_resumed = tick = stop = client_gone


def served(pieces: list[bytes]) -> tuple[list[tuple[bytes, bytes, bytes]], bytes, bool]:
    """(requests that came through, what was answered, whether the connection was closed)."""
    seen: list[tuple[bytes, bytes, bytes]] = []
    turns: list[Any] = []
    server: Any = SimpleNamespace(
        draining=False,
        connections=set(),
        forget=lambda connection: None,
        loop=SimpleNamespace(call_soon=turns.append),
        handle=lambda client, request: Echo(seen, client, request),
    )
    connection, wire = ClientConnection(server), Wire()
    connection.connection_made(wire)
    for piece in pieces:
        if wire.closed:
            break
        connection.data_received(piece)
        while turns:
            turns.pop(0)()
    return seen, wire.written, wire.closed


def cut(data: bytes, places: list[int]) -> list[bytes]:
    at = sorted({place % (len(data) + 1) for place in places} | {0, len(data)})
    return [data[start:end] for start, end in itertools.pairwise(at)]


# Requests

LINES = st.sampled_from(
    [
        b"content-length: 5", b"Content-Length: 3", b"content-length: 0", b"content-length: +5",
        b"content-length: 5, 5",
        b"content-length : 5", b"content-length: 0x5", b"content-length: -1", b"content-length:", b"content-length: 99",
        b"transfer-encoding: chunked", b"Transfer-Encoding: chunked", b"transfer-encoding: xchunked",
        b"transfer-encoding: chunked, identity", b"transfer-encoding: identity", b"transfer-encoding : chunked",
        b"transfer-encoding:\x0bchunked", b"transfer-encoding: gzip, chunked", b" folded: chunked", b"\tfolded",
        b"x-request-id: a\x00b", b"x-request-id: ok-1", b"connection: close", b"connection: upgrade",
        b"upgrade: h2c", b"expect: 100-continue", b"host: a", b"no colon at all", b": no name", b"x\x00y: z",
        b"x" * 70_000 + b": y", b"x: " + b"y" * 70_000,
    ]
)  # fmt: skip
ENDS = st.sampled_from([b"\r\n", b"\r\n", b"\r\n", b"\r\n", b"\n", b"\r", b"\r\r\n"])
STARTS = st.sampled_from(
    [b"POST /v1/chat/completions HTTP/1.1", b"POST /a HTTP/1.1", b"GET /b HTTP/1.1", b"POST /c HTTP/1.0",
     b"GET  /d HTTP/1.1", b"GET /e", b"get /f HTTP/1.1", b"GET /g HTTP/9.9", b"CONNECT x:1 HTTP/1.1", b"\x16\x03\x01"]
)  # fmt: skip
BODIES = st.sampled_from(
    [b"", b"hello", b"5\r\nhello\r\n0\r\n\r\n", b"5;ext=1\r\nhello\r\n0\r\n\r\n", b"5\nhello\n0\n\n", b"g\r\nhello\r\n",
     b"-5\r\nhello\r\n0\r\n\r\n", b"5\r\nhello0\r\n\r\n", b"0\r\n\r\nGET /smuggled HTTP/1.1\r\nhost: a\r\n\r\n",
     b"fffffffffffffffff\r\n", b"5\r\nhello\r\n0\r\ntrailer: x\r\n\r\n"]
)  # fmt: skip


@st.composite
def messages(draw: st.DrawFn) -> bytes:
    """One or two requests, most of them broken."""
    out = b""
    for _ in range(draw(st.integers(1, 2))):
        out += draw(STARTS) + draw(ENDS)
        for line in draw(st.lists(LINES, max_size=4)):
            out += line + draw(ENDS)
        out += draw(ENDS) + draw(BODIES)
    return out


@fuzz
@given(messages(), st.lists(st.integers(0, 100_000), max_size=5))
def test_any_bytes_are_served_or_refused_however_they_are_cut(data: bytes, places: list[int]) -> None:
    whole = served([data])
    parts = served(cut(data, places))
    limit = 60_000  # a head near the limit may pass or not, depending on how it is cut
    if len(data) < limit:
        assert [request[1:] for request in parts[0]] == [request[1:] for request in whole[0]]
        assert statuses(parts[1]) == statuses(whole[1])
    for status in statuses(whole[1]):
        assert status in (100, 200, 400)


def statuses(written: bytes) -> list[int]:
    return [int(found) for found in re.findall(rb"HTTP/1\.1 (\d{3}) ", written)]


@fuzz
@given(st.binary(max_size=400), st.lists(st.integers(0, 400), max_size=4))
def test_noise_is_refused(data: bytes, places: list[int]) -> None:
    served(cut(data, places))


class Patient(Echo):
    """Answers when it is told to."""

    def body_end(self) -> None:
        self.seen.append((self.request.method, self.request.target, self.data))


def patient() -> tuple[ClientConnection, Wire, list[Any], list[tuple[bytes, bytes, bytes]]]:
    """A connection, what it wrote, the turns of the loop that it asked for, and the requests that were handled."""
    seen: list[tuple[bytes, bytes, bytes]] = []
    turns: list[Any] = []
    server: Any = SimpleNamespace(
        draining=False,
        connections=set(),
        loop=SimpleNamespace(call_soon=turns.append),
        handle=lambda client, request: Patient(seen, client, request),
    )
    connection, wire = ClientConnection(server), Wire()
    connection.connection_made(wire)
    return connection, wire, turns, seen


def test_a_request_that_comes_between_two_turns_waits_for_its_own() -> None:
    """The first has its answer, the second waits for the loop to come round, and the third arrives before it does."""
    connection, wire, turns, seen = patient()
    for target in (b"/1", b"/2"):
        connection.data_received(b"GET %b HTTP/1.1\r\nx-request-id: %b\r\n\r\n" % (target, target[1:]))
    connection.answer(200, b"", b"")
    connection.data_received(b"GET /3 HTTP/1.1\r\nx-request-id: 3\r\n\r\n")
    while turns or len(seen) < 3:
        turns.pop(0)()
        connection.answer(200, b"", b"")
    assert [target for _, target, _ in seen] == [b"/1", b"/2", b"/3"]
    assert re.findall(rb"x-request-id: (.)", wire.written) == [b"1", b"2", b"3"]


def test_what_is_no_request_is_not_answered_in_the_place_of_one() -> None:
    """The second request waits for its turn; its client must not take the refusal for its answer."""
    connection, wire, turns, _ = patient()
    connection.data_received(b"GET /1 HTTP/1.1\r\n\r\nGET /2 HTTP/1.1\r\n\r\n")
    connection.answer(200, b"", b"")
    connection.data_received(b"nonsense\r\n\r\n")
    turns.pop(0)()
    assert statuses(wire.written) == [200]
    assert wire.closed


SMUGGLED = b"GET /smuggled HTTP/1.1\r\nhost: a\r\n\r\n"


@pytest.mark.parametrize(
    "head",
    [
        b"content-length: 6\r\ntransfer-encoding: chunked",
        b"transfer-encoding: chunked\r\ncontent-length: 6",
        b"content-length: 4\r\ncontent-length: 6",
        b"content-length: 6\r\nContent-Length: 6",
        b"content-length: 4, 6",
        b"content-length: +6",
        b"content-length: 0x6",
        b"content-length: -6",
        b"content-length : 6",
        b"content-length: 6\r\n folded: yes",
        b"transfer-encoding: xchunked",
        b"transfer-encoding: chunked, identity",
        b"transfer-encoding : chunked",
        b"transfer-encoding:\x0bchunked",
        b"transfer-encoding: chunked\r\ntransfer-encoding: identity",
        b"content-length: 6\x00",
        b"content-length: 6\rx: y",
        b"x: y\r\n\x20content-length: 6",
    ],
)
def test_a_head_of_two_meanings_carries_no_second_request(head: bytes) -> None:
    for body in (b"0\r\n\r\nX", b"0\r\n\r\n" + SMUGGLED, SMUGGLED):
        seen, _, closed = served([b"POST /a HTTP/1.1\r\nhost: a\r\n" + head + b"\r\n\r\n" + body])
        assert closed or not any(target == b"/smuggled" for _, target, _ in seen), head
        assert not any(target == b"/smuggled" for _, target, _ in seen), head


@pytest.mark.parametrize(
    "body", [b"5\r\nhello0\r\n\r\n", b"g\r\n", b"-1\r\n", b"5\nhello\r\n0\r\n\r\n", b"0x5\r\nhello\r\n"]
)
def test_chunks_that_are_none_are_refused(body: bytes) -> None:
    seen, written, closed = served([b"POST /a HTTP/1.1\r\ntransfer-encoding: chunked\r\n\r\n" + body + SMUGGLED])
    assert closed
    assert seen == []
    assert statuses(written) in ([400], [])


# Injection

HEADERS = st.binary(max_size=60)


@fuzz
@given(HEADERS)
def test_a_request_id_is_passed_on_or_replaced(sent: bytes) -> None:
    id = request_id(sent)
    assert re.fullmatch(rb"[A-Za-z0-9._-]{1,64}", id)


@pytest.mark.parametrize(
    "evil", [b"a\r\nx-evil: 1", b"a\nx-evil: 1", b"a\x00", b"a\rx-evil: 1", b"\xff\xfe", b"a" * 5000]
)
@pytest.mark.parametrize(
    "name", ["x-request-id", "traceparent", "x-session-id", "authorization", "x-stainless-retry-count"]
)
async def test_header_values_reach_neither_engine_nor_client(relay: Relay, evil: bytes, name: str) -> None:
    engine = await relay.engine([answer(completion())])
    client = await relay.client()
    body = json.dumps({"model": "demo", "messages": [{"role": "user", "content": "hi"}]}).encode()
    client.writer.write(
        b"POST /v1/chat/completions HTTP/1.1\r\nhost: a\r\n%b: %b\r\ncontent-length: %d\r\n\r\n%b"
        % (name.encode(), evil, len(body), body)
    )
    status, headers = await client.head()
    assert status in (200, 400)
    assert "x-evil" not in headers
    for seen in engine.seen:
        assert "x-evil" not in seen.headers
        assert evil.decode("latin-1") not in seen.head


@pytest.mark.parametrize(
    "model", ["a\r\nx-evil: 1", "a\x00b", "a\nb", '"', "\\", "\u2028", "\ud83d\ude00", "../../x", "%0d%0a"]
)
async def test_model_names_stay_in_the_body(relay: Relay, model: str) -> None:
    engine = await relay.engine([answer(completion())])
    async with relay.connected() as client:
        client.chat(model=model)
        result = await client.answer()
    assert result.status == 404
    assert result.error["code"] in ("model_not_found", None)
    assert "x-evil" not in result.headers
    assert engine.seen == []


# Streams

TEXT = st.text(max_size=20) | st.sampled_from(
    ['"usage":null', '"usage":{', "data: [DONE]", "\r\n\r\n", 'data: {"error"', '"model":"a-0123456789ab"', "}\n\n"]
)
NAME = "a-0123456789ab"
RENAME = (re.compile(rb'"model":\s*"a\-0123456789ab"'), b'"model":"french"')


def spaced(data: bytes) -> bytes:
    """The same event as an engine writes it that leaves spaces."""
    return b"data: " + json.dumps(json.loads(data[6:])).encode() + b"\n\n"


def with_null(data: bytes) -> bytes:
    return data.replace(b"}\n\n", b',"usage":null}\n\n')


EVENTS = st.lists(
    st.one_of(
        TEXT.map(lambda text: token(text, NAME)),
        TEXT.map(lambda text: with_null(token(text, NAME))),
        TEXT.map(lambda text: spaced(token(text, NAME))),
        TEXT.map(lambda text: spaced(with_null(token(text, NAME)))),
        TEXT.map(lambda text: token(text, NAME).replace(b"\n\n", b"\r\n\r\n")),
        st.just(b": a comment\n\n"),
        st.just(usage(3, 4, NAME)),
        TEXT.map(lambda text: event(choices=[{"delta": {"content": text}}], usage={"prompt_tokens": 1})),
    ),
    max_size=8,
)


@fuzz
@given(EVENTS, st.booleans(), st.booleans(), st.booleans(), st.lists(st.integers(0, 5000), max_size=8))
def test_a_stream_comes_out_the_same_however_it_is_cut(
    events: list[bytes], done: bool, keep_usage: bool, rename: bool, places: list[int]
) -> None:
    data = b"".join(events) + (DONE if done else b"")
    outs = []
    for pieces in (
        [data],
        cut(data, places),
        [one for one in events + [DONE] * done if one],
        [data[i : i + 1] for i in range(len(data))],
    ):
        stream = EventStream(keep_usage, RENAME if rename else None)
        out = b"".join(stream.feed(piece) for piece in pieces if piece)
        outs.append((out, stream.done, stream.events, stream.usage))
    assert all(other == outs[0] for other in outs[1:])
    assert outs[0][1] is done
    texts = [json.loads(part[6:]) for part in outs[0][0].split(b"\n\n") if part.startswith(b"data: {")]
    for text in texts:
        assert keep_usage or "usage" not in text
        assert not rename or text.get("model") in ("french", None)


class Sink:
    """Keeps what an upstream connection tells."""

    def __init__(self) -> None:
        self.body = b""
        self.ended = ""

    def upstream_head(self, status: int, headers: dict[bytes, bytes]) -> None: ...

    def upstream_data(self, data: bytes) -> None:
        self.body += data

    def upstream_end(self) -> None:
        self.ended = "end"

    def upstream_lost(self, reason: str) -> None:
        self.ended = "lost"


PAYLOADS = st.lists(
    st.sampled_from(
        [
            b"data: a\n\n",
            b"\n\n",
            b"5\n\n",
            b"x\n\n\r\n",
            b"\r\n\n\n",
            b"a",
            b"5\r\nhello\n\n\r\n",
            b"0\r\n\r\n",
            b"\n\n\r\n",
        ]
    )
    | st.binary(min_size=1, max_size=30),
    max_size=8,
)


class Plain:
    """The same by the parser alone."""

    def __init__(self) -> None:
        self.body = b""
        self.complete = False

    def on_body(self, data: bytes) -> None:
        self.body += data

    def on_message_complete(self) -> None:
        self.complete = True


@fuzz
@given(PAYLOADS, st.booleans(), st.booleans(), st.binary(max_size=6), st.lists(st.integers(0, 3000), max_size=10))
def test_chunks_are_read_as_the_parser_reads_them(
    payloads: list[bytes], upper: bool, ended: bool, junk: bytes, places: list[int]
) -> None:
    """The way round the parser that whole chunks take must never see what the parser would not."""
    size = b"%X" if upper else b"%x"
    head = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n"
    chunks = [size % len(payload) + b"\r\n" + payload + b"\r\n" for payload in payloads]
    tail = [b"0\r\n\r\n"] if ended else [junk] if junk else []
    for pieces in ([head, *chunks, *tail], cut(b"".join([head, *chunks, *tail]), places)):
        plain = Plain()
        parser = httptools.HttpResponseParser(plain)
        broken = False
        for piece in pieces:
            try:
                parser.feed_data(piece)
            except httptools.HttpParserError:
                broken = True
                break
        connection, wire, sink = Connection(Origin("none", SimpleNamespace())), Wire(), Sink()  # type: ignore[arg-type]
        connection.connection_made(wire)
        connection.send(sink, [b"x"])  # type: ignore[arg-type]
        for piece in pieces:
            if piece and not wire.closed:
                connection.data_received(piece)
        assert plain.body.startswith(sink.body) if broken else sink.body == plain.body
        assert (sink.ended == "end") == (plain.complete and not broken)
        if broken:
            assert sink.ended == "lost"
