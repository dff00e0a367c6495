"""A run directory from start to finish: put the parts together, train, export.

RUN/config.yaml       the resolved configuration
    run.json          what it was made of: versions, command line, hashes of base and data, counts
    events.jsonl      everything that happened
    data/, eval/      the tokenised examples
    checkpoints/      to resume from; each is an adapter by itself
    adapter/          the result, with manifest.json (full tuning: model/)
    pause             exists: stop at the next step, with a checkpoint
"""

from __future__ import annotations

import fcntl
import json
import math
import platform
import shutil
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import click
import torch

from trainer import config as configs
from trainer.checkpoint import CheckpointStore, TrainState, read_weights
from trainer.config import TrainConfig
from trainer.control import PauseRequest
from trainer.dataset import TokenDataset, Tokenise, prepare
from trainer.errors import DataError, RunError, TrainError
from trainer.events import EventLog, curve, read_events
from trainer.examples import tokeniser
from trainer.export import describe_base, export, now
from trainer.golden import golden_answers
from trainer.learner import Learner
from trainer.loop import Ending, Training, train
from trainer.lora import LoraSettings, inject
from trainer.model import BaseModel, load_base
from trainer.objectives import objective_for
from trainer.progress import ProgressView
from trainer.schedule import DataOrder

CONFIG, RECORD, EVENTS = "config.yaml", "run.json", "events.jsonl"


def start(config: TrainConfig) -> Ending:
    """A new run. A directory in which training never began is taken over. Raises TrainError."""
    directory = config.output_dir
    if (directory / RECORD).exists():
        raise RunError(
            f"{directory} holds a run already: go on with it by `gateway train resume {directory}`, "
            "or give another --output-dir"
        )
    directory.mkdir(parents=True, exist_ok=True)
    with _lock(directory):
        for leftover in ("data", "eval"):
            shutil.rmtree(directory / leftover, ignore_errors=True)
        (directory / CONFIG).write_text(configs.dump(config))
        return _run(config)


def resume(directory: Path) -> Ending:
    """Go on with a paused, killed or failed run, from its newest checkpoint. Raises TrainError."""
    if not (directory / CONFIG).is_file():
        raise RunError(f"{directory} holds no run: it has no {CONFIG}")
    config = configs.reload(directory / CONFIG)
    if directory.absolute() != config.output_dir:
        # The run was moved as a whole.
        config = config.model_copy(update={"output_dir": directory.absolute()})
    with _lock(directory):
        if _result_directory(config).exists():
            raise RunError(f"{directory} is finished; its result is {_result_directory(config)}")
        return _run(config)


def _run(config: TrainConfig) -> Ending:
    directory = config.output_dir
    with closing(EventLog(directory / EVENTS)) as events:
        try:
            return _train_and_export(config, events)
        except TrainError as error:
            events.write("failed", message=str(error))
            raise
        except OSError as error:
            events.write("failed", message=str(error))
            raise RunError(
                f"{directory} cannot be written: {error}; then `gateway train resume {directory}`"
            ) from error


def _train_and_export(config: TrainConfig, events: EventLog) -> Ending:
    directory = config.output_dir
    torch.manual_seed(config.seed)
    base = load_base(config)
    tokenise = tokeniser(config, base)
    datasets = {
        name: _dataset(config, tokenise, files, directory / name, events)
        for name, files in (("data", config.dataset), ("eval", config.eval_dataset))
        if files
    }
    dataset = datasets["data"]
    learner = _learner(config, base)
    order = DataOrder(len(dataset), config.batch_size, seed=config.seed, shuffle=config.shuffle)
    total_steps = config.max_steps or math.ceil(config.epochs * order.steps_per_epoch)
    checkpoints = CheckpointStore(directory / "checkpoints", config.keep_checkpoints)
    state = TrainState()
    if steps := checkpoints.steps():
        state = checkpoints.restore(learner, steps[-1])
    record = _record(config, datasets, learner, total_steps)
    if not (directory / RECORD).exists():
        (directory / RECORD).write_text(json.dumps(record, indent=2))
    events.write("resumed" if state.step else "started", step=state.step, total_steps=total_steps)
    pause = PauseRequest(directory)
    pause.clear()
    with ThreadPoolExecutor(1) as background, ProgressView(total_steps, state.step) as view, pause.listening():
        # Reading all weights again takes a while for a large model; it is needed at the end only.
        base_facts = background.submit(describe_base, base.path, base.tokenizer)
        run = Training(
            config=config,
            learner=learner,
            objective=objective_for(config),
            dataset=dataset,
            eval_dataset=datasets.get("eval"),
            order=order,
            total_steps=total_steps,
            checkpoints=checkpoints,
            events=events,
            view=view,
            pause=pause,
            state=state,
        )
        ending = train(run)
        if ending is not Ending.PAUSED:
            _export(run, record, base_facts)
            events.write("finished", step=run.state.step, ending=ending.value, result=_result_directory(config).name)
    return ending


def _export(run: Training, record: dict[str, Any], base_facts: Future[dict[str, Any]]) -> None:
    """Write the result: of the best evaluated step where there is an eval set, else of the last."""
    state, config = run.state, run.config
    step = state.best_step if state.best_step is not None and state.best_step in run.checkpoints.steps() else state.step
    if step != state.step:
        read_weights(run.learner, run.checkpoints.path(step))
    losses = curve(config.output_dir / EVENTS)
    manifest = {
        "kind": "adapter" if run.learner.adapter else "checkpoint",
        "created": now(),
        "method": config.method,
        "base": base_facts.result(),
        "data": record["data"],
        "config": config.model_dump(mode="json"),
        "software": record["software"],
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
        "golden": golden_answers(run.learner, run.eval_dataset or run.dataset, config.golden_prompts),
    }
    try:
        export(run.learner, _result_directory(config), manifest)
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


def _dataset(
    config: TrainConfig, tokenise: Tokenise, files: tuple[Path, ...], directory: Path, events: EventLog
) -> TokenDataset:
    """The tokenised files: what an earlier start of this run left, or made now and compared with its record."""
    if (directory / "meta.json").is_file():
        return TokenDataset(directory)
    dataset = prepare(files, tokenise, directory, max_length=config.max_length, overlong=config.overlong)
    record_file = config.output_dir / RECORD
    if record_file.is_file():
        before = json.loads(record_file.read_text())["data"][directory.name]["sha256"]
        if before != dataset.meta.sha256:
            shutil.rmtree(directory)
            raise DataError(f"{', '.join(map(str, files))} changed since the run began; start a new run with it")
    meta = dataset.meta
    if meta.dropped or meta.truncated:
        message = f"{meta.dropped} examples dropped, {meta.truncated} truncated: over {config.max_length} tokens"
        events.write("warning", message=f"{directory.name}: {message}")
        click.echo(f"{directory.name}: {message}", err=True)
    return dataset


def _record(
    config: TrainConfig, datasets: dict[str, TokenDataset], learner: Learner, total_steps: int
) -> dict[str, Any]:
    """What, beside the configuration, is needed to repeat the run."""
    return {
        "started": now(),
        "command": sys.argv,
        "software": {name: _version(name) for name in ("tunegate", "torch", "transformers", "tokenizers", "numpy")}
        | {"python": platform.python_version()},
        "device": str(learner.base.device),
        "threads": torch.get_num_threads(),
        "dtype": str(learner.base.dtype).removeprefix("torch."),
        "model": str(learner.base.path),
        "data": {name: asdict(dataset.meta) for name, dataset in datasets.items()},
        "total_steps": total_steps,
        "trained_parameters": sum(p.numel() for p in learner.parameters.values()),
        "config": config.model_dump(mode="json"),
    }


def _result_directory(config: TrainConfig) -> Path:
    return config.output_dir / ("adapter" if config.tuning == "lora" else "model")


def _version(distribution: str) -> str | None:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None


@contextmanager
def _lock(directory: Path) -> Iterator[None]:
    """One process a run. The lock goes with the process, however it ends. Raises RunError."""
    with (directory / "lock").open("w") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise RunError(f"{directory} is being trained by another process") from error
        yield
