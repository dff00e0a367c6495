"""A stream that outlives its engine: what was sent of it, and how another replica is asked to go on from there. Pure.

    Transcript  keeps what the client was sent   ─> continuation(body, transcript): the request for the rest
                                                    counting(body): the one that tells the tokens of the prompt alone
    ResumedStream  makes the rest look like one stream with what came before: its id, its usage, no second beginning

Chat goes on by `continue_final_message` with the text so far as the assistant's; a completion by prompt and text as the
new prompt. The engine tokenizes that text anew: greedy output goes on as it would have.
"""

from __future__ import annotations

import re
from typing import Any

import msgspec

from gateway.relay.answers import Usage
from gateway.relay.sse import EventStream

KEPT_BYTES = 1_000_000  # of a request's body, and of its answer's text; a stream with more is not continued
FOLD_AT = 256  # pieces kept as they were sent before only their text is

# What makes a request's answer more than text that can be gone on with, by the values that do not.
_PLAIN: dict[str, tuple[bytes, ...]] = {
    "n": (b"1",),
    "best_of": (b"1",),
    "tools": (b"[]",),
    "functions": (b"[]",),
    "response_format": (b'{"type":"text"}',),
    "logprobs": (b"false",),
    "top_logprobs": (),
    "prompt_logprobs": (),
    "echo": (b"false",),
    "suffix": (b'""',),
    "structured_outputs": (),
    "guided_json": (),
    "guided_regex": (),
    "guided_choice": (),
    "guided_grammar": (),
    "regex": (),
    "ebnf": (),
    "json_schema": (),
    "use_beam_search": (b"false",),
    "return_token_ids": (b"false",),
    "return_tokens_as_token_ids": (b"false",),
    "truncate_prompt_tokens": (),
    "logits_processors": (),
    "return_hidden_states": (b"false",),
}
_LENGTHS = ("max_tokens", "max_completion_tokens", "min_tokens", "min_new_tokens")
_SPACE = re.compile(rb"\s+")

_decode_body = msgspec.json.Decoder(dict[str, msgspec.Raw]).decode
_decode_list = msgspec.json.Decoder(list[msgspec.Raw]).decode


class _Delta(msgspec.Struct):
    content: str | None = None
    reasoning: str | None = None
    reasoning_content: str | None = None
    tool_calls: list[msgspec.Raw] | None = None


class _Choice(msgspec.Struct):
    delta: _Delta | None = None
    text: str | None = None
    finish_reason: str | None = None


class _Chunk(msgspec.Struct):
    id: str
    created: int
    choices: list[_Choice] = []


_decode_chunk = msgspec.json.Decoder(_Chunk).decode


class Unfit(Exception):
    """A stream that cannot be continued; the text says why, as the end of a sentence."""


class Transcript:
    """What a client was sent of one stream. The token path appends to `pieces`, and folds them now and then."""

    __slots__ = ("_bytes", "_tail", "_texts", "created", "finished", "id", "pieces", "prompt_tokens", "tokens", "unfit")

    def __init__(self) -> None:
        self.pieces: list[bytes] = []  # whole events, as sent; not yet looked at
        self._texts: list[str] = []
        self._tail: list[str] = []  # the last ones, from the first of which on all end in white space
        self._bytes = 0
        self.id = ""
        self.created = 0
        self.tokens = 0  # events that carried text: a token each, so long as the engine is not behind
        self.prompt_tokens: int | None = None  # of the request itself; once an engine was asked
        self.finished = False  # the client knows how it ended
        self.unfit = ""  # why this cannot be continued; "" while it can

    @property
    def text(self) -> str:
        """All of it. Call `fold` before."""
        return "".join(self._texts + self._tail)

    def fold(self) -> None:
        """Keep of the pieces only what is needed to go on: text. Unfit once there is something else in them."""
        data = b"".join(self.pieces)
        self.pieces.clear()
        if self.unfit:
            return
        try:
            for event in data.split(b"\n\n"):
                if event.startswith(b"data: {"):
                    self._read(_decode_chunk(event[6:]))
        except msgspec.MsgspecError:
            self.unfit = "the engine sent what is no chunk of a stream"
        if self._bytes > KEPT_BYTES:
            self.unfit = f"more than {KEPT_BYTES} bytes of text were sent"
        if self.unfit:
            self._tail = []
        self._texts = ["".join(self._texts)] if not self.unfit else []

    def _read(self, chunk: _Chunk) -> None:
        if not self.id:
            self.id, self.created = chunk.id, chunk.created
        for choice in chunk.choices:
            delta = choice.delta
            self.finished = self.finished or choice.finish_reason is not None
            if delta is not None and (delta.tool_calls or delta.reasoning or delta.reasoning_content):
                self.unfit = "it holds more than plain text"
            text = delta.content if delta is not None else choice.text
            if text:
                if not text[-1].isspace():
                    self._texts += self._tail
                    self._texts.append(text)
                    self._tail = []
                else:
                    self._tail.append(text)
                self._bytes += len(text)
                self.tokens += 1

    def cut(self, whole_tokens: bool) -> tuple[str, str, int]:
        """What the next engine is given of the text, what it is to say again, and how many tokens it is given.

        White space at the end is not given: templates strip it, and tokenizers make one token of it and of what is
        beside it. whole_tokens: no more is given of a token of which a part is not, so that the engine says it again.
        """
        if whole_tokens:
            return "".join(self._texts), "".join(self._tail), self.tokens - len(self._tail)
        text = self.text
        given = text.rstrip()
        blank = 0
        while blank < len(self._tail) and self._tail[-1 - blank].isspace():
            blank += 1
        return given, text[len(given) :], self.tokens - blank


class Rest(msgspec.Struct, frozen=True, gc=False):
    """What another engine is asked in order to go on."""

    body: bytes
    again: str  # was sent, and is not in what the engine is given: it says it again
    tokens: int  # of the answer, that the engine is given
    exact: bool  # greedy: there is one right text


def continuation(body: bytes, transcript: Transcript, chat: bool) -> Rest:
    """The request for the rest of a stream. body: a JSON object, as it was sent. Raises Unfit."""
    try:
        return _continuation(body, transcript, chat)
    except (msgspec.MsgspecError, ValueError, OverflowError, RecursionError) as error:
        raise Unfit(f"its body cannot be read: {error}") from error


def _continuation(body: bytes, transcript: Transcript, chat: bool) -> Rest:
    transcript.fold()
    members = _decode_body(body)
    if transcript.unfit:
        raise Unfit(transcript.unfit)
    if transcript.finished:
        raise Unfit("all of its text was sent, and only its usage is missing")
    _check_plain(members)
    exact = _number(members, "temperature") == 0
    text, again, tokens = transcript.cut(exact)
    begun = _is(members, "continue_final_message", b"true")
    if chat and not begun and text[:1].isspace():  # a template may strip that, too
        if not exact:
            raise Unfit("its text begins with white space, which a chat template may strip")
        text, again, tokens = "", text + again, 0
    left: dict[str, Any] = {}
    for name in _LENGTHS:
        length = _number(members, name)
        if length is not None:
            left[name] = length - tokens if name.startswith("max") else max(0, length - tokens)
    if any(length <= 0 for name, length in left.items() if name.startswith("max")):
        raise Unfit("it had all of its tokens")
    goes_on = _chat(members, text) if chat else _completion(members, text, "max_tokens" in left)
    return Rest(msgspec.json.encode(members | left | goes_on), again, tokens, exact)


def counting(body: bytes) -> bytes:
    """The request that tells how many tokens a request's prompt has: itself, for one token. body: a JSON object."""
    members = _decode_body(body)
    kept = {name: raw for name, raw in members.items() if name not in (*_LENGTHS, "stream", "stream_options")}
    length = "max_completion_tokens" if "max_completion_tokens" in members else "max_tokens"
    return msgspec.json.encode(kept | {length: 1})


def _chat(members: dict[str, msgspec.Raw], text: str) -> dict[str, Any]:
    messages: list[Any] = list(_decode_list(members.get("messages", msgspec.Raw(b"[]"))))
    if _is(members, "continue_final_message", b"true"):
        last = msgspec.json.decode(messages.pop())
        if last.get("role") != "assistant" or not isinstance(last.get("content"), str):
            raise Unfit("the message that it goes on with is not plain text")
        messages.append(last | {"content": last["content"] + text})
    elif _is(members, "add_generation_prompt", b"false"):
        raise Unfit("it was asked for without a generation prompt")
    elif text:
        messages.append({"role": "assistant", "content": text})
    else:
        return {}  # nothing was said yet: it is asked again
    return {"messages": messages, "continue_final_message": True, "add_generation_prompt": False}


def _completion(members: dict[str, msgspec.Raw], text: str, has_length: bool) -> dict[str, Any]:
    prompt = msgspec.json.decode(members.get("prompt", msgspec.Raw(b"null")))
    if isinstance(prompt, list) and len(prompt) == 1:
        prompt = prompt[0]
    if not isinstance(prompt, str):
        raise Unfit("its prompt is not one text")
    if not has_length:  # the engine's own limit, which is not known here
        raise Unfit("it has no `max_tokens`")
    return {"prompt": prompt + text}


def _check_plain(members: dict[str, msgspec.Raw]) -> None:
    for name, harmless in _PLAIN.items():
        if name in members and _SPACE.sub(b"", bytes(members[name])) not in (b"null", *harmless):
            raise Unfit(f"it was asked for with `{name}`")


def _is(members: dict[str, msgspec.Raw], name: str, value: bytes) -> bool:
    return name in members and bytes(members[name]).strip() == value


def _number(members: dict[str, msgspec.Raw], name: str) -> float | int | None:
    try:
        return msgspec.json.decode(members[name], type=int | float | None) if name in members else None
    except msgspec.ValidationError:
        return None


class ResumedStream(EventStream):
    """The rest of a stream, made one with its beginning: the same id, no second opening, usage of the whole."""

    __slots__ = ("_again", "_exact", "_summed", "_tokens_before", "_transcript", "strayed")

    def __init__(
        self,
        keep_usage: bool,
        rename: tuple[re.Pattern[bytes], bytes] | None,
        transcript: Transcript,
        rest: Rest,
        events: int,
    ) -> None:
        """transcript: folded. rest: what the engine was asked. events: sent before."""
        super().__init__(keep_usage, rename)
        self._transcript = transcript
        self._again = rest.again  # what is still to come of it
        self._exact = rest.exact
        self._tokens_before = rest.tokens
        self._summed = False
        self.strayed = False  # the engine did not say again what it had to: nothing more comes out
        self.events = events

    def feed(self, data: bytes) -> bytes:
        """As EventStream's."""
        data = super().feed(data)
        if self.usage is not None and not self._summed:
            self._summed = True
            self.usage = Usage(*self._whole(self.usage.prompt, self.usage.completion))
        if not data:
            return data
        out = b"".join(self._event(event) for event in data.split(b"\n\n")[:-1])
        if self.strayed:
            self.done, self.error = False, b""
        return out

    def _event(self, event: bytes) -> bytes:
        if self.strayed:
            return b""
        if not event.startswith(b"data: {"):
            return event + b"\n\n"
        try:
            chunk = msgspec.json.decode(event[6:])
        except msgspec.MsgspecError:
            return event + b"\n\n"  # not a chunk: the client may make of it what it can
        chunk |= {"id": self._transcript.id, "created": self._transcript.created}
        for choice in chunk.get("choices") or ():
            if not self._choice(choice):
                return b""
        usage = chunk.get("usage")
        if usage:
            prompt, completion = self._whole(usage.get("prompt_tokens") or 0, usage.get("completion_tokens") or 0)
            usage |= {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}
        return b"data: " + msgspec.json.encode(chunk) + b"\n\n"

    def _choice(self, choice: dict[str, Any]) -> bool:
        """Take out of a choice what the client has; False if nothing is left of it."""
        holder, name = (choice["delta"], "content") if "delta" in choice else (choice, "text")
        text = holder.get(name) or ""
        again, ends = self._again, choice.get("finish_reason") is not None
        if again and (text or ends):
            if text.startswith(again) or (again.startswith(text) and not ends):
                text, self._again = text[len(again) :], again[len(text) :]
                holder[name] = text
            elif self._exact:
                self.strayed = True
                return False
            else:
                self._again = ""
        return bool(text) or ends

    def _whole(self, prompt: int, completion: int) -> tuple[int, int]:
        """Usage of the whole stream from that of the rest, whose prompt held what had been sent."""
        counted = self._transcript.prompt_tokens
        before = self._tokens_before
        return counted if counted is not None else max(0, prompt - before), completion + before
