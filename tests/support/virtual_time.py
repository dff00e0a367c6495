"""An event loop whose clock jumps to the next timer: hours pass in milliseconds, and the same way every time."""

from __future__ import annotations

import asyncio
import selectors
from typing import Any


class _Selector(selectors.SelectSelector):
    def __init__(self) -> None:
        super().__init__()
        self.now_s = 1000.0

    def select(self, timeout: float | None = None) -> Any:
        found = super().select(0)
        if not found:
            assert timeout is not None, "every task waits for something that cannot come"
            self.now_s += timeout
        return found


class VirtualLoop(asyncio.SelectorEventLoop):
    """Nothing in it may wait for the real world: threads, sockets, processes."""

    def __init__(self) -> None:
        self._clock = _Selector()
        super().__init__(self._clock)

    def time(self) -> float:
        return self._clock.now_s
