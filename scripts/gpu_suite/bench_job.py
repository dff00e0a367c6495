"""`gateway bench` on one engine, direct and through the gateway in interleaved blocks."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from backends import registry
from scripts.gpu_suite.report import Report
from scripts.gpu_suite.serving import KEY, Engine, Served, serving, upload

_WORKLOAD = "random:512/128"


@dataclass(frozen=True)
class Point:
    """One place in the table."""

    concurrency: int
    seconds: float  # of load on each target
    adapters: int = 0  # the requests spread over so many; 0: the base

    def __str__(self) -> str:
        return f"c{self.concurrency}" + (f"-{self.adapters}lora" if self.adapters else "")


def bench_job(report: Report, engine: Engine, model: Path, loras: list[Path], points: list[Point], work: Path,
              measuring: contextlib.AbstractContextManager[Any]) -> None:  # fmt: skip
    """Start, upload what adapters the points want, and measure while `measuring` holds the GPU alone."""
    wanted = max(point.adapters for point in points)
    flags = ["--max-model-len", "4096", "--max-adapter-rank", "16", "--adapter-slots", str(min(8, wanted))]
    flags += ["--dtype", "bfloat16"]
    with serving(engine, model, work / "state", *flags, name="base") as served:
        report.figures |= {"ready_s": served.ready_s, "version": served.version(), "kernels": served.kernels()}
        print(f"{report.stage}: ready after {served.ready_s} s", flush=True)
        uploads = [upload(served, f"tuned{n}", lora) for n, lora in enumerate(loras[:wanted])]
        report.figures |= {"upload_ready_s": uploads, "workload": _WORKLOAD, "points": {}}
        with measuring:
            for point in points:
                with report.check(str(point)):
                    found = report.figures["points"][str(point)] = _measure(served, point, work)
                    print(f"{report.stage}: {point}: {_in_short(found)}", flush=True)


def _measure(served: Served, point: Point, work: Path) -> dict[str, Any]:
    if point.adapters <= 1:
        public = f"tuned{0}" if point.adapters else "base"
        targets = [f"direct={served.engine_url()},model={_engine_name(served, public)},key={served.state()['api_key']}",
                   f"gateway={served.gateway.url},model={public},key={KEY}"]  # fmt: skip
        return _summary(_bench(work / str(point), point, targets, ()))
    # The names differ, so the two take turns as whole runs.
    public_names = [f"tuned{n}" for n in range(point.adapters)]
    engine_names = [_engine_name(served, name) for name in public_names]
    found: dict[str, Any] = {}
    for turn in range(2):
        for side, url, key, names in (("direct", served.engine_url(), served.state()["api_key"], engine_names),
                                      ("gateway", served.gateway.url, KEY, public_names)):  # fmt: skip
            out = _bench(work / f"{point}-{side}-{turn}", point, [f"{side}={url},model={names[0]},key={key}"], names)
            found[f"{side}-{turn}"] = _summary(out)["targets"][side]
    return {"targets": found, "interleaved": "whole runs in turn"}


def _bench(out: Path, point: Point, targets: list[str], adapters: tuple[str, ...] | list[str]) -> dict[str, Any]:
    block_s = max(4.0, point.seconds / 3)
    command = [sys.executable, "-m", "bench", "run", "--workload", _WORKLOAD, "--concurrency", str(point.concurrency)]
    command += ["--duration", str(point.seconds), "--block", str(block_s), "--repeats", "1", "--quiet"]
    command += ["--warmup", str(min(64, 2 * point.concurrency)), "--out", str(out.parent), "--name", out.name]
    for target in targets:
        command += ["--target", target]
    if adapters:
        command += ["--adapters", ",".join(adapters)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=420, check=False)
    out.mkdir(parents=True, exist_ok=True)
    (out / "said.txt").write_text(done.stdout + done.stderr)
    assert (out / "result.json").exists(), done.stderr[-800:]
    return dict(json.loads((out / "result.json").read_text()))


def _summary(result: dict[str, Any]) -> dict[str, Any]:
    """The figures of the table; the whole result stays beside the logs."""
    return {"verdict": result["verdict"]["level"], "findings": result["verdict"]["findings"],
            "targets": result["summary"]["targets"], "paired": result["paired"]}  # fmt: skip


def _engine_name(served: Served, public: str) -> str:
    """What the engine calls an adapter: by the content's address."""
    if public == "base":
        return "base"
    with served.http() as http:
        digest = str(http.get(f"/v1/adapters/{public}").raise_for_status().json()["sha256"])
    return registry.get(served.engine.name).engine_model("base", f"a-{digest[:12]}")


def _in_short(found: dict[str, Any]) -> str:
    """A line a target, for whoever watches."""
    rows = []
    for name, target in found["targets"].items():
        steady = target["steady"]
        half = {key: round(steady["metrics"][key]["p50"]["value"], 2) for key in ("ttft_ms", "tpot_ms")}
        rows.append(
            f"{name} {steady['output_tokens_per_s']['value']:.0f} tok/s {half}, {steady['failures'] or 'no failures'}"
        )
    return "; ".join(rows)
