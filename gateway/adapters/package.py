"""Unpack an upload: a .zip, a .tar or .tar.gz, or the files themselves. Hostile until proven otherwise.

Only the files that make an adapter are ever written, under names of our own choice; everything else in the upload is
skipped and named in the answer. Every byte that comes out of a decompressor is counted before it is kept.
"""

from __future__ import annotations

import errno
import gzip
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, Protocol

from gateway.errors import InvalidRequest, PayloadTooLarge

CONFIG, WEIGHTS, MANIFEST = "adapter_config.json", "adapter_model.safetensors", "manifest.json"
KEPT = frozenset({CONFIG, WEIGHTS, MANIFEST})

_PICKLES = frozenset({".bin", ".pt", ".pth", ".pkl", ".ckpt"})
_CHUNK_BYTES = 1 << 20
_MAX_NAME_BYTES = 1024
_MAX_HEADER_READ_BYTES = 1 << 20  # tarfile reads an extended header whole: no honest one is that long
_MAX_ZIP_DIRECTORY_BYTES = 4 << 20  # zipfile reads the central directory whole
_BOMB_FLOOR_BYTES = 32 << 20  # small uploads may compress as well as they like


class Readable(Protocol):
    """What the archive readers of the standard library have in common."""

    def read(self, size: int, /) -> bytes: ...


@dataclass(frozen=True, slots=True)
class Part:
    """One uploaded file: the name that the client gave, and where its bytes lie in staging."""

    filename: str
    path: Path


@dataclass(frozen=True, slots=True)
class Limits:
    """What an upload may cost."""

    total_bytes: int  # unpacked
    members: int = 1000
    ratio: int = 100  # unpacked to packed; weights hardly compress, so this is generous


@dataclass(frozen=True, slots=True)
class Unpacked:
    """The kept files by their own names, and what was skipped."""

    files: dict[str, Path]
    skipped: tuple[str, ...]


def unpack(parts: Sequence[Part], into: Path, limits: Limits) -> Unpacked:
    """Write the adapter's files into `into`, an empty directory. Raises InvalidRequest, PayloadTooLarge, OSError."""
    if not parts:
        raise _refused("the upload holds no file: send a .zip or .tar.gz of a PEFT directory, or its files", "no_file")
    archives = [(part, _archive_kind(part.path)) for part in parts]
    if len(parts) > 1 and any(kind for _, kind in archives):
        raise _refused("send either one archive or the adapter's files themselves, not both", "mixed_upload")
    sink = _Sink(into, limits, packed_bytes=sum(part.path.stat().st_size for part in parts))
    part, kind = archives[0]
    if kind == "zip":
        _unzip(part.path, sink, limits)
    elif kind == "gzip":
        unzipped = _gunzip(part.path, into / "unzipped", sink)
        _untar(unzipped, sink)
        unzipped.unlink()
    elif kind == "tar":
        _untar(part.path, sink)
    else:
        for part in parts:
            with part.path.open("rb") as source:
                sink.take(part.filename, _chunks(source))
    return sink.finish()


def _archive_kind(path: Path) -> str:
    """ "zip", "gzip", "tar" or "" by the first bytes; the name is the client's to choose and tells nothing."""
    with path.open("rb") as file:
        head = file.read(265)
    if head.startswith((b"PK\x03\x04", b"PK\x05\x06")):
        return "zip"
    if head.startswith(b"\x1f\x8b"):
        return "gzip"
    return "tar" if head[257:262] == b"ustar" else ""


class _Sink:
    """Takes members one by one and keeps those that belong to an adapter."""

    def __init__(self, into: Path, limits: Limits, packed_bytes: int) -> None:
        self._into = into
        self._limits = limits
        self._packed_bytes = packed_bytes
        self._unpacked_bytes = 0
        self._seen: set[PurePosixPath] = set()
        self._kept: dict[PurePosixPath, Path] = {}

    def take(self, raw_name: str, contents: Iterable[bytes]) -> None:
        """Keep or skip one member; `contents` is consumed only when it is kept."""
        name = self.admit(raw_name)
        if name is None or name.name not in KEPT:
            return
        target = self._into / f"member-{len(self._kept)}"
        with target.open("xb") as file:
            file.writelines(contents)
        self._kept[name] = target

    def admit(self, raw_name: str) -> PurePosixPath | None:
        """The member's safe name, each only once; None for a directory."""
        name = _safe_name(raw_name)
        if raw_name.endswith("/"):
            return None
        if name in self._seen:
            raise _refused(f"{str(name)!r} is in the upload twice", "duplicate_member")
        self._seen.add(name)
        if len(self._seen) > self._limits.members:
            raise _refused(
                f"the upload holds more than {self._limits.members} files; an adapter is {', '.join(sorted(KEPT))}",
                "too_many_files",
            )
        return name

    def counted(self, chunks: Iterable[bytes]) -> Iterator[bytes]:
        """The same chunks, from a decompressor, each accounted for before it is passed on."""
        for chunk in chunks:
            self._count(len(chunk))
            yield chunk

    def _count(self, size_bytes: int) -> None:
        self._unpacked_bytes += size_bytes
        if self._unpacked_bytes > self._limits.total_bytes:
            raise PayloadTooLarge(
                f"the upload unpacks to more than {self._limits.total_bytes // 1_000_000} MB, the limit "
                "(--max-adapter-mb)",
                param="file",
                code="adapter_too_large",
            )
        bomb = self._unpacked_bytes > self._limits.ratio * max(self._packed_bytes, 1)
        if bomb and self._unpacked_bytes > _BOMB_FLOOR_BYTES:
            raise _refused(
                f"the upload unpacks to more than {self._limits.ratio} times its size: not an adapter's weights",
                "decompression_bomb",
            )

    def finish(self) -> Unpacked:
        """Give the kept files their own names. Raises InvalidRequest when they are not one adapter."""
        root = self._root()
        files = {}
        for name, path in self._kept.items():
            if name.parent == root:
                files[name.name] = path.rename(self._into / name.name)
            else:
                path.unlink()
        if WEIGHTS not in files:
            raise _no_weights(root, self._seen)
        skipped = sorted(str(name) for name in self._seen if name not in {root / file for file in files})
        return Unpacked(files, tuple(skipped))

    def _root(self) -> PurePosixPath:
        """The directory of the one adapter in the upload: the highest that holds an adapter_config.json."""
        roots = sorted((name.parent for name in self._kept if name.name == CONFIG), key=lambda path: len(path.parts))
        if not roots:
            held = ", ".join(sorted(str(name) for name in self._seen)[:10]) or "nothing"
            raise _refused(f"the upload has no {CONFIG}; it holds {held}. Send a PEFT adapter directory", "no_config")
        if len(roots) > 1 and len(roots[1].parts) == len(roots[0].parts):
            raise _refused(
                f"the upload holds several adapters: {', '.join(map(str, roots))}. Send one", "many_adapters"
            )
        return roots[0]


def _no_weights(root: PurePosixPath, seen: set[PurePosixPath]) -> InvalidRequest:
    for name in sorted(seen):
        if name.parent == root and name.stem == "adapter_model" and name.suffix in _PICKLES:
            return _refused(
                f"{name} is a pickle, which can run code when it is read; save the adapter with "
                "`model.save_pretrained(DIR, safe_serialization=True)` and send adapter_model.safetensors",
                "pickle_refused",
            )
    return _refused(f"the upload has no {WEIGHTS} beside its {CONFIG}", "no_weights")


def _safe_name(raw: str) -> PurePosixPath:
    """The member's name as a relative path below the upload. Raises InvalidRequest for any other."""
    name = PurePosixPath(raw)
    shown = raw[:200]
    if not raw or "\0" in raw or "\\" in raw or len(raw.encode(errors="surrogatepass")) > _MAX_NAME_BYTES:
        raise _refused(f"the upload holds a file named {shown!r}; use plain relative names", "unsafe_name")
    if name.is_absolute() or (len(raw) > 1 and raw[1] == ":"):
        raise _refused(f"the upload holds the absolute name {shown!r}; use relative names", "absolute_name")
    if ".." in name.parts:
        raise _refused(f"the upload holds {shown!r}, which leads out of its directory", "path_traversal")
    return name


def _unzip(path: Path, sink: _Sink, limits: Limits) -> None:
    _check_zip_directory(path, limits)
    try:
        with zipfile.ZipFile(path) as archive:
            for member in archive.infolist():
                name = member.orig_filename
                mode = member.external_attr >> 16
                if mode and (mode & 0o170000) not in (0o100000, 0o040000, 0):
                    raise _refused(f"{name!r} is a link or a device, not a file", "link_or_device")
                if member.flag_bits & 0x1:
                    raise _refused(f"{name!r} is encrypted; send the archive without a password", "encrypted_archive")
                if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                    raise _refused(f"{name!r} is packed by a rare method; use plain zip (deflate)", "bad_archive")
                with archive.open(member) as source:
                    sink.take(name, sink.counted(_chunks(source)))
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, ValueError) as error:
        raise _refused(f"the zip archive is damaged: {error}", "bad_archive") from error
    except OSError as error:
        if error.errno != errno.EINVAL:  # zipfile seeks wherever a damaged directory points
            raise
        raise _refused("the zip archive is damaged: its directory points nowhere", "bad_archive") from error


def _check_zip_directory(path: Path, limits: Limits) -> None:
    """Refuse a central directory that would fill the memory, which zipfile reads before it counts anything."""
    size = path.stat().st_size
    with path.open("rb") as file:
        file.seek(max(0, size - 65_557))
        tail = file.read()
    at = tail.rfind(b"PK\x05\x06")
    if at < 0 or len(tail) < at + 22:
        raise _refused("the zip archive is damaged: its directory is missing", "bad_archive")
    _, _, _, entries, directory_bytes = struct.unpack_from("<HHHHL", tail, at + 4)
    zip64 = at >= 20 and tail[at - 20 : at - 16] == b"PK\x06\x07"
    if zip64 or directory_bytes > _MAX_ZIP_DIRECTORY_BYTES or entries > 2 * limits.members:
        raise _refused(f"the zip archive holds too many files, more than {limits.members}", "too_many_files")


def _gunzip(path: Path, target: Path, sink: _Sink) -> Path:
    """Decompress to `target`, so that tarfile can seek in it and every byte is counted first."""
    try:
        with gzip.open(path) as source, target.open("xb") as file:
            file.writelines(sink.counted(_chunks(source)))
    except (gzip.BadGzipFile, zlib.error, EOFError) as error:
        raise _refused(f"the gzip archive is damaged: {error}", "bad_archive") from error
    return target


class _ShortReads:
    """A file for tarfile that refuses to be read whole: a forged header length must not fill the memory."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self.tell = file.tell
        self.seek = file.seek

    def read(self, size: int = -1) -> bytes:
        if size < 0 or size > _MAX_HEADER_READ_BYTES:
            raise _refused("the tar archive has a header of more than 1 MB", "bad_archive")
        return self._file.read(size)


def _untar(path: Path, sink: _Sink) -> None:
    try:
        with path.open("rb") as file, tarfile.open(fileobj=_ShortReads(file), mode="r:") as archive:  # type: ignore[call-overload]  # has what tarfile uses of a file
            for member in archive:
                if member.isdir():
                    sink.admit(member.name + "/")
                    continue
                if not member.isreg() or member.issparse():
                    raise _refused(f"{member.name!r} is a link or a device, not a file", "link_or_device")
                source = archive.extractfile(member)
                assert source is not None, "a regular member has contents"
                sink.take(member.name, _chunks(source))
    except (tarfile.TarError, ValueError) as error:
        raise _refused(f"the tar archive is damaged: {error}", "bad_archive") from error


def _chunks(source: Readable) -> Iterator[bytes]:
    while chunk := source.read(_CHUNK_BYTES):
        yield chunk


def _refused(message: str, code: str) -> InvalidRequest:
    return InvalidRequest(message, param="file", code=code)
