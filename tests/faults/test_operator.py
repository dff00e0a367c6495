"""What an operator changes while requests come: engines, keys, limits, replicas, the certificate."""

from __future__ import annotations

import contextlib
import os
import signal
import ssl
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest

from tests.support.certificates import write_certificate
from tests.support.engines import adapter, chat, checkpoint, state_of, upload
from tests.support.gateway import Gateway, gateway
from tests.support.wait import eventually


def emulated(tmp_path: Path, *more: str) -> tuple[str, ...]:
    base = checkpoint(tmp_path / "base")
    return ("--engine-version", "emulator", "--device", "cuda", "--model", str(base), *more)


class Load:
    """Requests one after another on several connections until told to stop: plain and streamed, base and adapter."""

    def __init__(self, running: Gateway, models: tuple[str, ...], clients: int = 6) -> None:
        self.failures: list[str] = []
        self.answered = 0
        self._running = running
        self._models = models
        self._stop = threading.Event()
        self._pool = ThreadPoolExecutor(clients)
        self._futures = [self._pool.submit(self._ask, number) for number in range(clients)]

    def _ask(self, number: int) -> None:
        stream = number % 2 == 0
        body = {"messages": [{"role": "user", "content": "hello"}], "stream": stream, "max_tokens": 8}
        with self._running.client() as client:
            while not self._stop.is_set():
                model = self._models[number % len(self._models)]
                answer = client.post("/v1/chat/completions", json={"model": model, **body})
                whole = answer.text.endswith("data: [DONE]\n\n") if stream else answer.status_code == 200
                if not whole or "error" in answer.text:
                    self.failures.append(f"{answer.status_code} {answer.text[-300:]}")
                self.answered += 1

    def end(self) -> None:
        self._stop.set()
        for future in self._futures:
            future.result(30)
        self._pool.shutdown()


def test_switching_engines_under_load_loses_nothing(tmp_path: Path) -> None:
    with gateway(*emulated(tmp_path, "--backend", "vllm", "--relays", "2", "--replicas", "2")) as running:
        upload(running, "tuned", adapter(tmp_path / "tuned"))
        load = Load(running, ("base", "tuned"))
        with running.client() as client:
            eventually(lambda: load.answered > 50, 30)
            to = {"backend": "sglang", "engine_version": "emulator", "wait_s": 60}
            shown = client.post("/admin/backend", json=to).json()
            assert shown["switch"]["phase"] == "done", shown
            at_switch = load.answered
            eventually(lambda: load.answered > at_switch + 50, 30)
            assert [replica["backend"] for replica in running.replicas()] == ["sglang", "sglang"]

            # The engine that cannot start leaves the one that serves.
            shown = client.post(
                "/admin/backend", json={"backend": "vllm", "engine_version": "0.0", "wait_s": 60}
            ).json()
            assert shown["switch"]["phase"] == "failed"
            assert shown["backend"] == "sglang"

            # Another control process goes on with the engines that were switched to.
            engines = [state_of(running, id)["engine_pid"] for id in ("r2", "r3")]
            [control] = running.children("gateway.control")
            os.kill(control, signal.SIGKILL)
            eventually(lambda: running.children("gateway.control") not in ([], [control]), 30)
            eventually(lambda: [replica["state"] for replica in _replicas(running)] == ["ready", "ready"], 30)
            assert [state_of(running, id)["engine_pid"] for id in ("r2", "r3")] == engines
            after = client.get("/admin/backend").json()
            assert (after["backend"], after["switch"]) == ("sglang", shown["switch"])
        load.end()
        assert load.failures == []
        assert chat(running, "tuned").status_code == 200


def _replicas(running: Gateway) -> list[dict[str, object]]:
    try:
        return running.replicas()
    except httpx2.HTTPError:
        return []


@pytest.fixture(scope="module")
def closed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Gateway, Path]]:
    """A gateway with a key, TLS and a configuration file, and its folder."""
    folder = tmp_path_factory.mktemp("closed")
    cert, key = write_certificate(folder)
    file = folder / "gateway.yaml"
    file.write_text(f"api_key: [root]\ntls_cert: {cert}\ntls_key: {key}\n")
    with gateway(*emulated(folder, "--config", str(file), "--relays", "2")) as running:
        running.api_key = "root"
        assert running.url.startswith("https://")
        yield running, folder


@contextlib.contextmanager
def _client(closed: tuple[Gateway, Path], key: str = "root") -> Iterator[openai.OpenAI]:
    running, folder = closed
    context = ssl.create_default_context(cafile=folder / "cert.pem")
    with openai.DefaultHttpxClient(verify=context, trust_env=False) as http:
        yield openai.OpenAI(base_url=f"{running.url}/v1", api_key=key, max_retries=0, http_client=http)


def _admin(closed: tuple[Gateway, Path]) -> httpx2.Client:
    running, folder = closed
    context = ssl.create_default_context(cafile=folder / "cert.pem")
    headers = {"authorization": "Bearer root"}
    return httpx2.Client(base_url=running.url, headers=headers, verify=context, trust_env=False, timeout=30)


def _ask(client: openai.OpenAI) -> Any:
    messages: Any = [{"role": "user", "content": "hi"}]
    return client.chat.completions.with_raw_response.create(model="base", messages=messages, max_tokens=5)


def test_keys_as_a_client_meets_them(closed: tuple[Gateway, Path]) -> None:
    with _admin(closed) as admin, _client(closed) as root:
        terms = {"requests_per_minute": 3, "tokens_per_minute": 1000}
        made = admin.post("/admin/keys", json={"name": "app", **terms}).json()
        client = root.with_options(api_key=made["key"])
        answers = [_ask(client) for _ in range(3)]
        assert [int(answer.headers["x-ratelimit-remaining-requests"]) for answer in answers] == [2, 1, 0]
        assert answers[0].headers["x-ratelimit-limit-tokens"] == "1000"
        with pytest.raises(openai.RateLimitError) as limited:
            _ask(client)
        assert limited.value.code == "rate_limit_exceeded"
        assert 0 < int(limited.value.response.headers["retry-after-ms"]) <= 20_000
        assert int(limited.value.response.headers["retry-after"]) <= 20
        assert limited.value.response.headers["x-ratelimit-remaining-requests"] == "0"
        with pytest.raises(openai.PermissionDeniedError, match="lacks the scope `train`"):
            client.files.list()
        with pytest.raises(openai.PermissionDeniedError, match="lacks the scope `adapters`"):
            client.models.delete("base")
        assert client.models.list().data, "limits are for inference"
        with pytest.raises(openai.AuthenticationError):
            _ask(root.with_options(api_key="tg-" + "x" * 43))

        spent = admin.post("/admin/keys", json={"name": "spent", "token_budget": 1}).json()
        spender = root.with_options(api_key=spent["key"])
        _ask(spender)
        with pytest.raises(openai.RateLimitError) as over:
            _ask(spender)
        assert over.value.code == "insufficient_quota"
        assert over.value.response.headers["x-should-retry"] == "false"
        eventually(lambda: admin.get("/admin/keys/spent").json()["used"]["budget_tokens"] > 1, 20)

        rotated = admin.post("/admin/keys/app/rotate").json()
        with pytest.raises(openai.AuthenticationError, match=r"no longer valid|Incorrect"):
            client.models.list()
        client = root.with_options(api_key=rotated["key"])
        assert client.models.list().data
        assert admin.delete("/admin/keys/app").json()["state"] == "revoked"
        with pytest.raises(openai.AuthenticationError):
            client.models.list()
        running, _ = closed
        secrets = (made["key"], rotated["key"], spent["key"])
        for file in running.state.rglob("*"):
            if file.is_file():
                contents = file.read_bytes()
                assert not any(secret.encode() in contents for secret in secrets), file
        assert not any(secret in running.errors for secret in secrets)


def test_a_killed_relay_does_not_forget_what_a_key_used(closed: tuple[Gateway, Path]) -> None:
    running, _ = closed
    with _admin(closed) as admin:
        made = admin.post("/admin/keys", json={"name": "steady", "requests_per_minute": 1}).json()
        with _client(closed, made["key"]) as client:
            _ask(client)
        before = running.children("gateway.relay")
        for relay in before:
            os.kill(relay, signal.SIGKILL)
        eventually(lambda: len(set(running.children("gateway.relay")) - set(before)) == 2, 30)
        eventually(lambda: _answers(admin, "/ready"), 30)
        for _ in range(4):
            with _client(closed, made["key"]) as client, pytest.raises(openai.RateLimitError):
                _ask(client)


def _answers(client: httpx2.Client, path: str) -> bool:
    try:
        return client.get(path).status_code == 200
    except httpx2.HTTPError:
        return False


def test_reload_by_signal_changes_keys_replicas_and_certificate(closed: tuple[Gateway, Path]) -> None:
    running, folder = closed
    file = folder / "gateway.yaml"
    text = file.read_text()
    with _admin(closed) as client:
        file.write_text(text + "max_adapters: 5\nreplicas: 9\n")
        said = client.post("/admin/reload")
        assert said.status_code == 400, said.text
        assert "max_adapters cannot change" in said.json()["error"]["message"]
        assert len(_all(client)) == 1
    old = (folder / "cert.pem").read_text()
    write_certificate(folder)
    assert (folder / "cert.pem").read_text() != old
    file.write_text(text.replace("[root]", "[root, second]") + "replicas: 2\nmax_body_mb: 1\n")
    running.process.send_signal(signal.SIGHUP)
    eventually(lambda: "reloaded: " in running.errors, 30)
    with _admin(closed) as client:  # trusts the new certificate alone
        eventually(lambda: _answers(client, "/ready"), 30)
        eventually(lambda: [replica["state"] for replica in _all(client)] == ["ready", "ready"], 30)
        too_large = client.post("/v1/chat/completions", content=b" " * 1_000_001)
        assert too_large.status_code == 413
    with _client(closed, "second") as second:
        assert second.models.list().data


def _all(client: httpx2.Client) -> list[dict[str, Any]]:
    return list(client.get("/admin/replicas").json()["data"])


def test_plain_http_on_the_tls_port_hurts_nobody(closed: tuple[Gateway, Path]) -> None:
    running, _ = closed
    with httpx2.Client(trust_env=False) as client, pytest.raises(httpx2.HTTPError):
        client.get(running.url.replace("https", "http") + "/ready")
    with _admin(closed) as client:
        started = time.monotonic()
        assert client.get("/ready").status_code == 200
        assert time.monotonic() - started < 20
