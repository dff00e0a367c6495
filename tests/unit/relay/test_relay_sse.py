"""The event stream as a pure function of bytes, however they are cut."""

from __future__ import annotations

import json
import re

import pytest
from scripted_upstream import DONE, event, token, usage

from gateway.relay import sse
from gateway.relay.sse import EventStream, EventTooLong, ResponsesStream

SPACED_NULL = b'data: {"id": "x", "model": "demo", "choices": [{"index": 0}], "usage": null}\n\n'
RENAME = (re.compile(rb'"model":\s*"a-0123456789ab"'), b'"model":"french"')


def null_usage(text: str) -> bytes:
    return token(text).replace(b"}\n\n", b',"usage":null}\n\n')


def run(
    data: bytes, keep_usage: bool = False, cut: int | None = None, rename: object = None
) -> tuple[bytes, EventStream]:
    stream = EventStream(keep_usage, rename)  # type: ignore[arg-type]
    pieces = [data] if cut is None else [data[:cut], data[cut:]]
    return b"".join(stream.feed(piece) for piece in pieces), stream


TRICKY = token('a "quoted" ,"usage":null and "usage":{"prompt_tokens":9} and\n\ndata: [DONE]\n\n and {"error"')

CASES = {
    "plain": (token("a") + token("b") + usage(5, 7) + DONE, token("a") + token("b") + DONE),
    "nulls": (null_usage("a") + null_usage("b") + usage(5, 7) + DONE, token("a") + token("b") + DONE),
    "spaced nulls": (
        SPACED_NULL + usage(5, 7).replace(b'"usage":', b'"usage": ') + DONE,
        SPACED_NULL.replace(b', "usage": null', b"") + DONE,
    ),
    "tricky text": (TRICKY + usage(5, 7) + DONE, TRICKY + DONE),
    "crlf": ((token("a") + usage(5, 7) + DONE).replace(b"\n", b"\r\n"), token("a") + DONE),
    "comments": (b": ping\n\n" + token("a") + usage(5, 7) + DONE, b": ping\n\n" + token("a") + DONE),
    "usage on the last token": (
        token("a")[:-3]
        + b',"usage":{"prompt_tokens":5,"completion_tokens":7,"prompt_tokens_details":{"x":1}}}\n\n'
        + DONE,
        token("a") + DONE,
    ),
    "rename": (
        token("a", "a-0123456789ab") + usage(5, 7, "a-0123456789ab") + DONE,
        token("a", "french") + DONE,
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_cut_anywhere_the_client_sees_the_same(name: str) -> None:
    data, expected = CASES[name]
    for cut in [None, *range(1, len(data))]:
        out, stream = run(data, cut=cut, rename=RENAME)
        assert out == expected, cut
        assert stream.done
        assert stream.usage is not None
        assert (stream.usage.prompt, stream.usage.completion) == (5, 7)
        assert stream.error is None


def test_byte_by_byte() -> None:
    data, expected = CASES["nulls"]
    stream = EventStream(False, None)
    assert b"".join(stream.feed(bytes([byte])) for byte in data) == expected


@pytest.mark.parametrize("name", ["plain", "nulls", "tricky text"])
def test_nothing_is_taken_from_a_client_that_asked(name: str) -> None:
    data, _ = CASES[name]
    for cut in [None, *range(1, len(data))]:
        out, stream = run(data, keep_usage=True, cut=cut)
        assert out == data
        assert stream.usage is not None
        assert stream.usage.completion == 7


def test_the_text_that_comes_out_is_whole_events() -> None:
    data = token("a") + token("b") + token("c")
    for cut in range(1, len(data)):
        stream = EventStream(False, None)
        for out in (stream.feed(data[:cut]), stream.feed(data[cut:])):
            assert out == b"" or out.endswith(b"\n\n")
            for part in out.split(b"\n\n")[:-1]:
                json.loads(part.removeprefix(b"data: "))


def test_an_error_ends_the_stream_and_keeps_what_came_before() -> None:
    data = token("a") + b'data: {"error": {"message": "no"}}\n\n' + token("b") + DONE
    for cut in [None, *range(1, len(data))]:
        stream = EventStream(False, None)
        out = b""
        for piece in [data] if cut is None else [data[:cut], data[cut:]]:
            if stream.error is None:
                out += stream.feed(piece)
        assert out == token("a"), cut
        assert stream.error == b'{"error": {"message": "no"}}'
        assert not stream.done


def test_the_word_error_in_a_text_is_no_error() -> None:
    text = event(choices=[{"index": 0, "delta": {"content": 'data: {"error": 1}'}}])
    out, stream = run(text + DONE)
    assert out == text + DONE
    assert stream.error is None


def test_events_are_counted_for_streams_cut_short() -> None:
    _, stream = run(token("a") + token("b") + token("c")[:20])
    assert (stream.events, stream.usage, stream.done) == (2, None, False)
    _, stream = run(token("a") + DONE)
    assert stream.events == 1


def test_an_event_without_end_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sse, "MAX_EVENT_BYTES", 1000)
    stream = EventStream(False, None)
    stream.feed(b"data: " + b"x" * 900)
    with pytest.raises(EventTooLong):
        stream.feed(b"x" * 200)


def test_renaming_leaves_text_alone() -> None:
    said = token('my "model":"a-0123456789ab" is', "a-0123456789ab")
    out, _ = run(said, rename=RENAME)
    assert json.loads(out[6:])["model"] == "french"
    assert json.loads(out[6:])["choices"][0]["delta"]["content"] == 'my "model":"a-0123456789ab" is'


def test_responses_end_with_their_last_event() -> None:
    created = b"event: response.created\n" + event(type="response.created", response={"model": "a-0123456789ab"})
    completed = b"event: response.completed\n" + event(
        type="response.completed",
        response={"model": "a-0123456789ab", "usage": {"input_tokens": 4, "output_tokens": 6, "total_tokens": 10}},
    )
    data = created + completed
    for cut in range(1, len(data)):
        stream = ResponsesStream(RENAME)
        out = stream.feed(data[:cut]) + stream.feed(data[cut:])
        assert out == data.replace(b"a-0123456789ab", b"french")
        assert stream.done
        assert stream.usage is not None
        assert (stream.usage.prompt, stream.usage.completion) == (4, 6)


def test_the_keepalive_dispatches_nothing() -> None:
    assert sse.KEEPALIVE.startswith(b":")
    assert sse.KEEPALIVE.count(b"\n") == 1
