"""The trainer on two GPUs over NCCL: the curve of one GPU, how speed grows, memory of each, and a resume."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from scripts.gpu_suite import machine
from scripts.gpu_suite.programs import run
from scripts.gpu_suite.report import Report
from scripts.gpu_suite.stages import Options
from trainer.events import curve, read_events

_RUN_LIMIT_S = 150.0
_LOSS_TOLERANCE = 1e-3  # relative, over all steps: sums of float32 in another order, on kernels that differ by shape
_STEPS = {"cuda": 24, "cpu": 4}
_SAVE_EVERY = {"cuda": 8, "cpu": 1}
_BATCH = 8
_WORDS = ("when", "orders", "arrive", "late", "customers", "write", "again", "and", "ask", "where", "parcels", "are")
# name -> flags of `gateway train sft`
_KINDS: dict[str, tuple[str, ...]] = {"lora": (), "full": ("--tuning", "full")}


def nccl(report: Report, options: Options, out: Path) -> None:
    """Needs two GPUs; on the CPU the same over gloo."""
    data = out / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in _rows(_STEPS[options.device] * _BATCH)))
    _scaling(report, options, out)
    for kind, parallel in (("lora", "ddp"), ("lora", "fsdp"), ("full", "fsdp")):
        alone, both = out / f"{kind}-none", out / f"{kind}-{parallel}"
        with report.check(f"{kind}, {parallel}: two processes learn what one learns"):
            if not alone.exists():
                _train(options, data, alone, kind, "none")
            _train(options, data, both, kind, parallel)
            _close(report, f"{kind}, {parallel}", alone, both)
    with report.check("full, fsdp: killed after a checkpoint, and resumed"):
        killed, whole = out / "full-killed", out / "full-fsdp"
        first = killed / "checkpoints" / f"step-{_SAVE_EVERY[options.device]:08d}"
        was_killed = _train(options, data, killed, "full", "fsdp", wait_for=first)
        run([*_ours(options), "resume", str(killed), "--processes", "2"], out / "resume.log", _RUN_LIMIT_S)
        report.figures["resumed from step"] = [
            event["step"] for event in read_events(killed / "events.jsonl") if event["type"] == "resumed"
        ]
        assert was_killed, "it ended before it could be killed"
        _close(report, "full, fsdp, killed and resumed", whole, killed)


def _scaling(report: Report, options: Options, out: Path) -> None:
    """Tokens a second on one and on two GPUs, full rows."""
    found: dict[str, dict[str, Any]] = report.figures.setdefault("speed", {})
    for parallel, flags in (("ddp", ("--compile",)), ("fsdp", ())):
        for processes in (1, 2):
            name = f"{parallel if processes > 1 else 'alone'}{' compiled' if flags else ''}, {processes}"
            with report.check(f"speed: {name}"):
                figures = out / f"{parallel}-{processes}.json"
                module = ["-m", "tests.proofs.train_speed", "--json", str(figures)]
                if options.device == "cpu":
                    module += ["--tiny", "--tokens", "128", "--steps", "4", "--warmup", "2"]
                else:
                    module += ["--steps", "10", *flags]
                if processes > 1:
                    # A machine without a network may not know its own name.
                    ranks = ["--standalone", "--local-addr", "127.0.0.1", "--nproc-per-node", str(processes)]
                    module = ["-m", "torch.distributed.run", *ranks, *module, "--parallel", parallel]
                env = {} if processes > 1 or options.device == "cpu" else _first_gpu()
                run([options.torch_python, *module], figures.with_suffix(".log"), _RUN_LIMIT_S, env)
                row = found[name] = json.loads(figures.read_text().splitlines()[-1])
                print(f"{report.stage}: {name}: {row['tokens_per_s']} tokens/s, GB {row['peaks_gb']}", flush=True)
        pair = [row["tokens_per_s"] for name, row in found.items() if (" compiled" in name) == bool(flags)]
        if len(pair) == 2:
            report.figures[f"{parallel}: times one GPU"] = round(pair[1] / pair[0], 3)


def _first_gpu() -> dict[str, str]:
    return {"CUDA_VISIBLE_DEVICES": machine.first_visible()}


def _train(
    options: Options, data: Path, directory: Path, kind: str, parallel: str, wait_for: Path | None = None
) -> bool:
    """A run of 24 steps in float32, or up to its checkpoint `wait_for`; whether it was killed then. Raises Ended."""
    command = [
        *_ours(options), "sft", "--model", str(options.demo), "--dataset", str(data), "--output-dir", str(directory),
        "--device", options.device, "--dtype", "float32", "--batch-size", str(_BATCH), "--micro-batch-tokens", "1024",
        "--max-length", "1024", "--learning-rate", "1e-4", "--golden-prompts", "0", "--parallel", parallel,
        *_KINDS[kind],
    ]  # fmt: skip
    command += ["--max-steps", str(_STEPS[options.device])]
    if wait_for:
        command += ["--save-every", str(_SAVE_EVERY[options.device])]
    env = _first_gpu() if options.device == "cuda" and parallel == "none" else {}
    if parallel != "none":
        command += ["--processes", "2"]
    seen = (lambda: wait_for.exists()) if wait_for else (lambda: False)
    return run(command, directory.with_suffix(".log"), _RUN_LIMIT_S, env, kill_when=seen)


def _ours(options: Options) -> list[str]:
    return [options.torch_python, "-m", "trainer"]


def _close(report: Report, name: str, one: Path, other: Path) -> None:
    """Raises AssertionError where two runs' losses differ."""
    curves = [curve(directory / "events.jsonl") for directory in (one, other)]
    assert curves[0] and curves[0].keys() == curves[1].keys(), [sorted(found) for found in curves]
    worst = max(abs(curves[0][step] - curves[1][step]) / abs(curves[0][step]) for step in curves[0])
    speeds = [curve(directory / "events.jsonl", field="tokens_per_s") for directory in (one, other)]
    report.figures[name] = {
        "worst relative difference of a loss": worst,
        "first and last loss": [curves[0][min(curves[0])], curves[0][max(curves[0])]],
        "median tokens/s": [sorted(found.values())[len(found) // 2] for found in speeds],
    }
    print(f"{report.stage}: {name}: {json.dumps(report.figures[name])}", flush=True)
    assert worst < _LOSS_TOLERANCE, worst


def _rows(count: int) -> list[dict[str, Any]]:
    """Conversations of 20 to 300 words, always the same."""
    rng = random.Random(0)
    turns = (" ".join(rng.choices(_WORDS, k=rng.randint(20, 300))) for _ in range(count))
    return [
        {"messages": [{"role": "user", "content": "Go on."}, {"role": "assistant", "content": text}]} for text in turns
    ]
