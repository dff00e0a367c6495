"""Plain blocking requests for what is not load: probing, tokenizing, metrics, loading adapters."""

from __future__ import annotations

import http.client
import ssl
from typing import Any

import msgspec

from bench.wire.http import Endpoint


class Answer(msgspec.Struct):
    """A whole answer."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def ok(self) -> bool:
        """Whether the status is 2xx."""
        return 200 <= self.status < 300

    def json(self) -> Any:
        """The decoded body, or None when it is not JSON."""
        try:
            return msgspec.json.decode(self.body)
        except msgspec.DecodeError:
            return None


def call(
    endpoint: Endpoint,
    method: str,
    path: str,
    headers: dict[str, str],
    body: bytes | None = None,
    timeout_s: float = 60.0,
) -> Answer:
    """One request on its own connection. Raises OSError when there is no HTTP answer."""
    connection = (
        http.client.HTTPSConnection(
            endpoint.host, endpoint.port, timeout=timeout_s, context=ssl.create_default_context()
        )
        if endpoint.tls
        else http.client.HTTPConnection(endpoint.host, endpoint.port, timeout=timeout_s)
    )
    sent = dict(headers) if body is None else {"content-type": "application/json"} | headers
    try:
        connection.request(method, endpoint.base_path + path, body, sent)
        response = connection.getresponse()
        received = {name.lower(): value for name, value in response.getheaders()}
        return Answer(response.status, received, response.read())
    except http.client.HTTPException as error:
        raise OSError(f"{endpoint.url}{path}: not an HTTP answer ({error!r})") from error
    finally:
        connection.close()
