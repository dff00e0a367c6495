"""A gateway that starts its own engine, as the stages use it: flags, the engine behind it, traffic, logs."""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx2
import openai

from backends.spec import BackendName, Device
from scripts.gpu_suite import machine, memory
from scripts.gpu_suite.report import quantile
from tests.support.gateway import Gateway, gateway

KEY = "sk-gpu-suite"
ANSWER_TOKENS = 24
_PATIENCE_S = 400.0
_KERNEL_WORDS = re.compile(
    r"(?i)marlin|machete|triton_?w4a16|awq|gptq|turbomind|linear ?kernel|attention backend|flash.?attn"
)

# Without graphs a small model is up in half the time, where its speed is not the question.
FAST_START: dict[BackendName, str] = {
    "vllm": "--enforce-eager",
    "sglang": "--disable-cuda-graph",
    "lmdeploy": "--eager-mode",
}


@dataclass(frozen=True)
class Engine:
    """Which engine, on what device, and the flags that this machine wants for it."""

    name: BackendName
    device: Device
    flags: tuple[str, ...] = ()
    share: float = 1.0  # of the GPU's memory


@dataclass
class Served:
    """A running gateway, and the engine that it started."""

    engine: Engine
    gateway: Gateway
    ready_s: float

    def client(self) -> openai.OpenAI:
        """The official client, patient."""
        return openai.OpenAI(base_url=f"{self.gateway.url}/v1", api_key=KEY, max_retries=0, timeout=_PATIENCE_S)

    def http(self) -> httpx2.Client:
        """Plain HTTP, with the key."""
        headers = {"authorization": f"Bearer {KEY}"}
        return httpx2.Client(base_url=self.gateway.url, headers=headers, timeout=_PATIENCE_S, trust_env=False)

    def state(self, replica: str = "r0") -> dict[str, Any]:
        """The replica's state file: process ids, port, key."""
        return dict(json.loads((self.gateway.state / "run" / f"replica-{replica}.json").read_text()))

    def replica_ids(self) -> list[str]:
        """Of the replicas that there are."""
        return [str(row["id"]) for row in self.gateway.replicas()]

    def engine_url(self, replica: str = "r0") -> str:
        """Where the engine itself listens."""
        return f"http://127.0.0.1:{self.state(replica)['port']}"

    def direct(self, replica: str = "r0") -> httpx2.Client:
        """The engine itself, past the gateway."""
        headers = {"authorization": f"Bearer {self.state(replica)['api_key']}"}
        return httpx2.Client(base_url=self.engine_url(replica), headers=headers, timeout=_PATIENCE_S, trust_env=False)

    def in_flight(self) -> float:
        """Requests that are under way, by the gateway's metrics page. Raises LookupError where it does not say."""
        with self.http() as http:
            lines = http.get("/metrics").raise_for_status().text.splitlines()
        rows = [line for line in lines if line.startswith("tunegate_in_flight_requests{")]
        if not rows:
            raise LookupError("/metrics has no tunegate_in_flight_requests")
        return sum(float(row.rpartition(" ")[2]) for row in rows)

    def log(self) -> str:
        """What the first replica's engine wrote since its start."""
        return Path(self.state()["log_path"]).read_text(errors="replace")

    def kernels(self, limit: int = 14) -> list[str]:
        """Lines in which the engine says with what it computes."""
        lines = [re.sub(r"^.*?(INFO|WARNING)\S*( [\d:-]+)*", r"\1", line) for line in self.log().splitlines()]
        return [line[:240] for line in dict.fromkeys(lines) if _KERNEL_WORDS.search(line)][:limit]

    def version(self) -> str:
        """The engine's own answer to which version it is; "" when it has none."""
        with self.direct() as direct:
            for path in ("/version", "/server_info", "/get_server_info"):
                answer = direct.get(path)
                if answer.status_code == 200 and "version" in answer.text:
                    return str(answer.json().get("version", ""))
        return ""


def memory_flags(engine: Engine, model: Path) -> list[str]:
    """What keeps the engine within its share of the GPU."""
    if engine.device == "cpu" or engine.share >= 1.0:
        return []
    return memory.flags(engine.name, engine.share, machine.gpus()[0], model)


@contextlib.contextmanager
def serving(engine: Engine, model: Path, state: Path, *flags: str, name: str | None = None,
            env: dict[str, str] | None = None) -> Iterator[Served]:  # fmt: skip
    """`gateway serve` starts the engine; both are gone afterwards. The state directory with the logs stays.

    env: added to the environment of the gateway and of its engine.
    """
    started = time.monotonic()
    named = ("--model-name", name) if name else ()
    own = ["--backend", engine.name, "--device", engine.device, "--model", str(model), *named]
    own += [*memory_flags(engine, model), *engine.flags, *flags]
    state.mkdir(parents=True, exist_ok=True)
    with gateway(*own, state=state, ready_timeout_s=_PATIENCE_S, api_key=KEY, env=env) as running:
        yield Served(engine, running, round(time.monotonic() - started, 1))


def chat(prompt: str) -> list[dict[str, str]]:
    """One user turn."""
    return [{"role": "user", "content": prompt}]


def greedy(client: openai.OpenAI, model: str, prompt: str) -> str:
    """The greedy answer's text."""
    answer = client.chat.completions.create(model=model, messages=chat(prompt), max_tokens=ANSWER_TOKENS, temperature=0)  # type: ignore[arg-type]
    assert answer.model == model, answer.model
    return answer.choices[0].message.content or ""


def upload(served: Served, name: str, directory: Path) -> float:
    """Upload an adapter (again, for another version); seconds until it is ready, and the name answers with it."""
    files = [("file", (file.name, file.read_bytes())) for file in sorted(directory.glob("adapter_*"))]
    started = time.monotonic()
    with served.http() as http:
        answer = http.post("/v1/adapters", data={"name": name}, files=files)
        assert answer.status_code in (200, 201, 202), f"{answer.status_code} {answer.text[:500]}"
        own = f"/v1/adapters/{answer.json()['id']}"  # by the name, one that failed would look like the one before
        while answer.json().get("state") not in ("ready", "failed") and time.monotonic() - started < _PATIENCE_S:
            time.sleep(0.2)
            answer = http.get(own)
    assert answer.json()["state"] == "ready", answer.text[:500]
    return round(time.monotonic() - started, 2)


def nudged(adapter: Path, out: Path, number: int) -> Path:
    """A copy in whose last weights `number`, above 0, is written in lowest bits: other contents, the same answers."""
    shutil.copytree(adapter, out)
    path = out / "adapter_model.safetensors"
    weights = bytearray(path.read_bytes())
    for bit in range(number.bit_length()):
        weights[-4 * (bit + 1)] ^= number >> bit & 1  # little-endian: the low byte of a float32, or of a bfloat16
    path.write_bytes(weights)
    return out


@dataclass
class Traffic:
    """Streamed chats from several clients while something else happens; what they noticed."""

    served: Served
    models: tuple[str, ...]
    clients: int = 8
    first_token_s: list[tuple[float, float]] = field(default_factory=list)  # (when, how long)
    failures: list[str] = field(default_factory=list)

    def __enter__(self) -> Traffic:
        self._stop = threading.Event()
        self._pool = ThreadPoolExecutor(self.clients)
        self._work = [self._pool.submit(self._run, self.models[n % len(self.models)]) for n in range(self.clients)]
        return self

    def __exit__(self, *exc: object) -> None:
        self._stop.set()
        for work in self._work:
            work.result()
        self._pool.shutdown()

    def _run(self, model: str) -> None:
        body = {"model": model, "messages": chat("Count to nine."), "max_tokens": 32, "stream": True, "temperature": 0}
        with self.served.http() as http:
            while not self._stop.is_set():
                try:
                    self._ask(http, body)
                except httpx2.HTTPError as error:
                    self.failures.append(f"{model}: {error!r}")
                    time.sleep(0.2)

    def _ask(self, http: httpx2.Client, body: dict[str, Any]) -> None:
        started, first, last = time.monotonic(), 0.0, ""
        with http.stream("POST", "/v1/chat/completions", json=body) as answer:
            if answer.status_code != 200:
                self.failures.append(f"{body['model']}: {answer.status_code} {answer.read()[:200]!r}")
                time.sleep(0.2)
                return
            for line in answer.iter_lines():
                if line.startswith("data:"):
                    first = first or time.monotonic() - started
                    last = line
        if last != "data: [DONE]" or not first:
            self.failures.append(f"{body['model']}: the stream ended with {last[:200]!r}")
        else:
            self.first_token_s.append((started, first))

    def figures(self, since: float = 0.0) -> dict[str, Any]:
        """Counts, and the median and 99th percentile of the time to the first token in ms."""
        times = [took for when, took in self.first_token_s if when >= since]
        half, tail = quantile(times, 0.5), quantile(times, 0.99)
        return {
            "answered": len(times),
            "failed": len(self.failures),
            "ttft_p50_ms": round(half * 1e3, 1) if half else None,
            "ttft_p99_ms": round(tail * 1e3, 1) if tail else None,
        }
