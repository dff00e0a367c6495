"""Choosing replicas and resolving names."""

from __future__ import annotations

import hashlib
import re
import time
from types import SimpleNamespace

import pytest

from gateway.errors import ModelNotFound, Unauthenticated, Unavailable
from gateway.relay.auth import authenticate
from gateway.relay.limits import Entry
from gateway.relay.route import Engine, Table, engine_head, nearest
from gateway.snapshot import Key, Model, Replica, Snapshot


def engine(row: int) -> Engine:
    return Engine(f"r{row}", row, "vllm", SimpleNamespace(), b"")  # type: ignore[arg-type]


def table(models: dict[str, Model], replicas: int = 2) -> Table:
    rows = tuple(Replica(f"r{i}", i, "vllm", "127.0.0.1", 1000 + i, "", True) for i in range(replicas))
    return Table(Snapshot(7, rows, models, {}), {f"r{i}": engine(i) for i in range(replicas)})


BASE = Model("demo", None, None, {"r0": "demo", "r1": "demo"}, "")
ADAPTER = Model("french", "demo", "a-1", {"r1": "demo:a-1", "gone": "a-1"}, "")


def test_a_name_resolves_to_the_replicas_that_have_it() -> None:
    known = table({"demo": BASE, "french": ADAPTER})
    base = known.resolve("demo")
    assert [(c.engine.id, c.override, c.engine_name) for c in base.candidates] == [("r0", b"", None), ("r1", b"", None)]
    (only,) = known.resolve("french").candidates
    assert (only.engine.id, only.override) == ("r1", b',"model":"demo:a-1"')
    assert only.engine_name == re.compile(rb'"model":\s*"demo:a\-1"')
    assert known.resolve("french") is known.resolve("french")
    assert repr(known) == "<Table v7: 2 names on r0, r1>"


def test_a_base_that_the_engine_calls_otherwise() -> None:
    known = table({"alias": Model("demo", None, None, {"r0": "demo"}, "")})
    route = known.resolve("alias")
    assert route.candidates[0].override == b',"model":"demo"'
    assert route.label == "demo"
    assert route.public == b'"model":"alias"'


def test_names_that_cannot_be_called() -> None:
    known = table(
        {
            "demo": BASE,
            "new": Model("new", "demo", "a-2", {}, "it is loading"),
            "away": Model("x", None, None, {"r9": "x"}, ""),
        }
    )
    with pytest.raises(ModelNotFound) as missing:
        known.resolve("demmo")
    assert missing.value.message == "The model `demmo` does not exist. Did you mean `demo`?"
    with pytest.raises(ModelNotFound) as strange:
        known.resolve("x" * 5000)
    assert len(strange.value.message) < 250
    with pytest.raises(Unavailable) as loading:
        known.resolve("new")
    assert "it is loading" in loading.value.message
    with pytest.raises(Unavailable) as away:
        known.resolve("away")
    assert "no replica" in away.value.message


def test_ready_needs_a_base() -> None:
    assert table({"demo": BASE, "french": ADAPTER}).unready() is None
    waiting = Model("demo", None, None, {}, "the engine is starting")
    assert table({"demo": waiting, "french": ADAPTER}).unready() == "the engine is starting"
    assert table({}).unready() == "no engine replica is ready yet"


def test_a_wrong_name_costs_little_whatever_the_number_of_adapters() -> None:
    names = [f"adapter-{i}" for i in range(50_000)]
    started_s = time.process_time()
    assert nearest("adapter-12x", names)
    nearest("x" * 100_000, names)
    assert time.process_time() - started_s < 0.5


def test_the_engines_head_has_its_key_and_nothing_of_the_client() -> None:
    local = engine_head(Replica("r0", 0, "vllm", "127.0.0.1", 8001, "secret", True))
    assert local == b"host: 127.0.0.1:8001\r\ncontent-type: application/json\r\nauthorization: Bearer secret\r\n"
    attached = engine_head(Replica("r0", 0, "vllm", "::1", 8001, "", True))
    assert attached == b"host: [::1]:8001\r\ncontent-type: application/json\r\n"


def test_authentication() -> None:
    assert authenticate(None, {}, "infer") is None
    assert authenticate(b"Bearer whatever", {}, "infer") is None
    entry = Entry(Key("k1", frozenset({"infer"}), row=0), None)
    keys = {hashlib.sha256(b"sekret").hexdigest(): entry}
    assert authenticate(b"Bearer sekret", keys, "infer") is entry
    assert authenticate(b"bearer  sekret ", keys, "infer") is entry
    for header in (None, b"", b"Bearer", b"Bearer ", b"Bearer wrong", b"Basic sekret", b"sekret"):
        with pytest.raises(Unauthenticated) as refused:
            authenticate(header, keys, "infer")
        assert "sekret" not in refused.value.message
        assert refused.value.code == "invalid_api_key"


@pytest.mark.parametrize("version", ["0" * 70_000, "1234567890", "٣", ""])
def test_a_version_that_cannot_be_is_not_asked_for(version: str) -> None:
    cold = Model("french", "demo", "a-1", {}, "", on_demand=True)
    with pytest.raises(ModelNotFound):
        table({"demo": BASE, "french": cold}).resolve(f"french@v{version}")
