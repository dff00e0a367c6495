"""OpenAI's graders as rewards, and what is refused of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from trainer import graders
from trainer.errors import ConfigError, RewardError, RowError
from trainer.rewards import Answer, make_reward

EXACT: dict[str, Any] = {
    "type": "string_check", "name": "exact", "input": "{{sample.output_text}}", "reference": "{{ item.answer }}",
    "operation": "eq",
}  # fmt: skip
ALIKE: dict[str, Any] = {
    "type": "text_similarity", "name": "alike", "input": "{{sample.output_text}}", "reference": "{{item.answer}}",
    "evaluation_metric": "fuzzy_match",
}  # fmt: skip
BOTH: dict[str, Any] = {
    "type": "multi", "name": "both", "graders": {"exact": EXACT, "alike": ALIKE},
    "calculate_output": "0.5 * exact + max(alike^2, 0.25) / 2 - -1",
}  # fmt: skip


def kept(folder: Path, grader: Any) -> Path:
    file = folder / "grader.json"
    file.write_text(json.dumps(grader))
    return file


@pytest.mark.parametrize(
    ("grader", "answer", "item", "score"),
    [
        (EXACT, "yes", {"answer": "yes"}, 1.0),
        (EXACT, "Yes", {"answer": "yes"}, 0.0),
        (EXACT | {"operation": "ne"}, "no", {"answer": "yes"}, 1.0),
        (EXACT | {"operation": "like"}, "oh yes!", {"answer": "yes"}, 1.0),
        (EXACT | {"operation": "like"}, "oh Yes!", {"answer": "yes"}, 0.0),
        (EXACT | {"operation": "ilike"}, "oh Yes!", {"answer": "yes"}, 1.0),
        (EXACT | {"reference": "[{{item.a.b}}]"}, "[3]", {"a": {"b": 3}}, 1.0),
        (EXACT | {"input": "{{sample.output_json.x}}", "reference": "3"}, '{"x": 3}', {}, 1.0),
        (EXACT | {"input": "{{" + " " * 20_000, "reference": "{{" + " " * 20_000}, "", {}, 1.0),  # at once
        (EXACT | {"input": "{{sample.output_json.x}}", "reference": "3"}, "no JSON", {}, 0.0),
        (ALIKE, "abcd", {"answer": "abef"}, 0.5),
        (BOTH, "abcd", {"answer": "abef"}, 0.5 * 0 + 0.25 / 2 + 1),
        (BOTH, "abcd", {"answer": "abcd"}, 2.0),
    ],
)
def test_scores(tmp_path: Path, grader: Any, answer: str, item: dict[str, Any], score: float) -> None:
    assert graders.read(kept(tmp_path, grader)).score(answer, item) == pytest.approx(score)


@pytest.mark.parametrize(
    ("grader", "words"),
    [
        ({"type": "python", "name": "p", "source": "x"}, "FILE.py:FUNCTION"),
        (BOTH | {"graders": {"a": {"type": "score_model"}}}, "score_model is not offered"),
        (ALIKE | {"evaluation_metric": "bleu"}, "evaluation_metric"),
        (EXACT | {"extra": 1}, "extra"),
        (EXACT | {"input": "{{sample.choices}}"}, "sample.output_text"),
        (BOTH | {"calculate_output": "__import__('os').system('x')"}, "not allowed"),
        (BOTH | {"calculate_output": "exact + nobody"}, "not allowed"),
        (BOTH | {"calculate_output": "exact +"}, "no formula"),
        (BOTH | {"calculate_output": "min(exact)"}, "min is of two numbers or more, given 1"),
        (BOTH | {"calculate_output": "log(exact, 2)"}, "log is of one number, given 2"),
        (BOTH | {"calculate_output": "abs()"}, "abs is of one number, given 0"),
        (EXACT | {"type": []}, "grader"),
        (BOTH | {"calculate_output": "-" * 600 + "exact"}, "at most 500"),
        ([], "grader"),
    ],
)
def test_what_is_refused(tmp_path: Path, grader: Any, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        graders.read(kept(tmp_path, grader))


def test_rows_that_lack_what_is_read(tmp_path: Path) -> None:
    grader = graders.read(kept(tmp_path, BOTH))
    graders.check_item(grader, {"answer": "x"})
    with pytest.raises(RowError, match="`answer` is missing"):
        graders.check_item(grader, {"solution": "x"})


def test_it_runs_in_a_child_process(tmp_path: Path) -> None:
    reward = make_reward(str(kept(tmp_path, BOTH | {"calculate_output": "1 / exact"})), 20)
    try:
        assert reward.name == "both"
        assert reward.score([Answer([], "a", {"answer": "a"})]) == [1.0]
        with pytest.raises(RewardError, match="ZeroDivisionError"):
            reward.score([Answer([], "a", {"answer": "b"})])
    finally:
        reward.close()
