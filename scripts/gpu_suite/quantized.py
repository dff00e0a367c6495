"""A checkpoint of our quantizer on an engine: it loads, on the right kernel, and answers as its weights say."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

from scripts.gpu_suite.reference import as_reference
from scripts.gpu_suite.report import Report
from scripts.gpu_suite.serving import Engine, Served, serving

# What logs must name, in lower case: vLLM Machete on Hopper, Marlin elsewhere. TurboMind names none.
FAST_KERNELS = {"vllm": "using (machete|marlin)", "sglang": "using (awq|gptq)_marlin"}
_SLOW = "falling back to unoptimized"  # SGLang, of a layer that its fast kernel does not take
_NEAR = 0.03  # relative, of a perplexity in 16 bits


def quantized_job(report: Report, engine: Engine, checkpoint: Path, form: str, work: Path, must_name: str) -> None:
    """Serve the checkpoint and compare. `must_name`: a pattern that the engine's log must hold; "" asks for none."""
    expected = json.loads(checkpoint.with_suffix(".json").read_text())
    flags = ["--dtype", "float16" if engine.name == "lmdeploy" else "bfloat16"]
    flags += ["--max-model-len", "2048", "--adapter-slots", "0"]
    if engine.name == "vllm":
        flags += ["--engine-arg=--enforce-eager"]  # answers are checked here, and speed is not
    with serving(engine, checkpoint, work / "state", *flags, name="quantized") as served, served.client() as client:
        report.figures |= {"ready_s": served.ready_s, "kernels": served.kernels(), "format": form}
        print(f"{report.stage}: ready after {served.ready_s} s", flush=True)
        with report.check("answers as its own weights do in float32"):
            report.figures["sure_tokens"] = as_reference(client, "quantized", expected["base"])
        if must_name:
            with report.check(f"the engine's log names {must_name}"):
                assert on_fast_kernel(served.log(), must_name), report.figures["kernels"]
        if engine.name != "lmdeploy":  # it gives no logprobs of a prompt
            with report.check(f"perplexity as served is within {_NEAR:.0%} of its weights' in float32"):
                own = _mean_logprob(served, expected["scored"]["ids"])
                both = {"served": math.exp(-own), "float32": math.exp(-expected["scored"]["mean_logprob"])}
                report.figures["perplexity"] = both
                print(f"{report.stage}: perplexity {both}", flush=True)
                assert abs(both["served"] / both["float32"] - 1) < _NEAR, both


def on_fast_kernel(log: str, must_name: str) -> bool:
    """Whether the engine says that it takes such a kernel, and of no layer that it cannot."""
    return bool(re.search(must_name, log.lower())) and _SLOW not in log.lower()


def _mean_logprob(served: Served, ids: list[int]) -> float:
    """What the engine itself gives for the tokens of a text after the first."""
    with served.direct() as direct:
        if served.engine.name == "sglang":
            body: dict[str, Any] = {"input_ids": ids, "return_logprob": True, "logprob_start_len": 0,
                                    "sampling_params": {"max_new_tokens": 1, "temperature": 0}}  # fmt: skip
            found = direct.post("/generate", json=body).raise_for_status().json()["meta_info"]["input_token_logprobs"]
            values = [row[0] for row in found[1:]]
        else:
            body = {"model": "quantized", "prompt": ids, "echo": True, "logprobs": 1, "max_tokens": 1, "temperature": 0}
            choice = direct.post("/v1/completions", json=body).raise_for_status().json()["choices"][0]
            values = choice["logprobs"]["token_logprobs"][1 : len(ids)]
    assert len(values) == len(ids) - 1, f"{len(values)} logprobs of {len(ids)} tokens"
    return math.fsum(values) / len(values)
