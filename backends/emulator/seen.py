"""What an emulator saw, for tests to ask after: `GET /emulator/seen`."""

from __future__ import annotations

import time
from collections import deque
from typing import Any

import msgspec

_KEPT = 2000


class Sight(msgspec.Struct):
    """One request. Times are of time.time(), which a test on the same machine can compare with its own."""

    number: int  # counts up over the emulator's life
    method: str
    path: str
    headers: list[tuple[bytes, bytes]]
    received_at_s: float
    body: bytes = b""
    status: int | None = None
    chunks: int = 0  # stream events sent
    adapter: str | None = None  # which adapter answered
    fault: str | None = None
    finished_at_s: float | None = None
    aborted_at_s: float | None = None  # the client went away before the end

    def shown(self) -> dict[str, Any]:
        """As JSON: the body as text, decoded when it is JSON."""
        shown = msgspec.structs.asdict(self)
        shown["headers"] = {name.decode("latin-1"): value.decode("latin-1") for name, value in self.headers}
        text = self.body.decode("utf-8", "replace")
        try:
            shown["body"] = msgspec.json.decode(text)
        except msgspec.DecodeError:
            shown["body"] = text
        shown["aborted"] = self.aborted_at_s is not None
        return shown


class Seen:
    """The latest requests, oldest first."""

    def __init__(self) -> None:
        self._sights: deque[Sight] = deque(maxlen=_KEPT)
        self._count = 0

    def add(self, scope: dict[str, Any]) -> Sight:
        """Begin the record of a request."""
        self._count += 1
        sight = Sight(self._count, scope["method"], scope["path"], scope["headers"], time.time())
        self._sights.append(sight)
        return sight

    def since(self, number: int) -> list[dict[str, Any]]:
        """All kept after the one with this number."""
        return [sight.shown() for sight in self._sights if sight.number > number]
