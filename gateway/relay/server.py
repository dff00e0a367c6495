"""Accepts clients on the listening socket that all relays share, and ends them in order."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl

from gateway.relay.client import ClientConnection, Handle

_HANDSHAKE_S = 10.0  # TLS
_SHUTDOWN_S = 2.0
_ON_THEIR_WAY_S = 0.25  # for requests that were sent on kept connections before their clients could know
_LAST_WRITES_S = 1.0  # for the answers given when the time to drain is over


class Server:
    """Accepts connections on an inherited socket; ends them in order."""

    def __init__(self, handle: Handle, loop: asyncio.AbstractEventLoop) -> None:
        self.handle = handle
        self.loop = loop
        self.connections: set[ClientConnection] = set()
        self.draining = False
        self._all_closed = asyncio.Event()
        self._listener: asyncio.Server | None = None

    async def start(self, listener: socket.socket, tls: ssl.SSLContext | None = None) -> None:
        """Accept from now on."""
        self._listener = await self.loop.create_server(
            lambda: ClientConnection(self),
            sock=listener,
            backlog=2048,
            ssl=tls,
            ssl_handshake_timeout=_HANDSHAKE_S if tls else None,
            ssl_shutdown_timeout=_SHUTDOWN_S if tls else None,
        )

    def tick(self) -> None:
        """A second has passed."""
        for connection in list(self.connections):
            connection.tick()

    def forget(self, connection: ClientConnection) -> None:
        """It is closed."""
        self.connections.discard(connection)
        if self.draining and not self.connections:
            self._all_closed.set()

    async def settle(self, settle_s: float) -> None:
        """Go on for so long, each answer with `connection: close`: whoever balances load sees that it is not ready.

        Where connections are kept, at least for as long as a request may be on its way.
        """
        self.draining = True
        for connection in list(self.connections):
            connection.end_after_answer()
        await asyncio.sleep(max(settle_s, _ON_THEIR_WAY_S) if self.connections else settle_s)

    async def drain(self, timeout_s: float) -> None:
        """Accept no more, let what is in flight finish for up to `timeout_s`, then end it."""
        assert self._listener is not None
        self.draining = True
        self._all_closed.clear()  # a moment without connections while it settled was not the end
        self._listener.close()
        for connection in list(self.connections):
            connection.drain()
        if not await self._closed_within(timeout_s):
            for connection in list(self.connections):
                connection.stop()
            await self._closed_within(_LAST_WRITES_S)

    async def _closed_within(self, timeout_s: float) -> bool:
        if self.connections:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._all_closed.wait(), timeout_s)
        return not self.connections
