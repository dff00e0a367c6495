"""The bench on the real vLLM through the gateway: `python -m tests.proofs.bench_real FOLDER`.

Starts `gateway serve` on the CPU with the demo model, runs the direct-against-gateway preset in short blocks, a sweep
whose rates the bench finds itself, and a capacity search; each leaves its record, JSON and HTML page in FOLDER. About
five minutes.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.support.gateway import gateway

ROOT = Path(__file__).parents[2]
PRESET = ROOT / "examples" / "bench" / "direct-vs-gateway.yaml"
START_TIMEOUT_S = 300
WORKLOAD = ("--workload", "random:64/16")
SLO = "ttft_p90=1000,tpot_p90=150"


def bench(*arguments: str) -> None:
    """One command of the bench in a process of its own, its output shown."""
    code = subprocess.run([sys.executable, "-m", "bench", *arguments], check=False).returncode
    print(f"bench {arguments[0]}: status {code}", flush=True)


def main(folder: Path) -> None:
    """Run all three and keep what they leave."""
    with (
        tempfile.TemporaryDirectory() as state,
        gateway(
            *("--backend", "vllm", "--device", "cpu", "--dtype", "float32", "--max-model-len", "2048"),
            state=Path(state),
            ready_timeout_s=START_TIMEOUT_S,
        ) as served,
    ):
        engine = json.loads((served.state / "run" / "replica-r0.json").read_text())
        out = ("--out", str(folder), "--quiet")
        direct = f"direct=http://127.0.0.1:{engine['port']},model={served.model},key={engine['api_key']}"
        through = f"gateway={served.url},model={served.model}"
        bench(
            *("run", "--config", str(PRESET), "--target", direct, "--target", through, "--name", "direct-vs-gateway"),
            *("--rate", "1", "--duration", "20", "--block", "5", "--slo", SLO, *WORKLOAD, *out),
        )
        one = ("--url", served.url, "--model", served.model, "--slo", SLO, "--repeats", "1", *WORKLOAD, *out)
        bench("sweep", *one, "--duration", "6", "--name", "sweep")
        bench("capacity", *one, "--duration", "6", "--name", "capacity")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
