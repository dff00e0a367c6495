"""`gateway bench` on one engine, direct and through the gateway in interleaved blocks."""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import random
import secrets
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2

from backends import registry
from backends.spec import AdapterLoading, BackendName
from scripts.gpu_suite import quiet
from scripts.gpu_suite.report import Report
from scripts.gpu_suite.serving import KEY, Engine, Served, serving, upload
from scripts.gpu_suite.stages import FORMS
from scripts.gpu_suite.swap_job import swap_under_load

SWAP = "swap"  # what comes under load, beside the points
_WORKLOAD = "random:512/128"
_ADAPTER_SLOTS = 8
_MAX_ADAPTERS = 96  # kept in the engine's host memory: all of the table's and the swap's, so that it is asked for any
_UPLOADS = 4  # at a time
_CLIENTS = 32  # users of one load process


@dataclass(frozen=True)
class Point:
    """One place in the table."""

    concurrency: int
    seconds: float  # of load on each target, all blocks together
    adapters: int = 0  # the requests spread over so many; 0: the base
    pairs: int = 3  # blocks on each target
    ramp_s: float = 0.0  # over which users begin: about a request's length, or all would walk in step
    workload: str = _WORKLOAD
    name: str = ""  # where the users and adapters do not say all

    def __str__(self) -> str:
        return self.name or f"c{self.concurrency}" + (f"-{self.adapters}lora" if self.adapters else "")


# The most wanted first: a run may be cut off.
_ONE, _MANY = Point(1, 10.5), Point(64, 13.5, ramp_s=1.5)
_BASE = (
    _MANY,
    _ONE,
    Point(256, 21, ramp_s=2.5),
    Point(16, 10.5, ramp_s=0.8),
    Point(1, 20, pairs=20, workload="random:128/4", name="ttft"),
)
_ADAPTERS = (Point(64, 12, 1, ramp_s=1.5), Point(64, 12, 8, ramp_s=1.5), Point(64, 12, 64, ramp_s=2))


def points(engine: BackendName, form: str) -> list[Point]:
    """The table of an engine, in bfloat16 with adapters where it takes them while it serves; or by `form`:

    awq, gptq: in 4 bits; plain: in bfloat16, started without slots for adapters; lora: with adapters loaded at start.
    """
    if form in FORMS:
        return [_ONE, _MANY]  # one user first: what 4 bits are for
    if form == "plain":
        return [_ONE]
    if form == "lora":
        return [_MANY, *_ADAPTERS[:2]]
    return [*_BASE, *(_ADAPTERS if _at_runtime(engine) else ())]


def bench_job(report: Report, engine: Engine, model: Path, loras: list[Path], points: list[Point], work: Path, *,
              swap: bool) -> None:  # fmt: skip
    """Start, measure each point with its adapters uploaded before it, and with `swap` swap adapters under load.

    An engine that takes adapters only when it starts has them all before the first point. `work`: below the suite's own
    directory, where it waits until its GPU is quiet.
    """
    wanted = max((point.adapters for point in points), default=0)
    runtime = _at_runtime(engine.name)
    flags = ["--max-model-len", "4096", "--dtype", _dtype(engine, model)]
    flags += ["--adapter-slots", str(_ADAPTER_SLOTS if wanted else 0), "--max-adapter-rank", "16"]
    flags += ["--max-adapters", str(_MAX_ADAPTERS)]
    with contextlib.ExitStack() as stack:
        with quiet.busy(work.parent, report.stage):
            served = stack.enter_context(serving(engine, model, work / "state", *flags, name="base"))
            report.figures |= {"ready_s": served.ready_s, "workload": _WORKLOAD, "flags": flags}
            report.figures |= {"upload_ready_s": [], "points": {}}
            print(f"{report.stage}: ready after {served.ready_s} s", flush=True)
            if wanted and not runtime:
                _upload_missing(report, served, loras, wanted, at_once=wanted)
            report.figures |= {"version": served.version(), "kernels": served.kernels()}
        stack.enter_context(quiet.quiet(work.parent, report.stage))
        print(f"{report.stage}: its turn", flush=True)
        last = [point for point in points if point.adapters > _ADAPTER_SLOTS]
        for point in points:
            if point not in last:
                _check_point(report, served, point, loras, work)
        if wanted and runtime and swap:
            with report.check("adapters swapped under load"):
                _upload_missing(report, served, loras, 2)
                swap_under_load(report, served, loras)
        for point in last:
            _check_point(report, served, point, loras, work)


def _check_point(report: Report, served: Served, point: Point, loras: list[Path], work: Path) -> None:
    with report.check(str(point)):
        _upload_missing(report, served, loras, point.adapters)
        found = report.figures["points"][str(point)] = measure(served, point, work)
        print(f"{report.stage}: {point}: {in_short(found)}", flush=True)
        faults = {name: side["failures"] for name, side in found["targets"].items() if side["failures"]}
        assert not faults, f"requests failed: {faults}"


def measure(served: Served, point: Point, work: Path) -> dict[str, Any]:
    """One point. Raises AssertionError where the bench gave no result."""
    names = [f"tuned{n:02}" for n in range(point.adapters)] or ["base"]
    engine_names = [engine_name(served, name) for name in names]
    asyncio.run(_warm(served, point, engine_names))
    key = served.state()["api_key"]
    sides = (("direct", served.engine_url(), key, engine_names), ("gateway", served.gateway.url, KEY, names))
    targets = [f"{side}={url},model={models[0]},adapters={'+'.join(models)},key={key}"
               for side, url, key, models in sides]  # fmt: skip
    before = _adapter_counts(served)
    result = _bench(work / str(point), point, targets)
    return summary(result) | {"adapter_hit_rate": hit_rate(before, _adapter_counts(served))}


def summary(result: dict[str, Any]) -> dict[str, Any]:
    """What the table needs of a bench's result; the whole stays beside the logs."""
    targets = {}
    for name, target in result["summary"]["targets"].items():
        steady = target["steady"]
        targets[name] = {
            "output_tokens_per_s": steady["output_tokens_per_s"],
            "requests": steady["requests"],
            "failures": steady["failures"],
            **{metric: {at: steady["metrics"][metric][at] for at in ("p50", "p99")}
               for metric in ("ttft_ms", "tpot_ms", "e2el_ms") if metric in steady["metrics"]},
        }  # fmt: skip
    found = {"verdict": result["verdict"]["level"], "findings": result["verdict"]["findings"], "targets": targets}
    pairs = {row["metric"]: row for row in result["paired"]}
    found["added_ms"] = {
        metric: {"pairs": row["pairs"], "blocks": row["blocks"], "p50": row["difference"]["p50"],
                 "mean": row["difference"]["mean"]}
        for metric, row in pairs.items()
    }  # fmt: skip
    direct, through = (targets[side]["output_tokens_per_s"] for side in ("direct", "gateway"))
    found["tokens_per_s_ratio"] = ratio(through, direct)
    if "e2el_ms" in pairs:
        found["tokens_per_s_ratio_by_pairs"] = ratio_by_pairs(pairs["e2el_ms"])
    return found


def ratio(over: dict[str, float], under: dict[str, float]) -> dict[str, float]:
    """The quotient of two independent estimates with its 95 % interval, by their standard errors."""
    assert over["value"] and under["value"], f"no tokens: {over}, {under}"
    value = over["value"] / under["value"]
    half = 1.96 * value * math.hypot(over["stderr"] / over["value"], under["stderr"] / under["value"])
    return {"value": value, "low": value - half, "high": value + half}


def ratio_by_pairs(row: dict[str, Any]) -> dict[str, float]:
    """Throughput of the other over the base's from what its requests took longer, each against its twin.

    Users who wait for their answers send as many requests as answers come: users / mean duration. It knows nothing of
    where a block begins and ends, which is most of the scatter of tokens/s over short blocks.
    """
    mean = row["difference"]["mean"]
    base = 100 * mean["value"] / row["relative_percent"] if row["relative_percent"] else math.inf
    return {"value": base_over(base, mean["value"]), "low": base_over(base, mean["high"]),
            "high": base_over(base, mean["low"])}  # fmt: skip


def base_over(base: float, added: float) -> float:
    """1 / (1 + added / base)."""
    return 1 / (1 + added / base)


def hit_rate(before: dict[str, float], after: dict[str, float]) -> float | None:
    """The share of requests for adapters whose adapter was loaded when they came to the gateway; None without any."""
    asked, missed = (after[key] - before[key] for key in ("requests", "misses"))
    return 1 - missed / asked if asked else None


def engine_name(served: Served, public: str) -> str:
    """What the engine calls an adapter: by the content's address."""
    if public == "base":
        return "base"
    with served.http() as http:
        digest = str(http.get(f"/v1/adapters/{public}").raise_for_status().json()["sha256"])
    return registry.get(served.engine.name).engine_model("base", f"a-{digest[:12]}")


def in_short(found: dict[str, Any]) -> str:
    """One line, for whoever watches."""
    rows = []
    for name, target in found["targets"].items():
        half = ", ".join(f"{metric[:-3]} {target[metric]['p50']['value']:.2f}" for metric in ("ttft_ms", "tpot_ms")
                         if metric in target)  # fmt: skip
        failed = target["failures"] or "no failures"
        rows.append(f"{name} {target['output_tokens_per_s']['value']:.0f} tok/s, p50 ms {half}, {failed}")
    for key in ("tokens_per_s_ratio", "tokens_per_s_ratio_by_pairs"):
        if key in found:
            rows.append(f"{key} {found[key]['value']:.4f} [{found[key]['low']:.4f}, {found[key]['high']:.4f}]")
    if added := found["added_ms"].get("ttft_ms"):
        p50 = added["p50"]
        rows.append(
            f"added ttft p50 {p50['value']:.3f} ms [{p50['low']:.3f}, {p50['high']:.3f}], {added['pairs']} pairs"
        )
    return "; ".join([*rows, f"hit rate {found['adapter_hit_rate']}", found["verdict"]])


def _dtype(engine: Engine, model: Path) -> str:
    """TurboMind computes with packed weights in float16."""
    packed = "quantization_config" in json.loads((model / "config.json").read_text())
    return "float16" if packed and engine.name == "lmdeploy" else "bfloat16"


def _at_runtime(engine: BackendName) -> bool:
    return registry.get(engine).capabilities.adapter_loading is AdapterLoading.RUNTIME


def _upload_missing(report: Report, served: Served, loras: list[Path], wanted: int, at_once: int = _UPLOADS) -> None:
    assert len(loras) >= wanted, f"{len(loras)} adapters were made, {wanted} are wanted"
    times = report.figures["upload_ready_s"]
    missing = range(len(times), wanted)
    with ThreadPoolExecutor(at_once) as pool:
        times += pool.map(lambda n: upload(served, f"tuned{n:02}", loras[n]), missing)


async def _warm(served: Served, point: Point, names: list[str]) -> None:
    """As many requests at once as the point has users: what an engine compiles or captures late is not measured."""
    words = ["time", "year", "people", "way", "day", "man", "thing", "woman", "life", "child", "world", "school"]
    headers = {"authorization": f"Bearer {served.state()['api_key']}"}
    limits = httpx2.Limits(max_connections=point.concurrency)
    async with httpx2.AsyncClient(base_url=served.engine_url(), headers=headers, limits=limits, timeout=120,
                                  trust_env=False) as http:  # fmt: skip

        async def ask(number: int) -> None:
            text = f"{secrets.token_hex(4)} " + " ".join(random.choices(words, k=400))
            body = {"model": names[number % len(names)], "messages": [{"role": "user", "content": text}],
                    "max_tokens": 8, "temperature": 0}  # fmt: skip
            (await http.post("/v1/chat/completions", json=body)).raise_for_status()

        await asyncio.gather(*map(ask, range(point.concurrency)))


def _bench(out: Path, point: Point, targets: list[str]) -> dict[str, Any]:
    command = [sys.executable, "-m", "bench", "run", "--quiet", "--repeats", "1", "--workload", point.workload]
    command += ["--concurrency", str(point.concurrency), "--workers", str(-(-point.concurrency // _CLIENTS))]
    command += ["--duration", str(point.seconds), "--block", str(point.seconds / point.pairs)]
    command += ["--ramp", str(point.ramp_s), "--warmup", "8", "--out", str(out.parent), "--name", out.name]
    for target in targets:
        command += ["--target", target]
    started = time.monotonic()
    done = subprocess.run(command, capture_output=True, text=True, timeout=420, check=False)
    out.mkdir(parents=True, exist_ok=True)
    (out / "said.txt").write_text(f"{done.stdout}{done.stderr}\n{time.monotonic() - started:.1f} s\n")
    assert (out / "result.json").exists(), done.stderr[-800:]
    return dict(json.loads((out / "result.json").read_text()))


def _adapter_counts(served: Served) -> dict[str, float]:
    """Requests for adapters, and those whose adapter was loaded nowhere, from the gateway's metrics page."""
    with served.http() as http:
        lines = http.get("/metrics").raise_for_status().text.splitlines()
    rows = [line.rpartition(" ") for line in lines if line.startswith("tunegate_adapter_")]
    names = {"requests": "tunegate_adapter_requests_total", "misses": "tunegate_adapter_misses_total"}
    return {key: sum(float(value) for row, _, value in rows if row.partition("{")[0] == name)
            for key, name in names.items()}  # fmt: skip
