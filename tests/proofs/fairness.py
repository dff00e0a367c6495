"""`python -m tests.proofs.fairness`: what one key's flood costs another key, with the queue here and with the engine's.

An emulated engine runs 2 requests at a time. A small key asks one thing after the other: alone; beside another key's
flood that waits in the engine (first come, first served); and beside the same flood while it waits in the gateway.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import tempfile
import time
from pathlib import Path

import httpx2

from tests.support.engines import checkpoint
from tests.support.gateway import Gateway, gateway

BATCH = 2
_SCRIPT = '{"ttft_ms": 40, "answer_tokens": 4}'


async def ask(client: httpx2.AsyncClient, model: str) -> tuple[float, int]:
    """Milliseconds of one short answer, and its status."""
    started_s = time.monotonic()
    body = {"model": model, "messages": [{"role": "user", "content": "hello"}], "max_tokens": 4}
    answer = await client.post("/v1/chat/completions", json=body)
    return (time.monotonic() - started_s) * 1e3, answer.status_code


async def times(running: Gateway, requests: int, flood: int) -> tuple[list[float], int]:
    """Of the small key's answers, sorted; and how many the flood got in the meantime."""

    def client(key: str) -> httpx2.AsyncClient:
        headers = {"authorization": f"Bearer {key}"}
        return httpx2.AsyncClient(base_url=running.url, headers=headers, timeout=60, trust_env=False)

    answered = 0

    async def flooding() -> None:
        nonlocal answered
        async with client("flood") as own:
            while True:
                _, status = await ask(own, running.model)
                answered += status == 200

    floods = [asyncio.create_task(flooding()) for _ in range(flood)]
    async with client("small") as own:
        await asyncio.sleep(1.0 if flood else 0.0)
        before, took = answered, []
        for _ in range(requests):
            duration_ms, status = await ask(own, running.model)
            assert status == 200, status
            took.append(duration_ms)
    for each in floods:
        each.cancel()
    await asyncio.gather(*floods, return_exceptions=True)
    return sorted(took), answered - before


def main() -> None:
    """Print a line a setting."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=40)
    parser.add_argument("--flood", type=int, default=32, help="requests that the other key keeps in flight")
    args = parser.parse_args()
    with contextlib.ExitStack() as stack:
        base = checkpoint(Path(stack.enter_context(tempfile.TemporaryDirectory())) / "base")
        flags = ["--engine-version", "emulator", "--device", "cuda", "--model", str(base), "--adapter-slots", "0"]
        flags += ["--engine-arg=--max-num-seqs", f"--engine-arg={BATCH}", "--relays", "2", "--api-key", "small"]
        for title, flood, more in (
            ("alone", 0, []),
            ("flood, queued by the engine", args.flood, []),
            ("flood, queued by the gateway", args.flood, ["--max-in-flight", str(BATCH)]),
        ):
            with gateway(*flags, *more, api_key="flood", env={"TUNEGATE_EMULATOR": _SCRIPT}) as running:
                took, others = asyncio.run(times(running, args.requests, flood))
            p50, p99 = took[len(took) // 2], took[min(len(took) - 1, len(took) * 99 // 100)]
            print(f"{title:30} p50 {p50:7.1f} ms   p99 {p99:7.1f} ms   the flood's answers {others}", flush=True)


if __name__ == "__main__":
    main()
