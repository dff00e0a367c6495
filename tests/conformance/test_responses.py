"""The Responses API, which all three engines have."""

from __future__ import annotations

import openai
import pytest

from tests.conformance.target import Target


def test_response(target: Target, client: openai.OpenAI) -> None:
    answer = client.responses.create(model=target.model, input="Say hi", max_output_tokens=6)
    assert answer.object == "response"
    assert answer.id
    assert answer.model == target.model
    assert answer.output_text
    assert answer.status == "incomplete"
    assert answer.usage is not None
    assert answer.usage.output_tokens == 6


async def test_async_response(target: Target) -> None:
    target.script(answer="hi")
    async with target.async_client() as client:
        answer = await client.responses.create(model=target.model, input=[{"role": "user", "content": "Say hi"}])
    assert answer.output_text == "hi"
    assert answer.status == "completed"


def test_stream(target: Target, client: openai.OpenAI) -> None:
    target.script(answer="one two three")
    events = list(client.responses.create(model=target.model, input="Count", stream=True))
    assert events[0].type == "response.created"
    assert events[-1].type == "response.completed"
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert "".join(event.delta for event in events if event.type == "response.output_text.delta") == "one two three"
    assert events[-1].response.output_text == "one two three"
    assert events[-1].response.usage is not None


def test_unknown_model(target: Target, client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as raised:
        client.responses.create(model="nope", input="hello")
    assert raised.value.code == "model_not_found"
