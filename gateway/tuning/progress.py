"""The trainer's log, and what the API makes of it. Pure functions but for reading the file.

A step may appear twice in the log, when the trainer was killed and did it again: the last counts.
"""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

import msgspec

from gateway.tuning.records import Event, Job

_COLUMNS = ("step", "train_loss", "train_accuracy", "valid_loss", "valid_mean_token_accuracy")


def read_log(file: Path, offset: int) -> tuple[list[dict[str, Any]], int]:
    """The whole lines behind `offset` bytes, and the offset behind them. Raises OSError."""
    if not file.exists():
        return [], offset
    with file.open("rb") as stream:
        stream.seek(offset)
        text, newline, _ = stream.read().rpartition(b"\n")
    lines = []
    for line in text.split(b"\n"):
        try:
            lines.append(json.loads(line))
        except json.JSONDecodeError:
            continue  # torn by a crash or a full disk
    return lines, offset + len(text) + len(newline)


def after(job: Job, line: dict[str, Any]) -> Job:
    """The job as a line of the log leaves it."""
    kind = line["type"]
    if kind in ("started", "resumed"):
        return msgspec.structs.replace(job, total_steps=line["total_steps"], step=line["step"])
    if kind != "step":
        return job
    ahead = job.total_steps - line["step"]
    seconds = line["tokens"] / line["tokens_per_s"] if line.get("tokens_per_s") else 0.0
    return msgspec.structs.replace(job, step=line["step"], estimated_finish=int(line["time"] + ahead * seconds))


def event(job: Job, line: dict[str, Any]) -> Event | None:
    """A line of the log as a line of the job's story; None for what the gateway tells itself."""
    kind, at, step = line["type"], int(line["time"]), line.get("step", 0)
    if kind == "started":
        return Event(created_at=at, message="Fine-tuning job started", data={"total_steps": line["total_steps"]})
    if kind == "resumed":
        return Event(created_at=at, message=f"Training goes on after step {step}", data={"step": step})
    if kind == "step":
        message = f"Step {step}/{job.total_steps}: {_told('training', line)}"
        data = {"step": step, "total_steps": job.total_steps} | _train(line)
        data |= {"learning_rate": line.get("learning_rate"), "tokens": line.get("tokens")}
        return Event(created_at=at, message=message, type="metrics", data=data)
    if kind == "eval":
        message = f"Step {step}/{job.total_steps}: {_told('validation', line)}"
        return Event(created_at=at, message=message, type="metrics", data={"step": step} | _valid(line))
    if kind == "paused":
        return Event(created_at=at, message=f"Training paused after step {step}", data={"step": step})
    if kind == "warning":
        return Event(created_at=at, message=str(line["message"]), level="warn")
    return None


def metrics_at(file: Path, step: int) -> dict[str, float]:
    """What is known of one step, by OpenAI's names."""
    found: dict[str, float] = {"step": step}
    for line in read_log(file, 0)[0]:
        if line.get("step") == step and line["type"] in ("step", "eval"):
            found |= _train(line) if line["type"] == "step" else _valid(line)
    return found


def metrics_csv(file: Path) -> bytes:
    """The steps of a whole run as a table with OpenAI's columns."""
    rows: dict[int, dict[str, Any]] = {}
    for line in read_log(file, 0)[0]:
        if line["type"] == "step":
            train = _train(line)
            found = {"train_loss": train.get("train_loss"), "train_accuracy": train.get("train_mean_token_accuracy")}
        elif line["type"] == "eval":
            found = _valid(line)
        else:
            continue
        rows.setdefault(line["step"], {"step": line["step"]}).update(found)
    text = io.StringIO()
    writer = csv.DictWriter(text, _COLUMNS, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows[step] for step in sorted(rows))
    return text.getvalue().encode()


def failure(file: Path) -> str | None:
    """Why the trainer gave up last, in its own words."""
    failed = [line["message"] for line in read_log(file, 0)[0] if line["type"] == "failed"]
    return str(failed[-1]) if failed else None


def _train(line: dict[str, Any]) -> dict[str, Any]:
    names = {"loss": "train_loss", "token_accuracy": "train_mean_token_accuracy", "reward": "train_mean_reward"}
    return _named(line, names)


def _valid(line: dict[str, Any]) -> dict[str, Any]:
    # The whole file is evaluated each time, so both of OpenAI's figures are the same.
    names = {"loss": "valid_loss", "token_accuracy": "valid_mean_token_accuracy", "reward": "valid_mean_reward"}
    found = _named(line, names)
    return found | {f"full_{name}": value for name, value in found.items()}


def _named(line: dict[str, Any], names: dict[str, str]) -> dict[str, Any]:
    return {new: line[old] for old, new in names.items() if line.get(old) is not None}


def _told(part: str, line: dict[str, Any]) -> str:
    """The figure that a method is judged by; part: of the data."""
    figure = "mean reward" if "reward" in line else "loss"
    value = line.get("reward", line.get("loss"))
    return f"{part} {figure}={'not a number' if value is None else f'{value:.4f}'}"
