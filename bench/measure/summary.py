"""All figures of a run from its record: a pure function, run after the load and again by `replay`."""

from __future__ import annotations

import math

import msgspec
import numpy as np

from bench.measure import compat
from bench.measure.define import CHUNKS, REQUEST_METRICS, Floats, Reading, read, values_of, values_with_failures
from bench.measure.record import Mark, Record, Segment
from bench.measure.slo import judge, meets, parse_slo
from bench.measure.stats import (
    Interval,
    bootstrap_mean,
    bootstrap_quantile,
    bootstrap_ratio,
    quantile,
    quantile_of_sorted,
    repeats_interval,
    wider,
)
from bench.measure.window import Window, full_window, steady_window, tokens_by_slice

WARMUP = "warmup"
QUANTILES = {"p50": 0.5, "p90": 0.9, "p95": 0.95, "p99": 0.99}
ADJUSTED = ("ttft_ms", "tpot_ms", "e2el_ms")
MIN_BLOCKS = 20
_CI_QUANTILES = ("p50", "p99")


class Figures(msgspec.Struct):
    """What one population of requests gives over some windows. Quantiles are of requests that succeeded; `adjusted`
    ones hold failures to be infinitely slow."""

    length_s: float
    requests: int
    succeeded: int
    failures: dict[str, int]
    metrics: dict[str, dict[str, Interval]]
    adjusted: dict[str, dict[str, float]]
    requests_per_s: Interval
    output_tokens_per_s: Interval
    total_tokens_per_s: float
    input_tokens_mean: float
    output_tokens_mean: float
    goodput_per_s: float | None = None
    attainment: float | None = None  # requests within every limit / requests sent
    slo: dict[str, tuple[float, bool]] = {}
    itl_refused: str | None = None


class TargetSummary(msgspec.Struct):
    """One server's part of a run."""

    target: str
    steady: Figures
    full: Figures
    counted_by: dict[str, int]
    cached_share: float | None
    models: dict[str, Figures]
    first_use: dict[str, dict[str, float]]  # model -> first and later TTFT in ms
    fairness: float | None  # tokens/s of the slowest user speed over that of the fastest, over models
    compat: dict[str, dict[str, float | None]]
    per_gpu_tokens_per_s: float | None = None
    cost_per_million_output_tokens: float | None = None
    gateway_cpu_us_per_event: float | None = None
    probe: Figures | None = None
    repeats: list[dict[str, float]] = []


class ChangeUnderLoad(msgspec.Struct):
    """Something done during the run, such as loading an adapter, and what became of the requests under way."""

    name: str
    at_s: float
    took_ms: float
    ok: bool
    answer: str
    in_flight: int
    failed: int


class Summary(msgspec.Struct):
    """A whole run."""

    targets: dict[str, TargetSummary]
    changes: list[ChangeUnderLoad] = []


def segments_of(record: Record, target: str) -> list[Segment]:
    """The measured segments of a target."""
    return [segment for segment in record.header.segments if segment.target == target and segment.label != WARMUP]


Readings = dict[int, list[Reading]]  # segment -> its requests in order of t0


def readings_by_segment(record: Record) -> Readings:
    """Every request read, by segment, in order of t0."""
    grouped: Readings = {segment.number: [] for segment in record.header.segments}
    for request in record.requests:
        grouped[request.segment].append(read(request))
    for readings in grouped.values():
        readings.sort(key=lambda reading: reading.t0_ns)
    return grouped


def summarize(record: Record, grouped: Readings) -> Summary:
    """All figures of a run, from its record and that record's readings."""
    names = dict.fromkeys(segment.target for segment in record.header.segments)
    everything = [reading for readings in grouped.values() for reading in readings]
    changes = [_change(mark, everything) for mark in record.marks]
    return Summary({name: _target(record, name, grouped) for name in names}, changes)


def _change(mark: Mark, readings: list[Reading]) -> ChangeUnderLoad:
    end_ns = mark.t_ns + mark.duration_ns
    under_way = [r for r in readings if r.request.sent_ns <= end_ns and r.request.end_ns >= mark.t_ns]
    failed = sum(reading.failure is not None for reading in under_way)
    took_ms = mark.duration_ns / 1e6
    return ChangeUnderLoad(mark.name, mark.t_ns / 1e9, took_ms, mark.ok, mark.detail, len(under_way), failed)


def _target(record: Record, target: str, grouped: Readings) -> TargetSummary:
    config = record.header.config
    segments = segments_of(record, target)
    load = {s.number: [r for r in grouped[s.number] if r.request.phase == "load"] for s in segments}
    probes = {s.number: [r for r in grouped[s.number] if r.request.phase == "probe"] for s in segments}
    everything = [reading for s in segments for reading in load[s.number]]
    full = [full_window(segment, load[segment.number]) for segment in segments]
    steady = [steady_window(segment, load[segment.number]) for segment in segments]
    objective = str(config.get("slo", ""))
    steady_figures = figures(load, steady, objective)
    models = sorted({reading.request.model for reading in everything})
    by_model = {
        model: figures({n: [r for r in rs if r.request.model == model] for n, rs in load.items()}, steady, objective)
        for model in (models if len(models) > 1 else [])
    }
    counted: dict[str, int] = {}
    for reading in everything:
        if reading.failure is None:
            counted[reading.counted_by] = counted.get(reading.counted_by, 0) + 1
    gpus, price = config.get("gpus"), config.get("gpu_hour_price")
    rate = steady_figures.output_tokens_per_s.value
    return TargetSummary(
        target=target,
        steady=steady_figures,
        full=figures(load, full, objective),
        counted_by=counted,
        cached_share=_cached_share(everything),
        models=by_model,
        first_use=_first_use(everything) if len(models) > 1 else {},
        fairness=_fairness(by_model),
        compat=compat.means(everything),
        per_gpu_tokens_per_s=rate / gpus if gpus else None,
        cost_per_million_output_tokens=price * (gpus or 1) / (rate * 3600) * 1e6 if price and rate > 0 else None,
        gateway_cpu_us_per_event=_gateway_cpu(record, target, everything),
        probe=figures(probes, steady, objective) if any(probes.values()) else None,
        repeats=_repeats(load, steady),
    )


def figures(load: dict[int, list[Reading]], windows: list[Window], objective: str = "") -> Figures:
    """The figures of the requests whose t0 lies in their segment's window; tokens count when they arrive in it."""
    inside = {w.segment.number: [r for r in load[w.segment.number] if w.holds(r.t0_ns)] for w in windows}
    chosen = [reading for readings in inside.values() for reading in readings]
    good = [reading for reading in chosen if reading.failure is None]
    failures: dict[str, int] = {}
    for reading in chosen:
        if reading.failure is not None:
            failures[reading.failure] = failures.get(reading.failure, 0) + 1
    length_s = sum(window.length_s for window in windows)
    blocks = _blocks(inside, windows)
    output = _output_rate(load, windows)
    prompt_tokens = [float(r.request.prompt_tokens) for r in good if r.request.prompt_tokens is not None]
    result = Figures(
        length_s=length_s,
        requests=len(chosen),
        succeeded=len(good),
        failures=failures,
        metrics=_metrics(blocks, inside, windows),
        adjusted={
            metric: {name: quantile(values_with_failures(chosen, metric), q) for name, q in QUANTILES.items()}
            for metric in ADJUSTED
        },
        requests_per_s=_request_rate(blocks, length_s),
        output_tokens_per_s=output,
        total_tokens_per_s=output.value + (sum(prompt_tokens) / length_s if length_s else 0.0),
        input_tokens_mean=float(np.mean(prompt_tokens)) if prompt_tokens else math.nan,
        output_tokens_mean=float(np.mean([reading.tokens for reading in good])) if good else math.nan,
    )
    if good and not all(reading.token_times_known for reading in good):
        result.itl_refused = (
            "several tokens an event and no count per event: the time of a token is not known; see chunk gap and TPOT"
        )
    if objective:
        limits = parse_slo(objective)
        kept = sum(meets(reading, limits) for reading in chosen)
        result.goodput_per_s = kept / length_s if length_s else None
        result.attainment = kept / len(chosen) if chosen else None
        result.slo = judge(chosen, limits)
    return result


def _blocks(inside: dict[int, list[Reading]], windows: list[Window]) -> list[list[Reading]]:
    """The requests of all windows in blocks of consecutive time."""
    each = max(1, math.ceil(MIN_BLOCKS / max(1, len(windows))))
    blocks: list[list[Reading]] = []
    for window in windows:
        parts: list[list[Reading]] = [[] for _ in range(each)]
        span_ns = max(1, window.end_ns - window.start_ns)
        for reading in inside[window.segment.number]:
            parts[min(each - 1, (reading.t0_ns - window.start_ns) * each // span_ns)].append(reading)
        blocks += parts
    return blocks


def _metrics(
    blocks: list[list[Reading]], inside: dict[int, list[Reading]], windows: list[Window]
) -> dict[str, dict[str, Interval]]:
    good = [[reading for reading in block if reading.failure is None] for block in blocks]
    by_repeat: dict[int, list[Reading]] = {}
    for window in windows:
        kept = [reading for reading in inside[window.segment.number] if reading.failure is None]
        by_repeat.setdefault(window.segment.repeat, []).extend(kept)
    repeats = list(by_repeat.values())
    table = {
        metric: _spread([values_of(block, metric) for block in good], [values_of(part, metric) for part in repeats])
        for metric in REQUEST_METRICS
    }
    table["chunk_gap_ms"] = _spread([chunk_gaps(block) for block in good], [chunk_gaps(part) for part in repeats])
    if all(reading.token_times_known for block in good for reading in block):
        table["itl_ms"] = _spread([token_gaps(block) for block in good], [token_gaps(part) for part in repeats])
    return {metric: row for metric, row in table.items() if row}


def _spread(blocks: list[Floats], repeats: list[Floats]) -> dict[str, Interval]:
    """Mean and quantiles, with intervals on the mean, the median and the 99th percentile."""
    pooled = np.sort(np.concatenate(blocks)) if blocks else np.zeros(0)
    if not len(pooled):
        return {}
    repeats = [part for part in repeats if len(part)]
    row = {"mean": _with_repeats(bootstrap_mean(blocks), np.asarray([part.mean() for part in repeats]))}
    for name, q in QUANTILES.items():
        if name in _CI_QUANTILES:
            each = np.asarray([quantile(part, q) for part in repeats])
            row[name] = _with_repeats(bootstrap_quantile(blocks, q), each)
        else:
            row[name] = Interval(quantile_of_sorted(pooled, q), math.nan, math.nan, math.nan, 0)
    row["max"] = Interval(float(pooled[-1]), math.nan, math.nan, math.nan, 0)
    return row


def _with_repeats(interval: Interval, repeats: Floats) -> Interval:
    """The wider of the interval within and the one between repeats, where there are enough repeats to tell."""
    return wider(interval, repeats_interval(interval.value, repeats)) if len(repeats) >= 3 else interval


def chunk_gaps(readings: list[Reading]) -> Floats:
    """All times between events with tokens, in milliseconds."""
    return np.concatenate([reading.gaps_ms for reading in readings]) if readings else np.zeros(0)


def token_gaps(readings: list[Reading]) -> Floats:
    """The time of every token after a request's first event: the event's gap divided by its tokens, once a token."""
    parts = []
    for reading in readings:
        counts = reading.token_counts[1:]
        some = counts > 0
        parts.append(np.repeat(reading.gaps_ms[some] / counts[some], counts[some].astype(int)))
    return np.concatenate(parts) if parts else np.zeros(0)


def _output_rate(load: dict[int, list[Reading]], windows: list[Window]) -> Interval:
    each = max(1, math.ceil(MIN_BLOCKS / max(1, len(windows))))
    tokens, seconds, by_repeat = [], [], dict[int, tuple[float, float]]()
    for window in windows:
        good = [reading for reading in load[window.segment.number] if reading.failure is None]
        parts = tokens_by_slice(good, window, each)
        tokens.append(parts)
        seconds.append(np.full(each, window.length_s / each))
        had = by_repeat.get(window.segment.repeat, (0.0, 0.0))
        by_repeat[window.segment.repeat] = (had[0] + float(parts.sum()), had[1] + window.length_s)
    if not tokens:
        return Interval(math.nan, math.nan, math.nan, math.nan, 0)
    rates = np.asarray([count / length for count, length in by_repeat.values() if length > 0])
    return _with_repeats(bootstrap_ratio(np.concatenate(tokens), np.concatenate(seconds)), rates)


def _request_rate(blocks: list[list[Reading]], length_s: float) -> Interval:
    counts = np.asarray([float(sum(reading.failure is None for reading in block)) for block in blocks])
    return bootstrap_ratio(counts, np.full(len(blocks), length_s / max(1, len(blocks))))


def _cached_share(readings: list[Reading]) -> float | None:
    pairs = [
        (r.request.cached_tokens, r.request.prompt_tokens)
        for r in readings
        if r.request.cached_tokens is not None and r.request.prompt_tokens
    ]
    return sum(cached for cached, _ in pairs) / sum(total or 0 for _, total in pairs) if pairs else None


def _gateway_cpu(record: Record, target: str, readings: list[Reading]) -> float | None:
    """CPU time of a gateway that states it, an event that it relayed: over the whole load, its idle time included."""
    pages = [sample.values for sample in record.samples if sample.source == f"server:{target}"]
    used_s = [values["gateway_cpu_s"] for values in pages if "gateway_cpu_s" in values]
    events = sum(len(reading.request.events.t_ns) for reading in readings)
    return (used_s[-1] - used_s[0]) / events * 1e6 if len(used_s) > 1 and events else None


def _first_use(readings: list[Reading]) -> dict[str, dict[str, float]]:
    """model -> TTFT of its first request and the median of the later ones: what a cold adapter costs."""
    table: dict[str, dict[str, float]] = {}
    for model in sorted({reading.request.model for reading in readings}):
        times = [
            r.ttft_ms for r in readings if r.request.model == model and r.failure is None and r.ttft_ms is not None
        ]
        if len(times) > 1:
            table[model] = {"first_ttft_ms": times[0], "later_ttft_ms": float(np.median(times[1:]))}
    return table


def _fairness(by_model: dict[str, Figures]) -> float | None:
    speeds = [
        f.metrics["user_tokens_per_s"]["p50"].value for f in by_model.values() if "user_tokens_per_s" in f.metrics
    ]
    return min(speeds) / max(speeds) if len(speeds) > 1 else None


def _repeats(load: dict[int, list[Reading]], windows: list[Window]) -> list[dict[str, float]]:
    """A line of plain values for each repeat, so that a reader sees the spread himself."""
    rows = []
    for repeat in sorted({window.segment.repeat for window in windows}):
        mine = [window for window in windows if window.segment.repeat == repeat]
        good = [r for w in mine for r in load[w.segment.number] if w.holds(r.t0_ns) and r.failure is None]
        row: dict[str, float] = {"repeat": float(repeat), "requests": float(len(good))}
        for metric in ("ttft_ms", "tpot_ms", "e2el_ms"):
            values = values_of(good, metric)
            row[f"{metric[:-3]}_p50"], row[f"{metric[:-3]}_p99"] = quantile(values, 0.5), quantile(values, 0.99)
        row["output_tokens_per_s"] = _output_rate(load, mine).value
        rows.append(row)
    return rows


def counts_by_chunk(summary: TargetSummary) -> int:
    """How many requests had their tokens counted as chunks, for want of anything better."""
    return summary.counted_by.get(CHUNKS, 0)
