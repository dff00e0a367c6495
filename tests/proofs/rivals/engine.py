"""The engine that every gateway stands before: it answers at once, at the pace that the prompt names (`pace=turns;`).

    python -m tests.proofs.rivals.engine PORT [PORT ...]      one process, as many replicas as ports

The prompt is the one thing that all gateways pass on as it is. What a chat costs here is the same whichever gateway
asked; the process's CPU is not the gateway's.
"""

from __future__ import annotations

import asyncio
import sys
from typing import ClassVar

import httptools
import msgspec
import uvloop

CHUNKS = 64
TICK_S = 0.010  # of the pace "ticks": a step of a batching engine gives each of its streams one token
ERROR_EVERY = 100  # requests, at the pace "errors"
MODELS = ("demo", "french")

_HEAD = b"HTTP/1.1 200 OK\r\ndate: Sat, 22 Nov 2025 02:00:00 GMT\r\nserver: uvicorn\r\n"
_JSON = b"content-type: application/json\r\ncontent-length: %d\r\n\r\n"
_EVENTS = b"content-type: text/event-stream; charset=utf-8\r\ntransfer-encoding: chunked\r\n\r\n"
_USAGE = b'"usage":{"prompt_tokens":20,"total_tokens":84,"completion_tokens":64}'
_ERROR = b'{"error":{"message":"CUDA error: an illegal memory access","type":"InternalServerError","code":500}}'


class _Options(msgspec.Struct):
    include_usage: bool = False


class _Chat(msgspec.Struct):
    model: str
    stream: bool = False
    stream_options: _Options | None = None


_decode = msgspec.json.Decoder(_Chat).decode


class Replica(asyncio.Protocol):
    """One connection to it."""

    streams: ClassVar[
        dict[Replica, list[bytes]]
    ] = {}  # at the pace "ticks": what each has still to say, last piece first
    answered = 0

    def __init__(self) -> None:
        self.pieces: list[bytes] = []
        self.on_body = self.pieces.append
        self.parser = httptools.HttpRequestParser(self)
        self.url = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport

    def connection_lost(self, error: Exception | None) -> None:
        self.streams.pop(self, None)

    def data_received(self, data: bytes) -> None:
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserError:
            self.transport.close()  # some gateways try whether an engine speaks gRPC

    def on_url(self, url: bytes) -> None:
        self.url = url

    def on_message_complete(self) -> None:
        body = b"".join(self.pieces)
        self.pieces.clear()
        if not self.url.startswith(b"/v1/chat"):
            self._json(_about(self.url))
            return
        chat = _decode(body)
        Replica.answered += 1
        at = body.find(b"pace=") + 5
        pace = body[at : body.index(b";", at)].decode() if at > 5 else "together"
        if pace == "errors" and Replica.answered % ERROR_EVERY == 0:
            self.transport.write(b"HTTP/1.1 500 Internal Server Error\r\n" + _JSON % len(_ERROR) + _ERROR)
        elif not chat.stream:
            self._json(_answer(chat.model.encode()))
        else:
            usage = chat.stream_options is not None and chat.stream_options.include_usage
            self._stream(_pieces(chat.model.encode(), usage), pace)

    def _json(self, body: bytes) -> None:
        self.transport.write(_HEAD + _JSON % len(body) + body)

    def _stream(self, pieces: list[bytes], pace: str) -> None:
        self.transport.write(_HEAD + _EVENTS)
        if pace == "together":
            self.transport.write(b"".join(pieces))
        elif pace == "ticks":
            self.streams[self] = pieces[::-1]
        else:
            self._by_turns(pieces[::-1])

    def _by_turns(self, left: list[bytes]) -> None:
        """A write a piece, each in a turn of the loop."""
        if not self.transport.is_closing():
            self.transport.write(left.pop())
            if left:
                asyncio.get_running_loop().call_soon(self._by_turns, left)


def _answer(model: bytes) -> bytes:
    return (
        b'{"id":"chatcmpl-0123456789abcdef","object":"chat.completion","created":1763769600,"model":"%b",'
        b'"choices":[{"index":0,"message":{"role":"assistant","content":"%b","refusal":null},"logprobs":null,'
        b'"finish_reason":"stop"}],%b}'
    ) % (model, b" token" * 16, _USAGE)


def _pieces(model: bytes, usage: bool) -> list[bytes]:
    """A stream as it stands on the wire, a piece a chunk."""
    head = (
        b'data: {"id":"chatcmpl-0123456789abcdef","object":"chat.completion.chunk","created":1763769600,"model":"%b",'
        % model
    )
    token = head + b'"choices":[{"index":0,"delta":{"content":" token"},"logprobs":null,"finish_reason":null}]}\n\n'
    events = [token] * CHUNKS
    if usage:
        events.append(head + b'"choices":[],' + _USAGE + b"}\n\n")
    events.append(b"data: [DONE]\n\n")
    return [b"%x\r\n%b\r\n" % (len(event), event) for event in events] + [b"0\r\n\r\n"]


def answer_bytes(model: bytes) -> bytes:
    """A whole answer as it stands on the wire."""
    body = _answer(model)
    return _HEAD + _JSON % len(body) + body


def stream_bytes(model: bytes, usage: bool) -> list[bytes]:
    """A stream as it stands on the wire: its head, then a piece a write."""
    return [_HEAD + _EVENTS, *_pieces(model, usage)]


def _about(url: bytes) -> bytes:
    """What gateways ask an engine before they trust it."""
    if url.startswith(b"/v1/models"):
        return msgspec.json.encode({"object": "list", "data": [{"id": name, "object": "model"} for name in MODELS]})
    return b'{"status":"ok","model_path":"demo","served_model_name":"demo","is_generation":true,"version":"0.32.0"}'


async def _serve(ports: list[int]) -> None:
    loop = asyncio.get_running_loop()

    def tick() -> None:
        loop.call_later(TICK_S, tick)
        for replica, left in list(Replica.streams.items()):
            if not replica.transport.is_closing():
                replica.transport.write(left.pop())
            if not left:
                Replica.streams.pop(replica, None)

    tick()
    servers = [await loop.create_server(Replica, "127.0.0.1", port, backlog=2048) for port in ports]
    await asyncio.gather(*(server.serve_forever() for server in servers))


if __name__ == "__main__":
    uvloop.run(_serve([int(port) for port in sys.argv[1:]]))
