"""Control's log: one JSON line an entry, as the relays write theirs."""

from __future__ import annotations

import contextlib
import logging
import os
import queue
import threading
import time

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
        self._lines: queue.Queue[bytes] = queue.Queue(kept)
        self._dropped = 0
        threading.Thread(target=self._write, name="log", daemon=True).start()

    def emit(self, record: logging.LogRecord) -> None:
        """Take a record; its text is made here, where what it speaks of is as it was."""
        try:
            if self._dropped:
                self._lines.put_nowait(b'{"dropped_log_lines":%d}\n' % self._dropped)
                self._dropped = 0
            self._lines.put_nowait(self.format(record).encode() + b"\n")
        except queue.Full:
            self._dropped += 1

    def close(self) -> None:
        """Wait for the last lines to be written, a moment at most."""
        deadline_s = time.monotonic() + _LAST_LINES_S
        while self._lines.unfinished_tasks and time.monotonic() < deadline_s:
            time.sleep(0.01)
        super().close()

    def _write(self) -> None:
        while True:
            line = self._lines.get()
            with contextlib.suppress(OSError):  # nobody reads any more, or a full disk
                while line:
                    line = line[os.write(self._fd, line) :]
            self._lines.task_done()
