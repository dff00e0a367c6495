"""Each engine's errors in OpenAI's shape, without what is not the client's to know."""

from __future__ import annotations

import json
import re
from types import SimpleNamespace

import pytest

from gateway.errors import EngineError
from gateway.relay.answers import engine_error, error_event, stream_error, usage_of
from gateway.relay.route import Candidate, Engine

CHAT = b"/v1/chat/completions"
FRENCH = Candidate(
    Engine("r0", 0, "sglang", SimpleNamespace(), b""),  # type: ignore[arg-type]
    "demo:a-0123456789ab",
    b',"model":"demo:a-0123456789ab"',
    re.compile(b"x"),
)


def shown(status: int, body: object, path: bytes = CHAT) -> tuple[int, str, str, str | None, str | None]:
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    error = engine_error(status, raw, path, "french", FRENCH)
    return error.status, error.type, error.message, error.param, error.code


VLLM = {"error": {"message": "max_tokens is 9000", "type": "BadRequestError", "param": "max_tokens", "code": 400}}
FLAT = {"object": "error", "message": "max_tokens is 9000", "type": "BadRequest", "param": "max_tokens", "code": 400}
FASTAPI = {"detail": [{"loc": ["body", "messages", 0, "role"], "msg": "Field required", "type": "missing"}]}


@pytest.mark.parametrize("body", [VLLM, FLAT])
def test_a_clients_fault(body: object) -> None:
    assert shown(400, body) == (400, "invalid_request_error", "max_tokens is 9000", "max_tokens", None)


def test_validation() -> None:
    assert shown(422, FASTAPI) == (
        400,
        "invalid_request_error",
        "messages.0.role: Field required",
        "messages.0.role",
        None,
    )
    vllm = (
        "1 validation error:\n  {'type': 'missing', 'loc': 'body.messages', 'msg': 'Field required', 'input': '<dict>'}"
    )
    sglang = (
        "2 validation errors:\n  {'type': 'list_type', 'loc': ('body', 'stop', 'list[str]'),"
        " 'msg': 'Input should be a list', 'input': 5}\n"
        "  {'type': 'x', 'loc': ('body', 'stop', 0), 'msg': \"Input isn't text\", 'input': 5}\n\n"
        '  File "/srv/env/lib/http_server.py", line 1870, in openai_v1_chat\n    POST /v1/chat/completions'
    )
    assert shown(400, {"error": {"message": vllm, "param": "body.messages"}})[2:4] == (
        "messages: Field required",
        "messages",
    )
    assert shown(400, {"object": "error", "message": sglang})[2:4] == (
        "stop: Input should be a list; stop.0: Input isn't text",
        "stop",
    )
    assert shown(400, {"error": "just a text"})[2] == "just a text"
    assert shown(400, {"error": None, "message": "flat"})[2] == "flat"
    assert shown(400, b"plain text")[2] == "plain text"
    assert shown(400, b"")[2] == "The engine answered with status 400 and no reason."


@pytest.mark.parametrize("status", [401, 403])
def test_our_own_key_is_not_the_clients_fault(status: int) -> None:
    assert shown(status, {"error": "Unauthorized"})[:2] == (502, "server_error")


def test_our_own_names_are_not_the_clients_fault() -> None:
    for status, message in (
        (404, "The model `a-0123456789ab` does not exist."),
        (400, "Got LoRA adapter that has never been loaded: a-0123456789ab"),
    ):
        got = shown(status, {"error": {"message": message}})
        assert got[0] == 503
        assert "french" in got[2]
        assert "a-0123456789ab" not in got[2]


def test_what_the_client_asked_for_is_not_there() -> None:
    got = shown(404, {"error": {"message": "Response with id 'resp_1' not found.", "param": "response_id"}})
    assert got[:4] == (404, "invalid_request_error", "Response with id 'resp_1' not found.", "response_id")


@pytest.mark.parametrize("status, detail", [(404, "Not Found"), (405, "Method Not Allowed")])
def test_a_route_that_the_engine_does_not_have(status: int, detail: str) -> None:
    got = shown(status, {"detail": detail}, b"/v1/embeddings")
    assert got[:2] == (404, "invalid_request_error")
    assert got[2] == "/v1/embeddings is not served for `french`: its engine (sglang) has none."


@pytest.mark.parametrize("status, expected, kind", [
    (413, 413, "invalid_request_error"), (429, 429, "rate_limit_error"), (418, 400, "invalid_request_error"),
    (500, 502, "server_error"), (502, 502, "server_error"), (503, 503, "server_error"), (504, 504, "server_error"),
    (302, 502, "server_error"),
])  # fmt: skip
def test_other_statuses(status: int, expected: int, kind: str) -> None:
    assert shown(status, {"error": {"message": "m"}})[:2] == (expected, kind)


def test_names_and_paths_of_ours_do_not_come_out() -> None:
    message = (
        "demo:a-0123456789ab (a-0123456789ab) not in /srv/state/adapters/a-0123456789ab/w.bin,"
        " see https://x.org/a/b and /v1/chat/completions"
    )
    got = shown(400, {"error": {"message": message}})[2]
    assert got == "french (french) not in <path>, see https://x.org/a/b and /v1/chat/completions"
    assert shown(400, {"error": {"message": "a-0123456789abc da-0123456789ab"}})[2] == "a-0123456789abc da-0123456789ab"
    assert len(shown(400, {"error": {"message": "x" * 100_000}})[2]) == 2000


def test_an_error_in_a_stream_has_its_status_in_its_code() -> None:
    for body in (VLLM, {"error": FLAT}):
        error = stream_error(json.dumps(body).encode(), CHAT, "french", FRENCH)
        assert (error.status, error.message) == (400, "max_tokens is 9000")
    assert stream_error(b'{"error":{"message":"m","code":null}}', CHAT, "french", FRENCH).status == 502
    event = error_event(EngineError("gone", param="p"))
    assert event.startswith(b"data: {")
    assert event.endswith(b"}\n\n")
    assert json.loads(event[6:]) == {"error": {"message": "gone", "type": "server_error", "param": "p", "code": None}}


def test_usage_under_both_names() -> None:
    for usage in ({"prompt_tokens": 3, "completion_tokens": 4}, {"input_tokens": 3, "output_tokens": 4}):
        found = usage_of(json.dumps({"usage": usage, "choices": []}).encode())
        assert found is not None
        assert (found.prompt, found.completion) == (3, 4)
    embedding = usage_of(b'{"data":[],"usage":{"prompt_tokens":3,"total_tokens":3}}')
    assert embedding is not None
    assert (embedding.prompt, embedding.completion) == (3, 0)
    assert usage_of(b'{"tokens":[1,2]}') is None
    for nonsense in (b"", b"<html>", b"[]"):
        with pytest.raises(EngineError):
            usage_of(nonsense)
