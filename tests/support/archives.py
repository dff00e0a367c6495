"""Build archives, honest and hostile, from (name, contents) pairs."""

from __future__ import annotations

import io
import tarfile
import zipfile
from collections.abc import Iterable
from pathlib import Path

Files = list[tuple[str, bytes]]


def files_of(folder: Path) -> Files:
    """The files of an adapter directory."""
    return [(path.name, path.read_bytes()) for path in sorted(folder.iterdir())]


def zip_of(files: Iterable[tuple[str, bytes]]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, contents in files:
            archive.writestr(zipfile.ZipInfo(name), contents, zipfile.ZIP_DEFLATED)
    return buffer.getvalue()


def tar_of(files: Iterable[tuple[str, bytes]], mode: str = "w:gz", extra: Iterable[tarfile.TarInfo] = ()) -> bytes:
    """`extra`: members without contents, such as links and devices."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode) as archive:  # type: ignore[call-overload]
        for name, contents in files:
            member = tarfile.TarInfo(name)
            member.size = len(contents)
            archive.addfile(member, io.BytesIO(contents))
        for member in extra:
            archive.addfile(member)
    return buffer.getvalue()
