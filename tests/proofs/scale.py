"""What ten thousand registered adapters cost, against ten: `python -m tests.proofs.scale`.

For each size, over an emulated engine: time to ready, /v1/models and /v1/adapters, memory of control and relay, bytes
that a load sends to a relay, and the relay's CPU time a request to an adapter that is loaded. The last two may not
grow.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import httpx2
import msgspec

from gateway.snapshot import Applied, Delta, Snapshot, ToRelay
from tests.support import engines
from tests.support.gateway import Gateway, gateway
from tests.support.registered import fill

_PLACES = 16


@dataclass(frozen=True)
class Figures:
    """Of one registry size."""

    adapters: int
    ready_s: float
    models_first_ms: float
    models_ms: float
    models_kb: float
    adapters_ms: float
    control_mb: float
    relay_mb: float
    picture_kb: float
    change_bytes: float
    load_ms: float
    cpu_us: float


def measure(count: int) -> Figures:
    """Start a gateway with so many adapters registered, and look."""
    with tempfile.TemporaryDirectory() as folder:
        state = Path(folder) / "state"
        names = fill(state, count)
        base = engines.checkpoint(Path(folder) / "base")
        flags = (
            "--model",
            str(base),
            "--engine-version",
            "emulator",
            "--device",
            "cpu",
            "--max-adapters",
            str(_PLACES),
        )
        started = time.monotonic()
        with gateway(*flags, state=state, ready_timeout_s=120) as served:
            ready_s = time.monotonic() - started
            with served.client() as client:
                for name in names[:_PLACES]:
                    assert engines.chat(served, name).status_code == 200, name
                models = [timed(client, "/v1/models") for _ in range(10)]
                adapters_ms, _ = timed(client, "/v1/adapters")
            loads = [load_ms(served, name) for name in names[_PLACES : _PLACES + 20]]
            relay, control = served.children("gateway.relay")[0], served.children("gateway.control")[0]
            picture, changes = asyncio.run(watch(served, names[-20:] if count > _PLACES else []))
            return Figures(
                adapters=count,
                ready_s=ready_s,
                models_first_ms=models[0][0],
                models_ms=statistics.median(ms for ms, _ in models[1:]),
                models_kb=models[0][1] / 1e3,
                adapters_ms=adapters_ms,
                control_mb=rss_mb(control),
                relay_mb=rss_mb(relay),
                picture_kb=picture / 1e3,
                change_bytes=statistics.median(changes) if changes else 0,
                load_ms=statistics.median(loads) if loads else 0,
                cpu_us=0.0,
            )


def timed(client: httpx2.Client, path: str) -> tuple[float, int]:
    """Milliseconds and bytes of a GET."""
    started = time.monotonic()
    body = client.get(path).raise_for_status().content
    return (time.monotonic() - started) * 1e3, len(body)


def load_ms(served: Gateway, name: str) -> float:
    """A request whose adapter is loaded first."""
    started = time.monotonic()
    assert engines.chat(served, name, max_tokens=1).status_code == 200
    return (time.monotonic() - started) * 1e3


async def watch(served: Gateway, names: list[str]) -> tuple[int, list[int]]:
    """Bytes of the whole picture, and of what each load then sends to a relay: this is one more relay to control."""
    path = served.state / "run" / "snapshots.sock"
    reader, writer = await asyncio.open_unix_connection(path, limit=1 << 28)
    lines: list[int] = []

    async def follow() -> None:
        while line := await reader.readline():
            lines.append(len(line))
            said: Snapshot | Delta = msgspec.json.decode(line, type=ToRelay)
            writer.write(msgspec.json.encode(Applied(99, said.version)) + b"\n")

    following = asyncio.create_task(follow())
    sizes = []
    while not lines:
        await asyncio.sleep(0.01)
    for name in names:
        before = sum(lines)
        await asyncio.to_thread(load_ms, served, name)
        sizes.append(sum(lines) - before)
    following.cancel()
    writer.close()
    return lines[0], sizes


def cost(count: int) -> float:
    """Microseconds of a relay's CPU time a request to a loaded adapter, with so many registered."""
    words = ["-m", "tests.support.relay_cost", "--only", "json, adapter", "--adapters", str(count)]
    said = subprocess.run([sys.executable, *words], check=True, capture_output=True, text=True).stdout
    return float(said.splitlines()[-1].removeprefix("json, adapter").split()[1])


def rss_mb(pid: int) -> float:
    """Resident memory of a process."""
    line = next(line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("VmRSS"))
    return int(line.split()[1]) / 1e3


def main() -> None:
    """Print one line a size."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[10, 10_000])
    args = parser.parse_args()
    for count in args.sizes:
        seen = dataclasses.replace(measure(count), cpu_us=cost(count))  # one after the other: each wants the machine
        print(
            f"{seen.adapters} adapters: ready in {seen.ready_s:.1f} s; /v1/models {seen.models_first_ms:.0f} ms first, "
            f"{seen.models_ms:.1f} ms then ({seen.models_kb:.0f} KB); /v1/adapters {seen.adapters_ms:.0f} ms; control "
            f"{seen.control_mb:.0f} MB, relay {seen.relay_mb:.0f} MB; picture {seen.picture_kb:.0f} KB, a load sends "
            f"{seen.change_bytes:.0f} bytes and takes {seen.load_ms:.0f} ms; relay CPU {seen.cpu_us:.1f} us a request",
            flush=True,
        )


if __name__ == "__main__":
    main()
