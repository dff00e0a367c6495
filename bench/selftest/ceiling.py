"""What this client can read a second on this machine: measured by `selftest`, remembered, held against every run."""

from __future__ import annotations

import os
import platform
from pathlib import Path

import msgspec

from bench import __version__


class Ceiling(msgspec.Struct):
    """One process's limit, and where and with what it was measured."""

    machine: str
    version: str
    events_per_s: float
    cpu_us_per_event: float


def _file() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "tunegate" / "bench-ceiling.json"


def _machine() -> str:
    return f"{platform.node()} {platform.machine()} {os.cpu_count()} cpus {platform.python_version()}"


def known_ceiling() -> float | None:
    """Events per second that one process can read here, or None when `selftest` has not said so for this version."""
    try:
        ceiling = msgspec.json.decode(_file().read_bytes(), type=Ceiling)
    except (FileNotFoundError, msgspec.DecodeError):
        return None
    return ceiling.events_per_s if (ceiling.machine, ceiling.version) == (_machine(), __version__) else None


def remember(events_per_s: float, cpu_us_per_event: float) -> None:
    """Keep what was measured."""
    path = _file()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(msgspec.json.encode(Ceiling(_machine(), __version__, events_per_s, cpu_us_per_event)))
