"""Logs and answers that a crash has torn, files that expire, and what a request becomes."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

from gateway.errors import InvalidRequest, NotFound, QuotaExceeded
from gateway.tuning import files as module
from gateway.tuning import lines, progress, request
from gateway.tuning.files import Files
from gateway.tuning.store import Objects
from trainer import config as trainer_config


def test_a_log_is_read_by_whole_lines(tmp_path: Path) -> None:
    log = tmp_path / "events.jsonl"
    assert progress.read_log(log, 0) == ([], 0)
    log.write_text('{"step": 1}\n{"st')
    assert progress.read_log(log, 0) == ([{"step": 1}], 12)
    log.write_text('{"step": 1}\n{"step": 2}\n')
    assert progress.read_log(log, 12) == ([{"step": 2}], 24)
    assert progress.read_log(log, 24) == ([], 24)


def test_a_step_that_was_done_again_is_told_once(tmp_path: Path) -> None:
    log = tmp_path / "events.jsonl"
    steps = [(1, 3.0), (2, 2.0), (2, 1.5)]
    log.write_text("".join(json.dumps({"type": "step", "step": step, "loss": loss}) + "\n" for step, loss in steps))
    assert progress.metrics_csv(log).decode().splitlines()[1:] == ["1,3.0,,,", "2,1.5,,,"]


def test_a_torn_answer_is_cut_off(tmp_path: Path) -> None:
    output = tmp_path / "output.jsonl"
    output.write_text('{"custom_id": "a"}\n{"custom_id": "b')
    assert lines.answered(output) == {"a"}
    assert output.read_text() == '{"custom_id": "a"}\n'


def test_lines_for_one_model_go_together(tmp_path: Path) -> None:
    rows = [
        {"custom_id": str(i), "method": "POST", "url": "/v1/completions", "body": {"model": model, "prompt": str(i)}}
        for i, model in enumerate(["b", "a", "b", "a"])
    ]
    file = tmp_path / "input.jsonl"
    file.write_text("\n".join(json.dumps(row) for row in rows))  # the last line without an end
    found, faults = lines.read(file, "/v1/completions")
    assert not faults and [line.custom_id for line in found] == ["1", "3", "0", "2"]
    assert [json.loads(line.body(file))["prompt"] for line in found] == ["1", "3", "0", "2"]


async def test_files_expire_and_strays_go(tmp_path: Path, objects: Objects, monkeypatch: pytest.MonkeyPatch) -> None:
    files = Files(objects, tmp_path / "files", 10**9)
    await files.open()
    staged = tmp_path / "staged"
    staged.write_bytes(b"{}")
    file = await files.add(staged, "a.jsonl", "batch", "", 3600)
    (tmp_path / "files" / "file-stray").touch()
    await files.open()
    assert [path.name for path in (tmp_path / "files").iterdir()] == [file.id]
    assert await files.get(file.id) == file
    monkeypatch.setattr(module.time, "time", lambda: file.created_at + 3600)
    with pytest.raises(NotFound):
        await files.get(file.id)
    await files.delete_expired()
    assert not list((tmp_path / "files").iterdir())
    with pytest.raises(InvalidRequest, match="expires_after"):
        await files.add(tmp_path, "b", "batch", "", 10)


@pytest.mark.parametrize(
    ("fields", "examples", "values"),
    [
        ({}, 5, {"n_epochs": 3, "batch_size": 5, "learning_rate_multiplier": 1.0}),
        ({}, 5000, {"n_epochs": 3, "batch_size": 16, "learning_rate_multiplier": 1.0}),
        ({"hyperparameters": {"batch_size": 2}}, 50, {"n_epochs": 3, "batch_size": 2, "learning_rate_multiplier": 1.0}),
        (
            {"method": {"type": "dpo"}},
            50,
            {"n_epochs": 3, "batch_size": 8, "learning_rate_multiplier": 1.0, "beta": 0.1},
        ),
    ],
)
def test_auto_is_resolved(fields: dict[str, Any], examples: int, values: dict[str, Any]) -> None:
    asked = request.parse({"model": "m", "training_file": "f"} | fields)
    assert request.hyperparameters(asked, examples) == values
    assert request.trainer_config(asked, values, examples)["batch_size"] == values["batch_size"]


@pytest.mark.parametrize("method", ["supervised", "dpo", "reinforcement"])
def test_the_trainer_takes_what_it_is_told(tmp_path: Path, method: str) -> None:
    """Its own schema refuses unknown keys and odd values."""
    settings = {"lora_rank": 4, "lora_alpha": 8, "lora_target": ["q_proj"], "learning_rate": 1e-3, "schedule": "linear"}
    for fields in ({}, {"validation_file": "v", "tunegate": settings}):
        own = {"reinforcement": {"grader": {}}} if method == "reinforcement" else {}
        asked = request.parse({"model": "m", "training_file": "f", "method": {"type": method} | own} | fields)
        config = request.trainer_config(asked, request.hyperparameters(asked, 20), 20)
        paths = {"model": "demo", "dataset": ["a"], "output_dir": str(tmp_path), "seed": 1, "device": "auto"}
        paths |= {"eval_dataset": ["b"]} if asked.validation_file else {}
        paths |= {"reward": ["/grader.json"], "publish_as": "x"} if own else {}
        taken = trainer_config.load(config["method"], None, config | paths)
        assert (taken.save_every, taken.epochs, taken.method) == (3, 3, config["method"])


async def test_a_key_keeps_so_much(tmp_path: Path, objects: Objects) -> None:
    files = Files(objects, tmp_path / "files", limit_bytes=10)
    await files.open()
    staged = tmp_path / "staged"
    staged.write_bytes(b"x" * 6)
    first = await files.upload(staged, "a", "batch", "key-a")
    both = await asyncio.gather(
        *(files.upload(staged, "b", "batch", "key-b") for _ in range(2)), return_exceptions=True
    )
    assert sorted(type(one).__name__ for one in both) == ["File", "QuotaExceeded"]
    with pytest.raises(QuotaExceeded, match="the key key-a keeps"):
        await files.upload(staged, "c", "batch", "key-a")
    assert len(list((tmp_path / "files").iterdir())) == 2
    await files.add(staged, "results", "batch_output", "key-a")  # what the gateway made is not refused
    await files.delete(first.id)
    with pytest.raises(QuotaExceeded):
        await files.check_room("key-a", 5)
    await files.check_room("key-a", 4)


async def test_what_has_expired_takes_no_room(
    tmp_path: Path, objects: Objects, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also while a job trains, and the runner does not come to delete it."""
    files = Files(objects, tmp_path / "files", limit_bytes=10)
    await files.open()
    staged = tmp_path / "staged"
    staged.write_bytes(b"x" * 6)
    first = await files.upload(staged, "a", "batch", "key-a", 3600)
    after_it = float(first.expires_at or 0)
    monkeypatch.setattr(module.time, "time", lambda: after_it)
    second = await files.upload(staged, "b", "batch", "key-a")
    assert [path.name for path in (tmp_path / "files").iterdir()] == [second.id]


def test_names_hold_nothing_odd() -> None:
    assert request.model_name("org/my model", None, "ftjob-0123456789") == "ft:org-my-model:tunegate::01234567"
