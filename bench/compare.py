"""`bench compare`: two records, or two targets of one, as a table; and the gate for CI."""

from __future__ import annotations

from pathlib import Path

import msgspec
from rich.console import Console
from rich.table import Table

from bench.measure.compare import Change, Comparison, Gate, compare_targets, differing_inputs, refuse_unlike
from bench.measure.record import read_record
from bench.measure.summary import readings_by_segment, summarize
from bench.report.table import with_error


def compare_files(before_file: Path, after_file: Path) -> Comparison:
    """Compare two records, the first target of each. Raises ValueError when they cannot be."""
    before, after = read_record(before_file), read_record(after_file)
    refuse_unlike(before, after)
    first, second = (
        next(iter(summarize(record, readings_by_segment(record)).targets.values())) for record in (before, after)
    )
    return Comparison(compare_targets(first, second), differing_inputs(before, after))


def print_comparison(console: Console, comparison: Comparison) -> None:
    """What moved, whether chance explains it, and what was not the same."""
    table = Table(box=None, padding=(0, 2))
    for column in ("", "before", "after", "change", "p", ""):
        table.add_column(column, justify="left" if not column else "right")
    for change in comparison.changes:
        style = {"faster": "green", "slower": "red", "noise": "dim"}[change.verdict]
        table.add_row(
            f"{change.name} [dim]{change.unit if change.name != 'output_tokens_per_s' else ''}[/]",
            with_error(change.before),
            with_error(change.after),
            f"{change.change_percent:+.2f} %",
            f"{change.p_value:.3f}",
            f"[{style}]{change.verdict}[/]",
        )
    console.print(table)
    if comparison.differing:
        console.print("not the same in the two runs:")
        for key, (a, b) in comparison.differing.items():
            console.print(f"  {key}: {a} -> {b}", style="dim", highlight=False)


def broken(changes: list[Change], gates: list[Gate]) -> list[str]:
    """A line for each gate that is broken."""
    by_name = {change.name: change for change in changes}
    return [
        f"{gate.name} moved {by_name[gate.name].change_percent:+.2f} %, {gate.limit_percent:+g} % is allowed"
        for gate in gates
        if gate.name in by_name and gate.broken_by(by_name[gate.name])
    ]


def comparison_json(comparison: Comparison) -> bytes:
    """The comparison as JSON."""
    return msgspec.json.format(msgspec.json.encode(comparison), indent=1)
