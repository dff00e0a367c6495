"""What engines say of themselves comes to where the relays look."""

from __future__ import annotations

import asyncio
import contextlib
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx2

from gateway.control.gauging import gauge
from gateway.observe.loads import Loads

PAGE = 'vllm:num_requests_waiting{engine="0"} 4\nvllm:kv_cache_usage_perc{engine="0"} 0.5\n'


def replica(index: int, answer: Any) -> Any:
    client = httpx2.AsyncClient(transport=httpx2.MockTransport(answer), base_url="http://engine")
    return SimpleNamespace(index=index, answers=True, client=client, backend=SimpleNamespace(name="vllm"))


def broken(request: httpx2.Request) -> httpx2.Response:
    raise httpx2.ConnectError("gone")


async def test_one_that_fails_does_not_keep_the_others_from_being_asked(tmp_path: Path) -> None:
    loads = Loads(tmp_path / "loads")
    replicas = [
        replica(0, broken),
        replica(1, lambda request: httpx2.Response(200, text=PAGE)),
        replica(2, lambda request: httpx2.Response(503)),
        SimpleNamespace(index=3, answers=True, client=None, backend=None),
    ]
    task = asyncio.create_task(gauge(replicas, loads))
    async with asyncio.timeout(20):
        while loads.of([1], time.monotonic()) != ([4], [0.5]):
            await asyncio.sleep(0.01)
    assert loads.of([0, 2, 3], time.monotonic()) == ([0, 0, 0], [0.0, 0.0, 0.0])
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task
