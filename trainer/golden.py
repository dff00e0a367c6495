"""Greedy answers with log-probabilities to a few prompts of the data: what a server of the adapter must reproduce."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Protocol

import numpy as np
import torch

from trainer import ranks
from trainer.learner import Learner
from trainer.pack import pack_sequences

_MAX_NEW_TOKENS = 16


class Prompts(Protocol):
    """Prompts by number."""

    def __len__(self) -> int: ...

    def prompt_ids(self, example: int) -> np.ndarray:
        """What the model sees before it answers."""


@dataclass
class Golden:
    """One prompt and its greedy continuation."""

    prompt_token_ids: list[int]
    token_ids: list[int]
    logprobs: list[float]
    text: str
    base_logprobs: list[float] | None = None  # of the same tokens with the adapter off; None: there is no adapter


def golden_answers(learner: Learner, prompts: Prompts, count: int) -> list[dict[str, Any]]:
    """Answers to the prompts of the first examples, up to the stop token or 16 tokens."""
    answers = [Golden(prompts.prompt_ids(i).tolist(), [], [], "") for i in range(min(count, len(prompts)))]
    stop = {*learner.base.stop_ids, learner.base.tokenizer.eos_token_id}
    open_answers = answers
    for _ in range(_MAX_NEW_TOKENS):
        open_answers = [answer for answer in open_answers if not stop & set(answer.token_ids)]
        if not open_answers:
            break
        found = _next_tokens(learner, open_answers)
        # All go on with the same: where layers are shared out, each pass takes every process.
        for answer, (token, logprob) in zip(open_answers, ranks.lead(found.copy), strict=True):
            answer.token_ids.append(token)
            answer.logprobs.append(round(min(logprob, 0.0), 5))
    for answer in answers:
        answer.text = learner.base.tokenizer.decode(answer.token_ids, skip_special_tokens=True)
    if learner.adapter is not None and answers:
        _score_base(learner, answers)
    return [asdict(answer) for answer in answers]


def _score_base(learner: Learner, answers: list[Golden]) -> None:
    """Fill in what the base makes of the answers' tokens."""
    pairs = []
    for answer in answers:
        ids = np.array([*answer.prompt_token_ids, *answer.token_ids], np.int32)
        pairs.append((ids, np.arange(len(ids)) >= len(answer.prompt_token_ids)))
    logprobs = learner.reference(pack_sequences(pairs, learner.base.device)).tolist()
    for answer in answers:
        answer.base_logprobs = [round(min(value, 0.0), 5) for value in logprobs[: len(answer.token_ids)]]
        del logprobs[: len(answer.token_ids)]


@torch.no_grad()
def _next_tokens(learner: Learner, answers: list[Golden]) -> list[tuple[int, float]]:
    """The likeliest next token of each, with its log-probability."""
    learner.set_mode(training=False)
    pairs = []
    for answer in answers:
        # The row drops each sequence's last token, so a placeholder target is put behind.
        ids = np.array([*answer.prompt_token_ids, *answer.token_ids, 0], np.int32)
        weights = np.zeros(len(ids), np.float32)
        weights[-1] = 1
        pairs.append((ids, weights))
    hidden_SH = learner.base.hidden_KH(pack_sequences(pairs, learner.base.device))
    logprobs_SV = (hidden_SH @ learner.base.head_VH.T).float().log_softmax(-1)
    best = logprobs_SV.max(-1)
    return list(zip(best.indices.tolist(), best.values.tolist(), strict=True))
