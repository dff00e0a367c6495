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
import re
import shlex
import signal
import socket
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scripts.recorder.adapters import write_all
from scripts.recorder.capture import ask, normal_text
from scripts.recorder.cases import Case
from scripts.recorder.flags import read_flags
from scripts.recorder.setups import KEY, SETUPS, Setup

LOG_TAIL_LINES = 60
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
    env: dict[str, str]
    env_root: Path  # of its Python environment
    adapters: Path
    out: Path
    start_timeout_s: float


def main() -> None:
    options = _options()
    out = options.out / options.engine
    out.mkdir(parents=True, exist_ok=True)
    env = dict(os.environ) | dict(pair.split("=", 1) for pair in options.env)
    setups = [setup for setup in SETUPS[options.engine] if not options.setups or setup.name in options.setups]
    with tempfile.TemporaryDirectory() as folder:
        adapters = Path(folder)
        write_all(adapters, options.model)
        target = Target(
            engine=options.engine,
            version=options.version,
            device=options.device,
            model=options.model,
            command=tuple(shlex.split(options.command)),
            env=env,
            env_root=Path(shlex.split(options.python)[0]).parent.parent,
            adapters=adapters,
            out=out,
            start_timeout_s=options.start_timeout_s,
        )
        if not options.setups:
            flags = read_flags(options.engine, tuple(shlex.split(options.python)), env)
            _write(target, "flags", {"flags": flags})
        with ThreadPoolExecutor(len(setups) if options.parallel else 1) as pool:
            for done in [pool.submit(record, target, setup) for setup in setups]:
                done.result()


def record(target: Target, setup: Setup) -> None:
    """Run one setup from start to stop and write its files."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    places = {"adapters": str(target.adapters), "model_path": str(target.model), "port": str(port), "key": KEY}
    places |= {"env": str(target.env_root), "home": str(Path.home())}
    args = [_filled(arg, places) for arg in setup.args]
    log_path = target.out / f"{setup.name}.log"
    print(f"{target.engine} {setup.name}: starting", flush=True)
    with _occupied(port if setup.occupy_port else None), log_path.open("wb") as log:
        started = time.monotonic()
        process = subprocess.Popen([*target.command, *args], stdout=log, stderr=subprocess.STDOUT,
                                   env=target.env | dict(setup.env), start_new_session=True)  # fmt: skip
        try:
            url = f"http://127.0.0.1:{port}"
            ready = bool(setup.groups) and _wait_ready(url, process, target.start_timeout_s)
            seconds = round(time.monotonic() - started, 1)
            print(f"{target.engine} {setup.name}: {'ready' if ready else 'not ready'} after {seconds} s", flush=True)
            if not setup.groups:
                _record_failure(target, setup, process, log_path, places)
                return
            if not ready:
                print(log_path.read_text(errors="replace")[-3000:], flush=True)
                return
            for group, cases in setup.groups.items():
                answers = {case.name: _ask(url, case, setup.key, places) for case in cases}
                _write(target, group, {"setup": setup.name, "args": list(setup.args), "cases": answers})
                print(f"{target.engine} {setup.name}: {group} {len(answers)}", flush=True)
            _record_log(target, setup, log_path, places)
        finally:
            _stop(process)


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
) -> None:
    started = time.monotonic()
    try:
        code: int | None = process.wait(target.start_timeout_s)
    except subprocess.TimeoutExpired:
        code = None
    _write(target, setup.name, {
        "args": list(setup.args),
        "exit_code": code,
        "after_s": round(time.monotonic() - started, 1),
        "log_tail": _lines(log, places)[-LOG_TAIL_LINES:],
    })  # fmt: skip
    log.unlink()


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
    (target.out / f"{name}.json").write_text(json.dumps(head | content, indent=1, ensure_ascii=False) + "\n")


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


def _stop(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(20)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


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
    parser.add_argument("--parallel", action="store_true", help="all setups at once")
    parser.add_argument("--start-timeout-s", type=float, default=240)
    parser.add_argument("--out", type=Path, default=Path("backends/emulator/recordings"))
    return parser.parse_args()


if __name__ == "__main__":
    main()
