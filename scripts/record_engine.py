"""Start a real engine, put the recorder's questions to it, and write what it answered under recordings/ENGINE/.

    python -m scripts.record_engine vllm --version 0.32.0 --device cpu --model DIR --python ENV/bin/python \
        --command ENV/bin/vllm [--env NAME=VALUE ...] [--setups main plain] [--parallel]

Standard library, numpy and safetensors alone, so that it also runs where the engine does.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import http.client
import json
import os
import random
import re
import shlex
import socket
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scripts.recorder.adapters import write_all
from scripts.recorder.capture import ask, normal_text
from scripts.recorder.cases import Case
from scripts.recorder.flags import read_flags
from scripts.recorder.running import Running
from scripts.recorder.setups import KEY, ON_CUDA, SETUPS, Setup

LOG_TAIL_LINES = 60
_PORTS = (20_000, 32_000)
LOG_LINE_CHARACTERS = 400
_RUNNING = re.compile(rb"^\w+:num_(?:requests_running|running_reqs)\{[^}]*\} ([0-9.e+]+)", re.MULTILINE)


@dataclass(frozen=True)
class Target:
    """The engine under recording, the same for all its setups."""

    engine: str
    version: str
    device: str
    model: Path
    command: tuple[str, ...]
    python: tuple[str, ...]
    env: Mapping[str, str]
    adapters: Path
    out: Path  # files go to out/engine
    start_timeout_s: float
    failure_timeout_s: float  # a start that must fail has this long to do so

    @property
    def env_root(self) -> Path:
        """Of its Python environment."""
        return Path(self.python[0]).parent.parent

    @property
    def folder(self) -> Path:
        """Where its recordings lie."""
        return self.out / self.engine


def main() -> None:
    options = _options()
    with tempfile.TemporaryDirectory() as folder:
        target = Target(
            engine=options.engine,
            version=options.version,
            device=options.device,
            model=options.model,
            command=tuple(shlex.split(options.command)),
            python=tuple(shlex.split(options.python)),
            env=dict(os.environ) | dict(pair.split("=", 1) for pair in options.env),
            adapters=Path(folder),
            out=options.out,
            start_timeout_s=options.start_timeout_s,
            failure_timeout_s=options.start_timeout_s,
        )
        write_all(target.adapters, target.model)
        known = (ON_CUDA if options.cuda else SETUPS)[options.engine]
        setups = [setup for setup in known if not options.setups or setup.name in options.setups]
        if not options.setups:
            record_flags(target)
        running = Running()
        with ThreadPoolExecutor(len(setups) if options.parallel else 1) as pool:
            for done in [pool.submit(record, target, setup, running) for setup in setups]:
                done.result()


def record_flags(target: Target) -> int:
    """Write the options that the engine's command takes; how many there are. Raises as `read_flags` does."""
    flags = read_flags(target.engine, target.python, dict(target.env))
    _write(target, "flags", {"flags": flags})
    return len(flags)


def record(target: Target, setup: Setup, running: Running) -> dict[str, Any]:
    """Run one setup from start to stop and write its files: seconds until ready, and how many answers each group has.

    Raises TimeoutError when the engine did not get ready; its last words are printed.
    """
    port = _free_port()
    places = {"adapters": str(target.adapters), "model_path": str(target.model), "port": str(port), "key": KEY}
    places |= {"env": str(target.env_root), "home": str(Path.home())}
    args = [_filled(arg, places) for arg in setup.args]
    target.folder.mkdir(parents=True, exist_ok=True)
    log_path = target.folder / f"{setup.name}.log"
    print(f"{target.engine} {setup.name}: starting", flush=True)
    with _occupied(port if setup.occupy_port else None), log_path.open("wb") as log:
        started = time.monotonic()
        process = running.start([*target.command, *args], log, {**target.env, **setup.env})
        try:
            if not setup.groups:
                return _record_failure(target, setup, process, log_path, places)
            url = f"http://127.0.0.1:{port}"
            ready = _wait_ready(url, process, target.start_timeout_s)
            seconds = round(time.monotonic() - started, 1)
            print(f"{target.engine} {setup.name}: {'ready' if ready else 'not ready'} after {seconds} s", flush=True)
            if not ready:
                print(log_path.read_text(errors="replace")[-3000:], flush=True)
                raise TimeoutError(f"{target.engine} {setup.name} was not ready after {seconds} s")
            counts = {}
            for group, cases in setup.groups.items():
                answers = {case.name: _ask(url, case, setup.key, places) for case in cases}
                running.check()
                _write(target, group, {"setup": setup.name, "args": list(setup.args), "cases": answers})
                counts[group] = len(answers)
                print(f"{target.engine} {setup.name}: {group} {len(answers)}", flush=True)
            _record_log(target, setup, log_path, places)
            return {"ready_s": seconds, "answers": counts, "seconds": round(time.monotonic() - started, 1)}
        finally:
            running.stop(process)


def _free_port() -> int:
    """Below those that the kernel gives to outgoing connections: an engine may bind it minutes later."""
    while True:
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", random.randrange(*_PORTS)))
            return int(probe.getsockname()[1])


def _ask(url: str, case: Case, key: str, places: dict[str, str]) -> dict[str, Any]:
    answer = ask(url, case, key, places)
    if case.hang_up_after is not None:
        answer["idle_after_s"] = _idle_after_s(url, key)
    return answer


def _idle_after_s(url: str, key: str) -> float | None:
    """Seconds until the engine's own metrics say that nothing runs; None if they never do."""
    request = urllib.request.Request(f"{url}/metrics", headers={"Authorization": f"Bearer {key}"})
    started = time.monotonic()
    while time.monotonic() - started < 15:
        with contextlib.suppress(OSError, http.client.HTTPException):
            found = _RUNNING.search(urllib.request.urlopen(request, timeout=10).read())
            if found and float(found.group(1)) == 0:
                return round(time.monotonic() - started, 2)
        time.sleep(0.05)
    return None


def _wait_ready(url: str, process: subprocess.Popen[bytes], timeout_s: float) -> bool:
    deadline = time.monotonic() + timeout_s
    while process.poll() is None and time.monotonic() < deadline:
        with contextlib.suppress(OSError, http.client.HTTPException, urllib.error.URLError):
            if urllib.request.urlopen(f"{url}/health", timeout=30).status == 200:
                return True
        time.sleep(0.5)
    return False


def _record_failure(
    target: Target, setup: Setup, process: subprocess.Popen[bytes], log: Path, places: dict[str, str]
) -> dict[str, Any]:
    started = time.monotonic()
    try:
        code: int | None = process.wait(target.failure_timeout_s)
    except subprocess.TimeoutExpired:
        code = None
    ended = {"exit_code": code, "after_s": round(time.monotonic() - started, 1)}
    tail = _lines(log, places)[-LOG_TAIL_LINES:]
    _write(target, setup.name, {"args": list(setup.args), **ended, "log_tail": tail})
    log.unlink()
    return ended


def _record_log(target: Target, setup: Setup, log: Path, places: dict[str, str]) -> None:
    """Keep how a start and a death look in the engine's own log: its first and last lines."""
    lines = _lines(log, places)
    if setup.name == "main":
        _write(target, "log_main", {"first": lines[:LOG_TAIL_LINES], "last": lines[-LOG_TAIL_LINES:]})
    log.unlink()


def _lines(log: Path, places: dict[str, str]) -> list[str]:
    lines = normal_text(log.read_text(errors="replace"), places).splitlines()
    return [line[:LOG_LINE_CHARACTERS] for line in lines]


def _write(target: Target, name: str, content: dict[str, Any]) -> None:
    head = {
        "engine": target.engine,
        "version": target.version,
        "device": target.device,
        "date": datetime.date.today().isoformat(),
    }
    target.folder.mkdir(parents=True, exist_ok=True)
    (target.folder / f"{name}.json").write_text(json.dumps(head | content, indent=1, ensure_ascii=False) + "\n")


def _filled(text: str, places: dict[str, str]) -> str:
    for name, value in places.items():
        text = text.replace(f"{{{name}}}", value)
    return text


@contextlib.contextmanager
def _occupied(port: int | None) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        if port is not None:
            taken = stack.enter_context(socket.socket())
            taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            taken.bind(("127.0.0.1", port))
            taken.listen()
        yield


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Record a real engine's answers.")
    parser.add_argument("engine", choices=sorted(SETUPS))
    parser.add_argument("--version", required=True)
    parser.add_argument("--device", required=True, help="as people name it: cpu, NVIDIA H100")
    parser.add_argument("--model", type=Path, required=True, help="checkpoint directory")
    parser.add_argument("--python", required=True, help="the engine environment's Python")
    parser.add_argument("--command", required=True, help="what starts the engine's command line")
    parser.add_argument("--env", action="append", default=[], metavar="NAME=VALUE")
    parser.add_argument("--setups", nargs="*", default=[], help="only these; also skips the flags")
    parser.add_argument("--cuda", action="store_true", help="the starts for a GPU that others use too")
    parser.add_argument("--parallel", action="store_true", help="all setups at once")
    parser.add_argument("--start-timeout-s", type=float, default=240)
    parser.add_argument("--out", type=Path, default=Path("backends/emulator/recordings"))
    return parser.parse_args()


if __name__ == "__main__":
    main()
