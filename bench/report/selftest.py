"""The self-test's table."""

from __future__ import annotations

import msgspec
from rich.console import Console
from rich.table import Table

from bench.report.table import number
from bench.selftest.check import Accuracy, Cost


def print_costs(console: Console, costs: list[Cost], accuracy: Accuracy) -> None:
    """Cost of each tool, how ours compares with the best of the others, and how true our readings are."""
    table = Table(box=None, padding=(0, 2))
    for column in ("client", "CPU us per event", "events/s per core", "fixed CPU s", "wall s"):
        table.add_column(column, justify="left" if column == "client" else "right")
    for cost in costs:
        table.add_row(
            cost.tool,
            number(cost.cpu_us_per_event),
            number(cost.ceiling_events_per_s),
            number(cost.fixed_cpu_s),
            number(cost.wall_s),
        )
    console.print(table)
    if len(costs) > 1:
        best = min(costs[1:], key=lambda cost: cost.cpu_us_per_event)
        share = costs[0].cpu_us_per_event / best.cpu_us_per_event
        console.print(f"this bench uses {share:.2f} of the CPU per event of the best other, {best.tool}")
    console.print(
        f"against the source's timeline: TTFT p50 {accuracy.ttft_p50_off_ms:+.2f} ms, gaps p50 "
        f"{accuracy.gap_p50_off_ms:+.2f} ms, p99 {accuracy.gap_p99_off_ms:+.2f} ms (the source's own lateness included)"
    )


def costs_json(costs: list[Cost], accuracy: Accuracy) -> bytes:
    """The same as JSON."""
    return msgspec.json.encode({"costs": costs, "accuracy": accuracy})
