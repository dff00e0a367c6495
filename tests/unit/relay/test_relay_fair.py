"""The queue's order, without a relay: who is served when, and what a flood costs the others."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.relay.fair import FairQueue, Ticket


def ticket(key: str, adapter: str | None = None, cost: float = 100, priority: int = 0, waiter: Any = None) -> Ticket:
    return Ticket(waiter, key, adapter, priority, cost, 10, 0.0, 60.0)


def any_ticket(_: Ticket) -> bool:
    return True


def served(queue: FairQueue, count: int) -> list[str | None]:
    taken = [queue.take(any_ticket) for _ in range(count)]
    return [each.key for each in taken if each is not None]


def test_one_key_is_first_come_first_served() -> None:
    queue = FairQueue()
    tickets = [ticket("a", waiter=n) for n in range(5)]
    for each in tickets:
        queue.add(each)
    assert [queue.take(any_ticket) for _ in range(5)] == tickets
    assert queue.take(any_ticket) is None
    assert (queue.waiting, queue.bytes) == (0, 0)


def test_a_flood_delays_another_key_by_one_request() -> None:
    queue = FairQueue()
    for _ in range(1000):
        queue.add(ticket("flood"))
    assert served(queue, 10) == ["flood"] * 10
    queue.add(ticket("small"))
    assert "small" in served(queue, 2)


def test_keys_share_evenly_by_cost() -> None:
    queue = FairQueue()
    for _ in range(100):
        queue.add(ticket("long", cost=300))
        queue.add(ticket("short", cost=100))
    assert Counter(served(queue, 40)) == {"short": 30, "long": 10}


def test_many_adapters_do_not_make_a_key_more_important() -> None:
    queue = FairQueue()
    for n in range(100):
        queue.add(ticket("many", adapter=f"a{n}"))
        queue.add(ticket("one", adapter="a0"))
    assert Counter(served(queue, 40)) == {"many": 20, "one": 20}


def test_adapters_of_one_key_share_evenly() -> None:
    queue = FairQueue()
    for _ in range(100):
        queue.add(ticket("a", adapter="busy"))
    queue.add(ticket("a", adapter="rare"))
    adapters = [each.adapter for each in (queue.take(any_ticket) for _ in range(3)) if each is not None]
    assert "rare" in adapters


def test_who_was_served_does_not_gain_by_leaving_the_queue() -> None:
    queue = FairQueue()
    for _ in range(50):
        queue.add(ticket("flood", cost=100))
    turns = []
    for _ in range(20):  # one at a time, each ten times as dear
        queue.add(ticket("dear", cost=1000))
        turns.append(served(queue, 1)[0])
        queue_of_dear = [each for each in queue if each.key == "dear"]
        for each in queue_of_dear:
            queue.remove(each)
    assert turns.count("dear") <= 3


def test_priorities_are_strict() -> None:
    queue = FairQueue()
    queue.add(ticket("batch", priority=-1))
    queue.add(ticket("normal"))
    queue.add(ticket("first", priority=5))
    assert served(queue, 3) == ["first", "normal", "batch"]


def test_what_does_not_fit_lets_others_pass_and_keeps_its_turn() -> None:
    queue = FairQueue()
    queue.add(ticket("a", adapter="full"))
    queue.add(ticket("a", adapter="free"))
    queue.add(ticket("b", adapter="full"))
    taken = queue.take(lambda each: each.adapter == "free")
    assert taken is not None and (taken.key, taken.adapter) == ("a", "free")
    assert queue.take(lambda each: each.adapter == "free") is None
    assert queue.waiting == 2


def test_how_many_are_ahead() -> None:
    queue = FairQueue()
    assert queue.ahead("a", 0) == 0
    for _ in range(100):
        queue.add(ticket("flood"))
    assert queue.ahead("flood", 0) == 100
    assert queue.ahead("small", 0) <= 1
    assert queue.ahead("small", -1) == 100  # all of a higher priority
    assert queue.ahead("flood", 1) == 0


def test_a_full_queue_takes_from_who_has_most() -> None:
    queue = FairQueue()
    for n in range(10):
        queue.add(ticket("flood", waiter=n))
    queue.add(ticket("small"))
    gives = queue.yielding("small", 0)
    assert gives is not None and (gives.key, gives.waiter) == ("flood", 9)  # its newest
    assert queue.yielding("flood", 0) is None
    queue.add(ticket("batch", priority=-1))
    lower = queue.yielding("flood", 0)
    assert lower is not None and lower.key == "batch"
    assert queue.yielding("other", -1) is None  # nobody of a higher priority makes room


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from("+-!"), st.integers(0, 3), st.integers(0, 2), st.integers(-1, 1)), max_size=60)
)
def test_nothing_is_lost_or_counted_twice(steps: list[tuple[str, int, int, int]]) -> None:
    queue, inside = FairQueue(), []
    for what, key, adapter, priority in steps:
        if what == "+":
            inside.append(ticket(str(key), str(adapter), priority=priority))
            queue.add(inside[-1])
        elif what == "-":
            taken = queue.take(any_ticket)
            assert (taken is None) == (not inside)
            if taken is not None:
                assert taken.priority == max(each.priority for each in inside)
                inside.remove(taken)
        elif inside:
            queue.remove(inside.pop(key % len(inside)))
        assert queue.waiting == len(inside) == len(list(queue))
        assert queue.bytes == 10 * len(inside)
    assert repr(queue).startswith(f"<FairQueue {len(inside)} waiting")


@pytest.mark.parametrize("keys", [10, 2000])
def test_what_is_remembered_of_idle_keys_is_bounded(keys: int) -> None:
    queue = FairQueue()
    queue.add(ticket("stays", adapter="full"))
    for n in range(keys):
        queue.add(ticket(f"key-{n}", adapter=f"a-{n}"))
        assert queue.take(lambda each: each.adapter != "full") is not None
    [lane] = queue._lanes.values()
    assert len(lane.tenants) <= 1026
