"""Bring a step's metrics to the host; where that would make it wait for the step, one step later."""

from __future__ import annotations

from typing import Any

import torch


class Readback:
    """Where `late`, holds the metrics of the newest step until the next one has been queued on the device."""

    def __init__(self, device: torch.device, *, late: bool) -> None:
        self._on_cuda, self._late = device.type == "cuda", late
        self._waiting: list[tuple[dict[str, Any], list[str], torch.Tensor, Any]] = []

    def push(self, record: dict[str, Any], metrics: dict[str, torch.Tensor]) -> list[dict[str, Any]]:
        """Hand in a step; get the records that are complete now, metrics filled in."""
        names = list(metrics)
        values = torch.stack([metrics[name].float() for name in names])
        copied = None
        if self._on_cuda:
            values = torch.empty(len(names), pin_memory=True).copy_(values, non_blocking=True)
            copied = torch.cuda.Event()
            copied.record()
        self._waiting.append((record, names, values, copied))
        return [self._take()] if len(self._waiting) > self._late else []

    def drain(self) -> list[dict[str, Any]]:
        """The records still held; waits for the device."""
        return [self._take() for _ in range(len(self._waiting))]

    def _take(self) -> dict[str, Any]:
        record, names, values, copied = self._waiting.pop(0)
        if copied is not None:
            copied.synchronize()
        return record | dict(zip(names, values.tolist(), strict=True))
