"""What is read beside the load, on the same clock: the servers' metrics pages, GPUs, and scripted changes."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import msgspec
import yaml

from bench.load.gpus import Gpus
from bench.measure.record import Mark, Sample
from bench.measure.server import parse_metrics
from bench.wire.http import Endpoint
from bench.wire.simple import call

INTERVAL_S = 1.0


class MetricsPage(msgspec.Struct, frozen=True):
    """A Prometheus page to read."""

    name: str
    endpoint: Endpoint
    path: str
    headers: dict[str, str]


class ChurnStep(msgspec.Struct, forbid_unknown_fields=True):
    """A request made while under load, such as loading an adapter."""

    at: float  # seconds after the first repeat's start
    name: str
    path: str
    method: str = "POST"
    json: Any = None


def read_churn(path: Path) -> list[ChurnStep]:
    """The steps of a churn script, in order of time. Raises ValueError."""
    try:
        steps = msgspec.convert(yaml.safe_load(path.read_text()), list[ChurnStep])
    except (msgspec.ValidationError, yaml.YAMLError) as error:
        raise ValueError(f"{path}: a list of steps {{at, name, path, method?, json?}} expected: {error}") from error
    return sorted(steps, key=lambda step: step.at)


class Watch:
    """Threads that sample and change things until stopped. Use as a context manager."""

    def __init__(self, origin_ns: int, pages: list[MetricsPage]) -> None:
        self.samples: list[Sample] = []
        self.marks: list[Mark] = []
        self.latest: dict[str, dict[str, float]] = {}
        self._origin_ns = origin_ns
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._poll, args=(page,), daemon=True) for page in pages]
        self._threads.append(threading.Thread(target=self._poll_gpus, daemon=True))

    def __enter__(self) -> Watch:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(10)

    def churn(self, steps: list[ChurnStep], endpoint: Endpoint, headers: dict[str, str], start_ns: int) -> None:
        """Make the steps' requests at their times, from a thread of its own."""
        thread = threading.Thread(target=self._change, args=(steps, endpoint, headers, start_ns), daemon=True)
        self._threads.append(thread)
        thread.start()

    def _now_ns(self) -> int:
        return time.monotonic_ns() - self._origin_ns

    def _poll(self, page: MetricsPage) -> None:
        while not self._stop.is_set():
            t_ns = self._now_ns()
            try:
                answer = call(page.endpoint, "GET", page.path, page.headers, timeout_s=5)
            except OSError:
                answer = None  # a server too busy to say is part of the picture: a gap in the series
            if answer is not None and answer.ok:
                values = parse_metrics(answer.body.decode("utf-8", "replace"))
                if not values:
                    return
                self.samples.append(Sample(f"server:{page.name}", t_ns, values))
                self.latest[page.name] = values
            elif answer is not None:
                return  # no metrics page here
            self._stop.wait(INTERVAL_S)

    def _poll_gpus(self) -> None:
        gpus = Gpus()
        while gpus.names() and not self._stop.wait(INTERVAL_S):
            t_ns = self._now_ns()
            self.samples += [Sample(f"gpu:{number}", t_ns, row) for number, row in enumerate(gpus.read())]

    def _change(self, steps: list[ChurnStep], endpoint: Endpoint, headers: dict[str, str], start_ns: int) -> None:
        for step in steps:
            if self._stop.wait(max(0.0, start_ns / 1e9 + step.at - time.monotonic())):
                return
            began_ns = self._now_ns()
            body = None if step.json is None else msgspec.json.encode(step.json)
            try:
                answer = call(endpoint, step.method, step.path, headers, body, 300)
                ok, detail = answer.ok, f"{answer.status} {answer.body[:200].decode('utf-8', 'replace')}"
            except OSError as error:
                ok, detail = False, str(error)
            self.marks.append(Mark(began_ns, step.name, self._now_ns() - began_ns, ok, detail))
