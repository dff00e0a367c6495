"""Compare the routing policies on simulated engines.

python -m tests.proofs.routing [--seconds S] [--replicas N] [--seeds N] [--out FILE]
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from statistics import mean

from tests.proofs.routing.simulation import POLICIES, Outcome, judge, simulate
from tests.proofs.routing.workload import WORKLOADS, asks


def table(results: dict[tuple[str, str], list[Outcome]], titles: dict[str, str]) -> str:
    """Markdown: a part a workload, a line a policy, means over the seeds."""
    lines = []
    for workload, title in titles.items():
        lines += [f"**{title}**", ""]
        lines += ["| policy | prefix hits | TTFT p50 ms | p99 ms | whole answer p50 s | fairness | imbalance |"]
        lines += ["|---|---|---|---|---|---|---|"]
        for policy in POLICIES:
            runs = results[workload, policy]
            lines.append(
                f"| {policy} | {mean(run.hit_rate for run in runs):.0%} | {mean(run.ttft_p50_ms for run in runs):,.0f} "
                f"| {mean(run.ttft_p99_ms for run in runs):,.0f} | {mean(run.latency_p50_s for run in runs):.2f} "
                f"| {mean(run.fairness for run in runs):.2f} | {mean(run.imbalance for run in runs):.2f} |"
            )
        lines.append("")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=240, help="simulated")
    parser.add_argument("--replicas", type=int, default=4)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--only", nargs="*", help="workloads")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    results: dict[tuple[str, str], list[Outcome]] = {}
    chosen = [workload for workload in WORKLOADS if not args.only or workload.name in args.only]
    for workload in chosen:
        for policy, route in POLICIES.items():
            started_s = time.monotonic()
            for seed in range(args.seeds):
                done = simulate(asks(workload, args.seconds, seed), route, args.replicas)
                results.setdefault((workload.name, policy), []).append(judge(done, args.replicas))
            print(workload.name, policy, f"{time.monotonic() - started_s:.1f} s", results[workload.name, policy][0])
    text = table(results, {workload.name: workload.title for workload in chosen})
    print(text)
    if args.out:
        args.out.write_text(text)


if __name__ == "__main__":
    main()
