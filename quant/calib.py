"""Calibration text: sequences of equal length, from the bundled set or from the user's JSONL."""

from __future__ import annotations

import gzip
import hashlib
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quant.errors import BadCalibration, BadCheckpoint

BUNDLED = Path(__file__).parent / "texts.jsonl.gz"


def read_records(path: Path | None) -> Iterator[dict[str, Any]]:
    """Records of a JSONL file, or the bundled one: each has `messages` (a chat) or `text`, itself or in its `body`.

    Raises BadCalibration.
    """
    source = path or BUNDLED
    with gzip.open(source) if path is None else source.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                record = json.loads(line.decode())
            except ValueError as error:
                raise BadCalibration(f"{source} line {number} is not JSON ({error})") from error
            if isinstance(record, dict) and isinstance(record.get("body"), dict):
                record = record["body"]  # a line of a batch file, or of a log of requests
            if not isinstance(record, dict) or not ("messages" in record or isinstance(record.get("text"), str)):
                raise BadCalibration(f'{source} line {number}: expected {{"messages": [...]}} or {{"text": "..."}}')
            yield record


def tokenizer_of(directory: Path) -> Any:
    """The tokenizer of a checkpoint. Raises BadCheckpoint."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(directory)
    except (OSError, ValueError) as error:
        raise BadCheckpoint(f"{directory} holds no tokenizer that can be read: {str(error).splitlines()[0]}") from error


def render(record: dict[str, Any], tokenizer: Any) -> list[int]:
    """Token ids of one record: chats through the model's own template, texts as they are. Raises BadCalibration."""
    if "messages" not in record:
        return list(tokenizer(record["text"])["input_ids"])
    from jinja2 import TemplateError

    if not tokenizer.chat_template:
        raise BadCalibration("the calibration file holds chats, but the model has no chat template: give it texts")
    try:
        text = tokenizer.apply_chat_template(record["messages"], tools=record.get("tools"), tokenize=False)
    except (TemplateError, TypeError, ValueError) as error:
        beginning = str(record["messages"])[:80]
        raise BadCalibration(
            f"a chat of the calibration file does not go through the model's chat template ({error}): {beginning}"
        ) from error
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def calibration_tokens(directory: Path, path: Path | None, samples: int, length_tokens: int, seed: int) -> Tensor:
    """Up to `samples` sequences of `length_tokens` ids, [B, T]: records in an order drawn by `seed`, joined and cut.

    A file too small for one sequence gives one shorter sequence. Raises BadCalibration, BadCheckpoint.
    """
    tokenizer = tokenizer_of(directory)
    records = list(read_records(path))
    random.Random(seed).shuffle(records)  # noqa: S311 - a reproducible order, not a secret
    ids: list[int] = []
    for record in records:
        if len(ids) >= samples * length_tokens:
            break
        ids += render(record, tokenizer)
        if tokenizer.eos_token_id is not None and "text" in record:
            ids.append(tokenizer.eos_token_id)
    if len(ids) < 2:
        raise BadCalibration(f"{path or BUNDLED} holds {len(ids)} tokens: nothing to calibrate with")
    return cut(ids, samples, length_tokens)


def cut(ids: list[int], samples: int, length_tokens: int) -> Tensor:
    """Up to `samples` equal sequences [B, T] from the start of one run of ids."""
    length_tokens = min(length_tokens, len(ids))
    count = min(samples, len(ids) // length_tokens)
    return torch.tensor(ids[: count * length_tokens]).view(count, length_tokens)


def fingerprint(tokens_BT: Tensor) -> str:
    """Identifies calibration tokens in a job."""
    return hashlib.sha256(tokens_BT.numpy().tobytes()).hexdigest()[:16]
