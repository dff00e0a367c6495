"""Measure the relay beside nginx and other gateways, in one run over one scripted engine: `make bench-gateway`.

    python -m tests.proofs.rivals [--targets WORD ...] [--modes NAME ...] [--seconds S] [--rounds N] [--out FOLDER]
    python -m tests.proofs.rivals --only-ours --scale               cost against adapters and relays
    python -m tests.proofs.rivals --only-ours --leavers 200000      memory, 30 % of the clients leave
    python -m tests.proofs.rivals --only-ours --modes turns --under 'perf record -o FILE --'

CPU is the whole process tree's user and system time over a run, divided by its requests. Load and engine run beside
it on the same cores, so throughput is the machine's as much as the gateway's: compare within one table only.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field, replace
from pathlib import Path

import msgspec
import uvloop

from tests.proofs.rivals import report
from tests.proofs.rivals.load import MODES, Load, Mode
from tests.proofs.rivals.processes import cpu, rss_bytes, tree
from tests.proofs.rivals.report import Figures, Latency, Run
from tests.proofs.rivals.targets import SCALES, TARGETS, NotHere, Running, Target, free_port, running

_WARM_S = 0.3
_LATENCY_MODES = ("json", "turns")
_BATCH = 10_000  # requests between two looks at the memory


@dataclass
class Bench:
    """One run of everything."""

    args: argparse.Namespace
    folder: Path
    engines: list[int]
    runs: dict[tuple[str, str], list[Run]] = field(default_factory=dict)  # (target, mode) -> a run a round

    async def measure(self, targets: list[Target], modes: list[Mode]) -> Figures:
        """Start all targets, measure them in turn, again and again."""
        absent: dict[str, str] = {}
        latencies: list[Latency] = []
        async with contextlib.AsyncExitStack() as stack:
            here: list[Running] = []
            for target in targets:
                under = self.args.under.split() if self.args.under and target.relays else []
                folder = self.folder / f"target-{len(here) + len(absent)}"
                try:
                    here.append(await stack.enter_async_context(running(target, self.engines, folder, under)))
                except NotHere as error:
                    absent[target.name] = str(error)
                    print(f"{target.name}: {error}", file=sys.stderr)
            pids = {one.target.name: tree(one.pid) for one in here}
            for turn in range(self.args.rounds):
                for mode in modes:
                    for one in here[turn % len(here) :] + here[: turn % len(here)]:
                        run = await self._run(one, mode, pids[one.target.name])
                        self.runs.setdefault((one.target.name, mode.name), []).append(run)
                        print(f"{turn + 1}/{self.args.rounds} {mode.name:15} {one.target.name:30} {run}", flush=True)
            if self.args.latency:
                for mode in (mode for mode in modes if mode.name in _LATENCY_MODES):
                    for one in here:
                        latencies.append(await self._added(one, mode))
                        print(latencies[-1], flush=True)
            memory = {name: rss_bytes(mine) for name, mine in pids.items()}
            versions = {one.target.name: one.version for one in here}
        return Figures(_machine(), _date(), versions, absent, self.runs, memory, latencies)

    async def _run(self, one: Running, mode: Mode, pids: list[int]) -> Run:
        if one.target.connections:
            mode = replace(mode, connections=min(mode.connections, one.target.connections))
        await Load(mode).closed(one.port, _WARM_S)
        before = cpu(pids)
        result = await Load(mode).closed(one.port, self.args.seconds)
        spent_ns, user, system = (now - then for now, then in zip(cpu(pids), before, strict=True))
        done = max(1, result.requests)
        each_us = spent_ns / 1e3 / done
        user_us = each_us * user / max(1, user + system)
        return Run(
            round(user_us, 1),
            round(each_us - user_us, 1),
            round(result.per_s, 1),
            round(result.quantile_ms(0.5), 2),
            round(result.quantile_ms(0.99), 2),
            done,
            result.errors,
            result.bad,
        )

    async def _added(self, one: Running, mode: Mode) -> Latency:
        """Latency at half of what the target took in the closed loop, less the engine's own at the same rate."""
        runs = sorted(run.per_s for run in self.runs[one.target.name, mode.name])
        rate = max(1.0, runs[len(runs) // 2] / 2)
        through = await Load(mode).open(one.port, self.args.seconds, rate)
        direct = await Load(mode).open(self.engines[0], self.args.seconds, rate)
        p50, p99 = ((through.quantile_ms(q) - direct.quantile_ms(q)) for q in (0.5, 0.99))
        return Latency(one.target.name, mode.name, round(rate), round(p50, 3), round(p99, 3))

    async def leavers(self, requests: int) -> list[tuple[int, int]]:
        """Memory of one relay over that many requests, 30 % of which their client breaks off: (requests, bytes)."""
        target = next(target for target in TARGETS if target.relays == 1)
        modes = {mode.name: mode for mode in MODES}
        seen = []
        async with running(target, self.engines, self.folder / "leavers", []) as one:
            pids = tree(one.pid)
            done = 0
            while done < requests:
                for name in ("json", "together", "adapter", "turns"):
                    result = await Load(modes[name], leavers=True).closed(one.port, requests=_BATCH // 4)
                    done += result.requests
                    if result.bad:
                        print(f"{name}: {result.bad} wrong answers", file=sys.stderr)
                seen.append((done, rss_bytes(pids)))
                print(f"{done:8} requests, {rss_bytes(pids) / 1e6:.1f} MB", flush=True)
        return seen


def _machine() -> str:
    model = next(
        (line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line),
        platform.machine(),
    )
    load = Path("/proc/loadavg").read_text().split()[0]
    cores, python = len(os.sched_getaffinity(0)), platform.python_version()
    return f"{model}, {cores} cores, Linux {platform.release()}, Python {python}, load {load}"


def _date() -> str:
    return time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime())


async def _main(args: argparse.Namespace) -> None:
    task = asyncio.current_task()
    assert task is not None
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)  # what was started is ended
    engines = [free_port() for _ in range(2)]
    command = [sys.executable, "-m", "tests.proofs.rivals.engine", *map(str, engines)]
    with tempfile.TemporaryDirectory(prefix="tunegate-rivals-") as folder, subprocess.Popen(command) as engine:
        try:
            bench = Bench(args, Path(folder), engines)
            if args.leavers:
                await bench.leavers(args.leavers)
                return
            targets = list(SCALES if args.scale else TARGETS)
            if args.targets:
                targets = [target for target in targets if any(word in target.name for word in args.targets)]
            if args.only_ours:
                targets = [target for target in targets if target.relays]
            modes = [mode for mode in MODES if not args.modes or mode.name in args.modes]
            figures = await bench.measure(targets, modes)
            print(report.table(figures, modes))
            if args.out:
                args.out.mkdir(parents=True, exist_ok=True)
                (args.out / "gateway.json").write_bytes(
                    msgspec.json.format(msgspec.json.encode(figures.plain()), indent=1)
                )
                (args.out / "gateway.svg").write_text(report.plot(figures, modes))
                report.put_into(args.out / "gateway.md", report.table(figures, modes))
        finally:
            engine.terminate()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--targets", nargs="*", help="those whose name has one of these words")
    parser.add_argument("--only-ours", action="store_true", help="no other gateway")
    parser.add_argument("--modes", nargs="*", choices=[mode.name for mode in MODES])
    parser.add_argument("--seconds", type=float, default=0.8, help="of load in each run")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--latency", action=argparse.BooleanOptionalAction, default=True, help="added, at half load")
    parser.add_argument("--scale", action="store_true", help="one relay or four, 10 adapters or 10,000")
    parser.add_argument("--leavers", type=int, metavar="REQUESTS", help="only this: memory while clients break off")
    parser.add_argument("--under", help="a profiler's command to run our relays under")
    parser.add_argument("--out", type=Path, help="folder for the table, the figures and the plot")
    uvloop.run(_main(parser.parse_args()))


if __name__ == "__main__":
    main()
