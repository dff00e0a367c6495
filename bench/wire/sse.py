"""Server-sent events of the OpenAI API, taken apart after the stream has ended.

An event's time is that of the read that completed it. What an event carries is kept as one flag word, so that every
metric, ours and other tools', can be computed from the columns without the bytes.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import msgspec

from bench.measure.record import (
    CHOICES,
    CONTENT,
    DONE,
    ERROR,
    FINISH,
    MALFORMED,
    REASONING,
    TOOL,
    UNKNOWN_TOKENS,
    USAGE,
    Events,
)

Pieces = list[tuple[int, bytes]]


class _Delta(msgspec.Struct, gc=False):
    content: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    tool_calls: list[Any] | None = None


class _Choice(msgspec.Struct, gc=False):
    delta: _Delta | None = None
    text: str | None = None
    finish_reason: str | None = None


class _PromptDetails(msgspec.Struct, gc=False):
    cached_tokens: int | None = None


class Usage(msgspec.Struct, gc=False):
    """The usage object of a chunk."""

    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    prompt_tokens_details: _PromptDetails | None = None


class _Chunk(msgspec.Struct, gc=False):
    choices: list[_Choice] | None = None
    usage: Usage | None = None
    error: Any = None
    object: str | None = None


_decode_chunk = msgspec.json.Decoder(_Chunk).decode
_decode_chunks = msgspec.json.Decoder(list[_Chunk]).decode


class Stream(msgspec.Struct):
    """A whole stream, decoded. `text` is everything that was generated, reasoning included."""

    events: Events
    text: str = ""
    finish: str | None = None
    usage: Usage | None = None
    error: str | None = None


def decode_stream(pieces: Pieces, origin_ns: int) -> Stream:
    """Decode a stream's body; event times come out in nanoseconds after `origin_ns`."""
    stream = Stream(Events())
    texts: list[str] = []
    stamps_ns: list[int] = []
    payloads: list[bytes] = []
    for stamp_ns, payload in _whole_events(pieces) or split_events(pieces):
        if payload == b"[DONE]":
            _append(stream, texts, stamps_ns, payloads, origin_ns)
            stamps_ns, payloads = [], []
            _push(stream.events, stamp_ns - origin_ns, DONE, 0, UNKNOWN_TOKENS)
        else:
            stamps_ns.append(stamp_ns)
            payloads.append(payload)
    _append(stream, texts, stamps_ns, payloads, origin_ns)
    stream.text = "".join(texts)
    return stream


def _whole_events(pieces: Pieces) -> list[tuple[int, bytes]] | None:
    """The events of a stream whose every piece is one event of one data line, as servers nearly always send it."""
    body = b"".join([piece for _, piece in pieces])
    plain = body.startswith(b"data: ") and body.count(b"\n\ndata: ") == len(pieces) - 1 and b"\r" not in body
    if plain and body.count(b"\n") == 2 * len(pieces) and all(piece.endswith(b"\n\n") for _, piece in pieces):
        return [(stamp_ns, piece[6:-2]) for stamp_ns, piece in pieces]
    return None


def split_events(pieces: Pieces) -> Iterator[tuple[int, bytes]]:
    """(time, data) of every event with data. A last event without its blank line is never dispatched, as the
    standard has it."""
    tail = b""
    for stamp_ns, piece in pieces:
        text = tail + piece if tail else piece
        if b"\r" in text:
            # a CR at the very end may be half of a CRLF
            held = b"\r" if text.endswith(b"\r") else b""
            text = text[: len(text) - len(held)].replace(b"\r\n", b"\n").replace(b"\r", b"\n") + held
        *events, tail = text.split(b"\n\n")
        for event in events:
            if event.startswith(b"data: ") and b"\n" not in event:
                yield stamp_ns, event[6:]
            else:
                payload = _data_of(event)
                if payload is not None:
                    yield stamp_ns, payload


def _data_of(event: bytes) -> bytes | None:
    """The joined data lines of an event that has comments, names or several lines."""
    lines = [line for line in event.split(b"\n") if line.startswith(b"data:")]
    if not lines:
        return None
    data = b"\n".join(line[5:].removeprefix(b" ") for line in lines)
    if b"event: error" in event.split(b"\n") and b'"error"' not in data:
        return b'{"error":' + msgspec.json.encode(data.decode("utf-8", "replace")) + b"}"
    return data


def _append(stream: Stream, texts: list[str], stamps_ns: list[int], payloads: list[bytes], origin_ns: int) -> None:
    if not payloads:
        return
    try:
        chunks: list[_Chunk | None] = list(_decode_chunks(b"[" + b",".join(payloads) + b"]"))
    except (msgspec.DecodeError, UnicodeDecodeError):
        chunks = [_decode_or_none(payload) for payload in payloads]
    if len(chunks) != len(payloads):  # a payload such as `{},{}` is one event and not JSON
        chunks = [_decode_or_none(payload) for payload in payloads]
    events = stream.events
    add_flags, add_chars, add_tokens = events.flags.append, events.chars.append, events.tokens.append
    events.t_ns += [stamp_ns - origin_ns for stamp_ns in stamps_ns]
    for payload, chunk in zip(payloads, chunks, strict=True):
        content = _plain_content(chunk)
        if content is None:
            flags, chars, tokens = _digest(stream, chunk, payload, texts)
            add_flags(flags)
            add_chars(chars)
            add_tokens(tokens)
            continue
        texts.append(content)
        add_chars(len(content))
        usage = chunk.usage if chunk is not None else None
        if usage is None:
            add_flags(CHOICES | CONTENT)
            add_tokens(UNKNOWN_TOKENS)
        else:
            stream.usage = usage
            add_flags(CHOICES | CONTENT | USAGE)
            add_tokens(UNKNOWN_TOKENS if usage.completion_tokens is None else usage.completion_tokens)


def _plain_content(chunk: _Chunk | None) -> str | None:
    """The text of a chunk that has one choice with text and nothing else, as nearly every chunk; else None."""
    if chunk is None or chunk.error is not None or not chunk.choices or len(chunk.choices) != 1:
        return None
    choice = chunk.choices[0]
    delta = choice.delta
    if delta is None or choice.finish_reason is not None or choice.text is not None:
        return None
    if delta.tool_calls is not None or delta.reasoning_content is not None or delta.reasoning is not None:
        return None
    return delta.content or None


def _decode_or_none(payload: bytes) -> _Chunk | None:
    try:
        return _decode_chunk(payload)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return None


def _digest(stream: Stream, chunk: _Chunk | None, payload: bytes, texts: list[str]) -> tuple[int, int, int]:
    """(flags, characters, cumulative tokens) of one event; notes what concerns the whole stream."""
    if chunk is None:
        stream.error = stream.error or f"not a chunk: {payload[:200]!r}"
        return MALFORMED, 0, UNKNOWN_TOKENS
    flags = chars = 0
    tokens = UNKNOWN_TOKENS
    if chunk.error or chunk.object == "error":
        flags |= ERROR
        stream.error = stream.error or payload[:500].decode("utf-8", "replace")
    if chunk.usage is not None:
        flags |= USAGE
        stream.usage = chunk.usage
        if chunk.usage.completion_tokens is not None:
            tokens = chunk.usage.completion_tokens
    if chunk.choices:
        flags |= CHOICES
        for choice in chunk.choices:
            if choice.finish_reason is not None:
                flags |= FINISH
                stream.finish = choice.finish_reason
            if choice.text:
                flags |= CONTENT
                texts.append(choice.text)
                chars += len(choice.text)
            delta = choice.delta
            if delta is None:
                continue
            if delta.content:
                flags |= CONTENT
                texts.append(delta.content)
                chars += len(delta.content)
            reasoning = delta.reasoning_content or delta.reasoning
            if reasoning:
                flags |= REASONING
                texts.append(reasoning)
                chars += len(reasoning)
            if delta.tool_calls:
                flags |= TOOL
    return flags, chars, tokens


def _push(events: Events, t_ns: int, flags: int, chars: int, tokens: int) -> None:
    events.t_ns.append(t_ns)
    events.flags.append(flags)
    events.chars.append(chars)
    events.tokens.append(tokens)
