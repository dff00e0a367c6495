"""The training loop: steps, evaluations, checkpoints, pause. One optimizer step is

    examples of the step -> rows of at most budget_tokens -> forward_backward each -> optim_step

and every loss is divided by the total of the whole step, so neither packing nor row count changes the mathematics.
Of several processes (`ranks.py`) each works on its share of the rows; what is decided is decided alike in all.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, NamedTuple

import torch

from trainer import ranks
from trainer.checkpoint import CheckpointStore, TrainState
from trainer.config import TrainConfig
from trainer.control import PauseRequest
from trainer.errors import CheckpointError, DivergedError, ModelError
from trainer.events import EventLog
from trainer.learner import Learner
from trainer.objectives import Metrics, PerToken, Sft
from trainer.pack import PackedBatch, halves
from trainer.progress import ProgressView
from trainer.readback import Readback
from trainer.schedule import learning_rate
from trainer.source import Examples, Source

_MAX_SKIPPED_STEPS = 10  # in a row


class Ending(StrEnum):
    """Why the loop returned."""

    FINISHED = "finished"
    STOPPED_EARLY = "stopped early"
    PAUSED = "paused"


@dataclass
class Training:
    """Everything a run needs, put together by `run.py`."""

    config: TrainConfig
    learner: Learner
    objective: Sft | PerToken
    source: Source
    evaluate: Callable[[], dict[str, float]] | None  # metrics of the model as it stands, `loss` among them
    total_steps: int
    checkpoints: CheckpointStore
    events: EventLog
    view: ProgressView
    pause: PauseRequest
    state: TrainState = field(default_factory=TrainState)
    best_tokens_per_s: float | None = None  # at 100 % MFU; None where the device's peak is not known
    measured_from: float = 0.0  # perf_counter when the step being measured began
    skipped_in_row: int = 0  # steps left out for non-finite gradients, up to now

    @property
    def warmup_steps(self) -> int:
        """Steps of linear warm-up."""
        return round(self.config.warmup_ratio * self.total_steps)


class Row(NamedTuple):
    """One forward and backward pass that a run asks for."""

    learner: Learner
    objective: Sft | PerToken
    batch: PackedBatch
    normaliser: float


Steps = Generator[Row, Metrics, Ending]


def _work(row: Row) -> Metrics:
    return row.learner.forward_backward(row.batch, row.objective, row.normaliser)


class BackOff:
    """Works on rows; one that does not fit in memory is split, and later ones are made no larger.

    The loss of a step is one sum, so only speed changes. Examples are never split.
    """

    def __init__(self, run: Training) -> None:
        self._run = run
        self._limit_tokens: int | None = None

    def __call__(self, row: Row) -> Metrics:
        """The metrics of the row. Raises torch.OutOfMemoryError when a single example does not fit."""
        waiting = [row.batch]
        total: Metrics = {}
        while waiting:
            batch = waiting.pop(0)
            if (
                self._limit_tokens
                and batch.tokens > self._limit_tokens
                and (parts := halves(batch, row.objective.sequences_per_example))
            ):
                waiting[:0] = parts
                continue
            before = {name: p.grad.clone() for name, p in row.learner.parameters.items() if p.grad is not None}
            try:
                metrics = _work(row._replace(batch=batch))
            except torch.OutOfMemoryError:
                parts = halves(batch, row.objective.sequences_per_example)
                if not parts:
                    raise
                self._back_off(row.learner, before, max(part.tokens for part in parts))
                waiting.insert(0, batch)
                continue
            for name, value in metrics.items():
                total[name] = total[name] + value if name in total else value
        return total

    def _back_off(self, learner: Learner, gradients: dict[str, torch.Tensor], tokens: int) -> None:
        for name, parameter in learner.parameters.items():
            parameter.grad = gradients.get(name)  # without what the failed row had added
        self._limit_tokens = tokens
        message = f"out of device memory: rows of over {tokens} tokens are split from now on"
        self._run.events.write("warning", step=self._run.state.step, message=message)
        self._run.view.note(f"warning: {message}")
        torch.cuda.empty_cache()


def train(run: Training) -> Ending:
    """Run until done, paused or stopped early; a checkpoint of the last step is on disk then. Raises as `steps`."""
    asking = steps(run)
    work = BackOff(run) if run.config.oom_backoff else _work
    try:
        row = next(asking)
        while True:
            row = asking.send(work(row))
    except StopIteration as stop:
        ending: Ending = stop.value
        return ending
    except torch.OutOfMemoryError as error:
        raise out_of_memory(run.config, run.source.longest_tokens) from error


def steps(run: Training) -> Steps:
    """The run, as a generator that asks for each row to be worked on: so several runs can share a forward pass.

    Raises DivergedError, TrainError of the source, CheckpointError (only for the last checkpoint).
    """
    device = run.learner.base.device
    # GRPO waits for its weights in every step anyway; read late, a step would be charged the next one's sampling.
    readback = Readback(device, late=device.type == "cuda" and run.config.method != "grpo")
    if _patience_over(run):
        return Ending.STOPPED_EARLY  # an earlier start got here and could not export
    if run.evaluate and run.state.step == 0:
        _evaluate(run)  # the adapter changes nothing yet: this is the base model's score
    run.measured_from = time.perf_counter()
    while run.state.step < run.total_steps:
        if reason := ranks.agreed(run.pause.reason()):
            _finish_records(run, readback.drain())
            run.checkpoints.save(run.learner, run.state)
            run.events.write("paused", step=run.state.step, reason=reason)
            return Ending.PAUSED
        _finish_records(run, readback.push(*(yield from _step(run))))
        config, step = run.config, run.state.step
        last = step == run.total_steps
        if run.evaluate and (last or (config.eval_every and step % config.eval_every == 0)):
            _finish_records(run, readback.drain())
            if _evaluate_and_judge(run):
                run.checkpoints.save(run.learner, run.state)
                return Ending.STOPPED_EARLY
        if not last and config.save_every and step % config.save_every == 0:
            _finish_records(run, readback.drain())
            _try_checkpoint(run)
    _finish_records(run, readback.drain())
    run.checkpoints.save(run.learner, run.state)
    return Ending.FINISHED


def _step(run: Training) -> Generator[Row, Metrics, tuple[dict[str, Any], Metrics]]:
    """One optimizer step. The record has what the host knows; the metrics are still on the device."""
    config, learner, state = run.config, run.learner, run.state
    ranks.seed_step(config.seed, state.step)
    work = run.source.step(state.step)
    total: Metrics = {}
    tokens = trained = 0
    for batch in work.batches:
        metrics = yield Row(learner, run.objective, batch, work.normaliser)
        for name, value in metrics.items():
            total[name] = total[name] + value if name in total else value
        tokens += batch.tokens if batch.sequences else 0  # a blank row only keeps step with other processes
        trained += len(batch.rows_K)
    total = ranks.summed(total)
    tokens, trained = ranks.total(torch.tensor([tokens, trained])).tolist()
    rate = learning_rate(
        state.step, run.total_steps, peak=config.learning_rate, schedule=config.schedule, warmup_steps=run.warmup_steps
    )
    if not total:  # every answer of the step was as good as its group: nothing to learn
        total["loss"] = torch.zeros((), device=learner.base.device)
    total |= learner.optim_step(rate, config.max_grad_norm)
    state.step += 1
    state.tokens += tokens
    state.trained_tokens += trained
    record = {
        "step": state.step,
        "epoch": round(state.step / run.source.steps_per_epoch, 4),
        "learning_rate": rate,
        "tokens": tokens,
        "trained_tokens": trained,
        **work.record,
    }
    return record, total


def out_of_memory(config: TrainConfig, longest_tokens: int) -> ModelError:
    """What to do about it, in words."""
    return ModelError(
        f"out of device memory with rows of {config.budget_tokens} tokens: lower --micro-batch-tokens "
        f"(not below the longest example, {longest_tokens}), set --compile or --gradient-checkpointing (less memory), "
        "or --oom-backoff to go on with smaller rows"
    )


def _finish_records(run: Training, records: list[dict[str, Any]]) -> None:
    """Log finished steps. Raises DivergedError."""
    for record in records:
        # Between two finished steps: the device's own pace, however far the host runs ahead.
        elapsed_s = time.perf_counter() - run.measured_from
        run.measured_from += elapsed_s
        run.state.seconds += elapsed_s
        record["tokens_per_s"] = round(record["tokens"] / elapsed_s, 1)
        if run.best_tokens_per_s:
            record["mfu"] = round(record["tokens_per_s"] / run.best_tokens_per_s, 4)
        skipped = bool(record.pop("skipped"))
        run.skipped_in_row = run.skipped_in_row + 1 if skipped else 0
        if skipped:
            run.events.write("warning", step=record["step"], message="non-finite gradients: the step was left out")
        run.events.write("step", **_json_safe(record))
        run.view.step(record)
        if run.skipped_in_row >= _MAX_SKIPPED_STEPS:
            raise DivergedError(
                f"{run.skipped_in_row} steps in a row up to {record['step']} had non-finite gradients; lower "
                f"--learning-rate (now {run.config.learning_rate:g}) or look at the data of these steps"
            )


def evaluate(learner: Learner, objective: Sft | PerToken, source: Examples) -> dict[str, float]:
    """Loss and accuracies over a whole dataset, in rows of the size that training uses."""
    dataset = source.dataset
    examples = list(range(len(dataset)))
    sums: Metrics = {}
    tokens = sequences = 0
    # Best fit is quadratic in the items: plan a stretch at a time.
    for first in range(0, len(examples), 1024):
        stretch = examples[first : first + 1024]
        for batch in source.batches(stretch):
            for name, value in learner.evaluate(batch, objective).items():
                sums[name] = sums[name] + value.double() if name in sums else value.double()
            tokens += len(batch.rows_K)
            sequences += batch.sequences
    sums = ranks.summed(sums)
    tokens, sequences = ranks.total(torch.tensor([tokens, sequences])).tolist()
    divisor = {"token_accuracy": float(tokens), "exact_match": float(sequences)}
    normaliser = source.normaliser(examples)
    return {name: float(value) / divisor.get(name, normaliser) for name, value in sums.items()}


def _evaluate(run: Training) -> dict[str, float]:
    """Evaluate the model as it stands, and log it."""
    assert run.evaluate is not None
    started = time.perf_counter()
    metrics = run.evaluate()
    seconds = round(time.perf_counter() - started, 2)
    run.events.write("eval", step=run.state.step, seconds=seconds, **_json_safe(metrics))
    shown = "  ".join(f"{name} {value:.4f}" for name, value in metrics.items())
    run.view.note(f"eval at step {run.state.step}: {shown}")
    return metrics


def _evaluate_and_judge(run: Training) -> bool:
    """Evaluate, remember and save the best; true when patience is over."""
    metrics, state = _evaluate(run), run.state
    if math.isfinite(metrics["loss"]) and (state.best_loss is None or metrics["loss"] < state.best_loss):
        state.best_step, state.best_loss, state.evaluations_without_gain = state.step, metrics["loss"], 0
        _try_checkpoint(run)
    else:
        state.evaluations_without_gain += 1
    run.measured_from = time.perf_counter()
    return _patience_over(run)


def _patience_over(run: Training) -> bool:
    patience = run.config.early_stopping
    return patience is not None and run.state.evaluations_without_gain >= patience


def _try_checkpoint(run: Training) -> None:
    """A checkpoint on the way: if the disk is full, training goes on and the next one tries again."""
    try:
        path = run.checkpoints.save(run.learner, run.state)
        run.events.write("checkpoint", step=run.state.step, path=path.name)
    except CheckpointError as error:
        run.events.write("warning", step=run.state.step, message=str(error))
        run.view.note(f"warning: {error}")
    run.measured_from = time.perf_counter()


def _json_safe(values: dict[str, Any]) -> dict[str, Any]:
    """NaN and infinity are no JSON numbers."""
    return {
        key: None if isinstance(value, float) and not abs(value) < float("inf") else value
        for key, value in values.items()
    }
