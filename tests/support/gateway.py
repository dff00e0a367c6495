"""Run the real `gateway serve` as a user does: a process, its ready line, its stop."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import httpx2

from tests.support.wait import eventually

_READY = re.compile(r"^ready (https?://\S+) model=(\S+)$", re.MULTILINE)


@dataclass
class Gateway:
    """A running `gateway serve`."""

    process: subprocess.Popen[str]
    state: Path
    url: str = ""
    model: str = ""
    stdout: list[str] = field(default_factory=list)
    stderr: list[str] = field(default_factory=list)
    api_key: str | None = None

    @property
    def errors(self) -> str:
        return "".join(self.stderr)

    def client(self, **kwargs: object) -> httpx2.Client:
        """An HTTP client of this gateway."""
        headers = {"authorization": f"Bearer {self.api_key}"} if self.api_key else {}
        return httpx2.Client(base_url=self.url, headers=headers, timeout=60, trust_env=False, **kwargs)  # type: ignore[arg-type]

    def replicas(self) -> list[dict[str, object]]:
        with self.client() as client:
            return list(client.get("/admin/replicas").raise_for_status().json()["data"])

    def children(self, module: str) -> list[int]:
        """Process ids below the main process that run `python -m <module>`."""
        return [pid for pid in descendants(self.process.pid) if f"-m {module}" in command_line(pid)]

    def stop(self, timeout_s: float = 60) -> int:
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(timeout_s)


def descendants(pid: int) -> list[int]:
    """All living processes below `pid`."""
    parents: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if entry.name.isdigit():
                stat = (entry / "stat").read_text().rsplit(")", 1)[1].split()
                parents.setdefault(int(stat[1]), []).append(int(entry.name))
    found, queue = [], [pid]
    while queue:
        children = parents.get(queue.pop(), [])
        found += children
        queue += children
    return found


def command_line(pid: int) -> str:
    """A process's command line, "" once it is gone."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
    except OSError:
        return ""


@contextlib.contextmanager
def gateway(
    *arguments: str,
    state: Path | None = None,
    ready_timeout_s: float = 60,
    env: dict[str, str] | None = None,
    api_key: str | None = None,
) -> Iterator[Gateway]:
    """`gateway serve` with these flags on a free port; everything it started is gone afterwards."""
    with contextlib.ExitStack() as stack:
        home = state or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="tunegate-test-")))
        argv = [sys.executable, "-m", "gateway", "serve", "--port", "0", "--state", str(home), *arguments]
        if api_key:
            argv += ["--api-key", api_key]
        process = subprocess.Popen(
            argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, **(env or {})}
        )
        running = Gateway(process, home, api_key=api_key)
        readers = [
            threading.Thread(target=lambda: running.stdout.extend(process.stdout or ()), daemon=True),
            threading.Thread(target=lambda: running.stderr.extend(process.stderr or ()), daemon=True),
        ]
        for reader in readers:
            reader.start()
        try:
            eventually(lambda: _READY.search("".join(running.stdout)) or process.poll() is not None, ready_timeout_s)
            found = _READY.search("".join(running.stdout))
            assert found, f"gateway did not become ready (exit status {process.poll()}):\n{running.errors}"
            running.url, running.model = found.groups()
            yield running
        finally:
            below = descendants(process.pid)
            if process.poll() is None:
                process.terminate()
                try:
                    process.wait(60)
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait(10)
            for reader in readers:
                reader.join(10)
            for pipe in (process.stdout, process.stderr):
                if pipe is not None:
                    pipe.close()
            eventually(lambda: not [pid for pid in below if command_line(pid)], 30)
