"""A limit for request bodies that are read whole. Uploads (multipart) go to disk as they come, by their own limit."""

from __future__ import annotations

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gateway.api.errors import ErrorResponse
from gateway.errors import PayloadTooLarge

MAX_BYTES = 2_000_000


class LimitedBodies:
    """Reads a body before the routes do, up to `MAX_BYTES`, and answers 413 above."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = Headers(scope=scope) if scope["type"] == "http" else Headers()
        if scope["type"] != "http" or headers.get("content-type", "").lower().startswith("multipart/"):
            await self._app(scope, receive, send)
            return
        messages: list[Message] = []
        size_bytes, more = 0, True
        while more:
            message = await receive()
            messages.append(message)
            size_bytes += len(message.get("body", b""))
            more = message.get("more_body", False)
            if size_bytes > MAX_BYTES:
                error = PayloadTooLarge(
                    f"the body is over {MAX_BYTES} bytes, the most that this route reads; files go to POST /v1/files "
                    "and adapters to POST /v1/adapters, as multipart/form-data"
                )
                await ErrorResponse(error, more)(scope, receive, send)
                return
        left = iter(messages)

        async def replay() -> Message:
            return next(left, None) or await receive()

        await self._app(scope, replay, send)
