"""When a job that trains yields to serving, and when it goes on."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import httpx2
import pytest

from backends import envs
from backends.spec import EngineSpec
from gateway.config import ConfigError, load
from gateway.control import wiring
from gateway.control.core import Core
from gateway.observe.cells import PRESSING, Cells
from gateway.tuning.pressure import Pressure, Queues, Rule, after
from gateway.tuning.trainer import Place

RULE = Rule(wait_s=2.0)


def looks(*waiting: int, before: Pressure | None = None, every_s: float = 0.5) -> list[bool]:
    """Whether training is held after each look."""
    state, held = before or Pressure(), []
    for i, count in enumerate(waiting):
        state = after(state, count, i * every_s, RULE)
        held.append(state.held)
    return held


def test_what_waits_for_long_holds() -> None:
    assert looks(1, 3, 1, 1, 2, 1) == [False, False, False, False, True, True]


def test_a_look_without_any_begins_anew() -> None:
    assert not any(looks(1, 1, 1, 1, 0, 1, 1, 1, 1))


def test_it_goes_on_after_a_long_calm_only() -> None:
    calm = int(RULE.calm_s / 0.5)
    assert looks(*[0] * (calm + 1), before=Pressure(held=True)) == [True] * calm + [False]
    assert all(looks(*[0] * calm, 1, *[0] * calm, before=Pressure(held=True)))


@pytest.mark.parametrize("every_s", [0.1, 10.0])
def test_it_goes_by_the_clock(every_s: float) -> None:
    assert sum(not held for held in looks(*[1] * 30, every_s=every_s)) == (20 if every_s == 0.1 else 1)


async def test_what_waits_is_added_up(tmp_path: Path) -> None:
    """At relays and in engines; those of batches that an engine has may be what waits there."""
    for relay, count in enumerate((2, 1)):
        cells = Cells(tmp_path / f"relay-{relay}.cells")
        cells.values[PRESSING] = count
        cells.close()

    def engine(waiting: int | None) -> Any:
        page = f'vllm:num_requests_waiting{{engine="0"}} {waiting}\n'
        answer = httpx2.Response(503) if waiting is None else httpx2.Response(200, text=page)
        client = httpx2.AsyncClient(transport=httpx2.MockTransport(lambda _: answer), base_url="http://engine")
        return SimpleNamespace(answers=True, client=client, backend=SimpleNamespace(name="vllm"))

    core = SimpleNamespace(setup=SimpleNamespace(run_dir=tmp_path), replicas=[engine(4), engine(5), engine(None)])
    in_flight = [16, 6]
    queues = Queues(cast(Core, core), in_flight.pop)
    assert await queues.waiting(engines=True) == 3 + 9 - 6
    assert await queues.waiting(engines=True) == 3
    assert await queues.waiting(engines=False) == 3


def training(device: str | None, **flags: Any) -> wiring.Training:
    """device: of the engines; None: they are attached."""
    spec = SimpleNamespace(device=device, tensor_parallel=2, pipeline_parallel=1) if device else None
    return wiring._training(load(None, flags), cast(EngineSpec | None, spec), Place(Path(), Path(), 1))


@pytest.mark.parametrize(
    ("engines", "flags", "wait_s"),
    [
        ("cpu", {"train_device": "cpu"}, 2.0),
        ("cuda", {"train_device": "cuda"}, 2.0),
        ("cuda", {"train_device": "cuda:2"}, None),
        ("cuda", {"train_device": "cpu"}, None),
        ("cuda", {"train_device": "cpu", "train_pause_wait_ms": 500}, 0.5),
        ("cuda", {"train_device": "cuda", "train_pause_wait_ms": 0}, None),
        (None, {"train_device": "cpu"}, None),
    ],
)
def test_only_a_shared_device_is_yielded(
    engines: str | None, flags: dict[str, Any], wait_s: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(envs, "gpu_count", lambda: 3)
    rule = training(engines, **flags).rule
    assert (rule.wait_s if rule else None) == wait_s


def test_a_gpu_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(envs, "gpu_count", lambda: 8)
    trainer = training("cuda", train_device="cuda:2").trainer
    assert trainer.device == "cuda" and trainer._own_device == {"CUDA_VISIBLE_DEVICES": "2"}
    with pytest.raises(ConfigError, match="replicas use the first 2 GPUs"):
        training("cuda", train_device="cuda:1")
    with pytest.raises(ConfigError, match="train_device"):
        load(None, {"train_device": "gpu"})
    with pytest.raises(ConfigError, match="there are 8 GPUs, counted from 0"):
        training("cuda", train_device="cuda:8")


def test_gpus_are_counted_as_the_gateway_sees_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """And no engine is given the one of jobs, whatever its number."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7,6,2,5")
    assert training("cuda", train_device="cuda:2").trainer._own_device == {"CUDA_VISIBLE_DEVICES": "2"}
    spec = cast(EngineSpec, SimpleNamespace(device="cuda", tensor_parallel=2, pipeline_parallel=1))
    assert wiring._engine_gpus(load(None, {"train_device": "cuda:2"}), spec) == "7,6,5"
    with pytest.raises(ConfigError, match="replicas use the first 2 GPUs"):
        training("cuda", train_device="cuda:1")
    with pytest.raises(ConfigError, match="there are 4 GPUs"):
        training("cuda", train_device="cuda:4")


def test_a_limit_of_files_is_a_number() -> None:
    with pytest.raises(ConfigError, match="max_files_gb"):
        load(None, {"max_files_gb": float("inf")})
