"""The output directory while it is being written: resumable, and invisible under its final name until it is whole.

OUT.partial/job.json             what the job is, and which shards are finished (with their SHA-256)
OUT.partial/model-00001.safetensors ...
OUT.partial/.lock                held by the process at work
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
from pathlib import Path
from types import TracebackType
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from quant.errors import BadCheckpoint, JobConflict
from quant.headers import INDEX_NAME, read_entries, read_file_entries, read_json
from quant.report import render

_JOB = "job.json"
_LOCK = ".lock"
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx", ".index.json")


class Workspace:
    """`OUT.partial` as a context manager: finished shards survive a kill, `commit` turns it into OUT."""

    def __init__(self, out: Path, job: dict[str, Any]) -> None:
        """`job` identifies the work: a partial directory of another job is refused (JobConflict)."""
        self.out, self.partial = out, out.with_name(out.name + ".partial")
        self._job = job
        self._shards: dict[str, dict[str, Any]] = {}  # shard name -> sha256, bytes, notes
        if out.exists():
            raise JobConflict(f"{out} exists already: choose another --out, or delete it")

    def __enter__(self) -> Workspace:
        self.partial.mkdir(parents=True, exist_ok=True)
        self._lock = (self.partial / _LOCK).open("w")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            self._lock.close()
            raise JobConflict(f"another process is writing {self.partial}") from error
        state_file = self.partial / _JOB
        if state_file.is_file():
            state = read_json(state_file)
            if state.get("job") != self._job:
                self._lock.close()
                raise JobConflict(
                    f"{self.partial} holds the unfinished work of a different job (other options, model or texts): "
                    "delete it, or repeat the command that began it"
                )
            self._shards = state["shards"]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._lock.close()

    def has(self, shard: str) -> bool:
        """Whether this shard was finished, by this run or an earlier one."""
        return shard in self._shards

    def notes(self, shard: str) -> Any:
        """What `put` was given to remember with a finished shard."""
        return self._shards[shard]["notes"]

    def read(self, shard: str) -> dict[str, Tensor]:
        """The tensors of a finished shard. Raises BadCheckpoint when it changed since."""
        file = self.partial / shard
        if sync_and_hash(file) != self._shards[shard]["sha256"]:
            raise BadCheckpoint(f"{file} is not what was written: delete {self.partial} and start again")
        return load_file(file)

    def put(self, shard: str, tensors: dict[str, Tensor], notes: Any) -> None:
        """Write one shard durably, then record it as finished. Raises OSError (a full disk keeps earlier shards)."""
        file, aside = self.partial / shard, self.partial / f"{shard}.tmp"
        try:
            save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, aside, metadata={"format": "pt"})
        except SafetensorError as error:  # so it reports a disk that takes no more
            raise OSError(f"{aside} cannot be written: {error}") from error
        digest = sync_and_hash(aside)
        aside.rename(file)
        self._shards[shard] = {"sha256": digest, "bytes": file.stat().st_size, "notes": notes}
        write_json(self.partial / _JOB, {"job": self._job, "shards": self._shards})

    def commit(
        self, source: Path, config: dict[str, Any], manifest: dict[str, Any], report: dict[str, Any] | None
    ) -> None:
        """Add configuration, tokenizer, index, manifest and report, then give the directory its final name."""
        for file in sorted(source.iterdir()):
            if (
                file.is_file()
                and not file.name.endswith(_WEIGHTS)
                and file.name not in ("config.json", "manifest.json")
            ):
                shutil.copyfile(file, self.partial / file.name)
        entries = {shard: read_file_entries(self.partial / shard) for shard in self._shards}
        names = {name: shard for shard, own in entries.items() for name in own}
        total_bytes = sum(entry.size_bytes for own in entries.values() for entry in own.values())
        write_json(self.partial / INDEX_NAME, {"metadata": {"total_size": total_bytes}, "weight_map": names})
        write_json(self.partial / "config.json", config)
        if report is not None:
            write_json(self.partial / "quant_report.json", report)
            (self.partial / "quant_report.html").write_text(render(report, source.name), encoding="utf-8")
        unlisted = (_JOB, _LOCK, "manifest.json")  # the last: of a try that was killed before the rename
        own = [file for file in sorted(self.partial.iterdir()) if file.name not in unlisted and file.suffix != ".tmp"]
        files = {file.name: _describe(file, self._shards.get(file.name)) for file in own}
        write_json(self.partial / "manifest.json", manifest | {"files": files})
        read_entries(self.partial)  # the last look at every shard's length before the name says it is whole
        for leftover in self.partial.glob("*.tmp"):
            leftover.unlink()
        sync_directory(self.partial)
        self.partial.rename(self.out)
        for name in (_JOB, _LOCK):  # only now: without them a kill before the rename would cost all finished shards
            (self.out / name).unlink(missing_ok=True)
        sync_directory(self.out)
        sync_directory(self.out.parent)


def _describe(file: Path, shard: dict[str, Any] | None) -> dict[str, Any]:
    if shard:
        return {"sha256": shard["sha256"], "bytes": shard["bytes"]}
    return {"sha256": sync_and_hash(file), "bytes": file.stat().st_size}


def sync_and_hash(file: Path) -> str:
    """Flush a file to disk and return its SHA-256."""
    with file.open("rb") as stream:
        os.fsync(stream.fileno())
        return hashlib.file_digest(stream, "sha256").hexdigest()


def write_json(file: Path, value: dict[str, Any]) -> None:
    """Write a JSON file so that a reader, or the next run after a kill, sees the old one or the new one."""
    aside = file.with_name(file.name + ".tmp")
    with aside.open("w") as stream:
        json.dump(value, stream, indent=1)
        stream.flush()
        os.fsync(stream.fileno())
    aside.rename(file)


def sync_directory(directory: Path) -> None:
    """Make renames inside a directory durable."""
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
