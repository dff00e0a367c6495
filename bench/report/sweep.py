"""A sweep's table and page: load against latency and throughput."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

import msgspec
from rich.console import Console
from rich.table import Table

from bench.config import RunConfig
from bench.measure.record import Record, write_record
from bench.report.html import page, table
from bench.report.svg import Series, chart
from bench.report.table import with_error
from bench.search import Point

_FIGURES = (("ttft_ms", "p50"), ("ttft_ms", "p99"), ("tpot_ms", "p50"), ("tpot_ms", "p99"))
_COLUMNS = ("load", "tokens/s", "TTFT p50", "TTFT p99", "TPOT p50", "TPOT p99", "failed", "within limits")


def _rows(points: list[Point]) -> list[list[str]]:
    return [
        [
            f"{point.load:.4g}{'/s' if point.kind == 'rate' else ' users'}",
            with_error(point.figures.output_tokens_per_s),
            *(with_error(point.of(metric, column)) for metric, column in _FIGURES),
            str(point.figures.requests - point.figures.succeeded),
            "-" if point.figures.attainment is None else f"{point.figures.attainment:.1%}",
        ]
        for point in points
    ]


def print_points(console: Console, points: list[Point]) -> None:
    """One line a load."""
    shown = Table(box=None, padding=(0, 1))
    for column in _COLUMNS:
        shown.add_column(column, justify="right", no_wrap=True)
    for row in _rows(points):
        shown.add_row(*row)
    console.print(shown)


def save_sweep(record: Record, points: list[Point], config: RunConfig) -> Path:
    """Write record, JSON and HTML into a folder of their own; returns it."""
    folder = config.out / (config.name or datetime.now(UTC).strftime("%Y%m%d-%H%M%S"))
    folder.mkdir(parents=True, exist_ok=True)
    write_record(folder / "record.jsonl.gz", record)
    (folder / "result.json").write_bytes(msgspec.json.format(msgspec.json.encode(points), indent=1))
    (folder / "report.html").write_text(render_sweep(record, points))
    return folder


def render_sweep(record: Record, points: list[Point]) -> str:
    """The page as text."""
    unit = "requests/s" if points and points[0].kind == "rate" else "users"
    loads = [point.load for point in points]

    def line(name: str, metric: str, column: str) -> Series:
        found = [point.of(metric, column) for point in points]
        return Series(name, loads, [i.value for i in found], "line", [i.low for i in found], [i.high for i in found])

    tokens = [point.figures.output_tokens_per_s for point in points]
    rates = Series("", loads, [i.value for i in tokens], "line", [i.low for i in tokens], [i.high for i in tokens])
    speed = [point.of("user_tokens_per_s", "p50").value for point in points]
    charts = [
        chart("output tokens/s by load", [rates], unit, "tokens/s"),
        chart("TTFT by load", [line("p50", "ttft_ms", "p50"), line("p99", "ttft_ms", "p99")], unit, "ms"),
        chart("TPOT by load", [line("p50", "tpot_ms", "p50"), line("p99", "tpot_ms", "p99")], unit, "ms"),
        chart(
            "total tokens/s against speed per user",
            [Series("", speed, rates.y, "line")],
            "tokens/s per user",
            "tokens/s",
        ),
    ]
    title = f"{record.header.config.get('workload')}: load against latency"
    body = f"<h1>{title}</h1><p class=dim>{record.header.started_at}</p>"
    body += f'<div class="charts">{"".join(charts)}</div>{table(list(_COLUMNS), _rows(points))}'
    return page(title, body)
