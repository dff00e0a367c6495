"""How a job's trainer reaches the gateway that it runs beside."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from trainer.sampler import Gateway


class Models(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        body = b'{"data": [{"id": "m"}]}'
        self.send_response(200)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def url() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Models) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


@pytest.mark.parametrize("name", ["HTTP_PROXY", "http_proxy", "ALL_PROXY"])
def test_no_proxy_stands_between(url: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It would be given the key, and look for the gateway on its own machine."""
    monkeypatch.setenv(name, "http://127.0.0.1:9")
    gateway = Gateway(url, 20, lambda _: None)
    try:
        assert gateway.base_model() == "m"
    finally:
        gateway.close()
