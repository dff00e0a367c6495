"""The trainer reads packed weights by code of its own: what it computes with is what is written here and served."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")

from torch.nn.functional import linear  # noqa: E402

from quant.checkpoint import Checkpoint, take_packed  # noqa: E402
from quant.config import FORMATS, Format, Grid, QuantOptions, default_symmetric  # noqa: E402
from quant.walk import quantize_checkpoint  # noqa: E402
from trainer.packed import check_settings, read_layer  # noqa: E402


@pytest.mark.parametrize("form", FORMATS)
def test_the_trainers_linear_is_the_dequantized_one_forward_and_backward(
    form: Format, model_of: Callable[[str], Path], tmp_path: Path
) -> None:
    grid = Grid(group_size=32, symmetric=default_symmetric(form))
    options = QuantOptions(model=model_of("qwen2"), format=form, grid=grid, calib_samples=0)
    quantize_checkpoint(options, tmp_path / "out", lambda step: None)
    checkpoint = Checkpoint(tmp_path / "out")
    assert checkpoint.scheme is not None
    settings = checkpoint.config["quantization_config"]
    check_settings(settings, checkpoint)
    for module in checkpoint.quantized_modules:
        stored = checkpoint.tensors(checkpoint.packed_names(module))
        layer = read_layer(
            {name.removeprefix(f"{module}."): one for name, one in stored.items()}, settings, torch.float32
        )
        weight_NK = take_packed(stored, checkpoint.scheme)[module].dequantize()
        x_TK = torch.randn(5, weight_NK.shape[1], generator=torch.Generator().manual_seed(0), requires_grad=True)
        y_TN = layer(x_TK)
        assert torch.equal(y_TN, linear(x_TK, weight_NK))
        (dx_TK,) = torch.autograd.grad(y_TN.square().sum(), x_TK)
        torch.testing.assert_close(dx_TK, 2 * y_TN.detach() @ weight_NK)
