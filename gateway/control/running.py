"""What this gateway runs at the moment, for the next control process to go on with.

Main hands it over as an open file of the memory, never of the disk: it holds keys. Each change adds a JSON line; the
last whole line counts.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from gateway.config import ServeConfig


class Progress(BaseModel):
    """How far a switch of engines is."""

    backend: str  # the one that is switched to
    mode: Literal["beside", "replace"]
    phase: Literal["starting", "draining", "done", "failed"]
    started_at: float  # seconds since the epoch
    shifted: bool = False  # traffic goes to the new engine
    reason: str | None = None
    ended_at: float | None = None


class Running(BaseModel):
    """What control was started for, and what has been changed since."""

    model_config = ConfigDict(frozen=True)

    config: ServeConfig  # what holds now
    declared: ServeConfig  # what the file and the flags say; other engines may have been switched to since
    file: Path | None = None  # of --config
    flags: dict[str, Any] = {}  # which win over the file
    replicas: tuple[int, ...] | None = None  # their numbers; None: from 0 on
    drained: tuple[int, ...] = ()  # those that an operator has taken out of traffic
    switch: Progress | None = None  # the last one

    @classmethod
    def of(cls, config: ServeConfig, file: Path | None = None, flags: dict[str, Any] | None = None) -> Running:
        """At the start of a gateway."""
        return cls(config=config, declared=config, file=file, flags=flags or {})

    @property
    def indices(self) -> tuple[int, ...]:
        """The numbers of the replicas."""
        return self.replicas if self.replicas is not None else tuple(range(self.config.replicas))


class Notebook:
    """The file that holds what runs."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def read(self) -> Running:
        """The last whole line. Raises OSError, and ValueError for what is none."""
        *lines, _ = self._path.read_bytes().split(b"\n")
        return Running.model_validate_json(next(filter(None, reversed(lines)), b""))

    def write(self, running: Running) -> None:
        """Make this what the next control process goes on with. Raises OSError."""
        with self._path.open("ab") as file:
            file.write(b"\n" + line(running))  # whoever wrote before may have been killed within a line


def line(running: Running) -> bytes:
    """One line of the file."""
    return running.model_dump_json().encode() + b"\n"
