"""Every error a client can meet. One leaf is one HTTP status and one OpenAI error type.

    GatewayError
    ├── InvalidRequest        400  invalid_request_error
    ├── Unauthenticated       401  invalid_request_error   (code invalid_api_key)
    ├── Forbidden             403  invalid_request_error   (code insufficient_permissions)
    ├── NotFound              404  invalid_request_error
    │   └── ModelNotFound     404  invalid_request_error   (code model_not_found)
    ├── MethodNotAllowed      405  invalid_request_error
    ├── Conflict              409  invalid_request_error   (never retried: x-should-retry false)
    ├── PayloadTooLarge       413  invalid_request_error
    ├── UnsupportedMedia      415  invalid_request_error
    ├── RateLimited           429  rate_limit_error        (code rate_limit_exceeded)
    │   └── QuotaExceeded     429  insufficient_quota      (never retried: x-should-retry false)
    ├── InternalError         500  server_error
    ├── EngineError           502  server_error            (an engine broke off or answered nonsense)
    ├── Unavailable           503  server_error            (nothing can take the request now)
    │   └── Overloaded        503  server_error            (code overloaded; with retry-after-ms)
    ├── EngineTimeout         504  server_error
    └── StorageFull           507  server_error

A message says what was given, what is allowed and what to do.
"""

from __future__ import annotations

import msgspec


class GatewayError(Exception):
    """Base of all errors shown to a client. Subclasses set `status` and `type`."""

    status = 500
    type = "server_error"
    code: str | None = None
    should_retry: bool | None = None  # sent as x-should-retry when not None
    retry_after_s: int | None = None  # sent as retry-after when not None
    retry_after_ms: int | None = None  # sent as retry-after-ms and, rounded up, as retry-after when not None

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        if code is not None:
            self.code = code

    def body(self) -> bytes:
        """The OpenAI error object, encoded: all four keys are required by the SDK."""
        return error_body(self.message, self.type, self.param, self.code)

    def headers(self) -> list[tuple[bytes, bytes]]:
        """Headers that go with the error, beside content-type and x-request-id."""
        headers = []
        if self.should_retry is not None:
            headers.append((b"x-should-retry", b"true" if self.should_retry else b"false"))
        if self.retry_after_ms is not None:
            headers.append((b"retry-after-ms", b"%d" % self.retry_after_ms))
            headers.append((b"retry-after", b"%d" % -(-self.retry_after_ms // 1000)))
        elif self.retry_after_s is not None:
            headers.append((b"retry-after", b"%d" % self.retry_after_s))
        return headers


class InvalidRequest(GatewayError):
    """The request is malformed or asks for what cannot be had."""

    status = 400
    type = "invalid_request_error"


class Unauthenticated(GatewayError):
    """No API key, or one we do not know."""

    status = 401
    type = "invalid_request_error"
    code = "invalid_api_key"


class Forbidden(GatewayError):
    """The key is known, and does not open this."""

    status = 403
    type = "invalid_request_error"
    code = "insufficient_permissions"


class NotFound(GatewayError):
    """No such route or object."""

    status = 404
    type = "invalid_request_error"


class ModelNotFound(NotFound):
    """The `model` of a request names neither the base nor an adapter."""

    code = "model_not_found"


class MethodNotAllowed(GatewayError):
    """The route exists, the method does not."""

    status = 405
    type = "invalid_request_error"


class Conflict(GatewayError):
    """The object's state forbids it. The SDK retries 409 unless told otherwise."""

    status = 409
    type = "invalid_request_error"
    should_retry = False


class PayloadTooLarge(GatewayError):
    """A body above the configured limit."""

    status = 413
    type = "invalid_request_error"


class UnsupportedMedia(GatewayError):
    """A body of a kind that the route does not read."""

    status = 415
    type = "invalid_request_error"


class RateLimited(GatewayError):
    """Over a limit of requests or tokens."""

    status = 429
    type = "rate_limit_error"
    code = "rate_limit_exceeded"


class QuotaExceeded(RateLimited):
    """The key's budget is spent: waiting a moment does not help. The SDK retries 429 unless told otherwise."""

    type = "insufficient_quota"
    code = "insufficient_quota"
    should_retry = False


class InternalError(GatewayError):
    """A defect of the gateway itself."""


class EngineError(GatewayError):
    """The engine closed the connection, or answered what is not HTTP or not JSON. It may have run."""

    status = 502
    should_retry = False


class Unavailable(GatewayError):
    """No replica can take the request now; nothing ran, so a retry is safe."""

    status = 503
    retry_after_s = 1


class Overloaded(Unavailable):
    """All replicas are busy, and waiting would take longer than the request can wait."""

    code = "overloaded"


class EngineTimeout(GatewayError):
    """The engine did not answer in time. It may have run."""

    status = 504
    should_retry = False


class StorageFull(GatewayError):
    """The disk is full; nothing was kept."""

    status = 507
    should_retry = False


class _ErrorObject(msgspec.Struct):
    message: str
    type: str
    param: str | None
    code: str | None


class _ErrorBody(msgspec.Struct):
    error: _ErrorObject


def error_body(message: str, type: str, param: str | None = None, code: str | None = None) -> bytes:
    """Encode OpenAI's error object: `{"error": {message, type, param, code}}`."""
    return msgspec.json.encode(_ErrorBody(_ErrorObject(message, type, param, code)))
