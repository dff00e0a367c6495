"""The main job on real engines: chat, upload an adapter, call it, delete it, restart; tokens equal to the judge's."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest

from tests.engine.conftest import Oracle
from tests.proofs import swaps
from tests.support.gateway import Gateway
from tests.support.wait import eventually

pytestmark = [pytest.mark.engine, pytest.mark.timeout(900)]

MAX_TOKENS = 24


@pytest.fixture
def client(served: Gateway) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0, timeout=120)


@pytest.fixture(scope="module")
def direct(served: Gateway) -> Iterator[httpx2.Client]:
    """The engine itself, past the gateway: address and key are in the replica's own state file."""
    state = json.loads((served.state / "run" / "replica-r0.json").read_text())
    headers = {"authorization": f"Bearer {state['api_key']}"}
    with httpx2.Client(base_url=f"http://127.0.0.1:{state['port']}", headers=headers, timeout=120) as engine:
        yield engine


@pytest.fixture(scope="module")
def uploaded(served: Gateway, oracle: Oracle) -> Iterator[list[str]]:
    """Both adapters, uploaded while base traffic runs; that traffic must not notice."""
    with BaseTraffic(served) as traffic, served.client() as http:
        for name in ("pirate", "robot"):
            answer = upload(http, name, oracle.adapter(name))
            assert answer["state"] == "ready", answer
        eventually(lambda: traffic.answered >= 3, 60)
    assert traffic.failures == []
    yield ["pirate", "robot"]


def upload(http: httpx2.Client, name: str, directory: Path) -> dict[str, Any]:
    files = [("file", (file.name, file.read_bytes())) for file in sorted(directory.glob("adapter_*"))]
    answer = http.post("/v1/adapters", data={"name": name}, files=files)
    assert answer.status_code == 201, answer.text
    return dict(answer.json())


class BaseTraffic:
    """Chat requests to the base model, one after another, in a thread."""

    def __init__(self, served: Gateway) -> None:
        self._served = served
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self.answered = 0
        self.failures: list[str] = []

    def __enter__(self) -> BaseTraffic:
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        with self._served.client() as http:
            while not self._stop.is_set():
                body = {"model": self._served.model, "messages": chat("Say hi."), "max_tokens": 4}
                answer = http.post("/v1/chat/completions", json=body)
                if answer.status_code == 200:
                    self.answered += 1
                else:
                    self.failures.append(answer.text)


def chat(prompt: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": prompt}]


def greedy_text(client: openai.OpenAI, model: str, prompt: str) -> str:
    answer = client.chat.completions.create(
        model=model,
        messages=chat(prompt),
        max_tokens=MAX_TOKENS,
        temperature=0,  # type: ignore[arg-type]
    )
    assert answer.model == model
    return answer.choices[0].message.content or ""


def test_models_are_listed(client: openai.OpenAI, served: Gateway, uploaded: list[str]) -> None:
    listed = {model.id: model for model in client.models.list()}
    assert set(uploaded) | {served.model} <= set(listed)
    assert all(listed[name].parent == served.model for name in uploaded)  # type: ignore[attr-defined]


def test_chat_equals_the_engine_itself(
    client: openai.OpenAI, direct: httpx2.Client, served: Gateway, oracle: Oracle
) -> None:
    for prompt in oracle.expected["base"]:
        body = {"model": served.model, "messages": chat(prompt), "max_tokens": MAX_TOKENS, "temperature": 0}
        straight = direct.post("/v1/chat/completions", json=body | {"logprobs": True}).raise_for_status().json()
        through = client.chat.completions.create(**body, logprobs=True)  # type: ignore[call-overload]
        tokens = [token["token"] for token in straight["choices"][0]["logprobs"]["content"]]
        assert [token.token for token in through.choices[0].logprobs.content] == tokens
        stream = client.chat.completions.create(**body, stream=True)  # type: ignore[call-overload]
        streamed = "".join(chunk.choices[0].delta.content or "" for chunk in stream)
        assert streamed == straight["choices"][0]["message"]["content"] == through.choices[0].message.content


def test_adapters_answer_as_peft_does(client: openai.OpenAI, oracle: Oracle, uploaded: list[str]) -> None:
    for name in uploaded:
        for prompt, text in oracle.expected[name].items():
            assert greedy_text(client, name, prompt) == text


def test_mixed_batch_keeps_base_and_adapters_apart(
    client: openai.OpenAI, served: Gateway, oracle: Oracle, uploaded: list[str]
) -> None:
    """vLLM's CPU build gives base rows the last adapter's weights without the mend in its environment."""
    wanted = [
        (served.model if name == "base" else name, prompt, text)
        for name, answers in oracle.expected.items()
        for prompt, text in answers.items()
    ]
    with ThreadPoolExecutor(len(wanted)) as pool:
        answers = list(pool.map(lambda row: greedy_text(client, row[0], row[1]), wanted))
    assert answers == [text for _, _, text in wanted]


def test_prompts_are_scored_in_mixed_batches(client: openai.OpenAI, served: Gateway, uploaded: list[str]) -> None:
    """vLLM's CPU build dies of it without the mend in its environment."""
    if served.replicas()[0]["backend"] != "vllm":
        pytest.skip("a field of vLLM's")

    def score(row: tuple[str, str]) -> list[float]:
        model, prompt = row
        choice = client.completions.create(
            model=model, prompt=prompt, max_tokens=1, temperature=0, extra_body={"prompt_logprobs": 0}
        ).choices[0]
        tokens: list[dict[str, dict[str, float]]] = choice.prompt_logprobs[1:]  # type: ignore[attr-defined]
        return [next(iter(token.values()))["logprob"] for token in tokens]

    rows = [(model, "one two three four five " * times) for times in (1, 2) for model in (served.model, *uploaded)]
    alone = list(map(score, rows))
    with ThreadPoolExecutor(len(rows)) as pool:
        together = list(pool.map(score, rows))
    assert [pytest.approx(scores, abs=0.01) for scores in alone] == together


def test_usage_comes_last_and_only_when_asked(client: openai.OpenAI, served: Gateway) -> None:
    body: dict[str, Any] = {"model": served.model, "messages": chat("Count to five."), "max_tokens": 8, "stream": True}
    asked = list(client.chat.completions.create(**body, stream_options={"include_usage": True}))
    assert [chunk.usage is not None for chunk in asked] == [False] * (len(asked) - 1) + [True]
    assert asked[-1].choices == [] and asked[-1].usage.completion_tokens == 8
    assert all(chunk.usage is None and chunk.choices for chunk in client.chat.completions.create(**body))


def test_json_schema_and_logprobs(client: openai.OpenAI, served: Gateway) -> None:
    schema = {
        "type": "object",
        "properties": {"city": {"type": "string", "maxLength": 12}, "people": {"type": "integer", "maximum": 99999999}},
        "required": ["city", "people"],
        "additionalProperties": False,
    }
    answer = client.chat.completions.create(
        model=served.model,
        messages=chat("Describe Paris as JSON."),  # type: ignore[arg-type]
        max_tokens=96,
        temperature=0,
        response_format={"type": "json_schema", "json_schema": {"name": "city", "schema": schema, "strict": True}},
    )
    assert set(json.loads(answer.choices[0].message.content or "")) == {"city", "people"}
    answer = client.chat.completions.create(
        model=served.model,
        messages=chat("Hi"),
        max_tokens=2,
        logprobs=True,
        top_logprobs=3,  # type: ignore[arg-type]
    )
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None and len(logprobs.content[0].top_logprobs) == 3  # type: ignore[index]


def test_client_that_goes_away_stops_the_engine(served: Gateway, direct: httpx2.Client) -> None:
    body = {"model": served.model, "messages": chat("Tell a very long story."), "max_tokens": 1500, "stream": True}
    with (
        served.client() as http,
        http.stream("POST", "/v1/chat/completions", json=body | {"ignore_eos": True}) as answer,
    ):
        next(answer.iter_lines())
        eventually(lambda: running(direct) == 1, 10)
    left = time.monotonic()
    eventually(lambda: running(direct) == 0, 10)
    assert time.monotonic() - left < 2.5  # one second, and what the engine's own report lags behind


def running(direct: httpx2.Client) -> int:
    """Requests the engine is working on, by its own account."""
    loads = direct.get("/v1/loads")  # SGLang's metrics lag by dozens of tokens, this does not
    if loads.status_code == 200:
        return int(loads.json()["loads"][0]["num_running_reqs"])
    for line in direct.get("/metrics").text.splitlines():
        if line.startswith("vllm:num_requests_running"):
            return int(float(line.rsplit(" ", 1)[1]))
    raise AssertionError("the engine says nowhere how much it is working on")


def test_a_name_moves_between_versions_under_load(served: Gateway, oracle: Oracle) -> None:
    report = asyncio.run(swaps.run(served, oracle.adapter("pirate"), oracle.adapter("robot"), swaps=4, clients=3))
    assert report.good, str(report)
    with served.client() as http:
        assert http.delete(f"/v1/adapters/{swaps.NAME}").status_code == 200


def test_deleted_adapter_is_gone(client: openai.OpenAI, served: Gateway, oracle: Oracle) -> None:
    """Uploaded again under another name: the same bytes, one content address, its own life."""
    with served.client() as http:
        upload(http, "short-lived", oracle.adapter("robot"))
        assert greedy_text(client, "short-lived", "What is gravity?")
        assert http.delete("/v1/adapters/short-lived").status_code == 200
        with pytest.raises(openai.NotFoundError):
            greedy_text(client, "short-lived", "What is gravity?")
        assert greedy_text(client, "robot", "What is gravity?")


def test_killed_engine_comes_back_with_its_adapters(
    client: openai.OpenAI, served: Gateway, oracle: Oracle, uploaded: list[str]
) -> None:
    state = json.loads((served.state / "run" / "replica-r0.json").read_text())
    os.kill(state["engine_pid"], signal.SIGKILL)
    eventually(lambda: served.replicas()[0]["state"] != "ready", 30)
    with pytest.raises(openai.InternalServerError):
        greedy_text(client, served.model, "Hi")

    def answers_again() -> bool:
        try:
            prompt = "What is gravity?"
            return greedy_text(client, "pirate", prompt) == oracle.expected["pirate"][prompt]
        except openai.InternalServerError:
            return False

    eventually(answers_again, 300, every_s=1)
