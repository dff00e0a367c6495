"""The reward of the example: the right number and nothing else is worth 1, any bare number 0.3."""

from __future__ import annotations

from typing import Any


def bare_sum(completions: list[Any], sum: list[int], **_: Any) -> list[float]:
    texts = [messages[-1]["content"].strip() for messages in completions]
    return [
        1.0 if text == str(right) else 0.3 if text.isdigit() else 0.0 for text, right in zip(texts, sum, strict=True)
    ]
