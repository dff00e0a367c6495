"""Three gateways, one an engine, under traffic while everything around them breaks at random.

    python -m tests.proofs.soak [--minutes 30] [--engines vllm sglang lmdeploy] [--clients 8] [--seed 1] [--out FILE]

Every minute the traffic pauses, what is broken is mended, and what is left is looked at: no slot may still be taken,
and memory, open files and counters of a process that was not restarted may not keep growing.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import platform
import random
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import httpx2

from tests.proofs.rivals.processes import rss_bytes
from tests.proofs.soak.faults import PACE, REPLICAS, Mischief
from tests.proofs.soak.traffic import PROMPTS, Client, Crowd, Expected, Tally
from tests.support.engines import adapter, checkpoint, script, upload
from tests.support.gateway import Gateway, gateway
from tests.support.wait import eventually

KEY = "sk-soak-0123456789abcdef"
_SEEDS = (11, 12)  # the contents that the adapter `churn` takes in turn
_ROUND_S = 60.0
_FAULT_EVERY_S = 4.0
_SETTLE_S = 30.0  # for the last requests, and for slots to be freed
_WARM_ROUNDS = 3  # whose memory is not yet the level
GROWTH_MB, GROWTH_FILES = 5.0, 10  # more than the level, at the end of a soak, is growth


@dataclass(frozen=True)
class Look:
    """What a process holds, at a quiet moment."""

    minute: float
    process: str  # "relay 0"
    pid: int
    rss_mb: float
    files: int
    series: int  # lines in its list of counters


@dataclass
class Soak:
    """One gateway's soak and what came of it."""

    engine: str
    folder: Path
    args: argparse.Namespace
    started_s: float = field(default_factory=time.monotonic)
    tally: Tally = field(default_factory=Tally)
    expected: Expected = field(default_factory=Expected)
    faults: Counter[str] = field(default_factory=Counter)
    looks: list[Look] = field(default_factory=list)
    lost_slots: list[str] = field(default_factory=list)
    churns: Counter[str] = field(default_factory=Counter)

    async def run(self) -> None:
        """Until the time is over."""
        base = checkpoint(self.folder / "base")
        flags = ["--backend", self.engine, "--engine-version", "emulator", "--device", "cuda", "--model", str(base)]
        # LMDeploy restarts an engine for each adapter, and the upload waits for that.
        timeout_s = "45" if self.engine == "lmdeploy" else "10"
        flags += ["--replicas", "2", "--relays", "2", "--request-timeout-s", timeout_s]
        with gateway(*flags, state=self.folder / "state", api_key=KEY, ready_timeout_s=120) as serving:
            await asyncio.to_thread(self._prepare, serving)
            port = int(serving.url.rpartition(":")[2])
            self.started_s = time.monotonic()
            deadline_s = self.started_s + self.args.minutes * 60
            number = 0
            while time.monotonic() < deadline_s:
                number += 1
                await self._round(serving, port, number, min(_ROUND_S, deadline_s - time.monotonic()))
            assert serving.stop() == 0, "the gateway did not stop in order"

    def _prepare(self, serving: Gateway) -> None:
        """Load the adapters, and have every question answered once while all is well."""
        eventually(lambda: all(replica["state"] == "ready" for replica in serving.replicas()), 60)
        for name, seed in [("kept", 7), *(("churn", seed) for seed in _SEEDS)]:
            upload(serving, name, adapter(self.folder / f"{name}-{seed}", seed))
            self._learn(serving, name, f"{name}-{seed}" if name == "churn" else name)
        self._learn(serving, "base", "base")
        assert len({self.expected.texts[name, PROMPTS[0]] for name in ("base", "kept", "churn-11", "churn-12")}) == 4
        self.expected.churned = {f"churn-{_SEEDS[-1]}"}
        for replica in REPLICAS:
            script(serving, replica, **PACE)

    def _learn(self, serving: Gateway, model: str, key: str) -> None:
        port = int(serving.url.rpartition(":")[2])
        for prompt in PROMPTS:
            status, text = asyncio.run(Client(port, KEY, model, prompt, False).ask())
            assert status == 200 and text, (model, status)
            self.expected.texts[key, prompt] = text

    async def _round(self, serving: Gateway, port: int, number: int, seconds: float) -> None:
        crowd = Crowd(port, KEY, ("base", "kept", "churn"), self.expected, self.tally, self.args.seed + number)

        def relay_killed() -> None:
            crowd.relay_killed_s = time.monotonic() + 1

        mischief = Mischief(serving, random.Random(self.args.seed * 7919 + number), relay_killed)
        clients = [asyncio.create_task(crowd.one(i, 0.5)) for i in range(self.args.clients)]
        others = [asyncio.create_task(self._break(mischief)), asyncio.create_task(self._churn(serving, number))]
        await asyncio.sleep(seconds)
        for other in others:
            other.cancel()
        await asyncio.gather(*others, return_exceptions=True)
        crowd.going = False
        await mischief.heal()
        await asyncio.gather(*clients)
        self.faults += mischief.done
        await self._settled(serving)
        self.looks += self._look(serving)
        print(f"{self._minute():5.1f} min {self.engine}: {self.tally}; lost slots {len(self.lost_slots)}", flush=True)
        for wrong in self.tally.wrong[-3:]:
            print(f"    {wrong}", flush=True)

    async def _break(self, mischief: Mischief) -> None:
        while True:
            await asyncio.sleep(_FAULT_EVERY_S)
            await mischief.one()

    async def _churn(self, serving: Gateway, number: int) -> None:
        """Delete the adapter, upload it with another content. LMDeploy restarts its engines for each: once a while."""
        if self.engine == "lmdeploy" and number % 4:
            return
        await asyncio.sleep(5)
        turn = 0
        while True:
            turn += 1
            seed = _SEEDS[(number + turn) % len(_SEEDS)]
            await asyncio.to_thread(self._change, serving, seed)
            await asyncio.sleep(60 if self.engine == "lmdeploy" else 10)

    def _change(self, serving: Gateway, seed: int) -> None:
        files = [("file", (file.name, file.read_bytes())) for file in sorted((self.folder / f"churn-{seed}").iterdir())]
        with contextlib.suppress(httpx2.HTTPError), serving.client() as client:
            deleted = client.delete("/v1/adapters/churn").status_code
            self.churns[f"delete {deleted}"] += 1
            self.expected.churned.add(f"churn-{seed}")
            uploaded = client.post("/v1/adapters", data={"name": "churn"}, files=files).status_code
            self.churns[f"upload {uploaded}"] += 1
            if uploaded in (200, 201) and deleted == 200:
                self.expected.churned = {f"churn-{seed}"}

    async def _settled(self, serving: Gateway) -> None:
        """Nothing is in flight any more; what still is after a while is lost."""
        deadline_s = time.monotonic() + _SETTLE_S
        taken: dict[str, float] = {}
        while time.monotonic() < deadline_s:
            with contextlib.suppress(httpx2.HTTPError):
                taken = await asyncio.to_thread(_taken, serving)
                if taken and not any(taken.values()):
                    return
            await asyncio.sleep(0.5)
        self.lost_slots.append(f"minute {self._minute():.1f}: {taken}")

    def _look(self, serving: Gateway) -> list[Look]:
        looks = []
        for module in ("relay", "control"):
            for pid in serving.children(f"gateway.{module}"):
                line = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
                index = line[line.index(b"--index") + 1].decode() if module == "relay" else ""
                listed = serving.state / "run" / f"relay-{index}.series"
                series = len(listed.read_bytes().splitlines()) if index else 0
                files = len(os.listdir(f"/proc/{pid}/fd"))
                name = f"{module} {index}".strip()
                looks.append(Look(round(self._minute(), 1), name, pid, rss_bytes([pid]) / 1e6, files, series))
        return looks

    def _minute(self) -> float:
        return (time.monotonic() - self.started_s) / 60

    def grown(self) -> list[str]:
        """Processes that hold more at the end than they did once warm."""
        found = []
        lives: dict[tuple[str, int], list[Look]] = {}
        for look in self.looks:
            lives.setdefault((look.process, look.pid), []).append(look)
        for (name, pid), life in lives.items():
            if len(life) > 2 * _WARM_ROUNDS:
                level, last = life[_WARM_ROUNDS], life[-1]
                if last.rss_mb > level.rss_mb + GROWTH_MB or last.files > level.files + GROWTH_FILES:
                    found.append(f"{self.engine} {name} ({pid}): {level} -> {last}")
        return found

    def good(self) -> bool:
        return not (self.tally.wrong or self.lost_slots or self.grown())


def _taken(serving: Gateway) -> dict[str, float]:
    """Slots in use and requests waiting, as the metrics say."""
    with serving.client() as client:
        page = client.get("/metrics").raise_for_status().text
    samples = [line.rpartition(" ") for line in page.splitlines() if not line.startswith("#")]
    names = ("tunegate_in_flight_requests", "tunegate_queued_requests", "tunegate_waiting_requests")
    return {name: float(value) for name, _, value in samples if name.startswith(names)}


def report(soaks: list[Soak], minutes: float) -> str:
    """The result as Markdown."""
    lines = [
        f"{time.strftime('%Y-%m-%d', time.gmtime())}; {len(os.sched_getaffinity(0))} cores, Linux "
        f"{platform.release()}, Python {platform.python_version()}; {minutes:g} minutes, {len(soaks)} gateways at "
        "once, each with two emulated replicas and two relays.",
        "",
        "| | " + " | ".join(soak.engine for soak in soaks) + " |",
        "|---|" + "---|" * len(soaks),
    ]
    for title, counters in (
        ("requests", [soak.tally.outcomes for soak in soaks]),
        ("faults", [soak.faults for soak in soaks]),
        ("adapter", [soak.churns for soak in soaks]),
    ):
        for name in sorted(set().union(*counters)):
            lines.append(f"| {title}: {name} | " + " | ".join(f"{counter[name]:,}" for counter in counters) + " |")
    lines.append("| **wrong answers** | " + " | ".join(str(len(soak.tally.wrong)) for soak in soaks) + " |")
    lines.append("| **lost slots** | " + " | ".join(str(len(soak.lost_slots)) for soak in soaks) + " |")
    lines.append("| **processes that grew** | " + " | ".join(str(len(soak.grown())) for soak in soaks) + " |")
    lines += ["", "| process | warm: MB, files, series | at the end |", "|---|---|---|"]
    for soak in soaks:
        lives: dict[tuple[str, int], list[Look]] = {}
        for look in soak.looks:
            lives.setdefault((look.process, look.pid), []).append(look)
        for (name, _), life in lives.items():
            if len(life) > 2 * _WARM_ROUNDS:
                level, last = (f"{one.rss_mb:.1f}, {one.files}, {one.series}" for one in (life[_WARM_ROUNDS], life[-1]))
                minutes = life[-1].minute - life[_WARM_ROUNDS].minute
                lines.append(f"| {soak.engine} {name}, {minutes:.0f} minutes | {level} | {last} |")
    for soak in soaks:
        lines += [f"- {soak.engine}: {text}" for text in (*soak.tally.wrong, *soak.lost_slots, *soak.grown())]
    return "\n".join(lines) + "\n"


async def _main(args: argparse.Namespace) -> bool:
    with tempfile.TemporaryDirectory(prefix="tunegate-soak-") as folder:
        soaks = [Soak(engine, Path(folder) / engine, args) for engine in args.engines]
        await asyncio.gather(*(soak.run() for soak in soaks))
        text = report(soaks, args.minutes)
        print(text)
        if args.out:
            args.out.write_text(text)
        return all(soak.good() for soak in soaks)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--engines", nargs="*", default=["vllm", "sglang", "lmdeploy"])
    parser.add_argument("--clients", type=int, default=8, help="of each gateway")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path, help="file for the result")
    return 0 if asyncio.run(_main(parser.parse_args())) else 1


if __name__ == "__main__":
    sys.exit(main())
