"""Checkpoints: a directory each, written beside its place and renamed when whole, so a crash leaves only whole ones.

checkpoints/step-00000120/
    adapter_model.safetensors, adapter_config.json     a PEFT adapter by itself (full tuning: model.safetensors)
    optimizer.safetensors                              AdamW moments by parameter name, random-number states
    state.json                                         step, counters, best evaluation
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import nn

from trainer import ranks, sharding
from trainer.errors import CheckpointError
from trainer.learner import Learner
from trainer.peft_files import copy_tensors, load_adapter, load_tensors, save_adapter, save_tensors

_FULL_WEIGHTS = "model.safetensors"


@dataclass
class TrainState:
    """Where a run stands, beside weights and moments. The data position is a function of `step`."""

    step: int = 0  # optimizer steps done
    tokens: int = 0  # fed to the model
    trained_tokens: int = 0  # of them targets
    seconds: float = 0.0  # spent training, over all starts
    best_step: int | None = None
    best_loss: float | None = None  # of an evaluation
    evaluations_without_gain: int = 0


class CheckpointStore:
    """The checkpoints of one run: the newest `keep`, and the best."""

    def __init__(self, directory: Path, keep: int) -> None:
        self._directory, self._keep = directory, keep
        ranks.lead(self._tidy)

    def __repr__(self) -> str:
        return f"<CheckpointStore {' '.join(str(step) for step in self.steps()) or 'empty'}>"

    def steps(self) -> list[int]:
        """Steps of the whole checkpoints, ascending."""
        return sorted(int(path.name.removeprefix("step-")) for path in self._directory.glob("step-????????"))

    def path(self, step: int) -> Path:
        """The directory of a step's checkpoint."""
        return self._directory / f"step-{step:08d}"

    def save(self, learner: Learner, state: TrainState) -> Path:
        """Write a checkpoint, then drop those past retention. Raises CheckpointError; earlier ones stay whole.

        Every process calls it and gives its shards; the first writes.
        """
        final = self.path(state.step)
        if ranks.lead(final.exists):
            # Same weights; only an evaluation's outcome can be new.
            ranks.lead(lambda: _replace_text(final / "state.json", json.dumps(asdict(state))))
            return final
        partial = final.with_suffix(".partial")
        try:
            ranks.lead(partial.mkdir)
            write_weights(learner, partial)
            _write_optimizer(learner, partial / "optimizer.safetensors")
            ranks.lead(lambda: self._complete(partial, final, state))
        except OSError as error:
            if ranks.is_first():
                shutil.rmtree(partial, ignore_errors=True)
            raise CheckpointError(f"no checkpoint at step {state.step}: {error}; earlier ones are whole") from error
        return final

    def restore(self, learner: Learner, step: int) -> TrainState:
        """Load weights, moments and random-number states into the learner. Raises CheckpointError."""
        directory = self.path(step)
        read_weights(learner, directory)
        _read_optimizer(learner, directory / "optimizer.safetensors")
        return TrainState(**json.loads((directory / "state.json").read_text()))

    def _tidy(self) -> None:
        self._directory.mkdir(parents=True, exist_ok=True)
        for leftover in self._directory.glob("*.partial"):
            shutil.rmtree(leftover)

    def _complete(self, partial: Path, final: Path, state: TrainState) -> None:
        """Weights and moments lie in `partial`: make a checkpoint of it."""
        (partial / "state.json").write_text(json.dumps(asdict(state)))
        for file in (*partial.iterdir(), partial):
            sync(file)
        partial.rename(final)
        sync(self._directory)
        self._prune({state.step, state.best_step})

    def _prune(self, keep_also: set[int | None]) -> None:
        for step in self.steps()[: -self._keep]:
            if step not in keep_also:
                shutil.rmtree(self.path(step))


def write_weights(learner: Learner, directory: Path) -> None:
    """What is trained, into an existing directory; every process calls it, the first writes. Raises OSError."""
    if (adapter := learner.adapter) is not None:
        ranks.lead(lambda: save_adapter(adapter, directory, str(learner.base.path)))
    else:
        weights = whole_weights(learner)
        ranks.lead(lambda: save_tensors(weights, directory / _FULL_WEIGHTS))


def whole_weights(learner: Learner) -> dict[str, torch.Tensor]:
    """Every trained parameter on the host of the first process; every process calls it, the others get nothing."""
    return _collected((name, part.detach(), learner.parameters[name]) for name, part in learner.own.items())


def read_weights(learner: Learner, directory: Path) -> None:
    """Load what `write_weights` wrote. Raises CheckpointError."""
    if learner.adapter is not None:
        load_adapter(learner.adapter, directory)
    else:
        file = directory / _FULL_WEIGHTS
        copy_tensors(load_tensors(file), dict(learner.parameters), file)


def _collected(parts: Iterable[tuple[str, torch.Tensor, nn.Parameter]]) -> dict[str, torch.Tensor]:
    """(name, what this process holds, the parameter that it is laid out as) -> whole tensors, on the first process."""
    found = {}
    for name, part, parameter in parts:
        tensor = sharding.whole(part, parameter)
        if ranks.is_first():
            found[name] = tensor.cpu().contiguous()
    return found


def _write_optimizer(learner: Learner, file: Path) -> None:
    tensors = {"rng.cpu": torch.get_rng_state()}
    if learner.base.device.type == "cuda":
        tensors["rng.cuda"] = torch.cuda.get_rng_state(learner.base.device)
    tensors |= _collected(
        (f"{key}/{name}", value.detach(), learner.parameters[name])
        for name, part in learner.own.items()
        for key, value in learner.optimizer.state[part].items()
    )
    ranks.lead(lambda: save_tensors(tensors, file))


def _read_optimizer(learner: Learner, file: Path) -> None:
    tensors = load_tensors(file)
    torch.set_rng_state(tensors.pop("rng.cpu"))
    cuda_rng = tensors.pop("rng.cuda", None)
    if cuda_rng is not None and learner.base.device.type == "cuda":
        torch.cuda.set_rng_state(cuda_rng, learner.base.device)
    for key, value in tensors.items():
        kind, _, name = key.partition("/")
        part = learner.own[name]
        held = sharding.part_of(value, learner.parameters[name])
        learner.optimizer.state[part][kind] = held.to(part.device, copy=True)


def _replace_text(file: Path, text: str) -> None:
    try:
        write_whole(file, text)
    except OSError as error:
        raise CheckpointError(f"{file} cannot be renewed: {error}; it is as it was") from error


def write_whole(file: Path, text: str) -> None:
    """Write it beside its place and rename it: whoever reads finds all of it, or what was there. Raises OSError."""
    partial = file.with_suffix(".partial")
    try:
        partial.write_text(text)
        sync(partial)
        partial.rename(file)
    except OSError:
        partial.unlink(missing_ok=True)
        raise


def sync(path: Path) -> None:
    """Have the disk hold what was written, before anything is renamed over it."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
