"""Recordings of an engine on this GPU, all its starts side by side, and how they differ from the emulators' ones."""

from __future__ import annotations

import os
import subprocess
import tempfile
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from backends import envs
from backends.base import Launch
from backends.emulator.recordings import FOLDER
from backends.process import engine_environment
from scripts.gpu_suite import machine
from scripts.gpu_suite.report import Report
from scripts.gpu_suite.serving import Engine
from scripts.record_engine import Target, record, record_flags
from scripts.recorder.adapters import write_all
from scripts.recorder.compare import compare, table
from scripts.recorder.running import Running
from scripts.recorder.setups import ON_CUDA, SETUPS, Setup

LIMIT_S = 330.0  # under the stage's own; four minutes are what it should take
_START_TIMEOUT_S = 200.0
_FAILURE_TIMEOUT_S = 150.0  # SGLang does not end where its port is taken
_VERSION = "import importlib.metadata as metadata; print(metadata.version({name!r}))"


def record_job(report: Report, engine: Engine, model: Path, out: Path) -> None:
    """Record `engine` with the demo model into `out`/NAME; figures a start, and the differences, go to the report."""
    env = envs.lookup(engine.name, None, engine.device)
    command = envs.executable(env)
    environment = engine_environment(Launch(command), os.environ)
    running = Running()
    timer = threading.Timer(LIMIT_S, running.end)
    timer.daemon = True
    timer.start()
    with tempfile.TemporaryDirectory() as adapters:
        target = Target(
            engine=engine.name,
            version=_version(env, environment),
            device=_device(engine.device),
            model=model,
            command=command,
            python=(str(env.python),),
            env=environment,
            adapters=Path(adapters),
            out=out,
            start_timeout_s=_START_TIMEOUT_S,
            failure_timeout_s=_FAILURE_TIMEOUT_S,
        )
        report.figures |= {"version": target.version, "device": target.device}
        print(f"{report.stage}: {target.engine} {target.version} on {target.device}", flush=True)
        write_all(target.adapters, model)
        _record_all(report, target, running, (ON_CUDA if engine.device == "cuda" else SETUPS)[engine.name])
    timer.cancel()
    with report.check("compared with the emulator's recordings"):
        rows = compare(FOLDER / engine.name, target.folder)
        (out / f"{engine.name}-differences.txt").write_text(table(rows))
        report.figures["differences"] = len(rows)


def _record_all(report: Report, target: Target, running: Running, setups: list[Setup]) -> None:
    workers = len(setups) + 1 if target.device != "cpu" else 1
    with ThreadPoolExecutor(workers) as pool:
        recordings: dict[str, Future[dict[str, Any]]] = {
            setup.name: pool.submit(record, target, setup, running) for setup in setups
        }
        flags = pool.submit(record_flags, target)
        for name, recording in recordings.items():
            with report.check(f"recorded: {name}"):
                report.figures[name] = recording.result()
                print(f"{report.stage}: {name}: {report.figures[name]}", flush=True)
        with report.check("recorded: flags"):
            report.figures["flags"] = flags.result()


def _version(env: envs.EngineEnv, environment: dict[str, str]) -> str:
    """What the engine's own Python says; the catalogue's where it does not say."""
    command = [str(env.python), "-c", _VERSION.format(name=env.name)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)
    return done.stdout.strip() or env.version


def _device(device: str) -> str:
    if device != "cuda":
        return device
    found = machine.gpus()
    return found[0].name if found else "CUDA"
