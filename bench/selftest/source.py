"""A stand-in for an engine that streams tokens on a known timeline, as cheaply as a Python process can.

It is no model of an engine: every stream starts after `ttft_ms` and goes on at `gap_ms`, whatever the load. It knows
the routes that load generators ask for: /v1/models, /tokenize, chat and plain completions, streamed or not.
"""

from __future__ import annotations

import heapq
import select
import socket
import sys
import time
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import click
import httptools
import msgspec

from bench.load.worker import raise_open_files

WORD = " word"
MODEL = "source"
_HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\ntransfer-encoding: chunked\r\n\r\n"
_IDENTITY = '"id":"chatcmpl-0123456789abcdef","object":"%s","created":1700000000,"model":"source"'


class Timeline(msgspec.Struct, frozen=True):
    """When a stream's events come, in milliseconds after the request was read."""

    ttft_ms: float = 5.0
    gap_ms: float = 20.0
    tokens_per_event: int = 1


class _Stream:
    """One answer under way."""

    __slots__ = ("chat", "due_s", "left", "number", "peer", "per_chunk", "prompt", "usage")

    def __init__(self, peer: _Peer, due_s: float, left: int, prompt: int, chat: bool, options: dict[str, Any]) -> None:
        self.peer, self.due_s, self.left, self.prompt, self.chat = peer, due_s, left, prompt, chat
        self.usage = bool(options.get("include_usage"))
        self.per_chunk = bool(options.get("continuous_usage_stats"))
        self.number = 0


class _Peer:
    """A connection and its request parser."""

    def __init__(self, sock: socket.socket, answer: Callable[[_Peer, str, bytes], None]) -> None:
        self.sock = sock
        self.unsent = b""
        self._answer = answer
        self._path = ""
        self._body = b""
        self.parser = httptools.HttpRequestParser(self)

    def on_message_begin(self) -> None:
        """Start a request."""
        self._path, self._body = "", b""

    def on_url(self, url: bytes) -> None:
        """Keep the path."""
        self._path += url.decode("latin-1")

    def on_body(self, body: bytes) -> None:
        """Keep the body."""
        self._body += body

    def on_message_complete(self) -> None:
        """Answer it."""
        self._answer(self, self._path, self._body)

    def send(self, data: bytes) -> None:
        """Send now, or keep what the socket does not take."""
        if self.unsent:
            self.unsent += data
            return
        try:
            sent_bytes = self.sock.send(data)
        except BlockingIOError:
            sent_bytes = 0
        if sent_bytes < len(data):
            self.unsent = data[sent_bytes:]


class Source:
    """The server: one thread, one epoll set, one heap of what is due."""

    def __init__(self, port: int, timeline: Timeline) -> None:
        self._timeline = timeline
        self._listener = socket.create_server(("127.0.0.1", port), backlog=4096)
        self._listener.setblocking(False)
        self._epoll = select.epoll()
        self._epoll.register(self._listener.fileno(), select.EPOLLIN)
        self._peers: dict[int, _Peer] = {}
        self._due: list[tuple[float, int, _Stream]] = []
        self._count = 0

    @property
    def url(self) -> str:
        """Where it listens."""
        return f"http://127.0.0.1:{self._listener.getsockname()[1]}"

    def serve(self) -> None:
        """Serve until killed."""
        while True:
            now_s = time.monotonic()
            while self._due and self._due[0][0] <= now_s:
                self._step(heapq.heappop(self._due)[2])
            wait_s = self._due[0][0] - time.monotonic() if self._due else 1.0
            # epoll counts in milliseconds, select does not
            select.select([self._epoll], [], [], max(0.0, wait_s))
            for fd, mask in self._epoll.poll(0):
                self._ready(fd, mask)

    def _ready(self, fd: int, mask: int) -> None:
        if fd == self._listener.fileno():
            self._accept()
            return
        peer = self._peers[fd]
        try:
            if mask & select.EPOLLOUT:
                data, peer.unsent = peer.unsent, b""
                peer.send(data)
                if not peer.unsent:
                    self._epoll.modify(fd, select.EPOLLIN)
            if mask & (select.EPOLLIN | select.EPOLLHUP | select.EPOLLERR):
                data = peer.sock.recv(1 << 20)
                if not data:
                    raise ConnectionResetError
                peer.parser.feed_data(data)
        except (ConnectionError, httptools.HttpParserError):
            self._drop(fd, peer)

    def _accept(self) -> None:
        for _ in range(256):
            try:
                sock, _ = self._listener.accept()
            except BlockingIOError:
                return
            sock.setblocking(False)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._peers[sock.fileno()] = _Peer(sock, self._answer)
            self._epoll.register(sock.fileno(), select.EPOLLIN)

    def _drop(self, fd: int, peer: _Peer) -> None:
        del self._peers[fd]
        peer.sock.close()

    def _answer(self, peer: _Peer, path: str, body: bytes) -> None:
        path = path.partition("?")[0]
        if path in ("/v1/chat/completions", "/v1/completions"):
            self._complete(peer, msgspec.json.decode(body), path == "/v1/chat/completions")
        elif path == "/v1/models":
            _json(peer, {"object": "list", "data": [{"id": MODEL, "object": "model", "max_model_len": 1 << 20}]})
        elif path == "/tokenize":
            count = len(str(msgspec.json.decode(body).get("prompt", "")).split())
            _json(peer, {"count": count, "max_model_len": 1 << 20, "tokens": []})
        elif path == "/health":
            _json(peer, {})
        else:
            _json(peer, {"error": {"message": f"no route {path}"}}, "404 Not Found")

    def _complete(self, peer: _Peer, asked: dict[str, Any], chat: bool) -> None:
        left = int(asked.get("max_tokens") or asked.get("max_completion_tokens") or 16)
        prompt = _prompt_tokens(asked)
        if not asked.get("stream"):
            message = {"message": {"role": "assistant", "content": WORD * left}} if chat else {"text": WORD * left}
            _json(
                peer,
                {
                    "id": "c",
                    "object": "chat.completion" if chat else "text_completion",
                    "created": 1700000000,
                    "model": MODEL,
                    "choices": [{"index": 0, "finish_reason": "length", **message}],
                    "usage": {"prompt_tokens": prompt, "completion_tokens": left, "total_tokens": prompt + left},
                },
            )
            return
        due_s = time.monotonic() + self._timeline.ttft_ms / 1e3
        stream = _Stream(peer, due_s, left, prompt, chat, asked.get("stream_options") or {})
        peer.send(_HEAD + (_chunk(_event(chat, "", '{"role":"assistant","content":""}')) if chat else b""))
        self._push(stream)

    def _push(self, stream: _Stream) -> None:
        self._count += 1
        heapq.heappush(self._due, (stream.due_s, self._count, stream))

    def _step(self, stream: _Stream) -> None:
        peer, timeline = stream.peer, self._timeline
        tokens = min(stream.left, timeline.tokens_per_event)
        stream.left -= tokens
        stream.number += tokens
        stated = (stream.prompt, stream.number) if stream.per_chunk else None
        data = _frame(stream.chat, tokens, stated)
        if not stream.left:
            data += _chunk(_event(stream.chat, "", "{}", finish='"length"'))
            if stream.usage:
                data += _chunk(b"data: {" + _identity(stream.chat) + _usage_only(stream.prompt, stream.number))
            data += _chunk(b"data: [DONE]\n\n") + b"0\r\n\r\n"
        try:
            peer.send(data)
        except OSError:  # the reader is gone
            return
        if peer.unsent and peer.sock.fileno() >= 0:
            self._epoll.modify(peer.sock.fileno(), select.EPOLLIN | select.EPOLLOUT)
        if stream.left:
            stream.due_s += timeline.gap_ms / 1e3
            self._push(stream)


def _prompt_tokens(asked: dict[str, Any]) -> int:
    texts = [asked.get("prompt") or ""] + [message.get("content") or "" for message in asked.get("messages", [])]
    return sum(len(text.split()) if isinstance(text, str) else len(text) for text in texts)


def _chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


def _identity(chat: bool) -> bytes:
    return (_IDENTITY % ("chat.completion.chunk" if chat else "text_completion")).encode()


def _event(chat: bool, text: str, delta: str | None = None, usage: str = "", finish: str = "null") -> bytes:
    held = f'"delta":{delta or f"""{{"content":"{text}"}}"""}' if chat else f'"text":"{text}"'
    body = f'"choices":[{{"index":0,{held},"logprobs":null,"finish_reason":{finish}}}]{usage}'
    return b"data: {" + _identity(chat) + f",{body}}}\n\n".encode()


@lru_cache(maxsize=1 << 16)
def _frame(chat: bool, tokens: int, stated: tuple[int, int] | None) -> bytes:
    """An event with tokens as it goes on the wire; equal ones are made once, so that the source keeps its timeline."""
    return _chunk(_event(chat, WORD * tokens, None, "" if stated is None else _usage(*stated)))


def _usage(prompt: int, tokens: int) -> str:
    return f',"usage":{{"prompt_tokens":{prompt},"total_tokens":{prompt + tokens},"completion_tokens":{tokens}}}'


def _usage_only(prompt: int, tokens: int) -> bytes:
    return f',"choices":[]{_usage(prompt, tokens)}}}\n\n'.encode()


def _json(peer: _Peer, payload: Any, status: str = "200 OK") -> None:
    body = msgspec.json.encode(payload)
    head = f"HTTP/1.1 {status}\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
    peer.send(head.encode() + body)


@click.command()
@click.option("--port", default=0)
@click.option("--ttft-ms", default=5.0)
@click.option("--gap-ms", default=20.0)
@click.option("--tokens-per-event", default=1)
def main(port: int, ttft_ms: float, gap_ms: float, tokens_per_event: int) -> None:
    """Serve a known timeline; prints `ready URL`."""
    raise_open_files()
    source = Source(port, Timeline(ttft_ms, gap_ms, tokens_per_event))
    sys.stdout.write(f"ready {source.url}\n")
    sys.stdout.flush()
    source.serve()


if __name__ == "__main__":
    main()
