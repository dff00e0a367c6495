"""The same record under other tools' definitions, so that a figure can be held against theirs.

Each function restates what a tool's own client and formula make of one stream, oddities included. Times in milliseconds
from the actual send; MLPerf's from the scheduled time, as its load generator does.
"""

from __future__ import annotations

from collections.abc import Callable

import msgspec
import numpy as np

from bench.measure.define import Floats, count_tokens
from bench.measure.record import CHOICES, CONTENT, DONE, ERROR, GENERATED, REASONING, RequestRecord


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


def _times(record: RequestRecord, mask: int) -> Floats:
    flags = np.asarray(record.events.flags, dtype=np.int64)
    chosen = ((flags & mask) != 0) & ((flags & ERROR) == 0)
    times_ms: Floats = (np.asarray(record.events.t_ns, dtype=np.int64)[chosen] - record.sent_ns) / 1e6
    return times_ms


def _ok_status(record: RequestRecord) -> bool:
    return record.status == 200 and record.transport is None


def _at(times: Floats, place: int) -> float | None:
    return float(times[place]) if len(times) else None


def _per(total_ms: float | None, count: float) -> float | None:
    return None if total_ms is None or count <= 0 else float(total_ms) / count


def vllm(record: RequestRecord) -> Compat:
    """vLLM `bench serve`, openai-chat: any chunk with choices is a token event, the role chunk included; an in-band
    error or a stream cut short is a success."""
    times = _times(record, CHOICES)
    n = float(record.output_tokens or 0)
    gaps = np.diff(times)
    return Compat(
        success=_ok_status(record) and len(times) > 0,
        tokens=n,
        ttft_ms=_at(times, 0),
        tpot_ms=_per(times[-1] - times[0], n - 1) if len(times) else None,
        itl_mean_ms=float(gaps.mean()) if len(gaps) else None,
        itl_max_ms=float(gaps.max()) if len(gaps) else None,
        e2el_ms=_at(times, -1),
    )


def sglang(record: RequestRecord) -> Compat:
    """SGLang `bench_serving`, oai-chat: first text; the end is the last line of any kind; usage is not asked for, so
    the token count is the number requested."""
    times = _times(record, TEXT)
    lines = (np.asarray(record.events.t_ns, dtype=np.int64) - record.sent_ns) / 1e6
    n = float(record.output_tokens_asked or record.output_tokens or 0)
    gaps = np.diff(times)
    return Compat(
        success=_ok_status(record),
        tokens=n,
        ttft_ms=_at(times, 0),
        tpot_ms=_per(lines[-1] - times[0], n - 1) if len(times) else None,
        itl_mean_ms=float(gaps.mean()) if len(gaps) else None,
        itl_max_ms=float(gaps.max()) if len(gaps) else None,
        e2el_ms=_at(lines, -1),
    )


def guidellm(record: RequestRecord) -> Compat:
    """GuideLLM: TPOT has the first token in it; ITL is a mean a request; chunk times are not kept."""
    times = _times(record, GENERATED)
    n = float(record.output_tokens if record.output_tokens is not None else len(times))
    return Compat(
        success=_ok_status(record) and not _has(record, ERROR),
        tokens=n,
        ttft_ms=_at(times, 0),
        tpot_ms=_per(times[-1], n) if len(times) else None,
        itl_mean_ms=_per(times[-1] - times[0], n - 1) if len(times) else None,
        e2el_ms=(record.end_ns - record.sent_ns) / 1e6,
    )


def aiperf(record: RequestRecord) -> Compat:
    """AIPerf with --use-server-token-count and --per-chunk-usage: ITL leaves the first chunk's tokens out (one where
    they are not stated)."""
    times = _times(record, GENERATED)
    _, counts, n, counted_by = count_tokens(record)
    first = float(counts[0]) if len(counts) and counted_by == "usage per chunk" else 1.0
    return Compat(
        success=_ok_status(record) and not _has(record, ERROR) and len(times) > 0,
        tokens=n,
        ttft_ms=_at(times, 0),
        itl_mean_ms=_per(times[-1] - times[0], n - first) if len(times) else None,
        e2el_ms=_at(times, -1),
    )


def genai_perf(record: RequestRecord) -> Compat:
    """genai-perf: from the first response with content; ITL is a mean a request. Its chunk-wise list, each gap divided
    by the tokens of its chunk, is what the maximum is of."""
    times_ns, counts, n, _ = count_tokens(record)
    times = (times_ns - record.sent_ns) / 1e6
    later = counts[1:] > 0
    per_token = np.diff(times)[later] / counts[1:][later]
    return Compat(
        success=_ok_status(record),
        tokens=n,
        ttft_ms=_at(times, 0),
        itl_mean_ms=_per(float(times[-1] - times[0]), n - 1) if len(times) else None,
        itl_max_ms=float(per_token.max()) if len(per_token) else None,
        e2el_ms=_at(times, -1),
    )


def inference_perf(record: RequestRecord) -> Compat:
    """inference-perf: first non-empty token, end at completion, gaps between chunks pooled."""
    times = _times(record, GENERATED)
    n = float(record.output_tokens if record.output_tokens is not None else len(times))
    end = (record.end_ns - record.sent_ns) / 1e6
    gaps = np.diff(times)
    return Compat(
        success=_ok_status(record),
        tokens=n,
        ttft_ms=_at(times, 0),
        tpot_ms=_per(end - times[0], n - 1) if len(times) else None,
        itl_mean_ms=float(gaps.mean()) if len(gaps) else None,
        itl_max_ms=float(gaps.max()) if len(gaps) else None,
        e2el_ms=end,
    )


def evalscope(record: RequestRecord) -> Compat:
    """evalscope: the role chunk is the first token; the end is the last message, usage included."""
    times = _times(record, CHOICES)
    messages = _times(record, ~DONE)
    n = float(record.output_tokens if record.output_tokens is not None else len(times))
    gaps = np.diff(times)
    return Compat(
        success=_ok_status(record),
        tokens=n,
        ttft_ms=_at(times, 0),
        tpot_ms=_per(messages[-1] - times[0], n - 1) if len(times) else None,
        itl_mean_ms=float(gaps.mean()) if len(gaps) else None,
        itl_max_ms=float(gaps.max()) if len(gaps) else None,
        e2el_ms=_at(messages, -1),
    )


def mlperf(record: RequestRecord) -> Compat:
    """MLPerf load generator: latency from the scheduled time; TPOT without the first token; one token is an error."""
    late_ms = 0.0 if record.intended_ns is None else (record.sent_ns - record.intended_ns) / 1e6
    times = _times(record, GENERATED) + late_ms
    _, _, n, _ = count_tokens(record)
    return Compat(
        success=_ok_status(record) and n > 1,
        tokens=n,
        ttft_ms=_at(times, 0),
        tpot_ms=_per(times[-1] - times[0], n - 1) if len(times) else None,
        e2el_ms=_at(times, -1),
    )


def llmperf(record: RequestRecord) -> Compat:
    """llmperf: the time to the first token is inside the mean of what it calls inter-token latency."""
    times = _times(record, CONTENT)
    chunks = len(_times(record, CHOICES))
    n = float(record.output_tokens if record.output_tokens is not None else len(times))
    return Compat(
        success=_ok_status(record) and not _has(record, ERROR),
        tokens=n,
        ttft_ms=_at(times, 0),
        itl_mean_ms=_per(times[-1], chunks) if len(times) else None,
        e2el_ms=(record.end_ns - record.sent_ns) / 1e6,
    )


def _has(record: RequestRecord, mask: int) -> bool:
    return bool((np.asarray(record.events.flags, dtype=np.int64) & mask).any())


TOOLS: dict[str, Callable[[RequestRecord], Compat]] = {
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


def means(records: list[RequestRecord]) -> dict[str, dict[str, float | None]]:
    """tool -> figure -> mean over the requests that the tool would call successful; `successes` counts them."""
    table: dict[str, dict[str, float | None]] = {}
    for tool, read in TOOLS.items():
        counted = [compat for compat in map(read, records) if compat.success]
        row: dict[str, float | None] = {"successes": float(len(counted))}
        for figure in FIGURES:
            values = [value for value in (getattr(compat, figure) for compat in counted) if value is not None]
            row[figure] = float(np.mean(values)) if values else None
        table[tool] = row
    return table
