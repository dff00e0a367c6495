"""What goes wrong in a soak, and how everything is made right again before a look at what is left."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import signal
import time
from collections import Counter
from collections.abc import Callable

import httpx2

from tests.support.engines import script, state_of
from tests.support.gateway import Gateway

REPLICAS = ("r0", "r1")
_SCRIPTED = (
    {"kind": "status", "status": 500, "times": 3},
    {"kind": "status", "status": 503, "times": 3},
    {"kind": "delay", "delay_ms": 400, "times": 5},
    {"kind": "hang", "times": 2},
    {"kind": "reset", "times": 3},
    {"kind": "close", "times": 3},
    {"kind": "garbage", "times": 2},
    {"kind": "stream_delay", "delay_ms": 400, "after_chunks": 3, "times": 3},
    {"kind": "stream_hang", "after_chunks": 2, "times": 2},
    {"kind": "stream_reset", "after_chunks": 5, "times": 3},
    {"kind": "stream_close", "after_chunks": 4, "times": 3},
    {"kind": "stream_truncate", "after_chunks": 6, "times": 3},
    {"kind": "stream_error", "after_chunks": 3, "times": 3},
    {"kind": "stream_die", "after_chunks": 3},
    {"kind": "die"},
    {"kind": "status", "status": 500, "on": "health", "times": 2},
    {"kind": "hang", "on": "health", "times": 1},
)
PACE = {"ttft_ms": 5, "inter_token_ms": 10}
_STOPPED_S = 3.0  # how long a stopped engine stands still


class Mischief:
    """Breaks one gateway's engines, relays and control, at random and one thing at a time."""

    def __init__(self, gateway: Gateway, rng: random.Random, relay_killed: Callable[[], None]) -> None:
        """relay_killed: told before a relay is, since its connections will break."""
        self._gateway = gateway
        self._rng = rng
        self._relay_killed = relay_killed
        self.done: Counter[str] = Counter()
        self._stopped: set[int] = set()

    async def one(self) -> None:
        """One thing goes wrong."""
        choice = self._rng.random()
        replica = self._rng.choice(REPLICAS)
        if choice < 0.70:
            fault = self._rng.choice(_SCRIPTED)
            kind = str(fault["kind"]) + (f" {fault['status']}" if "status" in fault else "")
            await self._script(replica, kind + (" of health" if fault.get("on") else ""), faults=[fault])
        elif choice < 0.80:
            self._kill(replica, "engine killed", signal.SIGKILL)
        elif choice < 0.90:
            await self._stop_a_while(replica)
        elif choice < 0.95:
            relays = self._gateway.children("gateway.relay")
            if relays:
                self._relay_killed()
                self.done["relay killed"] += 1
                with contextlib.suppress(ProcessLookupError):
                    os.kill(max(relays), signal.SIGKILL)  # the other one is never killed: its memory is watched
        else:
            for control in self._gateway.children("gateway.control"):
                self.done["control killed"] += 1
                os.kill(control, signal.SIGKILL)

    async def heal(self) -> None:
        """Nothing goes wrong any more: engines run, and answer as they should."""
        for pid in self._stopped:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)
        self._stopped.clear()
        deadline_s = time.monotonic() + 60
        for replica in REPLICAS:
            while not await self._script(replica, ""):
                if time.monotonic() > deadline_s:
                    raise TimeoutError(f"{replica} did not come back within 60 s")
                await asyncio.sleep(0.5)

    async def _script(self, replica: str, kind: str, **fields: object) -> bool:
        try:
            await asyncio.to_thread(script, self._gateway, replica, **PACE, **fields)
        except (httpx2.HTTPError, OSError, json.JSONDecodeError):
            return False  # it is down just now
        if kind:
            self.done[kind] += 1
        return True

    def _kill(self, replica: str, kind: str, number: signal.Signals) -> int | None:
        with contextlib.suppress(OSError, json.JSONDecodeError):
            pid = int(state_of(self._gateway, replica)["engine_pid"])
            os.kill(pid, number)
            self.done[kind] += 1
            return pid
        return None

    async def _stop_a_while(self, replica: str) -> None:
        pid = self._kill(replica, "engine stopped", signal.SIGSTOP)
        if pid is not None:
            self._stopped.add(pid)
            await asyncio.sleep(_STOPPED_S)
            self._stopped.discard(pid)
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)
