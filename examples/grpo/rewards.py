"""The reward of the example: 0 for an answer without the order's number, else the number's share of the answer."""

from __future__ import annotations

from typing import Any


def short_and_right(completions: list[Any], order: list[str], **_: Any) -> list[float]:
    texts = [messages[-1]["content"].strip() for messages in completions]
    return [len(number) / len(text) if number in text else 0.0 for text, number in zip(texts, order, strict=True)]
