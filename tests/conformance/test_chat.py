"""Chat without streaming: everything the client reads from an answer."""

from __future__ import annotations

import openai
import pytest

from tests.conformance.target import Target

QUESTION = [{"role": "user", "content": "What is the capital of France?"}]


def test_answer(target: Target, client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model=target.model, messages=QUESTION, max_tokens=8)
    assert answer.object == "chat.completion"
    assert answer.model == target.model
    assert answer.id and answer.created > 1_700_000_000
    [choice] = answer.choices
    assert choice.index == 0
    assert choice.message.role == "assistant"
    assert choice.message.content
    assert choice.finish_reason == "length"
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 8
    assert answer.usage.prompt_tokens > 0
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + 8


async def test_async_answer(target: Target) -> None:
    async with target.async_client() as client:
        answer = await client.chat.completions.create(model=target.model, messages=QUESTION, max_tokens=8)
    assert answer.choices[0].message.content
    assert answer.choices[0].finish_reason == "length"


def test_greedy_is_repeatable(target: Target, client: openai.OpenAI) -> None:
    answers = {
        client.chat.completions.create(model=target.model, messages=QUESTION, max_tokens=8, temperature=0)
        .choices[0]
        .message.content
        for _ in range(3)
    }
    assert len(answers) == 1


def test_natural_end(target: Target, client: openai.OpenAI) -> None:
    target.script(answer="All done.")
    answer = client.chat.completions.create(model=target.model, messages=QUESTION)
    assert answer.choices[0].message.content == "All done."
    assert answer.choices[0].finish_reason == "stop"


def test_max_completion_tokens(target: Target, client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model=target.model, messages=QUESTION, max_completion_tokens=3)
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 3


@pytest.mark.parametrize("stop", ["three", ["never", "three"]])
def test_stop(target: Target, client: openai.OpenAI, stop: str | list[str]) -> None:
    target.script(answer="one two three four")
    answer = client.chat.completions.create(model=target.model, messages=QUESTION, stop=stop)
    assert answer.choices[0].message.content == "one two "
    assert answer.choices[0].finish_reason == "stop"


def test_several_choices(target: Target, client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model=target.model, messages=QUESTION, n=3, temperature=1, max_tokens=8, extra_body={"ignore_eos": True}
    )
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    assert len({choice.message.content for choice in answer.choices}) == 3
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 24


def test_seed(target: Target, client: openai.OpenAI) -> None:
    if target.engine == "sglang":
        pytest.skip("SGLang keeps a seed only with --enable-deterministic-inference, which costs it speed")

    def say(seed: int) -> str | None:
        answer = client.chat.completions.create(
            model=target.model, messages=QUESTION, seed=seed, temperature=1, max_tokens=12
        )
        return answer.choices[0].message.content

    assert say(1) == say(1) != say(2)


def test_system_history_and_parts(target: Target, client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model=target.model,
        messages=[
            {"role": "system", "content": "Be brief."},
            *QUESTION,
            {"role": "assistant", "content": "Paris."},
            {"role": "user", "content": [{"type": "text", "text": "And of "}, {"type": "text", "text": "Italy?"}]},
        ],
        max_tokens=4,
    )
    assert answer.choices[0].message.content


@pytest.mark.parametrize("text", ["é", "漢字 かな", "🎉🎊 party", "ß\u0301 \u200d 👨‍👩‍👧", '"quoted" \\ back\n\ttab'])
def test_unicode_there_and_back(target: Target, client: openai.OpenAI, text: str) -> None:
    target.script(answer=text)
    since = target.last_number()
    answer = client.chat.completions.create(model=target.model, messages=[{"role": "user", "content": text}])
    assert answer.choices[0].message.content == text
    [sight] = target.seen(since)
    assert sight["body"]["messages"][0]["content"] == text


def test_logprobs(target: Target, client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model=target.model, messages=QUESTION, logprobs=True, top_logprobs=2, max_tokens=3
    )
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None and logprobs.content is not None
    assert len(logprobs.content) == 3
    for token in logprobs.content:
        assert token.logprob <= 0
        assert token.token
        assert token.top_logprobs


def test_request_id(target: Target, client: openai.OpenAI) -> None:
    first = client.chat.completions.create(model=target.model, messages=QUESTION, max_tokens=1)
    second = client.chat.completions.create(model=target.model, messages=QUESTION, max_tokens=1)
    assert first._request_id
    assert first._request_id != second._request_id


def test_raw_response(target: Target, client: openai.OpenAI) -> None:
    raw = client.chat.completions.with_raw_response.create(model=target.model, messages=QUESTION, max_tokens=1)
    assert raw.headers["content-type"] == "application/json"
    assert raw.request_id
    assert raw.parse().choices


def test_fields_beyond_the_client(target: Target, client: openai.OpenAI) -> None:
    since = target.last_number()
    client.chat.completions.create(
        model=target.model,
        messages=QUESTION,
        max_tokens=2,
        extra_body={"top_k": 5, "ignore_eos": True},
        extra_headers={"x-tenant": "blue"},
    )
    [sight] = target.seen(since)
    assert sight["body"]["top_k"] == 5


def test_clients_key_stays_here(target: Target, client: openai.OpenAI) -> None:
    since = target.last_number()
    client.chat.completions.create(model=target.model, messages=QUESTION, max_tokens=1)
    [sight] = target.seen(since)
    assert "sk-conformance" not in str(sight["headers"])
