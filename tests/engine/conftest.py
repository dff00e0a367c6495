"""The real engines and the judge. Each engine is started once a session, through `gateway serve`."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from gateway import models
from tests.support.gateway import Gateway, gateway

ROOT = Path(__file__).parents[2]
ORACLE_PYTHON = ROOT / ".venv-torch" / "bin" / "python"
START_TIMEOUT_S = 300


@dataclass(frozen=True)
class Oracle:
    """What peft on transformers answers, and the adapters it made."""

    directory: Path
    expected: dict[str, dict[str, str]]  # "base" or adapter -> prompt -> greedy answer

    def adapter(self, name: str) -> Path:
        return self.directory / name


@pytest.fixture(scope="session")
def demo_model() -> Path:
    return models.resolve("demo")


@pytest.fixture(scope="session")
def oracle(demo_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Oracle:
    directory = tmp_path_factory.mktemp("oracle")
    subprocess.run(
        [ORACLE_PYTHON, Path(__file__).with_name("oracle.py"), demo_model, directory], check=True, timeout=600
    )
    return Oracle(directory, json.loads((directory / "expected.json").read_text()))


@pytest.fixture(scope="session")
def odd_oracle(demo_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Oracle:
    """Adapters that engines read in different ways as they are, each with golden prompts."""
    directory = tmp_path_factory.mktemp("odd-oracle")
    script = Path(__file__).with_name("odd_oracle.py")
    environment = os.environ | {"OMP_WAIT_POLICY": "PASSIVE"}
    subprocess.run([ORACLE_PYTHON, script, demo_model, directory], check=True, timeout=600, env=environment)
    return Oracle(directory, json.loads((directory / "expected.json").read_text()))


@pytest.fixture(scope="session", params=["vllm", "sglang"])
def served(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    """A gateway over the real engine, in float32: the demo model's logits lie too close together for bfloat16."""
    with gateway(
        *("--backend", request.param, "--device", "cpu", "--dtype", "float32", "--max-model-len", "2048"),
        *("--trainer-python", str(ORACLE_PYTHON)),
        state=tmp_path_factory.mktemp(request.param),
        ready_timeout_s=START_TIMEOUT_S,
    ) as running:
        yield running
