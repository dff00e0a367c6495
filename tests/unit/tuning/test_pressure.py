"""When a job that trains yields to serving, and when it goes on."""

from __future__ import annotations

from collections.abc import Callable
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
from gateway.tuning import pressure as module
from gateway.tuning.pressure import Look, Pressure, Queues, Rule, after
from gateway.tuning.trainer import Place

RULE = Rule(wait_s=2.0)


def looks(*waiting: int, before: Pressure | None = None, every_s: float = 0.5) -> list[bool]:
    """Whether training is held after each look."""
    state, held = before or Pressure(), []
    for i, count in enumerate(waiting):
        state = after(state, count > 0, i * every_s, RULE)
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

    in_flight = [16, 6]
    queues = queues_of(tmp_path, says(4), says(5), lambda _: httpx2.Response(404), batches=in_flight.pop)
    assert await queues.look(engines=True) == Look(3 + 9 - 6)
    assert await queues.look(engines=True) == Look(3)
    assert await queues.look(engines=False) == Look(3)


def slow(request: httpx2.Request) -> httpx2.Response:
    raise httpx2.ReadTimeout("too slow", request=request)


def broken(request: httpx2.Request) -> httpx2.Response:
    raise httpx2.ReadError("reset", request=request)


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (slow, "it did not answer /metrics within 2 s"),
        (broken, "it did not answer /metrics: reset"),
        (lambda _: httpx2.Response(503), "it answered /metrics by 503"),
        (None, "it is starting again"),
    ],
)
async def test_an_engine_that_does_not_say_may_have_a_queue(tmp_path: Path, answer: Answer | None, words: str) -> None:
    look = await queues_of(tmp_path, says(0), answer).look(engines=True)
    assert look == Look(0, {"r1": words}) and look.busy
    assert look.why(2.0) == f"for 2 s it has not been known whether requests queue at r1 ({words})"
    assert Look(1, look.silent).why(2.0) == "requests have queued for 2 s"


async def test_an_engine_that_never_says_is_not_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """After five minutes; said once. What says something again is asked again."""
    now_s = 1000.0
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: now_s))
    answers: list[Answer] = [slow]
    queues = queues_of(tmp_path, lambda request: answers[0](request))

    async def busy_at(at_s: float) -> bool:
        nonlocal now_s
        now_s = at_s
        return (await queues.look(engines=True)).busy

    async def busy_until(at_s: float) -> bool:
        """Asked every 20 s until then; what the last look says."""
        while now_s + 20 < at_s:
            assert await busy_at(now_s + 20)
        return await busy_at(at_s)

    assert await busy_at(1000) and await busy_until(1299)
    assert [await busy_at(at_s) for at_s in (1300, 1301, 2000)] == [False, False, False]
    told = [record.getMessage() for record in caplog.records]
    assert told == ["r0: it did not answer /metrics within 2 s, for 300 s; jobs no longer yield to its queue"]
    answers[0] = says(0)
    assert not await busy_at(2001)
    answers[0] = slow
    assert await busy_at(2002) and await busy_until(2301)
    assert not await busy_at(2303)


async def test_silence_counts_only_while_somebody_listens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between two jobs nobody asks: an engine that is busy at the end of one may have spoken before the next."""
    now_s = 1000.0
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: now_s))
    queues = queues_of(tmp_path, slow)
    assert (await queues.look(engines=True)).busy
    now_s = 5000.0
    assert (await queues.look(engines=True)).busy


Answer = Callable[[httpx2.Request], httpx2.Response]


def says(waiting: int) -> Answer:
    page = f'vllm:num_requests_waiting{{engine="0"}} {waiting}\n'
    return lambda _: httpx2.Response(200, text=page)


def queues_of(run_dir: Path, *engines: Answer | None, batches: Callable[[], int] = lambda: 0) -> Queues:
    """engines: how each answers; None: its client is gone, though it counts as ready."""

    def replica(number: int, answer: Answer | None) -> Any:
        transport = httpx2.MockTransport(answer) if answer is not None else None
        client = httpx2.AsyncClient(transport=transport, base_url="http://engine") if transport else None
        return SimpleNamespace(id=f"r{number}", answers=True, client=client, backend=SimpleNamespace(name="vllm"))

    replicas = [replica(number, answer) for number, answer in enumerate(engines)]
    return Queues(cast(Core, SimpleNamespace(setup=SimpleNamespace(run_dir=run_dir), replicas=replicas)), batches)


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
