"""Greedy answers with log-probabilities to a few prompts of the data: what a server of the adapter must reproduce."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from trainer.dataset import TokenDataset
from trainer.learner import Learner
from trainer.pack import pack_sequences

_MAX_NEW_TOKENS = 16


@dataclass
class Golden:
    """One prompt and its greedy continuation."""

    prompt_token_ids: list[int]
    token_ids: list[int]
    logprobs: list[float]
    text: str


def golden_answers(learner: Learner, dataset: TokenDataset, count: int) -> list[dict[str, Any]]:
    """Answers to the prompts of the first examples, up to the stop token or 16 tokens."""
    answers = [Golden(_prompt_of(dataset, i), [], [], "") for i in range(min(count, len(dataset)))]
    stop = {*learner.base.stop_ids, learner.base.tokenizer.eos_token_id}
    open_answers = answers
    for _ in range(_MAX_NEW_TOKENS):
        open_answers = [answer for answer in open_answers if not stop & set(answer.token_ids)]
        if not open_answers:
            break
        for answer, (token, logprob) in zip(open_answers, _next_tokens(learner, open_answers), strict=True):
            answer.token_ids.append(token)
            answer.logprobs.append(round(logprob, 5))
    for answer in answers:
        answer.text = learner.base.tokenizer.decode(answer.token_ids, skip_special_tokens=True)
    return [asdict(answer) for answer in answers]


@torch.no_grad()
def _next_tokens(learner: Learner, answers: list[Golden]) -> list[tuple[int, float]]:
    """The likeliest next token of each, with its log-probability."""
    learner.base.model.eval()
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


def _prompt_of(dataset: TokenDataset, example: int) -> list[int]:
    """The ids before the first target of the example's first sequence."""
    token_ids, weights = dataset.sequences(example)[0]
    return [int(token) for token in token_ids[: int(np.flatnonzero(weights)[0])]]
