"""schemathesis over the gateway's own OpenAPI document: no request that it makes up may end in a server error.

    python -m tests.proofs.openapi [--examples N] [--engine vllm] [--phases coverage,fuzzing]

Not asked: draining, and switching the engine, which rightly make what follows answer 503.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.support.engines import adapter, checkpoint, upload
from tests.support.gateway import gateway

_KEY = "sk-openapi-0123456789"
_NOT_ASKED = "drain|backend"


def explore(engine: str, examples: int, phases: str, folder: Path) -> tuple[int, str]:
    """schemathesis' exit status and what it printed; 0: nothing found."""
    base = checkpoint(folder / "base")
    flags = ("--backend", engine, "--engine-version", "emulator", "--device", "cuda", "--model", str(base))
    with gateway(*flags, state=folder / "state", api_key=_KEY, ready_timeout_s=120) as serving:
        upload(serving, "tuned", adapter(folder / "tuned"))
        command = [
            str(Path(sys.executable).with_name("schemathesis")), "run", f"{serving.url}/openapi.json",
            "-H", f"Authorization: Bearer {_KEY}", "--checks", "not_a_server_error", "--no-color",
            "--phases", phases, "--max-examples", str(examples), "--seed", "1", "--request-timeout", "30",
            "--exclude-path-regex", _NOT_ASKED, "--generation-database", "none",
        ]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, cwd=folder)
        assert serving.process.poll() is None, serving.errors[-2000:]
    return done.returncode, done.stdout + done.stderr


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--examples", type=int, default=50, help="of each route")
    parser.add_argument("--engine", default="vllm", choices=["vllm", "sglang", "lmdeploy"])
    parser.add_argument("--phases", default="coverage,fuzzing")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="tunegate-openapi-") as folder:
        status, text = explore(args.engine, args.examples, args.phases, Path(folder))
    print(text)
    return status


if __name__ == "__main__":
    sys.exit(main())
