"""What adapter_config.json and the tensors may say: each unsupported kind has its own refusal."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from gateway.adapters.shapes import UnknownBase, read_base
from gateway.errors import GatewayError
from tests.support.archives import files_of, tar_of, zip_of
from tests.support.checkpoints import write_checkpoint
from tests.support.peft_files import ATTENTION, MLP, TINY, Adapter, write_adapter
from tests.unit.adapters.conftest import Intake


def upload(intake: Intake, folder: Path) -> Any:
    return intake(*files_of(folder))


def refusal(intake: Intake, folder: Path) -> GatewayError:
    with pytest.raises(GatewayError) as caught:
        upload(intake, folder)
    assert intake.left() == []
    return caught.value


def adapter(tmp_path: Path, **config: Any) -> Path:
    return write_adapter(tmp_path / "adapter", TINY, Adapter(config=config))


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"peft_type": "IA3"}, ["'IA3'", "merge_and_unload"]),
        ({"peft_type": None}, ["None"]),
        ({"use_dora": True}, ["DoRA", "gateway adapters merge"]),
        ({"bias": "lora_only"}, ["bias='none'"]),
        ({"lora_bias": True}, ["lora_bias=False"]),
        ({"modules_to_save": ["lm_head"]}, ["modules_to_save", "lm_head", "gateway adapters merge"]),
        ({"trainable_token_indices": [1]}, ["trainable_token_indices"]),
        ({"layer_replication": [[0, 1]]}, ["layer_replication"]),
        ({"target_parameters": ["experts.gate_up_proj"]}, ["target_parameters", "target_modules"]),
        ({"alora_invocation_tokens": [5]}, ["alora_invocation_tokens"]),
        ({"megatron_config": {"a": 1}}, ["megatron_config"]),
        ({"use_qalora": True}, ["use_qalora"]),
        ({"use_next_years_trick": True}, ["use_next_years_trick"]),
        ({"init_lora_weights": "pissa_niter_16"}, ["path_initial_model_for_weight_conversion"]),
        ({"init_lora_weights": "olora"}, ["olora"]),
        ({"init_lora_weights": "corda"}, ["corda"]),
        ({"init_lora_weights": "loftq"}, ["loftq"]),
        ({"rank_pattern": {"(a+)+": 4}}, ["(a+)+"]),
        ({"alpha_pattern": {"*": 4}}, ["no regular expression"]),
        ({"alpha_pattern": {f"{i}.*": 4 for i in range(17)}}, ["more than 16 with a '*'"]),
    ],
    ids=str,
)
def test_unsupported_kinds(intake: Intake, tmp_path: Path, config: dict[str, Any], words: list[str]) -> None:
    error = refusal(intake, adapter(tmp_path, **config))
    assert error.code == "unsupported_adapter"
    assert all(word in error.message for word in words), error.message


@pytest.mark.parametrize("init", [True, False, None, "gaussian", "orthogonal", "eva"])
def test_harmless_initialisations(intake: Intake, tmp_path: Path, init: bool | str | None) -> None:
    assert upload(intake, adapter(tmp_path, init_lora_weights=init)).rank == 8


@pytest.mark.parametrize("value", ["8", 8.5, None, True, 10**30])
def test_rank_of_a_wrong_type(intake: Intake, tmp_path: Path, value: Any) -> None:
    assert refusal(intake, adapter(tmp_path, r=value)).code in ("bad_config", "rank_too_high")


@pytest.mark.parametrize("value", [10**400, 1e7, "2"])
def test_alpha_that_is_no_sensible_number(intake: Intake, tmp_path: Path, value: Any) -> None:
    assert refusal(intake, adapter(tmp_path, lora_alpha=value)).code == "bad_config"


@pytest.mark.parametrize("value", [0, -1])
def test_rank_that_is_not_positive(intake: Intake, tmp_path: Path, value: int) -> None:
    assert refusal(intake, adapter(tmp_path, r=value)).code == "bad_config"


def test_rank_above_the_limit(intake: Intake, tmp_path: Path) -> None:
    error = refusal(intake, write_adapter(tmp_path / "adapter", TINY, Adapter(rank=32)))
    assert error.code == "rank_too_high"
    assert "--max-adapter-rank 32" in error.message


def test_a_pattern_counts_for_the_rank(intake: Intake, tmp_path: Path) -> None:
    assert refusal(intake, adapter(tmp_path, rank_pattern={"q_proj": 64})).code == "rank_too_high"


def test_rank_pattern_is_read(intake: Intake, tmp_path: Path) -> None:
    folder = adapter(tmp_path, rank_pattern={"q_proj": 4})
    change(folder, lambda name, value: halve_rank(name, value) if "q_proj" in name else value)
    assert upload(intake, folder).rank == 8


def change(folder: Path, edit: Callable[[str, Any], Any]) -> None:
    """Rewrite the tensors; `edit` returns the new value, or None to drop one."""
    path = folder / "adapter_model.safetensors"
    edited = {name: edit(name, value) for name, value in load_file(path).items()}
    save_file({name: value for name, value in edited.items() if value is not None}, path)


def halve_rank(name: str, value: Any) -> Any:
    return np.ascontiguousarray(value[:4] if "lora_A" in name else value[:, :4])


def test_rank_that_the_config_does_not_say(intake: Intake, tmp_path: Path) -> None:
    folder = adapter(tmp_path)
    change(folder, halve_rank)
    error = refusal(intake, folder)
    assert error.code == "rank_mismatch"
    assert "lora_A.weight has shape [4, 16], tiny needs [8, 16]" in error.message


@pytest.mark.parametrize(("hidden", "head_dim"), [(64, 32), (8, 4)], ids=["larger", "smaller"])
def test_another_base(intake: Intake, tmp_path: Path, hidden: int, head_dim: int) -> None:
    other = dataclasses.replace(TINY, hidden=hidden, head_dim=head_dim)
    folder = write_adapter(tmp_path / "adapter", other, Adapter(), base="acme/other-model")
    error = refusal(intake, folder)
    assert error.code == "wrong_base"
    assert f"lora_A.weight has shape [8, {hidden}], tiny needs [8, 16]" in error.message
    assert "acme/other-model" in error.message


def test_outputs_of_another_base(intake: Intake, tmp_path: Path) -> None:
    folder = write_adapter(tmp_path / "adapter", dataclasses.replace(TINY, intermediate=64), Adapter(targets=MLP))
    error = refusal(intake, folder)
    assert error.code == "wrong_base"
    assert "[64, 8], tiny needs [32, 8]" in error.message or "[8, 64], tiny needs [8, 32]" in error.message


def test_more_layers_than_the_base(intake: Intake, tmp_path: Path) -> None:
    error = refusal(intake, write_adapter(tmp_path / "adapter", dataclasses.replace(TINY, layers=2)))
    assert error.code == "wrong_base"
    assert "model.layers.1.self_attn" in error.message


def test_another_name_of_the_base_is_only_told(intake: Intake, tmp_path: Path) -> None:
    accepted = upload(intake, write_adapter(tmp_path / "adapter", base="/home/me/checkpoint"))
    assert accepted.metadata == {"gate": "none", "trained_on": "/home/me/checkpoint"}


@pytest.mark.parametrize("side", ["lora_A", "lora_B"])
def test_half_a_pair(intake: Intake, tmp_path: Path, side: str) -> None:
    folder = adapter(tmp_path)
    change(folder, lambda name, value: None if "q_proj" in name and side in name else value)
    error = refusal(intake, folder)
    assert (error.code, f"no {side}" in error.message) == ("bad_weights", True)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_values_that_are_not_finite(intake: Intake, tmp_path: Path, value: float, dtype: type) -> None:
    folder = adapter(tmp_path)

    def poison(name: str, tensor: Any) -> Any:
        tensor = tensor.astype(dtype)
        if "v_proj.lora_B" in name:
            tensor[-1, -1] = value
        return tensor

    change(folder, poison)
    error = refusal(intake, folder)
    assert (error.code, "v_proj.lora_B" in error.message) == ("bad_weights", True)


def bfloat16(folder: Path, bits: int) -> None:
    """Rewrite the weights as BF16 that all have these bits; numpy has no such type, so the file is put together."""
    path = folder / "adapter_model.safetensors"
    header, data = {}, b""
    for name, value in load_file(path).items():
        encoded = np.full(value.shape, bits, np.uint16).tobytes()
        header[name] = {
            "dtype": "BF16",
            "shape": value.shape,
            "data_offsets": [len(data), len(data) + len(encoded)],
        }
        data += encoded
    encoded = json.dumps(header).encode()
    path.write_bytes(len(encoded).to_bytes(8, "little") + encoded + data)


@pytest.mark.parametrize(("bits", "fits"), [(0x3F80, True), (0x7F80, False), (0xFFC0, False)])
def test_bfloat16(intake: Intake, tmp_path: Path, bits: int, fits: bool) -> None:
    folder = adapter(tmp_path)
    bfloat16(folder, bits)
    if fits:
        assert upload(intake, folder).rank == 8
    else:
        assert refusal(intake, folder).code == "bad_weights"


@pytest.mark.parametrize("dtype", [np.int32, np.float64])
def test_other_dtypes(intake: Intake, tmp_path: Path, dtype: type) -> None:
    folder = adapter(tmp_path)
    change(folder, lambda _, value: value.astype(dtype))
    error = refusal(intake, folder)
    assert (error.code, "BF16" in error.message) == ("bad_weights", True)


@pytest.mark.parametrize(
    "name", ["base_model.model.lm_head.weight", "base_model.model.model.embed_tokens.lora_embedding_A", "whatever"]
)
def test_tensors_that_engines_skip(intake: Intake, tmp_path: Path, name: str) -> None:
    folder = adapter(tmp_path)
    path = folder / "adapter_model.safetensors"
    save_file(load_file(path) | {name: np.ones((2, 2), np.float32)}, path)
    error = refusal(intake, folder)
    assert (error.code, name in error.message) == ("unsupported_adapter", True)


@pytest.mark.parametrize("keep", [0, 4, 100, 3000])
def test_truncated_weights(intake: Intake, tmp_path: Path, keep: int) -> None:
    folder = adapter(tmp_path)
    path = folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    assert refusal(intake, folder).code == "bad_weights"


def test_no_tensors(intake: Intake, tmp_path: Path) -> None:
    folder = adapter(tmp_path)
    change(folder, lambda _, __: None)
    assert refusal(intake, folder).code == "bad_weights"


@pytest.mark.parametrize("layout", ["plain", "awq", "gptq", "compressed-tensors"])
@pytest.mark.parametrize("shards", [1, 3])
def test_shapes_of_quantized_and_sharded_bases(tmp_path: Path, layout: str, shards: int) -> None:
    base = read_base(write_checkpoint(tmp_path / layout, TINY, layout=layout, shards=shards), "tiny")
    found = {name.rpartition(".")[2]: size for name, size in base.modules.items()}
    assert found == {module: TINY.in_out(module) for module in (*ATTENTION, *MLP)}


def test_base_whose_names_have_wrappers(make_intake: Callable[..., Intake], tmp_path: Path) -> None:
    folder = adapter(tmp_path)
    change(folder, lambda _, value: value)
    path = folder / "adapter_model.safetensors"
    renamed = {name.replace(".model.model.", ".model.model.language_model."): v for name, v in load_file(path).items()}
    save_file(renamed, path)
    assert upload(make_intake(), folder).target_modules == ("k_proj", "o_proj", "q_proj", "v_proj")


def test_base_without_weights(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UnknownBase, match="no safetensors weights"):
        read_base(tmp_path, "tiny")


def test_base_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UnknownBase, match="cannot be read"):
        read_base(tmp_path / "nothing", "tiny")


@pytest.mark.parametrize("prefix", ["", "./", "my-adapter/", "a/b/"])
@pytest.mark.parametrize("pack", [zip_of, tar_of, lambda files: tar_of(files, "w")], ids=["zip", "tar.gz", "tar"])
def test_archives_of_a_directory(intake: Intake, tmp_path: Path, pack: Callable[..., bytes], prefix: str) -> None:
    files = [(prefix + name, contents) for name, contents in files_of(adapter(tmp_path))]
    files += [(prefix + "README.md", b"hello"), (prefix + "checkpoint-5/adapter_config.json", b"{}")]
    accepted = intake(("anything", pack(files)))
    assert sorted(path.name for path in accepted.stored.path.iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    assert len(accepted.metadata["skipped_files"]) == 2
    assert {name.split("/")[0] for name in intake.left()} == {"adapters"}


def test_layout_of_the_config_does_not_change_the_identity(intake: Intake, tmp_path: Path) -> None:
    folder = adapter(tmp_path)
    first = upload(intake, folder)
    values = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(dict(reversed(values.items()))))
    assert upload(intake, folder).stored == first.stored
    change(folder, lambda _, value: value * 2)
    assert upload(intake, folder).stored.content_id != first.stored.content_id
