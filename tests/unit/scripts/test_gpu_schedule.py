"""Which stage starts when and where: scripts/gpu_suite/schedule.py, without a process."""

from __future__ import annotations

from typing import Any

from scripts.gpu_suite.schedule import Running, Standing, choose, soon, standing
from scripts.gpu_suite.stages import StageSpec

FOREVER = float("inf")


def stage(name: str, share: float = 1.0, estimate_s: float = 100, **given: Any) -> StageSpec:
    return StageSpec(name, lambda *_: None, estimate_s, 1000, share=share, **given)


def placed(ready: list[StageSpec], gpus: int, running: list[Running] | None = None) -> dict[str, tuple[int, ...]]:
    return {spec.name: where for spec, where in choose([(spec, 0.0) for spec in ready], running or [], gpus, now=0.0)}


def test_each_that_measures_has_a_gpu_to_itself() -> None:
    assert placed([stage("a"), stage("b"), stage("c")], gpus=2) == {"a": (0,), "b": (1,)}


def test_checks_share_one_gpu_and_leave_the_others_whole() -> None:
    checks = [stage(f"check{n}", share=0.3) for n in range(4)]
    assert placed([*checks, stage("bench")], gpus=3) == {
        "check0": (0,), "check1": (0,), "check2": (0,), "check3": (1,), "bench": (2,),
    }  # fmt: skip


def test_shares_that_add_up_to_a_whole_fit() -> None:
    assert len(placed([stage(f"check{n}", share=0.1) for n in range(11)], gpus=1)) == 10


def test_a_pair_of_gpus() -> None:
    assert placed([stage("bench"), stage("pair", gpus=2)], gpus=4) == {"bench": (0,), "pair": (1, 2)}


def test_later_ones_do_not_starve_a_pair() -> None:
    running = [Running(stage("x"), (0,), ends_at=50.0), Running(stage("y"), (1,), ends_at=80.0)]
    running += [Running(stage("z"), (2,), ends_at=500.0)]
    # Kept for the pair: the free one, and that of x, from 50 s on. A short one may use the free one until then.
    ready = [stage("pair", gpus=2), stage("long", estimate_s=90), stage("short", estimate_s=40)]
    assert placed(ready, gpus=4, running=running) == {"short": (3,)}


def test_checks_do_not_starve_one_that_measures() -> None:
    running = [Running(stage("check", share=0.2), (0,), ends_at=30.0)]
    ready = [stage("bench"), stage("slow", share=0.2), stage("quick", share=0.2, estimate_s=20)]
    assert placed(ready, gpus=1, running=running) == {"quick": (0,)}


def test_only_the_first_that_finds_no_gpu_has_them_kept() -> None:
    running = [Running(stage("x"), (0,), ends_at=50.0), Running(stage("y", share=0.5), (1,), ends_at=60.0)]
    ready = [stage("bench1"), stage("bench2"), stage("check", share=0.5)]
    assert placed(ready, gpus=2, running=running) == {"check": (1,)}


def test_whole_gpus_are_kept_for_those_that_only_wait_for_running_ones() -> None:
    running = [Running(stage("weights", share=0.3), (0,), ends_at=70.0)]
    wanted = [(stage("bench1"), 70.0), (stage("bench2"), 70.0), (stage("main", share=0.2), 60.0)]
    wanted += [(stage("record", share=0.2), 0.0), (stage("quick", estimate_s=60), 0.0), (stage("train"), 0.0)]
    assert {spec.name: where for spec, where in choose(wanted, running, 3, now=0.0)} == {"record": (0,), "quick": (1,)}
    assert {spec.name for spec, _ in choose(wanted, running, 4, now=0.0)} == {"record", "quick", "train"}


def test_when_one_that_waits_for_others_can_begin() -> None:
    spec = stage("main", after=("oracle", "weights"))
    assert soon(spec, {"oracle": True}, "", {"weights": 70.0}) == 70.0
    assert soon(spec, {}, "", {"weights": 70.0}) is None, "the oracle has not begun"
    assert soon(spec, {"oracle": True}, "waits for vllm", {"weights": 70.0}) is None
    assert soon(spec, {"oracle": True}, "waits for vllm", {"weights": 70.0}, brought_at=240.0) == 240.0
    assert soon(stage("record"), {}, "waits for vllm", {}, brought_at=240.0) == 240.0
    assert soon(spec, {}, "waits for vllm", {"weights": 70.0}, brought_at=240.0) is None, "the oracle has not begun"


def judged(spec: StageSpec, passed: dict[str, bool] | None = None, lacks: str = "", gpus: int = 1,
           left_s: float = FOREVER) -> Standing:  # fmt: skip
    return standing(spec, passed or {}, lacks, gpus, left_s)


def test_too_few_gpus() -> None:
    assert judged(stage("pair", gpus=2)) == Standing("never", "needs 2 GPUs, the machine has 1")


def test_after_others() -> None:
    spec = stage("main", after=("oracle", "weights"))
    assert judged(spec, {"oracle": True}) == Standing("waits", "after weights")
    assert judged(spec, {"oracle": True, "weights": True}) == Standing("ready")
    assert judged(spec, {"oracle": False}) == Standing("never", "needs oracle, which did not pass")


def test_what_is_not_there_yet_is_waited_for_until_it_is_too_late() -> None:
    assert judged(stage("main"), lacks="waits for vllm", left_s=101).kind == "waits"
    found = judged(stage("main"), lacks="waits for vllm", left_s=99)
    assert found.kind == "never"
    assert found.why == "its 100 s would end past --until, 99 s from now; it waited: waits for vllm"


def test_until() -> None:
    assert judged(stage("bench"), left_s=100).kind == "ready"
    assert judged(stage("bench"), left_s=99.5).kind == "never"
