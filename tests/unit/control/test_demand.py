"""What adapters are asked for, read from the relays' cells: every request counts, and for its own adapter alone."""

from __future__ import annotations

from collections import Counter

from gateway.control.demand import Demand
from gateway.control.rows import Rows
from gateway.observe.cells import ADAPTER_ROW


class Cells:
    """What all relays count, without relays."""

    def __init__(self) -> None:
        self.values: Counter[int] = Counter()
        self.rows = Rows(lambda cell: self.values[cell])
        self.demand = Demand(self.rows, lambda end: [self.values[cell] for cell in range(ADAPTER_ROW, end)])

    def ask(self, content_id: str, requests: int) -> None:
        """Requests that came and were answered since."""
        self.values[self.rows.cell("r0", content_id) + 1] += requests


def test_requests_before_the_first_look_count() -> None:
    cells = Cells()
    cells.ask("a-1", 3)
    cells.demand.look(1.0)
    assert cells.demand.served == 3
    assert cells.demand.rate("a-1") > 0


def test_a_row_that_is_given_again_counts_for_its_new_adapter_alone() -> None:
    cells = Cells()
    cells.ask("a-1", 5)
    cells.demand.look(1.0)
    first = cells.rows.cell("r0", "a-1")
    cells.rows.release({"r0": ()})
    assert cells.rows.cell("r0", "a-2") == first
    cells.ask("a-2", 2)
    cells.demand.look(2.0)
    assert cells.demand.served == 7
    assert cells.demand.rate("a-1") > cells.demand.rate("a-2") > 0


def test_one_that_comes_back_to_another_row_is_counted_on() -> None:
    cells = Cells()
    cells.ask("a-1", 5)
    cells.demand.look(1.0)
    cells.rows.release({"r0": ()})
    cells.ask("a-2", 9)  # takes its row
    cells.ask("a-1", 1)
    cells.demand.look(2.0)
    assert cells.demand.served == 15


def test_a_row_with_requests_in_flight_is_kept() -> None:
    cells = Cells()
    cells.values[cells.rows.cell("r0", "a-1")] = 1
    cells.rows.release({"r0": ()})
    assert cells.rows.cell("r0", "a-2") != cells.rows.cell("r0", "a-1")


def test_a_replica_that_is_gone_gives_back_its_rows() -> None:
    """Each switch of engines makes others."""
    cells = Cells()
    for _ in range(3):
        first, base = cells.rows.cell("r1", "a-1"), cells.rows.cell("r1", None)
        kept = cells.rows.cell("r0", None)
        cells.values[base] = 1
        cells.rows.release({"r0": ()})
        assert cells.rows.places == {("r0", None): kept, ("r1", None): base}  # what is in flight there is still counted
        cells.values[base] = 0
        cells.rows.release({"r0": ()})
        assert cells.rows.places == {("r0", None): kept}
        assert {cells.rows.cell("r2", None), cells.rows.cell("r2", "a-1")} == {first, base}
        cells.rows.release({"r0": ()})


def test_one_is_asked_for_from_its_first_request_on() -> None:
    cells = Cells()
    cells.ask("a-1", 0)
    cells.demand.look(1.0)
    assert not cells.demand.use("r0", "a-1", 1.0).asked
    cells.ask("a-1", 1)
    cells.demand.look(2.0)
    cells.demand.look(3.0)
    assert cells.demand.use("r0", "a-1", 3.0).asked
