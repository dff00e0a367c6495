"""What each path is: inference, the relay's own answers, or control's. Holds the relay's state of the world."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from gateway import scopes
from gateway.errors import GatewayError, MethodNotAllowed, RateLimited, Unavailable
from gateway.observe import loads, series
from gateway.observe.cells import CellsFull
from gateway.observe.usage import Usage
from gateway.relay.account import Meter
from gateway.relay.auth import authenticate
from gateway.relay.awaiting import Awaiting
from gateway.relay.client import ClientConnection, Handler
from gateway.relay.forward import Inference
from gateway.relay.health import Outliers
from gateway.relay.http import JSON, Request
from gateway.relay.limits import Account, Ledger
from gateway.relay.proxy import ControlProxy
from gateway.relay.route import Engine, Table, engine_head
from gateway.relay.traffic import Endpoint, Limits, Traffic
from gateway.relay.upstream import Address, Origin
from gateway.snapshot import Delta, NotLoaded, Replica, Snapshot

# The only paths that ever reach an engine, each by POST.
ENDPOINTS = {
    endpoint.path: endpoint
    for endpoint in (
        Endpoint(b"/v1/chat/completions", "generate", "chunks"),
        Endpoint(b"/v1/completions", "generate", "chunks", takes_prompt=True),
        Endpoint(b"/v1/embeddings", "embed", names_checkpoint=frozenset({"sglang"})),
        Endpoint(b"/v1/responses", "generate", "responses", has_effects=True),
        Endpoint(b"/tokenize", absent_from=frozenset({"lmdeploy"})),
        Endpoint(b"/detokenize", absent_from=frozenset({"lmdeploy"})),
    )
}

_MOST_WAITING = 2000  # requests of one relay that wait for adapters
_STARTING = "The gateway is starting: it does not know its models yet."


class App:
    """Answers or hands on every request of one relay."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        meter: Meter,
        usage: Usage,
        limits: Limits,
        run_dir: Path,
        note: Callable[[str], None],
        ask: Callable[[str], None] = lambda _: None,
        reload: Callable[[], None] = lambda: None,
    ) -> None:
        """note: takes a line for the operator. ask: tells control that an adapter is wanted."""
        self._loop = loop
        self._meter = meter
        asked = limits.routing == "engine-load"
        self._traffic = Traffic(loop, meter, limits, loads.Loads(run_dir / loads.NAME) if asked else None)
        self._outliers = Outliers()
        self.draining = False  # it is to stop: not ready, though it still answers
        self._note = note
        self._ledger = Ledger(usage)
        self._control = Origin(str(run_dir / "control.sock"), loop)
        self._origins: dict[Address, Origin] = {}
        self._engines: dict[Replica, Engine] = {}
        self._reloads = 0
        self._reload = reload
        self._awaiting = Awaiting(ask, limits.adapter_wait_s, _MOST_WAITING)
        self._table: Table | None = None  # None until control has said who may ask for what

    def __repr__(self) -> str:
        return f"<App {self._table!r}>"

    def apply(self, news: Snapshot | Delta) -> None:
        """Route by what control says from the next request on; those in flight go on as they are."""
        if isinstance(news, Snapshot):
            self._table = Table(news, self._meet(news), self._awaiting)
            self._awaiting.replaced(self._table)
            self._routes_changed()
            return
        if self._table is None:
            raise ValueError("a change came before what it changes")
        self._table.change(news)
        if news.rest is not None:
            self._table.take_rest(news.rest, self._meet(news.rest))
        self._awaiting.changed((*news.changed, *news.removed), self._table)
        self._routes_changed()

    def _routes_changed(self) -> None:
        self._traffic.table = self._table
        self._traffic.admission.reroute()

    def not_loaded(self, answer: NotLoaded) -> None:
        """Waiting for this name is of no use."""
        self._awaiting.refused(answer.name, answer.reason, answer.exists)

    def _meet(self, snapshot: Snapshot) -> dict[str, Engine]:
        """Take over replicas and keys; what is kept for each replica that accepts requests."""
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
        self._ledger.apply(snapshot.keys)
        if snapshot.limits is not None:
            self._traffic.limits = replace(
                self._traffic.limits,
                max_body_bytes=snapshot.limits.max_body_bytes,
                request_timeout_s=snapshot.limits.request_timeout_s,
            )
        if snapshot.reloads != self._reloads:
            self._reloads = snapshot.reloads
            self._reload()
        return {engine.id: engine for engine in engines.values()}

    def tick(self) -> None:
        """A second has passed."""
        self._meter.tick()
        self._ledger.tick()
        self._meter.adapter_waits(self._awaiting.count, self._awaiting.misses)
        self._awaiting.tick()
        self._traffic.admission.tick()
        self._judge_replicas()
        for origin in self._origins.values():
            origin.tick()

    def _judge_replicas(self) -> None:
        """Stay away from those that fail far more than the others."""
        engines = {engine.health: engine for engine in self._engines.values()}
        for health in self._outliers.judge(list(engines), time.monotonic()):
            self._meter.count(series.EJECTIONS, engines[health].id, "outlier")

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
            scope = scopes.INFER if endpoint is not None else scopes.needed(request.method, request.path)
            entry = authenticate(request.headers.get(b"authorization"), self._ledger.entries, scope)
            if entry is not None:
                request.key_id = entry.id
                if endpoint is not None and entry.account is not None:
                    _admit(request, entry.account)
            if endpoint is not None:
                return Inference(client, request, endpoint, self._table, self._traffic)
        except GatewayError as error:
            client.answer_error(error, b"allow: POST\r\n" if isinstance(error, MethodNotAllowed) else b"")
            route = endpoint.path.decode() if endpoint is not None else "control"
            self._meter.plain(request, route, error.status, "refused", request.path[:200].decode("latin-1"))
            return None
        return ControlProxy(client, request, self._control, self._meter, self._traffic.limits.request_timeout_s)

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
        if self.draining:
            reason = "the gateway is stopping"
        if reason is None:
            client.answer(200, JSON, b'{"status":"ready"}')
            self._meter.plain(request, "/ready", 200, "ok")
        else:
            client.answer_error(Unavailable(f"Not ready: {reason}"))
            self._meter.plain(request, "/ready", 503, "refused")


def _admit(request: Request, account: Account) -> None:
    """Count a request in, or say what is left with the refusal. Raises RateLimited."""
    try:
        request.limit_headers = account.enter(request.started_s)
        request.account = account
    except RateLimited:
        request.limit_headers = account.refused(request.started_s)
        raise


_OWN: dict[bytes, Callable[[App, ClientConnection, Request], None]] = {
    b"/health": App._health,
    b"/ready": App._ready,
}
