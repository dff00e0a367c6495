"""Several processes on one job: each takes a share of the calibration sequences, and of the linears to solve.

torchrun starts them and says by the environment who is who. Moments are sums over sequences, so shares add up; the
linears of a layer do not depend on each other, so they are dealt by what they cost. Only the first process reads and
writes the output directory; the others are told what it holds. Alone, every method hands back what it was given.
"""

from __future__ import annotations

import contextlib
import datetime
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

from quant.errors import BadCalibration, RankLost
from quant.moments import Moments

Value = TypeVar("Value")

_HOST = torch.device("cpu")

_PATIENCE = datetime.timedelta(hours=1)  # for the slowest process; one that dies is noticed at once


@contextlib.contextmanager
def _heard() -> Iterator[None]:
    """Raises RankLost where the others do not answer."""
    try:
        yield
    except RuntimeError as error:
        raise RankLost(
            f"another process of this job ended, or cannot be reached ({str(error).splitlines()[0]}); its own output "
            "says why. The same command goes on with what is finished"
        ) from error


@dataclass(frozen=True, slots=True)
class Ranks:
    """Which of how many processes this is. What differs between them is in the arguments; all call in one order."""

    rank: int = 0
    size: int = 1

    @property
    def is_first(self) -> bool:
        """Whether this process writes, and speaks to the user."""
        return self.rank == 0

    def share(self, tokens_BT: Tensor) -> Tensor:
        """This process's sequences. Raises BadCalibration when there are fewer than processes."""
        if tokens_BT.shape[0] < self.size:
            raise BadCalibration(f"{tokens_BT.shape[0]} calibration sequences are too few for {self.size} processes")
        return tokens_BT[self.rank :: self.size]

    @_heard()
    def told(self, value: Value) -> Value:
        """What the first process gives; the others' own values do not matter."""
        if self.size == 1:
            return value
        given = [value if self.is_first else None]
        dist.broadcast_object_list(given, device=_HOST)
        return cast(Value, given[0])

    @_heard()
    def same(self, tensor: Tensor) -> Tensor:
        """The first process's tensor, where all computed one that rounding may have made different."""
        if self.size > 1:
            tensor = tensor.contiguous()
            dist.broadcast(tensor, 0)
        return tensor

    @_heard()
    def gathered(self, value: Value) -> list[Value]:
        """Everyone's values, in the first process; in the others their own."""
        if self.size == 1:
            return [value]
        values: list[Value | None] | None = [None] * self.size if self.is_first else None
        dist.gather_object(value, values)
        return [one for one in values if one is not None] if values else [value]

    def dealt(self, costs: Mapping[str, float]) -> set[str]:
        """The names this process takes: the dearest first, each to whoever has least so far."""
        loads, own = [0.0] * self.size, set()
        for name in sorted(costs, key=lambda name: (-costs[name], name)):
            taker = loads.index(min(loads))
            loads[taker] += costs[name]
            if taker == self.rank:
                own.add(name)
        return own

    @_heard()
    def summed(
        self, moments: dict[str, Moments], sites: Sequence[str], full: bool, device: torch.device
    ) -> dict[str, Moments]:
        """Everyone's sums at the sites that a token reached anywhere. full: as they were gathered."""
        if self.size == 1:
            return moments
        channels = torch.tensor([moments[site].square_K.numel() if site in moments else 0 for site in sites])
        dist.all_reduce(channels, dist.ReduceOp.MAX)
        whole: dict[str, Moments] = {}
        for site, count in zip(sites, channels.tolist(), strict=True):
            if count:
                own = moments.get(site) or Moments.zeros(count, device, full)
                tokens = torch.tensor(own.tokens)
                for part in (tokens, own.square_K, own.abs_K, own.gram_KK):
                    if part is not None:
                        dist.all_reduce(part)
                own.tokens = int(tokens)
                whole[site] = own
        return whole


ALONE = Ranks()


def local_rank() -> int:
    """This process's number on its machine, by which it takes a device. Raises RankLost."""
    return _number("LOCAL_RANK", 0)


def _number(name: str, default: int) -> int:
    """What torchrun says in an environment variable. Raises RankLost where that is no number from 0 on."""
    text = os.environ.get(name, str(default))
    if not re.fullmatch(r"[0-9]+", text):
        raise RankLost(f"{name} is {text!r}, expected a number: start the processes by torchrun, or unset it for one")
    return int(text)


@contextlib.contextmanager
def joined(device: torch.device) -> Iterator[Ranks]:
    """The processes that torchrun started, or this one alone. device: where this one computes. Raises RankLost."""
    size = _number("WORLD_SIZE", 1)
    if size <= 1:
        yield ALONE
        return
    if missing := [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]:
        raise RankLost(
            f"WORLD_SIZE says {size} processes, but {', '.join(missing)} is not set: start them by torchrun, or unset "
            "WORLD_SIZE for one process"
        )
    if (rank := _number("RANK", 0)) >= size:
        raise RankLost(f"RANK is {rank}, but WORLD_SIZE says {size} processes: RANK counts from 0")
    _number("MASTER_PORT", 0)
    with _heard():
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", timeout=_PATIENCE)
    yield Ranks(dist.get_rank(), size)
    dist.destroy_process_group()  # one that fails leaves at once instead, so that the others hear of it
