"""What is wrong with a request. One table for all engines: a check applies where the engine's recorded answer to a
like request is a refusal, and that answer, with this request's values put in, is the reply.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from backends.emulator import schema
from backends.emulator.ask import Ask, completion_prompts
from backends.emulator.language import count_tokens, in_vocabulary
from backends.emulator.recordings import Book, Reply
from backends.emulator.settings import Settings

_FLOATS = ("temperature", "top_p", "presence_penalty", "frequency_penalty", "min_p", "repetition_penalty")
_INTS = ("max_tokens", "max_completion_tokens", "n", "seed", "top_k", "top_logprobs")
_BOOLS = ("stream", "ignore_eos", "echo")
_TRUTHS = {"true", "false", "1", "0", "yes", "no", "on", "off", "t", "f", "y", "n"}


def type_fault(book: Book, ask: Ask) -> Reply | None:
    """A field that is missing or of the wrong type."""
    body = ask.body
    if ask.kind == "chat" and body.get("messages") is None:
        return _refusal(book, "errors/no_messages", {"<dict of 1 items>": f"<dict of {len(body)} items>"})
    if ask.kind == "chat" and not isinstance(body["messages"], list):
        return _refusal(book, "errors/messages_text", {"hello": body["messages"]})
    if ask.kind == "completion" and body.get("prompt") is None:
        return _refusal(book, "completions/completion_no_prompt")
    for fields, kind, case in (
        (_FLOATS, float, "errors/temperature_text"),
        (_INTS, int, "errors/max_tokens_text"),
        (_BOOLS, bool, "errors/stream_text"),
    ):
        recorded_field, recorded_value = case.removeprefix("errors/").removesuffix("_text"), _text_of(book, case)
        for field in fields:
            if field in body and not _is(body[field], kind):
                return _refusal(book, case, {recorded_field: field, recorded_value: body[field]})
    stop = body.get("stop")
    if not (
        stop is None or isinstance(stop, str) or (isinstance(stop, list) and all(isinstance(s, str) for s in stop))
    ):
        return _refusal(book, "errors/stop_number", {"5": stop})
    if ask.kind == "completion":
        try:
            completion_prompts(body["prompt"])
        except TypeError:
            empty = body["prompt"] == []
            return _refusal(book, "completions/completion_no_prompt" if empty else "errors/prompt_number")
    if "model" in body and body["model"] is None and (fault := _refusal(book, "errors/null_model")):
        return fault
    return _refusal(book, "errors/no_model") if "model" not in body else None


def _text_of(book: Book, case: str) -> str:
    return str(book.given(case, case.removeprefix("errors/").removesuffix("_text")))


def _is(value: Any, kind: type) -> bool:
    """As pydantic takes it: null, the type itself, or a text that reads as one."""
    if value is None:
        return True
    if kind is bool:
        return isinstance(value, bool) or str(value).lower() in _TRUTHS
    if isinstance(value, int | float):
        return kind is float or float(value).is_integer()
    if not isinstance(value, str):
        return False
    try:
        kind(value)
    except ValueError:
        return False
    return True


Test = Callable[[Ask, Settings], Any]


def _number(ask: Ask, field: str) -> float | None:
    value = ask.get(field)
    return None if value is None else float(value)


def _outside(field: str, low: float | None, high: float | None) -> Test:
    def test(ask: Ask, settings: Settings) -> bool:
        value = _number(ask, field)
        return value is not None and ((low is not None and value < low) or (high is not None and value > high))

    return test


def _schema_is_invalid(ask: Ask, settings: Settings) -> bool:
    try:
        schema.minimal(ask.schema)
    except schema.SchemaError:
        return True
    return False


def _form(ask: Ask) -> Mapping[str, Any]:
    form: Mapping[str, Any] = ask.get("response_format") or {}
    return form


def _named_tool(ask: Ask) -> str | None:
    choice = ask.get("tool_choice")
    return choice["function"]["name"] if isinstance(choice, dict) and "function" in choice else None


def _wants_tools(ask: Ask, settings: Settings) -> bool:
    return ask.kind == "chat" and ask.may_call_tools and not settings.tool_parser


def _roles(ask: Ask) -> list[Any]:
    messages = ask.get("messages", []) if ask.kind == "chat" else []
    return [message.get("role") if isinstance(message, dict) else None for message in messages]


_KNOWN_ROLES = {"system", "user", "assistant", "tool", "function", "developer"}

_CLIENTS_FAULT = range(400, 500)

# Recorded case, the field whose value its text repeats, and when it applies.
_VALUES: list[tuple[str, str | None, Test]] = [
    ("errors/empty_messages", None, lambda ask, _: ask.kind == "chat" and not ask.body["messages"]),
    ("errors/message_without_role", None, lambda ask, _: None in _roles(ask)),
    ("errors/unknown_role", None, lambda ask, _: any(role and role not in _KNOWN_ROLES for role in _roles(ask))),
    ("errors/temperature_negative", "temperature", _outside("temperature", 0, None)),
    ("errors/temperature_three", "temperature", _outside("temperature", None, 2)),
    ("errors/top_p_two", "top_p", lambda ask, _: (p := _number(ask, "top_p")) is not None and not 0 < p <= 1),
    ("errors/max_tokens_negative", "max_tokens", lambda ask, _: ask.max_tokens is not None and ask.max_tokens < 0),
    ("errors/max_tokens_zero", "max_tokens", lambda ask, _: ask.max_tokens == 0),
    ("errors/max_tokens_over_context", "max_tokens", lambda ask, s: (ask.max_tokens or 0) > s.context_tokens),
    ("completions/completion_default_length", None,
     lambda ask, _: ask.kind == "completion" and "max_tokens" in ask.body and ask.body["max_tokens"] is None),
    ("errors/n_zero", "n", _outside("n", 1, None)),
    ("errors/stream_options_without_stream", None, lambda ask, _: ask.get("stream_options") and not ask.stream),
    ("errors/top_logprobs_alone", None,
     lambda ask, _: ask.kind == "chat" and ask.get("top_logprobs") and not ask.get("logprobs")),
    ("errors/top_logprobs_many", "top_logprobs", lambda ask, _: ask.kind == "chat" and (ask.logprobs or 0) > 20),
    ("errors/logprobs_many", "logprobs", lambda ask, _: ask.kind == "completion" and (ask.logprobs or 0) > 20),
    ("chat/chat_token_ids_stream", None,
     lambda ask, _: ask.kind == "chat" and ask.stream and ask.get("return_token_ids")),
    ("structured/unknown_format", None,
     lambda ask, _: _form(ask).get("type", "text") not in ("text", "json_object", "json_schema")),
    ("structured/schema_missing", None,
     lambda ask, _: _form(ask).get("type") == "json_schema" and not _form(ask).get("json_schema")),
    ("structured/schema_invalid", None, _schema_is_invalid),
    ("tools/tools_malformed", None, lambda ask, _: any("function" not in tool for tool in ask.get("tools", []))),
    ("tools/tools_choice_without_tools", None,
     lambda ask, _: ask.get("tool_choice") not in (None, "none", "auto") and not ask.get("tools")),
    ("tools/tools_named_unknown", None, lambda ask, _: _named_tool(ask) is not None and ask.tool is None),
    ("tools_off/tools_named", None, lambda ask, s: _wants_tools(ask, s) and _named_tool(ask)),
    ("tools_off/tools_required", None, lambda ask, s: _wants_tools(ask, s) and ask.get("tool_choice") == "required"),
    ("tools_off/tools_auto", None, _wants_tools),
    ("completions/completion_suffix", None, lambda ask, _: ask.kind == "completion" and ask.get("suffix")),
    ("completions/completion_ids", None,
     lambda ask, _: ask.kind == "completion" and isinstance(ask.body["prompt"], list)
     and not isinstance(ask.body["prompt"][0], str)),
    ("errors/prompt_ids_out_of_vocabulary", "prompt", lambda ask, _: _unknown_id(ask) is not None),
    ("deadly/completion_empty_prompt", None,
     lambda ask, _: ask.kind == "completion" and ask.body["prompt"] in ("", [""])),
]  # fmt: skip


def value_fault(book: Book, settings: Settings, ask: Ask) -> Reply | None:
    """A value that the engine does not take."""
    for case, field, applies in _VALUES:
        if case in book.cases and book[case].status in _CLIENTS_FAULT and applies(ask, settings):
            return _refusal(book, case, _values(book, settings, ask, case, field))
    if ask.logprobs is not None and not settings.logprobs:
        case = "logprobs_off/" + ("chat_logprobs" if ask.kind == "chat" else "completion_logprobs")
        return _refusal(book, case, {"2": ask.logprobs})
    return None


def _values(book: Book, settings: Settings, ask: Ask, case: str, field: str | None) -> dict[str, Any]:
    replace: dict[str, Any] = {"512": settings.context_tokens}
    if (name := _named_tool(ask)) is not None:
        replace |= {"nope": name, "get_weather": name}
    if field == "prompt":
        return replace | {str(book.given(case, "prompt")[0]): _unknown_id(ask)}
    if field is not None:
        recorded = book.given(case, field)
        given = ask.max_tokens if field == "max_tokens" else ask.get(field)
        replace |= {str(float(recorded)): float(given or 0), str(recorded): given}
    return replace


def _unknown_id(ask: Ask) -> int | None:
    """A prompt's token id that is no token."""
    if ask.kind != "completion" or not isinstance(ask.body["prompt"], list):
        return None
    ids = (id for prompt in completion_prompts(ask.body["prompt"]) for id in prompt.ids or ())
    return next((id for id in ids if not in_vocabulary(id)), None)


def length_fault(book: Book, settings: Settings, ask: Ask) -> Reply | None:
    """A prompt that leaves no room in the context."""
    longest = max(prompt.tokens for prompt in ask.prompts)
    limit = settings.context_tokens
    if longest < limit:
        return None
    case = "errors/context_overflow" if ask.kind == "chat" else "errors/context_overflow_completion"
    return _refusal(book, case, {"513": limit + 1, "512": limit, "731": longest, "701": longest})


def embedding_fault(book: Book, settings: Settings, body: Mapping[str, Any]) -> Reply | None:
    """What is wrong with a request for embeddings."""
    given = body.get("input")
    if given is None:
        return _refusal(book, "embeddings/embeddings_no_input")
    if not isinstance(given, str | list):
        return _refusal(book, "embeddings/embeddings_wrong_type", {"5": given})
    if body.get("model") not in (None, settings.served_name):
        fault = _refusal(book, "embeddings/embeddings_unknown_model", {"nope": body["model"]})
        if fault:
            return fault
    if body.get("dimensions") is not None and (
        fault := _refusal(book, "embeddings/embeddings_dimensions", {"8": body["dimensions"]})
    ):
        return fault
    texts = [given] if isinstance(given, str) else [item for item in given if isinstance(item, str)]
    if any(count_tokens(text) > settings.context_tokens for text in texts):
        limit = settings.context_tokens
        return _refusal(book, "embeddings/embeddings_overflow", {"513": limit + 1, "512": limit})
    return None


def _refusal(book: Book, case: str, replace: Mapping[str, Any] | None = None) -> Reply | None:
    """The recorded refusal; None where this engine takes such a request."""
    return book.reply(case, replace) if case in book.cases and book[case].refused else None
