"""What is compared: this quantizer, and two others, each in an environment that this module makes where there is none.

The others' environments are kept in a cache folder of the user's, never in the project's own. Installing goes through
pip, so that its configuration (mirrors, folders of wheels such as torch's for CPUs) counts.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ENVIRONMENTS = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "tunegate-quant-peers"
_HERE = Path(__file__).parent
_COMMON = ("torch==2.13.0", "transformers==5.17.0", "accelerate==1.15.0", "datasets==4.8.4")
PEERS: dict[str, tuple[str, ...]] = {
    "gptqmodel": ("gptqmodel==7.3.6", *_COMMON),
    "llmcompressor": ("llmcompressor==0.14.0.1", *_COMMON),
}


class NotHere(Exception):
    """A peer cannot be installed on this machine; the text says why."""


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
    """The command that quantizes `model` into `out`. tokens_file: rows of ids, for those that cannot draw them."""
    if tool.peer is None:
        return [
            sys.executable, "-m", "quant", "--method", tool.settings["method"], "--format", tool.settings["format"],
            "--model", str(model), "--out", str(out), "--device", "cpu", "--group-size", str(group_size),
            "--calib-samples", str(samples), "--calib-tokens", str(length_tokens),
        ]  # fmt: skip
    job = {"model": str(model), "out": str(out), "tokens": str(tokens_file), "group_size": group_size, **tool.settings}
    program = _HERE / f"run_{tool.peer}.py"
    return [str(ENVIRONMENTS / tool.peer / "bin/python"), str(program), json.dumps(job)]


def install(peer: str) -> None:
    """Make sure that a peer's environment is there, with the pinned versions. Raises NotHere."""
    home = ENVIRONMENTS / peer
    wanted = "\n".join(PEERS[peer])
    mark = home / "installed"
    if mark.is_file() and mark.read_text() == wanted:
        return
    steps = (
        [sys.executable, "-m", "venv", "--clear", str(home)],
        [str(home / "bin/python"), "-m", "pip", "install", "--quiet", *PEERS[peer]],
    )
    if any(subprocess.run(step).returncode for step in steps):
        raise NotHere(f"{PEERS[peer][0]} could not be installed in {home}")
    mark.write_text(wanted)


def versions(python: Path | str, packages: Sequence[str]) -> dict[str, str]:
    """Versions of installed distributions, as an environment's own Python sees them."""
    code = f"import importlib.metadata as m, json; print(json.dumps({{p: m.version(p) for p in {list(packages)!r}}}))"
    answer = subprocess.run([str(python), "-c", code], capture_output=True, text=True, check=True)
    found: dict[str, str] = json.loads(answer.stdout)
    return found
