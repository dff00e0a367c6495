"""The canonical form computes what the original computes, and engines cannot read it in two ways."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from gateway.adapters import floats
from gateway.adapters.canonical import canonicalise
from gateway.adapters.intake import Accepted
from gateway.adapters.manifest import parse_config
from gateway.adapters.tensors import Tensor, read_header
from gateway.errors import PayloadTooLarge
from tests.support.archives import files_of
from tests.support.peft_files import TINY, Adapter, write_adapter
from tests.unit.adapters.conftest import Intake

MODULE = "base_model.model.model.layers.0.self_attn."
ULP = {"F32": 2.0**-24, "F16": 2.0**-11, "BF16": 2.0**-8}  # the most that one rounding changes a number by
KINDS: dict[str, dict[str, Any]] = {
    "rslora": {"use_rslora": True},
    "alpha": {"alpha_pattern": {"q_proj": 3.0, "layers.0.self_attn.v_proj": 50}},
    "rank": {"rank_pattern": {"q_proj": 3, "k_.*": 1}},
    "all": {"use_rslora": True, "rank_pattern": {"q_proj": 3}, "alpha_pattern": {"q_proj": 7, "o_proj": 1}},
    "patterns that match nothing": {"rank_pattern": {"proj": 2}, "alpha_pattern": {"q": 2}},
}


def write(folder: Path, dtype: str, **config: Any) -> Path:
    """An adapter of rank 8, with the ranks that its rank_pattern says."""
    write_adapter(folder, TINY, Adapter(config=config))
    path = folder / "adapter_model.safetensors"
    ranks = {"q_proj": 3, "k_proj": 1} if "k_.*" in config.get("rank_pattern", {}) else {}
    if config.get("rank_pattern") == {"q_proj": 3}:
        ranks = {"q_proj": 3}
    tensors = {}
    for name, value in load_file(path).items():
        rank = ranks.get(name.split(".")[-3], 8)
        tensors[name] = np.ascontiguousarray(value[:rank] if "lora_A" in name else value[:, :rank])
    save(path, tensors, dtype)
    return folder


def save(path: Path, tensors: dict[str, Any], dtype: str) -> None:
    """numpy knows no BF16, so the file is put together by hand."""
    header, data = {}, b""
    for name, value in tensors.items():
        encoded = floats.encode(value.astype(np.float64), dtype)
        header[name] = {"dtype": dtype, "shape": value.shape, "data_offsets": [len(data), len(data) + len(encoded)]}
        data += encoded
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


def effects(folder: Path) -> dict[str, Any]:
    """Module -> scale * B A as an engine reads it that knows alpha / r alone."""
    config = json.loads((folder / "adapter_config.json").read_text())
    assert not config["use_rslora"] and not config["rank_pattern"] and not config["alpha_pattern"]
    pairs = matrices(folder)
    assert {a.shape[0] for a, _ in pairs.values()} == {config["r"]}
    return {module: config["lora_alpha"] / config["r"] * (b @ a) for module, (a, b) in pairs.items()}


def matrices(folder: Path) -> dict[str, tuple[Any, Any]]:
    path = folder / "adapter_model.safetensors"
    tensors = {name: floats.read(path, tensor).astype(np.float64) for name, tensor in read_header(path).items()}
    names = {name.removeprefix(MODULE).split(".")[0] for name in tensors}
    return {n: (tensors[f"{MODULE}{n}.lora_A.weight"], tensors[f"{MODULE}{n}.lora_B.weight"]) for n in names}


def scale(module: str, config: dict[str, Any], rank: int) -> float:
    """As peft computes it."""
    alpha = next((v for k, v in config.get("alpha_pattern", {}).items() if k.split(".")[-1] == module), 16)
    return float(alpha / (math.sqrt(rank) if config.get("use_rslora") else rank))


def take_in(intake: Intake, folder: Path) -> Accepted:
    return intake(*files_of(folder))


@pytest.mark.parametrize("dtype", ULP)
@pytest.mark.parametrize("kind", KINDS)
def test_it_computes_the_same(intake: Intake, tmp_path: Path, kind: str, dtype: str) -> None:
    folder = write(tmp_path / "adapter", dtype, **KINDS[kind])
    accepted = take_in(intake, folder)
    found = effects(accepted.stored.path)
    for module, (a, b) in matrices(folder).items():
        factor = scale(module, KINDS[kind], a.shape[0])
        # Each product of B and A is off by the one rounding of B at most, and tiny numbers by the smallest step.
        allowed = ULP[dtype] * (abs(factor * b) @ abs(a)) + 2.0**-24 * abs(a).sum(0)
        assert np.all(abs(found[module] - factor * (b @ a)) <= allowed), module
    assert accepted.rank == 8
    assert accepted.metadata["canonical"]["changes"]
    assert take_in(intake, folder).stored == accepted.stored


@pytest.mark.parametrize("kind", ["rslora", "patterns that match nothing"])
def test_one_scale_for_all_leaves_the_weights_alone(intake: Intake, tmp_path: Path, kind: str) -> None:
    folder = write(tmp_path / "adapter", "BF16", **KINDS[kind])
    stored = take_in(intake, folder).stored.path
    weights = "adapter_model.safetensors"
    assert (stored / weights).read_bytes() == (folder / weights).read_bytes()


def test_a_plain_adapter_is_not_touched(intake: Intake, tmp_path: Path) -> None:
    folder = write_adapter(tmp_path / "adapter", TINY, Adapter())
    accepted = take_in(intake, folder)
    assert "canonical" not in accepted.metadata
    for name, contents in files_of(accepted.stored.path):
        sent = dict(files_of(folder))[name]
        assert contents == sent if name.endswith(".safetensors") else json.loads(contents) == json.loads(sent)


def test_the_original_is_remembered(intake: Intake, tmp_path: Path) -> None:
    plain = take_in(intake, write_adapter(tmp_path / "plain", TINY, Adapter()))
    accepted = take_in(intake, write_adapter(tmp_path / "adapter", TINY, Adapter(config={"use_rslora": True})))
    sent = accepted.metadata["canonical"]["sent_sha256"]
    assert len(sent) == 64 and sent not in (accepted.stored.sha256, plain.stored.sha256)


def test_padding_cannot_blow_an_upload_up(tmp_path: Path) -> None:
    folder = write(tmp_path, "F32", rank_pattern={"q_proj": 3, "k_.*": 1})
    config, weights = folder / "adapter_config.json", folder / "adapter_model.safetensors"
    before = weights.read_bytes()
    with pytest.raises(PayloadTooLarge, match="highest rank, 8"):
        canonicalise(config, weights, parse_config(config), limit_bytes=4095)
    assert weights.read_bytes() == before
    canonicalise(config, weights, parse_config(config), limit_bytes=4096)


def test_a_scale_that_overflows(intake: Intake, tmp_path: Path) -> None:
    folder = write(tmp_path / "adapter", "F16", alpha_pattern={"q_proj": 1e6})
    path = folder / "adapter_model.safetensors"
    save_file({name: value + np.float16(9) for name, value in load_file(path).items()}, path)
    with pytest.raises(Exception, match=r"q_proj.lora_B.* overflows F16"):
        take_in(intake, folder)


@given(st.floats(width=32, allow_nan=False, allow_infinity=False), st.floats(-8, 8))
def test_bfloat16_is_rounded_once_to_the_nearest(value: float, factor: float) -> None:
    exact = np.float64(np.float32(value)) * factor
    bits = int.from_bytes(floats.encode(np.array([exact]), "BF16"), "little")
    found = as_float(bits)
    if not math.isfinite(found) or abs(found) < 2.0**-120:
        return
    below, above = as_float(bits - 1), as_float(bits + 1)
    distance = abs(found - exact)
    assert distance <= abs(below - exact) and distance <= abs(above - exact)
    if distance == abs(above - exact) or distance == abs(below - exact):
        assert bits % 2 == 0  # between two: the even one


def as_float(bits: int) -> float:
    return float(np.array([(bits & 0xFFFF) << 16], np.uint32).view(np.float32)[0])


def test_reading_rows(tmp_path: Path) -> None:
    values = np.arange(24, dtype=np.float32).reshape(6, 4)
    save(tmp_path / "file", {"a": values}, "BF16")
    tensor: Tensor = read_header(tmp_path / "file")["a"]
    assert np.array_equal(floats.read(tmp_path / "file", tensor), values)
    assert np.array_equal(floats.read(tmp_path / "file", tensor, 2, 3), values[2:5])
