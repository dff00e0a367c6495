"""What the trainer's stages make of what they see, and how they end what they started."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import pytest

from backends import proctree
from scripts.gpu_suite import programs, train_grpo_job
from scripts.gpu_suite.stages import Options
from scripts.gpu_suite.train_job import TRAIN_STAGES, compared, python_of


def test_the_first_of_ours_is_compared_with_every_other_row() -> None:
    rows = {
        "ours, packed": {"trainer": "ours", "tokens_per_s": 12000},
        "trl": {"trainer": "trl-liger", "tokens_per_s": 4000},
        "ours, unpacked": {"trainer": "ours", "tokens_per_s": 3000},
    }
    assert compared(rows) == {"trl": 3.0, "ours, unpacked": 4.0}
    assert compared({"trl": rows["trl"]}) == {}


def test_a_peers_python_is_the_one_given_or_one_that_is_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    options = Options(out=tmp_path, torch_python="python-torch", peer_pythons={"trl": Path("/there")})
    assert python_of(options, "ours") == Path("python-torch")
    assert python_of(options, "trl-liger") == Path("/there")
    with pytest.raises(LookupError, match="give --peer-python unsloth=PATH"):
        python_of(options, "unsloth")
    home = tmp_path / "tunegate-train-peers" / "unsloth"
    home.mkdir(parents=True)
    (home / "installed").touch()
    assert python_of(options, "unsloth") == home / "bin/python"


def test_figures_of_a_run_that_learns_from_rewards() -> None:
    events = [
        {"type": "started", "time": 0.0, "step": 0},
        {"type": "eval", "time": 1.0, "step": 0, "reward": 0.1},
        {"type": "step", "time": 3.0, "step": 1, "reward": 0.2, "sampler_gap": 0.01},
        {"type": "step", "time": 5.5, "step": 2, "reward": 0.3},
        {"type": "eval", "time": 6.0, "step": 2, "reward": 0.4},
    ]
    found = train_grpo_job.figures(events)
    assert found["held-out reward"] == [(0, 0.1), (2, 0.4)]
    assert (found["steps"], found["step_s, median"], found["run_s"]) == (2, 2.5, 6.0)
    assert found["widest sampler gap"] == 0.01


def test_a_program_past_its_limit_is_ended_with_what_it_started(tmp_path: Path) -> None:
    """Whatever session that is in."""
    code = (
        "import pathlib, subprocess, sys, time\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'], start_new_session=True)\n"
        f"pathlib.Path({str(tmp_path / 'pid')!r}).write_text(str(child.pid))\n"
        "print('so far', flush=True)\n"
        "time.sleep(600)\n"
    )
    pid = tmp_path / "pid"
    with pytest.raises(programs.Ended, match=r"(?s)not through in its time.*so far"):
        programs.run([sys.executable, "-c", code], tmp_path / "log", 3.0)
    assert proctree.start_ticks(int(pid.read_text())) is None


def test_a_program_is_killed_once_what_was_waited_for_is_there(tmp_path: Path) -> None:
    seen = tmp_path / "seen"
    code = f"import pathlib, time; pathlib.Path({str(seen)!r}).touch(); time.sleep(600)"
    started = time.monotonic()
    assert programs.run([sys.executable, "-c", code], tmp_path / "log", 60.0, kill_when=seen.exists)
    assert time.monotonic() - started < 60
    assert not programs.run([sys.executable, "-c", ""], tmp_path / "log", 60.0, kill_when=seen.with_name("x").exists)
    with pytest.raises(programs.Ended, match="exit status 3"):
        programs.run([sys.executable, "-c", "raise SystemExit(3)"], tmp_path / "log", 60.0, {"A": os.sep})


def test_every_stage_has_room_between_its_estimate_and_its_limit() -> None:
    assert all(stage.estimate_s < stage.limit_s and stage.name == name for name, stage in TRAIN_STAGES.items())
