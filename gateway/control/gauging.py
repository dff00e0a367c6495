"""Asks each engine how busy it says it is, and puts it where the relays look (`--routing engine-load`)."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Sequence

import httpx2

from backends import load
from gateway.control.replica import Replica
from gateway.observe.loads import Loads

_EVERY_S = 1.0
_TIMEOUT_S = 2.0
_NO_SUCH_PAGE = (404, 405, 501)


async def gauge(replicas: Sequence[Replica], loads: Loads) -> None:
    """Once a second, for ever. An engine that does not answer is not noted: what is old counts as nothing.

    replicas: as they are at each moment; the list may change.
    """
    while True:
        await asyncio.gather(*(_note(replica, loads) for replica in list(replicas) if replica.answers))
        await asyncio.sleep(_EVERY_S)


class Silent(Exception):
    """An engine does not say how busy it is, though it may be; the message says how that showed."""


async def ask(replica: Replica) -> load.Load | None:
    """How busy a replica's engine says it is; None where it has no such page. Raises Silent."""
    client, backend = replica.client, replica.backend
    if client is None or backend is None:
        raise Silent("it is starting again")
    try:
        answer = await client.get(load.PATH, timeout=_TIMEOUT_S)
    except httpx2.TimeoutException as error:
        raise Silent(f"it did not answer {load.PATH} within {_TIMEOUT_S:g} s") from error
    except (httpx2.HTTPError, RuntimeError) as error:  # its supervisor may close the client meanwhile
        raise Silent(f"it did not answer {load.PATH}: {error}") from error
    if answer.status_code in _NO_SUCH_PAGE:
        return None
    if answer.status_code != 200:
        raise Silent(f"it answered {load.PATH} by {answer.status_code}")
    return load.read(backend.name, answer.text)


async def _note(replica: Replica, loads: Loads) -> None:
    with contextlib.suppress(Silent):
        if said := await ask(replica):
            loads.write(replica.index, said.waiting, said.kv_used)
