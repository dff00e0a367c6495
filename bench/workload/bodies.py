"""Request bodies: the JSON that a prompt becomes, with only what the server was found to accept."""

from __future__ import annotations

from typing import Any

import msgspec

from bench.workload.prompts import Message, Prompt

PATHS = {"chat": "/v1/chat/completions", "completions": "/v1/completions"}


class Dialect(msgspec.Struct, frozen=True):
    """What the server takes beyond the plain API, found by asking it once before the load."""

    usage: bool = True  # stream_options.include_usage
    usage_per_chunk: bool = True  # stream_options.continuous_usage_stats
    ignore_eos: bool = True
    length_key: str = "max_tokens"


class Asking(msgspec.Struct, frozen=True):
    """What every request of a run carries."""

    api: str = "chat"
    dialect: Dialect = Dialect()
    temperature: float | None = 0.0
    extra: dict[str, Any] = {}


def body(asking: Asking, model: str, messages: list[Message], output_tokens: int, stream: bool = True) -> bytes:
    """The JSON of one request."""
    dialect = asking.dialect
    fields: dict[str, Any] = {"model": model}
    if asking.api == "chat":
        fields["messages"] = messages
    else:
        fields["prompt"] = "\n".join(message["content"] for message in messages)
    fields[dialect.length_key] = output_tokens
    if asking.temperature is not None:
        fields["temperature"] = asking.temperature
    if dialect.ignore_eos:
        fields["ignore_eos"] = True
    if stream:
        fields["stream"] = True
        if dialect.usage:
            options: dict[str, Any] = {"include_usage": True}
            if dialect.usage_per_chunk:
                options["continuous_usage_stats"] = True
            fields["stream_options"] = options
    return msgspec.json.encode(fields | asking.extra)


def prompt_body(asking: Asking, model: str, prompt: Prompt) -> bytes:
    """The JSON of a prompt."""
    return body(asking, model, prompt.messages, prompt.output_tokens)
