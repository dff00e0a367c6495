"""`python -m tests.proofs.residency_policy`: what gives way, compared by the hour in virtual time.

Clients ask for adapters by Zipf's law; one replica has a few places, and loads one adapter after another. The policy is
the gateway's own (`residency.decide`), asked as often as control asks it, over the same decaying rates. What is made up
is the engine: loads and answers take a given time.
"""

from __future__ import annotations

import argparse
import dataclasses
import heapq
import itertools
import math
import random
from collections import defaultdict, deque
from dataclasses import dataclass, field

from gateway.control.residency import Held, Rules, Seat, Want, decide
from tests.proofs.swaps import quantile

_LOOK_EVERY_S = 0.05  # of control, while requests wait
_HALF_LIFE_S = 30.0  # of rates (control.demand)
_REPLICA = "r0"


@dataclass(frozen=True)
class Case:
    """An engine, and those who ask."""

    name: str
    places: int = 4
    adapters: int = 200
    exponent: float = 1.0
    clients: int = 6
    gap_s: float = 0.2  # mean pause of a client between two requests
    load_s: float = 0.39
    answer_s: float = 0.6


CASES = (
    Case("the real engine's: 200 over 4, six clients"),
    Case("the same with 24 clients", clients=24),
    Case("answers of 1.2 s on the real engine", answer_s=1.2),
    Case("loads that cost little: 20 ms", load_s=0.02),
    Case("loads that cost much: 2 s", load_s=2.0),
    Case("flat law: exponent 0.5", exponent=0.5),
    Case("steep law: exponent 1.5", exponent=1.5),
    Case("5,000 over 16, 32 clients", places=16, adapters=5000, clients=32, load_s=0.1),
    Case("one place", places=1),
    Case("quiet: a client with a pause of 2 s", clients=1, gap_s=2.0),
)


@dataclass
class Result:
    """What clients met."""

    hits: int = 0
    waits_s: list[float] = field(default_factory=list)  # of all requests, hits with 0
    by_rank: dict[int, list[float]] = field(default_factory=lambda: defaultdict(list))

    @property
    def hit_rate(self) -> float:
        """The share of requests whose adapter was there."""
        return self.hits / len(self.waits_s)

    @property
    def fairness(self) -> float:
        """Jain's index of the mean waits of adapters asked for three times or more, a tenth of a second added."""
        means = [0.1 + sum(waits) / len(waits) for waits in self.by_rank.values() if len(waits) >= 3]
        return sum(means) ** 2 / (len(means) * sum(mean**2 for mean in means)) if means else math.nan


class Simulation:
    """One run: events by time, and a policy that is asked now and then."""

    def __init__(self, case: Case, rules: Rules, seed: int) -> None:
        self._case, self._rules, self._dice = case, rules, random.Random(seed)
        weights = [1 / rank**case.exponent for rank in range(1, case.adapters + 1)]
        self._weights = list(itertools.accumulate(weights))
        self._now_s, self._order = 0.0, itertools.count()
        self._events: list[tuple[float, int, str, str]] = []  # time, order, what, adapter
        self._ready: dict[str, float] = {}  # adapter -> since when it is loaded
        self._used: dict[str, float] = {}
        self._in_flight: dict[str, int] = defaultdict(int)
        self._rates: dict[str, tuple[float, float]] = {}  # adapter -> requests a second, as of when
        self._waiting: dict[str, deque[float]] = {}  # adapter -> since when each of its requests waits
        self._plan: tuple[str, ...] = ()
        self._loading: str | None = None
        self.result = Result()

    def run(self, seconds: float) -> Result:
        """The figures of so long a time."""
        for _ in range(self._case.clients):
            self._later(self._dice.expovariate(1 / self._case.gap_s), "ask", "")
        self._later(_LOOK_EVERY_S, "look", "")
        while self._events and self._events[0][0] < seconds:
            self._now_s, _, what, adapter = heapq.heappop(self._events)
            if what == "ask":
                self._ask(self._dice.choices(range(self._case.adapters), cum_weights=self._weights)[0])
            elif what == "answered":
                self._in_flight[adapter] -= 1
                self._used[adapter] = self._now_s
                self._later(self._dice.expovariate(1 / self._case.gap_s), "ask", "")
            elif what == "loaded":
                self._loading = None
                self._ready[adapter] = self._used[adapter] = self._now_s
                for since_s in self._waiting.pop(adapter, ()):
                    self._answer(adapter, self._now_s - since_s)
            else:
                self._later(_LOOK_EVERY_S, "look", "")
            if what != "answered":
                self._decide()
            self._reconcile()
        return self.result

    def _later(self, after_s: float, what: str, adapter: str) -> None:
        heapq.heappush(self._events, (self._now_s + after_s, next(self._order), what, adapter))

    def _ask(self, rank: int) -> None:
        adapter = f"m{rank:04d}"
        if adapter in self._ready and adapter in self._plan:
            self.result.hits += 1
            self._answer(adapter, 0.0)
        else:
            self._waiting.setdefault(adapter, deque()).append(self._now_s)

    def _answer(self, adapter: str, wait_s: float) -> None:
        rate, as_of_s = self._rates.get(adapter, (0.0, 0.0))
        kept = math.exp2((as_of_s - self._now_s) / _HALF_LIFE_S)
        self._rates[adapter] = rate * kept + math.log(2) / _HALF_LIFE_S, self._now_s
        self.result.waits_s.append(wait_s)
        self.result.by_rank[int(adapter[1:])].append(wait_s)
        self._in_flight[adapter] += 1
        self._used[adapter] = self._now_s
        self._later(self._case.answer_s, "answered", adapter)

    def _worth(self, adapter: str) -> float:
        rate, as_of_s = self._rates.get(adapter, (0.0, 0.0))
        return rate * math.exp2((as_of_s - self._now_s) / _HALF_LIFE_S) * self._case.load_s

    def _decide(self) -> None:
        held = {
            adapter: Held(
                self._ready.get(adapter),
                self._used.get(adapter, self._now_s) if adapter in self._ready else self._now_s,
                self._in_flight[adapter],
                self._worth(adapter),
            )
            for adapter in self._plan
        }
        wants = [
            Want(adapter, waiting_since_s=since_s[0], worth=self._worth(adapter))
            for adapter, since_s in self._waiting.items()
        ]
        hot = sorted(self._rates.keys() - self._waiting.keys(), key=self._worth, reverse=True)[: len(held) + 1]
        wants += [Want(adapter, worth=self._worth(adapter)) for adapter in hot]
        load = float(sum(self._in_flight.values()))
        plan = decide({_REPLICA: Seat(held, load)}, wants, self._case.places, 1, self._now_s, self._rules)
        self._plan = plan[_REPLICA]

    def _reconcile(self) -> None:
        """Unload what is not planned and not in use; load what is planned, one at a time."""
        for adapter in [adapter for adapter in self._ready if adapter not in self._plan]:
            if not self._in_flight[adapter]:
                del self._ready[adapter]
        missing = [adapter for adapter in self._plan if adapter not in self._ready]
        if self._loading is None and missing and len(self._ready) <= self._case.places:
            self._loading = missing[0]
            self._later(self._case.load_s, "loaded", missing[0])


def main() -> None:
    """A table: what each case comes to, with the given rules."""
    parser = argparse.ArgumentParser(prog="tests.proofs.residency_policy", description=__doc__)
    parser.add_argument("--seconds", type=float, default=1800)
    for rule in dataclasses.fields(Rules):
        parser.add_argument(f"--{rule.name.replace('_', '-')}", type=float, default=rule.default)
    args = parser.parse_args()
    rules = Rules(**{rule.name: getattr(args, rule.name) for rule in dataclasses.fields(Rules)})
    print(rules)
    for case in CASES:
        found = Simulation(case, rules, seed=1).run(args.seconds)
        waits = [wait_s for wait_s in found.waits_s if wait_s]
        print(
            f"{case.name}: {len(found.waits_s) / args.seconds:.2f}/s, hit rate {found.hit_rate:.2f}, mean wait "
            f"{sum(found.waits_s) / len(found.waits_s):.2f} s, of misses p50 {quantile(waits or [0.0], 0.5):.2f} s "
            f"p99 {quantile(waits or [0.0], 0.99):.2f} s, fairness {found.fairness:.2f}"
        )


if __name__ == "__main__":
    main()
