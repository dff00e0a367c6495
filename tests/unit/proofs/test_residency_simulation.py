"""`tests.proofs.residency_policy` in small: nobody starves, and what is asked for most is there."""

from __future__ import annotations

import pytest

from gateway.control.residency import Rules
from tests.proofs.residency_policy import Case, Result, Simulation


def run(case: Case, seconds: float = 120.0) -> Result:
    return Simulation(case, Rules(), seed=1).run(seconds)


@pytest.mark.parametrize("case", [Case("four places"), Case("one place", places=1), Case("many clients", clients=24)])
def test_nobody_starves_where_more_wait_than_places_come_free(case: Case) -> None:
    found = run(case)
    assert len(found.waits_s) > 100
    round_s = case.clients * (case.load_s + case.answer_s) / case.places  # each client's adapter loaded in turn
    assert max(found.waits_s) < 2 * round_s + Rules().turn_s
    assert found.fairness > 0.8


def test_what_is_asked_for_most_is_there_more_often_than_not_where_the_law_is_steep() -> None:
    found = run(Case("steep", exponent=2.0, gap_s=1.0))
    assert found.hit_rate > 0.6
    assert sum(wait_s == 0 for wait_s in found.by_rank[0]) > 0.8 * len(found.by_rank[0])
