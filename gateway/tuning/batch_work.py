"""The requests of one batch: sent to the gateway while there is room, each answer written as it comes."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import time
from collections import deque
from pathlib import Path
from typing import Any, BinaryIO

import httpx2
import msgspec
from sqlalchemy.exc import SQLAlchemyError

from gateway.errors import GatewayError
from gateway.tuning.batches import Batch, Batches
from gateway.tuning.lines import Line
from gateway.tuning.records import new_id

_log = logging.getLogger(__name__)
_IN_FLIGHT = 16  # requests at a time, of all batches; the lowest priority takes only room that nobody waits for
_TOLD_EVERY_S = 1.0  # how often counts are written
_LONGEST_WAIT_S = 30.0  # before a request that found no room is sent again
_AGAIN = (408, 429, 503)  # nothing ran; other failures are answers
_TIMEOUT_S = 600.0
_UNKNOWN_S = 60.0  # for relays to learn of a lent secret; a control that has just begun tells them nothing at first
_UNKNOWN_WAIT_S = 0.5


class Room:
    """For requests in flight. Who waits for it gets it in turn, of whichever batch it is."""

    def __init__(self) -> None:
        self.taken = 0
        self._free = asyncio.Semaphore(_IN_FLIGHT)

    async def __aenter__(self) -> None:
        await self._free.acquire()
        self.taken += 1

    async def __aexit__(self, *_: object) -> None:
        self.taken -= 1
        self._free.release()


class Work:
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
        room: Room,
    ) -> None:
        self._batches, self._batch, self._input = batches, batch, input_file
        self._left, self._output, self._errors = left, output, errors
        self._completed, self._failed = completed, failed
        self._room = room
        self._stop = False
        self._unknown_until_s = 0.0  # monotonic; until then a relay may not know the secret

    async def run(self, url: str, secret: str | None) -> None:
        """Send what is left until all is answered, the batch is to stop, or its time is over. Raises OSError.

        url: of the gateway. secret: by which its relays let the requests in; None where access is open.
        """
        headers = {"x-priority": "batch", "content-type": "application/json"}
        if secret:
            headers["authorization"] = f"Bearer {secret}"
            self._unknown_until_s = time.monotonic() + _UNKNOWN_S
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
                if answer.status_code == 401 and time.monotonic() < self._unknown_until_s:
                    wait_s = _UNKNOWN_WAIT_S
                elif answer.status_code not in _AGAIN or spent:
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
