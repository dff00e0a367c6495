"""Eight adapters trained at once against one after the other: time, CPU time, memory, and whether the curves agree.

    python -m tests.proofs.cotraining [--model demo] [--runs 8] [--steps 12]

Each way is a process of its own, so that its peak memory is its own.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import platform
import resource
import tempfile
import time
from pathlib import Path
from typing import Any

RATES = (1e-4, 2e-4, 4e-4, 8e-4)
RANKS = (4, 8, 16, 32)
WORDS = ("red", "green", "blue", "black", "white", "brown", "grey", "pink")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--runs", type=int, default=8)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--batch-size", type=int, default=2)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        figures = {}
        for way in ("at once", "in turn"):
            settings = [_settings(given, work, way.replace(" ", "-"), i) for i in range(given.runs)]
            figures[way] = _apart(_together if way == "at once" else _in_turn, settings)
        pairs = [(_losses(work / "at-once" / str(i)), _losses(work / "in-turn" / str(i))) for i in range(given.runs)]
    import torch

    print(f"{given.model}, {given.runs} adapters, {given.steps} steps of {given.batch_size} examples each")
    print(f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    for way, seen in figures.items():
        print(
            f"{way}: {seen['seconds']:.1f} s, {seen['cpu_s']:.1f} CPU s, peak {seen['peak_mib']:.0f} MiB, "
            f"{seen['tokens'] / seen['seconds']:.0f} tokens/s"
        )
    ratios = {key: figures["in turn"][key] / figures["at once"][key] for key in ("seconds", "cpu_s")}
    print(f"ratio in turn / at once: time {ratios['seconds']:.2f}, CPU {ratios['cpu_s']:.2f}")
    for setting, (together, alone) in zip(settings, pairs, strict=True):
        apart = max(abs(a - b) / abs(b) for a, b in zip(together, alone, strict=True))
        name = f"rank {setting['lora_rank']:2}, rate {setting['learning_rate']:.0e}"
        losses = f"loss {alone[0]:.4f} -> {alone[-1]:.4f} alone, {together[-1]:.4f} at once"
        print(f"{name}: {losses}; a step's two losses differ by {apart:.1e} of it at most")


def _settings(given: argparse.Namespace, work: Path, way: str, i: int) -> dict[str, Any]:
    """Run i: its own rank, rate and data."""
    data = work / f"{i}.jsonl"
    rows = [
        {
            "messages": [
                {"role": "user", "content": f"Item {n} please."},
                {"role": "assistant", "content": f"{WORDS[i % 8]} {n}"},
            ]
        }
        for n in range(given.steps * given.batch_size)
    ]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {
        "model": given.model,
        "device": "cpu",
        "dataset": [data],
        "output_dir": work / way / str(i),
        "batch_size": given.batch_size,
        "max_steps": given.steps,
        "max_length": 128,
        "micro_batch_tokens": 2048,
        "lora_rank": RANKS[i % 4],
        "learning_rate": RATES[i // 2 % 4],
        "golden_prompts": 0,
    }


def _apart(way: Any, settings: list[dict[str, Any]]) -> dict[str, float]:
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        seen: dict[str, float] = pool.apply(way, (settings,))
        return seen


def _together(settings: list[dict[str, Any]]) -> dict[str, float]:
    from trainer import config, run

    return _measured(lambda: run.start_together([config.load("sft", None, one) for one in settings]), settings)


def _in_turn(settings: list[dict[str, Any]]) -> dict[str, float]:
    from trainer import config, run

    return _measured(lambda: [run.start(config.load("sft", None, one)) for one in settings], settings)


def _measured(work: Any, settings: list[dict[str, Any]]) -> dict[str, float]:
    started, cpu = time.perf_counter(), time.process_time()
    work()
    tokens = 0
    for one in settings:
        events = (one["output_dir"] / "events.jsonl").read_text().splitlines()
        tokens += sum(event.get("tokens", 0) for event in map(json.loads, events) if event["type"] == "step")
    return {
        "seconds": time.perf_counter() - started,
        "cpu_s": time.process_time() - cpu,
        "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "tokens": tokens,
    }


def _losses(directory: Path) -> list[float]:
    from trainer.events import curve

    return list(curve(directory / "events.jsonl").values())


if __name__ == "__main__":
    main()
