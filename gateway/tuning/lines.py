"""The lines of a batch: its input checked and put in order, and what was answered to them. Blocking."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from gateway.tuning.batches import LineFault

MAX_LINES, MAX_BYTES = 50_000, 200_000_000
_FAULTS_SHOWN = 20


@dataclass(frozen=True, slots=True)
class Line:
    """Where one request stands in the input."""

    model: str
    number: int
    custom_id: str
    offset: int
    size_bytes: int

    def body(self, input_file: Path) -> bytes:
        """The request's body, encoded. Raises OSError."""
        with input_file.open("rb") as stream:
            stream.seek(self.offset)
            return msgspec.json.encode(json.loads(stream.read(self.size_bytes))["body"])


def read(input_file: Path, endpoint: str) -> tuple[list[Line], list[LineFault]]:
    """Every request, those for one model together, and what is wrong with the input."""
    if input_file.stat().st_size > MAX_BYTES:
        return [], [LineFault("file_too_large", f"the input is over {MAX_BYTES // 1_000_000} MB, the limit")]
    lines: list[Line] = []
    faults: list[LineFault] = []
    seen: set[str] = set()
    for number, offset, raw in _raw(input_file):
        row, fault = _checked(raw, endpoint, seen)
        if fault:
            faults.append(msgspec.structs.replace(fault, line=number))
        else:
            seen.add(row["custom_id"])
            lines.append(Line(str(row["body"]["model"]), number, row["custom_id"], offset, len(raw)))
        if len(faults) == _FAULTS_SHOWN or len(lines) > MAX_LINES:
            break
    if len(lines) > MAX_LINES:
        faults.append(LineFault("too_many_tasks", f"the input has more than {MAX_LINES} lines, the limit"))
    elif not lines and not faults:
        faults.append(LineFault("empty_file", "the input has no lines"))
    # Together by model: an adapter is loaded once, and its requests share its prefix cache.
    return sorted(lines, key=lambda line: (line.model, line.number)), faults


def answered(file: Path) -> set[str]:
    """The custom ids of an output file; a line that a crash has torn is cut off."""
    if not file.exists():
        return set()
    data = file.read_bytes()
    whole = data[: data.rfind(b"\n") + 1]
    if len(whole) < len(data):
        with file.open("r+b") as stream:
            stream.truncate(len(whole))
    return {json.loads(line)["custom_id"] for line in whole.splitlines()}


def _raw(file: Path) -> Iterator[tuple[int, int, bytes]]:
    """(line number from 1, offset, bytes) of the lines that hold anything."""
    offset = 0
    with file.open("rb") as stream:
        for number, raw in enumerate(stream, 1):
            if raw.strip():
                yield number, offset, raw
            offset += len(raw)


def _checked(raw: bytes, endpoint: str, seen: set[str]) -> tuple[dict[str, Any], LineFault | None]:
    try:
        row = json.loads(raw)
    except ValueError:
        return {}, LineFault("invalid_json_line", "this line is not JSON")
    except RecursionError:
        return {}, LineFault("invalid_json_line", "this line is nested too deeply")
    if not isinstance(row, dict):
        return {}, LineFault("invalid_json_line", "this line is no JSON object")
    custom_id, body = row.get("custom_id"), row.get("body")
    if not isinstance(custom_id, str) or not custom_id:
        return {}, LineFault("missing_required_parameter", "custom_id must be a text", param="custom_id")
    if custom_id in seen:
        return {}, LineFault("duplicate_custom_id", f"custom_id {custom_id[:100]!r} is there twice", param="custom_id")
    if row.get("method") != "POST":
        return {}, LineFault("invalid_method", "method must be POST", param="method")
    if row.get("url") != endpoint:
        return {}, LineFault("invalid_url", f"url must be the batch's endpoint, {endpoint}", param="url")
    if not isinstance(body, dict) or not isinstance(body.get("model"), str):
        return {}, LineFault("invalid_request", "body must be an object with a `model`", param="body")
    if body.get("stream"):
        return {}, LineFault("invalid_request", "a batch does not stream; leave body.stream out", param="body.stream")
    try:
        msgspec.json.encode(body)
    except UnicodeEncodeError:
        return {}, LineFault("invalid_request", "body holds half of a surrogate pair, no character", param="body")
    except RecursionError:
        return {}, LineFault("invalid_request", "body is nested too deeply", param="body")
    return row, None
