"""Whole jobs on tiny models: every family, format and method; kills, broken inputs, full disks."""

from __future__ import annotations

import json
import resource
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from safetensors.torch import load_file, save_file  # noqa: E402

from quant import workspace as workspace_module  # noqa: E402
from quant.checkpoint import Checkpoint  # noqa: E402
from quant.choice import group_size_for  # noqa: E402
from quant.config import Grid, QuantOptions, default_symmetric  # noqa: E402
from quant.convert import convert  # noqa: E402
from quant.errors import BadCheckpoint, JobConflict, UnsupportedModel  # noqa: E402
from quant.evaluate import evaluate  # noqa: E402
from quant.rules import judge, read_facts  # noqa: E402
from quant.verify import round_trip  # noqa: E402
from quant.walk import Progress, quantize_checkpoint  # noqa: E402

from .conftest import FAMILIES  # noqa: E402

CPU = torch.device("cpu")
TOKENS_BT = torch.randint(3, 200, (4, 32), generator=torch.Generator().manual_seed(9))


def options_for(model: Path, **changes: Any) -> QuantOptions:
    form = changes.pop("format", "awq")
    grid = changes.pop("grid", Grid(group_size=32, symmetric=default_symmetric(form)))
    return QuantOptions(model=model, format=form, grid=grid, calib_samples=8, calib_tokens=32, **changes)


def job(
    options: QuantOptions, out: Path, on_progress: Callable[[Progress], None] = lambda step: None
) -> dict[str, Any]:
    return quantize_checkpoint(options, out, on_progress)


@pytest.mark.parametrize("method", ["rtn", "awq", "gptq"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_and_method(family: str, method: str, model_of: Callable[[str], Path], tmp_path: Path) -> None:
    model, out = model_of(family), tmp_path / "out"
    report = job(options_for(model, method=method), out)
    facts = read_facts(out)
    per_layer = 4 + (24 if family == "qwen3_moe" else 3)
    assert len(facts.linears) == round_trip(out) == 2 * per_layer
    assert {linear["method"] for layer in report["layers"] for linear in layer["linears"]} <= {method, "rtn"}
    quality = evaluate(model, out, TOKENS_BT, CPU)
    assert 0 < quality.kl_nats < 0.3
    assert not out.with_name("out.partial").exists()
    assert (out / "tokenizer.json").is_file()
    assert json.loads((out / "config.json").read_text())["quantization_config"]["quant_method"] == "awq"


@pytest.mark.parametrize(("form", "bits"), [("awq", 4), ("gptq", 4), ("gptq", 8), ("compressed-tensors", 8)])
def test_every_format_loads_as_the_engines_dequantize_it(
    form: Any, bits: Any, model_of: Callable[[str], Path], tmp_path: Path
) -> None:
    """What `evaluate` measures is what is on disk; eight bits are nearly free."""
    model, out = model_of("qwen3"), tmp_path / "out"
    job(options_for(model, format=form, grid=Grid(bits=bits, group_size=32, symmetric=form != "awq")), out)
    assert evaluate(model, out, TOKENS_BT, CPU).kl_nats < (0.001 if bits == 8 else 0.15)


def test_folds_alone_change_nothing(model_of: Callable[[str], Path], tmp_path: Path) -> None:
    """With eight bits AWQ's moved scales leave the model as it was, in every family: the folds are exact."""
    moved = 0
    for family in FAMILIES:
        model, out = model_of(family), tmp_path / family
        grid = Grid(bits=8, group_size=32, symmetric=True)
        job(options_for(model, method="awq", format="compressed-tensors", grid=grid), out)
        changed = load_file(out / "model-00001.safetensors")["model.layers.0.input_layernorm.weight"]
        original = Checkpoint(model).tensors(["model.layers.0.input_layernorm.weight"]).popitem()[1]
        moved += not torch.equal(changed, original)
        assert evaluate(model, out, TOKENS_BT, CPU).kl_nats < 0.002, family
    assert moved >= 5


@pytest.mark.parametrize("method", ["awq", "gptq"])
def test_unreached_experts_are_quantized_and_listed(
    method: str, model_of: Callable[[str], Path], tmp_path: Path
) -> None:
    options = options_for(model_of("qwen3_moe"), method=method).model_copy(
        update={"calib_samples": 1, "calib_tokens": 8}
    )
    report = job(options, tmp_path / "out")
    linears = [linear for layer in report["layers"] for linear in layer["linears"]]
    unreached = [linear for linear in linears if linear["tokens"] == 0]
    assert unreached
    assert all("no calibration token reached this expert" in linear["note"] for linear in unreached)
    assert len(linears) == 2 * 28


def test_layers_that_do_not_divide_are_left_alone_and_listed(model_of: Callable[[str], Path], tmp_path: Path) -> None:
    """192 inputs of down_proj do not divide by 128; the rest does."""
    model, out = model_of("llama"), tmp_path / "out"
    report = job(options_for(model, grid=Grid(group_size=128)), out)
    assert report["skipped"]["model.layers.1.mlp.down_proj"] == "its 192 inputs are not divisible by group size 128"
    left = json.loads((out / "config.json").read_text())["quantization_config"]["modules_to_not_convert"]
    assert left == ["lm_head", "model.layers.0.mlp.down_proj", "model.layers.1.mlp.down_proj"]
    assert "model.layers.0.mlp.down_proj" not in read_facts(out).linears
    assert evaluate(model, out, TOKENS_BT, CPU).kl_nats < 0.15


def test_a_checkpoint_of_sizes_that_fit_is_taken_by_every_engine_that_reads_its_format(
    model_of: Callable[[str], Path], tmp_path: Path
) -> None:
    """Groups of 128 for TurboMind, chosen by themselves."""
    model = model_of("wide")
    assert group_size_for(model) == 128
    grid = Grid(group_size=128, symmetric=True)
    job(options_for(model, format="gptq", grid=grid), tmp_path / "gptq")
    for form in ("awq", "compressed-tensors"):
        convert(tmp_path / "gptq", form, tmp_path / form)
    for form in ("awq", "gptq", "compressed-tensors"):
        taking = {verdict.engine for verdict in judge(read_facts(tmp_path / form)) if verdict.outcome == "accepted"}
        assert taking >= {"vllm", "sglang", "lmdeploy-turbomind"}
        assert ("lmdeploy-pytorch" in taking) == (form == "awq")


def test_skipping_one_linear_skips_those_fused_with_it(model_of: Callable[[str], Path], tmp_path: Path) -> None:
    report = job(options_for(model_of("llama"), skip=(r"layers\.0\..*k_proj",)), tmp_path / "out")
    assert report["skipped"]["model.layers.0.self_attn.k_proj"] == "skipped by request"
    assert "k_proj" in report["skipped"]["model.layers.0.self_attn.q_proj"]
    assert "model.layers.1.self_attn.q_proj" not in report["skipped"]


class Killed(BaseException):
    """Stands for a kill: nothing may catch it."""


@pytest.mark.parametrize("method", ["awq", "gptq"])
def test_a_killed_job_resumes_to_the_same_checkpoint(
    method: Any, model_of: Callable[[str], Path], tmp_path: Path
) -> None:
    options, whole, out = options_for(model_of("llama"), method=method), tmp_path / "whole", tmp_path / "out"
    job(options, whole)

    def kill(step: Progress) -> None:
        raise Killed

    with pytest.raises(Killed):
        job(options, out, kill)
    assert not out.exists()
    steps: list[Progress] = []
    job(options, out, steps.append)
    assert [step.resumed for step in steps] == [True, False]
    for name in ("model-00001.safetensors", "model-00002.safetensors", "model-00003.safetensors"):
        assert (out / name).read_bytes() == (whole / name).read_bytes()
    assert sorted(path.name for path in out.iterdir()) == sorted(path.name for path in whole.iterdir())


def test_unfinished_work_of_another_job_is_not_mixed_in(model_of: Callable[[str], Path], tmp_path: Path) -> None:
    def kill(step: Progress) -> None:
        raise Killed

    with pytest.raises(Killed):
        job(options_for(model_of("llama")), tmp_path / "out", kill)
    with pytest.raises(JobConflict, match="different job"):
        job(options_for(model_of("llama"), method="awq"), tmp_path / "out")


def test_a_full_disk_keeps_what_is_finished(
    model_of: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A limit on a file's size stands for the disk: the write of the second shard really fails half way."""
    write, limits = workspace_module.save_file, resource.getrlimit(resource.RLIMIT_FSIZE)
    tries: list[str] = []

    def fill_up(tensors: dict[str, Any], file: Path, **rest: Any) -> None:
        tries.append(file.name)
        first = file.name.startswith("model-00002") and tries.count(file.name) == 1
        size_bytes = 20_000 if first else limits[0]
        resource.setrlimit(resource.RLIMIT_FSIZE, (size_bytes, limits[1]))
        try:
            write(tensors, file, **rest)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    monkeypatch.setattr(workspace_module, "save_file", fill_up)
    options, out = options_for(model_of("llama")), tmp_path / "out"
    with pytest.raises(OSError, match=r"model-00002\.safetensors\.tmp cannot be written"):
        job(options, out)
    assert not out.exists()
    steps: list[Progress] = []
    job(options, out, steps.append)
    assert [step.resumed for step in steps] == [True, False]
    assert round_trip(out) == 14


def test_a_finished_shard_that_was_damaged_since_is_named(model_of: Callable[[str], Path], tmp_path: Path) -> None:
    def kill(step: Progress) -> None:
        raise Killed

    options, out = options_for(model_of("llama")), tmp_path / "out"
    with pytest.raises(Killed):
        job(options, out, kill)
    shard = tmp_path / "out.partial" / "model-00001.safetensors"
    shard.write_bytes(shard.read_bytes()[:-100])
    with pytest.raises(BadCheckpoint, match=r"model-00001\.safetensors is not what was written"):
        job(options, out)
    assert not out.exists()


def test_a_kill_before_the_last_rename_leaves_no_trace_in_the_manifest(
    model_of: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def kill(directory: Path) -> None:
        raise Killed

    options, out = options_for(model_of("llama")), tmp_path / "out"
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(workspace_module, "sync_directory", kill)
        job(options, out)
    assert (tmp_path / "out.partial" / "manifest.json").is_file()
    job(options, out)
    described = json.loads((out / "manifest.json").read_text())["files"]
    assert described.keys() == {file.name for file in out.iterdir()} - {"manifest.json"}
    for name, found in described.items():
        assert found["sha256"] == workspace_module.sync_and_hash(out / name)


def test_an_existing_output_is_never_overwritten(model_of: Callable[[str], Path], tmp_path: Path) -> None:
    with pytest.raises(JobConflict, match="exists already"):
        job(options_for(model_of("llama")), tmp_path)


def test_a_quantized_model_is_refused(model_of: Callable[[str], Path], tmp_path: Path) -> None:
    job(options_for(model_of("llama")), tmp_path / "once")
    with pytest.raises(UnsupportedModel, match="already quantized"):
        job(options_for(tmp_path / "once"), tmp_path / "twice")


def copy_of(model: Path, to: Path) -> Path:
    return Path(shutil.copytree(model, to))


def test_a_truncated_shard_is_named(model_of: Callable[[str], Path], tmp_path: Path) -> None:
    model = copy_of(model_of("llama"), tmp_path / "model")
    shard = model / "model.safetensors"
    shard.write_bytes(shard.read_bytes()[:-100])
    with pytest.raises(BadCheckpoint, match=r"model\.safetensors is .* truncated"):
        job(options_for(model), tmp_path / "out")
    assert not (tmp_path / "out.partial").exists()


def test_weights_that_are_not_finite_are_named(model_of: Callable[[str], Path], tmp_path: Path) -> None:
    model = copy_of(model_of("llama"), tmp_path / "model")
    tensors = load_file(model / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = float("nan")
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(BadCheckpoint, match=r"model\.layers\.1\.mlp\.up_proj\.weight holds NaN"):
        job(options_for(model), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_unknown_structure_is_refused(model_of: Callable[[str], Path], tmp_path: Path) -> None:
    model = copy_of(model_of("llama"), tmp_path / "model")
    tensors = load_file(model / "model.safetensors")
    tensors["model.layers.0.mlp.extra.weight"] = torch.zeros(4)
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UnsupportedModel, match=r"1 unknown \(model\.layers\.0\.mlp\.extra"):
        job(options_for(model), tmp_path / "out")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"model_type": "bert", "architectures": ["BertModel"]}))
    with pytest.raises(UnsupportedModel):
        job(options_for(model), tmp_path / "out")


def test_calibration_can_be_left_out(model_of: Callable[[str], Path], tmp_path: Path) -> None:
    options = options_for(model_of("llama")).model_copy(update={"calib_samples": 0})
    assert job(options, tmp_path / "out")["calibration_tokens"] == 0
    assert evaluate(model_of("llama"), tmp_path / "out", TOKENS_BT, CPU).kl_nats < 0.15
