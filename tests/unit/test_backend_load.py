"""How busy an engine says it is, read from its own metrics."""

from __future__ import annotations

import pytest

from backends import load
from backends.load import Load

PAGES = {
    "vllm": """\
# HELP vllm:num_requests_waiting Number of requests waiting to be processed.
# TYPE vllm:num_requests_waiting gauge
vllm:num_requests_waiting{engine="0",model_name="base"} 3.0
vllm:num_requests_waiting{engine="1",model_name="base"} 2.0
vllm:num_requests_waiting_by_reason{engine="0",model_name="base",reason="capacity"} 3.0
vllm:kv_cache_usage_perc{engine="0",model_name="base"} 0.25
vllm:kv_cache_usage_perc{engine="1",model_name="base"} 0.75
""",
    "sglang": """\
sglang:num_queue_reqs{model_name="base",tp_rank="0"} 5.0
sglang:token_usage{model_name="base",tp_rank="0"} 0.75
sglang:token_usage{model_name="other",tp_rank="0"} NaN
""",
    "lmdeploy": """\
lmdeploy:num_requests_waiting{engine="0",model_name="base"} 5
lmdeploy:gpu_cache_usage_perc{engine="0",model_name="base"} 0.75
""",
}


@pytest.mark.parametrize("engine", PAGES)
def test_queues_are_added_up_and_the_fullest_cache_counts(engine: str) -> None:
    assert load.read(engine, PAGES[engine]) == Load(5, 0.75)


@pytest.mark.parametrize(
    "page", ["", "nonsense", "vllm:num_requests_waiting", "vllm:num_requests_waiting x y", "<html>"]
)
def test_a_page_without_figures_is_no_load(page: str) -> None:
    assert load.read("vllm", page) == Load(0, 0.0)
