"""What the real engine answered, read from `recordings/ENGINE/*.json`. Nothing an emulator says is retyped here.

A case is named `file/case`, e.g. `errors/unknown_model`.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

FOLDER = Path(__file__).parent / "recordings"
JSON_TYPE = (b"content-type", b"application/json")


@dataclass(frozen=True)
class Reply:
    """A whole answer, ready to send."""

    status: int
    body: bytes = b""
    headers: tuple[tuple[bytes, bytes], ...] = ()


class Recorded(msgspec.Struct, frozen=True):
    """One recorded answer. Exactly one of `json`, `text`, `events`, `families`, `broken` says what the body was."""

    elapsed_s: float
    status: int = 0
    headers: dict[str, str] = {}
    json: Any = None
    text: str | None = None
    events: list[Any] | None = None
    families: dict[str, Any] | None = None
    broken: str | None = None
    compact: bool = True
    line_end: str = "lf"

    @property
    def refused(self) -> bool:
        return self.status >= 400

    def json_copy(self) -> Any:
        """The decoded body, free to be changed."""
        return copy.deepcopy(self.json)


class Case(msgspec.Struct, frozen=True):
    """A recorded request and its answer."""

    request: dict[str, Any]
    response: Recorded
    idle_after_s: float | None = None


@dataclass(frozen=True)
class Book:
    """Every recording of one engine."""

    engine: str
    version: str
    cases: Mapping[str, Case]
    documents: Mapping[str, Any] = field(repr=False)  # file name -> its whole content, for what are not cases

    @classmethod
    def load(cls, engine: str) -> Book:
        """Read all files of `engine` (some 0.5 MB)."""
        cases: dict[str, Case] = {}
        documents: dict[str, Any] = {}
        for path in sorted((FOLDER / engine).glob("*.json")):
            document = msgspec.json.decode(path.read_bytes())
            documents[path.stem] = document
            for name, case in document.get("cases", {}).items():
                cases[f"{path.stem}/{name}"] = msgspec.convert(case, Case)
        return cls(engine, documents["flags"]["version"], cases, documents)

    def __getitem__(self, name: str) -> Recorded:
        return self.cases[name].response

    def given(self, name: str, key: str) -> Any:
        """What the recorded request had in its body under `key`."""
        return self.cases[name].request["body"][key]

    def reply(self, name: str, replace: Mapping[str, Any] | None = None) -> Reply:
        """The recorded answer as it was, with whole words of its text swapped by `replace`."""
        recorded = self[name]
        headers = [(key.encode(), value.encode()) for key, value in recorded.headers.items()]
        if recorded.json is not None:
            body = encode(_swap(recorded.json, replace or {}), recorded.compact)
        else:
            body = str(_swap(recorded.text or "", replace or {})).encode()
        headers = [(key, value) for key, value in headers if key not in (b"transfer-encoding", b"connection")]
        return Reply(recorded.status, body, (*headers, (b"content-length", str(len(body)).encode())))


def json_reply(status: int, value: Any, compact: bool = True) -> Reply:
    """An answer with a JSON body."""
    body = encode(value, compact)
    return Reply(status, body, (JSON_TYPE, (b"content-length", str(len(body)).encode())))


def encode(value: Any, compact: bool) -> bytes:
    """JSON in one of the two styles engines write: without spaces and in UTF-8, or as json.dumps does by default."""
    return msgspec.json.encode(value) if compact else json.dumps(value).encode()


def _swap(value: Any, replace: Mapping[str, Any]) -> Any:
    """Replace words in every string of `value`, leaving its structure and keys alone."""
    if isinstance(value, dict):
        return {key: _swap(item, replace) for key, item in value.items()}
    if isinstance(value, list):
        return [_swap(item, replace) for item in value]
    if isinstance(value, str):
        for old, new in replace.items():
            value = re.sub(rf"(?<!\w)(?<!\d\.){re.escape(old)}(?!\w)", str(new).replace("\\", r"\\"), value)
    return value
