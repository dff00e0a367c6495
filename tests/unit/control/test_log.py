"""Control's log: lines of JSON, written aside."""

from __future__ import annotations

import contextlib
import gc
import json
import logging
import os
import queue
import sys
import threading

import pytest

from gateway.control.log import Aside, JsonLines
from tests.support.pipes import full_pipe
from tests.support.wait import eventually


def aside(fd: int, kept: int = 100) -> tuple[logging.Logger, Aside]:
    """A logger of its own that writes there."""
    handler = Aside(fd, kept)
    handler.setFormatter(JsonLines())
    logger = logging.Logger("aside")
    logger.addHandler(handler)
    return logger, handler


def test_a_log_that_nobody_reads_holds_nobody_up() -> None:
    reading, writing = full_pipe()
    logger, handler = aside(writing, kept=100)
    for number in range(1000):
        logger.warning("line %d", number)
    os.set_blocking(reading, False)
    text = b""

    def read() -> list[dict[str, object]]:
        nonlocal text
        with contextlib.suppress(BlockingIOError):
            text += os.read(reading, 1 << 20)
        return [json.loads(line) for line in text.split(b"\n")[:-1] if line.startswith(b"{")]

    eventually(lambda: len(read()) >= 100)
    logger.warning("the last")
    lines = eventually(lambda: found if (found := read())[-1].get("note") == "the last" else None)
    assert lines is not None
    dropped = sum(int(str(line.get("dropped_log_lines", 0))) for line in lines)
    assert dropped and dropped + sum("note" in line for line in lines) == 1001
    handler.close()
    os.close(reading)


def test_a_log_says_at_its_end_what_it_dropped() -> None:
    reading, writing = os.pipe()
    logger, handler = aside(writing, kept=0)
    for _ in range(3):
        logger.warning("no room")
    handler.close()
    assert os.read(reading, 4096) == b'{"dropped_log_lines":3}\n'
    os.close(reading)
    os.close(writing)


def test_dropped_lines_are_told_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the collector, run by the telling, ends what logs too."""

    class Telling(queue.SimpleQueue[bytes | None]):
        def put(self, item: bytes | None, block: bool = True, timeout: float | None = None) -> None:
            super().put(item)
            if item is not None and b"dropped" in item:
                logger.warning("collected")

    reading, writing = os.pipe()
    with monkeypatch.context() as patched:
        patched.setattr(queue, "SimpleQueue", Telling)
        logger, handler = aside(writing)
    handler._dropped = 3
    logger.warning("the next")
    handler.close()
    lines = [json.loads(line) for line in os.read(reading, 4096).splitlines()]
    assert [line.get("dropped_log_lines") or line["note"] for line in lines] == [3, "collected", "the next"]
    os.close(reading)
    os.close(writing)


def test_a_line_that_cannot_be_made_does_not_end_who_says_it(capsys: pytest.CaptureFixture[str]) -> None:
    reading, writing = os.pipe()
    logger, handler = aside(writing)
    logger.warning("%d", "no number")
    logger.warning("a file's name: \udc80")
    logger.warning("the next")
    handler.close()
    assert [json.loads(line)["note"] for line in os.read(reading, 4096).splitlines()] == ["the next"]
    assert capsys.readouterr().err.count("--- Logging error ---") == 2
    os.close(reading)
    os.close(writing)


class _SaysItsEnd:
    """Garbage that logs when it is collected, as a task does that nobody waited for."""

    def __init__(self, logger: logging.Logger) -> None:
        self.itself = self
        self.logger = logger

    def __del__(self) -> None:
        self.logger.warning("collected")


def test_what_logs_while_a_line_is_logged_holds_nobody_up() -> None:
    """Wherever in it the collector runs."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    logger, handler = aside(nowhere, kept=1)

    def log() -> None:
        for allocations in range(1, 60):
            gc.collect()
            _SaysItsEnd(logger)
            gc.set_threshold(allocations)
            logger.warning("said")
            gc.set_threshold(100_000)

    before = gc.get_threshold()
    logging_thread = threading.Thread(target=log, daemon=True)
    gc.freeze()  # or each collection would walk through all that the tests have imported
    try:
        gc.set_threshold(100_000)
        logging_thread.start()
        logging_thread.join(20)
    finally:
        gc.set_threshold(*before)
        gc.unfreeze()
    assert not logging_thread.is_alive()
    handler.close()
    os.close(nowhere)


def test_log_lines_are_json() -> None:
    try:
        raise ValueError("why")
    except ValueError:
        record = logging.LogRecord("a", logging.ERROR, "f", 1, "it %s", ("broke",), sys.exc_info())
    entry = json.loads(JsonLines().format(record))
    assert entry.pop("ts") > 0
    assert "ValueError: why" in entry.pop("traceback")
    assert entry == {"level": "error", "logger": "a", "note": "it broke"}
