"""The quantizer on GPUs: whole 8B-shaped models, beside its peers, what it costs in quality, and over several GPUs.

The shape is that of the bench (Qwen3-8B's sizes, 36 layers), so that its weights are made once. Programs with torch do
the work: `python -m quant`, and the proofs quant_peers and quant_ranks, whose figures are taken over as they grow. On
the CPU everything is tiny: it shows that the stages work, and no more.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from scripts.gpu_suite.programs import end, last_words, run
from scripts.gpu_suite.report import Report
from scripts.gpu_suite.stages import Options, StageSpec
from tests.proofs.quant_peers.tools import PEERS, TOOLS

_GOALS_S = {"rtn": 180.0, "awq": 480.0, "gptq": 480.0}  # for a whole 8B-shaped model
_FASTER = 3.0  # than each peer at the same algorithm
_WORST = 1.005  # perplexity beside the best of the peers
_LAYERS = 4  # of the shape where tools are compared
_SPEED = ("ours-rtn", "ours-awq", "ours-gptq", "llmc-gptq", "gptqmodel", "llmc-awq", "gptqmodel-awq")
_QUALITY = {
    "ours": ("ours-rtn", "ours-awq", "ours-gptq", "ours-rtn-gptq", "ours-awq-gptq", "ours-gptq-awq"),
    "llmcompressor": ("llmc-gptq", "llmc-gptq-mse", "llmc-awq"),
    "gptqmodel": ("gptqmodel", "gptqmodel-mse", "gptqmodel-awq"),
}
# Ours -> the peers' rows of the same algorithm on the same grid.
_SAME = {
    "ours-gptq": ("llmc-gptq", "llmc-gptq-mse", "gptqmodel", "gptqmodel-mse"),
    "ours-awq": ("llmc-awq", "gptqmodel-awq"),
}
_PEER_OF = {tool.name: tool.peer for tool in TOOLS}
_LOOK_S = 2.0


def whole(method: str, report: Report, options: Options, out: Path) -> None:
    """A whole model by our command: seconds, phases, peaks."""
    model, made = _weights(report, options), out / "made"
    command = [options.torch_python, "-m", "quant", "--method", method, "--model", str(model), "--out", str(made)]
    command += ["--device", options.device, "--group-size", "128", *_calibration(options, "--calib-")]
    report.figures |= {"shape": options.bench_shape, "method": method}
    try:
        with report.check(f"{method}, {options.bench_shape}"):
            started = time.monotonic()
            run(command, out / "quant.log", 700)
            report.figures["wall_s"] = round(time.monotonic() - started, 1)
            own = json.loads((made / "quant_report.json").read_text())
            linears = [linear for layer in own["layers"] for linear in layer["linears"]]
            report.figures |= {
                "quantize_s": own["elapsed_s"], "layers": len(own["layers"]), "linears": len(linears),
                "each_layer_s": [layer["seconds"] for layer in own["layers"]], "phases_s": own.get("phases_s"),
                "calibration_tokens": own["calibration_tokens"], "device_gb": own["peak_device_bytes"] / 1e9,
                "host_gb": own["peak_host_bytes"] / 1e9, "worst_error": max(one["error"] for one in linears),
                "fallbacks": sum(one["method"] != method for one in linears), "versions": own["versions"],
            }  # fmt: skip
            print(json.dumps(report.figures), flush=True)
        with report.check(f"{method} in under {_GOALS_S[method]:g} s"):
            assert report.figures.get("wall_s", math.inf) < _GOALS_S[method], report.figures.get("wall_s")
    finally:
        shutil.rmtree(made, ignore_errors=True)


def peers(report: Report, options: Options, out: Path) -> None:
    """The same cut model by every tool, one after the other on one GPU."""
    model = _weights(report, options)
    _told_of_peers(report, options)
    with report.check("all tools ran"):
        _proof(report, options, out / "run", ("--model", str(model), "--layers", str(_LAYERS)), _SPEED, 380)
        assert not (failed := _failed(report.figures["run"])), failed
    rows = _rows(report, "run")
    for ours, theirs in _SAME.items():
        for peer in theirs:
            if {ours, peer} <= rows.keys():
                ratio, whole_ratio = (rows[peer][cost] / rows[ours][cost] for cost in ("quantize_s", "wall_s"))
                figures = {"quantizing": round(ratio, 2), "the whole process": round(whole_ratio, 2)}
                report.figures[f"{ours} times as fast as {peer}"] = figures
                with report.check(f"{ours} {_FASTER:g} times as fast as {peer}"):
                    assert ratio >= _FASTER, f"{ratio:.2f} times"


def quality(report: Report, options: Options, out: Path) -> None:
    """The demo model by every tool, held against the original; the tools of a maker run beside those of the others."""
    text = options.text
    if text is None or not text.is_file():
        raise LookupError(f"--text names no file: {text}; perplexity is taken on it")
    _told_of_peers(report, options)
    flags = ("--model", str(options.demo), "--text", str(text), "--judged", "128" if options.device == "cuda" else "1")
    here = {"ours", *_pythons(options)}
    running = {
        name: _started(options, out / name, flags, tools, 600, 8) for name, tools in _QUALITY.items() if name in here
    }
    _watch(report, {name: out / name for name in running}, running)
    for name in running:
        with report.check(f"all tools of {name} ran"):
            assert running[name].returncode == 0, last_words(running[name], out / f"{name}.log")
            assert not (failed := _failed(report.figures[name])), failed
    rows = {key: row for name in running for key, row in _rows(report, name).items() if "perplexity" in row}
    for ours, theirs in _SAME.items():
        found = {peer: rows[peer]["perplexity"] for peer in theirs if peer in rows}
        with report.check(f"{ours}: perplexity no worse than its best peer's by {_WORST - 1:.1%}"):
            assert found, f"none of {', '.join(theirs)} was judged"
            ratio = rows[ours]["perplexity"] / min(found.values())
            report.figures[f"{ours} beside its best peer"] = round(ratio, 4)
            assert ratio <= _WORST, f"{ratio:.4f} of {found}"


def nccl(report: Report, options: Options, out: Path) -> None:
    """Calibration shared by two GPUs, beside one GPU."""
    model, run = _weights(report, options), out / "run"
    command = [options.torch_python, "-m", "tests.proofs.quant_ranks", "--out", str(run), "--model", str(model)]
    command += ["--layers", str(_LAYERS), "--device", options.device, "--limit", "75", *_calibration(options, "--")]
    with report.check("two processes make what one makes"):
        with (out / "run.log").open("wb") as log:
            process = subprocess.Popen([*command, "gptq", "awq"], stdout=log, stderr=log)
        _watch(report, {"run": run}, {"run": process})
        assert process.returncode == 0, last_words(process, out / "run.log")


QUANT_STAGES: dict[str, StageSpec] = {
    spec.name: spec
    for spec in (
        StageSpec("quant-8b-rtn", partial(whole, "rtn"), 40, 420, demo=True),
        StageSpec("quant-8b-awq", partial(whole, "awq"), 60, 700, demo=True),
        StageSpec("quant-8b-gptq", partial(whole, "gptq"), 60, 700, demo=True),
        StageSpec("quant-8b-peers", peers, 380, 520, demo=True),
        StageSpec("quant-quality", quality, 540, 720, share=0.4, demo=True),
        StageSpec("quant-nccl", nccl, 150, 330, gpus=2, demo=True),
    )
}


def _weights(report: Report, options: Options) -> Path:
    """Random weights of the bench's shape, made by whoever asks first. Raises CalledProcessError."""
    model = options.made(options.bench_shape)
    command = [options.torch_python, "-m", "scripts.gpu_suite.torch_side", "random", options.bench_shape]
    if not (model / "done").exists():
        with report.check(f"random weights, {options.bench_shape}"):
            subprocess.run([*command, str(options.demo), str(model)], check=True)
    return model


def _told_of_peers(report: Report, options: Options) -> None:
    """None is installed here: that is for those who prepare the machine."""
    for name in PEERS:
        with report.check(f"{name} is here"):
            assert name in _pythons(options), f"give --peer-python {name}=PATH"


def _calibration(options: Options, prefix: str) -> list[str]:
    samples, tokens = (128, 512) if options.device == "cuda" else (2, 64)
    return [f"{prefix}samples", str(samples), f"{prefix}tokens", str(tokens)]


def _proof(
    report: Report, options: Options, out: Path, flags: Sequence[str], tools: Sequence[str], budget_s: float
) -> None:
    """Run quant_peers to its end and take its figures over as they grow. Raises AssertionError, when it failed."""
    process = _started(options, out, flags, tools, budget_s, 4)
    _watch(report, {out.name: out}, {out.name: process})
    assert process.returncode == 0, last_words(process, out.with_name(out.name + ".log"))


def _started(
    options: Options, out: Path, flags: Sequence[str], tools: Sequence[str], budget_s: float, neighbours: int
) -> subprocess.Popen[bytes]:
    """quant_peers, with its share of the cores: one in so many `neighbours`."""
    command = [options.torch_python, "-m", "tests.proofs.quant_peers", "--out", str(out), "--device", options.device]
    command += [*flags, *_calibration(options, "--"), "--budget", str(budget_s)]
    command += ["--threads", str(max(1, (os.cpu_count() or 1) // neighbours))]
    pythons = _pythons(options)
    for name, python in pythons.items():
        command += ["--peer-python", f"{name}={python}"]
    tools = [name for name in tools if _PEER_OF[name] is None or _PEER_OF[name] in pythons]
    with out.with_name(out.name + ".log").open("wb") as log:
        return subprocess.Popen([*command, *tools], stdout=log, stderr=log)


def _pythons(options: Options) -> dict[str, Path]:
    """The peers' Pythons: those of the command line, else environments that are here already, as they are."""
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "tunegate-quant-peers"
    here = {name: cache / name / "bin/python" for name in PEERS if (cache / name / "installed").is_file()}
    return here | {name: path for name, path in options.peer_pythons.items() if name in PEERS}


def _watch(report: Report, folders: dict[str, Path], running: dict[str, subprocess.Popen[bytes]]) -> None:
    """Until all have ended: each row of figures is printed and kept as soon as it is there."""
    told: dict[str, int] = {}  # rows

    def look() -> None:
        for name, folder in folders.items():
            report.figures[name] = _figures(folder)
            for row in report.figures[name]["rows"][told.get(name, 0) :]:
                print(json.dumps(row), flush=True)
                report.keep()
            told[name] = len(report.figures[name]["rows"])

    try:
        while any(process.poll() is None for process in running.values()):
            time.sleep(_LOOK_S)
            look()
    finally:
        for process in running.values():
            end(process)
        look()


def _figures(folder: Path) -> dict[str, Any]:
    """What a proof has written so far."""
    try:
        return dict(json.loads((folder / "figures.json").read_text()))
    except FileNotFoundError:
        return {"rows": []}


def _rows(report: Report, name: str) -> dict[str, dict[str, Any]]:
    """By tool, those that ran."""
    return {row["tool"]: row for row in report.figures[name]["rows"] if "failed" not in row}


def _failed(figures: dict[str, Any]) -> dict[str, str]:
    return {row["tool"]: row["failed"] for row in figures["rows"] if "failed" in row}
