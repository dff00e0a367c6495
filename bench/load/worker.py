"""One load process: told by JSON lines on stdin what to send, it writes a part of the record and reports its counters.

`python -m bench.load.worker` is started by the fleet, one a core.
"""

from __future__ import annotations

import gc
import itertools
import os
import resource
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np

from bench.load.arrivals import arrivals
from bench.load.finish import to_record
from bench.load.job import Job
from bench.load.loop import Loop, Target
from bench.load.sources import ClosedSource, Merged, OpenSource, Source
from bench.measure.outcome import failure
from bench.measure.record import Segment, encode_line
from bench.wire.connection import Exchange
from bench.workload.adapters import pick, shares
from bench.workload.bodies import Asking, prompt_body
from bench.workload.prompts import Content, Prompt, Trace, Workload, build_workload
from bench.workload.spec import WorkloadSpec
from bench.workload.words import Tokenization

PROBE_INDEX = 1_000_000_000  # indices of probe requests begin here, so that they never share a prompt with the load
PROBE_OUTPUT_TOKENS = 16


class Setup(msgspec.Struct):
    """Everything of a run that is the same in each of its segments."""

    worker: int
    workers: int
    origin_ns: int
    targets: list[Target]
    asking: Asking
    workload: WorkloadSpec
    tokens: Tokenization
    models: dict[str, list[str]]  # target -> the models asked for, in the order of the mix
    base_models: dict[str, str]  # target -> the model that probes ask for
    mix: str
    timeout_s: float
    max_in_flight: int | None
    record_path: str


class Order(msgspec.Struct):
    """One segment to run. Times are monotonic nanoseconds."""

    segment: Segment
    start_ns: int
    content: Content
    arrivals: str
    schedule_seed: int
    first_index: int = 0
    requests: int | None = None
    ramp_s: float = 0.0
    drain_s: float = 30.0
    probe_rate_per_s: float = 0.0


class Tick(msgspec.Struct):
    """A worker's counters, cumulative over the segment; `cpu_s` over its life."""

    worker: int
    t_ns: int
    finished: bool = False
    sent: int = 0
    done: int = 0
    failed: int = 0
    in_flight: int = 0
    events: int = 0
    tokens: float = 0
    cpu_s: float = 0.0
    round_ms_max: float = 0.0
    capped_ms: float = 0.0
    ttft_ms: list[float] = msgspec.field(default_factory=list)  # of requests done since the last tick
    failures: dict[str, int] = msgspec.field(default_factory=dict)


class Worker:
    """Makes jobs, runs the loop over them, writes what comes back."""

    def __init__(self, setup: Setup) -> None:
        self._setup = setup
        self._workload: Workload = build_workload(setup.workload, setup.tokens)
        self._cumulative = {name: np.cumsum(shares(setup.mix, len(models))) for name, models in setup.models.items()}
        self._record = Path(setup.record_path).open("ab", buffering=1 << 20)  # noqa: SIM115  # open as long as we live
        self._tick = Tick(setup.worker, 0)
        self._parent = os.getppid()
        self._stopping = self._cut = False
        self._loop = Loop(setup.targets, self._done, setup.timeout_s, self._share(setup.max_in_flight), self._on_tick)

    def stop(self) -> None:
        """Send nothing more; what is in flight may still end."""
        self._stopping = True

    def cut(self) -> None:
        """Send nothing more in this segment."""
        self._cut = True

    def run(self, order: Order) -> None:
        """Run one segment to its end."""
        self._cut = False
        self._tick = Tick(self._setup.worker, 0)
        self._loop.stats.capped_ns = 0
        deadline_ns = order.start_ns + order.segment.duration_ns + int(order.drain_s * 1e9)
        time.sleep(max(0.0, (order.start_ns - time.monotonic_ns()) / 1e9 - 0.05))
        self._loop.run(self._source(order), deadline_ns)
        self._record.flush()
        self._tick.finished = True
        self._report(time.monotonic_ns())

    def close(self) -> None:
        """Close sockets and the record."""
        self._loop.close()
        self._record.close()

    def _source(self, order: Order) -> Source:
        segment, me, workers = order.segment, self._setup.worker, self._setup.workers
        make = self._maker(order)
        source: Source
        if segment.concurrency is not None:
            indices = itertools.count(order.first_index + me, workers)
            stop_ns = order.start_ns + segment.duration_ns
            users = segment.concurrency // workers + (me < segment.concurrency % workers)
            mine = None if order.requests is None else len(range(me, order.requests, workers))
            source = ClosedSource(
                users, order.start_ns, stop_ns, int(order.ramp_s * 1e9), itertools.islice(indices, mine), make
            )
        else:
            offsets = self._offsets(order)
            every = np.arange(len(offsets))[me::workers]
            source = OpenSource([order.first_index + int(n) for n in every], offsets[every], order.start_ns, make)
        if order.probe_rate_per_s and me == 0:
            times = arrivals("constant", order.probe_rate_per_s, segment.duration_ns / 1e9, 0)
            indices_probed = [PROBE_INDEX + n for n in range(len(times))]
            source = Merged(source, OpenSource(indices_probed, times, order.start_ns, self._prober(order)))
        return source

    def _offsets(self, order: Order) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
        if isinstance(self._workload, Trace) and order.segment.rate_per_s is None:
            offsets = np.asarray([line.timestamp * 1e6 for line in self._workload.lines], dtype=np.int64)
            offsets = offsets[offsets < order.segment.duration_ns]
        else:
            assert order.segment.rate_per_s is not None
            duration_s = order.segment.duration_ns / 1e9
            offsets = arrivals(order.arrivals, order.segment.rate_per_s, duration_s, order.schedule_seed)
        return offsets[: order.requests]

    def _maker(self, order: Order) -> Callable[[int], Job]:
        target = order.segment.target
        models, cumulative = self._setup.models[target], self._cumulative[target]

        def make(index: int) -> Job:
            prompt = self._workload.prompt(index, order.content)
            mixed = models[pick(cumulative, order.content.seed, index)] if len(models) > 1 else models[0]
            return self._job(order, index, prompt.model or mixed, prompt, 0)

        return make

    def _prober(self, order: Order) -> Callable[[int], Job]:
        def make(index: int) -> Job:
            prompt = self._workload.prompt(index, order.content)
            prompt.output_tokens, prompt.next_turn = PROBE_OUTPUT_TOKENS, None
            job = self._job(order, index, self._setup.base_models[order.segment.target], prompt, 0)
            job.phase = "probe"
            return job

        return make

    def _job(self, order: Order, index: int, model: str, prompt: Prompt, turn: int) -> Job:
        job = Job(
            index=index,
            segment=order.segment.number,
            target=order.segment.target,
            model=model,
            body=prompt_body(self._setup.asking, model, prompt),
            output_tokens=prompt.output_tokens,
            prompt_tokens=prompt.prompt_tokens,
            output_exact=self._setup.asking.dialect.ignore_eos,
            turn=turn,
        )
        following = prompt.next_turn
        if following is not None:

            def follow_up(text: str) -> tuple[float, Job]:
                think_s, prompt = following(text)
                return think_s, self._job(order, index, model, prompt, turn + 1)

            job.follow_up = follow_up
        return job

    def _done(self, job: Job, exchange: Exchange) -> str | None:
        record, text = to_record(job, exchange, self._setup.origin_ns, self._setup.worker)
        self._record.write(encode_line(record))
        tick = self._tick
        tick.events += len(record.events.t_ns)
        cause = failure(record)
        if cause is not None:
            tick.failed += 1
            tick.failures[cause] = tick.failures.get(cause, 0) + 1
            return None
        tick.tokens += record.output_tokens or len(record.events.t_ns)
        if record.headers_ns is not None:
            first_ns = next(
                (t for t, chars in zip(record.events.t_ns, record.events.chars, strict=True) if chars), None
            )
            start_ns = record.sent_ns if record.intended_ns is None else record.intended_ns
            if first_ns is not None:
                tick.ttft_ms.append((first_ns - start_ns) / 1e6)
        return text

    def _on_tick(self, now_ns: int) -> bool:
        if os.getppid() != self._parent:
            sys.exit(1)  # nobody will read the result
        self._report(now_ns)
        return not (self._stopping or self._cut)

    def _report(self, now_ns: int) -> None:
        stats, tick = self._loop.stats, self._tick
        usage = resource.getrusage(resource.RUSAGE_SELF)
        tick.t_ns = now_ns - self._setup.origin_ns
        tick.sent, tick.done, tick.in_flight = stats.sent, stats.done, stats.in_flight
        tick.cpu_s = usage.ru_utime + usage.ru_stime
        tick.round_ms_max = stats.round_ns_max / 1e6
        tick.capped_ms = stats.capped_ns / 1e6
        stats.round_ns_max = 0
        _say(tick)
        tick.ttft_ms = []

    def _share(self, whole: int | None) -> int | None:
        """This worker's part of a number, at least one."""
        if whole is None:
            return None
        return max(1, whole // self._setup.workers + (self._setup.worker < whole % self._setup.workers))


def _say(tick: Tick) -> None:
    sys.stdout.buffer.write(msgspec.json.encode(tick) + b"\n")
    sys.stdout.buffer.flush()


def main() -> None:
    """Read a `Setup`, then an `Order` a line, until stdin ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides; the terminal tells everyone
    raise_open_files()
    worker = Worker(msgspec.json.decode(sys.stdin.buffer.readline(), type=Setup))
    signal.signal(signal.SIGTERM, lambda number, frame: worker.stop())
    signal.signal(signal.SIGUSR1, lambda number, frame: worker.cut())
    # a collection would be a pause in the middle of a measurement, and nothing here makes cycles
    gc.collect()
    gc.freeze()
    gc.disable()
    _say(Tick(-1, 0, finished=True))
    for line in sys.stdin.buffer:
        worker.run(msgspec.json.decode(line, type=Order))
        gc.collect()
    worker.close()


def raise_open_files() -> None:
    """Allow as many sockets as the system lets us have."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


if __name__ == "__main__":
    main()
