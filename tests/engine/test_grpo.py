"""GRPO by the real trainer on the real engine: versions come and go, and both score tokens alike."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.engine.conftest import ORACLE_PYTHON
from tests.support.gateway import Gateway
from tests.support.wait import eventually

pytestmark = [pytest.mark.engine, pytest.mark.timeout(600)]

REWARD = """
def short(completions, **_):
    return [-len(messages[-1]["content"]) for messages in completions]
"""
SETTINGS = {
    "publish-as": "learner",
    "batch-size": 2,
    "group-size": 4,
    "max-completion-tokens": 8,
    "max-length": 64,
    "max-steps": 3,
    "learning-rate": 1e-3,
    "warmup-ratio": 0,
    "lora-rank": 4,
    "golden-prompts": 0,
}


@pytest.mark.parametrize("served", ["vllm"], indirect=True)
def test_three_steps(served: Gateway, demo_model: Path, tmp_path: Path) -> None:
    (tmp_path / "rewards.py").write_text(REWARD)
    rows = [{"prompt": f"Name a {thing}."} for thing in ("fruit", "river", "metal", "bird")]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    command: list[str | Path] = [ORACLE_PYTHON, "-m", "trainer", "grpo", "--model", demo_model]
    command += ["--gateway-url", served.url, "--dataset", tmp_path / "prompts.jsonl"]
    command += ["--reward", f"{tmp_path / 'rewards.py'}:short"]
    command += ["--output-dir", tmp_path / "run", *(f"--{key}={value}" for key, value in SETTINGS.items())]
    names_before, answer_before = names(served), greedy_text(served)
    versions: set[int] = set()
    with (tmp_path / "log").open("wb") as log:
        trainer = subprocess.Popen(command, stdout=log, stderr=log)
    try:

        def over() -> bool:
            versions.update(current_version(served))
            return trainer.poll() is not None

        eventually(over, 300, every_s=0.1)
    finally:
        trainer.kill()
        status = trainer.wait()
    assert status == 0, (tmp_path / "log").read_text()
    steps = [event for event in events(tmp_path / "run") if event["type"] == "step"]
    # The first step's answers are the base model's; each of the others published what the one before it had learnt.
    assert len(steps) == 3 and versions == {1, 2}
    # Both compute in float32, and the engine saw the ids that the trainer learns from: else they would be far apart.
    assert max(step["sampler_gap"] for step in steps) < 1e-3
    assert names(served) == names_before and greedy_text(served) == answer_before


def names(served: Gateway) -> set[str]:
    with served.client() as http:
        return {model["id"] for model in http.get("/v1/models").raise_for_status().json()["data"]}


def current_version(served: Gateway) -> list[int]:
    """The version that the learner's name stands for, if any."""
    with served.client() as http:
        answer = http.get("/v1/adapters/learner")
    current = answer.json()["current_version"] if answer.status_code == 200 else None
    return [] if current is None else [current]


def greedy_text(served: Gateway) -> str:
    body = {"model": served.model, "messages": [{"role": "user", "content": "Name a fruit."}]}
    with served.client() as http:
        answer = http.post("/v1/chat/completions", json=body | {"max_tokens": 12, "temperature": 0}).raise_for_status()
    return str(answer.json()["choices"][0]["message"]["content"])


def events(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
