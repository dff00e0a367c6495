"""A server's own metrics page, reduced to a few figures with one name each, whichever engine wrote it."""

from __future__ import annotations

import re

# figure -> the names it goes by; the first found counts, summed over its label sets (averaged for shares)
_NAMES: dict[str, tuple[str, ...]] = {
    "running": ("vllm:num_requests_running", "sglang:num_running_reqs", "lmdeploy:num_requests_running"),
    "waiting": ("vllm:num_requests_waiting", "sglang:num_queue_reqs", "lmdeploy:num_requests_waiting"),
    "kv_usage": (
        "vllm:kv_cache_usage_perc", "vllm:gpu_cache_usage_perc", "sglang:token_usage", "lmdeploy:gpu_cache_usage_perc",
    ),
    "cache_hit_tokens": ("vllm:prefix_cache_hits_total", "sglang:cached_tokens_total"),
    "cache_query_tokens": ("vllm:prefix_cache_queries_total", "sglang:prompt_tokens_total"),
    "prompt_tokens": ("vllm:prompt_tokens_total", "sglang:prompt_tokens_total"),
    "generation_tokens": ("vllm:generation_tokens_total", "sglang:generation_tokens_total"),
    "preemptions": ("vllm:num_preemptions_total", "sglang:num_retracted_reqs"),
    "lora_slots_used": ("sglang:lora_pool_slots_used",),
}  # fmt: skip
SHARES = ("kv_usage",)
GATEWAY_PREFIX = "tunegate_"
_LINE = re.compile(r"^([A-Za-z_:][\w:]*)(?:\{.*\})?\s+([^\s]+)")


def parse_metrics(text: str) -> dict[str, float]:
    """The figures found on a Prometheus page, and the CPU seconds of a gateway. Unknown ones are left out."""
    found: dict[str, list[float]] = {}
    for line in text.splitlines():
        match = _LINE.match(line)
        if match is None:
            continue
        try:
            found.setdefault(match[1], []).append(float(match[2]))
        except ValueError:
            continue
    figures: dict[str, float] = {}
    for figure, names in _NAMES.items():
        values = next((found[name] for name in names if name in found), None)
        if values:
            figures[figure] = sum(values) / len(values) if figure in SHARES else sum(values)
    for name, values in found.items():
        if name.startswith(GATEWAY_PREFIX) and "cpu_seconds" in name and not name.endswith("_created"):
            figures["gateway_cpu_s"] = figures.get("gateway_cpu_s", 0.0) + sum(values)
    return figures
