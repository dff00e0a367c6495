"""A server that plays timelines: the truth that the client's readings are held against."""

from __future__ import annotations

import json
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field

Step = tuple[float, bytes]  # (milliseconds after the request was read, raw bytes)


def event(payload: object) -> bytes:
    data = payload if isinstance(payload, str) else json.dumps(payload)
    return f"data: {data}\n\n".encode()


def chunk(
    content: str | None = None, *, role: bool = False, finish: str | None = None, tokens: int | None = None
) -> bytes:
    delta: dict[str, object] = {"role": "assistant", "content": ""} if role else {}
    if content is not None:
        delta["content"] = content
    body: dict[str, object] = {
        "id": "chatcmpl-1",
        "object": "chat.completion.chunk",
        "created": 1,
        "model": "m",
        "choices": [{"index": 0, "delta": delta, "finish_reason": finish}],
    }
    if tokens is not None:
        body["usage"] = {"prompt_tokens": 5, "completion_tokens": tokens, "total_tokens": tokens + 5}
    return event(body)


def usage(tokens: int, cached: int | None = None) -> bytes:
    details = {} if cached is None else {"prompt_tokens_details": {"cached_tokens": cached}}
    return event(
        {
            "id": "c",
            "object": "chat.completion.chunk",
            "choices": [],
            "usage": {"prompt_tokens": 5, "completion_tokens": tokens, **details},
        }
    )


DONE = b"data: [DONE]\n\n"
HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\ntransfer-encoding: chunked\r\n\r\n"
END = b"0\r\n\r\n"


def http_chunk(data: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(data), data)


def golden(per_chunk_usage: bool = True, content_chunks: int = 25) -> list[Step]:
    """The known timeline: role at 20 ms, 4 tokens every 40 ms from 200 ms, finish at 1161, usage at 1165."""
    steps: list[Step] = [(0.5, HEAD), (20, http_chunk(chunk(role=True, tokens=0 if per_chunk_usage else None)))]
    for k in range(content_chunks):
        tokens = 4 * (k + 1) if per_chunk_usage else None
        steps.append((200 + 40 * k, http_chunk(chunk("four words are here ", tokens=tokens))))
    return steps


def golden_end() -> list[Step]:
    return [
        (1161, http_chunk(chunk(finish="length"))),
        (1165, http_chunk(usage(100))),
        (1166, http_chunk(DONE) + END),
    ]


@dataclass
class Played:
    """One request as the server saw it; times are monotonic ns at which each step was sent."""

    request: bytes
    received_ns: int
    sent_ns: list[int] = field(default_factory=list)


@dataclass
class ScriptedServer:
    url: str
    played: list[Played]


@contextmanager
def scripted(
    script: Callable[[int, bytes], list[Step]],
    close_after: Callable[[int], bool] = lambda n: False,
    tls: ssl.SSLContext | None = None,
) -> Iterator[ScriptedServer]:
    """Serve `script(request number, request bytes)` to every request; after some, close the connection."""
    listener = socket.create_server(("127.0.0.1", 0), backlog=256)
    server = ScriptedServer(f"{'https' if tls else 'http'}://127.0.0.1:{listener.getsockname()[1]}", [])
    lock = threading.Lock()
    stop = threading.Event()
    threads: list[threading.Thread] = []
    connections: list[socket.socket] = []

    def serve(accepted: socket.socket) -> None:
        with tls.wrap_socket(accepted, server_side=True) if tls else accepted as connection:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            buffer = b""
            while not stop.is_set():
                try:
                    buffer, request = read_request(connection, buffer)
                except OSError:
                    return
                if request is None:
                    return
                with lock:
                    number = len(server.played)
                    played = Played(request, time.monotonic_ns())
                    server.played.append(played)
                try:
                    play(connection, script(number, request), played)
                except OSError:
                    return
                if close_after(number):
                    return

    def play(connection: socket.socket, steps: list[Step], played: Played) -> None:
        for at_ms, data in steps:
            wait_s = played.received_ns / 1e9 + at_ms / 1e3 - time.monotonic()
            if wait_s > 0 and stop.wait(max(0.0, wait_s - 0.002)):
                return
            while time.monotonic_ns() < played.received_ns + at_ms * 1e6:
                time.sleep(0.0001)
            played.sent_ns.append(time.monotonic_ns())
            connection.sendall(data)

    def accept() -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            connections.append(connection)
            thread = threading.Thread(target=serve, args=(connection,), daemon=True)
            threads.append(thread)
            thread.start()

    acceptor = threading.Thread(target=accept, daemon=True)
    acceptor.start()
    try:
        yield server
    finally:
        stop.set()
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        acceptor.join(5)
        for connection in connections:
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        for thread in threads:
            thread.join(5)


def read_request(connection: socket.socket, buffer: bytes) -> tuple[bytes, bytes | None]:
    """(left over, one whole request), None at the end of the stream."""
    while True:
        head, separator, rest = buffer.partition(b"\r\n\r\n")
        if separator:
            length = 0
            for line in head.split(b"\r\n"):
                if line.lower().startswith(b"content-length:"):
                    length = int(line.split(b":")[1])
            if len(rest) >= length:
                return rest[length:], head + b"\r\n\r\n" + rest[:length]
        data = connection.recv(65536)
        if not data:
            return buffer, None
        buffer += data


def plain(status: str, body: bytes, headers: str = "") -> bytes:
    return (
        f"HTTP/1.1 {status}\r\ncontent-type: application/json\r\n{headers}content-length: {len(body)}\r\n\r\n".encode()
        + body
    )
