"""What a request meets by its key: scope, expiry, limits; and that every end of it is counted."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from relay_harness import Relay, replica, until
from scripted_upstream import DONE, END, STREAM_HEAD, Close, Hang, answer, chunk, token, usage

from gateway.observe.usage import IN_FLIGHT, REQUESTS, ROW_CELLS, TOKENS
from gateway.snapshot import Key

SEKRET = {"authorization": "Bearer sekret"}
USAGE = {"prompt_tokens": 7, "completion_tokens": 5, "total_tokens": 12}
ANSWER = answer(json.dumps({"model": "demo", "choices": [], "usage": USAGE}).encode())


async def start(relay: Relay, *scripts: Any, **terms: Any) -> None:
    key = Key("key-1", frozenset(terms.pop("scopes", {"infer"})), row=2, **terms)
    upstream = await relay.engine(*scripts, serve=False)
    relay.serve(replica(upstream), keys={hashlib.sha256(b"sekret").hexdigest(): key})


def cells(relay: Relay) -> tuple[int, int, int]:
    """Requests, tokens and requests in flight of the key."""
    first = 2 * ROW_CELLS
    values = relay.usage.cells
    return values[first + REQUESTS], values[first + TOKENS], values[first + IN_FLIGHT]


async def test_an_expired_key(relay: Relay) -> None:
    await start(relay, expires_at=1)
    answer = await relay.ask(headers=SEKRET)
    assert (answer.status, answer.error["code"]) == (401, "invalid_api_key")
    assert "key-1 is no longer valid" in answer.error["message"]


async def test_a_key_without_the_scope(relay: Relay) -> None:
    await start(relay, scopes={"adapters"})
    answer = await relay.ask(headers=SEKRET)
    assert (answer.status, answer.error["code"]) == (403, "insufficient_permissions")
    assert "lacks the scope `infer`" in answer.error["message"]
    async with relay.connected() as client:
        for path, scope in (("/admin/keys", "admin"), ("/%61dmin/keys", "admin"), ("/metrics", "metrics")):
            client.send("GET", path, **SEKRET)
            refused = await client.answer()
            assert (refused.status, f"`{scope}`" in refused.error["message"]) == (403, True), path
    assert cells(relay) == (0, 0, 0)


async def test_limits_are_in_the_answers_head_and_tokens_are_charged(relay: Relay) -> None:
    await start(relay, [ANSWER], requests_per_minute=2, tokens_per_minute=12)
    answer = await relay.ask(headers=SEKRET)
    assert answer.status == 200
    assert answer.headers["x-ratelimit-remaining-requests"] == "1"
    assert cells(relay) == (1, 12, 0)
    refused = await relay.ask(headers=SEKRET)
    assert (refused.status, refused.error["code"]) == (429, "rate_limit_exceeded")
    assert "12 tokens per minute" in refused.error["message"]
    assert refused.headers["x-ratelimit-remaining-tokens"] == "0"
    assert 0 < int(refused.headers["retry-after-ms"]) <= 5000
    assert int(refused.headers["retry-after"]) <= 5
    assert cells(relay) == (1, 12, 0)


async def test_a_stream_has_them_too(relay: Relay) -> None:
    await start(relay, [STREAM_HEAD, chunk(token("a")), chunk(usage(7, 2)), chunk(DONE), END], requests_per_minute=2)
    answer = await relay.ask(headers=SEKRET, stream=True)
    assert answer.headers["x-ratelimit-limit-requests"] == "2"
    assert cells(relay) == (1, 9, 0)


async def test_every_end_gives_the_place_back(relay: Relay) -> None:
    await start(relay, [STREAM_HEAD, chunk(token("a")), Hang()], [Close()], [answer(b"{}", "500 Bad")], max_in_flight=1)
    async with relay.connected() as client:
        client.chat(headers=SEKRET, stream=True)
        await client.head()
        await client.piece()
        assert cells(relay)[2] == 1
        busy = await relay.ask(headers=SEKRET)
        assert (busy.status, "1 requests in flight" in busy.error["message"]) == (429, True)
    prompt = len(json.dumps({"model": "demo", "messages": [{"role": "user", "content": "hi"}], "stream": True})) // 4
    await until(lambda: cells(relay) == (1, prompt + 1, 0))
    for _ in range(2):
        assert (await relay.ask(headers=SEKRET)).status >= 500
    assert cells(relay)[2] == 0
    too_large = await relay.ask(headers=SEKRET, messages=[{"role": "user", "content": "x" * 200_000}])
    assert too_large.status == 413
    assert cells(relay)[2] == 0


async def test_who_leaves_before_a_whole_answer_pays_for_the_prompt(relay: Relay) -> None:
    await start(relay, [Hang()], max_in_flight=1)
    async with relay.connected() as client:
        client.chat(headers=SEKRET, messages=[{"role": "user", "content": "x" * 4000}])
        await until(relay.in_flight)
        await relay.upstreams[0].request()
    await until(lambda: cells(relay)[2] == 0)
    assert 1000 <= cells(relay)[1] <= 1100
