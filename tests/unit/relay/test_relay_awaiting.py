"""Requests for adapters that are registered and loaded nowhere."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from types import SimpleNamespace

import msgspec
import pytest
from relay_harness import Relay, replica, until
from scripted_upstream import ScriptedUpstream, answer, completion

from gateway.errors import Unavailable
from gateway.relay.admit import ticket_for
from gateway.relay.awaiting import Awaiting
from gateway.relay.http import Request
from gateway.relay.placing import Placing
from gateway.relay.route import Engine, Table
from gateway.snapshot import Delta, Model, NotLoaded, Snapshot

COLD = Model("french", "demo", "a-0123456789ab", {}, "", on_demand=True)
WARM = msgspec.structs.replace(COLD, engine_models={"r0": "a-0123456789ab"}, rows={"r0": 2000}, on_demand=False)


async def serving(relay: Relay, *names: Model) -> tuple[ScriptedUpstream, list[str]]:
    """An engine, and what the relay asks of control."""
    engine = await relay.engine(*[[answer(completion(model="a-0123456789ab"))]] * 8, serve=False)
    asked: list[str] = []
    relay.app._awaiting._ask = asked.append
    base = Model("demo", None, None, {"r0": "demo"}, "")
    relay.serve(replica(engine), models={"demo": base, **{model.id: model for model in names}})
    return engine, asked


def change(relay: Relay, *models: Model, removed: tuple[str, ...] = ()) -> None:
    relay.version += 1
    relay.app.apply(Delta(relay.version, {model.id: model for model in models}, removed))


async def test_requests_wait_and_go_on_when_it_is_loaded(relay: Relay) -> None:
    engine, asked = await serving(relay, COLD)
    clients = [await relay.client() for _ in range(3)]
    for client in clients:
        client.chat(model="french")
    await until(lambda: relay.app._awaiting.count == 3)
    assert asked == ["french"]
    assert (await relay.ask()).status == 200  # the base is served meanwhile
    change(relay, WARM)
    for client in clients:
        assert (await client.answer()).json["model"] == "french"
    assert [seen.json["model"] for seen in engine.seen][1:] == ["a-0123456789ab"] * 3
    assert (relay.in_flight(), relay.app._awaiting.count) == (0, 0)
    assert list(relay.cells.values[2000:2002]) == [0, 3]  # none in flight, three ever
    relay.seconds(1)
    assert relay.counted("tunegate_adapter_misses") == {("0",): 3}


async def test_a_wait_ends_with_a_hint_when_it_takes_too_long(relay: Relay) -> None:
    _, asked = await serving(relay, COLD)
    relay.app._awaiting._limit_s = 0.0
    client = await relay.client()
    client.chat(model="french")
    await until(lambda: relay.app._awaiting.count)
    relay.seconds(1)
    late = await client.answer()
    assert (late.status, late.error["code"], late.headers["retry-after"]) == (503, "adapter_not_loaded", "5")
    assert (await relay.settled()).outcome == "adapter_not_loaded"
    assert asked == ["french"]


async def test_control_is_asked_again_while_requests_wait(relay: Relay) -> None:
    _, asked = await serving(relay, COLD)
    client = await relay.client()
    client.chat(model="french")
    await until(lambda: asked)
    relay.seconds(3)
    assert asked == ["french"] * 4
    client.go()
    await until(lambda: relay.entries)
    assert ((await relay.settled()).status, relay.app._awaiting.count) == (499, 0)
    relay.seconds(1)
    assert len(asked) == 4


async def test_control_says_that_it_cannot_be_loaded(relay: Relay) -> None:
    await serving(relay, COLD)
    for exists, status in ((True, 503), (False, 404)):
        client = await relay.client()
        client.chat(model="french")
        await until(lambda: relay.app._awaiting.count)
        relay.app.not_loaded(NotLoaded("french", "no memory", exists))
        refused = await client.answer()
        assert refused.status == status
        assert "no memory" in refused.error["message"]


async def test_it_is_deleted_while_requests_wait(relay: Relay) -> None:
    await serving(relay, COLD)
    client = await relay.client()
    client.chat(model="french")
    await until(lambda: relay.app._awaiting.count)
    change(relay, removed=("french",))
    assert (await client.answer()).status == 404


async def test_no_more_than_the_bound_wait(relay: Relay) -> None:
    await serving(relay, COLD)
    relay.app._awaiting._limit = 1
    client = await relay.client()
    client.chat(model="french")
    await until(lambda: relay.app._awaiting.count)
    refused = await relay.ask(model="french")
    assert (refused.status, refused.error["code"]) == (503, "adapter_not_loaded")


async def test_versions_that_are_not_listed_are_asked_for(relay: Relay) -> None:
    _, asked = await serving(relay, COLD)
    client = await relay.client()
    client.chat(model="french@v3")
    await until(lambda: asked == ["french@v3"])
    assert (await relay.ask(model="german@v3")).status == 404
    change(relay, msgspec.structs.replace(WARM, id="french@v3"))
    assert (await client.answer()).json["model"] == "french@v3"


async def test_a_new_picture_of_control_lets_all_try_again(relay: Relay) -> None:
    engine, _ = await serving(relay, COLD)
    client = await relay.client()
    client.chat(model="french")
    await until(lambda: relay.app._awaiting.count)
    relay.serve(replica(engine), models={"demo": Model("demo", None, None, {"r0": "demo"}, ""), "french": WARM})
    assert (await client.answer()).status == 200


def test_a_change_costs_what_changed() -> None:
    models = {f"m{i}": Model(f"m{i}", "demo", f"a-{i:012x}", {}, "", on_demand=True) for i in range(10_000)}
    engines: dict[str, Engine] = {}
    table = Table(Snapshot(1, (), models, {}), engines, Awaiting(lambda _: None, 1.0, 1))
    table.change(Delta(2, {"m1": WARM}, ("m2",)))
    assert models is table._models  # not a copy of ten thousand names
    assert (table.version, models["m1"], "m2" in models) == (2, WARM, False)
    table.take_rest(Snapshot(3, (), {}, {}, "embed"), engines)
    assert (table.task, table._models is models) == ("embed", True)


async def test_a_defect_of_one_that_waits_ends_that_one_only(relay: Relay, monkeypatch: pytest.MonkeyPatch) -> None:
    await serving(relay, COLD)
    clients = [await relay.client() for _ in range(3)]
    for number, client in enumerate(clients):
        client.chat(model="french", n=number + 1)
        await until(lambda count=number + 1: relay.app._awaiting.count == count)
    find, reported = Placing._find_route, []

    def broken(self: Placing) -> None:
        if b'"n": 2' in self._body:
            raise OverflowError("a defect")
        find(self)

    monkeypatch.setattr(Placing, "_find_route", broken)
    asyncio.get_running_loop().set_exception_handler(lambda _, context: reported.append(context["exception"]))
    change(relay, WARM)
    assert [(await client.answer()).status for client in clients] == [200, 500, 200]
    assert (len(reported), relay.in_flight(), relay.app._awaiting.count) == (1, 0, 0)


@pytest.mark.parametrize("tokens", [b"9" * 400, b"1e999", b'"\xff"', b"[" * 900 + b"]" * 900])
async def test_a_length_that_cannot_be_is_estimated(relay: Relay, tokens: bytes) -> None:
    account_less = Request(b"POST", b"/v1/completions", {}, True)
    body = b'{"model":"demo","max_tokens":%b}' % tokens
    cost = ticket_for(SimpleNamespace(), account_less, None, body, 1.0).cost  # type: ignore[arg-type]
    assert 256 <= cost <= 1_001_000


@dataclass(eq=False)
class Parked:
    """A request as far as its place is concerned."""

    parked_key: str | None
    parked_bytes: int


async def test_no_key_has_more_than_half_of_the_places(relay: Relay) -> None:
    awaiting = Awaiting(lambda _: None, 1.0, 4)
    for key, bytes_ in (("a", 1), ("a", 1), ("b", 63_000_000)):
        awaiting.park("french", Parked(key, bytes_), 0.0)  # type: ignore[arg-type]
    for key, bytes_ in (("a", 1), ("c", 2_000_000)):
        with pytest.raises(Unavailable):
            awaiting.park("french", Parked(key, bytes_), 0.0)  # type: ignore[arg-type]
    assert len(awaiting._release("french")) == 3
    assert (awaiting.count, awaiting._bytes, awaiting._by_key) == (0, 0, {})
