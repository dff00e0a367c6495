"""One row of training data, in any of the known formats, as messages with a weight each. Pure; no torch, no files.

    conversation  messages         {"messages": [...], "tools": [...]}
                  alpaca           {"instruction": "", "input": "", "output": "", "system"?: "", "history"?: [[q, a]]}
                  sharegpt         {"conversations": [{"from": "human", "value": ""}, ...], "system"?, "tools"?}
                  query-response   {"query": "", "response": "", "system"?: "", "history"?: [[q, a]]}
    preference    preference       {"prompt"?: "" or messages, "chosen": ..., "rejected": ...}
                                   {"messages": [...], "rejected_response": ""}
                                   {"input": {"messages", "tools"}, "preferred_output", "non_preferred_output"}

Messages are OpenAI's: role, content (text, text parts or null), tool_calls, tool_call_id, name; beside them
`reasoning_content`, and on an assistant message `weight` (a number) or `loss` (true/false) for its share of the loss.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from trainer.errors import RowError

FormatName = Literal["auto", "messages", "alpaca", "sharegpt", "query-response", "preference"]
Message = dict[str, Any]  # as the chat template takes it
Row = dict[str, Any]

_ROLES = ("system", "developer", "user", "assistant", "tool")
_SHAREGPT_ROLES = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "function_call": "assistant",
    "observation": "tool",
    "tool": "tool",
}


@dataclass(frozen=True, slots=True)
class Conversation:
    """Messages, and how much each counts in the loss (0: context only)."""

    messages: list[Message]
    weights: list[float]
    tools: list[dict[str, Any]] | None = None


@dataclass(frozen=True, slots=True)
class Preference:
    """Two continuations of one prompt; only the continuations have weight."""

    chosen: Conversation
    rejected: Conversation


@dataclass(frozen=True, slots=True)
class Labelled:
    """A conversation whose last answer is good or bad."""

    conversation: Conversation
    good: bool


@dataclass(frozen=True, slots=True)
class Prompt:
    """Messages to be answered, and what else the row holds for the rewards."""

    messages: list[Message]
    tools: list[dict[str, Any]] | None
    columns: dict[str, Any]


def parse_conversation(row: Row, format: FormatName = "auto") -> Conversation:
    """Read a row for supervised training. Raises RowError with what is wrong."""
    name = _detect(row, _CONVERSATIONS) if format == "auto" else format
    if name not in _CONVERSATIONS:
        raise RowError(f"format `{name}` holds no conversation; allowed: {', '.join(_CONVERSATIONS)}")
    return _CONVERSATIONS[name][1](row)


def parse_preference(row: Row, format: FormatName = "auto") -> Preference:
    """Read a row for preference training. Raises RowError with what is wrong."""
    if format not in ("auto", "preference"):
        raise RowError(f"format `{format}` holds no preference; use `preference`")
    if "preferred_output" in row or "non_preferred_output" in row:
        return _openai_preference(row)
    if "rejected_response" in row:
        return _messages_preference(row)
    return _chosen_rejected(row)


def parse_labelled(row: Row, format: FormatName = "auto") -> Labelled:
    """Read a row for KTO: a conversation, or `prompt` and `completion`, with a `label`. Raises RowError."""
    label = row.get("label")
    if not isinstance(label, bool):
        raise RowError(f"`label` must be true (a good answer) or false (a bad one), given {_short(label)}")
    if format == "auto" and "completion" in row:
        prompt, answer = _prompt(row), _completion(row["completion"], "completion")
        weights = [0.0] * len(prompt) + [1.0] * len(answer)
        return Labelled(_conversation(prompt + answer, weights, _tools(row.get("tools"))), label)
    parsed = parse_conversation(row, format)
    weights = [0.0] * (len(parsed.weights) - 1) + [1.0]
    return Labelled(Conversation(parsed.messages, weights, parsed.tools), label)


def parse_prompt(row: Row, format: FormatName = "auto") -> Prompt:
    """Read a row for GRPO: `prompt` or `messages`; everything else goes to the rewards. Raises RowError."""
    if format not in ("auto", "messages"):
        raise RowError(f"format `{format}` holds no prompt; use `messages`")
    messages = _prompt(row) if "prompt" in row else _messages(row.get("messages"), "messages")[0]
    if messages[-1]["role"] == "assistant":
        raise RowError("the last message is the assistant's: a prompt ends where the model is to answer")
    columns = {key: value for key, value in row.items() if key not in ("prompt", "messages", "tools")}
    return Prompt(messages, _tools(row.get("tools")), columns)


def with_system(messages: list[Message], system: str | None) -> list[Message]:
    """The messages, with a system message before them where one is given and they have none."""
    if system is None or messages[0]["role"] in ("system", "developer"):
        return messages
    return [{"role": "system", "content": system}, *messages]


def _prompt(row: Row) -> list[Message]:
    """`prompt`: text, or messages."""
    raw = row.get("prompt")
    return _messages([{"role": "user", "content": raw}] if isinstance(raw, str) else raw, "prompt")[0]


def _detect(row: Row, known: dict[str, tuple[str, Callable[[Row], Conversation]]]) -> str:
    for name, (key, _) in known.items():
        if key in row:
            return name
    keys = ", ".join(f"`{key}`" for key, _ in known.values())
    raise RowError(f"no known format: one of the keys {keys} is needed, found {', '.join(map(repr, row)) or 'none'}")


# --- conversations ---------------------------------------------------------------------------------------------------


def _from_messages(row: Row) -> Conversation:
    messages, weights = _messages(row.get("messages"), "messages")
    return _conversation(messages, weights, _tools(row.get("tools")))


def _from_alpaca(row: Row) -> Conversation:
    instruction, given = _text(row, "instruction"), _text(row, "input", default="")
    return _from_turns(row, f"{instruction}\n{given}" if given else instruction, _text(row, "output"))


def _from_query_response(row: Row) -> Conversation:
    return _from_turns(row, _text(row, "query"), _text(row, "response"))


def _from_turns(row: Row, question: str, answer: str) -> Conversation:
    history = row.get("history") or []
    if not isinstance(history, list) or any(not isinstance(t, list | tuple) or len(t) != 2 for t in history):
        raise RowError("`history` must be a list of [question, answer] pairs")
    system = _text(row, "system", default="")
    raw: list[Any] = [{"role": "system", "content": system}] if system else []
    for asked, answered in [*history, (question, answer)]:
        raw += [{"role": "user", "content": asked}, {"role": "assistant", "content": answered}]
    return _conversation(*_messages(raw, "history"), None)


def _from_sharegpt(row: Row) -> Conversation:
    turns = row.get("conversations")
    if not isinstance(turns, list) or not turns:
        raise RowError("`conversations` must be a list of {from, value}")
    system = _text(row, "system", default="")
    raw: list[Any] = [{"role": "system", "content": system}] if system else []
    for i, turn in enumerate(turns):
        if not isinstance(turn, dict) or turn.get("from") not in _SHAREGPT_ROLES:
            given = turn.get("from") if isinstance(turn, dict) else turn
            raise RowError(f"conversations[{i}].from must be one of {', '.join(_SHAREGPT_ROLES)}, given {given!r}")
        message = {"role": _SHAREGPT_ROLES[turn["from"]], "content": turn.get("value")}
        if turn["from"] == "function_call":
            call = _json(turn.get("value"), f"conversations[{i}].value")
            message |= {"content": "", "tool_calls": [{"type": "function", "function": call}]}
        raw.append(message | {key: turn[key] for key in ("weight", "loss") if key in turn})
    return _conversation(*_messages(raw, "conversations"), _tools(row.get("tools")))


_CONVERSATIONS: dict[str, tuple[str, Callable[[Row], Conversation]]] = {
    "messages": ("messages", _from_messages),
    "sharegpt": ("conversations", _from_sharegpt),
    "alpaca": ("instruction", _from_alpaca),
    "query-response": ("query", _from_query_response),
}


def _conversation(messages: list[Message], weights: list[float], tools: list[dict[str, Any]] | None) -> Conversation:
    if messages[-1]["role"] != "assistant":
        raise RowError(f"the last message must be the assistant's, it is the {messages[-1]['role']}'s")
    if not any(weights):
        raise RowError("nothing to learn: every assistant message has weight 0")
    return Conversation(messages, weights, tools)


# --- preferences -----------------------------------------------------------------------------------------------------


def _openai_preference(row: Row) -> Preference:
    given = row.get("input")
    if not isinstance(given, dict):
        raise RowError("`input` must be an object with `messages`")
    prompt, _ = _messages(given.get("messages"), "input.messages")
    preferred = _messages(row.get("preferred_output"), "preferred_output")[0]
    other = _messages(row.get("non_preferred_output"), "non_preferred_output")[0]
    return _pair(prompt, preferred, other, _tools(given.get("tools")))


def _messages_preference(row: Row) -> Preference:
    messages, _ = _messages(row.get("messages"), "messages")
    if messages[-1]["role"] != "assistant":
        raise RowError("`messages` must end with the preferred assistant message")
    rejected = [{"role": "assistant", "content": _text(row, "rejected_response")}]
    return _pair(messages[:-1], messages[-1:], rejected, _tools(row.get("tools")))


def _chosen_rejected(row: Row) -> Preference:
    for key in ("chosen", "rejected"):
        if key not in row:
            raise RowError(f"`{key}` is missing: a preference needs `chosen` and `rejected`")
    chosen, rejected = _completion(row["chosen"], "chosen"), _completion(row["rejected"], "rejected")
    if "prompt" in row:
        return _pair(_prompt(row), chosen, rejected, _tools(row.get("tools")))
    # The prompt is what both sides begin with.
    shared = 0
    while shared < min(len(chosen), len(rejected)) and chosen[shared] == rejected[shared]:
        shared += 1
    return _pair(chosen[:shared], chosen[shared:], rejected[shared:], _tools(row.get("tools")))


def _completion(raw: Any, where: str) -> list[Message]:
    return _messages([{"role": "assistant", "content": raw}] if isinstance(raw, str) else raw, where)[0]


def _pair(
    prompt: list[Message], chosen: list[Message], rejected: list[Message], tools: list[dict[str, Any]] | None
) -> Preference:
    if not prompt:
        raise RowError("no prompt: give `prompt`, or let `chosen` and `rejected` begin with the same messages")
    if chosen == rejected:
        raise RowError("both answers are the same")
    for name, side in (("preferred", chosen), ("other", rejected)):
        if [message["role"] for message in side] != ["assistant"]:
            raise RowError(f"the {name} answer must be one assistant message, found {[m['role'] for m in side]}")
    context = [0.0] * len(prompt)
    return Preference(
        Conversation(prompt + chosen, [*context, 1.0], tools), Conversation(prompt + rejected, [*context, 1.0], tools)
    )


# --- messages --------------------------------------------------------------------------------------------------------


def _messages(raw: Any, where: str) -> tuple[list[Message], list[float]]:
    """Check and normalise a list of messages; the weights beside them."""
    if not isinstance(raw, list) or not raw:
        raise RowError(f"`{where}` must be a list of messages, given {_short(raw)}")
    messages, weights = [], []
    for i, item in enumerate(raw):
        at = f"{where}[{i}]"
        if not isinstance(item, dict):
            raise RowError(f"{at} must be an object with `role` and `content`, given {_short(item)}")
        messages.append(_message(item, at))
        weights.append(_weight(item, at))
    return messages, weights


def _message(item: Row, at: str) -> Message:
    role = item.get("role")
    if role not in _ROLES:
        raise RowError(f"{at}.role must be one of {', '.join(_ROLES)}, given {_short(role)}")
    message: Message = {"role": role, "content": _content(item.get("content"), at)}
    for key in ("reasoning_content", "name", "tool_call_id"):
        if item.get(key) is not None:
            if not isinstance(item[key], str):
                raise RowError(f"{at}.{key} must be text, given {_short(item[key])}")
            message[key] = item[key]
    if item.get("tool_calls"):
        if role != "assistant":
            raise RowError(f"{at}: only an assistant message may have `tool_calls`")
        if not isinstance(item["tool_calls"], list):
            raise RowError(f"{at}.tool_calls must be a list, given {_short(item['tool_calls'])}")
        message["tool_calls"] = [_tool_call(call, f"{at}.tool_calls[{j}]") for j, call in enumerate(item["tool_calls"])]
    if role == "assistant" and not (message["content"] or "tool_calls" in message or "reasoning_content" in message):
        raise RowError(f"{at} is empty: an assistant message needs `content` or `tool_calls`")
    return message


def _content(raw: Any, at: str) -> str:
    """Text as the servers hand it to the template: parts joined by newlines, null as the empty text."""
    if raw is None:
        return ""
    if isinstance(raw, str):
        return raw
    if isinstance(raw, list) and all(isinstance(part, dict) and part.get("type") == "text" for part in raw):
        return "\n".join(_text(part, "text") for part in raw)
    raise RowError(f"{at}.content must be text or a list of text parts, given {_short(raw)}")


def _tool_call(call: Any, at: str) -> dict[str, Any]:
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise RowError(f"{at} must be {{type, function: {{name, arguments}}}}, given {_short(call)}")
    arguments = function.get("arguments", {})
    # OpenAI's arguments are JSON text; templates, as the servers fill them, take the object.
    arguments = _json(arguments, f"{at}.function.arguments")
    named = {"id": call["id"]} if isinstance(call.get("id"), str) else {}
    return {**named, "type": "function", "function": {"name": function["name"], "arguments": arguments}}


def _tools(raw: Any) -> list[dict[str, Any]] | None:
    """Tool schemas, as a list or as JSON text of one."""
    if raw is None or raw == "" or raw == []:
        return None
    tools = _json(raw, "tools")
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise RowError(f"`tools` must be a list of objects, given {_short(raw)}")
    return tools


def _weight(item: Row, at: str) -> float:
    given = [key for key in ("weight", "loss") if item.get(key) is not None]
    if item["role"] != "assistant":
        if any(item[key] for key in given):
            raise RowError(f"{at}: only an assistant message can be learnt, it is the {item['role']}'s")
        return 0.0
    if not given:
        return 1.0
    if len(given) == 2:
        raise RowError(f"{at}: give `weight` or `loss`, not both")
    weight = item[given[0]]
    if not isinstance(weight, int | float) or not 0 <= weight < float("inf"):
        raise RowError(f"{at}.{given[0]} must be a number from 0 up, given {_short(weight)}")
    return float(weight)


def _text(row: Row, key: str, default: str | None = None) -> str:
    value = row.get(key)
    if value is None:
        value = default
    if not isinstance(value, str):
        raise RowError(f"`{key}` must be text, given {_short(value)}" if key in row else f"`{key}` is missing")
    return value


def _json(raw: Any, at: str) -> Any:
    """An object as it is, or parsed from JSON text."""
    if not isinstance(raw, str):
        return raw
    try:
        return json.loads(raw)
    except json.JSONDecodeError as error:
        raise RowError(f"{at} is not JSON: {error.msg} at character {error.pos}") from error


def _short(value: Any) -> str:
    shown = repr(value)
    return shown if len(shown) <= 60 else f"{shown[:57]}..."
