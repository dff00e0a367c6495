"""Layers on their way in and out while another is computed: one thread reads ahead, one writes behind.

From and to a CUDA device copies go through page-locked memory: the device fetches and leaves them by itself.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

Tensors = dict[str, Tensor]

_UNWRITTEN = 2  # shards on their way to the disk before the next has to wait: what memory they take is bounded


class ReadAhead:
    """The weights of some layers, in order; while one is worked on, the next is read. A context manager."""

    def __init__(self, read: Callable[[int], Tensors], layers: Sequence[int], device: torch.device) -> None:
        """read: a layer's weights in host memory, called in a thread of its own. Begins at once with the first."""
        self._read, self._left, self._device = read, deque(layers), device
        self._pool = ThreadPoolExecutor(1, "read-ahead", initializer=_work_for, initargs=(device,))
        self._coming: Future[Tensors] | None = None
        self._go_on()

    def __enter__(self) -> ReadAhead:
        return self

    def __exit__(self, *failure: object) -> None:
        self._pool.shutdown(cancel_futures=True)

    def take(self) -> Tensors:
        """The next layer's weights on the device. Raises what reading them raised."""
        assert self._coming is not None, "no layer is left"
        weights = self._coming.result()
        self._go_on()
        return {name: tensor.to(self._device, non_blocking=True) for name, tensor in weights.items()}

    def _go_on(self) -> None:
        self._coming = self._pool.submit(self._fetch, self._left.popleft()) if self._left else None

    def _fetch(self, layer: int) -> Tensors:
        weights = self._read(layer)
        if self._device.type != "cuda":
            return weights
        return {name: tensor.pin_memory() for name, tensor in weights.items()}


class WriteBehind:
    """Shards written in order by a thread of their own. A context manager.

    What was given is written even when the block fails; when it does not, leaving it waits for the disk, and raises
    what a write raised.
    """

    def __init__(self, put: Callable[[str, Tensors, Any], None]) -> None:
        """put: (shard's name, tensors on the host, notes), returns when all is on the disk."""
        self._put = put
        self._pool = ThreadPoolExecutor(1, "write-behind")
        self._writing: deque[Future[None]] = deque()

    def __enter__(self) -> WriteBehind:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pool.shutdown()
        while kind is None and self._writing:
            self._writing.popleft().result()

    def put(self, shard: str, tensors: Tensors, notes: Any) -> None:
        """Begin to write a shard. Raises what an earlier write raised; waits where too many are unwritten."""
        while self._writing and (len(self._writing) >= _UNWRITTEN or self._writing[0].done()):
            self._writing.popleft().result()
        host = {name: tensor.to("cpu", non_blocking=True) for name, tensor in tensors.items()}
        copied = None
        if any(tensor.is_cuda for tensor in tensors.values()):
            copied = torch.cuda.Event(blocking=True)
            copied.record()
        self._writing.append(self._pool.submit(self._write, shard, host, notes, copied))

    def _write(self, shard: str, host: Tensors, notes: Any, copied: torch.cuda.Event | None) -> None:
        if copied is not None:
            copied.synchronize()
        self._put(shard, host, notes)


def _work_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.set_device(device)  # a thread begins on the first, and would take memory there
