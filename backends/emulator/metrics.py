"""The engine's /metrics page: the families of its recording, with live values where a reader would act on them."""

from __future__ import annotations

import time
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from backends.emulator.batch import Batch
from backends.emulator.recordings import Book, Reply
from backends.emulator.settings import Settings


@dataclass(frozen=True)
class Names:
    """What an engine calls what is counted. "" where it has no such thing."""

    running: str
    waiting: str
    prompt_tokens: str
    generation_tokens: str
    finished: str  # counter
    finished_reasons: Mapping[str, str]  # ours -> its `finished_reason` label; empty: the counter has none
    aborted: str
    ttft: str  # histograms
    inter_token: str
    latency: str


NAMES = {
    "vllm": Names(
        running="vllm:num_requests_running",
        waiting="vllm:num_requests_waiting",
        prompt_tokens="vllm:prompt_tokens_total",
        generation_tokens="vllm:generation_tokens_total",
        finished="vllm:request_success_total",
        finished_reasons={"stop": "stop", "length": "length", "tool_calls": "stop", "abort": "abort"},
        aborted="",
        ttft="vllm:time_to_first_token_seconds",
        inter_token="vllm:inter_token_latency_seconds",  # noqa: S106  (no password)
        latency="vllm:e2e_request_latency_seconds",
    ),
    "sglang": Names(
        running="sglang:num_running_reqs",
        waiting="sglang:num_queue_reqs",
        prompt_tokens="sglang:prompt_tokens_total",
        generation_tokens="sglang:generation_tokens_total",
        finished="sglang:num_requests_total",
        finished_reasons={},
        aborted="sglang:num_aborted_requests_total",
        ttft="sglang:time_to_first_token_seconds",
        inter_token="sglang:inter_token_latency_seconds",  # noqa: S106  (no password)
        latency="sglang:e2e_request_latency_seconds",
    ),
    "lmdeploy": Names(
        running="lmdeploy:num_requests_running",
        waiting="lmdeploy:num_requests_waiting",
        prompt_tokens="lmdeploy:prompt_tokens_total",
        generation_tokens="lmdeploy:generation_tokens_total",
        finished="lmdeploy:request_success_total",
        finished_reasons={
            "stop": "ResponseType.FINISH",
            "length": "ResponseType.FINISH",
            "tool_calls": "ResponseType.FINISH",
            "abort": "ResponseType.CANCEL",
        },
        aborted="",
        ttft="lmdeploy:time_to_first_token_seconds",
        inter_token="lmdeploy:iter_token_latency",  # noqa: S106  (no password)
        latency="lmdeploy:e2e_request_latency_seconds",
    ),
}


@dataclass
class Histogram:
    """Observed values by bucket."""

    bounds: list[float]
    counts: list[int] = field(default_factory=list)
    total: float = 0.0

    def __post_init__(self) -> None:
        self.counts = [0] * len(self.bounds)

    def observe(self, value: float, times: int = 1) -> None:
        self.counts[bisect_left(self.bounds, value)] += times
        self.total += value * times


class Meter:
    """Counts what happens, and draws the page."""

    def __init__(self, book: Book, settings: Settings, batch: Batch) -> None:
        self._families: Mapping[str, Any] = book["metrics/metrics"].families or {}
        self._content_type = book["metrics/metrics"].headers["content-type"]
        self._names = NAMES[book.engine]
        self._settings, self._batch = settings, batch
        self._started_at_s = time.time()
        self.prompt_tokens = 0
        self.generation_tokens = 0
        self.finished: Counter[str] = Counter()  # by stop, length, tool_calls, abort
        self.ttft, self.inter_token, self.latency = map(
            self._histogram, (self._names.ttft, self._names.inter_token, self._names.latency)
        )

    def _histogram(self, name: str) -> Histogram:
        return Histogram([float(bound) for bound in self._families[name]["buckets"]])

    def page(self) -> Reply:
        """Everything as text."""
        body = "".join(line + "\n" for name in self._families if ":" in name for line in self._family(name)).encode()
        headers = ((b"content-type", self._content_type.encode()), (b"content-length", str(len(body)).encode()))
        return Reply(200, body, headers)

    def _family(self, name: str) -> Iterator[str]:
        family = self._families[name]
        yield f"# HELP {name} {family['help']}"
        yield f"# TYPE {name} {family['type']}"
        if name == "vllm:lora_requests_info":
            yield f"{name}{_labels(self._adapter_labels())} {time.time()}"
            return
        told: set[str] = set()  # where a family has several label sets, the first has all of the live values
        for sample, labels in family["samples"]:
            live = sample not in told or "finished_reason" in labels
            told.add(sample)
            shown = labels | ({"model_name": self._settings.served_name} if "model_name" in labels else {})
            if sample.endswith("_bucket"):
                running_total = 0
                for bound, count in zip(family["buckets"], self._histogram_of(name).counts, strict=True):
                    running_total += count if live else 0
                    yield f"{sample}{_labels(shown | {'le': bound})} {float(running_total)}"
            else:
                yield f"{sample}{_labels(shown)} {float(self._value(name, sample, labels) if live else 0)}"

    def _histogram_of(self, name: str) -> Histogram:
        names = self._names
        known = {names.ttft: self.ttft, names.inter_token: self.inter_token, names.latency: self.latency}
        return known.get(name) or self._histogram(name)

    def _value(self, name: str, sample: str, labels: Mapping[str, str]) -> float:
        names, batch = self._names, self._batch
        if name.endswith("_created"):
            return self._started_at_s
        if sample.endswith(("_count", "_sum")) and self._families[name]["type"] == "histogram":
            histogram = self._histogram_of(name)
            return histogram.total if sample.endswith("_sum") else sum(histogram.counts)
        if name == names.finished:
            reason = labels.get("finished_reason")
            ours = [key for key, theirs in names.finished_reasons.items() if theirs == reason]
            return sum(self.finished[key] for key in ours) if reason else sum(self.finished.values())
        simple = {
            names.running: batch.running,
            names.waiting: batch.waiting,
            names.prompt_tokens: self.prompt_tokens,
            names.generation_tokens: self.generation_tokens,
            names.aborted: self.finished["abort"],
            "sglang:lora_pool_slots_used": len(batch.running_adapters),
            "sglang:lora_pool_slots_total": (self._settings.batch_adapters or 0) + 1,
            "vllm:cache_config_info": 1,
        }
        return simple.get(name, 0)

    def _adapter_labels(self) -> dict[str, str]:
        running, waiting = self._batch.running_adapters, self._batch.waiting_adapters
        return {
            "max_lora": str(self._settings.batch_adapters),
            "running_lora_adapters": ",".join(running),
            "waiting_lora_adapters": ",".join(waiting),
        }


def _labels(labels: Mapping[str, str]) -> str:
    inside = ",".join(f'{name}="{value}"' for name, value in labels.items())
    return f"{{{inside}}}" if inside else ""
