"""Tool calls and structured output."""

from __future__ import annotations

import json
from typing import Annotated, Any

import openai
import pydantic
import pytest

from tests.conformance.target import Target

WEATHER = [{"role": "user", "content": "What is the weather in Paris?"}]
TOOL: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Get the weather of a city",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}, "days": {"type": "integer", "minimum": 1}},
            "required": ["city", "days"],
            "additionalProperties": False,
        },
    },
}


def test_required_tool(target: Target, client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model=target.model, messages=WEATHER, tools=[TOOL], tool_choice="required", max_tokens=100
    )
    [choice] = answer.choices
    assert choice.finish_reason == "tool_calls"
    [call] = choice.message.tool_calls or []
    assert call.id
    assert call.type == "function"
    assert call.function.name == "get_weather"
    arguments = json.loads(call.function.arguments)
    assert set(arguments) == {"city", "days"}


def test_required_tool_streamed(target: Target, client: openai.OpenAI) -> None:
    arguments, names, ids, reasons = "", [], [], []
    for chunk in client.chat.completions.create(
        model=target.model, messages=WEATHER, tools=[TOOL], tool_choice="required", max_tokens=100, stream=True
    ):
        for choice in chunk.choices:
            for call in choice.delta.tool_calls or []:
                assert call.index == 0
                assert call.function is not None
                names += [call.function.name] if call.function.name else []
                ids += [call.id] if call.id else []
                arguments += call.function.arguments or ""
            reasons += [choice.finish_reason] if choice.finish_reason else []
    assert names == ["get_weather"]
    assert len(ids) == 1
    assert set(json.loads(arguments)) == {"city", "days"}
    assert reasons == ["tool_calls"]


def test_required_tool_through_the_helper(target: Target, client: openai.OpenAI) -> None:
    with client.chat.completions.stream(
        model=target.model, messages=WEATHER, tools=[TOOL], tool_choice="required"
    ) as stream:
        final = stream.get_final_completion()
    [call] = final.choices[0].message.tool_calls or []
    assert call.function.name == "get_weather"


def test_named_tool(target: Target, client: openai.OpenAI) -> None:
    named = {"type": "function", "function": {"name": "get_weather"}}
    answer = client.chat.completions.create(
        model=target.model, messages=WEATHER, tools=[TOOL], tool_choice=named, max_tokens=100
    )
    message = answer.choices[0].message
    if target.engine == "lmdeploy":  # LMDeploy does not force a tool by name
        assert message.content
        return
    [call] = message.tool_calls or []
    assert call.function.name == "get_weather"
    json.loads(call.function.arguments)


@pytest.mark.parametrize("calls", [False, True])
def test_models_choice(target: Target, client: openai.OpenAI, calls: bool) -> None:
    target.script(call_tools=calls)
    answer = client.chat.completions.create(model=target.model, messages=WEATHER, tools=[TOOL], max_tokens=100)
    message = answer.choices[0].message
    assert bool(message.tool_calls) == calls
    assert calls or message.content


def test_no_tool(target: Target, client: openai.OpenAI) -> None:
    target.script(call_tools=True)
    answer = client.chat.completions.create(
        model=target.model, messages=WEATHER, tools=[TOOL], tool_choice="none", max_tokens=8
    )
    assert answer.choices[0].message.content
    assert not answer.choices[0].message.tool_calls


def test_tool_result_goes_back(target: Target, client: openai.OpenAI) -> None:
    call = {"id": "call_1", "type": "function", "function": {"name": "get_weather", "arguments": '{"city": "Paris"}'}}
    answer = client.chat.completions.create(
        model=target.model,
        messages=[
            *WEATHER,
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "tool_call_id": "call_1", "content": "18 C"},
        ],
        tools=[TOOL],
        tool_choice="none",
        max_tokens=8,
    )
    assert answer.choices[0].message.content


Name = Annotated[str, pydantic.Field(max_length=20)]


class City(pydantic.BaseModel):
    """What the model must answer with; bounded, so that any model's answer ends."""

    name: Name
    population: Annotated[int, pydantic.Field(ge=1, le=99_999_999)]
    twins: Annotated[list[Name], pydantic.Field(max_length=3)]


def test_schema(target: Target, client: openai.OpenAI) -> None:
    schema = {"name": "city", "strict": True, "schema": City.model_json_schema()}
    answer = client.chat.completions.create(
        model=target.model, messages=WEATHER, response_format={"type": "json_schema", "json_schema": schema}
    )
    City.model_validate_json(answer.choices[0].message.content or "")


# SGLang's `metadata` is not the object of texts that the client expects; it warns, and goes on.
@pytest.mark.filterwarnings("ignore:Pydantic serializer warnings:UserWarning")
def test_schema_parsed_by_the_client(target: Target, client: openai.OpenAI) -> None:
    answer = client.chat.completions.parse(model=target.model, messages=WEATHER, response_format=City)
    assert isinstance(answer.choices[0].message.parsed, City)


def test_schema_streamed(target: Target, client: openai.OpenAI) -> None:
    with client.chat.completions.stream(model=target.model, messages=WEATHER, response_format=City) as stream:
        final = stream.get_final_completion()
    assert isinstance(final.choices[0].message.parsed, City)


def test_json_object(target: Target, client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model=target.model, messages=WEATHER, response_format={"type": "json_object"}
    )
    assert isinstance(json.loads(answer.choices[0].message.content or ""), dict)
