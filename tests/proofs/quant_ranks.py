"""One quantization by several processes beside the same by one: what differs in the result, and the time.

    python -m tests.proofs.quant_ranks --out FOLDER [--model DIR] [--layers N] [--device cuda] [METHOD ...]

Runs in an environment with torch; torchrun starts the processes, with NCCL between GPUs and gloo on the CPU. Moments
are sums over the same sequences in another order, so float32 rounding moves an integer to the next level now and then:
the share that stays is told, and the error of the linears' outputs. FOLDER keeps logs and figures.json, which grows
with every method.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import sys
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from torch import Tensor

from quant.checkpoint import Checkpoint, take_packed
from quant.choice import group_size_for
from quant.cli import find_model
from quant.headers import read_json
from quant.verify import round_trip
from tests.proofs.cost import run
from tests.proofs.quant_peers.__main__ import cut_model, machine, own_figures, write_aside

LEAST_SAME = 0.9  # share of the integers: few tokens leave directions that rounding decides
MOST_WORSE = 0.01  # of the mean error


def main() -> int:
    """Exit status 0 when both make the same checkpoint within LEAST_SAME and MOST_WORSE."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("methods", nargs="*", metavar="METHOD", help="default: gptq awq")
    parser.add_argument("--out", type=Path, required=True, help="folder for everything; must not exist")
    parser.add_argument("--model", default="demo", help="checkpoint directory, or the name of a pulled model")
    parser.add_argument("--layers", type=int, help="cut the model to so many layers")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--samples", type=int, default=128, help="calibration sequences")
    parser.add_argument("--tokens", type=int, default=512, help="of a calibration sequence")
    parser.add_argument("--limit", type=float, default=3600, help="seconds for one quantization")
    given = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # what was started is ended
    if given.device == "cuda" and torch.cuda.device_count() < given.processes:
        parser.error(f"--processes {given.processes}: torch sees {torch.cuda.device_count()} CUDA devices")
    model = find_model(given.model)
    given.out.mkdir(parents=True)
    if given.layers:
        model = cut_model(model, given.layers, given.out / "cut")
    rows: list[dict[str, Any]] = []
    figures = {"machine": machine(given.device), "processes": given.processes, "layers": given.layers, "rows": rows}
    for method in given.methods or ("gptq", "awq"):
        rows.append(beside(method, model, given))
        print(json.dumps(rows[-1]), flush=True)
        write_aside(given.out / "figures.json", figures)
    return 0 if all(row.get("same") for row in rows) else 1


def beside(method: str, model: Path, given: argparse.Namespace) -> dict[str, Any]:
    """One method by one process and by several: costs of both, and how far apart the results are."""
    row: dict[str, Any] = {"method": method}
    for name, processes in (("alone", 1), ("together", given.processes)):
        try:
            row[name] = quantized(method, model, given.out / f"{method}-{name}", processes, given)
        except OSError as error:
            return row | {"failed": f"{name}: {error}"}
        print(json.dumps({method: {name: row[name]}}), flush=True)
        if "failed" in row[name]:
            return row
    alone, together = (given.out / f"{method}-{name}" for name in ("alone", "together"))
    row["linears_whole"] = round_trip(together)
    row["same_integers"] = share_of_same_integers(alone, together)
    row["worse"] = row["together"]["mean_error"] / row["alone"]["mean_error"] - 1
    row["same"] = row["same_integers"] >= LEAST_SAME and row["worse"] <= MOST_WORSE
    row["speedup"] = row["alone"]["quantize_s"] / row["together"]["quantize_s"]
    for made in (alone, together):
        shutil.rmtree(made)
    return row


def quantized(method: str, model: Path, out: Path, processes: int, given: argparse.Namespace) -> dict[str, Any]:
    """One run's costs. Raises OSError, when it did not end in time."""
    # By its number: a name need not resolve where there is no network.
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1"]
    launcher = [*torchrun, "--nproc-per-node", str(processes)] if processes > 1 else []
    command = [
        sys.executable, *launcher, "-m", "quant", "--method", method, "--model", str(model), "--out", str(out),
        "--device", given.device, "--group-size", str(group_size_for(model)), "--calib-samples", str(given.samples),
        "--calib-tokens", str(given.tokens),
    ]  # fmt: skip
    log = out.with_name(out.name + ".log")
    threads = str(max(1, len(os.sched_getaffinity(0)) // processes))
    cost = run(command, log, {"OMP_NUM_THREADS": threads, "HF_HUB_OFFLINE": "1"}, given.limit)
    if cost.exit_code:
        return {"failed": f"exit status {cost.exit_code}: {log.read_text(errors='replace')[-2000:]}"}
    report = read_json(out / "quant_report.json")
    layers_s = [layer["seconds"] for layer in report["layers"]]
    errors = [linear["error"] for layer in report["layers"] for linear in layer["linears"]]
    figures = {"wall_s": round(cost.wall_s, 1), "each_layer_s": layers_s, "mean_error": mean(errors)}
    return figures | own_figures(report) | {"peak_gb": cost.peak_bytes / 1e9, "on": report["device"]}


def share_of_same_integers(one: Path, other: Path) -> float:
    """Of all linears of two checkpoints."""
    same = count = 0
    sides = [Checkpoint(one), Checkpoint(other)]
    for module in sides[0].quantized_modules:
        q_NK, other_NK = (_integers(side, module) for side in sides)
        same, count = same + int((q_NK == other_NK).sum()), count + q_NK.numel()
    return same / count


def _integers(side: Checkpoint, module: str) -> Tensor:
    assert side.scheme is not None
    return take_packed(side.tensors(side.packed_names(module)), side.scheme)[module].q_NK


if __name__ == "__main__":
    sys.exit(main())
