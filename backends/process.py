"""Start, adopt, watch and stop an engine process through its guard (`backends/guard.py`).

Everything here is short and blocking (a start 0.1 s, a stop up to its grace): call it from a thread in async code.
One replica id in one run directory is one engine; a start ends whatever ran under that id before.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import random
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from backends import guard, proctree
from backends.base import BackendError, Endpoint, Launch

_DEFAULT_GRACE_S = 10.0
_KILL_S = 5.0  # from "kill now" to the guard's end
_START_S = 30.0  # a guard answers within 0.2 s on an idle machine
_FIRST_PORT = 20_000
_PORT_TRIES = 64

# What the gateway's environment holds that an engine must not get: Python settings of another virtual environment,
# our own settings, and secrets. Engines are given their own key and read their model from the disk.
_DROPPED = {"PYTHONPATH", "PYTHONHOME", "PYTHONSTARTUP", "VIRTUAL_ENV", "VLLM_SERVER_DEV_MODE"}
_DROPPED_PREFIX = "TUNEGATE_"
_KEPT = {"TUNEGATE_EMULATOR"}  # how an emulated engine behaves
_DROPPED_SUFFIXES = ("_KEY", "_TOKEN", "_SECRET", "_PASSWORD", "DATABASE_URL")
_DEFAULTS = {
    "DO_NOT_TRACK": "1",
    "HF_HUB_OFFLINE": "1",  # the checkpoint is a local directory; without a network every look-up would cost a timeout
    "NO_COLOR": "1",  # the log is searched for the cause of a failed start
    "PYTHONUNBUFFERED": "1",
}


class EngineStartError(BackendError):
    """The engine's process could not be started at all; the message says why."""


class EngineProcess:
    """A guarded engine, started by us or by a process before us."""

    def __init__(self, state: dict[str, Any], starter: subprocess.Popen[bytes] | None = None) -> None:
        self.replica_id: str = state["replica_id"]
        self.endpoint = Endpoint(state["host"], state["port"], state["api_key"])
        self.guard_pid: int = state["guard_pid"]
        self.engine_pid: int = state["engine_pid"]
        self.started_at: float = state["started_at"]  # seconds since the epoch
        self.log_path = Path(state["log_path"])
        self._state_path = Path(state["state_path"])
        self._guard_start_ticks: int = state["guard_start_ticks"]
        self._digest: str = state["digest"]
        self._guard = starter

    def __repr__(self) -> str:
        state = "alive" if self.alive() else f"ended {self.exit_status()}"
        return f"<EngineProcess {self.replica_id} pid={self.engine_pid} port={self.endpoint.port} {state}>"

    def alive(self) -> bool:
        """True until the engine and all its workers are gone (its memory is free and its port closed)."""
        if self._guard is not None:
            self._guard.poll()  # collects it, if it is our child
        return proctree.start_ticks(self.guard_pid) == self._guard_start_ticks

    def exit_status(self) -> int | None:
        """None while the engine runs; then its status, negative when a signal ended it. It answers nothing from then
        on, though its workers may be ending for some seconds more (`alive`)."""
        gone = not self.alive()  # asked first: what it had to say is written by then
        state = _read_state(self._state_path)
        if state is not None and state["guard_pid"] == self.guard_pid and state["exit_status"] is not None:
            return int(state["exit_status"])
        return -signal.SIGKILL if gone else None  # the guard was killed, and the kernel killed the engine with it

    def runs(self, launch: Launch) -> bool:
        """True when it was started by exactly this command and environment."""
        return self._digest == digest(launch)

    def stop(self, grace_s: float = _DEFAULT_GRACE_S) -> None:
        """End the whole process tree: SIGTERM, then SIGKILL once `grace_s` is over. Returns when nothing is left."""
        for wait_s in (grace_s, _KILL_S):
            if not self._signal_guard(signal.SIGTERM, wait_s):
                break
        else:
            self._signal_guard(signal.SIGKILL, _KILL_S)
        proctree.end_leftovers(self._state_path)

    def log_tail(self, limit_bytes: int = 65_536) -> str:
        """The end of what the engine wrote since its start; "" when there is no log."""
        try:
            with self.log_path.open("rb") as log:
                size = log.seek(0, os.SEEK_END)
                log.seek(max(0, size - limit_bytes))
                return log.read().decode(errors="replace")
        except OSError:
            return ""

    def _signal_guard(self, number: signal.Signals, wait_s: float) -> bool:
        """Signal the guard and wait for its end; True when it is still there."""
        if not self.alive():
            return False
        try:
            fd = os.pidfd_open(self.guard_pid)
        except ProcessLookupError:
            return False
        try:
            signal.pidfd_send_signal(fd, number)
            select.select([fd], [], [], wait_s)
        except ProcessLookupError:
            pass
        finally:
            os.close(fd)
        return self.alive()


def start(
    replica_id: str,
    run_dir: Path,
    log_path: Path,
    launch: Launch,
    endpoint: Endpoint,
    main_pid: int,
    grace_s: float = _DEFAULT_GRACE_S,
    log_limit_bytes: int = guard.LOG_LIMIT_BYTES,
) -> EngineProcess:
    """Start an engine that lives until it is stopped or `main_pid` ends. Raises EngineStartError.

    run_dir: holds the state file `replica-<id>.json`; log_path: the engine's output of this run, the run before it
    is kept as `<log_path>.1`. grace_s: from SIGTERM to SIGKILL when the main process ends.
    """
    state_path = _state_path(run_dir, replica_id)
    if before := _living(state_path):
        before.stop(0)
    log_path.parent.mkdir(parents=True, exist_ok=True)
    task = {
        "argv": launch.argv,
        "env": engine_environment(launch, os.environ),
        "cwd": str(run_dir.resolve()),  # not the caller's: a folder named like an engine there would be imported
        "main_pid": main_pid,
        "main_start_ticks": proctree.start_ticks(main_pid),
        "grace_s": grace_s,
        "log_path": str(log_path.resolve()),
        "log_limit_bytes": log_limit_bytes,
        "state_path": str(state_path),
        "state": {
            "replica_id": replica_id,
            "state_path": str(state_path),
            "main_pid": main_pid,
            "main_start_ticks": proctree.start_ticks(main_pid),
            "host": endpoint.host,
            "port": endpoint.port,
            "api_key": endpoint.api_key,
            "digest": digest(launch),
        },
    }
    # The task goes through a pipe: arguments are visible to every user of the machine, and it holds the key.
    process = subprocess.Popen(
        [sys.executable, "-m", "backends.guard"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    answer = _converse(process, json.dumps(task).encode())
    if not answer.get("ok"):
        process.kill()
        process.wait()
        raise EngineStartError(f"cannot start {replica_id}: {answer['error']} (log: {log_path})")
    state = _read_state(state_path)
    assert state is not None
    return EngineProcess(state, process)


def adopt(run_dir: Path, replica_id: str) -> EngineProcess | None:
    """The living engine of this id that a process before us started, unless its gateway has ended."""
    return _living(_state_path(run_dir, replica_id), for_use=True)


def end_strays(run_dir: Path) -> int:
    """End what killed guards left behind under this run directory; how many processes there were."""
    return sum(
        proctree.end_leftovers(path.resolve())
        for path in run_dir.glob("replica-*.json")
        if _living(path.resolve()) is None
    )


def free_port() -> int:
    """A free TCP port of the loopback address, below those the kernel gives to outgoing connections.

    An engine binds it seconds later; a port of the kernel's range could be taken by then.
    """
    with open("/proc/sys/net/ipv4/ip_local_port_range") as file:  # noqa: PTH123
        first_given = int(file.read().split()[0])
    for _ in range(_PORT_TRIES):
        port = random.randrange(_FIRST_PORT, first_given) if first_given > _FIRST_PORT else 0  # noqa: S311
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return int(probe.getsockname()[1])
    raise EngineStartError(f"no free TCP port between {_FIRST_PORT} and {first_given} in {_PORT_TRIES} tries")


def engine_environment(launch: Launch, inherited: Mapping[str, str]) -> dict[str, str]:
    """The engine's environment: defaults, `inherited` less what is not its business, then the launch's own."""
    kept = {
        name: value
        for name, value in inherited.items()
        if name in _KEPT
        or (name not in _DROPPED and not name.startswith(_DROPPED_PREFIX) and not name.endswith(_DROPPED_SUFFIXES))
    }
    # Engines call tools of their own environment by name (ninja for kernels compiled at start).
    path = {"PATH": f"{Path(launch.argv[0]).parent}:{kept.get('PATH', os.defpath)}"}
    if launch.argv[0] == sys.executable:  # an emulated engine: it must find what we found, wherever we run from
        path["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
    return _DEFAULTS | dict(launch.defaults) | kept | path | dict(launch.env)


def digest(launch: Launch) -> str:
    """Identifies a command with its environment."""
    environment = {**launch.defaults, **launch.env}
    return hashlib.sha256(json.dumps([launch.argv, sorted(environment.items())]).encode()).hexdigest()


def _converse(process: subprocess.Popen[bytes], task: bytes) -> dict[str, Any]:
    """Hand the task to the guard; its one-line answer."""
    assert process.stdin is not None and process.stdout is not None
    with process.stdin as stdin, process.stdout as stdout:
        with contextlib.suppress(BrokenPipeError):  # it ended before it read all: no answer then
            stdin.write(task)
            stdin.close()
        if not select.select([stdout], [], [], _START_S)[0]:
            return {"error": f"the guard process did not answer within {_START_S:g} s"}
        line = stdout.readline()
    return dict(json.loads(line)) if line else {"error": "the guard process crashed"}


def _state_path(run_dir: Path, replica_id: str) -> Path:
    return run_dir.resolve() / f"replica-{replica_id}.json"


def _read_state(path: Path) -> dict[str, Any] | None:
    try:
        return dict(json.loads(path.read_text()))
    except (OSError, ValueError):  # none, or one that a power cut left empty
        return None


def _living(state_path: Path, for_use: bool = False) -> EngineProcess | None:
    """The engine of a state file while its guard lives; for use: only while its gateway lives too."""
    state = _read_state(state_path)
    if state is None:
        return None
    process = EngineProcess(state)
    if for_use and proctree.start_ticks(state["main_pid"]) != state["main_start_ticks"]:
        return None  # its guard is about to end it
    return process if process.alive() else None
