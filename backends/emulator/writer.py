"""Writes one choice of an answer, piece by piece, until it ends by itself, at a stop string or at its limit."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Literal

from backends.emulator.language import EOS_ID, Token

Reason = Literal["stop", "length", "tool_calls"]


@dataclass(slots=True)
class Piece:
    """What one stream event carries."""

    text: str
    tokens: list[Token] = field(default_factory=list)
    last: bool = False


@dataclass(slots=True)
class Writer:
    """One choice. `reason`, `stop` and `tokens` are final once `pieces` has ended."""

    index: int
    source: Iterable[Token]
    limit: int  # tokens
    chunk: int = 1  # tokens a piece
    stops: list[str] = field(default_factory=list)
    ignore_eos: bool = False
    counts_end_token: bool = True
    reason: Reason = "length"
    stop: str | int | None = None  # the stop string, or the end token's id
    tokens: int = 0
    tool: str | None = None  # name of the tool that is called: the text is its arguments
    natural_end: Reason = "stop"

    def pieces(self) -> Iterator[Piece]:
        """Every piece, the last one marked; it may be empty."""
        piece, held = Piece(""), ""
        for token in self._tokens():
            piece.tokens.append(token)
            held += token.text
            found = self._first_stop(held) if self.stops else None
            if found is not None:
                self.reason, self.stop = "stop", found
                held = held[: held.index(found)]
                break
            if len(piece.tokens) >= self.chunk and self.tokens < self.limit:
                piece.text, held = self._without_possible_stop(held) if self.stops else (held, "")
                if piece.text or not token.text:
                    yield piece
                    piece = Piece("")
        piece.text, piece.last = held, True
        yield piece

    def _tokens(self) -> Iterator[Token]:
        if self.limit <= 0:
            return
        for token in self.source:
            if token.id == EOS_ID:
                if self.ignore_eos:
                    continue
                self.reason, self.stop = self.natural_end, EOS_ID
                self.tokens += self.counts_end_token
                return
            self.tokens += 1
            yield token
            if self.tokens >= self.limit:
                return
        self.reason, self.stop = self.natural_end, EOS_ID

    def _first_stop(self, text: str) -> str | None:
        found = [stop for stop in self.stops if stop in text]
        return min(found, key=text.index) if found else None

    def _without_possible_stop(self, text: str) -> tuple[str, str]:
        """Split off a tail that may grow into a stop string."""
        for size in range(min(len(text), max(map(len, self.stops), default=1) - 1), 0, -1):
            if any(stop.startswith(text[-size:]) for stop in self.stops):
                return text[:-size], text[-size:]
        return text, ""
