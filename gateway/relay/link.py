"""The relay's end of the snapshots socket: takes each snapshot, says that it was applied, comes back when cut off."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

import msgspec

from gateway.snapshot import Applied, Snapshot

_SNAPSHOT_LIMIT_BYTES = 256_000_000
_BACKOFF_S = (0.05, 0.1, 0.2, 0.5, 1.0)  # the last one repeats


async def follow(socket: Path, relay: int, apply: Callable[[Snapshot], None], note: Callable[[str], None]) -> None:
    """Apply what control sends, for ever. While control is away the last snapshot stands.

    note: takes a line for the operator.
    """
    decode = msgspec.json.Decoder(Snapshot).decode
    failures = 0
    while True:
        try:
            reader, writer = await asyncio.open_unix_connection(socket, limit=_SNAPSHOT_LIMIT_BYTES)
        except OSError:
            await asyncio.sleep(_BACKOFF_S[min(failures, len(_BACKOFF_S) - 1)])
            failures += 1
            continue
        failures = 0
        try:
            while (line := await reader.readline()).endswith(b"\n"):
                snapshot = decode(line)
                apply(snapshot)
                writer.write(msgspec.json.encode(Applied(relay, snapshot.version)) + b"\n")
                await writer.drain()
        except (OSError, msgspec.MsgspecError, ValueError) as error:
            note(f"the link to control broke: {error}")
        finally:
            writer.close()
        await asyncio.sleep(_BACKOFF_S[0])
