"""`gateway keys`, `gateway backend` and `gateway reload` against a scripted gateway."""

from __future__ import annotations

import json
from typing import Any

import pytest
from click.testing import CliRunner

from gateway.cli import backend, keys
from gateway.cli.client import GatewayClient
from gateway.cli.main import main

KEY = {"id": "key-1", "name": "app", "scopes": ["infer"], "state": "active", "expires_at": None}
KEY |= {"requests_per_minute": 5, "tokens_per_minute": None, "token_budget": 10, "budget_period": "day"}
KEY |= {"used": {"requests": 3, "tokens": 40, "budget_tokens": 7, "last_at": None}}


class Calls(list[tuple[str, str, Any]]):
    """What was called, and what is answered next."""

    answers: list[Any]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    calls = Calls()

    def call(self: Any, method: str, path: str, **kwargs: Any) -> Any:
        calls.append((method, path, kwargs.get("json")))
        return calls.answers.pop(0)

    monkeypatch.setattr(GatewayClient, "call", call)
    monkeypatch.setattr(backend, "_POLL_S", 0)
    return calls


def run(*argv: str) -> Any:
    return CliRunner().invoke(main, [*argv])


def test_a_new_key_is_alone_on_standard_output(calls: Calls) -> None:
    calls.answers = [KEY | {"key": "tg-secret"}]
    result = run("keys", "create", "app", "--scope", "infer", "--expires-in", "2h", "--requests-per-minute", "5")
    assert result.exit_code == 0, result.output
    assert result.stdout == "tg-secret\n"
    body = {"name": "app", "scopes": ["infer"], "expires_in_s": 7200, "requests_per_minute": 5}
    assert calls == [("POST", "/admin/keys", body)]


def test_spans_of_time() -> None:
    assert [keys.Span().convert(text, None, None) for text in ("90s", "5m", "1h", "30d")] == [90, 300, 3600, 2_592_000]
    result = run("keys", "rotate", "app", "--grace", "soon")
    assert result.exit_code == 2
    assert "30d" in result.output


def test_list_rotate_change_revoke(calls: Calls) -> None:
    calls.answers = [{"data": [KEY]}, KEY | {"key": "tg-new"}, KEY, KEY]
    listed = run("keys", "list").stdout
    assert "key-1" in listed
    assert "7/10" in listed
    assert run("keys", "rotate", "app", "--grace", "1d").stdout == "tg-new\n"
    assert json.loads(run("keys", "change", "app", "--priority", "3").stdout)["id"] == "key-1"
    assert run("keys", "revoke", "app").stdout == "key-1 (app) revoked\n"
    assert calls == [
        ("GET", "/admin/keys", None),
        ("POST", "/admin/keys/app/rotate", {"grace_s": 86_400}),
        ("PATCH", "/admin/keys/app", {"priority": 3}),
        ("DELETE", "/admin/keys/app", None),
    ]


def test_switch_waits_for_its_end(calls: Calls) -> None:
    phases = ["starting", "draining", "done"]
    calls.answers = [{"backend": "sglang", "switch": {"phase": phase, "seconds": 3.5}} for phase in phases]
    result = run("backend", "switch", "sglang", "--replace", "--engine-arg=--x")
    assert result.stdout == "sglang serves, after 3.5 s\n"
    assert calls[0] == ("POST", "/admin/backend", {"backend": "sglang", "mode": "replace", "engine_arg": ("--x",)})


def test_a_failed_switch_says_why(calls: Calls) -> None:
    calls.answers = [{"backend": "vllm", "switch": {"phase": "failed", "reason": "no memory"}}]
    result = run("backend", "switch", "sglang")
    assert result.exit_code == 1
    assert "not switched to sglang: no memory" in result.output
    assert calls[0][2] == {"backend": "sglang", "mode": "beside"}


def test_a_switch_that_control_did_not_live_to_finish(calls: Calls) -> None:
    under_way = {"backend": "vllm", "switch": {"phase": "starting"}}
    calls.answers = [under_way, {"backend": "vllm", "switch": None}]
    result = run("backend", "switch", "sglang")
    assert result.exit_code == 1
    assert "started again meanwhile, and goes on with vllm" in result.output


def test_reload(calls: Calls) -> None:
    calls.answers = [{"changed": {"replicas": 2}}]
    assert run("reload").stdout == "reloaded: replicas 2\n"
