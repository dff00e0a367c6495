"""`python -m gateway.control`: the control process, on a Unix socket in the run directory.

SIGTERM stops the engines too. Any other death leaves them running, for the next control process to adopt.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import logging
import os
import signal
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

import uvicorn

from backends import process
from backends.base import BackendError
from gateway.config import ConfigError
from gateway.control import wiring
from gateway.control.hosting import end_others
from gateway.control.log import Aside, JsonLines
from gateway.control.running import Notebook
from gateway.control.store import StoreUnavailable
from gateway.errors import StorageFull

_STDERR = 2
_CONFIG_REFUSED = 2  # exit status: starting it again would not help
_OPEN_REQUESTS_S = 5  # for requests in flight when control stops


def main() -> None:
    """Run until SIGTERM."""
    args = _arguments()
    handler = Aside(_STDERR)
    handler.setFormatter(JsonLines())
    logging.basicConfig(level=logging.INFO, handlers=[handler])
    logging.getLogger("httpx2").setLevel(logging.WARNING)
    for library in ("alembic", "uvicorn"):
        logging.getLogger(library).setLevel(logging.WARNING)
    args.run_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
    process.end_strays(args.run_dir)
    try:
        notebook = Notebook(args.config_json)
        running = notebook.read()
        end_others(args.run_dir, {f"r{index}" for index in running.indices})
        control = wiring.build(running, args.run_dir, args.main_pid, notebook)
        asyncio.run(_serve(control, args.run_dir))
    except (ConfigError, BackendError) as error:
        _refuse(error, _CONFIG_REFUSED)
    except (StoreUnavailable, StorageFull) as error:
        _refuse(error, 1)


def _refuse(error: Exception, status: int) -> NoReturn:
    print(f"gateway: {error}", file=sys.stderr)  # noqa: T201 - for the person at the terminal
    sys.exit(status)


class _Server(uvicorn.Server):
    """uvicorn, with the signals left to us: engines are stopped after the last request."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


async def _serve(control: wiring.Control, run_dir: Path) -> None:
    server = _Server(
        uvicorn.Config(
            control.app,
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            timeout_graceful_shutdown=_OPEN_REQUESTS_S,
        )
    )
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, setattr, server, "should_exit", True)
    await control.core.open()
    await control.desk.open()
    with _listen(run_dir / "control.sock") as listener:
        running = [asyncio.create_task(work) for work in (control.core.run(), control.desk.run())]
        for task in running:
            task.add_done_callback(lambda _: setattr(server, "should_exit", True))
        await server.serve(sockets=[listener])
    for task in running:
        if task.done():
            task.result()  # a defect: its traceback ends this process, and engines are adopted by the next
        task.cancel()
    await asyncio.wait(running)
    await control.core.stop_engines()
    await control.core.keys.fold()
    control.store.close()


def _listen(path: Path) -> socket.socket:
    """A listening socket that only this user can open, in place of what an earlier process left."""
    path.unlink(missing_ok=True)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    mask = os.umask(0o177)
    try:
        listener.bind(str(path))
    finally:
        os.umask(mask)
    listener.listen(128)
    listener.setblocking(False)
    return listener


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="gateway.control", description=__doc__)
    parser.add_argument(
        "--config-json", type=Path, required=True, help="what is to run: lines of gateway.control.running"
    )
    parser.add_argument("--run-dir", type=Path, required=True, help="where sockets and state files are")
    parser.add_argument("--main-pid", type=int, required=True, help="engines end with this process")
    return parser.parse_args()


if __name__ == "__main__":
    main()
