"""The stimulus: arrivals, mixes, prompts and sources, rebuilt from what they produce."""

from __future__ import annotations

import itertools
from pathlib import Path

import msgspec
import numpy as np
import pytest

from bench.load.arrivals import arrivals
from bench.load.job import Job
from bench.load.sources import ClosedSource, Merged, OpenSource
from bench.measure.stats import exponential_fit
from bench.workload.adapters import pick, shares
from bench.workload.bodies import Asking, Dialect, body
from bench.workload.prompts import Content, build_workload
from bench.workload.spec import parse_spec
from bench.workload.words import Tokenization, common_words

TOKENS = Tokenization(common_words(), overhead_tokens=10)


def job(index: int, phase: str = "load") -> Job:
    return Job(index=index, segment=0, target="t", model="m", body=b"", output_tokens=1, phase=phase)


def test_poisson_arrivals_have_the_rate_and_the_law() -> None:
    offsets = arrivals("poisson", 50, 100, seed=3)
    assert len(offsets) == pytest.approx(5000, abs=4 * 5000**0.5)
    assert exponential_fit(np.diff(offsets).astype(float)) > 0.01
    assert (np.diff(offsets) >= 0).all() and offsets[-1] < 100e9
    assert (arrivals("poisson", 50, 100, seed=3) == offsets).all()
    assert (
        len(arrivals("poisson", 50, 100, seed=4)) != len(offsets) or (arrivals("poisson", 50, 100, 4) != offsets).any()
    )


def test_constant_and_bursty_arrivals() -> None:
    assert np.diff(arrivals("constant", 8, 2, 0)).tolist() == [125_000_000] * 15
    gaps = np.diff(arrivals("gamma:0.25", 100, 200, 1)).astype(float)
    assert gaps.std() / gaps.mean() == pytest.approx(2.0, rel=0.1)
    with pytest.raises(ValueError, match="allowed: poisson, constant, gamma:SHAPE"):
        arrivals("normal", 1, 1, 0)


def test_zipf_is_the_true_one() -> None:
    weights = shares("zipf:1.5", 64)
    assert weights[0] / weights[3] == pytest.approx(4**1.5)
    assert weights[:8].sum() == pytest.approx(0.82, abs=0.01)
    assert (weights > 0.001).sum() == 56
    drawn = np.bincount([pick(np.cumsum(weights), 0, index) for index in range(4000)], minlength=64) / 4000
    assert drawn[0] == pytest.approx(weights[0], abs=0.03)


@pytest.mark.parametrize("mix", ["zipf", "weights:1,2", "weights:0,0,0", "geometric:2", "uniform:3"])
def test_wrong_mixes_are_refused(mix: str) -> None:
    with pytest.raises(ValueError, match="adapter mix"):
        shares(mix, 3)


def test_random_prompts_have_the_length_asked_and_repeat_by_seed_only() -> None:
    workload = build_workload(parse_spec("random:100/7"), TOKENS)
    first = workload.prompt(5, Content(0, nonce=1))
    assert len(first.messages[0]["content"].split()) == 90  # the server adds ten
    assert (first.prompt_tokens, first.output_tokens) == (100, 7)
    assert workload.prompt(5, Content(0, nonce=1)).messages == first.messages
    assert workload.prompt(5, Content(0, nonce=2)).messages != first.messages
    assert workload.prompt(6, Content(0, nonce=1)).messages != first.messages


def test_shared_part_of_prompts_is_the_share_asked() -> None:
    workload = build_workload(parse_spec("random:110/7"), TOKENS)
    one, two = (workload.prompt(n, Content(0, 1, 1, shared=0.5)).messages[0]["content"].split() for n in (1, 2))
    assert one[:50] == two[:50] and one[50:] != two[50:]


def test_spread_moves_lengths_and_keeps_their_mean() -> None:
    workload = build_workload(parse_spec("random:1000/100,spread=0.5"), TOKENS)
    outs = [workload.prompt(n, Content(0, 0)).output_tokens for n in range(400)]
    assert min(outs) >= 50 and max(outs) <= 150
    assert np.mean(outs) == pytest.approx(100, abs=5)


def test_prefix_groups_share_their_beginning_only() -> None:
    workload = build_workload(parse_spec("prefix:20/5,groups=2,prefix=40"), TOKENS)
    texts = [workload.prompt(n, Content(0, 1, 1)).messages[0]["content"].split() for n in range(40)]
    assert len({" ".join(text[:40]) for text in texts}) == 2
    assert len({" ".join(text[40:]) for text in texts}) == 40


def test_turns_carry_the_whole_conversation() -> None:
    prompt = build_workload(parse_spec("turns:30/5,turns=3,next=4,think=0.5"), TOKENS).prompt(0, Content(0, 0))
    for turn in range(2):
        assert prompt.next_turn is not None
        think_s, prompt = prompt.next_turn(f"answer {turn}")
        assert think_s == 0.5
    assert [message["role"] for message in prompt.messages] == ["user", "assistant"] * 2 + ["user"]
    assert prompt.messages[1]["content"] == "answer 0"
    assert prompt.next_turn is None


def test_trace_keeps_lengths_and_shared_blocks(tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    lines = [
        {"timestamp": 100, "input_length": 1100, "output_length": 9, "hash_ids": [1, 2]},
        {"timestamp": 0, "input_length": 600, "output_length": 3, "hash_ids": [1], "model": "legal"},
    ]
    path.write_bytes(b"\n".join(msgspec.json.encode(line) for line in lines))
    workload = build_workload(parse_spec(f"trace:{path},speed=2"), Tokenization(common_words()))
    early, late = (workload.prompt(n, Content(0, 0)) for n in (0, 1))
    assert (early.output_tokens, late.output_tokens) == (3, 9)
    assert (early.model, late.model) == ("legal", "")
    words = [prompt.messages[0]["content"].split() for prompt in (early, late)]
    assert [len(part) for part in words] == [600, 1100]
    assert words[0][:512] == words[1][:512] and words[0][512:600] != words[1][512:600]


def test_sharegpt_files_are_read(tmp_path: Path) -> None:
    path = tmp_path / "share.json"
    turns = [{"from": "human", "value": "What is the capital of France?"}, {"from": "gpt", "value": "Paris. " * 10}]
    path.write_bytes(msgspec.json.encode([{"conversations": turns}, {"conversations": []}]))
    prompt = build_workload(parse_spec(f"sharegpt:{path}"), TOKENS).prompt(3, Content(0, nonce=7))
    assert prompt.messages[0]["content"] == "[7-3]\nWhat is the capital of France?"
    assert prompt.output_tokens == 17


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("randon:1/2", "did you mean 'random'"),
        ("random:512", "lengths are IN/OUT"),
        ("random:1/2,groups=3", "unknown option 'groups=3'; allowed: spread"),
        ("sharegpt:/nowhere.json", "no file"),
        ("random:1/2,spread=x", "spread is a number"),
    ],
)
def test_wrong_workloads_say_what_is_allowed(text: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        parse_spec(text)


def test_bodies_carry_only_what_the_server_takes() -> None:
    full = msgspec.json.decode(body(Asking(), "m", [{"role": "user", "content": "x"}], 5))
    assert full["stream_options"] == {"include_usage": True, "continuous_usage_stats": True}
    assert (full["ignore_eos"], full["max_tokens"], full["temperature"]) == (True, 5, 0.0)
    bare = Asking("completions", Dialect(False, False, False, "max_completion_tokens"), None, {"top_p": 1})
    assert msgspec.json.decode(body(bare, "m", [{"role": "user", "content": "x"}], 5)) == {
        "model": "m", "prompt": "x", "max_completion_tokens": 5, "stream": True, "top_p": 1,
    }  # fmt: skip


def test_open_source_never_waits_for_answers() -> None:
    source = OpenSource([0, 1, 2], np.array([0, 10, 20]), 100, job)
    assert [(source.peek(), source.take().intended_ns) for _ in range(3)] == [(100, 100), (110, 110), (120, 120)]
    assert source.peek() is None


def test_closed_source_keeps_its_users_busy_until_the_end() -> None:
    source = ClosedSource(2, 0, 1000, 100, itertools.count(), job)
    first, second = source.take(), source.take()
    assert source.peek() is None
    source.finished(second, "done", 500)
    assert source.peek() == 500
    assert source.take().index == 2
    source.finished(first, "done", 1000)
    assert source.peek() is None


def test_closed_source_stops_at_its_count() -> None:
    source = ClosedSource(1, 0, 1000, 0, iter([0, 1]), job)
    for _ in range(2):
        source.finished(source.take(), "done", 1)
    assert source.peek() is None


def test_probes_run_beside_the_load() -> None:
    load = ClosedSource(1, 0, 1000, 0, itertools.count(), job)
    probes = OpenSource([7], np.array([5]), 0, lambda index: job(index, "probe"))
    source = Merged(load, probes)
    assert source.take().phase == "load"
    assert source.peek() == 5
    probe = source.take()
    assert probe.phase == "probe"
    source.finished(probe, "x", 6)
    assert source.peek() is None
