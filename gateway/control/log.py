"""Control's log: one JSON line an entry, as the relays write theirs."""

from __future__ import annotations

import logging

import msgspec


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
