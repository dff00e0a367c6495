"""The relay's end of the snapshots socket: takes what control sends, says that it was applied, asks for adapters, and
comes back when cut off."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

import msgspec

from gateway.snapshot import Applied, Delta, NotLoaded, Snapshot, ToRelay, Wanted

_SNAPSHOT_LIMIT_BYTES = 256_000_000
_UNSENT_LIMIT_BYTES = 1_000_000  # of questions to a control that does not read; they are asked again anyway
_BACKOFF_S = (0.05, 0.1, 0.2, 0.5, 1.0)  # the last one repeats


class Link:
    """One relay's line to control."""

    def __init__(self, socket: Path, relay: int, note: Callable[[str], None]) -> None:
        """note: takes a line for the operator."""
        self._socket = socket
        self._relay = relay
        self._note = note
        self._decode = msgspec.json.Decoder(ToRelay).decode
        self._writer: asyncio.StreamWriter | None = None

    def ask(self, name: str) -> None:
        """Say that requests wait for a name to be loaded. Lost while control is away: say it again."""
        if self._writer is not None and self._writer.transport.get_write_buffer_size() < _UNSENT_LIMIT_BYTES:
            self._writer.write(msgspec.json.encode(Wanted(self._relay, name)) + b"\n")

    async def follow(
        self,
        apply: Callable[[Snapshot | Delta], None],
        not_loaded: Callable[[NotLoaded], None] = lambda _: None,
    ) -> None:
        """Apply what control sends, for ever. While control is away the last picture stands."""
        failures = 0
        while True:
            try:
                reader, writer = await asyncio.open_unix_connection(self._socket, limit=_SNAPSHOT_LIMIT_BYTES)
            except OSError:
                await asyncio.sleep(_BACKOFF_S[min(failures, len(_BACKOFF_S) - 1)])
                failures += 1
                continue
            failures = 0
            self._writer = writer
            try:
                while (line := await reader.readline()).endswith(b"\n"):
                    said: ToRelay = self._decode(line)
                    if isinstance(said, NotLoaded):
                        not_loaded(said)
                        continue
                    apply(said)
                    writer.write(msgspec.json.encode(Applied(self._relay, said.version)) + b"\n")
                    await writer.drain()
            except (OSError, msgspec.MsgspecError, ValueError) as error:
                self._note(f"the link to control broke: {error}")
            finally:
                self._writer = None
                writer.close()
            await asyncio.sleep(_BACKOFF_S[0])
