"""`python -m tests.proofs.canaries`: how often canaries that are no different, worse or better are judged wrongly."""

from __future__ import annotations

import argparse
from collections import Counter

from gateway.control.canary import Action, Policy
from tests.support.canaries import Behaviour, rollout

WEIGHT = 5.0  # percent
REQUESTS = 5000  # of the canary, at most
CASES = {
    "no different": Behaviour(),
    "no different, heavy tails": Behaviour(sigma=1.6),
    "1 % more fail": Behaviour(error_rate=0.02),
    "4 % more fail": Behaviour(error_rate=0.05),
    "1.2 times the time to first token": Behaviour(ttft_ms=120),
    "1.5 times the time to first token": Behaviour(ttft_ms=150),
    "2 times the duration": Behaviour(duration_ms=3000),
    "0.7 times the duration": Behaviour(duration_ms=1050),
}


def main() -> None:
    """Print what became of each case's canaries."""
    parser = argparse.ArgumentParser(prog="tests.proofs.canaries", description=__doc__)
    parser.add_argument("--runs", type=int, default=500, help="canaries of each case")
    runs = parser.parse_args().runs
    print(f"{runs} canaries a case, {WEIGHT:g} % of the requests, {REQUESTS} of them at most; {Policy()}")
    for name, canary in CASES.items():
        baseline = Behaviour(sigma=canary.sigma)
        found = [rollout(baseline, canary, WEIGHT, REQUESTS, Policy(), seed) for seed in range(runs)]
        shares = Counter(action for action, _ in found)
        decided = sorted(count for action, count in found if action is not Action.WATCH)
        after = f"; median {decided[len(decided) // 2]} requests" if decided else ""
        print(f"{name}: " + ", ".join(f"{action} {shares[action] / runs:.1%}" for action in Action) + after)


if __name__ == "__main__":
    main()
