"""How a replica has been doing, as one relay sees it: a circuit breaker each, and outliers among them. Pure.

    closed ──failures in a row, or a refused connection──> open ──time──> half open ──a probe answers──> closed
                                                             ^───────────────────────── it fails, twice the time

An open circuit does not refuse: the replica comes last in the choice (`avoid_until_s`), so that where all are open
requests still go to one of them. Control's own health checks take a replica out of the choice altogether.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

_FAILURES_IN_A_ROW = 5
_FIRST_OPEN_S = 1.0
_LONGEST_OPEN_S = 30.0
_PROBE_S = 10.0  # a probe that has not ended by then no longer keeps others away

# An outlier has failed this often lately, in at least this share of its requests, and this many times as often as
# the others together.
_OUTLIER_FAILURES = 5
_OUTLIER_SHARE = 0.3
_OUTLIER_TIMES = 3.0
_EJECTED_S = 10.0
_HALVED_EVERY_S = 5.0


class Health:
    """One replica's. `failed` and `answered` report each request's end; both return at once."""

    __slots__ = ("_ejections", "_openings", "_probing", "answers", "avoid_until_s", "errors", "failures")

    def __init__(self) -> None:
        self.avoid_until_s = 0.0  # monotonic; it comes last until then
        self.failures = 0  # in a row; 0: the circuit is closed and nothing hints at trouble
        self.answers = 0.0  # lately: halved every few seconds
        self.errors = 0.0
        self._openings = 0  # without an answer between them
        self._ejections = 0
        self._probing = False

    def __repr__(self) -> str:
        state = "open" if self._openings else "closed"
        return f"<Health {state} failures={self.failures} lately={self.errors:.0f}/{self.answers + self.errors:.0f}>"

    def begins(self, now_s: float) -> None:
        """A request goes to it. Where the circuit was open this is the probe: others stay away until it ends."""
        if self._openings and now_s >= self.avoid_until_s:
            self._probing = True
            self.avoid_until_s = now_s + _PROBE_S

    def answered(self) -> None:
        """A request was answered, if only by a refusal of the client's."""
        self.answers += 1
        if self.failures:
            self.failures = 0
            if self._openings:
                self._openings = 0
                self._probing = False
                self.avoid_until_s = 0.0

    def failed(self, now_s: float, certain: bool = False) -> bool:
        """A request failed by its fault; True if that opened the circuit. certain: a refused connection, say."""
        self.errors += 1
        self.failures += 1
        if self._openings and not self._probing:
            return False  # a request from before: the circuit is open already
        if not (certain or self._probing or self.failures >= _FAILURES_IN_A_ROW):
            return False
        self._probing = False
        open_s = min(_LONGEST_OPEN_S, _FIRST_OPEN_S * 2.0 ** min(self._openings, 30))
        self._openings += 1
        self.avoid_until_s = now_s + open_s * random.uniform(1.0, 1.2)  # noqa: S311 - not all relays at once
        return True

    def eject(self, now_s: float) -> None:
        """It is an outlier: stay away for a while, longer each time."""
        self._ejections = min(self._ejections + 1, 6)
        self.avoid_until_s = max(self.avoid_until_s, now_s + _EJECTED_S * self._ejections)
        self.answers = self.errors = 0.0  # judged anew by what comes after

    def halve(self) -> None:
        """What was recently counts half from now on."""
        self.answers /= 2
        self.errors /= 2
        if self._ejections and self.errors < 1 and self.answers > _OUTLIER_FAILURES:
            self._ejections -= 1


class Outliers:
    """Looks for replicas that fail far more than the others. One a relay."""

    def __init__(self) -> None:
        self._halved_s = 0.0

    def judge(self, replicas: Sequence[Health], now_s: float) -> list[Health]:
        """Eject and return the outliers. Never so many that more than half are avoided. Called about once a second."""
        avoided = sum(health.avoid_until_s > now_s for health in replicas)
        found = []
        for health in sorted(replicas, key=lambda health: health.errors, reverse=True):
            if (avoided + 1) * 2 > len(replicas):
                break
            if health.avoid_until_s <= now_s and _stands_out(health, replicas):
                health.eject(now_s)
                found.append(health)
                avoided += 1
        if now_s - self._halved_s >= _HALVED_EVERY_S:
            self._halved_s = now_s
            for health in replicas:
                health.halve()
        return found


class RetryBudget:
    """How many retries there may be: a share of the requests, and a few a second. Retries of clients count too.

    Without it, an engine that fails each request gets twice or thrice the load for it.
    """

    __slots__ = ("_seen", "_seen_s", "_tokens", "requests")

    _SHARE = 0.2
    _PER_S = 1.0
    _MOST = 10.0

    def __init__(self, now_s: float) -> None:
        self.requests = 0  # first tries so far; whoever serves them adds to it
        self._seen = 0
        self._seen_s = now_s
        self._tokens = self._MOST

    def __repr__(self) -> str:
        return f"<RetryBudget {self._tokens:.1f}>"

    def take(self, now_s: float) -> bool:
        """One more retry, if the budget allows it."""
        if self.spent(now_s):
            return False
        self._tokens -= 1
        return True

    def charge(self, now_s: float) -> None:
        """A client tries again, of its own accord."""
        self.spent(now_s)
        self._tokens = max(0.0, self._tokens - 1)

    def spent(self, now_s: float) -> bool:
        """Whether there is none left."""
        earned = (self.requests - self._seen) * self._SHARE + (now_s - self._seen_s) * self._PER_S
        self._seen, self._seen_s = self.requests, now_s
        self._tokens = min(self._MOST, self._tokens + earned)
        return self._tokens < 1


def _stands_out(health: Health, replicas: Sequence[Health]) -> bool:
    total = health.answers + health.errors
    if health.errors < _OUTLIER_FAILURES or health.errors < _OUTLIER_SHARE * total:
        return False
    errors = sum(other.errors for other in replicas if other is not health)
    others = sum(other.answers for other in replicas if other is not health) + errors
    if not others:
        return False  # nothing to compare with
    return health.errors / total >= _OUTLIER_TIMES * errors / others
