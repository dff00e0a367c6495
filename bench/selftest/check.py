"""The self-test: CPU time per event of this client, beside others, and how true its readings are.

A program's CPU time has a fixed part (starting, importing, reporting) and one that grows with the events it reads. Each
is run on two amounts of work over the same source; the slope between them is the cost of an event.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec

from bench.measure.record import read_record
from bench.measure.summary import readings_by_segment, summarize
from bench.selftest.rivals import Job, bench, command_of
from bench.selftest.source import MODEL

TTFT_MS = 20.0
_SHORT_SHARE = 0.2


class SelfTestError(Exception):
    """A part of the self-test could not be run."""


class Cost(msgspec.Struct):
    """One tool's cost on the source."""

    tool: str
    events: int
    cpu_s: float
    fixed_cpu_s: float
    cpu_us_per_event: float
    wall_s: float

    @property
    def ceiling_events_per_s(self) -> float:
        """What one core can read at that cost."""
        return 1e6 / self.cpu_us_per_event


class Accuracy(msgspec.Struct):
    """This client's readings against the source's timeline, milliseconds; the source's own lateness is in them."""

    ttft_p50_off_ms: float
    gap_p50_off_ms: float
    gap_p99_off_ms: float


@contextmanager
def source(gap_ms: float, ttft_ms: float = TTFT_MS) -> Iterator[str]:
    """A running source; yields its URL. Raises SelfTestError when it does not start."""
    process = subprocess.Popen(
        [sys.executable, "-m", "bench.selftest.source", "--ttft-ms", str(ttft_ms), "--gap-ms", str(gap_ms)],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    try:
        word, _, url = process.stdout.readline().strip().partition(" ")
        if word != "ready":
            raise SelfTestError("the stream source did not start (its messages are above)")
        yield url
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def measure(program: Path | None, job: Job, log: Path) -> Cost:
    """A tool's cost an event; None is this bench. Raises SelfTestError when it fails, with where its output is."""
    tool = "this bench" if program is None else program.name
    short = msgspec.structs.replace(job, requests=max(job.concurrency, int(job.requests * _SHORT_SHARE)))
    few_s, _ = _cpu_s(program, short, log)
    many_s, wall_s = _cpu_s(program, job, log)
    if many_s <= few_s:
        raise SelfTestError(f"{tool}: the run is too short to tell its cost; give more requests")
    slope_s = (many_s - few_s) / ((job.requests - short.requests) * job.output_tokens)
    events = job.requests * job.output_tokens
    return Cost(tool, events, many_s, max(0.0, many_s - slope_s * events), slope_s * 1e6, wall_s)


def accuracy(url: str, gap_ms: float, concurrency: int, log: Path) -> Accuracy:
    """Readings of a quiet run against what the source was told. Raises SelfTestError."""
    with tempfile.TemporaryDirectory(prefix="bench-selftest-") as folder:
        _own(Job(url, MODEL, concurrency * 3, concurrency, 50), folder, log)
        record = read_record(Path(folder) / "selftest" / "record.jsonl.gz")
    summary = summarize(record, readings_by_segment(record))
    metrics = next(iter(summary.targets.values())).full.metrics
    return Accuracy(
        metrics["ttft_from_send_ms"]["p50"].value - TTFT_MS,
        metrics["chunk_gap_ms"]["p50"].value - gap_ms,
        metrics["chunk_gap_ms"]["p99"].value - gap_ms,
    )


def _cpu_s(program: Path | None, job: Job, log: Path) -> tuple[float, float]:
    """(CPU seconds of the program and all that it waited for, wall seconds)."""
    began_s = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="bench-selftest-") as folder:
        used_s = _own(job, folder, log) if program is None else _run(command_of(program, job), folder, log, {})
    return used_s, time.monotonic() - began_s


def _own(job: Job, folder: str, log: Path) -> float:
    path = os.pathsep.join(part for part in sys.path if part)
    return _run([*bench(sys.executable, job), "--out", folder], folder, log, {"PYTHONPATH": path})


def _run(command: list[str], folder: str, log: Path, extra: dict[str, str]) -> float:
    environment = os.environ | {"OPENAI_API_KEY": "none"} | extra
    with log.open("ab") as output:
        process = subprocess.Popen(command, cwd=folder, env=environment, stdout=output, stderr=output)
        _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode not in (0, 3):  # 3: this bench's own verdict on so short a run
        raise SelfTestError(f"{command[0]} ended with status {process.returncode}; its output is in {log}")
    return usage.ru_utime + usage.ru_stime
