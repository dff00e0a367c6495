"""Works batches off, a few of each key side by side, by sending their requests to the gateway at the lowest priority.

Each answer is a line of the output or of the error file, written as it comes. So a batch goes on after a restart with
what is not answered yet; a request in flight when the gateway was killed is sent again.
"""

from __future__ import annotations

import asyncio
import logging
import shutil
import time
from collections import deque
from pathlib import Path

import msgspec
from sqlalchemy.exc import SQLAlchemyError

from gateway.control.core import Core
from gateway.errors import GatewayError, StorageFull
from gateway.tuning import lines
from gateway.tuning.batch_work import Room, Work
from gateway.tuning.batches import Batch, Batches, LineFault

_log = logging.getLogger(__name__)
_SIDE_BY_SIDE = 4  # batches of one key; turns go round among them, so that a small one need not wait for a large one
_RETRY_S = 5.0


class BatchRunner:
    """The one worker of a gateway's batches."""

    def __init__(self, batches: Batches, core: Core, url: str) -> None:
        """url: of the gateway itself."""
        self._batches = batches
        self._core = core
        self._url = url
        self._busy: dict[str, str] = {}  # the batches that are worked on, and whose they are
        self._secrets: dict[str, str] = {}  # by key
        self._room = Room()

    @property
    def in_flight(self) -> int:
        """Requests of batches that were sent and not answered."""
        return self._room.taken

    async def run(self) -> None:
        """Work until cancelled. A key at its limit holds up its own batches only."""
        async with asyncio.TaskGroup() as tasks:
            while True:
                self._batches.changed.clear()
                busy = dict(self._busy)  # before the list is read: what ends meanwhile is still open there
                try:
                    waiting = await self._batches.open_batches()
                except (GatewayError, SQLAlchemyError) as error:
                    _log.error("batches stand still, trying again in %g s: %s", _RETRY_S, error)
                    await asyncio.sleep(_RETRY_S)
                    continue
                for batch in waiting:
                    if batch.id not in busy and list(busy.values()).count(batch.key_id) < _SIDE_BY_SIDE:
                        busy[batch.id] = self._busy[batch.id] = batch.key_id
                        tasks.create_task(self._attend(batch))
                await self._batches.changed.wait()

    async def _attend(self, batch: Batch) -> None:
        """Work on a batch, whatever becomes of it: other batches and control go on."""
        try:
            try:
                await self._work(batch)
            except* (OSError, StorageFull, ValueError) as errors:
                await self._give_up(batch, _first(errors))
        except* (GatewayError, SQLAlchemyError, OSError, ValueError) as errors:
            _log.error("%s stands still, trying again in %g s: %s", batch.id, _RETRY_S, _first(errors))
            await asyncio.sleep(_RETRY_S)
        finally:
            del self._busy[batch.id]
            self._batches.changed.set()

    async def _give_up(self, batch: Batch, error: BaseException) -> None:
        """Fail a batch that cannot be worked off here, and hand over what was answered."""
        _log.error("%s failed: %r", batch.id, error)
        folder = self._batches.folder(batch)
        good = await asyncio.to_thread(lines.answered, folder / "output.jsonl")
        bad = await asyncio.to_thread(lines.answered, folder / "errors.jsonl")

        def counts(last: Batch) -> Batch:
            return msgspec.structs.replace(last, completed=len(good), failed=len(bad))

        await self._batches.change(batch.id, counts)
        # Of an OSError only its kind: its text names paths of the server.
        said = (error.strerror or "input or output failed") if isinstance(error, OSError) else str(error)
        await self._finish(batch.id, folder, LineFault("batch_not_kept", f"the batch cannot be kept: {said}"))

    async def _work(self, batch: Batch) -> None:
        """From where it stands to its end."""
        folder = self._batches.folder(batch)
        todo, faults = await asyncio.to_thread(lines.read, folder / "input.jsonl", batch.endpoint)
        now = int(time.time())
        if faults:
            await self._batches.change(
                batch.id,
                lambda last: msgspec.structs.replace(last, status="failed", failed_at=now, faults=tuple(faults)),
            )
            await asyncio.to_thread(shutil.rmtree, folder, True)
            return
        good = await asyncio.to_thread(lines.answered, folder / "output.jsonl")
        bad = await asyncio.to_thread(lines.answered, folder / "errors.jsonl")

        def begin(last: Batch) -> Batch:
            status = "in_progress" if last.status == "validating" else last.status
            started = last.in_progress_at or now
            return msgspec.structs.replace(last, status=status, in_progress_at=started, total=len(todo))

        batch = await self._batches.change(batch.id, begin)
        if batch.status == "in_progress":
            left = deque(line for line in todo if line.custom_id not in good | bad)
            with (folder / "output.jsonl").open("ab") as output, (folder / "errors.jsonl").open("ab") as errors:
                done = (len(good), len(bad))
                work = Work(self._batches, batch, folder / "input.jsonl", left, output, errors, *done, self._room)
                await work.run(self._url, await self._secret(batch))
        await self._finish(batch.id, folder)

    async def _secret(self, batch: Batch) -> str | None:
        """By which relays let the requests in, as if they came from who ordered the batch."""
        if not batch.key_id:
            return None
        if batch.key_id not in self._secrets:
            self._secrets[batch.key_id] = self._core.keys.lend(batch.key_id)
            await self._core.published()
        return self._secrets[batch.key_id]

    async def _finish(self, id: str, folder: Path, fault: LineFault | None = None) -> None:
        """Hand over what was answered. fault: why the batch failed."""
        now = int(time.time())

        def finalize(last: Batch) -> Batch:
            kept = last.status if last.status == "cancelling" else "finalizing"
            return msgspec.structs.replace(last, status=kept, finalizing_at=now)

        batch = await self._batches.change(id, finalize)
        made: dict[str, str | None] = {}
        for name in ("output", "errors"):
            file = folder / f"{name}.jsonl"
            made[name] = None
            if file.exists() and file.stat().st_size:
                kept = await self._batches.files.add(file, f"{id}_{name}.jsonl", "batch_output", batch.key_id)
                made[name] = kept.id
        ended = "cancelled" if batch.status == "cancelling" else "completed"
        if ended == "completed" and batch.completed + batch.failed < batch.total:
            ended = "expired"
        if fault is not None:
            ended = "failed"

        def end(last: Batch) -> Batch:
            return msgspec.structs.replace(
                last,
                status=ended,
                output_file_id=made["output"],
                error_file_id=made["errors"],
                faults=() if fault is None else (fault,),
                **{f"{ended}_at": int(time.time())},
            )

        await self._batches.change(id, end)
        await asyncio.to_thread(shutil.rmtree, folder, True)


def _first(errors: BaseExceptionGroup[BaseException]) -> BaseException:
    """The first error of a group that is no group."""
    error: BaseException = errors
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error
