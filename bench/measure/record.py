"""The raw record: what the client saw, before any metric. A JSON-lines file, gzipped, with a version.

Line 1 is a `Header`; each further line is a `RequestRecord`, a `Sample` of the server, the client or a GPU, or a
`Mark` of something done during the run. Every time is in nanoseconds after the run's origin on one monotonic clock.
Every figure in every report is computed from this file alone, so a mended formula never needs another run.
"""

from __future__ import annotations

import gzip
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import msgspec

RECORD_VERSION = 1

# What an event carried; one word of flags an event.
CHOICES = 1  # a non-empty `choices`: what several tools count as a token, role-only chunks included
CONTENT = 2
REASONING = 4
TOOL = 8
FINISH = 16
USAGE = 32
ERROR = 64
DONE = 128
MALFORMED = 256
GENERATED = CONTENT | REASONING | TOOL
UNKNOWN_TOKENS = -1


class Events(msgspec.Struct, array_like=True, gc=False):
    """A stream's events as columns. `tokens` is the cumulative completion count an event stated, or -1."""

    t_ns: list[int] = msgspec.field(default_factory=list)
    flags: list[int] = msgspec.field(default_factory=list)
    chars: list[int] = msgspec.field(default_factory=list)
    tokens: list[int] = msgspec.field(default_factory=list)


class RequestRecord(msgspec.Struct, tag="request", tag_field="type", omit_defaults=True):
    """One request: what was meant, what was sent and what came back."""

    index: int
    segment: int
    target: str
    model: str
    intended_ns: int | None  # None: closed loop, sent when a user became free
    sent_ns: int
    end_ns: int
    worker: int = 0
    phase: str = "load"  # load | probe
    prompt_tokens_asked: int | None = None
    output_tokens_asked: int | None = None
    output_exact: bool = False  # the end-of-sequence token is ignored, so fewer tokens is a failure
    turn: int = 0
    reused: bool = False
    connect_ns: int | None = None  # how long the connection took; None: it was open already
    headers_ns: int | None = None  # first byte of the answer
    read_delay_ns: int = 0  # how late the client read, at worst (0 where the system cannot tell)
    status: int | None = None
    transport: str | None = None  # what went wrong below HTTP
    error: str | None = None  # the server's own words
    finish: str | None = None
    prompt_tokens: int | None = None
    output_tokens: int | None = None
    cached_tokens: int | None = None
    retokenized_tokens: int | None = None  # the server's tokenizer over the text, where usage was not sent
    text: str | None = None
    headers: dict[str, str] = msgspec.field(default_factory=dict)
    events: Events = msgspec.field(default_factory=Events)


class Sample(msgspec.Struct, tag="sample", tag_field="type"):
    """A reading of something other than a request: a server's metrics, a worker's own cost, a GPU."""

    source: str  # "server:NAME", "worker:N", "gpu:N"
    t_ns: int
    values: dict[str, float]


class Mark(msgspec.Struct, tag="mark", tag_field="type"):
    """Something done during the run, such as loading an adapter."""

    t_ns: int
    name: str
    duration_ns: int = 0
    ok: bool = True
    detail: str = ""


class Segment(msgspec.Struct, frozen=True):
    """A stretch of load of one kind on one target. Requests belong to the segment that sent them."""

    number: int
    label: str
    target: str
    repeat: int
    start_ns: int
    duration_ns: int
    rate_per_s: float | None = None
    concurrency: int | None = None
    pair: int | None = None  # the block that an interleaved comparison pairs this one with


class Header(msgspec.Struct, tag="header", tag_field="type"):
    """Everything that was set or found before the load; the segments are known once it ended."""

    version: int
    started_at: str
    origin_realtime_ns: int
    config: dict[str, Any]
    workload_hash: str
    environment: dict[str, Any]
    servers: dict[str, dict[str, Any]]
    segments: list[Segment]
    stamps: str  # "kernel" or "client"


Line = Header | RequestRecord | Sample | Mark
_encoder = msgspec.json.Encoder()
_decoder = msgspec.json.Decoder(Line)


class Record(msgspec.Struct):
    """A whole run in memory."""

    header: Header
    requests: list[RequestRecord] = msgspec.field(default_factory=list)
    samples: list[Sample] = msgspec.field(default_factory=list)
    marks: list[Mark] = msgspec.field(default_factory=list)


def encode_line(line: Line) -> bytes:
    """One line of a record file, newline included."""
    return _encoder.encode(line) + b"\n"


def decode_lines(data: bytes) -> list[Line]:
    """The lines of a record file or a part of one. Raises msgspec.DecodeError."""
    return _decoder.decode_lines(data)


def write_record(path: Path, record: Record) -> None:
    """Write a record file; a `.gz` name is compressed."""
    lines: Iterable[Line] = (record.header, *record.requests, *record.samples, *record.marks)
    with gzip.open(path, "wb", compresslevel=3) if path.suffix == ".gz" else path.open("wb") as file:
        for line in lines:
            file.write(encode_line(line))


def read_record(path: Path) -> Record:
    """Read a record file. Raises ValueError when it is none, or of another version."""
    record: Record | None = None
    for line in _lines_of(path):
        if isinstance(line, Header):
            if line.version != RECORD_VERSION:
                raise ValueError(f"{path} is a record of version {line.version}; this bench reads {RECORD_VERSION}")
            record = Record(line)
        elif record is None:
            raise ValueError(f"{path} is not a bench record: it does not begin with a header")
        elif isinstance(line, RequestRecord):
            record.requests.append(line)
        elif isinstance(line, Sample):
            record.samples.append(line)
        else:
            record.marks.append(line)
    if record is None:
        raise ValueError(f"{path} is empty")
    return record


def _lines_of(path: Path) -> Iterator[Line]:
    with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as file:
        for number, raw in enumerate(file, 1):
            try:
                yield _decoder.decode(raw)
            except msgspec.DecodeError as error:
                raise ValueError(f"{path} line {number} is not part of a bench record: {error}") from error
