"""A name that two versions share: who gets which, and what the client and the counts see."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

import pytest
from relay_harness import Relay, replica
from scripted_upstream import DONE, END, STREAM_HEAD, chunk, completion, token, usage
from scripted_upstream import answer as whole

from gateway.relay.http import Request
from gateway.relay.route import Route
from gateway.relay.split import Split, draw, sticky_key
from gateway.snapshot import Canary, Model


def request(**headers: str) -> Request:
    encoded = {name.replace("_", "-").encode(): value.encode() for name, value in headers.items()}
    return Request(b"POST", b"/v1/chat/completions", encoded, True)


def body(**members: Any) -> bytes:
    return json.dumps({"model": "tuned", **members}).encode()


def split(share: float) -> tuple[Route, Split]:
    stay, canary = (Route(f"tuned@v{n}", b"", f"a-{n}", ()) for n in (1, 2))
    return stay, Split(canary, share)


def arms(share: float, bodies: list[bytes]) -> list[str]:
    stay, shared = split(share)
    return [shared.choose(stay, each, request()).label for each in bodies]


@pytest.mark.parametrize("field", ["user", "safety_identifier", "prompt_cache_key"])
def test_a_user_stays_with_one_version(field: str) -> None:
    bodies = [body(**{field: f"user-{n}"}) for n in range(4000)]
    first = arms(0.05, bodies)
    assert first == arms(0.05, bodies)
    assert 140 <= Counter(first)["tuned@v2"] <= 260  # 200 expected, deviation 14
    wider = arms(0.2, bodies)
    assert all(now == "tuned@v2" for before, now in zip(first, wider, strict=True) if before == "tuned@v2")


def test_another_canary_tries_other_users() -> None:
    users = [b"user-%d" % n for n in range(4000)]
    both = sum(draw("tuned@v2", user) < 0.5 and draw("tuned@v3", user) < 0.5 for user in users)
    assert 890 <= both <= 1110


def test_what_names_the_asker() -> None:
    everything = request(x_session_id="session")
    everything.key_id = "key-1"
    named = {"user": "u", "safety_identifier": "s", "prompt_cache_key": "p"}
    assert sticky_key(body(**named), everything) == b'"u"'
    assert sticky_key(body(prompt_cache_key="p", user=None), everything) == b'"p"'
    assert sticky_key(body(user=""), everything) == b"session"
    assert sticky_key(body(user={"odd": 1}), everything) == b"session"
    del everything.headers[b"x-session-id"]
    assert sticky_key(body(), everything) == b"key-1"
    assert sticky_key(body(), request()) is None
    for odd in (b"1e999", b"[1, {}]", b'"\xc3\xa4"', b'"\\u00e4"'):  # not ours to refuse
        said = sticky_key(b'{"model": "tuned", "user": %b}' % odd, request())
        assert said == (odd if odd.startswith(b'"') else None)


def test_who_is_not_known_is_dealt_at_random() -> None:
    found = Counter(arms(0.3, [body()] * 4000))
    assert 1050 <= found["tuned@v2"] <= 1350


def test_the_client_is_told_which_version_answers() -> None:
    stay, shared = split(1.0)
    asked = request()
    shared.choose(stay, body(), asked)
    assert asked.limit_headers == b"x-tunegate-model: tuned@v2\r\n"


# Through a relay


def names(share: float, ready: bool = True) -> dict[str, Model]:
    """`tuned` points to v1 on r0; v2 is tried there, if it is ready."""
    where = {"r0": "a-2"} if ready else {}
    canary = Canary(Model("tuned@v2", "demo", "a-2", where, ""), "tuned@v1", share)
    return {
        "demo": Model("demo", None, None, {"r0": "demo"}, ""),
        "tuned": Model("tuned", "demo", "a-1", {"r0": "a-1"}, "", canary=canary),
        "tuned@v2": Model("tuned@v2", "demo", "a-2", where, ""),
    }


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("share", "version"), [(0.0, 1), (1.0, 2)])
async def test_a_request_is_answered_by_one_version(relay: Relay, share: float, version: int, stream: bool) -> None:
    said = f"a-{version}"
    streamed = [STREAM_HEAD, chunk(token("hello", said)), chunk(usage(1, 1, said)), chunk(DONE), END]
    engine = await relay.engine(streamed if stream else [whole(completion(model=said))], serve=False)
    relay.serve(replica(engine), models=names(share))
    answer = await relay.ask(model="tuned", user="u", stream=stream)
    assert answer.status == 200
    assert answer.headers["x-tunegate-model"] == f"tuned@v{version}"
    assert engine.seen[0].json["model"] == said  # Python's parser keeps the last, as engines do
    shown = answer.events if stream else [answer.json]
    assert {event["model"] for event in shown if isinstance(event, dict)} == {"tuned"}
    entry = await relay.settled()
    assert entry.model == f"tuned@v{version}"
    assert relay.counted("tunegate_requests") == {("/v1/chat/completions", f"tuned@v{version}", "200"): 1}


async def test_a_canary_that_is_not_loaded_costs_nobody_an_error(relay: Relay) -> None:
    engine = await relay.engine([whole(completion(model="a-1"))], serve=False)
    relay.serve(replica(engine), models=names(1.0, ready=False))
    answer = await relay.ask(model="tuned", user="u")
    assert (answer.status, "x-tunegate-model" in answer.headers) == (200, False)
    assert (await relay.settled()).model == "tuned"


async def test_other_names_know_nothing_of_it(relay: Relay) -> None:
    engine = await relay.engine([whole(completion())], serve=False)
    relay.serve(replica(engine), models=names(1.0))
    answer = await relay.ask(model="demo", user="u")
    assert (answer.status, "x-tunegate-model" in answer.headers) == (200, False)
    assert (await relay.settled()).model == "demo"
