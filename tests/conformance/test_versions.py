"""Versions, canaries and aliases as a client meets them: by raw HTTP, through the whole gateway."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest

from tests.conformance.target import Target, serving
from tests.support.engines import adapter

HISTORY_KEYS = {"at", "event", "from", "to", "who", "why", "figures"}


@pytest.fixture(scope="module")
def target() -> Iterator[Target]:
    with serving("vllm", "--relays", "2") as target:
        yield target


@pytest.fixture(scope="module")
def http(target: Target) -> Iterator[httpx2.Client]:
    with target.gateway.client() as client:
        yield client


@pytest.fixture(scope="module", autouse=True)
def tuned(http: httpx2.Client, tmp_path_factory: pytest.TempPathFactory) -> None:
    """`tuned` points to v1, v2 is there beside it."""
    folder = tmp_path_factory.mktemp("adapters")
    for version, fields in ((1, {}), (2, {"promote": "false"})):
        answer = send(http, adapter(folder / f"v{version}", version), **fields)
        assert (answer.status_code, answer.json()["current_version"]) == (201, 1), answer.text


def send(http: httpx2.Client, directory: Path, **fields: str) -> httpx2.Response:
    files = [("file", (file.name, file.read_bytes())) for file in sorted(directory.iterdir())]
    return http.post("/v1/adapters", data={"name": "tuned", **fields}, files=files)


def say(http: httpx2.Client, model: str, **members: Any) -> tuple[str, str | None]:
    """Greedy answer, and which version the gateway says it is from."""
    body = {"model": model, "messages": [{"role": "user", "content": "hello"}], "max_tokens": 12, "temperature": 0}
    answer = http.post("/v1/chat/completions", json=body | members)
    assert answer.status_code == 200, answer.text
    assert answer.json()["model"] == model
    return answer.json()["choices"][0]["message"]["content"], answer.headers.get("x-tunegate-model")


def change(http: httpx2.Client, action: str, **body: Any) -> dict[str, Any]:
    answer = http.post(f"/v1/adapters/tuned/{action}", json=body)
    assert answer.status_code == 200, answer.text
    assert answer.json()["object"] == "adapter"
    return dict(answer.json())


def test_promote_and_rollback(http: httpx2.Client) -> None:
    first, second = say(http, "tuned@v1")[0], say(http, "tuned@v2")[0]
    assert first != second
    assert say(http, "tuned") == (first, None)
    assert change(http, "promote", version=2)["current_version"] == 2
    assert all(say(http, "tuned") == (second, None) for _ in range(4))  # over both relays
    assert change(http, "rollback")["current_version"] == 1
    assert all(say(http, "tuned") == (first, None) for _ in range(4))
    history = http.get("/v1/adapters/tuned").json()["history"]
    assert [(line["from"], line["to"]) for line in history] == [(2, 1), (1, 2), (None, 1)]
    assert all(set(line) == HISTORY_KEYS for line in history)
    assert history[0]["who"].startswith("key-")


def test_a_client_cannot_say_who_it_is(http: httpx2.Client) -> None:
    body = {"version": 1}
    http.post("/v1/adapters/tuned/promote", json={"version": 2}, headers={"x-tunegate-key-id": "somebody"})
    http.post("/v1/adapters/tuned/promote", json=body, headers={"x-tunegate-key-id": "somebody"})
    history = http.get("/v1/adapters/tuned").json()["history"]
    assert {line["who"] for line in history[:2]} == {history[-1]["who"]} != {"somebody"}


def test_canary_is_sticky_and_told(http: httpx2.Client) -> None:
    texts = {"tuned@v1": say(http, "tuned@v1")[0], "tuned@v2": say(http, "tuned@v2")[0]}
    change(http, "canary", version=2, weight=50, automatic=False)
    chosen = {user: say(http, "tuned", user=user) for user in map("user-{}".format, range(24))}
    assert {version for _, version in chosen.values()} == set(texts)
    assert all(texts[version] == text for text, version in chosen.values() if version)
    assert all(say(http, "tuned", user=user) == answer for user, answer in chosen.items())
    assert say(http, "tuned@v1") == (texts["tuned@v1"], None)
    page = http.get("/metrics").text
    assert 'tunegate_requests_total{model="tuned@v2",route="/v1/chat/completions",status="200"}' in page
    assert change(http, "rollback")["canary"] is None
    assert say(http, "tuned", user="user-1") == (texts["tuned@v1"], None)


def test_alias_is_a_model_like_any_other(http: httpx2.Client) -> None:
    change(http, "aliases", alias="prod")
    assert say(http, "prod")[0] == say(http, "tuned")[0]
    assert "prod" in {model["id"] for model in http.get("/v1/models").json()["data"]}
    assert http.get("/v1/models/prod").json()["root"] == "tuned@v1"
    assert http.delete("/v1/adapters/tuned/aliases/prod").status_code == 200
    body = {"model": "prod", "messages": [{"role": "user", "content": "hello"}]}
    assert http.post("/v1/chat/completions", json=body).status_code == 404


@pytest.mark.parametrize(
    ("status", "action", "body"),
    [
        (404, "tuned/promote", {"version": 7}),
        (404, "nobody/promote", {"version": 1}),
        (400, "tuned/promote", {"version": "two"}),
        (400, "tuned/promote", {"verison": 2}),
        (404, "tuned/canary", {"version": 7, "weight": 5}),
        (400, "tuned/canary", {"version": 2, "weight": 0}),
        (400, "tuned/canary", {"version": 2, "weight": 100}),
        (409, "tuned/canary", {"version": 1, "weight": 5}),
        (409, "tuned/aliases", {"alias": "tuned"}),
        (400, "tuned/aliases", {"alias": "a/b"}),
        (404, "nobody/rollback", {}),
    ],
)
def test_what_cannot_be(http: httpx2.Client, status: int, action: str, body: dict[str, Any]) -> None:
    answer = http.post(f"/v1/adapters/{action}", json=body)
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error"
    assert answer.headers.get("x-should-retry") == ("false" if status == 409 else None)
