"""Quantize one model with this quantizer, GPTQModel and llm-compressor, with the same calibration tokens.

    python -m tests.proofs.quant_peers --text FILE --out FOLDER [--model DIR] [--samples 32] [--layers N] [TOOL ...]

Runs in an environment with torch (`.venv-torch`). Each tool is a process of its own on the CPU with the same number of
threads: wall seconds, CPU seconds of its tree and peak memory, Python's start, loading and saving included. What all
wrote is then held against the original on FILE (plain text) by quant/evaluate.py. `--layers` cuts the model to its
first layers, to see in a minute that everything works. FOLDER keeps the checkpoints, logs and figures.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import signal
import sys
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from quant.calib import calibration_tokens
from quant.checkpoint import Checkpoint
from quant.choice import group_size_for
from quant.cli import find_model
from quant.evaluate import evaluate_all, evaluation_tokens
from quant.headers import read_json
from tests.proofs.cost import run
from tests.proofs.environments import NotHere, versions
from tests.proofs.quant_peers.tools import TOOLS, Tool, command, python_of


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [tool.name for tool in TOOLS]
    parser.add_argument("tools", nargs="*", metavar="TOOL", help=f"default: all of {', '.join(names)}")
    parser.add_argument("--out", type=Path, required=True, help="folder for everything; must not exist")
    parser.add_argument("--text", type=Path, required=True, help="plain text to judge on, such as WikiText-2's test")
    parser.add_argument("--model", default="demo", help="checkpoint directory, or the name of a pulled model")
    parser.add_argument("--layers", type=int, help="cut the model to so many layers")
    parser.add_argument("--samples", type=int, default=32, help="calibration sequences")
    parser.add_argument("--tokens", type=int, default=512, help="of a calibration sequence")
    parser.add_argument("--judged", type=int, default=32, help="sequences of 1024 tokens of FILE")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    given = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # what was started is ended
    unknown = sorted(set(given.tools) - set(names))
    if unknown:
        parser.error(f"unknown: {', '.join(unknown)}; allowed: {', '.join(names)}")
    given.out.mkdir(parents=True)
    torch.set_num_threads(given.threads)
    model = find_model(given.model)
    if given.layers:
        model = cut_model(model, given.layers, given.out / "cut")
    rows = quantize_all(given, model, [tool for tool in TOOLS if not given.tools or tool.name in given.tools])
    judge(given, model, rows)
    figures = {"machine": machine(), "versions": all_versions(rows), "threads": given.threads, "rows": rows}
    figures |= {"calibration": [given.samples, given.tokens], "layers": given.layers}
    (given.out / "figures.json").write_text(json.dumps(figures, indent=1))
    print(json.dumps({key: value for key, value in figures.items() if key != "rows"}, indent=1))
    print(table(rows))


def quantize_all(given: argparse.Namespace, model: Path, tools: list[Tool]) -> list[dict[str, Any]]:
    """One tool after the other: a row of costs each, or of why there are none."""
    tokens_BT = calibration_tokens(model, None, given.samples, given.tokens, seed=0)  # as our own command draws them
    tokens_file = given.out / "calibration.json"
    tokens_file.write_text(json.dumps(tokens_BT.tolist()))
    group_size = group_size_for(model)
    threads = str(given.threads)
    environment = {"OMP_NUM_THREADS": threads, "OMP_WAIT_POLICY": "PASSIVE", "HF_HUB_OFFLINE": "1"}
    rows: list[dict[str, Any]] = []
    for tool in tools:
        row: dict[str, Any] = {"tool": tool.name, "title": tool.title, "grid": tool.grid}
        rows.append(row)
        out = given.out / tool.name
        try:
            asked = command(tool, model, out, tokens_file, given.samples, given.tokens, group_size)
        except NotHere as error:
            row["failed"] = str(error)
            continue
        log = given.out / f"{tool.name}.log"
        cost = run(asked, log, environment)
        row |= {"wall_s": round(cost.wall_s, 1), "cpu_s": round(cost.cpu_s, 1), "peak_gb": cost.peak_bytes / 1e9}
        if cost.exit_code:
            row["failed"] = f"exit status {cost.exit_code}: {log.read_text(errors='replace')[-300:]}"
        elif tool.peer:
            row |= json.loads(out.with_name(out.name + ".json").read_text())
        else:
            report = read_json(out / "quant_report.json")
            row |= {"quantize_s": report["elapsed_s"], "quantize_cpu_s": report["cpu_s"]}
        print(row, flush=True)
    return rows


def judge(given: argparse.Namespace, model: Path, rows: list[dict[str, Any]]) -> None:
    """Add to each row how far its checkpoint is from the original."""
    tokens_BT = evaluation_tokens(model, given.text, given.judged, 1024)
    made = [row for row in rows if "failed" not in row]
    if not made:
        return
    found = evaluate_all(model, [given.out / row["tool"] for row in made], tokens_BT, torch.device("cpu"))
    for row, quality in zip(made, found, strict=True):
        row |= {"judged_tokens": quality.tokens, "original_perplexity": quality.original_perplexity}
        row |= {"perplexity": quality.perplexity, "kl": quality.kl_nats, "top1": quality.top1_agreement}


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as Markdown."""
    lines = [
        "| tool and method | grid | wall s | CPU s | quantizing | peak GB | perplexity | KL, nats | same choice |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        if "failed" in row:
            lines.append(f"| {row['title']} | {row['grid']} | {row['failed']} |||||||")
            continue
        costs = f"{row['wall_s']:.0f} | {row['cpu_s']:.0f} | {row['quantize_cpu_s']:.0f} | {row['peak_gb']:.1f}"
        quality = f"{row['perplexity']:.3f} | {row['kl']:.4f} | {row['top1']:.1%}"
        lines.append(f"| {row['title']} | {row['grid']} | {costs} | {quality} |")
    return "\n".join(lines)


def cut_model(model: Path, layers: int, out: Path) -> Path:
    """A copy of a checkpoint without the layers from number `layers` on."""
    source = Checkpoint(model)
    kept = [name for name in source.entries if not _is_past(name, layers)]
    out.mkdir()
    for file in model.iterdir():
        if file.is_file() and "safetensors" not in file.name:
            (out / file.name).write_bytes(file.read_bytes())
    (out / "config.json").write_text(json.dumps(source.config | {"num_hidden_layers": layers}))
    save_file(source.tensors(kept), out / "model.safetensors", metadata={"format": "pt"})
    return out


def _is_past(name: str, layers: int) -> bool:
    return any(part.isdigit() and int(part) >= layers for part in name.split(".layers.")[-1].split(".")[:1])


def machine() -> str:
    """The processor, its cores here, Python, the load, the time."""
    found = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line]
    model = found[0].split(":")[1].strip() if found else platform.machine()
    load = Path("/proc/loadavg").read_text().split()[0]
    now = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime())
    return f"{model}, {len(os.sched_getaffinity(0))} cores, Python {platform.python_version()}, load {load}, {now}"


def all_versions(rows: list[dict[str, Any]]) -> dict[str, dict[str, str]]:
    """Of what ran, by environment."""
    ran = {row["tool"] for row in rows if "failed" not in row}
    peers = dict.fromkeys(tool.peer for tool in TOOLS if tool.name in ran and tool.peer)
    found = {"ours": versions(sys.executable, ["torch", "transformers"])}
    return found | {peer: versions(python_of(peer), [peer, "torch", "transformers"]) for peer in peers}


if __name__ == "__main__":
    main()
