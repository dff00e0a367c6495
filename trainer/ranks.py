"""The processes of one run, one a device: who they are, and what they say to each other.

torchrun starts them, or `launch.py`. Each takes its share of every step's examples (`pack.own_rows`), their gradients
are summed, and all make the same step; the first alone writes files. In a run of one process nothing is done here.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from trainer.config import TrainConfig
from trainer.errors import TOLD, ConfigError, ModelError, RunError, TrainError
from trainer.launch import MEETING

# For the first process to tokenise or to hash while the others wait; one that dies is noticed at once.
_PATIENCE = timedelta(hours=2)
_BUCKET_ELEMENTS = 2**26  # of gradients that are summed at a time: 256 MiB
_HOST = torch.device("cpu")
T = TypeVar("T")


def rank() -> int:
    """The number of this process in its run, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def count() -> int:
    """Processes of the run."""
    return dist.get_world_size() if dist.is_initialized() else 1


def is_first() -> bool:
    """Whether this process is the one that writes."""
    return rank() == 0


@contextmanager
def joined(config: TrainConfig) -> Iterator[None]:
    """Inside, this process works with the others that were started. Raises ConfigError, ModelError, RunError."""
    processes = _processes(config)
    if processes == 1:
        yield
        return
    device = local_device(config)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    try:
        with _heard():
            dist.init_process_group(
                "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", timeout=_PATIENCE, **_meeting(processes)
            )
    except ValueError as error:  # WORLD_SIZE alone says nothing of the others
        raise ConfigError(f"{error}; add --processes N, or start them by torchrun") from error
    yield
    # One that fails leaves at once, so that the others hear of it; those that are done go together.
    wait()
    dist.destroy_process_group()


def _meeting(processes: int) -> dict[str, Any]:
    """Where they meet: nothing where torchrun's environment says it all, else the socket that `launch.py` opened."""
    if MEETING not in os.environ:
        return {}
    descriptor, address, port = (os.environ[name] for name in (MEETING, "MASTER_ADDR", "MASTER_PORT"))
    store = dist.TCPStore(
        address,
        int(port),
        processes,
        is_master=bool(descriptor),
        timeout=_PATIENCE,
        master_listen_fd=int(descriptor) if descriptor else None,
    )
    return {"store": store, "rank": int(os.environ["RANK"]), "world_size": processes}


def _processes(config: TrainConfig) -> int:
    """How many were started for the run. Raises ConfigError where that does not fit."""
    started = int(os.environ.get("WORLD_SIZE", "1"))
    if config.parallel == "none":
        if started > 1:
            raise ConfigError(
                f"{started} processes were started (WORLD_SIZE), but `parallel` is none: give --parallel ddp or fsdp, "
                "or start one process"
            )
        return 1
    if "WORLD_SIZE" not in os.environ:
        raise ConfigError(
            f"`parallel: {config.parallel}` needs several processes: add --processes N, or start them by "
            "`torchrun --nproc-per-node N -m trainer …`"
        )
    if config.batch_size < started:
        raise ConfigError(f"`batch_size` ({config.batch_size}) must be at least the number of processes, {started}")
    return started


def local_device(config: TrainConfig) -> torch.device:
    """The device that this process trains on. Raises ModelError."""
    if config.device == "cpu" or (config.device == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise ModelError(
            "--device cuda, but torch sees no CUDA device; use --device cpu or install a CUDA build of torch"
        )
    if config.parallel == "none":
        return torch.device("cuda")
    number, devices = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if number >= devices:
        raise ModelError(f"process {number} of this machine has no device: torch sees {devices}; start {devices}")
    return torch.device("cuda", number)


@contextmanager
def _heard() -> Iterator[None]:
    """Raises RunError where the others do not answer."""
    try:
        yield
    except RuntimeError as error:
        raise RunError(
            f"another process of this run ended, or cannot be reached ({str(error).splitlines()[0]}); its own output "
            "says why. Go on by `train resume` on the run directory"
        ) from error


def lead(do: Callable[[], T]) -> T:
    """What the first process makes of it, to all. Where it fails with a TrainError or OSError, all do."""
    if count() == 1:
        return do()
    said: list[object] = [None, None]
    if is_first():
        try:
            said[0] = do()
        except (TrainError, OSError) as error:
            said[1] = error
    with _heard():
        dist.broadcast_object_list(said, src=0, device=_HOST)
    result, failure = said
    if isinstance(failure, BaseException):
        if not is_first():
            failure.add_note(TOLD)
        raise failure
    return result  # type: ignore[return-value]  # what `do` returned, in the first process


def agreed(reason: str) -> str:
    """The reason of the first process that has one; empty where none has."""
    if count() == 1:
        return reason
    speaker = torch.tensor(rank() if reason else count())
    said = [reason]
    with _heard():
        dist.all_reduce(speaker, dist.ReduceOp.MIN)
        if int(speaker) == count():
            return ""
        dist.broadcast_object_list(said, src=int(speaker), device=_HOST)
    return said[0]


def total(values: Tensor) -> Tensor:
    """The sum over all processes, on whatever device the values are, in their place."""
    if count() > 1:
        with _heard():
            dist.all_reduce(values)
    return values


def summed(values: dict[str, Tensor]) -> dict[str, Tensor]:
    """Scalars by name, each as its sum over all processes, which hold the same names."""
    return dict(zip(values, total(torch.stack(list(values.values()))).unbind(), strict=True)) if values else values


def wait() -> None:
    """Until all processes are here."""
    total(torch.zeros(1))


def sum_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Replace each gradient by its sum over all processes; every process ends with the same bits."""
    if count() == 1:
        return
    for bucket in _buckets(parameters):
        # No row of this process may have reached it, where another's did.
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in bucket]
        flat = total(torch.cat([gradient.flatten() for gradient in gradients]))
        for parameter, part in zip(bucket, flat.split([p.numel() for p in bucket]), strict=True):
            parameter.grad = part.view_as(parameter)


def _buckets(parameters: Iterable[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    bucket: list[nn.Parameter] = []
    for parameter in parameters:
        if bucket and sum(p.numel() for p in bucket) + parameter.numel() > _BUCKET_ELEMENTS:
            yield bucket
            bucket = []
        bucket.append(parameter)
    if bucket:
        yield bucket


def seed_step(seed: int, step: int) -> None:
    """Give each process of several its own random numbers for the step, whatever went before."""
    if count() > 1:
        torch.manual_seed(int(np.random.default_rng([seed, step, rank()]).integers(2**63)))
