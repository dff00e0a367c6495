"""Switching engines and reloading the configuration, over scripted engines."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path
from random import Random
from typing import Any

import pytest

from backends.process import EngineStartError
from gateway.config import ServeConfig
from gateway.control.fleet import Fleet
from gateway.control.hosting import AttachedHost
from gateway.control.reload import Reload
from gateway.control.replica import State
from gateway.control.running import Notebook, Running, line
from gateway.control.switch import Switch
from gateway.errors import Conflict, InvalidRequest
from tests.support.fake_engine import Script
from tests.unit.control.conftest import FAST, Start, World, until
from tests.unit.control.test_api import api, assert_error
from tests.unit.control.test_hosting import duties as no_duties


def to(world: World, backend: str = "sglang") -> ServeConfig:
    return world.estate.running.config.model_copy(update={"backend": backend})


def picture(world: World) -> Any:
    assert world.core.publisher.current is not None
    return world.core.publisher.current


async def test_the_new_engine_takes_over_with_the_adapters_and_the_old_one_is_stopped(start: Start) -> None:
    async with start(replicas=2) as world:
        await world.upload("pirate")
        old = list(world.hosts)
        seen: list[tuple[str, ...]] = []  # who took traffic for the adapter, at each change
        switch = Switch(world.estate)
        switch.begin(to(world), "beside")
        while switch.show()["switch"]["phase"] == "starting":
            seen.append(tuple(picture(world).models["pirate"].engine_models))
            await switch.wait(0.002)
        await switch.wait(20)
        assert switch.show()["backend"] == "sglang"
        assert switch.show()["switch"]["phase"] == "done", switch.show()
        assert set(seen) == {("r0", "r1")}, "no traffic for the new one before all of it is there"
        assert [host.closed for host in old] == [True, True]
        assert [replica.id for replica in world.replicas] == ["r2", "r3"]
        assert {replica.backend for replica in picture(world).replicas} == {"sglang"}
        assert list(picture(world).models["pirate"].engine_models) == ["r2", "r3"]
        assert world.estate.running.indices == (2, 3)
        await world.upload("other", seed=1)  # goes to the new ones alone


async def test_an_old_engine_finishes_what_it_has(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    async with start() as world:
        left = 3

        async def in_flight(replica: Any) -> int:
            return left if replica.id == "r0" else 0

        monkeypatch.setattr(world.core, "in_flight", in_flight)
        old = world.hosts[0]
        switch = Switch(world.estate)
        switch.begin(to(world), "beside")
        await until(lambda: switch.show()["switch"]["phase"] == "draining")
        await until(lambda: list(picture(world).models["base"].engine_models) == ["r1"])
        assert not old.closed
        with pytest.raises(Conflict, match="under way"):
            switch.begin(to(world), "beside")
        left = 0
        await switch.wait(20)
        assert old.closed


@pytest.mark.parametrize(
    "script, words",
    [
        (Script(dies_starting="CUDA out of memory"), "the model is too big"),
        (Script(start_error="no such file"), "no such file"),
        (Script(rejects="rank 8 is too high"), "does not take the adapter"),
    ],
)
async def test_an_engine_that_does_not_come_up_changes_nothing(start: Start, script: Script, words: str) -> None:
    async with start() as world:
        await world.upload("pirate")
        world.next_script = script
        switch = Switch(world.estate)
        switch.begin(to(world), "beside")
        await switch.wait(20)
        shown = switch.show()
        assert (shown["backend"], shown["switch"]["phase"]) == ("vllm", "failed")
        assert words in shown["switch"]["reason"]
        assert [replica.id for replica in world.replicas] == ["r0"]
        assert all(host.closed for host in world.hosts[1:])
        assert not world.hosts[0].closed
        await world.core.published()
        assert list(picture(world).models["pirate"].engine_models) == ["r0"]
        world.next_script = Script()
        switch.begin(to(world), "beside")  # and it can be tried again
        await switch.wait(20)
        assert switch.show()["backend"] == "sglang"


async def test_what_is_deleted_meanwhile_is_not_waited_for(start: Start) -> None:
    async with start() as world:
        await world.upload("pirate")
        await world.upload("robot", seed=1)
        world.next_script = Script(never_ready=True)
        switch = Switch(world.estate)
        switch.begin(to(world), "beside")
        await until(lambda: len(world.hosts) == 2)
        await world.service.delete("pirate")
        world.next_script.never_ready = False
        await switch.wait(20)
        assert switch.show()["switch"]["phase"] == "done", switch.show()
        assert list(picture(world).models["robot"].engine_models) == ["r1"]


async def test_replacing_stops_the_old_first(start: Start) -> None:
    async with start() as world:
        old = world.hosts[0]
        world.next_script = Script(never_ready=True)
        switch = Switch(world.estate)
        switch.begin(to(world), "replace")
        await until(lambda: len(world.hosts) == 2)
        assert old.closed
        await until(lambda: not picture(world).models["base"].engine_models)
        world.next_script.never_ready = False
        await switch.wait(20)
        assert switch.show()["switch"]["phase"] == "done"
        await until(lambda: list(picture(world).models["base"].engine_models) == ["r0"])


async def test_a_replacement_that_does_not_come_up_brings_the_old_engine_back(start: Start) -> None:
    async with start() as world:
        switch = Switch(world.estate)
        switch.begin(to(world, "vllm"), "beside")  # so that what serves has another number than a first one gets
        await switch.wait(20)
        world.next_script = script = Script(dies_starting="CUDA out of memory")
        switch.begin(to(world), "replace")
        await until(lambda: len(world.hosts) == 3)
        world.next_script = Script()  # the old one starts well
        await switch.wait(20)
        assert script.dies_starting
        assert "vllm is started again" in switch.show()["switch"]["reason"]
        assert world.estate.running.indices == tuple(replica.index for replica in world.replicas)
        await until(lambda: picture(world).models["base"].engine_models)
        assert {replica.backend for replica in picture(world).replicas} == {"vllm"}


async def test_an_old_engine_that_does_not_come_back_either(start: Start, caplog: pytest.LogCaptureFixture) -> None:
    async with api(start) as (world, client):
        switch = {"backend": "sglang", "mode": "replace", "wait_s": 20}
        world.next_script = Script(dies_starting="CUDA out of memory")  # of both
        shown = (await client.post("/admin/backend", json=switch)).json()
        assert (shown["backend"], shown["switch"]["phase"]) == ("vllm", "failed")
        first, _, second = shown["switch"]["reason"].partition("; and vllm, started again, does not come back: ")
        for reason in (first, second):
            assert "r0 did not start" in reason and "the model is too big" in reason
        assert second.endswith("it is tried again, less and less often")
        assert shown["switch"]["reason"] in caplog.text
        world.next_script.dies_starting = None
        await until(lambda: picture(world).models["base"].engine_models)


async def test_an_old_engine_that_cannot_even_be_tried(start: Start, caplog: pytest.LogCaptureFixture) -> None:
    async with start(replicas=2) as world:
        world.next_script = Script(never_ready=True)
        switch = Switch(world.estate)
        switch.begin(to(world), "replace")
        await until(lambda: len(world.hosts) == 4)
        world.refused = EngineStartError("the checkpoint is gone")
        world.next_script.dies_starting = "CUDA out of memory"
        for host in world.hosts[2:]:
            await until(lambda host=host: host.engines)
            host.engine.die(1, "CUDA out of memory")
        await switch.wait(20)
        reason = switch.show()["switch"]["reason"]
        assert "the model is too big; and vllm cannot be started again: the checkpoint is gone; nothing" in reason
        assert reason in caplog.text
        assert not world.replicas
        world.refused, world.next_script = None, Script()
        switch.begin(to(world), "beside")  # as many as there should be, not as there are
        await switch.wait(20)
        assert switch.show()["switch"]["phase"] == "done"
        assert len(world.replicas) == 2


async def test_a_defect_ends_a_switch_too(
    start: Start, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async with start() as world:

        async def broken(*_: Any) -> None:
            raise ZeroDivisionError

        monkeypatch.setattr(world.estate, "ready", broken)
        switch = Switch(world.estate)
        switch.begin(to(world), "beside")
        await until(lambda: switch.show()["switch"]["phase"] == "failed")
        assert "defect" in switch.show()["switch"]["reason"] and "ZeroDivisionError" in caplog.text


@pytest.mark.parametrize("shifted, phase", [(False, "failed"), (True, "done")])
async def test_the_next_control_process_knows_of_the_switch(
    start: Start, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, shifted: bool, phase: str
) -> None:
    async with start() as world:
        path = tmp_path / "running"
        monkeypatch.setattr(world.estate, "_notebook", Notebook(path))
        held = asyncio.Event()

        async def hold(*_: Any) -> None:
            await held.wait()

        monkeypatch.setattr(world.estate, "retire" if shifted else "ready", hold)
        switch = Switch(world.estate)
        switch.begin(to(world), "beside")
        await until(lambda: (switch.show()["switch"]["phase"] == "draining") is shifted and len(world.hosts) == 2)
        killed = path.read_bytes()
        held.set()
        await switch.wait(20)
        assert Notebook(path).read().switch == switch._progress and switch.show()["switch"]["phase"] == "done"
        assert Switch(world.estate).show() == switch.show()
        path.write_bytes(killed)
        world.estate.running = Notebook(path).read()
        shown = Switch(world.estate).show()
        assert shown["switch"]["phase"] == phase
        serves = "sglang" if shifted else "vllm"
        assert shown["backend"] == serves
        reason = f"the gateway's control process was started again meanwhile, and goes on with {serves}"
        assert shown["switch"]["reason"] == (None if shifted else reason)
        assert Notebook(path).read().switch == world.estate.running.switch


async def test_a_switch_begins_at_once(start: Start) -> None:
    """Not when its task first runs: what came between would be undone by it."""
    async with start() as world:
        switch = Switch(world.estate)
        switch.begin(to(world), "beside")
        with pytest.raises(Conflict, match="under way"):
            switch.begin(to(world), "beside")
        with pytest.raises(Conflict, match="under way"):
            await Reload(world.estate).run()
        await switch.wait(20)
        assert len(world.hosts) == 2


async def test_api(start: Start) -> None:
    async with api(start) as (world, client):
        assert (await client.get("/admin/backend")).json() == {
            "object": "backend", "backend": "vllm", "engine_version": None, "switch": None,
        }  # fmt: skip
        assert_error(await client.post("/admin/backend", json={"backend": "llama"}), 400, "backend")
        assert_error(await client.post("/admin/backend", json={"backend": "vllm", "port": 1}), 400, "port")
        bad = {"backend": "vllm", "memory_fraction": 2}
        assert_error(await client.post("/admin/backend", json=bad), 400, "memory_fraction")
        answer = await client.post("/admin/backend", json={"backend": "sglang", "wait_s": 10})
        assert answer.status_code == 202
        assert answer.json()["switch"]["phase"] == "done"
        assert [replica.state for replica in world.replicas] == [State.READY]


class TestReload:
    def world_of(self, world: World, tmp_path: Path, text: str) -> Reload:
        file = tmp_path / "gateway.yaml"
        file.write_text(text)
        flags = {"start_timeout_s": 20, "drain_timeout_s": 20, "backend": "vllm"}
        declared = ServeConfig.model_validate({"replicas": len(world.replicas), **flags})
        world.estate.running = Running(config=declared, declared=declared, file=file, flags=flags)
        return Reload(world.estate)

    async def test_replicas_keys_and_limits(self, start: Start, tmp_path: Path) -> None:
        async with start() as world:
            reload = self.world_of(world, tmp_path, "replicas: 3\napi_key: [one, two]\nmax_body_mb: 5\n")
            answer = await reload.run()
            assert answer["changed"] == {"replicas": 3, "api_key": "2 keys", "max_body_mb": 5}
            await until(lambda: len(picture(world).models["base"].engine_models) == 3)
            assert len(picture(world).keys) == 2
            assert picture(world).limits.max_body_bytes == 5_000_000
            assert picture(world).reloads == 1
            (tmp_path / "gateway.yaml").write_text("replicas: 1\n")
            with pytest.raises(InvalidRequest, match="open to everybody"):
                await reload.run()
            assert len(picture(world).keys) == 2
            (tmp_path / "gateway.yaml").write_text("replicas: 1\napi_key: [two]\n")
            await reload.run()
            await until(lambda: [replica.id for replica in world.replicas] == ["r0"])
            await until(lambda: [host.closed for host in world.hosts] == [False, True, True])
            await until(lambda: len(picture(world).keys) == 1)
            assert world.estate.running.indices == (0,)

    async def test_what_is_on_its_way_out_is_not_counted(
        self, start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        async with start() as world:
            reload = self.world_of(world, tmp_path, "replicas: 3\n")
            await reload.run()
            busy = 1

            async def in_flight(replica: Any) -> int:
                return busy if replica.index else 0

            monkeypatch.setattr(world.core, "in_flight", in_flight)
            file = tmp_path / "gateway.yaml"
            file.write_text("replicas: 1\n")
            await reload.run()
            file.write_text("replicas: 2\n")
            await reload.run()  # while r1 and r2 drain
            assert world.estate.running.indices == (0, 3)
            switch = Switch(world.estate)
            switch.begin(to(world), "beside")
            await until(lambda: switch.show()["switch"]["phase"] == "draining")
            busy = 0
            await switch.wait(20)
            assert switch.show()["switch"]["phase"] == "done"
            await until(lambda: [replica.id for replica in world.replicas] == ["r4", "r5"])

    async def test_a_new_replica_gets_the_gpus_that_none_has(
        self, start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Not those of one that stays, while the one that is to go still has some."""
        async with start(replicas=2) as world:
            world.shares = 2
            reload = self.world_of(world, tmp_path, "replicas: 2\n")
            await reload.run()
            busy = 1

            async def in_flight(replica: Any) -> int:
                return busy if replica.index == 1 else 0

            monkeypatch.setattr(world.core, "in_flight", in_flight)
            file = tmp_path / "gateway.yaml"
            file.write_text("replicas: 1\n")
            await reload.run()
            file.write_text("replicas: 2\n")
            await reload.run()  # while r1 drains
            assert world.estate.running.indices == (0, 3)
            assert [index % 2 for index in world.estate.running.indices] == [0, 1]
            busy = 0
            await until(lambda: [replica.id for replica in world.replicas] == ["r0", "r3"])
            switch = Switch(world.estate)
            switch.begin(to(world), "beside")  # all are in use: each new one shares with one of the old
            await switch.wait(20)
            assert world.estate.running.indices == (1, 2)

    async def test_a_replica_has_its_number_until_its_engine_is_gone(
        self, start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A new one of the same number would find the dying engine, and take it for its own."""
        async with start(replicas=2) as world:
            reload = self.world_of(world, tmp_path, "replicas: 1\n")
            dying, end = threading.Event(), threading.Event()
            close = world.hosts[1].close

            def slowly(grace_s: float) -> None:
                dying.set()
                assert end.wait(20)
                close(grace_s)

            monkeypatch.setattr(world.hosts[1], "close", slowly)
            await reload.run()
            await until(dying.is_set)
            assert [replica.id for replica in world.replicas] == ["r0"]
            (tmp_path / "gateway.yaml").write_text("replicas: 2\n")
            await reload.run()
            assert [replica.id for replica in world.replicas] == ["r0", "r2"]
            end.set()
            await until(lambda: world.hosts[1].closed)

    async def test_a_replacement_waits_until_those_that_a_reload_took_out_are_gone(
        self, start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The device does not hold them and the new engine."""
        async with start() as world:
            reload = self.world_of(world, tmp_path, "replicas: 2\n")
            await reload.run()
            busy = 1

            async def in_flight(replica: Any) -> int:
                return busy if replica.index else 0

            monkeypatch.setattr(world.core, "in_flight", in_flight)
            (tmp_path / "gateway.yaml").write_text("replicas: 1\n")
            await reload.run()
            switch = Switch(world.estate)
            switch.begin(to(world), "replace")
            await until(lambda: world.hosts[0].closed)
            await world.core.published()
            assert len(world.hosts) == 2, "r1 still has its request"
            busy = 0
            await switch.wait(20)
            assert switch.show()["switch"]["phase"] == "done"
            assert [host.closed for host in world.hosts] == [True, True, False]
            assert [replica.id for replica in world.replicas] == ["r0"]

    @pytest.mark.parametrize(
        "text, words",
        [
            ("model: other\nreplicas: 2\nrelays: 4\n", "model, relays cannot change while the gateway runs"),
            ("replicas: 0\n", "`replicas`: "),
            ("replica: 2\n", "did you mean `replicas`?"),
            ("replicas: [\n", "is not YAML"),
            ("tls_cert: /none\ntls_key: /none\n", "cannot read --tls-cert /none"),
        ],
    )
    async def test_a_file_with_a_fault_changes_nothing(
        self, start: Start, tmp_path: Path, text: str, words: str
    ) -> None:
        async with start() as world:
            reload = self.world_of(world, tmp_path, text)
            with pytest.raises(InvalidRequest, match="nothing was changed") as refused:
                await reload.run()
            assert words in str(refused.value)
            assert len(world.replicas) == 1
            assert picture(world).limits is None

    async def test_a_switched_engine_stays_and_may_be_written_down(self, start: Start, tmp_path: Path) -> None:
        async with start() as world:
            reload = self.world_of(world, tmp_path, "replicas: 1\n")
            switch = Switch(world.estate)
            switch.begin(to(world), "beside")
            await switch.wait(20)
            world.estate.running = world.estate.running.model_copy(update={"flags": {"start_timeout_s": 20}})
            (tmp_path / "gateway.yaml").write_text("backend: sglang\ndrain_timeout_s: 20\nreplicas: 2\n")
            assert (await reload.run())["changed"] == {"backend": "sglang", "replicas": 2}
            await until(lambda: len(picture(world).models["base"].engine_models) == 2)
            assert {replica.backend for replica in picture(world).replicas} == {"sglang"}


class TestRows:
    """Which number a new replica gets; its GPUs are those of the number modulo the shares."""

    def fleet(self, *indices: int) -> Fleet:
        fleet = Fleet(lambda _: no_duties(), FAST, lambda: None)
        for index in indices:
            fleet.add(f"r{index}", index, AttachedHost("http://127.0.0.1:1", "", "m"), None)
        return fleet

    @pytest.mark.parametrize(
        ("taken", "leaving", "shares", "count", "given"),
        [
            ((), (), 1, 2, [0, 1]),
            ((0, 1), (), 1, 2, [2, 3]),
            ((0, 2), (2,), 1, 1, [1]),
            ((), (), 4, 2, [0, 1]),
            ((0, 1), (1,), 2, 1, [3]),  # beside the one that goes
            ((0, 1), (), 2, 2, [2, 3]),  # a switch on GPUs that are all in use: one beside each
            ((0, 1), (), 4, 2, [2, 3]),  # and where there are more
            ((2, 3), (), 3, 1, [1]),
            ((0, 1, 2), (0, 2), 2, 1, [4]),
            ((0, 1, 3, 5), (1, 3, 5), 2, 2, [7, 2]),
            ((0, 4), (), 4, 3, [1, 2, 3]),
        ],
    )
    def test_the_emptiest_share(
        self, taken: tuple[int, ...], leaving: tuple[int, ...], shares: int, count: int, given: list[int]
    ) -> None:
        assert self.fleet(*taken).free_indices(count, shares, {f"r{index}" for index in leaving}) == given

    @pytest.mark.parametrize("shares", [1, 2, 3, 8])
    def test_no_share_twice_while_there_is_a_free_one(self, shares: int) -> None:
        random = Random(shares)
        for _ in range(200):
            staying = random.sample(range(3 * shares), random.randrange(shares + 1))
            count = random.randrange(shares + 1)
            given = self.fleet(*staying).free_indices(count, shares)
            assert len({*given, *staying}) == count + len(staying)
            free = shares - len({index % shares for index in staying})
            fresh = {index % shares for index in given} - {index % shares for index in staying}
            assert len(fresh) == min(free, count)


def test_what_runs_is_the_last_whole_line(tmp_path: Path) -> None:
    notebook = Notebook(tmp_path / "running")
    first = Running.of(ServeConfig(api_key=("secret",), replicas=2), Path("/a.yaml"), {"port": 1})
    (tmp_path / "running").write_bytes(line(first))
    assert notebook.read() == first
    assert first.indices == (0, 1)
    second = first.model_copy(update={"replicas": (2, 3)})
    notebook.write(second)
    assert notebook.read() == second
    for torn in (b"\n", b"\n" + line(first)[:50], line(first)[:-1]):
        with (tmp_path / "running").open("ab") as file:
            file.write(torn)  # killed while it wrote
        assert notebook.read() == second
    third = first.model_copy(update={"replicas": (4,)})
    notebook.write(third)  # by the next process
    assert notebook.read() == third
