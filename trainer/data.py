"""Rows of data as lines of JSON, read one by one in bounded memory. Every bad line is named by number."""

from __future__ import annotations

import gzip
import hashlib
import json
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO, TypeVar, cast

from trainer.errors import DataError, RowError
from trainer.origins import Origin, parse_origin
from trainer.tables import table_lines

MAX_LINE_BYTES = 32 * 2**20
_FAULTS_SHOWN = 20

Parsed = TypeVar("Parsed")


@dataclass(frozen=True, slots=True)
class Line:
    """One row, as it stands in a file of lines or as a table's row reads there."""

    origin: Origin
    number: int  # from 1
    text: bytes


@dataclass
class Faults:
    """Collects what is wrong, keeps the first few messages and counts the rest."""

    shown: list[str] = field(default_factory=list)
    count: int = 0

    def add(self, line: Line, message: str) -> None:
        """Note one bad line."""
        self.count += 1
        if len(self.shown) < _FAULTS_SHOWN:
            self.shown.append(f"{line.origin.name_of_row(line.number)}: {message}")

    def raise_if_any(self) -> None:
        """Raise DataError with the collected messages."""
        if self.count:
            rest = self.count - len(self.shown)
            more = [f"and {rest} more bad lines"] if rest else []
            raise DataError("\n".join([f"{self.count} bad line(s) in the training data:", *self.shown, *more]))


def read_lines(origins: Sequence[str | Path], digest: Any = None) -> Iterator[Line]:
    """Non-empty lines in order; `digest` (a hashlib object) is fed every byte of the lines read. Raises DataError."""
    for text in origins:
        origin = parse_origin(str(text))
        yield from islice(_lines_of(origin, digest), origin.rows)


def _lines_of(origin: Origin, digest: Any) -> Iterator[Line]:
    lines = table_lines(origin) if origin.package else _file_lines(Path(origin.place))
    for number, raw in enumerate(lines, 1):
        if len(raw) > MAX_LINE_BYTES:
            raise DataError(f"{origin.name_of_row(number)} is over {MAX_LINE_BYTES >> 20} MiB")
        if digest is not None:
            digest.update(raw)
        if text := raw.strip():
            yield Line(origin, number, text)


def _file_lines(file: Path) -> Iterator[bytes]:
    """Lines as they are; one that is too long is cut. Raises DataError."""
    try:
        with _open(file) as stream:
            while raw := stream.readline(MAX_LINE_BYTES + 1):
                yield raw
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"cannot read {file}: {error}") from error


def parse_line(line: Line, parse: Callable[[dict[str, Any]], Parsed]) -> Parsed:
    """The row of one line. Raises RowError."""
    try:
        row = json.loads(line.text)
    except UnicodeDecodeError as error:
        raise RowError(f"not UTF-8 at byte {error.start}") from error
    except json.JSONDecodeError as error:
        raise RowError(f"not JSON: {error.msg} at character {error.pos}") from error
    except RecursionError as error:
        raise RowError("nested too deeply") from error
    if b"\\u" in line.text:
        _check_unicode(row)
    if not isinstance(row, dict):
        raise RowError(f"must be a JSON object, found {type(row).__name__}")
    return parse(row)


@dataclass(frozen=True, slots=True)
class Summary:
    """What a validation pass saw."""

    examples: int
    sha256: str  # of the uncompressed lines, in order


def validate(origins: Sequence[str | Path], parse: Callable[[dict[str, Any]], object]) -> Summary:
    """Check every line without keeping any. Raises DataError that names the bad lines."""
    digest, faults, examples = hashlib.sha256(), Faults(), 0
    for line in read_lines(origins, digest):
        try:
            parse_line(line, parse)
            examples += 1
        except RowError as error:
            faults.add(line, str(error))
    faults.raise_if_any()
    if not examples:
        raise DataError(f"no examples in {', '.join(map(str, origins))}")
    return Summary(examples, digest.hexdigest())


def _check_unicode(row: Any) -> None:
    """Half a surrogate pair is legal JSON but no tokenizer takes it. Raises RowError."""
    try:
        json.dumps(row, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise RowError("holds half of a \\u surrogate pair, which is no character") from error


def _open(file: Path) -> BinaryIO:
    return cast(BinaryIO, gzip.open(file, "rb")) if file.suffix == ".gz" else file.open("rb")
