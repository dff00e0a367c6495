"""A batch that cannot be worked off ends by itself: control, other batches and what was answered live on."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import json
from collections import deque
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any, cast

import httpx2
import msgspec
import pytest

from gateway.control.core import Core
from gateway.errors import StorageFull
from gateway.tuning import batch_runner as module
from gateway.tuning import batch_work, lines
from gateway.tuning.batch_runner import BatchRunner
from gateway.tuning.batch_work import Room, Work
from gateway.tuning.batches import WINDOW_S, Batch, Batches
from gateway.tuning.files import Files
from gateway.tuning.store import Objects

_URL = "/v1/completions"


def row(custom_id: str, body: str) -> str:
    return f'{{"custom_id": "{custom_id}", "method": "POST", "url": "{_URL}", "body": {body}}}\n'


class Gateway:
    """In the place of the HTTP client: a model called `limited` is over its limit."""

    def __init__(self, **_: Any) -> None:
        pass

    async def __aenter__(self) -> Gateway:
        return self

    async def __aexit__(self, *_: object) -> None:
        pass

    async def post(self, url: str, content: bytes) -> httpx2.Response:
        return httpx2.Response(429 if json.loads(content)["model"] == "limited" else 200, json={})


@pytest.fixture
async def batches(tmp_path: Path, objects: Objects, monkeypatch: pytest.MonkeyPatch) -> Batches:
    async def no_secret(*_: object) -> None:
        return None

    monkeypatch.setattr(httpx2, "AsyncClient", Gateway)
    monkeypatch.setattr(BatchRunner, "_secret", no_secret)
    monkeypatch.setattr(module, "_RETRY_S", 0.01)
    batches = Batches(objects, Files(objects, tmp_path / "files", 10**9), tmp_path / "batches")
    await batches.files.open()
    return batches


async def create(batches: Batches, model: str = "m", key_id: str = "") -> Batch:
    staged = batches._directory.parent / "staged"
    staged.write_text(row("a", json.dumps({"model": model})))
    file = await batches.files.add(staged, "in.jsonl", "batch", key_id)
    staged.unlink(missing_ok=True)
    return await batches.create({"input_file_id": file.id, "endpoint": _URL, "completion_window": "24h"}, key_id)


@contextlib.asynccontextmanager
async def running(batches: Batches) -> AsyncIterator[None]:
    """The runner at work; it must still be when the test is over."""
    task = asyncio.create_task(BatchRunner(batches, cast(Core, None), "").run())
    yield
    assert not task.done(), task.exception()
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task


async def until(condition: Callable[[Batch], bool], batches: Batches, id: str) -> Batch:
    async with asyncio.timeout(10):
        while not condition(batch := await batches.get(id)):
            await asyncio.sleep(0.01)
    return batch


@pytest.mark.parametrize(
    ("bad", "code"),
    [
        ('{"model": "m", "prompt": "\\ud800"}', "invalid_request"),
        ('{"model": "m", "prompt": ' + "[" * 100_000 + "]" * 100_000 + "}", "invalid_json_line"),
    ],
)
def test_a_line_that_cannot_be_sent_is_a_fault(tmp_path: Path, bad: str, code: str) -> None:
    file = tmp_path / "input.jsonl"
    file.write_text(row("a", '{"model": "m"}') + row("b", bad))
    _, faults = lines.read(file, _URL)
    assert [(fault.line, fault.code) for fault in faults] == [(2, code)]


async def test_answers_that_cannot_be_written_fail_the_batch(batches: Batches, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> bytes:
        raise OSError(errno.ENOSPC, "No space left on device", "/secret/path")

    monkeypatch.setattr(Work, "_encode", full)
    batch = await create(batches)
    async with running(batches):
        # It is told first, and its folder goes then.
        failed = await until(
            lambda now: now.status == "failed" and not batches.folder(batch).exists(), batches, batch.id
        )
    assert [fault.message for fault in failed.faults] == ["the batch cannot be kept: No space left on device"]
    assert failed.failed_at


async def test_answers_outlive_a_failed_handover(batches: Batches, monkeypatch: pytest.MonkeyPatch) -> None:
    put, failures = batches._objects.put, [StorageFull("full"), StorageFull("full")]

    def fails_twice(record: Any, *more: Any) -> None:
        if isinstance(record, Batch) and record.output_file_id and failures:
            raise failures.pop()
        put(record, *more)

    monkeypatch.setattr(batches._objects, "put", fails_twice)
    batch = await create(batches)
    async with running(batches):
        done = await until(lambda now: bool(now.output_file_id), batches, batch.id)
    assert done.output_file_id and not failures
    assert json.loads(batches.files.path(done.output_file_id).read_bytes())["custom_id"] == "a"


async def test_a_key_at_its_limit_holds_up_only_its_own(batches: Batches) -> None:
    limited = await create(batches, "limited", "key-a")
    other = await create(batches, "m", "key-b")
    async with running(batches):
        await until(lambda now: now.status == "completed", batches, other.id)
        assert (await batches.get(limited.id)).status == "in_progress"


async def test_batches_of_a_key_go_on_side_by_side(batches: Batches) -> None:
    stuck = [await create(batches, "limited", "key-a") for _ in range(module._SIDE_BY_SIDE - 1)]
    small = await create(batches, "m", "key-a")
    async with running(batches):
        await until(lambda now: now.status == "completed", batches, small.id)
        for batch in stuck:
            await until(lambda now: now.status == "in_progress", batches, batch.id)


async def test_a_relay_that_does_not_know_the_secret_yet_is_asked_again(
    batches: Batches, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a restart of control relays learn of it a while later."""
    unknown = [httpx2.Response(401, json={})] * 2

    async def post(*_: object, **__: object) -> httpx2.Response:
        return unknown.pop() if unknown else httpx2.Response(200, json={})

    async def secret(*_: object) -> str:
        return "secret"

    monkeypatch.setattr(Gateway, "post", post)
    monkeypatch.setattr(BatchRunner, "_secret", secret)
    batch = await create(batches, "m", "key-a")
    async with running(batches):
        done = await until(lambda now: now.status == "completed", batches, batch.id)
    assert (done.completed, done.failed) == (1, 0)


def work(batches: Batches, batch: Batch) -> Work:
    with Path("/dev/null").open("ab") as sink:
        input_file = batches.folder(batch) / "input.jsonl"
        return Work(batches, batch, input_file, deque(), sink, sink, 0, 0, Room())


async def test_no_room_ends_with_the_batchs_time(batches: Batches) -> None:
    batch = await create(batches, "limited")
    found, _ = lines.read(batches.folder(batch) / "input.jsonl", _URL)
    old = msgspec.structs.replace(batch, created_at=batch.created_at - WINDOW_S - 1)
    async with asyncio.timeout(5):
        assert await work(batches, old)._answer(cast(httpx2.AsyncClient, Gateway()), found[0]) is None


async def test_telling_goes_on_after_an_error(batches: Batches, monkeypatch: pytest.MonkeyPatch) -> None:
    told, again = 0, asyncio.Event()

    async def fails_first(_: Work) -> None:
        nonlocal told
        told += 1
        if told == 1:
            raise StorageFull("full")
        again.set()

    monkeypatch.setattr(Work, "_tell_once", fails_first)
    monkeypatch.setattr(batch_work, "_TOLD_EVERY_S", 0.0)
    telling = asyncio.create_task(work(batches, await create(batches))._tell())
    async with asyncio.timeout(20):
        await again.wait()
    telling.cancel()
    await asyncio.wait([telling])


async def test_folders_that_a_crash_left_are_swept(batches: Batches) -> None:
    batch = await create(batches)
    (batches.folder(batch).parent / "batch_stray").mkdir()
    await batches.open()
    assert [folder.name for folder in batches.folder(batch).parent.iterdir()] == [batch.id]
