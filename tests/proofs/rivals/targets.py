"""What is measured: this gateway's relay, and others, each installed by this module where it is not yet there.

The others' environments are kept in a cache folder of the user's, never in the project's own environment.
All get the same two replicas, their cheapest policy, and no more log than they insist on.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path

import msgspec

from gateway.snapshot import Key, Model, Replica, Snapshot
from tests.proofs.rivals.load import KEY

ENVIRONMENTS = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "tunegate-rivals"
ADAPTER_ID = "a-0123456789ab"
_START_S = 90.0
_UNREACHED = 10**12  # limits that are checked and never met


class NotHere(Exception):
    """A target cannot be started on this machine; the text says why."""


@dataclass(frozen=True)
class Target:
    """A gateway to measure. argv: (its environment's bin, its port, the engines' ports, a folder) -> command."""

    name: str
    argv: Callable[[Path, int, list[int], Path], list[str]]
    package: str | None = None  # on PyPI
    relays: int = 0  # of ours; 0: it is not ours
    adapters: int = 10  # of ours, in the snapshot
    connections: int = 0  # clients at most; 0: as many as the mode has


@dataclass(frozen=True)
class Running:
    """A started target."""

    target: Target
    version: str
    pid: int
    port: int


def _urls(ports: list[int]) -> list[str]:
    return [f"http://127.0.0.1:{port}" for port in ports]


def _nginx(_: Path, port: int, engines: list[int], folder: Path) -> list[str]:
    servers = "".join(f"server 127.0.0.1:{engine}; " for engine in engines)
    (folder / "nginx.conf").write_text(
        f"""worker_processes 1; daemon off; pid {folder}/nginx.pid; error_log {folder}/error.log;
events {{ worker_connections 4096; }}
http {{
  access_log off; client_body_temp_path {folder}/body; proxy_temp_path {folder}/proxy; fastcgi_temp_path {folder}/f;
  uwsgi_temp_path {folder}/u; scgi_temp_path {folder}/s; keepalive_requests 10000000; client_body_buffer_size 256k;
  upstream engines {{ least_conn; {servers} keepalive 1024; keepalive_requests 10000000; }}
  server {{
    listen 127.0.0.1:{port} backlog=2048;
    location / {{
      proxy_pass http://engines; proxy_http_version 1.1; proxy_set_header Connection ""; proxy_buffering off;
    }}
  }}
}}
"""
    )
    return ["nginx", "-c", str(folder / "nginx.conf"), "-p", str(folder)]


def _vllm_router(bin: Path, port: int, engines: list[int], folder: Path) -> list[str]:
    return [
        str(bin / "vllm-router"), "--port", str(port), "--worker-urls", *_urls(engines), "--policy", "round_robin",
        "--log-level", "error", "--prometheus-port", str(free_port()),
    ]  # fmt: skip


def _sglang_router(bin: Path, port: int, engines: list[int], folder: Path) -> list[str]:
    return [
        str(bin / "python"), "-m", "sglang_router.launch_router", "--port", str(port), "--worker-urls",
        *_urls(engines), "--policy", "round_robin", "--log-level", "error", "--prometheus-port", str(free_port()),
    ]  # fmt: skip


def _smg(bin: Path, port: int, engines: list[int], folder: Path) -> list[str]:
    return [
        str(bin / "smg"), "launch", "--port", str(port), "--worker-urls", *_urls(engines), "--policy", "round_robin",
        "--log-level", "error", "--prometheus-port", str(free_port()),
    ]  # fmt: skip


def _litellm(bin: Path, port: int, engines: list[int], folder: Path) -> list[str]:
    models = [
        {"model_name": name, "litellm_params": {"model": f"openai/{name}", "api_base": f"{url}/v1", "api_key": "none"}}
        for name in ("demo", "french")
        for url in _urls(engines)
    ]
    (folder / "litellm.json").write_bytes(
        msgspec.json.encode({"model_list": models, "general_settings": {"master_key": KEY}})
    )
    return [str(bin / "litellm"), "--config", str(folder / "litellm.json"), "--port", str(port), "--host", "127.0.0.1"]


TARGETS = (
    Target("nginx", _nginx),
    Target("tunegate", lambda *_: [], relays=1),
    Target("tunegate, 2 relays", lambda *_: [], relays=2),
    Target("vllm-router", _vllm_router, "vllm-router"),
    Target("sglang-router", _sglang_router, "sglang-router"),
    Target("smg", _smg, "smg"),
    Target("litellm", _litellm, "litellm[proxy]", connections=8),  # more would only wait
)
SCALES = tuple(
    Target(f"tunegate, {relays} relay(s), {adapters} adapters", lambda *_: [], relays=relays, adapters=adapters)
    for relays, adapters in ((1, 10), (1, 10_000), (4, 10))
)


def install(target: Target) -> str:
    """Make sure that a target can be started; gives its version. Raises NotHere."""
    if target.relays:
        return "this tree"
    if target.package is None:
        if shutil.which("nginx") is None:
            raise NotHere("nginx is not installed (Debian: `apt-get install nginx-light`)")
        return subprocess.run(["nginx", "-v"], capture_output=True, text=True).stderr.rpartition("/")[2].strip()
    home = ENVIRONMENTS / target.name
    distribution = target.package.partition("[")[0]
    if not (home / "installed").exists():
        uv = [sys.executable, "-m", "uv"]
        made = subprocess.run([*uv, "venv", "--quiet", "--clear", str(home)]).returncode == 0 and (
            subprocess.run([*uv, "pip", "install", "--quiet", "--python", str(home), target.package]).returncode == 0
        )
        if not made:
            raise NotHere(f"{target.package} could not be installed in {home}")
        (home / "installed").touch()
    code = f"import importlib.metadata as m; print(m.version({distribution!r}))"
    return subprocess.run([str(home / "bin/python"), "-c", code], capture_output=True, text=True).stdout.strip()


@contextlib.asynccontextmanager
async def running(
    target: Target, engines: list[int], folder: Path, under: list[str], relay_flags: tuple[str, ...] = ()
) -> AsyncIterator[Running]:
    """Start a target and wait until it answers a chat. under: a profiler's command. Raises NotHere."""
    version = install(target)
    folder.mkdir()
    with contextlib.ExitStack() as stack:
        log = stack.enter_context((folder / "log").open("wb"))
        if target.relays:
            control = await _control(folder, engines, target.adapters)
            stack.callback(control.close)
            listener = stack.enter_context(socket.create_server(("127.0.0.1", 0), backlog=2048))
            port = listener.getsockname()[1]
            fd = listener.fileno()
            commands = [
                [*under, sys.executable, "-m", "gateway.relay", "--index", str(i), "--relays", str(target.relays),
                 "--run-dir", str(folder), "--fd", str(fd), *relay_flags]
                for i in range(target.relays)
            ]  # fmt: skip
        else:
            port, fd = free_port(), -1
            commands = [target.argv(ENVIRONMENTS / target.name / "bin", port, engines, folder)]
        if len(commands) > 1:  # one parent, so that all targets are one tree
            script = " ".join(f"{' '.join(command)} &" for command in commands) + " wait"
            commands = [["sh", "-c", f"trap 'kill 0; wait' TERM; {script}"]]
        environment = {**os.environ, "LITELLM_LOCAL_MODEL_COST_MAP": "True", "LITELLM_LOG": "ERROR"}
        process = subprocess.Popen(
            commands[0],
            pass_fds=[fd] if fd >= 0 else [],
            stdout=log,
            stderr=log,
            env=environment,
            start_new_session=True,
        )
        try:
            await asyncio.to_thread(_wait_ready, process, port, folder / "log")
            yield Running(target, version, process.pid, port)
        finally:
            process.terminate()
            try:
                process.wait(15)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, 9)
                process.wait()


def free_port() -> int:
    """A port that nobody has at the moment."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])


def _wait_ready(process: subprocess.Popen[bytes], port: int, log: Path) -> None:
    body = b'{"model":"demo","messages":[{"role":"user","content":"hi"}]}'
    ask = urllib.request.Request(f"http://127.0.0.1:{port}/v1/chat/completions", body)
    ask.add_header("content-type", "application/json")
    ask.add_header("authorization", f"Bearer {KEY}")
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    deadline_s = time.monotonic() + _START_S
    reason = ""
    while time.monotonic() < deadline_s and process.poll() is None:
        try:
            with opener.open(ask, timeout=5):
                return
        except urllib.error.HTTPError as error:
            reason = f"{error.code} {error.read()[:300]!r}"
        except OSError as error:
            reason = str(error)
        time.sleep(0.1)
    raise NotHere(f"does not answer ({reason}); the end of its log: {log.read_text(errors='replace')[-600:]}")


def snapshot(engines: list[int], adapters: int, digest: str) -> Snapshot:
    """A key with limits of every kind, a replica a port, and that many adapters on each."""
    replicas = tuple(
        Replica(f"r{i}", i, "vllm", "127.0.0.1", port, "engine-key", True) for i, port in enumerate(engines)
    )
    everywhere = [replica.id for replica in replicas]
    models = {"demo": Model("demo", None, None, dict.fromkeys(everywhere, "demo"), "")}
    for i in range(adapters):
        name, id = ("french", ADAPTER_ID) if i == 0 else (f"adapter-{i}", f"a-{i:012x}")
        models[name] = Model(name, "demo", id, dict.fromkeys(everywhere, id), "")
    key = Key("key-1", frozenset({"infer"}), 0, None, _UNREACHED, _UNREACHED, _UNREACHED, _UNREACHED)
    return Snapshot(1, replicas, models, {digest: key})


async def _control(folder: Path, engines: list[int], adapters: int) -> asyncio.Server:
    """Stands in for control: sends one snapshot."""
    line = msgspec.json.encode(snapshot(engines, adapters, hashlib.sha256(KEY.encode()).hexdigest())) + b"\n"

    async def send(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(line)
        await reader.read()

    return await asyncio.start_unix_server(send, folder / "snapshots.sock")
