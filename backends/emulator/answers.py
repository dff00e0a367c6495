"""Fill recorded answers with made-up content.

What a field is called and where it stands comes from the recording; only the values are ours.
"""

from __future__ import annotations

import copy
import time
import uuid
from dataclasses import dataclass
from typing import Any

from backends.emulator.ask import Ask, Prompt
from backends.emulator.language import Token, alternatives, token_bytes
from backends.emulator.recordings import Book, Reply, json_reply
from backends.emulator.writer import Writer


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


def new_id(template: str) -> str:
    """A recorded id with a fresh random part."""
    return template.replace("<id>", uuid.uuid4().hex)
