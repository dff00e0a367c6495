"""The numbers of a run in TensorBoard's and W&B's own files, as they stand in events.jsonl."""

from __future__ import annotations

import time
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from tests.trainer.models import chat_rows, write_jsonl
from trainer import config, extras
from trainer.errors import ConfigError
from trainer.events import EventLog, curve
from trainer.reporters import numbers, open_reporters


class Broken:
    """A reporter that has lost its disk."""

    def __init__(self) -> None:
        self.asked = 0

    def write(self, event: dict[str, Any]) -> None:
        self.asked += 1
        raise OSError("no space left")

    def close(self) -> None:
        raise AssertionError("it was let go of before")


def test_what_can_be_drawn_of_an_event() -> None:
    step = {"time": 1.5, "type": "step", "step": 3, "loss": 0.5, "grad_norm": None, "epoch": 1}
    assert numbers(step) == {"train/loss": 0.5, "train/epoch": 1}
    assert numbers({"time": 1.5, "type": "eval", "step": 3, "loss": 0.25}) == {"eval/loss": 0.25}
    assert numbers({"time": 1.5, "type": "checkpoint", "step": 3, "path": "x"}) == {}


def test_a_reporter_that_fails_costs_no_training(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    reporter = Broken()
    log = EventLog(tmp_path / "events.jsonl", [reporter])
    log.write("step", step=1, loss=0.5)
    log.write("step", step=2, loss=0.25)
    log.close()
    assert reporter.asked == 1 and "no more numbers go to Broken: no space left" in capsys.readouterr().err
    assert curve(tmp_path / "events.jsonl") == {1: 0.5, 2: 0.25}


def test_a_missing_package_is_named_before_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extras.importlib.util, "find_spec", lambda name: None)
    asked = {"model": "m", "dataset": ["/d.jsonl"], "output_dir": tmp_path, "report_to": "wandb"}
    with pytest.raises(ConfigError, match="report_to"):
        config.load("sft", None, asked)
    with pytest.raises(ConfigError, match=r"needs wandb: pip install 'tunegate\[wandb\]'"):
        extras.require_for(config.load("sft", None, asked | {"report_to": ["wandb"]}))


def tell(config_: config.TrainConfig, start: str, steps: list[int]) -> Path:
    """The log of one start of a run, with an evaluation at its end; reporters hear it too."""
    file = config_.output_dir / "events.jsonl"
    file.parent.mkdir(exist_ok=True)
    with closing(EventLog(file, open_reporters(config_))) as log:
        log.write(start, step=steps[0] - 1, total_steps=4)
        for step in steps:
            log.write("step", step=step, loss=len(start) / step, grad_norm=None)
        log.write("eval", step=steps[-1], loss=0.25)
    return file


def asking(tmp_path: Path, reporter: str) -> config.TrainConfig:
    asked = {"model": "m", "dataset": ["d.jsonl"], "output_dir": tmp_path / "run", "report_to": [reporter]}
    return config.load("sft", None, asked)


@pytest.mark.filterwarnings("ignore")
def test_tensorboard_reads_the_curves_back(tmp_path: Path) -> None:
    pytest.importorskip("torch", reason="needs torch")
    pytest.importorskip("tensorboard", reason="needs tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run_config = asking(tmp_path, "tensorboard")
    tell(run_config, "started", [1, 2, 3])  # killed; its last checkpoint is of step 2
    events = tell(run_config, "resumed", [3, 4])
    read = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    read.Reload()
    for tag, kind in (("train/loss", "step"), ("eval/loss", "eval")):
        shown = {scalar.step: scalar.value for scalar in read.Scalars(tag)}
        assert shown == pytest.approx(curve(events, kind) if kind == "step" else {4: 0.25})


@pytest.mark.filterwarnings("ignore")
def test_wandb_keeps_the_run_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb", reason="needs wandb")
    for name, value in {"MODE": "offline", "SILENT": "true", "CACHE_DIR": str(tmp_path / "cache")}.items():
        monkeypatch.setenv(f"WANDB_{name}", value)
    tell(asking(tmp_path, "wandb"), "started", [1, 2])
    (kept,) = (tmp_path / "run" / "wandb").glob("offline-run-*/run-*.wandb")
    assert kept.stem == f"run-{(tmp_path / 'run' / 'wandb-id').read_text()}"
    deadline_s = time.monotonic() + 30  # the package's own service writes the file, in its own time
    while not (b"train/loss" in kept.read_bytes() and b"eval/loss" in kept.read_bytes()):
        assert time.monotonic() < deadline_s, kept.read_bytes()
        time.sleep(0.05)


def test_a_run_tells_its_reporters(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from trainer import run

    heard: list[str] = []

    class Listener:
        def write(self, event: dict[str, Any]) -> None:
            heard.append(event["type"])

        def close(self) -> None:
            heard.append("closed")

    monkeypatch.setattr(run, "open_reporters", lambda config_: [Listener()])
    settings = {
        "model": str(checkpoint),
        "device": "cpu",
        "dataset": [write_jsonl(tmp_path / "train.jsonl", chat_rows(8))],
        "output_dir": tmp_path / "run",
        "batch_size": 4,
        "golden_prompts": 0,
    }
    run.start(config.load("sft", None, settings))
    assert heard == ["started", "step", "step", "finished", "closed"]
