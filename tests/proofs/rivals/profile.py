"""Where the relay's own time goes: `python -m tests.proofs.rivals.profile [--stream] [--adapter] [--lines]`.

Requests and answers are handed to the relay's two connections as bytes, without sockets, so that all that is measured
is the relay's Python (and the C that it calls); what the kernel takes is the rest of the table's figure. A timer
samples which function runs, and on which line.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import signal
import tempfile
import time
from collections import Counter
from pathlib import Path
from types import FrameType, SimpleNamespace
from typing import Any

import uvloop

from gateway.observe.cells import Cells, Peers
from gateway.observe.usage import Usage
from gateway.relay.account import Meter
from gateway.relay.app import App
from gateway.relay.client import ClientConnection
from gateway.relay.traffic import Limits
from gateway.relay.upstream import Connection
from tests.proofs.rivals.engine import answer_bytes, stream_bytes
from tests.proofs.rivals.load import KEY, MODES, request
from tests.proofs.rivals.targets import ADAPTER_ID, snapshot

_SAMPLE_S = 0.0005
_TIMED, _SAMPLED = 100, 2000  # requests
_SHOWN = 25


class _Wire:
    """A transport to nowhere."""

    def is_closing(self) -> bool:
        return False

    def write(self, data: bytes) -> None: ...

    def writelines(self, parts: list[bytes]) -> None: ...


async def _profile(
    stream: bool, adapter: bool, seconds: float, folder: Path
) -> tuple[float, Counter[str], Counter[str]]:
    """(us a request at best, samples by function, samples by line)."""
    loop = asyncio.get_running_loop()
    log: list[object] = []
    meter = Meter(Cells(folder / "relay-0.cells"), Peers({}), 0, log.append)
    app = App(loop, meter, Usage(folder / "relay-0.usage", 1), Limits(10**7, 600), folder, lambda _: None)
    app.apply(snapshot([1001, 1002], 10, hashlib.sha256(KEY.encode()).hexdigest()))
    client = ClientConnection(SimpleNamespace(draining=False, connections=set(), loop=loop, handle=app.handle))  # type: ignore[arg-type]
    wire: Any = _Wire()
    client.connection_made(wire)
    engines = []
    for engine in app._engines.values():
        connection = Connection(engine.origin)
        connection.connection_made(wire)
        engine.origin.idle[connection] = None
        engines.append(connection)
    name = {(False, False): "json", (False, True): "adapter", (True, False): "turns", (True, True): "adapter-stream"}
    asked = request(next(mode for mode in MODES if mode.name == name[stream, adapter]))
    model = ADAPTER_ID.encode() if adapter else b"demo"
    parts = stream_bytes(model, usage=True) if stream else [answer_bytes(model)]

    def one() -> None:
        client.data_received(asked)
        engine = next(engine for engine in engines if engine._sink is not None)
        for part in parts:
            engine.data_received(part)

    functions: Counter[str] = Counter()
    lines: Counter[str] = Counter()

    def sample(_: int, frame: FrameType | None) -> None:
        if frame is not None:
            code = frame.f_code
            where = code.co_filename.rpartition("/gateway/")[2]
            functions[f"{where}:{code.co_qualname}"] += 1
            lines[f"{where}:{frame.f_lineno}"] += 1

    best_us = float("inf")
    signal.signal(signal.SIGPROF, sample)
    deadline_s = time.monotonic() + seconds
    while time.monotonic() < deadline_s:
        signal.setitimer(signal.ITIMER_PROF, 0)
        began_s = time.thread_time()
        for _ in range(_TIMED):
            one()
        best_us = min(best_us, (time.thread_time() - began_s) / _TIMED * 1e6)
        signal.setitimer(signal.ITIMER_PROF, _SAMPLE_S, _SAMPLE_S)
        for _ in range(_SAMPLED):
            one()
        signal.setitimer(signal.ITIMER_PROF, 0)
        log.clear()
    return best_us, functions, lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stream", action="store_true", help="64 chunks, each in a read of its own")
    parser.add_argument("--adapter", action="store_true")
    parser.add_argument("--seconds", type=float, default=10)
    parser.add_argument("--lines", action="store_true", help="by line instead of by function")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="tunegate-profile-") as folder:
        best_us, functions, lines = uvloop.run(_profile(args.stream, args.adapter, args.seconds, Path(folder)))
    counted = lines if args.lines else functions
    total = counted.total()
    print(f"{best_us:.1f} us a request, {total} samples\n\n| us | share | where |\n|---|---|---|")
    for where, count in counted.most_common(_SHOWN):
        print(f"| {count / total * best_us:.1f} | {count / total:.1%} | {where} |")


if __name__ == "__main__":
    main()
