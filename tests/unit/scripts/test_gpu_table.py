"""In which order the GPU suite's table runs on a machine of four GPUs, by its own estimates and without a process."""

from __future__ import annotations

from pathlib import Path

import pytest

from scripts.gpu_suite import table
from scripts.gpu_suite.schedule import Running, choose, soon
from scripts.gpu_suite.stages import Options, StageSpec

GPUS = 4


def begun() -> dict[str, float]:
    """When each stage begins where everything that it needs lies on the machine from the start."""
    waiting = list(table.stages(Options(Path("/nowhere"), gpus=GPUS)).stages.values())
    running: list[Running] = []
    passed: dict[str, bool] = {}
    found: dict[str, float] = {}
    now = 0.0
    while waiting or running:
        ends_at = {row.stage.name: row.ends_at for row in running}
        wanted: list[tuple[StageSpec, float]] = []
        for stage in waiting:
            if all(name in passed for name in stage.after):
                wanted.append((stage, now))
                ends_at[stage.name] = now + stage.estimate_s
            elif (ready_at := soon(stage, passed, "", ends_at)) is not None:
                wanted.append((stage, max(now + 1, ready_at)))
        for stage, gpus in choose(wanted, running, GPUS, now):
            waiting.remove(stage)
            running.append(Running(stage, gpus, now + stage.estimate_s))
            found[stage.name] = now
        now = min(row.ends_at for row in running)
        passed |= {row.stage.name: True for row in running if row.ends_at <= now}
        running = [row for row in running if row.ends_at > now]
    return found


@pytest.fixture(scope="module")
def begins() -> dict[str, float]:
    return begun()


def test_what_is_served_comes_before_training_and_peers(begins: dict[str, float]) -> None:
    wanted = ("bench-vllm", "bench-sglang", "bench-lmdeploy", "switch", "parallel-vllm", "main-lmdeploy")
    later = [name for name in begins if name.startswith("train-")] + ["quant-8b-peers"]
    assert max(begins[name] for name in wanted) < min(begins[name] for name in later)


def test_the_long_benches_begin_as_soon_as_there_are_weights(begins: dict[str, float]) -> None:
    assert begins["bench-vllm"] <= 90
    assert begins["bench-sglang"] <= 150
