"""Conversions keep every integer, zero point and scale, or are refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")

from quant.checkpoint import Checkpoint  # noqa: E402
from quant.config import Format, Grid, QuantOptions  # noqa: E402
from quant.convert import convert  # noqa: E402
from quant.errors import NotExact, UnsupportedModel  # noqa: E402
from quant.rules import read_facts  # noqa: E402
from quant.verify import round_trip  # noqa: E402
from quant.walk import quantize_checkpoint  # noqa: E402


def make(model: Path, form: Format, out: Path, *, bits: int = 4, symmetric: bool) -> Path:
    grid = Grid.model_validate({"bits": bits, "group_size": 32, "symmetric": symmetric})
    quantize_checkpoint(QuantOptions(model=model, format=form, grid=grid, calib_samples=0), out, lambda step: None)
    return out


def weights_of(directory: Path) -> dict[str, torch.Tensor]:
    return Checkpoint(directory).weights("model.layers.")


@pytest.mark.parametrize(
    ("first", "symmetric", "second"),
    [
        ("gptq", True, "compressed-tensors"),
        ("gptq", True, "awq"),
        ("compressed-tensors", True, "gptq"),
        ("compressed-tensors", True, "awq"),
        ("compressed-tensors", False, "awq"),
        ("awq", False, "compressed-tensors"),
        ("awq", True, "gptq"),
    ],
)
def test_no_weight_changes(
    first: Format, symmetric: bool, second: Format, model_of: Callable[[str], Path], tmp_path: Path
) -> None:
    source = make(model_of("llama"), first, tmp_path / "source", symmetric=symmetric)
    convert(source, second, tmp_path / "target")
    assert read_facts(tmp_path / "target").scheme.format == second
    assert round_trip(tmp_path / "target") == 14
    before, after = weights_of(source), weights_of(tmp_path / "target")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_there_and_back_is_the_same_file(model_of: Callable[[str], Path], tmp_path: Path) -> None:
    source = make(model_of("llama"), "gptq", tmp_path / "gptq", symmetric=True)
    convert(source, "compressed-tensors", tmp_path / "ct")
    convert(tmp_path / "ct", "gptq", tmp_path / "again")
    for shard in source.glob("*.safetensors"):
        assert (tmp_path / "again" / shard.name).read_bytes() == shard.read_bytes()


def test_what_is_not_exact_is_refused(model_of: Callable[[str], Path], tmp_path: Path) -> None:
    awq = make(model_of("llama"), "awq", tmp_path / "awq", symmetric=False)
    with pytest.raises(NotExact, match="zero points of their own; quantize the original again"):
        convert(awq, "gptq", tmp_path / "gptq")
    assert not (tmp_path / "gptq").exists()
    wide = make(model_of("llama"), "gptq", tmp_path / "wide", bits=8, symmetric=True)
    with pytest.raises(NotExact, match="4 bits, these weights have 8"):
        convert(wide, "awq", tmp_path / "narrow")
    with pytest.raises(NotExact, match="already"):
        convert(awq, "awq", tmp_path / "same")
    with pytest.raises(UnsupportedModel, match="not quantized"):
        convert(model_of("llama"), "awq", tmp_path / "plain")
