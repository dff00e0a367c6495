"""The Responses API: the recorded answer and events with our text, ids, counts and ending in their places."""

from __future__ import annotations

import copy
import time
from collections.abc import Mapping
from typing import Any

from backends.emulator.answers import Usage, new_id
from backends.emulator.ask import Ask
from backends.emulator.recordings import Book, Reply, encode, json_reply
from backends.emulator.writer import Reason

_DELTA = "response.output_text.delta"


def chat_body(body: Mapping[str, Any]) -> dict[str, Any]:
    """The chat request that a request for a response amounts to."""
    given = body.get("input", "")
    messages = [{"role": "user", "content": given}] if isinstance(given, str) else list(given)
    if body.get("instructions"):
        messages.insert(0, {"role": "system", "content": body["instructions"]})
    taken = {key: body[key] for key in ("model", "temperature", "top_p", "stream", "ignore_eos") if key in body}
    return {**taken, "messages": messages, "max_completion_tokens": body.get("max_output_tokens")}


class Response:
    """One response; `whole` or, event by event, `begin`, `delta` and `end`."""

    def __init__(self, book: Book, ask: Ask, model: Any) -> None:
        self._whole = book["responses/responses"]
        self._stream = book["responses/responses_stream"]
        self._ask = ask
        self._values: dict[str, Any] = {
            "model": model,
            "created_at": int(time.time()),
            "temperature": ask.get("temperature"),
            "max_output_tokens": ask.max_tokens,
        }
        self._ids = {name: new_id(name) for name in ("resp_<id>", "msg_<id>")}
        self._number = 0
        events = [event for event in self._stream.events or [] if isinstance(event, dict)]
        places = [index for index, event in enumerate(events) if event["event"] == _DELTA]
        self._before, self._delta, self._after = events[: places[0]], events[places[0]], events[places[-1] + 1 :]

    def whole(self, text: str, usage: Usage, reason: Reason) -> Reply:
        """The answer without streaming."""
        return json_reply(200, self._filled(self._whole.json_copy(), text, usage, reason), self._whole.compact)

    def begin(self) -> bytes:
        """The events before the first text, of a response that is in progress."""
        return b"".join(self._event(event, "", Usage(0, 0), "length") for event in self._before)

    def delta(self, text: str) -> bytes:
        """The event of a piece of text."""
        event = copy.deepcopy(self._delta)
        event["data"]["delta"] = text
        return self._event(event, text, Usage(0, 0), "length")

    def end(self, text: str, usage: Usage, reason: Reason) -> bytes:
        """The events after the last text."""
        return b"".join(self._event(event, text, usage, reason) for event in self._after)

    def _event(self, event: dict[str, Any], text: str, usage: Usage, reason: Reason) -> bytes:
        data = self._filled(copy.deepcopy(event["data"]), text, usage, reason)
        data["sequence_number"] = self._number
        self._number += 1
        if reason != "length" and data["type"] == "response.incomplete":
            data["type"] = "response.completed"
        return f"event: {data['type']}\ndata: ".encode() + encode(data, self._stream.compact) + b"\n\n"

    def _filled(self, value: Any, text: str, usage: Usage, reason: Reason) -> Any:
        """A recorded value with everything of ours put in; `reason` other than length makes it a completed one."""
        if isinstance(value, list):
            return [self._filled(item, text, usage, reason) for item in value]
        if not isinstance(value, dict):
            return self._ids.get(value, value) if isinstance(value, str) else value
        filled = {key: self._filled(item, text, usage, reason) for key, item in value.items()}
        for key, item in filled.items():
            if key in ("text", "output_text") and isinstance(item, str) and item:
                filled[key] = text
            elif key in self._values and item is not None:
                filled[key] = self._values[key]
        if "input_tokens" in filled:
            total = usage.prompt_tokens + usage.completion_tokens
            filled |= {"input_tokens": usage.prompt_tokens, "output_tokens": usage.completion_tokens}
            filled["total_tokens"] = total
        if reason != "length" and filled.get("status") == "incomplete":
            filled["status"] = "completed"
            if "incomplete_details" in filled:
                filled["incomplete_details"] = None
        return filled
