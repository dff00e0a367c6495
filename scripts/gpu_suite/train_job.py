"""The trainer beside its peers on one GPU, and the table of all its stages.

Every tool is a process of `tests.proofs.train_speed`, which makes the same model in each; they run one after the other
on the same GPU, those that matter most first, and one that fails or takes too long leaves the others alone.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scripts.gpu_suite import machine
from scripts.gpu_suite.programs import Ended, run
from scripts.gpu_suite.report import Report
from scripts.gpu_suite.stages import Options, StageSpec
from scripts.gpu_suite.train_grpo_job import grpo
from scripts.gpu_suite.train_ranks_job import nccl

_TOOL_LIMIT_S = 170.0
_LEAST_S = 25.0  # no tool gets anywhere in less
_CHECKPOINT_BYTES = 18e9
_WIDE_BYTES = 100e9  # of a GPU, on which peers get 16 padded conversations to a forward pass; else 8
_OURS = "ours"
_PYTHON_OF = {"trl": "trl", "trl-liger": "trl", "unsloth": "unsloth", "ms-swift": "ms-swift"}
_TINY = ("--tiny", "--tokens", "128", "--steps", "4", "--warmup", "2", "--batch", "8", "--accumulation", "2")


@dataclass(frozen=True)
class Tool:
    """A row of a table."""

    name: str
    trainer: str
    flags: tuple[str, ...] = ()


_FULL = (
    Tool("ours", _OURS, ("--compile",)),
    Tool("unsloth", "unsloth"),
    Tool("ms-swift", "ms-swift"),
    Tool("trl-liger", "trl-liger"),
)
_CONVERSATIONS = (
    Tool("ours, packed", _OURS, ("--compile", "--steps", "8", "--warmup", "4")),
    Tool("unsloth, its default", "unsloth"),
    Tool("ms-swift, padded", "ms-swift"),
    Tool("trl-liger, padded", "trl-liger"),
    Tool("unsloth, packed", "unsloth", ("--pack", "--steps", "10", "--warmup", "4")),
    Tool("ours, unpacked", _OURS, ("--compile", "--no-packing", "--batch", "24")),
    Tool("trl-liger, packed", "trl-liger", ("--pack", "--steps", "10", "--warmup", "4")),
)
_FOUR_BIT = (
    Tool("ours", _OURS, ("--compile",)),
    Tool("unsloth", "unsloth"),
    Tool("ours, checkpointing", _OURS, ("--compile", "--checkpointing", "--sequences", "1")),
    Tool("unsloth, checkpointing", "unsloth", ("--checkpointing", "--sequences", "1")),
)


def speed(report: Report, options: Options, out: Path) -> None:
    """Full rows of 4096 tokens: what is left is the speed of a step."""
    _table(report, options, out, _FULL, ("--steps", "12"), 400)


def packing(report: Report, options: Options, out: Path) -> None:
    """Conversations as they come in practice: tokens that are no padding."""
    found = machine.gpus() if options.device == "cuda" else []
    wide = bool(found) and found[0].memory_bytes > _WIDE_BYTES
    common = ("--rows", "conversations", "--steps", "5", "--warmup", "2", "--accumulation", "8" if wide else "16")
    _table(report, options, out, _CONVERSATIONS, common, 620)


def qlora(report: Report, options: Options, out: Path) -> None:
    """A base of four bits."""
    _table(report, options, out, _FOUR_BIT, ("--four-bit", "--steps", "8"), 300)


def _table(
    report: Report, options: Options, out: Path, tools: Sequence[Tool], common: Sequence[str], budget_s: float
) -> None:
    """One tool after the other, each row told as soon as it is there; then how ours compares."""
    until = time.monotonic() + budget_s
    rows: dict[str, dict[str, Any]] = report.figures.setdefault("rows", {})
    for tool in tools:
        with report.check(f"{tool.name} ran"):
            left_s = until - time.monotonic()
            assert left_s > _LEAST_S, f"not begun: {budget_s:g} s of this stage are over"
            rows[tool.name] = _row(options, out, tool, common, min(_TOOL_LIMIT_S, left_s))
            shown = {key: rows[tool.name][key] for key in ("tokens_per_s", "mfu", "peak_gb", "step_s", "first_step_s")}
            print(f"{report.stage}: {tool.name}: {json.dumps(shown)}", flush=True)
            report.figures["ours beside the others"] = compared(rows)


def compared(rows: dict[str, dict[str, Any]]) -> dict[str, float]:
    """Our first row's tokens a second, as a multiple of each of the others'."""
    ours = next((row for row in rows.values() if row["trainer"] == _OURS), None)
    others = {name: row for name, row in rows.items() if row is not ours}
    return {name: round(ours["tokens_per_s"] / row["tokens_per_s"], 3) for name, row in others.items()} if ours else {}


def _row(options: Options, out: Path, tool: Tool, common: Sequence[str], limit_s: float) -> dict[str, Any]:
    """What one tool printed. Raises Ended, LookupError."""
    name = tool.name.replace(", ", "-").replace(" ", "-")
    figures = out / f"{name}.json"
    command = [str(python_of(options, tool.trainer)), "-m", "tests.proofs.train_speed", "--trainer", tool.trainer]
    command += [*common, *tool.flags, "--json", str(figures), "--checkpoint", str(_kept(options))]
    if options.device == "cpu":  # where compiling takes minutes
        command = [*(part for part in command if part != "--compile"), *_TINY]
    # Unsloth writes code into the working directory, which two stages at a time would share.
    own = {"UNSLOTH_COMPILE_LOCATION": str(out / f"{name}-code"), "UNSLOTH_DISABLE_STATISTICS": "1"}
    run(command, out / f"{name}.log", limit_s, own)
    if not figures.exists():
        raise Ended(f"{tool.name} ended without figures")
    return dict(json.loads(figures.read_text().splitlines()[-1]))


def python_of(options: Options, trainer: str) -> Path:
    """The Python of a trainer: of the command line, or of an environment that is here. Raises LookupError."""
    if trainer == _OURS:
        return Path(options.torch_python)
    peer = _PYTHON_OF[trainer]
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "tunegate-train-peers" / peer
    found = options.peer_pythons.get(peer) or (cache / "bin/python" if (cache / "installed").is_file() else None)
    if found is None:
        raise LookupError(f"no Python of {peer}: give --peer-python {peer}=PATH")
    return found


def _kept(options: Options) -> Path:
    """Where the random checkpoint lies that some peers load: in memory where there is room."""
    memory = Path("/dev/shm")
    room = memory.is_dir() and shutil.disk_usage(memory).free > _CHECKPOINT_BYTES
    folder = memory / "tunegate-train-speed" if room else options.made("train-speed")
    return folder.with_name(folder.name + ("-tiny" if options.device == "cpu" else ""))


TRAIN_STAGES: dict[str, StageSpec] = {
    spec.name: spec
    for spec in (
        StageSpec("train-speed", speed, 270, 430),
        StageSpec("train-packing", packing, 520, 700),
        StageSpec("train-grpo", grpo, 180, 420, share=0.3, engines=("vllm",), demo=True),
        StageSpec("train-qlora", qlora, 260, 400),
        StageSpec("train-nccl", nccl, 390, 560, gpus=2, demo=True),
    )
}
