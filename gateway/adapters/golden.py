"""Golden prompts of an adapter: what its trainer saw it answer, so that every replica can be held against it.

They stand in manifest.json under `golden`: for each prompt its token ids, the ids of the greedy answer, and the
answer's log-probabilities with the adapter and (`base_logprobs`) without it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import msgspec

from gateway.adapters.manifest import json_object
from gateway.adapters.package import MANIFEST
from gateway.errors import InvalidRequest

PROMPTS_USED = 8  # of those that a manifest holds: every load on every replica asks them
_PROMPT_TOKENS = 4096
_ANSWER_TOKENS = 256


class Golden(msgspec.Struct, frozen=True):
    """One prompt and its greedy answer, by token. Log-probabilities are natural logarithms."""

    prompt_token_ids: list[int]
    token_ids: list[int]
    logprobs: list[float]
    base_logprobs: list[float] | None = None  # of the same tokens, by the base alone

    def __post_init__(self) -> None:
        answer = len(self.token_ids)
        if not 1 <= len(self.prompt_token_ids) <= _PROMPT_TOKENS or not 1 <= answer <= _ANSWER_TOKENS:
            raise ValueError(f"a prompt has 1 to {_PROMPT_TOKENS} token ids, its answer 1 to {_ANSWER_TOKENS}")
        if any(len(given) != answer for given in (self.logprobs, self.base_logprobs) if given is not None):
            raise ValueError("each token of an answer needs its logprob")
        if min(*self.prompt_token_ids, *self.token_ids) < 0:
            raise ValueError("token ids are not negative")
        if not all(math.isfinite(value) and value <= 0 for value in (*self.logprobs, *(self.base_logprobs or ()))):
            raise ValueError("logprobs are finite and at most 0")


class _Manifest(msgspec.Struct):
    golden: list[Golden] | None = None
    dtype: str = ""


@dataclass(frozen=True, slots=True)
class Reference:
    """What an adapter is held against."""

    goldens: tuple[Golden, ...] = ()
    dtype: str = ""  # that the trainer computed in; "" when it did not say


def read_reference(directory: Path) -> Reference:
    """The golden prompts of an adapter's directory, as far as they are asked; none where it has none.

    Raises InvalidRequest when manifest.json is not one, OSError.
    """
    path = directory / MANIFEST
    if not path.exists():
        return Reference()
    try:
        manifest = msgspec.convert(json_object(path), _Manifest)
    except msgspec.ValidationError as error:
        raise InvalidRequest(f"manifest.json: {error}", param="file", code="bad_config") from error
    return Reference(tuple(manifest.golden or ())[:PROMPTS_USED], manifest.dtype)
