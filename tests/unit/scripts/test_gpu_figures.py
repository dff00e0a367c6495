"""What the GPU suite makes of what it saw: ratios, windows of a load, the cost of a switch of engines."""

from __future__ import annotations

import json

import pytest

from bench.measure.record import CONTENT, DONE, FINISH, Events, Header, Record, RequestRecord
from scripts.gpu_suite import bench_job, parallel_job, swap_job, switch_job
from scripts.gpu_suite.reference import agrees
from scripts.gpu_suite.serving import Engine
from tests.proofs.switching import Asked, Step, cost

_MS = 1_000_000


def test_the_table_begins_with_what_is_wanted_most() -> None:
    names = [str(point) for point in bench_job.points("vllm", "")]
    assert names == ["c64", "c1", "c256", "c16", "ttft", "c64-1lora", "c64-8lora", "c64-64lora"]
    assert [str(point) for point in bench_job.points("lmdeploy", "")] == names[:5]
    assert [str(point) for point in bench_job.points("lmdeploy", "lora")] == ["c64", "c64-1lora", "c64-8lora"]
    assert [str(point) for point in bench_job.points("sglang", "awq")] == ["c1", "c64"]
    assert [str(point) for point in bench_job.points("sglang", "plain")] == ["c1"]


def test_a_ratio_has_the_uncertainty_of_both() -> None:
    found = bench_job.ratio({"value": 99.0, "stderr": 0.99}, {"value": 100.0, "stderr": 1.0})
    assert found["value"] == pytest.approx(0.99)
    assert found["high"] - found["value"] == pytest.approx(1.96 * 0.99 * 0.01 * 2**0.5)


def test_users_who_wait_give_throughput_from_durations() -> None:
    mean = {"value": 10.0, "low": -5.0, "high": 25.0}
    found = bench_job.ratio_by_pairs({"difference": {"mean": mean}, "relative_percent": 1.0})  # base: 1000 ms
    assert found["value"] == pytest.approx(1000 / 1010)
    assert (found["low"], found["high"]) == (pytest.approx(1000 / 1025), pytest.approx(1000 / 995))
    equal = {"difference": {"mean": {"value": 0.0, "low": 0.0, "high": 0.0}}, "relative_percent": 0.0}
    assert bench_job.ratio_by_pairs(equal)["value"] == 1


def test_the_hit_rate_is_of_the_point_alone() -> None:
    before, after = {"requests": 100.0, "misses": 50.0}, {"requests": 300.0, "misses": 60.0}
    assert bench_job.hit_rate(before, after) == pytest.approx(0.95)
    assert bench_job.hit_rate(before, before) is None


def test_requests_belong_to_the_window_that_they_were_sent_in() -> None:
    def request(sent_ms: int, ttft_ms: int, **extra: object) -> RequestRecord:
        first, last = (sent_ms + ttft_ms) * _MS, (sent_ms + ttft_ms + 7) * _MS
        events = Events([first, last, last], [CONTENT, CONTENT | FINISH, DONE], [1, 1, 0], [-1, -1, -1])
        fields = {"status": 200, "finish": "length", "output_tokens": 2, "events": events, "headers_ns": first}
        return RequestRecord(sent_ms, 0, "gateway", "base", None, sent_ms * _MS, last, **(fields | extra))  # type: ignore[arg-type]

    origin_ns = 1_000_000 * _MS
    header = Header(1, "", origin_ns, {}, "", {}, {}, [], "kernel")
    requests = [request(100, 20), request(900, 22), request(1100, 30), request(2100, 20)]
    requests.append(request(1200, 5, transport="reset", finish=None, events=Events()))
    windows = [(name, origin_ns + start * _MS, origin_ns + (start + 1000) * _MS)
               for name, start in (("before", 0), ("during", 1000), ("after", 2000))]  # fmt: skip
    found = swap_job.costs(Record(header, requests), windows)
    assert [found[name]["sent"] for name in ("before", "during", "after")] == [2, 2, 1]
    assert found["during"]["failed"] == 1 and len(found["failures"]) == 1
    assert found["ttft_p99_rise"] == pytest.approx(30 / 22 - 1)
    assert found["during"]["stall_ms_p99"] == pytest.approx(7)


def test_every_engine_is_switched_to_both_ways() -> None:
    steps = [(step.mode, step.backend) for step in switch_job.plan(["vllm", "sglang", "lmdeploy"])]
    assert steps[:4] == [("beside", "sglang"), ("replace", "lmdeploy"), ("replace", "vllm"), ("replace", "sglang")]
    assert steps[4:] == [("beside", "lmdeploy"), ("beside", "vllm")]


def test_flags_become_the_fields_of_a_switch() -> None:
    flags = ["--memory-fraction", "0.25", "--engine-arg=--kv-cache-memory-bytes=7", "--engine-arg", "--eager-mode",
             "--max-model-len", "4096", "--engine-version=emulator"]  # fmt: skip
    assert switch_job.fields_of(flags) == {
        "memory_fraction": 0.25,
        "engine_arg": ["--kv-cache-memory-bytes=7", "--eager-mode"],
        "engine_version": "emulator",
    }


def test_an_answer_is_right_as_far_as_the_reference_is_sure() -> None:
    answer = {"text": "one two three", "sure": "one two", "sure_tokens": 2, "all_sure": False}
    assert agrees("one two four", answer)
    assert not agrees("one three", answer)
    sure = answer | {"text": "arr", "sure": "arr", "all_sure": True}
    assert agrees("arr", sure)
    assert not agrees("arr matey", sure)


def test_the_cost_of_a_replacement() -> None:
    step = Step("replace", "sglang", {"draining": 10.0, "done": 15.0})
    asked = [
        Asked(8.0, 8.5, 503, "", "m", "p", "earlier"),  # of a switch before this one
        Asked(9.0, 9.5, 200, "good", "m", "p"),
        Asked(9.9, 10.6, 200, "good", "m", "p"),
        Asked(10.7, 10.8, 503, "", "m", "p", "come again"),
        Asked(14.8, 14.9, 503, "", "m", "p", "come again"),
        Asked(15.0, 15.6, 200, "good", "m", "p"),
        Asked(15.1, 15.7, 200, "odd", "m", "p"),
        Asked(15.2, 15.3, 200, "", "m", "p", "the stream has no end"),
        Asked(15.2, 15.3, 0, "", "m", "p", "ConnectError('refused')"),
    ]
    found = cost(step, asked, lambda one: one.text == "good")
    assert found["seconds"] == pytest.approx(5) and found["done"]
    assert found["told_to_come_again"] == 2
    assert found["down_s"] == pytest.approx(15.6 - 10.7)
    assert found["silence_s"] == pytest.approx(15.6 - 10.6)
    assert found["failed"] == {"cut": 1, "connection: ConnectError": 1}
    assert (found["cut"], found["of_neither"]) == (1, 1)
    json.dumps(found)


def test_a_switch_beside_allows_no_refusal() -> None:
    step = Step("beside", "sglang", {"starting": 10.0, "done": 15.0})
    asked = [Asked(9.0, 9.5, 200, "good", "m", "p"), Asked(11.0, 11.1, 503, "", "m", "p", "come again")]
    assert cost(step, asked, lambda one: True)["failed"] == {"status 503": 1}


def test_two_gpus_are_started_without_multicast() -> None:
    engine = Engine("vllm", "cuda")
    small, large = (parallel_job.flags(engine, small=small) for small in (True, False))
    assert "--engine-arg=--disable-custom-all-reduce" in small and "--engine-arg=--enforce-eager" in small
    assert large[large.index("--tp") + 1] == "2" and "--engine-arg=--enforce-eager" not in large
    [fused] = [flag for flag in large if flag.startswith("--engine-arg=--compilation-config=")]
    assert json.loads(fused.split("=", 2)[2]) == {"pass_config": {"fuse_allreduce_rms": False}}


def test_memory_is_counted_by_process() -> None:
    listing = "7, GPU-a, 100\n8, GPU-a, 50\n8, GPU-b, 1\n9, GPU-b, 900\n"
    assert parallel_job.of_processes(listing, {7, 8}) == {"GPU-a": 150 << 20, "GPU-b": 1 << 20}
    assert parallel_job.of_processes("", {7}) == {}
