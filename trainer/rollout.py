"""GRPO's work: for each step, answers sampled by the gateway with the newest adapter, scored, set against their group.

    prompts of the step -> group_size answers each -> rewards -> advantages within the group -> rows

Answers are drawn at temperature 1, the distribution that is trained; their log-probabilities come from the sampler and
enter the clipped ratio, so neither another kernel nor a sampler one step behind biases the gradient.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from trainer.checkpoint import write_weights
from trainer.config import GrpoConfig
from trainer.errors import RolloutError
from trainer.learner import Learner
from trainer.pack import PackedBatch, pack_sequences, plan
from trainer.prompts import PromptDataset
from trainer.rewards import Answer, make_reward
from trainer.sampler import Gateway, Sampled
from trainer.schedule import DataOrder
from trainer.source import StepWork

_MAX_REQUESTS = 256  # at a time; the engine batches them
_STD_FLOOR = 1e-4
# Engines apply the checkpoint's own settings where a request names none; log-probabilities come without them.
_AS_TRAINED = {
    "top_p": 1.0,
    "top_k": -1,
    "min_p": 0.0,
    "repetition_penalty": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
}


@dataclass(frozen=True, slots=True)
class Rollout:
    """One answer, ready to be learnt from."""

    prompt_ids: np.ndarray
    token_ids: np.ndarray
    sampled: np.ndarray  # log-probability of each token of the answer
    rewards: tuple[float, ...]  # one a reward function
    total: float  # their weighted sum
    finished: bool
    advantage: float = 0.0


class Rollouts:
    """Samples, scores and packs the answers of each step (source.Source)."""

    def __init__(
        self, config: GrpoConfig, learner: Learner, prompts: PromptDataset, evaluation: PromptDataset | None
    ) -> None:
        """Raises ConfigError, RolloutError when the gateway cannot be reached."""
        self._config = config
        self._learner = learner
        self._prompts = prompts
        self._evaluation = evaluation
        self._order = DataOrder(len(prompts), config.batch_size, seed=config.seed, shuffle=config.shuffle)
        self._rewards = [make_reward(spec, config.reward_timeout_s) for spec in config.reward]
        self._gateway = Gateway(config.gateway_url, config.rollout_timeout_s, time.sleep)
        self._base = self._gateway.base_model()
        self._requests = ThreadPoolExecutor(_MAX_REQUESTS, thread_name_prefix="rollout")
        self._background = ThreadPoolExecutor(1, thread_name_prefix="rollout-ahead")
        self._ahead: dict[int, Future[list[Rollout]]] = {}
        self._published: str | None = None

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps of one pass over the prompts."""
        return self._order.steps_per_epoch

    @property
    def longest_tokens(self) -> int:
        """The longest prompt and answer."""
        return self._prompts.meta.longest_tokens

    def close(self) -> None:
        """Stop sampling and take the adapter of this training out of the gateway."""
        self._requests.shutdown(cancel_futures=True)
        self._background.shutdown(cancel_futures=True)
        for reward in self._rewards:
            reward.close()
        try:
            if self._published is not None:
                self._gateway.forget(self._config.adapter_name)
        finally:
            self._gateway.close()

    def step(self, step: int) -> StepWork:
        """Sample (or take what was sampled ahead) and pack. Raises RolloutError, RewardError."""
        started_s = time.perf_counter()
        waiting = self._ahead.pop(step, None)
        rollouts = waiting.result() if waiting is not None else self._collect(step, self._publish())
        if self._config.rollout_ahead:
            model = self._publish()  # the weights before this step: one behind when step + 1 learns from them
            self._ahead[step + 1] = self._background.submit(self._collect, step + 1, model)
        record = describe(rollouts, [reward.name for reward in self._rewards])
        record["rollout_s"] = round(time.perf_counter() - started_s, 2)
        return StepWork(
            rows(rollouts, self._config, self._learner.base.device), normaliser(rollouts, self._config), record
        )

    def evaluate(self) -> dict[str, float]:
        """Rewards of greedy answers to the held-out prompts; `loss` is minus their mean. Raises as `step`."""
        assert self._evaluation is not None
        model = self._publish()
        examples = list(range(len(self._evaluation)))
        rollouts = self._sample(self._evaluation, examples, model, count=1, temperature=0.0)
        described = describe(rollouts, [reward.name for reward in self._rewards])
        return {"loss": -described["reward"], **{key: value for key, value in described.items() if value is not None}}

    def _publish(self) -> str:
        """The model name of the weights as they stand."""
        adapter = self._learner.adapter
        assert adapter is not None, "GRPO trains an adapter"
        if not any(slot.lora_b.any() for slot in adapter.slots.values()):
            return self._base  # nothing learnt yet: the adapter changes nothing
        name = self._gateway.publish(self._config.adapter_name, lambda path: write_weights(self._learner, path))
        before, self._published = self._published, name
        # What is sampled ahead may still be on the version before, so one more is kept.
        if before is not None and before != name:
            number = int(before.rpartition("@v")[2])
            self._gateway.forget(f"{self._config.adapter_name}@v{number - 1}")
        return name

    def _collect(self, step: int, model: str) -> list[Rollout]:
        config = self._config
        examples = self._order.batch(step)
        rollouts = self._sample(self._prompts, examples, model, count=config.group_size, temperature=1.0)
        groups = [rollouts[i : i + config.group_size] for i in range(0, len(rollouts), config.group_size)]
        return [rollout for group in groups for rollout in with_advantages(group, scale=config.scale_rewards)]

    def _sample(
        self,
        prompts: PromptDataset,
        examples: Sequence[int],
        model: str,
        *,
        count: int,
        temperature: float,
    ) -> list[Rollout]:
        """`count` answers to each prompt, side by side, scored; a prompt's answers are neighbours."""
        asked = [example for example in examples for _ in range(count)]
        futures = []
        for example in asked:
            prompt = prompts.prompts[example]
            settings = {
                "tools": prompt.tools,
                "temperature": temperature,
                **_AS_TRAINED,
                "max_tokens": self._config.max_completion_tokens,
                "chat_template_kwargs": self._config.template_kwargs or None,
            }
            futures.append(self._requests.submit(self._gateway.sample, model, prompt.messages, **settings))
        sampled = [future.result() for future in futures]
        answers = [
            Answer(prompts.prompts[example].messages, sample.text, prompts.prompts[example].columns)
            for example, sample in zip(asked, sampled, strict=True)
        ]
        scores = list(zip(*(reward.score(answers) for reward in self._rewards), strict=True))
        return [
            self._rollout(prompts.prompt_ids(example), sample, rewards)
            for example, sample, rewards in zip(asked, sampled, scores, strict=True)
        ]

    def _rollout(self, prompt_ids: np.ndarray, sample: Sampled, rewards: tuple[float, ...]) -> Rollout:
        if sample.prompt_token_ids is not None and sample.prompt_token_ids != prompt_ids.tolist():
            raise RolloutError(
                "the engine read a prompt as other token ids than the trainer: the served model's tokenizer or chat "
                f"template is not the one of --model (trainer {prompt_ids[:8].tolist()}…, engine "
                f"{sample.prompt_token_ids[:8]}…)"
            )
        token_ids = sample.token_ids if sample.token_ids is not None else self._encode(sample)
        if len(token_ids) != len(sample.logprobs):
            raise RolloutError(
                f"the engine gave {len(sample.logprobs)} log-probabilities for an answer of {len(token_ids)} tokens; "
                "GRPO needs one each: use vLLM, which returns the sampled token ids"
            )
        weights = self._config.weights
        return Rollout(
            prompt_ids,
            np.asarray(token_ids, np.int32),
            np.asarray(sample.logprobs, np.float32),
            rewards,
            sum(weight * reward for weight, reward in zip(weights, rewards, strict=True)),
            sample.finished,
        )

    def _encode(self, sample: Sampled) -> list[int]:
        """Ids of an answer whose engine gives only its text; the stop token is added where one ended it."""
        tokenizer = self._learner.base.tokenizer
        ids: list[int] = tokenizer(sample.text, add_special_tokens=False)["input_ids"]
        if sample.finished and len(ids) + 1 == len(sample.logprobs):
            ids = [*ids, tokenizer.eos_token_id]
        return ids


def with_advantages(group: Sequence[Rollout], *, scale: bool) -> list[Rollout]:
    """Reward less the group's mean, over its standard deviation where `scale` (arXiv 2402.03300, section 4.1)."""
    rewards = [rollout.total for rollout in group]
    mean = math.fsum(rewards) / len(rewards)
    deviation = math.sqrt(math.fsum((reward - mean) ** 2 for reward in rewards) / max(1, len(rewards) - 1))
    divisor = deviation + _STD_FLOOR if scale else 1.0
    return [replace(rollout, advantage=(rollout.total - mean) / divisor) for rollout in group]


def describe(rollouts: Sequence[Rollout], names: Sequence[str]) -> dict[str, Any]:
    """What the log says of a step's answers."""
    count = len(rollouts)
    each = {f"reward_{name}": sum(r.rewards[i] for r in rollouts) / count for i, name in enumerate(names)}
    return {
        "reward": sum(rollout.total for rollout in rollouts) / count,
        **(each if len(names) > 1 else {}),
        "answer_tokens": sum(len(rollout.token_ids) for rollout in rollouts) / count,
        "unfinished": sum(not rollout.finished for rollout in rollouts) / count,
        "without_advantage": sum(not rollout.advantage for rollout in rollouts) / count,
    }


def normaliser(rollouts: Sequence[Rollout], config: GrpoConfig) -> float:
    """What the summed loss is divided by: answers, or all their tokens."""
    if config.loss_type == "dapo":
        return float(sum(len(rollout.token_ids) for rollout in rollouts))
    return float(len(rollouts))


def rows(rollouts: Sequence[Rollout], config: GrpoConfig, device: torch.device) -> Iterator[PackedBatch]:
    """Rows of at most the configured tokens. Answers of no advantage teach nothing but the KL term."""
    useful = [r for r in rollouts if len(r.token_ids) and (r.advantage or config.beta)]
    lengths = [len(r.prompt_ids) + len(r.token_ids) - 1 for r in useful]
    bins = plan(lengths, config.budget_tokens) if config.packing else [[i] for i in range(len(useful))]
    for items in bins:
        yield _row([useful[i] for i in items], config, device)


def _row(rollouts: Sequence[Rollout], config: GrpoConfig, device: torch.device) -> PackedBatch:
    pairs = []
    for rollout in rollouts:
        ids = np.concatenate([rollout.prompt_ids, rollout.token_ids])
        weights = np.zeros(len(ids), np.float32)
        weights[len(rollout.prompt_ids) :] = _share(rollout, config)
        pairs.append((ids, weights))
    batch = pack_sequences(pairs, device)
    advantage_S = torch.tensor([rollout.advantage for rollout in rollouts], device=device)
    columns = {
        "sampled_K": torch.from_numpy(np.concatenate([rollout.sampled for rollout in rollouts])).to(device),
        "advantage_K": advantage_S[batch.sequence_K],
    }
    return replace(batch, columns=columns)


def _share(rollout: Rollout, config: GrpoConfig) -> float:
    """A token's weight in the sum that `normaliser` divides."""
    if config.loss_type == "dapo":
        return 1.0
    return 1.0 / (config.max_completion_tokens if config.loss_type == "dr_grpo" else len(rollout.token_ids))
