"""Works batches off, one at a time, by sending their requests to the gateway itself at the lowest priority.

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
from gateway.errors import GatewayError
from gateway.tuning import lines
from gateway.tuning.batches import Batch, Batches
from gateway.tuning.lines import Line
from gateway.tuning.records import new_id

_log = logging.getLogger(__name__)
_IN_FLIGHT = 16  # requests at a time; with the lowest priority they take only room that nobody waits for
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

    async def run(self) -> None:
        """Work until cancelled."""
        while True:
            self._batches.changed.clear()
            try:
                for batch in await self._batches.open_batches():
                    await self._work(batch)
            except (GatewayError, SQLAlchemyError, OSError) as error:
                _log.error("batches stand still, trying again in %g s: %s", _RETRY_S, error)
                await asyncio.sleep(_RETRY_S)
                continue
            await self._batches.changed.wait()

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
                work = _Work(self._batches, batch, folder / "input.jsonl", left, output, errors, len(good), len(bad))
                await work.run(self._url, await self._secret(batch))
        await self._finish(batch.id, folder)

    async def _secret(self, batch: Batch) -> str | None:
        """By which relays let the requests in, as if they came from who ordered the batch."""
        if not batch.key_id:
            return None
        secret = self._core.keys.lend(batch.key_id)
        await self._core.published()
        return secret

    async def _finish(self, id: str, folder: Path) -> None:
        """Hand over what was answered."""
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

        def end(last: Batch) -> Batch:
            done = msgspec.structs.replace(
                last, status=ended, output_file_id=made["output"], error_file_id=made["errors"]
            )
            at = int(time.time())
            if ended == "cancelled":
                return msgspec.structs.replace(done, cancelled_at=at)
            if ended == "expired":
                return msgspec.structs.replace(done, expired_at=at)
            return msgspec.structs.replace(done, completed_at=at)

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
    ) -> None:
        self._batches, self._batch, self._input = batches, batch, input_file
        self._left, self._output, self._errors = left, output, errors
        self._completed, self._failed = completed, failed
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
        while not self._stop:
            with contextlib.suppress(httpx2.HTTPError):  # the relays are being started again: as if there were no room
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
        except ValueError:
            body = answer.text
        response = {"status_code": answer.status_code, "request_id": answer.headers.get("x-request-id"), "body": body}
        row = {"id": new_id("batch_req_"), "custom_id": line.custom_id, "response": response, "error": None}
        return json.dumps(row).encode() + b"\n"

    async def _tell(self) -> None:
        while True:
            await self._tell_once()
            await asyncio.sleep(_TOLD_EVERY_S)

    async def _tell_once(self) -> None:
        """Write the counts, and learn whether to go on."""

        def counts(last: Batch) -> Batch:
            return msgspec.structs.replace(last, completed=self._completed, failed=self._failed)

        batch = await self._batches.change(self._batch.id, counts)
        self._stop = batch.status != "in_progress" or time.time() > batch.expires_at
