"""Start and steer one emulated engine, without a gateway."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx2

from backends.process import free_port
from tests.support.wait import eventually

ENGINES = ("vllm", "sglang", "lmdeploy")
_START_TIMEOUT_S = 60


@dataclass
class Emulator:
    """A running emulator: an engine at `url` that answers for `model`."""

    engine: str
    url: str
    model: str
    api_key: str
    process: subprocess.Popen[bytes]
    log: Path
    _client: httpx2.Client = field(repr=False)

    @property
    def port(self) -> int:
        return int(self.url.rsplit(":", 1)[1])

    def client(self, **options: Any) -> httpx2.Client:
        """An HTTP client of the engine, with its key."""
        headers = {"authorization": f"Bearer {self.api_key}"} if self.api_key else {}
        return httpx2.Client(base_url=self.url, headers=headers, timeout=30, trust_env=False, **options)

    def script(self, **fields: Any) -> None:
        """Make it behave so from now on; what is not named returns to its default (backends/emulator/script.py)."""
        answer = self._client.post("/emulator/script", json=fields)
        assert answer.status_code == 200, answer.text

    def fault(self, kind: str, **fields: Any) -> None:
        """Make this go wrong, and nothing else."""
        self.script(faults=[{"kind": kind, **fields}])

    def seen(self, path: str | None = None, since: int = 0) -> list[dict[str, Any]]:
        """The requests it saw, oldest first (backends/emulator/seen.py); with `path`, only those for it."""
        sights: list[dict[str, Any]] = self._client.get("/emulator/seen", params={"since": since}).json()
        return [sight for sight in sights if path in (None, sight["path"])]

    def last_number(self) -> int:
        """The number of the latest request, for `seen(since=...)`."""
        return max((sight["number"] for sight in self.seen()), default=0)

    def refuse(self, duration_ms: float) -> None:
        """Close its port and every connection for so long."""
        self._client.post("/emulator/refuse", params={"ms": duration_ms})

    def said(self) -> str:
        """Everything it has printed."""
        return self.log.read_text(errors="replace")


def arguments(engine: str, port: int, model_path: Path | str, model: str, api_key: str) -> list[str]:
    """The engine's own command line for these."""
    path, key = str(model_path), api_key
    match engine:
        case "vllm":
            argv = ["serve", path, "--host", "127.0.0.1", "--port", str(port), "--served-model-name", model]
            return argv + (["--api-key", key] if key else [])
        case "sglang":
            argv = ["--model-path", path, "--host", "127.0.0.1", "--port", str(port), "--served-model-name", model]
            return [*argv, "--enable-metrics"] + (["--api-key", key] if key else [])
        case _:
            argv = ["serve", "api_server", path, "--server-name", "127.0.0.1", "--server-port", str(port)]
            return [*argv, "--model-name", model] + (["--api-keys", key] if key else [])


def lora_arguments(engine: str, adapters: Mapping[str, Path] | None = None) -> list[str]:
    """What turns adapters on."""
    named = [f"{name}={path}" for name, path in (adapters or {}).items()]
    match engine:
        case "vllm":
            return ["--enable-lora", "--max-loras", "4", "--max-cpu-loras", "8", "--max-lora-rank", "16"]
        case "sglang":
            return ["--enable-lora", "--max-lora-rank", "16", "--lora-target-modules", "all"]
        case _:
            return ["--backend", "pytorch", *(["--adapters", *named] if named else [])]


@contextlib.contextmanager
def emulator(
    engine: str,
    *extra: str,
    model: str = "base",
    model_path: Path | str = "some/model",
    api_key: str = "",
    script: Mapping[str, Any] | None = None,
    env: Mapping[str, str] | None = None,
    ready_path: str = "/emulator",
) -> Iterator[Emulator]:
    """An emulator on a free port; gone afterwards. extra: more of the engine's own arguments."""
    port = free_port()
    argv = [*arguments(engine, port, model_path, model, api_key), *extra]
    with tempfile.TemporaryDirectory(prefix="tunegate-emulator-") as folder:
        log = Path(folder) / "log"
        process = launch(engine, argv, log, script, env)
        url = f"http://127.0.0.1:{port}"
        with httpx2.Client(base_url=url, timeout=10, trust_env=False) as client:
            try:
                eventually(lambda: _answers(client, ready_path) or process.poll() is not None, _START_TIMEOUT_S)
                assert process.poll() is None, log.read_text()
                yield Emulator(engine, url, model, api_key, process, log, client)
            finally:
                process.terminate()
                try:
                    process.wait(10)
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait()


def launch(
    engine: str,
    argv: Sequence[str],
    log: Path,
    script: Mapping[str, Any] | None = None,
    env: Mapping[str, str] | None = None,
) -> subprocess.Popen[bytes]:
    """Start an emulator process with the engine's own arguments; the caller ends it."""
    variables = {**os.environ, "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True", **(env or {})}
    if script is not None:
        variables["TUNEGATE_EMULATOR"] = json.dumps(script)
    with log.open("wb") as output:
        return subprocess.Popen(
            [sys.executable, "-m", "backends.emulator", "--as", engine, *argv],
            stdout=output,
            stderr=subprocess.STDOUT,
            env=variables,
        )


def run_to_exit(
    engine: str, *argv: str, script: Mapping[str, Any] | None = None, timeout_s: float = 20
) -> tuple[int, str]:
    """Start one that must fail: its exit status and all that it printed."""
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        process = launch(engine, argv, log, script)
        try:
            return process.wait(timeout_s), log.read_text()
        finally:
            process.kill()
            process.wait()


def _answers(client: httpx2.Client, path: str) -> bool:
    try:
        return client.get(path).status_code == 200
    except httpx2.TransportError:
        return False


def now_s() -> float:
    """The clock that an emulator's sights are stamped with."""
    return time.time()
