"""Whether a run's figures may be believed: VALID, DOUBTFUL or INVALID, with every reason."""

from __future__ import annotations

from enum import IntEnum
from itertools import pairwise
from typing import Any

import msgspec
import numpy as np

from bench.measure.define import Reading, values_of
from bench.measure.record import Record, Sample, Segment
from bench.measure.stats import exponential_fit, quantile
from bench.measure.summary import Readings, Summary, counts_by_chunk, segments_of
from bench.measure.window import Window, drift, in_flight, steady_window, tokens_by_slice

MIN_WINDOW_S = 10.0
MIN_REQUESTS = 50


class Level(IntEnum):
    """How bad a finding is."""

    VALID = 0
    DOUBTFUL = 1
    INVALID = 2


class Finding(msgspec.Struct, frozen=True):
    """One reason to doubt."""

    level: Level
    what: str


class Verdict(msgspec.Struct):
    """The findings and the worst of them."""

    level: Level
    findings: list[Finding]
    checked: dict[str, Any]  # what was looked at and what it came to

    @property
    def exit_code(self) -> int:
        """0 valid or doubtful, 3 invalid."""
        return 3 if self.level is Level.INVALID else 0


def judge_run(
    record: Record, grouped: Readings, summary: Summary, ceiling_events_per_s: float | None = None
) -> Verdict:
    """Look at everything that makes figures wrong. The ceiling is what one process of this client can read here."""
    findings: list[Finding] = []
    checked: dict[str, Any] = {}
    measured = [segment for target in summary.targets for segment in segments_of(record, target)]
    readings = [reading for segment in measured for reading in grouped[segment.number]]
    if not readings:
        return Verdict(Level.INVALID, [Finding(Level.INVALID, "no request was sent")], {})
    _kept_up(record, readings, measured, findings, checked)
    _ceiling(record, measured, readings, ceiling_events_per_s, findings, checked)
    _stimulus(record, measured, grouped, findings, checked)
    for target, part in summary.targets.items():
        mine = [reading for segment in segments_of(record, target) for reading in grouped[segment.number]]
        _outcomes(target, mine, findings)
        _cache(target, record, part.cached_share, findings, checked)
        _windows(target, segments_of(record, target), grouped, findings)
        if counts_by_chunk(part):
            _doubt(
                findings, f"{target}: the server sent no usage and has no tokenizer route: chunks are taken for tokens"
            )
    for change in summary.changes:
        if change.failed:
            _doubt(findings, f"{change.failed} of {change.in_flight} requests under way during {change.name!r} failed")
    level = max((finding.level for finding in findings), default=Level.VALID)
    return Verdict(level, findings, checked)


def _doubt(findings: list[Finding], what: str) -> None:
    findings.append(Finding(Level.DOUBTFUL, what))


def _graded(findings: list[Finding], value: float, doubtful: float, invalid: float, what: str) -> None:
    if value > invalid:
        findings.append(Finding(Level.INVALID, what))
    elif value > doubtful:
        findings.append(Finding(Level.DOUBTFUL, what))


def _kept_up(
    record: Record, readings: list[Reading], measured: list[Segment], findings: list[Finding], checked: dict[str, Any]
) -> None:
    capped_ms = max((s.values["capped_ms"] for s in _workers(record)), default=0.0)
    rated = [reading for reading in readings if reading.request.intended_ns is not None]
    if capped_ms:
        first = min((s.t_ns for s in _workers(record) if s.values["capped_ms"]), default=0) / 1e9
        _doubt(findings, f"the cap on requests in flight was reached: closed loop from t={first:.1f} s")
    elif rated:
        lag_ms = quantile(np.asarray([reading.send_lag_ms for reading in rated]), 0.99)
        checked["send_lag_p99_ms"] = lag_ms
        _graded(findings, lag_ms, 10, 100, f"requests went out late: send lag p99 {lag_ms:.1f} ms")
    late_ms = quantile(np.asarray([reading.request.read_delay_ns / 1e6 for reading in readings]), 0.99)
    checked["read_delay_p99_ms"] = late_ms
    _graded(findings, late_ms, 20, 200, f"the client read late: {late_ms:.1f} ms at worst in 1 % of requests")
    rounds_ms = np.asarray([s.values["round_ms_max"] for s in _workers(record) if "round_ms_max" in s.values])
    if len(rounds_ms):
        away_ms = quantile(rounds_ms, 0.99)
        checked["loop_away_p99_ms"] = away_ms
        if record.header.stamps == "client":  # no kernel to say when bytes came: the loop's own absence is the error
            _graded(findings, away_ms, 20, 200, f"the client was away from its sockets for {away_ms:.1f} ms")
    busiest = _busiest(record, measured)
    checked["client_cpu_share"] = busiest
    _graded(findings, busiest, 0.85, 0.97, f"a client process used {busiest:.0%} of a core")


def _workers(record: Record) -> list[Sample]:
    return [sample for sample in record.samples if sample.source.startswith("worker:")]


def _busiest(record: Record, measured: list[Segment]) -> float:
    """The largest share of a core that a worker used while a measured segment was offered."""
    shares = []
    for segment in measured:
        end_ns = segment.start_ns + segment.duration_ns
        for source in {sample.source for sample in _workers(record)}:
            inside = [s for s in _workers(record) if s.source == source and segment.start_ns <= s.t_ns < end_ns]
            if len(inside) > 1 and inside[-1].t_ns - inside[0].t_ns > 1e9:
                used_s = inside[-1].values["cpu_s"] - inside[0].values["cpu_s"]
                shares.append(used_s / ((inside[-1].t_ns - inside[0].t_ns) / 1e9))
    return max(shares, default=0.0)


def _ceiling(
    record: Record,
    measured: list[Segment],
    readings: list[Reading],
    ceiling: float | None,
    findings: list[Finding],
    checked: dict[str, Any],
) -> None:
    load_s = sum(segment.duration_ns for segment in measured) / 1e9
    events_per_s = sum(len(reading.request.events.t_ns) for reading in readings) / load_s
    checked["events_per_s"] = events_per_s
    checked["ceiling_events_per_s"] = ceiling
    if ceiling:
        share = events_per_s / (ceiling * record.header.environment.get("workers", 1))
        _graded(
            findings, share, 0.7, 0.95, f"{events_per_s:,.0f} events/s are {share:.0%} of what this client can read"
        )


def _stimulus(
    record: Record,
    measured: list[Segment],
    grouped: Readings,
    findings: list[Finding],
    checked: dict[str, Any],
) -> None:
    config = record.header.config
    achieved = []
    for segment in measured:
        if segment.rate_per_s is None or config.get("requests"):
            continue
        sent = [r for r in grouped[segment.number] if r.request.phase == "load" and r.request.turn == 0]
        asked = segment.rate_per_s * segment.duration_ns / 1e9
        # a Poisson process of mean N varies by its square root; that is not a fault of the client
        allowance = 4 / np.sqrt(asked) if config.get("arrivals") != "constant" else 1 / asked
        achieved.append(len(sent) / asked)
        short = 1 - len(sent) / asked - allowance
        _graded(
            findings, short, 0.02, 0.1, f"segment {segment.number}: {len(sent)} requests sent, {asked:.0f} asked for"
        )
        if config.get("arrivals") == "poisson":
            times_s = np.sort([reading.request.sent_ns / 1e9 for reading in sent])
            p = exponential_fit(np.diff(times_s))
            checked[f"poisson_p_segment_{segment.number}"] = p
            if p < 0.01 / max(1, len(measured)):
                _doubt(findings, f"segment {segment.number}: the gaps between sends are not those of a Poisson process")
    if achieved:
        checked["sent_over_asked"] = float(np.mean(achieved))


def _outcomes(target: str, readings: list[Reading], findings: list[Finding]) -> None:
    causes: dict[str, int] = {}
    for reading in readings:
        if reading.failure is not None:
            causes[reading.failure] = causes.get(reading.failure, 0) + 1
    failed = sum(causes.values())
    listed = ", ".join(f"{count} {cause}" for cause, count in sorted(causes.items(), key=lambda item: -item[1]))
    _graded(findings, failed / len(readings), 0.01, 0.2, f"{target}: {failed} of {len(readings)} failed ({listed})")
    ratios = [
        r.request.prompt_tokens / r.request.prompt_tokens_asked
        for r in readings
        if r.failure is None and r.request.prompt_tokens and r.request.prompt_tokens_asked
    ]
    free = [r for r in readings if r.failure is None and not r.request.output_exact and r.request.output_tokens_asked]
    if free:
        share = float(np.mean([r.tokens / (r.request.output_tokens_asked or 1) for r in free]))
        if share < 0.98:
            _doubt(findings, f"{target}: answers have {share:.0%} of the tokens asked; the server takes no ignore_eos")
    if ratios:
        off = float(np.mean(ratios)) - 1
        if abs(off) > 0.02:
            _doubt(findings, f"{target}: prompts are {off:+.1%} off the length asked, by the server's count")


def _cache(target: str, record: Record, cached: float | None, findings: list[Finding], checked: dict[str, Any]) -> None:
    config = record.header.config
    if cached is None:
        cached = _hits_by_counters(record, target)
    checked[f"cached_share_{target}"] = cached
    kind = str(config.get("workload", "")).partition(":")[0]
    if cached is None or kind in ("prefix", "turns", "trace"):
        return
    cache = str(config.get("cache"))
    if cache == "cold":
        _graded(
            findings, cached, 0.05, 0.5, f"{target}: {cached:.0%} of prompt tokens came from a cache meant to be cold"
        )
    elif cache == "warm":
        if cached < 0.5:
            _doubt(findings, f"{target}: only {cached:.0%} of prompt tokens came from a cache meant to be warm")
    elif abs(cached - float(cache)) > 0.1:
        _doubt(findings, f"{target}: {cached:.0%} of prompt tokens were cached, {float(cache):.0%} were meant to be")


def _hits_by_counters(record: Record, target: str) -> float | None:
    start_ns = min((segment.start_ns for segment in segments_of(record, target)), default=0)
    pages = [s for s in record.samples if s.source == f"server:{target}" and s.t_ns >= start_ns]
    pages = [sample for sample in pages if {"cache_hit_tokens", "cache_query_tokens"} <= set(sample.values)]
    if len(pages) < 2:
        return None
    asked = pages[-1].values["cache_query_tokens"] - pages[0].values["cache_query_tokens"]
    hits = pages[-1].values["cache_hit_tokens"] - pages[0].values["cache_hit_tokens"]
    return hits / asked if asked > 0 else None


def _windows(target: str, segments: list[Segment], grouped: Readings, findings: list[Finding]) -> None:
    windows = [steady_window(segment, grouped[segment.number]) for segment in segments]
    length_s = sum(window.length_s for window in windows)
    inside = [r for w in windows for r in grouped[w.segment.number] if w.holds(r.t0_ns)]
    if length_s < MIN_WINDOW_S:
        _doubt(findings, f"{target}: {length_s:.1f} s of steady load; give --duration more than {MIN_WINDOW_S:g} s")
    if len(inside) < MIN_REQUESTS:
        _doubt(findings, f"{target}: {len(inside)} requests in the steady window; tails need {MIN_REQUESTS} and more")
    answer_s = quantile(values_of(inside, "e2el_ms"), 0.5) / 1e3
    for window in windows:
        if window.segment.pair is None and window.length_s < 3 * answer_s:
            _doubt(findings, f"{target}: the steady window ({window.length_s:.1f} s) is under 3 answers' time")
            break
    for window in windows:
        if window.length_s >= MIN_WINDOW_S:
            _stationary(target, window, grouped[window.segment.number], findings)


def _stationary(target: str, window: Window, readings: list[Reading], findings: list[Finding]) -> None:
    place = f"{target}, segment {window.segment.number}"
    speed = drift(tokens_by_slice(readings, window, 10))
    if speed.real:
        _doubt(findings, f"{place}: tokens/s moved {speed.change:+.0%} inside the window")
    if window.segment.rate_per_s is not None:
        times, levels = in_flight(readings)
        edges = np.linspace(window.start_ns, window.end_ns, 11)
        usual = np.asarray(
            [
                float(levels[(times >= low) & (times < high)].mean())
                if ((times >= low) & (times < high)).any()
                else 0.0
                for low, high in pairwise(edges)
            ]
        )
        queue = drift(usual)
        if queue.real and queue.change > 0.5:
            _doubt(
                findings,
                f"{place}: requests in flight grew {queue.change:+.0%}: the rate is more than the server can do",
            )
