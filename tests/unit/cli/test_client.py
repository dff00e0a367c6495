"""The command line's client: whatever is wrong with --url is said in one line, and any key can be sent."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import ClassVar

import click
import pytest

from gateway.cli.client import GatewayClient


class _Page(BaseHTTPRequestHandler):
    seen: ClassVar[list[bytes]] = []

    def do_GET(self) -> None:
        self.seen[:] = [self.headers["authorization"].encode("latin-1")]
        self.send_response(200)
        self.send_header("content-length", "6")
        self.end_headers()
        self.wfile.write(b"<html>")

    def log_message(self, *_: object) -> None:
        """Nothing to the test's output."""


@pytest.fixture
def other_server() -> Iterator[str]:
    with HTTPServer(("127.0.0.1", 0), _Page) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def test_a_server_that_is_no_gateway(other_server: str) -> None:
    with pytest.raises(click.ClickException, match="answered no JSON: --url names no gateway"):
        GatewayClient(other_server, "key").call("GET", "/v1/adapters")


@pytest.mark.parametrize("url", ["http://[::1", "localhost"])
def test_what_is_no_url(url: str) -> None:
    with pytest.raises(click.ClickException, match=f"no answer from {re.escape(url)}"):
        GatewayClient(url, None).call("GET", "/v1/adapters")


def test_a_key_that_is_not_ascii_is_sent_as_it_is(other_server: str) -> None:
    with pytest.raises(click.ClickException, match="answered no JSON"):
        GatewayClient(other_server, "kéy").call("GET", "/v1/adapters")
    assert _Page.seen == ["Bearer kéy".encode()]
