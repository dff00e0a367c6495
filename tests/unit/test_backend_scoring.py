"""Given tokens scored by vLLM: what it is asked, and that a wrong adapter costs a few requests, not one a token."""

from __future__ import annotations

import json
from typing import Any

import httpx2
import pytest

from backends import scoring
from backends.base import AdapterRejected, EngineBusy

PROMPT = [1, 2]
ANSWER = list(range(10, 22))


class Engine:
    """Answers like vLLM's /v1/completions; token `at` of an answer has the logprob -at / 100 when it is its own."""

    def __init__(self, own: list[int]) -> None:
        self.own = own
        self.asked: list[dict[str, Any]] = []

    def __call__(self, request: httpx2.Request) -> httpx2.Response:
        body = json.loads(request.content)
        self.asked.append(body)
        at = len(body["prompt"]) - len(PROMPT)
        ids = body.get("allowed_token_ids") or self.own[at : at + body["max_tokens"]]
        logprobs = [-(at + i) / 100 if token == self.own[at + i] else -9.0 for i, token in enumerate(ids)]
        choice = {"token_ids": ids, "logprobs": {"token_logprobs": logprobs}}
        return httpx2.Response(200, json={"choices": [choice]})

    async def score(self) -> list[float]:
        async with httpx2.AsyncClient(transport=httpx2.MockTransport(self), base_url="http://engine") as client:
            return await scoring.vllm(client, "a-1", PROMPT, ANSWER, timeout_s=5)


async def test_its_own_answer_takes_one_request() -> None:
    engine = Engine(ANSWER)
    assert await engine.score() == [-at / 100 for at in range(12)]
    [body] = engine.asked
    assert (body["model"], body["prompt"], body["max_tokens"], body["ignore_eos"]) == ("a-1", PROMPT, 12, True)
    assert "prompt_logprobs" not in body


async def test_tokens_it_would_not_say_are_forced_a_few_times() -> None:
    engine = Engine([*ANSWER[:3], 99, *ANSWER[4:]])
    assert await engine.score() == [0, -0.01, -0.02, -9.0, -0.04, -0.05, -0.06]
    forced = engine.asked[1:]
    assert [body["allowed_token_ids"] for body in forced] == [[token] for token in ANSWER[3:7]]
    assert [body["prompt"] for body in forced] == [[*PROMPT, *ANSWER[:at]] for at in range(3, 7)]
    assert {body["max_tokens"] for body in forced} == {1}


async def test_a_last_token_of_its_own() -> None:
    engine = Engine([*ANSWER[:-1], 99])
    assert await engine.score() == [*(-at / 100 for at in range(11)), -9.0]
    assert len(engine.asked) == 2


@pytest.mark.parametrize(("status", "error"), [(503, EngineBusy), (429, EngineBusy), (400, AdapterRejected)])
async def test_refusals(status: int, error: type[Exception]) -> None:
    transport = httpx2.MockTransport(lambda _: httpx2.Response(status, json={"error": {"message": "no"}}))
    async with httpx2.AsyncClient(transport=transport, base_url="http://engine") as client:
        with pytest.raises(error, match="no"):
            await scoring.vllm(client, "a-1", PROMPT, ANSWER, timeout_s=5)
