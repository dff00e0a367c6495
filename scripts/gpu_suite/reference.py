"""Answers held against what transformers and peft answer, as far as those are sure: see torch_side.py."""

from __future__ import annotations

from typing import Any

import openai

from scripts.gpu_suite.serving import greedy

Expected = dict[str, dict[str, dict[str, Any]]]  # "base" or adapter -> prompt -> answer


def agrees(text: str, answer: dict[str, Any]) -> bool:
    """Whether a text begins with what the reference is sure of: engines may differ in what comes after."""
    return bool(text == answer["text"] if answer["all_sure"] else text.startswith(answer["sure"]))


def as_reference(client: openai.OpenAI, model: str, answers: dict[str, dict[str, Any]]) -> int:
    """How many tokens the reference is sure of in all. Raises AssertionError unless every answer agrees."""
    wrong = []
    for prompt, answer in answers.items():
        got = greedy(client, model, prompt)
        if not agrees(got, answer):
            wrong.append(f"{prompt!r}: {got!r}, the reference is sure of {answer['sure']!r}")
    assert not wrong, "; ".join(wrong)
    return sum(answer["sure_tokens"] for answer in answers.values())
