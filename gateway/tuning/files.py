"""Files of the API: bytes in `<state>/files/<id>`, what is known of them in the store.

A file is written aside, forced to the disk and linked before the store knows it: a crash leaves all of it or nothing.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from pathlib import Path

from gateway.adapters.storage import full_disk_is_an_error
from gateway.disk import sync
from gateway.errors import InvalidRequest, NotFound, QuotaExceeded
from gateway.tuning.records import File, new_id
from gateway.tuning.store import Objects

_log = logging.getLogger(__name__)
PURPOSES = ("fine-tune", "batch", "user_data", "assistants", "vision", "evals")  # that a client may give
_MAX_FILENAME = 255
_EXPIRY_S = range(3600, 2_592_001)


class Files:
    """Add, find, read, delete."""

    def __init__(self, objects: Objects, directory: Path, limit_bytes: int) -> None:
        """limit_bytes: of all files that one key has here."""
        self._objects = objects
        self._directory = directory
        self._limit_bytes = limit_bytes
        self._uploads = asyncio.Lock()  # each is held against what is there, then added

    async def open(self) -> None:
        """Make the directory, and clear it of what a crash left."""
        await asyncio.to_thread(self._sweep)

    def path(self, id: str) -> Path:
        """Where a file's bytes lie."""
        return self._directory / id

    async def upload(
        self, staged: Path, filename: str, purpose: str, key_id: str, expires_after_s: int | None = None
    ) -> File:
        """As `add`, for a client, whose key has room for so much only. Raises QuotaExceeded too."""
        async with self._uploads:
            await self.check_room(key_id, (await asyncio.to_thread(staged.stat)).st_size)
            return await self.add(staged, filename, purpose, key_id, expires_after_s)

    async def check_room(self, key_id: str, size_bytes: int) -> None:
        """Refuse what would go beyond what a key may keep here. Raises QuotaExceeded."""
        files = await self.delete_expired()  # the runner does not come to it while a job trains
        kept_bytes = sum(file.size_bytes for file in files if file.key_id == key_id)
        if kept_bytes + size_bytes > self._limit_bytes:
            whose = f"the key {key_id} keeps" if key_id else "there are"
            raise QuotaExceeded(
                f"{whose} {kept_bytes / 1e6:.1f} MB of files here, and {size_bytes / 1e6:.1f} MB more are over the "
                f"limit of {self._limit_bytes / 1e9:g} GB (--max-files-gb); delete some, or have them expire"
            )

    async def add(
        self, staged: Path, filename: str, purpose: str, key_id: str, expires_after_s: int | None = None
    ) -> File:
        """Keep a file from staging, which its owner clears away. Raises InvalidRequest, StorageFull, OSError.

        key_id: whose it is; "" where access is open.
        """
        if expires_after_s is not None and expires_after_s not in _EXPIRY_S:
            raise InvalidRequest(
                f"expires_after[seconds] is {expires_after_s}; give {_EXPIRY_S.start} to {_EXPIRY_S.stop - 1}",
                param="expires_after",
            )
        return await asyncio.to_thread(self._add, staged, filename, purpose, key_id, expires_after_s)

    async def get(self, id: str, param: str = "file_id") -> File:
        """What is known of a file. Raises NotFound."""
        file = await asyncio.to_thread(self._objects.get, id, File)
        if file is None or _expired(file):
            raise NotFound(f"No such File object: {id[:100]}", param=param)
        return file

    async def page(
        self, purpose: str | None, after: str | None, limit: int, oldest_first: bool
    ) -> tuple[list[File], bool]:
        """Files behind `after`, and whether there are more. Raises InvalidRequest."""

        def keep(file: File) -> bool:
            return purpose in (None, file.purpose) and not _expired(file)

        return await asyncio.to_thread(self._objects.page, File, after, limit, keep, oldest_first)

    async def delete(self, id: str) -> None:
        """Forget a file. Jobs that use it keep what they read. Raises NotFound."""
        await self.get(id)
        await asyncio.to_thread(self._delete, id)

    async def delete_expired(self) -> list[File]:
        """Forget the files whose time is over; those that are left."""
        files = await asyncio.to_thread(self._objects.all, File)
        over = {file.id for file in files if _expired(file)}
        for id in over:
            await asyncio.to_thread(self._delete, id)
        return [file for file in files if file.id not in over]

    def _add(self, staged: Path, filename: str, purpose: str, key_id: str, expires_after_s: int | None) -> File:
        now = int(time.time())
        file = File(
            id=new_id("file-"),
            created_at=now,
            filename=filename[:_MAX_FILENAME] or "file",
            purpose=purpose,
            size_bytes=staged.stat().st_size,
            expires_at=None if expires_after_s is None else now + expires_after_s,
            key_id=key_id,
        )
        with full_disk_is_an_error():
            sync(staged)
            os.link(staged, self.path(file.id))  # a crash before the owner refers to it loses nothing
            sync(self._directory)
        self._objects.put(file)
        return file

    def _delete(self, id: str) -> None:
        self._objects.delete(id)
        self.path(id).unlink(missing_ok=True)

    def _sweep(self) -> None:
        self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        known = {file.id for file in self._objects.all(File)}
        for path in self._directory.iterdir():
            if path.name not in known:
                _log.warning("removed %s, which the registry does not know", path)
                path.unlink()


def _expired(file: File) -> bool:
    return file.expires_at is not None and file.expires_at <= time.time()
