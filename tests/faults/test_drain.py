"""A stop under steady load on kept connections: who was let in is answered, and is told to go elsewhere."""

from __future__ import annotations

import http.client
import json
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from tests.support.engines import checkpoint, script
from tests.support.gateway import Gateway, gateway
from tests.support.wait import eventually

_CLIENTS = 6
_DRAIN_S = 10


@dataclass
class Client:
    """Sends one request after the other for as long as there is anyone to send to, as a pooled HTTP client does."""

    statuses: list[int] = field(default_factory=list)
    told_to_close: list[bool] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)  # of requests on a connection that was served before

    def run(self, host: str, port: int, body: bytes) -> None:
        while True:
            connection = http.client.HTTPConnection(host, port, timeout=30)
            try:
                connection.connect()
            except OSError:
                return  # nobody is there any more
            with connection.sock:
                if not self._use(connection, body):
                    return

    def _use(self, connection: http.client.HTTPConnection, body: bytes) -> bool:
        """Ask until told to close; False if a new connection was not let in."""
        answered = False
        while True:
            try:
                connection.request("POST", "/v1/chat/completions", body, {"content-type": "application/json"})
                answer = connection.getresponse()
                answer.read()
            except (OSError, http.client.HTTPException) as error:
                if answered:
                    self.failures.append(repr(error))
                return answered
            answered = True
            self.statuses.append(answer.status)
            self.told_to_close.append(answer.will_close)
            if answer.will_close:
                return True


@pytest.mark.parametrize("settle_s", [0, 2])
def test_nobody_who_was_let_in_is_turned_out(tmp_path: Path, settle_s: int) -> None:
    flags = (
        "--backend",
        "vllm",
        "--engine-version",
        "emulator",
        "--device",
        "cuda",
        "--replicas",
        "2",
        "--relays",
        "2",
    )
    times = ("--settle-s", str(settle_s), "--drain-timeout-s", str(_DRAIN_S))
    with gateway(*flags, *times, "--model", str(checkpoint(tmp_path / "base"))) as running:
        eventually(lambda: all(replica["state"] == "ready" for replica in running.replicas()), 30)
        for replica in ("r0", "r1"):
            script(running, replica, inter_token_ms=5)
        clients = [Client() for _ in range(_CLIENTS)]
        threads = started(running, clients)
        eventually(lambda: all(len(client.statuses) > 2 for client in clients), 30)
        assert not any(any(client.told_to_close) for client in clients)

        since_s = time.monotonic()
        assert running.stop() == 0
        assert time.monotonic() - since_s >= settle_s
        for thread in threads:
            thread.join(30)

    for client in clients:
        assert set(client.statuses) == {200}
        assert client.failures == []
        assert client.told_to_close[-1]
    if settle_s:  # new connections were served for so long
        assert all(sum(client.told_to_close) > 1 for client in clients)


def started(running: Gateway, clients: list[Client]) -> list[threading.Thread]:
    """Let the clients loose, each in its thread."""
    address = urlsplit(running.url)
    messages = [{"role": "user", "content": "a story"}]
    body = json.dumps({"model": running.model, "messages": messages, "max_tokens": 10}).encode()
    threads = [
        threading.Thread(target=client.run, args=(address.hostname, address.port, body), daemon=True)
        for client in clients
    ]
    for thread in threads:
        thread.start()
    return threads
