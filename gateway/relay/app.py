"""What each path is: inference, the relay's own answers, or control's. Holds the relay's state of the world."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

from gateway.errors import GatewayError, MethodNotAllowed, Unavailable
from gateway.observe.cells import CellsFull
from gateway.relay.account import Meter
from gateway.relay.auth import authenticate
from gateway.relay.client import ClientConnection, Handler
from gateway.relay.forward import Endpoint, Inference, Limits
from gateway.relay.http import JSON, Request
from gateway.relay.proxy import ControlProxy
from gateway.relay.route import Engine, Table, engine_head
from gateway.relay.upstream import Address, Origin
from gateway.snapshot import Replica, Snapshot

# The only paths that ever reach an engine, each by POST.
ENDPOINTS = {
    endpoint.path: endpoint
    for endpoint in (
        Endpoint(b"/v1/chat/completions", "generate", "chunks"),
        Endpoint(b"/v1/completions", "generate", "chunks", takes_prompt=True),
        Endpoint(b"/v1/embeddings", "embed", names_checkpoint=frozenset({"sglang"})),
        Endpoint(b"/v1/responses", "generate", "responses"),
        Endpoint(b"/tokenize", absent_from=frozenset({"lmdeploy"})),
        Endpoint(b"/detokenize", absent_from=frozenset({"lmdeploy"})),
    )
}

_STARTING = "The gateway is starting: it does not know its models yet."


class App:
    """Answers or hands on every request of one relay."""

    def __init__(
        self, loop: asyncio.AbstractEventLoop, meter: Meter, limits: Limits, run_dir: Path, note: Callable[[str], None]
    ) -> None:
        """note: takes a line for the operator."""
        self._loop = loop
        self._meter = meter
        self._limits = limits
        self._note = note
        self._control = Origin(str(run_dir / "control.sock"), loop)
        self._origins: dict[Address, Origin] = {}
        self._engines: dict[Replica, Engine] = {}
        self._table: Table | None = None  # None until control has said who may ask for what

    def __repr__(self) -> str:
        return f"<App {self._table!r}>"

    def apply(self, snapshot: Snapshot) -> None:
        """Route by `snapshot` from the next request on; those in flight go on as they are."""
        engines: dict[Replica, Engine] = {}
        for replica in snapshot.replicas:
            if replica.accepting:
                try:
                    engines[replica] = self._engines.get(replica) or self._engine(replica)
                except CellsFull as error:
                    self._note(f"replica {replica.id} gets no requests: {error}")
        self._engines = engines
        addresses = {(replica.host, replica.port) for replica in snapshot.replicas}
        for address in [address for address in self._origins if address not in addresses]:
            self._origins.pop(address).close()
        self._table = Table(snapshot, {engine.id: engine for engine in engines.values()})

    def tick(self) -> None:
        """A second has passed."""
        self._meter.tick()
        for origin in self._origins.values():
            origin.tick()

    def handle(self, client: ClientConnection, request: Request) -> Handler | None:
        """Begin to answer a request whose head has come (client.Handle)."""
        endpoint = ENDPOINTS.get(request.path)
        own = _OWN.get(request.path)
        try:
            if own is not None:
                own(self, client, request)
                return None
            if endpoint is not None and request.method != b"POST":
                raise MethodNotAllowed(f"{endpoint.path.decode()} takes POST, not {request.method.decode()}.")
            if self._table is None:
                raise Unavailable(_STARTING)
            request.key_id = authenticate(request.headers.get(b"authorization"), self._table.key_digests)
            if endpoint is not None:
                return Inference(client, request, endpoint, self._table, self._meter, self._limits)
        except GatewayError as error:
            client.answer_error(error, b"allow: POST\r\n" if isinstance(error, MethodNotAllowed) else b"")
            route = endpoint.path.decode() if endpoint is not None else "control"
            self._meter.plain(request, route, error.status, "refused", request.path[:200].decode("latin-1"))
            return None
        return ControlProxy(client, request, self._control, self._meter, self._limits.request_timeout_s)

    def _engine(self, replica: Replica) -> Engine:
        address = (replica.host, replica.port)
        origin = self._origins.get(address)
        if origin is None:
            origin = self._origins[address] = Origin(address, self._loop)
        self._meter.name_replica(replica.index, replica.id)
        return Engine(replica.id, replica.index, replica.backend, origin, engine_head(replica))

    def _health(self, client: ClientConnection, request: Request) -> None:
        """The process is alive."""
        client.answer(200, JSON, b'{"status":"ok"}')
        self._meter.plain(request, "/health", 200, "ok")

    def _ready(self, client: ClientConnection, request: Request) -> None:
        """A base model can be called."""
        reason = self._table.unready() if self._table is not None else _STARTING
        if reason is None:
            client.answer(200, JSON, b'{"status":"ready"}')
            self._meter.plain(request, "/ready", 200, "ok")
        else:
            client.answer_error(Unavailable(f"Not ready: {reason}"))
            self._meter.plain(request, "/ready", 503, "refused")


_OWN: dict[bytes, Callable[[App, ClientConnection, Request], None]] = {
    b"/health": App._health,
    b"/ready": App._ready,
}
