"""Power, memory and use of this machine's GPUs, where nvidia-ml-py and a driver are there."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any


class Gpus:
    """The GPUs that NVML knows; none where it is not installed or finds no driver."""

    def __init__(self) -> None:
        self._handles: list[Any] = []
        try:
            self._nvml: Any = importlib.import_module("pynvml")
        except ImportError:
            return
        try:
            self._nvml.nvmlInit()
        except self._nvml.NVMLError:  # the package is there, the driver is not
            return
        self._handles = [self._nvml.nvmlDeviceGetHandleByIndex(n) for n in range(self._nvml.nvmlDeviceGetCount())]

    def names(self) -> list[str]:
        """What each is called."""
        return [str(self._nvml.nvmlDeviceGetName(handle)) for handle in self._handles]

    def read(self) -> list[dict[str, float]]:
        """One row of figures a GPU: watts, bytes, share of time in use. What a GPU does not tell is left out."""
        return [self._row(handle) for handle in self._handles]

    def _row(self, handle: Any) -> dict[str, float]:
        figures: dict[str, Callable[[], float]] = {
            "power_w": lambda: self._nvml.nvmlDeviceGetPowerUsage(handle) / 1000,
            "memory_bytes": lambda: float(self._nvml.nvmlDeviceGetMemoryInfo(handle).used),
            "utilization": lambda: self._nvml.nvmlDeviceGetUtilizationRates(handle).gpu / 100,
        }
        row = {}
        for name, ask in figures.items():
            try:
                row[name] = ask()
            except self._nvml.NVMLError:
                continue
        return row
