"""Server-sent events of an engine, turned into what an OpenAI client expects. Pure: bytes in, bytes out.

Work is done on all whole events of a read at once, by searches that run in C; single events are looked at only where
a search hit. The searches are safe on undecoded JSON: inside a JSON string a quote is escaped, so `"usage":` found
unescaped is a key. What most reads are, one token's event in which nothing is to be changed, takes a shorter way and
comes out as the object that went in.
"""

from __future__ import annotations

import re

import msgspec

from gateway.relay.answers import Usage

KEEPALIVE = b": ka\n"  # one newline: a blank line would dispatch an event in some clients
MAX_EVENT_BYTES = 16_000_000

DONE = b"data: [DONE]\n\n"
_ERROR = b'data: {"error"'
_COMPACT_NULL_USAGE = b',"usage":null'
_NULL_USAGE = re.compile(rb',\s*"usage":\s*null')
_SOME_USAGE = re.compile(rb'"usage":\s*\{')
_USAGE_OBJECT = re.compile(rb',\s*"usage":\s*\{(?:[^{}]|\{[^{}]*\})*\}')
_RESPONSES_END = re.compile(rb'"type":\s*"response\.(?:completed|failed|incomplete)"')


class EventTooLong(Exception):
    """An event without an end: not an engine speaking SSE."""


class _Chunk(msgspec.Struct):
    choices: list[msgspec.Raw] = []
    usage: Usage | None = None


class _Response(msgspec.Struct):
    usage: Usage | None = None


class _ResponseEvent(msgspec.Struct):
    response: _Response | None = None


_decode_chunk = msgspec.json.Decoder(_Chunk).decode
_decode_response_event = msgspec.json.Decoder(_ResponseEvent).decode


class EventStream:
    """The events of one chat or completion stream.

    keep_usage: the client asked for usage; otherwise its chunk and its null members are taken out.
    rename: pattern and replacement for the engine's own model name, None where it is the public one.
    """

    __slots__ = ("_keep_usage", "_public_start", "_rename", "_rest", "_start", "done", "error", "events", "usage")

    def __init__(self, keep_usage: bool, rename: tuple[re.Pattern[bytes], bytes] | None) -> None:
        self._keep_usage = keep_usage
        self._rename = rename
        self._start = b""  # of the last event in which the engine's name was looked for, up to the name
        self._public_start = b""  # what stands in its place
        self._rest = b""
        self.done = False  # the engine said that this was all
        self.error: bytes | None = None  # the data of an error event, which ends the stream
        self.events = 0
        self.usage: Usage | None = None

    def feed(self, data: bytes) -> bytes:
        """The events that `data` completes, ready for the client; b"" if none. Raises EventTooLong.

        After an event of error, or the last one, nothing more comes out.
        """
        if not self._rest and data.find(b"\n") == len(data) - 2 and data[-3:] == b"}\n\n":  # one event, of one line
            usage = data.rfind(b'"usage"')
            if usage >= 0 and not self._keep_usage:
                data = data.replace(_COMPACT_NULL_USAGE, b"")
                usage = data.rfind(b'"usage"')
            if usage < 0 and not data.startswith(_ERROR):
                self.events += 1
                return data if self._rename is None else self._renamed(data, self._rename)
        return self._feed(data)

    def _feed(self, data: bytes) -> bytes:
        """The same for any `data`."""
        if self._rest:
            data = self._rest + data
        if data.find(b"\r") >= 0:  # `in` takes twice as long: it tries the bytes as a number first
            data = data.replace(b"\r\n", b"\n")
        if data.endswith(b"\n\n"):
            self._rest = b""
        else:
            last = data.rfind(b"\n\n")
            end = last + 2 if last >= 0 else 0
            data, self._rest = data[:end], data[end:]
            if len(self._rest) > MAX_EVENT_BYTES:
                raise EventTooLong(f"an event of more than {MAX_EVENT_BYTES} bytes")
            if not data:
                return b""
        if data.find(_ERROR) >= 0:
            data = self._until_error(data)
        self.events += data.count(b"\n") >> 1
        found = data.find(b'"usage"')
        if found >= 0:
            before = data.rfind(b"\n\n", 0, found)
            start = before + 2 if before >= 0 else 0
            data = data[:start] + self._account(data[start:])
        if self._rename is not None:
            data = self._rename[0].sub(self._rename[1], data)
        if self._ends(data):
            self.done = True
            self.events -= 1
        return data

    def _renamed(self, event: bytes, rename: tuple[re.Pattern[bytes], bytes]) -> bytes:
        """One event with the public name. Up to it a stream's events begin alike: looked for once, then known."""
        if self._start and event.startswith(self._start):
            return self._public_start + event[len(self._start) :]
        pattern, public = rename
        found = pattern.search(event)
        if found is None:
            return event
        self._start = event[: found.end()]
        self._public_start = pattern.sub(public, self._start)
        return pattern.sub(public, event)

    def _ends(self, data: bytes) -> bool:
        """Whether the last event is the stream's last."""
        return data.endswith(DONE)

    def _until_error(self, data: bytes) -> bytes:
        """The events before the first error; the error's data is set aside."""
        before = data.find(_ERROR)
        while before > 0 and data[before - 1 : before] != b"\n":
            before = data.find(_ERROR, before + 1)
        if before < 0:
            return data
        self.error = data[before + 6 : data.index(b"\n", before)]
        return data[:before]

    def _account(self, data: bytes) -> bytes:
        """Read usage, and take it out where the client did not ask for it. data: whole events."""
        if not self._keep_usage:
            data = _NULL_USAGE.sub(b"", data)
        if not _SOME_USAGE.search(data):
            return data
        return b"".join(
            self._account_event(event + b"\n\n") if b'"usage"' in event else event + b"\n\n"
            for event in data.split(b"\n\n")[:-1]
        )

    def _account_event(self, event: bytes) -> bytes:
        try:
            chunk = _decode_chunk(event[event.index(b"{") :])
        except (msgspec.MsgspecError, ValueError):
            return event  # not a chunk: the client may make of it what it can
        if chunk.usage is None:
            return event
        self.usage = chunk.usage
        if self._keep_usage:
            return event
        return _USAGE_OBJECT.sub(b"", event) if chunk.choices else b""


class ResponsesStream(EventStream):
    """The events of a /v1/responses stream: named, without [DONE], usage within the last one."""

    __slots__ = ()

    def __init__(self, rename: tuple[re.Pattern[bytes], bytes] | None) -> None:
        super().__init__(True, rename)

    def feed(self, data: bytes) -> bytes:
        return self._feed(data)

    def _ends(self, data: bytes) -> bool:
        return _RESPONSES_END.search(data) is not None or data.endswith(DONE)

    def _account_event(self, event: bytes) -> bytes:
        try:
            response = _decode_response_event(event[event.index(b"{") :]).response
        except (msgspec.MsgspecError, ValueError):
            return event
        if response is not None and response.usage is not None:
            self.usage = response.usage
        return event
