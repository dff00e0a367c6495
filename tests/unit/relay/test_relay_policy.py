"""The routing policies as pure functions, and the key that affinity goes by."""

from __future__ import annotations

import json
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from relay_harness import Relay, replica
from scripted_upstream import answer, completion

from gateway.observe.loads import Loads
from gateway.relay.policy import BOUND, ROUTINGS, affinity, chooser, engine_load, least_load, prefix_key
from gateway.relay.route import Candidate, Engine
from gateway.relay.traffic import Limits

LOADS = st.lists(st.integers(0, 50), min_size=1, max_size=8)


def candidates(count: int) -> list[Candidate]:
    engines = (Engine(f"r{row}", row, "vllm", SimpleNamespace(), b"") for row in range(count))  # type: ignore[arg-type]
    return [Candidate(engine, "demo", b"", None) for engine in engines]


@given(LOADS, st.integers(0, 1000))
def test_least_load_takes_one_of_the_least_loaded(loads: list[int], turn: int) -> None:
    assert loads[least_load(loads, turn)] == min(loads)


def test_equals_take_turns() -> None:
    assert [least_load([0, 0, 0], turn) for turn in range(6)] == [0, 1, 2, 0, 1, 2]
    assert [least_load([1, 0, 0], turn) for turn in range(6)] == [1, 1, 2, 1, 1, 2]


@given(LOADS, st.integers(0, 2**32 - 1))
def test_affinity_never_exceeds_the_bound(loads: list[int], key: int) -> None:
    chosen = affinity(loads, range(len(loads)), key)
    assert loads[chosen] < BOUND * (sum(loads) + 1) / len(loads) + 1


@given(st.integers(0, 2**32 - 1), st.integers(2, 8), st.data())
def test_affinity_keeps_to_its_replica_when_another_leaves(key: int, count: int, data: st.DataObject) -> None:
    rows = list(range(count))
    home = rows[affinity([0] * count, rows, key)]
    rows.remove(data.draw(st.sampled_from([row for row in rows if row != home])))
    assert rows[affinity([0] * len(rows), rows, key)] == home


def test_affinity_spreads_keys_evenly() -> None:
    homes = [affinity([0] * 4, range(4), prefix_key(None, chat(f"question {i}"))) for i in range(4000)]
    assert all(850 < homes.count(row) < 1150 for row in range(4))


def test_engine_load_avoids_queues_and_full_caches() -> None:
    assert engine_load([3, 3], [5, 0], [0.5, 0.5], 0) == 1
    assert engine_load([3, 4], [0, 0], [0.95, 0.2], 0) == 1
    assert engine_load([3, 4], [0, 0], [0.0, 0.0], 1) == 0  # nothing known: the least loaded


def chat(*texts: str, system: str = "Be brief.", **members: object) -> bytes:
    roles = ("user", "assistant") * len(texts)
    messages = [{"role": "system", "content": system}]
    messages += [{"role": role, "content": text} for role, text in zip(roles, texts, strict=False)]
    return json.dumps({"messages": messages, **members}).encode()


def test_a_conversation_keeps_its_key() -> None:
    first = prefix_key(None, chat("What is a tree?", max_tokens=5))
    assert first == prefix_key(None, chat("What is a tree?", "A plant.", "And a bush?", stream=True, max_tokens=9))
    assert first != prefix_key(None, chat("What is a bush?"))
    assert first != prefix_key("a-1", chat("What is a tree?"))  # engines share no cache between adapters
    assert first != prefix_key(None, chat("What is a tree?", system="Be long."))


def test_a_long_common_prompt_decides_alone() -> None:
    system = "You know everything about trees. " * 100
    assert prefix_key(None, chat("a", system=system)) == prefix_key(None, chat("b", system=system))


@pytest.mark.parametrize("name", ["prompt", "input"])
def test_prompts_of_other_routes(name: str) -> None:
    texts = [json.dumps({"model": "m", "seed": 7, name: text * 300}).encode() for text in ("tree ", "bush ")]
    assert prefix_key(None, texts[0]) != prefix_key(None, texts[1])
    assert prefix_key(None, texts[0]) == prefix_key(None, texts[0].replace(b'"seed": 7', b'"seed": 8'))


@given(st.binary(max_size=300))
def test_any_bytes_have_a_key(body: bytes) -> None:
    assert 0 <= prefix_key("a", body) < 2**32


@pytest.mark.parametrize("routing", ROUTINGS)
def test_a_replica_that_failed_comes_last_for_a_while(routing: str, tmp_path: Path) -> None:
    choose = chooser(routing, Loads(tmp_path / "loads"))
    choices = candidates(2)
    home = choose(choices, lambda row: 0, 9.0, 0, None, b"{}").engine
    other = next(one.engine for one in choices if one.engine is not home)
    home.health.avoid_until_s = 10.0
    assert choose(choices, {home.row: 0, other.row: 7}.__getitem__, 9.0, 0, None, b"{}").engine is other
    assert choose(choices, {home.row: 0, other.row: 7}.__getitem__, 10.0, 0, None, b"{}").engine is home
    other.health.avoid_until_s = 10.0
    assert choose(choices, lambda row: 0, 9.0, 0, None, b"{}").engine is home  # no other is better
    assert choose(choices[:1], lambda row: 0, 9.0, 0, None, b"{}") is choices[0]


def test_what_engines_said_is_seen_until_it_is_old(tmp_path: Path) -> None:
    written, read = Loads(tmp_path / "loads"), Loads(tmp_path / "loads")
    now_s = time.monotonic()
    assert read.of([0, 3], now_s) == ([0, 0], [0.0, 0.0])
    written.write(3, 4, 0.25)
    assert read.of([0, 3], now_s) == ([0, 4], [0.0, 0.25])
    assert read.of([3], now_s + 60) == ([0], [0.0])
    choose = chooser("engine-load", read)
    assert choose([candidates(4)[0], candidates(4)[3]], lambda row: 0, now_s, 1, None, b"").engine.row == 0


async def test_the_operators_choice_reaches_requests(tmp_path: Path) -> None:
    """One conversation stays at one replica, where the least loaded would take turns; others go elsewhere."""
    relay = Relay(tmp_path, Limits(100_000, 30, routing="affinity"))
    await relay.start()
    try:
        engines = [await relay.engine([answer(completion())], serve=False) for _ in range(2)]
        relay.serve(replica(engines[0]), replica(engines[1], "r1", 1))
        for _ in range(6):
            assert (await relay.ask(messages=[{"role": "user", "content": "What is a tree?"}])).status == 200
        assert sorted(len(engine.seen) for engine in engines) == [0, 6]
        for number in range(12):
            await relay.ask(messages=[{"role": "user", "content": f"What is {number}?"}])
        assert all(len(engine.seen) > 1 for engine in engines)
    finally:
        await relay.close()
