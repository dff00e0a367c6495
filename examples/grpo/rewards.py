"""The reward of the example: half for the right number and nothing else, half by the share of digits in the answer."""

from __future__ import annotations

from typing import Any


def bare_sum(completions: list[Any], sum: list[int], **_: Any) -> list[float]:
    texts = [messages[-1]["content"].strip() for messages in completions]
    return [
        0.5 * (text == str(right)) + 0.5 * len([c for c in text if c.isdigit()]) / max(1, len(text))
        for text, right in zip(texts, sum, strict=True)
    ]
