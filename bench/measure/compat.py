"""The same record under other tools' definitions, so that a figure can be held against theirs.

Each function restates what a tool's own client and formula make of one stream, oddities included. Times in milliseconds
from the actual send; MLPerf's from the scheduled time, as its load generator does.
"""

from __future__ import annotations

from collections.abc import Callable

import msgspec
import numpy as np

from bench.measure.define import PER_CHUNK, Floats, Reading
from bench.measure.record import CHOICES, CONTENT, DONE, ERROR, GENERATED, REASONING


class Compat(msgspec.Struct):
    """One tool's reading of one request. None where the tool has no such figure."""

    success: bool
    tokens: float
    ttft_ms: float | None = None
    tpot_ms: float | None = None
    itl_mean_ms: float | None = None
    itl_max_ms: float | None = None
    e2el_ms: float | None = None


TEXT = CONTENT | REASONING


def _times(reading: Reading, mask: int) -> Floats:
    chosen = ((reading.flags & mask) != 0) & ((reading.flags & ERROR) == 0)
    times_ms: Floats = (reading.t_ns[chosen] - reading.request.sent_ns) / 1e6
    return times_ms


def _ok_status(reading: Reading) -> bool:
    return reading.request.status == 200 and reading.request.transport is None


def _at(times: Floats, place: int) -> float | None:
    return float(times[place]) if len(times) else None


def _per(total_ms: float | None, count: float) -> float | None:
    return None if total_ms is None or count <= 0 else float(total_ms) / count


def vllm(reading: Reading) -> Compat:
    """vLLM `bench serve`, openai-chat: any chunk with choices is a token event, the role chunk included; an in-band
    error or a stream cut short is a success."""
    times = _times(reading, CHOICES)
    n = float(reading.request.output_tokens or 0)
    gaps = np.diff(times)
    return Compat(
        success=_ok_status(reading) and len(times) > 0,
        tokens=n,
        ttft_ms=_at(times, 0),
        tpot_ms=_per(times[-1] - times[0], n - 1) if len(times) else None,
        itl_mean_ms=float(gaps.mean()) if len(gaps) else None,
        itl_max_ms=float(gaps.max()) if len(gaps) else None,
        e2el_ms=_at(times, -1),
    )


def sglang(reading: Reading) -> Compat:
    """SGLang `bench_serving`, oai-chat: first text; the end is the last line of any kind; usage is not asked for, so
    the token count is the number requested."""
    times = _times(reading, TEXT)
    lines = (reading.t_ns - reading.request.sent_ns) / 1e6
    n = float(reading.request.output_tokens_asked or reading.request.output_tokens or 0)
    gaps = np.diff(times)
    return Compat(
        success=_ok_status(reading),
        tokens=n,
        ttft_ms=_at(times, 0),
        tpot_ms=_per(lines[-1] - times[0], n - 1) if len(times) else None,
        itl_mean_ms=float(gaps.mean()) if len(gaps) else None,
        itl_max_ms=float(gaps.max()) if len(gaps) else None,
        e2el_ms=_at(lines, -1),
    )


def guidellm(reading: Reading) -> Compat:
    """GuideLLM: TPOT has the first token in it; ITL is a mean a request; chunk times are not kept."""
    times = _times(reading, GENERATED)
    n = _usage_or(reading, len(times))
    return Compat(
        success=_ok_status(reading) and not _has(reading, ERROR),
        tokens=n,
        ttft_ms=_at(times, 0),
        tpot_ms=_per(times[-1], n) if len(times) else None,
        itl_mean_ms=_per(times[-1] - times[0], n - 1) if len(times) else None,
        e2el_ms=_to_the_end_ms(reading),
    )


def aiperf(reading: Reading) -> Compat:
    """AIPerf with --use-server-token-count and --per-chunk-usage: ITL leaves the first chunk's tokens out (one where
    they are not stated)."""
    times = _times(reading, GENERATED)
    counts, n = reading.token_counts, reading.tokens
    first = float(counts[0]) if len(counts) and reading.counted_by == PER_CHUNK else 1.0
    return Compat(
        success=_ok_status(reading) and not _has(reading, ERROR) and len(times) > 0,
        tokens=n,
        ttft_ms=_at(times, 0),
        itl_mean_ms=_per(times[-1] - times[0], n - first) if len(times) else None,
        e2el_ms=_at(times, -1),
    )


def genai_perf(reading: Reading) -> Compat:
    """genai-perf: from the first response with content; ITL is a mean a request. Its chunk-wise list, each gap divided
    by the tokens of its chunk, is what the maximum is of."""
    counts, n = reading.token_counts, reading.tokens
    times = (reading.token_t_ns - reading.request.sent_ns) / 1e6
    later = counts[1:] > 0
    per_token = reading.gaps_ms[later] / counts[1:][later]
    return Compat(
        success=_ok_status(reading),
        tokens=n,
        ttft_ms=_at(times, 0),
        itl_mean_ms=_per(float(times[-1] - times[0]), n - 1) if len(times) else None,
        itl_max_ms=float(per_token.max()) if len(per_token) else None,
        e2el_ms=_at(times, -1),
    )


def inference_perf(reading: Reading) -> Compat:
    """inference-perf: first non-empty token, end at completion, gaps between chunks pooled."""
    times = _times(reading, GENERATED)
    n = _usage_or(reading, len(times))
    end = _to_the_end_ms(reading)
    gaps = np.diff(times)
    return Compat(
        success=_ok_status(reading),
        tokens=n,
        ttft_ms=_at(times, 0),
        tpot_ms=_per(end - times[0], n - 1) if len(times) else None,
        itl_mean_ms=float(gaps.mean()) if len(gaps) else None,
        itl_max_ms=float(gaps.max()) if len(gaps) else None,
        e2el_ms=end,
    )


def evalscope(reading: Reading) -> Compat:
    """evalscope: the role chunk is the first token; the end is the last message, usage included."""
    times = _times(reading, CHOICES)
    messages = _times(reading, ~DONE)
    n = _usage_or(reading, len(times))
    gaps = np.diff(times)
    return Compat(
        success=_ok_status(reading),
        tokens=n,
        ttft_ms=_at(times, 0),
        tpot_ms=_per(messages[-1] - times[0], n - 1) if len(times) else None,
        itl_mean_ms=float(gaps.mean()) if len(gaps) else None,
        itl_max_ms=float(gaps.max()) if len(gaps) else None,
        e2el_ms=_at(messages, -1),
    )


def mlperf(reading: Reading) -> Compat:
    """MLPerf load generator: latency from the scheduled time; TPOT without the first token; one token is an error."""
    times = _times(reading, GENERATED) + reading.send_lag_ms
    n = reading.tokens
    return Compat(
        success=_ok_status(reading) and n > 1,
        tokens=n,
        ttft_ms=_at(times, 0),
        tpot_ms=_per(times[-1] - times[0], n - 1) if len(times) else None,
        e2el_ms=_at(times, -1),
    )


def llmperf(reading: Reading) -> Compat:
    """llmperf: the time to the first token is inside the mean of what it calls inter-token latency."""
    times = _times(reading, CONTENT)
    chunks = len(_times(reading, CHOICES))
    n = _usage_or(reading, len(times))
    return Compat(
        success=_ok_status(reading) and not _has(reading, ERROR),
        tokens=n,
        ttft_ms=_at(times, 0),
        itl_mean_ms=_per(times[-1], chunks) if len(times) else None,
        e2el_ms=_to_the_end_ms(reading),
    )


def _has(reading: Reading, mask: int) -> bool:
    return bool((reading.flags & mask).any())


def _usage_or(reading: Reading, events: int) -> float:
    total = reading.request.output_tokens
    return float(events if total is None else total)


def _to_the_end_ms(reading: Reading) -> float:
    return (reading.request.end_ns - reading.request.sent_ns) / 1e6


TOOLS: dict[str, Callable[[Reading], Compat]] = {
    "vLLM": vllm,
    "SGLang": sglang,
    "GuideLLM": guidellm,
    "AIPerf": aiperf,
    "genai-perf": genai_perf,
    "inference-perf": inference_perf,
    "evalscope": evalscope,
    "MLPerf": mlperf,
    "llmperf": llmperf,
}
FIGURES = ("ttft_ms", "tpot_ms", "itl_mean_ms", "e2el_ms", "tokens")


def means(readings: list[Reading]) -> dict[str, dict[str, float | None]]:
    """tool -> figure -> mean over the requests that the tool would call successful; `successes` counts them."""
    table: dict[str, dict[str, float | None]] = {}
    for tool, read_as in TOOLS.items():
        counted = [compat for compat in map(read_as, readings) if compat.success]
        row: dict[str, float | None] = {"successes": float(len(counted))}
        for figure in FIGURES:
            values = [value for value in (getattr(compat, figure) for compat in counted) if value is not None]
            row[figure] = float(np.mean(values)) if values else None
        table[tool] = row
    return table
