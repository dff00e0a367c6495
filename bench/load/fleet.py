"""The load processes of a run: started once, told of one segment after the other, read while they work."""

from __future__ import annotations

import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import msgspec

from bench.load.worker import Order, Setup, Tick
from bench.measure.record import RequestRecord, decode_lines

START_S = 20.0
_MARGIN_S = 30.0

OnTicks = Callable[[list[Tick]], None]


class FleetError(Exception):
    """A load process died or went silent."""


def default_workers() -> int:
    """One process for each two cores: the server under test may live on the same machine."""
    return max(1, len(os.sched_getaffinity(0)) // 2 if hasattr(os, "sched_getaffinity") else 1)


class Fleet:
    """Workers, their pipes and their parts of the record. Use as a context manager."""

    def __init__(self, setup: Setup, folder: Path) -> None:
        self._parts = [folder / f"part-{number}.jsonl" for number in range(setup.workers)]
        self._ticks: queue.Queue[tuple[int, Tick | None]] = queue.Queue()
        self._listeners: list[threading.Thread] = []
        self._processes = [self._start(setup, number) for number in range(setup.workers)]
        self._await_ready()

    def __enter__(self) -> Fleet:
        return self

    def __exit__(self, *exc: object) -> None:
        for process in self._processes:
            assert process.stdin is not None
            process.stdin.close()
        for process in self._processes:
            try:
                process.wait(5)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        for listener in self._listeners:
            listener.join()

    def run(self, order: Order, on_ticks: OnTicks) -> list[Tick]:
        """Run a segment in every worker; hands on each worker's newest counters as they come; returns the last ones.

        Raises FleetError when a worker dies or goes silent, and KeyboardInterrupt once an interrupted segment has ended
        in good order.
        """
        line = msgspec.json.encode(order) + b"\n"
        for process in self._processes:
            assert process.stdin is not None
            process.stdin.write(line)
            process.stdin.flush()
        newest: dict[int, Tick] = {}
        give_up_s = (order.start_ns + order.segment.duration_ns) / 1e9 + order.drain_s + _MARGIN_S
        interrupted = False
        while not (len(newest) == len(self._processes) and all(tick.finished for tick in newest.values())):
            try:
                number, tick = self._next(give_up_s)
            except KeyboardInterrupt:
                interrupted = True
                self.stop()
                continue
            if tick is None:
                raise FleetError(f"load process {number} died (its messages are above)")
            newest[number] = tick
            on_ticks([tick])
        if interrupted:
            raise KeyboardInterrupt
        return list(newest.values())

    def stop(self) -> None:
        """Ask the workers to send nothing more."""
        for process in self._processes:
            process.terminate()

    def cut(self) -> None:
        """Ask the workers to send nothing more in this segment; the next goes on as ever."""
        for process in self._processes:
            process.send_signal(signal.SIGUSR1)

    def requests(self) -> list[RequestRecord]:
        """Every request so far, in the order of sending."""
        requests = [
            line for part in self._parts for line in decode_lines(part.read_bytes()) if isinstance(line, RequestRecord)
        ]
        return sorted(requests, key=lambda request: request.sent_ns)

    def _start(self, setup: Setup, number: int) -> subprocess.Popen[bytes]:
        process = subprocess.Popen(
            [sys.executable, "-m", "bench.load.worker"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        assert process.stdin is not None
        mine = msgspec.structs.replace(setup, worker=number, record_path=str(self._parts[number]))
        process.stdin.write(msgspec.json.encode(mine) + b"\n")
        process.stdin.flush()
        listener = threading.Thread(target=self._listen, args=(number, process), daemon=True)
        listener.start()
        self._listeners.append(listener)
        return process

    def _listen(self, number: int, process: subprocess.Popen[bytes]) -> None:
        assert process.stdout is not None
        with process.stdout as lines:
            for line in lines:
                self._ticks.put((number, msgspec.json.decode(line, type=Tick)))
        self._ticks.put((number, None))

    def _await_ready(self) -> None:
        waiting = set(range(len(self._processes)))
        give_up_s = time.monotonic() + START_S
        while waiting:
            number, tick = self._next(give_up_s)
            if tick is None:
                raise FleetError(f"load process {number} did not start (its messages are above)")
            waiting.discard(number)

    def _next(self, give_up_s: float) -> tuple[int, Tick | None]:
        try:
            return self._ticks.get(timeout=max(0.1, give_up_s - time.monotonic()))
        except queue.Empty as error:
            raise FleetError("the load processes went silent") from error
