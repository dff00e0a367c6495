"""Errors: the right exception, with all that the client reads from it, and what the client does by itself."""

from __future__ import annotations

import time
from typing import Any

import openai
import pytest

from tests.conformance.target import Target
from tests.support.wait import eventually

QUESTION = [{"role": "user", "content": "hello"}]


def check(error: openai.APIStatusError, status: int, type: str = "invalid_request_error") -> None:
    """The error object is OpenAI's, whatever the engine's own was."""
    assert error.status_code == status
    assert error.type == type
    assert isinstance(error.body, dict)
    assert set(error.body) >= {"message", "type", "param", "code"}
    assert error.body["message"]
    assert error.request_id


@pytest.mark.parametrize("key", ["wrong", "sk-conformance2", ""])
def test_wrong_key(target: Target, key: str) -> None:
    with target.client(api_key=key or "none") as client, pytest.raises(openai.AuthenticationError) as raised:
        client.chat.completions.create(model=target.model, messages=QUESTION)
    check(raised.value, 401)
    assert raised.value.code == "invalid_api_key"
    with target.client(api_key="wrong") as client, pytest.raises(openai.AuthenticationError):
        client.models.list()


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("model", ["nope", "base:nope", "nope/x", "a-0123456789ab", "base@v1", "é"])
def test_unknown_model(target: Target, client: openai.OpenAI, model: str, stream: bool) -> None:
    since = target.last_number()
    with pytest.raises(openai.NotFoundError) as raised:
        client.chat.completions.create(model=model, messages=QUESTION, stream=stream)
    check(raised.value, 404)
    assert raised.value.code == "model_not_found"
    assert model in raised.value.message
    assert target.seen(since) == []


def test_unknown_model_for_completions(target: Target, client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as raised:
        client.completions.create(model="nope", prompt="hello")
    check(raised.value, 404)


WRONG: list[dict[str, Any]] = [
    {"temperature": -1},
    {"temperature": "hot"},
    {"top_p": 2},
    {"max_tokens": -1},
    {"max_tokens": "many"},
    {"n": 0},
    {"stop": 5},
    {"messages": []},
    {"messages": "hello"},
    {"response_format": {"type": "poem"}},
    {"response_format": {"type": "json_schema"}},
    {"tool_choice": "required"},
]


@pytest.mark.parametrize("fields", WRONG, ids=str)
@pytest.mark.parametrize("stream", [False, True])
def test_wrong_values(target: Target, client: openai.OpenAI, fields: dict[str, Any], stream: bool) -> None:
    request: dict[str, Any] = {"model": target.model, "messages": QUESTION, "stream": stream}
    with pytest.raises(openai.BadRequestError) as raised:
        client.chat.completions.create(**(request | fields))
    check(raised.value, 400)


@pytest.mark.parametrize("stream", [False, True])
def test_context_overflow(target: Target, client: openai.OpenAI, stream: bool) -> None:
    with pytest.raises(openai.BadRequestError) as raised:
        client.chat.completions.create(
            model=target.model, messages=[{"role": "user", "content": "word " * 20_000}], stream=stream
        )
    check(raised.value, 400)
    assert str(target.context_tokens) in raised.value.message


@pytest.mark.parametrize(
    "body", [b"", b"{", b"[]", b'"text"', b'{"model": 5}', b'{"model": "base", "messages": [', b"\xff\xfe{}", b"{}"]
)
def test_malformed_body(target: Target, client: openai.OpenAI, body: bytes) -> None:
    with pytest.raises(openai.APIStatusError) as raised:
        client.post(
            "/chat/completions", cast_to=object, content=body, options={"headers": {"content-type": "application/json"}}
        )  # type: ignore[call-overload]
    assert raised.value.status_code in (400, 404)
    check(raised.value, raised.value.status_code)


def test_absent_route(target: Target, client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as raised:
        client.get("/no/such/route", cast_to=object)
    check(raised.value, 404)


# ---- what the client does by itself


def test_client_retries_until_the_engine_recovers(target: Target) -> None:
    target.fault("status", status=503, times=1)
    since = target.last_number()
    with target.client(max_retries=2) as client:
        answer = client.chat.completions.create(model=target.model, messages=QUESTION, max_tokens=2)
    assert answer.choices[0].message.content
    statuses = [sight["status"] for sight in target.seen(since)]
    assert statuses == [503, 200]


async def test_async_client_retries(target: Target) -> None:
    target.fault("status", status=503, times=2)
    async with target.async_client(max_retries=3) as client:
        answer = await client.chat.completions.create(model=target.model, messages=QUESTION, max_tokens=2)
    assert answer.choices[0].message.content


def test_what_may_have_run_is_not_retried(target: Target) -> None:
    """The engine failed on it, so asking again may do it twice: the answer tells the client not to."""
    target.fault("status", status=500, times=1)
    since = target.last_number()
    with target.client(max_retries=3) as client, pytest.raises(openai.InternalServerError) as raised:
        client.chat.completions.create(model=target.model, messages=QUESTION, max_tokens=2)
    assert raised.value.response.headers["x-should-retry"] == "false"
    assert len(target.seen(since)) == 1


@pytest.mark.parametrize("status", [500, 503])
def test_engine_errors_without_retries(target: Target, client: openai.OpenAI, status: int) -> None:
    target.fault("status", status=status, times=None)
    with pytest.raises(openai.InternalServerError) as raised:
        client.chat.completions.create(model=target.model, messages=QUESTION)
    check(raised.value, raised.value.status_code, "server_error")
    assert raised.value.status_code >= 500


@pytest.mark.parametrize("kind", ["close", "reset", "garbage"])
def test_engine_breaks_off_before_its_head(target: Target, client: openai.OpenAI, kind: str) -> None:
    target.fault(kind, times=None)
    with pytest.raises(openai.InternalServerError) as raised:
        client.chat.completions.create(model=target.model, messages=QUESTION)
    check(raised.value, raised.value.status_code, "server_error")


def test_bad_requests_are_not_retried(target: Target) -> None:
    since = target.last_number()
    with target.client(max_retries=5) as client, pytest.raises(openai.BadRequestError):
        client.chat.completions.create(model=target.model, messages=QUESTION, temperature=-1)
    assert len(target.seen(since)) <= 1


def test_timeout(target: Target, client: openai.OpenAI) -> None:
    target.script(ttft_ms=20_000)
    since = target.last_number()
    started_s = time.monotonic()
    with pytest.raises(openai.APITimeoutError):
        client.with_options(timeout=0.4).chat.completions.create(model=target.model, messages=QUESTION)
    assert time.monotonic() - started_s < 3
    eventually(lambda: [sight for sight in target.seen(since) if sight["aborted"]], 3)


def test_timeout_within_a_stream(target: Target, client: openai.OpenAI) -> None:
    target.fault("stream_hang", after_chunks=3)
    stream = client.with_options(timeout=0.5).chat.completions.create(
        model=target.model, messages=QUESTION, max_tokens=20, stream=True
    )
    # The client's httpx raises its own ReadTimeout here in both majors: it does not wrap what happens in a body.
    with pytest.raises(Exception, match=r"(?i)time"):
        list(stream)
