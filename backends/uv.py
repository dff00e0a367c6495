"""Runs uv: the sources of packages that pip is configured with, and its output as progress.

uv reads its own settings (`UV_*`) and none of pip's. A mirror or a wheel folder that pip is told of holds for engines
too, so pip's settings are handed on, where uv has not been told otherwise. They go by the environment, which other
users cannot read: an index URL may hold a password.
"""

from __future__ import annotations

import configparser
import functools
import os
import re
import selectors
import signal
import subprocess
import sys
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO

from uv import find_uv_bin

from backends import lifeline
from backends.base import BackendError
from backends.progress import Progress

_PIP_LISTS = ("extra-index-url", "find-links", "trusted-host")
_PIP_KEYS = (*_PIP_LISTS, "index-url", "no-index", "cert", "timeout", "default-timeout")
_TAIL_LINES = 30
_TICK_S = 1.0
_COMPILE_TIMEOUT_S = "600"  # uv gives up on a file after 60 s, which a busy machine can exceed


class UvFailed(BackendError):
    """uv ended with an error; the message is its own."""


def pip_settings(environ: Mapping[str, str]) -> dict[str, str]:
    """What pip is configured with, of the keys that say where packages come from, and how."""
    settings: dict[str, str] = {}
    for file in _pip_files(environ):
        parser = configparser.RawConfigParser()
        try:
            parser.read(file)
        except configparser.Error:
            continue  # pip itself refuses such a file; its user will hear of it there
        for section in ("global", "install"):
            if parser.has_section(section):
                settings |= {key: value for key, value in parser.items(section) if key in _PIP_KEYS}
    for key in _PIP_KEYS:
        value = environ.get("PIP_" + key.upper().replace("-", "_"))
        if value:
            settings[key] = value
    return settings


def _pip_files(environ: Mapping[str, str]) -> list[Path]:
    """pip's configuration files, in the order in which one overrides the other."""
    named = environ.get("PIP_CONFIG_FILE")
    if named == os.devnull:
        return []
    home = Path(environ.get("HOME") or Path.home())
    config = Path(environ.get("XDG_CONFIG_HOME") or home / ".config")
    shared = [Path(folder) / "pip" for folder in environ.get("XDG_CONFIG_DIRS", "/etc/xdg").split(":")]
    folders = [*shared, Path("/etc"), home / ".pip", config / "pip", Path(sys.prefix)]
    return [folder / "pip.conf" for folder in folders] + ([Path(named)] if named else [])


def environment(environ: Mapping[str, str]) -> dict[str, str]:
    """The environment uv runs in: the given one, with pip's settings where uv has none of its own."""
    settings = pip_settings(environ)
    lists = {key: settings.get(key, "").split() for key in _PIP_LISTS}
    from_pip = {
        "UV_FIND_LINKS": ",".join(lists["find-links"]),
        "UV_INSECURE_HOST": " ".join(lists["trusted-host"]),
        "UV_HTTP_TIMEOUT": (settings.get("timeout") or settings.get("default-timeout", "")).partition(".")[0],
        "UV_COMPILE_BYTECODE_TIMEOUT": _COMPILE_TIMEOUT_S,
        "SSL_CERT_FILE": settings.get("cert", ""),
    }
    if not {"UV_INDEX", "UV_EXTRA_INDEX_URL", "UV_DEFAULT_INDEX", "UV_INDEX_URL"} & environ.keys():
        from_pip["UV_INDEX"] = " ".join(lists["extra-index-url"])
        from_pip["UV_DEFAULT_INDEX"] = settings.get("index-url", "")
    # pip takes the best match of all sources. Every version is pinned, so this only says where to look for it.
    from_pip["UV_INDEX_STRATEGY"] = "unsafe-best-match"
    return {key: value for key, value in from_pip.items() if value} | dict(environ)


def index_flags(environ: Mapping[str, str]) -> list[str]:
    """What makes `uv pip install` ask no index where pip is configured so; uv has no variable for it."""
    return ["--no-index"] if pip_settings(environ).get("no-index", "").lower() in ("1", "true", "yes", "on") else []


def run(
    arguments: Sequence[str], progress: Progress, *, environ: Mapping[str, str], pass_fds: Sequence[int] = ()
) -> None:
    """Run `uv ARGUMENTS`, telling of its steps. Raises UvFailed with the end of its output.

    When this process is killed, so is uv. pass_fds: descriptors that uv, and what it starts, hold open until they end.
    """
    tail: deque[str] = deque(maxlen=_TAIL_LINES)
    steps = _Steps()
    with subprocess.Popen(
        [find_uv_bin(), "--color", "never", "--no-progress", *arguments],
        env=dict(environ),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        pass_fds=pass_fds,
        preexec_fn=functools.partial(lifeline.end_with_parent, signal.SIGKILL, os.getpid()),
    ) as process:
        assert process.stdout is not None
        for line in lines_or_ticks(process.stdout):
            if line:
                tail.append(line)
                steps.read(line)
            progress.update(str(steps))
    if process.returncode != 0:
        raise UvFailed("\n".join(tail) or f"uv ended with status {process.returncode} and said nothing")


def lines_or_ticks(pipe: IO[bytes]) -> Iterator[str]:
    """The pipe's lines as they come, and "" whenever a second passed without one."""
    with selectors.DefaultSelector() as selector:
        selector.register(pipe, selectors.EVENT_READ)
        rest = b""
        while True:
            if not selector.select(timeout=_TICK_S):
                yield ""
                continue
            chunk = os.read(pipe.fileno(), 65536)
            if not chunk:
                break
            *lines, rest = (rest + chunk).split(b"\n")
            for line in lines:
                yield line.decode(errors="replace").rstrip()
        if rest:
            yield rest.decode(errors="replace")


_DOWNLOAD = re.compile(r"^Downloading (\S+) \(([\d.]+)([KMG])iB\)")
_UNITS_MIB = {"K": 1 / 1024, "M": 1.0, "G": 1024.0}
_STEPS = (
    (re.compile(r"^Resolved (\d+) packages?"), "fetching {0} packages"),
    (re.compile(r"^Prepared (\d+) packages?"), "laying {0} packages in place"),
    (re.compile(r"^Installed (\d+) packages?"), "compiling {0} packages to bytecode"),
    (re.compile(r"^Bytecode compiled (\d+) files?"), "{0} files compiled to bytecode"),
)


class _Steps:
    """Where uv is, read from the lines it prints when it is not on a terminal (large downloads only)."""

    def __init__(self) -> None:
        self._step = "looking for packages"
        self._sizes_mib: dict[str, float] = {}
        self._waiting: dict[str, None] = {}

    def read(self, line: str) -> None:
        started = _DOWNLOAD.match(line)
        if started:
            name, size, unit = started.groups()
            self._sizes_mib[name] = float(size) * _UNITS_MIB[unit]
            self._waiting[name] = None
        elif line.startswith(" Downloaded "):
            self._waiting.pop(line.removeprefix(" Downloaded "), None)
        for pattern, text in _STEPS:
            found = pattern.match(line)
            if found:
                self._step = text.format(*found.groups())

    def __str__(self) -> str:
        if not self._waiting:
            return self._step
        total_mib = sum(self._sizes_mib.values())
        done_mib = total_mib - sum(self._sizes_mib[name] for name in self._waiting)
        largest = sorted(self._waiting, key=lambda name: -self._sizes_mib[name])[:3]
        return f"{self._step}: {done_mib:.0f} of {total_mib:.0f} MiB, waiting for {', '.join(largest)}"
