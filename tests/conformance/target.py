"""What the suite talks to: a gateway over one emulated engine, and the strings behind it.

With TUNEGATE_CONFORMANCE_URL (and _MODEL, _KEY, _ENGINE, _CONTEXT_TOKENS) set it is a gateway that runs already, over a
real engine: tests that must script the engine or look into it are skipped.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest

from tests.support.engines import checkpoint, state_of
from tests.support.gateway import Gateway, gateway

API_KEY = "sk-conformance"
CONTEXT_TOKENS = 16384  # room for the longest stream of the suite
TOOL_PARSERS = {"vllm": "hermes", "sglang": "qwen25", "lmdeploy": "qwen2d5"}


@dataclass
class Target:
    """A served model, and the emulator that answers for it."""

    engine: str
    gateway: Gateway
    key: str = API_KEY
    context_tokens: int = CONTEXT_TOKENS

    def control(self, method: str, path: str, **options: Any) -> httpx2.Response:
        """Ask the emulator itself. Its port is looked up each time: a restarted engine has another."""
        url = f"http://127.0.0.1:{state_of(self.gateway, 'r0')['port']}/emulator/{path}"
        return httpx2.request(method, url, trust_env=False, **options)

    @property
    def base_url(self) -> str:
        return f"{self.gateway.url}/v1"

    @property
    def model(self) -> str:
        return self.gateway.model

    def client(self, **options: Any) -> openai.OpenAI:
        """The official client, told nothing but where to go. No retries unless asked for."""
        return openai.OpenAI(**{"base_url": self.base_url, "api_key": self.key, "max_retries": 0, **options})

    def async_client(self, **options: Any) -> openai.AsyncOpenAI:
        """The same for asyncio."""
        return openai.AsyncOpenAI(**{"base_url": self.base_url, "api_key": self.key, "max_retries": 0, **options})

    def script(self, **fields: Any) -> None:
        """Make the engine behave so (backends/emulator/script.py)."""
        answer = self.control("POST", "script", json=fields)
        assert answer.status_code == 200, answer.text

    def fault(self, kind: str, **fields: Any) -> None:
        """Make this go wrong in the engine, and nothing else."""
        self.script(faults=[{"kind": kind, **fields}])

    def last_number(self) -> int:
        """The number of the engine's latest request."""
        return max((sight["number"] for sight in self.seen()), default=0)

    def seen(self, since: int = 0) -> list[dict[str, Any]]:
        """The engine's requests for inference after number `since`."""
        sights: list[dict[str, Any]] = self.control("GET", "seen", params={"since": since}).json()
        return [sight for sight in sights if sight["path"].endswith(("completions", "embeddings"))]


class RealTarget(Target):
    """A gateway that somebody else started, over a real engine: nothing can be made to go wrong in it."""

    @property
    def base_url(self) -> str:
        return f"{os.environ['TUNEGATE_CONFORMANCE_URL']}/v1"

    @property
    def model(self) -> str:
        return os.environ["TUNEGATE_CONFORMANCE_MODEL"]

    def control(self, method: str, path: str, **options: Any) -> httpx2.Response:
        pytest.skip("needs an emulated engine")

    def script(self, **fields: Any) -> None:
        if fields:
            pytest.skip("needs an emulated engine")

    def last_number(self) -> int:
        return 0


def running_target() -> RealTarget | None:
    """What the environment names, if it names one."""
    if "TUNEGATE_CONFORMANCE_URL" not in os.environ:
        return None
    engine, key = os.environ["TUNEGATE_CONFORMANCE_ENGINE"], os.environ["TUNEGATE_CONFORMANCE_KEY"]
    context_tokens = int(os.environ["TUNEGATE_CONFORMANCE_CONTEXT_TOKENS"])
    return RealTarget(engine, None, key, context_tokens)  # type: ignore[arg-type]  # the process is not ours


@contextlib.contextmanager
def serving(engine: str, *flags: str) -> Iterator[Target]:
    """A gateway over one emulated replica of `engine`."""
    with tempfile.TemporaryDirectory(prefix="tunegate-conformance-") as folder:
        model = checkpoint(Path(folder) / "base")
        common = ("--backend", engine, "--engine-version", "emulator", "--device", "cuda", "--model", str(model))
        with gateway(*common, *flags, state=Path(folder) / "state", api_key=API_KEY) as running:
            yield Target(engine, running)
