"""Works batches off, one of each key at a time, by sending their requests to the gateway at the lowest priority.

Each answer is a line of the output or of the error file, written as it comes. So a batch goes on after a restart with
what is not answered yet; a request in flight when the gateway was killed is sent again.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import shutil
import time
from collections import deque
from pathlib import Path
from typing import Any, BinaryIO

import httpx2
import msgspec
from sqlalchemy.exc import SQLAlchemyError

from gateway.control.core import Core
from gateway.errors import GatewayError, StorageFull
from gateway.tuning import lines
from gateway.tuning.batches import Batch, Batches, LineFault
from gateway.tuning.lines import Line
from gateway.tuning.records import new_id

_log = logging.getLogger(__name__)
_IN_FLIGHT = 16  # requests at a time, of all batches; the lowest priority takes only room that nobody waits for
_TOLD_EVERY_S = 1.0  # how often counts are written
_RETRY_S = 5.0
_LONGEST_WAIT_S = 30.0  # before a request that found no room is sent again
_AGAIN = (408, 429, 503)  # nothing ran; other failures are answers
_TIMEOUT_S = 600.0


class BatchRunner:
    """The one worker of a gateway's batches."""

    def __init__(self, batches: Batches, core: Core, url: str) -> None:
        """url: of the gateway itself."""
        self._batches = batches
        self._core = core
        self._url = url
        self._busy: set[str] = set()  # the keys that have a batch worked on
        self._room = asyncio.Semaphore(_IN_FLIGHT)

    async def run(self) -> None:
        """Work until cancelled. A key at its limit holds up its own batches only."""
        async with asyncio.TaskGroup() as tasks:
            while True:
                self._batches.changed.clear()
                busy = set(self._busy)  # before the list is read: what ends meanwhile is still open there
                try:
                    waiting = await self._batches.open_batches()
                except (GatewayError, SQLAlchemyError) as error:
                    _log.error("batches stand still, trying again in %g s: %s", _RETRY_S, error)
                    await asyncio.sleep(_RETRY_S)
                    continue
                for batch in waiting:
                    if batch.key_id not in busy:
                        busy.add(batch.key_id)
                        self._busy.add(batch.key_id)
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
            self._busy.discard(batch.key_id)
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
                work = _Work(self._batches, batch, folder / "input.jsonl", left, output, errors, *done, self._room)
                await work.run(self._url, await self._secret(batch))
        await self._finish(batch.id, folder)

    async def _secret(self, batch: Batch) -> str | None:
        """By which relays let the requests in, as if they came from who ordered the batch."""
        if not batch.key_id:
            return None
        secret = self._core.keys.lend(batch.key_id)
        await self._core.published()
        return secret

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
                kept = await self._batches.files.add(file, f"{id}_{name}.jsonl", "batch_output")
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


class _Work:
    """The requests of one batch, as long as it is in progress and its time is not over."""

    def __init__(
        self,
        batches: Batches,
        batch: Batch,
        input_file: Path,
        left: deque[Line],
        output: BinaryIO,
        errors: BinaryIO,
        completed: int,
        failed: int,
        room: asyncio.Semaphore,
    ) -> None:
        self._batches, self._batch, self._input = batches, batch, input_file
        self._left, self._output, self._errors = left, output, errors
        self._completed, self._failed = completed, failed
        self._room = room
        self._stop = False

    async def run(self, url: str, secret: str | None) -> None:
        headers = {"x-priority": "batch", "content-type": "application/json"}
        headers |= {"authorization": f"Bearer {secret}"} if secret else {}
        # To this very gateway, over the loopback: its certificate is made out for its public name.
        async with httpx2.AsyncClient(
            base_url=url,
            headers=headers,
            timeout=_TIMEOUT_S,
            trust_env=False,
            verify=False,
        ) as client:
            telling = asyncio.create_task(self._tell())
            try:
                async with asyncio.TaskGroup() as workers:
                    for _ in range(_IN_FLIGHT):
                        workers.create_task(self._worker(client))
            finally:
                telling.cancel()
                await asyncio.wait([telling])
            await self._tell_once()

    async def _worker(self, client: httpx2.AsyncClient) -> None:
        while self._left and not self._stop:
            line = self._left.popleft()
            answer = await self._answer(client, line)
            if answer is None:
                return
            text = await asyncio.to_thread(self._encode, line, answer)
            good = answer.status_code == 200
            file = self._output if good else self._errors
            file.write(text)
            file.flush()
            self._completed += good
            self._failed += not good

    async def _answer(self, client: httpx2.AsyncClient, line: Line) -> httpx2.Response | None:
        """The gateway's answer; asked again while there is no room. None when the batch is to stop."""
        body = await asyncio.to_thread(line.body, self._input)
        wait_s = 0.5
        while not self._stop and time.time() <= self._batch.expires_at:
            with contextlib.suppress(httpx2.HTTPError):  # the relays are being started again: as if there were no room
                async with self._room:
                    answer = await client.post(self._batch.endpoint, content=body)
                spent = answer.headers.get("x-should-retry") == "false"
                if answer.status_code not in _AGAIN or spent:
                    return answer
            await asyncio.sleep(wait_s)
            wait_s = min(2 * wait_s, _LONGEST_WAIT_S)
        return None

    def _encode(self, line: Line, answer: httpx2.Response) -> bytes:
        try:
            body: Any = answer.json()
        except (ValueError, RecursionError):
            body = answer.text
        response = {"status_code": answer.status_code, "request_id": answer.headers.get("x-request-id"), "body": body}
        row = {"id": new_id("batch_req_"), "custom_id": line.custom_id, "response": response, "error": None}
        return json.dumps(row).encode() + b"\n"

    async def _tell(self) -> None:
        while True:
            try:
                await self._tell_once()
            except (GatewayError, SQLAlchemyError) as error:
                _log.error("the counts of %s were not written, trying again: %s", self._batch.id, error)
            await asyncio.sleep(_TOLD_EVERY_S)

    async def _tell_once(self) -> None:
        """Write the counts, and learn whether to go on."""

        def counts(last: Batch) -> Batch:
            return msgspec.structs.replace(last, completed=self._completed, failed=self._failed)

        batch = await self._batches.change(self._batch.id, counts)
        self._stop = batch.status != "in_progress" or time.time() > batch.expires_at


def _first(errors: BaseExceptionGroup[BaseException]) -> BaseException:
    """The first error of a group that is no group."""
    error: BaseException = errors
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error
