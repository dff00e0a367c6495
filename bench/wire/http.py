"""HTTP/1.1 as bytes: where a server is, what a request looks like."""

from __future__ import annotations

import socket
from typing import cast
from urllib.parse import urlsplit

import msgspec


class Endpoint(msgspec.Struct, frozen=True):
    """A server's address, resolved once so that no request of a run waits for a name server."""

    host: str
    port: int
    tls: bool
    base_path: str
    family: int
    address: tuple[str | int, ...]

    @property
    def url(self) -> str:
        """The address as a URL, without a trailing slash."""
        return f"{'https' if self.tls else 'http'}://{self.host}:{self.port}{self.base_path}"


def resolve(url: str) -> Endpoint:
    """Look a server's URL up. A trailing /v1 is dropped, since paths carry it. Raises ValueError, OSError."""
    parts = urlsplit(url if "://" in url else f"http://{url}")
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError(f"not a server address: {url!r}; give http://HOST:PORT or https://HOST[:PORT]")
    tls = parts.scheme == "https"
    port = parts.port or (443 if tls else 80)
    family, _, _, _, address = socket.getaddrinfo(parts.hostname, port, type=socket.SOCK_STREAM)[0]
    return Endpoint(
        host=parts.hostname,
        port=port,
        tls=tls,
        base_path=parts.path.rstrip("/").removesuffix("/v1"),
        family=int(family),
        address=cast("tuple[str | int, ...]", address),
    )


def render_post(endpoint: Endpoint, path: str, body: bytes, headers: dict[str, str]) -> bytes:
    """The bytes of one POST of a JSON body."""
    lines = [
        f"POST {endpoint.base_path}{path} HTTP/1.1",
        f"host: {endpoint.host}:{endpoint.port}",
        "accept: text/event-stream, application/json",
        "content-type: application/json",
        f"content-length: {len(body)}",
        *(f"{name}: {value}" for name, value in headers.items()),
    ]
    return ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1") + body
