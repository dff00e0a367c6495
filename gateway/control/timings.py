"""How long control waits for what; tests shorten them."""

from __future__ import annotations

import random
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Timings:
    """All in seconds."""

    start_s: float = 1200.0  # an engine must answer by then
    stop_grace_s: float = 10.0
    poll_s: float = 0.25  # between looks at a process
    health_every_s: float = 5.0
    health_misses: int = 4  # in a row make an engine hang; each may take the backend's own 10 s
    steady_s: float = 60.0  # a replica that was ready this long starts again from the first delay
    first_backoff_s: float = 0.5
    last_backoff_s: float = 60.0
    patience: int = 3  # starts that fail without a known cause before the replica counts as failed
    resync_s: float = 30.0  # between comparisons of what is loaded with what should be
    retry_s: float = 30.0  # first wait before a refused adapter is tried on that replica again; doubles
    last_retry_s: float = 600.0
    verify_s: float = 120.0  # one token from a busy engine
    relays_s: float = 5.0  # for relays to take a new snapshot
    adopt_s: float = 30.0  # for engines of before to be known again; until then relays go by what they were told
    drain_s: float = 30.0  # for requests in flight before a planned restart
    canary_s: float = 5.0  # between looks at what canaries' requests came to

    def backoff_s(self, failures: int) -> float:
        """The wait before the next start after so many failures in a row, with jitter."""
        delay_s = min(self.last_backoff_s, self.first_backoff_s * 2.0 ** min(failures - 1, 30))
        return delay_s * random.uniform(0.8, 1.2)  # noqa: S311 - no secret
