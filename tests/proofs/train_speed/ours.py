"""Steps of this trainer: one process, or several by torchrun, a GPU each."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tests.proofs.train_speed.clock import Clock, Speed
from tests.proofs.train_speed.shape import RANK, lengths_of, random_model, random_rows
from trainer import attention, ranks, sharding
from trainer.config import SftConfig
from trainer.learner import Learner
from trainer.lora import LoraSettings, inject
from trainer.model import BaseModel, prepare_layers
from trainer.objectives import Sft
from trainer.pack import PackedBatch, pack_sequences, plan


@contextmanager
def processes(given: argparse.Namespace) -> Iterator[torch.device]:
    """Inside, this process works with the others that torchrun started; its device."""
    config = SftConfig(model="none", dataset=("none",), output_dir=Path("none"), parallel=given.parallel)
    with ranks.joined(config):
        yield ranks.local_device(config)


def speed(given: argparse.Namespace, device: torch.device) -> Speed:
    """Train, and measure. Of several processes each makes the same number of rows a step."""
    base = make_base(given, device)
    done = [0]
    clock = Clock(given.steps, given.warmup, lambda: done[0])
    for tokens in steps(given, base):
        done[0] += tokens
        clock.step_ended()
    return clock.speed()


def make_base(given: argparse.Namespace, device: torch.device) -> BaseModel:
    """The frozen model."""
    model = random_model(given, attention.NAME, device)
    if given.four_bit:
        _into_four_bits(model, device)
    if given.parallel == "fsdp" and ranks.count() > 1:
        sharding.shard(model, sharding.make_mesh(device), device)
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    prepare_layers(model, checkpointing=given.checkpointing, compiled=given.compile)
    return BaseModel(model, None, Path(), device, model.dtype)


def steps(given: argparse.Namespace, base: BaseModel) -> Iterator[int]:
    """Train; each step is on data of its own. Yields the step's tokens."""
    adapter = inject(base.model, LoraSettings(rank=RANK, alpha=2.0 * RANK), torch.Generator().manual_seed(0))
    learner = Learner(base, adapter, weight_decay=0.0)
    for number, lengths in enumerate(lengths_of(given, given.steps)):
        total = sum(lengths)
        for batch in _batches(given, base, lengths, number):
            learner.forward_backward(batch, Sft(), float(total * ranks.count()))
        learner.optim_step(1e-4, 1.0)
        yield total


def _batches(given: argparse.Namespace, base: BaseModel, lengths: list[int], step: int) -> Iterator[PackedBatch]:
    # A sequence gives all but its last token as input.
    rows = random_rows([length + 1 for length in lengths], base.model.config.vocab_size, seed=step)
    packed = plan(lengths, given.sequences * given.tokens) if given.packing else [[i] for i in range(len(lengths))]
    for items in packed:
        yield pack_sequences([(rows[i], np.ones(len(rows[i]), np.float32)) for i in items], base.device)


def _into_four_bits(model: Any, device: torch.device) -> None:
    """Put a random four-bit layer in the place of every linear one but the vocabulary matrix."""
    from trainer.packed import PackedLinear

    for layer in model.base_model.layers:
        for name, linear in list(layer.named_modules()):
            if isinstance(linear, torch.nn.Linear):
                outputs, inputs = linear.weight.shape
                words = torch.randint(-(2**31), 2**31, (outputs, inputs // 8), dtype=torch.int32, device=device)
                scale = torch.full((outputs, inputs // 128), 0.004, dtype=model.dtype, device=device)
                zero = torch.full_like(scale, 8, dtype=torch.uint8)
                parent, _, attribute = name.rpartition(".")
                setattr(layer.get_submodule(parent), attribute, PackedLinear(words, scale, zero, None))
