"""From records made by hand to figures, windows, verdicts and comparisons."""

from __future__ import annotations

import math
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from bench_records import MS, S, answer, record_of, steady

from bench import search
from bench.config import RunConfig, load_config, resolved, workload_hash
from bench.measure.compare import compare_targets, parse_gate, refuse_unlike
from bench.measure.define import read
from bench.measure.paired import PairedDifference, paired_differences
from bench.measure.record import Events, Mark, Record, Sample, Segment, read_record, write_record
from bench.measure.server import parse_metrics
from bench.measure.slo import parse_slo
from bench.measure.summary import Summary, readings_by_segment
from bench.measure.summary import summarize as summarize_readings
from bench.measure.verdict import Level, Verdict
from bench.measure.verdict import judge_run as judge_readings
from bench.report.html import render
from bench.report.live import Silent
from bench.report.table import paired_rows
from bench.search import Probe, falls_behind, next_rate


def summarize(record: Record) -> Summary:
    return summarize_readings(record, readings_by_segment(record))


def judge_run(record: Record, summary: Summary) -> Verdict:
    return judge_readings(record, readings_by_segment(record), summary)


def paired_of(record: Record) -> list[PairedDifference]:
    return paired_differences(record, readings_by_segment(record))


def test_a_quiet_run_is_valid_and_its_figures_are_the_truth() -> None:
    record = record_of(steady(), {"arrivals": "constant"})
    summary = summarize(record)
    figures = summary.targets["a"].steady
    assert figures.metrics["tpot_ms"]["p50"].value == pytest.approx(10)
    assert figures.metrics["ttft_ms"]["p50"].value == pytest.approx(53)
    assert figures.metrics["itl_ms"]["p99"].value == pytest.approx(10)
    assert figures.output_tokens_per_s.value == pytest.approx(200, rel=0.01)
    assert figures.requests_per_s.value == pytest.approx(10, rel=0.01)
    verdict = judge_run(record, summary)
    assert (verdict.level, verdict.findings) == (Level.VALID, [])


def test_latency_counts_from_the_intended_send() -> None:
    late = answer(0, 1000, sent_ns=1030 * MS)
    assert (read(late).ttft_ms, read(late).ttft_from_send_ms, read(late).send_lag_ms) == (50, 20, 30)
    closed = answer(0, 1000, intended_ns=None)
    assert (read(closed).ttft_ms, read(closed).send_lag_ms) == (50, 0)


def test_failures_are_infinitely_slow_in_adjusted_tails_and_divide_goodput() -> None:
    requests = steady()
    for request in requests[::10]:
        request.finish = None
    figures = summarize(record_of(requests, {"slo": "ttft_p99=1000"})).targets["a"].steady
    assert figures.adjusted["ttft_ms"]["p99"] == math.inf
    assert figures.metrics["ttft_ms"]["p99"].value < 60
    assert figures.failures == {"truncated": pytest.approx(60, abs=2)}
    assert figures.attainment == pytest.approx(0.9, abs=0.01)
    assert not figures.slo["ttft p99 <= 1000 ms"][1]


@pytest.mark.parametrize(
    ("change", "level", "said"),
    [
        ({"sent_lag": 50}, Level.DOUBTFUL, "send lag"),
        ({"sent_lag": 500}, Level.INVALID, "send lag"),
        ({"read_delay_ns": 50 * MS}, Level.DOUBTFUL, "read late"),
        ({"cached_tokens": 80}, Level.INVALID, "meant to be cold"),
        ({"prompt_tokens": 90}, Level.DOUBTFUL, "off the length asked"),
        ({"status": 503, "events": Events()}, Level.INVALID, "600 http 503"),
        ({"output_exact": True, "output_tokens_asked": 30}, Level.INVALID, "600 short"),
        ({"output_tokens_asked": 30}, Level.DOUBTFUL, "67% of the tokens asked"),
    ],
)
def test_each_doubt_is_found(change: dict[str, Any], level: Level, said: str) -> None:
    lag = change.pop("sent_lag", 0)
    requests = steady(**change)
    for request in requests:
        request.sent_ns += lag * MS
    record = record_of(requests, {"arrivals": "constant"})
    verdict = judge_run(record, summarize(record))
    assert verdict.level is level
    assert any(said in finding.what for finding in verdict.findings)


def test_too_few_sends_a_busy_client_and_a_short_run_are_found() -> None:
    record = record_of(steady(300), {"arrivals": "constant"})
    record.samples = [Sample("worker:0", n * S, {"cpu_s": float(n), "capped_ms": 0.0}) for n in range(20)]
    verdict = judge_run(record, summarize(record))
    said = " ".join(finding.what for finding in verdict.findings)
    assert "300 requests sent, 600 asked for" in said
    assert "used 100% of a core" in said
    assert verdict.exit_code == 3
    short = record_of(steady(20), {}, [Segment(0, "load", "a", 0, 0, 2 * S, 10.0)])
    assert any("of steady load" in f.what for f in judge_run(short, summarize(short)).findings)


def test_a_growing_queue_is_found() -> None:
    requests = [answer(n, n * 100.0, ttft_ms=50 + n * 30.0) for n in range(600)]
    record = record_of(requests, {"arrivals": "constant"})
    findings = judge_run(record, summarize(record)).findings
    assert any("more than the server can do" in finding.what for finding in findings)


def test_token_times_are_refused_where_chunks_hold_several() -> None:
    requests = steady(60)
    for request in requests:
        request.events.tokens = [-1] * len(request.events.tokens)
        request.output_tokens = 80
    figures = summarize(record_of(requests)).targets["a"].steady
    assert "itl_ms" not in figures.metrics and figures.itl_refused is not None
    assert figures.metrics["tpot_ms"]["p50"].value == pytest.approx(2.5)
    assert figures.metrics["chunk_gap_ms"]["p50"].value == pytest.approx(10)


def test_records_survive_a_round_trip_and_give_the_same_figures(tmp_path: Path) -> None:
    record = record_of(steady(100))
    write_record(tmp_path / "r.jsonl.gz", record)
    again = read_record(tmp_path / "r.jsonl.gz")
    assert summarize(again) == summarize(record)
    (tmp_path / "no.jsonl").write_bytes(b'{"a":1}\n')
    with pytest.raises(ValueError, match="line 1 is not part of a bench record"):
        read_record(tmp_path / "no.jsonl")


def test_interleaved_targets_are_paired_request_by_request() -> None:
    rng = np.random.default_rng(0)
    segments, requests = [], []
    for block in range(30):
        for place, name in enumerate(("direct", "gateway")):
            number = block * 2 + place
            start_ms = number * 1000.0
            segments.append(Segment(number, "load", name, 0, int(start_ms * MS), S, 10.0, None, block))
            slow = rng.normal(0, 20)  # whole blocks differ by far more than what is looked for
            for n in range(10):
                ttft = 100 + 10 * n + (slow if place == 0 else 0) * 0 + (2.0 if place else 0.0) + rng.normal(0, 0.5)
                requests.append(answer(n, start_ms + n * 100, ttft, segment=number, target=name))
    found = {d.metric: d for d in paired_of(record_of(requests, {}, segments))}
    added = found["ttft_ms"].difference["mean"]
    assert added.value == pytest.approx(2.0, abs=0.2)
    assert added.low < 2.0 < added.high and added.high - added.low < 0.5
    assert found["ttft_ms"].significant and not found["tpot_ms"].significant
    assert found["ttft_ms"].pairs == 300


def test_added_time_has_no_share_of_a_base_that_takes_none() -> None:
    segments = [Segment(n, "load", name, 0, n * 10 * S, 10 * S, 10.0, pair=0) for n, name in enumerate(("a", "b"))]
    requests = [
        answer(n, segment.start_ns / MS + n * 100, gap_ms=gap_ms, segment=segment.number, target=segment.target)
        for segment, gap_ms in zip(segments, (0.0, 5.0), strict=True)  # a: all tokens in one read
        for n in range(10)
    ]
    found = {d.metric: d for d in paired_of(record_of(requests, {}, segments))}
    assert (found["tpot_ms"].difference["mean"].value, found["tpot_ms"].relative_percent) == (5.0, None)
    assert "-" in paired_rows([found["tpot_ms"]])[0]


def test_compare_names_slower_and_refuses_other_work() -> None:
    def run(gap_ms: float) -> Record:
        segments = [Segment(n, "load", "a", n, n * 70 * S, 60 * S, 10.0) for n in range(3)]
        rng = np.random.default_rng(int(gap_ms * 100))
        requests = [
            answer(n, s.start_ns / MS + n * 100, 50, gap_ms * (1 + rng.normal(0, 0.001)), segment=s.number)
            for s in segments
            for n in range(600)
        ]
        return record_of(requests, {}, segments)

    before, after = run(10.0), run(10.3)
    changes = {c.name: c for c in compare_targets(*(summarize(r).targets["a"] for r in (before, after)))}
    assert changes["tpot_p50"].verdict == "slower"
    assert changes["tpot_p50"].change_percent == pytest.approx(3, abs=0.2)
    assert changes["ttft_p50"].verdict == "noise"
    assert parse_gate("tpot_p50:+2%").broken_by(changes["tpot_p50"])
    assert not parse_gate("tpot_p50:+5%").broken_by(changes["tpot_p50"])
    after.header.workload_hash = "other"
    with pytest.raises(ValueError, match="different work"):
        refuse_unlike(before, after)


def test_capacity_search_closes_in_on_the_edge() -> None:
    probes: list[Probe] = []
    while (rate := next_rate(probes, 1.0)) is not None:
        probes.append(Probe(rate, rate <= 37.0, ""))
    kept = max(probe.rate for probe in probes if probe.kept)
    assert 37 / 1.1 <= kept <= 37
    assert len(probes) <= 12


def test_an_edge_that_was_luck_is_lowered_until_it_is_kept_again(monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[float] = []

    def probe(now: Any, rate: float, *rest: Any) -> Probe:
        lucky = rate <= 36 and rate not in tried
        tried.append(rate)
        return Probe(rate, rate <= 30 or lucky, "")

    session = SimpleNamespace(warm_up=lambda observer: None, record=lambda: record_of([]))
    monkeypatch.setattr(search, "session", lambda config: nullcontext(session))
    monkeypatch.setattr(search, "_probe", probe)
    found, _ = search.capacity(RunConfig(rate=1.0, slo="ttft_p99=100"), 1.0, Silent())
    assert found.confirmed and found.rate is not None and 30 / 1.1**2 <= found.rate <= 30
    assert max(tried) > 36 and [probe.kept for probe in found.probes[-3:]] == [False, True, True]
    monkeypatch.setattr(search, "_probe", lambda now, rate, *rest: Probe(rate, False, ""))
    nothing, _ = search.capacity(RunConfig(rate=1.0, slo="ttft_p99=100"), 1.0, Silent())
    assert (nothing.rate, nothing.confirmed) == (None, False) and nothing.probes[-1].rate * 60 >= 1


def test_a_server_that_falls_behind_is_told_from_one_that_fills_up() -> None:
    rng = np.random.default_rng(0)
    assert falls_behind([2.0 * n for n in range(20)])
    assert not falls_behind([2.0 * n for n in range(10)])  # too early to say
    assert not falls_behind(list(40 + rng.normal(0, 4, 40)))
    assert not falls_behind([0.0] * 10 + [1.0] * 10 + [3.0] * 10)  # a handful is chance


def test_what_became_of_requests_during_a_change_is_told() -> None:
    requests = steady(100)
    requests[50].finish = None
    record = record_of(requests)
    record.marks = [Mark(int(5.02 * S), "load fresh", int(0.1 * S)), Mark(8 * S, "unload fresh")]
    summary = summarize(record)
    assert [(c.name, c.in_flight, c.failed) for c in summary.changes] == [("load fresh", 4, 1), ("unload fresh", 3, 0)]
    said = [finding.what for finding in judge_run(record, summary).findings]
    assert "1 of 4 requests under way during 'load fresh' failed" in said
    assert not any("unload fresh" in what for what in said)


def test_a_loop_that_was_away_matters_where_no_kernel_stamps_arrivals() -> None:
    record = record_of(steady(), {"arrivals": "constant"})
    record.samples = [
        Sample("worker:0", n * S, {"cpu_s": 0.0, "capped_ms": 0.0, "round_ms_max": 300.0}) for n in (1, 2)
    ]
    assert judge_run(record, summarize(record)).level is Level.VALID
    record.header.stamps = "client"
    verdict = judge_run(record, summarize(record))
    assert verdict.level is Level.INVALID and "away from its sockets" in verdict.findings[0].what


def test_objectives() -> None:
    assert [str(limit) for limit in parse_slo("mlperf:llama3.1-8b:interactive")] == [
        "ttft p99 <= 500 ms", "tpot p99 <= 30 ms",
    ]  # fmt: skip
    with pytest.raises(ValueError, match="allowed: mlperf:llama2-70b:server"):
        parse_slo("mlperf:gpt:server")
    with pytest.raises(ValueError, match="METRIC_pQUANTILE=MS"):
        parse_slo("ttft<200")


def test_metrics_pages_of_engines_reduce_to_the_same_names() -> None:
    vllm = 'vllm:num_requests_running{engine="0"} 3.0\nvllm:num_requests_running{engine="1"} 2\n'
    vllm += 'vllm:kv_cache_usage_perc{a="b c"} 0.5\n# HELP x\n'
    assert parse_metrics(vllm) == {"running": 5.0, "kv_usage": 0.5}
    assert parse_metrics('sglang:num_running_reqs{x="1"} 4\nsglang:token_usage 0.25\n') == {
        "running": 4.0,
        "kv_usage": 0.25,
    }
    assert parse_metrics("python_info 1\n") == {}


def test_report_is_one_page_that_needs_nothing_else() -> None:
    requests = steady(120)
    requests[3].finish = None
    requests[7].model = "<script>alert(1)</script>"
    record = record_of(requests)
    record.samples = [Sample("server:a", n * S, {"running": 3.0, "waiting": 0.0, "kv_usage": 0.2}) for n in range(10)]
    summary = summarize(record)
    page = render(record, readings_by_segment(record), summary, judge_run(record, summary), [])
    assert "http://" not in page.replace("http://127.0.0.1", "") and "https://" not in page and "<script" not in page
    for expected in ("TTFT", "KV cache in use", "truncated", "by adapter", "requests in flight", "vLLM"):
        assert expected in page


def test_gateway_cpu_is_divided_by_the_events_it_relayed() -> None:
    record = record_of(steady(100))
    record.samples = [Sample("server:a", n * S, {"gateway_cpu_s": 5 + 0.021 * n}) for n in range(11)]
    assert summarize(record).targets["a"].gateway_cpu_us_per_event == pytest.approx(0.21 / (100 * 21) * 1e6)
    text = 'tunegate_relay_cpu_seconds_total{relay="0"} 1.5\ntunegate_relay_cpu_seconds_total{relay="1"} 2\n'
    assert parse_metrics(text) == {"gateway_cpu_s": 3.5}


def test_charts_are_well_formed_and_carry_their_data() -> None:
    record = record_of(steady(120))
    summary = summarize(record)
    page = render(record, readings_by_segment(record), summary, judge_run(record, summary), [])
    drawings = [
        ElementTree.fromstring(part.split("</svg>")[0] + "</svg>")
        for part in page.split("<svg")[1:]
        for part in ["<svg" + part]
    ]
    titles = [drawing.get("aria-label") or "" for drawing in drawings]
    assert any(title.startswith("TTFT: share") for title in titles)
    dots = next(d for d in drawings if (d.get("aria-label") or "").startswith("TTFT by time"))
    assert len(dots.findall("circle")) == 120
    for drawing in drawings:
        for path in drawing.findall("path"):
            assert "nan" not in (path.get("d") or "")


def test_configuration_errors_say_what_to_do(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("rate: 8\nworkload: random:8/8\n")
    assert load_config(file, {"rate": 9.0}).rate == 9.0
    assert load_config(file, {"concurrency": 4}).rate is None
    file.write_text("durration: 8\n")
    with pytest.raises(ValueError, match="did you mean 'duration'"):
        load_config(file, {})
    with pytest.raises(ValueError, match="--rate REQUESTS_PER_SECOND or --concurrency USERS"):
        load_config(None, {})
    with pytest.raises(ValueError, match="exclude each other"):
        load_config(None, {"rate": 1.0, "concurrency": 1})
    with pytest.raises(ValueError, match="cache is cold, warm or a share"):
        load_config(None, {"rate": 1.0, "cache": "hot"})


def test_the_hash_knows_work_from_place() -> None:
    base = RunConfig(rate=1.0)
    assert workload_hash(base) == workload_hash(RunConfig(rate=1.0, url="http://elsewhere", repeats=5, quiet=True))
    assert workload_hash(base) != workload_hash(RunConfig(rate=1.0, seed=1))
    assert "secret" not in str(resolved(RunConfig(rate=1.0, api_key="secret", target=("a=http://x,key=secret",))))
