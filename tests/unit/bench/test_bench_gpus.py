"""GPU power and memory beside the load, with an NVML made for the purpose."""

from __future__ import annotations

import sys
import time
from types import SimpleNamespace

import pytest

from bench.load import watch
from bench.load.gpus import Gpus
from bench.prepare import environment


class NVMLError(Exception):
    """What NVML raises."""


class FakeNvml(SimpleNamespace):
    """Two GPUs; the second does not tell its power."""

    NVMLError = NVMLError

    def nvmlInit(self) -> None:
        if self.broken:
            raise NVMLError("no driver")

    def nvmlDeviceGetCount(self) -> int:
        return 2

    def nvmlDeviceGetHandleByIndex(self, number: int) -> int:
        return number

    def nvmlDeviceGetName(self, handle: int) -> str:
        return f"GPU {handle}"

    def nvmlDeviceGetPowerUsage(self, handle: int) -> int:
        if handle:
            raise NVMLError("not supported")
        return 350_000

    def nvmlDeviceGetMemoryInfo(self, handle: int) -> SimpleNamespace:
        return SimpleNamespace(used=70_000_000_000)

    def nvmlDeviceGetUtilizationRates(self, handle: int) -> SimpleNamespace:
        return SimpleNamespace(gpu=87)


def install(monkeypatch: pytest.MonkeyPatch, broken: bool = False) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", FakeNvml(broken=broken))


def test_power_and_memory_are_sampled_on_the_runs_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch)
    monkeypatch.setattr(watch, "INTERVAL_S", 0.005)
    origin_ns = time.monotonic_ns()
    with watch.Watch(origin_ns, []) as looking:
        deadline_s = time.monotonic() + 5
        while len(looking.samples) < 4 and time.monotonic() < deadline_s:
            time.sleep(0.005)
    first, second, *_ = looking.samples
    assert (first.source, first.values) == (
        "gpu:0",
        {"power_w": 350.0, "memory_bytes": 7e10, "utilization": 0.87},
    )
    assert (second.source, second.values) == ("gpu:1", {"memory_bytes": 7e10, "utilization": 0.87})
    assert 0 < first.t_ns < time.monotonic_ns() - origin_ns
    assert environment(1)["gpus"] == ["GPU 0", "GPU 1"]


def test_without_a_driver_or_the_package_there_are_no_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, broken=True)
    assert Gpus().names() == [] and Gpus().read() == []
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert Gpus().names() == []
