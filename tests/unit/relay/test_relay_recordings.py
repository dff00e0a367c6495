"""What the real engines were recorded to answer, through the relay's pure parts."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import backends.emulator
from gateway.relay.answers import engine_error, usage_of
from gateway.relay.app import ENDPOINTS
from gateway.relay.route import Candidate, Engine
from gateway.relay.sse import EventStream, ResponsesStream

RECORDINGS = Path(backends.emulator.__file__).parent / "recordings"
INFERENCE = {path.decode() for path in ENDPOINTS}


def cases() -> list[tuple[str, Any, Any]]:
    """(name, request, response) of every recorded inference request, of all engines."""
    found = []
    for file in sorted(RECORDINGS.glob("*/*.json")):
        for name, case in json.loads(file.read_text()).get("cases", {}).items():
            if case["request"].get("path") in INFERENCE:
                found.append((f"{file.parent.name}/{file.stem}/{name}", case["request"], case["response"]))
    return found


CASES = cases()
# `hang_up`: the recorder left in the middle. `deadly`: a stream of an engine that had died.
STREAMS = [case for case in CASES if case[2].get("events") and "hang_up" not in case[0] and "deadly" not in case[0]]
ERRORS = [case for case in CASES if case[2].get("status", 0) >= 400]
PLAIN = [case for case in CASES if case[2].get("status") == 200 and case[2].get("json") is not None]


def wire(response: Any) -> bytes:
    """The recorded events as the engine wrote them."""
    separators = (",", ":") if response.get("compact", True) else (", ", ": ")
    end = "\r\n" if response.get("line_end") == "crlf" else "\n"
    text = ""
    for event in response["events"]:
        if isinstance(event, dict) and set(event) == {"event", "data"}:
            text += f"event: {event['event']}{end}"
            event = event["data"]
        data = event if isinstance(event, str) else json.dumps(event, separators=separators)
        text += f"data: {data}{end}{end}"
    return text.encode()


def ids(cases: list[tuple[str, Any, Any]]) -> dict[str, Any]:
    return {"argvalues": cases, "ids": [case[0] for case in cases]}


def test_there_are_recordings_of_every_engine() -> None:
    assert {name.split("/")[0] for name, _, _ in STREAMS} == {"vllm", "sglang", "lmdeploy"}


@pytest.mark.parametrize("case", **ids(STREAMS))
def test_streams(case: tuple[str, Any, Any]) -> None:
    _, request, response = case
    data = wire(response)
    rename = (re.compile(rb'"model":\s*"base"'), b'"model":"public"')
    if request["path"] == "/v1/responses":
        stream: EventStream = ResponsesStream(rename)
        out = stream.feed(data)
        assert stream.usage is not None
    else:
        asked = bool((request["body"].get("stream_options") or {}).get("include_usage"))
        stream = EventStream(asked, rename)
        out = stream.feed(data)
        assert (stream.usage is not None) == asked
        if asked:
            assert out.count(b"\n\n") == len(response["events"])
        else:
            assert b'"usage"' not in out
    assert stream.done
    assert b'"base"' not in out
    for cut in range(1, len(data), 97):
        again = type(stream).__new__(type(stream))
        for name in EventStream.__slots__:
            setattr(again, name, getattr(stream, name))
        again._rest, again.done = b"", False
        assert again.feed(data[:cut]) + again.feed(data[cut:]) == out


@pytest.mark.parametrize("case", **ids(ERRORS))
def test_errors(case: tuple[str, Any, Any]) -> None:
    name, request, response = case
    body = (
        json.dumps(response["json"]).encode()
        if response.get("json") is not None
        else (response.get("text") or "").encode()
    )
    engine = Engine("r0", 0, name.split("/")[0], SimpleNamespace(), b"")  # type: ignore[arg-type]
    error = engine_error(
        response["status"], body, request["path"].encode(), "demo", Candidate(engine, "base", b"", None)
    )
    shown = json.loads(error.body())["error"]
    assert set(shown) == {"message", "type", "param", "code"}
    assert shown["message"]
    assert error.status not in (401, 403, 422)
    for leak in ('File "', "site-packages", "{'type'", "Traceback"):
        assert leak not in shown["message"]


@pytest.mark.parametrize("case", **ids(PLAIN))
def test_usage_of_plain_answers(case: tuple[str, Any, Any]) -> None:
    _, request, response = case
    usage = usage_of(json.dumps(response["json"]).encode())
    assert (usage is None) == ("tokenize" in request["path"])
