"""An inference request, read from its JSON: what matters to a made-up answer, the same for every engine."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from backends.emulator.language import count_tokens, detokenize, in_vocabulary, tokenize


@dataclass(frozen=True, slots=True)
class Prompt:
    """What the model reads, as text and as a count of tokens."""

    text: str
    tokens: int
    ids: list[int] | None = None  # as given by the client
    answered: str = ""  # text of the last message, where it is the assistant's and is to be continued

    @property
    def token_ids(self) -> list[int]:
        return tokenize(self.text) if self.ids is None else self.ids


@dataclass(slots=True)
class Ask:
    """One request for chat or completion. Values are as given, and may be of the wrong type until checked."""

    kind: Literal["chat", "completion"]
    body: Mapping[str, Any]
    model: Any
    prompts: list[Prompt] = field(default_factory=list)
    weights: str = ""  # content hash of the adapter that answers, "" for the base
    adapter: str | None = None  # its name in the engine
    cold: bool = False  # the adapter has to be read from disk first
    keeps_seed: bool = True

    def get(self, key: str, default: Any = None) -> Any:
        """A field of the body; null counts as absent."""
        value = self.body.get(key)
        return default if value is None else value

    @property
    def stream(self) -> bool:
        return bool(self.get("stream", False))

    @property
    def n(self) -> int:
        return int(self.get("n", 1))

    @property
    def max_tokens(self) -> int | None:
        limit = self.get("max_completion_tokens", self.get("max_tokens"))
        return None if limit is None else int(limit)

    @property
    def include_usage(self) -> bool:
        return bool((self.get("stream_options") or {}).get("include_usage"))

    @property
    def continuous_usage(self) -> bool:
        return self.include_usage and bool(self.get("stream_options").get("continuous_usage_stats"))

    @property
    def stops(self) -> list[str]:
        stop = self.get("stop", [])
        return [stop] if isinstance(stop, str) else list(stop)

    @property
    def logprobs(self) -> int | None:
        """How many alternatives to name for each token; None: no logprobs at all."""
        if self.kind == "completion":
            return None if self.get("logprobs") is None else int(self.get("logprobs"))
        return int(self.get("top_logprobs", 0)) if self.get("logprobs") else None

    @property
    def schema(self) -> Any:
        """The JSON schema that the answer must follow; None: any text."""
        form = self.get("response_format") or {}
        if form.get("type") == "json_object":
            return {"type": "object", "properties": {"answer": {"type": "string"}}}
        return (form.get("json_schema") or {}).get("schema") if form.get("type") == "json_schema" else None

    @property
    def tool(self) -> Mapping[str, Any] | None:
        """The tool that the request forces, by name or with `required`."""
        tools, choice = self.get("tools", []), self.get("tool_choice", "auto")
        if isinstance(choice, dict):
            name = (choice.get("function") or {}).get("name")
            return next((tool for tool in tools if tool["function"]["name"] == name), None)
        return tools[0] if choice == "required" and tools else None

    @property
    def may_call_tools(self) -> bool:
        return bool(self.get("tools")) and self.get("tool_choice", "auto") != "none"

    @property
    def variant(self) -> str:
        """What sampling adds to the model's determinism: the seed, where the temperature lets it count."""
        return str(self.get("seed", "")) if self.keeps_seed and self.get("temperature", 1) else ""


def chat_prompt(messages: list[Any], continued: bool) -> Prompt:
    """The conversation as the chat template writes it. `continued`: the last message is left open."""
    parts = []
    for message in messages:
        text = _content(message.get("content"))
        if message.get("tool_calls"):
            text += json.dumps(message["tool_calls"])
        parts.append(f"<|im_start|>{message.get('role', 'user')}\n{text}<|im_end|>\n")
    rendered = "".join(parts)
    if continued and messages[-1].get("role") == "assistant":
        return _prompt(rendered.removesuffix("<|im_end|>\n"), answered=_content(messages[-1].get("content")))
    return _prompt(rendered + "<|im_start|>assistant\n")


def completion_prompts(prompt: Any) -> list[Prompt]:
    """A text, a list of texts, token ids, or a list of those. Raises TypeError for anything else."""
    if isinstance(prompt, str):
        return [_prompt(prompt)]
    if isinstance(prompt, list) and prompt:
        if all(isinstance(item, int) for item in prompt):
            return [_ids_prompt(prompt)]
        if all(isinstance(item, str) for item in prompt):
            return [_prompt(item) for item in prompt]
        if all(isinstance(item, list) and all(isinstance(id, int) for id in item) for item in prompt):
            return [_ids_prompt(item) for item in prompt]
    raise TypeError(f"a prompt cannot be {prompt!r}")


def _prompt(text: str, answered: str = "") -> Prompt:
    return Prompt(text, count_tokens(text), answered=answered)


def _ids_prompt(ids: list[int]) -> Prompt:
    known = [id for id in ids if in_vocabulary(id)]
    return Prompt(detokenize(known), len(ids), ids)


def _content(content: Any) -> str:
    if isinstance(content, list):
        return "".join(part.get("text", "") for part in content if isinstance(part, dict))
    return content if isinstance(content, str) else ""
