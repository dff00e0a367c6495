"""GRPO against a gateway that really samples: the reward rises, versions follow the steps, faults have messages."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="needs torch")

from tests.trainer.live_gateway import LiveGateway  # noqa: E402
from tests.trainer.models import write_jsonl  # noqa: E402
from trainer import config, losses, rollout, run  # noqa: E402
from trainer.errors import RewardError, RolloutError  # noqa: E402
from trainer.events import curve, read_events  # noqa: E402
from trainer.loop import Ending  # noqa: E402
from trainer.rewards import Answer, make_reward  # noqa: E402

REWARDS = """
import os, time

def letters(prompts, completions, wanted, **columns):
    assert len(prompts) == len(completions) == len(wanted)
    assert "TUNEGATE_API_KEY" not in os.environ
    texts = [parts[-1]["content"] for parts in completions]
    return [sum(a <= character <= b for character in text) / max(1, len(text))
            for text, (a, b) in zip(texts, wanted)]

def flat(completions, **columns):
    return [0.0] * len(completions)

def slow(completions, **columns):
    time.sleep(60)

def broken(completions, **columns):
    raise ValueError("no such column")

def few(completions, **columns):
    print("this goes to standard error")
    return [1.0]
"""


@pytest.fixture
def plugin(tmp_path: Path) -> Path:
    file = tmp_path / "my_rewards.py"
    file.write_text(REWARDS)
    return file


@pytest.fixture
def gateway(checkpoint: Path, tmp_path: Path) -> Iterator[LiveGateway]:
    live = LiveGateway(checkpoint, tmp_path / "served")
    yield live
    live.close()


@pytest.fixture
def settings(checkpoint: Path, tmp_path: Path, plugin: Path, gateway: LiveGateway) -> dict[str, Any]:
    rows = [{"prompt": f"say {word}", "wanted": "az"} for word in ("abc", "hello", "yes", "code")]
    return {
        "model": str(checkpoint),
        "device": "cpu",
        "gateway_url": gateway.url,
        "dataset": [write_jsonl(tmp_path / "prompts.jsonl", rows)],
        "output_dir": tmp_path / "run",
        "batch_size": 2,
        "group_size": 8,
        "max_completion_tokens": 4,
        "max_length": 64,
        "max_steps": 8,
        "learning_rate": 3e-2,
        "schedule": "constant",
        "warmup_ratio": 0.0,
        "lora_rank": 8,
        "reward": [f"{plugin}:letters"],
    }


@pytest.mark.parametrize("ahead", [False, True])
def test_the_reward_rises(
    settings: dict[str, Any], gateway: LiveGateway, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, ahead: bool
) -> None:
    monkeypatch.setenv("TUNEGATE_API_KEY", "a-secret")
    gateway.refuse_next = 2
    # Answers that are a step old ask for smaller steps.
    slower = {"rollout_ahead": True, "max_steps": 12, "learning_rate": 2e-2} if ahead else {}
    changes = {"eval_dataset": settings["dataset"], **slower}
    assert run.start(config.load("grpo", None, settings | changes)) is Ending.FINISHED
    events = tmp_path / "run" / "events.jsonl"
    rewards = list(curve(events, field="reward").values())
    assert sum(rewards[-4:]) > sum(rewards[:4]) + (0.3 if ahead else 1.0), rewards
    evaluated = [event["reward"] for event in read_events(events) if event["type"] == "eval"]
    assert evaluated[-1] > max(0.7, evaluated[0])
    # The checkpoint's own generation settings would sample from another distribution than the one that is trained.
    assert all(body["top_k"] == -1 and body["repetition_penalty"] == 1.0 for body in gateway.asked)
    # Every answer came from the version that its step published; old versions and the name are gone.
    assert gateway.used[0] == "base" and set(gateway.used) - {"base"} <= set(gateway.published)
    assert gateway.deleted[-1] == "grpo-run"
    gaps = list(curve(events, field="sampler_gap").values())
    if ahead:
        assert max(gaps) > 1e-3  # the sampler is a step behind, and its own log-probabilities correct for it
    else:
        assert max(gaps) < 1e-4  # the same weights: trainer and sampler agree on every token
    assert "a-secret" not in (tmp_path / "run" / "config.yaml").read_text()


def test_steps_that_teach_nothing(settings: dict[str, Any], plugin: Path, tmp_path: Path) -> None:
    """Equal rewards within every group: no advantage, no row to learn from, and the run goes on."""
    changes = {"reward": [f"{plugin}:flat"], "max_steps": 2, "group_size": 2}
    assert run.start(config.load("grpo", None, settings | changes)) is Ending.FINISHED
    steps = [event for event in read_events(tmp_path / "run" / "events.jsonl") if event["type"] == "step"]
    assert [(step["tokens"], step["without_advantage"]) for step in steps] == [(0, 1.0)] * 2


def test_another_chat_template_at_the_gateway_is_noticed(settings: dict[str, Any], gateway: LiveGateway) -> None:
    gateway.tokenizer.chat_template = "{{ messages[0].content }}"
    with pytest.raises(RolloutError, match="other token ids than the trainer"):
        run.start(config.load("grpo", None, settings))


def test_a_gateway_that_is_not_there(settings: dict[str, Any]) -> None:
    with pytest.raises(RolloutError, match=r"the gateway at http://127\.0\.0\.1:9 did not answer"):
        run.start(config.load("grpo", None, settings | {"gateway_url": "http://127.0.0.1:9"}))


def test_a_gateway_that_has_moved(settings: dict[str, Any], gateway: LiveGateway, tmp_path: Path) -> None:
    """A run that began with another address goes on where the gateway is now."""
    with pytest.raises(RolloutError, match="did not answer"):
        run.start(config.load("grpo", None, settings | {"gateway_url": "http://127.0.0.1:9", "max_steps": 1}))
    assert run.resume(tmp_path / "run", gateway.url) is Ending.FINISHED
    assert gateway.asked


@pytest.mark.parametrize(
    ("function", "timeout_s", "message"),
    [
        ("slow", 0.5, "no answer within 0.5 s"),
        ("broken", 30, "ValueError: no such column"),
        ("few", 30, "must return a list of 2 numbers"),
        ("absent", 30, "has no attribute 'absent'"),
    ],
)
def test_plugins_that_fail(plugin: Path, function: str, timeout_s: float, message: str) -> None:
    reward = make_reward(f"{plugin}:{function}", timeout_s)
    answers = [Answer([{"role": "user", "content": "?"}], "text", {})] * 2
    try:
        with pytest.raises(RewardError, match=message):
            reward.score(answers)
    finally:
        reward.close()


def test_one_plugin_serves_two_threads(plugin: Path) -> None:
    """Answers sampled ahead are scored beside an evaluation: each caller gets its own scores."""
    reward = make_reward(f"{plugin}:letters", 60.0)
    texts = ["abc", "123", "a1", ""]
    wanted = {"wanted": "az"}
    try:
        with ThreadPoolExecutor(4) as threads:
            calls = [
                threads.submit(reward.score, [Answer([{"role": "user", "content": "?"}], text, wanted)] * (i % 5 + 1))
                for i, text in enumerate(texts * 5)
            ]
        expected = [[share] * (i % 5 + 1) for i, share in enumerate([1.0, 0.0, 0.5, 0.0] * 5)]
        assert [call.result() for call in calls] == expected
    finally:
        reward.close()


def test_format_reward() -> None:
    def score(text: str) -> float:
        return make_reward("format", 1.0).score([Answer([], text, {})])[0]

    assert score("<think>so</think>\n<answer>4</answer>") == 1.0
    assert score("<answer>4</answer>") == 0.0


def test_accuracy_reward() -> None:
    pytest.importorskip("math_verify", reason="needs math-verify")
    reward = make_reward("accuracy", 60.0)
    texts = ["It is $\\frac{1}{2}$.", "It is 0.25", "no idea", "\\boxed{0.5}"]
    answers = [Answer([], text, {"solution": "0.5"}) for text in texts]
    try:
        assert reward.score(answers) == [1.0, 0.0, 0.0, 1.0]
    finally:
        reward.close()


def test_advantages_are_relative_to_the_group() -> None:
    import numpy as np

    empty = np.zeros(0)
    group = [rollout.Rollout(empty, empty, empty, (reward,), reward, True) for reward in (0.0, 0.0, 1.0, 3.0)]
    scaled = [one.advantage for one in rollout.with_advantages(group, scale=True)]
    plain = [one.advantage for one in rollout.with_advantages(group, scale=False)]
    assert plain == [-1.0, -1.0, 0.0, 2.0]
    assert scaled == pytest.approx([value / (2**0.5 + 1e-4) for value in plain])
    same = [one.advantage for one in rollout.with_advantages(group[:2], scale=True)]
    assert same == [0.0, 0.0]


def test_clipping_stops_the_gradient_only_where_it_would_go_on() -> None:
    logprobs = torch.tensor([-1.0, -1.0, -1.0, -1.0], requires_grad=True)
    sampled = torch.tensor([-2.0, -2.0, -0.5, -0.5])
    advantage = torch.tensor([1.0, -1.0, 1.0, -1.0])
    policy = losses.clipped_policy(logprobs, sampled, advantage, clip_low=0.2, clip_high=0.2)
    policy.loss_K.sum().backward()
    assert policy.clipped_K.tolist() == [1.0, 0.0, 0.0, 1.0]
    assert [value == 0 for value in logprobs.grad.tolist()] == [True, False, False, True]
