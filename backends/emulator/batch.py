"""Who runs and who waits: an engine's batch has places for requests, and slots for different adapters."""

from __future__ import annotations

import asyncio
from collections import Counter, deque

from backends.emulator.settings import Settings


class Batch:
    """First come, first served, but a request whose adapter finds no slot lets others pass, as in vLLM."""

    def __init__(self, settings: Settings) -> None:
        self._places = settings.max_running
        self._slots = settings.batch_adapters
        self.running = 0
        self.running_adapters: Counter[str] = Counter()
        self._queue: deque[tuple[str | None, asyncio.Future[None]]] = deque()

    @property
    def waiting(self) -> int:
        return len(self._queue)

    @property
    def waiting_adapters(self) -> Counter[str]:
        """Adapter -> requests that wait for it."""
        return Counter(adapter for adapter, _ in self._queue if adapter)

    async def enter(self, adapter: str | None) -> None:
        """Wait for a place. Cancelling it gives up the wait."""
        if self._fits(adapter):
            self._admit(adapter)
            return
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        entry = (adapter, turn)
        self._queue.append(entry)
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():
                self.leave(adapter)
            else:
                self._queue.remove(entry)
            raise

    def leave(self, adapter: str | None) -> None:
        """Give the place to who waits for it."""
        self.running -= 1
        if adapter:
            self.running_adapters[adapter] -= 1
            if not self.running_adapters[adapter]:
                del self.running_adapters[adapter]
        for entry in list(self._queue):
            if self._fits(entry[0]):
                self._queue.remove(entry)
                self._admit(entry[0])
                entry[1].set_result(None)

    def _fits(self, adapter: str | None) -> bool:
        if self.running >= self._places:
            return False
        slots_full = self._slots is not None and len(self.running_adapters) >= self._slots
        return not adapter or adapter in self.running_adapters or not slots_full

    def _admit(self, adapter: str | None) -> None:
        self.running += 1
        if adapter:
            self.running_adapters[adapter] += 1
