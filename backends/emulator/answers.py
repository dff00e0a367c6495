"""Fill recorded answers with made-up content: whole JSON answers, and the events of streams.

What a field is called and where it stands comes from the recording; only the values are ours.
"""

from __future__ import annotations

import copy
import json
import time
import uuid
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from backends.emulator.ask import Ask, Prompt
from backends.emulator.language import Token, alternatives, token_bytes
from backends.emulator.recordings import Book, Recorded, Reply, encode, json_reply
from backends.emulator.writer import Piece, Writer

DONE = b"data: [DONE]\n\n"
EVENT_STREAM = (b"content-type", b"text/event-stream; charset=utf-8")
_SLOT = "\ue000"


@dataclass(frozen=True, slots=True)
class Usage:
    """Token counts of a request."""

    prompt_tokens: int
    completion_tokens: int

    def fill(self, template: dict[str, Any]) -> dict[str, Any]:
        """The engine's usage object with these counts."""
        counts = {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
        }
        return template | counts


class Format:
    """How one engine writes answers. Subclasses say where it puts what the others lack."""

    lists_chosen_token = True  # among the likeliest tokens of a position
    merges_choices = False  # one chat event carries a piece of each choice
    echoes = True  # a completion's prompt, when asked to
    completions_share_index = False  # choices of a streamed completion come one after another, all with index 0

    def __init__(self, book: Book, served_name: str) -> None:
        self.book = book
        self.served_name = served_name
        self._templates: dict[tuple[str, bool], Templates] = {}

    def templates(self, ask: Ask) -> Templates:
        """The events for what is asked for, found once."""
        key = _case_name(ask), ask.n > 1
        if key not in self._templates:
            self._templates[key] = Templates.of(self.book, ask)
        return self._templates[key]

    def finish(self, choice: dict[str, Any], writer: Writer) -> None:
        """Set what tells why a choice ended, beside `finish_reason`."""

    def add_ids(self, choice: dict[str, Any], ids: list[int]) -> None:
        """Set the ids of a choice's tokens."""

    def add_prompt_ids(self, body: dict[str, Any], kind: str, prompts: list[Prompt]) -> None:
        """Set the ids of the prompt."""

    def add_totals(self, body: dict[str, Any], usage: Usage) -> None:
        """Set what else counts tokens."""

    # ---- whole answers

    def whole(self, ask: Ask, writers: list[Writer], texts: list[str], tokens: list[list[Token]], id: str) -> Reply:
        """The answer without streaming. texts, tokens: of each choice."""
        recorded = self.book["chat/chat" if ask.kind == "chat" else "completions/completion"]
        body = recorded.json_copy()
        choice_template = body["choices"][0]
        usage = Usage(sum(prompt.tokens for prompt in ask.prompts), sum(writer.tokens for writer in writers))
        body |= {"id": id, "created": int(time.time()), "model": self.shown_model(ask), "choices": []}
        body["usage"] = usage.fill(body["usage"])
        self.add_totals(body, usage)
        for writer, text, chosen in zip(writers, texts, tokens, strict=True):
            choice = copy.deepcopy(choice_template)
            choice["index"], choice["finish_reason"] = writer.index, writer.reason
            self.put_text(choice, ask, writer, text)
            self.finish(choice, writer)
            if ask.logprobs is not None:
                choice["logprobs"] = self.logprobs(ask, writer, chosen)
                if self.echoes and ask.get("echo"):
                    _forget_first(choice["logprobs"])
            if ask.get("return_token_ids"):
                self.add_ids(choice, [token.id for token in chosen])
            body["choices"].append(choice)
        if ask.get("return_token_ids"):
            self.add_prompt_ids(body, ask.kind, ask.prompts)
        return json_reply(200, body, recorded.compact)

    def shown_model(self, ask: Ask) -> Any:
        """What the answer gives as `model`."""
        return ask.model

    def put_text(self, choice: dict[str, Any], ask: Ask, writer: Writer, text: str) -> None:
        """Set a choice's text, or the tool call that it is."""
        if ask.kind == "completion":
            choice["text"] = text
        elif writer.tool is not None:
            message = copy.deepcopy(self.book["tools/tools_required"].json["choices"][0]["message"])
            call = message["tool_calls"][0]
            call["id"] = new_id(call.get("id") or "call_<id>")
            call["function"] = {"name": writer.tool, "arguments": text}
            choice["message"] = message
        else:
            choice["message"]["content"] = text

    # ---- logprobs

    def logprobs(self, ask: Ask, writer: Writer, tokens: list[Token], offset: int = 0) -> Any:
        """The logprobs object for these tokens. offset: characters of the choice's text before them."""
        count = ask.logprobs or 0
        if ask.kind == "chat":
            return {"content": [self._chat_logprob(token, count) for token in tokens]}
        result: dict[str, Any] = {"text_offset": [], "token_logprobs": [], "tokens": [], "top_logprobs": []}
        for token in tokens:
            result["text_offset"].append(self.text_offset(offset))
            result["token_logprobs"].append(token.logprob)
            result["tokens"].append(token.text)
            result["top_logprobs"].append({other.text: other.logprob for other in alternatives(token, max(count, 1))})
            offset += len(token.text)
        return result

    def text_offset(self, offset: int) -> int:
        """What stands for a token's place in the text."""
        return offset

    def token_text(self, token: Token) -> str:
        """A token as logprobs write it."""
        return token.text

    def _chat_logprob(self, token: Token, count: int) -> dict[str, Any]:
        template = self.book["chat/chat_logprobs"].json["choices"][0]["logprobs"]["content"][0]
        others = alternatives(token, count)[0 if self.lists_chosen_token else 1 :]
        entry = self._described(token, template)
        return entry | {"top_logprobs": [self._described(other, template) for other in others]}

    def _described(self, token: Token, template: dict[str, Any]) -> dict[str, Any]:
        text = self.token_text(token)
        data = text.encode() if text != token.text else token_bytes(token.id)
        entry = {"token": text, "logprob": token.logprob, "bytes": list(data)}
        return {key: entry[key] for key in template if key in entry}


def _forget_first(logprobs: dict[str, Any]) -> None:
    """Nothing comes before the first token of a prompt, so it has no probability."""
    for key in ("token_logprobs", "top_logprobs"):
        logprobs[key][0] = None


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
        self.templates = form.templates(ask)
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


def new_id(template: str) -> str:
    """A recorded id with a fresh random part."""
    return template.replace("<id>", uuid.uuid4().hex)


def error_events(recorded: Recorded, error: Any) -> bytes:
    """An error within a stream, and the stream's end."""
    return b"data: " + encode({"error": error}, recorded.compact) + b"\n\n" + DONE


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
