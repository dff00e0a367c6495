"""Every recorded request, put to the emulator: the answer has the recorded status, content type and shape.

What a model says differs, and with it texts, counts and how many events a stream has; nothing else may.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from backends.emulator.recordings import Book
from backends.process import free_port
from scripts.recorder.adapters import write_all
from scripts.recorder.capture import ask
from scripts.recorder.cases import Case
from scripts.recorder.setups import KEY, SETUPS, Setup
from tests.support.checkpoints import write_checkpoint
from tests.support.emulator import launch
from tests.support.peft_files import Shapes
from tests.support.wait import eventually

RECORDED_WITH = Shapes(hidden=576, layers=1, heads=9, kv_heads=3, intermediate=1536, head_dim=64)
# Groups that an emulator does not play.
LEFT_OUT = {"hang_up"}
# Cases whose answer depends on what the model says, or on words that only the engine's own parser finds.
EXCEPTIONS = {
    "completions/completion_echo_logprobs",  # vLLM adds `prompt_logprobs`, which nobody reads
}

STARTS = [(engine, setup) for engine, setups in SETUPS.items() for setup in setups if setup.groups]


@pytest.fixture(scope="module")
def folders() -> Iterator[tuple[Path, Path]]:
    """(a checkpoint of the recorded shapes, the recorded adapters)"""
    with tempfile.TemporaryDirectory(prefix="tunegate-replay-") as folder:
        model = write_checkpoint(Path(folder) / "model", RECORDED_WITH, {"max_position_embeddings": 8192})
        adapters = Path(folder) / "adapters"
        write_all(adapters, model)
        yield model, adapters


@pytest.mark.parametrize(("engine", "setup"), STARTS, ids=[f"{engine}-{setup.name}" for engine, setup in STARTS])
def test_replay(engine: str, setup: Setup, folders: tuple[Path, Path], tmp_path: Path) -> None:
    book = Book.load(engine)
    model, adapters = folders
    places = {"adapters": str(adapters), "model_path": str(model), "port": str(free_port()), "key": KEY}
    argv = list(setup.args)
    for name, value in places.items():
        argv = [word.replace(f"{{{name}}}", value) for word in argv]
    url = f"http://127.0.0.1:{places['port']}"
    process = launch(engine, argv, tmp_path / "log", {"health_ms": 0, "health_lag_s": 6}, dict(setup.env))
    wrong: list[str] = []
    try:
        ready = Case("ready", "/emulator", method="GET")
        eventually(lambda: "status" in ask(url, ready, "", {})["response"] or process.poll() is not None, 20)
        assert process.poll() is None, (tmp_path / "log").read_text()
        for group, cases in setup.groups.items():
            if group in LEFT_OUT:
                continue
            for case in cases:
                name = f"{group}/{case.name}"
                if name not in book.cases:
                    continue
                answer = ask(url, replace(case, wait_s=min(case.wait_s, 4)), setup.key, places)["response"]
                wrong += [f"{name}: {fault}" for fault in differences(book, answer, name)]
    finally:
        process.kill()
        process.wait()
    assert not wrong, "\n".join(wrong)


def differences(book: Book, answer: dict[str, Any], name: str) -> Iterator[str]:
    """What tells an emulator's answer from the recorded one."""
    recorded = book[name]
    if name in EXCEPTIONS:
        return
    if (recorded.broken is None) != ("broken" not in answer):
        yield f"recorded broken {recorded.broken!r}, now {answer.get('broken')!r}"
        return
    if recorded.broken is not None:
        return
    if recorded.status != answer["status"]:
        yield f"recorded status {recorded.status}, now {answer['status']}: {str(answer.get('json'))[:300]}"
        return
    for header in ("content-type", "allow"):
        if recorded.headers.get(header) != answer["headers"].get(header):
            yield f"recorded {header} {recorded.headers.get(header)!r}, now {answer['headers'].get(header)!r}"
    if recorded.text is not None and recorded.text != answer.get("text"):
        yield f"recorded text {recorded.text!r}, now {answer.get('text')!r}"
    if recorded.refused and recorded.json is not None:
        expected, given = (re.sub(r"\d+", "#", str(value)) for value in (recorded.json, answer["json"]))
        if expected != given:
            yield f"recorded {expected}\n   now {given}"
    elif recorded.json is not None:
        yield from unlike(recorded.json, answer["json"], "")
        if recorded.compact != answer["compact"]:
            yield "JSON is spaced otherwise"
    if recorded.events is not None:
        known = [event for other in book.cases.values() for event in other.response.events or ()]
        yield from unlike_streams(recorded.events, answer["events"], {str(shape(event)) for event in known})
    if recorded.families is not None and name == "metrics/metrics":
        gone = {key for key in recorded.families if ":" in key} - set(answer["families"])
        if gone:
            yield f"metrics are missing: {sorted(gone)}"


# What is null or a value according to how a choice ended.
_OFTEN_NULL = {"stop_reason", "matched_stop", "finish_reason", "content", "id"}


def unlike(expected: Any, given: Any, place: str) -> Iterator[str]:
    """Where two JSON values differ in keys, their order, or types."""
    key = place.rsplit(".", 1)[-1]
    if key == "matched_stop" or (key in _OFTEN_NULL and (expected is None or given is None)):
        return
    if isinstance(expected, dict) and isinstance(given, dict):
        if not place.endswith("top_logprobs[]") and list(expected) != list(given):
            yield f"{place or 'body'}: recorded keys {list(expected)}, now {list(given)}"
            return
        for key in expected:
            if key in given:
                yield from unlike(expected[key], given[key], f"{place}.{key}")
    elif isinstance(expected, list) and isinstance(given, list):
        if expected and given:
            yield from unlike(expected[0], given[0], f"{place}[]")
        elif bool(expected) != bool(given) and "top_logprobs" not in place:
            yield f"{place}: recorded {len(expected)} items, now {len(given)}"
    elif kind(expected) != kind(given):
        yield f"{place}: recorded {expected!r}, now {given!r}"


def kind(value: Any) -> str:
    """A JSON value's type; integers and fractions are one."""
    return "number" if isinstance(value, int | float) and not isinstance(value, bool) else type(value).__name__


def unlike_streams(expected: list[Any], given: list[Any], known: set[str]) -> Iterator[str]:
    """Streams are alike when they begin and end alike, and no event has a shape that the engine never showed."""
    if (expected[-1:] == ["[DONE]"]) != (given[-1:] == ["[DONE]"]):
        yield f"recorded end {expected[-1:]}, now {given[-1:]}"
    for event in given:
        if str(shape(event)) not in known:
            yield f"an event like none that was recorded: {event}"
            return
    for place in (0, -2):
        if len(given) > 1 and len(expected) > 1 and str(shape(given[place])) != str(shape(expected[place])):
            yield f"event {place}: recorded {expected[place]}\n   now {given[place]}"


def shape(value: Any, key: str = "") -> Any:
    """A value reduced to keys and types."""
    if isinstance(value, dict):
        return {name: shape(item, name) for name, item in value.items()}
    if isinstance(value, list):
        return [shape(value[0])] if value and not (key == "top_logprobs" and "token" not in value[0]) else []
    return "any" if key in _OFTEN_NULL else kind(value)
