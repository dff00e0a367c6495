"""Checkpoints made by our quantizer, on an engine: they load, on the right kernel, and answer as their weights say."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

from scripts.gpu_suite.main_job import as_reference
from scripts.gpu_suite.report import Report
from scripts.gpu_suite.serving import Engine, serving

# What vLLM's log must name: one of its fast kernels, Machete on Hopper, Marlin elsewhere. The other two name none.
FAST_KERNELS = {"vllm": "machete|marlin"}


def quantized_job(report: Report, engine: Engine, checkpoint: Path, form: str, work: Path, must_name: str) -> None:
    """Serve the checkpoint and compare. `must_name`: a pattern that the engine's log must hold."""
    expected = json.loads(checkpoint.with_suffix(".json").read_text())["base"]
    flags = (
        "--dtype",
        "bfloat16" if engine.name != "lmdeploy" else "float16",
        "--max-model-len",
        "2048",
        "--adapter-slots",
        "0",
    )
    with serving(engine, checkpoint, work / "state", *flags, name="quantized") as served, served.client() as client:
        report.figures |= {"ready_s": served.ready_s, "kernels": served.kernels(), "format": form}
        with report.check("answers as its own weights do in float32"):
            report.figures["sure_tokens"] = as_reference(client, "quantized", expected)
        with report.check(f"the engine's log names {must_name or 'its kernel'}"):
            assert re.search(must_name, served.log().lower()), report.figures["kernels"]


def make(torch_python: str, model: Path, out: Path, method: str, form: str, group_size: int) -> None:
    """Quantize with our own command and compute what must come out. Raises CalledProcessError."""
    if not out.exists():
        command = [
            torch_python,
            "-m",
            "quant",
            "--method",
            method,
            "--format",
            form,
            "--model",
            str(model),
            "--out",
            str(out),
        ]
        command += ["--group-size", str(group_size), "--calib-samples", "32"]
        subprocess.run(command, check=True, stdout=sys.stderr)
    subprocess.run(
        [torch_python, "-m", "scripts.gpu_suite.torch_side", "expect", str(out), str(out.with_suffix(".json"))],
        check=True,
    )
