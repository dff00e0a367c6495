"""The trainer as a process: `python -m trainer` in an environment with torch, behind a guard as engines are.

So it ends with the gateway, by a signal that has it write a checkpoint first; and it outlives a control process that
dies, whose successor finds it again. Blocking: call it from a thread.
"""

from __future__ import annotations

import functools
import logging
import os
import re
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from backends import lifeline, process
from backends.base import Endpoint, Launch
from backends.process import EngineProcess
from gateway.errors import InvalidRequest

_log = logging.getLogger(__name__)
EXIT_PAUSED = 75
_PROBE_S, _CHECK_S = 60, 300  # time limits
_PAUSE_GRACE_S = 60.0  # for a step and a checkpoint, when the gateway ends
_NEEDED = ("trainer", "torch", "transformers")
_PROBE = (
    "import importlib.util as u, sys; "
    f"missing = [name for name in {_NEEDED!r} if u.find_spec(name) is None]; "
    "print(' '.join(missing)); sys.exit(bool(missing))"
)
_GOOD = re.compile(r"^(\d+) good examples", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Place:
    """Where processes keep their state, and with whom they end."""

    run_dir: Path
    log_dir: Path
    main_pid: int


class Trainer:
    """Checks data and trains, in the environment of one Python."""

    def __init__(self, python: Path | None, device: str, place: Place, gpu: str | None = None) -> None:
        """python: with torch and the trainer; None: the one that runs the gateway. device: auto, cpu or cuda.

        gpu: the one that is seen, as CUDA_VISIBLE_DEVICES has it; None: those that the gateway sees.
        """
        self._python = str(python.absolute() if python else Path(sys.executable))
        self.device = device
        self._own_device = {"CUDA_VISIBLE_DEVICES": gpu} if gpu is not None else {}
        self._place = place
        self._proven = False

    def prove(self) -> None:
        """Raises InvalidRequest unless the environment can train."""
        if self._proven:
            return
        missing = _run([self._python, "-c", _PROBE], _PROBE_S)
        if missing is None or missing.returncode:
            what = missing.stdout.strip() if missing is not None else ""
            raise InvalidRequest(
                f"this gateway cannot train: {self._python} {f'lacks {what}' if what else 'does not run'}. Install "
                "`tunegate[train]` there, or in another environment that --trainer-python PYTHON names",
                code="no_trainer",
            )
        self._proven = True

    def check_data(self, file: Path, filename: str, method: str, param: str, grader: Path | None = None) -> int:
        """How many good examples a file holds. method: as the trainer calls it. grader: what will read them.

        Raises InvalidRequest with the number of each bad line, or what is wrong with the grader.
        """
        judged = ["--grader", str(grader)] if grader else []
        done = _run([self._python, "-m", "trainer", "check-data", "--method", method, *judged, str(file)], _CHECK_S)
        if done is None:
            raise InvalidRequest(f"{filename} could not be checked within {_CHECK_S} s; send less", param=param)
        good = _GOOD.search(done.stdout)
        if done.returncode == 0 and good:
            return int(good[1])
        of_grader = done.stderr.lstrip().startswith("Error: grader")  # looked at before clients' own names stand there
        said = done.stderr.replace(f"{file.name} line", f"{filename} line").replace(str(file), filename).strip()
        if not said.startswith("Error: "):  # a traceback names the server's paths
            _log.error("check-data ended with status %d: %s", done.returncode, done.stderr)
            said = f"the trainer could not check {filename}; the gateway's log says why"
        if of_grader:
            own = "method.reinforcement.grader"
            raise InvalidRequest(said.removeprefix("Error: "), param=own, code="invalid_grader")
        raise InvalidRequest(said.removeprefix("Error: "), param=param, code="invalid_training_file")

    def adopt(self, job_id: str) -> EngineProcess | None:
        """The process of a job that runs already."""
        return process.adopt(self._place.run_dir, job_id)

    def start(
        self, job_id: str, method: str, config: Path, run: Path, url: str | None = None, secret: str | None = None
    ) -> EngineProcess:
        """Start a run, or go on with it where its last checkpoint stands. Raises BackendError, OSError.

        url: of the gateway, where it calls it; secret: by which it may.
        """
        self._place.run_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        begun = (run / "run.json").exists()
        arguments = ["resume", str(run)] if begun else [method, "--config", str(config)]
        if url is not None:
            arguments += ["--gateway-url", url]
        # Beside a busy server on the same cores, threads that spin while they wait slow down both.
        env = {"OMP_WAIT_POLICY": "PASSIVE"} | ({"TUNEGATE_API_KEY": secret} if secret else {})
        launch = Launch((self._python, "-m", "trainer", *arguments), env | self._own_device)
        log = self.log_path(job_id)
        nowhere = Endpoint("", 0, "")
        return process.start(job_id, self._place.run_dir, log, launch, nowhere, self._place.main_pid, _PAUSE_GRACE_S)

    def log_path(self, job_id: str) -> Path:
        """What the trainer of a job writes on its terminal."""
        return self._place.log_dir / f"train-{job_id}.log"


def _run(argv: list[str], limit_s: float) -> subprocess.CompletedProcess[str] | None:
    """A child's ending and output; None when it does not start or end."""
    environment = process.engine_environment(Launch((argv[0],)), os.environ)
    try:
        return subprocess.run(
            argv,
            env=environment,
            cwd="/",
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=limit_s,
            preexec_fn=functools.partial(lifeline.end_with_parent, signal.SIGTERM, os.getpid()),
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
