"""The report: one HTML page that needs nothing else."""

from __future__ import annotations

import math
from html import escape
from typing import Any

import msgspec
import numpy as np
import yaml

from bench.measure.define import DEFINITIONS, Reading, values_of
from bench.measure.outcome import CAUSES
from bench.measure.paired import PairedDifference
from bench.measure.record import Record, Sample
from bench.measure.summary import Figures, Readings, Summary, TargetSummary, segments_of
from bench.measure.verdict import Verdict
from bench.measure.window import in_flight, steady_window
from bench.report.style import STYLE
from bench.report.svg import Series, cdf, chart
from bench.report.table import CHANGE_COLUMNS, PAIRED_COLUMNS, change_rows, head_rows, number, paired_rows, with_error

_BINS = 120
_COLUMNS = ("mean", "p50", "p90", "p95", "p99", "max")
_HEADLINES = (("ttft_ms", "p50"), ("ttft_ms", "p99"), ("tpot_ms", "p50"), ("tpot_ms", "p99"), ("e2el_ms", "p50"))


def render(
    record: Record, grouped: Readings, summary: Summary, verdict: Verdict, paired: list[PairedDifference]
) -> str:
    """The page as text."""
    header = record.header
    title = f"{header.config.get('workload')} on {', '.join(summary.targets)}"
    parts = [f"<h1>{escape(title)}</h1>", f"<p class=dim>{escape(header.started_at)}</p>", _verdict(verdict)]
    for name, target in summary.targets.items():
        if len(summary.targets) > 1:
            parts.append(f"<h2>{escape(name)}</h2>")
        parts.append(_cards(target))
    parts.append(_paired(paired))
    parts.append('<div class="charts">')
    for name in summary.targets:
        readings = [r for s in segments_of(record, name) for r in grouped[s.number]]
        parts += _timeline(record, name, readings, len(summary.targets) > 1)
    parts += _distributions(record, summary, grouped)
    parts.append("</div>")
    parts.append(table(list(CHANGE_COLUMNS), change_rows(summary.changes)))
    for target in summary.targets.values():
        parts.append(_tables(target, len(summary.targets) > 1))
    parts.append(_details(record, verdict))
    return page(title, "".join(parts))


def page(title: str, body: str) -> str:
    """A whole document around a body."""
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        f'<meta name="viewport" content="width=device-width,initial-scale=1"><style>{STYLE}</style></head>'
        f"<body><main>{body}</main></body></html>\n"
    )


def table(columns: list[str], rows: list[list[str]], caption: str = "") -> str:
    """An HTML table; the first column is text, the others are figures. Cells are escaped."""
    if not rows:
        return ""
    head = "".join(f"<th>{escape(column)}</th>" for column in columns)
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    shown = f"<caption>{escape(caption)}</caption>" if caption else ""
    return f'<div class="wide"><table>{shown}<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _verdict(verdict: Verdict) -> str:
    items = "".join(
        f"<li><b>{finding.level.name.lower()}</b> {escape(finding.what)}</li>"
        for finding in sorted(verdict.findings, key=lambda finding: -finding.level)
    )
    return (
        f'<section class="verdict {verdict.level.name.lower()}"><h2>{verdict.level.name}</h2><ul>{items}</ul></section>'
    )


def _cards(target: TargetSummary) -> str:
    steady = target.steady
    cards = [("output tokens/s", with_error(steady.output_tokens_per_s))]
    for metric, column in _HEADLINES:
        row = steady.metrics.get(metric)
        if row is not None:
            definition = DEFINITIONS[metric]
            cards.append((f"{definition.title} {column}, {definition.unit}", with_error(row[column])))
    cards.append(("requests, failed", f"{steady.requests}, {steady.requests - steady.succeeded}"))
    if steady.attainment is not None:
        cards.append(("within limits", f"{steady.attainment:.1%}"))
    if target.per_gpu_tokens_per_s is not None:
        cards.append(("tokens/s per GPU", number(target.per_gpu_tokens_per_s)))
    if target.cost_per_million_output_tokens is not None:
        cards.append(("cost per million tokens", number(target.cost_per_million_output_tokens)))
    shown = "".join(f"<div><b>{escape(value)}</b><span>{escape(name)}</span></div>" for name, value in cards)
    return f'<div class="cards">{shown}</div>'


def _timeline(record: Record, target: str, readings: list[Reading], named: bool) -> list[str]:
    if not readings:
        return []
    prefix = f"{target}: " if named else ""
    start_s = min(reading.t0_ns for reading in readings) / 1e9
    end_s = max(reading.request.end_ns for reading in readings) / 1e9
    span = (start_s, end_s)
    segments = segments_of(record, target)
    by_segment: dict[int, list[Reading]] = {segment.number: [] for segment in segments}
    for reading in readings:
        by_segment[reading.request.segment].append(reading)
    windows = [steady_window(segment, by_segment[segment.number]) for segment in segments]
    shaded = [(window.start_ns / 1e9, window.end_ns / 1e9) for window in windows]
    good = [reading for reading in readings if reading.failure is None]
    bad = [reading for reading in readings if reading.failure is not None]
    times, levels = in_flight(readings)
    charts = [
        chart(f"{prefix}tokens/s", [_token_rate(readings, span)], "s", "tokens/s", span, shaded),
        chart(
            f"{prefix}requests in flight",
            [Series("", (times / 1e9).tolist(), levels.tolist(), "step")], "s", "requests", span, shaded,
        ),
        chart(
            f"{prefix}TTFT by time of sending, x: failed",
            [
                Series("TTFT", [r.t0_ns / 1e9 for r in good], [r.ttft_ms or 0.0 for r in good], "points"),
                Series("failed", [r.t0_ns / 1e9 for r in bad], [0.0] * len(bad), "crosses"),
            ],
            "s",
            "ms",
            span,
            shaded,
        ),
    ]  # fmt: skip
    return charts + _server_charts(record, target, span, shaded, prefix)


def _token_rate(readings: list[Reading], span: tuple[float, float]) -> Series:
    edges = np.linspace(span[0], span[1], _BINS + 1)
    times = np.concatenate([reading.token_t_ns for reading in readings]) / 1e9
    counts = np.concatenate([reading.token_counts for reading in readings])
    rate = np.histogram(times, bins=edges, weights=counts)[0] / (edges[1] - edges[0])
    return Series("tokens/s", edges[:-1].tolist(), rate.tolist(), "step")


def _server_charts(
    record: Record, target: str, span: tuple[float, float], shaded: list[tuple[float, float]], prefix: str
) -> list[str]:
    inside = [sample for sample in record.samples if span[0] <= sample.t_ns / 1e9 <= span[1]]

    def series(source: str, key: str, name: str) -> Series:
        found = [sample for sample in inside if sample.source == source and key in sample.values]
        return Series(name, [sample.t_ns / 1e9 for sample in found], [sample.values[key] for sample in found])

    def over_time(title: str, shown: list[Series], unit: str, y_end: float | None = None) -> str:
        return chart(title, shown, "s", unit, span, shaded, y_end)

    source = f"server:{target}"
    queue = [series(source, "running", "running"), series(source, "waiting", "waiting")]
    hits = _cache_hits([sample for sample in inside if sample.source == source])
    gpus = sorted({sample.source for sample in inside if sample.source.startswith("gpu:")})
    return [
        over_time(f"{prefix}server: running and waiting", queue, "requests"),
        over_time(f"{prefix}server: KV cache in use", [series(source, "kv_usage", "")], "share", 1.0),
        over_time(f"{prefix}server: prompt tokens found in the cache", [hits], "share", 1.0),
        over_time("GPU power", [series(gpu, "power_w", gpu) for gpu in gpus], "W"),
        over_time("GPU memory", [series(gpu, "memory_bytes", gpu) for gpu in gpus], "bytes"),
    ]


def _cache_hits(pages: list[Sample]) -> Series:
    """The share of prompt tokens found in the cache, from each reading of the counters to the next."""
    pages = [page for page in pages if {"cache_hit_tokens", "cache_query_tokens"} <= page.values.keys()]
    times_s = np.asarray([page.t_ns / 1e9 for page in pages[1:]])
    hits, asked = (np.diff([page.values[f"cache_{key}_tokens"] for page in pages]) for key in ("hit", "query"))
    moved = asked > 0
    return Series("", times_s[moved].tolist(), (hits[moved] / asked[moved]).tolist(), "step")


def _distributions(record: Record, summary: Summary, grouped: Readings) -> list[str]:
    named: dict[str, list[Reading]] = {}
    for name in summary.targets:
        named[name] = [r for s in segments_of(record, name) for r in grouped[s.number] if r.failure is None]
    charts = [
        cdf(f"{DEFINITIONS[metric].title}: share of requests at or below",
            {name: values_of(readings, metric).tolist() for name, readings in named.items()}, DEFINITIONS[metric].unit)
        for metric in ("ttft_ms", "tpot_ms", "e2el_ms", "stall_ms")
    ]  # fmt: skip
    for target in summary.targets.values():
        if target.models:
            charts.append(_by_model(target))
    return charts


def _by_model(target: TargetSummary) -> str:
    ranked = sorted(target.models.values(), key=lambda figures: -figures.requests)
    places = [float(place + 1) for place in range(len(ranked))]

    def of(column: str) -> list[float]:
        return [f.metrics["ttft_ms"][column].value if "ttft_ms" in f.metrics else math.nan for f in ranked]

    return chart(
        f"{target.target}: TTFT by adapter, most used first",
        [Series("p50", places, of("p50")), Series("p99", places, of("p99"))],
        "adapter",
        "ms",
    )


def _tables(target: TargetSummary, named: bool) -> str:
    steady = target.steady
    rows = []
    for metric, row in steady.metrics.items():
        definition = DEFINITIONS[metric]
        adjusted = steady.adjusted.get(metric, {}).get("p99")
        cells = [with_error(row[column]) for column in _COLUMNS]
        rows.append([f"{definition.title} ({definition.unit})", *cells, number(adjusted) if adjusted else "",
                     definition.formula])  # fmt: skip
    parts = [f"<h2>{escape(target.target)}</h2>" if named else ""]
    parts.append(table(["steady window", *_COLUMNS, "p99, failures = inf", "formula"], rows))
    if steady.itl_refused:
        parts.append(f"<p class=dim>ITL: {escape(steady.itl_refused)}</p>")
    parts.append(table(["", "steady", "full run"], [list(row) for row in head_rows(target)]))
    limits = [[limit, number(seen), "kept" if kept else "broken"] for limit, (seen, kept) in steady.slo.items()]
    parts.append(table(["objective", "observed", ""], limits))
    if target.repeats:
        columns = list(target.repeats[0])
        repeats = [[number(row[column]) for column in columns] for row in target.repeats]
        parts.append(table(columns, repeats, "repeats"))
    parts.append(table(["cause", "requests", "meaning"], _failures(target.full), "failures"))
    parts.append(table(["adapter", "requests", "failed", "TTFT p50", "TTFT p99", "TPOT p50", "first TTFT",
                       "later TTFT"], _model_rows(target), "by adapter"))  # fmt: skip
    if target.probe is not None:
        probe = [
            [DEFINITIONS[m].title, *(number(row[c].value) for c in _COLUMNS)] for m, row in target.probe.metrics.items()
        ]
        parts.append(table(["base-model probe beside the load", *_COLUMNS], probe))
    compat = [
        [tool, *(number(row[name]) for name in ("ttft_ms", "tpot_ms", "itl_mean_ms", "e2el_ms", "tokens", "successes"))]
        for tool, row in target.compat.items()
    ]
    parts.append(table(["as defined by", "TTFT", "TPOT", "ITL", "E2EL", "tokens", "successes"], compat,
                       "means under other tools' definitions, ms"))  # fmt: skip
    return "".join(parts)


def _failures(figures: Figures) -> list[list[str]]:
    return [
        [cause, str(count), CAUSES["http" if cause.startswith("http") else cause]]
        for cause, count in sorted(figures.failures.items(), key=lambda item: -item[1])
    ]


def _model_rows(target: TargetSummary) -> list[list[str]]:
    rows = []
    for name, figures in sorted(target.models.items(), key=lambda item: -item[1].requests):
        first = target.first_use.get(name, {})
        picked = [("ttft_ms", "p50"), ("ttft_ms", "p99"), ("tpot_ms", "p50")]
        cells = [number(figures.metrics[m][c].value) if m in figures.metrics else "-" for m, c in picked]
        rows.append([name, str(figures.requests), str(figures.requests - figures.succeeded), *cells,
                     number(first.get("first_ttft_ms")), number(first.get("later_ttft_ms"))])  # fmt: skip
    return rows


def _paired(paired: list[PairedDifference]) -> str:
    return table(list(PAIRED_COLUMNS), paired_rows(paired))


def _details(record: Record, verdict: Verdict) -> str:
    header = record.header
    shown: dict[str, Any] = {
        "config": header.config,
        "workload hash": header.workload_hash,
        "checked": verdict.checked,
        "environment": header.environment,
        "servers": header.servers,
    }
    parts = [
        f"<details><summary>{escape(name)}</summary><pre>{escape(_yaml(value))}</pre></details>"
        for name, value in shown.items()
    ]
    return "".join(parts)


def _yaml(value: Any) -> str:
    return str(yaml.safe_dump(msgspec.json.decode(msgspec.json.encode(value)), sort_keys=False))
