"""Circuit breakers, outliers and the retry budget, in virtual time."""

from __future__ import annotations

from gateway.relay.admit import Rate
from gateway.relay.health import Health, Outliers, RetryBudget


def test_failures_in_a_row_open_the_circuit() -> None:
    health = Health()
    assert [health.failed(10.0) for _ in range(5)] == [False] * 4 + [True]
    assert 11.0 <= health.avoid_until_s <= 11.2


def test_an_answer_between_failures_keeps_it_closed() -> None:
    health = Health()
    for _ in range(20):
        assert not health.failed(10.0)
        health.answered()
    assert health.avoid_until_s == 0.0


def test_a_refused_connection_opens_it_at_once() -> None:
    health = Health()
    assert health.failed(10.0, certain=True)
    assert health.avoid_until_s > 10.0


def test_half_open_lets_one_probe_through() -> None:
    health = Health()
    health.failed(10.0, certain=True)
    now_s = health.avoid_until_s
    health.begins(now_s)
    assert health.avoid_until_s > now_s + 5  # the others stay away
    health.answered()
    assert (health.avoid_until_s, health.failures) == (0.0, 0)


def test_failed_probes_wait_twice_as_long_each_up_to_a_limit() -> None:
    health = Health()
    health.failed(0.0, certain=True)
    waits = []
    for _ in range(8):
        now_s = health.avoid_until_s
        health.begins(now_s)
        assert health.failed(now_s)
        waits.append(health.avoid_until_s - now_s)
    for wait_s, expected_s in zip(waits, (2, 4, 8, 16, 30, 30, 30, 30), strict=True):
        assert expected_s <= wait_s <= expected_s * 1.2


def test_late_failures_of_an_open_circuit_change_nothing() -> None:
    health = Health()
    health.failed(10.0, certain=True)
    until_s = health.avoid_until_s
    for _ in range(10):
        assert not health.failed(10.1)
    assert health.avoid_until_s == until_s


def test_an_answer_while_it_is_open_closes_it() -> None:
    health = Health()
    health.failed(10.0, certain=True)
    health.answered()  # where all were avoided, one of them was asked all the same
    assert health.avoid_until_s == 0.0


def mixed(answers: int, errors: int) -> Health:
    health = Health()
    health.answers, health.errors = float(answers), float(errors)
    return health


def test_an_outlier_is_ejected() -> None:
    bad, good = mixed(50, 50), mixed(100, 1)
    assert Outliers().judge([good, bad], 100.0) == [bad]
    assert bad.avoid_until_s == 110.0
    assert good.avoid_until_s == 0.0


def test_no_outlier_where_all_fail_alike_or_few_requests_did() -> None:
    assert Outliers().judge([mixed(50, 50), mixed(50, 45)], 100.0) == []
    assert Outliers().judge([mixed(0, 4), mixed(100, 0)], 100.0) == []
    assert Outliers().judge([mixed(90, 10), mixed(100, 0)], 100.0) == []
    assert Outliers().judge([mixed(0, 100)], 100.0) == []


def test_never_more_than_half_are_ejected() -> None:
    replicas = [mixed(10, 90), mixed(10, 90), mixed(10, 90), *(mixed(1000, 0) for _ in range(2))]
    assert len(Outliers().judge(replicas, 100.0)) == 2
    pair = [mixed(10, 90), mixed(1000, 0)]
    assert len(Outliers().judge(pair, 100.0)) == 1


def test_ejections_grow_and_old_failures_fade() -> None:
    outliers, bad, good = Outliers(), mixed(10, 90), mixed(1000, 0)
    outliers.judge([bad, good], 100.0)
    bad.answers, bad.errors = 10.0, 90.0
    outliers.judge([bad, good], 120.0)
    assert bad.avoid_until_s == 140.0
    bad.answers, bad.errors = 100.0, 6.0
    for second in range(150, 190, 5):
        assert outliers.judge([bad, good], float(second)) == []
    assert bad.errors < 1


def test_budget_is_a_share_of_the_requests() -> None:
    budget = RetryBudget(0.0)
    assert [budget.take(0.0) for _ in range(11)] == [True] * 10 + [False]
    budget.requests += 10
    assert [budget.take(0.0) for _ in range(3)] == [True, True, False]
    assert budget.spent(0.0)
    assert budget.take(1.0)  # and a few a second


def test_clients_that_try_again_use_it_too() -> None:
    budget = RetryBudget(0.0)
    for _ in range(50):
        budget.charge(0.0)
    assert not budget.take(0.0)
    assert not budget.spent(2.0)  # no debt: it never goes below none


def test_rate_of_service() -> None:
    rate = Rate()
    assert rate.per_s(0.0) is None
    rate.began(100.0)
    for n in range(1, 51):
        rate.served(100.0 + n / 10)
    measured = rate.per_s(105.0)
    assert measured is not None and 9 <= measured <= 11
    slower = rate.per_s(115.0)
    assert slower is not None and slower < 2  # nothing was served since


def test_rate_begins_anew_after_a_quiet_time() -> None:
    rate = Rate()
    rate.began(100.0)
    for _ in range(100):
        rate.served(101.0)
    rate.began(200.0)
    assert rate.per_s(200.5) is None
    rate.served(200.5)
    measured = rate.per_s(201.0)
    assert measured is not None and 0.5 <= measured <= 2
