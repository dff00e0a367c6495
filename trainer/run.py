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
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path

import torch

from trainer import config as configs
from trainer import ranks
from trainer.assemble import CONFIG, EVENTS, RECORD, assembled, result_directory
from trainer.checkpoint import write_whole
from trainer.config import GrpoConfig, TrainConfig
from trainer.control import PauseRequest
from trainer.errors import RunError, TrainError
from trainer.events import EventLog
from trainer.extras import require_for
from trainer.joint import Outcome, train_together
from trainer.loop import Ending, train
from trainer.model import load_base
from trainer.reporters import open_reporters


def start(config: TrainConfig) -> Ending:
    """A new run. A directory in which training never began is taken over. Raises TrainError."""
    require_for(config)
    directory = config.output_dir
    with ranks.joined(config), ExitStack() as stack:

        def begin() -> None:
            if (directory / RECORD).exists():
                raise RunError(
                    f"{directory} holds a run already: go on with it by `gateway train resume {directory}`, "
                    "or give another --output-dir"
                )
            directory.mkdir(parents=True, exist_ok=True)
            stack.enter_context(_lock(directory))
            _begin(config)

        ranks.lead(begin)
        return _run(config)


def resume(directory: Path, gateway_url: str | None = None) -> Ending:
    """Go on with a paused, killed or failed run, from its newest checkpoint. Raises TrainError.

    gateway_url: of a run that samples, instead of the one that it began with.
    """
    if not (directory / CONFIG).is_file():
        raise RunError(f"{directory} holds no run: it has no {CONFIG}")
    config = configs.reload(directory / CONFIG)
    require_for(config)
    if directory.absolute() != config.output_dir:
        # The run was moved as a whole.
        config = config.model_copy(update={"output_dir": directory.absolute()})
    if gateway_url is not None:
        if not isinstance(config, GrpoConfig):
            raise RunError(
                f"--gateway-url is for grpo, whose answers a gateway samples; {directory} is {config.method}"
            )
        config = config.model_copy(update={"gateway_url": gateway_url})
    with ranks.joined(config), ExitStack() as stack:

        def go_on() -> None:
            stack.enter_context(_lock(directory))
            if result_directory(config).exists():
                raise RunError(f"{directory} is finished; its result is {result_directory(config)}")

        ranks.lead(go_on)
        return _run(config)


def start_together(runs: Sequence[TrainConfig]) -> list[Outcome]:
    """Several runs on one base model, each in its directory: new ones begin, others go on, finished ones stay.

    How each ended; a run that fails leaves the others alone. Raises TrainError when one cannot begin.
    """
    with ExitStack() as stack:
        for config in runs:
            require_for(config)
            config.output_dir.mkdir(parents=True, exist_ok=True)
            stack.enter_context(_lock(config.output_dir))
            _begin_or_check(config)
        open_runs = [config for config in runs if not result_directory(config).exists()]
        if not open_runs:
            return [Ending.FINISHED] * len(runs)
        torch.manual_seed(open_runs[0].seed)
        base = load_base(open_runs[0])
        pause = PauseRequest(runs[0].output_dir.parent)
        pause.clear()
        stack.enter_context(pause.listening())
        parts = []
        for config in open_runs:
            own = PauseRequest(config.output_dir, pause)
            own.clear()
            events = stack.enter_context(closing(EventLog(config.output_dir / EVENTS, open_reporters(config))))
            parts.append(stack.enter_context(assembled(config, base, events, own, config.output_dir.name)))
        ended = train_together([part.training for part in parts], max(config.budget_tokens for config in open_runs))
        for i, (part, outcome) in enumerate(zip(parts, ended, strict=True)):
            try:
                if isinstance(outcome, TrainError):
                    raise outcome
                part.finish(outcome)
            except TrainError as error:
                part.training.events.write("failed", message=str(error))
                ended[i] = error
        by_directory = dict(zip([config.output_dir for config in open_runs], ended, strict=True))
        return [by_directory.get(config.output_dir, Ending.FINISHED) for config in runs]


def _run(config: TrainConfig) -> Ending:
    directory = config.output_dir
    with closing(_event_log(config)) as events:
        try:
            torch.manual_seed(config.seed)
            base = load_base(config)
            pause = PauseRequest(directory)
            if ranks.is_first():
                pause.clear()
            with pause.listening(), assembled(config, base, events, pause) as run:
                ending = train(run.training)
                run.finish(ending)
                return ending
        except TrainError as error:
            events.write("failed", message=str(error))
            raise
        except OSError as error:
            events.write("failed", message=str(error))
            raise RunError(
                f"{directory} cannot be written: {error}; then `gateway train resume {directory}`"
            ) from error
        except RuntimeError as error:
            if ranks.count() > 1:  # where layers are shared out, a process that died shows up in any product
                events.write("failed", message=str(error))
            raise


def _event_log(config: TrainConfig) -> EventLog:
    """Of several processes the first has the log; what the others would write there goes nowhere."""
    if ranks.is_first():
        return EventLog(config.output_dir / EVENTS, open_reporters(config))
    return EventLog(Path(os.devnull))


def _begin(config: TrainConfig) -> None:
    """A directory in which nothing was trained yet."""
    for leftover in ("data", "eval"):
        shutil.rmtree(config.output_dir / leftover, ignore_errors=True)
    write_whole(config.output_dir / CONFIG, configs.dump(config))


def _begin_or_check(config: TrainConfig) -> None:
    """A new run, or the same one again. Raises RunError where another run lies."""
    directory = config.output_dir
    if not (directory / RECORD).exists():
        _begin(config)
    elif configs.reload(directory / CONFIG) != config:
        raise RunError(f"{directory} holds a run with another configuration; give another output_dir")


@contextmanager
def _lock(directory: Path) -> Iterator[None]:
    """One process a run. The lock goes with the process, however it ends. Raises RunError."""
    with (directory / "lock").open("w") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise RunError(f"{directory} is being trained by another process") from error
        yield
