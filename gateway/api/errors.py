"""Every error as OpenAI's object, whatever raised it."""

from __future__ import annotations

import asyncio
import contextlib
import logging

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from gateway.errors import GatewayError, InternalError, InvalidRequest, MethodNotAllowed, NotFound

_log = logging.getLogger(__name__)
_LINGER_S = 30.0


class ErrorResponse(Response):
    """An error, sent at once; what is left of an unread request body is read and dropped afterwards.

    Closing with unread bytes would cut the connection before the client has seen the answer.
    """

    media_type = "application/json"

    def __init__(self, error: GatewayError, unread_body: bool) -> None:
        headers = {name.decode(): value.decode() for name, value in error.headers()}
        super().__init__(error.body(), error.status, headers)
        self._unread_body = unread_body

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        await send({"type": "http.response.body", "body": self.body, "more_body": self._unread_body})
        if self._unread_body:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_LINGER_S):
                    while (await receive()).get("more_body"):
                        pass
            await send({"type": "http.response.body", "body": b""})


def install(app: FastAPI) -> None:
    """Make `app` answer errors in one shape."""
    app.add_exception_handler(GatewayError, _gateway_error)
    app.add_exception_handler(RequestValidationError, _validation_error)
    app.add_exception_handler(HTTPException, _http_error)
    # The one catch-all of this process: a defect of ours becomes a 500, and uvicorn logs its traceback.
    app.add_exception_handler(Exception, _defect)


def _answer(request: Request, error: GatewayError) -> Response:
    return ErrorResponse(error, getattr(request.state, "unread_body", False))


async def _gateway_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, GatewayError)
    return _answer(request, error)


async def _validation_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    fault = error.errors()[0]
    param = ".".join(str(part) for part in fault["loc"][1:]) or None
    what = f"{param}: {fault['msg']}" if param else str(fault["msg"])
    return _answer(request, InvalidRequest(f"The request is not valid. {what}", param=param))


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    asked = f"{request.method} {request.url.path}"
    if error.status_code == 404:
        return _answer(request, NotFound(f"No route {asked}. The OpenAI routes start with /v1"))
    if error.status_code == 405:
        response = _answer(request, MethodNotAllowed(f"{asked}: this route has other methods"))
        response.headers.update(error.headers or {})
        return response
    return _answer(request, InvalidRequest(f"{asked}: {error.detail}"))


async def _defect(request: Request, error: Exception) -> Response:
    return _answer(request, InternalError("The gateway has a defect; its log says more, by this request's id"))
