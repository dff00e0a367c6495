"""What an engine does by itself, without the gateway: whether it repeats itself, and what a first request costs it."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2

from scripts.gpu_suite.report import Report
from scripts.gpu_suite.serving import ANSWER_TOKENS, Served, chat

_TIMES = 10
_TOP_K_PATIENCE_S = 300.0
_JIT_CACHES = ("flashinfer", "tvm", "sgl")  # in the names of the directories below ~/.cache


@dataclass(frozen=True)
class Repeated:
    """What an engine answered to one greedy request, sent again and again."""

    agreed: list[str]  # the tokens that all answers begin with
    distinct: int
    text: str  # of the last answer

    @classmethod
    def of(cls, answers: list[dict[str, Any]]) -> Repeated:
        """From choices with logprobs."""
        tokens = [[token["token"] for token in answer["logprobs"]["content"]] for answer in answers]
        agreed = []
        for column in zip(*tokens, strict=False):
            if len(set(column)) > 1:
                break
            agreed.append(column[0])
        return cls(agreed, len({tuple(row) for row in tokens}), answers[-1]["message"]["content"])

    def allows(self, tokens: list[str], text: str) -> bool:
        """Whether another answer is one that the engine itself might have given."""
        if self.distinct == 1:
            return tokens == self.agreed and text == self.text
        return tokens[: len(self.agreed)] == self.agreed


def request(model: str, prompt: str) -> dict[str, Any]:
    """A greedy chat that shows its tokens."""
    return {"model": model, "messages": chat(prompt), "max_tokens": ANSWER_TOKENS, "temperature": 0, "logprobs": True}


def repeatable(report: Report, served: Served, model: str, prompts: list[str]) -> dict[str, Repeated]:
    """Ten times the same, straight to the first replica; every replica is asked once before, for its prefix cache.

    Raises AssertionError, with the figures written, only after all prompts: see `Repeated` for what can be compared.
    """
    found: dict[str, Repeated] = {}
    cold_differs = []
    with report.check("the same greedy request, ten times straight to the engine, gives one answer"):
        for prompt in prompts:
            body = request(model, prompt)
            cold = []
            for replica in served.replica_ids():
                with served.direct(replica) as direct:
                    cold.append(_choice(direct, body))
            with served.direct() as direct:
                found[prompt] = Repeated.of([_choice(direct, body) for _ in range(_TIMES)])
            if any(not found[prompt].allows(*_seen(answer)) for answer in cold):
                cold_differs.append(prompt)
        report.figures["distinct_answers_of_ten"] = {prompt: row.distinct for prompt, row in found.items()}
        report.figures["differs_with_a_cold_prefix_cache"] = cold_differs
        apart = {prompt: row for prompt, row in found.items() if row.distinct > 1}
        assert not apart, {prompt: f"{row.distinct} answers, the same for {len(row.agreed)} tokens"
                           for prompt, row in apart.items()}  # fmt: skip
    return found


def first_top_k(report: Report, served: Served, model: str, before: set[str]) -> None:
    """SGLang compiles its sampling kernels for the first request with top_k: how long one takes once it is ready.

    before: `jit_files` before its start.
    """
    started = time.monotonic()
    body = request(model, "Name a colour.") | {"top_k": 5, "temperature": 1, "logprobs": False}
    try:
        with served.direct() as direct:
            status = direct.post("/v1/chat/completions", json=body, timeout=_TOP_K_PATIENCE_S).status_code
    finally:
        made = sorted(jit_files() - before)
        report.figures["first_top_k"] = {"seconds": round(time.monotonic() - started, 2), "files_made": made[:40]}
        print(f"{report.stage}: first top_k: {report.figures['first_top_k']}", flush=True)
    assert status == 200, status


def jit_files() -> set[str]:
    """What engines compiled while they ran, below ~/.cache."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    roots = [path for path in cache.glob("*") if any(name in path.name for name in _JIT_CACHES)]
    return {str(file.relative_to(cache)) for root in roots for file in root.rglob("*") if file.is_file()}


def _choice(direct: httpx2.Client, body: dict[str, Any]) -> dict[str, Any]:
    return dict(direct.post("/v1/chat/completions", json=body).raise_for_status().json()["choices"][0])


def _seen(answer: dict[str, Any]) -> tuple[list[str], str]:
    return [token["token"] for token in answer["logprobs"]["content"]], answer["message"]["content"]
