"""`gateway train merge`: what it cannot merge it says in one line."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from gateway.cli.train import train
from tests.support.checkpoints import write_checkpoint
from tests.support.peft_files import TINY, Adapter, write_adapter


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """A finished run, as far as a merge goes by it."""
    base, finished = tmp_path / "base", tmp_path / "run"
    write_checkpoint(base, TINY)
    write_adapter(finished / "adapter", TINY, Adapter())
    hashes = {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in base.glob("*.safetensors")}
    (finished / "adapter" / "manifest.json").write_text(json.dumps({"base": {"weight_files": hashes}}))
    (finished / "run.json").write_text(json.dumps({"model": str(base)}))
    return finished


def refusal(run_dir: Path, out: Path) -> str:
    refused = CliRunner().invoke(train, ["merge", str(run_dir), "--out", str(out)])
    assert isinstance(refused.exception, SystemExit) and refused.exit_code == 1, refused.output
    return refused.output


@pytest.mark.parametrize("record", ["run.json", "adapter/manifest.json"])
@pytest.mark.parametrize("text", ["{", "{}", "[]"])
def test_a_record_that_no_run_wrote(run_dir: Path, tmp_path: Path, record: str, text: str) -> None:
    (run_dir / record).write_text(text)
    assert f"{run_dir / record} is not as a run leaves it" in refusal(run_dir, tmp_path / "merged")


def test_a_place_that_cannot_be_written(run_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    out = tmp_path / "file" / "merged"
    assert f"{out} cannot be written: " in refusal(run_dir, out)
    done = CliRunner().invoke(train, ["merge", str(run_dir), "--out", str(tmp_path / "merged")])
    assert done.exit_code == 0, done.output
