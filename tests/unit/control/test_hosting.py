"""Attached engines, GPUs of replicas, and what the configuration becomes."""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from backends import envs, process
from backends import registry as backends
from backends.spec import EngineSpec
from gateway.config import ConfigError, ServeConfig
from gateway.control import __main__ as main
from gateway.control import wiring
from gateway.control.hosting import AttachedHost, LocalHost, Place, gpus_of, shares_of
from gateway.control.publish import Public
from gateway.control.replica import OPERATOR, Replica, State
from gateway.control.running import Running, line
from gateway.control.supervisor import Duties, Supervisor
from tests.support.checkpoints import write_checkpoint
from tests.support.fake_engine import FakeEngine, Script
from tests.support.peft_files import TINY
from tests.unit.control.conftest import FAST, until


class Attached:
    """A supervised attached engine."""

    def __init__(self, url: str, model: str = "base") -> None:
        self.replica = Replica("r0", 0, lambda: None)
        self.host = AttachedHost(url, "key", model)
        self.task = asyncio.create_task(Supervisor(self.replica, self.host, duties(), FAST).run())

    async def __aenter__(self) -> Replica:
        return self.replica

    async def __aexit__(self, *exc: object) -> None:
        self.task.cancel()
        await asyncio.wait([self.task])


def duties() -> Duties:
    async def start_failed(*_: object) -> None:
        return None

    async def keep(_: Replica) -> None:
        await asyncio.Event().wait()

    return Duties(dict, start_failed, keep)


async def engine() -> FakeEngine:
    made = FakeEngine(Script(), {}, [])
    await made.listen()
    return made


async def test_attached_engine_is_recognised_and_never_stopped() -> None:
    running = await engine()
    async with Attached(running.endpoint.url) as replica:
        await until(lambda: replica.answers)
        assert repr(replica) == "<Replica r0 vllm ready>"
        running.script.unhealthy = True
        await until(lambda: not replica.answers)
        running.script.unhealthy = False
        await until(lambda: replica.answers)
    assert running.alive()
    running.die()


async def test_attached_engine_that_is_not_there_yet() -> None:
    async with Attached("http://127.0.0.1:1") as replica:
        await until(lambda: replica.state is State.LOADING)
        assert replica.backend is None


async def test_attached_engine_that_serves_something_else() -> None:
    running = await engine()
    async with Attached(running.endpoint.url, model="llama") as replica:
        await until(lambda: replica.state is State.FAILED)
        assert "serves base, not llama; give --model-name the name that it serves" in replica.reason
    running.die()


@pytest.mark.parametrize("url", ["localhost:8000", "https://host:1", "http://", "http://h:1/v1", ""])
def test_urls_that_are_no_engine(url: str) -> None:
    with pytest.raises(ConfigError, match="--attach"):
        AttachedHost(url, "", "base")


SPEC = EngineSpec(
    backend="vllm",
    version="1",
    model_path=Path("/m"),
    served_name="m",
    device="cuda",
    tensor_parallel=2,
)


@pytest.mark.parametrize(
    ("visible", "shares"),
    [
        (None, ["0,1", "2,3"]),
        ("4,5,6,7", ["4,5", "6,7"]),
        ("a, b ,c,d,e", ["a,b", "c,d"]),
        ("5,4,3,2,1,0", ["5,4", "3,2", "1,0"]),  # the third has none yet
    ],
)
def test_every_replica_has_its_own_gpus(visible: str | None, shares: list[str]) -> None:
    assert shares_of(2, SPEC, visible, 4) == shares
    assert [gpus_of(index, shares) for index in (0, 1)] == [{"CUDA_VISIBLE_DEVICES": one} for one in shares[:2]]


def test_too_few_gpus() -> None:
    with pytest.raises(ConfigError, match="--replicas 2 needs 4 GPUs, CUDA_VISIBLE_DEVICES=0,1,2 has 3"):
        shares_of(2, SPEC, "0,1,2", 4)
    with pytest.raises(ConfigError, match="--replicas 3 needs 6 GPUs, this machine has 4; lower --replicas"):
        shares_of(3, SPEC, None, 4)
    with pytest.raises(ConfigError, match="--replicas 1 needs 2 GPUs, CUDA_VISIBLE_DEVICES= has 0"):
        shares_of(1, SPEC, "", 4)


def test_what_takes_over_shares_the_gpus_of_what_it_takes_over_from() -> None:
    """Of two replicas on all GPUs, a switch's new ones have the numbers 2 and 3."""
    assert [gpus_of(index, ["0,1", "2,3"])["CUDA_VISIBLE_DEVICES"] for index in (2, 3)] == ["0,1", "2,3"]


def test_gpus_that_nobody_counted_are_handed_out_all_the_same() -> None:
    assert shares_of(2, SPEC, None, 0) == ["0,1", "2,3"]
    # What takes over from the only one shares with it: there may be no more GPUs than it has.
    assert shares_of(1, SPEC, None, 0) == ["0,1"]


def test_gpus_of_replicas_as_they_are_wired(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the GPUs that the gateway sees; a number that was not among the first has the share that it was given for."""
    model = write_checkpoint(tmp_path / "tiny", TINY)
    (model / "tokenizer.json").write_text("{}")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,3")
    monkeypatch.setattr(envs, "gpu_count", lambda: 4)
    monkeypatch.setattr(envs, "find", envs.lookup)  # as if it were installed
    config = ServeConfig.model_validate({"model": str(model), "backend": "vllm", "device": "cuda", "replicas": 2})
    assert wiring._shares(config) == 2
    assert wiring._shares(config.model_copy(update={"replicas": 1})) == 2
    with pytest.raises(ConfigError, match="--replicas 3 needs 3 GPUs, CUDA_VISIBLE_DEVICES=2,3 has 2"):
        wiring._shares(config.model_copy(update={"replicas": 3}))
    place = Place(tmp_path, tmp_path, 1, 1.0)
    _, hosts = wiring._make(place, config, [0, 1, 3])
    given = [(id, host._env) for id, host in hosts if isinstance(host, LocalHost)]
    gpus = [("r0", "2"), ("r1", "3"), ("r3", "3")]
    assert given == [(id, {"CUDA_VISIBLE_DEVICES": names}) for id, names in gpus]
    emulated = config.model_copy(update={"engine_version": "emulator"})
    assert wiring._shares(emulated) == 1
    assert wiring._shares(config.model_copy(update={"device": "cpu"})) == 1


def test_no_process_to_be_had_is_a_failed_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And no defect of ours, which would end control."""

    def start(*_: object) -> None:
        raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))

    monkeypatch.setattr(process, "start", start)
    host = LocalHost("r0", backends.get("vllm"), SPEC, ("vllm",), Place(tmp_path, tmp_path, 1, 1.0), {})
    with pytest.raises(process.EngineStartError, match=r"cannot start r0: .*Cannot allocate memory"):
        host.start({})


@pytest.fixture
def config(tmp_path: Path) -> Callable[..., ServeConfig]:
    model = write_checkpoint(tmp_path / "tiny", TINY)
    (model / "tokenizer.json").write_text("{}")

    def make(**values: object) -> ServeConfig:
        return ServeConfig.model_validate(
            {"model": str(model), "engine_version": "emulator", "state": tmp_path / "state", "device": "cpu"} | values
        )

    return make


def test_configuration_of_own_engines(config: Callable[..., ServeConfig], tmp_path: Path) -> None:
    control = wiring.build(Running.of(config(replicas=2, max_adapters=5, api_key=("secret",))), tmp_path / "run", 1)
    setup = control.core.setup
    assert [id for id, _ in setup.hosts] == ["r0", "r1"]
    assert (setup.backend and setup.backend.name, setup.capacity) == ("vllm", 6)
    assert setup.public == Public("tiny", {})
    assert len(control.core.keys.published) == 1
    assert "secret" not in repr(setup)
    control.store.close()


def test_what_an_operator_drained_stays_so_in_the_next_control_process(
    config: Callable[..., ServeConfig], tmp_path: Path
) -> None:
    running = Running.of(config(replicas=2)).model_copy(update={"replicas": (0, 3), "drained": (3,)})
    control = wiring.build(running, tmp_path / "run", 1)
    assert [replica.is_drained(OPERATOR) for replica in control.core.replicas] == [False, True]
    control.store.close()


@pytest.mark.parametrize(
    ("values", "known"),
    [
        ({}, True),  # --model is the checkpoint that the attached engine serves
        ({"model": "org/elsewhere"}, False),
        ({"model": "demo", "model_name": "llama"}, False),  # --model was not given
    ],
)
def test_base_of_attached_engines(
    config: Callable[..., ServeConfig], tmp_path: Path, values: dict[str, str], known: bool
) -> None:
    settings = config(attach=("http://127.0.0.1:1",), **values)
    assert (wiring._attached_checkpoint(settings) is not None) is known
    control = wiring.build(Running.of(settings), tmp_path / "run", 1)
    assert control.core.setup.backend is None
    control.store.close()


def test_configuration_that_cannot_be_served_ends_with_its_own_status(
    config: Callable[..., ServeConfig],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    file = tmp_path / "config.json"
    file.write_bytes(line(Running.of(config(attach=("nonsense",)))))
    argv = ["control", "--config-json", str(file), "--run-dir", str(tmp_path / "run"), "--main-pid", "1"]
    monkeypatch.setattr(sys, "argv", argv)
    monkeypatch.setattr(logging.root, "handlers", [*logging.root.handlers])
    with pytest.raises(SystemExit) as ended:
        main.main()
    assert ended.value.code == 2
    assert "--attach nonsense" in capsys.readouterr().err
