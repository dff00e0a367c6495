"""What is compared: this quantizer, and two others, each in an environment of its own."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tests.proofs.environments import environment

_HERE = Path(__file__).parent
_COMMON = ("torch==2.13.0", "transformers==5.17.0", "accelerate==1.15.0", "datasets==4.8.4")
PEERS: dict[str, tuple[str, ...]] = {
    "gptqmodel": ("gptqmodel==7.3.6", *_COMMON),
    "llmcompressor": ("llmcompressor==0.14.0.1", *_COMMON),
}
ZEROS, SYMMETRIC = "zero points", "symmetric"


@dataclass(frozen=True)
class Tool:
    """One row of the table. peer: its environment, None for ours. settings: what its program is told."""

    name: str
    title: str
    grid: str
    peer: str | None
    settings: dict[str, Any]


def _ours(method: str, form: str, grid: str) -> Tool:
    name = f"ours-{method}" if form == ("gptq" if method == "gptq" else "awq") else f"ours-{method}-{form}"
    return Tool(name, f"{method}, {form} layout", grid, None, {"method": method, "format": form})


def _gptqmodel(name: str, title: str, grid: str, method: str, mse: float = 0.0) -> Tool:
    return Tool(name, f"GPTQModel {title}", grid, "gptqmodel", {"method": method, "mse": mse})


def _llmc(name: str, title: str, grid: str, method: str, observer: str | None = None) -> Tool:
    return Tool(name, f"llm-compressor {title}", grid, "llmcompressor", {"method": method, "observer": observer})


# The slowest are last: where time is short, they are what is missed.
TOOLS = (
    _ours("rtn", "awq", ZEROS),
    _ours("awq", "awq", ZEROS),
    _ours("gptq", "gptq", SYMMETRIC),
    _llmc("llmc-gptq", "GPTQ", SYMMETRIC, "gptq"),
    _gptqmodel("gptqmodel", "GPTQ", SYMMETRIC, "gptq"),
    _llmc("llmc-awq", "AWQ", ZEROS, "awq"),
    _gptqmodel("gptqmodel-awq", "AWQ", ZEROS, "awq"),
    _llmc("llmc-gptq-mse", "GPTQ, ranges searched (observer mse)", SYMMETRIC, "gptq", "mse"),
    _gptqmodel("gptqmodel-mse", "GPTQ, ranges searched (mse=2.4)", SYMMETRIC, "gptq", 2.4),
    _ours("rtn", "gptq", SYMMETRIC),
    _ours("awq", "gptq", SYMMETRIC),
    _ours("gptq", "awq", ZEROS),
)


@dataclass(frozen=True)
class Job:
    """One quantization, the same for every tool."""

    model: str
    out: str
    tokens: str  # file of rows of ids, for those that cannot draw them
    samples: int
    length_tokens: int
    group_size: int
    device: str  # cpu or cuda


def command(tool: Tool, job: Job, pythons: Mapping[str, Path]) -> list[str]:
    """The command that does a job by a tool. pythons: of peers that are here already. Raises NotHere."""
    if tool.peer is None:
        return [
            sys.executable, "-m", "quant", "--method", tool.settings["method"], "--format", tool.settings["format"],
            "--model", job.model, "--out", job.out, "--device", job.device, "--group-size", str(job.group_size),
            "--calib-samples", str(job.samples), "--calib-tokens", str(job.length_tokens),
        ]  # fmt: skip
    program = _HERE / f"run_{tool.peer}.py"
    return [str(python_of(tool.peer, pythons)), str(program), json.dumps(asdict(job) | tool.settings)]


def python_of(peer: str, pythons: Mapping[str, Path]) -> Path:
    """The Python of a peer: the one given, or of its environment, made where there is none. Raises NotHere."""
    return pythons.get(peer) or environment(f"tunegate-quant-peers/{peer}", PEERS[peer]) / "bin/python"
