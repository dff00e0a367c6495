"""The events of streams: recorded ones with made-up content."""

from __future__ import annotations

import copy
import json
import time
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from backends.emulator.answers import Format, Usage, new_id
from backends.emulator.ask import Ask, Prompt
from backends.emulator.recordings import Book, Recorded, encode
from backends.emulator.writer import Piece, Writer

DONE = b"data: [DONE]\n\n"
EVENT_STREAM = (b"content-type", b"text/event-stream; charset=utf-8")
_SLOT = "\ue000"


@dataclass(frozen=True, slots=True)
class Templates:
    """The events of a recorded stream, by what they are for."""

    recorded: Recorded
    opening: dict[str, Any] | None
    piece: dict[str, Any]
    closing: dict[str, Any]
    usage: dict[str, Any] | None

    @classmethod
    def of(cls, book: Book, ask: Ask) -> Templates:
        """Those of the recorded stream that is most like what is asked for."""
        recorded = book[_case_name(ask)]
        events = [event for event in recorded.events or [] if isinstance(event, dict)]
        texts = [_text(event["choices"][0]) if event["choices"] else None for event in events]
        after_all = events
        if ask.kind == "chat" and ask.n > 1:  # LMDeploy writes another usage for several choices
            after_all = [event for event in book["chat/chat_two_stream"].events or [] if isinstance(event, dict)]
        return cls(
            recorded,
            opening=events[0] if texts[0] == "" else None,
            piece=next(event for event, text in zip(events, texts, strict=True) if text),
            closing=next(event for event in events if _ends(event["choices"])),
            usage=next(event for event in after_all if not event["choices"]) if ask.include_usage else None,
        )


class Events:
    """The events of one stream, from the recorded stream of a like request."""

    def __init__(self, form: Format, ask: Ask, id: str) -> None:
        self.form, self.ask = form, ask
        self.templates = _templates(form.book, ask)
        self.recorded = self.templates.recorded
        self._head = {"id": id, "created": int(time.time()), "model": form.shown_model(ask)}
        self.closing_has_text = bool(_text(self.templates.closing["choices"][0]))
        self.plain = ask.logprobs is None and not ask.get("return_token_ids") and not ask.continuous_usage
        self._frames: dict[int, tuple[bytes, bytes]] = {}
        self._written: dict[int, int] = {}  # characters of each choice so far

    def open(self, index: int, prompts: list[Prompt]) -> bytes:
        """What comes before a choice's first text; nothing for some engines."""
        if self.templates.opening is None:
            return b""
        event = self._for_choice(self.templates.opening, index)
        self._count(event, Usage(prompts[0].tokens, 0))
        if self.ask.get("return_token_ids"):
            self.form.add_prompt_ids(event, "stream", prompts)
        return self._encoded(event)

    def piece(self, writer: Writer, piece: Piece, usage: Usage) -> bytes:
        """One event with text (or, for a called tool, with a part of its arguments)."""
        if self.plain and writer.tool is None:
            prefix, suffix = self.frame(writer.index)
            return prefix + escaped(piece.text, self.recorded.compact) + suffix
        return self._encoded(self.piece_dict(writer, piece, usage))

    def piece_dict(self, writer: Writer, piece: Piece, usage: Usage) -> dict[str, Any]:
        """As `piece`, not yet encoded."""
        if writer.tool is not None:
            return self._tool_event(writer.index, {"arguments": piece.text})
        event = self._for_choice(self.templates.piece, writer.index)
        self._fill(event["choices"][0], writer, piece)
        self._count(event, usage)
        return event

    def close(self, writer: Writer, piece: Piece, usage: Usage) -> bytes:
        """The end of a choice: its last text and why it ended."""
        before = b""
        if writer.tool is not None or (piece.text and not self.closing_has_text):
            before = self.piece(writer, piece, usage) if piece.text else b""
            piece = Piece("")
        event = self._for_choice(self.templates.closing, writer.index)
        choice = event["choices"][0]
        if self.ask.get("return_token_ids") and not self.closing_has_text:
            del choice["finish_reason"]
            self.form.add_ids(choice, [])
        choice["finish_reason"] = writer.reason
        if self.closing_has_text:
            self._fill(choice, writer, piece)
            if self.ask.kind == "chat" and not piece.text:
                choice["delta"] = {}
        self.form.finish(choice, writer)
        self._count(event, usage)
        return before + self._encoded(event)

    def end(self, usage: Usage) -> bytes:
        """After all choices."""
        if self.templates.usage is None:
            return DONE
        event = self.templates.usage | self._head
        event["usage"] = usage.fill(event["usage"])
        return self._encoded(event) + DONE

    def call(self, writer: Writer) -> bytes:
        """The event that names the called tool."""
        return self._encoded(self._tool_event(writer.index, {"name": writer.tool}))

    def merged(self, events: list[dict[str, Any]]) -> bytes:
        """One event with the choices of several."""
        return self._encoded(events[0] | {"choices": [event["choices"][0] for event in events]})

    def _tool_event(self, index: int, function: dict[str, Any]) -> dict[str, Any]:
        recorded = self.form.book["tools/tools_required_stream"].events or []
        calls = [event for event in recorded if isinstance(event, dict) and _calls(event)]
        template = copy.deepcopy(calls[0 if "name" in function else 1])
        call = template["choices"][0]["delta"]["tool_calls"][0]
        if call.get("id"):
            call["id"] = new_id(call["id"])
        call["function"] |= function
        template |= self._head
        template["choices"][0]["index"] = index
        return template

    def _for_choice(self, event: dict[str, Any], index: int) -> dict[str, Any]:
        shown = 0 if self.form.completions_share_index and self.ask.kind == "completion" else index
        choice = event["choices"][0] | {"index": shown}
        if "delta" in choice:
            choice["delta"] = dict(choice["delta"])
        return event | self._head | {"choices": [choice]}

    def _fill(self, choice: dict[str, Any], writer: Writer, piece: Piece) -> None:
        if self.ask.kind == "chat":
            choice["delta"]["content"] = piece.text
        else:
            choice["text"] = piece.text
        if self.ask.logprobs is not None:
            offset = self._written.get(writer.index, 0)
            choice["logprobs"] = self.form.logprobs(self.ask, writer, piece.tokens, offset)
            self._written[writer.index] = offset + len(piece.text)
        if self.ask.get("return_token_ids"):
            self.form.add_ids(choice, [token.id for token in piece.tokens])

    def _count(self, event: dict[str, Any], usage: Usage) -> None:
        if event.get("usage"):
            event["usage"] = usage.fill(event["usage"])

    def frame(self, index: int) -> tuple[bytes, bytes]:
        """The bytes before and after the text of a plain piece."""
        found = self._frames.get(index)
        if found is None:
            event = self._for_choice(self.templates.piece, index)
            self._fill(event["choices"][0], Writer(index, (), 0), Piece(_SLOT))
            prefix, suffix = self._encoded(event).split(escaped(_SLOT, self.recorded.compact))
            found = self._frames[index] = prefix, suffix
        return found

    def _encoded(self, event: dict[str, Any]) -> bytes:
        return b"data: " + encode(event, self.recorded.compact) + b"\n\n"


def error_events(recorded: Recorded, error: Any) -> bytes:
    """An error within a stream, and the stream's end."""
    return b"data: " + encode({"error": error}, recorded.compact) + b"\n\n" + DONE


_found: dict[tuple[str, str, bool], Templates] = {}


def _templates(book: Book, ask: Ask) -> Templates:
    """The events for what is asked for, looked for once."""
    key = book.engine, _case_name(ask), ask.n > 1
    if key not in _found:
        _found[key] = Templates.of(book, ask)
    return _found[key]


def _case_name(ask: Ask) -> str:
    kind, file = ("chat", "chat") if ask.kind == "chat" else ("completion", "completions")
    usage = "_usage" if ask.include_usage else ""
    continuous = "_continuous" if ask.continuous_usage and ask.kind == "chat" else ""
    return f"{file}/{kind}_stream{usage}{continuous}"


def _text(choice: dict[str, Any]) -> str | None:
    text: str | None = choice["delta"].get("content") if "delta" in choice else choice.get("text")
    return text


def _ends(choices: list[dict[str, Any]]) -> bool:
    return bool(choices) and choices[0].get("finish_reason") is not None


def _calls(event: dict[str, Any]) -> bool:
    return bool(event["choices"]) and bool(event["choices"][0]["delta"].get("tool_calls"))


@lru_cache(maxsize=4096)
def escaped(text: str, compact: bool) -> bytes:
    """A text as it stands inside a JSON string."""
    return json.dumps(text, ensure_ascii=not compact)[1:-1].encode()
