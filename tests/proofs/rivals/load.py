"""The clients: as many requests as a gateway takes (closed loop), or a fixed number a second (open loop)."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import msgspec

from tests.proofs.rivals.engine import CHUNKS
from tests.support.openai_request import chat_request

KEY = "sk-rivals-0123456789abcdef"
STALLED_S = 30.0  # a run that hangs is over after this
_GOING_AWAY = 0.3  # of the clients, where a mode has clients that leave


@dataclass(frozen=True)
class Mode:
    """A kind of traffic. pace: how the engine sends a stream (see engine.py), or that it errs."""

    name: str
    title: str
    stream: bool = False
    pace: str = "together"
    model: str = "demo"
    prompt_chars: int = 60
    connections: int = 32


MODES = (
    Mode("json", "small JSON"),
    Mode("prompt", "100 KB prompt", prompt_chars=100_000),
    Mode("adapter", "adapter, small JSON", model="french"),
    Mode("errors", "1 % errors, small JSON", pace="errors"),
    Mode("together", "64-chunk stream, one write", stream=True),
    Mode("turns", "64-chunk stream, a write a chunk", stream=True, pace="turns"),
    Mode("adapter-stream", "adapter, 64-chunk stream, a write a chunk", stream=True, pace="turns", model="french"),
    Mode("gaps-50", "64-chunk stream, 10 ms gaps, 50 at once", stream=True, pace="ticks", connections=50),
    Mode("gaps", "64-chunk stream, 10 ms gaps, 500 at once", stream=True, pace="ticks", connections=500),
)


def request(mode: Mode) -> bytes:
    """A chat as the official Python client sends it."""
    body = msgspec.json.encode(
        {
            "model": mode.model,
            "messages": [{"role": "user", "content": f"pace={mode.pace}; " + "word " * (mode.prompt_chars // 5)}],
            "max_tokens": CHUNKS,
            "stream": mode.stream,
        }
    )
    return chat_request(KEY, body)


@dataclass
class Result:
    """What the clients saw."""

    seconds: float = 0.0
    times_s: list[float] = field(default_factory=list)
    errors: int = 0  # answers of status 500
    bad: int = 0  # answers that are wrong: cut short, not what was asked
    left: int = 0  # requests that their client broke off

    @property
    def requests(self) -> int:
        return len(self.times_s) + self.left

    @property
    def per_s(self) -> float:
        """Throughput, requests a second."""
        return self.requests / self.seconds if self.seconds else 0.0

    def quantile_ms(self, q: float) -> float:
        """Latency; of an open loop from when the request was due."""
        times = sorted(self.times_s)
        return times[min(len(times) - 1, int(len(times) * q))] * 1e3 if times else 0.0


class Load:
    """Clients that send `request` again and again."""

    def __init__(self, mode: Mode, *, leavers: bool = False) -> None:
        """leavers: 30 % of the requests are broken off by their client, at whatever stage they are."""
        self.mode = mode
        self.request = request(mode)
        self.leavers = leavers
        self.result = Result()
        self.idle: list[Client] = []
        self.sending = True
        self.busy = 0
        self.wanted = 0  # closed loop: requests yet to send, over all clients; 0: until `sending` ends

    async def closed(self, port: int, seconds: float = 0.0, requests: int = 0) -> Result:
        """Each client sends its next request when it has its answer; for `seconds`, or `requests` in all."""
        loop = asyncio.get_running_loop()
        self.wanted = requests or -1
        started_s = time.monotonic()
        clients = [Client(self, port) for _ in range(self.mode.connections)]
        await asyncio.gather(
            *(loop.create_connection(lambda client=client: client, "127.0.0.1", port) for client in clients)
        )
        if requests:
            while self.wanted and time.monotonic() - started_s < 3600:
                await asyncio.sleep(0.05)
        else:
            await asyncio.sleep(seconds)
        await self._end()
        self.result.seconds = time.monotonic() - started_s
        return self.result

    async def open(self, port: int, seconds: float, rate: float) -> Result:
        """`rate` requests a second, whatever becomes of them; each is timed from when it was due."""
        loop = asyncio.get_running_loop()
        self.wanted = 0
        started_s = time.monotonic()
        sent = 0
        while (now_s := time.monotonic()) < started_s + seconds:
            while sent < (now_s - started_s) * rate:
                due_s = started_s + sent / rate
                sent += 1
                if not self.idle:
                    await loop.create_connection(lambda: Client(self, port), "127.0.0.1", port)
                self.idle.pop().send(due_s)
            await asyncio.sleep(max(0.0, started_s + sent / rate - time.monotonic()))
        await self._end()
        self.result.seconds = time.monotonic() - started_s
        return self.result

    def next(self, client: Client) -> None:
        """`client` has nothing to do."""
        if self.sending and self.wanted:
            self.wanted -= 1
            client.send(time.monotonic())
        else:
            self.idle.append(client)

    async def _end(self) -> None:
        self.sending = False
        deadline_s = time.monotonic() + STALLED_S
        while self.busy and time.monotonic() < deadline_s:
            await asyncio.sleep(0.01)
        self.result.bad += self.busy
        for client in self.idle:
            client.transport.close()


class Client(asyncio.Protocol):
    """One connection."""

    def __init__(self, load: Load, port: int) -> None:
        self.load = load
        self.port = port
        self.pieces: list[bytes] = []
        self.asking = False
        self.sent = 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport
        self.load.next(self)

    def send(self, due_s: float) -> None:
        """Send a request that was due then."""
        self.due_s = due_s
        self.asking = True
        self.sent += 1
        self.load.busy += 1
        self.pieces.clear()
        self.transport.write(self.load.request)
        if self._leaves and self.sent % 2:  # at once, before the answer; or else at its first bytes
            self._leave()

    def data_received(self, data: bytes) -> None:
        if self._leaves and self.asking:
            self._leave()
            return
        pieces = self.pieces
        pieces.append(data)
        if not self.asking or not _complete(pieces, self.load.mode.stream):
            return
        self._over(time.monotonic())

    def connection_lost(self, error: Exception | None) -> None:
        if self.asking:  # not by us
            self.asking = False
            self.load.busy -= 1
            self.load.result.bad += 1
            self._anew()

    def _over(self, now_s: float) -> None:
        self.asking = False
        load = self.load
        load.busy -= 1
        answer = b"".join(self.pieces)
        if answer.startswith(b"HTTP/1.1 200"):
            said = answer.count(b" token")
            whole = said == CHUNKS and b"[DONE]" in answer if load.mode.stream else said == 16
            load.result.bad += not whole
        elif answer.startswith(b"HTTP/1.1 500") or answer.startswith(b"HTTP/1.1 502"):
            load.result.errors += 1
        else:
            load.result.bad += 1
        load.result.times_s.append(now_s - self.due_s)
        load.next(self)

    @property
    def _leaves(self) -> bool:
        return self.load.leavers and self.sent % 10 < _GOING_AWAY * 10

    def _leave(self) -> None:
        self.asking = False
        self.load.busy -= 1
        self.load.result.left += 1
        self.transport.abort()
        self._anew()

    def _anew(self) -> None:
        if self.load.sending:
            loop = asyncio.get_running_loop()
            client = Client(self.load, self.port)
            client.sent = self.sent
            task = loop.create_task(loop.create_connection(lambda: client, "127.0.0.1", self.port))  # type: ignore[arg-type]
            _tasks.add(task)
            task.add_done_callback(_tasks.discard)


_tasks: set[asyncio.Task[object]] = set()


def _complete(pieces: Sequence[bytes], stream: bool) -> bool:
    """Whether an answer has come to its end; a stream's end is the last chunk, a body's its length."""
    if stream and pieces[0].startswith(b"HTTP/1.1 200"):
        last = pieces[-1]
        if len(last) < 7 and len(pieces) > 1:
            last = b"".join(pieces[-3:])
        return last.endswith(b"\r\n0\r\n\r\n") or last == b"0\r\n\r\n"
    head, found, body = b"".join(pieces).partition(b"\r\n\r\n")
    if not found:
        return False
    length = head.lower().partition(b"content-length:")[2].partition(b"\r\n")[0]
    return len(body) >= int(length) if length else body.endswith(b"0\r\n\r\n")
