"""Where adapters lie: `<state>/adapters/a-<sha12>/`, written once, read-only, never rewritten.

An upload is worked on in `<state>/staging` and becomes visible by one rename, so a crash leaves either nothing or
the whole adapter. The same contents twice are one directory.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import secrets
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from gateway.adapters.names import content_id, is_content_id
from gateway.disk import sync
from gateway.errors import InternalError, StorageFull

_FULL = (errno.ENOSPC, errno.EDQUOT)


@dataclass(frozen=True, slots=True)
class Stored:
    """Contents in their final place."""

    content_id: str
    sha256: str
    path: Path
    size_bytes: int


@contextlib.contextmanager
def full_disk_is_an_error() -> Iterator[None]:
    """Turn "no space left" into StorageFull; other OSErrors pass."""
    try:
        yield
    except OSError as error:
        if error.errno not in _FULL:
            raise
        raise StorageFull(
            "the disk of the gateway's --state directory is full; nothing was kept. Free space and try again"
        ) from error


class AdapterStorage:
    """The two directories of one gateway's state. Blocking: call it from a thread."""

    def __init__(self, state_dir: Path) -> None:
        self._staging = state_dir / "staging"
        self._adapters = state_dir / "adapters"
        for directory in (self._staging, self._adapters):
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)

    @contextlib.contextmanager
    def staging(self) -> Iterator[Path]:
        """A directory for one upload, gone afterwards whatever happens. Raises StorageFull when the disk is."""
        with full_disk_is_an_error():
            work = Path(tempfile.mkdtemp(prefix="upload-", dir=self._staging))
            try:
                yield work
            finally:
                shutil.rmtree(work)

    def path_of(self, adapter: str) -> Path:
        """Where the contents with this id lie."""
        return self._adapters / adapter

    def commit(self, files: Mapping[str, Path]) -> Stored:
        """Move staged files (name -> path, all in one directory that holds nothing else) to their final place.

        Raises OSError; InternalError when other contents hold the id.
        """
        directory = next(iter(files.values())).parent
        digest, size_bytes = _digest(files)
        stored = Stored(content_id(digest), digest, self.path_of(content_id(digest)), size_bytes)
        if stored.path.exists():
            self._check_same(stored)
            return stored
        for path in files.values():
            path.chmod(0o444)
            sync(path)
        sync(directory)
        directory.rename(stored.path)
        stored.path.chmod(0o555)
        sync(self._adapters)
        return stored

    def _check_same(self, stored: Stored) -> None:
        there = {path.name: path for path in stored.path.iterdir()}
        digest, _ = _digest(there)
        if digest != stored.sha256:
            raise InternalError(
                f"{stored.path} holds other contents than its name says (sha256 {digest}); the disk may be damaged. "
                "Delete the adapters that use it and upload them again"
            )

    def remove(self, adapter: str) -> None:
        """Delete contents that nothing names any more; unknown ids are fine."""
        path = self.path_of(adapter)
        if not path.exists():
            return
        # Out of sight in one step: a crash in the middle leaves a directory that the next start sweeps.
        path.chmod(0o700)
        shutil.rmtree(path.rename(self._staging / f"removed-{secrets.token_hex(8)}"))

    def stored(self) -> frozenset[str]:
        """The ids of all contents here."""
        return frozenset(path.name for path in self._adapters.iterdir() if is_content_id(path.name))

    def sweep(self, known: frozenset[str]) -> tuple[str, ...]:
        """At start: empty staging, remove contents that the registry does not know. Returns their ids."""
        for left in self._staging.iterdir():
            _make_removable(left)
            shutil.rmtree(left)
        orphans = sorted(self.stored() - known)
        for orphan in orphans:
            self.remove(orphan)
        return tuple(orphans)


def sha256_of(files: Mapping[str, Path]) -> str:
    """The digest (hex) by which files of these names would be stored."""
    return _digest(files)[0]


def _digest(files: Mapping[str, Path]) -> tuple[str, int]:
    """SHA-256 over the sorted names and digests of the files, and their size in bytes."""
    whole, size_bytes = hashlib.sha256(), 0
    for name, path in sorted(files.items()):
        with path.open("rb") as file:
            part = hashlib.file_digest(file, "sha256").hexdigest()
            size_bytes += file.tell()
        whole.update(f"{name}\0{part}\n".encode())
    return whole.hexdigest(), size_bytes


def _make_removable(path: Path) -> None:
    for directory in [path, *(found for found in path.rglob("*") if found.is_dir())]:
        directory.chmod(0o700)
