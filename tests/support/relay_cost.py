"""What a relayed request costs: CPU of one relay process a request, everything on (keys, metrics, log, usage).

    python -m tests.support.relay_cost [--only WORD ...] [--seconds S] [--under PROFILER]

A scripted engine, a stand-in for control and the load run beside the relay, each in a process of its own.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import multiprocessing
import os
import socket
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import httptools
import msgspec
import uvloop

from gateway.snapshot import Key, Model, Replica, Snapshot
from tests.support.openai_request import chat_request

KEY = "sk-relay-cost-0123456789abcdef"
CHUNKS = 64
HEAD = b"HTTP/1.1 200 OK\r\ndate: Sat, 22 Nov 2025 02:00:00 GMT\r\nserver: uvicorn\r\n"
JSON = b"content-type: application/json\r\ncontent-length: %d\r\n\r\n"
EVENTS = b"content-type: text/event-stream; charset=utf-8\r\ntransfer-encoding: chunked\r\n\r\n"
ADAPTER, ADAPTER_ID = "french", "a-0123456789ab"


@dataclass(frozen=True)
class Mode:
    """A kind of traffic. gap_ms: between an engine's chunks; None: each in a turn of its loop; 0: all at once."""

    name: str
    stream: bool = False
    gap_ms: float | None = 0
    model: str = "demo"
    prompt_chars: int = 60
    connections: int = 16


MODES = (
    Mode("json"),
    Mode("json, 1 connection", connections=1),
    Mode("json, adapter", model=ADAPTER),
    Mode("json, 100 KB prompt", prompt_chars=100_000),
    Mode("stream, chunks at once", stream=True),
    Mode("stream, chunks by turns", stream=True, gap_ms=None),
    Mode("stream, adapter, by turns", stream=True, gap_ms=None, model=ADAPTER),
    Mode("stream, 10 ms gaps", stream=True, gap_ms=10, connections=200),
)


def _chunk(model: bytes, rest: bytes) -> bytes:
    head = (
        b'{"id":"chatcmpl-0123456789abcdef","object":"chat.completion.chunk","created":1763769600,"model":"%b",' % model
    )
    return b"data: " + head + rest + b"}\n\n"


def _events(model: bytes) -> list[bytes]:
    token = b'"choices":[{"index":0,"delta":{"content":" token"},"logprobs":null,"finish_reason":null}]'
    usage = b'"choices":[],"usage":{"prompt_tokens":20,"total_tokens":84,"completion_tokens":64}'
    return [_chunk(model, token)] * CHUNKS + [_chunk(model, usage), b"data: [DONE]\n\n"]


class Engine(asyncio.Protocol):
    """Answers at once, or in chunks as the request's `user` member says."""

    def __init__(self) -> None:
        self.pieces: list[bytes] = []
        self.on_body = self.pieces.append
        self.parser = httptools.HttpRequestParser(self)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        self.parser.feed_data(data)

    def on_message_complete(self) -> None:
        if not self.pieces:  # a health check
            self.transport.write(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n{}")
            return
        body = msgspec.json.decode(b"".join(self.pieces))
        self.pieces.clear()
        model = body["model"].encode()
        if not body.get("stream"):
            answer = (
                b'{"id":"chatcmpl-0123456789abcdef","object":"chat.completion","created":1763769600,"model":"%b",'
                b'"choices":[{"index":0,"message":{"role":"assistant","content":"%b","refusal":null},"logprobs":null,'
                b'"finish_reason":"stop"}],"usage":{"prompt_tokens":20,"total_tokens":84,"completion_tokens":64}}'
            ) % (model, b" token" * 16)
            self.transport.write(HEAD + JSON % len(answer) + answer)
            return
        self.transport.write(HEAD + EVENTS)
        pieces = [b"%x\r\n%b\r\n" % (len(event), event) for event in _events(model)] + [b"0\r\n\r\n"]
        gap = body["user"]
        if gap == "0":
            self.transport.write(b"".join(pieces))
        else:
            self._next(pieces, 0, None if gap == "turns" else float(gap) / 1e3)

    def _next(self, pieces: list[bytes], i: int, gap_s: float | None) -> None:
        if self.transport.is_closing():
            return
        self.transport.write(pieces[i])
        if i + 1 == len(pieces):
            return
        loop = asyncio.get_running_loop()
        if gap_s is None:
            loop.call_soon(self._next, pieces, i + 1, gap_s)
        else:
            loop.call_later(gap_s, self._next, pieces, i + 1, gap_s)


def run_engine(port: int) -> None:
    async def serve() -> None:
        server = await asyncio.get_running_loop().create_server(Engine, "127.0.0.1", port, backlog=2048)
        await server.serve_forever()

    uvloop.run(serve())


class Client(asyncio.Protocol):
    """Sends one request after the other as long as `left` says so."""

    def __init__(self, load: Load) -> None:
        self.load = load
        self.buffer = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport
        self._send()

    def _send(self) -> None:
        if self.load.left <= 0:
            self.transport.close()
            return
        self.load.left -= 1
        self.buffer = b""
        self.sent_s = time.monotonic()
        self.transport.write(self.load.request)

    def data_received(self, data: bytes) -> None:
        self.buffer += data
        if self.load.stream:
            if not self.buffer.endswith(b"\r\n0\r\n\r\n"):
                return
            good = b"[DONE]" in self.buffer and self.buffer.count(b" token") == CHUNKS and b"usage" not in self.buffer
        else:
            head, found, body = self.buffer.partition(b"\r\n\r\n")
            if not found or len(body) < int(head.partition(b"content-length: ")[2].partition(b"\r\n")[0]):
                return
            good = head.startswith(b"HTTP/1.1 200") and b"total_tokens" in body
        self.load.bad += not good
        self.load.times.append(time.monotonic() - self.sent_s)
        self._send()

    def connection_lost(self, error: Exception | None) -> None:
        self.load.open -= 1
        if not self.load.open:
            self.load.done.set()


class Load:
    def __init__(self, mode: Mode, requests: int) -> None:
        user = "turns" if mode.gap_ms is None else f"{mode.gap_ms:g}"
        body = msgspec.json.encode(
            {
                "model": mode.model,
                "messages": [{"role": "user", "content": "word " * (mode.prompt_chars // 5)}],
                "max_tokens": 64,
                "user": user,
                "stream": mode.stream,
            }
        )
        self.stream = mode.stream
        self.request = chat_request(KEY, body)
        self.left = requests
        self.open = mode.connections
        self.bad = 0
        self.times: list[float] = []
        self.done = asyncio.Event()

    async def run(self, port: int) -> None:
        loop = asyncio.get_running_loop()
        for _ in range(self.open):
            await loop.create_connection(lambda: Client(self), "127.0.0.1", port)
        await self.done.wait()


def cpu_s(pid: int) -> tuple[float, float]:
    """user and system time of a process."""
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    tick = os.sysconf("SC_CLK_TCK")
    return int(fields[11]) / tick, int(fields[12]) / tick


async def measure(modes: list[Mode], seconds: float, port: int, pid: int) -> None:
    titles = ("requests/s", "CPU us/request", "user", "system", "p50 ms", "p99 ms", "bad")
    print(f"{'mode':28}" + "".join(f"{title:>{len(title) + 2}}" for title in titles))
    for mode in modes:
        requests = 64
        while True:  # until a run is long enough to be measured
            load = Load(mode, max(requests, mode.connections))
            user, system = cpu_s(pid)
            started = time.monotonic()
            await load.run(port)
            elapsed = time.monotonic() - started
            if elapsed >= seconds:
                break
            requests = int(requests * min(8, 1.2 * seconds / elapsed)) + 1
        user, system = (after - before for after, before in zip(cpu_s(pid), (user, system), strict=True))
        n = len(load.times)
        times = sorted(load.times)
        cpu_us = [seconds / n * 1e6 for seconds in (user + system, user, system)]
        print(
            f"{mode.name:28}{n / elapsed:12.0f}{cpu_us[0]:16.1f}{cpu_us[1]:6.1f}{cpu_us[2]:8.1f}"
            f"{times[n // 2] * 1e3:8.2f}{times[n * 99 // 100] * 1e3:8.2f}{load.bad:5}",
            flush=True,
        )


# Every kind of limit, none of them ever reached.
_LIMITS = {"requests_per_minute": 10**9, "tokens_per_minute": 10**12, "tokens_until": 10**15, "max_in_flight": 10**6}
KEYS = {
    "none": None,
    "plain": Key("key-1", frozenset({"infer"})),
    "counted": Key("key-1", frozenset({"infer"}), row=0),
    "limited": Key("key-1", frozenset({"infer"}), row=0, **_LIMITS),
}


async def serve_snapshot(run_dir: Path, engine_port: int, key: Key | None, registered: int = 0) -> asyncio.Server:
    replica = Replica("r0", 0, "vllm", "127.0.0.1", engine_port, "engine-key", True)
    snapshot = Snapshot(
        1,
        (replica,),
        {
            "demo": Model("demo", None, None, {"r0": "demo"}, ""),
            ADAPTER: Model(ADAPTER, "demo", ADAPTER_ID, {"r0": ADAPTER_ID}, ""),
        }
        | {f"m{i}": Model(f"m{i}", "demo", f"a-{i:012x}", {}, "", on_demand=True) for i in range(registered)},
        {hashlib.sha256(KEY.encode()).hexdigest(): key} if key is not None else {},
    )

    async def send(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(msgspec.json.encode(snapshot) + b"\n")
        await reader.read()

    return await asyncio.start_unix_server(send, run_dir / "snapshots.sock")


async def run(args: argparse.Namespace) -> None:
    modes = [mode for mode in MODES if not args.only or any(word in mode.name for word in args.only)]
    with (
        tempfile.TemporaryDirectory() as folder,
        socket.create_server(("127.0.0.1", 0), backlog=2048) as listener,
        Path(folder, "log").open("wb") as log,
    ):
        with socket.create_server(("127.0.0.1", 0)) as probe:
            engine_port = probe.getsockname()[1]
        engine = multiprocessing.get_context("spawn").Process(target=run_engine, args=(engine_port,), daemon=True)
        engine.start()
        await serve_snapshot(Path(folder), engine_port, KEYS[args.key], args.adapters)
        prefix = args.under.split() if args.under else []
        command = [*prefix, sys.executable, "-m", "gateway.relay", "--index", "0", "--run-dir", folder]
        relay = subprocess.Popen([*command, "--fd", str(listener.fileno())], pass_fds=(listener.fileno(),), stderr=log)
        try:
            while not list(Path(folder).glob("relay-0.series")):
                await asyncio.sleep(0.05)
            await asyncio.sleep(0.5)  # for the snapshot
            await measure(modes, args.seconds, listener.getsockname()[1], relay.pid)
        finally:
            relay.terminate()
            relay.wait()
            engine.terminate()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=3, help="of load in each mode, at least")
    parser.add_argument("--only", nargs="*", help="modes whose name has one of these words")
    parser.add_argument("--key", choices=KEYS, default="counted", help="what the requests' API key is subject to")
    parser.add_argument("--adapters", type=int, default=0, help="registered beside, loaded nowhere")
    parser.add_argument("--under", help="a profiler's command to run the relay under")
    uvloop.run(run(parser.parse_args()))


if __name__ == "__main__":
    main()
