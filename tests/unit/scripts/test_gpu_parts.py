"""Pure parts of the GPU suite: the table, memory by share, the machine's GPUs, repeated answers, a nudged adapter."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from scripts.gpu_suite import machine, memory, table
from scripts.gpu_suite.probes import Repeated
from scripts.gpu_suite.quantized import FAST_KERNELS, on_fast_kernel
from scripts.gpu_suite.serving import nudged
from scripts.gpu_suite.stages import Options

GIB = 1 << 30


@pytest.fixture(scope="module")
def known() -> table.Table:
    return table.stages(Options(Path("/nowhere")))


def test_every_part_can_be_read(known: table.Table) -> None:
    assert known.broken == {}
    assert {"quant-8b-gptq", "quant-nccl", "train-speed", "train-nccl", "record-vllm"} <= known.stages.keys()


def test_stages_come_after_stages_that_exist_and_can_end_in_time(known: table.Table) -> None:
    for spec in known.stages.values():
        assert set(spec.after) <= known.stages.keys(), spec
        assert 0 < spec.estimate_s < spec.limit_s <= 900, spec
        assert spec.share == 1.0 or spec.gpus == 1 or spec.name in ("parallel-vllm", "parallel-lmdeploy"), spec


def test_names_bring_what_they_come_after(known: table.Table) -> None:
    names = [spec.name for spec in known.wanted(["switch", "main-vllm", "bench-vllm"])]
    assert names == ["oracle", "switch", "main-vllm", "weights", "bench-vllm"]
    with pytest.raises(LookupError, match="no stage is called mian"):
        known.wanted(["mian"])


def test_stages_wait_for_the_tools_that_the_command_line_names(known: table.Table) -> None:
    options = Options(Path("/out"), text=Path("/text"), peer_pythons={"trl": Path("/t"), "gptqmodel": Path("/g")})
    found = {name: list(spec.files(options)) for name, spec in known.stages.items() if spec.files(options)}
    assert found["quant-quality"] == [Path("/g"), Path("/text")]
    assert found["train-speed"] == [Path("/t")]
    assert "quant-8b-gptq" not in found


def test_on_the_cpu_stages_take_turns() -> None:
    assert {spec.share for spec in table.stages(Options(Path("/nowhere"), device="cpu")).stages.values()} == {1.0}


def test_options_reach_a_stages_process() -> None:
    options = Options(Path("/out"), flags=(("vllm", "--x"),), text=Path("/text"), peer_pythons={"trl": Path("/t")})
    assert Options.from_json(json.loads(json.dumps(options.to_json()))) == options


def gpu_of(gib: int, free_gib: int) -> machine.Gpu:
    return machine.Gpu("0", "GPU-a", "NVIDIA H200", gib * GIB, free_gib * GIB, "580.1")


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    config = {"num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3, "hidden_size": 576}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with (tmp_path / "model.safetensors").open("wb") as file:
        file.truncate(2 * GIB)
    return tmp_path


def test_a_whole_gpu_is_used_as_users_do(checkpoint: Path) -> None:
    assert memory.flags("vllm", 1.0, gpu_of(80, 80), checkpoint) == []


@pytest.mark.parametrize("gib", [80, 140])
def test_caches_leave_room_within_the_share(gib: int, checkpoint: Path) -> None:
    gpu = gpu_of(gib, gib // 2 + 2)
    cache = f"--engine-arg=--kv-cache-memory-bytes={int(0.15 * gib * GIB * 0.45)}"
    assert memory.flags("vllm", 0.15, gpu, checkpoint) == ["--memory-fraction", "0.15", cache]
    [*_, tokens] = memory.flags("sglang", 0.15, gpu, checkpoint)
    assert int(tokens.rpartition("=")[2]) * 23_040 <= 0.15 * gib * GIB / 2
    # LMDeploy: as many bytes, of the half that neighbours and its own weights leave
    assert memory.flags("lmdeploy", 0.1, gpu, checkpoint) == ["--memory-fraction", "0.090"]
    assert memory.flags("lmdeploy", 0.8, gpu, checkpoint) == ["--memory-fraction", "0.720"]
    assert memory.flags("lmdeploy", 0.9, gpu_of(gib, 3), checkpoint) == ["--memory-fraction", "0.800"]


def test_what_a_token_takes(checkpoint: Path) -> None:
    assert memory.kv_bytes_a_token(checkpoint) == 30 * 2 * 3 * 64 * 2


def test_gpus_as_the_driver_lists_them() -> None:
    listing = "0, GPU-a, NVIDIA H200, 143771, 143000, 580.1\n1, GPU-b, NVIDIA H200, 143771, 7, 580.1\n"
    found = machine.parse(listing)
    assert [gpu.memory_bytes for gpu in found] == [143771 << 20] * 2
    assert [gpu.free_bytes for gpu in found] == [143000 << 20, 7 << 20]
    assert machine.visible(found, None) == found
    assert [gpu.index for gpu in machine.visible(found, "1, GPU-a")] == ["1", "0"]
    assert machine.parse("No devices were found\n") == []


def answer(*tokens: str) -> dict[str, Any]:
    content = [{"token": token} for token in tokens]
    return {"logprobs": {"content": content}, "message": {"content": "".join(tokens)}}


def test_an_engine_that_repeats_itself_is_compared_in_full() -> None:
    own = Repeated.of([answer("a", "b")] * 10)
    assert own.distinct == 1
    assert own.allows(["a", "b"], "ab")
    assert not own.allows(["a"], "a")


def test_another_is_compared_as_far_as_it_agrees_with_itself() -> None:
    own = Repeated.of([answer("a", "b", "c"), answer("a", "x")])
    assert (own.distinct, own.agreed) == (2, ["a"])
    assert own.allows(["a", "z"], "az")
    assert not own.allows(["b"], "b")


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_nudged_adapters_are_all_others_with_the_same_numbers(tmp_path: Path, dtype: type) -> None:
    own: np.ndarray = np.linspace(1, 2, 64, dtype=dtype)
    (tmp_path / "own").mkdir()
    save_file({"x": own}, tmp_path / "own" / "adapter_model.safetensors")
    copies = [nudged(tmp_path / "own", tmp_path / f"{n}", n) for n in range(1, 10)]
    files = [copy / "adapter_model.safetensors" for copy in [tmp_path / "own", *copies]]
    assert len({file.read_bytes() for file in files}) == 10
    for file in files:
        assert np.allclose(load_file(file)["x"], own, rtol=2 * np.finfo(dtype).eps, atol=0)


def test_the_log_of_an_engine_names_its_fast_kernel() -> None:
    vllm, sglang = FAST_KERNELS["vllm"], FAST_KERNELS["sglang"]
    assert on_fast_kernel("INFO [auto_awq.py:473] Using MacheteLinearKernel for AutoAWQMarlinLinearMethod", vllm)
    assert not on_fast_kernel("INFO non-default args: {'model': '/models/awq_marlin'}", vllm)
    marlin = "The model is convertible to awq_marlin during runtime. Using awq_marlin kernel.\n"
    assert on_fast_kernel(marlin, sglang)
    plain = "Layer 'qkv_proj' is not supported by AWQMarlin. Falling back to unoptimized AWQ kernels.\n"
    assert not on_fast_kernel(marlin + plain, sglang)
