"""What a test can make an emulator do, and how it notices a client that goes away."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from typing import Any

import httpx2
import pytest

from tests.support.emulator import ENGINES, Emulator, emulator
from tests.support.wait import eventually

CHAT = "/v1/chat/completions"


def body(**fields: Any) -> dict[str, Any]:
    return {"model": "base", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 8, **fields}


@pytest.fixture(scope="module", params=ENGINES)
def shared(request: pytest.FixtureRequest) -> Iterator[Emulator]:
    with emulator(request.param) as running:
        yield running


@pytest.fixture
def engine(shared: Emulator) -> Iterator[Emulator]:
    shared.script()
    yield shared
    shared.script()


@pytest.fixture
def client(engine: Emulator) -> Iterator[httpx2.Client]:
    with engine.client() as client:
        yield client


def events(client: httpx2.Client, **fields: Any) -> list[str]:
    """The stream's lines of data, as far as it came."""
    found = []
    with client.stream("POST", CHAT, json=body(stream=True, **fields)) as answer:
        for line in answer.iter_lines():
            if line:
                found.append(line.removeprefix("data: "))
    return found


def test_status(engine: Emulator, client: httpx2.Client) -> None:
    engine.fault("status", status=503, times=2)
    answers = [client.post(CHAT, json=body()) for _ in range(3)]
    assert [answer.status_code for answer in answers] == [503, 503, 200]
    error = answers[0].json()
    assert ("error" in error) == (engine.engine == "vllm")


@pytest.mark.parametrize("kind", ["reset", "close", "garbage"])
def test_no_head(engine: Emulator, client: httpx2.Client, kind: str) -> None:
    engine.fault(kind)
    with pytest.raises(httpx2.TransportError):
        client.post(CHAT, json=body())
    assert client.post(CHAT, json=body()).status_code == 200


def test_hang_before_the_head(engine: Emulator, client: httpx2.Client) -> None:
    engine.fault("hang")
    since = engine.last_number()
    with pytest.raises(httpx2.ReadTimeout):
        client.post(CHAT, json=body(), timeout=0.2)
    [sight] = eventually(lambda: [sight for sight in engine.seen(CHAT, since) if sight["aborted"]])
    assert sight["fault"] == "hang"
    assert sight["status"] is None


def test_delay(engine: Emulator, client: httpx2.Client) -> None:
    engine.fault("delay", delay_ms=200)
    started_s = time.monotonic()
    assert client.post(CHAT, json=body()).status_code == 200
    assert time.monotonic() - started_s >= 0.2


@pytest.mark.parametrize("kind", ["stream_reset", "stream_close"])
def test_a_stream_that_breaks(engine: Emulator, client: httpx2.Client, kind: str) -> None:
    engine.fault(kind, after_chunks=3)
    with pytest.raises(httpx2.TransportError), client.stream("POST", CHAT, json=body(stream=True)) as answer:
        answer.read()


def test_a_stream_without_its_end(engine: Emulator, client: httpx2.Client) -> None:
    whole = events(client)
    engine.fault("stream_truncate", after_chunks=3)
    found = events(client)
    assert whole[-1] == "[DONE]"
    assert len(found) == 3
    assert "[DONE]" not in found


def test_a_stream_with_an_error_inside(engine: Emulator, client: httpx2.Client) -> None:
    engine.fault("stream_error", after_chunks=3, status=500)
    found = events(client)
    assert found[3].startswith('{"error"')
    assert found[4:] == ["[DONE]"]


def test_a_stream_with_garbage_goes_on(engine: Emulator, client: httpx2.Client) -> None:
    engine.fault("stream_garbage", after_chunks=2)
    found = events(client)
    assert found[2] == "{this is not JSON"
    assert found[-1] == "[DONE]"


def test_a_stream_that_hangs(engine: Emulator, client: httpx2.Client) -> None:
    engine.fault("stream_hang", after_chunks=2)
    since = engine.last_number()
    with pytest.raises(httpx2.ReadTimeout), client.stream("POST", CHAT, json=body(stream=True), timeout=0.3) as answer:
        answer.read()
    [sight] = eventually(lambda: [sight for sight in engine.seen(CHAT, since) if sight["aborted"]])
    assert sight["chunks"] == 2


def test_timing(engine: Emulator, client: httpx2.Client) -> None:
    engine.script(ttft_ms=100, inter_token_ms=20, tokens_per_chunk=2)
    started_s = time.monotonic()
    found = events(client, max_tokens=10)
    took_s = time.monotonic() - started_s
    assert 0.1 + 4 * 0.04 <= took_s < 3
    texts = [event for event in found if '"content"' in event]
    assert len(texts) <= 8


@pytest.mark.parametrize("stream", [False, True])
def test_leaving_is_noticed_at_once(engine: Emulator, stream: bool) -> None:
    engine.script(ttft_ms=0 if stream else 10_000, inter_token_ms=20)
    since = engine.last_number()
    with engine.client() as client:
        left_at_s = 0.0
        if stream:
            with client.stream("POST", CHAT, json=body(stream=True, max_tokens=400, ignore_eos=True)) as answer:
                parts = answer.iter_bytes()
                next(parts)
                left_at_s = time.time()
                parts.close()
        else:
            with pytest.raises(httpx2.ReadTimeout):
                client.post(CHAT, json=body(), timeout=0.2)
            left_at_s = time.time()
    [sight] = eventually(lambda: [sight for sight in engine.seen(CHAT, since) if sight["aborted"]])
    assert sight["aborted_at_s"] - left_at_s < 0.5
    assert sight["finished_at_s"] is None


def test_metrics_follow(engine: Emulator, client: httpx2.Client) -> None:
    name = {
        "vllm": "vllm:num_requests_running",
        "sglang": "sglang:num_running_reqs",
        "lmdeploy": "lmdeploy:num_requests_running",
    }[engine.engine]

    def running() -> float:
        page = client.get("/metrics").text
        return float(next(line for line in page.splitlines() if line.startswith(name + "{")).rsplit(" ", 1)[1])

    assert running() == 0
    engine.script(inter_token_ms=20)
    with client.stream("POST", CHAT, json=body(stream=True, max_tokens=400, ignore_eos=True)) as answer:
        parts = answer.iter_bytes()
        next(parts)
        assert running() == 1
        parts.close()
    eventually(lambda: running() == 0)


def test_sights(engine: Emulator, client: httpx2.Client) -> None:
    since = engine.last_number()
    client.post(CHAT, json=body(user="me"), headers={"x-mark": "here"})
    [sight] = engine.seen(CHAT, since)
    assert sight["body"]["user"] == "me"
    assert sight["headers"]["x-mark"] == "here"
    assert sight["status"] == 200
    assert sight["finished_at_s"] >= sight["received_at_s"]


def test_refusing_for_a_while(engine: Emulator) -> None:
    engine.refuse(300)

    def connects() -> bool:
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", engine.port)) == 0

    eventually(lambda: not connects(), 2)
    eventually(connects, 5)
    with engine.client() as client:
        eventually(lambda: client.post(CHAT, json=body()).status_code == 200, 5)


@pytest.mark.parametrize("kind", ["die", "stream_die"])
def test_death(kind: str) -> None:
    with emulator("vllm") as engine, engine.client() as client:
        engine.fault(kind, skip=1)
        assert client.post(CHAT, json=body()).status_code == 200
        with pytest.raises(httpx2.TransportError), client.stream("POST", CHAT, json=body(stream=True)) as answer:
            answer.read()
        assert engine.process.wait(5) == 1


def test_script_from_the_environment() -> None:
    with emulator("vllm", script={"answer": "as told"}) as engine, engine.client() as client:
        assert client.post(CHAT, json=body(max_tokens=None)).json()["choices"][0]["message"]["content"] == "as told"


def test_garbled_http_is_answered_400(engine: Emulator) -> None:
    with socket.create_connection(("127.0.0.1", engine.port), 5) as connection:
        connection.sendall(b"NOT HTTP\r\n\r\n")
        assert connection.recv(1000).startswith(b"HTTP/1.1 400")
