"""Batches: made, listed and cancelled by the API; worked off in idle time by `batch_runner.py`."""

from __future__ import annotations

import asyncio
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import msgspec

from gateway.adapters.storage import full_disk_is_an_error
from gateway.errors import Conflict, InvalidRequest, NotFound
from gateway.tuning.files import Files
from gateway.tuning.records import new_id
from gateway.tuning.store import Objects

Endpoint = Literal["/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/responses"]
OPEN = ("validating", "in_progress", "finalizing", "cancelling")
WINDOW_S = 86_400


class LineFault(msgspec.Struct, frozen=True):
    """What is wrong with a line of the input."""

    code: str
    message: str
    line: int | None = None
    param: str | None = None


class Batch(msgspec.Struct, frozen=True, kw_only=True):
    """A batch. Times are seconds since the epoch, None until it came to that."""

    id: str
    created_at: int
    status: str
    endpoint: str
    input_file_id: str
    key_id: str  # who ordered it, and whose limits its requests count against; "" where access is open
    metadata: dict[str, str] | None = None
    in_progress_at: int | None = None
    finalizing_at: int | None = None
    completed_at: int | None = None
    failed_at: int | None = None
    expired_at: int | None = None
    cancelling_at: int | None = None
    cancelled_at: int | None = None
    faults: tuple[LineFault, ...] = ()
    total: int = 0
    completed: int = 0
    failed: int = 0
    output_file_id: str | None = None
    error_file_id: str | None = None

    @property
    def expires_at(self) -> int:
        """When what is not done yet is given up."""
        return self.created_at + WINDOW_S


class CreateBatch(msgspec.Struct, forbid_unknown_fields=True):
    """The body of POST /v1/batches."""

    input_file_id: str
    endpoint: Endpoint
    completion_window: Literal["24h"]
    metadata: dict[str, str] | None = None


class Batches:
    """The batches of one gateway."""

    def __init__(self, objects: Objects, files: Files, directory: Path) -> None:
        """directory: a folder a batch, with its input and what is answered so far."""
        self.files = files
        self._objects = objects
        self._directory = directory
        self._lock = asyncio.Lock()
        self.changed = asyncio.Event()

    async def open(self) -> None:
        """Clear the directory of what a crash left."""
        await asyncio.to_thread(self._sweep)

    def folder(self, batch: Batch) -> Path:
        """Where a batch's lines lie while it is worked on."""
        return self._directory / batch.id

    async def create(self, body: Any, key_id: str) -> Batch:
        """Queue a batch; its lines are checked when its turn comes. Raises InvalidRequest, NotFound."""
        try:
            asked = msgspec.convert(body, CreateBatch)
        except msgspec.ValidationError as error:
            raise InvalidRequest(f"the batch is not valid: {error}") from error
        file = await self.files.get(asked.input_file_id, "input_file_id")
        if file.purpose != "batch":
            raise InvalidRequest(
                f"input_file_id {file.id!r} was uploaded for {file.purpose!r}; upload it with purpose='batch'",
                param="input_file_id",
            )
        batch = Batch(
            id=new_id("batch_"),
            created_at=int(time.time()),
            status="validating",
            endpoint=asked.endpoint,
            input_file_id=file.id,
            key_id=key_id,
            metadata=asked.metadata,
        )
        await asyncio.to_thread(self._keep, batch)
        await asyncio.to_thread(self._objects.put, batch)
        self.changed.set()
        return batch

    async def get(self, id: str) -> Batch:
        """Raises NotFound."""
        batch = await asyncio.to_thread(self._objects.get, id, Batch)
        if batch is None:
            raise NotFound(f"No batch found with id {id[:100]!r}", param="batch_id")
        return batch

    async def page(self, after: str | None, limit: int) -> tuple[list[Batch], bool]:
        """Batches behind `after`, newest first, and whether there are more."""
        return await asyncio.to_thread(self._objects.page, Batch, after, limit)

    async def open_batches(self) -> list[Batch]:
        """What is to be worked on, oldest first."""
        return await asyncio.to_thread(self._objects.all, Batch, OPEN)

    async def cancel(self, id: str) -> Batch:
        """Send no more of its requests; what was answered is kept. Raises NotFound, Conflict."""

        def change(batch: Batch) -> Batch:
            if batch.status not in ("validating", "in_progress"):
                raise Conflict(f"{batch.id} is {batch.status}, and cannot be cancelled")
            return msgspec.structs.replace(batch, status="cancelling", cancelling_at=int(time.time()))

        return await self.change(id, change)

    async def change(self, id: str, change: Callable[[Batch], Batch]) -> Batch:
        """Read a batch, change it, write it. Raises what `change` raises, NotFound."""
        return await asyncio.shield(self._change(id, change))

    async def _change(self, id: str, change: Callable[[Batch], Batch]) -> Batch:
        async with self._lock:
            batch = change(await self.get(id))
            await asyncio.to_thread(self._objects.put, batch)
        self.changed.set()
        return batch

    def _sweep(self) -> None:
        known = {batch.id for batch in self._objects.all(Batch, OPEN)}
        for folder in self._directory.glob("batch_*"):
            if folder.name not in known:
                shutil.rmtree(folder, ignore_errors=True)

    def _keep(self, batch: Batch) -> None:
        """The batch's own name for its input, so that it keeps it when the file is deleted."""
        with full_disk_is_an_error():
            self.folder(batch).mkdir(mode=0o700, parents=True)
            os.link(self.files.path(batch.input_file_id), self.folder(batch) / "input.jsonl")


def view(batch: Batch) -> dict[str, Any]:
    """The batch as OpenAI's object."""
    times = ("in_progress_at", "finalizing_at", "completed_at", "failed_at", "expired_at", "cancelling_at")
    errors = {"object": "list", "data": msgspec.to_builtins(batch.faults)} if batch.faults else None
    return {
        "id": batch.id,
        "object": "batch",
        "endpoint": batch.endpoint,
        "errors": errors,
        "input_file_id": batch.input_file_id,
        "completion_window": "24h",
        "status": batch.status,
        "output_file_id": batch.output_file_id,
        "error_file_id": batch.error_file_id,
        "created_at": batch.created_at,
        "expires_at": batch.expires_at,
        "cancelled_at": batch.cancelled_at,
        "request_counts": {"total": batch.total, "completed": batch.completed, "failed": batch.failed},
        "metadata": batch.metadata,
        **{name: getattr(batch, name) for name in times},
    }
