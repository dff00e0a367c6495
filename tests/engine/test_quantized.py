"""The real vLLM loads all three formats, answers, and is as good as the reference dequantization says."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from backends import envs
from tests.engine.conftest import ORACLE_PYTHON, ROOT

pytestmark = [pytest.mark.engine, pytest.mark.timeout(600)]

FORMATS = ("awq", "gptq", "compressed-tensors")


@pytest.fixture(scope="module")
def directory(demo_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint a format, and expected.json."""
    made = tmp_path_factory.mktemp("quantized")
    run(ORACLE_PYTHON, "quantized_oracle.py", demo_model, made)
    return made


@pytest.fixture(scope="module")
def said(directory: Path) -> dict[str, Any]:
    """What the engine made of each format."""
    checkpoints = [directory / form for form in FORMATS]
    engine = envs.find("vllm", device="cpu")
    run(engine.python, "vllm_scores.py", directory / "expected.json", directory / "said.json", *checkpoints)
    answers: dict[str, Any] = json.loads((directory / "said.json").read_text())
    return answers


@pytest.mark.parametrize("form", FORMATS)
def test_served_perplexity_equals_the_reference(form: str, directory: Path, said: dict[str, Any]) -> None:
    expected = json.loads((directory / "expected.json").read_text())["perplexity"]
    served, answer = said[form]["perplexity"], said[form]["answer"]
    print(f"{form}: served {served:.4f}, reference {expected:.4f} ({served / expected - 1:+.3%}); answers {answer!r}")
    assert served == pytest.approx(expected, rel=0.005)  # the engine computes in bfloat16, the reference in float32
    assert "Paris" in answer


def run(python: Path, script: str, *arguments: Path) -> None:
    argv = [str(python), str(Path(__file__).with_name(script)), *map(str, arguments)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_WAIT_POLICY": "PASSIVE", "DO_NOT_TRACK": "1"}
    done = subprocess.run(argv, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
