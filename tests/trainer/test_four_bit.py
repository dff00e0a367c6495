"""Adapters on a base of four bits: the same as on the dense weights that it stands for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="needs torch")

from safetensors.torch import load_file, save_file  # noqa: E402

from quant.config import Grid  # noqa: E402
from quant.pack import QuantizedLinear, pack  # noqa: E402
from tests.trainer.models import make_checkpoint  # noqa: E402
from tests.trainer.test_numerics import CPU, gradients, make_learner, random_sequences  # noqa: E402
from trainer.errors import ModelError  # noqa: E402
from trainer.objectives import Sft  # noqa: E402
from trainer.pack import pack_sequences  # noqa: E402

SETTINGS: dict[str, dict[str, Any]] = {
    "awq": {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"},
    "gptq": {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False, "sym": True},
    "compressed-tensors": {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": {"num_bits": 4, "group_size": 32}}},
    },
}


def make_pair(directory: Path, form: str) -> tuple[Path, Path]:
    """A packed checkpoint, and the plain one with the same weights."""
    packed, dense = directory / "packed", make_checkpoint(directory / "dense", family="qwen3")
    weights = load_file(dense / "model.safetensors")
    stored, generator = dict(weights), torch.Generator().manual_seed(0)
    for name in [name for name in weights if name.endswith("_proj.weight")]:
        outputs, inputs = weights[name].shape
        symmetric = form != "awq"
        zeros = torch.full((outputs, inputs // 32), 8) if symmetric else torch.randint(1, 15, (outputs, inputs // 32))
        linear = QuantizedLinear(
            torch.randint(0, 16, (outputs, inputs), generator=generator).to(torch.uint8),
            (torch.rand(outputs, inputs // 32, generator=generator) * 0.05 + 0.01).half(),
            zeros.to(torch.uint8),
            Grid(bits=4, group_size=32, symmetric=symmetric),
        )
        weights[name] = linear.dequantize()
        del stored[name]
        stored |= {name.removesuffix("weight") + leaf: tensor for leaf, tensor in pack(linear, form).items()}
    save_file(weights, dense / "model.safetensors", metadata={"format": "pt"})
    packed.mkdir()
    for file in dense.iterdir():
        if file.suffix != ".safetensors":
            (packed / file.name).write_bytes(file.read_bytes())
    save_file({name: tensor.contiguous() for name, tensor in stored.items()}, packed / "model.safetensors")
    settings = json.loads((packed / "config.json").read_text())
    (packed / "config.json").write_text(json.dumps(settings | {"quantization_config": SETTINGS[form]}))
    return packed, dense


@pytest.mark.parametrize("form", SETTINGS)
def test_loss_and_gradients_equal_those_on_the_dense_weights(tmp_path: Path, form: str) -> None:
    packed, dense = (make_learner(path) for path in make_pair(tmp_path, form))
    batch = pack_sequences(random_sequences((20, 33)), CPU)
    losses = [learner.forward_backward(batch, Sft(), 10.0)["loss"] for learner in (packed, dense)]
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-6, atol=1e-6)
    expected = gradients(dense)
    for name, gradient in gradients(packed).items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(packed.reference(batch), dense.reference(batch))


def test_a_quantization_that_cannot_be_trained_on_is_refused(tmp_path: Path) -> None:
    packed, _ = make_pair(tmp_path, "gptq")
    settings = json.loads((packed / "config.json").read_text())
    for wrong, message in (({"bits": 8}, "8 bits"), ({"quant_method": "fp8"}, "'fp8'")):
        quantization = settings["quantization_config"] | wrong
        (packed / "config.json").write_text(json.dumps(settings | {"quantization_config": quantization}))
        with pytest.raises(ModelError, match=message):
            make_learner(packed)
    (packed / "config.json").write_text(json.dumps(settings))
    weights = load_file(packed / "model.safetensors")
    name = next(name for name in weights if name.endswith("g_idx"))
    save_file(weights | {name: weights[name].flip(0)}, packed / "model.safetensors")
    with pytest.raises(ModelError, match="activation order"):
        make_learner(packed)
    packed, _ = make_pair(tmp_path / "other", "compressed-tensors")
    weights = load_file(packed / "model.safetensors")
    scale = next(name for name in weights if name.endswith("weight_scale"))
    groups = weights[scale].shape[1]
    order = torch.arange(groups * 32, dtype=torch.int32).flip(0) // 32
    save_file(weights | {scale.replace("weight_scale", "weight_g_idx"): order}, packed / "model.safetensors")
    with pytest.raises(ModelError, match="activation order"):
        make_learner(packed)
