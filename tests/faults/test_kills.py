"""kill -9 of each kind of process: requests in flight get a clear end, the rest go on, everything comes back."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest

from tests.support.engines import adapter, chat, checkpoint, script, state_of, upload
from tests.support.gateway import Gateway, command_line, descendants, gateway
from tests.support.wait import eventually


@pytest.fixture(params=["vllm", "sglang", "lmdeploy"])
def running(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Gateway]:
    """Two emulated replicas behind two relays, with one adapter uploaded."""
    model = checkpoint(tmp_path / "base")
    flags = ("--backend", request.param, "--engine-version", "emulator", "--device", "cuda", "--model", str(model))
    with gateway(*flags, "--replicas", "2", "--relays", "2", state=tmp_path / "state") as serving:
        eventually(lambda: all(replica["state"] == "ready" for replica in serving.replicas()), 30)
        upload(serving, "tuned", adapter(tmp_path / "tuned"))
        yield serving


@pytest.fixture
def base_answer(running: Gateway) -> str:
    return text_of(chat(running))


def text_of(answer: httpx2.Response) -> str:
    assert answer.status_code == 200, answer.text
    return str(answer.json()["choices"][0]["message"]["content"])


class Streams:
    """Streams of 40 tokens, which last until they are told to hurry, however slow the machine is."""

    def __init__(self, running: Gateway, count: int, **fields: Any) -> None:
        """Started one after the other, so that each goes to the replica that has fewest."""
        self._running = running
        self._pace(500)
        self._ends: list[str] = []
        self._threads = [
            threading.Thread(target=lambda: self._ends.append(end_of_stream(running, **fields))) for _ in range(count)
        ]
        for number, thread in enumerate(self._threads, 1):
            thread.start()
            eventually(lambda wanted=number: sum(in_flight(running).values()) == wanted)  # type: ignore[misc]

    def ends(self, *replicas: str) -> list[str]:
        """How they ended, once these replicas, which still run, have hurried."""
        self._pace(5, *replicas)
        for thread in self._threads:
            thread.join(60)
        return sorted(self._ends)

    def _pace(self, inter_token_ms: int, *replicas: str) -> None:
        for replica in replicas or ("r0", "r1"):
            script(self._running, replica, inter_token_ms=inter_token_ms)


def test_killed_engine(running: Gateway, base_answer: str) -> None:
    streams = Streams(running, 4, n=2)  # such a stream cannot go on elsewhere
    assert in_flight(running) == {"r0": 2, "r1": 2}
    killed = state_of(running, "r0")["engine_pid"]
    os.kill(killed, signal.SIGKILL)
    assert streams.ends("r1") == ["[DONE]", "[DONE]", "error", "error"]
    assert text_of(chat(running)) == base_answer  # the other replica
    eventually(lambda: state_of(running, "r0")["engine_pid"] != killed, 30)
    eventually(lambda: all(replica["state"] == "ready" for replica in running.replicas()), 60)
    with running.client() as client:
        eventually(lambda: on_replicas(client, "tuned") == {"r0": "ready", "r1": "ready"}, 30)
    assert text_of(chat(running, "tuned")) != base_answer


def test_streams_outlive_their_engine(running: Gateway) -> None:
    """Half of them are on the replica that is killed; all come to their end."""
    streams = Streams(running, 4)
    assert in_flight(running) == {"r0": 2, "r1": 2}
    os.kill(state_of(running, "r0")["engine_pid"], signal.SIGKILL)
    assert streams.ends("r1") == ["[DONE]"] * 4
    eventually(lambda: in_flight(running) == {"r0": 0, "r1": 0})


def test_killed_relay(running: Gateway, base_answer: str) -> None:
    before = counted(running)
    relay = running.children("gateway.relay")[0]
    os.kill(relay, signal.SIGKILL)
    for _ in range(10):
        assert text_of(chat(running)) == base_answer  # the other relay shares the port
    eventually(lambda: len(running.children("gateway.relay")) == 2 and relay not in running.children("gateway.relay"))
    assert counted(running) >= before + 10  # the dead relay's counts are kept
    eventually(lambda: in_flight(running) == {"r0": 0, "r1": 0})


def test_killed_control(running: Gateway, base_answer: str) -> None:
    engines = [state_of(running, replica)["engine_pid"] for replica in ("r0", "r1")]
    tuned_answer = text_of(chat(running, "tuned"))
    [control] = running.children("gateway.control")
    os.kill(control, signal.SIGKILL)
    assert text_of(chat(running)) == base_answer  # inference goes on without it
    assert text_of(chat(running, "tuned")) == tuned_answer

    def listed() -> bool:
        with running.client() as client:
            answer = client.get("/v1/models")
        if answer.status_code == 503:
            assert answer.json()["error"]["type"] == "server_error"
            return False
        return "tuned" in {model["id"] for model in answer.json()["data"]}

    eventually(listed, 30)
    assert [state_of(running, replica)["engine_pid"] for replica in ("r0", "r1")] == engines  # adopted, not restarted
    assert text_of(chat(running, "tuned")) == tuned_answer


def test_killed_main_leaves_nothing(running: Gateway) -> None:
    below = descendants(running.process.pid)
    below += [state_of(running, replica)[key] for replica in ("r0", "r1") for key in ("guard_pid", "engine_pid")]
    running.process.kill()
    eventually(lambda: not [pid for pid in below if command_line(pid)], 30)


def test_stop_lets_streams_finish(running: Gateway) -> None:
    stream = Streams(running, 1)
    running.process.send_signal(signal.SIGTERM)
    assert stream.ends() == ["[DONE]"]
    assert running.process.wait(60) == 0


def end_of_stream(running: Gateway, **fields: Any) -> str:
    """How a stream of 40 tokens ends for an OpenAI client: with [DONE], or with the error it raises."""
    client = openai.OpenAI(base_url=f"{running.url}/v1", api_key="none", max_retries=0)
    messages = [{"role": "user", "content": "a long story"}]
    try:
        chunks = list(
            client.chat.completions.create(model=running.model, messages=messages, stream=True, max_tokens=40, **fields)  # type: ignore[arg-type]
        )
    except openai.APIError:
        return "error"
    return "[DONE]" if chunks[-1].choices[0].finish_reason else "cut off"


def metric(running: Gateway, name: str) -> dict[str, float]:
    """Every sample of a metric: its labels as written -> value."""
    with running.client() as client:
        page = client.get("/metrics").text
    samples = [line.rpartition(" ") for line in page.splitlines() if line.startswith(name + "{")]
    return {labels: float(value) for labels, _, value in samples}


def in_flight(running: Gateway) -> dict[str, int]:
    """Requests in flight by replica, over all relays."""
    found = {"r0": 0, "r1": 0}
    for labels, value in metric(running, "tunegate_in_flight_requests").items():
        for replica in found:
            if f'replica="{replica}"' in labels:
                found[replica] += int(value)
    return found


def counted(running: Gateway) -> float:
    """Requests answered so far, over all relays and their restarts."""
    return sum(metric(running, "tunegate_requests_total").values())


def on_replicas(client: httpx2.Client, name: str) -> dict[str, str]:
    """The adapter's state on each replica."""
    answer = client.get(f"/v1/adapters/{name}").json()
    return {replica["id"]: replica["state"] for replica in answer["replicas"]}
