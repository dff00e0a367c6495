"""Streamed chat answers, read whole."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any


def events(lines: Iterable[str]) -> list[dict[str, Any]]:
    """The chunks of a stream, from its lines. Raises ValueError where it has no end, or a chunk is no JSON."""
    data = [line.removeprefix("data: ") for line in lines if line.startswith("data: ")]
    if data[-1:] != ["[DONE]"]:
        raise ValueError(f"the stream ended early: {data[-1:]}")
    return [json.loads(event) for event in data[:-1]]


def text(chunks: Iterable[dict[str, Any]]) -> str:
    """What chunks say together. Raises KeyError for one that is no chunk, such as an error."""
    return "".join(choice["delta"].get("content") or "" for chunk in chunks for choice in chunk["choices"])
