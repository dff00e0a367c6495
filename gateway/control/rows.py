"""Which row of the relays' cells counts what on which replica (observe.cells)."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping

from gateway.observe.cells import ADAPTER_ROW, ADAPTER_ROW_CELLS, MAX_ADAPTER_ROWS

_SHARED = 0  # the row of all for which there is none: they count together, so none of them ever looks idle alone
Place = tuple[str, str | None]  # replica id and content id; None: the base


class Rows:
    """Gives rows, and takes them back. Control's own: after a restart it gives them anew."""

    def __init__(self, read: Callable[[int], int], limit: int = MAX_ADAPTER_ROWS) -> None:
        """read: what a cell comes to over all relays: a row's first is requests in flight there, its second ever."""
        self._read = read
        self._limit = limit
        self._rows: dict[Place, int] = {}
        self._ever: dict[Place, int] = {}  # what its row had counted when it was given, of others
        self._free: list[int] = []  # given back, to be given again
        self._next = _SHARED + 1

    def cell(self, replica: str, content_id: str | None) -> int:
        """The first cell of the row, which is given if there is none yet."""
        row = self._rows.get((replica, content_id))
        if row is None:
            row = self._rows[replica, content_id] = self._give()
            self._ever[replica, content_id] = self._read(_cell(row) + 1)
        return _cell(row)

    def ever(self, place: Place) -> int:
        """What the second cell of its row said when the row was given: requests of others, not its own."""
        return self._ever[place]

    def release(self, held: Mapping[str, Collection[str]]) -> None:
        """Take back the rows of adapters that their replica holds no more, and all those of replicas that are gone.

        held: replica id -> content ids. Those with requests in flight keep their rows.
        """
        for place in [place for place in self._rows if not _is_held(place, held)]:
            row = self._rows[place]
            if row == _SHARED or not self._read(_cell(row)):
                del self._rows[place], self._ever[place]
                if row != _SHARED:
                    self._free.append(row)

    @property
    def end(self) -> int:
        """The cell after the last row that was ever given."""
        return _cell(self._next)

    @property
    def places(self) -> dict[Place, int]:
        """Every row that is given: its first cell. A copy."""
        return {place: _cell(row) for place, row in self._rows.items()}

    def _give(self) -> int:
        if self._free:
            return self._free.pop(0)
        while self._next < self._limit:
            self._next += 1
            if not self._read(_cell(self._next - 1)):
                return self._next - 1
        return _SHARED


def _cell(row: int) -> int:
    return ADAPTER_ROW + ADAPTER_ROW_CELLS * row


def _is_held(place: Place, held: Mapping[str, Collection[str]]) -> bool:
    replica, content_id = place
    return replica in held and (content_id is None or content_id in held[replica])
