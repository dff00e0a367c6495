"""The questions put to a real engine, in order, as data. What an emulator answers is built from the answers.

Placeholders in paths and bodies, kept in the recording: {adapters}, the folder of recorded-with adapters.
The served name is always `base`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

MODEL = "base"
QUESTION = [{"role": "user", "content": "What is the capital of France?"}]
CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
CITY = {
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 8}, "population": {"type": "integer"}},
    "required": ["city", "population"],
    "additionalProperties": False,
}
TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Get the weather of a city",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "maxLength": 8}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}
_JSON_PLEASE = [{"role": "user", "content": "Give Paris as JSON"}]
SCHEMA_FORMAT = {"type": "json_schema", "json_schema": {"name": "city", "schema": CITY, "strict": True}}
NAMED_TOOL = {"type": "function", "function": {"name": "get_weather"}}
WITH_USAGE = {"stream": True, "stream_options": {"include_usage": True}}
CONTINUOUS_USAGE = {"include_usage": True, "continuous_usage_stats": True}
LONG = "hi " * 700  # over every recorded engine's context of 512 tokens


@dataclass(frozen=True)
class Case:
    """One request. A `body` of bytes is sent as it is; None sends no body."""

    name: str
    path: str
    body: Any = None
    method: str = "POST"
    headers: Mapping[str, str] = field(default_factory=dict)
    key: bool = True  # send the API key
    hang_up_after: int | None = None  # close the connection after so many stream events
    wait_s: float = 0  # before it is sent
    keep_body: bool = True  # of a metrics page


def chat(name: str, **fields: Any) -> Case:
    return Case(name, CHAT, {"model": MODEL, "messages": QUESTION, "max_tokens": 6, "temperature": 0} | fields)


def complete(name: str, **fields: Any) -> Case:
    return Case(
        name, COMPLETIONS, {"model": MODEL, "prompt": "Once upon a time", "max_tokens": 6, "temperature": 0} | fields
    )


def get(name: str, path: str, **more: Any) -> Case:
    return Case(name, path, method="GET", **more)


MODELS = [
    get("models", "/v1/models"),
    get("retrieve", "/v1/models/base"),
    get("retrieve_unknown", "/v1/models/nope"),
    get("health", "/health"),
    get("ready", "/ready"),
    get("ping", "/ping"),
    get("version", "/version"),
    get("load", "/load"),
    get("model_info", "/model_info"),
    get("loads", "/v1/loads"),
    get("absent_route", "/v1/absent"),
    get("wrong_method", CHAT),
    Case("models_post", "/v1/models", {}),
]

_HI = {"model": MODEL, "messages": QUESTION, "max_tokens": 2}
AUTH = [
    get("models_no_key", "/v1/models", key=False),
    get("models_wrong_key", "/v1/models", key=False, headers={"Authorization": "Bearer wrong"}),
    get("models_wrong_scheme", "/v1/models", key=False, headers={"Authorization": "Basic engine-key"}),
    Case("chat_no_key", CHAT, _HI, key=False),
    Case("completions_no_key", COMPLETIONS, {"model": MODEL, "prompt": "a", "max_tokens": 1}, key=False),
    Case("tokenize_no_key", "/tokenize", {"model": MODEL, "prompt": "a"}, key=False),
    Case("encode_no_key", "/v1/encode", {"input": "a"}, key=False),
    Case("invocations_no_key", "/invocations", _HI, key=False),
    Case("generate_no_key", "/generate", {"prompt": "a", "text": "a", "max_tokens": 1}, key=False),
    Case("load_adapter_no_key_v1", "/v1/load_lora_adapter", {"lora_name": "x", "lora_path": "x"}, key=False),
    Case("load_adapter_no_key", "/load_lora_adapter", {"lora_name": "x", "lora_path": "x"}, key=False),
    get("health_no_key", "/health", key=False),
    get("ready_no_key", "/ready", key=False),
    get("metrics_no_key", "/metrics", key=False, keep_body=False),
    get("version_no_key", "/version", key=False),
    get("load_no_key", "/load", key=False),
    get("absent_route_no_key", "/absent", key=False),
    get("absent_v1_route_no_key", "/v1/absent", key=False),
]

CHATS = [
    chat("chat"),
    chat("chat_stream", stream=True),
    chat("chat_stream_usage", **WITH_USAGE),
    chat(
        "chat_stream_usage_continuous",
        stream=True,
        stream_options=CONTINUOUS_USAGE,
    ),
    chat("chat_two", n=2, temperature=1, seed=7),
    chat("chat_two_stream", n=2, temperature=1, seed=7, max_tokens=3, **WITH_USAGE),
    chat("chat_stop", stop=["is", "changes"], max_tokens=20),
    chat("chat_stop_stream", stop=["is", "changes"], max_tokens=20, stream=True),
    chat("chat_to_its_end", max_tokens=64),
    chat("chat_to_its_end_stream", max_tokens=64, **WITH_USAGE),
    chat("chat_max_completion_tokens", max_tokens=None, max_completion_tokens=3),
    chat("chat_one_token", max_tokens=1),
    chat("chat_one_token_stream", max_tokens=1, **WITH_USAGE),
    chat("chat_logprobs", max_tokens=2, logprobs=True, top_logprobs=2),
    chat("chat_logprobs_no_top", max_tokens=2, logprobs=True),
    chat("chat_logprobs_stream", max_tokens=2, logprobs=True, top_logprobs=2, stream=True),
    chat("chat_token_ids", max_tokens=3, return_token_ids=True),
    chat("chat_token_ids_stream", max_tokens=3, return_token_ids=True, stream=True),
    chat("chat_ignore_eos", max_tokens=40, ignore_eos=True),
    chat("chat_parts", messages=[{"role": "user", "content": [{"type": "text", "text": "Say hi"}]}]),
    chat("chat_system", messages=[{"role": "system", "content": "Be brief."}, *QUESTION]),
    chat("chat_unicode", messages=[{"role": "user", "content": "Répète: é 漢字 🎉"}]),
    chat("chat_unknown_field", no_such_field=1),
    chat(
        "chat_continue",
        messages=[*QUESTION, {"role": "assistant", "content": "The capital of"}],
        continue_final_message=True,
        add_generation_prompt=False,
    ),
    chat("chat_duplicate_key_last_wins", max_tokens=3),
    Case(
        "chat_duplicate_keys",
        CHAT,
        b'{"model":"nope","messages":[{"role":"user","content":"Hi"}],"max_tokens":2,"temperature":0,"model":"base"}',
    ),
]

STRUCTURED = [
    chat(
        "json_schema",
        messages=_JSON_PLEASE,
        max_tokens=60,
        response_format=SCHEMA_FORMAT,
    ),
    chat(
        "json_schema_stream",
        messages=_JSON_PLEASE,
        max_tokens=60,
        response_format=SCHEMA_FORMAT,
        stream=True,
    ),
    chat(
        "json_object",
        messages=_JSON_PLEASE,
        max_tokens=20,
        response_format={"type": "json_object"},
    ),
    chat("text_format", response_format={"type": "text"}),
    chat("unknown_format", response_format={"type": "poem"}),
    chat("schema_missing", response_format={"type": "json_schema"}),
    chat(
        "schema_invalid",
        response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "nonsense"}}},
    ),
    chat("choice", structured_outputs={"choice": ["Rome", "Paris"]}),
    chat("regex", regex="(Paris|Rome)"),
]

_WEATHER = [{"role": "user", "content": "What is the weather in Paris?"}]
TOOLS = [
    chat("tools_auto", messages=_WEATHER, tools=[TOOL], max_tokens=80),
    chat("tools_auto_stream", messages=_WEATHER, tools=[TOOL], max_tokens=80, **WITH_USAGE),
    chat("tools_none", messages=_WEATHER, tools=[TOOL], tool_choice="none"),
    chat("tools_named", messages=_WEATHER, tools=[TOOL], tool_choice=NAMED_TOOL, max_tokens=80),
    chat("tools_named_stream", messages=_WEATHER, tools=[TOOL], tool_choice=NAMED_TOOL, max_tokens=80, **WITH_USAGE),
    chat("tools_required", messages=_WEATHER, tools=[TOOL], tool_choice="required", max_tokens=80),
    chat("tools_required_stream", messages=_WEATHER, tools=[TOOL], tool_choice="required", max_tokens=80, stream=True),
    chat(
        "tools_result",
        max_tokens=6,
        tools=[TOOL],
        tool_choice="none",
        messages=[
            *_WEATHER,
            {
                "role": "assistant",
                "content": None,
                "tool_calls": [
                    {
                        "id": "call_1",
                        "type": "function",
                        "function": {"name": "get_weather", "arguments": '{"city": "Paris"}'},
                    }
                ],
            },
            {"role": "tool", "tool_call_id": "call_1", "content": "18 C"},
        ],
    ),
    chat(
        "tools_named_unknown",
        messages=_WEATHER,
        tools=[TOOL],
        tool_choice={"type": "function", "function": {"name": "nope"}},
    ),
    chat("tools_choice_without_tools", messages=_WEATHER, tool_choice="required"),
    chat("tools_malformed", messages=_WEATHER, tools=[{"type": "function"}]),
]

COMPLETE = [
    complete("completion"),
    complete("completion_stream", stream=True),
    complete("completion_stream_usage", **WITH_USAGE),
    complete("completion_two", n=2, temperature=1, seed=7),
    complete("completion_two_prompts", prompt=["One", "Two"], max_tokens=3),
    complete("completion_two_prompts_stream", prompt=["One", "Two"], max_tokens=2, **WITH_USAGE),
    complete("completion_ids", prompt=[788, 1672, 260, 655]),
    complete("completion_ids_lists", prompt=[[788, 1672], [260]], max_tokens=2),
    complete("completion_logprobs", max_tokens=2, logprobs=2),
    complete("completion_logprobs_stream", max_tokens=2, logprobs=2, stream=True),
    complete("completion_echo", echo=True, max_tokens=2),
    complete("completion_echo_logprobs", echo=True, max_tokens=1, logprobs=1),
    complete("completion_stop", stop="the", max_tokens=30),
    complete("completion_suffix", suffix="The end."),
    complete("completion_one_token", max_tokens=1),
    complete("completion_default_length", max_tokens=None),
    complete("completion_token_ids", max_tokens=3, return_token_ids=True),
    complete("completion_no_prompt", prompt=None),
]

ERRORS = [
    chat("unknown_model", model="nope"),
    chat("unknown_model_stream", model="nope", stream=True),
    complete("unknown_model_completion", model="nope"),
    chat("colon_model", model="base:nope"),
    Case("no_model", CHAT, {"messages": QUESTION, "max_tokens": 2}),
    chat("null_model", model=None),
    chat("empty_model", model=""),
    Case("no_messages", CHAT, {"model": MODEL}),
    chat("empty_messages", messages=[]),
    chat("messages_text", messages="hello"),
    chat("message_without_role", messages=[{"content": "x"}]),
    chat("unknown_role", messages=[{"role": "wizard", "content": "x"}]),
    Case("bad_json", CHAT, b'{"model": "base", "messages": ['),
    Case("empty_body", CHAT, b""),
    Case("json_array", CHAT, []),
    Case("not_utf8", CHAT, b'{"model": "\xff\xfe"}'),
    Case("wrong_content_type", CHAT, b'{"model": "base"}', headers={"Content-Type": "text/plain"}),
    chat("temperature_text", temperature="hot"),
    chat("temperature_negative", temperature=-1),
    chat("temperature_three", temperature=3),
    chat("top_p_two", top_p=2),
    chat("max_tokens_zero", max_tokens=0),
    chat("max_tokens_negative", max_tokens=-1),
    chat("max_tokens_text", max_tokens="many"),
    chat("max_tokens_over_context", max_tokens=5000),
    chat("context_overflow", messages=[{"role": "user", "content": LONG}]),
    chat("context_overflow_stream", messages=[{"role": "user", "content": LONG}], stream=True),
    complete("context_overflow_completion", prompt=LONG),
    chat("n_zero", n=0),
    chat("stream_options_without_stream", stream_options={"include_usage": True}),
    chat("top_logprobs_alone", top_logprobs=2),
    chat("top_logprobs_many", logprobs=True, top_logprobs=500),
    complete("logprobs_many", logprobs=500),
    chat("stop_number", stop=5),
    chat("stream_text", stream="maybe"),
    complete("prompt_number", prompt=5),
    complete("prompt_ids_out_of_vocabulary", prompt=[99999999]),
]

TOKENIZE = [
    Case("tokenize", "/tokenize", {"model": MODEL, "prompt": "Hello world"}),
    Case("tokenize_chat", "/tokenize", {"model": MODEL, "messages": QUESTION}),
    Case("tokenize_v1", "/v1/tokenize", {"model": MODEL, "prompt": "Hello world"}),
    Case("tokenize_unknown_model", "/tokenize", {"model": "nope", "prompt": "Hello world"}),
    Case("detokenize", "/detokenize", {"model": MODEL, "tokens": [19556, 905]}),
    Case("encode", "/v1/encode", {"input": "Hello world", "add_bos": False}),
    Case("encode_list", "/v1/encode", {"input": ["Hello", "world"], "add_bos": False}),
]

RESPONSES = [
    Case("responses", "/v1/responses", {"model": MODEL, "input": "Say hi", "max_output_tokens": 6, "temperature": 0}),
    Case(
        "responses_stream",
        "/v1/responses",
        {"model": MODEL, "input": "Say hi", "max_output_tokens": 6, "temperature": 0, "stream": True},
    ),
    Case("responses_unknown_model", "/v1/responses", {"model": "nope", "input": "Say hi"}),
]

EMBEDDINGS = [
    Case("embeddings", "/v1/embeddings", {"model": MODEL, "input": "hello"}),
    Case("embeddings_list", "/v1/embeddings", {"model": MODEL, "input": ["hello", "world"]}),
    Case("embeddings_ids", "/v1/embeddings", {"model": MODEL, "input": [788, 1672]}),
    Case("embeddings_base64", "/v1/embeddings", {"model": MODEL, "input": "hello", "encoding_format": "base64"}),
    Case("embeddings_dimensions", "/v1/embeddings", {"model": MODEL, "input": "hello", "dimensions": 8}),
    Case("embeddings_unknown_model", "/v1/embeddings", {"model": "nope", "input": "hello"}),
    Case("embeddings_no_input", "/v1/embeddings", {"model": MODEL}),
    Case("embeddings_overflow", "/v1/embeddings", {"model": MODEL, "input": LONG}),
    Case("embeddings_wrong_type", "/v1/embeddings", {"model": MODEL, "input": 5}),
]

ON_AN_EMBEDDER = [
    Case("chat_on_an_embedder", CHAT, _HI),
    Case("completions_on_an_embedder", COMPLETIONS, {"model": MODEL, "prompt": "a", "max_tokens": 1}),
    get("models_on_an_embedder", "/v1/models"),
]

HANG_UP = [
    Case(
        "hang_up",
        CHAT,
        {"model": MODEL, "messages": QUESTION, "max_tokens": 400, "temperature": 0, "ignore_eos": True, "stream": True},
        hang_up_after=3,
    ),
]

# An empty prompt ends LMDeploy's engine, though not its server. Last of its setup.
DEADLY = [
    complete("completion_empty_prompt", prompt=""),
    chat("chat_after"),
    chat("chat_stream_after", **WITH_USAGE),
    get("models_after", "/v1/models"),
    get("health_after", "/health"),
    get("health_later", "/health", wait_s=15),
]

METRICS = [get("metrics", "/metrics")]
