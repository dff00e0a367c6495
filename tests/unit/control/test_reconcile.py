"""Adapters on replicas: loaded, verified, mended, unloaded, whatever the engines do."""

from __future__ import annotations

import asyncio
from typing import Any

import msgspec
import pytest

from backends import upstream
from gateway.control.catalog import VersionState
from gateway.control.replica import AdapterState, AdapterStatus, State
from gateway.errors import Conflict, InvalidRequest
from gateway.observe.cells import IN_FLIGHT_ROW, Cells
from gateway.observe.series import IN_FLIGHT
from gateway.snapshot import Applied, Delta, ToRelay
from tests.support.fake_engine import Script
from tests.unit.control.conftest import Start, World, until


async def test_upload_is_loaded_verified_and_published(start: Start) -> None:
    async with start(replicas=2) as world:
        shown, new = await world.upload("pirate")
        assert (new, shown["state"], shown["current"]) == (True, "ready", True)
        content_id = world.content_id("pirate")
        assert world.model("pirate").engine_models == {"r0": content_id, "r1": content_id}
        assert world.model("pirate") == msgspec.structs.replace(world.model("pirate@v1"), id="pirate")
        for host in world.hosts:
            assert host.calls == [f"load {content_id}", f"ask {content_id}"]
        assert repr(world.replicas[0]) == f"<Replica r0 vllm ready: {content_id} ready>"


async def test_base_is_served_while_an_adapter_is_loaded(start: Start) -> None:
    async with start() as world:
        world.script.hangs_loading = True
        shown, _ = await world.upload("slow", wait_s=0.1)
        assert shown["state"] == "loading"
        assert world.model("base").engine_models == {"r0": "base"}
        assert world.model("slow").unready_reason == "it is loading on r0"


async def test_new_version_takes_over_when_it_is_ready_everywhere(start: Start) -> None:
    async with start(replicas=2) as world:
        await world.upload("pirate", seed=1)
        first = world.content_id("pirate")
        world.hosts[1].script.busy = True
        shown, new = await world.upload("pirate", seed=2, wait_s=0.2)
        second = world.content_id("pirate")
        assert (new, shown["version"], shown["current"]) == (True, 2, False)
        await until(lambda: world.model("pirate@v2").engine_models == {"r0": second})
        await until(lambda: world.service.adapter("pirate@v2")["state"] == "verifying")
        assert set(world.model("pirate").engine_models.values()) == {first}
        world.hosts[1].script.busy = False
        await until(lambda: set(world.model("pirate").engine_models.values()) == {second})
        assert set(world.model("pirate@v1").engine_models.values()) == {first}


async def test_the_same_bytes_are_one_version(start: Start) -> None:
    async with start() as world:
        first, _ = await world.upload("pirate")
        again, new = await world.upload("pirate")
        assert (again, new) == (first, False)
        other, new = await world.upload("corsair")
        assert (other["sha256"], other["id"], new) == (first["sha256"], "corsair@v1", True)
        assert world.hosts[0].calls.count(f"load {world.content_id('pirate')}") == 1


async def test_the_same_bytes_while_their_name_is_deleted(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    async with start() as world:
        await world.upload("pirate")
        registry = world.core.registry
        aim = registry.aim

        async def deleted_first(*given: Any) -> None:
            await registry.delete("pirate")
            await aim(*given)

        monkeypatch.setattr(registry, "aim", deleted_first)
        with pytest.raises(Conflict, match="pirate@v1 was deleted meanwhile"):
            await world.upload("pirate")
        monkeypatch.undo()
        shown, new = await world.upload("pirate")
        assert (shown["state"], new) == ("ready", True)


async def test_engine_that_says_200_and_does_not_have_it(start: Start) -> None:
    async with start() as world:
        world.script.forgets = True
        with pytest.raises(InvalidRequest, match=r"said that it loaded a-.*, and does not list it"):
            await world.upload("ghost")
        assert world.core.registry.adapters == {}
        await until(lambda: list((world.state / "adapters").iterdir()) == [])


async def test_engine_refuses(start: Start) -> None:
    async with start(replicas=2) as world:
        for host in world.hosts:
            host.script.rejects = "LoRA rank 64 is greater than max_lora_rank 16."
        with pytest.raises(InvalidRequest) as caught:
            await world.upload("big")
        assert "LoRA rank 64 is greater than max_lora_rank 16." in caught.value.message
        assert caught.value.code == "adapter_refused"
        assert world.core.registry.adapters == {}
        # Only one replica was asked: what no engine has taken yet is tried on one at a time.
        assert sum(len(host.calls) for host in world.hosts) == 1


async def test_first_request_fails(start: Start) -> None:
    async with start() as world:
        world.script.fails_answering = True
        with pytest.raises(InvalidRequest, match="answered the first request with it by 500: size mismatch"):
            await world.upload("broken")
        await until(lambda: world.hosts[0].calls[-1].startswith("unload"))
        assert world.hosts[0].engine.adapters == {}


async def test_adapter_that_kills_engines_is_condemned_after_two(start: Start) -> None:
    async with start(replicas=2) as world:
        for host in world.hosts:
            host.script.dies_answering = True
        with pytest.raises(InvalidRequest, match="died or hung 2 times"):
            await world.upload("killer")
        await world.ready()
        assert sum(len(host.engines) for host in world.hosts) == 4
        assert sum(call.startswith("load ") for host in world.hosts for call in host.calls) == 2


async def test_condemned_adapter_is_not_tried_after_a_restart_of_control(start: Start) -> None:
    async with start(verify_s=0.2) as world:
        world.script.dies_loading = True
        shown, _ = await world.upload("killer", wait_s=0.0)
        assert shown["state"] != "ready"
        await until(lambda: world.core.registry.adapters["killer"].newest.state is VersionState.FAILED)
    async with start() as world:
        await asyncio.sleep(0.05)
        assert world.hosts[0].calls == []
        assert "died or hung 2 times" in world.service.adapter("killer")["reason"]
        assert "died or hung 2 times" in world.model("killer").unready_reason
        shown, new = await world.upload("killer")  # sent again: tried again
        assert (shown["state"], shown["version"], new) == ("ready", 1, True)


async def test_hanging_load_restarts_the_replica(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(upstream, "LOAD_TIMEOUT_S", 0.05)
    async with start(first_backoff_s=0.2) as world:
        world.script.hangs_loading = True
        uploading = asyncio.create_task(world.upload("slow"))
        await until(lambda: world.replicas[0].state is State.UNHEALTHY)
        assert "did not answer /v1/load_lora_adapter" in world.replicas[0].reason
        world.script.hangs_loading = False
        monkeypatch.undo()
        shown, _ = await uploading
        assert shown["state"] == "ready"
        assert not world.hosts[0].engines[0].alive()


async def test_an_adapter_is_not_blamed_for_replicas_that_are_taken_away(start: Start) -> None:
    """However often one is stopped, by a reload or a switch, while it loads it."""
    async with start() as world:
        world.script.hangs_loading = True
        uploading = asyncio.create_task(world.upload("slow"))
        for _ in range(3):
            last = world.hosts[-1]
            await until(lambda last=last: any(call.startswith("load") for call in last.calls))
            world.next_script = Script(hangs_loading=True)
            more = await world.estate.add(world.estate.running.config, 1)
            await world.core.remove(world.replicas[0])
            assert world.replicas == more
        await until(lambda: any(call.startswith("load") for call in world.hosts[-1].calls))
        world.next_script.hangs_loading = False
        world.hosts[-1].engine.die()
        shown, _ = await uploading
        assert shown["state"] == "ready"


async def test_no_adapter_is_blamed_where_no_process_could_be_started(start: Start) -> None:
    async with start(backend="lmdeploy") as world:
        world.script.start_error = "cannot allocate memory"
        uploading = asyncio.create_task(world.upload("pirate"))
        await until(lambda: world.replicas[0].state is State.FAILED)
        await until(lambda: len(world.hosts[0].started_with) > 2)
        world.script.start_error = None
        shown, _ = await uploading
        assert shown["state"] == "ready"


async def test_busy_engine_is_asked_again_and_left_running(start: Start) -> None:
    async with start() as world:
        world.script.busy = True
        uploading = asyncio.create_task(world.upload("pirate"))
        await until(lambda: sum("ask" in call for call in world.hosts[0].calls) >= 2)
        world.script.busy = False
        assert (await uploading)[0]["state"] == "ready"
        assert len(world.hosts[0].engines) == 1


async def test_restarted_engine_gets_its_adapters_back(start: Start) -> None:
    async with start() as world:
        await world.upload("one", seed=1)
        await world.upload("two", seed=2)
        wanted = {world.content_id("one"), world.content_id("two")}
        world.hosts[0].engine.die()
        await until(lambda: not world.model("one").engine_models)
        assert world.model("one").unready_reason in ("r0 is unhealthy", "r0 is starting", "r0 is loading")
        await until(lambda: world.model("one").engine_models and world.model("two").engine_models)
        assert set(world.hosts[0].engine.adapters) == wanted


async def test_adapter_that_an_engine_lost_is_loaded_again(start: Start) -> None:
    async with start(resync_s=0.02) as world:
        await world.upload("pirate")
        content_id = world.content_id("pirate")
        world.hosts[0].engine.adapters.clear()
        await until(lambda: world.hosts[0].calls.count(f"load {content_id}") == 2)
        await until(lambda: world.core.publisher.current and world.model("pirate").engine_models)


async def test_restarted_control_finds_adapters_and_verifies_them(start: Start) -> None:
    async with start() as old:
        await old.upload("pirate")
        engine = old.hosts[0].engine
        calls = len(old.hosts[0].calls)

        def script(world: World) -> None:
            world.hosts[0].adoptable = engine

        async with start(script=script) as world:
            await until(lambda: world.core.publisher.current and world.model("pirate").engine_models)
            assert engine.calls[calls:] == [f"ask {world.content_id('pirate')}"]
            assert world.core.publisher.current and old.core.publisher.current
            assert world.core.publisher.current.version > old.core.publisher.current.version


async def test_delete_unpublishes_then_unloads_then_removes_the_files(start: Start) -> None:
    async with start() as world:
        await world.upload("pirate")
        content_id = world.content_id("pirate")
        await world.service.delete("pirate")
        assert world.core.publisher.current is not None
        assert set(world.core.publisher.current.models) == {"base"}
        await until(lambda: world.hosts[0].calls[-1] == f"unload {content_id}")
        await until(lambda: list((world.state / "adapters").iterdir()) == [])
        assert repr(world.replicas[0]) == "<Replica r0 vllm ready>"


async def test_unload_waits_for_the_relays(start: Start) -> None:
    async with start(relays_s=30) as world:
        await world.upload("pirate")
        reader, writer = await asyncio.open_unix_connection(world.run_dir / "snapshots.sock", limit=1 << 20)
        cells = Cells(world.run_dir / "relay-0.cells")
        cells.name_row(IN_FLIGHT, 0, "r0")
        cells.values[IN_FLIGHT_ROW] = 1
        deleting = asyncio.create_task(world.service.delete("pirate"))
        names: set[str] = {"pirate"}
        while "pirate" in names:
            said: Any = msgspec.json.decode(await reader.readline(), type=ToRelay)
            names = (names | said.changed.keys()) - set(said.removed) if isinstance(said, Delta) else set(said.models)
        await until(lambda: AdapterState.DRAINING in [s.state for s in world.replicas[0].adapters.values()])
        await asyncio.sleep(0.05)
        assert not deleting.done()  # the relay has not said that it routes by this
        assert not any(call.startswith("unload") for call in world.hosts[0].calls)
        writer.write(msgspec.json.encode(Applied(0, said.version)) + b"\n")
        await deleting
        await asyncio.sleep(0.05)
        assert not any(call.startswith("unload") for call in world.hosts[0].calls)  # a request is in flight
        cells.values[IN_FLIGHT_ROW] = 0
        await until(lambda: any(call.startswith("unload") for call in world.hosts[0].calls))
        writer.close()
        cells.close()


async def test_delete_leaves_what_another_name_needs(start: Start) -> None:
    async with start() as world:
        await world.upload("pirate")
        await world.upload("corsair")
        await world.service.delete("pirate")
        await asyncio.sleep(0.05)
        assert world.model("corsair").engine_models
        assert not any("unload" in call for call in world.hosts[0].calls)
        assert len(list((world.state / "adapters").iterdir())) == 1


async def test_unload_that_hangs_restarts_the_replica(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(upstream, "UNLOAD_TIMEOUT_S", 0.05)
    async with start() as world:
        await world.upload("pirate")
        world.script.hangs_unloading = True
        await world.service.delete("pirate")
        await until(lambda: len(world.hosts[0].engines) == 2)
        await world.ready()
        assert world.hosts[0].engine.adapters == {}


async def test_unload_that_does_nothing_restarts_the_replica(start: Start) -> None:
    async with start(first_backoff_s=0.2) as world:
        await world.upload("pirate")
        world.script.keeps_unloaded = True
        await world.service.delete("pirate")
        await until(lambda: world.replicas[0].state is State.UNHEALTHY)
        assert "still lists it" in world.replicas[0].reason
        await world.ready()


async def test_adapters_of_others_are_left_alone(start: Start) -> None:
    async with start(resync_s=0.01) as world:
        world.hosts[0].engine.adapters["someone-elses"] = "/x"
        await world.upload("pirate")
        await world.service.delete("pirate")
        await until(lambda: world.hosts[0].calls[-1].startswith("unload"))
        assert list(world.hosts[0].engine.adapters) == ["someone-elses"]


async def test_one_replica_refuses_what_works_elsewhere(start: Start) -> None:
    def script(world: World) -> None:
        world.hosts[1].script.never_ready = True
        world.hosts[1].script.rejects = "no memory"

    async with start(replicas=2, wait=False, script=script, start_s=30) as world:
        await until(lambda: world.replicas[0].answers)
        await world.upload("pirate")
        content_id = world.content_id("pirate")
        world.hosts[1].script.never_ready = False
        await until(
            lambda: world.replicas[1].adapters.get(content_id) == AdapterStatus(AdapterState.FAILED, "no memory")
        )
        shown = world.service.adapter("pirate")
        assert (shown["state"], shown["reason"]) == ("failed", "r1: no memory")
        assert world.model("pirate").engine_models == {"r0": content_id}  # the one that has it serves it
        world.hosts[1].script.rejects = None
        await until(lambda: len(world.model("pirate").engine_models) == 2)


async def test_more_than_an_engine_takes_at_its_start(start: Start) -> None:
    async with start(backend="lmdeploy", capacity=3) as world:  # two names and the spare one
        await world.upload("one", seed=1)
        await world.upload("two", seed=2)
        with pytest.raises(Conflict) as caught:
            await world.upload("three", seed=3)
        assert "--max-adapters 3" in caught.value.message
        await until(lambda: len(list((world.state / "adapters").iterdir())) == 2)


async def test_old_versions_give_way(start: Start) -> None:
    async with start(capacity=2) as world:
        await world.upload("pirate", seed=1)
        old = world.content_id("pirate")
        for seed in (2, 3):
            shown, _ = await world.upload("pirate", seed=seed)
            assert (shown["state"], shown["current"]) == ("ready", True)
        await until(lambda: old not in world.hosts[0].engine.adapters)
        assert world.service.adapter("pirate@v1")["state"] == "unloaded"
        assert "--max-adapters" in world.service.adapter("pirate@v1")["reason"]
        assert world.model("pirate@v2").engine_models


async def test_engine_that_takes_adapters_at_start_is_rolled_one_by_one(start: Start) -> None:
    async with start(backend="lmdeploy", replicas=2) as world:
        fewest = 2
        uploading = asyncio.create_task(world.upload("pirate"))
        while not uploading.done():
            fewest = min(fewest, sum(replica.accepting for replica in world.replicas))
            await asyncio.sleep(0.001)
        shown, _ = await uploading
        content_id = world.content_id("pirate")
        assert (shown["state"], fewest) == ("ready", 1)
        for host in world.hosts:
            assert host.started_with == [frozenset(), frozenset({content_id})]
        assert len(world.model("pirate").engine_models) == 2


async def test_a_version_is_ready_when_its_name_answers_with_it(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    async with start(backend="lmdeploy", replicas=2, drain_s=20.0) as world:
        await world.upload("pirate", seed=1)
        old = world.content_id("pirate")
        held, rolled = True, list[int]()

        def in_flight(index: int) -> int:
            """The replica that is started again first is idle; the other has a request until it is let go."""
            rolled.append(index)
            return int(held and index != rolled[0])

        monkeypatch.setattr(world.core._cells, "replica", in_flight)
        shown, _ = await world.upload("pirate", seed=2, wait_s=0)
        new = world.content_id("pirate")
        await until(lambda: len(set(rolled)) == 2 and world.replicas[rolled[0]].adapter_ready(new))
        # One has both versions, the other only the old one, which is ready on both and is what the name answers with.
        assert set(world.model("pirate").engine_models.values()) == {old}
        assert (await world.service.show("pirate@v1"))["state"] == "ready"
        for polled in ("pirate", shown["id"]):
            shown = await world.service.show(polled)
            assert (shown["id"], shown["state"], shown["current"]) == ("pirate@v2", "loading", False)
            assert (shown["current_version"], shown["coming"]) == (1, 2)
        assert [adapter["id"] for adapter in world.service.list_adapters()] == ["pirate@v2"]
        assert world.service.answering("pirate")["id"] == "pirate@v1"
        held = False
        deadline = asyncio.get_running_loop().time() + 20
        while (shown := await world.service.show("pirate"))["state"] != "ready":
            assert asyncio.get_running_loop().time() < deadline, shown
            await asyncio.sleep(0.002)
        assert (shown["id"], shown["current"]) == ("pirate@v2", True)
        assert set(world.model("pirate").engine_models.values()) == {new}


async def test_ready_everywhere_is_not_ready_before_the_name_moved(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with start() as world:
        await world.upload("pirate", seed=1)
        monkeypatch.setattr(world.core, "can_take_over", lambda version: False)
        await world.upload("pirate", seed=2, wait_s=0)
        await until(lambda: world.replicas[0].adapter_ready(world.content_id("pirate")))
        for polled in ("pirate", "pirate@v2"):
            shown = world.service.adapter(polled)
            assert (shown["state"], shown["reason"]) == ("verifying", "pirate does not point to it yet")
            assert [replica["state"] for replica in shown["replicas"]] == ["ready"]
        monkeypatch.undo()
        await world.core.published()
        await until(lambda: world.service.adapter("pirate")["state"] == "ready")
        assert world.core.registry.adapters["pirate"].current == 2


async def test_its_only_replica_announces_the_restart(start: Start) -> None:
    async with start(backend="lmdeploy") as world:
        uploading = asyncio.create_task(world.upload("pirate"))
        await until(lambda: world.replicas[0].state is State.LOADING)
        assert "lmdeploy takes adapters only at its start" in world.replicas[0].reason
        assert (await uploading)[0]["state"] == "ready"
        await world.service.delete("pirate")
        await asyncio.sleep(0.05)
        assert len(world.hosts[0].engines) == 2  # deleting needs no restart: nobody can name it any more


async def test_static_adapter_that_keeps_the_engine_from_starting(start: Start) -> None:
    async with start(backend="lmdeploy", replicas=2) as world:
        await world.upload("good", seed=1)
        for host in world.hosts:
            host.script.starts_only_with = {world.content_id("good")}
        with pytest.raises(InvalidRequest, match=r"r\d did not start with it"):
            await world.upload("bad", seed=2)
        await until(lambda: len(world.model("good").engine_models) == 2)
        # The other replica was never touched by the bad one.
        assert sorted(len(host.engines) for host in world.hosts) == [2, 4]
