"""Made-up embeddings: a unit vector that is a pure function of the text."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from typing import Any

import numpy as np

from backends.emulator.answers import new_id
from backends.emulator.ask import Prompt, completion_prompts
from backends.emulator.recordings import Book, Reply, json_reply
from backends.emulator.settings import Settings

_DEFAULT_SIZE = 576


def embeddings(book: Book, settings: Settings, body: Mapping[str, Any]) -> Reply:
    """The answer to a request that has been checked."""
    answer = book["embeddings/embeddings"].json_copy()
    item = answer["data"][0]
    prompts = completion_prompts(body["input"])
    size = settings.hidden_size or _DEFAULT_SIZE
    as_text = body.get("encoding_format") == "base64"
    answer["data"] = [
        item | {"index": index, "embedding": _vector(prompt, size, as_text)} for index, prompt in enumerate(prompts)
    ]
    tokens = sum(prompt.tokens for prompt in prompts)
    answer["usage"] |= {"prompt_tokens": tokens, "total_tokens": tokens}
    if "id" in answer:
        answer["id"] = new_id(answer["id"])
    answer["model"] = settings.model_path if answer["model"] == "{model_path}" else settings.served_name
    return json_reply(200, answer)


def _vector(prompt: Prompt, size: int, as_text: bool) -> Any:
    seed = [size, *prompt.text.encode()]
    values = np.random.default_rng(seed).standard_normal(size).astype(np.float32)
    values /= np.linalg.norm(values)
    return base64.b64encode(values.tobytes()).decode() if as_text else [float(value) for value in values]
