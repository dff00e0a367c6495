"""Runs stages as processes: starts what `schedule.py` chooses, ends what is overdue, keeps DIR/results.json."""

from __future__ import annotations

import contextlib
import datetime
import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from backends import envs, proctree
from backends.base import BackendError
from gateway.config import ConfigError
from scripts.gpu_suite import quiet
from scripts.gpu_suite.report import write_json
from scripts.gpu_suite.schedule import Running, choose, soon, standing
from scripts.gpu_suite.stages import Options, StageSpec

_POLL_S = 1.0
_BROUGHT_S = 240.0  # from the beginning: so long, stages keep their places for what is brought with --until
_GRACE_S = 15.0  # from SIGTERM to SIGKILL, and for what a stage leaves behind
_TOLD_CHARACTERS = 240
_TAIL_CHARACTERS = 2000
_FIGURES_CHARACTERS = 600
_ROOT = Path(__file__).parents[2]

Command = Callable[[StageSpec, Options], list[str]]


def child_command(stage: StageSpec, options: Options) -> list[str]:
    """The process that does a stage's job."""
    return [sys.executable, "-m", "scripts.gpu_suite.child", stage.name, json.dumps(options.to_json())]


class StageProcess:
    """A stage's process, and all that it started."""

    def __init__(
        self, stage: StageSpec, gpus: tuple[int, ...], options: Options, visible: str, command: Command
    ) -> None:
        self.stage, self.gpus = stage, gpus
        self.began = self._looked = time.monotonic()
        self._waits = quiet.mark(options.out, stage.name)
        self._waits.unlink(missing_ok=True)
        self.why_ended = ""
        self._signalled_at = math.inf
        self._below: dict[int, int] = {}  # pid -> start ticks, of whatever was seen below it
        self._log = options.out / f"{stage.name}.log"
        self._told_bytes = 0
        argv = command(stage, replace(options, share=stage.share))
        with self._log.open("wb") as log:
            self.process = subprocess.Popen(argv, cwd=_ROOT, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                                            start_new_session=True,
                                            env=os.environ | {"CUDA_VISIBLE_DEVICES": visible,
                                                              "PYTHONUNBUFFERED": "1"})  # fmt: skip

    def end(self, why: str) -> None:
        """Ask the whole process group to end; `gone` follows it up."""
        if math.isinf(self._signalled_at):
            self.why_ended = why
            self._signal(signal.SIGTERM)

    def gone(self) -> bool:
        """Look at it: True once the process has ended and nothing that it started is left."""
        self.tell()
        now = time.monotonic()
        if self._waits.exists():
            self.began += now - self._looked
        self._looked = now
        if self.process.poll() is None:
            ticks = {pid: proctree.start_ticks(pid) for pid in proctree.descendants(self.process.pid)}
            self._below |= {pid: started for pid, started in ticks.items() if started is not None}
            if now - self.began > self.stage.limit_s:
                self.end(f"ended after its limit of {self.stage.limit_s:g} s")
            if now - self._signalled_at > _GRACE_S:
                self._signal(signal.SIGKILL)
            return False
        left = [pid for pid, started in self._below.items() if proctree.start_ticks(pid) == started]
        if math.isinf(self._signalled_at):
            self._signalled_at = now  # engines' guards end by themselves, a moment after their gateway
        if left and now - self._signalled_at > _GRACE_S:
            proctree.kill(left, spare_trackers=False)
        return not left

    def tell(self) -> None:
        """Print the lines of its log that are meant for whoever watches."""
        with self._log.open("rb") as log:
            log.seek(self._told_bytes)
            new = log.read()
        whole = new[: new.rfind(b"\n") + 1]
        self._told_bytes += len(whole)
        for line in whole.decode(errors="replace").splitlines():
            if line.startswith(f"{self.stage.name}: "):
                print(line[:_TOLD_CHARACTERS], flush=True)

    def _signal(self, number: signal.Signals) -> None:
        self._signalled_at = min(self._signalled_at, time.monotonic())
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, number)


class Suite:
    """The stages of one call, from first to last."""

    def __init__(self, stages: list[StageSpec], options: Options, gpus: list[str], until_s: float | None,
                 machine: dict[str, Any], command: Command = child_command) -> None:  # fmt: skip
        """gpus: their names for CUDA_VISIBLE_DEVICES, "" for a machine without; until_s: from now."""
        self._command = command
        self._options, self._gpus, self._until_s, self._machine = options, gpus, until_s, machine
        self._began = time.monotonic()
        self._waiting = list(stages)
        self._running: list[StageProcess] = []
        self._results: dict[str, dict[str, Any]] = {}
        self._stopping = False

    def run(self) -> bool:
        """Run them; True when every stage passed."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: setattr(self, "_stopping", True))
        for stage in list(self._waiting):
            if (self._options.out / f"{stage.name}.json").exists():  # of an earlier call
                self._waiting.remove(stage)
                self._record(stage.name, {})
        while self._turn():
            time.sleep(_POLL_S)
        self._write()
        return all(row["status"] == "ok" for row in self._results.values())

    def _turn(self) -> bool:
        """Look at everything once; False when there is nothing left to do."""
        for child in [child for child in self._running if child.gone()]:
            self._running.remove(child)
            self._over(child)
        if self._stopping:
            for child in self._running:
                child.end("the suite was told to stop")
            self._give_up(self._waiting, "the suite was told to stop")
            return bool(self._running)
        started = self._start()
        if not started and not self._running and self._until_s is None:
            self._give_up(self._waiting, "")  # what they wait for is not made by a stage
        return bool(self._running or self._waiting)

    def _start(self) -> bool:
        elapsed = time.monotonic() - self._began
        left_s = math.inf if self._until_s is None else self._until_s - elapsed
        passed = {name: row["status"] == "ok" for name, row in self._results.items() if row["status"] != "running"}
        now = time.monotonic()
        running = [Running(child.stage, child.gpus, max(now, child.began + child.stage.estimate_s))
                   for child in self._running]  # fmt: skip
        ends_at = {row.stage.name: row.ends_at for row in running}
        bringing = self._until_s is not None and elapsed < _BROUGHT_S
        brought_at = self._began + _BROUGHT_S if bringing else None
        wanted: list[tuple[StageSpec, float]] = []
        for stage in list(self._waiting):
            lacking = lacks(stage, self._options)
            found = standing(stage, passed, lacking, len(self._gpus), left_s)
            if found.kind == "never":
                self._give_up([stage], found.why)
            elif found.kind == "ready":
                wanted.append((stage, now))
                ends_at[stage.name] = now + stage.estimate_s
            elif (ready_at := soon(stage, passed, lacking, ends_at, brought_at)) is not None:
                wanted.append((stage, max(now + _POLL_S, ready_at)))
                if lacking:  # what comes after it keeps its place, too
                    ends_at[stage.name] = ready_at
        chosen = choose(wanted, running, len(self._gpus), now)
        for stage, gpus in chosen:
            visible = ",".join(self._gpus[gpu] for gpu in gpus)
            self._waiting.remove(stage)
            self._running.append(StageProcess(stage, gpus, self._options, visible, self._command))
            where = f"GPU {visible}" if visible else "no GPU"
            self._record(stage.name, {"status": "running", "gpus": visible, "began_s": round(elapsed, 1)})
            print(f"[{elapsed:.0f} s] {stage.name}: begins on {where}", flush=True)
        return bool(chosen)

    def _over(self, child: StageProcess) -> None:
        name, out = child.stage.name, self._options.out
        elapsed = time.monotonic() - self._began
        child.tell()
        if not (out / f"{name}.json").exists():
            why = child.why_ended or f"its process ended with status {child.process.returncode}"
            partial = out / f"{name}.partial.json"
            body: dict[str, Any] = {"stage": name, "figures": {}, "checks": []}
            if partial.exists():
                body = json.loads(partial.read_text())
            body["checks"].append({"check": "the stage ran to its end", "ok": False, "failure": why})
            # What was stopped with the whole suite is run again by the next call.
            write_json(partial if self._stopping else out / f"{name}.json", body | {"ok": False})
        self._record(name, {key: self._results[name][key] for key in ("gpus", "began_s")}
                     | {"ended_s": round(elapsed, 1)})  # fmt: skip
        row = self._results[name]
        figures = json.dumps(row.get("figures", {}), default=str)[:_FIGURES_CHARACTERS]
        print(f"[{elapsed:.0f} s] {name}: {row['status']}: {figures}", flush=True)

    def _record(self, name: str, row: dict[str, Any]) -> None:
        """Keep what a stage came to, with what it wrote."""
        body: dict[str, Any] = {}
        for path in (self._options.out / f"{name}.json", self._options.out / f"{name}.partial.json"):
            if "status" not in row and not body and path.exists():
                body = json.loads(path.read_text())
        failed = [f"{check['check']}: {check['failure']}" for check in body.get("checks", ()) if not check["ok"]]
        status: dict[str, Any] = {"status": "ok" if body.get("ok") else "failed"}
        if failed:
            status |= {"why": failed, "log_end": _end_of(self._options.out / f"{name}.log")}
        self._results[name] = status | row | body
        self._write()

    def _give_up(self, stages: list[StageSpec], why: str) -> None:
        for stage in list(stages):
            reason = why or self._reason(stage)
            self._waiting.remove(stage)
            print(f"{stage.name}: not run: {reason}", flush=True)
            self._record(stage.name, {"status": "not run", "why": [reason]})

    def _reason(self, stage: StageSpec) -> str:
        waiting = [name for name in stage.after if name not in self._results]
        return lacks(stage, self._options) or f"after {' and '.join(waiting)}"

    def _write(self) -> None:
        written = self._options.out / "results.json"
        of_others = json.loads(written.read_text())["stages"] if written.exists() else {}  # other calls' stages
        write_json(written, {
            "machine": self._machine,
            "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "seconds": round(time.monotonic() - self._began, 1),
            "stages": of_others | self._results,
        })  # fmt: skip


def _end_of(log: Path) -> str:
    return log.read_text(errors="replace")[-_TAIL_CHARACTERS:] if log.exists() else ""


def lacks(stage: StageSpec, options: Options) -> str:
    """What the stage needs and is not on this machine yet, in words; "" when all is there."""
    missing = [str(path) for path in stage.files(options) if not path.expanduser().exists()]
    try:
        for name in stage.engines:
            env = envs.lookup(name, None, options.device)
            if (state := env.state()) is not envs.State.READY:
                missing.append(f"{env} ({state})")
        if stage.demo:
            options.demo  # noqa: B018 - asked for its error
    except (BackendError, ConfigError) as error:
        missing.append(str(error))
    return f"waits for {'; '.join(missing)}" if missing else ""
