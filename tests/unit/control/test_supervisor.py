"""A replica's life: start, readiness, crash, hang, failed starts, adoption."""

from __future__ import annotations

import pytest

from gateway.control.reconcile import Reconciler
from gateway.control.replica import State
from tests.support.fake_engine import FakeEngine
from tests.unit.control.conftest import Start, World, until


async def test_from_start_to_ready(start: Start) -> None:
    async with start() as world:
        assert repr(world.replicas[0]) == "<Replica r0 vllm ready>"
        assert world.replicas[0].max_model_len == 2048
        assert world.model("base").engine_models == {"r0": "base"}


async def test_crash_is_restarted_and_told(start: Start) -> None:
    async with start(first_backoff_s=0.2) as world:
        replica, first = world.replicas[0], world.hosts[0].engine
        first.die(-9)
        await until(lambda: replica.state is State.UNHEALTHY)
        assert replica.reason == "the engine was ended by SIGKILL"
        await until(lambda: not world.model("base").engine_models)
        assert world.model("base").unready_reason == "r0 is unhealthy"
        await until(lambda: replica.answers)
        assert world.hosts[0].engine is not first
        assert (replica.restarts, replica.reason) == (1, "")


async def test_one_replica_crashes_the_other_goes_on(start: Start) -> None:
    async with start(replicas=2) as world:
        world.hosts[0].engine.die()
        await until(lambda: list(world.model("base").engine_models) == ["r1"])
        await until(lambda: len(world.model("base").engine_models) == 2)
        assert len(world.hosts[1].engines) == 1


async def test_known_cause_of_a_failed_start(start: Start) -> None:
    def script(world: World) -> None:
        world.script.dies_starting = "blah\ntorch: out of memory\n"

    async with start(wait=False, script=script, first_backoff_s=0.1) as world:
        replica = world.replicas[0]
        await until(lambda: replica.state is State.FAILED)
        assert replica.reason == "the engine ended with status 1 while it started. the model is too big"
        assert len(world.hosts[0].engines) == 1
        world.script.dies_starting = None
        await until(lambda: replica.answers)


async def test_unknown_cause_is_tried_again_before_it_counts_as_failed(start: Start) -> None:
    def script(world: World) -> None:
        world.script.dies_starting = "one\n\ntwo  \n"

    async with start(wait=False, script=script) as world:
        replica = world.replicas[0]
        await until(lambda: replica.state is State.UNHEALTHY)
        await until(lambda: replica.state is State.FAILED)
        assert replica.reason == "the engine ended with status 1 while it started; its last words: one | two"
        assert len(world.hosts[0].engines) == 3
        await until(lambda: len(world.hosts[0].engines) > 4)  # tried on, seldom


async def test_process_that_cannot_be_started(start: Start) -> None:
    def script(world: World) -> None:
        world.script.start_error = "no such file: vllm"

    async with start(wait=False, script=script) as world:
        await until(lambda: world.replicas[0].state is State.FAILED)
        assert world.replicas[0].reason == "no such file: vllm"


async def test_engine_that_never_becomes_ready(start: Start) -> None:
    def script(world: World) -> None:
        world.script.never_ready = True

    async with start(wait=False, script=script, start_s=0.1, first_backoff_s=0.2) as world:
        await until(lambda: world.replicas[0].state is State.LOADING)
        await until(lambda: world.replicas[0].state is State.UNHEALTHY)
        assert "--start-timeout-s" in world.replicas[0].reason
        await until(lambda: not world.hosts[0].engines[0].alive())  # ended, not left running


async def test_no_requests_for_an_engine_whose_workers_are_still_ending(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with start(first_backoff_s=0.2) as world:
        engine, replica = world.hosts[0].engine, world.replicas[0]
        monkeypatch.setattr(engine, "alive", lambda: True)
        engine.die()
        await engine.gone()
        await until(lambda: not replica.answers)
        assert replica.reason == "the engine was ended by SIGKILL"


async def test_hanging_engine_is_restarted(start: Start) -> None:
    async with start(first_backoff_s=0.2) as world:
        first = world.hosts[0].engine
        world.script.unhealthy = True
        await until(lambda: world.replicas[0].state is State.UNHEALTHY)
        assert world.replicas[0].reason == "the engine did not answer 2 health checks in a row"
        world.script.unhealthy = False
        await world.ready()
        assert not first.alive()


async def test_missed_health_checks_in_between_are_forgiven(start: Start) -> None:
    async with start(health_misses=3) as world:
        engine = world.hosts[0].engine
        for _ in range(3):
            world.script.unhealthy = True
            await checked(engine)
            world.script.unhealthy = False
            await checked(engine)
            await checked(engine)
        assert world.hosts[0].engines == [engine]


async def checked(engine: FakeEngine) -> None:
    """Wait for one more health check."""
    seen = engine.health_checks
    await until(lambda: engine.health_checks > seen)


async def test_running_engine_is_adopted(start: Start) -> None:
    async with start() as old:
        running: FakeEngine = old.hosts[0].engine

        def script(world: World) -> None:
            world.hosts[0].adoptable = running

        async with start(script=script) as world:
            assert world.replicas[0].endpoint == running.endpoint
            assert world.hosts[0].engines == []


@pytest.mark.parametrize("purposes", [["operator"], ["operator", "other"]])
async def test_draining(start: Start, purposes: list[str]) -> None:
    async with start() as world:
        replica = world.replicas[0]
        for purpose in purposes:
            replica.drain(purpose)
        await until(lambda: not world.model("base").engine_models)
        assert repr(replica) == "<Replica r0 vllm draining>"
        assert world.core.publisher.current is not None
        assert [r.accepting for r in world.core.publisher.current.replicas] == [False]
        for purpose in purposes:
            assert not replica.accepting
            replica.resume(purpose)
        assert replica.accepting


async def test_stop_ends_the_engines(start: Start) -> None:
    async with start() as world:
        engine = world.hosts[0].engine
    assert world.hosts[0].closed
    assert not engine.alive()


async def test_defect_of_ours_ends_control(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is started again by its parent, and adopts the engines; hiding the defect would leave adapters unkept."""

    async def broken(*_: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(Reconciler, "keep", broken)
    with pytest.raises(ExceptionGroup) as caught:
        async with start(wait=False) as world:
            await until(lambda: world.replicas[0].backend is not None)
            await world.core.wait_for(lambda: False, 0.1)
    assert caught.group_contains(ZeroDivisionError)
