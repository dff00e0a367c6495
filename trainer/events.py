"""The run's log: a JSON object a line, appended. Where a step appears twice (replayed after a crash), the last counts.

    {"time": 1763778000.1, "type": "step", "step": 3, "loss": 2.1, "learning_rate": 0.0002, "grad_norm": 0.9, ...}

Types: started, resumed, step, eval, checkpoint, warning, paused, finished, failed.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from trainer.reporters import Reporter


class EventLog:
    """Appends to `events.jsonl`, and tells reporters. A full disk costs lines of the log, never the training."""

    def __init__(self, file: Path, reporters: Sequence[Reporter] = ()) -> None:
        self._file = file
        self._reporters = list(reporters)
        _cut_torn_line(file)
        self._stream = file.open("ab", buffering=0)
        self._torn = False

    def write(self, type: str, **fields: Any) -> None:
        """Append one event."""
        event = {"time": round(time.time(), 3), "type": type, **fields}
        self._append(json.dumps(event) + "\n")
        for reporter in list(self._reporters):
            try:
                reporter.write(event)
            except OSError as error:
                self._lose(reporter, error)

    def close(self) -> None:
        """Close the file and the reporters."""
        self._stream.close()
        for reporter in list(self._reporters):
            try:
                reporter.close()
            except OSError as error:
                self._lose(reporter, error)

    def _lose(self, reporter: Reporter, error: OSError) -> None:
        self._reporters.remove(reporter)
        click.echo(f"warning: no more numbers go to {type(reporter).__name__}: {error}", err=True)

    def _append(self, line: str) -> None:
        try:
            # After a write that broke off, the next line starts on a line of its own.
            self._stream.write(b"\n" * self._torn + line.encode())
            self._torn = False
        except OSError as error:
            if not self._torn:
                click.echo(f"warning: {self._file} cannot be written: {error}", err=True)
            self._torn = True


def read_events(file: Path) -> list[dict[str, Any]]:
    """All whole events of a log, in order."""
    events = []
    for line in file.read_bytes().split(b"\n"):
        try:
            events.append(json.loads(line))
        except json.JSONDecodeError:
            continue  # torn by a crash or a full disk
    return events


def curve(file: Path, type: str = "step", field: str = "loss") -> dict[int, float]:
    """step -> value, as the run finally went."""
    return {event["step"]: event[field] for event in read_events(file) if event["type"] == type}


def _cut_torn_line(file: Path) -> None:
    if not file.exists():
        return
    data = file.read_bytes()
    if data and not data.endswith(b"\n"):
        with file.open("r+b") as stream:
            stream.truncate(data.rfind(b"\n") + 1)
