"""Completions: prompts of every kind, echo, logprobs, streams."""

from __future__ import annotations

import openai
import pytest

from tests.conformance.conftest import ENGINES
from tests.conformance.target import Target, serving


def test_completion(target: Target, client: openai.OpenAI) -> None:
    answer = client.completions.create(model=target.model, prompt="Once upon a time", max_tokens=6)
    assert answer.object == "text_completion"
    assert answer.model == target.model
    [choice] = answer.choices
    assert choice.text
    assert choice.finish_reason == "length"
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 6
    assert answer._request_id


async def test_async_completion(target: Target) -> None:
    async with target.async_client() as client:
        answer = await client.completions.create(model=target.model, prompt="Once upon a time", max_tokens=6)
    assert answer.choices[0].text


def test_several_prompts(target: Target, client: openai.OpenAI) -> None:
    answer = client.completions.create(model=target.model, prompt=["One", "Two"], max_tokens=4)
    assert [choice.index for choice in answer.choices] == [0, 1]
    assert answer.choices[0].text != answer.choices[1].text


def test_stream(target: Target, client: openai.OpenAI) -> None:
    whole = client.completions.create(model=target.model, prompt="Once", max_tokens=8, temperature=0)
    chunks = list(
        client.completions.create(
            model=target.model,
            prompt="Once",
            max_tokens=8,
            temperature=0,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    text = "".join(choice.text for chunk in chunks for choice in chunk.choices)
    assert text == whole.choices[0].text
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 8
    assert len({chunk.id for chunk in chunks}) == 1


def test_stop(target: Target, client: openai.OpenAI) -> None:
    target.script(answer="one two three")
    answer = client.completions.create(model=target.model, prompt="Count", stop=["two"], max_tokens=20)
    assert answer.choices[0].text == "one "
    assert answer.choices[0].finish_reason == "stop"


def test_continuing_goes_on_as_it_would_have(target: Target, client: openai.OpenAI) -> None:
    whole = client.completions.create(model=target.model, prompt="Once", max_tokens=16, temperature=0)
    begun = client.completions.create(model=target.model, prompt="Once", max_tokens=6, temperature=0)
    prompt = "Once" + begun.choices[0].text
    rest = client.completions.create(model=target.model, prompt=prompt, max_tokens=10, temperature=0)
    assert begun.choices[0].text + rest.choices[0].text == whole.choices[0].text


def test_token_ids(target: Target, client: openai.OpenAI) -> None:
    if target.engine == "lmdeploy":  # LMDeploy takes text alone
        with pytest.raises(openai.BadRequestError):
            client.completions.create(model=target.model, prompt=[788, 1672], max_tokens=2)
        return
    answer = client.completions.create(model=target.model, prompt=[[788, 1672], [260]], max_tokens=2)
    assert len(answer.choices) == 2
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == 3


def test_echo_and_logprobs(target: Target, client: openai.OpenAI) -> None:
    if target.engine == "lmdeploy":  # LMDeploy has neither for completions
        return
    answer = client.completions.create(model=target.model, prompt="Once upon", echo=True, logprobs=1, max_tokens=2)
    [choice] = answer.choices
    assert choice.text.startswith("Once upon")
    assert choice.logprobs is not None
    tokens, values = choice.logprobs.tokens or [], choice.logprobs.token_logprobs or []
    assert "".join(tokens) == choice.text
    assert values[0] is None
    assert all(value <= 0 for value in values[1:] if value is not None)


@pytest.mark.parametrize("engine", ENGINES)
def test_empty_prompt_harms_nobody(engine: str) -> None:
    """It ends LMDeploy's engine for good: the gateway must not let it through."""
    with serving(engine) as target, target.client() as client:
        refuses_empty_prompts(target, client)


def refuses_empty_prompts(target: Target, client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError):
        client.completions.create(model=target.model, prompt="", max_tokens=2)
    answer = client.completions.create(model=target.model, prompt="still here", max_tokens=2)
    assert answer.choices[0].text
