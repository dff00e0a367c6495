"""The real vLLM on the CPU loads all three formats, answers, and is as good as the reference dequantization says.

Needs the demo model (`gateway models pull demo`) and the engine (`gateway engines install vllm --device cpu`).
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from quant.calib import calibration_tokens  # noqa: E402
from quant.config import FORMATS, Grid, QuantOptions  # noqa: E402
from quant.convert import convert  # noqa: E402
from quant.evaluate import evaluate  # noqa: E402
from quant.walk import quantize_checkpoint  # noqa: E402

HOME = Path(os.environ.get("TUNEGATE_HOME", "~/.tunegate")).expanduser()
DEMO = HOME / "models" / "demo"
READY_WITHIN_S = 300

pytestmark = [pytest.mark.engine, pytest.mark.timeout(1800)]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One quantization in all three formats: conversions are exact, so all hold the same weights."""
    if not DEMO.is_dir():
        pytest.skip(f"no demo model at {DEMO}: gateway models pull demo")
    directory = tmp_path_factory.mktemp("served")
    options = QuantOptions(model=DEMO, format="gptq", grid=Grid(group_size=64, symmetric=True), calib_samples=0)
    quantize_checkpoint(options, directory / "gptq", lambda step: None)
    for form in ("awq", "compressed-tensors"):
        convert(directory / "gptq", form, directory / form)
    return {form: directory / form for form in FORMATS}


@pytest.fixture(scope="module")
def reference(checkpoints: dict[str, Path]) -> tuple[list[list[int]], float]:
    """(sequences, their perplexity under the reference dequantization)."""
    tokens_BT = calibration_tokens(DEMO, None, 4, 256, seed=5)
    return tokens_BT.tolist(), evaluate(DEMO, checkpoints["gptq"], tokens_BT, torch.device("cpu")).perplexity


@pytest.mark.parametrize("form", FORMATS)
def test_served_perplexity_equals_the_reference(
    form: str, checkpoints: dict[str, Path], reference: tuple[list[list[int]], float], tmp_path: Path
) -> None:
    sequences, expected = reference
    with vllm(checkpoints[form], tmp_path / "vllm.log") as url:
        served = perplexity(url, sequences)
        question = [{"role": "user", "content": "What is the capital of France?"}]
        answer = post(url, "/v1/chat/completions", {"messages": question, "max_tokens": 24, "temperature": 0})
    text = answer["choices"][0]["message"]["content"]
    print(f"{form}: served {served:.4f}, reference {expected:.4f} ({served / expected - 1:+.3%}); answers {text!r}")
    assert served == pytest.approx(expected, rel=0.01)  # the engine computes in bfloat16, the reference in float32
    assert "Paris" in text


def perplexity(url: str, sequences: list[list[int]]) -> float:
    """Of prompts given as token ids, from the engine's own prompt log-probabilities."""
    losses: list[float] = []
    for ids in sequences:
        answer = post(url, "/v1/completions", {"prompt": ids, "max_tokens": 1, "prompt_logprobs": 0, "temperature": 0})
        known = answer["choices"][0]["prompt_logprobs"]
        losses += [-at[str(token)]["logprob"] for token, at in zip(ids[1:], known[1:], strict=True)]
    return math.exp(sum(losses) / len(losses))


def post(url: str, path: str, body: dict[str, Any]) -> Any:
    request = urllib.request.Request(
        url + path, json.dumps(body | {"model": "base"}).encode(), {"content-type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=300) as answer:
        return json.load(answer)


@contextlib.contextmanager
def vllm(model: Path, log: Path) -> Iterator[str]:
    engines = sorted((HOME / "engines").glob("vllm-*-cpu/bin/vllm"))
    if not engines:
        pytest.skip("no vLLM for the CPU: gateway engines install vllm --device cpu")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    argv = [str(engines[-1]), "serve", str(model), "--served-model-name", "base", "--dtype", "bfloat16"]
    argv += ["--max-model-len", "1024", "--enforce-eager", "--host", "127.0.0.1", "--port", str(port)]
    environment = dict(os.environ, VLLM_CPU_KVCACHE_SPACE="1", DO_NOT_TRACK="1")
    with log.open("w") as stream:
        process = subprocess.Popen(argv, stdout=stream, stderr=stream, env=environment, start_new_session=True)
    try:
        deadline = time.monotonic() + READY_WITHIN_S
        while not _healthy(url):
            assert process.poll() is None, log.read_text()[-3000:]
            assert time.monotonic() < deadline, log.read_text()[-3000:]
            time.sleep(0.5)
        yield url
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _healthy(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=5) as answer:
            return bool(answer.status == 200)
    except (urllib.error.URLError, OSError):
        return False
