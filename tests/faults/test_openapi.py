"""The gateway's OpenAPI document: what it lists, and that nothing made up from it ends in a server error."""

from __future__ import annotations

from pathlib import Path

from gateway.api.document import Application
from gateway.relay.app import ENDPOINTS
from tests.proofs.openapi import explore


def test_the_document_has_every_route_of_the_relay() -> None:
    paths = Application(title="x").openapi()["paths"]
    assert {path.decode() for path in ENDPOINTS} <= set(paths)
    assert {"/health", "/ready"} <= set(paths)


def test_no_request_made_from_the_document_ends_in_a_server_error(tmp_path: Path) -> None:
    status, text = explore("vllm", 2, "fuzzing", tmp_path)
    assert status == 0, text
