"""Which version of a gateway's adapter `gateway adapters merge NAME` takes."""

from __future__ import annotations

from typing import Any

import pytest

from gateway.cli.client import GatewayClient
from gateway.cli.merge import _answering

ALIASES = {"prod": None, "old": 1}


class _Client(GatewayClient):
    """A gateway whose `tuned` points to v1 and is on its way to v2."""

    def __init__(self) -> None:
        super().__init__("http://gateway", None)

    def call(self, method: str, path: str, **kwargs: Any) -> Any:
        version = 1 if path.rpartition("/")[2] in ("tuned@v1", "old") else 2
        return {"name": "tuned", "version": version, "current_version": 1, "aliases": ALIASES}


@pytest.mark.parametrize(
    ("reference", "version"), [("tuned", 1), ("prod", 1), ("old", 1), ("tuned@v1", 1), ("tuned@v2", 2)]
)
def test_a_name_is_what_it_answers_with(reference: str, version: int) -> None:
    assert _answering(_Client(), reference)["version"] == version
