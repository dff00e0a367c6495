"""How a long step tells what it does. Functions take a `Progress`; what a person sees is the caller's choice."""

from __future__ import annotations

import time
from typing import Protocol, TextIO

_QUIET_S = 10.0  # between two lines of one phase where lines cannot be overwritten


class Progress(Protocol):
    """Receives the phases of a long step in order."""

    def phase(self, text: str) -> None:
        """A new phase begins; the one before it is done."""

    def update(self, text: str) -> None:
        """How far the phase is. Comes often, at least every second while something runs."""

    def finish(self, text: str) -> None:
        """The whole step is done."""


class Silent:
    """Shows nothing."""

    def phase(self, text: str) -> None: ...

    def update(self, text: str) -> None: ...

    def finish(self, text: str) -> None: ...


class PlainProgress:
    """Lines of text with the seconds since the start: overwritten in place on a terminal, sparse in a log."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._overwrites = stream.isatty()
        self._started_s = self._said_s = time.monotonic()

    def phase(self, text: str) -> None:
        self._say(text, stays=True)

    def update(self, text: str) -> None:
        if self._overwrites or time.monotonic() - self._said_s >= _QUIET_S:
            self._say(text, stays=not self._overwrites)

    def finish(self, text: str) -> None:
        self._say(text, stays=True)

    def _say(self, text: str, stays: bool) -> None:
        self._said_s = time.monotonic()
        start = "\r\x1b[K" if self._overwrites else ""
        self._stream.write(f"{start}[{self._said_s - self._started_s:4.0f} s] {text}" + ("\n" if stays else ""))
        self._stream.flush()
