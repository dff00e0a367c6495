"""Where else the numbers of a run go: TensorBoard and Weights & Biases, from the events of `events.jsonl`.

The numbers of a step are `train/NAME`, those of an evaluation `eval/NAME`, each at its step.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from trainer.config import TrainConfig
from trainer.errors import ConfigError

_GROUPS = {"step": "train", "eval": "eval"}
_NOT_MEASURED = frozenset({"time", "type", "step"})


class Reporter(Protocol):
    """Takes every event of a run."""

    def write(self, event: dict[str, Any]) -> None:
        """One event, as it stands in the log. Raises OSError."""

    def close(self) -> None:
        """Nothing more comes."""


def open_reporters(config: TrainConfig) -> list[Reporter]:
    """Those that the run asks for. Raises ConfigError."""
    makers: dict[str, Callable[[TrainConfig], Reporter]] = {"tensorboard": TensorBoard, "wandb": WandB}
    return [makers[name](config) for name in dict.fromkeys(config.report_to)]


def numbers(event: dict[str, Any]) -> dict[str, float]:
    """What a curve can be drawn of: group/name -> value."""
    group = _GROUPS.get(event["type"])
    measured = {name: value for name, value in event.items() if name not in _NOT_MEASURED} if group else {}
    return {f"{group}/{name}": value for name, value in measured.items() if isinstance(value, int | float)}


class TensorBoard:
    """Event files in RUN/tensorboard."""

    def __init__(self, config: TrainConfig) -> None:
        from torch.utils.tensorboard import SummaryWriter  # of the extra: only where asked for

        self._new_writer = SummaryWriter
        self._directory = config.output_dir / "tensorboard"
        self._writer: Any = None

    def write(self, event: dict[str, Any]) -> None:
        """Numbers as scalars at their step and time."""
        if event["type"] in ("started", "resumed"):
            # What a killed run wrote after its checkpoint happens again: viewers drop the first account of it.
            self._writer = self._new_writer(str(self._directory), purge_step=event["step"] + 1)
        for name, value in numbers(event).items():
            self._writer.add_scalar(name, value, event["step"], event["time"])

    def close(self) -> None:
        """Write out what is held back."""
        if self._writer is not None:
            self._writer.close()


class WandB:
    """A run of Weights & Biases, in the project of $WANDB_PROJECT; the package's own variables decide the rest."""

    def __init__(self, config: TrainConfig) -> None:
        import wandb  # of the extra: only where asked for

        try:
            self._run = wandb.init(
                project=os.environ.get("WANDB_PROJECT", "tunegate"),
                name=config.output_dir.name,
                id=_kept_id(config.output_dir / "wandb-id"),
                resume="allow",
                dir=config.output_dir,
                config=config.model_dump(mode="json"),
                reinit="create_new",  # runs trained together are runs of one process
                settings=wandb.Settings(console="off"),
            )
        except wandb.errors.Error as error:
            raise ConfigError(f"report_to wandb: {error}; or set WANDB_MODE=offline") from error
        self._run.define_metric("*", step_metric="step")  # steps may be replayed; its own count must not go back
        self._failed = False

    def write(self, event: dict[str, Any]) -> None:
        """Numbers, sent by the package in the background."""
        self._failed = event["type"] == "failed"
        if found := numbers(event):
            self._run.log({**found, "step": event["step"]})

    def close(self) -> None:
        """Wait until everything is sent."""
        self._run.finish(exit_code=int(self._failed))


def _kept_id(file: Path) -> str:
    """The same at every start of one run directory."""
    if not file.exists():
        file.write_text(secrets.token_hex(8))
    return file.read_text()
