"""The stages of `scripts/gpu_suite` as tests: real engines on a CUDA device, started by the gateway itself."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from backends import envs
from backends.spec import BACKEND_NAMES

ROOT = Path(__file__).parents[2]
TORCH_PYTHON = os.environ.get("TUNEGATE_TORCH_PYTHON", str(ROOT / ".venv-torch" / "bin" / "python"))

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(envs.gpu_count() == 0, reason="needs a CUDA device: the NVIDIA driver lists none"),
]


@pytest.fixture(scope="session")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the stages keep results; TUNEGATE_GPU_OUT keeps them from run to run."""
    kept = os.environ.get("TUNEGATE_GPU_OUT")
    return Path(kept) if kept else tmp_path_factory.mktemp("gpu")


def passes(out: Path, stage: str) -> None:
    """Run the stage after those that it needs; every check of it must have passed."""
    command = [sys.executable, "-m", "scripts.gpu_suite", "--out", str(out), "--torch-python", TORCH_PYTHON, stage]
    subprocess.run(command, cwd=ROOT, check=False)
    result = json.loads((out / "results.json").read_text())["stages"][stage]
    assert result["status"] == "ok", "\n".join(result["why"])


def needs(engine: str) -> None:
    """Skip where the engine's CUDA environment is not installed."""
    env = envs.lookup(engine, None, "cuda")
    if env.state() is not envs.State.READY:
        pytest.skip(f"{env} is {env.state()}; run: {env.install_command}")


@pytest.mark.parametrize("engine", BACKEND_NAMES)
def test_main_job(out: Path, engine: str) -> None:
    needs(engine)
    passes(out, f"main-{engine}")


@pytest.mark.parametrize("form", ["awq", "gptq"])
@pytest.mark.parametrize("engine", BACKEND_NAMES)
def test_quantized_checkpoint(out: Path, engine: str, form: str) -> None:
    needs(engine)
    passes(out, f"quant-{engine}-{form}")


def test_demo_in_four_bits(out: Path) -> None:
    needs("vllm")
    passes(out, "quant-vllm-demo")


@pytest.mark.skipif(envs.gpu_count() < 2, reason="needs 2 CUDA devices")
@pytest.mark.parametrize("engine", BACKEND_NAMES)
def test_on_two_gpus(out: Path, engine: str) -> None:
    needs(engine)
    passes(out, f"parallel-{engine}")
