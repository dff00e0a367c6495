"""The tables printed at the end of a run."""

from __future__ import annotations

import math

from rich.console import Console
from rich.table import Table

from bench.measure.define import DEFINITIONS
from bench.measure.paired import PairedDifference
from bench.measure.stats import Interval
from bench.measure.summary import ChangeUnderLoad, Figures, Summary, TargetSummary
from bench.measure.verdict import Level, Verdict

_STYLE = {Level.VALID: "green", Level.DOUBTFUL: "yellow", Level.INVALID: "red"}
_COLUMNS = ("mean", "p50", "p90", "p99", "max")
_METRICS = ("ttft_ms", "tpot_ms", "itl_ms", "chunk_gap_ms", "e2el_ms", "stall_ms", "user_tokens_per_s", "send_lag_ms")
_MODELS_SHOWN = 12


def number(value: float | None) -> str:
    """A figure with about four digits; "-" for what is not known."""
    if value is None or math.isnan(value):
        return "-"
    if math.isinf(value):
        return "failed"
    if value == 0 or abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.{max(0, 3 - math.floor(math.log10(abs(value))))}f}"


def with_error(interval: Interval) -> str:
    """A figure with half the width of its 95 % interval."""
    if math.isnan(interval.low):
        return number(interval.value)
    half = interval.half_width
    return f"{number(interval.value)} ±{half:.2g}" if half < 100 else f"{number(interval.value)} ±{half:,.0f}"


def print_run(console: Console, summary: Summary, verdict: Verdict, paired: list[PairedDifference]) -> None:
    """Every target's figures, what one adds to another, then the verdict."""
    for target in summary.targets.values():
        print_target(console, target)
    if paired:
        _print_paired(console, paired)
    if summary.changes:
        _print_changes(console, summary.changes)
    print_verdict(console, verdict)


def print_target(console: Console, target: TargetSummary) -> None:
    """One target's tables."""
    steady = target.steady
    head = Table(title=f"[bold]{target.target}[/]", title_justify="left", show_header=True, box=None, padding=(0, 2))
    for name in ("", "steady", "full run"):
        head.add_column(name, justify="left" if not name else "right")
    for row in head_rows(target):
        head.add_row(*row)
    console.print(head)
    console.print(_metrics(steady))
    if steady.itl_refused:
        console.print(f"ITL: {steady.itl_refused}", style="dim")
    for limit, (observed, kept) in steady.slo.items():
        console.print(f"{limit}: {number(observed)} [{'green]kept' if kept else 'red]broken'}[/]")
    if target.models:
        _print_models(console, target)
    if target.probe is not None:
        console.print("base-model probe beside the load:")
        console.print(_metrics(target.probe))
    console.print(_compat(target))


def head_rows(target: TargetSummary) -> list[tuple[str, str, str]]:
    """(what, in the steady window, in the full run): what a target's tables begin with."""
    steady, full = target.steady, target.full
    rows = [
        ("window s", number(steady.length_s), number(full.length_s)),
        ("requests, failed", _counts(steady), _counts(full)),
        ("requests/s", with_error(steady.requests_per_s), with_error(full.requests_per_s)),
        ("output tokens/s", with_error(steady.output_tokens_per_s), with_error(full.output_tokens_per_s)),
        ("total tokens/s", number(steady.total_tokens_per_s), number(full.total_tokens_per_s)),
        ("tokens in / out, mean", _means(steady), _means(full)),
    ]
    if target.per_gpu_tokens_per_s is not None:
        rows.append(("output tokens/s per GPU", number(target.per_gpu_tokens_per_s), ""))
    if target.cost_per_million_output_tokens is not None:
        rows.append(("cost per million output tokens", number(target.cost_per_million_output_tokens), ""))
    if steady.goodput_per_s is not None:
        rows.append(("goodput requests/s", number(steady.goodput_per_s), number(full.goodput_per_s)))
        rows.append(("within limits / sent", _share(steady.attainment), _share(full.attainment)))
    if target.cached_share is not None:
        rows.append(("prompt tokens from cache", _share(target.cached_share), ""))
    if target.gateway_cpu_us_per_event is not None:
        rows.append(("gateway CPU us per event", number(target.gateway_cpu_us_per_event), ""))
    rows.append(("tokens counted by", ", ".join(f"{how} ({n})" for how, n in target.counted_by.items()), ""))
    return rows


def print_verdict(console: Console, verdict: Verdict) -> None:
    """The verdict and its reasons."""
    console.print(f"[{_STYLE[verdict.level]} bold]{verdict.level.name}[/]")
    for finding in sorted(verdict.findings, key=lambda finding: -finding.level):
        console.print(f"  [{_STYLE[finding.level]}]{finding.level.name.lower()}[/] {finding.what}", highlight=False)


def _counts(figures: Figures) -> str:
    return f"{figures.requests}, {figures.requests - figures.succeeded}"


def _means(figures: Figures) -> str:
    return f"{number(figures.input_tokens_mean)} / {number(figures.output_tokens_mean)}"


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"


def _metrics(figures: Figures) -> Table:
    table = Table(box=None, padding=(0, 1))
    table.add_column("", no_wrap=True)
    for column in (*_COLUMNS, "p99 incl. failed"):
        table.add_column(column, justify="right", no_wrap=True)
    for metric in _METRICS:
        row = figures.metrics.get(metric)
        # chunks are shown where tokens cannot be; a lag only where there was a schedule to lag behind
        if row is None or (metric == "chunk_gap_ms" and "itl_ms" in figures.metrics):
            continue
        if metric == "send_lag_ms" and row["max"].value == 0:
            continue
        definition = DEFINITIONS[metric]
        adjusted = figures.adjusted.get(metric, {}).get("p99")
        cells = [with_error(row[column]) for column in _COLUMNS]
        table.add_row(f"{definition.title} [dim]{definition.unit}[/]", *cells, number(adjusted) if adjusted else "")
    return table


def _print_models(console: Console, target: TargetSummary) -> None:
    table = Table(title="by model", title_justify="left", box=None, padding=(0, 2))
    for column in ("model", "requests", "failed", "TTFT p50", "TTFT p99", "TPOT p50", "first TTFT", "later TTFT"):
        table.add_column(column, justify="left" if column == "model" else "right")
    ranked = sorted(target.models.items(), key=lambda item: -item[1].requests)
    for name, figures in ranked[:_MODELS_SHOWN]:
        first = target.first_use.get(name, {})
        table.add_row(
            name,
            str(figures.requests),
            str(figures.requests - figures.succeeded),
            *(
                number(_of(figures, metric, q))
                for metric, q in (("ttft_ms", "p50"), ("ttft_ms", "p99"), ("tpot_ms", "p50"))
            ),
            number(first.get("first_ttft_ms")),
            number(first.get("later_ttft_ms")),
        )
    console.print(table)
    if len(ranked) > _MODELS_SHOWN:
        console.print(f"and {len(ranked) - _MODELS_SHOWN} more in the report", style="dim")
    if target.fairness is not None:
        console.print(f"fairness (slowest over fastest median speed): {target.fairness:.2f}")


def _of(figures: Figures, metric: str, column: str) -> float | None:
    row = figures.metrics.get(metric)
    return None if row is None else row[column].value


def _compat(target: TargetSummary) -> Table:
    table = Table(title="means as other tools define them", title_justify="left", box=None, padding=(0, 2))
    for column in ("", "TTFT ms", "TPOT ms", "ITL ms", "E2EL ms", "tokens", "successes"):
        table.add_column(column, justify="left" if not column else "right")
    for tool, row in target.compat.items():
        figures = [row[name] for name in ("ttft_ms", "tpot_ms", "itl_mean_ms", "e2el_ms", "tokens", "successes")]
        table.add_row(tool, *map(number, figures), style="dim")
    return table


def paired_rows(paired: list[PairedDifference]) -> list[list[str]]:
    """The cells of the table of added time; `PAIRED_COLUMNS` are its heads."""
    return [
        [
            f"{d.title}: {d.other} - {d.base}",
            *(with_error(d.difference[column]) for column in ("mean", "p50")),
            *(number(d.difference[column].value) for column in ("p90", "p99")),
            "-" if d.relative_percent is None else f"{d.relative_percent:+.2f} %",
            "beyond chance" if d.significant else "noise",
            f"{d.pairs} in {d.blocks}",
        ]
        for d in paired
    ]


PAIRED_COLUMNS = ("added, ms, request by request", "mean", "p50", "p90", "p99", "of mean", "", "pairs in blocks")


def _print_paired(console: Console, paired: list[PairedDifference]) -> None:
    table = Table(box=None, padding=(0, 1))
    for place, column in enumerate(PAIRED_COLUMNS):
        table.add_column(column, justify="right" if place else "left", no_wrap=True)
    for row in paired_rows(paired):
        table.add_row(*row)
    console.print(table)


CHANGE_COLUMNS = ("done while under load", "at s", "took ms", "requests under way", "failed", "answer")


def change_rows(changes: list[ChangeUnderLoad]) -> list[list[str]]:
    """The cells of the table of what was done during the run."""
    return [
        [c.name, f"{c.at_s:.1f}", f"{c.took_ms:.0f}", str(c.in_flight), str(c.failed), c.answer[:60]] for c in changes
    ]


def _print_changes(console: Console, changes: list[ChangeUnderLoad]) -> None:
    table = Table(box=None, padding=(0, 2))
    for column in CHANGE_COLUMNS:
        table.add_column(column)
    for change, row in zip(changes, change_rows(changes), strict=True):
        table.add_row(*row, style="" if change.ok and not change.failed else "red")
    console.print(table)
