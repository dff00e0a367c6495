from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.trainer.models import make_checkpoint

# Two threads for a matrix of 64 only wait for each other; child processes inherit it. Read when torch is imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama with a ChatML template."""
    pytest.importorskip("torch", reason="needs torch")
    return make_checkpoint(tmp_path_factory.mktemp("models") / "tiny")
