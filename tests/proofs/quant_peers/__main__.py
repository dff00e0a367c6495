"""Quantize one model with this quantizer, GPTQModel and llm-compressor, with the same calibration tokens.

    python -m tests.proofs.quant_peers --out FOLDER [--text FILE] [--device cuda] [--model DIR] [--samples 32]
                                       [--layers N] [--peer-python NAME=PATH] [--budget SECONDS] [TOOL ...]

Runs in an environment with torch (`.venv-torch`). Each tool is a process of its own, one after the other, on one GPU or
on the CPU with the same number of threads: wall seconds, CPU seconds of its tree and peak memory, Python's start,
loading and saving included. What it wrote is then held against the original on FILE (plain text) by quant/evaluate.py;
without FILE it is not. `--layers` cuts the model to its first layers. FOLDER keeps logs and figures.json, which
grows with every tool. A tool that fails, or that --budget leaves no time for, does not stop the others.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from quant.calib import calibration_tokens
from quant.checkpoint import Checkpoint
from quant.choice import group_size_for
from quant.cli import find_model
from quant.errors import QuantError
from quant.evaluate import evaluate, evaluation_tokens
from quant.headers import read_json
from tests.proofs.cost import run
from tests.proofs.environments import NotHere, peer_python, versions
from tests.proofs.quant_peers.tools import PEERS, TOOLS, Job, Tool, command, python_of

_JUDGED_TOKENS = 1024  # of a sequence


def main() -> None:
    given = arguments()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # what was started is ended
    deadline = time.monotonic() + given.budget
    torch.set_num_threads(given.threads)
    model = find_model(given.model)
    judged_BT = evaluation_tokens(model, given.text, given.judged, _JUDGED_TOKENS) if given.text else None
    given.out.mkdir(parents=True)
    if given.layers:
        model = cut_model(model, given.layers, given.out / "cut")
    tokens_BT = calibration_tokens(model, None, given.samples, given.tokens, seed=0)  # as our own command draws them
    (given.out / "calibration.json").write_text(json.dumps(tokens_BT.tolist()))
    chosen = [tool for tool in TOOLS if not given.tools or tool.name in given.tools]
    rows: list[dict[str, Any]] = []
    figures = {"machine": machine(given.device), "threads": given.threads, "layers": given.layers, "rows": rows}
    figures |= {"calibration": list(tokens_BT.shape), "versions": all_versions(chosen, dict(given.peer_python))}
    for tool in chosen:
        row = quantized(tool, given, model, deadline)
        if judged_BT is not None and "failed" not in row:
            row |= judged(model, given.out / tool.name, judged_BT, torch.device(given.device))
        if not given.keep:
            shutil.rmtree(given.out / tool.name, ignore_errors=True)
        rows.append(row)
        print(json.dumps(row), flush=True)
        write_aside(given.out / "figures.json", figures)
    print(json.dumps({key: value for key, value in figures.items() if key != "rows"}, indent=1))
    print(table(rows))


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line, held against what there is: a wrong path is told before an hour's work."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [tool.name for tool in TOOLS]
    parser.add_argument("tools", nargs="*", metavar="TOOL", help=f"default: all of {', '.join(names)}")
    parser.add_argument("--out", type=Path, required=True, help="folder for everything; must not exist")
    parser.add_argument("--text", type=Path, help="plain text to judge on, such as WikiText-2's test")
    parser.add_argument("--model", default="demo", help="checkpoint directory, or the name of a pulled model")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--layers", type=int, help="cut the model to so many layers")
    parser.add_argument("--samples", type=int, default=32, help="calibration sequences")
    parser.add_argument("--tokens", type=int, default=512, help="of a calibration sequence")
    parser.add_argument("--judged", type=int, default=32, help=f"sequences of {_JUDGED_TOKENS} tokens of FILE")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--budget", type=float, default=6 * 3600, help="seconds for all tools")
    parser.add_argument("--keep", action="store_true", help="keep the checkpoints")
    parser.add_argument(
        "--peer-python", type=peer_python, action="append", default=[], metavar="NAME=PATH",
        help=f"an environment that is here already: {', '.join(PEERS)}",
    )  # fmt: skip
    given = parser.parse_args(argv)
    if unknown := sorted(set(given.tools) - set(names)):
        parser.error(f"unknown: {', '.join(unknown)}; allowed: {', '.join(names)}")
    if given.text and not given.text.is_file():
        parser.error(f"--text: there is no {given.text}")
    if given.out.exists():
        parser.error(f"--out: {given.out} exists; name another folder")
    if given.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no CUDA device")
    return given


def quantized(tool: Tool, given: argparse.Namespace, model: Path, deadline: float) -> dict[str, Any]:
    """One tool's costs, or why there are none. deadline: of all tools, by the monotonic clock."""
    row: dict[str, Any] = {"tool": tool.name, "title": tool.title, "grid": tool.grid, "device": given.device}
    threads, out = str(given.threads), given.out / tool.name
    environment = {"OMP_NUM_THREADS": threads, "OMP_WAIT_POLICY": "PASSIVE", "HF_HUB_OFFLINE": "1"}
    job = Job(
        model=str(model), out=str(out), tokens=str(given.out / "calibration.json"), samples=given.samples,
        length_tokens=given.tokens, group_size=group_size_for(model), device=given.device,
    )  # fmt: skip
    left_s = deadline - time.monotonic()
    if left_s < 1:
        return row | {"failed": "no time was left for it"}
    log = given.out / f"{tool.name}.log"
    try:
        cost = run(command(tool, job, dict(given.peer_python)), log, environment, left_s)
    except (NotHere, OSError) as error:
        return row | {"failed": str(error)}
    row |= {"wall_s": round(cost.wall_s, 1), "cpu_s": round(cost.cpu_s, 1), "peak_gb": cost.peak_bytes / 1e9}
    if cost.exit_code:
        return row | {"failed": f"exit status {cost.exit_code}: {log.read_text(errors='replace')[-600:]}"}
    if tool.peer:
        return row | dict(json.loads(out.with_name(out.name + ".json").read_text()))
    return row | own_figures(read_json(out / "quant_report.json"))


def own_figures(report: dict[str, Any]) -> dict[str, Any]:
    """What our report says of a job's costs. Quantizing is without loading and writing, as with the peers."""
    phases_s = report["phases_s"]
    quantize_s = report["elapsed_s"] - phases_s.get("load", 0.0) - phases_s.get("write", 0.0)
    figures = {"quantize_s": quantize_s, "quantize_cpu_s": report["cpu_s"], "layers_s": report["elapsed_s"]}
    figures |= {"worst_error": max(one["error"] for layer in report["layers"] for one in layer["linears"])}
    if report["peak_device_bytes"]:
        figures["device_gb"] = report["peak_device_bytes"] / 1e9
    return figures | {"phases_s": phases_s}


def judged(model: Path, made: Path, tokens_BT: Tensor, device: torch.device) -> dict[str, Any]:
    """How far a checkpoint is from the original."""
    try:
        quality = evaluate(model, made, tokens_BT, device)
    except QuantError as error:
        return {"not_judged": str(error)}
    found = {"judged_tokens": quality.tokens, "original_perplexity": quality.original_perplexity}
    return found | {"perplexity": quality.perplexity, "kl": quality.kl_nats, "top1": quality.top1_agreement}


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as Markdown. Quantizing, without start, loading and saving, is by the clock on a GPU, else CPU."""
    lines = [
        "| tool and method | grid | wall s | CPU s | quantizing | host GB | GPU GB | perplexity | KL, nats "
        "| same choice |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        if "failed" in row:
            lines.append(f"| {row['title']} | {row['grid']} | {' '.join(row['failed'].split())[-300:]} ||||||||")
            continue
        quantizing = row["quantize_s" if row["device"] == "cuda" else "quantize_cpu_s"]
        costs = f"{row['wall_s']:.0f} | {row['cpu_s']:.0f} | {quantizing:.1f} | {row['peak_gb']:.1f}"
        costs += f" | {row['device_gb']:.1f}" if "device_gb" in row else " | -"
        quality = row.get("not_judged", "-") + " | - | -"
        if "perplexity" in row:
            quality = f"{row['perplexity']:.3f} | {row['kl']:.4f} | {row['top1']:.1%}"
        lines.append(f"| {row['title']} | {row['grid']} | {costs} | {quality} |")
    return "\n".join(lines)


def cut_model(model: Path, layers: int, out: Path) -> Path:
    """A copy of a checkpoint without the layers from number `layers` on."""
    source = Checkpoint(model)
    layers = min(layers, source.config["num_hidden_layers"])
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


def write_aside(path: Path, figures: dict[str, Any]) -> None:
    """A reader finds the old figures or the new ones."""
    aside = path.with_suffix(".new")
    aside.write_text(json.dumps(figures, indent=1) + "\n")
    aside.replace(path)


def machine(device: str) -> str:
    """The GPU or the processor, the cores here, Python, the load, the time."""
    found = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line]
    model = found[0].split(":")[1].strip() if found else platform.machine()
    if device == "cuda":
        model = f"{torch.cuda.get_device_name()}, {model}"
    load = Path("/proc/loadavg").read_text().split()[0]
    now = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime())
    return f"{model}, {len(os.sched_getaffinity(0))} cores, Python {platform.python_version()}, load {load}, {now}"


def all_versions(tools: list[Tool], pythons: dict[str, Path]) -> dict[str, Any]:
    """Of what is to run, by environment; of one that cannot be asked, why."""
    found: dict[str, Any] = {}
    for peer in dict.fromkeys(tool.peer for tool in tools):
        try:
            python = python_of(peer, pythons) if peer else sys.executable
            found[peer or "ours"] = versions(python, [*([peer] if peer else []), "torch", "transformers"])
        except (NotHere, OSError, subprocess.CalledProcessError) as error:
            found[peer or "ours"] = f"unknown: {error}"
    return found


if __name__ == "__main__":
    main()
