"""A run's result: the record, its figures and the verdict, and the files they are kept in."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec

from bench.measure.paired import PairedDifference, paired_differences
from bench.measure.record import Record, write_record
from bench.measure.summary import Readings, Summary, readings_by_segment, summarize
from bench.measure.verdict import Verdict, judge_run
from bench.report.html import render
from bench.selftest.ceiling import known_ceiling

RECORD_FILE, JSON_FILE, HTML_FILE = "record.jsonl.gz", "result.json", "report.html"


class Result(msgspec.Struct):
    """Everything that can be said of a run."""

    record: Record
    grouped: Readings
    summary: Summary
    verdict: Verdict
    paired: list[PairedDifference]


def analyse(record: Record) -> Result:
    """Compute everything from a record."""
    grouped = readings_by_segment(record)
    summary = summarize(record, grouped)
    verdict = judge_run(record, grouped, summary, known_ceiling())
    return Result(record, grouped, summary, verdict, paired_differences(record, grouped))


def as_json(result: Result) -> dict[str, Any]:
    """The result as plain data; figures that are not known are null."""
    header = result.record.header
    plain: dict[str, Any] = msgspec.json.decode(
        msgspec.json.encode(
            {
                "started_at": header.started_at,
                "config": header.config,
                "workload_hash": header.workload_hash,
                "environment": header.environment,
                "servers": header.servers,
                "verdict": {
                    "level": result.verdict.level.name,
                    "findings": [{"level": f.level.name, "what": f.what} for f in result.verdict.findings],
                    "checked": result.verdict.checked,
                },
                "summary": result.summary,
                "paired": result.paired,
                "marks": result.record.marks,
                "record": RECORD_FILE,
            }
        )
    )
    return plain


def save(result: Result, out: Path, name: str, with_record: bool = True) -> Path:
    """Write record, JSON and HTML into a folder of their own; returns it."""
    folder = out / (name or datetime.now(UTC).strftime("%Y%m%d-%H%M%S"))
    folder.mkdir(parents=True, exist_ok=True)
    if with_record:
        write_record(folder / RECORD_FILE, result.record)
    (folder / JSON_FILE).write_bytes(msgspec.json.format(msgspec.json.encode(as_json(result)), indent=1))
    (folder / HTML_FILE).write_text(
        render(result.record, result.grouped, result.summary, result.verdict, result.paired)
    )
    return folder
