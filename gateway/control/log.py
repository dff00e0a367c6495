"""Control's log: one JSON line an entry, as the relays write theirs."""

from __future__ import annotations

import contextlib
import logging
import os
import queue
import threading

import msgspec

_LAST_LINES_S = 1.0


class JsonLines(logging.Formatter):
    """Formats a record as `{"ts", "level", "logger", "note"}`, with its traceback if it has one."""

    def format(self, record: logging.LogRecord) -> str:
        """The line, without its end."""
        entry: dict[str, object] = {
            "ts": record.created,
            "level": record.levelname.lower(),
            "logger": record.name,
            "note": record.getMessage(),
        }
        if record.exc_info:
            entry["traceback"] = self.formatException(record.exc_info)
        return msgspec.json.encode(entry).decode()


class Aside(logging.Handler):
    """Writes records in a thread: whoever reads the log may stall, and control goes on.

    What comes while too much waits to be written is counted, not kept.
    """

    def __init__(self, fd: int, kept: int = 10_000) -> None:
        """kept: records that may wait."""
        super().__init__()
        self._fd = fd
        self._kept = kept
        # Not a `Queue`: while it puts one line, the collector may end an object that logs another, for ever.
        self._lines: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._dropped = 0
        self._writer = threading.Thread(target=self._write, name="log", daemon=True)
        self._writer.start()

    def emit(self, record: logging.LogRecord) -> None:
        """Take a record; its text is made here, where what it speaks of is as it was."""
        try:
            line = self.format(record).encode() + b"\n"
        except Exception:  # noqa: BLE001 - a line that cannot be made is not to end what wanted to say it
            self.handleError(record)
            return
        if self._lines.qsize() >= self._kept:
            self._dropped += 1
            return
        self._tell_dropped()
        self._lines.put(line)

    def close(self) -> None:
        """Wait for the last lines to be written, a moment at most."""
        self._tell_dropped()
        self._lines.put(None)
        self._writer.join(_LAST_LINES_S)
        super().close()

    def _tell_dropped(self) -> None:
        if self._dropped:
            dropped, self._dropped = self._dropped, 0  # before the collector may run, and end what logs too
            self._lines.put(b'{"dropped_log_lines":%d}\n' % dropped)

    def _write(self) -> None:
        for line in iter(self._lines.get, None):
            with contextlib.suppress(OSError):  # nobody reads any more, or a full disk
                while line:
                    line = line[os.write(self._fd, line) :]
