"""A test's own server, of which nothing is left open when the test ends, however early that is.

`asyncio.start_server` leaks a connection that comes while it is closed (CPython 3.11), and a coroutine that is
cancelled before its first step never comes to its `finally`; both fail some later test, by a ResourceWarning.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Awaitable, Callable

Serve = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


class Connections:
    """Accepts at `listener` in the running loop; `serve` answers one connection, which is closed when it returns."""

    def __init__(self, listener: socket.socket, serve: Serve) -> None:
        listener.setblocking(False)
        self._listener = listener
        self._serve = serve
        self._loop = asyncio.get_running_loop()
        self._accepted: dict[asyncio.Task[None], socket.socket] = {}  # no stream made of it yet
        self._writers: dict[asyncio.Task[None], asyncio.StreamWriter] = {}
        self._loop.add_reader(listener, self._accept)

    def abort(self) -> None:
        """Stop listening and break every connection; the task that calls this goes on, without its peer."""
        if self._listener.fileno() >= 0:
            self._loop.remove_reader(self._listener)
            self._listener.close()
        for writer in self._writers.values():
            writer.transport.abort()
        for task in (*self._accepted, *self._writers):
            if task is not asyncio.current_task():
                task.cancel()

    async def closed(self) -> None:
        """Return once all are closed, which aborting only begins."""
        while tasks := (*self._accepted, *self._writers):
            await asyncio.wait(tasks)
        await asyncio.sleep(0)  # transports close in the loop's next step

    def _accept(self) -> None:
        with contextlib.suppress(BlockingIOError, ConnectionAbortedError):
            connection, _ = self._listener.accept()
            task = asyncio.create_task(self._answer(connection))
            self._accepted[task] = connection
            task.add_done_callback(self._end)

    async def _answer(self, connection: socket.socket) -> None:
        reader, writer = await asyncio.open_connection(sock=connection)
        task = asyncio.current_task()
        assert task is not None
        del self._accepted[task]
        self._writers[task] = writer
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
            await self._serve(reader, writer)

    def _end(self, task: asyncio.Task[None]) -> None:
        if task in self._accepted:
            self._accepted.pop(task).close()
        else:
            self._writers.pop(task).close()
        if not task.cancelled():
            task.result()
