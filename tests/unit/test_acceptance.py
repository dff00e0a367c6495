"""`gateway serve` refuses a quantized checkpoint that its engine would not load, before it starts one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from backends.base import UnsupportedSpec
from backends.spec import EngineSpec
from gateway.acceptance import check_checkpoint
from quant.config import Grid
from tests.support.quantized import write_checkpoint, write_plain


def spec(model: Path, **changes: Any) -> EngineSpec:
    given = {"backend": "vllm", "version": "1", "served_name": "m", "device": "cuda", "model_path": model} | changes
    return EngineSpec.model_validate(given)


@pytest.fixture
def awq64(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "awq64", "awq", Grid(group_size=64))


@pytest.fixture
def gptq128(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "gptq128", "gptq", Grid(group_size=128, symmetric=True))


@pytest.mark.parametrize(
    "accepted",
    [
        {"backend": "vllm"},
        {"backend": "vllm", "device": "cpu"},
        {"backend": "sglang"},
        {"backend": "lmdeploy", "engine_args": ("--backend", "pytorch")},
        {"backend": "vllm", "version": "emulator", "device": "cpu"},
    ],
)
def test_what_the_engine_loads_passes(accepted: dict[str, Any], awq64: Path) -> None:
    check_checkpoint(spec(awq64, **accepted))


@pytest.mark.parametrize(
    ("refused", "words"),
    [
        ({"backend": "lmdeploy"}, "group_size is 64, allowed: 128 .*--engine-arg=--backend --engine-arg=pytorch"),
        ({"backend": "lmdeploy", "version": "emulator", "device": "cpu"}, "lmdeploy-turbomind on cuda does not load"),
        ({"backend": "sglang", "device": "cpu"}, "SGLang on the CPU serves unquantized .*; taken by .*vllm"),
    ],
)
def test_what_it_does_not_load_is_refused_with_a_way_out(refused: dict[str, Any], words: str, awq64: Path) -> None:
    with pytest.raises(UnsupportedSpec, match=words):
        check_checkpoint(spec(awq64, **refused))


def test_adapters_on_lmdeploy_need_its_pytorch_engine(gptq128: Path) -> None:
    with pytest.raises(UnsupportedSpec, match=r"lmdeploy-pytorch .*no GPTQ checkpoint.*add --adapter-slots 0"):
        check_checkpoint(spec(gptq128, backend="lmdeploy"))
    check_checkpoint(spec(gptq128, backend="lmdeploy", adapter_slots=0))


def test_a_truncated_shard_is_found_before_the_engine_finds_it(awq64: Path) -> None:
    shard = awq64 / "model.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(UnsupportedSpec, match="truncated"):
        check_checkpoint(spec(awq64))


def test_what_no_rule_covers_is_left_to_the_engine(tmp_path: Path) -> None:
    plain = write_plain(tmp_path / "plain")
    check_checkpoint(spec(plain))
    (plain / "config.json").write_text(json.dumps({"quantization_config": {"quant_method": "fp8"}}))
    check_checkpoint(spec(plain))
    check_checkpoint(spec(tmp_path / "nowhere"))
