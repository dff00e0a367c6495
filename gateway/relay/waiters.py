"""Telling requests that wait how it goes on, so that a defect met by one of them ends that one only."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Protocol, TypeVarTuple

_Args = TypeVarTuple("_Args")


class Breakable(Protocol):
    """What may meet a defect of ours when it is told something."""

    def broke(self) -> None:
        """It has: it ends now."""


def tell(waiter: Breakable, call: Callable[[*_Args], None], *args: *_Args) -> None:
    """`call(*args)`, a method of `waiter`. Whoever calls has others to tell, or is in the middle of another request."""
    try:
        call(*args)
    except Exception as defect:  # noqa: BLE001 - as the loop does for what it calls itself: reported, and contained
        loop = asyncio.get_running_loop()
        loop.call_exception_handler({"message": "a request that waited met a defect", "exception": defect})
        loop.call_soon(waiter.broke)
