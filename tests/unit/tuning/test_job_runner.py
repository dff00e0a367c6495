"""What a runner makes of results, of trainers left behind, and of odd input from clients."""

from __future__ import annotations

import contextlib
import gzip
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import msgspec
import pytest
from fastapi import Request

from backends import process
from gateway.api import files as files_api
from gateway.api import fine_tuning
from gateway.control.service import Service
from gateway.control.views import FAILED, READY
from gateway.errors import Conflict, InvalidRequest, NotFound
from gateway.tuning import results as module
from gateway.tuning import runner as runner_module
from gateway.tuning.files import Files
from gateway.tuning.jobs import Jobs
from gateway.tuning.pressure import Look, Queues, Rule
from gateway.tuning.records import Job, Status
from gateway.tuning.results import Results
from gateway.tuning.runner import Runner
from gateway.tuning.store import Objects
from gateway.tuning.trainer import EXIT_PAUSED, Place, Trainer
from tests.support.wait import eventually
from trainer.data import read_lines
from trainer.errors import DataError


class Adapters:
    """In the place of the service: takes everything in; engines refuse it where `state` says so."""

    def __init__(self, state: str = READY) -> None:
        self.state = state
        self.deleted: list[str] = []
        self.taken_in: list[str] = []
        self.jobs: Jobs | None = None  # whose job is cancelled while engines load its model
        self.storage = SimpleNamespace(staging=contextlib.nullcontext)

    async def take_in(self, name: str, *_: object) -> tuple[None, bool]:
        self.taken_in.append(name)
        return None, False

    async def settle(self, _version: None, new: bool, _wait_s: float) -> dict[str, Any]:
        if self.jobs is not None:
            await self.jobs.cancel("ftjob-1")
        if new and self.state == FAILED:
            raise InvalidRequest("the engine refused the adapter")
        return {"state": self.state, "reason": ""}

    async def delete(self, name: str) -> None:
        self.deleted.append(name)


class Process:
    """A trainer that lives until it is stopped."""

    def __init__(self) -> None:
        self.living = True

    def alive(self) -> bool:
        return self.living

    def stop(self, _grace_s: float) -> None:
        self.living = False

    def exit_status(self) -> int:
        return -15


def job(id: str = "ftjob-1", status: Status = Status.RUNNING) -> Job:
    return Job(
        id=id, created_at=0, status=status, model="m", training_file="f", validation_file=None, method="supervised",
        hyperparameters={}, settings={}, seed=0, name="ft:m", config={"method": "sft"}, gate_eval_loss=True,
    )  # fmt: skip


def jobs_of(objects: Objects, folder: Path, service: Adapters, trainer: Any = None) -> Jobs:
    files = Files(objects, folder / "files", 10**9)
    return Jobs(cast(Service, service), objects, files, cast(Trainer, trainer), folder / "jobs", "http://here")


def runner_of(jobs: Jobs, rule: Rule | None = None, waiting: list[int] | None = None) -> Runner:
    """waiting: what waits at each look, -1 where nobody knows; the last one for ever."""
    waits = waiting or [0]

    async def look(engines: bool) -> Look:
        count = waits.pop(0) if len(waits) > 1 else waits[0]
        return Look(count) if count >= 0 else Look(0, {"r0": "it does not say"})

    return Runner(jobs, Results(jobs, None), cast(Queues, SimpleNamespace(look=look)), rule)


async def published(objects: Objects, folder: Path, service: Adapters, jobs: Jobs) -> Job:
    """The job after its result was there."""
    await jobs.files.open()
    objects.put(job())
    result = jobs.run_dir(job()) / "adapter"
    result.mkdir(parents=True)
    (result / "manifest.json").write_text(json.dumps({"metrics": {"step": 1, "tokens": 1, "eval": {}}}))
    (result.parent / "events.jsonl").touch()
    await Results(jobs, None).publish(job())
    return await jobs.get("ftjob-1")


async def test_cancelled_while_it_is_published(tmp_path: Path, objects: Objects) -> None:
    service = Adapters()
    service.jobs = jobs = jobs_of(objects, tmp_path, service)
    done = await published(objects, tmp_path, service, jobs)
    assert (done.status, done.fine_tuned_model) == (Status.CANCELLED, None)
    assert service.deleted == [done.name] and not jobs.folder(done).exists()
    assert not list((tmp_path / "files").iterdir())


async def test_a_canary_of_an_adapter_that_is_gone_leaves_none_behind(tmp_path: Path, objects: Objects) -> None:
    service = Adapters()
    gone = NotFound("no adapter 'tickets'")

    def adapter(_: str) -> None:
        raise gone

    service.versions = SimpleNamespace(adapter=adapter)  # type: ignore[attr-defined]
    settings = {"adapter": "tickets", "canary_weight": 5.0}
    jobs = jobs_of(objects, tmp_path, service)
    objects.put(job())
    told = await Results(jobs, None)._hand_on(msgspec.structs.replace(job(), settings=settings))
    assert [event.message for event in told] == ["It was not made a version of tickets: no adapter 'tickets'"]
    assert not service.taken_in


async def test_a_job_that_ends_while_it_is_held(tmp_path: Path, objects: Objects) -> None:
    service = Adapters()
    jobs = jobs_of(objects, tmp_path, service)
    objects.put(job())
    service.settle = lambda *_: hold_and_settle()  # type: ignore[method-assign]

    async def hold_and_settle() -> dict[str, Any]:
        await jobs.hold("ftjob-1", "requests queue")
        return {"state": READY, "reason": ""}

    done = await published(objects, tmp_path, service, jobs)
    assert (done.status, done.held) == (Status.SUCCEEDED, False)


async def test_refused_after_a_restart(tmp_path: Path, objects: Objects) -> None:
    service = Adapters(FAILED)
    done = await published(objects, tmp_path, service, jobs_of(objects, tmp_path, service))
    assert done.status is Status.FAILED


@pytest.mark.parametrize("loss", [None, float("nan")])
def test_a_loss_that_is_no_number_fails_the_gate(loss: float | None) -> None:
    figures = {"eval": {"loss": loss}, "base_eval": {"loss": 2.0}}
    assert "is no number" in module._worse(figures, held_out=True)
    assert not module._worse({"eval": {}, "base_eval": {}}, held_out=False)


@pytest.mark.parametrize("status", [Status.CANCELLED, Status.PAUSED])
async def test_a_trainer_left_behind_is_followed(tmp_path: Path, objects: Objects, status: Status) -> None:
    """The next job waits for it."""
    process = Process()
    trainer = SimpleNamespace(adopt=lambda id: process if id == "ftjob-1" and process.living else None)
    jobs = jobs_of(objects, tmp_path, Adapters(), trainer)
    objects.put(job("ftjob-0", Status.QUEUED))
    objects.put(job(status=status))
    jobs.run_dir(job()).mkdir(parents=True)
    runner = runner_of(jobs)
    assert await runner._look() and await runner._look()
    assert (await jobs.get("ftjob-0")).status is Status.QUEUED
    assert not process.living if status is Status.CANCELLED else (jobs.run_dir(job()) / "pause").exists()


async def test_a_job_yields_to_serving(tmp_path: Path, objects: Objects, monkeypatch: pytest.MonkeyPatch) -> None:
    """The trainer is asked to pause; nothing begins while requests queue; then the same job goes on first."""
    begun: list[str] = []
    process = Process()

    def start(job_id: str, *_: object) -> Process:
        begun.append(job_id)
        process.living = True
        return process

    monkeypatch.setattr(Process, "exit_status", lambda _: EXIT_PAUSED)
    trainer = SimpleNamespace(adopt=lambda _: None, start=start, prove=lambda: None)
    jobs = jobs_of(objects, tmp_path, Adapters(), trainer)
    objects.put(job("ftjob-0", Status.QUEUED))
    objects.put(job(status=Status.RUNNING))
    pause = jobs.run_dir(job()) / "pause"
    pause.parent.mkdir(parents=True)
    clock = iter(range(1000))
    monkeypatch.setattr(runner_module, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    runner = runner_of(jobs, Rule(wait_s=2), waiting=[0, 1, 1, 1, 1, 0])
    for _ in range(5):
        await runner._look()
    held = await jobs.get("ftjob-1")
    assert begun == ["ftjob-1"] and (held.status, held.held) == (Status.PAUSED, True)
    await runner._look()
    assert pause.exists()
    process.living = False
    pause.unlink()
    for _ in range(20):
        await runner._look()
    assert begun == ["ftjob-1"]  # and not the next in the queue
    for _ in range(15):
        await runner._look()
    resumed = await jobs.get("ftjob-1")
    assert begun == ["ftjob-1"] * 2 and (resumed.status, resumed.held) == (Status.RUNNING, False)
    assert not pause.exists()


@pytest.mark.parametrize(
    ("waiting", "why"),
    [
        (1, "requests have queued for 2 s; serving comes first"),
        (-1, "for 2 s it has not been known whether requests queue at r0 (it does not say); serving comes first"),
    ],
)
@pytest.mark.parametrize(("status", "what"), [(Status.RUNNING, "paused"), (Status.QUEUED, "waits")])
async def test_a_job_says_why_it_stands_still(
    tmp_path: Path, objects: Objects, monkeypatch: pytest.MonkeyPatch, waiting: int, why: str, status: Status, what: str
) -> None:
    """Once, whether it ran before or is only next."""
    jobs = jobs_of(objects, tmp_path, Adapters(), SimpleNamespace(adopt=lambda _: None))
    objects.put(job(status=status))
    clock = iter(range(1000))
    monkeypatch.setattr(runner_module, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    runner = runner_of(jobs, Rule(wait_s=2), waiting=[waiting])
    current = await jobs.get("ftjob-1")
    for _ in range(5):
        current = await runner._weigh(current)
    told, _ = await jobs.events("ftjob-1", None, 10)
    assert [event.message for event in told] == [f"Fine-tuning job {what}: {why}"]
    assert (current.status, current.held) == (
        (Status.PAUSED, True) if status is Status.RUNNING else (Status.QUEUED, False)
    )


async def test_a_trainers_secret_outlives_control(tmp_path: Path, objects: Objects) -> None:
    """Its digest is lent again before relays are told anything, and taken back when the trainer ends.

    Not that of a trainer that is gone: it would take the living one's place.
    """
    known: dict[str, str] = {}
    service = Adapters()
    keys = SimpleNamespace(
        lend_again=lambda own, key_id, scopes: known.update({own: f"{key_id} {sorted(scopes)}"}),
        take_back=lambda own: known.pop(own),
    )
    service.core = SimpleNamespace(keys=keys)  # type: ignore[attr-defined]
    living = SimpleNamespace(adopt=lambda id: Process() if id == "ftjob-1" else None)
    jobs = jobs_of(objects, tmp_path, service, living)
    kept = msgspec.structs.replace(job(), method="reinforcement", key_id="key-a", pass_digest="d" * 64)
    objects.put(kept)
    objects.put(msgspec.structs.replace(kept, id="ftjob-2", status=Status.PAUSED, pass_digest="e" * 64))
    runner = runner_of(jobs)
    await runner.open()
    assert known == {"d" * 64: "key-a ['adapters', 'infer']"}
    await runner._ended(kept, EXIT_PAUSED)
    assert not known and not (await jobs.get(kept.id)).pass_digest
    assert service.deleted == [kept.id]  # the adapter that it sampled with


@pytest.mark.parametrize("method", ["reinforcement", "supervised"])
async def test_a_trainer_is_told_where_the_gateway_is_now(tmp_path: Path, objects: Objects, method: str) -> None:
    """Not where it was when the job was made: it may have started again on another port."""
    started: list[tuple[Any, ...]] = []

    def start(*arguments: Any) -> Process:
        started.append(arguments)
        return Process()

    trainer = SimpleNamespace(adopt=lambda _: None, start=start, prove=lambda: None)
    objects.put(msgspec.structs.replace(job(status=Status.QUEUED), method=method))
    jobs = jobs_of(objects, tmp_path, Adapters(), trainer)
    await runner_of(jobs)._look()
    assert [arguments[4:] for arguments in started] == [("http://here" if method == "reinforcement" else None, None)]


def test_a_trainer_is_told_at_every_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[tuple[str, ...]] = []
    monkeypatch.setattr(process, "start", lambda *arguments: told.append(arguments[3].argv[3:]))
    trainer = Trainer(None, "cpu", Place(tmp_path, tmp_path, 1))
    config, run = tmp_path / "job.yaml", tmp_path / "run"
    trainer.start("ftjob-1", "sft", config, run)
    trainer.start("ftjob-1", "grpo", config, run, "http://one")
    run.mkdir()
    (run / "run.json").touch()
    trainer.start("ftjob-1", "grpo", config, run, "http://two")
    assert told == [
        ("sft", "--config", str(config)),
        ("grpo", "--config", str(config), "--gateway-url", "http://one"),
        ("resume", str(run), "--gateway-url", "http://two"),
    ]


async def test_a_result_found_leaves_nothing_else(tmp_path: Path, objects: Objects) -> None:
    """Its trainer ended while no control process was there to see it."""
    service = Adapters()
    jobs = jobs_of(objects, tmp_path, service, SimpleNamespace(adopt=lambda _: None))
    await jobs.files.open()
    objects.put(msgspec.structs.replace(job(), method="reinforcement"))
    result = jobs.run_dir(job()) / "adapter"
    result.mkdir(parents=True)
    (result / "manifest.json").write_text(json.dumps({"metrics": {"step": 1, "tokens": 1}}))
    await runner_of(jobs)._look()
    assert (await jobs.get("ftjob-1")).status is Status.SUCCEEDED and service.deleted == ["ftjob-1"]


async def test_a_held_job_is_its_owners(tmp_path: Path, objects: Objects) -> None:
    jobs = jobs_of(objects, tmp_path, Adapters())
    objects.put(job())
    await jobs.hold("ftjob-1", "requests queue")
    assert [one.id for one in await jobs.open_jobs()] == ["ftjob-1"]
    assert not (await jobs.pause("ftjob-1")).held  # from now on it waits for its owner
    assert not await jobs.open_jobs()
    with pytest.raises(Conflict):
        await jobs.let_go("ftjob-1", "calm")


async def test_a_job_made_during_a_sweep_keeps_its_folder(
    tmp_path: Path, objects: Objects, monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs, read = jobs_of(objects, tmp_path, Adapters()), objects.all
    (tmp_path / "jobs" / "ftjob-stray").mkdir(parents=True)

    def made_meanwhile(*kind: Any) -> list[Any]:
        found = read(*kind)
        jobs.folder(job()).mkdir()
        objects.put(job())
        return found

    monkeypatch.setattr(objects, "all", made_meanwhile)
    await jobs.sweep()
    assert [folder.name for folder in (tmp_path / "jobs").iterdir()] == ["ftjob-1"]


@pytest.mark.parametrize("after", ["ftevent-²", "ftevent-" + "9" * 30])
async def test_odd_event_ids_are_refused(tmp_path: Path, objects: Objects, after: str) -> None:
    objects.put(job())
    with pytest.raises(InvalidRequest, match="give the id of an event"):
        await jobs_of(objects, tmp_path, Adapters()).events("ftjob-1", after, 1)


@pytest.mark.parametrize("seconds", ["²", "9" * 5000])
def test_odd_seconds_are_refused(seconds: str) -> None:
    with pytest.raises(InvalidRequest, match="expires_after"):
        files_api._seconds({"expires_after[seconds]": seconds})


@pytest.mark.parametrize("body", [b"[" * 100_000 + b"]" * 100_000, b'"\xff"'])
async def test_odd_bodies_are_refused(body: bytes) -> None:
    async def whole() -> bytes:
        return body

    with pytest.raises(InvalidRequest, match="not JSON"):
        await fine_tuning.read_json(cast(Request, SimpleNamespace(body=whole)))


def test_corrupt_gzip_is_a_data_error(tmp_path: Path) -> None:
    file = tmp_path / "data.jsonl.gz"
    whole = bytearray(gzip.compress(b'{"a": 1}\n' * 50))
    whole[10:14] = b"\xff\xff\xff\xff"  # behind the header
    file.write_bytes(whole)
    with pytest.raises(DataError, match="cannot read"):
        list(read_lines([file]))


def test_a_traceback_is_not_shown(tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho 'Traceback: File \"/secret/path\"' >&2\nexit 1\n")
    python.chmod(0o755)
    trainer = Trainer(python, "cpu", Place(tmp_path, tmp_path, 1))
    with pytest.raises(InvalidRequest) as refused:
        trainer.check_data(tmp_path / "dataset.jsonl", "mine.jsonl", "sft", "training_file")
    assert refused.value.message == "the trainer could not check mine.jsonl; the gateway's log says why"


@pytest.mark.parametrize(
    ("said", "param"),
    [("dataset.jsonl line 1: no", "training_file"), ("grader.name: no", "method.reinforcement.grader")],
)
def test_what_is_wrong_is_told_apart_whatever_a_file_is_called(tmp_path: Path, said: str, param: str) -> None:
    python = tmp_path / "python"
    python.write_text(f"#!/bin/sh\necho 'Error: {said}' >&2\nexit 1\n")
    python.chmod(0o755)
    trainer = Trainer(python, "cpu", Place(tmp_path, tmp_path, 1))
    with pytest.raises(InvalidRequest) as refused:
        trainer.check_data(tmp_path / "dataset.jsonl", "grader.jsonl", "sft", "training_file")
    assert refused.value.param == param


def test_a_check_ends_with_control(tmp_path: Path) -> None:
    mark = tmp_path / "pid"
    script = f"from gateway.tuning import trainer; trainer._run(['sh', '-c', 'echo $$ > {mark}; exec sleep 60'], 60)"
    control = subprocess.Popen([sys.executable, "-c", script])
    try:
        pid = int(eventually(lambda: mark.exists() and mark.read_text().strip(), 20))
    finally:
        control.kill()
        control.wait()

    def ended() -> bool:
        try:
            return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
        except (FileNotFoundError, ProcessLookupError):
            return True

    try:
        eventually(ended, 5)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
