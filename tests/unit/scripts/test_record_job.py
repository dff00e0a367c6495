"""The suite's recordings, with an emulator in the engine's place."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from scripts.gpu_suite import record_job
from scripts.gpu_suite.report import Report
from scripts.gpu_suite.serving import Engine
from scripts.recorder.setups import ON_CUDA, Setup
from tests.support.checkpoints import write_checkpoint
from tests.support.peft_files import Shapes


@pytest.fixture
def emulated(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An emulator for the engine; returns a checkpoint that it takes."""
    command = (sys.executable, "-m", "backends.emulator", "--as", "vllm")
    monkeypatch.setattr("backends.envs.executable", lambda env: command)
    monkeypatch.setattr(record_job, "_version", lambda *given: "1.2.3")
    shapes = Shapes(hidden=64, layers=1, heads=2, kv_heads=2, intermediate=128, head_dim=32)
    return write_checkpoint(tmp_path / "model", shapes, {"max_position_embeddings": 8192})


def setups(*names: str) -> dict[str, list[Setup]]:
    return {"vllm": [setup for setup in ON_CUDA["vllm"] if setup.name in names]}


def test_records_what_it_can(emulated: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(record_job, "ON_CUDA", setups("plain", "start_unknown_flag"))
    report = Report("record-vllm")
    record_job.record_job(report, Engine("vllm", "cuda"), emulated, tmp_path)
    [failed] = report.failures
    assert failed.startswith("recorded: flags: FileNotFoundError")  # no engine is installed
    assert report.figures["plain"]["answers"] == {"tools_off": 11, "lora_off": 2}
    assert report.figures["start_unknown_flag"]["exit_code"] == 2
    recorded = json.loads((tmp_path / "vllm" / "lora_off.json").read_text())
    assert {recorded[key] for key in ("engine", "version", "device")} == {"vllm", "1.2.3", report.figures["device"]}
    assert recorded["cases"]["load_without_lora"]["response"]["status"] == 404
    differences = (tmp_path / "vllm-differences.txt").read_text()
    assert "lora_off" not in differences and report.figures["differences"] > 0


def test_ends_in_time(emulated: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A start that hangs is ended with the recording; what is not whole is not written."""
    [plain] = setups("plain")["vllm"]
    slow = replace(plain, env={"TUNEGATE_EMULATOR": json.dumps({"startup_s": 600})})
    monkeypatch.setattr(record_job, "ON_CUDA", {"vllm": [slow]})
    monkeypatch.setattr(record_job, "LIMIT_S", 1.0)
    report = Report("record-vllm")
    record_job.record_job(report, Engine("vllm", "cuda"), emulated, tmp_path)
    assert any(failure.startswith("recorded: plain: TimeoutError") for failure in report.failures)
    assert not list((tmp_path / "vllm").glob("*.json"))
