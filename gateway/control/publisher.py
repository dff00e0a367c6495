"""Control's end of `<run>/snapshots.sock`: the whole picture to a relay that connects, then only what changes."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from collections import deque
from collections.abc import Callable
from pathlib import Path

import msgspec

from gateway.snapshot import Applied, Delta, FromRelay, NotLoaded, Snapshot, Wanted

_log = logging.getLogger(__name__)
_SEND_LIMIT_S = 10.0  # for a relay to take what is sent; then its connection is dropped, and it comes back
_KEPT_CHANGES = 512  # a relay that is further behind gets the whole picture again
_KEPT_BYTES = 4_000_000  # of changes
_LINE_LIMIT_BYTES = 1_000_000  # of what a relay says
_ASKED_AHEAD = 10_000  # answers kept for one relay that does not read
_encode = msgspec.json.Encoder().encode
_decode = msgspec.json.Decoder(FromRelay).decode


class _Link:
    """One relay's connection."""

    def __init__(self) -> None:
        self.relay: int | None = None  # which it is, once it has said so
        self.applied = 0  # the version it routes by
        self.answers: deque[bytes] = deque(maxlen=_ASKED_AHEAD)  # for it alone, not sent yet


class Publisher:
    """Serves the newest picture to every relay that connects; relays keep what they have when it is away."""

    def __init__(self, socket_path: Path, wanted: Callable[[Wanted], NotLoaded | None] = lambda _: None) -> None:
        """wanted: called when a relay asks for an adapter; what it returns is the answer, None: it will come."""
        self._path = socket_path
        self._wanted = wanted
        self._current: Snapshot | None = None
        self._changes: deque[tuple[int, bytes]] = deque()  # version and line of each, oldest first, without gaps
        self._changes_bytes = 0
        self._since = 0  # the version that the oldest of them follows
        self._whole: tuple[int, bytes] = (0, b"")  # the last whole picture that was sent, encoded
        self._links: dict[asyncio.Task[None], _Link] = {}
        self._news = asyncio.Condition()
        self._server: asyncio.Server | None = None

    def __repr__(self) -> str:
        relays = ", ".join(f"{link.relay}@{link.applied}" for link in self._links.values() if link.relay is not None)
        return f"<Publisher v{self._current.version if self._current else 0}: {relays or 'no relay'}>"

    @property
    def current(self) -> Snapshot | None:
        """The newest picture. Its models are the living ones: later changes show in them."""
        return self._current

    async def start(self) -> None:
        """Listen; the socket is for this user alone."""
        self._path.unlink(missing_ok=True)
        mask = os.umask(0o177)
        try:
            self._server = await asyncio.start_unix_server(self._serve, self._path, limit=_LINE_LIMIT_BYTES)
        finally:
            os.umask(mask)

    async def stop(self) -> None:
        """Stop listening and let the relays go."""
        if self._server is not None:
            self._server.close()
        for connection in self._links:
            connection.cancel()
        await asyncio.gather(*self._links, return_exceptions=True)
        self._path.unlink(missing_ok=True)

    async def publish(self, new: Snapshot) -> None:
        """Make `new` the current picture; it is sent whole."""
        self._current, self._since = new, new.version
        self._changes.clear()
        self._changes_bytes = 0
        await self._tell()

    async def change(self, delta: Delta) -> None:
        """Change the current picture; only this is sent. There must be a picture."""
        current = self._current
        assert current is not None, "a change needs something to change"
        models = current.models
        for name in delta.removed:
            models.pop(name, None)
        models.update(delta.changed)
        self._current = msgspec.structs.replace(delta.rest or current, version=delta.version, models=models)
        line = _encode(delta) + b"\n"
        self._changes.append((delta.version, line))
        self._changes_bytes += len(line)
        while len(self._changes) > _KEPT_CHANGES or self._changes_bytes > _KEPT_BYTES:
            self._since, dropped = self._changes.popleft()
            self._changes_bytes -= len(dropped)
        await self._tell()

    async def answer(self, answer: NotLoaded) -> None:
        """Tell all relays that waiting for a name is of no use."""
        line = _encode(answer) + b"\n"
        for link in self._links.values():
            link.answers.append(line)
        await self._tell()

    async def wait_applied(self, version: int, timeout_s: float) -> bool:
        """Until every connected relay routes by that version or a newer one; False when the time is over."""
        try:
            async with asyncio.timeout(timeout_s), self._news:
                await self._news.wait_for(lambda: all(link.applied >= version for link in self._links.values()))
                return True
        except TimeoutError:
            _log.warning("relays did not take snapshot %s within %s s: %r", version, timeout_s, self)
            return False

    async def _tell(self) -> None:
        async with self._news:
            self._news.notify_all()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        link = self._links[task] = _Link()
        sending = asyncio.create_task(self._send(link, writer))
        try:
            while line := await reader.readline():
                await self._heard(link, _decode(line))
        except (ConnectionError, ValueError) as error:
            _log.warning("a relay's connection to control broke: %s", error)
        finally:
            sending.cancel()
            await asyncio.gather(sending, return_exceptions=True)
            del self._links[task]
            writer.close()
            await self._tell()

    async def _heard(self, link: _Link, said: FromRelay) -> None:
        link.relay = said.relay
        if isinstance(said, Applied):
            link.applied = said.version
        else:
            answer = self._wanted(said)
            if answer is None:
                return
            link.answers.append(_encode(answer) + b"\n")
        await self._tell()

    async def _send(self, link: _Link, writer: asyncio.StreamWriter) -> None:
        """Send what is new; whole pictures that are outdated before the relay reads them are skipped."""
        sent = 0
        with contextlib.suppress(ConnectionError, TimeoutError):
            while True:
                async with self._news:
                    while not link.answers and self._version <= sent:
                        await self._news.wait()
                lines, sent = self._lines(sent), self._version
                lines += list(link.answers)
                link.answers.clear()
                writer.writelines(lines)
                async with asyncio.timeout(_SEND_LIMIT_S):
                    await writer.drain()
        writer.transport.abort()  # closing would wait until it reads, and everybody with it who waits for all relays

    @property
    def _version(self) -> int:
        return self._current.version if self._current is not None else 0

    def _lines(self, sent: int) -> list[bytes]:
        """What brings a relay from a version (0: it has none) to the current one."""
        if sent and sent >= self._since:
            return [line for version, line in self._changes if version > sent]
        if self._current is not None and self._whole[0] != self._current.version:
            self._whole = self._current.version, _encode(self._current) + b"\n"
        return [self._whole[1]]
