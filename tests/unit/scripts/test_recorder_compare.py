"""Recordings compared by shape: what counts as a difference, what does not, and the table."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from backends.emulator.recordings import FOLDER
from scripts.recorder.compare import Difference, compare, table

CHUNK = {"id": "x", "choices": [{"index": 0, "delta": {"content": "Hi"}, "finish_reason": None}]}
LAST = {"id": "x", "choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]}

Planted = Callable[[str, Callable[[dict[str, Any]], None]], list[Difference]]


@pytest.fixture
def planted(tmp_path: Path) -> Planted:
    """Change one recorded case (`file/case`) of vLLM's in a copy, and compare the two."""

    def plant(place: str, change: Callable[[dict[str, Any]], None]) -> list[Difference]:
        name, case = place.split("/")
        content = json.loads((FOLDER / "vllm" / f"{name}.json").read_text())
        for folder in ("a", "b"):
            if folder == "b":
                change(content["cases"][case]["response"])
            (tmp_path / folder).mkdir()
            (tmp_path / folder / f"{name}.json").write_text(json.dumps(content))
        return compare(tmp_path / "a", tmp_path / "b")

    return plant


def response(**fields: Any) -> dict[str, Any]:
    return {"status": 200, "headers": {"content-type": "application/json"}} | fields


def two(folder: Path, a: dict[str, Any], b: dict[str, Any]) -> list[tuple[str, str, str]]:
    """What differs between two answers to one question."""
    for name, answer in (("a", a), ("b", b)):
        (folder / name).mkdir()
        (folder / name / "chat.json").write_text(json.dumps({"cases": {"hi": {"request": {}, "response": answer}}}))
    rows = compare(folder / "a", folder / "b")
    assert {row.place for row in rows} <= {"chat/hi"}
    return [(row.what, row.a, row.b) for row in rows]


@pytest.mark.parametrize("engine", ["vllm", "sglang", "lmdeploy"])
def test_recordings_equal_themselves(engine: str) -> None:
    assert compare(FOLDER / engine, FOLDER / engine) == []


def test_planted_status(planted: Planted) -> None:
    rows = planted("errors/unknown_model", lambda answer: answer.update(status=400))
    assert rows == [Difference("errors/unknown_model", "status", "404", "400")]


def test_planted_key_deep_in_a_stream(planted: Planted) -> None:
    def change(answer: dict[str, Any]) -> None:
        del answer["events"][1]["choices"][0]["token_ids"]

    rows = planted("chat/chat_stream", change)
    what = "keys of event chunk(content).choices[] of one alone"
    assert rows == [Difference("chat/chat_stream", what, "token_ids", "-")]


def test_planted_type(planted: Planted) -> None:
    def change(answer: dict[str, Any]) -> None:
        answer["json"]["usage"] = "none"

    assert planted("chat/chat", change) == [Difference("chat/chat", "type of body.usage", "object", "text")]


def test_planted_metric(planted: Planted) -> None:
    def change(answer: dict[str, Any]) -> None:
        answer["families"]["vllm:new"] = answer["families"].pop("vllm:num_requests_running")

    [row] = planted("metrics/metrics", change)
    assert (row.what, row.a, row.b) == ("metrics of one alone", "vllm:num_requests_running", "vllm:new")


def test_planted_label(planted: Planted) -> None:
    def change(answer: dict[str, Any]) -> None:
        answer["families"]["vllm:num_requests_running"]["samples"] = [["vllm:num_requests_running", {"rank": "0"}]]

    [row] = planted("metrics/metrics", change)
    assert (row.what, row.b) == ("labels of vllm:num_requests_running", "rank")


def test_values_do_not_count(tmp_path: Path) -> None:
    a = response(json={"n": 1, "text": "one", "stop": None, "list": [1, 2, 3], "empty": []}, elapsed_s=1)
    b = response(json={"n": 2.5, "text": "two", "stop": "end", "list": [4], "empty": [{}]}, elapsed_s=2)
    assert two(tmp_path, a, b) == []


def test_an_errors_type_and_code_count(tmp_path: Path) -> None:
    a = response(status=400, json={"error": {"message": "no", "type": "BadRequestError", "code": 400}})
    b = response(status=400, json={"error": {"message": "not so", "type": "invalid", "code": 400}})
    assert two(tmp_path, a, b) == [("error's type", "BadRequestError", "invalid")]


def test_order_of_events(tmp_path: Path) -> None:
    a = response(events=[CHUNK, CHUNK, CHUNK, LAST, "[DONE]"])
    b = response(events=[CHUNK, LAST, {"choices": [], "usage": {}}, "[DONE]"])
    same, other = "chunk(content) > chunk(end) > [DONE]", "chunk(content) > chunk(end) > usage > [DONE]"
    assert two(tmp_path, a, b) == [("order of events", same, other)]


def test_named_events_and_broken_connections(tmp_path: Path) -> None:
    a = response(events=[{"event": "response.created", "data": {}}])
    found = two(tmp_path, a, {"broken": "RemoteDisconnected"})
    assert [row[0] for row in found] == ["status", "content-type", "kind of body"]


def test_what_one_side_lacks(tmp_path: Path) -> None:
    for folder, cases in (("a", {"one": response(text="")}), ("b", {})):
        (tmp_path / folder).mkdir()
        body = {"cases": {name: {"response": answer} for name, answer in cases.items()}}
        (tmp_path / folder / "models.json").write_text(json.dumps(body))
    (tmp_path / "b" / "flags.json").write_text('{"flags": []}')
    rows = compare(tmp_path / "a", tmp_path / "b")
    assert rows == [Difference("flags", "file", "-", "there"), Difference("models/one", "case", "there", "-")]


def test_options_and_exits(tmp_path: Path) -> None:
    for folder, option, code in (("a", "--old", 1), ("b", "--new", None)):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "flags.json").write_text(json.dumps({"flags": [{"names": [option]}]}))
        (tmp_path / folder / "start_port_taken.json").write_text(json.dumps({"exit_code": code, "after_s": 1}))
    rows = compare(tmp_path / "a", tmp_path / "b")
    assert [(row.what, row.a, row.b) for row in rows] == [
        ("options of one alone", "--old", "--new"),
        ("exit status", "1", "None"),
    ]


def test_table_joins_what_differs_alike() -> None:
    rows = [Difference(f"chat/{n}", "status", "200", "400") for n in range(5)]
    lines = table([*rows, Difference("models/one", "case", "there", "-")]).splitlines()
    assert [line.split() for line in lines] == [
        ["what", "A", "B", "where"],
        ["status", "200", "400", "chat/0,", "chat/1,", "chat/2", "and", "2", "more"],
        ["case", "there", "-", "models/one"],
        ["6", "differences", "of", "2", "kinds"],
    ]


def test_command(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "scripts.recorder.compare", str(FOLDER / "vllm"), str(FOLDER / "sglang")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    assert (done.returncode, done.stderr) == (1, "")
    assert "B: " in done.stdout and "differences of" in done.stdout
    refused = subprocess.run([*command[:-1], str(tmp_path)], capture_output=True, text=True, timeout=30, check=False)
    assert refused.returncode == 2 and "holds no recordings" in refused.stderr
