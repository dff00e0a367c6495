"""Every preset runs as it stands, on emulated engines instead of the addresses it names and for a moment only."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import yaml

from bench.config import RunConfig, load_config
from bench.measure.record import Record
from bench.report.live import Silent
from bench.results import Result, analyse
from bench.run import run
from tests.support.emulator import Emulator, emulator, lora_arguments
from tests.support.peft_files import write_adapter

PRESETS = Path(__file__).parents[3] / "examples" / "bench"
ADAPTERS = ("support", "legal", "sales", "code")
SHORT: dict[str, Any] = {
    "duration": 0.5, "block": 0.25, "repeats": 1, "warmup": 0, "workload": "random:24/6", "drain": 5.0, "workers": 1,
}  # fmt: skip


@pytest.fixture(scope="module")
def vllm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Emulator]:
    folder = tmp_path_factory.mktemp("adapters")
    environment = {"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1"}
    with emulator("vllm", *lora_arguments("vllm"), model="demo", env=environment) as engine, engine.client() as http:
        for name in (*ADAPTERS, "fresh"):
            write_adapter(folder / name)
        for name in ADAPTERS:
            answer = http.post("/v1/load_lora_adapter", json={"lora_name": name, "lora_path": str(folder / name)})
            assert answer.status_code == 200, answer.text
        yield engine


@pytest.fixture(scope="module")
def sglang() -> Iterator[Emulator]:
    with emulator("sglang", model="demo") as engine:
        yield engine


def short(name: str, **over: Any) -> RunConfig:
    config = load_config(PRESETS / f"{name}.yaml", SHORT | over)
    if config.rate is not None:
        return msgspec.structs.replace(config, rate=40.0)
    return msgspec.structs.replace(config, concurrency=4)


def done(config: RunConfig) -> tuple[Record, Result]:
    record = run(config, Silent())
    result = analyse(record)
    for name, target in result.summary.targets.items():
        assert target.full.requests > 3 and target.full.failures == {}, (name, target.full.failures)
    return record, result


def redirected(name: str, urls: dict[str, str], models: dict[str, str]) -> tuple[str, ...]:
    """A preset's targets with the emulators' addresses and models."""
    named = [text.partition("=")[0] for text in yaml.safe_load((PRESETS / f"{name}.yaml").read_text())["target"]]
    return tuple(f"{target}={urls[target]},model={models.get(target, 'demo')}" for target in named)


def test_quick(vllm: Emulator) -> None:
    record, result = done(short("quick", url=vllm.url))
    assert result.summary.targets["server"].steady.slo.keys() == {"ttft p99 <= 500 ms", "tpot p99 <= 50 ms"}
    server = [sample.values for sample in record.samples if sample.source == "server:server"]
    assert server and "running" in server[0] and "kv_usage" in server[0]


@pytest.mark.parametrize(
    ("preset", "first", "second", "models"),
    [
        ("direct-vs-gateway", ("direct", "vllm"), ("gateway", "vllm"), {}),
        ("engine-vs-engine", ("vllm", "vllm"), ("sglang", "sglang"), {}),
        ("bf16-vs-awq", ("bf16", "vllm"), ("awq", "sglang"), {}),
        ("base-vs-adapter", ("base", "vllm"), ("adapter", "vllm"), {"adapter": "support"}),
    ],
)
def test_two_targets_take_turns(
    vllm: Emulator,
    sglang: Emulator,
    preset: str,
    first: tuple[str, str],
    second: tuple[str, str],
    models: dict[str, str],
) -> None:
    engines = {"vllm": vllm.url, "sglang": sglang.url}
    urls = {name: engines[engine] for name, engine in (first, second)}
    config = short(preset, target=redirected(preset, urls, models))
    record, result = done(config)
    turns = [segment.target for segment in record.header.segments if segment.label == "load"]
    assert sorted(turns) == sorted([first[0], second[0]] * 2)
    assert {(d.base, d.other) for d in result.paired} == {(first[0], second[0])}
    if config.rate is not None:
        assert all(difference.pairs > 3 for difference in result.paired)


def test_adapters_with_churn(vllm: Emulator, tmp_path: Path) -> None:
    steps = yaml.safe_load((PRESETS / "churn.yaml").read_text())
    steps[0]["json"]["lora_path"] = str(write_adapter(tmp_path / "fresh"))
    for at_s, step in zip((0.1, 0.3), steps, strict=True):
        step["at"] = at_s
    steps.append({"at": 0.4, "name": "miss", "path": "/v1/none"})
    script = tmp_path / "churn.yaml"
    script.write_text(yaml.safe_dump(steps))
    _, result = done(short("adapters", url=vllm.url, churn=script, probe=10.0, duration=1.5))
    changes = [(change.name, change.ok, change.failed) for change in result.summary.changes]
    assert changes == [("load fresh", True, 0), ("unload fresh", True, 0), ("miss", False, 0)]
    target = result.summary.targets["server"]
    assert set(target.models) <= set(ADAPTERS) and len(target.models) > 1
    assert target.probe is not None
    timed = [figures for figures in target.models.values() if "user_tokens_per_s" in figures.metrics]
    assert (target.fairness is not None) == (len(timed) > 1)  # tokens that come in one read have no speed
