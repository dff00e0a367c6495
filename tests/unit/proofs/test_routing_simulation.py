"""The simulator that compares routing policies: what must hold whatever the policy, and what the figures rest on."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.proofs.routing.engine import BLOCK_TOKENS, Ask, Engine, Speed
from tests.proofs.routing.simulation import POLICIES, judge, simulate
from tests.proofs.routing.workload import WORKLOADS, asks

SMALL = Speed(blocks=64, most_running=4, prompt_tokens_a_step=64)


def ask(blocks: tuple[object, ...], answer_tokens: int, arrived_s: float = 0.0) -> Ask:
    return Ask(arrived_s, "tenant", blocks, answer_tokens, b"{}", None)


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 3), st.integers(1, 20), st.integers(1, 200), st.floats(0, 1)), max_size=25),
)
def test_an_engine_answers_all_and_never_holds_more_than_it_has(given: list[tuple[int, int, int, float]]) -> None:
    engine = Engine(SMALL)
    wanted = [ask(tuple((prefix, i) for i in range(blocks)), answer) for prefix, blocks, answer, _ in given]
    for one in wanted:
        engine.add(one)
    done = []
    while engine.in_flight:
        done += engine.step()
        assert len(engine.cache) + engine.private <= SMALL.blocks
        assert 0 <= engine.kv_used <= 1
        assert engine.used == sum(1 for users in engine.cache.values() if users)
        assert len(engine.running) <= SMALL.most_running
    assert sorted(map(id, done)) == sorted(map(id, wanted))
    assert all(0 < one.first_s <= one.done_s and one.cached_blocks <= len(one.blocks) for one in done)
    assert engine.private == engine.used == 0


def test_a_cached_prompt_is_answered_sooner() -> None:
    engine = Engine(Speed())
    blocks = tuple(("document", i) for i in range(300))
    first, second = ask(blocks, 5), ask(blocks, 5)
    for one in (first, second):
        engine.add(one)
        began_s = engine.now_s
        while engine.in_flight:
            engine.step()
        one.arrived_s = began_s
    assert first.cached_blocks == 0
    assert second.cached_blocks == 300
    assert second.first_s - second.arrived_s < (first.first_s - first.arrived_s) / 10


def test_what_does_not_fit_beside_the_others_waits() -> None:
    engine = Engine(SMALL)
    for number in range(3):
        engine.add(ask(tuple((number, i) for i in range(20)), 10 * BLOCK_TOKENS))
    engine.step()
    assert (len(engine.running), len(engine.waiting)) == (2, 1)


@pytest.mark.parametrize("policy", POLICIES)
def test_every_request_is_answered_once(policy: str) -> None:
    wanted = asks(WORKLOADS[0], 10, seed=3)
    done = simulate(wanted, POLICIES[policy], 3)
    assert sorted(map(id, done)) == sorted(map(id, wanted))
    assert judge(done, 3).requests == len(wanted)


def test_affinity_finds_more_in_the_caches() -> None:
    documents = next(workload for workload in WORKLOADS if workload.name == "documents")
    rates = {
        name: judge(simulate(asks(documents, 30, 1), POLICIES[name], 4), 4).hit_rate
        for name in ("least-load", "affinity")
    }
    assert rates["affinity"] > 1.2 * rates["least-load"]
