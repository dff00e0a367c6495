"""One run put together from its configuration (data, adapter, objective, checkpoints), and its result written."""

from __future__ import annotations

import json
import math
import platform
import shutil
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import click
import torch

from trainer import ranks
from trainer.checkpoint import CheckpointStore, TrainState, read_weights, write_whole
from trainer.config import GrpoConfig, TrainConfig
from trainer.control import PauseRequest
from trainer.dataset import TokenDataset, prepare
from trainer.errors import DataError, RunError
from trainer.events import EventLog, curve, read_events
from trainer.examples import tokeniser
from trainer.export import describe_base, export, now
from trainer.flops import best_tokens_per_s
from trainer.golden import golden_answers
from trainer.learner import Learner
from trainer.loop import Ending, Training, evaluate
from trainer.lora import LoraSettings, inject
from trainer.model import BaseModel
from trainer.objectives import Grpo, PerToken, Sft, objective_for
from trainer.progress import ProgressView
from trainer.prompts import PromptDataset, read_prompts
from trainer.rollout import Rollouts
from trainer.source import Source, examples_for

Dataset = TokenDataset | PromptDataset
CONFIG, RECORD, EVENTS = "config.yaml", "run.json", "events.jsonl"


@dataclass(frozen=True, slots=True)
class Assembled:
    """A run ready to train."""

    training: Training
    record: dict[str, Any]
    datasets: dict[str, Dataset]
    base_facts: Future[dict[str, Any]] | None  # of the first process

    def finish(self, ending: Ending) -> None:
        """Write the result, unless the run only paused. Raises RunError."""
        if ending is not Ending.PAUSED:
            run = self.training
            _export(run, self.record, self.datasets, self.base_facts)
            result = result_directory(run.config).name
            run.events.write("finished", step=run.state.step, ending=ending.value, result=result)


@contextmanager
def assembled(
    config: TrainConfig, base: BaseModel, events: EventLog, pause: PauseRequest, name: str = ""
) -> Iterator[Assembled]:
    """Put a run together in its directory, from its newest checkpoint where there is one. Raises TrainError.

    name: stands before its lines where several runs report; alone it has a progress bar.
    """
    directory = config.output_dir
    datasets = _datasets(config, base, events)
    learner = _learner(config, base)
    with ExitStack() as stack:
        work = stack.enter_context(_work(config, learner, datasets))
        total_steps = config.max_steps or math.ceil(config.epochs * work.source.steps_per_epoch)
        checkpoints = CheckpointStore(directory / "checkpoints", config.keep_checkpoints)
        state = TrainState()
        if steps := ranks.lead(checkpoints.steps):
            state = checkpoints.restore(learner, steps[-1])
        record = _record(config, datasets, learner, total_steps)
        if ranks.is_first() and not (directory / RECORD).exists():
            write_whole(directory / RECORD, json.dumps(record, indent=2))
        events.write("resumed" if state.step else "started", step=state.step, total_steps=total_steps)
        background = stack.enter_context(ThreadPoolExecutor(1))
        run = Training(
            config=config,
            learner=learner,
            objective=work.objective,
            source=work.source,
            evaluate=work.evaluate,
            total_steps=total_steps,
            checkpoints=checkpoints,
            events=events,
            view=stack.enter_context(ProgressView(total_steps, state.step, name, shown=ranks.is_first())),
            pause=pause,
            state=state,
            best_tokens_per_s=best_tokens_per_s(learner),
        )
        # Reading all weights again takes a while for a large model; it is needed at the end only.
        facts = background.submit(describe_base, base.path, base.tokenizer) if ranks.is_first() else None
        yield Assembled(run, record, datasets, facts)


@dataclass(frozen=True, slots=True)
class _Work:
    """What the method makes of the data."""

    objective: Sft | PerToken
    source: Source
    evaluate: Callable[[], dict[str, float]] | None


@contextmanager
def _work(config: TrainConfig, learner: Learner, datasets: dict[str, Dataset]) -> Iterator[_Work]:
    """Raises TrainError."""
    data, held_out = datasets["data"], datasets.get("eval")
    if isinstance(config, GrpoConfig):
        assert isinstance(data, PromptDataset) and not isinstance(held_out, TokenDataset)
        with closing(Rollouts(config, learner, data, held_out)) as rollouts:
            yield _Work(
                Grpo(config.beta, config.clip_low, config.clip_high), rollouts, rollouts.evaluate if held_out else None
            )
        return
    assert isinstance(data, TokenDataset) and not isinstance(held_out, PromptDataset)
    objective = objective_for(config)
    judged = examples_for(config, held_out, objective, learner) if held_out else None
    yield _Work(
        objective,
        examples_for(config, data, objective, learner),
        partial(evaluate, learner, objective, judged) if judged else None,
    )


def _export(
    run: Training, record: dict[str, Any], datasets: dict[str, Dataset], base_facts: Future[dict[str, Any]] | None
) -> None:
    """Write the result: of the best evaluated step where there is an eval set, else of the last."""
    state, config = run.state, run.config
    kept = ranks.lead(run.checkpoints.steps)
    step = state.best_step if state.best_step is not None and state.best_step in kept else state.step
    if step != state.step:
        read_weights(run.learner, run.checkpoints.path(step))
    losses = curve(config.output_dir / EVENTS)
    golden = golden_answers(run.learner, datasets.get("eval") or datasets["data"], config.golden_prompts)
    manifest = {
        "kind": "adapter" if run.learner.adapter else "checkpoint",
        "created": now(),
        "method": config.method,
        "base": base_facts.result() if base_facts else None,
        "data": record["data"],
        "config": config.model_dump(mode="json"),
        "software": record["software"],
        "dtype": record["dtype"],
        "metrics": {
            "step": step,  # of these weights
            "last_step": state.step,
            "train_loss": losses.get(step),
            "eval": _eval_at(config.output_dir / EVENTS, step),
            "base_eval": _eval_at(config.output_dir / EVENTS, 0),
            "tokens": state.tokens,
            "trained_tokens": state.trained_tokens,
            "seconds": round(state.seconds, 1),
        },
        "golden": golden,
    }
    try:
        export(run.learner, result_directory(config), manifest)
    except OSError as error:
        raise RunError(
            f"the result cannot be written: {error}. Nothing is lost: free some space, then "
            f"`gateway train resume {config.output_dir}`"
        ) from error


def _eval_at(events: Path, step: int) -> dict[str, float]:
    """The metrics of the evaluation after `step`."""
    found = [event for event in read_events(events) if event["type"] == "eval" and event["step"] == step]
    about = ("time", "type", "step", "seconds")
    return {key: value for key, value in found[-1].items() if key not in about} if found else {}


def _learner(config: TrainConfig, base: BaseModel) -> Learner:
    adapter = None
    if config.tuning == "lora":
        settings = LoraSettings(
            rank=config.lora_rank,
            alpha=config.alpha,
            dropout=config.lora_dropout,
            rank_stabilised=config.lora_rs,
            targets=config.lora_target,
            rank_pattern=config.lora_rank_pattern,
            alpha_pattern=config.lora_alpha_pattern,
        )
        adapter = inject(base.model, settings, torch.Generator().manual_seed(config.seed))
    return Learner(base, adapter, weight_decay=config.weight_decay)


def _datasets(config: TrainConfig, base: BaseModel, events: EventLog) -> dict[str, Dataset]:
    """Made by the first process; the others open what it left."""
    made: dict[str, Dataset] = {}
    parts = {"data": config.dataset, "eval": config.eval_dataset}

    def make() -> None:
        for part, origins in parts.items():
            if origins:
                made[part] = _dataset(config, base, origins, config.output_dir / part, events)

    ranks.lead(make)
    return made or {part: TokenDataset(config.output_dir / part) for part, origins in parts.items() if origins}


def _dataset(
    config: TrainConfig, base: BaseModel, origins: tuple[str, ...], directory: Path, events: EventLog
) -> Dataset:
    """The tokenised rows: what an earlier start of this run left, or made now and compared with its record."""
    if (directory / "meta.json").is_file():
        return TokenDataset(directory)
    dataset: Dataset
    if isinstance(config, GrpoConfig):
        dataset = read_prompts(config, base, origins)
    else:
        tokenise = tokeniser(config, base)
        dataset = prepare(origins, tokenise, directory, max_length=config.max_length, overlong=config.overlong)
    record_file = config.output_dir / RECORD
    if record_file.is_file():
        before = json.loads(record_file.read_text())["data"][directory.name]["sha256"]
        if before != dataset.meta.sha256:
            shutil.rmtree(directory, ignore_errors=True)
            raise DataError(f"{', '.join(origins)} changed since the run began; start a new run with it")
    meta = dataset.meta
    if meta.dropped or meta.truncated:
        message = f"{meta.dropped} examples dropped, {meta.truncated} truncated: over {config.max_length} tokens"
        events.write("warning", message=f"{directory.name}: {message}")
        click.echo(f"{directory.name}: {message}", err=True)
    return dataset


def _record(config: TrainConfig, datasets: dict[str, Dataset], learner: Learner, total_steps: int) -> dict[str, Any]:
    """What, beside the configuration, is needed to repeat the run."""
    return {
        "started": now(),
        "command": sys.argv,
        "software": {name: _version(name) for name in ("tunegate", "torch", "transformers", "tokenizers", "numpy")}
        | {"python": platform.python_version()},
        "device": str(learner.base.device),
        "processes": ranks.count(),
        "threads": torch.get_num_threads(),
        "dtype": str(learner.base.dtype).removeprefix("torch."),
        "model": str(learner.base.path),
        "data": {name: asdict(dataset.meta) for name, dataset in datasets.items()},
        "total_steps": total_steps,
        "trained_parameters": sum(p.numel() for p in learner.parameters.values()),
        "config": config.model_dump(mode="json"),
    }


def result_directory(config: TrainConfig) -> Path:
    """Where the result lies once the run is finished."""
    return config.output_dir / ("adapter" if config.tuning == "lora" else "model")


def _version(distribution: str) -> str | None:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None
