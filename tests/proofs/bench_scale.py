"""Two thousand streams of fifty tokens a second each: `python -m tests.proofs.bench_scale FOLDER [STREAMS]`.

One client process reads a hundred thousand events a second from the self-test's stream source, on one machine; what it
prints and the verdict say whether it kept up. About a minute.
"""

from __future__ import annotations

import os
import subprocess
import sys

from bench.selftest.check import source

GAP_MS = 20.0
ANSWER_TOKENS = 250
DURATION_S = 24
RAMP_S = 5  # one answer's time: after it, streams begin and end evenly


def main(folder: str, streams: int = 2000) -> None:
    """Run it and show it."""
    with source(GAP_MS) as url:
        print(f"{streams} streams of {1000 / GAP_MS:g} tokens/s on {os.cpu_count()} cores", flush=True)
        subprocess.run(
            [
                *(sys.executable, "-m", "bench", "run", "--url", url, "--quiet", "--workers", "1", "--repeats", "1"),
                *("--concurrency", str(streams), "--duration", str(DURATION_S), "--ramp", str(RAMP_S), "--warmup", "0"),
                *("--workload", f"random:16/{ANSWER_TOKENS}", "--out", folder, "--name", f"scale-{streams}"),
            ],
            check=False,
        )


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:3]))
