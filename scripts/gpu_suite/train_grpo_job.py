"""GRPO with gateway, engine and trainer on one GPU: `examples/grpo` as its README has it, on CUDA."""

from __future__ import annotations

import importlib.util
import json
from itertools import pairwise
from pathlib import Path
from typing import Any

from scripts.gpu_suite.programs import run
from scripts.gpu_suite.report import Report
from scripts.gpu_suite.serving import KEY, Engine, serving
from scripts.gpu_suite.stages import Options
from trainer.events import read_events

_EXAMPLE = Path(__file__).parents[2] / "examples" / "grpo"
_STEPS, _EVAL_EVERY = 30, 5
_WIDEST_GAP = 0.2  # nats a token, on average over a step: both compute in bfloat16
_LIMIT_S = {"cuda": 200.0, "cpu": 600.0}


def grpo(report: Report, options: Options, out: Path) -> None:
    """The held-out reward before and after, and what a step takes."""
    _make_data(out / "data")
    flags = tuple(flag for engine, flag in options.flags if engine == "vllm")
    engine = Engine("vllm", options.device, flags, options.share / 2)  # the trainer has the other half
    steps = _STEPS if options.device == "cuda" else 2
    with (
        report.check("gateway and engine are ready"),
        serving(engine, options.demo, out / "state", name="demo") as served,
    ):
        report.figures["ready_s"] = served.ready_s
        with report.check("the run ends"):
            command = [
                options.torch_python, "-m", "trainer", "grpo", "--config", str(_EXAMPLE / "orders.yaml"),
                "--model", str(options.demo), "--gateway-url", served.gateway.url,
                "--dataset", str(out / "data/train.jsonl"), "--eval-dataset", str(out / "data/eval.jsonl"),
                "--reward", f"{_EXAMPLE / 'rewards.py'}:short_and_right", "--output-dir", str(out / "run"),
                "--device", options.device, "--max-steps", str(steps), "--eval-every", str(min(_EVAL_EVERY, steps)),
            ]  # fmt: skip
            try:
                run(command, out / "trainer.log", _LIMIT_S[options.device], {"TUNEGATE_API_KEY": KEY})
            finally:
                if (out / "run/events.jsonl").exists():
                    report.figures |= figures(read_events(out / "run/events.jsonl"))
                    print(f"{report.stage}: {json.dumps(report.figures)}", flush=True)
        with report.check("the held-out reward rises"):
            rewards = [reward for _, reward in report.figures["held-out reward"]]
            assert len(rewards) > 1 and rewards[-1] > rewards[0], rewards
        with report.check("sampler and trainer score tokens alike"):
            gap = report.figures["widest sampler gap"]
            assert gap is not None and gap < _WIDEST_GAP, gap


def figures(events: list[dict[str, Any]]) -> dict[str, Any]:
    """What a run's log says."""
    steps = [event for event in events if event["type"] == "step"]
    seconds = [round(after["time"] - before["time"], 2) for before, after in pairwise(steps)]
    return {
        "steps": len(steps),
        "step_s, median": sorted(seconds)[len(seconds) // 2] if seconds else None,
        "run_s": round(events[-1]["time"] - events[0]["time"], 1),
        "held-out reward": [(event["step"], event["reward"]) for event in events if event["type"] == "eval"],
        "reward while sampling": [(event["step"], event.get("reward")) for event in steps[:: max(1, len(steps) // 8)]],
        "widest sampler gap": max((event["sampler_gap"] for event in steps if "sampler_gap" in event), default=None),
    }


def _make_data(folder: Path) -> None:
    """By the example's own script."""
    spec = importlib.util.spec_from_file_location("make_data", _EXAMPLE / "make_data.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.main(folder)
