"""How a run is asked to pause: SIGUSR1, SIGTERM, Ctrl-C, or a file named `pause` in its directory."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

SIGNALS = (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT)


class PauseRequest:
    """Asked between steps; a second Ctrl-C interrupts at once."""

    def __init__(self, directory: Path, common: PauseRequest | None = None) -> None:
        """common: a request to several runs, of which this is one."""
        self._file = directory / "pause"
        self._common = common
        self._reason = ""

    def ask(self) -> None:
        """Request a pause of the run in this directory, from any process."""
        self._file.touch()

    def clear(self) -> None:
        """Forget requests made before."""
        self._file.unlink(missing_ok=True)
        self._reason = ""

    def reason(self) -> str:
        """Why to pause; empty to go on."""
        own = self._reason or ("pause file" if self._file.exists() else "")
        return own or (self._common.reason() if self._common is not None else "")

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Inside, the signals set the request. Only the main thread of a process can take signals."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self._on_signal) for number in SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self._reason and number == signal.SIGINT:
            raise KeyboardInterrupt
        self._reason = signal.Signals(number).name
