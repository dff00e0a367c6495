"""JSONL files, plain or .gz, read line by line in bounded memory. Every bad line is named by number."""

from __future__ import annotations

import gzip
import hashlib
import json
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, TypeVar, cast

from trainer.errors import DataError, RowError

MAX_LINE_BYTES = 32 * 2**20
_FAULTS_SHOWN = 20

Parsed = TypeVar("Parsed")


@dataclass(frozen=True, slots=True)
class Line:
    """One non-empty line of a file."""

    file: Path
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
            self.shown.append(f"{line.file.name} line {line.number}: {message}")

    def raise_if_any(self) -> None:
        """Raise DataError with the collected messages."""
        if self.count:
            rest = self.count - len(self.shown)
            more = [f"and {rest} more bad lines"] if rest else []
            raise DataError("\n".join([f"{self.count} bad line(s) in the training data:", *self.shown, *more]))


def read_lines(files: Sequence[Path], digest: Any = None) -> Iterator[Line]:
    """Non-empty lines in order; `digest` (a hashlib object) is fed every byte. Raises DataError."""
    for file in files:
        try:
            with _open(file) as stream:
                number = 0
                while raw := stream.readline(MAX_LINE_BYTES + 1):
                    number += 1
                    if len(raw) > MAX_LINE_BYTES:
                        raise DataError(f"{file} line {number} is over {MAX_LINE_BYTES >> 20} MiB")
                    if digest is not None:
                        digest.update(raw)
                    if text := raw.strip():
                        yield Line(file, number, text)
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
    sha256: str  # of the uncompressed bytes of all files, in order


def validate(files: Sequence[Path], parse: Callable[[dict[str, Any]], object]) -> Summary:
    """Check every line without keeping any. Raises DataError that names the bad lines."""
    digest, faults, examples = hashlib.sha256(), Faults(), 0
    for line in read_lines(files, digest):
        try:
            parse_line(line, parse)
            examples += 1
        except RowError as error:
            faults.add(line, str(error))
    faults.raise_if_any()
    if not examples:
        raise DataError(f"no examples in {', '.join(map(str, files))}")
    return Summary(examples, digest.hexdigest())


def _check_unicode(row: Any) -> None:
    """Half a surrogate pair is legal JSON but no tokenizer takes it. Raises RowError."""
    try:
        json.dumps(row, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise RowError("holds half of a \\u surrogate pair, which is no character") from error


def _open(file: Path) -> BinaryIO:
    return cast(BinaryIO, gzip.open(file, "rb")) if file.suffix == ".gz" else file.open("rb")
