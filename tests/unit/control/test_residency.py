"""The decision who holds what, as a pure function."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from gateway.control.residency import Held, Rules, Seat, Want, decide, ranked, spread

RULES = Rules(stay_s=1.0, unasked_s=3.0, patience_s=0.5, turn_s=5.0)
NOW_S = 100.0


def held(
    *, since_s: float | None = 0.0, used_s: float = 0.0, in_flight: int = 0, worth: float = 0.0, asked: bool = True
) -> Held:
    return Held(since_s, used_s, in_flight, worth, asked)


def after(holding: dict[str, Held], *wants: Want, room: int = 2, spare: int = 1) -> set[str]:
    """What one replica is to hold."""
    return set(decide({"r0": Seat(holding, 0.0)}, wants, room, spare, NOW_S, RULES)["r0"])


def waiting(name: str, since_s: float = NOW_S, worth: float = 0.0) -> Want:
    return Want(name, waiting_since_s=since_s, worth=worth)


def test_the_least_worth_gives_way_and_among_equals_the_least_recently_used() -> None:
    assert after({"a": held(used_s=9), "b": held(used_s=5)}, waiting("c")) == {"a", "c"}
    assert after({"a": held(used_s=9, worth=0.1), "b": held(used_s=5, worth=0.2)}, waiting("c")) == {"b", "c"}


def test_nothing_gives_way_before_it_has_stayed_or_while_it_is_loaded() -> None:
    assert after({"a": held(since_s=NOW_S - 0.5), "b": held(since_s=None)}, waiting("c", 0.0)) == {"a", "b"}


def test_what_had_no_request_yet_stays_longer_since_those_that_waited_for_it_are_on_their_way() -> None:
    here = {"a": held(used_s=1, since_s=NOW_S - 2, asked=False), "b": held(used_s=2, since_s=NOW_S - 2)}
    assert after(here, waiting("c", 0.0)) == {"a", "c"}
    assert after(here | {"a": held(used_s=1, since_s=NOW_S - 4, asked=False)}, waiting("c", 0.0)) == {"b", "c"}


def test_what_is_worth_much_gives_way_only_to_a_wait_that_lasts() -> None:
    busy = {"a": held(worth=3.0), "b": held(worth=4.0)}
    assert after(busy, waiting("c")) == {"a", "b"}
    assert after(busy, waiting("c", NOW_S - 0.6)) == {"b", "c"}
    assert after(busy, Want("c", worth=5.0)) == {"a", "b"}  # without a wait it takes twice the worth
    assert after(busy, Want("c", worth=7.0)) == {"b", "c"}


def test_in_use_they_take_turns() -> None:
    used = {"a": held(since_s=NOW_S - 9, in_flight=1), "b": held(since_s=NOW_S - 8, in_flight=1)}
    assert after(used, waiting("c")) == {"a", "b"}
    assert after(used, waiting("c", NOW_S - 1)) == {"b", "c"}
    fresh = {"a": held(since_s=NOW_S - 4, in_flight=1), "b": held(since_s=NOW_S - 3, in_flight=1)}
    assert after(fresh, waiting("c", NOW_S - 60)) == {"a", "b"}


def test_pins_stay_and_versions_on_their_way_up_use_the_spare_room() -> None:
    full = {"a": held(), "b": held(used_s=1)}
    assert after(full, Want("a", pinned=True), waiting("c", 0.0)) == {"a", "c"}
    assert after(full, Want("c", rising=True)) == {"a", "b", "c"}
    assert after(full | {"c": held(used_s=2)}) == {"b", "c"}  # it has risen: the room is free again


def test_the_one_that_waits_longest_comes_first() -> None:
    wants = [waiting("c", NOW_S - 1), waiting("d", NOW_S - 3), waiting("e", NOW_S - 2)]
    assert after({"a": held(), "b": held()}, *wants) == {"b", "d"}  # one at a time: loads are serial


def test_placement_is_by_the_adapters_own_order_and_free_room() -> None:
    replicas = [f"r{number}" for number in range(8)]
    for name in "abcdefgh":
        (first,) = [
            replica
            for replica, names in decide(
                {replica: Seat({}, 0.0) for replica in replicas}, [waiting(name)], 2, 1, NOW_S, RULES
            ).items()
            if names
        ]
        assert first == ranked(name, replicas)[0]
        loaded = {replica: Seat({}, 50.0 if replica == first else 1.0) for replica in replicas}
        assert not decide(loaded, [waiting(name)], 2, 1, NOW_S, RULES)[first]  # above the bound
    homes = [ranked(f"m{number}", replicas)[0] for number in range(4000)]
    assert all(400 < homes.count(replica) < 600 for replica in replicas)
    moved = sum(ranked(f"m{number}", replicas[:7])[0] != home for number, home in enumerate(homes))
    assert moved == homes.count("r7")  # only what was there moves when a replica goes


def test_spread_grows_with_an_adapters_own_load() -> None:
    assert spread(0, 0, 8) == spread(3.9, 100, 8) == 1
    assert spread(100, 100, 8) == 7  # alone: all but the bound's slack
    assert spread(16, 800, 8) == 1  # no more than its share
    assert spread(1000, 1000, 2) == 2


CONTENT = st.sampled_from("abcdefgh")
SEAT = st.dictionaries(
    CONTENT,
    st.builds(
        Held,
        st.one_of(st.none(), st.floats(0, 100)),
        st.floats(0, 100),
        st.integers(0, 3),
        st.floats(0, 9),
        st.booleans(),
    ),
    max_size=4,
)
WANT = st.builds(
    Want, CONTENT, st.integers(1, 3), st.one_of(st.none(), st.floats(0, 100)), st.booleans(), st.booleans(),
    st.floats(0, 9),
)  # fmt: skip


@given(st.lists(SEAT, min_size=1, max_size=4), st.lists(WANT, max_size=6, unique_by=lambda want: want.content_id))
def test_whatever_is_asked_room_is_kept_and_what_counts_stays(seats: list[dict[str, Held]], wants: list[Want]) -> None:
    before = {f"r{number}": Seat(holding, float(number)) for number, holding in enumerate(seats)}
    plan = decide(before, wants, 3, 1, NOW_S, RULES)
    assert plan == decide(before, wants, 3, 1, NOW_S, RULES)
    kept = {want.content_id for want in wants if want.pinned or want.rising or want.waiting_since_s is not None}
    for replica, names in plan.items():
        holding = before[replica].held
        assert len(names) == len(set(names)) <= max(4, len(holding))
        gone = holding.keys() - set(names)
        assert not gone & kept
        for name in gone:
            since_s = holding[name].since_s
            assert since_s is not None
            assert NOW_S - since_s >= RULES.stay_s
            assert not holding[name].in_flight or NOW_S - since_s >= RULES.turn_s
