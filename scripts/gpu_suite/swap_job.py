"""Adapters that come and a name that moves while others stream: what it costs those."""

from __future__ import annotations

import contextlib
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bench.measure.define import Reading, read
from bench.measure.record import Record, read_record
from scripts.gpu_suite.report import Report, quantile
from scripts.gpu_suite.serving import KEY, Served, nudged, upload
from tests.support.wait import eventually

_USERS = 16
_WORKLOAD = "random:512/64"
_MOVING = "tuned00"  # asked for all the time, as is the base
_UPLOADS = 8
_WINDOW_S = 10.0
_SETTLE_S = 2.0  # of the load's beginning, which is nobody's
_LIMIT_S = 240.0
_MAX_RISE = 0.2  # of p99 TTFT

Window = tuple[str, int, int]  # name, from, to: nanoseconds since the epoch


def swap_under_load(report: Report, served: Served, loras: list[Path]) -> None:
    """Quiet, then eight uploads of new contents and a name's move, then quiet. Raises AssertionError.

    Users stream from the base and from an adapter; TTFT and gaps are of a load process of its own, so that the uploads,
    which are made here, disturb the server only.
    """
    work = served.gateway.state.parent / "swap"
    shutil.rmtree(work, ignore_errors=True)
    large = loras[:_UPLOADS]  # the first ones are on all linears
    fresh = [nudged(large[n % len(large)], work / f"fresh{n}", n + 1) for n in range(_UPLOADS + 1)]
    ready_s: list[float] = []
    with _load(served, work):
        begun_ns = time.time_ns()
        time.sleep(_SETTLE_S + _WINDOW_S)
        changed_ns = time.time_ns()
        for number, lora in enumerate(fresh[:_UPLOADS]):
            _until(changed_ns, number * _WINDOW_S / len(fresh))
            ready_s.append(upload(served, f"fresh{number}", lora))
        _until(changed_ns, _UPLOADS * _WINDOW_S / len(fresh))
        moved_s = upload(served, _MOVING, fresh[_UPLOADS])
        _until(changed_ns, _WINDOW_S)
        quiet_ns = time.time_ns()
        time.sleep(_WINDOW_S)
        ended_ns = time.time_ns()
    windows = [("before", begun_ns + int(_SETTLE_S * 1e9), changed_ns), ("during", changed_ns, quiet_ns),
               ("after", quiet_ns, ended_ns)]  # fmt: skip
    found = costs(read_record(work / "load" / "record.jsonl.gz"), windows)
    found |= {"users": _USERS, "workload": _WORKLOAD, "upload_ready_s": ready_s, "name_moved_s": moved_s}
    report.figures["swap"] = found
    print(f"{report.stage}: swap: {found}", flush=True)
    assert not found["failures"], found["failures"]
    assert found["ttft_p99_rise"] is not None and found["ttft_p99_rise"] < _MAX_RISE, f"{found['ttft_p99_rise']:.0%}"


def costs(record: Record, windows: list[Window]) -> dict[str, Any]:
    """Of each window the requests sent in it: how many, TTFT, the longest gap within an answer; all failures."""
    origin_ns = record.header.origin_realtime_ns
    everything = [read(request) for request in record.requests if request.phase == "load"]
    found: dict[str, Any] = {}
    for name, start_ns, end_ns in windows:
        mine = [reading for reading in everything if start_ns <= origin_ns + reading.t0_ns < end_ns]
        good = [reading for reading in mine if reading.failure is None]
        row = {"sent": len(mine), "failed": len(mine) - len(good), "seconds": round((end_ns - start_ns) / 1e9, 1)}
        found[name] = row | _quantiles(good, "ttft_ms") | _quantiles(good, "stall_ms")
    found["failures"] = [
        f"{reading.failure}: {reading.request.error or reading.request.transport or ''}"[:200]
        for reading in everything
        if reading.failure is not None
    ][:20]
    found["ttft_p99_rise"] = _rise(found, "ttft_ms_p99")
    found["stall_p99_rise"] = _rise(found, "stall_ms_p99")
    return found


def _quantiles(readings: list[Reading], metric: str) -> dict[str, float | None]:
    values = [value for reading in readings if (value := getattr(reading, metric)) is not None]
    return {f"{metric}_p{percent}": quantile(values, percent / 100) for percent in (50, 99)}


def _rise(found: dict[str, Any], metric: str) -> float | None:
    before, during = found["before"][metric], found["during"][metric]
    return during / before - 1 if before and during is not None else None


@contextlib.contextmanager
def _load(served: Served, work: Path) -> Iterator[None]:
    """The bench's users, from when all of them are there until they are told to stop; then its record is written."""
    target = f"gateway={served.gateway.url},model=base,adapters=base+{_MOVING},key={KEY}"
    command = [sys.executable, "-m", "bench", "run", "--quiet", "--target", target, "--workload", _WORKLOAD]
    command += ["--concurrency", str(_USERS), "--workers", "1", "--duration", str(_LIMIT_S), "--repeats", "1"]
    command += ["--warmup", "0", "--out", str(work), "--name", "load"]
    with (work / "said.txt").open("w") as said, subprocess.Popen(command, stdout=said, stderr=said) as process:
        try:
            eventually(lambda: served.in_flight() > _USERS / 2 or process.poll() is not None, 60)
            assert process.poll() is None, (work / "said.txt").read_text()[-500:]
            yield
            process.send_signal(signal.SIGINT)
            process.wait(60)
        finally:
            if process.poll() is None:
                process.kill()


def _until(since_ns: int, seconds: float) -> None:
    time.sleep(max(0.0, (since_ns - time.time_ns()) / 1e9 + seconds))
