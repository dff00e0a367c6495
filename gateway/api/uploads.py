"""Multipart bodies streamed to disk: no part is held in memory, and every byte counts against the limit as it comes."""

from __future__ import annotations

import asyncio
import io
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path

import python_multipart as multipart
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import parse_options_header
from starlette.requests import ClientDisconnect, Request

from gateway.adapters.package import Part
from gateway.errors import InvalidRequest, PayloadTooLarge

_MAX_PARTS = 64
_MAX_FIELD_BYTES = 4096
_WRITE_BYTES = 1 << 20  # gathered before a write, which costs a change of threads
OVERHEAD_BYTES = 1 << 20  # boundaries, headers and fields beside the files


@dataclass
class Form:
    """A multipart body: its fields, and its files as they lie in staging."""

    fields: dict[str, str] = field(default_factory=dict)
    files: list[Part] = field(default_factory=list)


async def receive(request: Request, work: Path, limit_bytes: int, flag: str = "--max-adapter-mb") -> Form:
    """Stream the body of `request` into files below `work`. flag: what sets the limit, for messages.

    Raises InvalidRequest, PayloadTooLarge, OSError.
    """
    body_limit_bytes = limit_bytes + OVERHEAD_BYTES
    boundary = _boundary(request.headers.get("content-type", ""))
    request.state.unread_body = True
    declared = request.headers.get("content-length", "")
    if declared.isdigit() and int(declared) > body_limit_bytes:
        raise _too_large(limit_bytes, flag)
    writer = _Writer(work)
    parser = multipart.MultipartParser(boundary, writer.callbacks())
    received_bytes = 0
    try:
        async for chunk in _stream(request):
            received_bytes += len(chunk)
            if received_bytes > body_limit_bytes:
                raise _too_large(limit_bytes, flag)
            parser.write(chunk)
            if writer.pending_bytes >= _WRITE_BYTES:
                await asyncio.to_thread(writer.flush)
        parser.finalize()
        await asyncio.to_thread(writer.flush)
    except FormParserError as error:
        raise InvalidRequest(f"the multipart body is damaged: {error}") from error
    finally:
        writer.close()
    request.state.unread_body = False
    if not writer.complete:
        raise InvalidRequest("the multipart body ends before its last boundary")
    return writer.form


async def _stream(request: Request) -> AsyncIterator[bytes]:
    try:
        async for chunk in request.stream():
            yield chunk
    except ClientDisconnect as error:
        raise InvalidRequest("the client went away before its upload was complete") from error


def _boundary(content_type: str) -> bytes:
    kind, options = parse_options_header(content_type)
    boundary = options.get(b"boundary")
    if kind != b"multipart/form-data" or not boundary:
        raise InvalidRequest(
            f"content-type is {content_type[:100]!r}; send multipart/form-data with the fields `name` and `file`"
        )
    return boundary


def _too_large(limit_bytes: int, flag: str) -> PayloadTooLarge:
    return PayloadTooLarge(
        f"the upload is larger than {limit_bytes // 1_000_000} MB, the limit ({flag})",
        param="file",
        code="adapter_too_large" if flag == "--max-adapter-mb" else "file_too_large",
    )


class _Writer:
    """Callbacks of the multipart parser; they only gather, `flush` writes."""

    def __init__(self, work: Path) -> None:
        self.form = Form()
        self.pending_bytes = 0
        self.complete = False
        self._work = work
        self._pending: list[tuple[io.BufferedWriter, bytes]] = []
        self._open: list[io.BufferedWriter] = []
        self._header_name = b""
        self._header_value = b""
        self._disposition = b""
        self._field = ""
        self._value = bytearray()
        self._file: io.BufferedWriter | None = None
        self._parts = 0

    def callbacks(self) -> multipart.multipart.MultipartCallbacks:
        return {
            "on_part_begin": self._part_begin,
            "on_part_data": self._part_data,
            "on_part_end": self._part_end,
            "on_header_field": self._on_header_name,
            "on_header_value": self._on_header_value,
            "on_header_end": self._header_end,
            "on_headers_finished": self._headers_finished,
            "on_end": self._end,
        }

    def flush(self) -> None:
        """Write what was gathered. Blocking. Raises OSError."""
        for file, data in self._pending:
            file.write(data)
        self._pending.clear()
        self.pending_bytes = 0
        for file in self._open:
            file.flush()

    def close(self) -> None:
        """Close the files; what was not flushed is dropped."""
        for file in self._open:
            file.raw.close()

    def _part_begin(self) -> None:
        self._parts += 1
        if self._parts > _MAX_PARTS:
            raise InvalidRequest(f"the multipart body has more than {_MAX_PARTS} parts")
        self._disposition = b""

    def _on_header_name(self, data: bytes, start: int, end: int) -> None:
        self._header_name += data[start:end]

    def _on_header_value(self, data: bytes, start: int, end: int) -> None:
        self._header_value += data[start:end]

    def _header_end(self) -> None:
        if self._header_name.lower() == b"content-disposition":
            self._disposition = self._header_value
        self._header_name = self._header_value = b""

    def _headers_finished(self) -> None:
        _, options = parse_options_header(self._disposition)
        if b"name" not in options:
            raise InvalidRequest("a part of the multipart body has no name")
        self._field = options[b"name"].decode(errors="replace")
        self._value.clear()
        self._file = None
        if b"filename" in options:
            path = self._work / f"part-{len(self.form.files)}"
            self._file = path.open("xb")
            self._open.append(self._file)
            # The name as it was sent: what is unsafe about it is refused with the rest of the contents.
            self.form.files.append(Part(options[b"filename"].decode(errors="replace"), path))

    def _part_data(self, data: bytes, start: int, end: int) -> None:
        if self._file is not None:
            self._pending.append((self._file, data[start:end]))
            self.pending_bytes += end - start
            return
        self._value += data[start:end]
        if len(self._value) > _MAX_FIELD_BYTES:
            raise InvalidRequest(f"the field {self._field!r} is longer than {_MAX_FIELD_BYTES} bytes")

    def _part_end(self) -> None:
        if self._file is None:
            self.form.fields[self._field] = self._value.decode(errors="replace")

    def _end(self) -> None:
        self.complete = True
