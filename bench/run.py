"""One run: segments of load in order, everything kept in one record."""

from __future__ import annotations

import secrets
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Protocol

import msgspec
import numpy as np

from bench.config import RunConfig, cache_of, resolved, workload_hash
from bench.load.fleet import Fleet, default_workers
from bench.load.watch import Watch, read_churn
from bench.load.worker import Order, Setup, Tick
from bench.measure.define import Reading, read
from bench.measure.record import RECORD_VERSION, Header, Mark, Record, Sample, Segment
from bench.measure.summary import WARMUP
from bench.prepare import Prepared, environment, prepare, reset_caches
from bench.workload.calibrate import count_tokens
from bench.workload.prompts import WARM_POOL, Content, read_trace

INDEX_STRIDE = 10_000_000  # a repeat's indices begin here, so that repeats never share a prompt
_WARMUP_USERS = 8
_WARMUP_S = 600.0
_LEAD_S = 0.2
_RETOKENIZE_MAX = 500


class Observer(Protocol):
    """Whoever looks on while a run is under way."""

    def segment(self, segment: Segment) -> None:
        """A segment begins."""

    def ticks(self, ticks: list[Tick], watch: Watch) -> None:
        """Workers reported."""


class Session:
    """Servers prepared, workers up, a record growing. Made by `session`."""

    def __init__(self, config: RunConfig, prepared: Prepared, fleet: Fleet, watch: Watch, origin_ns: int) -> None:
        self.config, self.prepared, self.fleet, self.watch = config, prepared, fleet, watch
        self.segments: list[Segment] = []
        self.samples: list[Sample] = []
        self.marks: list[Mark] = []
        self._origin_ns = origin_ns
        self._nonce = secrets.randbits(31)

    def run(self, order: Order, observer: Observer) -> Segment:
        """Run a segment now; its start is set here."""
        start_ns = time.monotonic_ns() + int(_LEAD_S * 1e9)
        segment = msgspec.structs.replace(order.segment, number=len(self.segments), start_ns=start_ns - self._origin_ns)
        order.segment, order.start_ns = segment, start_ns
        self.segments.append(segment)
        observer.segment(segment)

        def on_ticks(ticks: list[Tick]) -> None:
            for tick in ticks:
                values = {
                    "cpu_s": tick.cpu_s,
                    "in_flight": float(tick.in_flight),
                    "round_ms_max": tick.round_ms_max,
                    "capped_ms": tick.capped_ms,
                    "events": float(tick.events),
                }
                self.samples.append(Sample(f"worker:{tick.worker}", tick.t_ns, values))
            observer.ticks(ticks, self.watch)

        self.fleet.run(order, on_ticks)
        return segment

    def order(
        self,
        target: str,
        label: str,
        repeat: int,
        duration_s: float,
        rate: float | None = None,
        concurrency: int | None = None,
        pair: int | None = None,
    ) -> Order:
        """A segment to run, as the configuration has it. Paired segments get the same schedule and lengths."""
        config = self.config
        warm, shared = cache_of(config)
        part = repeat if pair is None else pair
        nonce = 0 if warm else self._nonce * 1000 + len(self.segments)
        segment = Segment(0, label, target, repeat, 0, int(duration_s * 1e9), rate, concurrency, pair)
        return Order(
            segment=segment,
            start_ns=0,
            content=Content(config.seed, nonce, 0 if warm else self._nonce, warm, shared),
            arrivals=config.arrivals,
            schedule_seed=config.seed * 100_003 + part,
            first_index=0 if warm else (part + 1) * INDEX_STRIDE,
            requests=config.requests,
            ramp_s=config.ramp,
            drain_s=config.drain,
            probe_rate_per_s=config.probe,
        )

    def warm_up(self, observer: Observer) -> None:
        """Requests that are not counted, on every target; none is the load's, unless the cache is to be warm."""
        warm, _ = cache_of(self.config)
        count = max(self.config.warmup, WARM_POOL if warm else 0)
        if not count:
            return
        for target in self.prepared.targets:
            order = self.order(target.name, WARMUP, -1, _WARMUP_S, concurrency=min(_WARMUP_USERS, count))
            order.requests, order.probe_rate_per_s, order.ramp_s = count, 0.0, 0.0
            self.run(order, observer)

    def readings(self, segment: Segment) -> list[Reading]:
        """The requests of a segment that has ended, for a search that goes by them."""
        held = [request for request in self.fleet.requests() if request.segment == segment.number]
        return [read(request) for request in held if request.phase == "load"]

    def record(self) -> Record:
        """Everything so far as one record."""
        config, prepared = self.config, self.prepared
        origin_realtime_ns = time.time_ns() - time.monotonic_ns() + self._origin_ns
        header = Header(
            version=RECORD_VERSION,
            started_at=datetime.fromtimestamp(origin_realtime_ns / 1e9, UTC).isoformat(timespec="seconds"),
            origin_realtime_ns=origin_realtime_ns,
            config=resolved(config),
            workload_hash=workload_hash(config),
            environment=environment(config.workers or default_workers())
            | {"tokenization": msgspec.to_builtins(msgspec.structs.replace(prepared.tokens, words=()))},
            servers=prepared.about,
            segments=self.segments,
            stamps="kernel" if all(not target.endpoint.tls for target in prepared.targets) else "client",
        )
        record = Record(header, self.fleet.requests(), self.samples + self.watch.samples, self.marks + self.watch.marks)
        _retokenize(record, prepared)
        return record


@contextmanager
def session(config: RunConfig) -> Iterator[Session]:
    """Prepare the servers, start the workers, watch the metrics; end all of it on leaving."""
    prepared = prepare(config)
    origin_ns = time.monotonic_ns()
    workers = config.workers or default_workers()
    setup = Setup(
        worker=0,
        workers=workers,
        origin_ns=origin_ns,
        targets=prepared.targets,
        asking=prepared.asking,
        workload=config.spec,
        tokens=prepared.tokens,
        models=prepared.models,
        base_models=prepared.base_models,
        mix=config.mix,
        timeout_s=config.timeout,
        max_in_flight=config.max_concurrency,
        record_path="",
    )
    with (
        tempfile.TemporaryDirectory(prefix="bench-") as folder,
        Fleet(setup, Path(folder)) as fleet,
        Watch(origin_ns, prepared.pages) as watch,
    ):
        yield Session(config, prepared, fleet, watch, origin_ns)


def run(config: RunConfig, observer: Observer) -> Record:
    """Warm up, then every repeat on every target; targets take turns in short blocks when there are several."""
    with session(config) as now:
        now.warm_up(observer)
        if config.cache == "cold":
            now.samples.append(Sample("client", 0, {"caches_reset": float(len(reset_caches(now.prepared)))}))
        if config.churn is not None:
            first = now.prepared.targets[0]
            start_ns = time.monotonic_ns() + int(_LEAD_S * 1e9)
            now.watch.churn(read_churn(config.churn), first.endpoint, first.headers, start_ns)
        try:
            for repeat in range(config.repeats):
                _repeat(now, repeat, observer)
        except KeyboardInterrupt:
            now.fleet.stop()
        return now.record()


def _repeat(now: Session, repeat: int, observer: Observer) -> None:
    config, targets = now.config, [target.name for target in now.prepared.targets]
    if len(targets) == 1:
        duration_s = _trace_s(config) if config.rate is None and config.concurrency is None else config.duration
        now.run(now.order(targets[0], "load", repeat, duration_s, config.rate, config.concurrency), observer)
        return
    blocks = max(1, round(config.duration / config.block))
    rng = np.random.default_rng([config.seed, 9, repeat])
    for block in range(blocks):
        pair = repeat * blocks + block
        # a fresh random order each time, so that nothing that drifts or alternates favours one of them
        for place in rng.permutation(len(targets)).tolist():
            order = now.order(targets[place], "load", repeat, config.block, config.rate, config.concurrency, pair)
            now.run(order, observer)


def _trace_s(config: RunConfig) -> float:
    last_ms = read_trace(config.spec)[-1].timestamp
    return min(config.duration, last_ms / 1e3 + 1e-3)


def _retokenize(record: Record, prepared: Prepared) -> None:
    """Count tokens by the server's tokenizer where it sent no usage; the texts have then served their purpose."""
    for request in [request for request in record.requests if request.text][:_RETOKENIZE_MAX]:
        server = prepared.servers[request.target]
        assert request.text is not None
        counted = count_tokens(server, request.model, request.text)
        if counted is None:
            return
        request.retokenized_tokens = counted
        request.text = None
