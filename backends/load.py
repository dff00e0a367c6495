"""How busy an engine says it is: two figures from its own /metrics page. Pure."""

from __future__ import annotations

from dataclasses import dataclass

PATH = "/metrics"
_WAITING = {
    "vllm": "vllm:num_requests_waiting",
    "sglang": "sglang:num_queue_reqs",
    "lmdeploy": "lmdeploy:num_requests_waiting",
}
_KV_USED = {
    "vllm": "vllm:kv_cache_usage_perc",
    "sglang": "sglang:token_usage",
    "lmdeploy": "lmdeploy:gpu_cache_usage_perc",
}


@dataclass(frozen=True, slots=True)
class Load:
    """What waits in an engine's own queue, and which share of its KV cache is in use (0 to 1)."""

    waiting: int
    kv_used: float


def read(backend: str, page: str) -> Load:
    """Read a page of metrics; a figure that it lacks is 0.

    An engine of several schedulers has a sample for each: what waits is added up, the fullest cache counts.
    """
    waiting = sum(_samples(page, _WAITING[backend]))
    kv_used = max(_samples(page, _KV_USED[backend]), default=0.0)
    return Load(round(waiting), min(1.0, max(0.0, kv_used)))


def _samples(page: str, name: str) -> list[float]:
    """The values of one metric; a line that is no sample is left out."""
    found = []
    for line in page.splitlines():
        if line.startswith(name) and line[len(name) : len(name) + 1] in ("{", " "):
            try:
                found.append(float(line.rpartition(" ")[2]))
            except ValueError:
                continue
    return [value for value in found if value == value]  # without NaN
