"""The main process: binds the port, keeps control and the relays running, prints the ready line, ends it all.

    gateway serve ── relay 0 … N-1   share the listening socket
                 └── control ── guard ── engine, one pair a replica

It holds no request and no state, so that there is little in it to fail. When it is killed, the kernel ends relays and
control (PR_SET_PDEATHSIG) and each guard ends its engine; when another of them dies, it is started anew.
"""

from __future__ import annotations

import asyncio
import errno
import fcntl
import functools
import os
import signal
import socket
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import httpx2

from backends import lifeline
from gateway.config import ConfigError, ServeConfig
from gateway.control.running import Running, line
from gateway.observe.cells import forget_surplus
from gateway.preflight import check

_RESTART_DELAYS_S = (0.1, 0.5, 1.0, 2.0, 5.0)  # the last one repeats
_STEADY_S = 60.0  # a child that ran this long starts again from the first delay
_CONFIG_REFUSED = 2  # control's exit status for a configuration it cannot serve
_CONTROL_STOP_S = 60.0  # engines get their own grace within it
_POLL_S = 0.2
_SOCKET_PATH_BYTES = 107  # the kernel's limit
_PROGRESS_EVERY_S = 15.0


@dataclass(frozen=True, slots=True)
class Source:
    """Where the configuration is from, to read it again."""

    file: Path | None = None
    flags: dict[str, Any] = field(default_factory=dict)  # they win over the file


def serve(config: ServeConfig, source: Source) -> int:
    """Serve until SIGTERM or SIGINT; the process's exit status. Raises ConfigError or BackendError before it starts."""
    check(config)
    run_dir = config.state_dir / "run"
    if len(os.fsencode(run_dir / "snapshots.sock")) > _SOCKET_PATH_BYTES:
        raise ConfigError(f"--state {config.state_dir} is too long for the sockets in it; choose a shorter path")
    try:
        run_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"cannot make --state {config.state_dir}: {error.strerror}") from error
    with _only_one(config.state_dir), _listen(config.host, config.port) as listener:
        forget_surplus(run_dir, config.relays)
        return asyncio.run(_Gateway(config, source, run_dir, listener).run())


def _only_one(state_dir: Path) -> IO[str]:
    """Hold the state directory's lock. Raises ConfigError when another gateway holds it."""
    try:
        lock = (state_dir / "lock").open("a+")
    except OSError as error:
        raise ConfigError(f"cannot write to --state {state_dir}: {error.strerror}") from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        lock.seek(0)
        raise ConfigError(
            f"process {lock.read().strip() or '?'} already serves from {state_dir}; stop it or choose another --state"
        ) from error
    lock.truncate(0)
    lock.write(str(os.getpid()))
    lock.flush()
    return lock


def _listen(host: str, port: int) -> socket.socket:
    """The listening socket that all relays inherit. Raises ConfigError with the cause."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except socket.gaierror as error:
        raise ConfigError(f"--host {host} is not an address of this machine: {error.strerror}") from error
    except OSError as error:
        advice = "stop what listens there or choose another --port" if error.errno == errno.EADDRINUSE else ""
        raise ConfigError(f"cannot listen on {host}:{port}: {os.strerror(error.errno or 0)}; {advice}") from error
    listener.listen(2048)
    listener.setblocking(False)
    return listener


class _Child:
    """A process kept running: when it ends it is started anew, after a growing delay."""

    def __init__(self, name: str, argv: Sequence[str], fds: tuple[int, ...] = ()) -> None:
        self.name = name
        self._argv = argv
        self._fds = fds
        self._process: asyncio.subprocess.Process | None = None
        self._stopping = False
        self.may_refuse = False  # whether an exit status can mean that its configuration cannot be served
        self.refused = asyncio.Event()

    async def keep_running(self) -> None:
        """Start it, and again whenever it ends, until `stop`."""
        deaths = 0
        while not self._stopping:
            started = time.monotonic()
            try:
                status = await self._run()
            except OSError as error:  # no memory or no descriptors for another process, at this moment
                status = None
                _say(f"{self.name} cannot be started: {error.strerror}")
            if self._stopping:
                return
            if status == _CONFIG_REFUSED and self.may_refuse:
                self.refused.set()
                return
            deaths = 1 if time.monotonic() - started > _STEADY_S else deaths + 1
            delay_s = _RESTART_DELAYS_S[min(deaths, len(_RESTART_DELAYS_S)) - 1]
            _say(f"{self.name} ended with status {status}; starting it again in {delay_s:g} s")
            await asyncio.sleep(delay_s)

    async def _run(self) -> int:
        """From its start to its end; the exit status. Raises OSError when it cannot be started."""
        self._process = await asyncio.create_subprocess_exec(
            *self._argv,
            pass_fds=self._fds,
            stdin=asyncio.subprocess.DEVNULL,
            start_new_session=True,  # a terminal's Ctrl-C reaches only the main process, which stops them in order
            preexec_fn=functools.partial(lifeline.end_with_parent, signal.SIGTERM, os.getpid()),
        )
        return await self._process.wait()

    async def stop(self, grace_s: float) -> None:
        """SIGTERM, then SIGKILL once `grace_s` is over."""
        self._stopping = True
        process = self._process
        if process is None or process.returncode is not None:
            return
        process.terminate()
        try:
            await asyncio.wait_for(process.wait(), grace_s)
        except TimeoutError:
            _say(f"{self.name} did not stop within {grace_s:g} s: killed")
            process.kill()
            await process.wait()


class _Gateway:
    """One run of `gateway serve`."""

    def __init__(self, config: ServeConfig, source: Source, run_dir: Path, listener: socket.socket) -> None:
        self._config = config
        self._reloads: set[asyncio.Task[None]] = set()  # under way: the loop itself would let go of them
        host, self._port = listener.getsockname()[:2]
        scheme = "https" if config.tls_cert else "http"
        self._url = f"{scheme}://{'[' + host + ']' if ':' in host else host}:{self._port}"
        self._control_socket = run_dir / "control.sock"
        fd = listener.fileno()
        # The configuration holds secrets: a file of the memory keeps them off the disk and out of the process list.
        memory = os.memfd_create("configuration")
        known = config.model_copy(update={"port": self._port})
        os.write(memory, line(Running(config=known, declared=config, file=source.file, flags=source.flags)))
        self._control = _Child(
            "control",
            _command("gateway.control", run_dir, config_json=f"/proc/self/fd/{memory}", main_pid=os.getpid()),
            fds=(memory,),
        )
        self._control.may_refuse = True  # until it has served: later, what was right is mended, not given up
        limits = {
            "max_body_bytes": config.max_body_mb * 1_000_000,
            "request_timeout_s": config.request_timeout_s,
            "adapter_wait_s": config.adapter_wait_s,
            "routing": config.routing,
            "max_in_flight": config.max_in_flight,
            "max_waiting": config.max_waiting,
            "max_wait_s": config.max_wait_s,
            "settle_s": config.settle_s,
            "drain_timeout_s": config.drain_timeout_s,
            **({"tls_cert": config.tls_cert, "tls_key": config.tls_key} if config.tls_cert else {}),
        }
        self._relays = [
            _Child(
                f"relay {index}",
                _command("gateway.relay", run_dir, index=index, relays=config.relays, fd=fd, **limits),
                fds=(fd,),
            )
            for index in range(config.relays)
        ]

    async def run(self) -> int:
        """Until a signal, or a start that fails. Returns the exit status."""
        stopping = asyncio.Event()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, stopping.set)
        loop.add_signal_handler(signal.SIGHUP, self._begin_to_reload)
        kept = [asyncio.create_task(child.keep_running()) for child in (self._control, *self._relays)]
        ready = asyncio.create_task(self._announce())
        refused = asyncio.create_task(self._control.refused.wait())
        stop = asyncio.create_task(stopping.wait())
        try:
            done, _ = await asyncio.wait({ready, refused, stop}, return_when=asyncio.FIRST_COMPLETED)
            failed = refused in done or (ready in done and not ready.result())
            if not failed:
                self._control.may_refuse = False
                await stop
        finally:
            for task in (ready, refused, stop):
                task.cancel()
            await self._stop()
            for keeper in kept:
                keeper.cancel()
        return 1 if failed else 0

    async def _announce(self) -> bool:
        """Print the ready line once a request can be answered; False when an engine failed to start."""
        started = time.monotonic()
        said, said_at = "", started
        transport = httpx2.AsyncHTTPTransport(uds=str(self._control_socket))
        async with httpx2.AsyncClient(transport=transport, base_url="http://control", timeout=5) as control:
            while True:
                replicas = await _replicas(control)
                failed = [replica for replica in replicas if replica["state"] == "failed"]
                if failed:
                    _say(f"{failed[0]['id']} did not start: {failed[0]['reason']}")
                    return False
                if any(replica["state"] == "ready" for replica in replicas) and await self._relay_is_ready():
                    print(f"ready {self._url} model={self._config.public_name}", flush=True)  # noqa: T201
                    return True
                state = ", ".join(f"{replica['id']} {replica['state']}" for replica in replicas)
                now = time.monotonic()
                if state != said or now - said_at > _PROGRESS_EVERY_S:
                    _say(f"{state or 'control starting'} ({now - started:.0f} s)")
                    said, said_at = state, now
                await asyncio.sleep(_POLL_S)

    def _begin_to_reload(self) -> None:
        task = asyncio.create_task(self._reload())
        self._reloads.add(task)
        task.add_done_callback(self._reloads.discard)

    async def _reload(self) -> None:
        """Have control read the configuration again, and say how that went."""
        transport = httpx2.AsyncHTTPTransport(uds=str(self._control_socket))
        async with httpx2.AsyncClient(transport=transport, base_url="http://control", timeout=60) as control:
            try:
                answer = (await control.post("/admin/reload")).json()
            except httpx2.HTTPError as error:
                _say(f"not reloaded: control is not there ({error})")
                return
        if "error" in answer:
            _say(f"not reloaded: {answer['error']['message']}")
        else:
            changes = ", ".join(f"{name} {value}" for name, value in answer["changed"].items())
            _say(f"reloaded: {changes or 'nothing differs'}")

    async def _relay_is_ready(self) -> bool:
        # Our own relay, by an address that its certificate need not name.
        async with httpx2.AsyncClient(timeout=5, trust_env=False, verify=False) as client:
            try:
                return (await client.get(f"{self._url}/ready")).status_code == 200
            except httpx2.HTTPError:
                return False

    async def _stop(self) -> None:
        """Relays drain first, while control still answers; then control stops the engines."""
        grace_s = self._config.settle_s + self._config.drain_timeout_s + 5.0
        await asyncio.gather(*(relay.stop(grace_s) for relay in self._relays))
        await self._control.stop(_CONTROL_STOP_S)


def _command(module: str, run_dir: Path, **flags: object) -> list[str]:
    """`python -m module --run-dir DIR --flag value …`."""
    words = [sys.executable, "-m", module, "--run-dir", str(run_dir)]
    for name, value in flags.items():
        words += ["--" + name.replace("_", "-"), str(value)]
    return words


async def _replicas(control: httpx2.AsyncClient) -> list[dict[str, Any]]:
    """The replicas' states as control sees them; empty while control is not there."""
    try:
        answer = await control.get("/admin/replicas")
    except httpx2.HTTPError:
        return []
    return list(answer.json()["data"]) if answer.status_code == 200 else []


def _say(text: str) -> None:
    """A line for the person at the terminal."""
    print(f"gateway: {text}", file=sys.stderr, flush=True)  # noqa: T201
