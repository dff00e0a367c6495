"""Asks each engine how busy it says it is, and puts it where the relays look (`--routing engine-load`)."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import httpx2

from backends import load
from gateway.control.replica import Replica
from gateway.observe.loads import Loads

_EVERY_S = 1.0
_TIMEOUT_S = 2.0


async def gauge(replicas: Sequence[Replica], loads: Loads) -> None:
    """Once a second, for ever. An engine that does not answer is not noted: what is old counts as nothing.

    replicas: as they are at each moment; the list may change.
    """
    while True:
        await asyncio.gather(*(_note(replica, loads) for replica in list(replicas) if replica.answers))
        await asyncio.sleep(_EVERY_S)


async def ask(replica: Replica) -> load.Load | None:
    """How busy a replica's engine says it is; None where it does not say."""
    client, backend = replica.client, replica.backend
    if client is None or backend is None:
        return None
    try:
        answer = await client.get(load.PATH, timeout=_TIMEOUT_S)
    except (httpx2.HTTPError, RuntimeError):  # its supervisor may close the client meanwhile
        return None
    return load.read(backend.name, answer.text) if answer.status_code == 200 else None


async def _note(replica: Replica, loads: Loads) -> None:
    if said := await ask(replica):
        loads.write(replica.index, said.waiting, said.kv_used)
