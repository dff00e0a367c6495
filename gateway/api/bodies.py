"""What kinds of bodies routes take, and how large: said before any of it is read.

Every route takes JSON, which is read whole and so has a limit, but for two that take files. Those stream them to the
disk as they come, by limits of their own (uploads.py).
"""

from __future__ import annotations

from starlette.datastructures import Headers
from starlette.routing import Match
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gateway.api.errors import ErrorResponse
from gateway.errors import GatewayError, PayloadTooLarge, UnsupportedMedia

MAX_BYTES = 2_000_000
_UPLOADS = frozenset({"/v1/adapters", "/v1/files"})  # POST takes multipart/form-data
_ELSEWHERE = "files go to POST /v1/files and adapters to POST /v1/adapters, as multipart/form-data"


class LimitedBodies:
    """Reads a body before its route does, up to `MAX_BYTES`; answers 413 above, and 415 to multipart."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        kind = headers.get("content-type", "")
        multipart = kind.lower().lstrip().startswith("multipart/")
        if multipart and scope["method"] == "POST" and scope["path"] in _UPLOADS:
            await self._app(scope, receive, send)
            return
        error = _refusal(scope, headers, kind if multipart else None)
        messages: list[Message] = []
        size_bytes, more = 0, True
        while more and error is None:
            message = await receive()
            messages.append(message)
            size_bytes += len(message.get("body", b""))
            more = message.get("more_body", False)
            if size_bytes > MAX_BYTES:
                error = _too_large()
        if error is not None:
            await ErrorResponse(error, more)(scope, receive, send)
            return
        left = iter(messages)

        async def replay() -> Message:
            return next(left, None) or await receive()

        await self._app(scope, replay, send)


def _refusal(scope: Scope, headers: Headers, multipart: str | None) -> GatewayError | None:
    """What the head alone says against a body that is read whole. multipart: its content type where it is that."""
    declared = headers.get("content-length", "")
    if multipart is not None and (declared.strip("0") or "transfer-encoding" in headers) and _is_route(scope):
        return UnsupportedMedia(
            f"content-type is {multipart[:100]!r}; {scope['method']} {scope['path'][:100]} takes application/json; "
            f"{_ELSEWHERE}"
        )
    return _too_large() if declared.isdecimal() and int(declared[:20]) > MAX_BYTES else None


def _is_route(scope: Scope) -> bool:
    """Whether the path leads anywhere by this method; where it does not, that is what the client should hear."""
    return any(route.matches(scope)[0] is Match.FULL for route in scope["app"].routes)


def _too_large() -> PayloadTooLarge:
    return PayloadTooLarge(f"the body is over {MAX_BYTES} bytes, the most that this route reads; {_ELSEWHERE}")
