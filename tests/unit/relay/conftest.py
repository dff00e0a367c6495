from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import uvloop
from relay_harness import Relay


def pytest_asyncio_loop_factories(config: Any, item: Any) -> Mapping[str, Callable[[], Any]]:
    """The loop that relays run on."""
    return {"uvloop": uvloop.new_event_loop}


@pytest.fixture
async def relay(tmp_path: Path) -> AsyncIterator[Relay]:
    """A relay in this process, without snapshot and upstreams."""
    relay = Relay(tmp_path)
    await relay.start()
    yield relay
    await relay.close()
