"""Runs one engine and outlives whoever started it: `python -m backends.guard`, its task as JSON on standard input.

    main (gateway serve) <- - watched by pidfd - - guard ── engine ── its workers

- The engine ends when the main process ends, however that happens, or when the guard is told to stop (SIGTERM; a
  second SIGTERM skips the grace). Its whole tree ends: first SIGTERM to the engine, then SIGKILL to every descendant.
  The guard is the tree's subreaper, so processes that changed session or lost their parent are still its descendants.
- When the guard itself is killed, the kernel kills the engine (PR_SET_PDEATHSIG). What that leaves of the tree is
  recognised (`leftovers`) and ended by the next guard before it starts anew.
- Output of the whole tree goes to one log file of bounded size; a full disk loses log lines, never the engine.
- The state file says who runs where, for the process that adopts the engine after its starter died.

Standard library only, and few modules of it: one guard runs per replica.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from backends import lifeline, proctree

LOG_LIMIT_BYTES = 32 << 20  # per file; one older file is kept beside it
_REMAINS_GRACE_S = 3.0  # for workers, once the engine's first process is gone
_OOM_SCORE = "500"  # when memory runs out, an engine dies before the gateway does
_POLL_S = 0.05
_CHUNK_BYTES = 1 << 16


# -- files ----------------------------------------------------------------------------------------------------------


class Log:
    """An append-only file that starts anew as `<name>.1` <- `<name>` when it is full.

    Only making it raises OSError: a full disk loses lines, not the engine.
    """

    def __init__(self, path: Path, limit_bytes: int) -> None:
        self._path = path
        self._limit_bytes = limit_bytes
        self._size_bytes = 0
        self._fd = self._open_new()
        os.dup2(self._fd, 2)  # where Python writes how the guard itself crashed, should it

    def write(self, data: bytes) -> None:
        """Append; a chunk is never split over two files."""
        if self._size_bytes and self._size_bytes + len(data) > self._limit_bytes:
            with contextlib.suppress(OSError):
                fd = self._open_new()
                os.close(self._fd)
                self._fd = fd
        with contextlib.suppress(OSError):
            self._size_bytes += os.write(self._fd, data)

    def say(self, text: str) -> None:
        """A line of the guard's own."""
        self.write(f"[guard] {time.strftime('%H:%M:%S')} {text}\n".encode())

    def _open_new(self) -> int:
        if self._path.exists():
            self._path.replace(f"{self._path}.1")
        self._size_bytes = 0
        return os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)


def write_state(path: Path, state: dict[str, Any]) -> None:
    """Replace the state file in one step, readable by its owner only: it holds the engine's key."""
    aside = path.with_name(f"{path.name}.new")
    fd = os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(fd, "w") as file:
        json.dump(state, file)
    aside.replace(path)


# -- the guard ------------------------------------------------------------------------------------------------------


class Guard:
    """One engine, from its start to the end of its tree."""

    def __init__(self, task: dict[str, Any]) -> None:
        self._task = task
        self._state_path = Path(task["state_path"])
        self._log = Log(Path(task["log_path"]), task["log_limit_bytes"])
        self._grace_s = float(task["grace_s"])
        self._state: dict[str, Any] = {}
        self._engine: subprocess.Popen[bytes] | None = None
        self._output = ""  # the pipe the engine's tree writes to, e.g. pipe:[4711]
        self._stops_asked = 0
        self._status: int | None = None  # the engine's, once it has ended

    def run(self) -> int:
        """Start the engine and stay until nothing of it is left. Raises OSError when it cannot be started."""
        lifeline.prctl(lifeline.PR_SET_CHILD_SUBREAPER, 1)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._on_stop)
        main_fd = self._watch_main()
        wake_read, wake_write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        signal.set_wakeup_fd(wake_write, warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda *_: None)

        if left := proctree.end_leftovers(self._state_path):
            self._log.say(f"ended {left} process(es) that an earlier run of this replica left behind")
        engine = self._engine = self._start_engine()
        assert engine.stdout is not None
        self._output = os.readlink(f"/proc/self/fd/{engine.stdout.fileno()}")  # noqa: PTH115
        self._record(engine.pid)
        _answer({"ok": True})

        output = engine.stdout.fileno()
        os.set_blocking(output, False)
        poll = select.poll()
        for fd in (main_fd, wake_read, output):
            poll.register(fd, select.POLLIN)
        reason = ""
        while not reason:
            for fd, _ in poll.poll():
                if fd == output and not self._drain(output):
                    poll.unregister(output)
                elif fd == wake_read:
                    os.read(wake_read, 512)
                elif fd == main_fd:
                    reason = f"the gateway (process {self._task['main_pid']}) has ended"
            self._reap()
            if self._stops_asked:
                reason = "asked to stop"
            elif self._status is not None:
                reason = self._words_for_end(self._status)
        self._log.say(f"{reason}; ending the engine's processes")
        if self._status is not None:
            self._record(engine.pid)  # nobody is to send it requests while its workers end
        self._end_tree(engine.pid, output)
        self._record(engine.pid)
        return 0

    def _watch_main(self) -> int:
        """A descriptor that becomes readable when the main process ends."""
        pid = self._task["main_pid"]
        fd = os.pidfd_open(pid)  # ProcessLookupError (an OSError) when it is gone
        if proctree.start_ticks(pid) != self._task["main_start_ticks"]:
            raise ProcessLookupError(f"the gateway (process {pid}) has ended")
        return fd

    def _start_engine(self) -> subprocess.Popen[bytes]:
        guard_pid = os.getpid()

        def in_child() -> None:
            lifeline.end_with_parent(signal.SIGKILL, guard_pid)
            with open("/proc/self/oom_score_adj", "w") as file:  # noqa: PTH123 - between fork and exec
                file.write(_OOM_SCORE)

        return subprocess.Popen(
            self._task["argv"],
            env=self._task["env"] | {proctree.MARK_VARIABLE: str(self._state_path)},
            cwd=self._task["cwd"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=in_child,  # safe: the guard has one thread
        )

    def _record(self, engine_pid: int) -> None:
        state = self._task["state"] | {
            "guard_pid": os.getpid(),
            "guard_start_ticks": proctree.start_ticks(os.getpid()),
            "engine_pid": engine_pid,
            "output": self._output,
            "boot": proctree.boot_id(),
            "log_path": self._task["log_path"],
            "started_at": self._state.get("started_at", time.time()),  # seconds since the epoch
            "exit_status": self._status,  # negative: ended by that signal; None while it runs
        }
        self._state = state
        try:
            write_state(self._state_path, state)
        except OSError as error:
            self._log.say(f"cannot write {self._state_path}: {error.strerror}")
            if self._status is None:
                raise  # an engine that nobody can adopt or stop must not start

    def _on_stop(self, *_: object) -> None:
        self._stops_asked += 1

    def _drain(self, output: int) -> bool:
        """Move what the tree wrote to the log; False once every writer has closed it."""
        with contextlib.suppress(BlockingIOError):
            while data := os.read(output, _CHUNK_BYTES):
                self._log.write(data)
            return False
        return True

    def _reap(self) -> bool:
        """Collect ended children: the engine, and orphans that came to us as their subreaper. False: none are left."""
        assert self._engine is not None
        try:
            while True:
                pid, status = os.waitpid(-1, os.WNOHANG)
                if pid == 0:
                    return True
                if pid == self._engine.pid:
                    self._status = self._engine.returncode = os.waitstatus_to_exitcode(status)
        except ChildProcessError:
            return False

    def _words_for_end(self, status: int) -> str:
        if status == -signal.SIGKILL:
            return "engine ended by SIGKILL, not sent by the gateway"
        return f"engine ended by signal {-status}" if status < 0 else f"engine ended with status {status}"

    def _end_tree(self, engine_pid: int, output: int) -> None:
        """SIGTERM to the engine, a grace for it, a short one for what remains, then SIGKILL until nothing is left."""
        deadline = time.monotonic() + self._grace_s
        if self._status is None:
            proctree.send([engine_pid], signal.SIGTERM)
        told_remains = False
        while self._reap():
            self._drain(output)
            now = time.monotonic()
            if self._status is not None and not told_remains:
                told_remains = True
                deadline = min(deadline, now + _REMAINS_GRACE_S)
                proctree.send(proctree.descendants(os.getpid()), signal.SIGTERM)
            if self._stops_asked > 1:
                deadline = min(deadline, now)
            if now >= deadline:
                spare_trackers = now < deadline + proctree.TRACKER_GRACE_S
                proctree.kill(proctree.descendants(os.getpid()), spare_trackers)
            time.sleep(_POLL_S)
        self._drain(output)


def _answer(message: dict[str, Any]) -> None:
    """One line to the starter, which then closes the pipe; nobody may be there any more."""
    with contextlib.suppress(OSError):
        os.write(1, json.dumps(message).encode() + b"\n")
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, 1)
    os.close(null)


def main() -> int:
    """Read the task from standard input, run it. Exit status 1 when the engine could not be started."""
    task = json.load(sys.stdin)
    try:
        return Guard(task).run()
    except OSError as error:
        _answer({"ok": False, "error": f"{error.strerror or error}: {error.filename or task['argv'][0]}"})
        return 1


if __name__ == "__main__":
    sys.exit(main())
