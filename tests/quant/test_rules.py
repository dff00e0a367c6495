"""Static acceptance: configuration and headers alone decide, and the reasons name the numbers."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from quant.config import FORMATS, Format, Grid
from quant.errors import BadCheckpoint, UnsupportedModel
from quant.formats import quantization_config, read_scheme
from quant.rules import Verdict, judge, read_facts
from tests.support.quantized import SIZES, write_checkpoint

ALL = {"vllm/cuda", "vllm/cpu", "sglang/cuda", "lmdeploy-turbomind/cuda", "lmdeploy-pytorch/cuda"}


def verdicts(directory: Path, engine: str | None = None, device: str | None = None) -> dict[str, Verdict]:
    return {f"{v.engine}/{v.device}": v for v in judge(read_facts(directory), engine, device)}


def accepting(directory: Path) -> set[str]:
    return {name for name, verdict in verdicts(directory).items() if verdict.outcome != "refused"}


@pytest.mark.parametrize(
    ("form", "refusing"),
    [("awq", set()), ("gptq", {"lmdeploy-pytorch/cuda"}), ("compressed-tensors", {"lmdeploy-pytorch/cuda"})],
)
def test_who_takes_the_default_of_each_format(form: Format, refusing: set[str], tmp_path: Path) -> None:
    directory = write_checkpoint(tmp_path / "q", form, Grid(group_size=128, symmetric=form != "awq"))
    assert accepting(directory) == ALL - refusing


@pytest.mark.parametrize("form", FORMATS)
def test_turbomind_refuses_groups_of_64_and_says_so(form: Format, tmp_path: Path) -> None:
    directory = write_checkpoint(tmp_path / "q", form, Grid(group_size=64, symmetric=form != "awq"))
    (verdict,) = judge(read_facts(directory), "lmdeploy-turbomind")
    assert verdict.outcome == "refused"
    assert verdict.reasons[0].startswith("group_size is 64, allowed: ")
    assert accepting(directory) >= {"vllm/cuda", "vllm/cpu", "sglang/cuda"}


def test_a_refused_group_size_says_whether_another_would_do(tmp_path: Path) -> None:
    """The demo model's 576 inputs, and a model whose inputs 128 divides."""
    demo = {"model.layers.0.self_attn.q_proj": (576, 576), "model.layers.0.mlp.down_proj": (576, 1536)}
    for name, sizes, ending in (
        ("demo", demo, ", and 128 does not divide the 576 inputs of model.layers.0.self_attn.q_proj"),
        ("other", SIZES, ", and 128 divides all inputs: quantize with --group-size 128"),
    ):
        directory = write_checkpoint(tmp_path / name, "awq", Grid(group_size=64), sizes=sizes)
        (verdict,) = judge(read_facts(directory), "lmdeploy-turbomind")
        said = "group_size is 64, allowed: 128 (TurboMind's AWQ kernel takes groups of 128 only)"
        assert verdict.reasons == (said + ending,)


@pytest.mark.parametrize(
    ("changes", "engine", "reason"),
    [
        ({"desc_act": True}, "vllm", "desc_act is true, allowed: false"),
        ({"sym": False}, "sglang", "symmetric is false, allowed: true"),
        ({"checkpoint_format": "gptq_v2"}, "lmdeploy-turbomind", "checkpoint_format is gptq_v2"),
    ],
)
def test_gptq_variants_that_engines_refuse(changes: dict[str, Any], engine: str, reason: str, tmp_path: Path) -> None:
    directory = write_checkpoint(tmp_path / "q", "gptq", Grid(group_size=128, symmetric=True), changes)
    (verdict,) = judge(read_facts(directory), engine, "cuda")
    assert verdict.outcome == "refused"
    assert reason in verdict.reasons[0]


def test_awq_without_zero_points_is_slow_or_refused(tmp_path: Path) -> None:
    directory = write_checkpoint(tmp_path / "q", "awq", Grid(group_size=128), {"zero_point": False})
    found = verdicts(directory)
    assert found["vllm/cuda"].outcome == found["sglang/cuda"].outcome == "slow"
    assert found["lmdeploy-turbomind/cuda"].outcome == "refused"


def test_lmdeploys_pytorch_engine_takes_small_symmetric_groups_of_compressed_tensors(tmp_path: Path) -> None:
    directory = write_checkpoint(tmp_path / "q", "compressed-tensors", Grid(group_size=32, symmetric=True))
    assert accepting(directory) == ALL
    directory = write_checkpoint(tmp_path / "a", "compressed-tensors", Grid(group_size=32))
    assert "lmdeploy-pytorch/cuda" not in accepting(directory)


def test_turbomind_leaves_architectures_that_it_does_not_know_to_the_pytorch_engine(tmp_path: Path) -> None:
    directory = write_checkpoint(tmp_path / "q", "awq", Grid(group_size=128), architecture="Gemma3ForCausalLM")
    found = verdicts(directory, "lmdeploy")
    assert found["lmdeploy-turbomind/cuda"].reasons == (
        "it does not know Gemma3ForCausalLM: LMDeploy serves that by its PyTorch engine",
    )
    assert found["lmdeploy-pytorch/cuda"].outcome == "accepted"


def test_sizes_that_fall_off_the_fast_kernels(tmp_path: Path) -> None:
    """The demo model's 576 inputs on SGLang."""
    directory = write_checkpoint(
        tmp_path / "q", "awq", Grid(group_size=64), sizes={"model.layers.0.q_proj": (576, 576)}
    )
    found = verdicts(directory)
    assert found["sglang/cuda"].outcome == "slow"
    assert found["sglang/cuda"].reasons == (
        "1 linears do not divide into 64 x 128 (outputs x inputs), first model.layers.0.q_proj (576 x 576): "
        "padded, or off the fast kernels",
    )
    assert found["vllm/cuda"].outcome == "slow"
    assert "64 x 128 or 128 x 64" in found["vllm/cuda"].reasons[0]
    assert found["sglang/cpu"].outcome == "refused"
    assert found["vllm/cpu"].outcome == "accepted"
    gate_up = {"model.layers.0.gate_proj": (1536, 576)}  # of vLLM's two kinds of tile it fits the second
    directory = write_checkpoint(tmp_path / "g", "awq", Grid(group_size=64), sizes=gate_up)
    assert verdicts(directory)["vllm/cuda"].outcome == "accepted"


def test_sizes_that_kernels_do_not_take(tmp_path: Path) -> None:
    sizes = {"model.layers.0.q_proj": (40, 256)}
    directory = write_checkpoint(tmp_path / "q", "awq", Grid(group_size=64), sizes=sizes)
    found = verdicts(directory, "vllm", "cpu")["vllm/cpu"]
    assert found.reasons == ("1 linears have outputs not divisible by 32, first model.layers.0.q_proj (40)",)


def test_tensors_that_contradict_the_configuration(tmp_path: Path) -> None:
    directory = write_checkpoint(tmp_path / "q", "awq", Grid(group_size=64))
    config = {"quantization_config": quantization_config("awq", Grid(group_size=128), [])}
    (directory / "config.json").write_text(json.dumps(config))
    with pytest.raises(BadCheckpoint, match=r"qzeros is \[4, 32\], expected \[2, 32\]"):
        read_facts(directory)


def test_broken_files_are_named(tmp_path: Path) -> None:
    directory = write_checkpoint(tmp_path / "q", "awq", Grid(group_size=64))
    shard = directory / "model.safetensors"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-1])
    with pytest.raises(BadCheckpoint, match="truncated"):
        read_facts(directory)
    shard.write_bytes(b"GGUFGGUF" + whole)
    with pytest.raises(BadCheckpoint, match="not a safetensors file"):
        read_facts(directory)
    shard.unlink()
    with pytest.raises(BadCheckpoint, match=r"no \*\.safetensors"):
        read_facts(directory)


@pytest.mark.parametrize("header", [b"[]", b'{"a": {"dtype": "BF16"}}', b'{"a": 3}', b'{"a": {"data_offsets": []}}'])
def test_a_header_that_describes_no_tensors_is_named(header: bytes, tmp_path: Path) -> None:
    directory = write_checkpoint(tmp_path / "q", "awq", Grid(group_size=64))
    (directory / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(BadCheckpoint, match=r"model\.safetensors has a header that describes no tensors"):
        read_facts(directory)


@pytest.mark.parametrize("weight_map", [[], {"a": None}, "model.safetensors"])
def test_an_index_that_names_no_files_is_named(weight_map: Any, tmp_path: Path) -> None:
    directory = write_checkpoint(tmp_path / "q", "awq", Grid(group_size=64))
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(BadCheckpoint, match="does not say which file each tensor is in"):
        read_facts(directory)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"quant_method": "bitsandbytes"}, "quant_method is 'bitsandbytes'; allowed: awq"),
        ({"quant_method": "gptq", "bits": 3, "group_size": 128}, "bits is 3"),
        ({"quant_method": "gptq", "bits": 4, "dynamic": {"-:a": {}, "+:b": {"bits": 8}}}, "'.:b' a grid of its own"),
        ({"quant_method": "awq", "bits": 4, "group_size": -1}, "group_size -1"),
        ({"quant_method": "compressed-tensors", "config_groups": {}}, "0 groups"),
        ({"quant_method": "compressed-tensors", "config_groups": {"g": {"format": "float-quantized"}}}, "'float-"),
    ],
)
def test_unknown_schemes_say_what_is_known(config: dict[str, Any], message: str) -> None:
    with pytest.raises(UnsupportedModel, match=message):
        read_scheme(config)


def test_old_awq_spelling_is_read() -> None:
    scheme = read_scheme({"quant_method": "awq", "w_bit": 4, "q_group_size": 128, "version": "GEMM"})
    assert scheme.grid == Grid(bits=4, group_size=128)


def test_static_parts_import_no_torch() -> None:
    code = "import sys, quant.cli, quant.rules; assert not {'torch', 'transformers', 'safetensors'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
