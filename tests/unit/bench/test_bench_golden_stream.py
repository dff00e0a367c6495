"""A stream with a known timeline, read by the real client over a real socket, whole and with faults."""

from __future__ import annotations

import math
import shutil
import ssl
import subprocess
import time
from itertools import pairwise
from pathlib import Path

import pytest
from bench_scripted import (
    DONE,
    END,
    HEAD,
    Played,
    Step,
    chunk,
    event,
    golden,
    golden_end,
    http_chunk,
    plain,
    scripted,
    usage,
)

from bench.load.finish import to_record
from bench.load.job import Job
from bench.load.loop import Loop, Target
from bench.load.sources import ClosedSource
from bench.measure import compat
from bench.measure.define import FINAL, PER_CHUNK, read
from bench.measure.record import RequestRecord
from bench.wire.connection import Exchange
from bench.wire.http import resolve


def send_one(steps: list[Step], close: bool = False, timeout_s: float = 5.0) -> tuple[RequestRecord, Played]:
    with scripted(lambda number, request: steps, close_after=lambda number: close) as server:
        records = send_to(server.url, 1, timeout_s)
        return records[0], server.played[0]


def send_to(url: str, count: int, timeout_s: float = 5.0) -> list[RequestRecord]:
    """Records of so many requests, one after the other."""
    records: list[RequestRecord] = []
    start_ns = time.monotonic_ns()

    def done(job: Job, exchange: Exchange) -> str | None:
        record, text = to_record(job, exchange, start_ns, 0)
        records.append(record)
        return text

    def make(index: int) -> Job:
        return Job(index=index, segment=0, target="t", model="m", body=b'{"stream":true}', output_tokens=128)

    loop = Loop([Target("t", resolve(url), "/v1/chat/completions", {})], done, timeout_s)
    stop_ns = start_ns + int(20e9)
    loop.run(ClosedSource(1, start_ns, stop_ns, 0, iter(range(count)), make), stop_ns)
    loop.close()
    return records


def test_readings_equal_the_truth_within_a_millisecond() -> None:
    # A machine that has no time for the client for some ms makes it read late; then the stream is read once more.
    off = [math.inf]
    for _ in range(5):
        off = differences_from_the_truth()
        if max(off) < 1:
            break
    assert max(off) < 1, off


def differences_from_the_truth() -> list[float]:
    """Of four readings of the known stream: first and last token, the longest gap, and 96 times the time per token."""
    with scripted(lambda number, request: golden() + golden_end()) as server:
        # the second request finds its connection open, so that the server's receipt is the client's send
        record, played = send_to(server.url, 2)[1], server.played[1]
    reading = read(record)
    assert reading.failure is None
    assert (reading.counted_by, reading.tokens, reading.token_times_known) == (PER_CHUNK, 100, True)
    assert reading.ttft_from_send_ms is not None and reading.e2el_ms is not None and reading.tpot_ms is not None
    first_ns, last_ns = played.sent_ns[2] - played.received_ns, played.sent_ns[26] - played.received_ns
    return [
        abs(reading.ttft_from_send_ms - first_ns / 1e6),
        abs(reading.e2el_ms - reading.send_lag_ms - last_ns / 1e6),
        abs(reading.gaps_ms.max() - max(gaps_ms(played))),
        abs(96 * reading.tpot_ms - (last_ns - first_ns) / 1e6),
    ]


def ideal(steps: list[Step]) -> RequestRecord:
    """The record of a timeline kept to the microsecond: what formulas are held against."""
    exchange = Exchange(0, reused=True)
    exchange.status, exchange.headers = 200, {"content-type": "text/event-stream"}
    exchange.pieces = [(round(at_ms * 1e6), data) for at_ms, data in steps]
    exchange.complete, exchange.end_ns = True, round(steps[-1][0] * 1e6)
    job = Job(index=0, segment=0, target="t", model="m", body=b"", output_tokens=128)
    return to_record(job, exchange, 0, 0)[0]


def unframed(steps: list[Step]) -> list[Step]:
    """A timeline's events without their HTTP framing."""
    return [
        (at_ms, b"".join(data.split(b"\r\n")[1:2])) for at_ms, data in steps if not data.startswith((b"HTTP", b"0"))
    ]


def gaps_ms(played: Played) -> list[float]:
    sent = played.sent_ns[2:27]
    return [(b - a) / 1e6 for a, b in pairwise(sent)]


def test_final_usage_gives_the_same_tpot_and_refuses_token_times() -> None:
    reading = read(ideal(unframed(golden(per_chunk_usage=False) + golden_end())))
    assert reading.counted_by == FINAL
    assert reading.tokens == 100
    assert reading.tpot_ms == pytest.approx(10.0)
    assert not reading.token_times_known


def test_compatibility_columns_print_what_the_tools_print() -> None:
    record = ideal(unframed(golden() + golden_end()))
    vllm, sglang = compat.vllm(read(record)), compat.sglang(read(record))
    assert (vllm.ttft_ms, vllm.tpot_ms, vllm.itl_mean_ms, vllm.itl_max_ms, vllm.e2el_ms, vllm.tokens) == (
        pytest.approx(20, abs=0.06),
        pytest.approx(11.5, abs=0.06),
        pytest.approx(43.9, abs=0.06),
        pytest.approx(180, abs=0.06),
        pytest.approx(1161, abs=0.06),
        100,
    )
    assert (sglang.ttft_ms, sglang.tpot_ms, sglang.itl_mean_ms, sglang.e2el_ms, sglang.tokens) == (
        pytest.approx(200, abs=0.06),
        pytest.approx(7.6, abs=0.06),
        pytest.approx(40, abs=0.06),
        pytest.approx(1166, abs=0.06),
        128,
    )
    assert compat.guidellm(read(record)).tpot_ms == pytest.approx(11.6, abs=0.06)
    assert compat.guidellm(read(record)).itl_mean_ms == pytest.approx(9.7, abs=0.06)
    assert compat.aiperf(read(record)).itl_mean_ms == pytest.approx(10.0)
    assert compat.genai_perf(read(record)).itl_mean_ms == pytest.approx(9.7, abs=0.06)
    assert compat.genai_perf(read(record)).itl_max_ms == pytest.approx(10.0)
    evalscope = compat.evalscope(read(record))
    assert (evalscope.ttft_ms, evalscope.tpot_ms, evalscope.itl_mean_ms, evalscope.e2el_ms) == (
        pytest.approx(20, abs=0.06),
        pytest.approx(11.6, abs=0.06),
        pytest.approx(43.9, abs=0.06),
        pytest.approx(1165, abs=0.06),
    )
    assert compat.llmperf(read(record)).itl_mean_ms == pytest.approx(1160 / 27)
    assert compat.mlperf(read(record)).tpot_ms == pytest.approx(9.7, abs=0.06)


def test_in_band_error_is_a_failure_that_vllm_and_sglang_count_as_success() -> None:
    error = [
        (400.0, http_chunk(event({"error": {"message": "worker died", "code": 500}}))),
        (402.0, http_chunk(DONE) + END),
    ]
    steps = golden(per_chunk_usage=False, content_chunks=5) + error
    sent, _ = send_one(steps)
    assert read(sent).failure == "in-band error"
    record = ideal(unframed(steps))
    assert record.error is not None and "worker died" in record.error
    vllm, sglang = compat.vllm(read(record)), compat.sglang(read(record))
    assert (vllm.success, vllm.tokens, vllm.ttft_ms) == (True, 0, pytest.approx(20, abs=0.06))
    assert (sglang.success, sglang.tokens, sglang.tpot_ms) == (True, 128, pytest.approx(202 / 127))


def test_clean_end_without_finish_is_a_failure_that_others_count_as_success() -> None:
    steps = golden(per_chunk_usage=False, content_chunks=5)
    sent, _ = send_one([*steps, (362.0, END)])
    assert read(sent).failure == "truncated"
    record = ideal(unframed(steps))
    assert compat.vllm(read(record)).success
    assert (compat.sglang(read(record)).success, compat.sglang(read(record)).tpot_ms) == (
        True,
        pytest.approx(160 / 127),
    )


def test_connection_cut_inside_the_stream() -> None:
    record, _ = send_one(golden(content_chunks=3), close=True)
    assert read(record).failure == "truncated"
    assert record.transport == "closed inside the body"


@pytest.mark.parametrize(
    ("steps", "cause"),
    [
        ([(1, plain("429 Too Many Requests", b'{"error":{"message":"slow down"}}', "retry-after: 1\r\n"))], "http 429"),
        ([(1, plain("500 Internal Server Error", b"boom"))], "http 500"),
        ([(1, plain("200 OK", b'{"choices":[]}'))], "malformed"),
        ([(1, b"SPAM/1.1 nonsense\r\n\r\n")], "transport"),
        ([(1, HEAD + http_chunk(chunk("a")) + http_chunk(chunk(finish="stop")) + END)], "truncated"),
        ([(1, HEAD + http_chunk(b"data: {nonsense\n\n") + http_chunk(DONE) + END)], "malformed"),
        ([(1, HEAD + http_chunk(b"event: error\ndata: overloaded\n\n") + END)], "in-band error"),
        ([(1, HEAD + http_chunk(chunk(role=True) + chunk(finish="stop") + DONE) + END)], "empty"),
    ],
)
def test_each_fault_has_its_cause(steps: list[Step], cause: str) -> None:
    record, _ = send_one(steps)
    assert read(record).failure == cause


def test_short_answer_fails_only_when_length_was_exact() -> None:
    record, _ = send_one([(1, HEAD + http_chunk(chunk("hi") + chunk(finish="stop") + usage(2) + DONE) + END)])
    assert read(record).failure is None
    record.output_exact = True
    assert read(record).failure == "short"


def test_stall_ends_in_a_timeout() -> None:
    record, _ = send_one([*golden(content_chunks=1), (3000, END)], timeout_s=0.5)
    assert read(record).failure == "timeout"


def test_refused_connection() -> None:
    with scripted(lambda number, request: []) as server:
        url = server.url
    assert [read(record).failure for record in send_to(url, 2)] == ["connect", "connect"]


def test_odd_but_legal_framing_reads_the_same() -> None:
    """Split UTF-8, CRLF, comments, one event over many reads, usage in the last content chunk."""
    text = chunk("grüße 🙂", tokens=3).decode().replace("\n\n", "\r\n\r\n")
    raw = b": keep-alive\r\n\r\n" + chunk(role=True).replace(b"\n\n", b"\r\n\r\n") + text.encode()
    raw += chunk(" end", finish="stop", tokens=4).replace(b"data: ", b"data:") + DONE
    steps: list[Step] = [(0.5, HEAD)]
    steps += [(1 + 0.3 * k, http_chunk(raw[k * 7 : k * 7 + 7])) for k in range(-(-len(raw) // 7))]
    record, _ = send_one([*steps, (200, END)])
    reading = read(record)
    assert reading.failure is None
    assert (reading.tokens, reading.counted_by) == (4, PER_CHUNK)
    assert sum(record.events.chars) == len("grüße 🙂 end")


def test_connections_are_reused_and_a_stale_one_is_replaced() -> None:
    steps = [(1.0, HEAD + http_chunk(chunk("a", finish="stop") + usage(1) + DONE) + END)]
    with scripted(lambda number, request: steps, close_after=lambda number: number == 1) as server:
        records = send_to(server.url, 5)
    assert [read(record).failure for record in records] == [None] * 5
    assert [record.reused for record in records].count(False) == 2


@pytest.mark.skipif(shutil.which("openssl") is None, reason="needs openssl to make a certificate")
def test_streams_over_tls_read_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    certificate, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=127.0.0.1",
         "-addext", "subjectAltName=IP:127.0.0.1", "-keyout", str(key), "-out", str(certificate)],
        check=True, capture_output=True,
    )  # fmt: skip
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    steps = [
        (1.0, HEAD),
        (30.0, http_chunk(chunk("a", tokens=1))),
        (60.0, http_chunk(chunk("b", finish="stop", tokens=2))),
    ]
    steps.append((61.0, http_chunk(DONE) + END))
    with scripted(lambda number, request: steps, tls=context) as server:
        records = send_to(server.url, 2)
    readings = [read(record) for record in records]
    assert [reading.failure for reading in readings] == [None, None]
    assert [record.reused for record in records] == [False, True]
    sent_ns = server.played[1].sent_ns
    assert readings[1].tpot_ms == pytest.approx((sent_ns[2] - sent_ns[1]) / 1e6, abs=5)
