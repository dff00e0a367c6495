"""Stages as processes: scripts/gpu_suite/runner.py with stages that are one line of Python."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from backends import proctree
from scripts.gpu_suite import runner
from scripts.gpu_suite.runner import Suite
from scripts.gpu_suite.stages import Options, StageSpec
from tests.support.wait import eventually

SAVE = "import json, os; json.dump({'stage': NAME, 'ok': OK, 'figures': {'gpus': os.environ['CUDA_VISIBLE_DEVICES']}, "
SAVE += "'checks': [{'check': 'it', 'ok': OK, 'failure': 'no'}]}, open(f'{OUT}/{NAME}.json', 'w'))"
HANG = "import subprocess, sys, time; c = [sys.executable, '-c', 'import time; time.sleep(600)']; "
HANG += "p = subprocess.Popen(c, start_new_session=True); open(f'{OUT}/pid', 'w').write(str(p.pid)); time.sleep(600)"


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "_POLL_S", 0.02)
    monkeypatch.setattr(runner, "_GRACE_S", 0.3)
    monkeypatch.setattr(signal, "signal", lambda *_: None)


def stage(name: str, **given: Any) -> StageSpec:
    return replace(StageSpec(name, lambda *_: None, 10, 60, share=0.5), **given)


def run(out: Path, codes: dict[str, str], stages: list[StageSpec], gpus: int = 1,
        until_s: float | None = None) -> dict[str, Any]:  # fmt: skip
    """Run the suite; what results.json says of the stages."""

    def command(spec: StageSpec, options: Options) -> list[str]:
        begin = f"OUT, NAME, OK = {str(options.out)!r}, {spec.name!r}, True; "
        return [sys.executable, "-c", begin + codes[spec.name]]

    out.mkdir(exist_ok=True)
    suite = Suite(stages, Options(out), [str(n) for n in range(gpus)], until_s, {"cores": 2}, command)
    passed = suite.run()
    found = json.loads((out / "results.json").read_text())
    assert found["machine"] == {"cores": 2}
    assert passed == all(row["status"] == "ok" for row in found["stages"].values())
    return dict(found["stages"])


def test_a_failure_stops_what_comes_after_it_and_nothing_else(tmp_path: Path) -> None:
    codes = {"oracle": "OK = False; " + SAVE, "main": SAVE, "bench": SAVE}
    found = run(tmp_path, codes, [stage("main", after=("oracle",)), stage("oracle"), stage("bench", gpus=2)], gpus=2)
    assert found["oracle"]["status"] == "failed"
    assert found["oracle"]["why"] == ["it: no"]
    assert found["main"] == {"status": "not run", "why": ["needs oracle, which did not pass"]}
    assert found["bench"]["status"] == "ok"
    assert found["bench"]["figures"]["gpus"] == "0,1"


def test_what_has_a_result_is_not_run_again(tmp_path: Path) -> None:
    run(tmp_path, {"oracle": SAVE}, [stage("oracle")])
    found = run(tmp_path, {"oracle": "raise SystemExit(3)"}, [stage("oracle")])
    assert found["oracle"]["status"] == "ok"
    assert run(tmp_path, {"main": SAVE}, [stage("main")]).keys() == {"oracle", "main"}, "results are of all calls"


def test_a_stage_that_dies_keeps_what_it_had_seen(tmp_path: Path) -> None:
    code = "import json; json.dump({'figures': {'a': 1}, 'checks': []}, open(f'{OUT}/{NAME}.partial.json', 'w')); "
    code += "print('oh'); exit(7)"
    found = run(tmp_path, {"oracle": code}, [stage("oracle")])["oracle"]
    assert found["status"] == "failed"
    assert found["figures"] == {"a": 1}
    assert found["why"] == ["the stage ran to its end: its process ended with status 7"]
    assert found["log_end"] == "oh\n"


def test_waiting_for_a_turn_does_not_count(tmp_path: Path) -> None:
    waits = "import pathlib, time; mark = pathlib.Path(OUT, NAME + '.waits'); mark.touch(); time.sleep(2); "
    found = run(tmp_path, {"bench": waits + "mark.unlink(); " + SAVE}, [stage("bench", limit_s=1.5)])
    assert found["bench"]["status"] == "ok"


def test_a_stage_over_its_limit_ends_with_all_that_it_started(tmp_path: Path) -> None:
    found = run(tmp_path, {"slow": HANG, "next": SAVE}, [stage("slow", limit_s=1.0, share=1.0), stage("next")])
    assert found["slow"]["why"] == ["the stage ran to its end: ended after its limit of 1 s"]
    assert found["next"]["status"] == "ok"
    assert proctree.start_ticks(int((tmp_path / "pid").read_text())) is None


def test_until_and_files_that_never_come(tmp_path: Path) -> None:
    missing = stage("peers", files=lambda options: [options.out / "nowhere"])
    found = run(tmp_path / "a", {"peers": SAVE}, [missing])
    assert found["peers"]["why"] == [f"waits for {tmp_path / 'a' / 'nowhere'}"]
    found = run(tmp_path / "b", {"late": SAVE, "quick": SAVE}, [stage("late"), stage("quick", estimate_s=1)], until_s=5)
    assert found["late"]["status"] == "not run"
    assert found["quick"]["status"] == "ok"


def test_a_file_that_comes_later(tmp_path: Path) -> None:
    timer = threading.Timer(0.5, (tmp_path / "tool").touch)
    timer.start()
    waiting = stage("peers", estimate_s=1, files=lambda options: [options.out / "tool"])
    assert run(tmp_path, {"peers": SAVE}, [waiting], until_s=30)["peers"]["status"] == "ok"


def in_order_of_beginning(out: Path) -> list[str]:
    """Four stages that take the only GPU whole; two wait for a tool, which either of the others brings."""
    stages = [stage("weights", estimate_s=1, share=1.0, files=lambda options: [options.out / "tool"])]
    stages += [stage("bench", estimate_s=1, share=1.0, after=("weights",))]
    stages += [stage("train", estimate_s=50, share=1.0), stage("quick", estimate_s=0, share=1.0)]
    bring = "open(f'{OUT}/tool', 'w').close(); " + SAVE
    found = run(out, {"weights": SAVE, "bench": SAVE, "train": bring, "quick": bring}, stages, until_s=500)
    return sorted(found, key=lambda name: found[name]["began_s"])


def test_what_is_brought_finds_its_place_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "_BROUGHT_S", 30.0)
    assert in_order_of_beginning(tmp_path) == ["quick", "weights", "bench", "train"]


def test_it_is_not_kept_for_ever(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "_BROUGHT_S", 0.0)
    assert in_order_of_beginning(tmp_path)[0] == "train"


def test_sigterm_ends_every_stage(tmp_path: Path) -> None:
    """The whole command line, ended while a stage runs."""
    environment = os.environ | {"TUNEGATE_HOME": str(tmp_path / "home")}
    command = [sys.executable, "-m", "scripts.gpu_suite", "--device", "cpu", "--out", str(tmp_path / "out")]
    command += ["--torch-python", str(tmp_path / "python"), "--model", str(checkpoint(tmp_path / "model")), "weights"]
    (tmp_path / "python").write_text(
        f"#!{sys.executable}\nimport sys, time\ntime.sleep(600 * ('-c' not in sys.argv))\n"
    )
    (tmp_path / "python").chmod(0o755)
    with (tmp_path / "said").open("w") as said:
        suite = subprocess.Popen(command, env=environment, stdout=said, stderr=said)
    results = tmp_path / "out" / "results.json"
    try:
        eventually(lambda: results.exists() and len(proctree.descendants(suite.pid)) >= 2, 60)
        below = {pid: proctree.start_ticks(pid) for pid in proctree.descendants(suite.pid)}
    finally:
        suite.send_signal(signal.SIGTERM)
    assert suite.wait(60) == 1, (tmp_path / "said").read_text()
    eventually(lambda: all(proctree.start_ticks(pid) != ticks for pid, ticks in below.items()), 10)
    assert json.loads(results.read_text())["stages"]["weights"]["why"][-1].endswith("the suite was told to stop")
    assert not (tmp_path / "out" / "weights.json").exists(), "it is run again by the next call"


def checkpoint(folder: Path) -> Path:
    """What passes for a model that is here."""
    folder.mkdir()
    for name in ("config.json", "tokenizer.json", "model.safetensors"):
        (folder / name).write_text("{}")
    return folder
