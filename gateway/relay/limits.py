"""What an API key may still use: requests and tokens a minute, a budget, requests at a time; over all relays.

Each relay counts in its own cells and looks at the others' when its last look is older than _FRESH_S, so that
a request costs the same with any number of relays and keys. What two relays admit within that time they cannot see of
each other: that is all by which a limit can be passed.

A rate is a bucket that drains evenly, written as the time at which it will be empty (GCRA): a key that was idle may
send a whole minute's worth at once. Tokens are charged when the engine has said how many there were, so an answer
may take the bucket below empty; nothing is admitted until that is paid back.
"""

from __future__ import annotations

import time
from collections.abc import Mapping

import msgspec

from gateway.errors import QuotaExceeded, RateLimited
from gateway.observe.usage import (
    IN_FLIGHT,
    REQUESTS,
    REQUESTS_DUE_US,
    ROW_CELLS,
    TOKENS,
    TOKENS_DUE_US,
    Usage,
)
from gateway.snapshot import Key

_FRESH_S = 0.005
_FORGOTTEN_S = 1.0  # after so long without a look, the others' own view of the bucket is taken over
_PERIOD_S = 60.0
_ROOM_S = _PERIOD_S + 1e-9  # sums of fractions of a minute are not exact
_BUSY_RETRY_MS = 1000  # a guess: it depends on how long the answers in flight take


class _Bucket:
    """A rate of one key. Charges of this relay are its own; those of the others are seen by their counts."""

    __slots__ = ("_cells", "_count", "_due", "_lines", "_peers", "_seen", "_usage", "due_s", "each_s", "limit")

    def __init__(self, usage: Usage, what: str, cells: tuple[int, int], limit: int) -> None:
        """cells: of its count and of its due time, from the first of the file. limit: a minute."""
        self.limit = limit
        self.each_s = _PERIOD_S / limit
        self.due_s = 0.0  # monotonic; empty from then on
        self._usage = usage
        self._cells = usage.cells
        self._peers = usage.peers
        self._count, self._due = cells
        self._seen = 0  # the other relays' count that is already in the bucket
        names = tuple(f"x-ratelimit-{name}-{what}" for name in ("limit", "remaining", "reset"))
        self._lines = f"{names[0]}: {limit}\r\n{names[1]}: %d\r\n{names[2]}: %b\r\n".encode()

    def look(self, now_s: float, long_ago: bool) -> None:
        """Take in what the other relays have charged."""
        count = 0
        for cells in self._peers:
            count += cells[self._count]
        if long_ago:
            self.due_s = self._usage.due_us(self._due) / 1e6
        elif count > self._seen:
            self.due_s = max(self.due_s, now_s) + (count - self._seen) * self.each_s
        self._seen = count

    def charge(self, now_s: float, amount: int) -> None:
        """Put `amount` in."""
        due_s = self.due_s
        self.due_s = due_s = (due_s if due_s > now_s else now_s) + amount * self.each_s
        self._cells[self._due] = int(due_s * 1e6)

    def excess_s(self, now_s: float) -> float:
        """How long until there is room for one more; not positive when there is."""
        return self.due_s + self.each_s - now_s - _ROOM_S

    def headers(self, now_s: float) -> bytes:
        """OpenAI's three header lines."""
        used_s = self.due_s - now_s
        if used_s <= 0.0:
            return self._lines % (self.limit, b"0ms")
        remaining = int((_ROOM_S - used_s) / self.each_s) if used_s < _PERIOD_S else 0
        return self._lines % (remaining, duration(used_s))


class Account:
    """One key's use at this relay. `enter` begins a request, exactly one `leave` ends it."""

    __slots__ = (
        "_cells", "_live", "_others_in_flight", "_others_tokens", "_peers", "_read_s", "_requests", "_row", "_tokens",
        "key",
    )  # fmt: skip

    def __init__(self, key: Key, usage: Usage) -> None:
        """key: one that has a row."""
        assert key.row is not None
        self.key = key
        self._row = row = key.row * ROW_CELLS
        self._cells = usage.cells
        self._peers = usage.peers
        self._live = usage.live_peers
        self._read_s = 0.0
        self._others_tokens = self._others_in_flight = 0  # at the last look
        self._requests = self._tokens = None
        if key.requests_per_minute is not None:
            cells = row + REQUESTS, row + REQUESTS_DUE_US
            self._requests = _Bucket(usage, "requests", cells, key.requests_per_minute)
        if key.tokens_per_minute is not None:
            self._tokens = _Bucket(usage, "tokens", (row + TOKENS, row + TOKENS_DUE_US), key.tokens_per_minute)
        usage.claim(key.row, key.id)

    def enter(self, now_s: float) -> bytes:
        """Count one request in; the headers that say what is left. now_s: monotonic. Raises RateLimited."""
        key, cells, row, requests, tokens = self.key, self._cells, self._row, self._requests, self._tokens
        if now_s - self._read_s > _FRESH_S:
            self._look(now_s)
        if requests is not None and (excess_s := requests.excess_s(now_s)) > 0:
            raise self._refusal("requests", requests.limit, excess_s)
        if tokens is not None and (excess_s := tokens.excess_s(now_s)) > 0:
            raise self._refusal("tokens", tokens.limit, excess_s)
        if key.tokens_until is not None and cells[row + TOKENS] + self._others_tokens >= key.tokens_until:
            raise QuotaExceeded(
                f"The token budget of the key {key.id} is spent. Ask the operator of this gateway for more."
            )
        if key.max_in_flight is not None and cells[row + IN_FLIGHT] + self._others_in_flight >= key.max_in_flight:
            error = RateLimited(
                f"The key {key.id} may have {key.max_in_flight} requests in flight at a time, and has them."
            )
            error.retry_after_ms = _BUSY_RETRY_MS
            raise error
        cells[row + REQUESTS] += 1
        cells[row + IN_FLIGHT] += 1
        headers = b""
        if requests is not None:
            requests.charge(now_s, 1)
            headers = requests.headers(now_s)
        return headers + tokens.headers(now_s) if tokens is not None else headers

    def refused(self, now_s: float) -> bytes:
        """The headers of a refusal."""
        buckets = (self._requests, self._tokens)
        return b"".join(bucket.headers(now_s) for bucket in buckets if bucket is not None)

    def leave(self, tokens: int) -> None:
        """A request is over that used so many tokens, prompt and answer together."""
        row = self._row
        self._cells[row + IN_FLIGHT] -= 1
        if tokens:
            self._cells[row + TOKENS] += tokens
            if self._tokens is not None:
                self._tokens.charge(time.monotonic(), tokens)

    def _look(self, now_s: float) -> None:
        """See what the other relays have counted."""
        long_ago = now_s - self._read_s > _FORGOTTEN_S
        self._read_s = now_s
        for bucket in (self._requests, self._tokens):
            if bucket is not None:
                bucket.look(now_s, long_ago)
        row = self._row
        self._others_tokens = sum(cells[row + TOKENS] for cells in self._peers)
        self._others_in_flight = sum(cells[row + IN_FLIGHT] for cells in self._live)

    def _refusal(self, what: str, limit: int, excess_s: float) -> RateLimited:
        error = RateLimited(
            f"Rate limit reached for the key {self.key.id}: {limit} {what} per minute. "
            f"Try again in {duration(excess_s).decode()}."
        )
        error.retry_after_ms = max(1, -int(-excess_s * 1000 // 1))
        return error


class Entry:
    """What one digest opens: a key, with its own expiry while an old secret of it is still good."""

    __slots__ = ("account", "expires_at", "id", "scopes")

    def __init__(self, key: Key, account: Account | None) -> None:
        self.id = key.id
        self.scopes = key.scopes
        self.expires_at = key.expires_at
        self.account = account


class Ledger:
    """The keys of one snapshot, ready for look-ups; accounts live on while their key does not change."""

    def __init__(self, usage: Usage) -> None:
        self._usage = usage
        self._accounts: dict[str, Account] = {}
        self._keys: Mapping[str, Key] = {}
        self.entries: dict[str, Entry] = {}  # SHA-256 hex -> entry; empty: open access

    def apply(self, keys: Mapping[str, Key]) -> None:
        """Go by these keys from the next request on. What is in flight ends on the account that it began on."""
        if keys == self._keys:
            return
        accounts: dict[str, Account] = {}
        for key in keys.values():
            key = msgspec.structs.replace(key, expires_at=None)  # of which one key may have two
            if key.row is not None and key.id not in accounts:
                known = self._accounts.get(key.id)
                accounts[key.id] = known if known is not None and known.key == key else Account(key, self._usage)
        self.entries = {digest: Entry(key, accounts.get(key.id)) for digest, key in keys.items()}
        self._accounts, self._keys = accounts, keys

    def tick(self) -> None:
        """A second has passed."""
        self._usage.find()


def duration(seconds: float) -> bytes:
    """As OpenAI writes it: 250ms, 1.5s, 6m0s."""
    if seconds < 1.0:
        return b"%dms" % (seconds * 1000)
    if seconds < 60.0:
        return b"%.3gs" % seconds
    minutes, seconds = divmod(int(seconds), 60)
    return b"%dm%ds" % (minutes, seconds)
