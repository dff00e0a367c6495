"""What an answer says: the model's own text, or what a tool, a schema or a script makes of it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from backends.emulator import schema
from backends.emulator.ask import Ask, Prompt
from backends.emulator.language import Token, generate, spell
from backends.emulator.script import Script
from backends.emulator.writer import Writer


@dataclass(frozen=True, slots=True)
class Style:
    """What of an engine decides how its answers go."""

    context_tokens: int
    default_limit: int | None  # tokens of an answer whose request does not say; None: what the context leaves
    counts_end_token: bool
    parses_tools: bool
    calls_forced_tool: bool  # a tool that the request forces is called, rather than written about
    named_call_stops: bool  # and, when forced by name, ends with `stop`


def writers(ask: Ask, style: Style, script: Script) -> list[Writer]:
    """Who writes the choices: `n` for each prompt."""
    return [
        _writer(ask, prompt, index * ask.n + copy, copy, style, script)
        for index, prompt in enumerate(ask.prompts)
        for copy in range(ask.n)
    ]


def _writer(ask: Ask, prompt: Prompt, index: int, copy: int, style: Style, script: Script) -> Writer:
    room = max(style.context_tokens - prompt.tokens, 0)
    wanted = style.default_limit if ask.max_tokens is None else ask.max_tokens
    writer = Writer(
        index,
        (),
        limit=room if wanted is None else min(wanted, room),
        chunk=max(script.tokens_per_chunk, 1),
        stops=ask.stops,
        ignore_eos=bool(ask.get("ignore_eos")),
        counts_end_token=style.counts_end_token,
    )
    tool = _tool(ask, script)
    if tool is not None and style.parses_tools and (style.calls_forced_tool or script.call_tools):
        writer.tool = tool["name"]
        by_name = isinstance(ask.get("tool_choice"), dict)
        writer.natural_end = "stop" if by_name and style.named_call_stops else "tool_calls"
        given = script.tool_arguments
        writer.source = spell(json.dumps(schema.minimal(tool.get("parameters"))) if given is None else given)
    elif tool is not None and not style.parses_tools:
        # As recorded of SGLang without a parser; the others have refused the request by now.
        call = {"name": tool["name"], "parameters": schema.minimal(tool.get("parameters"))}
        writer.source = spell(json.dumps([call]))
    else:
        writer.source = _words(ask, prompt, copy, script)
    return writer


def _tool(ask: Ask, script: Script) -> Mapping[str, Any] | None:
    """The function to call: the one that the request forces, or the first where the script wants a call."""
    if ask.tool is not None:
        return ask.tool["function"]  # type: ignore[no-any-return]  # JSON
    if script.call_tools and ask.may_call_tools:
        return ask.get("tools")[0]["function"]  # type: ignore[no-any-return]  # JSON
    return None


def _words(ask: Ask, prompt: Prompt, copy: int, script: Script) -> Iterable[Token]:
    if ask.schema is not None:
        return spell(json.dumps(schema.minimal(ask.schema)))
    if script.answer is not None:
        return spell(script.answer)
    variant = ask.variant + (str(copy) if copy else "")
    words = generate(ask.weights, prompt.text, variant, may_end_at_once=bool(prompt.answered))
    return words if script.answer_tokens is None else _exactly(words, script.answer_tokens)


def _exactly(words: Iterable[Token], count: int) -> Iterable[Token]:
    left = count
    for word in words:
        if left <= 0:
            return
        if word.text:
            left -= 1
            yield word
