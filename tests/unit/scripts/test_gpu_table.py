"""In which order the GPU suite's table runs, by its own estimates and without a process."""

from __future__ import annotations

from pathlib import Path

import pytest

from scripts.gpu_suite import table
from scripts.gpu_suite.schedule import Running, choose, soon
from scripts.gpu_suite.stages import Options, StageSpec


def begun(options: Options) -> dict[str, float]:
    """When each stage begins where everything that it needs lies on the machine from the start."""
    waiting = [spec for spec in table.stages(options).stages.values() if spec.gpus <= options.gpus]
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
        for stage, gpus in choose(wanted, running, options.gpus, now):
            waiting.remove(stage)
            running.append(Running(stage, gpus, now + stage.estimate_s))
            found[stage.name] = now
        now = min(row.ends_at for row in running)
        passed |= {row.stage.name: True for row in running if row.ends_at <= now}
        running = [row for row in running if row.ends_at > now]
    return found


@pytest.fixture(scope="module")
def begins() -> dict[str, float]:
    return begun(Options(Path("/nowhere"), gpus=4))


def test_what_is_served_comes_before_training_and_peers(begins: dict[str, float]) -> None:
    wanted = ("bench-vllm", "bench-sglang", "bench-lmdeploy", "switch", "parallel-vllm", "main-lmdeploy")
    later = [name for name in begins if name.startswith("train-")] + ["quant-8b-peers"]
    assert max(begins[name] for name in wanted) < min(begins[name] for name in later)


def test_the_long_benches_begin_as_soon_as_there_are_weights(begins: dict[str, float]) -> None:
    assert begins["bench-vllm"] <= 90
    assert begins["bench-sglang"] <= 150


@pytest.mark.parametrize("gib", [80, 140])
def test_on_one_gpu_engines_of_the_bench_start_beside_others(gib: int) -> None:
    options = Options(Path("/nowhere"), gpus=1, gpu_bytes=gib << 30)
    specs = table.stages(options).stages
    found = begun(options)
    assert set(found) == {name for name, spec in specs.items() if spec.gpus == 1}
    benches = [name for name in found if name.startswith("bench-")]
    packed = [name for name in benches if name.endswith(("awq", "gptq"))]
    assert sum(specs[name].share for name in packed[:4]) < 1
    assert len({found[name] for name in packed}) < len(packed)  # some begin together


@pytest.mark.parametrize("gpus", [1, 2, 4])
def test_the_bench_takes_its_turns_itself_on_any_machine(gpus: int) -> None:
    specs = table.stages(Options(Path("/nowhere"), gpus=gpus)).stages
    assert {name for name, spec in specs.items() if spec.in_turn} == {
        name for name in specs if name.startswith("bench-") and not name.endswith("tp2")
    }
