"""The conformance suite against a gateway that runs already."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

from scripts.gpu_suite.serving import Served

_FILES = ("chat", "completions", "errors", "models", "responses", "streams", "tools_and_schemas")
# What tests of the suite ask of an emulator's model and a model of 135 million parameters need not do: among it, to end
# an object that no schema bounds before the context ends.
_OF_THE_MODEL = ("test_continuing_goes_on_as_it_would_have", "test_required_tool", "test_json_object")
_OF_THE_ENGINE = {
    # A forced tool's arguments need not follow their schema, and a call cut by its length is text.
    "vllm": ("test_named_tool",),
    # Its PyTorch engine, which serves adapters, has no logprobs unless it is started with --logprobs-mode.
    "lmdeploy": ("test_logprobs",),
    # A forced tool's arguments need not follow their schema; what is cut by its length is no call, or `completed`.
    "sglang": ("test_named_tool", "test_responses.py::test_response["),
}
_LIMIT_S = 240.0
_ROOT = Path(__file__).parents[2]


def conformance(served: Served, context_tokens: int, work: Path) -> dict[str, Any]:
    """Counts, and the names of failing tests; `unexplained`: neither the model's nor known of the engine."""
    environment = os.environ | {
        "TUNEGATE_CONFORMANCE_ENGINE": served.engine.name,
        "TUNEGATE_CONFORMANCE_URL": served.gateway.url,
        "TUNEGATE_CONFORMANCE_MODEL": served.gateway.model,
        "TUNEGATE_CONFORMANCE_CONTEXT_TOKENS": str(context_tokens),
        "TUNEGATE_CONFORMANCE_KEY": str(served.gateway.api_key),
    }
    files = [str(_ROOT / "tests" / "conformance" / f"test_{name}.py") for name in _FILES]
    command = [sys.executable, "-m", "pytest", "-q", "--no-header", "--tb=short", "-p", "no:cacheprovider", *files]
    said = work / "conformance.txt"
    with said.open("w") as log:  # a file: what was said before the limit is kept
        status = subprocess.run(command, cwd=_ROOT, env=environment, stdout=log, stderr=log, timeout=_LIMIT_S,
                                check=False).returncode  # fmt: skip
    text = said.read_text(errors="replace")
    found: dict[str, Any] = {kind: int(n) for n, kind in re.findall(r"(\d+) (passed|failed|skipped|error)", text)}
    found["failing"] = re.findall(r"^(?:FAILED|ERROR) (?:\S*/)?(\S+)", text, re.MULTILINE)
    known = (*_OF_THE_MODEL, *_OF_THE_ENGINE.get(served.engine.name, ()))
    found["unexplained"] = [name for name in found["failing"] if not any(test in name for test in known)]
    assert status in (0, 1) and found.get("passed"), text[-800:]
    return found
