"""`python -m gateway.relay`: one relay process on a listening socket that its parent opened."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import functools
import gc
import resource
import signal
import socket
import ssl
import sys
from collections.abc import Callable
from pathlib import Path

import uvloop

from gateway import tls
from gateway.observe.cells import Cells, Peers
from gateway.observe.log import AccessLog
from gateway.observe.usage import Usage
from gateway.relay import policy
from gateway.relay.account import Meter
from gateway.relay.app import App
from gateway.relay.link import Link
from gateway.relay.server import Server
from gateway.relay.traffic import Limits
from gateway.snapshot import Delta, Snapshot

_TICK_S = 1.0
_FIRST_SNAPSHOT_S = 5.0  # control sends it at once where it runs


def main() -> None:
    """Serve until SIGTERM, then drain."""
    args = _arguments()
    _, most_files = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most_files, most_files))
    with socket.socket(fileno=args.fd) as listener:
        listener.setblocking(False)
        uvloop.run(_serve(args, listener))


async def _serve(args: argparse.Namespace, listener: socket.socket) -> None:
    loop = asyncio.get_running_loop()
    stopping = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stopping.set)
    cells = {index: args.run_dir / f"relay-{index}.cells" for index in range(args.relays)}
    own = Cells(cells.pop(args.index))
    log = AccessLog(sys.stderr.fileno(), loop)
    meter = Meter(own, Peers(cells), args.index, log.add)
    usage = Usage(args.run_dir / f"relay-{args.index}.usage", args.relays)
    link = Link(args.run_dir / "snapshots.sock", args.index, log.note)
    limits = Limits(
        args.max_body_bytes,
        args.request_timeout_s,
        args.adapter_wait_s,
        args.max_in_flight,
        -(-args.max_waiting // args.relays),
        args.max_wait_s,
        args.routing,
    )
    context = _certificate(args)
    reload = functools.partial(_reload, args, context, log.note)
    app = App(loop, meter, usage, limits, args.run_dir, log.note, link.ask, reload)
    server = Server(app.handle, loop)
    _every_second(loop, (app.tick, server.tick))
    informed = asyncio.Event()

    def apply(news: Snapshot | Delta) -> None:
        app.apply(news)
        informed.set()

    following = loop.create_task(link.follow(apply, app.not_loaded))
    following.add_done_callback(lambda _: stopping.set())  # deaf to control: better started anew
    gc.collect()
    gc.freeze()  # what is here stays: no collection needs to look at it again
    # Connections wait in the socket's queue, or go to another relay, rather than meet one that knows no models.
    with contextlib.suppress(TimeoutError):
        await asyncio.wait_for(informed.wait(), _FIRST_SNAPSHOT_S)
    await server.start(listener, context)
    await stopping.wait()
    app.draining = True
    await server.settle(args.settle_s)
    await server.drain(args.drain_timeout_s)
    meter.tick()
    log.flush()
    if not following.cancel():
        following.result()  # raises what ended it


def _every_second(loop: asyncio.AbstractEventLoop, calls: tuple[Callable[[], None], ...]) -> None:
    """One timer for all that waits: silence, idle connections, CPU time. Requests have none of their own."""

    def tick() -> None:
        loop.call_later(_TICK_S, tick)
        for call in calls:
            call()

    loop.call_later(_TICK_S, tick)


def _certificate(args: argparse.Namespace) -> ssl.SSLContext | None:
    """What clients are served with; None for plain HTTP."""
    if args.tls_cert is None:
        return None
    try:
        return tls.server_context(args.tls_cert, args.tls_key)
    except tls.TlsError as error:  # it was good when the gateway started
        sys.exit(f"gateway: {error}")


def _reload(args: argparse.Namespace, context: ssl.SSLContext | None, note: Callable[[str], None]) -> None:
    """Serve new connections with the certificate as it is on the disk now; a bad one changes nothing."""
    try:
        if context is not None:
            tls.reload(context, args.tls_cert, args.tls_key)
    except tls.TlsError as error:
        note(f"the certificate stays as it was: {error}")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="gateway.relay", description=__doc__)
    parser.add_argument("--index", type=int, required=True, help="which of the relays this is, from 0")
    parser.add_argument("--relays", type=int, default=1, help="how many there are")
    parser.add_argument("--fd", type=int, required=True, help="the listening socket, inherited")
    parser.add_argument("--run-dir", type=Path, required=True, help="where the sockets and cells are")
    parser.add_argument("--max-body-bytes", type=int, default=16_000_000)
    parser.add_argument("--request-timeout-s", type=int, default=600)
    parser.add_argument("--adapter-wait-s", type=int, default=60)
    parser.add_argument("--routing", choices=policy.ROUTINGS, default="least-load")
    parser.add_argument("--max-in-flight", type=int, default=1024)
    parser.add_argument("--max-waiting", type=int, default=1024)
    parser.add_argument("--max-wait-s", type=int, default=60)
    parser.add_argument("--settle-s", type=int, default=0)
    parser.add_argument("--drain-timeout-s", type=int, default=30)
    parser.add_argument("--tls-cert", type=Path)
    parser.add_argument("--tls-key", type=Path)
    return parser.parse_args()


if __name__ == "__main__":
    main()
