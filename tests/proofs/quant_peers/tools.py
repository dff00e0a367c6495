"""What is compared: this quantizer, and two others, each in an environment of its own."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.proofs.environments import environment

_HERE = Path(__file__).parent
_COMMON = ("torch==2.13.0", "transformers==5.17.0", "accelerate==1.15.0", "datasets==4.8.4")
PEERS: dict[str, tuple[str, ...]] = {
    "gptqmodel": ("gptqmodel==7.3.6", *_COMMON),
    "llmcompressor": ("llmcompressor==0.14.0.1", *_COMMON),
}


@dataclass(frozen=True)
class Tool:
    """One row of the table. peer: its environment, None for ours. settings: what its program is told."""

    name: str
    title: str
    grid: str
    peer: str | None
    settings: dict[str, Any]


TOOLS = (
    Tool("ours-rtn", "rtn", "zero points", None, {"method": "rtn", "format": "awq"}),
    Tool("ours-awq", "awq", "zero points", None, {"method": "awq", "format": "awq"}),
    Tool("ours-gptq", "gptq", "symmetric", None, {"method": "gptq", "format": "gptq"}),
    Tool("gptqmodel", "GPTQModel GPTQ", "symmetric", "gptqmodel", {"mse": 0.0}),
    Tool("gptqmodel-mse", "GPTQModel GPTQ, ranges searched (mse=2.4)", "symmetric", "gptqmodel", {"mse": 2.4}),
    Tool("llmc-gptq", "llm-compressor GPTQ", "symmetric", "llmcompressor", {"method": "gptq", "observer": None}),
    Tool(
        "llmc-gptq-mse",
        "llm-compressor GPTQ, ranges searched (observer mse)",
        "symmetric",
        "llmcompressor",
        {"method": "gptq", "observer": "mse"},
    ),
    Tool("llmc-awq", "llm-compressor AWQ", "zero points", "llmcompressor", {"method": "awq", "observer": None}),
)


def command(
    tool: Tool, model: Path, out: Path, tokens_file: Path, samples: int, length_tokens: int, group_size: int
) -> list[str]:
    """The command that quantizes `model` into `out`. tokens_file: rows of ids, for those that cannot draw them.

    Raises NotHere.
    """
    if tool.peer is None:
        return [
            sys.executable, "-m", "quant", "--method", tool.settings["method"], "--format", tool.settings["format"],
            "--model", str(model), "--out", str(out), "--device", "cpu", "--group-size", str(group_size),
            "--calib-samples", str(samples), "--calib-tokens", str(length_tokens),
        ]  # fmt: skip
    job = {"model": str(model), "out": str(out), "tokens": str(tokens_file), "group_size": group_size, **tool.settings}
    program = _HERE / f"run_{tool.peer}.py"
    return [str(python_of(tool.peer)), str(program), json.dumps(job)]


def python_of(peer: str) -> Path:
    """The Python of a peer's environment, which is made where there is none. Raises NotHere."""
    return environment(f"tunegate-quant-peers/{peer}", PEERS[peer]) / "bin/python"
